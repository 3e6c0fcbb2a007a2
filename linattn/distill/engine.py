"""One training loop for every stage: float32 masters, a cosine schedule, and checkpoints that resume to the bit."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from linattn._modes import evaluating
from linattn.errors import CheckpointError, NonFiniteError, OptionError

if TYPE_CHECKING:
    from accelerate import PartialState

FORMAT = "linattn-distill-1"
METRICS = "metrics.jsonl"
MOMENTS = ("exp_avg", "exp_avg_sq")
FREE = ("save_every", "patience", "data", "held_out")
"""Options that may change between a run and its continuation; of the data, the first batch is compared instead."""

Progress = Callable[[int, Mapping[str, float]], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """How long and how fast a stage trains, and on what. Subclasses add what it trains and by which loss.

    Attributes:
        steps: optimizer steps. The steps' tokens are ``rows · accumulate · length`` on each process.
        learning_rate: of AdamW at its highest: reached after ``warmup`` steps, then a cosine down to 0.
        warmup: steps of linear rise.
        weight_decay, betas: of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
        clip: largest norm of the gradient of a step; inf for any.
        rows: windows read at once. length: tokens T of a window.
        accumulate: batches of ``rows`` windows whose mean gradient makes a step.
        seed: of the order of the data, and of all that is random in a step.
        save_every: steps between checkpoints.
        patience: this many steps in a row without finite gradients end the stage.
        repeats: part of a window's tokens that say earlier ones again (see :class:`Windows`): of use where a memory
            is to be trained to find things. Held-out text is left as it is.
        data: file of tokens (see :mod:`linattn.distill.data`).
        held_out: file of tokens that are measured, not trained on: its first ``held_out_windows`` windows, every
            ``measure_every`` steps and at the end. Training data of little variety is soon learnt by heart.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    rows: int = 1
    length: int = 2048
    accumulate: int = 1
    seed: int = 0
    save_every: int = 200
    patience: int = 20
    repeats: float = 0.0
    data: str = ""
    held_out: str = ""
    held_out_windows: int = 8
    measure_every: int = 100

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "rows",
            "length",
            "accumulate",
            "save_every",
            "patience",
            "held_out_windows",
            "measure_every",
        )
        for name in counts:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise OptionError(f"{name}: got {getattr(self, name)!r}, expected an integer ≥ 1.")
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name}: got {getattr(self, name)!r}, expected a number ≥ 0.")
        if not 0 <= self.warmup <= self.steps:
            raise OptionError(f"warmup: got {self.warmup!r}, expected 0 … steps = {self.steps}.")
        if not 0 <= self.repeats < 1:
            raise OptionError(f"repeats: got {self.repeats!r}, expected a part of the tokens: 0 ≤ repeats < 1.")
        if not self.clip > 0:
            raise OptionError(f"clip: got {self.clip!r}, expected a number > 0, or inf.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2


class Batch(NamedTuple):
    """Windows that are read side by side.

    Attributes:
        tokens: ``[B, T]`` int64 without padding.
        windows: number of each row in the data, which is what cached targets go by.
        step: optimizer step it belongs to, from 0.
        held_out: measured, not trained on: without what makes training random.
    """

    tokens: Tensor
    windows: tuple[int, ...] = ()
    step: int = 0
    held_out: bool = False


class Objective:
    """What a stage trains, and its loss.

    Attributes:
        parameters: the trained parameters by name.
        held: other tensors that :meth:`prepare` or a call may change, kept in checkpoints.
    """

    parameters: Mapping[str, nn.Parameter]
    held: Mapping[str, Tensor]

    def prepare(self, batch: Batch) -> None:
        """Settle starting values on the first batch; called once in the life of a stage, not when it resumes."""

    def factor(self, name: str) -> float:
        """How many times the stage's learning rate the parameter ``name`` learns at."""
        return 1.0

    def __call__(self, batch: Batch) -> Mapping[str, float | Tensor]:
        """Add this batch's gradients to the parameters' ``grad``; returns ``"loss"`` and whatever else to log.

        Numbers may be scalar tensors, which are read once a step: a device need not wait after every batch.
        """
        raise NotImplementedError


class Trained(NamedTuple):
    """What a stage did.

    Attributes:
        losses: of every step, those before an interruption included.
        skipped: steps left out because a gradient was not finite.
        resumed_at: steps that a checkpoint had done already.
        seconds: time in all runs of the stage, up to their last checkpoint.
    """

    losses: list[float]
    skipped: int
    resumed_at: int
    seconds: float


def train(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], Batch],
    stage: Stage,
    *,
    held_out: Sequence[Batch] = (),
    name: str = "train",
    out: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Trained:
    """Lower an objective's loss with AdamW, on float32 masters of exactly its parameters.

    The model may be of any dtype: after each step its parameters are the masters, rounded. It runs in evaluation mode,
    only the trained parameters ask for gradients, and modes and flags are afterwards as they were. What is random in a
    step is drawn from a seed of that step's own, and the batches are a function of their number: a stage that was
    killed at any moment resumes from its last checkpoint with the losses and weights, bit for bit, that it would have
    had, on the same machine and as far as its kernels are deterministic.

    Under ``accelerate launch`` every process trains a replica on batches of its own and gradients are averaged.

    Args:
        model: holds the objective's parameters.
        objective: see :class:`Objective`.
        batches: the batch of a number, from 0 to ``steps · accumulate − 1``, different on each process.
        stage: how to train.
        held_out: batches that are measured every ``measure_every`` steps and at the end: metrics get the mean of each
            number over them, as ``held_out_loss`` and so on.
        name: of the stage, in the files it writes.
        out: folder for ``metrics.jsonl``, one JSON object a step (``loss`` and the objective's other numbers,
            ``lr``, ``grad_norm`` before clipping, ``skipped`` so far, ``tokens`` and ``seconds`` so far), and for
            ``<name>.safetensors``, the checkpoint. None writes nothing.
        resume: continue from the checkpoint in ``out``, if there is one; False begins anew.
        progress: called after each step with (steps done, metrics of the step).

    Raises:
        NonFiniteError: ``patience`` steps in a row, or all steps, had no finite gradient.
        CheckpointError: the checkpoint cannot be read, or belongs to another stage, model or data.
    """
    from accelerate.utils import broadcast

    state = processes()
    writing = out is not None and state.is_main_process
    folder = Path("." if out is None else out)
    path, log = folder / f"{name}.safetensors", folder / METRICS
    if writing:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
    first = batches(0)
    settings = _settings(model, objective, stage, first.tokens)
    restored = None
    if out is not None and resume and path.exists():
        restored = _read(path, settings if state.is_main_process else None)

    random = own_randomness(model, stage.seed, "prepare")
    with random, evaluating(model), _only(model, objective.parameters):
        if restored is None:
            objective.prepare(first)
            if state.num_processes > 1:  # each has prepared on a batch of its own
                for t in [*objective.parameters.values(), *objective.held.values()]:
                    t.data.copy_(broadcast(t.data))
        masters = {key: p.detach().to(_wide(p)) for key, p in objective.parameters.items()}
        groups: dict[float, list[Tensor]] = {} if masters else {1.0: []}  # an objective may train held tensors alone
        for key, master in masters.items():
            groups.setdefault(objective.factor(key), []).append(master)
        optimizer = torch.optim.AdamW(
            [{"params": params, "factor": factor} for factor, params in groups.items()],
            betas=stage.betas,
            weight_decay=stage.weight_decay,
        )
        done, skipped, in_a_row, before = 0, 0, 0, 0.0
        if restored is not None:
            tensors, counts = restored
            done, skipped, in_a_row, before = (counts[x] for x in ("step", "skipped", "in_a_row", "seconds"))
            _restore(tensors, objective, masters, optimizer, updates=done - skipped)
        losses = _kept_lines(log, name, done, rewrite=writing) if out is not None else []
        state.wait_for_everyone()
        resumed_at, started, per_step = done, time.perf_counter(), 0

        with open(log, "a", encoding="utf-8") if writing else contextlib.nullcontext() as lines:
            for step in range(done, stage.steps):
                torch.manual_seed(derived_seed(stage.seed, step, state.process_index))
                parts: dict[str, Any] = {}
                for part in range(stage.accumulate):
                    batch = batches(step * stage.accumulate + part)._replace(step=step)
                    with torch.enable_grad():
                        for key, value in objective(batch).items():
                            parts[key] = parts.get(key, 0.0) + value / stage.accumulate
                    _collect(objective.parameters, masters)
                    per_step = batch.tokens.numel() * stage.accumulate * state.num_processes
                parts = _average(masters, parts, stage.accumulate, state)
                norm = float(nn.utils.clip_grad_norm_(masters.values(), stage.clip))
                sums = {key: float(value) for key, value in parts.items()}
                usable = math.isfinite(norm) and math.isfinite(sums["loss"])
                if usable:
                    for group in optimizer.param_groups:
                        group["lr"] = stage.rate(step) * group["factor"]
                    optimizer.step()
                    _write_back(objective.parameters, masters)
                optimizer.zero_grad()
                skipped, in_a_row = skipped + (not usable), 0 if usable else in_a_row + 1
                losses.append(sums["loss"])
                done = step + 1
                if done % stage.measure_every == 0 or done == stage.steps:
                    sums |= _measure(objective, held_out)
                seconds = before + time.perf_counter() - started
                if lines is not None:
                    entry = {"stage": name, "step": done, **sums, "lr": stage.rate(step), "grad_norm": norm}
                    entry |= {"skipped": skipped, "tokens": done * per_step, "seconds": round(seconds, 3)}
                    lines.write(json.dumps({key: finite(value) for key, value in entry.items()}) + "\n")
                    lines.flush()
                if progress is not None:
                    progress(done, sums)
                if in_a_row >= min(stage.patience, stage.steps):
                    raise NonFiniteError(
                        f"{name}: none of the last {in_a_row} steps (up to step {done}) gave finite gradients; lower "
                        "learning_rate, or look for NaN in the model with torch.autograd.set_detect_anomaly(True)."
                    )
                if writing and (done % stage.save_every == 0 or done == stage.steps):
                    counts = {"step": done, "skipped": skipped, "in_a_row": in_a_row, "seconds": seconds}
                    _save(path, settings, counts, objective, masters, optimizer if done < stage.steps else None)
    state.wait_for_everyone()
    return Trained(losses, skipped, resumed_at, before + time.perf_counter() - started)


