"""The search for the fastest config of one shape: what is wrong is never timed, what is faster is kept."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from linattn.errors import LinattnError, OptionError, UnsupportedError
from linattn.kernels.api import kernel_attention, linear_attention
from linattn.kernels.protocols import GivenFeatures
from linattn.kernels.triton import backend, config
from linattn.kernels.triton.config import Config, Key

FORWARD, BOTH = "forward", "forward+backward"
MARGIN = 0.99
"""A candidate must take less than this part of the best time so far."""
LONGEST_DENSE = 2048
"""Up to so many tokens the float64 reference is the dense one; beyond, the chunked implementation in float64."""
LONGEST_CHECKED = 131072
"""Candidates for longer sequences are checked on so many tokens."""

MakeMap = Callable[..., Any]
"""A feature map for ``num_heads``, ``num_kv_heads``, ``device`` and ``dtype``."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What to tune for.

    Attributes:
        features: F of given features; 0 if a map computes them, or without a far branch.
        decay: with a log-gate for each token and key head.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    features: int = 0
    window: int = 0
    sinks: int = 0
    decay: bool = False
    dtype: torch.dtype = torch.bfloat16


class Step(NamedTuple):
    """Candidates for one kernel: the fields each sets, all others as in the best config before the step."""

    name: str
    timed: str
    """``FORWARD`` without gradients, or ``BOTH``."""
    candidates: Sequence[dict[str, int]]


@dataclasses.dataclass
class Trial:
    """One candidate: its time, or why it has none.

    Attributes:
        changes: fields that differ from the config the search began with.
        ms: median of what the step times. reason: why it was not timed.
        worst: the largest error of output and gradients, over what it may be.
    """

    step: str
    changes: dict[str, int]
    ms: float | None = None
    reason: str | None = None
    worst: float | None = None
    kept: bool = False


class Tuned(NamedTuple):
    """The result of a search.

    Attributes:
        key: what a table is asked for such calls. start: the shipped config. best: the one found.
        ms: medians of start (None if it does not run) and best by what was timed.
    """

    problem: Problem
    key: Key
    start: Config
    best: Config
    ms: dict[str, tuple[float | None, float]]
    trials: list[Trial]
    device: torch.device


def steps(problem: Problem, start: Config, on: config.Chip) -> list[Step]:
    """The shipped search: segments and chunk, slices of large heads, then chunk, warps and stages of each kernel."""
    wide = problem.dtype != torch.bfloat16
    chunks = (16, 32, 64) if wide else (32, 64, 128)
    warps, stages, registers = (4, 8), (1, 2, 3), (0, 128, 168)
    segments = []
    for n in (1 << i for i in range(20)):
        tokens, programs = -(-problem.length // n), problem.batch * problem.heads * n
        if n > 1 and (tokens < 128 or programs > 32 * max(on.multiprocessors, 1)):
            break
        segments.append({"programs": programs, "shortest": min(start.shortest, tokens)})

    def product(**fields: Sequence[int]) -> list[dict[str, int]]:
        return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]

    slices = Step(
        "slices", BOTH, product(forward_slice=(0, 64), fold_slice=(0, 64), dq_slice=(0, 64), dkv_slice=(0, 64))
    )
    near = [
        Step("near", BOTH, product(near_chunk=chunks, near_warps=warps, near_stages=stages)),
        Step("near registers", BOTH, product(near_registers=registers)),
        Step("near dkv", BOTH, product(near_dkv_stages=stages, near_dkv_registers=registers)),
    ]
    return [
        Step("chunk", BOTH, product(chunk=chunks)),
        *([slices] if problem.value_dim > 64 and problem.features > 64 else []),
        Step("segments", BOTH, segments),
        Step("forward", FORWARD, product(forward_warps=warps, forward_stages=stages)),
        Step("fold", BOTH, product(fold_chunk=chunks, fold_warps=warps, fold_stages=stages)),
        Step("dq", BOTH, product(dq_warps=warps, dq_stages=stages)),
        Step("dkv", BOTH, product(dkv_chunk=chunks[:2], dkv_warps=warps, dkv_stages=stages)),
        *(near if problem.window else []),
        Step("map", BOTH, product(map_stages=stages, map_registers=registers)),
    ]


