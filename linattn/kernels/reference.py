"""The oracle: one sequence at a time, every pair of tokens, nothing clever. O(T²) memory."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from linattn.kernels.features import features_of
from linattn.kernels.read import safe_denominator
from linattn.kernels.validate import Call
from linattn.state import EMPTY_LOG_SCALE, AttentionState


class Tokens(NamedTuple):
    """Tokens of one sequence, oldest first."""

    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, V]
    k_far: Tensor  # [T, Hkv, D']
    decay: Tensor  # [T, Hkv]
    positions: Tensor  # [T]
    clock: Tensor  # [T, Hkv], the running sum of decay, zero at the last token before the new ones
    scores: Tensor | None = None  # [T, Hkv], −∞ in empty slots
    births: Tensor | None = None  # [T, Hkv], the positions of all, those in slots included


def attend(call: Call) -> tuple[Tensor, AttentionState | None]:
    """Dense attention of a checked call; float64 inputs are computed in float64."""
    batch, length, heads, _ = call.q.shape
    out = torch.zeros(batch, length, heads, call.v.shape[-1], dtype=call.v.dtype, device=call.v.device)
    states = []
    for n in range(call.sequences):
        row, queries, keys = _tokens_of(call, n)
        o, state = _attend_sequence(call, n, row, queries, keys)
        if call.cu_seqlens is None:
            out = out.index_put((torch.tensor(row, device=out.device), queries), o.to(out.dtype))
        else:
            out = out.index_put((torch.zeros_like(queries), queries), o.to(out.dtype))
        states.append(state)
    if not call.return_state:
        return out, None
    if not states:
        return out, _empty_state(call, 0)
    names = states[0].tensors()
    stacked = {name: torch.cat([getattr(s, name) for s in states]) for name in names}
    return out, AttentionState(**stacked, window=call.window)


def _tokens_of(call: Call, n: int) -> tuple[int, Tensor, Tensor]:
    """Row of sequence n and the indices along T of its queries and keys."""
    device = call.q.device
    if call.cu_seqlens is not None:
        start, stop = call.cu_seqlens[n : n + 2].tolist()
        span = torch.arange(start, stop, device=device)
        return 0, span, span
    queries = torch.arange(call.q.shape[1], device=device)
    keys = torch.arange(call.k.shape[1], device=device)
    if call.mask is not None:
        keys = keys[call.mask[n]]
        if call.causal or call.window:
            queries = keys
    return n, queries, keys


def _empty_state(call: Call, n: int) -> AttentionState:
    return AttentionState.empty(
        n,
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


def _features(call: Call, kind: Literal["queries", "keys"], x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Features ``[T, H, F]`` and log-scales ``[T, H]`` of ``x [T, H, D']`` in the accumulation dtype."""
    if call.feature_map is None:
        return x.new_zeros(*x.shape[:2], 0, dtype=call.sums), x.new_zeros(x.shape[:2], dtype=call.sums)
    values, log_scale = features_of(call, kind, x[None], positions[None])
    return values[0], values.new_zeros(values.shape[1:3]) if log_scale is None else log_scale[0]


