"""Time and memory of chunked attention against softmax attention on the CPU, and the cost of decoding.

    python benchmarks/cpu_attention.py [--longest 65536] [--threads 2]

One sequence, 9 heads of 64, 128 features. Everything is measured in one run: scaled_dot_product_attention (causal),
pure kernel attention from raw q, k, v (Hedgehog features), the same with 128 exact tokens and 4 sinks, and linear
attention on given features; eager and under torch.compile. Before a time is printed, the same call at 2,048 tokens is
compared with the dense float64 reference. Writes results/cpu_attention.json and docs/images/cpu_attention.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import IMAGES, RESULTS, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from linattn.feature_maps import make
from linattn.kernels import kernel_attention, linear_attention

HEADS, HEAD_DIM, FEATURES = 9, 64, 128
WINDOW, SINKS = 128, 4
SDPA = "softmax (SDPA, causal)"
PURE = "kernel attention"
HYBRID = f"hybrid, window {WINDOW} + {SINKS} sinks"
GIVEN = "linear attention, features given"
COMPILED = {PURE: f"{PURE}, compiled", HYBRID: f"{HYBRID}, compiled"}

COMPILED_LENGTHS = {COMPILED[PURE]: (16384, 65536), COMPILED[HYBRID]: (16384,)}

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(length: int) -> Inputs:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    return q, k, v


def hedgehog() -> torch.nn.Module:
    return make("hedgehog", HEAD_DIM, num_heads=HEADS)


def contenders() -> dict[str, Callable[..., Any]]:
    """What is timed, by name: functions of q, k, v ``[1, T, 9, 64]``, and of features ``[1, T, 9, 128]``."""
    phi = hedgehog()
    exact = {"window": WINDOW, "sinks": SINKS}

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)

    return {
        SDPA: softmax,
        GIVEN: lambda phi_q, phi_k, v: linear_attention(phi_q, phi_k, v).out,
        PURE: lambda q, k, v: kernel_attention(q, k, v, feature_map=phi).out,
        HYBRID: lambda q, k, v: kernel_attention(q, k, v, feature_map=phi, **exact).out,
    }


def prepare(name: str, length: int) -> Inputs:
    q, k, v = inputs(length)
    if name != GIVEN:
        return q, k, v
    phi = hedgehog()
    return phi.forward_queries(q).values, phi.forward_keys(k).values, v


def reference_error(name: str, attend: Callable[..., Tensor], length: int = 2048) -> float:
    """Greatest difference from the dense float64 reference, relative to its greatest value."""
    args = prepare(name, length)
    wide = [x.double() for x in args]
    if name == SDPA:
        expected = contenders()[SDPA](*wide)
    elif name == GIVEN:
        expected = linear_attention(*wide, impl="reference").out
    else:
        exact = {"window": WINDOW, "sinks": SINKS} if "hybrid" in name else {}
        expected = kernel_attention(*wide, feature_map=hedgehog().double(), **exact, impl="reference").out
    return float((attend(*args) - expected).abs().max() / expected.abs().max())


def median_times(
    attends: dict[str, Callable[..., Tensor]], length: int, budget: float
) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of a call and how many were timed, at least three; after a call to warm up.

    The contenders take turns, so that what else happens on the machine happens to all of them.
    """
    args = {name: prepare(name, length) for name in attends}
    for name, attend in attends.items():
        attend(*(args[name] if "compiled" in name else (x[:, :1024] for x in args[name])))
    times: dict[str, list[float]] = {name: [] for name in attends}
    while waiting := [n for n, t in times.items() if len(t) < 3 or (sum(t) < budget and len(t) < 15)]:
        for name in waiting:
            started = time.perf_counter()
            attends[name](*args[name])
            times[name].append(time.perf_counter() - started)
    return {n: statistics.median(t) for n, t in times.items()}, {n: len(t) for n, t in times.items()}


