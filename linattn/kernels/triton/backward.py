"""The backward pass: queries in order with the keys' memory, keys in reverse with the queries' memory.

With p_ti the normalised weight of key i for query t, do_t the output's gradient and δ_t = do_t · o_t, everything comes
from e_ti = do_t · v_i − δ_t: the gradient of a logit is p_ti e_ti, and that of a log-scale the sum of those it enters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton.device import (
    DENOMINATOR_FLOOR,
    EMPTY,
    MIRRORED,
    PRODUCT,
    differences,
    exp,
    features,
    features_backward,
    fold_chunk,
    gates,
    load_map,
    load_memory,
    load_rows,
    locate,
    store_rows,
    unseen,
)
from linattn.kernels.triton.forward import tanh

LARGEST_EXPONENT = tl.constexpr(80.0)
"""Exponents stop here: beyond, the kernel value they multiply has underflowed."""


@triton.jit
def delta_kernel(
    out, residual, dout, rden, scaled, delta, rows,
    V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """do / normaliser of R rows, and δ = o · do / normaliser; zero where the normaliser was clamped: no gradient there.

    ``residual`` is what rounding took from ``out``: an error in δ would be one in every weight of its row. So δ takes
    the rounded gradient, too.
    """
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = at < rows
    o = load_rows(out, at, V, valid, V, BV).to(tl.float32)
    if residual is not None:
        o += load_rows(residual, at, V, valid, V, BV).to(tl.float32)
    weight = tl.load(rden + at, mask=valid, other=0.0)
    do = load_rows(dout, at, V, valid, V, BV).to(tl.float32) * weight[:, None]
    do = do.to(scaled.dtype.element_ty)
    store_rows(scaled, at, V, valid, do, V, BV)
    d = tl.sum(o * do.to(tl.float32), 1)
    if TOP:
        d = tl.where(tl.abs(weight) > 0.99 / DENOMINATOR_FLOOR, 0.0, d)
    tl.store(delta + at, d, mask=valid)


@triton.jit
def exact_weights(
    s, seen, top, softcap, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Weights of raw logits ``s`` relative to exp(top), and the derivative of the capped logit by the raw one."""
    slope = 1.0
    if SOFTCAP:
        t = tanh(s / softcap)
        s = softcap * t
        slope = 1.0 - t * t
    p = exp(tl.where(seen, s, EMPTY) - top)
    return p, slope


