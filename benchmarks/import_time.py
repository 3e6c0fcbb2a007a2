"""What `import linattn` costs beyond `import torch`.

    python benchmarks/import_time.py [--runs 20]

Each run is a fresh interpreter that imports torch first and then times the import of linattn. The result goes to
benchmarks/results/import_time.json. The claim: a median under 0.2 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "import_time.json"
LIMIT_S = 0.2
PROBE = """
import time, torch
start = time.perf_counter()
import linattn
print(time.perf_counter() - start, torch.__version__, linattn.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="fresh interpreters to time (default 20)")
    runs = parser.parse_args().runs

    seconds = []
    for _ in range(runs + 1):
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, cwd=ROOT)
        elapsed, torch_version, linattn_version = probe.stdout.split()
        seconds.append(float(elapsed))
    seconds = seconds[1:]  # the first run may compile bytecode

    result = {
        "claim": f"import linattn takes under {LIMIT_S} s beyond torch",
        "holds": statistics.median(seconds) < LIMIT_S,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "runs": runs,
        "python": platform.python_version(),
        "torch": torch_version,
        "linattn": linattn_version,
        "machine": platform.platform(),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