def processes() -> PartialState:
    """The processes of this run: those that ``accelerate launch`` or torchrun started, or one."""
    from accelerate import PartialState

    found = torch.distributed.is_available() and torch.distributed.is_initialized()
    state = PartialState(cpu=not torch.accelerator.is_available())
    if not found and state.num_processes > 1:
        # Left to the interpreter's end, the threads of the group may abort a process that has done all its work.
        atexit.register(state.destroy_process_group)
    return state


def derived_seed(*parts: Any) -> int:
    """A seed for whatever ``parts`` name: equal for equal parts, unrelated otherwise. 0 ≤ seed < 2⁶³."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def own_randomness(model: nn.Module, *parts: Any) -> Iterator[None]:
    """Random numbers from the seed that ``parts`` name; afterwards the caller's go on where they were."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(derived_seed(*parts))
        yield


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a file beside ``path``, which takes its place whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for ``parameters`` alone; afterwards theirs are gone and every flag is as before."""
    trained = {id(p) for p in parameters.values()}
    every = {id(p): p for p in [*model.parameters(), *parameters.values()]}
    before = {key: p.requires_grad for key, p in every.items()}
    try:
        for key, p in every.items():
            p.requires_grad_(key in trained)
            if key in trained:
                p.grad = None
        yield
    finally:
        for key, p in every.items():
            p.requires_grad_(before[key])
            if key in trained:
                p.grad = None


@torch.no_grad()
def _collect(parameters: Mapping[str, nn.Parameter], masters: dict[str, Tensor]) -> None:
    """Move the parameters' gradients to the masters, where they add up in float32."""
    for key, p in parameters.items():
        if p.grad is not None:
            grad, held = p.grad.to(masters[key].dtype), masters[key].grad
            masters[key].grad = grad if held is None else held + grad
            p.grad = None


