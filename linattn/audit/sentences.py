"""What the parts of an audit say in words, from the dicts of :func:`linattn.audit.audit_model`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

NAMES = {"teacher": "its teacher", "control": "the untrained window of equal bytes"}
NAMES |= {"trained_control": "the trained window of equal bytes"}
PAIRS = {
    "far_branch": ("far_off", "student"),
    "retained": ("retained_off", "student"),
    "window_cost": ("far_off", "teacher"),
    "cost": ("student", "teacher"),
    "over_control": ("control", "student"),
    "over_layer_control": ("layer_control", "student"),
    "over_trained_control": ("trained_control", "student"),
}
"""Differences of losses: of the first over the second."""
FAINT = 0.1
"""Share of its teacher's far mass below which a layer counts as one that hardly looks back."""
ROUNDING = 0.01
"""Share of positions at which rounding alone may change the most likely token."""


def part_sentences(report: dict[str, Any]) -> list[str]:
    """Sentences about counterfactual text, telemetry, cache, recall and speed, of those that were measured."""
    sentences: list[str] = []
    if "counterfactual" in report:
        sentences += _counterfactual(report["counterfactual"], report["reach"], bool(report.get("retained")))
    if "telemetry" in report:
        sentences += _telemetry(report["telemetry"]["layers"], bool(report.get("retained")))
    if "cache" in report:
        sentences += _cache(report["cache"])
    if "recall" in report:
        sentences += _recall(report["recall"], report["reach"])
    if "speed" in report:
        sentences += _speed(report["speed"])
    return sentences


def _counterfactual(found: dict[str, Any], reach: int, retains: bool) -> Iterator[str]:
    models, near = found["models"], "windows and retained tokens" if retains else "windows"
    if models["student"]["beyond_reach"] is None:
        return
    yield (
        f"Another text further back than {reach} tokens changes its predictions by {_kl(models, 'student')} (KL), its "
        f"teacher's by {_kl(models, 'teacher')}, those of its {near} alone by {_kl(models, 'far_off')}."
    )
    stack = models["student"]["beyond_stack"]
    if stack is not None:
        changes = f"by {stack['mean']:.2g} nats" if stack["mean"] else "not at all"
        if alone := models["far_off"]["beyond_stack"]["mean"]:
            ways = "retained tokens or layers" if retains else "layers"
            changes += f" (by {alone:.2g} without the far branch, through {ways} kept softmax)"
        yield (
            f"Further back than {found['stacked_reach']} tokens, where its windows see nothing however they are "
            f"stacked, it changes them {changes}, its teacher's by {models['teacher']['beyond_stack']['mean']:.2g}."
        )


def _kl(models: dict[str, Any], name: str) -> str:
    return f"{models[name]['beyond_reach']['mean']:.2g} nats"


def _telemetry(layers: list[dict[str, Any]], retains: bool) -> Iterator[str]:
    near = "window, retained tokens and sinks" if retains else "window and sinks"
    ours, theirs = ([mean_of(layer[name]) for layer in layers] for name in ("far_mass", "teacher_far_mass"))
    faint = sum(a < FAINT * b for a, b in zip(ours, theirs, strict=True))
    yield (
        f"Of its attention {mean_of(ours):.1%} goes beyond {near}, of its teacher's {mean_of(theirs):.1%}; "
        f"less than a tenth of its teacher's in {faint} of {len(layers)} converted layers."
    )


def mean_of(values: Sequence[float | None]) -> float:
    """The mean of the numbers among ``values``; NaN without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _cache(found: dict[str, Any]) -> Iterator[str]:
    worst, other = (min(found[name], key=lambda check: check["agree"]) for name in ("student", "teacher"))
    how = "token by token" if worst["chunk"] == 1 else f"{worst['chunk']} tokens at a time"
    facts = (
        f"read {how}, its most likely token is that of one forward pass at "
        f"{worst['agree']:.1%} of the positions, its teacher's at {other['agree']:.1%}"
    )
    if worst["agree"] < other["agree"] - ROUNDING:
        yield f"Its cache changes what it says: {facts}."
    else:
        yield f"With the cache it says what it says without: {facts}."


def _recall(found: dict[str, list[dict[str, Any]]], reach: int) -> Iterator[str]:
    for task in dict.fromkeys(each["task"] for each in found["student"]):
        rows = {name: [each for each in each_model if each["task"] == task] for name, each_model in found.items()}
        far = {name: [each for each in each_task if each["distance"] > reach] for name, each_task in rows.items()}
        if not far["student"]:
            yield f"Task {task}: {_rate(rows['student'])} recalled, at distances of at most {reach} tokens only."
            continue
        others = ", ".join(f"{NAMES[name]} {_rate(each)}" for name, each in far.items() if name != "student")
        says = f"Task {task}: beyond {reach} tokens it recalls {_rate(far['student'])}, {others}"
        chance = far["student"][0]["chance"]
        says += f", a guess {chance:.2f}." if chance else "."
        rate, error = _pooled(far["teacher"])
        if rate - chance <= 2 * error:
            says += " Its teacher does not know the answers there either: this says nothing of the conversion."
        yield says


def _rate(rows: list[dict[str, Any]]) -> str:
    rate, error = _pooled(rows)
    return f"{rate:.2f} ± {error:.2f}"


def _pooled(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Rate over several distances, and its standard error as :class:`linattn.audit.Recall` has it."""
    found, prompts = (sum(row[name] for row in rows) for name in ("found", "prompts"))
    p = (found + 1) / (prompts + 2)
    return found / prompts, math.sqrt(p * (1 - p) / (prompts + 2))


def _speed(found: dict[str, Any]) -> Iterator[str]:
    teacher, student = found["teacher"][-1], found["student"][-1]
    times = f"{student['ms']:.3g} ms against {teacher['ms']:.3g} ms after {student['length']} tokens"
    if (first := found["faster_from"]) is None:
        yield f"Its decoding step is not faster than its teacher's at the longest text measured: {times}."
    else:
        measured = "of the lengths measured" if len(found["student"]) > 1 else "the only length measured"
        yield f"Its decoding step is faster than its teacher's from {first} tokens on, {measured}: {times}."
