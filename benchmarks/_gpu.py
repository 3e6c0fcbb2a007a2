"""Time, memory and ceilings of a GPU, one method for everything measured; and a record that survives a cut-off run."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import write_results

MIB = 1 << 20
CLOCK_HZ = 2e9
"""Above every clock of the chips in question: cycles to wait for a given time are at least that many."""
WARM_UP_S = 0.05


class Timing(NamedTuple):
    """Medians of one call, in milliseconds.

    Attributes:
        ms: between two events around the call, the L2 cache cleared before: what ``triton.testing.do_bench`` measures.
        device_ms: the same while the GPU has work queued, as inside a large model: without gaps in which it waits for
            Python. host_ms: what issuing the call takes. repeats: timed calls.
    """

    ms: float
    device_ms: float
    host_ms: float
    repeats: int


class Stopwatch:
    """Times calls on ``device``. On a CPU it only exercises the code: wall-clock times, no cache cleared."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._cache = torch.empty(256 * MIB if self.cuda else 1, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any], seconds: float = 0.3, most: float = 4.0) -> Timing:
        """Medians over at least 20 calls or ``seconds``, whichever is more, but not (beyond three) over ``most``."""
        for _ in range(3):  # the first one compiles
            call()
        self.synchronize()
        warm = time.perf_counter() + WARM_UP_S
        while self.cuda and time.perf_counter() < warm:
            call()
            self.synchronize()
        hosts = []
        started = time.perf_counter()
        for _ in range(3):
            issued = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - issued)
            self.synchronize()
        estimate = (time.perf_counter() - started) / 3
        host = statistics.median(hosts)
        repeats = min(max(20, round(seconds / estimate)), 200, max(3, round(most / estimate)))
        if not self.cuda:
            return Timing(estimate * 1e3, estimate * 1e3, host * 1e3, 3)
        ms = self._median(call, repeats, 0.0)
        device_ms = ms if host < estimate / 4 else self._median(call, min(repeats, 50), 1.5 * host)
        return Timing(ms, device_ms, host * 1e3, repeats)

    def _median(self, call: Callable[[], Any], repeats: int, head_start: float) -> float:
        spans = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._cache.zero_()
            if head_start:
                torch.cuda._sleep(int(head_start * CLOCK_HZ))
            start.record()
            call()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in spans)

    def extra_mib(self, call: Callable[[], Any]) -> float | None:
        """Peak memory that ``call`` and its results add to what is allocated already."""
        if not self.cuda:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak / MIB


def ceilings(watch: Stopwatch) -> dict[str, float]:
    """Bytes a second of a device-to-device copy (read and written) and FLOP a second of a bf16 matrix product."""
    device = "cuda" if watch.cuda else "cpu"
    source = torch.empty((4096 if watch.cuda else 1) * MIB, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    copy = watch.time(lambda: target.copy_(source)).ms
    n = 8192 if watch.cuda else 128
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = watch.time(lambda: a @ b).ms
    return {"copy_bytes_per_s": 2 * source.numel() / copy * 1e3, "bf16_flop_per_s": 2 * n**3 / product * 1e3}


class Record:
    """A JSON file of sections of rows, written anew after every row; sections measured earlier stay as they are."""

    def __init__(self, path: Path, base: Path | None, packages: tuple[str, ...]) -> None:
        """Continue the record at ``path``, or start from the one at ``base``."""
        self.path = path
        self.packages = tuple(p for p in packages if _installed(p))
        found = next((p for p in (path, base) if p is not None and p.exists()), None)
        self.sections: dict[str, dict[str, Any]] = (
            {} if found is None else json.loads(found.read_text(encoding="utf-8"))["sections"]
        )
        self.summary: Callable[[], dict[str, Any]] = dict

    def start(self, section: str, run: dict[str, Any], *, keep: bool = False) -> None:
        """Begin a section; with ``keep`` go on with the rows it has, those that failed left out."""
        before = self.sections.get(section) if keep else None
        self.sections[section] = {"run": run, "complete": False, "skipped": [], "rows": []}
        if before is not None:
            later = [*before.get("later_runs", []), run]
            rows = [row for row in before["rows"] if "error" not in row]
            self.sections[section] |= {"run": before["run"], "later_runs": later, "rows": rows}

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.sections[section]["rows"].append(row)
        self.write()

    def write(self) -> None:
        write_results(self.path, {**self.summary(), "sections": self.sections}, *self.packages)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
