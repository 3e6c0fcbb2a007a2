"""Retained tokens: the best-scored ones behind the window stay exact, the others go on through their features.

A row is an array of entries: the slots of its state, its ring, its new tokens. A score is settled when its token is
written, so an entry that drops out never returns: entry j is near to the queries j ≤ t < e_j, its expiry, and far from
then on. Sinks, empty slots and padding are entries of score −∞ and no weight. With them exactly one entry expires a
step once W + M are there: in order of expiry, what is far to query t are the first t − W − M + 1 entries, and the far
branch is causal linear attention at a fixed lag, by the operator itself. A sink of that call carries the near part's
mass, and columns of its values tell how the normaliser was shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.kernels import chunked, dispatch
from linattn.kernels import layout as layouts
from linattn.kernels.features import features_of
from linattn.kernels.layout import Layout
from linattn.kernels.protocols import GivenFeatures, KernelFeatureMap
from linattn.kernels.read import Exact, Summed, read
from linattn.kernels.scan import Memory, summarise
from linattn.kernels.validate import Call, resolve
from linattn.state import EMPTY_LOG_SCALE, AttentionState

FOREVER = 2**30
"""Expiry of an entry that never expires."""
NOBODYS = -1
"""Expiry of an entry that is nobody's: neither near nor far."""
EMPTY = EMPTY_LOG_SCALE
"""Log mass of no keys at all."""
GROUP_TOKENS = 2048
"""Queries whose keys are gathered at once."""
COLUMNS = 16
"""Columns beside those of the values in the far part on Triton: two are read, and rows of whole 16s load fast."""
DIGIT = 4
"""Bits of a place that :func:`expiry` settles at a time."""

Part = tuple[Tensor, Tensor]
"""Attention over some keys in the dtype of sums: output ``[R, T, H, V]`` and log mass ``[R, T, H]``."""


@torch.no_grad()
def expiry(scores: Tensor, *, window: int, retained: int) -> Tensor:
    """First query to which each entry is far, ``[R, Hkv, L]`` int32; ``FOREVER`` if there is none.

    Entry j leaves the window at query j + W. It expires with the query at which the M-th better one has left too, or
    then, if M are there before it. With ranks by score that M-th one is the M-th smallest place among the better ranks:
    a quantile of a prefix, for all prefixes at once by a wavelet matrix (Claude, Navarro & Ordóñez 2015).

    Args:
        scores: ``[R, Hkv, L]``; of equal ones the older entry is the better.
    """
    length = scores.shape[-1]
    if length <= retained:
        return torch.full(scores.shape, FOREVER, dtype=torch.int32, device=scores.device)
    place = torch.sort(scores.flatten(0, -2), dim=-1, descending=True, stable=True).indices  # best first
    rank = torch.arange(length, device=scores.device).expand(len(place), -1)
    left, right = torch.zeros_like(rank), rank  # the prefix of rank r is the better entries
    nth = torch.full_like(rank, retained - 1)
    found, level = torch.zeros_like(rank), place
    branches = torch.arange(2**DIGIT, device=scores.device)
    for shift in reversed(range(0, (length - 1).bit_length(), DIGIT)):
        digit = (level >> shift) % 2**DIGIT
        before = F.pad((digit[..., None] == branches).cumsum(1, dtype=torch.int32), [0, 0, 1, 0])  # [., L + 1, 16]
        low, high = (before.gather(1, x[..., None].expand(-1, -1, len(branches))) for x in (left, right))
        upto = (high - low).cumsum(-1)
        branch = (upto <= nth[..., None]).sum(-1, keepdim=True).clamp_max(len(branches) - 1)
        nth = nth - F.pad(upto, [1, 0]).gather(-1, branch)[..., 0]
        first = F.pad(before[:, -1].cumsum(-1), [1, 0])
        start = first.gather(1, branch[..., 0])
        left, right = (start + x.gather(-1, branch)[..., 0] for x in (low, high))
        found = found | (branch[..., 0] << shift)
        to = first.gather(1, digit) + before[:, :-1].gather(-1, digit[..., None])[..., 0]
        level = torch.empty_like(level).scatter(1, to, level)
    ends = torch.maximum(found, place) + window
    ends = torch.where(rank < retained, FOREVER, ends).int()
    return torch.empty_like(ends).scatter(1, place, ends).view(scores.shape)


