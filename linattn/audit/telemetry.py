"""What the layers of a converted model do on a text: how much they look far back, how fast they forget, what they hold.

The weight of a part of the attention is measured by the operator itself. With values of one and a sink logit s that has
no value, its output is D / (D + eˢ), where D is the sum of the weights of all tokens; it is taken with the far branch
and without. This holds for every feature map, with decay, far bias and softcap, and takes no O(T²) memory, nor does the
teacher's softmax, which is taken some queries at a time.
"""

from __future__ import annotations

import functools
import math
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
QUERIES_AT_ONCE = 256
"""Queries of which the teacher's attention weights stand in memory."""


class LayerTelemetry(NamedTuple):
    """One converted layer on a text. Hkv counts its states: with ``per_head``, one for each query head.

    Attributes:
        layer: position among the model's attention layers. path: of its attention module.
        far_mass: ``[H]`` share of the attention that goes to far tokens, averaged over the queries that have any;
            retained tokens are not far.
        teacher_far_mass: ``[H]`` the same of the teacher's softmax attention, over the same tokens.
        half_life: ``[Hkv]`` tokens after which the far branch has forgotten half, at the mean rate over the text; None
            without decay.
        effective_rank: ``[Hkv]`` of the state after the text: the exponential of the entropy of its normalised singular
            values (Roy and Vetterli 2007), from 1 to ``greatest_rank``. NaN of an empty state.
        greatest_rank: the smaller of feature_dim and head_dim; 0 without a far branch.
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
        tokens: ``[N, T]`` int64, T > window + retained + sinks of every converted layer.

    Raises:
        ShapeError: the windows do not reach beyond ``window + retained + sinks``.
        ConversionError: ``student`` is not converted, or ``teacher`` is.
    """
    check_tokens(tokens)
    layers = converted_layers(student)
    plan = ConversionPlan.from_dict(student.config.linattn)
    reach = max(layer.reach for layer in layers)
    if tokens.shape[1] <= reach:
        near = "window + retained + sinks" if any(layer.retained for layer in layers) else "window + sinks"
        raise ShapeError(f"tokens: got windows of {tokens.shape[1]} tokens, expected more than {near} = {reach}.")
    seen, ends = _student_facts(student, layers, tokens)
    exact = _teacher_masses(teacher, plan, tokens, ends)
    found = []
    for layer, planned, mine, theirs in zip(layers, plan.converted, seen, exact, strict=True):
        rates = mine.get("rate")
        found.append(
            LayerTelemetry(
                planned.index,
                planned.path,
                tuple(mine["far_mass"].tolist()),
                tuple(theirs.tolist()),
                None if rates is None else tuple((math.log(2) / rates).tolist()),
                tuple(mine["rank"].tolist()),
                min(layer.feature_map.feature_dim, layer.feature_map.head_dim) if layer.far else 0,
            )
        )
    return found


Facts = dict[str, Tensor]


def _read(model: PreTrainedModel, tokens: Tensor, *, cached: bool = False) -> None:
    """Let a model read each window of a text by itself."""
    device = next(model.parameters()).device
    with evaluating(model):
        for row in tokens:
            cache = empty_cache(model) if cached else None
            model.base_model(row[None].to(device), past_key_values=cache, use_cache=cached)


