"""One report: a converted model beside its teacher, itself without its parts, and the window of equal bytes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from linattn.audit.ablations import attention_off, converted_layers, far_off, near_off, retained_off
from linattn.audit.cached import compare_cached
from linattn.audit.counterfactual import counterfactual_kl, stacked_reach
from linattn.audit.far_gain import FarGain, gain_ratio, truncated_losses
from linattn.audit.memory import cheaper_from, equal_bytes_control, state_bytes
from linattn.audit.positions import EDGES, Bucket, Progress, by_position, check_tokens, mean_over, token_losses
from linattn.audit.recall import Recall
from linattn.audit.sentences import PAIRS, part_sentences
from linattn.audit.speed import decode_speed, faster_from
from linattn.audit.telemetry import layer_telemetry
from linattn.errors import OptionError, ShapeError

ABLATIONS = {"far_off": far_off, "near_off": near_off, "retained_off": retained_off, "attention_off": attention_off}
PARTS = ("losses", "far_gain", "counterfactual", "telemetry", "cache", "recall", "speed")
"""What :func:`audit_model` measures."""
RESOLUTION = 0.25
"""Part of the window's own loss that a standard error must resolve for the absence of an effect to be one."""
TELEMETRY_WINDOWS = 4
"""Windows of text that telemetry reads."""
CACHED_TOKENS = 128
"""Tokens beyond those attended exactly up to which reading with the cache is compared."""
SPEED_LENGTHS = (256, 1024, 4096, 16384)
MARGIN = 32
"""Positions that timed steps may take beyond a length."""

MeasureRecall = Callable[[PreTrainedModel], Sequence[Recall]]