def joined(parts: list[Part]) -> Part:
    """Attention over disjoint sets of keys as attention over all of them."""
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([mass for _, mass in parts]).logsumexp(0)
    out = torch.stack([out * (mass - total).exp()[..., None] for out, mass in parts]).sum(0)
    return out, total


class Entries(NamedTuple):
    """Rows of L entries: the state's slots and ring if there is one, then the new tokens.

    Attributes:
        k, v, k_far: ``[R, L, Hkv, ·]``. clock: ``[R, Hkv, L]`` running log-decay, zero at the state's last token.
        expiry: ``[R, Hkv, L]``, ``NOBODYS`` for entries of no weight. order: ``[R, L − W − M, Hkv]`` entries by expiry.
        start: ``[R]`` entry of the first new token, None for 0.
        positions: ``[R, L, Hkv]`` int64 tokens that came before each.
        lay: of the ring and the new tokens. fresh: of the new tokens alone.
    """

    k: Tensor
    v: Tensor
    k_far: Tensor
    clock: Tensor | None
    expiry: Tensor
    order: Tensor
    start: Tensor | None
    positions: Tensor
    lay: Layout
    fresh: Layout

    def at(self, count: int) -> Tensor:
        """``[R | 1, count]`` entry of each of ``count`` new tokens."""
        span = torch.arange(count, device=self.k.device)[None]
        return span if self.start is None else self.start[:, None] + span

    def by_slot(self, x: Tensor, lag: int) -> Tensor:
        """``x [R, T, ...]`` of the new tokens at entries ``lag, lag + 1, …, L − 1``; zeros before the first."""
        if self.start is None:
            return x[:, lag:]
        span = torch.arange(lag, self.k.shape[1], device=x.device)
        return _rows(x, span - self.start[:, None])

    def by_token(self, x: Tensor, lag: int, count: int) -> Tensor:
        """The inverse of :meth:`by_slot`."""
        if self.start is None:
            return F.pad(x, [0, 0] * (x.ndim - 2) + [lag, 0])
        return _rows(x, self.at(count) - lag)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[r, index[r, i]]`` of ``x [R, T, ...]``, zeros where there is no such one."""
    inside = (index >= 0) & (index < x.shape[1])
    if not x.shape[1]:
        return x.new_zeros(*index.shape, *x.shape[2:])
    found = x[torch.arange(len(x), device=x.device)[:, None], index.clamp(0, x.shape[1] - 1)]
    return torch.where(inside.view(*inside.shape, *[1] * (x.ndim - 2)), found, 0)


def _of_heads(x: Tensor, index: Tensor) -> Tensor:
    """``x[r, index[r, i, h], h]`` of ``x [R, L, Hkv, ...]`` and ``index [R, I, Hkv]``."""
    index = index.view(*index.shape, *[1] * (x.ndim - 3)).expand(-1, -1, -1, *x.shape[3:])
    return x.gather(1, index)


def _entries(call: Call) -> Entries:
    state, retained = call.state, call.retained
    lay = layouts.build(call, 1)
    fresh = lay if state is None else layouts.build(dataclasses.replace(call, state=None), 1)
    assert call.scores is not None

    def entries(new: Tensor, ring: Tensor | None, kept: Tensor | None) -> Tensor:
        placed = lay.place(new, ring)
        return placed if kept is None else torch.cat([kept.to(placed.dtype), placed], 1)

    def named(new: Tensor, name: str) -> Tensor:
        old = [None if state is None else getattr(state, f"{part}_{name}") for part in ("recent", "kept")]
        return entries(new, *old)

    k, v = named(call.k, "k"), named(call.v, "v")
    k_far = k if call.k_far is None else named(call.k_far, "far_k")
    scores = lay.place(call.scores, None if state is None else state.recent_score)
    scores = scores.masked_fill((lay.positions < call.sinks), -torch.inf)
    positions = lay.positions.expand(scores.shape)
    start = clock = None
    if state is not None and state.kept_score is not None and state.kept_at is not None:
        scores = torch.cat([state.kept_score, scores], 1)
        positions = torch.cat([state.kept_at.to(positions.dtype), positions], 1)
        start = retained + lay.past - lay.base
    if call.decay is not None:
        placed = lay.place(call.decay, None if state is None else state.recent_decay)
        clock = (placed if placed.device.type == "mps" else placed.double()).cumsum(1)
        if state is not None and state.kept_decay is not None:
            clock = clock - _rows(F.pad(clock, [0, 0, 1, 0]), (lay.past - lay.base)[:, None])
            clock = torch.cat([-state.kept_decay.to(clock.dtype), clock], 1)
        clock = clock.transpose(1, 2)

    scores = scores.transpose(1, 2)
    ends = expiry(scores, window=call.window, retained=retained)
    lag, length = call.window + retained, scores.shape[2]
    count = max(length - lag, 0)
    at = torch.arange(length, device=ends.device).expand(ends.shape)
    order = at.new_zeros(*ends.shape[:2], count + 1)
    order = order.scatter(2, (ends - lag).clamp_max(count).long(), at)[..., :count].transpose(1, 2)
    ends = ends.masked_fill(scores == -torch.inf, NOBODYS)
    return Entries(k, v, k_far, clock, ends, order, start, positions, lay, fresh)


# ----------------------------------------------------------------------------------------------------------- near


def near_in_chunks(call: Call, q: Tensor, e: Entries) -> Part:
    """The near part, sinks left out, of the new tokens ``q [R, T, H, D]``: each chunk of them gathers its keys."""
    window, retained, sums = call.window, call.retained, call.sums
    (rows, count, heads, _), h = q.shape, e.k.shape[2]
    c = call.chunk_size or min(max(chunked.CHUNK_SIZE, (window + retained) // 4), count)
    chunks = -(-count // c)
    q = F.pad(q.to(sums), [0, 0, 0, 0, 0, chunks * c - count])
    q = q.view(rows, chunks, c, h, heads // h, -1).permute(0, 3, 1, 4, 2, 5)  # [R, h, n, G, C, D]
    k, v = e.k.to(sums).transpose(1, 2), e.v.to(sums).transpose(1, 2)  # [R, h, L, ·]
    starts = e.at(count)[:, ::c, None].expand(rows, -1, -1)[:, None]  # [R, 1, n, 1]
    step = max(GROUP_TOKENS // c, 1)
    parts = [
        _near_of(call, q[:, :, i : i + step], starts[:, :, i : i + step], k, v, e.expiry)
        for i in range(0, chunks, step)
    ]
    out, mass = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    out = out.permute(0, 2, 4, 1, 3, 5).reshape(rows, chunks * c, heads, -1)
    return out[:, :count], mass.permute(0, 2, 4, 1, 3).reshape(rows, chunks * c, heads)[:, :count]


def _near_of(call: Call, q: Tensor, starts: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Part:
    """``q [R, h, n, G, C, D]`` of chunks that begin at entries ``starts [R, 1, n, 1]``."""
    window, c, length = call.window, q.shape[4], k.shape[2]
    at = torch.arange(length, device=k.device)
    # Retained as the chunk begins; then the window before it and the chunk itself.
    held = (at <= starts - window) & (ends[:, :, None] > starts)  # [R, h, n, L]
    held = torch.where(held, at, -1).topk(min(call.retained, length), dim=-1, sorted=False).values
    recent = starts + torch.arange(1 - window, c, device=k.device)
    recent = torch.where(recent < length, recent, -1).expand(*held.shape[:3], -1)
    index = torch.cat([held, recent], -1)  # [R, h, n, E]
    flat = index.clamp_min(0).flatten(2)
    keys, values = (
        x.gather(2, flat[..., None].expand(*flat.shape, x.shape[-1])).unflatten(2, index.shape[2:]) for x in (k, v)
    )
    until = ends.gather(2, flat).view(index.shape)
    t = starts + torch.arange(c, device=k.device)  # [R, 1, n, C]
    seen = (index >= 0)[..., None, :] & (index[..., None, :] <= t[..., None]) & (t[..., None] < until[..., None, :])
    logits = softcapped((q.flatten(3, 4) * call.scale) @ keys.transpose(-1, -2), call.softcap).view(*q.shape[:5], -1)
    return _softmax(logits, seen[:, :, :, None], lambda p: (p.flatten(3, 4) @ values).view(*q.shape[:5], -1))


def _by_age(call: Call, q: Tensor, e: Entries) -> tuple[Entries, tuple[Tensor, Entries] | None]:
    """The entries as ``q [R, T, H, D]`` meets them; with ``q_retained``, those that have aged, as that meets them.

    An entry ages at the query ``retained_distance`` + 1 tokens on: it expires for q by then, and stands there, its far
    key in place of its key, in a row of entries of its own. Those that had aged before the call keep their slots.
    """
    if call.q_retained is None or (e.start is None and q.shape[1] <= call.retained_distance + 1):
        return e, None
    length, sizes = e.k.shape[1], e.expiry.shape
    here = torch.arange(length, device=q.device)
    aged = here + call.retained_distance + 1
    if e.start is None:
        first, to = aged.expand(sizes), aged.expand(sizes)
    else:
        origin = (e.start - e.lay.past)[:, None, None]  # the entry at which position 0 would be
        slot = here < call.retained
        first = torch.where(slot, e.positions.transpose(1, 2) + origin + call.retained_distance + 1, aged)
        to = torch.where(slot & (first <= e.start[:, None, None]), here, first)
    young = e._replace(expiry=torch.minimum(e.expiry, first).int())
    source = here.new_full((*sizes[:2], length + 1), length).scatter(2, to.clamp_max(length), here.expand(sizes))
    source = source[..., :length].transpose(1, 2)  # [R, L, Hkv]; those that age beyond the call are left out
    there, source = source < length, source.clamp_max(length - 1)
    k, v = (_of_heads(x, source) for x in (e.k_far.to(e.k.dtype), e.v))
    ends = torch.where(there, _of_heads(e.expiry.transpose(1, 2), source), NOBODYS).transpose(1, 2)
    return young, (e.fresh.place(call.q_retained), e._replace(k=k, v=v, expiry=ends))


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _softmax(logits: Tensor, seen: Tensor, weigh: Callable[[Tensor], Tensor]) -> Part:
    """Output and log mass of ``logits [..., E]`` where ``seen``: zeros and ``EMPTY`` where nothing is."""
    logits = logits.masked_fill(~seen, EMPTY)
    top = logits.detach().amax(-1, keepdim=True).clamp_min(EMPTY / 2)
    p = (logits - top).exp()
    total = p.sum(-1, keepdim=True)
    some = total > 0
    total = torch.where(some, total, 1.0)
    return weigh(p / total), torch.where(some, top + total.log(), EMPTY)[..., 0]


def _sinks_part(call: Call, q: Tensor, sink_k: Tensor, sink_v: Tensor, there: Tensor, e: Entries) -> Part:
    """Attention to the sinks, which meet ``q_sink`` behind the window."""
    sums, h = call.sums, sink_k.shape[2]
    at = e.lay.past[:, None] + torch.arange(q.shape[1], device=q.device)
    gap = at[..., None] - torch.arange(call.sinks, device=q.device)  # [R, T, S]
    seen = ((gap >= 0) & there[:, None])[:, :, None, None]
    sink_k, sink_v = sink_k.to(sums), sink_v.to(sums)

    def logits(x: Tensor) -> Tensor:
        return torch.einsum("rthgd,rshd->rthgs", x.to(sums).unflatten(2, (h, -1)) * call.scale, sink_k)

    found = logits(q)
    if call.q_sink is not None:
        behind = (gap >= call.window)[:, :, None, None]
        found = torch.where(behind, logits(e.fresh.place(call.q_sink)), found)
    found = softcapped(found, call.softcap)
    out, mass = _softmax(found, seen, lambda p: torch.einsum("rthgs,rshv->rthgv", p, sink_v))
    return out.flatten(2, 3), mass.flatten(2, 3)


# ------------------------------------------------------------------------------------------------------------ far


class _InOrder:
    """The map of features that are there already, with log-scales beside them, of tokens from position 1 on."""

    scale = 1.0
    positional = True
    causal = True

    def __init__(self, feature_dim: int, log_q: Tensor | None, log_k: Tensor | None) -> None:
        self.feature_dim, self.log_q, self.log_k = feature_dim, log_q, log_k

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return q, self._at(self.log_q, positions)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return k, self._at(self.log_k, positions)

    @staticmethod
    def _at(x: Tensor | None, positions: Tensor | None) -> Tensor | None:
        assert positions is not None
        if x is None:
            return None
        index = (positions - 1).clamp(0, x.shape[1] - 1)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _with_far(call: Call, near: Part, phi_k: Tensor, log_k: Tensor | None, e: Entries, impl: str) -> Tensor:
    """Near and far part under one normaliser ``[R, T, H, V]``."""
    lag, state, sums = call.window + call.retained, call.state, call.sums
    near_out, log_near = near
    (rows, count), size, h = near_out.shape[:2], call.v.shape[-1], e.k.shape[2]
    dtype = call.v.dtype if impl == "triton" else sums
    width = size + (COLUMNS if impl == "triton" else 2)

    q_far = e.by_slot(e.fresh.place(call.q if call.q_far is None else call.q_far), lag)
    phi_q, log_q = features_of(call, "queries", q_far, e.order)
    there = _of_heads(e.expiry.transpose(1, 2) != NOBODYS, e.order)
    keys = _of_heads(phi_k, e.order) * there[..., None]
    log_keys = None if log_k is None else _of_heads(log_k, e.order)
    gates = None
    if call.decay is not None and e.clock is not None:
        # Decay from expiry on is the call's, decay before that a log-scale of the key.
        clock = e.clock.transpose(1, 2)
        now = clock[:, lag:]
        if e.start is not None:
            new = torch.arange(lag, clock.shape[1], device=clock.device) >= e.start[:, None]
            now = torch.where(new[..., None], now, 0)
        gates = e.by_slot(e.fresh.place(call.decay), lag)
        since = (now - _of_heads(clock, e.order)).to(sums)
        log_keys = since if log_keys is None else log_keys + since
    if log_keys is not None:
        log_keys = log_keys.masked_fill(~there, EMPTY_LOG_SCALE)
    map_: KernelFeatureMap = GivenFeatures(call.feature_dim, log_scaled=False)
    if log_keys is not None or log_q is not None:
        map_ = _InOrder(call.feature_dim, log_q, log_keys)

    values = _of_heads(e.v, e.order).to(dtype)
    values = F.pad(torch.cat([values, torch.ones_like(values[..., :1])], -1), [0, width - size - 1])
    sink_v = values.new_zeros(rows, 1, h, width)
    sink_v[..., size + 1] = 1
    if state is None:
        kv = phi_k.new_zeros(rows, h, call.feature_dim, width)
        memory = Memory(kv, kv[..., 0], phi_k.new_full((rows, h), EMPTY_LOG_SCALE))
    else:
        kv = torch.cat([state.kv, state.k[..., None]], -1)
        memory = Memory(F.pad(kv, [0, width - size - 1]), state.k, state.log_scale)
    logits = _in_parts(e.by_slot(log_near, lag).clamp_min(-3e4), dtype)
    before = AttentionState(
        *memory,
        length=torch.ones(rows, dtype=torch.int64, device=values.device),
        folded=torch.ones(rows, dtype=torch.int64, device=values.device),
        recent_k=values.new_zeros(rows, 0, h, logits.shape[-1]),
        recent_v=values.new_zeros(rows, 0, h, width),
        sink_k=values.new_ones(rows, 1, h, logits.shape[-1]),
        sink_v=sink_v,
        recent_far_k=values.new_zeros(rows, 0, h, call.feature_dim),
        recent_decay=None if gates is None else gates.new_zeros(rows, 0, h),
    )
    found = dispatch.dispatch(
        resolve(
            logits,
            torch.zeros_like(values[..., : logits.shape[-1]]),
            values,
            feature_map=map_,
            window=0,
            sinks=1,
            far=True,
            decay=gates,
            far_bias=call.far_bias,
            scale=1.0,
            softcap=None,
            sink_logits=None,
            q_far=phi_q.to(dtype),
            k_far=keys.to(dtype),
            q_sink=None,
            causal=True,
            mask=None,
            cu_seqlens=None,
            state=before,
            return_state=False,
            lookback=0,
            chunk_size=None,
        ),
        impl,
    )[0].to(sums)
    # Queries before the first that sees anything far get zeros: the near share is told by what it lacks to one.
    found = e.by_token(torch.cat([found[..., :size], found[..., size + 1 : size + 2] - 1], -1), lag, count)
    return found[..., :size] + (found[..., size:] + 1) * near_out


def _in_parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x [...]`` as a sum of three numbers ``[..., 3]`` of few digits, whose products with one are exact."""
    parts = []
    for _ in range(2):
        parts.append(x.to(torch.bfloat16).to(x.dtype))
        x = x - parts[-1]
    return torch.stack([*parts, x], -1).to(dtype)