@torch.no_grad()
def _average(masters: dict[str, Tensor], metrics: dict[str, Any], batches: int, state: PartialState) -> dict[str, Any]:
    """Means of the gradients over batches, zero where there was none; of these and the metrics over processes."""
    from accelerate.utils import reduce

    several = state.num_processes > 1
    for master in masters.values():
        grad = torch.zeros_like(master) if master.grad is None else master.grad
        grad = grad / batches if batches > 1 else grad
        master.grad = reduce(grad, "mean") if several else grad
    if not several:
        return metrics
    values = torch.tensor([float(value) for value in metrics.values()], dtype=torch.float64, device=state.device)
    return dict(zip(metrics, reduce(values, "mean").tolist(), strict=True))


def _measure(objective: Objective, batches: Sequence[Batch]) -> dict[str, float]:
    """Means of the objective's numbers over held-out batches, whose gradients are dropped."""
    sums: dict[str, float] = {}
    for batch in batches:
        with torch.enable_grad():
            for key, value in objective(batch._replace(held_out=True)).items():
                sums[f"held_out_{key}"] = sums.get(f"held_out_{key}", 0.0) + float(value) / len(batches)
        for p in objective.parameters.values():
            p.grad = None
    return sums


@torch.no_grad()
def _write_back(parameters: Mapping[str, nn.Parameter], masters: dict[str, Tensor]) -> None:
    if not parameters:
        return
    # The same memory, where a parameter is float32 itself.
    torch._foreach_copy_(list(parameters.values()), [masters[key] for key in parameters])


