"""The operator in plain PyTorch: O(T) memory, any device, autograd, exact continuation from a state.

Tokens stand in chunks of C. A chunk's queries read three things: the keys of their own and the ``reach`` neighbouring
chunks one by one (exactly inside the window, through features outside it), the sinks, and one memory that sums every
earlier chunk. The memories of all chunks come from one prefix sum, so there is no loop over chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.kernels import layout as layouts
from linattn.kernels.features import features_of
from linattn.kernels.layout import Layout
from linattn.kernels.read import Exact, Far, Queries, Summed, read
from linattn.kernels.scan import Memory, prefix, summarise
from linattn.kernels.validate import Call
from linattn.state import EMPTY_LOG_SCALE, AttentionState

CHUNK_SIZE = 64
SHORT_CHUNKS = (16, 32)
"""Chunk sizes for sequences that fit one of them."""
SEGMENT_TOKENS = 2048
MAX_COMPILED_SEGMENTS = 32
STEP_TOKENS = 16
"""Up to this many new tokens are read against the ring directly, without laying out chunks."""


def attend(call: Call) -> tuple[Tensor, AttentionState | None]:
    """Attention of a checked call."""
    batch, length, heads, _ = call.q.shape
    if batch == 0 or length == 0 or call.k.shape[1] == 0:
        empty = call.v.new_zeros(batch, length, heads, call.v.shape[3])
        if not call.return_state:
            return empty, None
        if call.state is None or batch == 0:
            return empty, empty_state(call)
        if call.lookback >= call.state.lookback:
            return empty, call.state.with_lookback(call.lookback)
        return _attend_chunks(call)  # the ring shrinks: its oldest tokens are folded
    if call.state is not None and call.causal and call.cu_seqlens is None and length <= STEP_TOKENS:
        if call.mask is None:
            return _attend_step(call)
        if length == 1 and call.lookback >= call.state.lookback:
            return masked_step(call, call.mask[:, 0], call.state, _attend_step)
    if not call.causal and call.window == 0 and call.cu_seqlens is None:
        return _attend_all(call), None
    segment = _segment(call)
    if call.causal and call.cu_seqlens is None and length > segment:
        return _attend_segments(call, segment)
    return _attend_chunks(call)


def _segment(call: Call) -> int:
    """Tokens laid out at once: few enough that a step's tensors stay in cache and memory is reused."""
    segment = max(SEGMENT_TOKENS, 8 * call.window)
    length = call.q.shape[1]
    if torch.compiler.is_compiling() and length > segment * MAX_COMPILED_SEGMENTS:
        return -(-length // MAX_COMPILED_SEGMENTS)  # a graph of at most that many copies of the work
    return segment


def _attend_segments(call: Call, segment: int) -> tuple[Tensor, AttentionState | None]:
    """A long sequence as segments, each continuing from the state of the one before."""
    length = call.q.shape[1]
    state, outs = call.state, []
    for start in range(0, length, segment):
        stop = min(start + segment, length)

        def cut(x: Tensor | None, start: int = start, stop: int = stop) -> Tensor | None:
            return None if x is None else x[:, start:stop]

        last = stop == length
        part = dataclasses.replace(
            call,
            q=call.q[:, start:stop],
            k=call.k[:, start:stop],
            v=call.v[:, start:stop],
            q_far=cut(call.q_far),
            k_far=cut(call.k_far),
            q_sink=cut(call.q_sink),
            decay=cut(call.decay),
            mask=cut(call.mask),
            state=state,
            return_state=call.return_state or not last,
        )
        out, state = attend(part)
        outs.append(out)
    return torch.cat(outs, 1), state


def empty_state(call: Call) -> AttentionState:
    """A state of the call's sizes that has seen nothing."""
    return AttentionState.empty(
        call.sequences,
        num_kv_heads=call.k.shape[2],
        feature_dim=call.feature_dim,
        head_dim=call.k.shape[3],
        value_dim=call.v.shape[3],
        window=call.window,
        sinks=call.sinks,
        lookback=call.lookback,
        far_head_dim=None if call.k_far is None else call.k_far.shape[-1],
        decay=call.decay is not None,
        retained=call.retained,
        dtype=call.v.dtype,
        device=call.v.device,
    )


# ------------------------------------------------------------------------------------------------------- features


def query_features(call: Call, q: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Features ``[B, T, H, F]`` and log-scale with the far bias ``[B, T, H]`` in the accumulation dtype."""
    if call.feature_map is None:
        return None, None
    values, log_scale = features_of(call, "queries", q, positions)
    if call.far_bias is not None:
        bias = call.far_bias.to(call.sums)
        log_scale = bias.expand(values.shape[:-1]) if log_scale is None else log_scale + bias
    return values, log_scale


def key_features(call: Call, k: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Features ``[B, T, Hkv, F]`` and log-scale ``[B, T, Hkv]`` in the accumulation dtype."""
    if call.feature_map is None:
        return None, None
    return features_of(call, "keys", k, positions)


def queries_of(call: Call, q: Tensor, features: Tensor | None, log_scale: Tensor | None, c: int) -> Queries:
    """``[R, n · C, H, ·]`` to ``[R, h, n, G, C, ·]``."""
    h = call.k.shape[2]
    return Queries(
        split(q.to(call.sums), h, c),
        None if features is None else split(features, h, c),
        None if log_scale is None else split(log_scale, h, c),
    )


def split(x: Tensor, h: int, c: int) -> Tensor:
    """``[R, n · C, H, ·]`` to ``[R, h, n, G, C, ·]``."""
    rows, width, heads = x.shape[:3]
    x = x.view(rows, width // c, c, h, heads // h, *x.shape[3:])
    return x.permute(0, 3, 1, 4, 2, *range(5, x.ndim))


def _merge_heads(out: Tensor, dtype: torch.dtype) -> Tensor:
    """``[R, h, n, G, C, V]`` to ``[R, n · C, H, V]``."""
    rows, h, n, groups, c, value_dim = out.shape
    return out.permute(0, 2, 4, 1, 3, 5).reshape(rows, n * c, h * groups, value_dim).to(dtype)


# --------------------------------------------------------------------------------------------------------- chunks


def _chunks(x: Tensor, c: int) -> Tensor:
    """``[R, n · C, h, ...]`` to ``[R, h, n, C, ...]``."""
    x = x.view(x.shape[0], x.shape[1] // c, c, *x.shape[2:])
    return x.permute(0, 3, 1, 2, *range(4, x.ndim)).contiguous()


def _extend(x: Tensor, before: int, after: int, value: float = 0) -> Tensor:
    """Each chunk with its neighbours: ``[R, h, n, C, ...]`` to ``[R, h, n, (before + 1 + after) · C, ...]``."""
    if before == after == 0:
        return x
    n = x.shape[2]
    padded = F.pad(x, [0, 0] * (x.ndim - 3) + [before, after], value=value)
    return torch.cat([padded[:, :, i : i + n] for i in range(before + 1 + after)], dim=3)


def _clock(decay: Tensor) -> Tensor:
    """Running log-decay along each row ``[R, h, L]``; float64 keeps differences exact after millions of tokens."""
    wide = decay if decay.device.type == "mps" else decay.double()
    return wide.cumsum(1).transpose(1, 2)


def _attend_chunks(call: Call) -> tuple[Tensor, AttentionState | None]:
    batch, length = call.q.shape[:2]
    # Comparisons, here and below, keep a compiled graph valid for a range of lengths.
    c = call.chunk_size or next((c for c in SHORT_CHUNKS if length <= c), CHUNK_SIZE)
    lay = layouts.build(call, c)
    state = call.state
    w, sums = call.window, call.sums

    k = lay.place(call.k, None if state is None else state.recent_k)
    v = lay.place(call.v, None if state is None else state.recent_v)
    q = lay.place(call.q, None if state is None else call.q.new_zeros(*state.recent_k.shape[:2], *call.q.shape[2:]))
    q_sink = None
    if call.q_sink is not None:
        blank = None if state is None else call.q.new_zeros(*state.recent_k.shape[:2], *call.q.shape[2:])
        q_sink = split(lay.place(call.q_sink, blank).to(sums), call.k.shape[2], c)
    q_far, k_far = q, k
    if call.q_far is not None and call.k_far is not None:
        ring = None if state is None else state.recent_far_k
        k_far = lay.place(call.k_far, ring)
        q_far = lay.place(
            call.q_far, None if ring is None else call.q_far.new_zeros(*ring.shape[:2], *call.q_far.shape[2:])
        )
    decay = None
    if call.decay is not None:
        decay = lay.place(call.decay, None if state is None else state.recent_decay)
    positions = lay.positions.clamp_min(0).flatten(1)
    phi_q, log_q = query_features(call, q_far, positions)
    phi_k, log_k = key_features(call, k_far, positions)

    reach = -(-(w - 1) // c) if w > 1 else 0
    reach = reach if reach < lay.chunks else lay.chunks - 1
    after = 0 if call.causal else reach
    queries = queries_of(call, q, phi_q, log_q, c)
    key_blocks, value_blocks = _chunks(k.to(sums), c), _chunks(v.to(sums), c)

    # Which of the extended keys each query sees, and how.
    at = lay.positions[:, None]  # [R, 1, n, C]
    key_at = _extend(at, reach, after, value=-1)  # [R, 1, n, E]
    seen = (key_at >= 0)[..., None, :]
    if lay.packed:
        owner = lay.sequence[:, None, :, None].expand(*lay.sequence[:, None].shape, c)
        seen = seen & (_extend(owner, reach, after, value=-2) == owner[..., :1])[..., None, :]
    gap = at[..., :, None] - key_at[..., None, :]  # [R, 1, n, C, E]
    near_gap = gap < w
    if call.causal:
        seen = seen & (gap >= 0)
    else:
        near_gap = near_gap & (gap > -w)

    exact: list[Exact] = []
    if w:
        exact.append(Exact(_extend(key_blocks, reach, after), _extend(value_blocks, reach, after), seen & near_gap))
    sink_k = sink_v = None
    if call.sinks:
        sink_k, sink_v, sink_there = sinks_of(call, lay, k, v)
        exact.append(_sink_block(call, lay, sink_k, sink_v, sink_there, at)._replace(q=q_sink))

    far: list[Far] = []
    summed: list[Summed] = []
    sums_so_far = clock = None
    if phi_k is not None:
        feature_blocks = _chunks(phi_k, c)
        clock = None if decay is None else _clock(decay)
        log_blocks = None if log_k is None else _chunks(log_k, c)
        is_far = seen & ~near_gap & (key_at >= call.sinks)[..., None, :]
        far_values = exact[0].v if w else value_blocks
        log_weights = _far_log_weights(log_blocks, clock, lay, reach, after, sums)
        far.append(Far(_extend(feature_blocks, reach, after), far_values, is_far, log_weights))
        memory = _summarise_chunks(call, lay, feature_blocks, value_blocks, log_blocks, clock)
        plain = log_blocks is None and clock is None
        ends = None if clock is None else clock.unflatten(2, (lay.chunks, c))[..., -1]
        if state is not None and not lay.packed:
            memory, initial = _begin_with(call, state, lay, memory, clock, min(reach + 1, lay.chunks), plain)
            summed.append(initial)
        sums_so_far = prefix(memory, ends, lay.sequence, plain=plain)
        if lay.chunks > reach + 1:
            summed.append(_earlier_chunks(lay, sums_so_far, clock, reach + 1, plain))
            if not call.causal:
                suffix = prefix(memory, None, lay.sequence, plain=plain, reverse=True)
                summed.append(_earlier_chunks(lay, suffix, None, -reach - 1, plain))
        if state is not None and lay.packed:
            summed.append(_initial_packed(call, state, lay, clock))

    out = read(queries, exact, far, summed, scale=call.scale, softcap=call.softcap, sink_logits=_sink_logits(call))
    out = lay.collect(_merge_heads(out, call.v.dtype), batch, length)
    if not call.return_state:
        return out, None
    return out, _final_state(call, lay, k, v, k_far, decay, sink_k, sink_v, phi_k, log_k, sums_so_far, clock)


def _sink_logits(call: Call) -> Tensor | None:
    return None if call.sink_logits is None else call.sink_logits.to(call.sums)


def _far_log_weights(
    log_blocks: Tensor | None, clock: Tensor | None, lay: Layout, before: int, after: int, dtype: torch.dtype
) -> Tensor | None:
    """Log-scale plus decay of each extended key as each query of the chunk sees it ``[R, h, n, C | 1, E]``."""
    total = None if log_blocks is None else _extend(log_blocks, before, after)[..., None, :]
    if clock is not None:
        blocks = clock.unflatten(2, (lay.chunks, lay.chunk_size))
        decay = (blocks[..., :, None] - _extend(blocks, before, after)[..., None, :]).to(dtype)
        total = decay if total is None else total + decay
    return total


def _summarise_chunks(
    call: Call, lay: Layout, features: Tensor, values: Tensor, log_blocks: Tensor | None, clock: Tensor | None
) -> Memory:
    """Each chunk's own tokens, sinks and empty slots left out, seen from the chunk's end."""
    log_weight = log_blocks
    if clock is not None:
        blocks = clock.unflatten(2, (lay.chunks, lay.chunk_size))
        to_end = (blocks[..., -1:] - blocks).to(features.dtype)
        log_weight = to_end if log_weight is None else log_weight + to_end
    # A causal row in order has empty slots only in its last chunk, which no later chunk reads.
    if call.causal and lay.source is None and call.sinks == 0:
        return summarise(features, values, log_weight, None)
    counts = (lay.positions >= call.sinks)[:, None].to(features.dtype)
    return summarise(features, values, log_weight, counts)


def _earlier_chunks(lay: Layout, memory: Memory, clock: Tensor | None, shift: int, plain: bool) -> Summed:
    """The running sums as the queries ``shift`` chunks later (earlier, if negative) see them."""
    there = None
    if lay.packed:
        there = _shifted(lay.sequence[:, None], shift, -2) == lay.sequence[:, None]
    if plain:
        return Summed(memory.kv, memory.k, None, there, shift)
    log_weight = _shifted(memory.log_scale, shift, EMPTY_LOG_SCALE)[..., None]
    if clock is not None:
        blocks = clock.unflatten(2, (lay.chunks, lay.chunk_size))
        log_weight = log_weight + (blocks - _shifted(blocks[..., -1], shift, 0)[..., None]).to(log_weight.dtype)
    return Summed(memory.kv, memory.k, log_weight, there, shift)


def _shifted(x: Tensor, shift: int, value: float) -> Tensor:
    """``[R, h, n]`` with entry i − shift at i, ``value`` where there is none."""
    n = x.shape[2]
    return F.pad(x, [max(shift, 0), max(-shift, 0)], value=value)[..., max(-shift, 0) : max(-shift, 0) + n]


def _initial_packed(call: Call, state: AttentionState, lay: Layout, clock: Tensor | None) -> Summed:
    """The sums of every packed sequence's state as the queries of its chunks see them."""
    owner = lay.sequence.clamp_min(0)

    def per_chunk(x: Tensor) -> Tensor:  # [N, h, ...] -> [1, h, n, ...]
        return x.to(call.sums)[owner].transpose(1, 2)

    log_weight = per_chunk(state.log_scale)[..., None]
    if clock is not None:
        blocks = clock.unflatten(2, (lay.chunks, lay.chunk_size))
        origin = _clock_before(lay, clock, lay.start + lay.past - lay.base)[owner].transpose(1, 2)
        log_weight = log_weight + (blocks - origin[..., None]).to(call.sums)
    return Summed(per_chunk(state.kv), per_chunk(state.k), log_weight)


def _begin_with(
    call: Call, state: AttentionState, lay: Layout, memory: Memory, clock: Tensor | None, blocks: int, plain: bool
) -> tuple[Memory, Summed]:
    """Put the state's sums into those of each row's first chunk, so that the running sums carry them along.

    The first ``blocks`` chunks read no running sum yet; they get the state's sums as they are.
    """
    kv, k, log_scale = state.kv.to(call.sums), state.k.to(call.sums), state.log_scale.to(call.sums)
    if plain:
        there = log_scale.exp()
        kv, k, log_scale = kv * there[..., None, None], k * there[..., None], torch.zeros_like(log_scale)
        first = Memory(memory.kv[:, :, 0] + kv, memory.k[:, :, 0] + k, log_scale)
        log_weight = None
    else:
        log_weight, at_end = log_scale[:, :, None, None], log_scale
        if clock is not None:
            origin = _clock_before(lay, clock, lay.start + lay.past - lay.base)
            since = clock.unflatten(2, (lay.chunks, lay.chunk_size)) - origin[..., None, None]
            log_weight = log_weight + since[:, :, :blocks].to(call.sums)
            at_end = log_scale + since[:, :, 0, -1].to(call.sums)
        log_weight = log_weight.expand(-1, -1, blocks, -1)
        log_weight = F.pad(log_weight, [0, 0, 0, lay.chunks - blocks], value=EMPTY_LOG_SCALE)
        first = merge([Memory(kv, k, at_end), Memory(*(x[:, :, 0] for x in memory))])
    carried = Memory(*(torch.cat([x.unsqueeze(2), rest[:, :, 1:]], 2) for x, rest in zip(first, memory, strict=True)))
    return carried, Summed(kv.unsqueeze(2), k.unsqueeze(2), log_weight, blocks=blocks)


def _clock_before(lay: Layout, clock: Tensor, slots: Tensor) -> Tensor:
    """The running log-decay just before each sequence's ``slots [N]``, as ``[N, h]``."""
    width = lay.chunks * lay.chunk_size
    row = lay.start // width
    return F.pad(clock, [1, 0])[row, :, slots - row * width]


# ---------------------------------------------------------------------------------------------- without a window


def _attend_all(call: Call) -> Tensor:
    """Bidirectional or cross attention without a window: one memory of all keys, no chunks."""
    sums, device = call.sums, call.k.device
    batch, length, keys = call.q.shape[0], call.q.shape[1], call.k.shape[1]
    k, v = call.k, call.v
    k_far = k if call.k_far is None else call.k_far
    key_at = torch.arange(keys, device=device).expand(batch, keys)
    query_at = torch.arange(length, device=device).expand(batch, length)
    there = torch.ones(batch, keys, dtype=torch.bool, device=device)
    if call.mask is not None:
        there = call.mask
        key_at = (there.cumsum(1) - 1).clamp_min(0)
        if keys == length:
            query_at = key_at
        wipe = ~there[..., None, None]
        k, v, k_far = (x.masked_fill(wipe, 0) for x in (k, v, k_far))

    phi_q, log_q = query_features(call, call.q if call.q_far is None else call.q_far, query_at)
    phi_k, log_k = key_features(call, k_far, key_at)
    queries = queries_of(call, call.q, phi_q, log_q, length)

    exact: list[Exact] = []
    if call.sinks:
        rank = torch.where(there, key_at, keys)
        slot = torch.arange(call.sinks, device=device)
        found = rank[:, None, :] == slot[:, None]  # [B, S, Tk]
        index = found.long().argmax(-1)[..., None, None]
        blocks = [x.gather(1, index.expand(-1, -1, *x.shape[2:])).to(sums).transpose(1, 2)[:, :, None] for x in (k, v)]
        exact.append(Exact(blocks[0], blocks[1], found.any(-1)[:, None, None, None].expand(-1, -1, -1, length, -1)))
    summed: list[Summed] = []
    if phi_k is not None:
        counts = (there & (key_at >= call.sinks))[:, None, None].to(sums)
        memory = summarise(
            phi_k.transpose(1, 2)[:, :, None],
            v.to(sums).transpose(1, 2)[:, :, None],
            None if log_k is None else log_k.transpose(1, 2)[:, :, None],
            counts,
        )
        log_weight = None if log_k is None else memory.log_scale[..., None]
        summed.append(Summed(memory.kv, memory.k, log_weight))
    out = read(queries, exact, [], summed, scale=call.scale, softcap=call.softcap, sink_logits=_sink_logits(call))
    return _merge_heads(out, call.v.dtype)


# ---------------------------------------------------------------------------------------------------------- sinks


def sinks_of(call: Call, lay: Layout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values ``[N, S, h, ·]`` of each sequence's first tokens, and which exist ``[N, S]``."""
    at = torch.arange(call.sinks, device=k.device)
    there = at < lay.length[:, None]
    slots = torch.where(there & (at >= lay.base[:, None]), lay.start[:, None] + at - lay.base[:, None], -1)
    sink_k, sink_v = lay.gather(k, slots), lay.gather(v, slots)
    if call.state is not None:
        kept = (at < lay.base[:, None])[..., None, None]
        sink_k = torch.where(kept, call.state.sink_k.to(k.dtype), sink_k)
        sink_v = torch.where(kept, call.state.sink_v.to(v.dtype), sink_v)
    return sink_k, sink_v, there


def _sink_block(call: Call, lay: Layout, sink_k: Tensor, sink_v: Tensor, there: Tensor, at: Tensor) -> Exact:
    """The sinks as keys of every chunk, where the window does not hold them already."""
    gap = at[..., None] - torch.arange(call.sinks, device=at.device)  # [R, 1, n, C, S]
    mask = gap >= call.window
    if not call.causal:
        mask = mask | (gap <= -call.window)
    if lay.packed:
        owner = lay.sequence.clamp_min(0)
        mask = mask & there[owner][:, None, :, None]
        k, v = sink_k[owner].permute(0, 3, 1, 2, 4), sink_v[owner].permute(0, 3, 1, 2, 4)
    else:
        mask = mask & there[:, None, None, None]
        k, v = sink_k.transpose(1, 2).unsqueeze(2), sink_v.transpose(1, 2).unsqueeze(2)
    return Exact(k.to(call.sums), v.to(call.sums), mask)


# ---------------------------------------------------------------------------------------------------------- state


def merge(parts: list[Memory]) -> Memory:
    """The sum of memories seen from the same time."""
    top = torch.stack([p.log_scale for p in parts]).amax(0).detach()
    weights = [(p.log_scale - top).exp() for p in parts]
    kv, k = parts[0].kv * weights[0][..., None, None], parts[0].k * weights[0][..., None]
    for p, w in zip(parts[1:], weights[1:], strict=True):
        kv, k = kv + p.kv * w[..., None, None], k + p.k * w[..., None]
    return Memory(kv, k, top)


def _final_state(
    call: Call,
    lay: Layout,
    k: Tensor,
    v: Tensor,
    k_far: Tensor,
    decay: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    phi_k: Tensor | None,
    log_k: Tensor | None,
    running: Memory | None,
    clock: Tensor | None,
) -> AttentionState:
    """Whole chunks that left the ring come from the running sums, the rest of them token by token."""
    c, ring = lay.chunk_size, call.ring
    blank = empty_state(call)
    old = call.state if call.state is not None else blank
    folded = torch.maximum(lay.base, lay.length - ring)
    count = folded - lay.base  # [N] tokens here that leave the ring
    memory = Memory(old.kv.to(call.sums), old.k.to(call.sums), old.log_scale.to(call.sums))
    if phi_k is not None and running is not None:
        whole = count // c
        index = lay.start // c + whole - 1
        row = lay.start // (lay.chunks * c)
        column = (index - row * lay.chunks).clamp_min(0)
        there = whole > 0
        log_scale = running.log_scale[row, :, column]
        slots = lay.start[:, None] + whole[:, None] * c + torch.arange(c, device=k.device)  # [N, C]
        rank = slots - lay.start[:, None]
        leaves = (rank < count[:, None]) & (rank + lay.base[:, None] >= call.sinks)
        tail_log = phi_k.new_zeros(*slots.shape, phi_k.shape[2]) if log_k is None else lay.gather(log_k, slots)
        if clock is not None:
            end = _clock_before(lay, clock, lay.start + lay.length - lay.base)  # [N, h]
            chunk_end = _clock_before(lay, clock, lay.start + whole * c)
            log_scale = log_scale + (end - chunk_end).to(log_scale.dtype)
            tail_clock = lay.gather(clock.transpose(1, 2), slots)
            tail_log = tail_log + (end[:, None] - tail_clock).to(tail_log.dtype)
            past = _clock_before(lay, clock, lay.start + lay.past - lay.base)
            memory = memory._replace(log_scale=memory.log_scale + (end - past).to(call.sums))
        tail = summarise(
            lay.gather(phi_k, slots).permute(0, 2, 1, 3)[:, :, None],
            lay.gather(v, slots).to(call.sums).permute(0, 2, 1, 3)[:, :, None],
            tail_log.transpose(1, 2)[:, :, None],
            leaves[:, None, None].to(phi_k.dtype),
        )
        if not lay.packed:  # the running sums began with the state's
            memory = memory._replace(log_scale=torch.where(there[:, None], EMPTY_LOG_SCALE, memory.log_scale))
        memory = merge(
            [
                memory,
                Memory(
                    torch.where(there[:, None, None, None], running.kv[row, :, column], 0),
                    torch.where(there[:, None, None], running.k[row, :, column], 0),
                    torch.where(there[:, None], log_scale, EMPTY_LOG_SCALE),
                ),
                Memory(tail.kv[:, :, 0], tail.k[:, :, 0], tail.log_scale[:, :, 0]),
            ]
        )
    ring_slots = lay.newest(ring)
    return AttentionState(
        kv=memory.kv,
        k=memory.k,
        log_scale=memory.log_scale.clamp_min(EMPTY_LOG_SCALE),
        length=lay.length,
        folded=folded,
        recent_k=lay.gather(k, ring_slots),
        recent_v=lay.gather(v, ring_slots),
        sink_k=blank.sink_k if sink_k is None else sink_k,
        sink_v=blank.sink_v if sink_v is None else sink_v,
        recent_far_k=None if call.k_far is None else lay.gather(k_far, ring_slots),
        recent_decay=None if decay is None else lay.gather(decay, ring_slots),
        window=call.window,
    )


# ----------------------------------------------------------------------------------------------------------- step


def _attend_step(call: Call) -> tuple[Tensor, AttentionState | None]:
    """A few new tokens against the ring, the sinks and the sums: one block, no layout, few operations."""
    state = call.state
    if state is None:
        raise RuntimeError("_attend_step() was called without a state")
    length, ring, sums = call.q.shape[1], state.recent_k.shape[1], call.sums
    device = call.q.device

    k = torch.cat([state.recent_k.to(call.k.dtype), call.k], 1)  # [N, W + T, h, D]
    v = torch.cat([state.recent_v.to(call.v.dtype), call.v], 1)
    k_far = k
    if call.k_far is not None and state.recent_far_k is not None:
        k_far = torch.cat([state.recent_far_k.to(call.k_far.dtype), call.k_far], 1)
    decay = clock = None
    if call.decay is not None and state.recent_decay is not None:
        decay = torch.cat([state.recent_decay.to(sums), call.decay], 1)
        clock = _clock(decay)  # [N, h, W + T]

    at = state.length[:, None] + torch.arange(length, device=device)  # [N, T]
    key_at = state.length[:, None] - ring + torch.arange(ring + length, device=device)  # [N, W + T]
    there = key_at >= state.folded[:, None]
    gap = (at[:, :, None] - key_at[:, None, :])[:, None, None]  # [N, 1, 1, T, W + T]
    seen = there[:, None, None, None] & (gap >= 0)
    near = gap < call.window

    phi_q, log_q = query_features(call, call.q if call.q_far is None else call.q_far, at)
    queries = queries_of(call, call.q, phi_q, log_q, length)
    key_block, value_block = (x.to(sums).transpose(1, 2)[:, :, None] for x in (k, v))

    exact: list[Exact] = []
    if call.window:
        exact.append(Exact(key_block, value_block, seen & near))
    sink_k, sink_v = state.sink_k, state.sink_v
    if call.sinks:
        sink_k, sink_v, own = step_sinks(call, state, k, v)
        exact.append(own)

    far: list[Far] = []
    summed: list[Summed] = []
    memory = Memory(state.kv.to(sums), state.k.to(sums), state.log_scale.to(sums))
    folded = torch.maximum(state.folded, state.length + length - call.ring)
    if call.feature_map is not None:
        # Only tokens that are outside the window of some query, or that leave the ring, need features.
        old = max(ring + length - call.window, 0)
        phi_k, log_k = key_features(call, k_far[:, :old], key_at[:, :old].clamp_min(0))
        if phi_k is None:
            raise RuntimeError("a feature map gave no features")
        features, far_v = phi_k.transpose(1, 2)[:, :, None], value_block[..., :old, :]
        log_keys = None if log_k is None else log_k.transpose(1, 2)  # [N, h, old]
        log_weight = None if log_keys is None else log_keys[:, :, None, None]
        memory_log = memory.log_scale[:, :, None, None]
        leave_log = log_keys
        if clock is not None:
            new = clock[..., ring:]  # [N, h, T]
            before = clock[..., ring - 1 : ring] if ring else torch.zeros_like(clock[..., :1])
            decayed = (new[..., :, None] - clock[..., None, :old]).to(sums)[:, :, None]
            log_weight = decayed if log_weight is None else log_weight + decayed
            memory_log = memory_log + (new - before).to(sums)[:, :, None]
            to_end = (clock[..., -1:] - clock[..., :old]).to(sums)
            leave_log = to_end if leave_log is None else leave_log + to_end
            memory = memory._replace(log_scale=memory.log_scale + (clock[..., -1:] - before).to(sums)[..., 0])
        is_far = (seen & ~near)[..., :old] & (key_at[:, :old] >= call.sinks)[:, None, None, None]
        far.append(Far(features, far_v, is_far, log_weight))
        summed.append(Summed(state.kv.to(sums)[:, :, None], state.k.to(sums)[:, :, None], memory_log))
        leaves = there[:, :old] & (key_at[:, :old] < folded[:, None]) & (key_at[:, :old] >= call.sinks)
        if leave_log is None:
            leave_log = features.new_zeros(features.shape[0], features.shape[1], old)
        if old:
            gone = summarise(features, far_v, leave_log[:, :, None], leaves[:, None, None].to(sums))
            memory = merge([memory, Memory(gone.kv[:, :, 0], gone.k[:, :, 0], gone.log_scale[:, :, 0])])

    out = read(queries, exact, far, summed, scale=call.scale, softcap=call.softcap, sink_logits=_sink_logits(call))
    out = _merge_heads(out, call.v.dtype)
    if not call.return_state:
        return out, None

    def newest(x: Tensor) -> Tensor:
        if call.ring <= x.shape[1]:
            return x[:, x.shape[1] - call.ring :]
        return F.pad(x, [0, 0] * (x.ndim - 2) + [call.ring - x.shape[1], 0])

    return out, AttentionState(
        kv=memory.kv,
        k=memory.k,
        log_scale=memory.log_scale.clamp_min(EMPTY_LOG_SCALE),
        length=state.length + length,
        folded=folded,
        recent_k=newest(k),
        recent_v=newest(v),
        sink_k=sink_k,
        sink_v=sink_v,
        recent_far_k=None if call.k_far is None else newest(k_far),
        recent_decay=None if decay is None else newest(decay),
        window=call.window,
    )


def step_sinks(call: Call, state: AttentionState, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Exact]:
    """Keys and values ``[N, S, h, ·]`` of the sinks after a step, and the block in which its queries meet them.

    ``k, v [N, W + T, h, ·]``: of the ring and the new tokens.
    """
    length, ring, sums, device = call.q.shape[1], state.recent_k.shape[1], call.sums, call.k.device
    first = torch.arange(call.sinks, device=device)
    # Sinks still in the ring, or arriving now, are copied to their place first.
    slots = first - (state.length[:, None] - ring)  # [N, S]
    live = (first >= state.folded[:, None]) & (first < state.length[:, None] + length)
    index = slots.clamp(0, ring + length - 1)[..., None, None]
    sink_k, sink_v = (
        torch.where(live[..., None, None], x.gather(1, index.expand(-1, -1, *x.shape[2:])), old.to(x.dtype))
        for x, old in ((k, state.sink_k), (v, state.sink_v))
    )
    at = state.length[:, None] + torch.arange(length, device=device)
    gap = (at[:, :, None] - first)[:, None, None]
    blocks = [x.to(sums).transpose(1, 2)[:, :, None] for x in (sink_k, sink_v)]
    q_sink = None if call.q_sink is None else split(call.q_sink.to(sums), call.k.shape[2], length)
    return sink_k, sink_v, Exact(blocks[0], blocks[1], gap >= call.window, q_sink)


def masked_step(
    call: Call,
    arrived: Tensor,
    before: AttentionState,
    step: Callable[[Call], tuple[Tensor, AttentionState | None]],
) -> tuple[Tensor, AttentionState | None]:
    """One new token for the rows that have ``arrived [N]``; the others answer zero and keep their state."""

    def per_row(x: Tensor) -> Tensor:
        return arrived.view(-1, *[1] * (x.ndim - 1))

    def wipe(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.masked_fill(~per_row(x), 0)

    names = ("q", "k", "v", "q_far", "k_far", "q_sink", "q_retained", "decay")
    inputs: dict[str, Any] = {name: wipe(getattr(call, name)) for name in names}
    out, after = step(dataclasses.replace(call, **inputs, mask=None))
    out = torch.where(per_row(out), out, 0)
    if after is None:
        return out, None
    kept = before.with_lookback(call.lookback).tensors()
    rows = {name: torch.where(per_row(t), t, kept[name].to(t.dtype)) for name, t in after.tensors().items()}
    return out, AttentionState(**rows, window=call.window)