def _student_facts(
    student: PreTrainedModel, layers: list[ConvertedAttention], tokens: Tensor
) -> tuple[list[Facts], list[list[Tensor]]]:
    """What each layer of ``student`` shows, averaged over the windows, and each window's expiries where it retains."""
    sums: dict[ConvertedAttention, Facts] = {layer: {} for layer in layers}
    ends: dict[ConvertedAttention, list[Tensor]] = {layer: [] for layer in layers}

    def hook(layer: Any, args: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
        q, k, v = args
        if layer.retained:
            options = {**options, "scores": layer.scores(k, v, options.get("rotation"))}
            ends[layer].append(layer.expiries(options["scores"]).cpu())
        for name, value in _facts(layer, q, k, options).items():
            sums[layer][name] = sums[layer].get(name, 0) + value.double().cpu() / len(tokens)

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        _read(student, tokens, cached=True)
    finally:
        for handle in hooks:
            handle.remove()
    return [sums[layer] for layer in layers], [ends[layer] for layer in layers]


def _facts(layer: ConvertedAttention, q: Tensor, k: Tensor, options: dict[str, Any]) -> Facts:
    total = _weight(layer, q, k, options)
    far, layer.far = layer.far, False
    try:
        near = _weight(layer, q, k, options)
    finally:
        layer.far = far
    sinks = options.get("sink_logits")
    most = total if sinks is None else total + (sinks.double() - SINK).exp()
    facts = {"far_mass": ((total - near) / most)[:, layer.reach :].mean((0, 1))}
    gates = layer.log_gates(layer.far_inputs(q, k, options.get("rotation"))[1])
    if gates is not None:
        facts["rate"] = -gates.double().flatten(0, -2).mean(0) if gates.ndim > 1 else -gates.double()
    cache_layer: LinattnCacheLayer = options["cache_layer"]
    assert cache_layer.state is not None  # the layer has just stored it
    facts["rank"] = _effective_rank(cache_layer.state.kv[0])
    return facts


def _weight(layer: ConvertedAttention, q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """``[B, T, H]`` float64: the sum of the weights of all tokens that each query attends to, over exp(SINK)."""
    ones = k.new_ones(*k.shape[:3], 1, dtype=torch.float64)
    sink = torch.full((q.shape[2],), SINK, dtype=torch.float64, device=q.device)
    options = {**options, "sink_logits": sink, "cache_layer": None}
    out = ConvertedAttention.forward(layer, q.double(), k.double(), ones, **options)[..., 0]
    return out / (1 - out)


def _effective_rank(matrix: Tensor) -> Tensor:
    """``[Hkv]`` of ``[Hkv, F, V]``."""
    if not matrix.shape[1]:  # no far branch
        return matrix.new_full((len(matrix),), math.nan)
    singular = torch.linalg.svdvals(matrix.double())
    return torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()


def _teacher_masses(
    teacher: PreTrainedModel, plan: ConversionPlan, tokens: Tensor, ends: list[list[Tensor]] | None = None
) -> list[Tensor]:
    """``[H]`` of each layer of ``plan``: the mass of its far tokens in the teacher's softmax, over the windows.

    ``ends``: of each layer, by window, ``[1, Hkv, T]`` the first query to which a token is far, if some are retained.
    """
    plan = ConversionPlan.from_dict(plan.to_dict())
    for planned in plan.kept:
        planned.kind = "keep"  # as the teacher has it
    reaches = [planned.window + planned.retained + planned.sinks for planned in plan.converted]
    for planned in plan.converted:
        planned.feature_map, planned.feature_map_options, planned.decay, planned.far_rope = "elu", {}, None, True
        planned.sink_distance, planned.retained, planned.retained_distance = None, 0, None
    seam = convert_model(teacher, plan=plan)
    try:
        layers = converted_layers(seam)
        masses: list[list[Tensor]] = [[] for _ in layers]
        ends = ends or [[] for _ in layers]
        for layer, reach, theirs, mine in zip(layers, reaches, ends, masses, strict=True):
            layer.__dict__["forward"] = functools.partial(_softmax, layer, reach, theirs, mine)
        _read(seam, tokens)
    finally:
        revert_model(seam)
    return [torch.stack(mine).mean(0) for mine in masses]


def _softmax(
    layer: ConvertedAttention,
    reach: int,
    ends: list[Tensor],
    masses: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> Tensor:
    """The softmax attention of a layer, some queries at a time; adds the ``[H]`` mass of far tokens to ``masses``."""
    end = ends[len(masses)].to(q.device)[:, :, None, None] if ends else None  # of this window
    batch, length = q.shape[:2]
    softcap, sinks = options.get("softcap"), options.get("sink_logits")
    queries = q.float().unflatten(2, (k.shape[2], -1)) * layer.feature_map.scale  # [B, T, Hkv, H / Hkv, D]
    outs, far = [], []
    for start in range(0, length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, length)
        at = torch.arange(stop, device=q.device)
        gap = at[start:, None] - at
        seen = gap >= 0 if layer.native_window is None else (gap >= 0) & (gap < layer.native_window)
        logits = torch.einsum("bthgd,bshd->bhgts", queries[:, start:stop], k[:, :stop].float())
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            column = sinks.float().view(k.shape[2], -1, 1, 1).expand(batch, -1, -1, stop - start, 1)
            logits = torch.cat([logits, column], -1)
        weights = logits.softmax(-1)[..., :stop]
        outs.append(torch.einsum("bhgts,bshv->bthgv", weights, v[:, :stop].float()).flatten(2, 3))
        behind = (gap >= layer.window) & (at >= layer.sinks) if end is None else at[start:, None] >= end[..., :stop]
        far.append((weights * behind).sum(-1).flatten(1, 2))
    masses.append(torch.cat(far, 2)[:, :, reach:].double().mean((0, 2)).cpu())
    return torch.cat(outs, 1).to(v.dtype)