# ---------------------------------------------------------------------------------------------------------- calls


def attend(call: Call, impl: str) -> tuple[Tensor, AttentionState | None]:
    """A call with retained tokens on one of the implementations other than the reference."""
    batch, length, heads, _ = call.q.shape
    empty = call.v.new_zeros(batch, length, heads, call.v.shape[3])
    if batch == 0 or (length == 0 and call.state is None):
        return empty, chunked.empty_state(call) if call.return_state else None
    state = call.state
    if state is not None and length == 1 and call.lookback == state.lookback == 0:
        if call.mask is None:
            return _attend_step(call)
        return chunked.masked_step(call, call.mask[:, 0], state, _attend_step)
    e = _entries(call)
    at = e.lay.positions[:, :0]  # no map here asks for positions
    phi_k = log_k = None
    if call.feature_map is not None and (call.return_state or e.order.shape[1]):
        phi_k, log_k = features_of(call, "keys", e.k_far, at)
    k, v = (x[:, x.shape[1] - e.lay.slots // e.lay.rows :] for x in (e.k, e.v))
    sinks = chunked.sinks_of(call, e.lay, k, v) if call.sinks else None
    out = empty
    if length:
        q = e.fresh.place(call.q)
        young, old = _by_age(call, q, e)
        parts = [_near(call, q, young, impl)]
        if old is not None:
            parts.append(_near(call, *old, impl))
        if sinks is not None:
            parts.append(_sinks_part(call, q, *sinks, e))
        if call.sink_logits is not None:
            mass = call.sink_logits.to(call.sums).expand(parts[0][1].shape)
            parts.append((torch.zeros_like(parts[0][0]), mass))
        near = joined(parts)
        wide = near[0] if phi_k is None or not e.order.shape[1] else _with_far(call, near, phi_k, log_k, e, impl)
        out = e.fresh.collect(wide.to(call.v.dtype), batch, length)
    if not call.return_state:
        return out, None
    return out, _final_state(call, e, phi_k, log_k, None if sinks is None else sinks[:2])


def _near(call: Call, q: Tensor, e: Entries, impl: str) -> Part:
    if impl != "triton":
        return near_in_chunks(call, q, e)
    from linattn.kernels.triton.expiring import expiring_attention

    ends = e.expiry.contiguous()
    return expiring_attention(q, e.k, e.v, ends, scale=call.scale, softcap=call.softcap, start=e.start)


def _final_state(
    call: Call, e: Entries, phi_k: Tensor | None, log_k: Tensor | None, sinks: tuple[Tensor, Tensor] | None
) -> AttentionState:
    """Of what left the ring, the best are kept, the rest is folded."""
    lay, ring, sums, old = e.lay, call.ring, call.sums, call.state
    blank = chunked.empty_state(call)
    folded = torch.maximum(lay.base, lay.length - ring)
    length, first = e.k.shape[1], e.k.shape[1] - lay.slots // lay.rows
    cut = (first + folded - lay.base)[:, None, None]  # entries that left the ring
    at = torch.arange(length, device=e.k.device)
    kept = (at < cut) & (e.expiry >= cut + call.window)  # [R, h, L]
    gone = (at < cut) & ~kept & (e.expiry != NOBODYS)
    index = torch.where(kept, at, -1).topk(min(call.retained, length), dim=-1).values.flip(-1)
    index = F.pad(index, [call.retained - index.shape[-1], 0], value=-1).transpose(1, 2)  # [R, M, h]
    there, index = index >= 0, index.clamp_min(0)

    def slots(x: Tensor, empty: float = 0.0) -> Tensor:
        return torch.where(there.view(*there.shape, *[1] * (x.ndim - 3)), _of_heads(x, index), empty)

    memory = Memory(*((blank if old is None else old).tensors()[n].to(sums) for n in ("kv", "k", "log_scale")))
    since = None
    if e.clock is not None:
        end = e.clock[..., -1:]
        since = (end - e.clock).to(sums)
        memory = memory._replace(log_scale=memory.log_scale + (0 if old is None else end[..., 0].to(sums)))
    if phi_k is not None:
        log_weight = phi_k.new_zeros(gone.shape) if since is None else since
        log_weight = log_weight if log_k is None else log_weight + log_k.transpose(1, 2)
        parts = (phi_k.transpose(1, 2), e.v.to(sums).transpose(1, 2), log_weight, gone.to(sums))
        left = summarise(*(x[:, :, None] for x in parts))
        memory = chunked.merge([memory, Memory(*(x[:, :, 0] for x in left))])

    ring_slots = lay.newest(ring)

    def newest(x: Tensor) -> Tensor:
        return lay.gather(x[:, first:], ring_slots)

    def placed(name: str) -> Tensor:
        return lay.place(getattr(call, name), None if old is None else getattr(old, f"recent_{name.rstrip('s')}"))

    scores = raw = placed("scores")
    if old is not None and old.kept_score is not None:
        scores = torch.cat([old.kept_score, raw], 1)
    return AttentionState(
        kv=memory.kv,
        k=memory.k,
        log_scale=memory.log_scale.clamp_min(EMPTY_LOG_SCALE),
        length=lay.length,
        folded=folded,
        recent_k=newest(e.k),
        recent_v=newest(e.v),
        sink_k=blank.sink_k if sinks is None else sinks[0],
        sink_v=blank.sink_v if sinks is None else sinks[1],
        recent_far_k=None if call.k_far is None else newest(e.k_far),
        recent_decay=None if call.decay is None else lay.gather(placed("decay"), ring_slots),
        window=call.window,
        kept_k=slots(e.k),
        kept_v=slots(e.v),
        kept_far_k=None if call.k_far is None else slots(e.k_far),
        kept_score=slots(scores, -torch.inf),
        kept_at=slots(e.positions, 0).int(),
        kept_decay=None if since is None else slots(since.transpose(1, 2)),
        recent_score=lay.gather(raw, ring_slots),
    )


def _attend_step(call: Call) -> tuple[Tensor, AttentionState | None]:
    """One new token after a state without lookback: what leaves the ring contends for a slot, the worst is folded."""
    state: Any = call.state
    sums, retained = call.sums, call.retained
    assert call.scores is not None
    device, groups = call.k.device, call.q.shape[2] // call.k.shape[2]
    k = torch.cat([state.recent_k.to(call.k.dtype), call.k], 1)  # [N, W + 1, h, D]
    v = torch.cat([state.recent_v.to(call.v.dtype), call.v], 1)
    score = torch.cat([state.recent_score, call.scores], 1)
    at = state.length[:, None] - call.window + torch.arange(call.window + 1, device=device)  # [N, W + 1]
    there = at >= state.folded[:, None]
    leaves = there[:, :1] & (at[:, :1] >= call.sinks)

    scores = torch.cat([state.kept_score, score[:, :1].masked_fill(~leaves[..., None], -torch.inf)], 1)
    worst = retained - scores.flip(1).argmin(1, keepdim=True)  # [N, 1, h], of equal scores the youngest
    slot = torch.arange(retained, device=device)[:, None]
    stay = slot + (slot >= worst)  # [N, M, h]
    folds = scores.gather(1, worst) > -torch.inf

    def contend(kept: Tensor | None, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """What stays ``[N, M, h, ...]`` and what folds ``[N, 1, h, ...]``."""
        assert kept is not None
        both = torch.cat([kept.to(leaving.dtype), leaving], 1)
        return _of_heads(both, stay), _of_heads(both, worst)

    (kept_k, gone_k), (kept_v, gone_v) = contend(state.kept_k, k[:, :1]), contend(state.kept_v, v[:, :1])
    k_far = kept_far = None
    if call.k_far is not None:
        k_far = torch.cat([state.recent_far_k.to(call.k_far.dtype), call.k_far], 1)
        kept_far, gone_k = contend(state.kept_far_k, k_far[:, :1])
    decay = kept_decay = gone_decay = None
    if call.decay is not None:
        decay = torch.cat([state.recent_decay.to(sums), call.decay], 1)
        since = decay[:, 1:].sum(1, keepdim=True)
        kept_decay, gone_decay = contend(state.kept_decay.to(sums) + call.decay, since)
    kept_score = scores.gather(1, stay)
    held = kept_score > -torch.inf
    kept_decay = None if kept_decay is None else torch.where(held, kept_decay, 0)

    def block(x: Tensor) -> Tensor:  # [N, E, h, ·] to [N, h, 1, E, ·]
        return x.to(sums).transpose(1, 2)[:, :, None]

    kept_at, _ = contend(state.kept_at, at[:, :1, None].expand(-1, -1, k.shape[2]))
    seen = held.transpose(1, 2)[:, :, None, None]  # [N, h, 1, 1, M]
    exact = [Exact(block(kept_k), block(kept_v), seen)]
    if call.q_retained is not None and kept_far is not None:
        aged = (state.length[:, None, None] - kept_at > call.retained_distance).transpose(1, 2)[:, :, None, None]
        q_aged = chunked.split(call.q_retained.to(sums), k.shape[2], 1)
        exact = [exact[0]._replace(mask=seen & ~aged), Exact(block(kept_far), block(kept_v), seen & aged, q_aged)]
    if call.window:
        exact.append(Exact(block(k[:, 1:]), block(v[:, 1:]), there[:, None, None, None, 1:]))
    sink_k, sink_v = state.sink_k, state.sink_v
    if call.sinks:
        sink_k, sink_v, own = chunked.step_sinks(call, state, k, v)
        exact.append(own)

    memory = Memory(state.kv.to(sums), state.k.to(sums), state.log_scale.to(sums))
    summed = []
    queries = chunked.queries_of(call, call.q, None, None, 1)
    if call.feature_map is not None:
        nowhere = at[:, :0]  # no map here asks for positions
        phi_q, log_q = chunked.query_features(call, call.q if call.q_far is None else call.q_far, nowhere)
        queries = chunked.queries_of(call, call.q, phi_q, log_q, 1)
        phi_k, log_k = features_of(call, "keys", gone_k, nowhere)
        log_weight = phi_k.new_zeros(phi_k.shape[:3]) if log_k is None else log_k
        if gone_decay is not None and call.decay is not None:
            log_weight = log_weight + gone_decay
            memory = memory._replace(log_scale=memory.log_scale + call.decay[:, 0])
        weight = folds.transpose(1, 2)[:, :, None].to(sums)
        left = summarise(block(phi_k), block(gone_v), log_weight.transpose(1, 2)[:, :, None], weight)
        memory = chunked.merge([memory, Memory(*(x[:, :, 0] for x in left))])
        summed = [Summed(memory.kv[:, :, None], memory.k[:, :, None], memory.log_scale[..., None, None])]
    logits = None if call.sink_logits is None else call.sink_logits.to(sums)
    out = read(queries, exact, [], summed, scale=call.scale, softcap=call.softcap, sink_logits=logits)
    out = out.view(len(out), 1, groups * call.k.shape[2], -1).to(call.v.dtype)
    if not call.return_state:
        return out, None
    return out, AttentionState(
        kv=memory.kv,
        k=memory.k,
        log_scale=memory.log_scale.clamp_min(EMPTY_LOG_SCALE),
        length=state.length + 1,
        folded=torch.maximum(state.folded, state.length + 1 - call.window),
        recent_k=k[:, 1:],
        recent_v=v[:, 1:],
        sink_k=sink_k,
        sink_v=sink_v,
        recent_far_k=None if k_far is None else k_far[:, 1:],
        recent_decay=None if decay is None else decay[:, 1:],
        window=call.window,
        kept_k=kept_k,
        kept_v=kept_v,
        kept_far_k=kept_far,
        kept_score=kept_score,
        kept_at=kept_at.int(),
        kept_decay=kept_decay,
        recent_score=score[:, 1:],
    )
