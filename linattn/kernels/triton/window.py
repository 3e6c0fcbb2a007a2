"""The exact part: a window of softmax attention, sinks before it, and one normaliser for these and what is far.

One program takes one chunk of queries (of keys, in their gradient) of one head and keeps no state: with W tokens of
window it reads the ⌈(W − 1) / C⌉ chunks before (after) its own. Exponents have base 2 with the logits' scale folded in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton.device import (
    EMPTY,
    LOG2_E,
    column,
    exp2,
    load_rows,
    locate_chunk,
    normalise,
    store_output,
    store_rows,
    tanh,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cap(s, scale, softcap, SOFTCAP: tl.constexpr):
    """Base-2 logits of products ``s``, and the derivative of the capped logit by the raw one."""
    slope = 1.0
    if SOFTCAP:
        t = tanh(s * (scale / softcap))
        s = t * (softcap * LOG2_E)
        slope = 1.0 - t * t
    else:
        s = s * (scale * LOG2_E)
    return s, slope


@triton.jit
def attend_block(
    acc, den, top, q, k, v, seen, scale, softcap,
    SOFTCAP: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax: keys ``[N, BD]`` and values ``[N, BV]`` more; every query sees all without ``seen [C, N]``."""
    s = tl.dot(q, tl.trans(k.to(OT)), input_precision=PRECISION)
    s, _ = cap(s, scale, softcap, SOFTCAP)
    if seen is not None:
        s = tl.where(seen, s, EMPTY)
    new = tl.maximum(tl.maximum(top, tl.max(s, 1)), EMPTY / 2)
    keep = exp2(top - new)
    p = exp2(s - new[:, None])
    den = den * keep + tl.sum(p, 1)
    acc = tl.dot(p.to(OT), v.to(OT), acc * keep[:, None], input_precision=PRECISION)
    return acc, den, new


@triton.jit
def weigh(s, seen, top, scale, softcap, SOFTCAP: tl.constexpr):
    """Weights of products ``s`` relative to exp2(top), and the derivative of the capped logit by the raw one."""
    s, slope = cap(s, scale, softcap, SOFTCAP)
    s = s - top
    if seen is not None:
        s = tl.where(seen, s, EMPTY)
    return exp2(s), slope


@triton.jit
def own_block(queries, keys, C: tl.constexpr, WINDOW: tl.constexpr, LEAST: tl.constexpr):
    """Which keys of its own chunk a query sees; rows broadcast against each other. No key behind the end is seen."""
    seen = queries >= keys + LEAST
    if WINDOW < C:
        seen = seen & (queries < keys + WINDOW)
    return seen


