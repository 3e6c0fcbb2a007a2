"""The Triton kernels on one GPU against flash-linear-attention, torch SDPA and FlexAttention, measured in one run.

    python benchmarks/kernels.py                                   everything: 25 minutes, 10 of them peers' tuning
    python benchmarks/kernels.py --only shapes,decode --budget 300
    python benchmarks/kernels.py --plot                            redraw the plot from the JSON, no GPU needed
    python benchmarks/kernels.py --smoke                           tiny shapes on the CPU: finds errors, not speeds

Sections: shapes (features given, and raw q, k, v), hybrid (window, sinks and decay up to a million tokens), crossover
(from which length on it is faster than softmax attention), decode, cold (the first call of a process), scaling (time
and memory against length, for the plot).

Before a time of ours is taken, outputs and all gradients of that very call are compared with float64 on two heads. The
error may be twice that of the PyTorch implementation in the same low precision plus one rounding of the greatest value;
where it is more, neither printed nor stored is the speed. Times are medians: the L2 cache is cleared before each call,
peers are warmed up and tuned. Memory is the peak added to inputs and output gradient.

Writes results/kernels.json after every figure, section by section, and docs/images/kernels.png (--out DIR: both there).
The peer is optional: pip install fla-core==0.6.0 einops.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import IMAGES, RESULTS, machine_line, versions
from _gpu import Record, Stopwatch, ceilings
from _kernel_cases import (
    BOTH,
    COLD,
    CROSSOVER_MAPS,
    CROSSOVER_TOKENS,
    CUDNN,
    DTYPE,
    FLA,
    FLA_PLAIN,
    FLA_RAW,
    FLEX,
    FORWARD,
    HYBRID,
    RAW,
    SDPA,
    SHAPES,
    SINKS,
    WINDOW,
    Case,
    Check,
    MakeWork,
    Oracle,
    Tensors,
    Work,
    draw,
    fla_raw_work,
    fla_work,
    flex_work,
    our_work,
    sdpa_work,
)
from _kernel_report import plot, print_tables, summary
from torch import Tensor
from torch.nn.attention import SDPBackend

from linattn.kernels import kernel_attention
from linattn.state import AttentionState

SECONDS = {"shapes": 420, "hybrid": 300, "crossover": 480, "decode": 90, "cold": 240, "scaling": 400}
"""Wall-clock budget of each section; what no longer fits is listed as skipped."""
CROSSOVER_LENGTHS = (2048, 1024, 4096, 512, 8192, 256, 16384)
"""Those in question first, should the time run out."""
SCALING_LENGTHS = tuple(1 << p for p in range(10, 21))
LONGEST_SOFTMAX, LONGEST_FLA = 131072, 262144


# ------------------------------------------------------------------------------------------------------- one run


class Bench:
    """Measures cases and puts them on record, one section at a time, each within its budget."""

    def __init__(self, record: Record, *, smoke: bool, budget: float | None, missing: bool = False) -> None:
        self.record, self.smoke, self.budget, self.missing = record, smoke, budget, missing
        self.device, self.impl = ("cpu", "chunked") if smoke else ("cuda", "triton")
        self.watch = Stopwatch(self.device)
        self.oracle = Oracle()
        self.ceilings = ceilings(self.watch)
        self.section, self.deadline = "", math.inf

    @contextlib.contextmanager
    def run(self, section: str) -> Iterator[None]:
        """Everything measured inside belongs to ``section``."""
        packages = self.record.packages
        header = {
            "machine": machine_line(),
            "versions": versions(*packages),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "smoke": self.smoke,
            **self.ceilings,
        }
        self.section = section
        self.deadline = time.perf_counter() + (self.budget or SECONDS[section])
        self.record.start(section, header, keep=self.missing)
        started = time.perf_counter()
        yield
        self.record.sections[section]["complete"] = not self.record.sections[section]["skipped"]
        self.record.sections[section]["seconds"] = round(time.perf_counter() - started, 1)
        self.record.write()

    def actual(self, case: Case) -> Case:
        """The case that runs under this one's name: itself, or a tiny one in a smoke run."""
        if not self.smoke:
            return case
        length = min(max(case.length // 64, 24), 200)
        return dataclasses.replace(case, batch=min(case.batch, 2), length=length, heads=2)

    def expired(self, what: str) -> bool:
        if time.perf_counter() < self.deadline:
            return False
        self.record.sections[self.section]["skipped"].append(what)
        print(f"{self.section}: no time left for {what}", flush=True)
        return True

    def has(self, case: Case, contender: str) -> bool:
        """Whether the section has this row already."""
        rows = self.record.sections[self.section]["rows"]
        return any((row["shape"], row["contender"]) == (case.shape, contender) for row in rows)

    def add(self, case: Case, contender: str, **figures: Any) -> None:
        about = {"shape": case.shape, "batch": case.batch, "length": case.length, "head_dim": case.head_dim}
        row = about | {"contender": contender} | figures
        self.record.add(self.section, row)
        print(f"{self.section}: {case.shape} {contender}: {_one_line(row)}", flush=True)

    def ours(self, case: Case, seconds: float = 0.3) -> None:
        """Check, then measure our operator."""
        self._guarded(case, case.title, lambda: self._ours(case, seconds))

    def peer(
        self, case: Case, contender: str, make_work: MakeWork, seconds: float = 0.3, *, same: bool = False
    ) -> None:
        """Measure a peer. ``same``: it computes our function, so its error is of interest."""
        self._guarded(case, contender, lambda: self._peer(case, contender, make_work, seconds, same))

    def _guarded(self, case: Case, contender: str, measure: Callable[[], None]) -> None:
        """Measure if there is time left; one failure must not cost the rest of the run."""
        if self.has(case, contender) or self.expired(f"{contender} at {case.shape}"):
            return
        try:
            measure()
        except Exception as error:
            self.add(case, contender, error=_brief(error))
        self._release()

    def _ours(self, case: Case, seconds: float) -> None:
        actual = self.actual(case)
        x = draw(actual, self.device)
        check = self.oracle.check(actual, x, self.impl)
        if check.holds:
            self._measure(case, case.title, our_work(actual, x, self.impl), seconds, check)
        else:
            self.add(case, case.title, error=f"wrong: {check}", **check._asdict())

    def _peer(self, case: Case, contender: str, make_work: MakeWork, seconds: float, same: bool) -> None:
        actual = self.actual(case)
        x = draw(actual, self.device)
        work = make_work(actual, x)
        started = time.perf_counter()
        with work.context():
            work.run(BOTH)
        self.watch.synchronize()
        first = time.perf_counter() - started
        errors = self.oracle.peer_errors(actual, x, work) if same else {}
        self._measure(case, contender, work, seconds, None, first_call_s=first, errors=errors)

    def _measure(
        self, case: Case, contender: str, work: Work, seconds: float, check: Check | None, **figures: Any
    ) -> None:
        if check is not None:
            figures |= check._asdict()
        with work.context():
            for name in (FORWARD, BOTH):
                figures[name] = self._figures(case, name, functools.partial(work.run, name), seconds)
                if check is not None:
                    ms = figures[name]["ms"]
                    figures[name]["bytes_per_s"] = case.floor_bytes(name) / ms * 1e3
                    figures[name]["flop_per_s"] = case.flop(name) / ms * 1e3
        self.add(case, contender, **figures)

    def _figures(self, case: Case, name: str, call: Callable[[], Any], seconds: float) -> dict[str, Any]:
        timing, memory = self.watch.time(call, seconds), self.watch.extra_mib(call)
        floor_ms = case.floor_bytes(name) / self.ceilings["copy_bytes_per_s"] * 1e3
        return {**timing._asdict(), "extra_mib": memory, "floor_ms": floor_ms, "over_floor": timing.ms / floor_ms}

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _one_line(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    return ", ".join(f"{name} {row[name]['ms']:.3f} ms" for name in (FORWARD, BOTH) if name in row)


# ------------------------------------------------------------------------------------------------------- sections
def softmax(bench: Bench, case: Case, contender: str, seconds: float = 0.3) -> None:
    backend = SDPBackend.MATH if bench.smoke else SDPA[contender]
    bench.peer(case, contender, lambda c, x: sdpa_work(c, x, backend), seconds)


def shapes(bench: Bench) -> None:
    for case in (*SHAPES, *RAW):
        bench.ours(case)
    wide = Case(8, 4096, head_dim=128, value_dim=128)
    for case in (RAW[0], wide, RAW[1]):
        for contender in SDPA:
            softmax(bench, case, contender)
    for case, raw in zip(SHAPES, (RAW[0], None, RAW[1]), strict=True):
        bench.peer(case, FLA_PLAIN, lambda c, x: fla_work(c, x, normalize=False))
        bench.peer(case, FLA, lambda c, x: fla_work(c, x, normalize=True), same=True)
        if raw is not None:
            bench.peer(raw, FLA_RAW, fla_raw_work)
    for case in (RAW[0], wide):
        bench.peer(case, FLEX, flex_work)


def hybrid(bench: Bench) -> None:
    softmax(bench, Case(1, 131072), CUDNN)
    for case in HYBRID:
        bench.ours(case)


def crossover(bench: Bench) -> None:
    for length, tokens in itertools.product(CROSSOVER_LENGTHS, CROSSOVER_TOKENS):
        batch = tokens // length
        for head_dim, contender in itertools.product((64, 128), SDPA):
            softmax(bench, Case(batch, length, head_dim, value_dim=head_dim), contender, 0.1)
        for name, head_dim in CROSSOVER_MAPS:
            case = Case(batch, length, head_dim, value_dim=head_dim, map=name)
            bench.ours(case, 0.1)
            bench.ours(dataclasses.replace(case, window=WINDOW, sinks=SINKS), 0.1)


def scaling(bench: Bench) -> None:
    for length in SCALING_LENGTHS:
        bench.ours(Case(1, length))
        if length <= LONGEST_SOFTMAX:
            for contender in SDPA:
                softmax(bench, Case(1, length), contender)
    for length in SCALING_LENGTHS:
        if length <= LONGEST_FLA:
            bench.peer(Case(1, length, map="given"), FLA, lambda c, x: fla_work(c, x, normalize=True))


class Decoder(NamedTuple):
    """One decode step: ``step()`` returns the output ``[N, H, V]``; ``state()`` is what the steps so far have left."""

    step: Callable[[], Tensor]
    state: Callable[[], AttentionState]


def decoder(case: Case, state: AttentionState, token: Tensors, impl: str) -> Decoder:
    """Our step of ``token``: in place on slots made from ``state``; for ``impl="chunked"`` always the first one."""
    assert token.phi is not None
    if impl == "chunked":
        return Decoder(lambda: chunked_step(case, state, token)[0], lambda: chunked_step(case, state, token)[1])
    from linattn.kernels.slots import DecodeSlots
    from linattn.kernels.triton.step import decode_step

    slots, projected, scale = DecodeSlots.from_state(state), token.phi.projected(), token.phi.scale
    q, k, v = (x[:, 0].contiguous() for x in (token.q, token.k, token.v))
    return Decoder(lambda: decode_step(slots, q, k, v, feature_map=projected, scale=scale), slots.to_state)


def chunked_step(case: Case, state: AttentionState, token: Tensors) -> tuple[Tensor, AttentionState]:
    """The PyTorch step: output ``[N, H, V]`` and the state after it."""
    found = kernel_attention(
        token.q,
        token.k,
        token.v,
        feature_map=token.phi,
        window=case.window,
        sinks=case.sinks,
        state=state,
        return_state=True,
        impl="chunked",
    )
    assert found.state is not None
    return found.out[:, 0], found.state


def full_state(case: Case, tokens: int, device: str) -> AttentionState:
    """A state that has seen ``tokens`` random tokens, of the size that so many would leave."""
    state = AttentionState.empty(
        case.batch,
        num_kv_heads=case.heads,
        feature_dim=case.features,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        window=case.window,
        sinks=case.sinks,
        dtype=DTYPE,
        device=device,
    )
    torch.manual_seed(tokens)
    folded = tokens - case.window
    for ring in (state.recent_k, state.recent_v, state.sink_k, state.sink_v):
        ring.normal_()
    state.k.uniform_(0.5, 1.5).mul_(folded / case.features)
    state.kv.normal_().mul_(math.sqrt(folded) / case.features)
    state.log_scale.zero_()
    state.length.fill_(tokens)
    state.folded.fill_(folded)
    return state


def step_bytes(case: Case) -> int:
    """What one step must move: sums read and written, the window and sinks read, one token in and one out."""
    sums = 2 * 4 * case.features * (case.value_dim + 1)
    exact = (case.window + case.sinks) * (case.head_dim + case.value_dim) * DTYPE.itemsize
    token = (3 * case.head_dim + 3 * case.value_dim) * DTYPE.itemsize
    return (sums + exact + token) * case.batch * case.heads


def decode(bench: Bench) -> None:
    for tokens in (1_000, 1_000_000):
        case = Case(64, 1, window=WINDOW, sinks=SINKS)
        if bench.expired(f"{tokens} tokens"):
            continue
        try:
            _decode(bench, case, tokens)
        except Exception as error:
            bench.add(case, case.title, tokens=tokens, error=_brief(error))


def _decode(bench: Bench, case: Case, tokens: int) -> None:
    actual = dataclasses.replace(case, batch=2, heads=2) if bench.smoke else case
    token = draw(actual, bench.device)
    token = token._replace(q=token.q.detach(), k=token.k.detach(), v=token.v.detach())
    state = full_state(actual, tokens, bench.device)
    with torch.no_grad():
        check = _check_step(actual, state, token, bench.impl)
        if not check.holds:
            bench.add(case, case.title, tokens=tokens, error=f"wrong: {check}", **check._asdict())
            return
        step = decoder(actual, state, token, bench.impl).step
        launches = _launches(step) if bench.watch.cuda else None
        timing = bench.watch.time(_graphed(step) if bench.watch.cuda else step)
    floor_ms = step_bytes(case) / bench.ceilings["copy_bytes_per_s"] * 1e3
    bench.add(
        case,
        case.title,
        tokens=tokens,
        launches=launches,
        step={**timing._asdict(), "floor_ms": floor_ms, "over_floor": timing.ms / floor_ms},
        **check._asdict(),
    )


def _check_step(case: Case, state: AttentionState, token: Tensors, impl: str) -> Check:
    """Output and sums of one step against float64, and against the PyTorch step in low precision."""

    def figures(out: Tensor, after: AttentionState) -> dict[str, Tensor]:
        scale = after.log_scale.exp()
        return {"out": out, "kv": after.kv * scale[..., None, None], "k": after.k * scale[..., None]}

    heads = list(range(case.heads))
    wide = state.map(lambda t: t.double() if t.is_floating_point() else t)
    expected = figures(*chunked_step(case, wide, token.heads(heads, torch.float64)))
    independent = figures(*chunked_step(case, state, token.heads(heads, DTYPE)))
    ours = decoder(case, state, token, impl)
    out = ours.step()
    return Check.of(figures(out, ours.state()), independent, expected, sums=("kv", "k"))


def _graphed(step: Callable[[], Tensor]) -> Callable[[], None]:
    """``step`` captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _launches(step: Callable[[], Tensor]) -> int | None:
    """Kernels that one step launches, as the profiler counts them; None where it sees none."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels) or None


def cold(bench: Bench, *, peer: bool = False) -> None:
    for name in (*COLD, *(["fla"] if peer else [])):
        case = COLD.get(name, COLD["given"])
        title = FLA if name == "fla" else case.title
        if bench.has(case, title) or bench.expired(name):
            continue
        try:
            with tempfile.TemporaryDirectory() as cache:
                figures = {"empty_cache": _fresh_process(name, cache, bench.smoke)}
                if name != "fla":
                    figures["filled_cache"] = _fresh_process(name, cache, bench.smoke)
            bench.add(case, title, **figures)
        except Exception as error:
            bench.add(case, title, error=_brief(error))


def _fresh_process(name: str, cache: str, smoke: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--first-call", name, *(["--smoke"] if smoke else [])]
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": cache}, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - started}


def first_call(name: str, smoke: bool) -> None:
    """Print the seconds of this process's first forward, and of its first forward and backward."""
    bare = object.__new__(Bench)
    bare.smoke = smoke
    case = bare.actual(COLD.get(name, COLD["given"]))
    device = "cpu" if smoke else "cuda"
    x = draw(case, device)
    work = fla_work(case, x, normalize=True) if name == "fla" else our_work(case, x, "chunked" if smoke else "triton")
    watch = Stopwatch(device)
    watch.synchronize()
    started = time.perf_counter()
    out = work.call()
    watch.synchronize()
    forward = time.perf_counter() - started
    torch.autograd.grad(out, work.leaves, work.dout)
    watch.synchronize()
    print(json.dumps({"first_forward_s": forward, "first_s": time.perf_counter() - started}))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "shapes": shapes,
    "hybrid": hybrid,
    "crossover": crossover,
    "decode": decode,
    "cold": cold,
    "scaling": scaling,
}


# ------------------------------------------------------------------------------------------------------- command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections to measure, separated by commas")
    parser.add_argument("--budget", type=float, help="seconds for each section, instead of the defaults")
    parser.add_argument("--missing", action="store_true", help="measure only what is not on record, or failed")
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.png")
    parser.add_argument("--cold-peer", action="store_true", help="time the peer's first call too (minutes)")
    parser.add_argument("--plot", action="store_true", help="only redraw the plot and print the tables")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, implementation in PyTorch")
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_call:
        return first_call(args.first_call, args.smoke)
    chosen = args.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(SECTIONS)}")
    if args.smoke and args.out is None:
        parser.error("--smoke: pass --out, its numbers are no results")
    if not (args.smoke or args.plot or torch.cuda.is_available()):
        sys.exit("no CUDA device: --plot redraws what is on record, --smoke tries the code on a CPU")

    base = None if args.smoke else RESULTS / "kernels.json"
    image = (args.out or IMAGES) / "kernels.png"
    record = Record((args.out or RESULTS) / "kernels.json", base, ("triton", "fla-core"))
    record.summary = lambda: summary(record.sections)
    if not args.plot:
        bench = Bench(record, smoke=args.smoke, budget=args.budget, missing=args.missing)
        for name in chosen:
            with bench.run(name):
                if name == "cold":
                    cold(bench, peer=args.cold_peer)
                else:
                    SECTIONS[name](bench)
    if {"scaling", "hybrid"} & set(record.sections):
        try:
            plot(record.sections, image)
        except ImportError:
            print("no matplotlib: --plot draws the plot from the JSON elsewhere")
    print_tables(record.sections, [s for s in chosen if s in record.sections], record.summary())


if __name__ == "__main__":
    main()
