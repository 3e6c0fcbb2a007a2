"""What the far branch should give: softmax attention split where the window ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.errors import OptionError
from linattn.state import EMPTY_LOG_SCALE

CHUNK = 128
"""Queries whose logits stand in memory at a time, where torch has no fused attention."""


class SplitAttention(NamedTuple):
    """Softmax attention in two parts, each normalised by itself, and the log of the mass each had.

        out = (1 − s) near + s far,   s = far_share = sigmoid(log_far − log_near)

    A target of the far branch itself: matching the whole output alone leaves the far branch idle behind a good window
    (arXiv:2510.05901).

    Attributes:
        near: ``[B, T, H, V]`` attention over sinks, window and retained tokens, and over a sink logit, which has no
            value.
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
        """``[B, T, H]`` share of the softmax mass that is far."""
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
    expiry: Tensor | None = None,
    chunk: int | None = None,
) -> SplitAttention:
    """Causal softmax attention of a layer, split into the part a converted layer computes exactly and the rest.

    What is far from query t are the keys sinks ≤ i ≤ t − window: causal attention of later queries to earlier keys. So
    two calls of torch's fused attention, of all keys and of the far ones, give both parts by their log-sum-exp; the
    near part, found by difference, has the precision of its share of the mass. Far keys that are told by their expiry
    have a kernel of their own. Where fused attention has no place (see ``chunk``), logits are formed for some queries
    at a time.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, T, Hkv, D]``. v: ``[B, T, Hkv, V]``.
        window: tokens that are near, the query's own included. sinks: first tokens that are near to all.
        scale: softmax scale. softcap: logits become softcap · tanh(logit / softcap).
        sink_logits: ``[H]`` logits that enter the normaliser with no value; they count as near.
        native_window: the layer's own sliding window: tokens beyond it have no part, sinks of a converted layer
            included, unless they lie within.
        expiry: ``[B, Hkv, T]`` the first query to which each key is far, later than the window's end for retained
            tokens and never for sinks (:meth:`ConvertedAttention.expiries`); None where nothing is retained.
        chunk: queries at a time; memory is then O(B · H · T · chunk). None for the fused attention, unless there is a
            softcap, a sink logit or a window of the layer's own, V ≠ D, float32 on a GPU, or an ``expiry`` elsewhere.
            Work is O(T²).

    Returns:
        :class:`SplitAttention` in float32 (float64 for float64 inputs), without gradients.
    """
    if chunk is not None and chunk < 1:
        raise OptionError(f"chunk: got {chunk!r}, expected an integer ≥ 1, or None.")
    batch, length, heads, _ = q.shape
    plain = softcap is None and sink_logits is None and (native_window is None or native_window >= length)
    if chunk is None and plain and v.shape[-1] == q.shape[-1] and _is_fused(q) and (expiry is None or q.is_cuda):
        return _by_difference(q, k, v, window + sinks, sinks, scale, expiry)
    chunk = chunk or CHUNK
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
        if expiry is None:
            near = seen & ((gap < window) | (token < sinks))
        else:
            near = seen & (at[start:stop, None] < expiry[:, :, None, None, first:stop])
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


def _is_fused(q: Tensor) -> bool:
    """Whether torch has attention that gives its log-sum-exp for tensors such as ``q``."""
    if q.device.type == "cuda":
        return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
    return q.device.type == "cpu"


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention ``[B, T, H, V]`` and its log-sum-exp ``[B, T, H]``, in float32 at least."""
    wide, groups = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    cuda = q.device.type == "cuda"
    name = "_scaled_dot_product_flash_attention" + ("" if cuda else "_for_cpu")
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    heads_first = [(x if cuda else x.to(wide)).transpose(1, 2) for x in (q, k, v)]
    out, log_sum, *_ = getattr(torch.ops.aten, name)(*heads_first, 0.0, True, scale=scale)
    return out.transpose(1, 2).to(wide), log_sum.transpose(1, 2).to(wide)


def _by_difference(
    q: Tensor, k: Tensor, v: Tensor, first: int, sinks: int, scale: float, expiry: Tensor | None
) -> SplitAttention:
    """The split of :func:`split_attention`; queries from ``first`` on see something that left the window."""
    length = q.shape[1]
    out, log_sum = _fused(q, k, v, scale)
    far, log_far, log_near = torch.zeros_like(out), torch.full_like(log_sum, -torch.inf), log_sum
    if first == 0 and expiry is None:
        return SplitAttention(far, out, log_far, log_sum)
    if first < length:
        if expiry is None:
            last = length - first + sinks  # of the keys that are far from some query
            part, log_part = _fused(q[:, first:], k[:, sinks:last], v[:, sinks:last], scale)
            far, log_far = F.pad(part, [0, 0, 0, 0, first, 0]), F.pad(log_part, [0, 0, first, 0], value=-torch.inf)
        else:
            from linattn.kernels.triton.expiring import expiring_attention

            part, log_part = expiring_attention(q, k, v, expiry, scale=scale, far=True)
            far, log_far = part.to(out.dtype), log_part.masked_fill(log_part <= EMPTY_LOG_SCALE / 2, -torch.inf)
        rest = -torch.expm1((log_far - log_sum).clamp_max(0.0))  # the near share
        rest = rest.clamp_min(torch.finfo(q.dtype).eps ** 2)
        log_near = log_sum + rest.log()
        out = far + (out - far) / rest[..., None]
    return SplitAttention(out, far, log_near, log_far)
