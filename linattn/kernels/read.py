"""Reading: blocks of queries against exact keys, far keys and summed memories, under one normaliser."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.state import EMPTY_LOG_SCALE

FAR_FLOOR = {torch.float32: 1e-30, torch.float64: 1e-200}
"""Far mass, relative to its own log-scale, below which it no longer sets the scale of a row."""

DENOMINATOR_FLOOR = 1e-4
"""Least normaliser of a row whose largest weight has been scaled to about one: reached only by rows with no weight."""


class Exact(NamedTuple):
    """Keys attended exactly: ``k [R, h, n, E, D]``, ``v [R, h, n, E, V]``, ``mask [R, 1, n, C, E]``.

    ``q [R, h, n, G, C, D]``: queries of their own, or None for those of all.
    """

    k: Tensor
    v: Tensor
    mask: Tensor
    q: Tensor | None = None


class Far(NamedTuple):
    """Keys attended through features.

    Attributes:
        features: ``[R, h, n, E, F]``. v: ``[R, h, n, E, V]``. mask: ``[R, 1, n, C, E]``.
        log_weight: ``[R, h, n, C | 1, E]`` log-scale and decay of each key as each query sees it, or None for zero.
    """

    features: Tensor
    v: Tensor
    mask: Tensor
    log_weight: Tensor | None


class Summed(NamedTuple):
    """A memory as each query sees it.

    Attributes:
        kv: ``[R, h, n | 1, F, V]``. k: ``[R, h, n | 1, F]``.
        log_weight: ``[R, h, n, C | 1]`` log-scale and decay of the memory, or None for zero.
        there: ``[R, 1, n]`` whether the block has this memory at all, or None for always.
        shift: block i reads entry i − shift, blocks without such an entry read nothing.
        blocks: only the first ``blocks`` read it; None for all.
    """

    kv: Tensor
    k: Tensor
    log_weight: Tensor | None = None
    there: Tensor | None = None
    shift: int = 0
    blocks: int | None = None


class Queries(NamedTuple):
    """Queries of R rows, h key/value heads, n blocks, G query heads a key/value head and C tokens.

    Attributes:
        q: ``[R, h, n, G, C, D]``. features: ``[R, h, n, G, C, F]`` or None without a far branch.
        log_scale: ``[R, h, n, G, C]`` the queries' log-scale and the far bias, or None for zero.
    """

    q: Tensor
    features: Tensor | None
    log_scale: Tensor | None


def read(
    queries: Queries,
    exact: list[Exact],
    far: list[Far],
    summed: list[Summed],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention output ``[R, h, n, G, C, V]``: near and far disjoint, one normaliser, computed in log space.

    Maxima serve as shifts only: the result does not depend on them, so they carry no gradient.
    """
    shape = queries.q.shape[:-1]  # [R, h, n, G, C]
    lead, (groups, c) = shape[:3], shape[3:]
    flat = queries.q.reshape(*lead, groups * c, -1)

    # Maxima only shift; EMPTY stays far enough below any shift that a masked weight is an exact zero.
    logits = []
    for part in exact:
        q = flat if part.q is None else part.q.reshape(flat.shape)
        s = ((q * scale) @ part.k.transpose(-1, -2)).view(*shape, -1)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        logits.append(s.masked_fill_(~part.mask[:, :, :, None], EMPTY_LOG_SCALE))

    num = den = log_far = None
    if queries.features is not None:
        num, den, log_scale = _read_far(queries.features, far, summed)
        log_far = log_scale if queries.log_scale is None else queries.log_scale + log_scale

    tops = [s.detach().amax(-1) for s in logits if s.shape[-1]]
    if den is not None and log_far is not None:
        tops.append((log_far + den.abs().clamp_min(FAR_FLOOR[den.dtype]).log()).detach().expand(shape))
    if sink_logits is not None:
        sink_logits = sink_logits.view(1, lead[1], 1, groups, 1)
        tops.append(sink_logits.detach().expand(shape))
    top = _maximum(tops)

    if num is not None and den is not None and log_far is not None:
        far_weight = (log_far - top).exp()
        num, den = num * far_weight[..., None], den * far_weight
    for s, part in zip(logits, exact, strict=True):
        w = s.sub_(top[..., None]).exp_()
        near = (w.view(*lead, groups * c, -1) @ part.v).view(*shape, -1)
        num = near if num is None else num + near
        den = w.sum(-1) if den is None else den + w.sum(-1)
    if num is None or den is None:
        raise RuntimeError("read() was called with nothing to read")
    if sink_logits is not None:
        den = den + (sink_logits - top).exp()
    return num / safe_denominator(den)[..., None]