def peak_mebibytes(name: str, length: int, backward: bool) -> float:
    """Peak memory that one call adds to its inputs, in a fresh process."""
    command = [sys.executable, __file__, "--probe", json.dumps([name, length, backward])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def probe(name: str, length: int, backward: bool) -> None:
    """Print the peak resident memory that one call adds, after a short call has loaded everything."""
    attend = contenders()[name]

    def run(args: Inputs) -> None:
        if backward:
            attend(*(x.requires_grad_() for x in args)).sum().backward()
        else:
            with torch.no_grad():
                attend(*args)

    with torch.no_grad():
        args = prepare(name, length)
    run(tuple(x[:, :64].detach().clone() for x in args))  # type: ignore[arg-type]
    # The high-water mark is inherited by a child process, and set by loading libraries: start it anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_kibibytes()
    run(args)
    print((high_water_kibibytes() - before) / 1024)


def high_water_kibibytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def decode(length: int, steps: int = 200) -> dict[str, float]:
    """Median milliseconds of one decode step after ``length`` tokens, and the bytes of the state."""
    phi, exact = hedgehog(), {"window": WINDOW, "sinks": SINKS}
    state = kernel_attention(*inputs(length), feature_map=phi, **exact, return_state=True).state
    token = [x[:, :1] for x in inputs(1)]
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        state = kernel_attention(*token, feature_map=phi, **exact, state=state, return_state=True).state
        times.append(time.perf_counter() - started)
    return {"tokens": length, "milliseconds": statistics.median(times) * 1e3, "state_bytes": state.nbytes}


def plot(times: dict[str, dict[int, float]], memory: dict[str, dict[int, float]]) -> None:
    import matplotlib.pyplot as plt

    colours = {SDPA: "tab:red", PURE: "tab:blue", HYBRID: "tab:green", GIVEN: "tab:gray"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, data in ((left, times), (right, memory)):
        for name, points in data.items():
            base = name.removesuffix(", compiled").removesuffix(", forward and backward")
            dashed = base != name
            axis.plot(
                list(points), list(points.values()), "--o" if dashed else "-o", color=colours[base], label=name, ms=3.5
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7.5, loc="upper left")
    bottom, top = right.get_ylim()
    right.set_ylim(bottom, top * 3)  # room for the legend
    left.set(ylabel="seconds, forward", title="Time")
    right.set(ylabel="MiB added to the inputs", title="Peak memory")
    figure.suptitle(f"CPU, {torch.get_num_threads()} threads, float32, 9 heads × 64, 128 features", fontsize=10)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "cpu_attention.png", dpi=150)


def crossover(times: dict[str, dict[int, float]], name: str) -> int | None:
    """The shortest measured length from which ``name`` is faster than softmax at every longer one."""
    slower = [length for length, value in times[name].items() if value >= times[SDPA][length]]
    longer = [length for length in times[name] if length > max(slower, default=0)]
    return min(longer, default=None)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=65536, help="longest sequence timed")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of repeats for one figure")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        with torch.enable_grad():
            probe(*json.loads(args.probe))
        return

    console = Console()
    lengths = [1 << p for p in range(9, args.longest.bit_length())]
    attends = contenders()
    for name, label in COMPILED.items():
        attends[label] = torch.compile(attends[name], fullgraph=True, dynamic=False)

    errors = {name: reference_error(name, attend) for name, attend in attends.items()}
    wrong = {name: error for name, error in errors.items() if not error < 1e-4}
    if wrong:
        sys.exit(f"not timed, because wrong: {wrong}")

    times: dict[str, dict[int, float]] = {name: {} for name in attends}
    repeats: dict[str, dict[int, int]] = {name: {} for name in attends}
    for length in track(lengths, "timing", console=console):
        present = {name: attend for name, attend in attends.items() if length in COMPILED_LENGTHS.get(name, lengths)}
        medians, counts = median_times(present, length, args.budget)
        for name in present:
            times[name][length], repeats[name][length] = medians[name], counts[name]

    memory: dict[str, dict[int, float]] = {}
    spans = {"": [x for x in lengths if x >= 8192], ", forward and backward": [2048, 4096, 8192, 16384]}
    probes = [(name, suffix, length) for name in (PURE, HYBRID) for suffix, span in spans.items() for length in span]
    for name, suffix, length in track(probes, "memory", console=console):
        memory.setdefault(name + suffix, {})[length] = peak_mebibytes(name, length, bool(suffix))
    steps = [decode(length) for length in track((100, 1_000, 10_000, 100_000), "decoding", console=console)]

    table = Table("tokens", *(f"{name}, s" for name in times))
    for length in lengths:
        table.add_row(f"{length:,}", *(f"{t[length]:.4f}" if length in t else "" for t in times.values()))
    console.print(table)
    speedups = {
        name: {length: round(times[SDPA][length] / value, 2) for length, value in points.items()}
        for name, points in times.items()
        if name != SDPA
    }
    compiled = {
        name: {length: round(times[name][length] / times[label][length], 2) for length in times[label]}
        for name, label in COMPILED.items()
    }
    crossovers = {name: crossover(times, name) for name in (GIVEN, PURE, HYBRID)}
    console.print("faster than softmax by", speedups)
    console.print("compiled faster than eager by", compiled)
    console.print("faster from", crossovers, "peak MiB", memory, "decoding", steps)
    plot(times, memory)
    write_results(
        RESULTS / "cpu_attention.json",
        {
            "setting": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM, "features": FEATURES, "dtype": "float32"},
            "reference_error": errors,
            "seconds": times,
            "repeats": repeats,
            "speedup_over_softmax": speedups,
            "compiled_over_eager": compiled,
            "faster_than_softmax_from_tokens": crossovers,
            "peak_mebibytes_added": memory,
            "decode": steps,
        },
    )


if __name__ == "__main__":
    main()
