"""Prefix sums of chunk summaries with decay and running maximum, without a loop over the chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.state import EMPTY_LOG_SCALE

GROUP = 16


class Memory(NamedTuple):
    """Sums over some tokens, as exp(log_scale) · (kv, k), seen from the end of the chunk they stand at.

    Attributes:
        kv: ``[R, h, n, F, V]``. k: ``[R, h, n, F]``. log_scale: ``[R, h, n]``.
    """

    kv: Tensor
    k: Tensor
    log_scale: Tensor


def summarise(features: Tensor, v: Tensor, log_weight: Tensor | None, weight: Tensor | None) -> Memory:
    """The memory of each chunk's own tokens.

    Args:
        features: ``[R, h, n, C, F]``. v: ``[R, h, n, C, V]``.
        log_weight: ``[R, h, n, C]`` log-weight of each token at the chunk's end, or None for zero.
        weight: ``[R, h | 1, n, C]`` 1 for tokens that count and 0 for others, or None for all ones.
    """
    if log_weight is None:
        log_scale = features.new_zeros(features.shape[:3])
        weighted = features if weight is None else features * weight[..., None]
    else:
        if weight is not None:
            log_weight = log_weight.masked_fill(weight == 0, EMPTY_LOG_SCALE)
        log_scale = log_weight.amax(-1).detach()
        relative = (log_weight - log_scale[..., None]).exp()
        weighted = features * (relative if weight is None else relative * weight)[..., None]
    return Memory(weighted.transpose(-1, -2) @ v, weighted.sum(-2), log_scale)


def prefix(memory: Memory, clock: Tensor | None, sequence: Tensor, *, plain: bool, reverse: bool = False) -> Memory:
    """Inclusive prefix sums along the chunks: entry n holds chunks ≤ n of n's sequence, seen from the end of n.

    Each sum is a weighted sum of chunk summaries with weights exp(μ_j + Γ_n − Γ_j − m_n) ≤ 1, where Γ is the running
    log-decay (``clock``) and m_n the running maximum. Groups of chunks are summed by one small triangular product,
    then the groups' totals by the same function.

    Args:
        memory: summaries of the chunks.
        clock: ``[R, h, n]`` log-decay from a fixed origin to the end of each chunk (float64 where available), or None.
        sequence: ``[R, n]`` non-decreasing along n where it is ≥ 0; chunks of different sequences do not mix.
        plain: True when all log-scales are zero and there is no decay.
        reverse: suffix sums instead.
    """
    if reverse:
        flipped = Memory(memory.kv.flip(2), memory.k.flip(2), memory.log_scale.flip(2))
        done = prefix(flipped, None, sequence.flip(1), plain=plain)
        return Memory(done.kv.flip(2), done.k.flip(2), done.log_scale.flip(2))
    kv, k, mu = memory
    rows, heads, n = mu.shape
    if n <= 1:
        return memory
    g, groups = (GROUP, (n + GROUP - 1) // GROUP) if n > GROUP else (n, 1)
    if pad := groups * g - n:
        kv, k = F.pad(kv, [0, 0, 0, 0, 0, pad]), F.pad(k, [0, 0, 0, pad])
        mu = F.pad(mu, [0, pad], value=EMPTY_LOG_SCALE)
        sequence = F.pad(sequence, [0, pad], value=-1)
        if clock is not None:
            clock = torch.cat([clock, clock[..., -1:].expand(rows, heads, pad)], -1)

    grouped_sequence = sequence.view(rows, 1, groups, g)
    allowed = (grouped_sequence[..., :, None] == grouped_sequence[..., None, :]).tril()
    grouped_mu = mu.view(rows, heads, groups, g)
    if plain:
        weights = allowed.to(kv.dtype).expand(rows, heads, groups, g, g)
        m = grouped_mu
    else:
        log_weights = grouped_mu[..., None, :]
        if clock is not None:
            grouped_clock = clock.view(rows, heads, groups, g)
            log_weights = log_weights + (grouped_clock[..., :, None] - grouped_clock[..., None, :]).to(kv.dtype)
        log_weights = log_weights.masked_fill(~allowed, EMPTY_LOG_SCALE)
        m = log_weights.amax(-1).detach()
        weights = (log_weights - m[..., None]).exp() * allowed
    kv = (weights @ kv.reshape(rows, heads, groups, g, -1)).view(rows, heads, groups, g, *kv.shape[-2:])
    k = weights @ k.view(rows, heads, groups, g, -1)
    if groups > 1:
        ends = grouped_sequence[:, 0, :, -1]
        carried = prefix(
            Memory(kv[:, :, :-1, -1], k[:, :, :-1, -1], m[:, :, :-1, -1]),
            None if clock is None else clock.view(rows, heads, groups, g)[:, :, :-1, -1],
            ends[:, :-1],
            plain=plain,
        )
        # Nothing stands before the first group; zeros there keep all groups one tensor, without slices to join again.
        before = Memory(
            F.pad(carried.kv, [0, 0, 0, 0, 1, 0])[:, :, :, None],
            F.pad(carried.k, [0, 0, 1, 0])[:, :, :, None],
            F.pad(carried.log_scale, [1, 0], value=EMPTY_LOG_SCALE)[..., None],
        )
        same = (grouped_sequence == F.pad(ends[:, :-1], [1, 0], value=-2)[:, None, :, None]).to(kv.dtype)
        if plain:
            take = same  # [R, 1, groups, g]
        else:
            log_take = before.log_scale
            if clock is not None:
                grouped_clock = clock.view(rows, heads, groups, g)
                log_take = log_take + (grouped_clock - F.pad(grouped_clock[:, :, :-1, -1:], [0, 0, 1, 0])).to(kv.dtype)
            log_take = log_take.masked_fill(same == 0, EMPTY_LOG_SCALE)
            merged = torch.maximum(m, log_take).detach()
            keep, take = (m - merged).exp(), (log_take - merged).exp() * same
            kv, k, m = kv * keep[..., None, None], k * keep[..., None], merged
        kv = torch.addcmul(kv, take[..., None, None], before.kv)
        k = torch.addcmul(k, take[..., None], before.k)
    return Memory(
        kv.flatten(2, 3)[:, :, :n], k.reshape(rows, heads, groups * g, -1)[:, :, :n], m.flatten(2, 3)[:, :, :n]
    )
