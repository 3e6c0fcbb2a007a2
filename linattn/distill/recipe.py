"""Stages one after the other: from a converted model to one that deserves its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linattn.distill.data import Windows
from linattn.distill.engine import Batch, Stage, finite, processes, train, write_atomically
from linattn.distill.logits import CachedTeacher, Logits
from linattn.distill.transfer import Transfer
from linattn.errors import LinattnError, OptionError

KINDS: dict[str, type[Transfer] | type[Logits]] = {"transfer": Transfer, "logits": Logits}
"""Stages by the name they have in files."""
MODEL = "model"
REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        name: in the folder's files. steps: it took. first, last: its loss at the first and the last of them, None
            where that is not finite.
        skipped: steps left out because a gradient was not finite. seconds: in all runs of it.
    """

    name: str
    steps: int
    first: float | None
    last: float | None
    skipped: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`distill` did, and where the model is."""

    stages: tuple[StageReport, ...]
    model: str

    def __str__(self) -> str:
        lines = [
            f"{stage.name}: loss {stage.first} → {stage.last} in {stage.steps} steps, {stage.seconds:.0f} s"
            + (f", {stage.skipped} skipped" if stage.skipped else "")
            for stage in self.stages
        ]
        return "\n".join([*lines, f"saved to {self.model}"])


def distill(
    model: nn.Module,
    teacher: nn.Module | CachedTeacher | None,
    stages: Sequence[Transfer | Logits],
    *,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Report:
    """Train a converted model through stages, in place, and save it.

    Called again with the same arguments on a model converted in the same way, it goes on where it was stopped, to the
    bit: finished stages are read from their checkpoints. The usual order is transfer, then logits (arXiv:2410.10254,
    arXiv:2408.10189).

    Args:
        model: a converted causal model.
        teacher: the model before conversion, for stages that need it, or a :class:`CachedTeacher`.
        stages: in order; :func:`read_stages` reads them from a file.
        out: folder for ``metrics.jsonl`` (see :func:`train`), a checkpoint of every stage, ``stages.json``, and in the
            end ``report.json`` and ``model/``, which :func:`linattn.load` reads.
        data: file of tokens for the stages that name none.
        resume: False begins anew.
        progress: show a bar for each stage, on a terminal.

    Raises:
        OptionError: there are no stages, or a stage has no data.
        ConversionError, UnsupportedError, NonFiniteError, CheckpointError: as the stages and :func:`train` say.
    """
    if not stages:
        raise OptionError("stages: got none, expected at least one, as Transfer(steps=1000).")
    names = [f"{number}-{_kind(stage)}" for number, stage in enumerate(stages, 1)]
    paths = [stage.data or data for stage in stages]
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise OptionError(f"data: stage {name} names no file of tokens; pass one that pack() wrote.")
    state, folder = processes(), Path(out)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_stages(stages, folder / "stages.json")
        for name in [] if resume else names:
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
    reports = []
    for name, stage, path in zip(names, stages, paths, strict=True):
        windows = Windows(path, stage.length, seed=stage.seed, repeats=stage.repeats)  # type: ignore[arg-type]
        batches = windows.batches(stage.rows, rank=state.process_index, processes=state.num_processes)
        measured = _measured(stage)
        with stage.objective(model, teacher) as objective, _bar(name, stage.steps, progress) as watch:
            done = train(
                model,
                objective,
                batches,
                stage,
                held_out=measured,
                name=name,
                out=folder,
                resume=resume,
                progress=watch,
            )
        first, last = (finite(done.losses[at]) if done.losses else None for at in (0, -1))
        reports.append(StageReport(name, stage.steps, first, last, done.skipped, round(done.seconds, 3)))
    report = Report(tuple(reports), str(folder / MODEL))
    if state.is_main_process:
        model.save_pretrained(folder / MODEL)  # type: ignore[operator]
        text = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
        write_atomically(folder / REPORT, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    state.wait_for_everyone()
    return report


def read_stages(path: str | os.PathLike[str]) -> list[Transfer | Logits]:
    """Stages from a JSON file: ``{"stages": [{"kind": "transfer", "steps": 1000, …}, …]}``.

    A stage's fields are those of its class in :data:`KINDS`; what is left out has the class's default.

    Raises:
        OptionError: the file holds no such list; stage and field are named.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f'{path}: no stages there ({error!r}); expected {{"stages": [{{"kind": …}}, …]}}.') from error
    stages = []
    for number, entry in enumerate(entries, 1):
        fields = dict(entry) if isinstance(entry, Mapping) else {}
        kind = fields.pop("kind", None)
        if kind not in KINDS:
            raise OptionError(f"{path}: stage {number} has kind={kind!r}, expected one of {', '.join(KINDS)}.")
        known = [field.name for field in dataclasses.fields(KINDS[kind])]
        if unknown := [name for name in fields if name not in known]:
            raise OptionError(f"{path}: stage {number} ({kind}) has no {unknown}; it takes {', '.join(known)}.")
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        try:
            stages.append(KINDS[kind](**values))
        except (LinattnError, TypeError) as error:
            raise OptionError(f"{path}: stage {number} ({kind}): {error}") from error
    return stages


def write_stages(stages: Sequence[Transfer | Logits], path: str | os.PathLike[str]) -> None:
    """Write what :func:`read_stages` reads, every field spelled out."""
    entries = [{"kind": _kind(stage)} | dataclasses.asdict(stage) for stage in stages]
    text = json.dumps({"stages": entries}, indent=2) + "\n"
    write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _measured(stage: Stage) -> list[Batch]:
    """The held-out windows of a stage, in batches."""
    if not stage.held_out:
        return []
    windows = Windows(stage.held_out, stage.length, seed=None)
    count = min(stage.held_out_windows, len(windows))
    return [
        Batch(torch.stack([windows[i] for i in range(start, min(start + stage.rows, count))]))
        for start in range(0, count, stage.rows)
    ]


def _kind(stage: Stage) -> str:
    for kind, cls in KINDS.items():
        if type(stage) is cls:
            return kind
    raise OptionError(f"stages: got {stage!r}, expected {' or '.join(cls.__name__ for cls in KINDS.values())} objects.")


@contextlib.contextmanager
def _bar(name: str, steps: int, shown: bool) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Steps done, their loss and the time left, on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text = (TextColumn("{task.description}"), TextColumn("{task.fields[note]}"))
    with Progress(text[0], *columns, text[1], console=console, disable=not (shown and console.is_terminal)) as bars:
        task = bars.add_task(name, total=steps, note="")

        def watch(done: int, metrics: Mapping[str, float]) -> None:
            bars.update(task, completed=done, note=" ".join(f"{key} {value:.4f}" for key, value in metrics.items()))

        yield watch
