"""Converted layers under training: they answer the rest of the model with the exact attention that they learn from."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linattn.attention import LONGEST_HALF_LIFE
from linattn.convert import ConversionPlan, ConvertedAttention
from linattn.distill.targets import SplitAttention, split_attention
from linattn.errors import ConversionError

SHORTEST = 8.0
"""Tokens of the shortest half-life that a decay starts with."""
WHOLE: dict[str, Any] = {"window": 0, "sinks": 0}
"""Edges beyond which all is far."""


def trainable_layers(model: nn.Module, *, far: bool = True, retained: bool = False) -> dict[str, ConvertedAttention]:
    """The converted attention modules by the path of the module they serve.

    Args:
        far: False also takes layers without a far branch: converted without one, or left softmax within a window.
        retained: True also takes layers without a far branch that retain tokens, and passes by those that have neither.
    """
    layers = _layers(model, bound=not far)
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no converted layer; call convert_model first.")
    if any(not module.causal for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has bidirectional converted layers; the stages are causal.")
    if any(not module.far and module.far_bias is not None for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has no far branch to train; leave window_only first.")
    if not far:
        return layers
    learning = {path: module for path, module in layers.items() if module.far or (retained and module.retained)}
    if not learning or (len(learning) < len(layers) and not retained):
        raise ConversionError(
            f"{type(model).__name__} has layers without a far branch (feature_map=None), which have nothing to learn "
            "from their softmax attention; a Logits stage trains the weights around them."
        )
    return learning


def indices(model: nn.Module, layers: dict[str, ConvertedAttention]) -> dict[str, int]:
    """The indices in the plan of ``model`` of some :func:`trainable_layers` of it that are not bound, by path."""
    plan = ConversionPlan.from_dict(model.config.linattn)  # type: ignore[union-attr,arg-type]
    found = dict(zip(_layers(model, bound=False), (layer.index for layer in plan.converted), strict=True))
    return {path: found[path] for path in layers}


def _layers(model: nn.Module, *, bound: bool) -> dict[str, ConvertedAttention]:
    return {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, ConvertedAttention) and (bound or not module.bound)
    }


@contextlib.contextmanager
def answered(layers: dict[str, ConvertedAttention], answer: Callable[..., Tensor]) -> Iterator[None]:
    """Call ``answer(name, module, …)`` in place of each layer's ``forward(…)``."""
    before = [module.__dict__.get("forward") for module in layers.values()]
    try:
        for name, module in layers.items():
            module.__dict__["forward"] = functools.partial(answer, name, module)
        yield
    finally:
        for module, forward in zip(layers.values(), before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def exact(
    module: ConvertedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    ends: Tensor | None = None,
    **other: int | None,
) -> SplitAttention:
    """The softmax attention the layer stands for, split at its window and sinks, or with ``other`` edges.

    Args:
        ends: the :func:`expiry` of its tokens, to count retained ones among the near.
    """
    edges = {"window": module.window, "sinks": module.sinks, "native_window": module.native_window} | other
    return split_attention(
        q,
        k,
        v,
        scale=module.feature_map.scale,
        softcap=options["softcap"],
        sink_logits=options["sink_logits"],
        expiry=ends,
        **edges,  # type: ignore[arg-type]
    )


def expiry(module: ConvertedAttention, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor | None:
    """``[B, Hkv, T]`` first query to which each token is far, by the layer's scores; None if it retains no tokens."""
    return module.expiries(module.scores(k, v, options.get("rotation"))) if module.retained else None


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """|out − target|² / |target|²."""
    return (out.float() - target.float()).square().mean() / target.float().square().mean().clamp_min(1e-12)


def prepare(
    module: ConvertedAttention,
    split: SplitAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    ends: Tensor | None = None,
) -> None:
    """Set the far bias; start decays at softmax's look-back, and fit the feature map, where the error falls by it.

    Args:
        split: softmax attention, split as the layer is. ends: the :func:`expiry` of its tokens.
    """
    of_first = None if ends is None else ends[:1]
    q_far, k_far = module.far_inputs(q, k, options.get("rotation"))

    def match() -> None:
        assert module.far_bias is not None  # of a layer with a far branch
        module.far_bias.copy_(_matching_bias(module, q_far[:1], k_far[:1], split.log_far[0], of_first))

    def error() -> float:
        return relative_error(ConvertedAttention.forward(module, q, k, v, **options), split.out).item()

    def change(how: Callable[[], None]) -> None:
        before, unchanged = {name: t.clone() for name, t in module.state_dict().items()}, error()
        how()
        match()
        if not error() < unchanged:
            module.load_state_dict(before)

    match()
    if module.decay is not None:
        change(lambda: _look_back(module, split, q[:1], k[:1], options, of_first))
    fit = getattr(module.feature_map, "fit", None)
    if fit is not None:
        far_keys = k_far[:, module.sinks : k.shape[1] - module.window]
        change(lambda: fit(q_far[:, module.reach :], far_keys))


def _look_back(
    module: ConvertedAttention,
    split: SplitAttention,
    q: Tensor,
    k: Tensor,
    options: dict[str, Any],
    ends: Tensor | None = None,
) -> None:
    """Decays under which far tokens of equal features are looked back to as far, in the mean, as by softmax.

    Retained tokens are taken to be spread evenly among those.
    """
    length, kv_heads, first = q.shape[1], k.shape[2], module.reach
    at = torch.arange(length, device=q.device, dtype=torch.float32)
    seen = exact(module, q, k, at[None, :, None, None].expand(1, -1, kv_heads, 1), options, ends).far[0, first:, :, 0]
    weight = split.far_share[0, first:].double().unflatten(1, (kv_heads, -1))
    distance = (at[first:, None] - module.window - seen).double().unflatten(1, (kv_heads, -1))
    count = torch.arange(1, length - first + 1, device=q.device) + module.retained
    if module.native_window is not None:
        count = count.clamp_max(max(1, module.native_window - module.window))
    found = half_lives((weight * distance).sum((0, 2)), weight.sum(2), count)
    rate = math.log(2) / found
    if module.decay == "fixed":
        module.log_half_life.copy_(torch.where(found.isnan(), module.log_half_life.double(), found.log()))
    else:
        bias = torch.log(torch.expm1(rate))
        module.gate_bias.copy_(torch.where(bias.isnan(), module.gate_bias.double(), bias))


def half_lives(distance: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Half-lives ``[K]`` of decays whose mean distances, over the tokens that queries can see, are those given.

    Of ``count`` tokens n at distances 0 … n − 1, weighted by exp(−λd), the mean distance is 1/(e^λ−1) − n/(e^λn−1).

    Args:
        distance: ``[K]`` Σ over queries of weight · mean distance.
        weight: ``[R, K]`` of the queries. count: ``[R]`` tokens that each sees.

    Returns:
        float64, between SHORTEST and LONGEST_HALF_LIFE; NaN without weight.
    """
    count = count.double()[:, None]
    low = torch.full_like(distance, math.log(SHORTEST))
    high = torch.full_like(distance, math.log(LONGEST_HALF_LIFE))
    for _ in range(50):
        middle = (low + high) / 2
        rate = math.log(2) / middle.exp()
        mean = 1 / torch.expm1(rate) - count / torch.expm1(rate * count)
        near = (weight * mean).sum(0) < distance
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    return torch.where(weight.sum(0) > 0, ((low + high) / 2).exp(), torch.nan)


def _matching_bias(
    module: ConvertedAttention, q: Tensor, k: Tensor, log_far: Tensor, ends: Tensor | None = None
) -> Tensor:
    """``[H]`` mean over queries of softmax's ``log_far [T, H]`` − log(the map's far mass); 0 where none has both.

    Queries and keys, ``[1, T, …]``, are those that the feature map sees.
    """
    phi, length, groups = module.feature_map, q.shape[1], q.shape[2] // k.shape[2]
    at = torch.arange(length, device=q.device)
    positions = (at[None],) if phi.positional else ()
    features_q, log_q = phi.forward_queries(q, *positions)
    features_k, log_k = phi.forward_keys(k, *positions)
    log_q = q.new_zeros(q.shape[:3], dtype=torch.float32) if log_q is None else log_q
    log_k = k.new_zeros(k.shape[:3], dtype=torch.float32) if log_k is None else log_k
    gates = module.log_gates(k)
    if gates is not None:
        clock = gates.expand(1, length, -1).cumsum(1)
        log_q, log_k = log_q + clock.repeat_interleave(groups, 2), log_k - clock

    rows = slice(module.reach, None)  # the queries that see anything far
    if ends is None:
        ends = (at + module.window).masked_fill(at < module.sinks, length).expand(1, k.shape[2], -1)
    bias = q.new_zeros(q.shape[2], dtype=torch.float32)
    for head in range(q.shape[2]):
        kernel = features_q[0, rows, head].float() @ features_k[0, :, head // groups].float().T
        far = at[rows, None] >= ends[0, head // groups]
        log_scale = (log_q[0, rows, head, None] + log_k[0, :, head // groups]).masked_fill(~far, -torch.inf)
        top = log_scale.amax(1, keepdim=True)
        mass = ((log_scale - top).exp() * kernel).sum(1)
        both = (mass > 0) & log_far[rows, head].isfinite()
        if bool(both.any()):
            bias[head] = (log_far[rows, head] - mass.log() - top[:, 0])[both].mean()
    return bias