@triton.jit
def store_map_gradient(
    dw, dw1, dc, dc1, out_w, out_c, place,
    D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Write one program's share ``[parts, D, F]`` of the gradient of the projections, and of the biases."""
    d = tl.arange(0, BD)
    f = tl.arange(0, BF)
    parts: tl.constexpr = 2 if ACT == PRODUCT else 1
    mask = (d < D)[:, None] & (f < F)[None, :]
    at = place.to(tl.int64) * parts
    tl.store(out_w + (at * D + d[:, None]) * F + f[None, :], dw, mask=mask)
    if ACT == PRODUCT:
        tl.store(out_w + ((at + 1) * D + d[:, None]) * F + f[None, :], dw1, mask=mask)
    if BIAS:
        tl.store(out_c + at * F + f, dc, mask=f < F)
        if ACT == PRODUCT:
            tl.store(out_c + (at + 1) * F + f, dc1, mask=f < F)


@triton.jit
def dq_kernel(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    v, v_b, v_t, v_h,
    qf, qf_b, qf_t, qf_h,
    kf, kf_b, kf_t, kf_h,
    query_weight, key_weight, query_low, key_low, query_map_heads, key_map_heads, query_bias, key_bias,
    query_log, key_log, far_bias,
    decay, decay_b, decay_t, decay_h,
    sink_k, sink_v,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    do, top, delta,
    dq, dqf, dlog, dweight, dbias, dsink_k, dsink_v,
    scale, softcap, norm, constant, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    DF: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BDF: tl.constexpr,
    BF: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    FAR: tl.constexpr,
    KEYS: tl.constexpr,
    STRICT: tl.constexpr,
    ACT: tl.constexpr,
    KLOG: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, of the query map and the queries' log-scales, and each segment's share of the sinks'."""
    head = tl.program_id(0)
    pid = tl.program_id(1)
    kv_head = head // G
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    DECAY: tl.constexpr = decay is not None
    PROJECT: tl.constexpr = query_weight is not None
    BIAS: tl.constexpr = query_bias is not None
    LOW: tl.constexpr = query_low is not None
    NEAR: tl.constexpr = (WINDOW > 0) or (SINKS > 0)
    NEAR_BLOCKS: tl.constexpr = WINDOW // C
    REACH: tl.constexpr = (WINDOW + C - 2) // C if WINDOW > 1 else 0
    LEAST: tl.constexpr = 1 if STRICT else 0  # tokens between a query and the newest key it sees
    FAR_GAP: tl.constexpr = WINDOW if WINDOW > LEAST else LEAST
    SHARED: tl.constexpr = dqf is None  # the far branch sees q itself

    q += row64 * q_b + start * q_t + head * q_h
    k += row64 * k_b + start * k_t + kv_head * k_h
    v += row64 * v_b + start * v_t + kv_head * v_h
    if FAR:
        qf += row64 * qf_b + start * qf_t + head * qf_h
        kf += row64 * kf_b + start * kf_t + kv_head * kf_h
        qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
            query_weight,
            query_low,
            query_bias,
            tl.where(query_map_heads == 1, 0, head),
            query_map_heads,
            DF,
            F,
            BDF,
            BF,
            ACT,
        )
        kw0, kw1, kl0, kl1, kc0, kc1 = load_map(
            key_weight, key_low, key_bias, tl.where(key_map_heads == 1, 0, kv_head), key_map_heads, DF, F, BDF, BF, ACT
        )
    if DECAY:
        decay += row64 * decay_b + start * decay_t + kv_head * decay_h

    place = pid.to(tl.int64) * kv_heads + kv_head
    S, z, m = load_memory(state_kv, state_k, state_m, place, F, V, BF, BV, KLOG)
    if SINKS > 0:
        sink_at = tl.arange(0, BS)
        sink_rows = (n.to(tl.int64) * SINKS + sink_at) * kv_heads + kv_head
        sk = load_rows(sink_k, sink_rows, D, sink_at < SINKS, D, BD)
        sv = load_rows(sink_v, sink_rows, V, sink_at < SINKS, V, BV)
        dsk = tl.zeros([BS, BD], tl.float32)
        dsv = tl.zeros([BS, BV], tl.float32)
    if dweight is not None:
        P: tl.constexpr = F // 2 if ACT == MIRRORED else F
        BP: tl.constexpr = BF // 2 if ACT == MIRRORED else BF
        dw = tl.zeros([BDF, BP], tl.float32)
        dw1 = tl.zeros([BDF, BP], tl.float32)
        dc = tl.zeros([BP], tl.float32)
        dc1 = tl.zeros([BP], tl.float32)

    first = s * (segment // C)
    last = tl.minimum(first + segment // C, tl.cdiv(length, C))
    for i in range(first, last):
        rows = i * C + tl.arange(0, C)
        valid = rows < length
        stat = (origin * H + head) + rows.to(tl.int64) * H
        xdo = load_rows(do + (origin * H + head) * V, rows, H * V, valid, V, BV)
        row_delta = tl.load(delta + stat, mask=valid, other=0.0)
        row_top = tl.load(top + stat, mask=valid, other=0.0) if TOP else tl.zeros([C], tl.float32)
        between = tl.full([], 0.0, tl.float64)
        g = tl.zeros([C], tl.float64)
        gate64 = tl.full([], 0.0, tl.float64)
        lag = tl.full([], 0.0, tl.float64)
        if DECAY:
            g, own = gates(decay, rows, decay_t, valid)
            gate64 += own
            for j in range(1, (REACH + 1) if KEYS else 1):
                key_rows = rows - j * C
                _, passed = gates(decay, key_rows, decay_t, (key_rows >= 0) & (key_rows < length))
                lag += passed
        if NEAR:
            xq = load_rows(q, rows, q_t, valid, D, BD)
            dxq = tl.zeros([C, BD], tl.float32)

        if KEYS:
            if NEAR_BLOCKS > 0:
                for j in range(0, NEAR_BLOCKS):
                    key_rows = rows - j * C
                    key_valid = (key_rows >= 0) & (key_rows < length)
                    xk = load_rows(k, key_rows, k_t, key_valid, D, BD).to(OT)
                    xv = load_rows(v, key_rows, v_t, key_valid, V, BV).to(OT)
                    seen = rows[:, None] >= unseen(key_rows, key_valid)[None, :] + LEAST
                    raw = tl.dot(xq.to(OT), tl.trans(xk), input_precision=PRECISION) * scale
                    p, slope = exact_weights(raw, seen, row_top[:, None], softcap, SOFTCAP)
                    e = tl.dot(xdo.to(OT), tl.trans(xv), input_precision=PRECISION) - row_delta[:, None]
                    dxq = tl.dot((p * e * slope).to(OT), xk, dxq, input_precision=PRECISION)
                    if DECAY:
                        if j > 0:
                            _, passed = gates(decay, key_rows, decay_t, key_valid)
                            between += passed

        if FAR:
            log_q = tl.zeros([C], tl.float32)
            if KLOG and PROJECT:
                xf = load_rows(qf, rows, qf_t, valid, DF, BDF)
                phi_q, log_q = features(
                    xf, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
                )
            if query_log is not None:
                log_q = tl.load(query_log + stat, mask=valid, other=0.0)
            if far_bias is not None:
                log_q += tl.load(far_bias + head)
            relative = (log_q - row_top) if TOP else tl.zeros([C], tl.float32)
            # The memory: everything before the blocks that the window's edge crosses.
            dphi = tl.dot(xdo.to(OT), S.to(OT), input_precision=PRECISION)
            dphi -= row_delta[:, None] * z[None, :]
            if DECAY or TOP:
                log_m = relative
                if DECAY:
                    log_m += (g + lag).to(tl.float32)
                if KLOG:
                    log_m += m
                dphi = dphi * exp(tl.minimum(log_m, LARGEST_EXPONENT))[:, None]

        if KEYS:
            for j in tl.static_range(NEAR_BLOCKS, REACH + 1):
                key_rows = rows - j * C
                key_valid = (key_rows >= 0) & (key_rows < length)
                xv = load_rows(v, key_rows, v_t, key_valid, V, BV).to(OT)
                e = tl.dot(xdo.to(OT), tl.trans(xv), input_precision=PRECISION) - row_delta[:, None]
                if WINDOW > 0:
                    xk = load_rows(k, key_rows, k_t, key_valid, D, BD).to(OT)
                    raw = tl.dot(xq.to(OT), tl.trans(xk), input_precision=PRECISION) * scale
                    seen = rows[:, None] >= (unseen(key_rows, key_valid) if j > 0 else key_rows)[None, :] + LEAST
                    seen = seen & (rows[:, None] < key_rows[None, :] + WINDOW)
                    p, slope = exact_weights(raw, seen, row_top[:, None], softcap, SOFTCAP)
                    dxq = tl.dot((p * e * slope).to(OT), xk, dxq, input_precision=PRECISION)
                if FAR:
                    xkf = load_rows(kf, key_rows, kf_t, key_valid, DF, BDF)
                    phi_k, log_k = features(
                        xkf, kw0, kw1, kl0, kl1, kc0, kc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
                    )
                    if key_log is not None:
                        key_stat = (origin * kv_heads + kv_head) + key_rows.to(tl.int64) * kv_heads
                        log_k = tl.load(key_log + key_stat, mask=key_valid, other=0.0)
                    counts = key_valid & (base + key_rows >= SINKS)
                    is_far = (
                        rows[:, None]
                        >= (unseen(key_rows, counts) if j > 0 or SINKS > 0 else key_rows)[None, :] + FAR_GAP
                    )
                    if SINKS > 0 and not (KLOG or DECAY):
                        phi_k = tl.where(counts[:, None], phi_k, 0.0)
                    phi_k = phi_k.to(OT)
                    to_end = tl.zeros([C], tl.float32)
                    block_gate = tl.full([], 0.0, tl.float64)
                    if DECAY:
                        if j > 0:
                            key_g, passed = gates(decay, key_rows, decay_t, key_valid)
                            block_gate += passed
                            to_end = (block_gate - key_g).to(tl.float32)
                            log_w = (g + between).to(tl.float32)[:, None] + to_end[None, :]
                            between += block_gate
                        else:
                            block_gate += gate64
                            to_end = (block_gate - g).to(tl.float32)
                            log_w = differences(g)
                    else:
                        log_w = tl.zeros([C, C], tl.float32)
                    if KLOG:
                        log_w += log_k[None, :]
                        to_end += log_k
                    if DECAY or TOP:
                        log_w = tl.minimum(log_w + relative[:, None], LARGEST_EXPONENT)
                        de = e * exp(tl.where(is_far, log_w, EMPTY))
                    else:
                        de = tl.where(is_far, e, 0.0)
                    dphi = tl.dot(de.to(OT), phi_k, dphi, input_precision=PRECISION)

        if FAR:
            if KEYS:
                if DECAY:
                    joined = block_gate.to(tl.float32)
                else:
                    joined = 0.0
                S, z, m = fold_chunk(
                    S, z, m, phi_k, xv, to_end, counts, counts.to(tl.float32), joined,
                    KLOG, DECAY, OT, PRECISION,
                )  # fmt: skip

        if SINKS > 0:
            if KEYS:
                gap = (base + rows)[:, None] - sink_at[None, :]
                seen = (gap >= WINDOW) & (sink_at < SINKS)[None, :]
            else:  # every query reads all keys, of which there are ``base``
                seen = (rows[:, None] >= 0) & (sink_at < tl.minimum(base, SINKS))[None, :]
            raw = tl.dot(xq.to(OT), tl.trans(sk.to(OT)), input_precision=PRECISION) * scale
            p, slope = exact_weights(raw, seen, row_top[:, None], softcap, SOFTCAP)
            e = tl.dot(xdo.to(OT), tl.trans(sv.to(OT)), input_precision=PRECISION) - row_delta[:, None]
            ds = (p * e * slope).to(OT)
            dxq = tl.dot(ds, sk.to(OT), dxq, input_precision=PRECISION)
            dsk = tl.dot(tl.trans(ds), xq.to(OT), dsk, input_precision=PRECISION)
            dsv = tl.dot(tl.trans(p.to(OT)), xdo.to(OT), dsv, input_precision=PRECISION)

        if FAR:
            if not (KLOG and PROJECT):
                xf = load_rows(qf, rows, qf_t, valid, DF, BDF)
                phi_q, _ = features(
                    xf, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
                )
            if dlog is not None:
                tl.store(dlog + stat, tl.sum(phi_q * dphi, 1), mask=valid)
            dx, dz, dz1 = features_backward(
                xf, phi_q, dphi, qw0, qw1, ql0, ql1, qc0, qc1, norm, ACT, PROJECT, LOW, BIAS, OT, PRECISION
            )
            if dweight is not None:
                xt = tl.trans(xf.to(OT))
                dw = tl.dot(xt, dz.to(OT), dw, input_precision=PRECISION)
                if BIAS:
                    dc += tl.sum(dz, 0)
                if ACT == PRODUCT:
                    dw1 = tl.dot(xt, dz1.to(OT), dw1, input_precision=PRECISION)
                    if BIAS:
                        dc1 += tl.sum(dz1, 0)
            if SHARED:
                if NEAR:
                    dxq = dxq * scale + dx
                else:
                    dxq = dx
                store_rows(dq + (origin * H + head) * D, rows, H * D, valid, dxq, D, BD)
            else:
                store_rows(dqf + (origin * H + head) * DF, rows, H * DF, valid, dx, DF, BDF)
                if NEAR:
                    store_rows(dq + (origin * H + head) * D, rows, H * D, valid, dxq * scale, D, BD)
        else:
            store_rows(dq + (origin * H + head) * D, rows, H * D, valid, dxq * scale, D, BD)

    if SINKS > 0:
        place = pid.to(tl.int64) * H + head
        store_rows(dsink_k + place * SINKS * D, sink_at, D, sink_at < SINKS, dsk * scale, D, BD)
        store_rows(dsink_v + place * SINKS * V, sink_at, V, sink_at < SINKS, dsv, V, BV)
    if dweight is not None:
        store_map_gradient(dw, dw1, dc, dc1, dweight, dbias, pid.to(tl.int64) * H + head, DF, P, BDF, BP, BIAS, ACT)


@triton.jit
def dkv_kernel(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    v, v_b, v_t, v_h,
    qf, qf_b, qf_t, qf_h,
    kf, kf_b, kf_t, kf_h,
    query_weight, key_weight, query_low, key_low, query_map_heads, key_map_heads, query_bias, key_bias,
    query_log, key_log, far_bias,
    decay, decay_b, decay_t, decay_h,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    do, top, delta,
    dk, dv, dkf, dlog, dweight, dbias,
    scale, softcap, norm, constant, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    DF: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BDF: tl.constexpr,
    BF: tl.constexpr,
    C: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    FAR: tl.constexpr,
    QUERIES: tl.constexpr,
    STRICT: tl.constexpr,
    ACT: tl.constexpr,
    KLOG: tl.constexpr,
    TOP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, values, the key map and the keys' log-scales. Tiles are ``[keys, queries]``.

    Without QUERIES the state is all that reads the keys: it holds the gradient of a final memory.
    """
    kv_head = tl.program_id(0)
    pid = tl.program_id(1)
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    DECAY: tl.constexpr = decay is not None
    PROJECT: tl.constexpr = query_weight is not None
    BIAS: tl.constexpr = query_bias is not None
    LOW: tl.constexpr = query_low is not None
    NEAR_BLOCKS: tl.constexpr = WINDOW // C
    REACH: tl.constexpr = (WINDOW + C - 2) // C if WINDOW > 1 else 0
    LEAST: tl.constexpr = 1 if STRICT else 0  # tokens between a query and the newest key it sees
    FAR_GAP: tl.constexpr = WINDOW if WINDOW > LEAST else LEAST
    SHARED: tl.constexpr = dkf is None

    if QUERIES:
        q += row64 * q_b + start * q_t
    k += row64 * k_b + start * k_t + kv_head * k_h
    v += row64 * v_b + start * v_t + kv_head * v_h
    if FAR:
        if QUERIES:
            qf += row64 * qf_b + start * qf_t
        kf += row64 * kf_b + start * kf_t + kv_head * kf_h
        kw0, kw1, kl0, kl1, kc0, kc1 = load_map(
            key_weight, key_low, key_bias, tl.where(key_map_heads == 1, 0, kv_head), key_map_heads, DF, F, BDF, BF, ACT
        )
        if QUERIES and G == 1:
            qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
                query_weight, query_low, query_bias, tl.where(query_map_heads == 1, 0, kv_head), query_map_heads,
                DF, F, BDF, BF, ACT,
            )  # fmt: skip
    if DECAY:
        decay += row64 * decay_b + start * decay_t + kv_head * decay_h

    place = pid.to(tl.int64) * kv_heads + kv_head
    R, z, m = load_memory(state_kv, state_k, state_m, place, F, V, BF, BV, TOP)
    if dweight is not None:
        P: tl.constexpr = F // 2 if ACT == MIRRORED else F
        BP: tl.constexpr = BF // 2 if ACT == MIRRORED else BF
        dw = tl.zeros([BDF, BP], tl.float32)
        dw1 = tl.zeros([BDF, BP], tl.float32)
        dc = tl.zeros([BP], tl.float32)
        dc1 = tl.zeros([BP], tl.float32)

    first = s * (segment // C)
    last = tl.minimum(first + segment // C, tl.cdiv(length, C))
    for step in range(0, last - first):
        i = last - 1 - step
        rows = i * C + tl.arange(0, C)
        valid = rows < length
        xv = load_rows(v, rows, v_t, valid, V, BV).to(OT)
        dxv = tl.zeros([C, BV], tl.float32)
        if WINDOW > 0:
            xk = load_rows(k, rows, k_t, valid, D, BD).to(OT)
            dxk = tl.zeros([C, BD], tl.float32)
        g = tl.zeros([C], tl.float64)
        gate64 = tl.full([], 0.0, tl.float64)
        lag = tl.full([], 0.0, tl.float64)
        if DECAY:
            g, own = gates(decay, rows, decay_t, valid)
            gate64 += own
            for j in range(1, REACH + 1):
                later = rows + j * C
                _, passed = gates(decay, later, decay_t, later < length)
                lag += passed
        if FAR:
            xkf = load_rows(kf, rows, kf_t, valid, DF, BDF)
            phi_k, log_k = features(
                xkf, kw0, kw1, kl0, kl1, kc0, kc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
            )
            if key_log is not None:
                log_k = tl.load(
                    key_log + (origin * kv_heads + kv_head) + rows.to(tl.int64) * kv_heads, mask=valid, other=0.0
                )
            counts = valid & (base + rows >= SINKS)
            phi_kt = phi_k.to(OT)
            # The memory of every later query that finds this block far.
            low = R.to(OT)
            dxv = tl.dot(phi_kt, tl.trans(low), dxv, input_precision=PRECISION)
            dphi = tl.dot(xv, low, input_precision=PRECISION)
            dphi += counts.to(tl.float32)[:, None] * z[None, :]
            if SINKS > 0 or DECAY or TOP:
                log_m = tl.zeros([C], tl.float32)
                if DECAY:
                    log_m += ((gate64 - g) + lag).to(tl.float32)
                if TOP:
                    log_m += m
                if KLOG:
                    log_m += log_k
                factor = exp(tl.where(counts, tl.minimum(log_m, LARGEST_EXPONENT), EMPTY))
                dxv = dxv * factor[:, None]
                dphi = dphi * factor[:, None]

        between = tl.full([], 0.0, tl.float64)
        if NEAR_BLOCKS > 0:
            for j in range(0, NEAR_BLOCKS):
                query_rows = rows + j * C
                query_valid = query_rows < length
                if DECAY:
                    if j > 0:
                        _, passed = gates(decay, query_rows, decay_t, query_valid)
                        between += passed
                seen = query_rows[None, :] >= rows[:, None] + LEAST
                for group in range(G):
                    head = kv_head * G + group
                    stat = (origin * H + head) + query_rows.to(tl.int64) * H
                    xq = load_rows(q + head * q_h, query_rows, q_t, query_valid, D, BD).to(OT)
                    xdo = load_rows(do + (origin * H + head) * V, query_rows, H * V, query_valid, V, BV).to(OT)
                    row_delta = tl.load(delta + stat, mask=query_valid, other=0.0)
                    row_top = tl.load(top + stat, mask=query_valid, other=0.0)
                    raw = tl.dot(xk, tl.trans(xq), input_precision=PRECISION) * scale
                    p, slope = exact_weights(raw, seen, row_top[None, :], softcap, SOFTCAP)
                    dxv = tl.dot(p.to(OT), xdo, dxv, input_precision=PRECISION)
                    e = tl.dot(xv, tl.trans(xdo), input_precision=PRECISION) - row_delta[None, :]
                    dxk = tl.dot((p * e * slope).to(OT), xq, dxk, input_precision=PRECISION)

        for j in tl.static_range(NEAR_BLOCKS, REACH + 1 if QUERIES else NEAR_BLOCKS):
            query_rows = rows + j * C
            query_valid = query_rows < length
            query_g = g
            block_gate = tl.full([], 0.0, tl.float64)
            log_w = tl.zeros([C, C], tl.float32)
            if DECAY:
                if j > 0:
                    query_g, passed = gates(decay, query_rows, decay_t, query_valid)
                    block_gate += passed
                    to_end = (gate64 - g + between).to(tl.float32)
                    log_w = to_end[:, None] + query_g.to(tl.float32)[None, :]
                    between += block_gate
                else:
                    block_gate += gate64
                    log_w = -differences(g)
            for group in range(G):
                head = kv_head * G + group
                stat = (origin * H + head) + query_rows.to(tl.int64) * H
                xdo = load_rows(do + (origin * H + head) * V, query_rows, H * V, query_valid, V, BV).to(OT)
                row_delta = tl.load(delta + stat, mask=query_valid, other=0.0)
                row_top = tl.load(top + stat, mask=query_valid, other=0.0) if TOP else tl.zeros([C], tl.float32)
                if WINDOW > 0:
                    e = tl.dot(xv, tl.trans(xdo), input_precision=PRECISION) - row_delta[None, :]
                    xq = load_rows(q + head * q_h, query_rows, q_t, query_valid, D, BD).to(OT)
                    raw = tl.dot(xk, tl.trans(xq), input_precision=PRECISION) * scale
                    seen = query_rows[None, :] >= rows[:, None] + LEAST
                    seen = seen & (query_rows[None, :] < rows[:, None] + WINDOW)
                    p, slope = exact_weights(raw, seen, row_top[None, :], softcap, SOFTCAP)
                    dxv = tl.dot(p.to(OT), xdo, dxv, input_precision=PRECISION)
                    dxk = tl.dot((p * e * slope).to(OT), xq, dxk, input_precision=PRECISION)
                if FAR:
                    if G > 1:
                        qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
                            query_weight, query_low, query_bias, tl.where(query_map_heads == 1, 0, head),
                            query_map_heads, DF, F, BDF, BF, ACT,
                        )  # fmt: skip
                    xf = load_rows(qf + head * qf_h, query_rows, qf_t, query_valid, DF, BDF)
                    phi_q, log_q = features(
                        xf, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
                    )
                    if query_log is not None:
                        log_q = tl.load(query_log + stat, mask=query_valid, other=0.0)
                    if far_bias is not None:
                        log_q += tl.load(far_bias + head)
                    relative = (log_q - row_top) if TOP else tl.zeros([C], tl.float32)
                    is_far = query_rows[None, :] >= (unseen(rows, counts) if SINKS > 0 else rows)[:, None] + FAR_GAP
                    phi_qt = phi_q.to(OT)
                    kernel = tl.dot(phi_kt, tl.trans(phi_qt), input_precision=PRECISION)
                    if DECAY or TOP:
                        exponent = log_w + relative[None, :]
                        if KLOG:
                            exponent += log_k[:, None]
                        weight = exp(tl.where(is_far, tl.minimum(exponent, LARGEST_EXPONENT), EMPTY))
                        kernel = kernel * weight
                    else:
                        kernel = tl.where(is_far, kernel, 0.0)
                    dxv = tl.dot(kernel.to(OT), xdo, dxv, input_precision=PRECISION)
                    e = tl.dot(xv, tl.trans(xdo), input_precision=PRECISION) - row_delta[None, :]
                    if DECAY or TOP:
                        e = e * weight
                    else:
                        e = tl.where(is_far, e, 0.0)
                    dphi = tl.dot(e.to(OT), phi_qt, dphi, input_precision=PRECISION)
                    if j == REACH:
                        # These queries find every earlier block far.
                        along = query_g.to(tl.float32) + relative
                        there = query_valid & (row_top > EMPTY / 4)
                        if DECAY:
                            joined = tl.where(group == 0, block_gate.to(tl.float32), 0.0)
                        else:
                            joined = 0.0
                        R, z, m = fold_chunk(
                            R, z, m, phi_qt, xdo, along, there, -row_delta, joined, TOP, DECAY, OT, PRECISION
                        )

        if DECAY and not QUERIES:
            # What reads an earlier block stands further from it by this block's gates.
            if TOP:
                m += gate64.to(tl.float32)
            else:
                R = R * exp(gate64.to(tl.float32))
                z = z * exp(gate64.to(tl.float32))
        store_rows(dv + (origin * kv_heads + kv_head) * V, rows, kv_heads * V, valid, dxv, V, BV)
        if FAR:
            if dlog is not None:
                tl.store(
                    dlog + (origin * kv_heads + kv_head) + rows.to(tl.int64) * kv_heads,
                    tl.sum(phi_kt * dphi, 1),
                    mask=valid,
                )
            dx, dz, dz1 = features_backward(
                xkf,
                phi_kt.to(tl.float32),
                dphi,
                kw0,
                kw1,
                kl0,
                kl1,
                kc0,
                kc1,
                norm,
                ACT,
                PROJECT,
                LOW,
                BIAS,
                OT,
                PRECISION,
            )
            if dweight is not None:
                xt = tl.trans(xkf.to(OT))
                dw = tl.dot(xt, dz.to(OT), dw, input_precision=PRECISION)
                if BIAS:
                    dc += tl.sum(dz, 0)
                if ACT == PRODUCT:
                    dw1 = tl.dot(xt, dz1.to(OT), dw1, input_precision=PRECISION)
                    if BIAS:
                        dc1 += tl.sum(dz1, 0)
            if SHARED:
                if WINDOW > 0:
                    dx += dxk * scale
                store_rows(dk + (origin * kv_heads + kv_head) * D, rows, kv_heads * D, valid, dx, D, BD)
            else:
                store_rows(dkf + (origin * kv_heads + kv_head) * DF, rows, kv_heads * DF, valid, dx, DF, BDF)
                if WINDOW > 0:
                    store_rows(dk + (origin * kv_heads + kv_head) * D, rows, kv_heads * D, valid, dxk * scale, D, BD)
        else:
            store_rows(dk + (origin * kv_heads + kv_head) * D, rows, kv_heads * D, valid, dxk * scale, D, BD)

    if dweight is not None:
        store_map_gradient(
            dw, dw1, dc, dc1, dweight, dbias, pid.to(tl.int64) * kv_heads + kv_head, DF, P, BDF, BP, BIAS, ACT
        )


@triton.jit
def suffix_kernel(
    d, minus, out, lengths, starts, T, heads,
    G: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, MINUS: tl.constexpr,
):  # fmt: skip
    """Σ from each token to its sequence's end of ``d [B, T, heads · G]`` (summed over G) − ``minus [B, T, heads]``."""
    head = tl.program_id(0)
    n = tl.program_id(1)
    row = n.to(tl.int64) * 0 if PACKED else n.to(tl.int64)
    start = tl.load(starts + n) if PACKED else row * 0
    length = (n * 0 + T).to(tl.int32) if lengths is None else tl.load(lengths + n).to(tl.int32)
    total = tl.full([], 0.0, tl.float64)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(0, blocks):
        at = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        valid = at < length
        slots = row * T + start + at.to(tl.int64)
        x = tl.zeros([BLOCK], tl.float32)
        for g in tl.static_range(G):
            x += tl.load(d + (slots * heads + head) * G + g, mask=valid, other=0.0)
        if MINUS:
            x -= tl.load(minus + slots * heads + head, mask=valid, other=0.0)
        wide = x.to(tl.float64)
        block = tl.sum(wide, 0)
        tl.store(out + slots * heads + head, (total + block - tl.cumsum(wide, 0) + wide).to(tl.float32), mask=valid)
        total += block