def _maximum(tops: list[Tensor]) -> Tensor:
    top = tops[0]
    for other in tops[1:]:
        top = torch.maximum(top, other)
    return top.clamp_min(EMPTY_LOG_SCALE / 2)


def _read_far(features: Tensor, far: list[Far], summed: list[Summed]) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator ``[R, h, n, G, C, V]``, normaliser ``[R, h, n, G, C]`` and their log-scale ``[R, h, n, 1, C]``."""
    shape = features.shape[:-1]
    lead, (groups, c) = shape[:3], shape[3:]
    flat = features.reshape(*lead, groups * c, -1).contiguous()  # every product would copy it again
    weights = [None if f.log_weight is None else f.log_weight.masked_fill(~f.mask, EMPTY_LOG_SCALE) for f in far]
    tops = [w.detach().amax(-1) for w in weights if w is not None and w.shape[-1]]
    tops += [m.log_weight.detach().expand(*lead, c) for m in summed if m.log_weight is not None]
    top = features.new_zeros(1, 1, 1, 1)
    unscaled = None  # what a part without log-weight is multiplied by
    if tops:
        if len(tops) < len(far) + len(summed):
            tops.append(torch.zeros_like(tops[0]))
        top = _maximum(tops)
        unscaled = (-top).exp()

    num: Tensor | None = None
    den: Tensor | None = None
    for f, w in zip(far, weights, strict=True):
        kernel = (flat @ f.features.transpose(-1, -2)).view(*shape, -1)
        seen = f.mask if w is None else (w - top[..., None]).exp()
        kernel = kernel * seen[:, :, :, None]
        mass = kernel.sum(-1)
        part = (kernel.view(*lead, groups * c, -1) @ f.v).view(*shape, -1)
        if w is None and unscaled is not None:
            part, mass = part * unscaled[:, :, :, None, :, None], mass * unscaled[:, :, :, None]
        num = part if num is None else num + part
        den = mass if den is None else den + mass
    for m in summed:
        part, mass = _read_summed(flat, m)
        part, mass = part.reshape(*shape, -1), mass.reshape(shape)
        relative: Tensor | None = unscaled if m.log_weight is None else (m.log_weight - top).exp()
        if m.there is not None:
            there = m.there[..., None].to(part.dtype)
            relative = there if relative is None else relative * there
        if relative is not None:
            relative = relative[:, :, :, None]
            part, mass = part * relative[..., None], mass * relative
        num = part if num is None else num + part
        den = mass if den is None else den + mass
    if num is None or den is None:
        raise RuntimeError("_read_far() was called with nothing to read")
    return num, den, top[:, :, :, None]


def _read_summed(flat: Tensor, m: Summed) -> tuple[Tensor, Tensor]:
    """``flat [R, h, n, G · C, F]`` against the memory of its block: ``[.., G · C, V]`` and ``[.., G · C, 1]``."""
    n = flat.shape[2]
    if m.kv.shape[2] == 1 < n:  # one memory for several blocks: one product
        blocks = n if m.blocks is None else m.blocks
        together = flat[:, :, :blocks].flatten(2, 3)
        kv, k = together @ m.kv[:, :, 0], together @ m.k[:, :, 0, :, None]
        pad = [0, 0, 0, 0, 0, n - blocks]
        return F.pad(kv.unflatten(2, (blocks, -1)), pad), F.pad(k.unflatten(2, (blocks, -1)), pad)
    if m.shift == 0:
        return flat @ m.kv, flat @ m.k[..., None]
    here = slice(0, n - m.shift) if m.shift > 0 else slice(-m.shift, n)
    pad = [0, 0, max(m.shift, 0), max(-m.shift, 0)]
    return flat @ F.pad(m.kv[:, :, here], [0, 0, *pad]), flat @ F.pad(m.k[:, :, here], pad)[..., None]


def safe_denominator(den: Tensor) -> Tensor:
    """The normaliser kept from zero, with its sign: a row with no weight gives output zero, not NaN."""
    return torch.where(den < 0, den.clamp_max(-DENOMINATOR_FLOOR), den.clamp_min(DENOMINATOR_FLOOR))
