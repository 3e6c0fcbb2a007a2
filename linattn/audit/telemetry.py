"""What the layers of a converted model do on a text: how much they look far back, how fast they forget, what they hold.

The weight of a part of the attention is measured by the operator itself. With values of one and a sink logit s that has
no value, its output is D / (D + eˢ), where D is the sum of the weights of all tokens; it is taken with the far branch
and without. This holds for every feature map, with decay, far bias and softcap, and takes no O(T²) memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linattn._modes import evaluating
from linattn.audit.ablations import converted_layers
from linattn.audit.memory import empty_cache
from linattn.audit.positions import check_tokens, finite
from linattn.convert import ConversionPlan, ConvertedAttention, LinattnCacheLayer, convert_model, revert_model
from linattn.errors import ShapeError

SINK = 200.0
"""Sink logit beside which sums of weights are measured: far above them, and far from the limits of float64."""


class LayerTelemetry(NamedTuple):
    """One converted layer on a text.

    Attributes:
        layer: position among the model's attention layers. path: of its attention module.
        far_mass: ``[H]`` share of the attention that goes to far tokens, averaged over the queries that have any.
        teacher_far_mass: ``[H]`` the same of the teacher's softmax attention, over the same tokens.
        half_life: ``[Hkv]`` tokens after which the far branch has forgotten half, at the mean rate over the text; None
            without decay.
        effective_rank: ``[Hkv]`` of the state after the text: the exponential of the entropy of its normalised singular
            values (Roy and Vetterli 2007), from 1 to ``greatest_rank``. NaN of an empty state.
        greatest_rank: the smaller of feature_dim and head_dim.
    """

    layer: int
    path: str
    far_mass: tuple[float, ...]
    teacher_far_mass: tuple[float, ...]
    half_life: tuple[float, ...] | None
    effective_rank: tuple[float, ...]
    greatest_rank: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; None where a number is not finite."""
        return {
            name: [finite(x) for x in value] if isinstance(value, tuple) else value
            for name, value in self._asdict().items()
        }


@torch.no_grad()
def layer_telemetry(teacher: PreTrainedModel, student: PreTrainedModel, tokens: Tensor) -> list[LayerTelemetry]:
    """Far mass, half-lives and effective ranks of every converted layer of ``student``, beside its ``teacher``.

    Each model reads the text by itself: the teacher's masses are those of its own queries and keys. Both are left as
    they were.

    Args:
        teacher: the model before its conversion. student: the converted one.
        tokens: ``[N, T]`` int64, T > window + sinks of every converted layer.

    Raises:
        ShapeError: the windows do not reach beyond ``window + sinks``.
        ConversionError: ``student`` is not converted, or ``teacher`` is.
    """
    check_tokens(tokens)
    layers = converted_layers(student)
    plan = ConversionPlan.from_dict(student.config.linattn)
    reach = max(layer.window + layer.sinks for layer in layers)
    if tokens.shape[1] <= reach:
        raise ShapeError(
            f"tokens: got windows of {tokens.shape[1]} tokens, expected more than window + sinks = {reach}."
        )
    seen = _observed(student, tokens, layers, _student_facts, cached=True)
    with _as_windows(teacher, plan, tokens.shape[1]) as (softmax, near):
        ours = dict(zip(softmax, near, strict=True))
        exact = _observed(teacher, tokens, softmax, lambda layer, *call: _teacher_facts(layer, ours[layer], *call))
    found = []
    for layer, planned, mine, theirs in zip(layers, plan.converted, seen, exact, strict=True):
        rates = mine.get("rate")
        found.append(
            LayerTelemetry(
                planned.index,
                planned.path,
                tuple(mine["far_mass"].tolist()),
                tuple(theirs["far_mass"].tolist()),
                None if rates is None else tuple((math.log(2) / rates).tolist()),
                tuple(mine["rank"].tolist()),
                min(layer.feature_map.feature_dim, layer.feature_map.head_dim),
            )
        )
    return found


Facts = dict[str, Tensor]


