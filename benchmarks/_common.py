"""What every benchmark writes beside its numbers: on which machine, with which versions, when."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

if str(ROOT) not in sys.path:  # benchmarks run from a checkout, installed or not
    sys.path.insert(0, str(ROOT))


def machine_line() -> str:
    """The machine in one line: processor, cores, threads that torch uses, GPU if there is one."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    parts = [processor, f"{os.cpu_count()} cores", f"{torch.get_num_threads()} torch threads", platform.system()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch, linattn and further ``packages`` (distribution names)."""
    import linattn

    found = {"python": platform.python_version(), "torch": torch.__version__, "linattn": linattn.__version__}
    return found | {name: importlib.metadata.version(name) for name in packages}


def write_results(path: Path, payload: dict[str, Any], *packages: str) -> None:
    """Write ``payload`` as JSON under a header of machine, versions (with those of ``packages``) and date."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    header = {"machine": machine_line(), "versions": versions(*packages), "date": today}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header | payload, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
