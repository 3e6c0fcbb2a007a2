"""The far part's backward pass: queries in order with the keys' memory, keys in reverse with the queries' memory.

With p_ti the normalised weight of key i for query t, do_t the output's gradient and δ_t = do_t · o_t, everything comes
from e_ti = do_t · v_i − δ_t: the gradient of a logit is p_ti e_ti, and that of a log-scale the sum of those it enters.
One over the normaliser goes into the queries' features where these pass through registers anyway (``rden``), and into
do beforehand where not.
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
    gates,
    join,
    load_map,
    load_memory,
    load_rows,
    locate,
    locate_slice,
    operand_features,
    store_rows,
    weigh,
)

LARGEST_EXPONENT = tl.constexpr(80.0)
"""Exponents stop here: beyond, the kernel value they multiply has underflowed."""


@triton.jit
def delta_kernel(
    out, residual, dout, rden, scaled, delta, rows,
    V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """δ = o · do of R rows, zero where the normaliser was clamped: no gradient there.

    ``scaled``, if it is wanted: do over the normaliser. δ is then made from it as it was rounded: an error in δ would
    be one in every weight of its row. So ``residual``, what rounding took from ``out``, enters, too.
    """
    first = tl.program_id(0).to(tl.int64) * R
    at = first + tl.arange(0, R)
    valid = at < rows
    o = load_rows(out, first, V, valid, V, BV).to(tl.float32)
    if residual is not None:
        o += load_rows(residual, first, V, valid, V, BV).to(tl.float32)
    if rden is not None:
        weight = tl.load(rden + at, mask=valid, other=0.0)
    do = load_rows(dout, first, V, valid, V, BV).to(tl.float32)
    if scaled is not None:
        do = (do * weight[:, None]).to(scaled.dtype.element_ty)
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
    key_weight, key_map_heads, key_bias,
    key_log,
    gate_sums, steep,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    do, relative, delta, rden,
    dphi_q, dlog,
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
    LOW: tl.constexpr,
    KLOG: tl.constexpr,
    TOP: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries' features ``[B, T, H, F]``, and of the log-scales of given ones (``dlog``).

    The program of a sequence's first segment writes zeros for queries that find no far keys.

    Of given features without ``dlog`` each program may have BF columns.
    """
    head, left = locate_slice(tl.program_id(0), F, BF)
    pid = tl.program_id(1)
    kv_head = head // G
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    DECAY: tl.constexpr = gate_sums is not None
    PROJECT: tl.constexpr = key_weight is not None
    BIAS: tl.constexpr = key_bias is not None
    stat = origin * H + head
    key_stat = origin * kv_heads + kv_head
    if key_log is not None:
        key_log += key_stat

    v += row64 * v_b + start * v_t + kv_head * v_h
    kf += row64 * kf_b + start * kf_t + kv_head * kf_h + left
    if state_kv is not None:
        state_kv += left * V
        state_k += left
    kw0, kw1, kl0, kl1, kc0, kc1 = load_map(
        key_weight, key_bias, tl.where(key_map_heads == 1, 0, kv_head), key_map_heads, DF, F, BDF, BF, ACT, OT
    )
    if DECAY:
        gate_sums += key_stat
    place = pid.to(tl.int64) * kv_heads + kv_head
    if steep is not None:
        if (tl.load(steep + place) != 0) != EXACT:
            return
    PAIRWISE: tl.constexpr = KLOG or EXACT
    S, z, m = load_memory(state_kv, state_k, state_m, place, s > 0 if FIRST_EMPTY else s >= 0, F, V, BF, BV, KLOG)

    begin = s * (segment // C)
    end = tl.minimum(begin + segment // C, tl.cdiv(length - GAP, C))
    last = tl.minimum((s + 1) * segment, length) - 1
    local = tl.arange(0, C)
    if GAP > 0:
        for i in range(0, tl.where(s == 0, tl.cdiv(GAP, C), 0)):
            first = (begin + i) * C
            near = first + local < tl.minimum(GAP, length)
            store_rows(dphi_q + stat * F + left, first, H * F, near, tl.zeros([C, BF], tl.float32), F, BF)
            if dlog is not None:
                tl.store(column(dlog + stat, first, H, C), tl.zeros([C], tl.float32), mask=near)
    for i in range(begin, end):
        first = i * C
        rows = first + local
        at = first + GAP  # its queries
        there = rows + GAP < length
        xdo = load_rows(do + stat * V, at, H * V, there, V, BV).to(OT)
        row_delta = tl.load(column(delta + stat, at, H, C), mask=there, other=0.0)
        log_row = tl.zeros([C], tl.float32)
        if TOP:
            log_row += tl.load(column(relative + stat, at, H, C), mask=there, other=EMPTY)
        row_factor = tl.full([C], 1.0, tl.float32)
        if rden is not None:
            row_factor = tl.load(column(rden + stat, at, H, C), mask=there, other=0.0)

        # The keys of this chunk, as in the forward pass.
        if KEYS:
            valid = rows < length
            counts = valid
            if SINKS > 0:
                counts = valid & (base + rows >= SINKS)
            counted = counts.to(tl.float32)
            xk = load_rows(kf, first, kf_t, valid, DF, BDF)
            xv = load_rows(v, first, v_t, valid, V, BV).to(OT)
            given_k = None
            if key_log is not None:
                given_k = tl.load(column(key_log, first, kv_heads, C), mask=valid, other=0.0)
            weight = None
            if DECAY:
                g, g_low, to_end, gate = gates(gate_sums, first, s * segment, last, kv_heads, C)
            if not PAIRWISE:
                if DECAY:
                    weight = exp(tl.where(counts, to_end, EMPTY))
                    S = S * exp(gate)
                    z = z * exp(gate)
                elif SINKS > 0:
                    weight = counted
            phi_k, log_k = operand_features(
                xk, given_k, kw0, kw1, kl0, kl1, kc0, kc1, norm, constant,
                F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, weight,
            )  # fmt: skip

        # The memory: all earlier chunks.
        dphi = tl.dot(xdo, S.to(OT), input_precision=PRECISION)
        dphi -= row_delta[:, None] * tl.sum(z, 0)[None, :]
        log_m = log_row
        if PAIRWISE:
            log_m += m

        # This chunk, token by token; then it joins the memory.
        if KEYS:
            e = tl.dot(xdo, tl.trans(xv), input_precision=PRECISION) - row_delta[:, None]
            seen = local[:, None] >= local[None, :]
            if PAIRWISE:
                if SINKS > 0:
                    seen = seen & counts[None, :]
                log_w = tl.zeros([C, C], tl.float32) + log_k[None, :] + log_row[:, None]
                log_weight = log_k
                step = 0.0
                if DECAY:
                    log_m += g
                    log_w += differences(g, g_low)
                    log_weight += to_end
                    step = gate
                e = e * exp(tl.where(seen, tl.minimum(log_w, LARGEST_EXPONENT), EMPTY))
                dphi = dphi * exp(tl.minimum(log_m, LARGEST_EXPONENT))[:, None]
                dphi = tl.dot(e.to(OT), phi_k, dphi, input_precision=PRECISION)
                if rden is not None:
                    dphi = dphi * row_factor[:, None]
                weight, keep, m = weigh(m, log_weight, counts, step, True)
                phi_k = (phi_k.to(tl.float32) * weight[:, None]).to(OT)
                S = S * keep
                z = z * keep
            else:
                e = tl.where(seen, e, 0.0)
                if DECAY:
                    log_row += g - gate
                dphi = tl.dot(e.to(OT), phi_k, dphi, input_precision=PRECISION)
                if TOP or DECAY:
                    row_factor *= exp(tl.minimum(log_row, LARGEST_EXPONENT))
                if (TOP or DECAY) or rden is not None:
                    dphi = dphi * row_factor[:, None]
            S, z = join(S, z, phi_k, xv, counted, True, OT, PRECISION)
        else:
            if TOP:
                row_factor *= exp(tl.minimum(log_m, LARGEST_EXPONENT))
            if TOP or rden is not None:
                dphi = dphi * row_factor[:, None]

        if dlog is not None:
            xq = load_rows(qf + row64 * qf_b + start * qf_t + head * qf_h, at, qf_t, there, F, BF)
            tl.store(column(dlog + stat, at, H, C), tl.sum(xq.to(tl.float32) * dphi, 1), mask=there)
        store_rows(dphi_q + stat * F + left, at, H * F, there, dphi, F, BF)


@triton.jit
def from_memory(x, R, z, factor, OT: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of ``x R``, plus the sum of the rows of ``z``, times ``factor [C]``; None counts as nothing."""
    found = tl.dot(x, R.to(OT), input_precision=PRECISION)
    if z is not None:
        found += tl.sum(z, 0)[None, :]
    if factor is not None:
        found = found * factor[:, None]
    return found


@triton.jit
def dkv_kernel(
    v, v_b, v_t: tl.constexpr, v_h,
    qf, qf_b, qf_t: tl.constexpr, qf_h,
    kf, kf_b, kf_t: tl.constexpr, kf_h,
    query_weight, key_weight, query_map_heads, key_map_heads, query_bias, key_bias,
    key_log,
    gate_sums, steep,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    do, relative, delta, rden,
    dphi_k, dv, dlog,
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
    LOW: tl.constexpr,
    KLOG: tl.constexpr,
    TOP: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The far part's gradients of the keys' features ``[B, T, Hkv, F]``, of given ones' log-scales, and of the values.

    Tiles are ``[keys, queries]``. Without QUERIES the state is all that reads the keys: it holds the gradient of a
    final memory. FACTORED weights of pairs are one factor of the key and one of the query, relative to the chunk's
    start. Each program has BV columns of the values and BF of the features, and those of the other ones whole; what is
    None is not computed.
    """
    kv_head, v_left = locate_slice(tl.program_id(0), V, BV)
    kv_head, f_left = locate_slice(kv_head, F, BF)
    pid = tl.program_id(1)
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    DECAY: tl.constexpr = gate_sums is not None
    PROJECT: tl.constexpr = key_weight is not None
    BIAS: tl.constexpr = key_bias is not None
    FACTORED: tl.constexpr = (QUERIES and not KLOG) and not EXACT
    # Unless both have log-scales, far weights have the scale of rows, and no memory leaves the range of numbers.
    LOG: tl.constexpr = TOP and KLOG
    SINGLE: tl.constexpr = (QUERIES and G == 1) and C > 32  # one query head: what needs most registers comes last
    key_stat = origin * kv_heads + kv_head
    if key_log is not None:
        key_log += key_stat

    v += row64 * v_b + start * v_t + kv_head * v_h + v_left
    kf += row64 * kf_b + start * kf_t + kv_head * kf_h + f_left
    if state_kv is not None:
        state_kv += f_left * V + v_left
        state_k += f_left
    kw0, kw1, kl0, kl1, kc0, kc1 = load_map(
        key_weight, key_bias, tl.where(key_map_heads == 1, 0, kv_head), key_map_heads, DF, F, BDF, BF, ACT, OT
    )
    if QUERIES:
        qf += row64 * qf_b + start * qf_t + f_left
        if G == 1:
            qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
                query_weight,
                query_bias,
                tl.where(query_map_heads == 1, 0, kv_head),
                query_map_heads,
                DF,
                F,
                BDF,
                BF,
                ACT,
                OT,
            )
    if DECAY:
        gate_sums += key_stat

    place = pid.to(tl.int64) * kv_heads + kv_head
    if steep is not None:
        if (tl.load(steep + place) != 0) != EXACT:
            return
    R, z, m = load_memory(
        state_kv, state_k, state_m, place, s < segments - 1 if LAST_EMPTY else s >= 0, F, V, BF, BV, LOG
    )

    begin = s * (segment // C)
    end = tl.minimum(begin + segment // C, tl.cdiv(length, C))
    last = tl.minimum((s + 1) * segment, length) - 1
    local = tl.arange(0, C)
    for step in range(0, end - begin):
        first = (end - 1 - step) * C
        rows = first + local
        valid = rows < length
        counts = valid
        if SINKS > 0:
            counts = valid & (base + rows >= SINKS)
        at = first + GAP
        there = rows + GAP < length
        xk = load_rows(kf, first, kf_t, valid, DF, BDF)
        xv = load_rows(v, first, v_t, valid, V, BV).to(OT)
        given_k = None
        if key_log is not None:
            given_k = tl.load(column(key_log, first, kv_heads, C), mask=valid, other=0.0)
        if SINGLE:
            xq = load_rows(qf + kv_head * qf_h, at, qf_t, there, DF, BDF)
            xdo = load_rows(do + (origin * H + kv_head) * V + v_left, at, H * V, there, V, BV).to(OT)
        g = tl.zeros([C], tl.float32)
        g_low = g
        to_end = g
        gate = tl.full([], 0.0, tl.float32)
        if DECAY:
            g, g_low, to_end, gate = gates(gate_sums, first, s * segment, last, kv_heads, C)

        key_factor = None
        if FACTORED and DECAY:
            R = R * exp(gate)
            z = z * exp(gate)
            key_factor = exp(tl.where(counts, tl.minimum(-g, LARGEST_EXPONENT), EMPTY))
        elif FACTORED and SINKS > 0:
            key_factor = counts.to(tl.float32)

        # The memory: all queries of later chunks.
        phi_k, log_k = operand_features(
            xk, given_k, kw0, kw1, kl0, kl1, kc0, kc1, norm, constant,
            F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, key_factor,
        )  # fmt: skip
        factor = None
        if not FACTORED:
            log_m = to_end
            if LOG:
                log_m += m
            if KLOG:
                log_m += log_k
            factor = exp(tl.where(counts, tl.minimum(log_m, LARGEST_EXPONENT), EMPTY))
        if SINGLE:
            dxv = tl.zeros([C, BV], tl.float32)
            dphi = tl.zeros([C, BF], tl.float32)
        else:
            dxv = from_memory(phi_k, tl.trans(R), None, factor, OT, PRECISION)
            dphi = from_memory(xv, R, z, factor, OT, PRECISION)

        # This chunk, token by token; then its queries join the memory.
        if QUERIES:
            seen = local[None, :] >= local[:, None]
            for group in range(G):
                head = kv_head * G + group
                stat = origin * H + head
                if not SINGLE:
                    xq = load_rows(qf + head * qf_h, at, qf_t, there, DF, BDF)
                    xdo = load_rows(do + stat * V + v_left, at, H * V, there, V, BV).to(OT)
                row_delta = tl.load(column(delta + stat, at, H, C), mask=there, other=0.0)
                log_row = tl.zeros([C], tl.float32)
                weighs = there
                if TOP:
                    log_row += tl.load(column(relative + stat, at, H, C), mask=there, other=EMPTY)
                    weighs = log_row > EMPTY / 4
                query_factor = None
                if FACTORED and (TOP or DECAY):
                    query_factor = exp(tl.where(weighs, log_row + g, EMPTY))
                if rden is not None:
                    share = tl.load(column(rden + stat, at, H, C), mask=there, other=0.0)
                    query_factor = share if query_factor is None else query_factor * share
                if G > 1:
                    qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
                        query_weight, query_bias, tl.where(query_map_heads == 1, 0, head), query_map_heads,
                        DF, F, BDF, BF, ACT, OT,
                    )  # fmt: skip
                phi_q, _ = operand_features(
                    xq, None, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant,
                    F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, query_factor,
                )  # fmt: skip
                e = tl.dot(xv, tl.trans(xdo), input_precision=PRECISION) - row_delta[None, :]
                kernel = tl.dot(phi_k, tl.trans(phi_q), input_precision=PRECISION)
                if not FACTORED:
                    pairs = seen & counts[:, None] if SINKS > 0 else seen
                    exponent = tl.zeros([C, C], tl.float32) + log_row[None, :]
                    if DECAY:
                        exponent -= differences(g, g_low)
                    if KLOG:
                        exponent += log_k[:, None]
                    weight = exp(tl.where(pairs, tl.minimum(exponent, LARGEST_EXPONENT), EMPTY))
                    kernel = kernel * weight
                    e = e * weight
                else:
                    kernel = tl.where(seen, kernel, 0.0)
                    e = tl.where(seen, e, 0.0)
                if SINGLE:
                    dxv = from_memory(phi_k, tl.trans(R), None, factor, OT, PRECISION)
                dxv = tl.dot(kernel.to(OT), xdo, dxv, input_precision=PRECISION)
                if SINGLE:
                    if dv is not None:
                        store_rows(dv + key_stat * V + v_left, first, kv_heads * V, valid, dxv, V, BV)
                    dphi = from_memory(xv, R, z, factor, OT, PRECISION)
                dphi = tl.dot(e.to(OT), phi_q, dphi, input_precision=PRECISION)
                if not FACTORED:
                    moved = tl.where(group == 0, gate, 0.0)
                    row_weight, keep, m = weigh(m, g + log_row, weighs, moved, LOG)
                    phi_q = (phi_q.to(tl.float32) * row_weight[:, None]).to(OT)
                    R = R * keep
                    z = z * keep
                R, z = join(R, z, phi_q, xdo, -row_delta, False, OT, PRECISION)
        elif DECAY:
            # What reads an earlier chunk stands further from it by this chunk's gates.
            if LOG:
                m += gate
            else:
                R = R * exp(gate)
                z = z * exp(gate)

        if dlog is not None:
            tl.store(column(dlog + key_stat, first, kv_heads, C), tl.sum(phi_k * dphi, 1), mask=valid)
        if dv is not None and not SINGLE:
            store_rows(dv + key_stat * V + v_left, first, kv_heads * V, valid, dxv, V, BV)
        if dphi_k is not None:
            if key_factor is not None:
                dphi = dphi * key_factor[:, None]
            store_rows(dphi_k + key_stat * F + f_left, first, kv_heads * F, valid, dphi, F, BF)


@triton.jit
def map_kernel(
    x, x_b, x_t: tl.constexpr, x_h,
    known, dphi, weight, map_heads, bias,
    dx, dlog, dweight, dbias,
    norm, T, spans, span,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    C: tl.constexpr,
    ACT: tl.constexpr,
    LOW: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through the feature map, from the gradient of features ``[B, T, H, F]`` to those of its input and weights.

    One program takes ``span`` tokens of one head; it writes its share of the gradient of the weights. ``known``: the
    features, if they are stored.
    """
    head = tl.program_id(0)
    pid = tl.program_id(1)
    batch = (pid // spans).to(tl.int64)
    begin = pid % spans * span
    end = tl.minimum(begin + span, T)
    PROJECT: tl.constexpr = weight is not None
    BIAS: tl.constexpr = bias is not None
    stat = batch * T * H + head
    x += batch * x_b + head * x_h
    w0, w1, l0, l1, c0, c1 = load_map(weight, bias, tl.where(map_heads == 1, 0, head), map_heads, D, F, BD, BF, ACT, OT)
    if dweight is not None:
        P: tl.constexpr = F // 2 if ACT == MIRRORED else F
        BP: tl.constexpr = BF // 2 if ACT == MIRRORED else BF
        dw = tl.zeros([BD, BP], tl.float32)
        dw1 = tl.zeros([BD, BP], tl.float32)
        dc = tl.zeros([BP], tl.float32)
        dc1 = tl.zeros([BP], tl.float32)
    for i in range(0, tl.cdiv(end - begin, C)):
        first = begin + i * C
        valid = first + tl.arange(0, C) < end
        xs = load_rows(x, first, x_t, valid, D, BD)
        d = load_rows(dphi + stat * F, first, H * F, valid, F, BF).to(tl.float32)
        if known is None:
            phi, _ = features(xs, w0, w1, l0, l1, c0, c1, norm, 0.0, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION)
        else:
            phi = load_rows(known + stat * F, first, H * F, valid, F, BF).to(tl.float32)
        if dlog is not None:
            tl.store(column(dlog + stat, first, H, C), tl.sum(phi * d, 1), mask=valid)
        dxs, dz, dz1 = features_backward(
            xs, phi, d, w0, w1, l0, l1, c0, c1, norm, ACT, PROJECT, LOW, BIAS, OT, PRECISION
        )
        if dweight is not None:
            xt = tl.trans(xs.to(OT))
            dw = tl.dot(xt, dz.to(OT), dw, input_precision=PRECISION)
            if BIAS:
                dc += tl.sum(dz, 0)
            if ACT == PRODUCT:
                dw1 = tl.dot(xt, dz1.to(OT), dw1, input_precision=PRECISION)
                if BIAS:
                    dc1 += tl.sum(dz1, 0)
        store_rows(dx + stat * D, first, H * D, valid, dxs, D, BD)
    if dweight is not None:
        store_map_gradient(dw, dw1, dc, dc1, dweight, dbias, pid.to(tl.int64) * H + head, D, P, BD, BP, BIAS, ACT)


@triton.jit
def sum_kernel(shares, out, rows, heads, parts, numbers, R: tl.constexpr, BLOCK: tl.constexpr):
    """``out [parts, heads, numbers]`` from ``shares [rows, heads, parts, numbers]``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < numbers
    head = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    shares += (head * parts + part) * numbers + at[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, R):
        row = first + tl.arange(0, R)
        pointers = shares + row.to(tl.int64)[:, None] * (heads * parts * numbers)
        total += tl.sum(tl.load(pointers, mask=(row < rows)[:, None] & there[None, :], other=0.0), 0)
    tl.store(out + (part * heads + head) * numbers + at, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def across_kernel(
    before_kv, before_k, before_m, after_kv, after_k, after_m, out, segments, heads,
    F: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What queries behind each segment read from before its end, by their output's gradient, ``out [segments, heads]``.

    The keys' memory before the next segment times the queries' after this one; of the last of all it is zero, and of
    the last of a sequence it means nothing. Log-scales are there for memories that have them.
    """
    head = tl.program_id(0)
    pid = tl.program_id(1)
    place = pid.to(tl.int64) * heads + head
    later = place + heads
    there = pid < segments - 1
    width = tl.where(there, F, 0)
    v = tl.arange(0, BV)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, F, ROWS):
        f = first + tl.arange(0, ROWS)
        inside = f < width
        mask = inside[:, None] & (v < V)[None, :]
        at = f[:, None] * V + v[None, :]
        S = tl.load(before_kv + later * F * V + at, mask=mask, other=0.0)
        S *= tl.load(after_kv + place * F * V + at, mask=mask, other=0.0)
        z = tl.load(before_k + later * F + f, mask=inside, other=0.0)
        z *= tl.load(after_k + place * F + f, mask=inside, other=0.0)
        total += tl.sum(tl.sum(S, 1) + z, 0)
    if before_m is not None:
        log = tl.load(before_m + later, mask=there, other=0.0)
        if after_m is not None:
            log += tl.load(after_m + place, mask=there, other=0.0)
        total *= exp(tl.minimum(log, LARGEST_EXPONENT))
    tl.store(out + place, total)


@triton.jit
def load_terms(d, slots, valid, head, heads, G: tl.constexpr):
    """``d [B, T, heads · G]`` of one head at ``slots``, summed over its G."""
    x = tl.zeros([slots.shape[0]], tl.float32)
    for g in tl.static_range(G):
        x += tl.load(d + (slots * heads + head) * G + g, mask=valid, other=0.0)
    return x.to(tl.float64)


@triton.jit
def decay_kernel(
    d, minus, boundaries, out, starts, lengths, bases, seg_sequence, seg_first, T, segments, segment, heads,
    G: tl.constexpr, GAP: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr,
    PLUS: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment's log-decays: what is read across each token, ``out [B, T, heads]``.

    That is what is read across the segment's end (``boundaries [segments, heads]`` of queries from GAP tokens behind it
    on, and ``d [B, T, heads · G]`` of those before them), plus Σ from the token to the end of ``d − minus``. What is
    read across the segment's begin is known, too, unless a STATE stands there: what rounding makes of the sum is
    spread over its terms, or it would add up along the sequence. Without PLUS the terms of ``d`` are zero.
    """
    head = tl.program_id(0)
    pid = tl.program_id(1)
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    begin = s * segment
    end = tl.minimum(begin + segment, length)
    origin = row.to(tl.int64) * T + start
    local = tl.arange(0, BLOCK)
    after = tl.full([], 0.0, tl.float64)
    before = after
    if boundaries is not None:
        after += tl.load(boundaries + pid.to(tl.int64) * heads + head, mask=end < length, other=0.0).to(tl.float64)
        earlier = boundaries + (pid - 1).to(tl.int64) * heads + head
        before += tl.load(earlier, mask=s > 0, other=0.0).to(tl.float64)
    drift = before - after
    for first in range(begin, end, BLOCK):
        at = first + local
        if PLUS:
            drift -= tl.sum(load_terms(d, origin + at + GAP, (at < end) & (at + GAP < length), head, heads, G), 0)
        drift += tl.sum(load_terms(minus, origin + at, at < end, head, heads, 1), 0)
    drift = drift / tl.maximum(end - begin, 1)
    if STATE:
        drift = tl.where(s > 0, drift, 0.0)
    if PLUS:
        for first in range(end, tl.minimum(end + GAP, length), BLOCK):
            at = first + local
            after += tl.sum(load_terms(d, origin + at, at < tl.minimum(end + GAP, length), head, heads, G), 0)
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(0, blocks):
        at = begin + (blocks - 1 - i) * BLOCK + local
        valid = at < end
        x = tl.where(valid, drift, 0.0) - load_terms(minus, origin + at, valid, head, heads, 1)
        if PLUS:
            x += load_terms(d, origin + at, valid, head, heads, G)
        total = tl.sum(x, 0)
        found = after + total - tl.cumsum(x, 0) + x
        tl.store(out + (origin + at) * heads + head, found.to(tl.float32), mask=valid)
        after += total
