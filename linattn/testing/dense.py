"""The operator, written down a second time from its definition: the oracle that no implementation shares code with."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.feature_maps.base import FeatureMap, Features
from linattn.testing.budgets import accumulator


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap,
    window: int = 0,
    sinks: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """Causal kernel attention of some query rows, one weight per pair of tokens.

    In float64 this is the exact result. In a low-precision dtype it is the naive implementation of that dtype: features
    and weights are rounded to it, products and normalisers are float32.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, T, Hkv, D]``. v: ``[B, T, Hkv, V]``.
        feature_map: φ.
        window, sinks: tokens attended exactly, as in :func:`linattn.kernels.kernel_attention`.
        rows: ``[R]`` query positions to compute, default all.

    Returns:
        ``[B, R, H, V]`` in the dtype of ``v``.
    """
    wide = accumulator(q.dtype)
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    keys = torch.arange(length, device=q.device)
    rows = keys if rows is None else rows

    queries_phi, keys_phi = features(feature_map, q, k)
    near_logits = feature_map.scale * scores(q[:, rows], k, group, wide)
    far_weights = scores(queries_phi.values[:, rows], keys_phi.values, group, wide)
    far_logits = far_weights.new_zeros(batch, heads, len(rows), length)
    if queries_phi.log_scale is not None:
        far_logits = far_logits + queries_phi.log_scale[:, rows].to(wide).permute(0, 2, 1)[..., None]
    if keys_phi.log_scale is not None:
        far_logits = far_logits + keys_phi.log_scale.to(wide).repeat_interleave(group, 2).permute(0, 2, 1)[:, :, None]

    age = rows[:, None] - keys
    near = (age >= 0) & ((age < window) | (keys < sinks))
    far = (age >= 0) & ~near
    logits = torch.where(near, near_logits, far_logits).masked_fill(age < 0, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * torch.where(far, far_weights, 1.0)
    values = v.repeat_interleave(group, 2).permute(0, 2, 1, 3)
    total = weights.sum(-1, keepdim=True)
    # Rectified features can leave a query without any weight: its output is zero.
    out = weights.to(v.dtype).to(wide) @ values.to(wide) / torch.where(total == 0, 1, total)
    return out.permute(0, 2, 1, 3).to(v.dtype)


def features(feature_map: FeatureMap, q: Tensor, k: Tensor) -> tuple[Features, Features]:
    """Features of queries and keys, with positions 0, 1, … where the map wants them."""
    positions = None
    if feature_map.positional:
        positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
    return (
        Features(*feature_map.forward_queries(q, positions)),
        Features(*feature_map.forward_keys(k, positions)),
    )


def scores(q: Tensor, k: Tensor, group: int, wide: torch.dtype) -> Tensor:
    """``[B, H, Tq, Tk]`` inner products of ``[B, Tq, H, F]`` and ``[B, Tk, H / group, F]``."""
    return torch.einsum("bthf,bshf->bhts", q.to(wide), k.to(wide).repeat_interleave(group, 2))