def audit_model(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokens: Tensor,
    *,
    parts: Sequence[str] = PARTS,
    recall: MeasureRecall | None = None,
    trained_control: PreTrainedModel | None = None,
    context: int | None = None,
    start: int | None = None,
    stride: int | None = None,
    edges: Sequence[int] = EDGES,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Does a converted model use its far branch, and does the branch earn the bytes it takes?

    Both models are left as they were. All losses are cross-entropies in nats on the same windows, so that differences
    are taken window by window, and so are their standard errors.

    Args:
        teacher: the model before its conversion. student: the converted one.
        tokens: ``[N, T]`` int64, N ≥ 2 windows of text that neither was trained on, T well beyond what the
            student attends exactly. Losses can be told of shorter ones, too, and far gains beyond a ``context``: layers
            may differ in what they attend.
        parts: what to measure, of ``PARTS``.
        recall: measures one model, as ``lambda model: recall_by_distance(model, tasks, text, distances=…)``; without
            it there is no part ``recall``.
        trained_control: a model converted by ``equal_bytes_plan(student)`` and trained; a far branch would be deleted.
        context: tokens of the truncated contexts of the far-gain ratio; see :func:`far_gain`. Default ``reach``; less
            says what retained tokens and far branch gain together beyond so many.
        start: first position of that ratio. Default 2,048, or T // 2 if that is less. stride: of its contexts.
        edges: bounds of the position buckets.
        lengths: at which decoding is timed. Default those of 256, 1,024, 4,096 and 16,384 tokens up to 4 T that the
            teacher has positions for, or T.
        progress: called with (measurements done, measurements in all).

    Returns:
        A JSON-able dict:

        - ``verdict``: sentences.
        - ``length``: T. ``windows``: N.
        - ``reach``: tokens attended exactly: window, retained ones and sinks; with more of them before it, a token has
          a far branch. ``retained``: those among them behind the window. Of the layer that has most.
        - ``cheaper_from``: length from which the student's memory takes fewer bytes than the teacher's, or None.

        and of the parts:

        - of ``losses``, ``models``: by name (``teacher``, ``student``, ``far_off``, ``near_off``, ``attention_off``,
          ``control``, ``trained_control``, ``retained_off`` where tokens are retained, and ``layer_control`` where they
          are or the far layers' windows differ: those of each layer's bytes) the ``buckets`` of
          :class:`PositionLosses`, and of what is no ablation the ``bytes`` (:class:`StateBytes`) at T tokens;
          ``windows`` of a control: tokens in the window of each converted layer. ``beyond_reach``: means over the
          positions beyond ``reach``, of ``far_branch`` (far_off − student), ``retained`` (retained_off − student),
          ``window_cost`` (far_off − teacher), ``cost`` (student − teacher), ``over_control``, ``over_layer_control``
          and ``over_trained_control`` (control − student); empty if there are none. ``differences``: the same by
          position.
        - ``far_gain``: :class:`FarGain`, with contexts of ``context`` tokens.
        - ``counterfactual``: :func:`counterfactual_kl` of ``teacher``, ``student`` and ``far_off`` under ``models``:
          ``buckets`` by the number of intact tokens, of which there are up to T // 2, and the means ``beyond_reach``
          and ``beyond_stack``, from ``stacked_reach`` intact tokens on; None where the text is too short.
        - ``telemetry``: ``layers`` (:class:`LayerTelemetry`).
        - ``cache``: :class:`CacheCheck` of ``teacher`` and ``student``.
        - ``recall``: :class:`Recall` of ``teacher``, ``student``, ``control`` and ``trained_control``.
        - ``speed``: :class:`DecodeSpeed` of ``teacher`` and ``student``, ``faster_from``: see :func:`faster_from`.

    Raises:
        ShapeError: fewer than two windows, or windows that do not reach beyond what is attended exactly and parts
            other than ``losses`` and a far gain whose ``context`` is given.
        OptionError: an unknown part; ``start`` lies within it, where nothing is far.
        ConversionError: ``student`` is not converted, or ``teacher`` is.
    """
    check_tokens(tokens)
    count, length = tokens.shape
    layers = converted_layers(student)
    reach, retained, sinks = (max(getattr(layer, name) for layer in layers) for name in ("reach", "retained", "sinks"))
    near = "window + retained + sinks" if retained else "window + sinks"
    start = min(2048, length // 2) if start is None else start
    if unknown := sorted({*parts} - {*PARTS}):
        raise OptionError(f"parts: got {', '.join(unknown)}; expected some of {', '.join(PARTS)}.")
    wanted = [part for part in PARTS if part in parts and (part != "recall" or recall is not None)]
    beyond_all, of_any_length = length > reach + 1, {"losses", *(["far_gain"] if context is not None else [])}
    if count < 2 or not (beyond_all or {*wanted} <= of_any_length):
        raise ShapeError(
            f"tokens: got {count} windows of {length} tokens, expected at least 2 (for standard errors) and more than "
            f"{near} = {reach} tokens, up to which nothing is far."
        )
    named = f"{near} = {reach}" if context is None else f"context = {context}"
    context = reach if context is None else context
    if "far_gain" in wanted and not 1 <= context <= start < length:
        raise OptionError(f"start={start}: expected 1 ≤ {named} ≤ start < T = {length}.")
    stride = max(1, context // 4) if stride is None else stride
    if lengths is None:
        positions = getattr(teacher.config, "max_position_embeddings", None) or 4 * length
        lengths = [each for each in SPEED_LENGTHS if each <= min(4 * length, positions - MARGIN)] or [length]

    controls = 1 + (trained_control is not None)
    costs = {
        "losses": 2 + len(_ablations(student)) + controls + _differ(student),
        "far_gain": 2,
        "counterfactual": 3,
        "cache": 2,
        "speed": 2,
    }
    costs |= {"telemetry": 1, "recall": 2 + controls}
    # The gains are differences of losses; where these are no part of the report, two of them are still measured.
    total = sum(costs[part] for part in wanted) + 2 * ("far_gain" in wanted and "losses" not in wanted)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    pair = (("teacher", teacher), ("student", student))
    report: dict[str, Any] = {"length": length, "windows": count, "reach": reach, "retained": retained}
    report["cheaper_from"] = cheaper = cheaper_from(teacher, student)
    beyond: dict[str, Bucket] = {}
    gain = None
    losses: dict[str, Tensor] = {}
    if "losses" in wanted:
        losses, facts = _losses(teacher, student, trained_control, tokens, edges, step)
        differences = {name: losses[a] - losses[b] for name, (a, b) in PAIRS.items() if a in losses}
        if beyond_all:
            beyond = {name: mean_over(values, start=reach + 1) for name, values in differences.items()}
        report["models"] = facts
        report["beyond_reach"] = {name: bucket.as_dict() for name, bucket in beyond.items()}
        report["differences"] = {
            name: by_position(values, edges=edges).as_dict() for name, values in differences.items()
        }
    if "far_gain" in wanted:
        gains = []
        for name, model in pair:
            if name not in losses:
                losses[name] = token_losses(model, tokens)
                step()
            truncated = truncated_losses(model, tokens, context=context, start=start, stride=stride)
            gains.append(truncated - losses[name][:, start - 1 :])
            step()
        gain = gain_ratio(*gains, context=context, start=start, stride=stride)
        report["far_gain"] = gain.as_dict()
    if "counterfactual" in wanted:
        boundary = max(length // 2, sinks + 1)
        report["counterfactual"] = _counterfactual(teacher, student, tokens, boundary, reach, sinks, edges, step)
    if "telemetry" in wanted:
        found = layer_telemetry(teacher, student, tokens[:TELEMETRY_WINDOWS])
        report["telemetry"] = {"layers": [layer.as_dict() for layer in found]}
        step()
    if "cache" in wanted:
        report["cache"] = {}
        for name, model in pair:
            checks = compare_cached(model, tokens[:1, : reach + CACHED_TOKENS])
            report["cache"][name] = [check._asdict() for check in checks]
            step()
    if "recall" in wanted and recall is not None:
        report["recall"] = {}
        with contextlib.closing(_with_controls(teacher, student, trained_control)) as models:
            for name, model in models:
                report["recall"][name] = [found.as_dict() for found in recall(model)]
                step()
    if "speed" in wanted:
        times = {}
        for name, model in pair:
            times[name] = decode_speed(model, tokens.flatten(), lengths=lengths)
            step()
        report["speed"] = {name: [at._asdict() for at in found] for name, found in times.items()}
        report["speed"]["faster_from"] = faster_from(times["teacher"], times["student"])
    return {"verdict": [*verdict(beyond, gain, cheaper), *part_sentences(report)], **report}


CONTROLS = {
    "over_control": "the untrained sliding window of equal state bytes",
    "over_layer_control": "untrained sliding windows of each layer's bytes, its layout without its far branches",
    "over_trained_control": "the trained sliding window of equal state bytes",
}
"""What a verdict calls the models that take as many bytes."""


def _with_controls(
    teacher: PreTrainedModel, student: PreTrainedModel, trained_control: PreTrainedModel | None
) -> Generator[tuple[str, PreTrainedModel], None, None]:
    """Every model but the ablations, by name, each in the form it is measured in until the next is asked for."""
    yield "teacher", teacher
    yield "student", student
    with equal_bytes_control(teacher, student) as control:
        yield "control", control
    if trained_control is not None:
        with far_off(trained_control):
            yield "trained_control", trained_control


def _differ(student: PreTrainedModel) -> bool:
    """Whether the windows of its far layers do, or tokens are retained: then the layout is a part of its worth."""
    layers = converted_layers(student)
    return len({layer.window for layer in layers}) > 1 or any(layer.retained for layer in layers)


def _ablations(student: PreTrainedModel) -> list[str]:
    """Those of ``ABLATIONS`` that take something away."""
    retains = any(layer.retained for layer in converted_layers(student))
    return [name for name in ABLATIONS if retains or name != "retained_off"]


def _losses(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    trained_control: PreTrainedModel | None,
    tokens: Tensor,
    edges: Sequence[int],
    step: Callable[[], None],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Losses of all models and ablations, and what the report says of each."""
    losses: dict[str, Tensor] = {}
    facts: dict[str, dict[str, Any]] = {}

    def measure(name: str, model: PreTrainedModel) -> None:
        losses[name] = token_losses(model, tokens)
        facts[name] = by_position(losses[name], edges=edges).as_dict()
        step()

    def weigh(name: str, model: PreTrainedModel) -> None:
        measure(name, model)
        facts[name]["bytes"] = state_bytes(model, tokens.shape[1]).as_dict()
        if name.endswith("control"):
            facts[name]["windows"] = [layer.window for layer in converted_layers(model)]

    with contextlib.closing(_with_controls(teacher, student, trained_control)) as models:
        for name, model in models:
            weigh(name, model)
    if _differ(student):
        with equal_bytes_control(teacher, student, by_layer=True) as control:
            weigh("layer_control", control)
    for name in _ablations(student):
        with ABLATIONS[name](student):
            measure(name, student)
    return losses, facts


def _counterfactual(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokens: Tensor,
    boundary: int,
    reach: int,
    sinks: int,
    edges: Sequence[int],
    step: Callable[[], None],
) -> dict[str, Any]:
    intact, stack = tokens.shape[1] - boundary, stacked_reach(student)
    models = {}
    for name, model in (("teacher", teacher), ("student", student), ("far_off", student)):
        with far_off(model) if name == "far_off" else contextlib.nullcontext():
            values = counterfactual_kl(model, tokens, boundary=boundary, sinks=sinks)
        beyond = mean_over(values, start=reach + 1).as_dict() if intact > reach else None
        stacked = mean_over(values, start=stack).as_dict() if intact >= stack else None
        models[name] = by_position(values, edges=edges).as_dict() | {"beyond_reach": beyond, "beyond_stack": stacked}
        step()
    return {"boundary": boundary, "stacked_reach": stack, "models": models}


def verdict(beyond: dict[str, Bucket], gain: FarGain | None, cheaper: int | None) -> list[str]:
    """Sentences that say what the losses and the memory show, the main one first; nothing of what was not measured.

    A difference counts when it is larger than its standard error. A far branch whose absence makes none that counts is
    a window in disguise, provided that the standard error would have shown the part ``RESOLUTION`` of what the window
    alone loses against the teacher; else the text cannot tell.
    """
    sentences = [*_loss_sentences(beyond)] if beyond else []
    if gain is not None and math.isfinite(gain.ratio):
        sentences.append(
            f"From position {gain.teacher.start} on, it gains {gain.ratio:.2f} ± {gain.standard_error:.2f} of what its "
            f"teacher gains from text further back than {gain.context} tokens."
        )
    elif gain is not None:
        sentences.append(
            f"From position {gain.teacher.start} on, its teacher gains nothing from text further back than "
            f"{gain.context} tokens: this text cannot tell how well distant text is used."
        )
    if cheaper is None:
        sentences.append("Its memory takes more bytes than its teacher's at any length.")
    else:
        sentences.append(f"Its memory takes fewer bytes than its teacher's from {cheaper} tokens on.")
    return sentences


def _loss_sentences(beyond: dict[str, Bucket]) -> Iterator[str]:
    far, window, retained = beyond["far_branch"], beyond["window_cost"], beyond.get("retained")
    alone = "its window alone is" if retained is None else "its window and retained tokens alone are"
    there = f"beyond {far.start - 1} tokens"
    if _counts(far) and far.mean > 0:
        says = f"It uses its far branch: without it, cross-entropy rises by {_nats(far)} {there}"
        share = f", where {alone} {_nats(window)} worse than its teacher"
        says += (share if _counts(window) and window.mean > 0 else "") + "."
    elif _counts(far):
        says = f"Its far branch harms: without it, cross-entropy falls by {_nats(far)} {there}."
    elif far.standard_error <= RESOLUTION * max(window.mean, 0.0):
        says = (
            f"It is a {'window-only' if retained is None else 'near-only'} model in disguise: without its far branch, "
            f"cross-entropy changes by no more than the standard error ({_nats(far)}) {there}."
        )
    else:
        says = (
            "Whether it uses its far branch, this text cannot tell: without the branch, cross-entropy changes by "
            f"{_nats(far)} {there}, and {alone} but {window.mean:.4f} nats worse than its teacher. Use "
            "more or longer windows."
        )
    yield says
    if retained is not None:
        if _counts(retained):
            worth, effect = ("help", "rises") if retained.mean > 0 else ("harm", "falls")
            change = f"{effect} by {_nats(retained)}"
        else:
            worth, change = "make no difference that counts", f"changes by no more than the error ({_nats(retained)})"
        yield f"Its retained tokens {worth}: with them far like their neighbours, cross-entropy {change} there."
    for name, what in CONTROLS.items():
        if (over := beyond.get(name)) is not None:
            outcome = "ties with" if not _counts(over) else "beats" if over.mean > 0 else "loses to"
            yield f"It {outcome} {what} ({_nats(over)} there)."
    cost = beyond["cost"]
    told = "no measurable cross-entropy" if not _counts(cost) else _nats(cost)
    worse = "It loses" if not _counts(cost) or cost.mean > 0 else "It gains"
    yield f"{worse} {told} against its teacher there."


def _counts(bucket: Bucket) -> bool:
    return abs(bucket.mean) > bucket.standard_error


def _nats(bucket: Bucket) -> str:
    return f"{abs(bucket.mean):.4f} ± {bucket.standard_error:.4f} nats"