# Checkpoints: one safetensors file, whose header holds as JSON what is no tensor. Renaming one file is atomic.


def _settings(model: nn.Module, objective: Objective, stage: Stage, tokens: Tensor) -> dict[str, Any]:
    """What a checkpoint and its continuation must have in common."""
    options = {key: value for key, value in dataclasses.asdict(stage).items() if key not in FREE}
    trained = {id(p) for p in [*objective.parameters.values(), *objective.held.values()]}  # read from the checkpoint
    weights = 0
    for p in model.parameters():
        if id(p) not in trained and p.device.type != "meta":
            sample = p.detach().flatten()[:: max(1, p.numel() // 64)].float().cpu()
            weights = zlib.crc32(sample.numpy().tobytes(), weights)
    shapes = {key: list(p.shape) for key, p in objective.parameters.items()}
    settings = {
        "stage": type(stage).__name__,
        **options,
        "the trained parameters": shapes,
        "the frozen weights": weights,
        "the first batch": zlib.crc32(tokens.cpu().contiguous().numpy().tobytes()),
    }
    return json.loads(json.dumps(settings))


def _save(
    path: Path,
    settings: dict[str, Any],
    counts: dict[str, Any],
    objective: Objective,
    masters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Write a checkpoint; a finished stage needs no optimizer any more."""
    tensors = {f"held.{key}": t for key, t in objective.held.items()}
    for key, master in masters.items():
        tensors[f"master.{key}"] = master
        for moment in MOMENTS:
            if optimizer is not None and master in optimizer.state:
                tensors[f"{moment}.{key}"] = optimizer.state[master][moment]
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    metadata = {"format": FORMAT, "counts": json.dumps(counts), "settings": json.dumps(settings)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def _read(path: Path, settings: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and counts of a checkpoint, made under the same ``settings`` if they are given."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of a distillation stage.")
            before, counts = json.loads(metadata["settings"]), json.loads(metadata["counts"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: no readable checkpoint: {error}") from error
    now = before if settings is None else settings
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            short = len(repr((before.get(key), now.get(key)))) < 80
            how = f" {before.get(key)!r}, now {now.get(key)!r}" if short else " other than now"
            raise CheckpointError(
                f"{path}: was made with {key}{how}; continue with what it was made with, pass resume=False to begin "
                "anew, or choose another out."
            )
    return tensors, counts


@torch.no_grad()
def _restore(
    tensors: dict[str, Tensor],
    objective: Objective,
    masters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
) -> None:
    for key, t in objective.held.items():
        t.copy_(tensors[f"held.{key}"])
    for key, master in masters.items():
        master.copy_(tensors[f"master.{key}"])
        if f"{MOMENTS[0]}.{key}" in tensors:
            moments = {m: tensors[f"{m}.{key}"].to(master.device) for m in MOMENTS}
            optimizer.state[master] = {"step": torch.tensor(float(updates)), **moments}
    _write_back(objective.parameters, masters)


def _kept_lines(log: Path, name: str, done: int, *, rewrite: bool) -> list[float]:
    """Losses of the stage's first ``done`` steps from the metrics; later lines, and torn ones, leave the file."""
    if not log.exists():
        return []
    kept, losses = [], []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["stage"] != name:
            kept.append(line)
        elif entry["step"] <= done:
            kept.append(line)
            losses.append(math.nan if entry["loss"] is None else entry["loss"])
    if rewrite:
        text = "".join(line + "\n" for line in kept)
        write_atomically(log, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return losses
