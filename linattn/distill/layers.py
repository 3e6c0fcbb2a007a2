"""Converted layers under training: they answer the rest of the model with the exact attention that they learn from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from linattn.convert import ConvertedAttention
from linattn.distill.targets import SplitAttention, split_attention
from linattn.errors import ConversionError


def trainable_layers(model: nn.Module) -> dict[str, ConvertedAttention]:
    """The converted attention modules by the path of the module they serve."""
    layers = {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, ConvertedAttention)
    }
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no converted layer; call convert_model first.")
    if any(not module.causal for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has bidirectional converted layers; the stages are causal.")
    if any(not module.far for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has no far branch to train; leave window_only first.")
    return layers


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
    **other: int | None,
) -> SplitAttention:
    """The softmax attention the layer stands for, split at its window and sinks, or with ``other`` edges."""
    edges = {"window": module.window, "sinks": module.sinks, "native_window": module.native_window} | other
    return split_attention(
        q,
        k,
        v,
        scale=module.feature_map.scale,
        softcap=options["softcap"],
        sink_logits=options["sink_logits"],
        **edges,  # type: ignore[arg-type]
    )


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """|out − target|² / |target|²."""
    return (out.float() - target.float()).square().mean() / target.float().square().mean().clamp_min(1e-12)


def prepare(
    module: ConvertedAttention, split: SplitAttention, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> None:
    """Set the far bias, and fit the feature map where it can be fitted and the layer's error falls by it."""

    def error() -> float:
        return relative_error(ConvertedAttention.forward(module, q, k, v, **options), split.out).item()

    q_far, k_far = module.far_inputs(q, k, options.get("rotation"))
    module.far_bias.copy_(_matching_bias(module, q_far[:1], k_far[:1], split.log_far[0]))
    fit = getattr(module.feature_map, "fit", None)
    if fit is None:
        return
    before, unfitted = {name: t.clone() for name, t in module.state_dict().items()}, error()
    fit(q_far[:, module.window + module.sinks :], k_far[:, module.sinks : k.shape[1] - module.window])
    module.far_bias.copy_(_matching_bias(module, q_far[:1], k_far[:1], split.log_far[0]))
    if not error() < unfitted:
        module.load_state_dict(before)


def _matching_bias(module: ConvertedAttention, q: Tensor, k: Tensor, log_far: Tensor) -> Tensor:
    """``[H]`` mean over queries of softmax's ``log_far [T, H]`` − log(the map's far mass); 0 where none has both.

    Queries and keys are those that the feature map sees.
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

    rows = slice(module.window + module.sinks, None)  # the queries that see anything far
    far = (at[rows, None] - at >= module.window) & (at >= module.sinks)
    bias = q.new_zeros(q.shape[2], dtype=torch.float32)
    for head in range(q.shape[2]):
        kernel = features_q[0, rows, head].float() @ features_k[0, :, head // groups].float().T
        log_scale = (log_q[0, rows, head, None] + log_k[0, :, head // groups]).masked_fill(~far, -torch.inf)
        top = log_scale.amax(1, keepdim=True)
        mass = ((log_scale - top).exp() * kernel).sum(1)
        both = (mass > 0) & log_far[rows, head].isfinite()
        if bool(both.any()):
            bias[head] = (log_far[rows, head] - mass.log() - top[:, 0])[both].mean()
    return bias