def tune(
    problem: Problem,
    make_map: MakeMap | None = None,
    *,
    search: Callable[[Problem, Config, config.Chip], list[Step]] | None = None,
    watch: Callable[[Trial, int], None] = lambda trial, total: None,
) -> Tuned:
    """Search by coordinate descent: kernel by kernel, each candidate checked, then timed, then kept or dropped.

    A candidate's output and all its gradients may be off the float64 reference by twice the error of
    ``impl="chunked"`` in the same dtype plus one rounding of the largest value. Compared are the heads of the first and
    of the last key head: none sees another.

    Args:
        problem: the shapes.
        make_map: the map in the far branch, if features are neither given nor absent.
        search: which candidates; default :func:`steps`.
        watch: called after each trial, with the number of trials there will be.

    Raises:
        UnsupportedError: there is no GPU (nor Triton's interpreter), the kernels refuse the problem, or no candidate
            runs.
    """
    device = _device(problem)
    on = config.chip(device)
    key = _key(problem, make_map, device)
    start = config._config(on, key, None)
    plan = (steps if search is None else search)(problem, start, on)
    total = 1 + sum(len(step.candidates) for step in plan)
    oracle = _Oracle(problem, make_map, device)
    call = oracle.call if problem.length <= LONGEST_CHECKED else _draw(problem, make_map, device)
    trials: list[Trial] = []
    known: dict[Config, Trial] = {}

    def attempt(step: str, candidate: Config, timed: str) -> Trial:
        changes = {name: value for name, value in candidate._asdict().items() if value != getattr(start, name)}
        trial = Trial(step, changes)
        trials.append(trial)
        try:
            if (before := known.get(candidate)) is None:
                trial.worst, trial.reason = oracle.check(candidate)
            else:
                trial.worst, trial.reason = before.worst, before.reason
            if trial.reason is None:
                trial.ms = _ms(call, candidate, timed)
        except Exception as error:
            trial.reason = _brief(error)
        known[candidate] = trial
        _still_alive(device, trial)
        watch(trial, total)
        return trial

    first = attempt("start", start, BOTH)
    best, runs = start, first.ms is not None
    for step in plan:
        least = _ms(call, best, step.timed) if runs else math.inf
        base, winner = best, None
        for changes in step.candidates:
            candidate = base._replace(**changes)
            if runs and candidate == base:
                continue
            trial = attempt(step.name, candidate, step.timed)
            if trial.ms is not None and trial.ms < MARGIN * least:
                least, best, winner, runs = trial.ms, candidate, trial, True
        if winner is not None:
            winner.kept = True
    if not runs:
        reasons = "; ".join(dict.fromkeys(trial.reason or "" for trial in trials))
        raise UnsupportedError(f"tune: no candidate runs: {reasons}")
    ms = {
        timed: (_ms(call, start, timed) if first.ms is not None else None, _ms(call, best, timed))
        for timed in (FORWARD, BOTH)
    }
    return Tuned(problem, key, start, best, ms, trials, device)


def save(found: Tuned, path: Path) -> None:
    """Write the config and its evidence to a table, which may be there already: then to its entry of the same key.

    Raises:
        OptionError: there is a table at ``path`` that is wrong, or for another chip.
    """
    on = config.chip(found.device)
    entry = {"for": found.key._asdict(), "config": found.best._asdict(), "evidence": evidence(found)}
    table: dict[str, Any] = {"architectures": [on.architecture], "entries": []}
    if path.exists():
        config.load(path)
        table = json.loads(path.read_text(encoding="utf-8"))
        if on.architecture not in table["architectures"]:
            raise OptionError(
                f"{path}: a table for {', '.join(table['architectures'])}, and this is {on.architecture}; "
                "choose another file."
            )
    table["entries"] = [old for old in table["entries"] if old["for"] != entry["for"]] + [entry]
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    config._config.cache_clear()


