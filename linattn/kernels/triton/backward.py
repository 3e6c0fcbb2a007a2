"""The far part's backward pass: queries in order with the keys' memory, keys in reverse with the queries' memory.

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
    column,
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
)

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
    first = tl.program_id(0).to(tl.int64) * R
    at = first + tl.arange(0, R)
    valid = at < rows
    o = load_rows(out, first, V, valid, V, BV).to(tl.float32)
    if residual is not None:
        o += load_rows(residual, first, V, valid, V, BV).to(tl.float32)
    weight = tl.load(rden + at, mask=valid, other=0.0)
    do = load_rows(dout, first, V, valid, V, BV).to(tl.float32) * weight[:, None]
    do = do.to(scaled.dtype.element_ty)
    store_rows(scaled, first, V, valid, do, V, BV)
    d = tl.sum(o * do.to(tl.float32), 1)
    if TOP:
        d = tl.where(tl.abs(weight) > 0.99 / DENOMINATOR_FLOOR, 0.0, d)
    tl.store(delta + at, d, mask=valid)


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
    v, v_b, v_t: tl.constexpr, v_h,
    qf, qf_b, qf_t: tl.constexpr, qf_h,
    kf, kf_b, kf_t: tl.constexpr, kf_h,
    query_weight, key_weight, query_low, key_low, query_map_heads, key_map_heads, query_bias, key_bias,
    query_log, key_log, far_bias, lag,
    decay, decay_b, decay_t: tl.constexpr, decay_h,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    do, top, delta,
    dq, dlog, dweight, dbias,
    norm, constant, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    DF: tl.constexpr,
    F: tl.constexpr,
    BV: tl.constexpr,
    BDF: tl.constexpr,
    BF: tl.constexpr,
    C: tl.constexpr,
    GAP: tl.constexpr,
    SINKS: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST_EMPTY: tl.constexpr,
    ACT: tl.constexpr,
    KLOG: tl.constexpr,
    TOP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The far part's gradients of queries, of the query map and of the queries' log-scales."""
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
    FIRST: tl.constexpr = KLOG and PROJECT  # the memory's weight needs the queries' log-scale
    stat = origin * H + head
    key_stat = origin * kv_heads + kv_head

    v += row64 * v_b + start * v_t + kv_head * v_h
    qf += row64 * qf_b + start * qf_t + head * qf_h
    kf += row64 * kf_b + start * kf_t + kv_head * kf_h
    qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
        query_weight, query_low, query_bias, tl.where(query_map_heads == 1, 0, head), query_map_heads,
        DF, F, BDF, BF, ACT,
    )  # fmt: skip
    kw0, kw1, kl0, kl1, kc0, kc1 = load_map(
        key_weight, key_low, key_bias, tl.where(key_map_heads == 1, 0, kv_head), key_map_heads, DF, F, BDF, BF, ACT
    )
    if DECAY:
        decay += row64 * decay_b + start * decay_t + kv_head * decay_h
    place = pid.to(tl.int64) * kv_heads + kv_head
    S, z, m = load_memory(state_kv, state_k, state_m, place, s > 0 if FIRST_EMPTY else s >= 0, F, V, BF, BV, KLOG)
    if dweight is not None:
        P: tl.constexpr = F // 2 if ACT == MIRRORED else F
        BP: tl.constexpr = BF // 2 if ACT == MIRRORED else BF
        dw = tl.zeros([BDF, BP], tl.float32)
        dw1 = tl.zeros([BDF, BP], tl.float32)
        dc = tl.zeros([BP], tl.float32)
        dc1 = tl.zeros([BP], tl.float32)

    begin = s * (segment // C)
    end = tl.minimum(begin + segment // C, tl.cdiv(length - GAP, C))
    local = tl.arange(0, C)
    for i in range(begin, end):
        first = i * C
        rows = first + local
        at = first + GAP  # its queries
        there = rows + GAP < length
        xdo = load_rows(do + stat * V, at, H * V, there, V, BV).to(OT)
        row_delta = tl.load(column(delta + stat, at, H, C), mask=there, other=0.0)
        g = tl.zeros([C], tl.float64)
        gate = tl.full([], 0.0, tl.float32)
        to_end = tl.zeros([C], tl.float32)
        if DECAY:
            g, gate64 = gates(decay, first, decay_t, rows < length)
            gate += gate64.to(tl.float32)
            to_end = (gate64 - g).to(tl.float32)

        # The memory: all earlier chunks.
        relative = tl.zeros([C], tl.float32)
        if TOP:
            log_q = tl.zeros([C], tl.float32)
            if FIRST:
                xq = load_rows(qf, at, qf_t, there, DF, BDF)
                phi_q, log_q = features(
                    xq, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
                )
            if query_log is not None:
                log_q = tl.load(column(query_log + stat, at, H, C), mask=there, other=0.0)
            if far_bias is not None:
                log_q += tl.load(far_bias + head)
            if lag is not None:
                log_q += tl.load(column(lag + key_stat, at, kv_heads, C), mask=there, other=0.0)
            relative = log_q - tl.load(column(top + stat, at, H, C), mask=there, other=0.0)
        dphi = tl.dot(xdo, S.to(OT), input_precision=PRECISION)
        dphi -= row_delta[:, None] * tl.sum(z, 0)[None, :]
        if DECAY or TOP:
            log_m = relative
            if DECAY:
                log_m += g.to(tl.float32)
            if KLOG:
                log_m += m
            dphi = dphi * exp(tl.minimum(log_m, LARGEST_EXPONENT))[:, None]

        # This chunk, token by token; then it joins the memory.
        if KEYS:
            valid = rows < length
            counts = valid
            if SINKS > 0:
                counts = valid & (base + rows >= SINKS)
            xv = load_rows(v, first, v_t, valid, V, BV).to(OT)
            xk = load_rows(kf, first, kf_t, valid, DF, BDF)
            phi_k, log_k = features(
                xk, kw0, kw1, kl0, kl1, kc0, kc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
            )
            if key_log is not None:
                log_k = tl.load(column(key_log + key_stat, first, kv_heads, C), mask=valid, other=0.0)
            if SINKS > 0 and not (KLOG or DECAY):
                phi_k = tl.where(counts[:, None], phi_k, 0.0)
            phi_k = phi_k.to(OT)
            e = tl.dot(xdo, tl.trans(xv), input_precision=PRECISION) - row_delta[:, None]
            seen = local[:, None] >= local[None, :]
            if SINKS > 0:
                seen = seen & counts[None, :]
            if DECAY or TOP:
                log_w = differences(g) if DECAY else tl.zeros([C, C], tl.float32)
                if KLOG:
                    log_w += log_k[None, :]
                    to_end += log_k
                log_w = tl.minimum(log_w + relative[:, None], LARGEST_EXPONENT)
                e = e * exp(tl.where(seen, log_w, EMPTY))
            else:
                e = tl.where(seen, e, 0.0)
            dphi = tl.dot(e.to(OT), phi_k, dphi, input_precision=PRECISION)
            S, z, m = fold_chunk(
                S, z, m, phi_k, xv, to_end, counts, counts.to(tl.float32), gate, KLOG, DECAY, True, OT, PRECISION
            )

        if not FIRST:
            xq = load_rows(qf, at, qf_t, there, DF, BDF)
            phi_q, _ = features(
                xq, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
            )
        if dlog is not None:
            tl.store(column(dlog + stat, at, H, C), tl.sum(phi_q * dphi, 1), mask=there)
        dx, dz, dz1 = features_backward(
            xq, phi_q, dphi, qw0, qw1, ql0, ql1, qc0, qc1, norm, ACT, PROJECT, LOW, BIAS, OT, PRECISION
        )
        if dweight is not None:
            xt = tl.trans(xq.to(OT))
            dw = tl.dot(xt, dz.to(OT), dw, input_precision=PRECISION)
            if BIAS:
                dc += tl.sum(dz, 0)
            if ACT == PRODUCT:
                dw1 = tl.dot(xt, dz1.to(OT), dw1, input_precision=PRECISION)
                if BIAS:
                    dc1 += tl.sum(dz1, 0)
        store_rows(dq + stat * DF, at, H * DF, there, dx, DF, BDF)

    if dweight is not None:
        store_map_gradient(dw, dw1, dc, dc1, dweight, dbias, pid.to(tl.int64) * H + head, DF, P, BDF, BP, BIAS, ACT)


@triton.jit
def dkv_kernel(
    v, v_b, v_t: tl.constexpr, v_h,
    qf, qf_b, qf_t: tl.constexpr, qf_h,
    kf, kf_b, kf_t: tl.constexpr, kf_h,
    query_weight, key_weight, query_low, key_low, query_map_heads, key_map_heads, query_bias, key_bias,
    query_log, key_log, far_bias, lag,
    decay, decay_b, decay_t: tl.constexpr, decay_h,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    do, top, delta,
    dk, dv, dlog, dweight, dbias,
    norm, constant, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    DF: tl.constexpr,
    F: tl.constexpr,
    BV: tl.constexpr,
    BDF: tl.constexpr,
    BF: tl.constexpr,
    C: tl.constexpr,
    GAP: tl.constexpr,
    SINKS: tl.constexpr,
    QUERIES: tl.constexpr,
    LAST_EMPTY: tl.constexpr,
    ACT: tl.constexpr,
    KLOG: tl.constexpr,
    TOP: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The far part's gradients of keys, values, the key map and the keys' log-scales. Tiles are ``[keys, queries]``.

    Without QUERIES the state is all that reads the keys: it holds the gradient of a final memory.
    """
    kv_head = tl.program_id(0)
    pid = tl.program_id(1)
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    DECAY: tl.constexpr = decay is not None
    PROJECT: tl.constexpr = key_weight is not None
    BIAS: tl.constexpr = key_bias is not None
    LOW: tl.constexpr = key_low is not None
    key_stat = origin * kv_heads + kv_head

    v += row64 * v_b + start * v_t + kv_head * v_h
    kf += row64 * kf_b + start * kf_t + kv_head * kf_h
    kw0, kw1, kl0, kl1, kc0, kc1 = load_map(
        key_weight, key_low, key_bias, tl.where(key_map_heads == 1, 0, kv_head), key_map_heads, DF, F, BDF, BF, ACT
    )
    if QUERIES:
        qf += row64 * qf_b + start * qf_t
        if G == 1:
            qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
                query_weight, query_low, query_bias, tl.where(query_map_heads == 1, 0, kv_head), query_map_heads,
                DF, F, BDF, BF, ACT,
            )  # fmt: skip
    if DECAY:
        decay += row64 * decay_b + start * decay_t + kv_head * decay_h

    place = pid.to(tl.int64) * kv_heads + kv_head
    R, z, m = load_memory(
        state_kv, state_k, state_m, place, s < segments - 1 if LAST_EMPTY else s >= 0, F, V, BF, BV, TOP
    )
    if dweight is not None:
        P: tl.constexpr = F // 2 if ACT == MIRRORED else F
        BP: tl.constexpr = BF // 2 if ACT == MIRRORED else BF
        dw = tl.zeros([BDF, BP], tl.float32)
        dw1 = tl.zeros([BDF, BP], tl.float32)
        dc = tl.zeros([BP], tl.float32)
        dc1 = tl.zeros([BP], tl.float32)

    begin = s * (segment // C)
    end = tl.minimum(begin + segment // C, tl.cdiv(length, C))
    local = tl.arange(0, C)
    for step in range(0, end - begin):
        first = (end - 1 - step) * C
        rows = first + local
        valid = rows < length
        counts = valid
        if SINKS > 0:
            counts = valid & (base + rows >= SINKS)
        g = tl.zeros([C], tl.float64)
        gate = tl.full([], 0.0, tl.float32)
        to_end = tl.zeros([C], tl.float32)
        if DECAY:
            g, gate64 = gates(decay, first, decay_t, valid)
            gate += gate64.to(tl.float32)
            to_end = (gate64 - g).to(tl.float32)

        # The memory: all queries of later chunks.
        xv = load_rows(v, first, v_t, valid, V, BV).to(OT)
        xk = load_rows(kf, first, kf_t, valid, DF, BDF)
        phi_k, log_k = features(
            xk, kw0, kw1, kl0, kl1, kc0, kc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
        )
        if key_log is not None:
            log_k = tl.load(column(key_log + key_stat, first, kv_heads, C), mask=valid, other=0.0)
        phi_kt = phi_k.to(OT)
        low = R.to(OT)
        dxv = tl.dot(phi_kt, tl.trans(low), input_precision=PRECISION)
        dphi = tl.dot(xv, low, input_precision=PRECISION)
        dphi += counts.to(tl.float32)[:, None] * tl.sum(z, 0)[None, :]
        if SINKS > 0 or DECAY or TOP:
            log_m = to_end
            if TOP:
                log_m += m
            if KLOG:
                log_m += log_k
            factor = exp(tl.where(counts, tl.minimum(log_m, LARGEST_EXPONENT), EMPTY))
            dxv = dxv * factor[:, None]
            dphi = dphi * factor[:, None]

        # This chunk, token by token; then its queries join the memory.
        if QUERIES:
            at = first + GAP
            there = rows + GAP < length
            seen = local[None, :] >= local[:, None]
            if SINKS > 0:
                seen = seen & counts[:, None]
            for group in range(G):
                head = kv_head * G + group
                stat = origin * H + head
                xdo = load_rows(do + stat * V, at, H * V, there, V, BV).to(OT)
                row_delta = tl.load(column(delta + stat, at, H, C), mask=there, other=0.0)
                if G > 1:
                    qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
                        query_weight, query_low, query_bias, tl.where(query_map_heads == 1, 0, head),
                        query_map_heads, DF, F, BDF, BF, ACT,
                    )  # fmt: skip
                xq = load_rows(qf + head * qf_h, at, qf_t, there, DF, BDF)
                phi_q, log_q = features(
                    xq, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
                )
                phi_q = phi_q.to(OT)
                relative = tl.zeros([C], tl.float32)
                weighs = there
                if TOP:
                    row_top = tl.load(column(top + stat, at, H, C), mask=there, other=EMPTY)
                    weighs = row_top > EMPTY / 4
                    if query_log is not None:
                        log_q = tl.load(column(query_log + stat, at, H, C), mask=there, other=0.0)
                    if far_bias is not None:
                        log_q += tl.load(far_bias + head)
                    if lag is not None:
                        log_q += tl.load(column(lag + key_stat, at, kv_heads, C), mask=there, other=0.0)
                    relative = tl.where(weighs, log_q - row_top, 0.0)
                kernel = tl.dot(phi_kt, tl.trans(phi_q), input_precision=PRECISION)
                e = tl.dot(xv, tl.trans(xdo), input_precision=PRECISION) - row_delta[None, :]
                if DECAY or TOP:
                    exponent = relative[None, :]
                    if DECAY:
                        exponent -= differences(g)
                    if KLOG:
                        exponent += log_k[:, None]
                    weight = exp(tl.where(seen, tl.minimum(exponent, LARGEST_EXPONENT), EMPTY))
                    kernel = kernel * weight
                    e = e * weight
                else:
                    kernel = tl.where(seen, kernel, 0.0)
                    e = tl.where(seen, e, 0.0)
                dxv = tl.dot(kernel.to(OT), xdo, dxv, input_precision=PRECISION)
                dphi = tl.dot(e.to(OT), phi_q, dphi, input_precision=PRECISION)
                if DECAY:
                    joined = tl.where(group == 0, gate, 0.0)
                else:
                    joined = 0.0
                R, z, m = fold_chunk(
                    R, z, m, phi_q, xdo, g.to(tl.float32) + relative, weighs, -row_delta, joined,
                    TOP, DECAY, False, OT, PRECISION,
                )  # fmt: skip
        elif DECAY:
            # What reads an earlier chunk stands further from it by this chunk's gates.
            if TOP:
                m += gate
            else:
                R = R * exp(gate)
                z = z * exp(gate)

        store_rows(dv + key_stat * V, first, kv_heads * V, valid, dxv, V, BV)
        if dlog is not None:
            tl.store(column(dlog + key_stat, first, kv_heads, C), tl.sum(phi_kt * dphi, 1), mask=valid)
        dx, dz, dz1 = features_backward(
            xk, phi_kt.to(tl.float32), dphi, kw0, kw1, kl0, kl1, kc0, kc1, norm, ACT, PROJECT, LOW, BIAS, OT, PRECISION
        )
        if dweight is not None:
            xt = tl.trans(xk.to(OT))
            dw = tl.dot(xt, dz.to(OT), dw, input_precision=PRECISION)
            if BIAS:
                dc += tl.sum(dz, 0)
            if ACT == PRODUCT:
                dw1 = tl.dot(xt, dz1.to(OT), dw1, input_precision=PRECISION)
                if BIAS:
                    dc1 += tl.sum(dz1, 0)
        store_rows(dk + key_stat * DF, first, kv_heads * DF, valid, dx, DF, BDF)

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
