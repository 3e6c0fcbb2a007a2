"""What the far branch should give: softmax attention split where the window ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.errors import OptionError

CHUNK = 128
"""Queries whose logits stand in memory at a time."""


class SplitAttention(NamedTuple):
    """Softmax attention in two parts, each normalised by itself, and the log of the mass each had.

        out = (1 − s) near + s far,   s = far_share = sigmoid(log_far − log_near)

    A target of the far branch itself: matching the whole output alone leaves the far branch idle behind a good window
    (arXiv:2510.05901).

    Attributes:
        near: ``[B, T, H, V]`` attention over sinks and window, and over a sink logit, which has no value.
        far: ``[B, T, H, V]`` attention over all earlier tokens; zero where there are none.
        log_near: ``[B, T, H]`` log Σ exp(logit) of the near part; −∞ where it is empty.
        log_far: ``[B, T, H]`` that of the far part.
    """

    near: Tensor
    far: Tensor
    log_near: Tensor
    log_far: Tensor

    @property
    def far_share(self) -> Tensor:
        """``[B, T, H]`` share of the softmax mass that lies beyond window and sinks."""
        return torch.sigmoid(self.log_far - self.log_near)

    @property
    def out(self) -> Tensor:
        """``[B, T, H, V]`` softmax attention."""
        return self.near + self.far_share[..., None] * (self.far - self.near)


@torch.no_grad()
def split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    native_window: int | None = None,
    chunk: int = CHUNK,
) -> SplitAttention:
    """Causal softmax attention of a layer, split into the part a converted layer computes exactly and the rest.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, T, Hkv, D]``. v: ``[B, T, Hkv, V]``.
        window: tokens that are near, the query's own included. sinks: first tokens that are near to all.
        scale: softmax scale. softcap: logits become softcap · tanh(logit / softcap).
        sink_logits: ``[H]`` logits that enter the normaliser with no value; they count as near.
        native_window: the layer's own sliding window: tokens beyond it have no part, sinks of a converted layer
            included, unless they lie within.
        chunk: queries at a time. Memory is O(B · H · T · chunk), work O(T²).

    Returns:
        :class:`SplitAttention` in float32 (float64 for float64 inputs), without gradients.
    """
    if chunk < 1:
        raise OptionError(f"chunk: got {chunk!r}, expected an integer ≥ 1.")
    batch, length, heads, _ = q.shape
    kv_heads, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).view(batch, length, kv_heads, heads // kv_heads, -1) * scale
    keys, values = k.to(wide), v.to(wide)
    at = torch.arange(length, device=q.device)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        first = 0 if native_window is None else max(0, start - native_window + 1)
        logits = torch.einsum("btkgd,bskd->bkgts", grouped[:, start:stop], keys[:, first:stop])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        token = at[first:stop]
        gap = at[start:stop, None] - token
        seen = gap >= 0 if native_window is None else (gap >= 0) & (gap < native_window)
        near = seen & ((gap < window) | (token < sinks))
        piece = []
        for where in (near, seen & ~near):
            weights = logits.masked_fill(~where, -torch.inf)
            mass = weights.logsumexp(-1)
            weights = (weights - mass.nan_to_num(neginf=0.0)[..., None]).exp()
            out = torch.einsum("bkgts,bskv->btkgv", weights, values[:, first:stop])
            piece += [out.flatten(2, 3), mass.permute(0, 3, 1, 2).flatten(2, 3)]
        parts.append(tuple(piece))
    near_out, log_near, far_out, log_far = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    if sink_logits is not None:
        with_sink = torch.logaddexp(log_near, sink_logits.to(wide))
        near_out = near_out * (log_near - with_sink).exp()[..., None]
        log_near = with_sink
    return SplitAttention(near_out, far_out, log_near, log_far)