def _attend_sequence(call: Call, n: int, row: int, queries: Tensor, keys: Tensor) -> tuple[Tensor, AttentionState]:
    sums, device = call.sums, call.q.device
    old = (call.state if call.state is not None else _empty_state(call, call.sequences)).select(
        torch.tensor([n], device=device)
    )
    past, folded, sinks, window = int(old.length), int(old.folded), call.sinks, call.window
    groups = call.q.shape[2] // call.k.shape[2]

    # All tokens still known one by one: sinks that left the ring, the ring, the new ones.
    ring = old.recent_k.shape[1]
    kept_sinks, first = min(folded, sinks), ring - (past - folded)
    new_decay = (
        call.decay[row, keys] if call.decay is not None else call.k.new_zeros(len(keys), call.k.shape[2], dtype=sums)
    )
    old_decay = (
        old.recent_decay[0, first:]
        if old.recent_decay is not None
        else new_decay.new_zeros(past - folded, call.k.shape[2])
    )
    far_k = call.k if call.k_far is None else call.k_far
    old_far_k = old.recent_k if old.recent_far_k is None else old.recent_far_k
    sink_far_k = far_k.new_zeros(kept_sinks, *far_k.shape[2:])  # sinks are never far
    decay = torch.cat([new_decay.new_zeros(kept_sinks, call.k.shape[2]), old_decay, new_decay])
    clock = decay.cumsum(0)
    t = Tokens(
        k=torch.cat([old.sink_k[0, :kept_sinks], old.recent_k[0, first:], call.k[row, keys]]),
        v=torch.cat([old.sink_v[0, :kept_sinks], old.recent_v[0, first:], call.v[row, keys]]),
        k_far=torch.cat([sink_far_k, old_far_k[0, first:], far_k[row, keys]]),
        decay=decay,
        positions=torch.cat(
            [torch.arange(kept_sinks, device=device), torch.arange(folded, past + len(keys), device=device)]
        ),
        clock=clock - clock[: len(clock) - len(keys)][-1:].sum(0),
    )
    if call.retained:
        t = _with_kept(call, t, old, row, keys)
    q = call.q[row, queries].to(sums)
    q_far = (call.q if call.q_far is None else call.q_far)[row, queries]
    at = past + torch.arange(len(queries), device=device)  # positions of the queries
    if call.mask is not None and len(queries) == call.k.shape[1]:
        at = past + (call.mask[row].cumsum(0)[queries] - 1).clamp_min(0)

    gap = at[:, None] - t.positions[None, :]  # [Tq, Tk]
    seen = gap >= 0 if call.causal else torch.ones_like(gap, dtype=torch.bool)
    is_sink = (t.positions < sinks)[None, :]
    near = seen & ((gap < window) & (gap > -window) | is_sink)
    far = seen & ~near
    if t.scores is not None:
        there = t.scores.isfinite().T[:, None] & ~is_sink  # [Hkv, 1, Tk]
        left = there & (gap >= window)
        kept = _best(t.scores, left, call.retained)
        near, far = (x.repeat_interleave(groups, 0) for x in (near | kept, left & ~kept))
    far = far & (call.feature_map is not None)

    def heads(x: Tensor) -> Tensor:  # [T, Hkv, ...] -> [T, H, ...]
        return x.repeat_interleave(groups, dim=1)

    phi_q, log_q = _features(call, "queries", q_far, at)
    phi_k, log_k = _features(call, "keys", t.k_far, t.positions)
    if call.far_bias is not None:
        log_q = log_q + call.far_bias.to(sums)
    total = t.clock
    total_q = total[len(t.positions) - len(keys) :] if call.causal else total.new_zeros(len(queries), total.shape[1])

    logits = torch.einsum("qhd,khd->hqk", q, heads(t.k.to(sums))) * call.scale
    if call.q_sink is not None:
        q_sink = call.q_sink[row, queries].to(sums)
        behind = torch.einsum("qhd,khd->hqk", q_sink, heads(t.k.to(sums))) * call.scale
        logits = torch.where(is_sink & (gap >= window), behind, logits)
    if call.q_retained is not None and t.births is not None:
        aged = kept & (at[:, None] - t.births.T[:, None] > call.retained_distance)  # [Hkv, Tq, Tk]
        q_retained = call.q_retained[row, queries].to(sums)
        afar = torch.einsum("qhd,khd->hqk", q_retained, heads(t.k_far.to(sums))) * call.scale
        logits = torch.where(aged.repeat_interleave(groups, 0), afar, logits)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    log_near = logits.masked_fill(~near, -torch.inf)
    log_far = log_q.T[:, :, None] + heads(log_k).T[:, None, :]
    if call.causal:
        log_far = log_far + heads(total_q).T[:, :, None] - heads(total).T[:, None, :]
    log_far = log_far.masked_fill(~far, -torch.inf)
    log_memory = log_q.T + heads(old.log_scale.to(sums) + total_q).T  # [H, Tq]

    kernel = torch.einsum("qhf,khf->hqk", phi_q, heads(phi_k))
    old_kv, old_k = (x[0].to(sums).repeat_interleave(groups, 0) for x in (old.kv, old.k))
    memory_kernel = torch.einsum("qhf,hf->hq", phi_q, old_k)
    parts = [log_near, log_far + kernel.abs().log(), (log_memory + memory_kernel.abs().log())[:, :, None]]
    if call.sink_logits is not None:
        parts.append(call.sink_logits.to(sums)[:, None, None].expand(-1, len(queries), 1))
    shift = torch.cat(parts, dim=2).amax(2, keepdim=True).detach()  # [H, Tq, 1]
    shift = torch.where(shift > EMPTY_LOG_SCALE, shift, 0.0)  # a row without any weight

    # Where a kernel value is zero its log-scale may lie far above the row's shift: bounded, the product stays zero.
    most = math.log(torch.finfo(sums).max) - 1
    weights = (log_near - shift).exp() + (log_far - shift).clamp_max(most).exp() * kernel
    memory = (log_memory - shift[:, :, 0]).clamp_max(most).exp()
    num = torch.einsum("hqk,khv->qhv", weights, heads(t.v.to(sums)))
    num = num + torch.einsum("hq,qhf,hfv->qhv", memory, phi_q, old_kv)
    den = weights.sum(2).T + (memory * memory_kernel).T
    if call.sink_logits is not None:
        den = den + (call.sink_logits.to(sums)[:, None] - shift[:, :, 0]).exp().T
    out = num / safe_denominator(den)[..., None]
    return out, _fold(call, old, t, phi_k, log_k, past + len(keys))