@triton.jit
def sinks_seen(
    rows, sink_at, base, WINDOW: tl.constexpr, SINKS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Which queries see which sinks outside their window ``[C, BS]``."""
    if KEYS:
        return ((base + rows)[:, None] >= sink_at[None, :] + WINDOW) & (sink_at < SINKS)[None, :]
    else:  # every query reads all keys, of which there are ``base``
        return (rows[:, None] >= 0) & (sink_at < tl.minimum(base, SINKS))[None, :]


@triton.jit
def near_kernel(
    q, q_b, q_t: tl.constexpr, q_h,
    k, k_b, k_t: tl.constexpr, k_h,
    v, v_b, v_t: tl.constexpr, v_h,
    sink_k, sink_v, q_sink, sink_logits,
    far_num, far_mass, far_log, far_far,
    starts, lengths, bases, seg_sequence, seg_first,
    out, residual, out_top, out_rden, out_relative,
    scale, softcap, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    KEYS: tl.constexpr,
    STRICT: tl.constexpr,
    GAP: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, its normaliser and log-scale from window, sinks and, if given, the far part's sums and log-scale.

    The sinks meet ``q_sink [B, T, H, D]``, which is contiguous, or q.
    """
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    kv_head = head // G
    n, first, row64, start, length, base = locate_chunk(
        chunk, segments, segment, T, starts, lengths, bases, seg_sequence, seg_first, C, PACKED
    )
    if first >= length:
        return
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    WHOLE: tl.constexpr = WINDOW // C  # blocks that lie in every query's window
    REACH: tl.constexpr = (WINDOW + C - 2) // C if WINDOW > 1 else 0
    EDGE: tl.constexpr = WHOLE if WHOLE > 1 else 1  # the first block before this one that the window's edge crosses
    LEAST: tl.constexpr = 1 if STRICT else 0  # tokens between a query and the newest key it sees
    q += row64 * q_b + start * q_t + head * q_h
    k += row64 * k_b + start * k_t + kv_head * k_h
    v += row64 * v_b + start * v_t + kv_head * v_h

    rows = first + tl.arange(0, C)
    valid = rows < length
    earlier = rows >= 0  # whole blocks before this one
    stat = origin * H + head
    xq = load_rows(q, first, q_t, valid, D, BD).to(OT)
    acc = tl.zeros([C, BV], tl.float32)
    den = tl.zeros([C], tl.float32)
    top = tl.full([C], EMPTY, tl.float32)
    if KEYS and WINDOW > 0:
        xk = load_rows(k, first, k_t, valid, D, BD)
        xv = load_rows(v, first, v_t, valid, V, BV)
        seen = own_block(rows[:, None], rows[None, :], C, WINDOW, LEAST)
        acc, den, top = attend_block(acc, den, top, xq, xk, xv, seen, scale, softcap, SOFTCAP, OT, PRECISION)
        if WHOLE > 1:
            for j in range(1, tl.minimum(WHOLE, first // C + 1)):
                xk = load_rows(k, first - j * C, k_t, earlier, D, BD)
                xv = load_rows(v, first - j * C, v_t, earlier, V, BV)
                acc, den, top = attend_block(acc, den, top, xq, xk, xv, None, scale, softcap, SOFTCAP, OT, PRECISION)
        if REACH >= EDGE:
            for j in range(EDGE, tl.minimum(REACH, first // C) + 1):
                xk = load_rows(k, first - j * C, k_t, earlier, D, BD)
                xv = load_rows(v, first - j * C, v_t, earlier, V, BV)
                seen = rows[:, None] < (rows - j * C + WINDOW)[None, :]
                acc, den, top = attend_block(acc, den, top, xq, xk, xv, seen, scale, softcap, SOFTCAP, OT, PRECISION)
    if SINKS > 0:
        sink_at = tl.arange(0, BS)
        sink = n.to(tl.int64) * SINKS * kv_heads + kv_head
        xk = load_rows(sink_k + sink * D, n * 0, kv_heads * D, sink_at < SINKS, D, BD)
        xv = load_rows(sink_v + sink * V, n * 0, kv_heads * V, sink_at < SINKS, V, BV)
        seen = sinks_seen(rows, sink_at, base, WINDOW, SINKS, KEYS)
        if q_sink is not None:
            xq = load_rows(q_sink + stat * D, first, H * D, valid, D, BD).to(OT)
        acc, den, top = attend_block(acc, den, top, xq, xk, xv, seen, scale, softcap, SOFTCAP, OT, PRECISION)

    top = top * LN_2
    FAR: tl.constexpr = far_num is not None
    num = 0.0
    mass = 0.0
    log_far = 0.0
    if FAR:
        far = valid & (rows >= GAP)
        mass = tl.load(column(far_mass + stat, first, H, C), mask=far, other=0.0)
        log_q = tl.load(column(far_log + stat, first, H, C), mask=far, other=EMPTY)
        log_far = log_q
        if far_far is not None:
            log_far += tl.load(column(far_far + stat, first, H, C), mask=far, other=0.0)
        num = load_rows(far_num + stat * V, first, H * V, far, V, BV)
    sink_logit = 0.0
    if sink_logits is not None:
        sink_logit = tl.load(sink_logits + head).to(tl.float32)
    acc, top, rden = normalise(acc, den, top, num, mass, log_far, sink_logit, FAR, sink_logits is not None)
    if TOP:
        tl.store(column(out_top + stat, first, H, C), top, mask=valid)
    if FAR:
        relative = tl.where(far & (rden != 0), log_q - top, EMPTY)
        tl.store(column(out_relative + stat, first, H, C), relative, mask=valid)
    tl.store(column(out_rden + stat, first, H, C), rden, mask=valid)
    store_output(out + stat * V, None if residual is None else residual + stat * V, first, H * V, valid, acc, V, BV)


@triton.jit
def dq_block(
    dx, q, do, delta, top, k, v, seen, scale, softcap,
    SOFTCAP: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries ``[C, BD]`` over the scale, with what keys and values ``[N, ·]`` add to it."""
    k = k.to(OT)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p, slope = weigh(s, seen, top[:, None], scale, softcap, SOFTCAP)
    e = tl.dot(do, tl.trans(v.to(OT)), input_precision=PRECISION) - delta[:, None]
    return tl.dot((p * e * slope).to(OT), k, dx, input_precision=PRECISION)


@triton.jit
def near_dq_kernel(
    q, q_b, q_t: tl.constexpr, q_h,
    k, k_b, k_t: tl.constexpr, k_h,
    v, v_b, v_t: tl.constexpr, v_h,
    sink_k, sink_v, q_sink,
    starts, lengths, bases, seg_sequence, seg_first,
    do, top, delta, rden,
    dq, dq_sink, dsink_k, dsink_v,
    scale, softcap, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    KEYS: tl.constexpr,
    STRICT: tl.constexpr,
    GAP: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, added to ``dq`` if ADD, that of ``q_sink``, and each chunk's share of the sinks'."""
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    kv_head = head // G
    n, first, row64, start, length, base = locate_chunk(
        chunk, segments, segment, T, starts, lengths, bases, seg_sequence, seg_first, C, PACKED
    )
    if first >= length:
        return
    origin = row64 * T + start
    kv_heads = H // G
    WHOLE: tl.constexpr = WINDOW // C
    REACH: tl.constexpr = (WINDOW + C - 2) // C if WINDOW > 1 else 0
    EDGE: tl.constexpr = WHOLE if WHOLE > 1 else 1
    LEAST: tl.constexpr = 1 if STRICT else 0
    q += row64 * q_b + start * q_t + head * q_h
    k += row64 * k_b + start * k_t + kv_head * k_h
    v += row64 * v_b + start * v_t + kv_head * v_h

    rows = first + tl.arange(0, C)
    valid = rows < length
    earlier = rows >= 0  # whole blocks before this one
    stat = origin * H + head
    xq = load_rows(q, first, q_t, valid, D, BD).to(OT)
    xdo = load_rows(do + stat * V, first, H * V, valid, V, BV).to(OT)
    row_delta = tl.load(column(delta + stat, first, H, C), mask=valid, other=0.0)
    row_top = tl.zeros([C], tl.float32)
    if TOP:
        row_top = tl.load(column(top + stat, first, H, C), mask=valid, other=0.0) * LOG2_E
    row_factor = tl.zeros([C], tl.float32) + 1.0
    if rden is not None:
        row_factor = tl.load(column(rden + stat, first, H, C), mask=valid, other=0.0)
    dx = tl.zeros([C, BD], tl.float32)
    if KEYS and WINDOW > 0:
        xk = load_rows(k, first, k_t, valid, D, BD)
        xv = load_rows(v, first, v_t, valid, V, BV)
        seen = own_block(rows[:, None], rows[None, :], C, WINDOW, LEAST)
        dx = dq_block(dx, xq, xdo, row_delta, row_top, xk, xv, seen, scale, softcap, SOFTCAP, OT, PRECISION)
        if WHOLE > 1:
            for j in range(1, tl.minimum(WHOLE, first // C + 1)):
                xk = load_rows(k, first - j * C, k_t, earlier, D, BD)
                xv = load_rows(v, first - j * C, v_t, earlier, V, BV)
                dx = dq_block(dx, xq, xdo, row_delta, row_top, xk, xv, None, scale, softcap, SOFTCAP, OT, PRECISION)
        if REACH >= EDGE:
            for j in range(EDGE, tl.minimum(REACH, first // C) + 1):
                xk = load_rows(k, first - j * C, k_t, earlier, D, BD)
                xv = load_rows(v, first - j * C, v_t, earlier, V, BV)
                seen = rows[:, None] < (rows - j * C + WINDOW)[None, :]
                dx = dq_block(dx, xq, xdo, row_delta, row_top, xk, xv, seen, scale, softcap, SOFTCAP, OT, PRECISION)
    if SINKS > 0:
        sink_at = tl.arange(0, BS)
        sink = n.to(tl.int64) * SINKS * kv_heads + kv_head
        xk = load_rows(sink_k + sink * D, n * 0, kv_heads * D, sink_at < SINKS, D, BD).to(OT)
        xv = load_rows(sink_v + sink * V, n * 0, kv_heads * V, sink_at < SINKS, V, BV).to(OT)
        seen = sinks_seen(rows, sink_at, base, WINDOW, SINKS, KEYS)
        if q_sink is not None:
            xq = load_rows(q_sink + stat * D, first, H * D, valid, D, BD).to(OT)
        raw = tl.dot(xq, tl.trans(xk), input_precision=PRECISION)
        p, slope = weigh(raw, seen, row_top[:, None], scale, softcap, SOFTCAP)
        e = tl.dot(xdo, tl.trans(xv), input_precision=PRECISION) - row_delta[:, None]
        ds = (p * e * slope).to(OT)
        if q_sink is None:
            dx = tl.dot(ds, xk, dx, input_precision=PRECISION)
        elif dq_sink is not None:
            dxs = tl.dot(ds, xk, input_precision=PRECISION) * (row_factor * scale)[:, None]
            store_rows(dq_sink + stat * D, first, H * D, valid, dxs, D, BD)
        p = p * row_factor[:, None]
        ds = (p * e * slope).to(OT)
        dsk = tl.dot(tl.trans(ds), xq, input_precision=PRECISION)
        dsv = tl.dot(tl.trans(p.to(OT)), xdo, input_precision=PRECISION)
        place = chunk.to(tl.int64) * H + head
        store_rows(dsink_k + place * SINKS * D, n * 0, D, sink_at < SINKS, dsk * scale, D, BD)
        store_rows(dsink_v + place * SINKS * V, n * 0, V, sink_at < SINKS, dsv, V, BV)
    dx = dx * (row_factor * scale)[:, None]
    dq += stat * D
    if ADD:
        dx += load_rows(dq, first, H * D, valid & (rows >= GAP), D, BD).to(tl.float32)
    store_rows(dq, first, H * D, valid, dx, D, BD)


@triton.jit
def dkv_block(
    dk, dv, k, v, q, do, delta, top, rden, seen, scale, softcap,
    SOFTCAP: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of keys over the scale and of values ``[N, ·]``, with what queries ``[C, BD]`` add to them.

    Queries behind the end have zeros for gradients and add nothing.
    """
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p, slope = weigh(s, seen, top[None, :], scale, softcap, SOFTCAP)
    p = p * rden[None, :]
    dv = tl.dot(p.to(OT), do, dv, input_precision=PRECISION)
    e = tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :]
    dk = tl.dot((p * e * slope).to(OT), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def near_dkv_kernel(
    q, q_b, q_t: tl.constexpr, q_h,
    k, k_b, k_t: tl.constexpr, k_h,
    v, v_b, v_t: tl.constexpr, v_h,
    starts, lengths, bases, seg_sequence, seg_first,
    do, top, delta, rden,
    dk, dv,
    scale, softcap, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    STRICT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD_K: tl.constexpr,
    ADD_V: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values from the windows they are in, added to ``dk`` if ADD_K and to ``dv`` if ADD_V.

    Tiles are ``[keys, queries]``.
    """
    kv_heads: tl.constexpr = H // G
    kv_head = tl.program_id(0) % kv_heads
    chunk = tl.program_id(0) // kv_heads
    n, first, row64, start, length, base = locate_chunk(
        chunk, segments, segment, T, starts, lengths, bases, seg_sequence, seg_first, C, PACKED
    )
    if first >= length:
        return
    origin = row64 * T + start
    REACH: tl.constexpr = (WINDOW + C - 2) // C if WINDOW > 1 else 0
    LEAST: tl.constexpr = 1 if STRICT else 0
    later = tl.minimum(tl.cdiv(length - first, C), REACH + 1)  # blocks of queries from this one on
    q += row64 * q_b + start * q_t
    k += row64 * k_b + start * k_t + kv_head * k_h
    v += row64 * v_b + start * v_t + kv_head * v_h

    rows = first + tl.arange(0, C)
    valid = rows < length
    xk = load_rows(k, first, k_t, valid, D, BD).to(OT)
    xv = load_rows(v, first, v_t, valid, V, BV).to(OT)
    dxk = tl.zeros([C, BD], tl.float32)
    dxv = tl.zeros([C, BV], tl.float32)
    for group in range(G):
        head = kv_head * G + group
        stat = origin * H + head
        for j in range(0, later):
            query_first = first + j * C
            at = query_first + tl.arange(0, C)
            there = at < length  # behind the end gradients are zero and add nothing
            xq = load_rows(q + head * q_h, query_first, q_t, there, D, BD).to(OT)
            xdo = load_rows(do + stat * V, query_first, H * V, there, V, BV).to(OT)
            row_delta = tl.load(column(delta + stat, query_first, H, C), mask=there, other=0.0)
            row_top = tl.load(column(top + stat, query_first, H, C), mask=there, other=0.0) * LOG2_E
            share = tl.zeros([C], tl.float32) + 1.0
            if rden is not None:
                share = tl.load(column(rden + stat, query_first, H, C), mask=there, other=0.0)
            seen = (at[None, :] >= (rows + LEAST)[:, None]) & (at[None, :] < (rows + WINDOW)[:, None])
            dxk, dxv = dkv_block(
                dxk, dxv, xk, xv, xq, xdo, row_delta, row_top, share, seen, scale, softcap, SOFTCAP, OT, PRECISION
            )
    dxk = dxk * scale
    dk += (origin * kv_heads + kv_head) * D
    dv += (origin * kv_heads + kv_head) * V
    if ADD_K:
        dxk += load_rows(dk, first, kv_heads * D, valid, D, BD).to(tl.float32)
    if ADD_V:
        dxv += load_rows(dv, first, kv_heads * V, valid, V, BV).to(tl.float32)
    store_rows(dk, first, kv_heads * D, valid, dxk, D, BD)
    store_rows(dv, first, kv_heads * V, valid, dxv, V, BV)


@triton.jit
def sum_rows(base, count, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr):
    """Σ of ``count`` rows of WIDTH columns, ``[BLOCK]``."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, R):
        rows = first + tl.arange(0, R)
        mask = (rows < count)[:, None] & (columns < WIDTH)[None, :]
        total += tl.sum(tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit
def sum_sinks_kernel(
    shares_k, shares_v,
    dk, dk_b, dk_t, dk_h,
    dv, dv_b, dv_t, dv_h,
    lengths, T, chunks,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    SINKS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """The gradient of one sink of one key head: Σ over chunks and query heads of ``shares [chunks, H, SINKS, ·]``.

    Every sequence has ``chunks`` of them, the first ones of which are written. ``ADD``: to what ``dk`` and ``dv`` hold.
    """
    sink = tl.program_id(0) % SINKS
    kv_head = tl.program_id(0) // SINKS % (H // G)
    n = (tl.program_id(0) // SINKS // (H // G)).to(tl.int64)
    length = T if lengths is None else tl.load(lengths + n).to(tl.int32)
    written = tl.cdiv(length, C)
    xk = tl.zeros([BD], tl.float32)
    xv = tl.zeros([BV], tl.float32)
    for group in range(G):
        row = (n * chunks * H + kv_head * G + group) * SINKS + sink
        xk += sum_rows(shares_k + row * D, written, H * SINKS * D, D, BD, R)
        xv += sum_rows(shares_v + row * V, written, H * SINKS * V, V, BV, R)
    d = tl.arange(0, BD)
    dk += n * dk_b + sink * dk_t + kv_head * dk_h + d
    v = tl.arange(0, BV)
    dv += n * dv_b + sink * dv_t + kv_head * dv_h + v
    if ADD:
        xk += tl.load(dk, mask=d < D, other=0.0).to(tl.float32)
        xv += tl.load(dv, mask=v < V, other=0.0).to(tl.float32)
    tl.store(dk, xk.to(dk.dtype.element_ty), mask=d < D)
    tl.store(dv, xv.to(dv.dtype.element_ty), mask=v < V)
