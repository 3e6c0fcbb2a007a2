"""One report: a converted model beside its teacher, itself without its parts, and the window of equal bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linattn.audit.ablations import attention_off, converted_layers, far_off, near_off
from linattn.audit.far_gain import FarGain, gain_ratio, truncated_losses
from linattn.audit.memory import cheaper_from, equal_bytes_control, state_bytes
from linattn.audit.positions import EDGES, Bucket, Progress, by_position, check_tokens, mean_over, token_losses
from linattn.errors import OptionError, ShapeError

PARTS = {"far_off": far_off, "near_off": near_off, "attention_off": attention_off}
RESOLUTION = 0.25
"""Part of the window's own loss that a standard error must resolve for the absence of an effect to be one."""


def audit_model(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokens: Tensor,
    *,
    trained_control: PreTrainedModel | None = None,
    start: int | None = None,
    stride: int | None = None,
    edges: Sequence[int] = EDGES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Does a converted model use its far branch, and does the branch earn the bytes it takes?

    Both models are left as they were. All losses are cross-entropies in nats on the same windows, so that differences
    are taken window by window, and so are their standard errors.

    Args:
        teacher: the model before its conversion. student: the converted one.
        tokens: ``[N, T]`` int64, N ≥ 2 windows of text that neither was trained on, T well beyond window + sinks.
        trained_control: a model converted by ``equal_bytes_plan(student)`` and trained; its far branch is deleted.
        start: first position of the far-gain ratio; see :func:`far_gain`. Default 2,048, or T // 2 if that is less.
        stride: of its truncated contexts.
        edges: bounds of the position buckets.
        progress: called with (measurements done, measurements in all).

    Returns:
        A JSON-able dict:

        - ``verdict``: sentences.
        - ``reach``: tokens attended exactly, ``window + sinks``; with more of them before it, a token has a far branch.
        - ``models``: by name (``teacher``, ``student``, ``far_off``, ``near_off``, ``attention_off``, ``control``,
          ``trained_control``), the ``buckets`` of :class:`PositionLosses`, and of what is no ablation the ``bytes``
          (:class:`StateBytes`) at T tokens. ``windows`` of a control: tokens in the window of each converted layer.
        - ``beyond_reach``: means over the positions beyond ``reach``, of ``far_branch`` (far_off − student),
          ``window_cost`` (far_off − teacher), ``cost`` (student − teacher), ``over_control`` and
          ``over_trained_control`` (control − student). ``differences``: the same by position.
        - ``cheaper_from``: length from which the student's memory takes fewer bytes than the teacher's, or None.
        - ``far_gain``: :class:`FarGain`, with contexts of ``reach`` tokens.

    Raises:
        ShapeError: fewer than two windows, or windows that do not reach beyond ``window + sinks``.
        OptionError: ``start`` lies within ``window + sinks``, where nothing is far.
        ConversionError: ``student`` is not converted, or ``teacher`` is.
    """
    check_tokens(tokens)
    count, length = tokens.shape
    reach = max(layer.window + layer.sinks for layer in converted_layers(student))
    start = min(2048, length // 2) if start is None else start
    if count < 2 or length <= reach + 1:
        raise ShapeError(
            f"tokens: got {count} windows of {length} tokens, expected at least 2 (for standard errors) and more than "
            f"window + sinks = {reach} tokens, up to which nothing is far."
        )
    if not 1 <= reach <= start < length:
        raise OptionError(f"start={start}: expected window + sinks = {reach} ≤ start < T = {length}, and reach ≥ 1.")
    stride = max(1, reach // 4) if stride is None else stride

    losses: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}
    total, done = len(PARTS) + 5 + (trained_control is not None), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def measure(name: str, model: PreTrainedModel, *, control: bool = False) -> None:
        losses[name] = token_losses(model, tokens)
        facts[name] = by_position(losses[name], edges=edges).as_dict()
        if name not in PARTS:
            facts[name]["bytes"] = state_bytes(model, length).as_dict()
        if control:
            facts[name]["windows"] = [layer.window for layer in converted_layers(model)]
        step()

    measure("teacher", teacher)
    measure("student", student)
    for name, off in PARTS.items():
        with off(student):
            measure(name, student)
    with equal_bytes_control(teacher, student) as control:
        measure("control", control, control=True)
    if trained_control is not None:
        with far_off(trained_control):
            measure("trained_control", trained_control, control=True)
    gains = []
    for name, model in (("teacher", teacher), ("student", student)):
        truncated = truncated_losses(model, tokens, context=reach, start=start, stride=stride)
        gains.append(truncated - losses[name][:, start - 1 :])
        step()
    gain = gain_ratio(*gains, context=reach, start=start, stride=stride)

    pairs = {
        "far_branch": ("far_off", "student"),
        "window_cost": ("far_off", "teacher"),
        "cost": ("student", "teacher"),
        "over_control": ("control", "student"),
    }
    if trained_control is not None:
        pairs["over_trained_control"] = ("trained_control", "student")
    differences = {name: losses[a] - losses[b] for name, (a, b) in pairs.items()}
    beyond = {name: mean_over(values, start=reach + 1) for name, values in differences.items()}
    cheaper = cheaper_from(teacher, student)
    return {
        "verdict": verdict(beyond, gain, cheaper),
        "reach": reach,
        "models": facts,
        "beyond_reach": {name: bucket.as_dict() for name, bucket in beyond.items()},
        "differences": {name: by_position(values, edges=edges).as_dict() for name, values in differences.items()},
        "cheaper_from": cheaper,
        "far_gain": gain.as_dict(),
    }


def verdict(beyond: dict[str, Bucket], gain: FarGain, cheaper: int | None) -> list[str]:
    """Sentences that say what :func:`audit_model` found, the main one first.

    A difference counts when it is larger than its standard error. A far branch whose absence makes none that counts is
    a window in disguise, provided that the standard error would have shown the part ``RESOLUTION`` of what the window
    alone loses against the teacher; else the text cannot tell.
    """
    far, window = beyond["far_branch"], beyond["window_cost"]
    there = f"beyond {far.start - 1} tokens"
    if _counts(far) and far.mean > 0:
        says = f"It uses its far branch: without it, cross-entropy rises by {_nats(far)} {there}"
        share = f", where its window alone is {_nats(window)} worse than its teacher"
        says += (share if _counts(window) and window.mean > 0 else "") + "."
    elif _counts(far):
        says = f"Its far branch harms: without it, cross-entropy falls by {_nats(far)} {there}."
    elif far.standard_error <= RESOLUTION * max(window.mean, 0.0):
        says = (
            "It is a window-only model in disguise: without its far branch, cross-entropy changes by no more than the "
            f"standard error ({_nats(far)}) {there}."
        )
    else:
        says = (
            "Whether it uses its far branch, this text cannot tell: without the branch, cross-entropy changes by "
            f"{_nats(far)} {there}, and its window alone is but {window.mean:.4f} nats worse than its teacher. Use "
            "more or longer windows."
        )
    sentences = [says]
    for name, what in (("over_control", "untrained"), ("over_trained_control", "trained")):
        if (over := beyond.get(name)) is not None:
            outcome = "ties with" if not _counts(over) else "beats" if over.mean > 0 else "loses to"
            sentences.append(f"It {outcome} the {what} sliding window of equal state bytes ({_nats(over)} there).")
    cost = beyond["cost"]
    told = "no measurable cross-entropy" if not _counts(cost) else _nats(cost)
    worse = "It loses" if not _counts(cost) or cost.mean > 0 else "It gains"
    sentences.append(f"{worse} {told} against its teacher there.")
    if math.isfinite(gain.ratio):
        sentences.append(
            f"From position {gain.teacher.start} on, it gains {gain.ratio:.2f} ± {gain.standard_error:.2f} of what its "
            f"teacher gains from text further back than {gain.context} tokens."
        )
    else:
        sentences.append(
            f"From position {gain.teacher.start} on, its teacher gains nothing from text further back than "
            f"{gain.context} tokens: this text cannot tell how well distant text is used."
        )
    if cheaper is None:
        sentences.append("Its memory takes more bytes than its teacher's at any length.")
    else:
        sentences.append(f"Its memory takes fewer bytes than its teacher's from {cheaper} tokens on.")
    return sentences


def _counts(bucket: Bucket) -> bool:
    return abs(bucket.mean) > bucket.standard_error


def _nats(bucket: Bucket) -> str:
    return f"{abs(bucket.mean):.4f} ± {bucket.standard_error:.4f} nats"