def _with_kept(call: Call, t: Tokens, old: Any, row: int, keys: Tensor) -> Tokens:
    """Tokens with scores, and the state's slots before the others, all at the position before the ring."""
    assert call.scores is not None
    kept_far = old.kept_k if old.kept_far_k is None else old.kept_far_k
    zeros = t.decay.new_zeros(call.retained, t.decay.shape[1])
    kept_clock = zeros if old.kept_decay is None else -old.kept_decay[0].to(zeros.dtype)
    length, folded = int(old.length), int(old.folded)
    slots = call.retained if folded > call.sinks else 0
    known = torch.cat([old.recent_score[0, old.recent_score.shape[1] - (length - folded) :], call.scores[row, keys]])
    scores = known.new_full(t.decay.shape, -torch.inf)
    scores[len(scores) - len(known) :] = known
    return Tokens(
        k=torch.cat([old.kept_k[0, :slots].to(t.k), t.k]),
        v=torch.cat([old.kept_v[0, :slots].to(t.v), t.v]),
        k_far=torch.cat([kept_far[0, :slots].to(t.k_far), t.k_far]),
        decay=torch.cat([zeros[:slots], t.decay]),
        positions=torch.cat([t.positions.new_full((slots,), folded - 1), t.positions]),
        clock=torch.cat([kept_clock[:slots], t.clock]),
        scores=torch.cat([old.kept_score[0, :slots], scores]),
        births=torch.cat([old.kept_at[0, :slots], t.positions[:, None].expand(scores.shape)]),
    )


def _best(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` best of the tokens ``among [Hkv, …, Tk]``, of equal scores ``[Tk, Hkv]`` the older."""
    chosen = torch.zeros_like(among)
    for head, order in enumerate(scores.sort(dim=0, descending=True, stable=True).indices.T):
        ranked = among[head][..., order]
        chosen[head][..., order] = ranked & (ranked.cumsum(-1) <= count)
    return chosen


def _fold(call: Call, old: AttentionState, t: Tokens, phi_k: Tensor, log_k: Tensor, length: int) -> AttentionState:
    """The state after ``length`` tokens: everything that left the ring summed, in one go."""
    new = _empty_state(call, 1)
    ring, sinks = call.ring, call.sinks
    folded = max(int(old.folded), length - ring)
    gone = ((t.positions < folded) & (t.positions >= sinks))[:, None].expand_as(t.decay)  # [Tk, Hkv]
    kept: dict[str, Tensor | None] = {}
    if t.scores is not None:
        there = (gone & t.scores.isfinite()).T
        best = _best(t.scores, there, call.retained)
        gone = (there & ~best).T
    end = t.clock[-1:] if length > int(old.length) else t.clock.new_zeros(1, call.k.shape[2])
    log_w = (log_k + end - t.clock).masked_fill(~gone, -torch.inf)  # [Tk, Hkv]
    log_old = old.log_scale.to(call.sums) + end  # [1, Hkv]
    shift = torch.cat([log_w, log_old]).amax(0).detach()  # [Hkv]
    w = (log_w - shift).exp()
    keep = (log_old - shift).exp()
    kv = torch.einsum("th,thf,thv->hfv", w, phi_k, t.v.to(call.sums))[None] + keep[..., None, None] * old.kv.to(
        call.sums
    )
    k = torch.einsum("th,thf->hf", w, phi_k)[None] + keep[..., None] * old.k.to(call.sums)

    def last_tokens(x: Tensor) -> Tensor:
        x = x[t.positions >= folded]
        return torch.nn.functional.pad(x, [0, 0] * (x.ndim - 1) + [ring - x.shape[0], 0])[None]

    def first_tokens(x: Tensor) -> Tensor:
        x = x[t.positions < min(sinks, length)]
        return torch.nn.functional.pad(x, [0, 0] * (x.ndim - 1) + [0, sinks - x.shape[0]])[None]

    def slots(x: Tensor, empty: float = 0.0) -> Tensor:
        """``x [Tk, Hkv, …]`` at each head's kept tokens, right-aligned: ``[1, M, Hkv, …]``."""
        rows = []
        for head, mine in enumerate(best):
            found = x[mine, head]
            blank = found.new_full((call.retained - len(found), *found.shape[1:]), empty)
            rows.append(torch.cat([blank, found]))
        return torch.stack(rows, 1)[None]

    if t.scores is not None:
        kept = {"kept_k": slots(t.k), "kept_v": slots(t.v), "kept_score": slots(t.scores, -torch.inf)}
        kept["kept_far_k"] = None if call.k_far is None else slots(t.k_far)
        kept["kept_decay"] = None if call.decay is None else slots(end - t.clock)
        assert t.births is not None
        kept["kept_at"] = slots(t.births).int()
        kept["recent_score"] = last_tokens(t.scores)
    return AttentionState(
        kv=kv,
        k=k,
        log_scale=shift[None].clamp_min(EMPTY_LOG_SCALE),
        length=torch.full_like(new.length, length),
        folded=torch.full_like(new.folded, folded),
        recent_k=last_tokens(t.k),
        recent_v=last_tokens(t.v),
        sink_k=first_tokens(t.k),
        sink_v=first_tokens(t.v),
        recent_far_k=None if call.k_far is None else last_tokens(t.k_far),
        recent_decay=None if call.decay is None else last_tokens(t.decay),
        window=call.window,
        **kept,
    )