def _observed(
    model: PreTrainedModel,
    tokens: Tensor,
    layers: list[ConvertedAttention],
    facts: Callable[..., Facts],
    *,
    cached: bool = False,
) -> list[Facts]:
    """What ``facts(layer, q, k, options)`` says of each layer, averaged over the windows of a text."""
    sums: dict[ConvertedAttention, Facts] = {layer: {} for layer in layers}

    def hook(layer: Any, args: tuple[Any, ...], options: dict[str, Any], _: Any) -> None:
        for name, value in facts(layer, *args[:2], options).items():
            sums[layer][name] = sums[layer].get(name, 0) + value.double().cpu() / len(tokens)

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for row in tokens:
                cache = empty_cache(model) if cached else None
                model.base_model(row[None].to(device), past_key_values=cache, use_cache=cached)
    finally:
        for handle in hooks:
            handle.remove()
    return [sums[layer] for layer in layers]


def _student_facts(layer: ConvertedAttention, q: Tensor, k: Tensor, options: dict[str, Any]) -> Facts:
    total = _weight(layer, q, k, options)
    with _set(layer, far=False):
        near = _weight(layer, q, k, options)
    facts = {"far_mass": _far_mass(total, near, layer.window + layer.sinks, options)}
    gates = layer.log_gates(k)
    if gates is not None:
        facts["rate"] = -gates.double().flatten(0, -2).mean(0) if gates.ndim > 1 else -gates.double()
    cache_layer: LinattnCacheLayer = options["cache_layer"]
    assert cache_layer.state is not None  # the layer has just stored it
    facts["rank"] = _effective_rank(cache_layer.state.kv[0])
    return facts


def _teacher_facts(
    layer: ConvertedAttention, near: tuple[int, int], q: Tensor, k: Tensor, options: dict[str, Any]
) -> Facts:
    total = _weight(layer, q, k, options)
    with _set(layer, window=near[0], sinks=near[1]):
        exact = _weight(layer, q, k, options)
    return {"far_mass": _far_mass(total, exact, sum(near), options)}


def _weight(layer: ConvertedAttention, q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """``[B, T, H]`` float64: the sum of the weights of all tokens that each query attends to, over exp(SINK)."""
    ones = k.new_ones(*k.shape[:3], 1, dtype=torch.float64)
    sink = torch.full((q.shape[2],), SINK, dtype=torch.float64, device=q.device)
    options = {**options, "sink_logits": sink, "cache_layer": None}
    out = ConvertedAttention.forward(layer, q.double(), k.double(), ones, **options)[..., 0]
    return out / (1 - out)


def _far_mass(total: Tensor, near: Tensor, nearest: int, options: dict[str, Any]) -> Tensor:
    """``[H]``: share of far tokens in the normaliser, in which the layer's own sink logits count."""
    sinks = options.get("sink_logits")
    most = total if sinks is None else total + (sinks.double() - SINK).exp()
    return ((total - near) / most)[:, nearest:].mean((0, 1))


def _effective_rank(matrix: Tensor) -> Tensor:
    """``[Hkv]`` of ``[Hkv, F, V]``."""
    singular = torch.linalg.svdvals(matrix.double())
    return torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()


@contextlib.contextmanager
def _as_windows(
    teacher: PreTrainedModel, plan: ConversionPlan, length: int
) -> Iterator[tuple[list[ConvertedAttention], list[tuple[int, int]]]]:
    """``teacher`` with the layers of ``plan`` computing their softmax by the operator: a window of all they see.

    Yields these layers, and of each the window and the sinks that the plan gives it.
    """
    plan = ConversionPlan.from_dict(plan.to_dict())
    near = []
    for planned in plan.converted:
        # A layer with a sliding window of its own sees no sinks beyond it.
        near.append((planned.window, planned.sinks if planned.native_window is None else 0))
        planned.feature_map, planned.feature_map_options, planned.decay = "elu", {}, None
    windows = convert_model(teacher, plan=plan)
    try:
        layers = converted_layers(windows)
        for layer in layers:
            layer.far, layer.sinks = False, 0
            layer.window = length if layer.native_window is None else layer.native_window
        yield layers, near
    finally:
        revert_model(windows)


@contextlib.contextmanager
def _set(layer: ConvertedAttention, **values: Any) -> Iterator[None]:
    """Other values of a layer's attributes while the context lasts."""
    before = {name: getattr(layer, name) for name in values}
    try:
        for name, value in values.items():
            setattr(layer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)