def evidence(found: Tuned) -> dict[str, Any]:
    """How the config was found: device, versions, date, times, and every candidate."""
    interpreted = found.device.type != "cuda"
    problem = dataclasses.asdict(found.problem) | {"dtype": str(found.problem.dtype).removeprefix("torch.")}
    trials = [{k: v for k, v in dataclasses.asdict(t).items() if v is not None} for t in found.trials]
    return {
        "device": "Triton's interpreter" if interpreted else torch.cuda.get_device_name(found.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        | _own_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "problem": problem,
        "start": found.start._asdict(),
        "ms": {timed: {"start": before, "best": after} for timed, (before, after) in found.ms.items()},
        "trials": trials,
    }


def _own_version() -> dict[str, str]:
    try:
        return {"linattn": importlib.metadata.version("linattn")}
    except importlib.metadata.PackageNotFoundError:
        return {}


# ------------------------------------------------------------------------------------------------------- the device


def _device(problem: Problem) -> torch.device:
    if backend.INTERPRETED:
        if problem.dtype == torch.bfloat16:
            raise UnsupportedError("tune: bfloat16 is wrong in Triton's interpreter; use float32 or float16 there.")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError("tune: torch sees no GPU; configs are measured on the GPU they are for.")
    return torch.device("cuda", torch.cuda.current_device())


def _still_alive(device: torch.device, trial: Trial) -> None:
    """A kernel that faulted leaves a GPU on which nothing runs any more: stop, naming it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise RuntimeError(f"the GPU failed at {trial.step} {trial.changes}: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _ms(call: _Call, candidate: Config, timed: str) -> float:
    """Median time; in the interpreter of one run."""
    with config.using(candidate):
        if call.dout.is_cuda:
            return float(triton.testing.do_bench(lambda: call.run(timed), warmup=20, rep=150, return_mode="median"))
        began = time.perf_counter()
        call.run(timed)
        return (time.perf_counter() - began) * 1e3


# ------------------------------------------------------------------------------------------------------- the problem


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of the operator, and everything that receives a gradient from it."""

    problem: Problem
    tensors: dict[str, Tensor]
    dout: Tensor
    phi: Any
    impl: str = "triton"

    @functools.cached_property
    def leaves(self) -> dict[str, Tensor]:
        parameters = dict(self.phi.named_parameters()) if hasattr(self.phi, "named_parameters") else {}
        return self.tensors | parameters

    def attend(self) -> Tensor:
        p = self.problem
        x: dict[str, Any] = dict(self.tensors)
        if p.features and not p.window + p.sinks:
            return linear_attention(x["q"], x["k"], x["v"], decay=x.get("decay"), impl=self.impl).out
        phi = GivenFeatures(p.features, log_scaled=False) if p.features else self.phi
        return kernel_attention(
            **x, feature_map=phi, far=phi is not None, window=p.window, sinks=p.sinks, impl=self.impl
        ).out

    def run(self, what: str) -> dict[str, Tensor]:
        """The output and, unless FORWARD, the gradients by name."""
        if what == FORWARD:
            with torch.no_grad():
                return {"output": self.attend()}
        out = self.attend()
        grads = torch.autograd.grad(out, list(self.leaves.values()), self.dout)
        named = (f"gradient of {name}" for name in self.leaves)
        return {"output": out.detach()} | dict(zip(named, grads, strict=True))

    def part(self, group: int, dtype: torch.dtype, impl: str, make_map: MakeMap | None) -> _Call:
        """The same call of one key head and its query heads, in ``dtype``."""
        p = dataclasses.replace(self.problem, heads=self.problem.heads // self.problem.kv_heads, kv_heads=1)
        tensors = {}
        for name, t in self.tensors.items():
            wide = torch.promote_types(dtype, torch.float32) if name == "decay" else dtype
            tensors[name] = _of_group(t.detach(), 2, self.problem, group).to(wide).requires_grad_()
        phi = None
        if make_map is not None:
            phi = make_map(num_heads=p.heads, num_kv_heads=1, device=self.dout.device, dtype=dtype)
            fits = phi.state_dict()
            known = self.phi.state_dict().items()
            phi.load_state_dict(
                {n: t if t.shape == fits[n].shape else _of_group(t, 0, self.problem, group) for n, t in known}
            )
        return _Call(p, tensors, _of_group(self.dout, 2, self.problem, group).to(dtype), phi, impl)


def _of_group(t: Tensor, dim: int, problem: Problem, group: int) -> Tensor:
    """What of ``t``, whose dimension ``dim`` is heads or key heads, belongs to one key head."""
    size = t.shape[dim] // problem.kv_heads
    return t.narrow(dim, group * size, size)


def _draw(problem: Problem, make_map: MakeMap | None, device: torch.device) -> _Call:
    """A call with random tensors, the same every time."""
    p = problem
    rng = torch.Generator(device).manual_seed(0)

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(p.batch, p.length, heads, width, device=device, dtype=p.dtype, generator=rng)

    tensors = {"q": normal(p.heads, p.head_dim), "k": normal(p.kv_heads, p.head_dim)}
    if p.features:
        given = [normal(heads, p.features).softmax(-1) for heads in (p.heads, p.kv_heads)]
        names = ("q_far", "k_far") if p.window + p.sinks else ("q", "k")
        tensors |= dict(zip(names, given, strict=True))
    tensors["v"] = normal(p.kv_heads, p.value_dim)
    if p.decay:  # half-lives of 64 … 8192 tokens, twice as fast or not at all from token to token
        gates = -math.log(2) / torch.logspace(6, 13, p.kv_heads, base=2.0, device=device)
        shape = (p.batch, p.length, p.kv_heads)
        tensors["decay"] = 2 * gates * torch.rand(shape, device=device, generator=rng)
    phi = None
    if make_map is not None:
        phi = make_map(num_heads=p.heads, num_kv_heads=p.kv_heads, device=device, dtype=p.dtype)
        with torch.no_grad():
            for w in phi.parameters():  # away from a start in which heads are equal
                w.add_(0.05 * torch.randn(w.shape, device=device, dtype=w.dtype, generator=rng))
    return _Call(p, {n: t.requires_grad_() for n, t in tensors.items()}, normal(p.heads, p.value_dim), phi)


def _key(problem: Problem, make_map: MakeMap | None, device: torch.device) -> Key:
    """What the kernels ask for calls like this; learnt from a short one."""
    short = _draw(dataclasses.replace(problem, batch=1, length=16), make_map, device)
    failed = None
    with config.using(Config()) as asked:
        try:
            short.run(FORWARD)
        except LinattnError:
            raise
        except Exception as error:  # the default may not fit this chip
            failed = error
    if not asked:
        raise failed or RuntimeError("the kernels did not ask for a config")
    return asked[0]


class _Oracle:
    """Results in float64 of some heads, and how far off a candidate's may be."""

    def __init__(self, problem: Problem, make_map: MakeMap | None, device: torch.device) -> None:
        length = min(problem.length, LONGEST_CHECKED)
        self.call = _draw(dataclasses.replace(problem, length=length), make_map, device)
        self.groups = sorted({0, problem.kv_heads - 1})
        exactly = "reference" if length <= LONGEST_DENSE else "chunked"
        self.exact: list[dict[str, Tensor]] = []
        self.bounds: list[dict[str, float]] = []
        rounding = torch.finfo(problem.dtype).eps / 2
        for group in self.groups:
            exact = self.call.part(group, torch.float64, exactly, make_map).run(BOTH)
            low = self.call.part(group, problem.dtype, "chunked", make_map).run(BOTH)
            self.bounds.append({n: 2 * _largest(low[n] - e) + rounding * _largest(e) for n, e in exact.items()})
            self.exact.append(exact)
            gc.collect()

    def check(self, candidate: Config) -> tuple[float, str | None]:
        """The largest error over its bound, and what is wrong if that is more than one."""
        with config.using(candidate) as asked:
            found = self.call.run(BOTH)
        if not asked:
            raise RuntimeError("the kernels did not ask for a config")
        worst, where = 0.0, ""
        for group, exact, bounds in zip(self.groups, self.exact, self.bounds, strict=True):
            for name, e in exact.items():
                dim = 0 if name.removeprefix("gradient of ") not in (*self.call.tensors, "output") else 2
                off = _largest(_of_group(found[name], dim, self.call.problem, group).double() - e)
                over = off / bounds[name] if bounds[name] else float(off > 0)
                over = math.inf if math.isnan(over) else over
                if over > worst:
                    worst, where = over, f"{name} is off by {off:.1e}, may be {bounds[name]:.1e}"
        return worst, None if worst <= 1 else f"wrong: {where}"


def _largest(t: Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0
