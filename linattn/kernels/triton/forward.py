"""The far part's forward pass: one program walks one segment of one head, chunk by chunk, with the memory in registers.

Chunks are of keys. A query that finds keys far from GAP tokens on stands in the chunk of its newest far key: chunk i
belongs to the queries GAP rows later, and everything below is the operator without a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton.device import (
    EMPTY,
    column,
    differences,
    exp,
    gates,
    join,
    load_map,
    load_memory,
    load_rows,
    locate,
    locate_slice,
    mass_of,
    normalise,
    operand_features,
    rounded,
    store_output,
    store_rows,
    weigh,
)

LEAST_MASS = tl.constexpr(1e-34)
"""A row whose far mass is below this has no weight: its output is zero."""


@triton.jit
def attend_kernel(
    v, v_b, v_t: tl.constexpr, v_h,
    qf, qf_b, qf_t: tl.constexpr, qf_h,
    kf, kf_b, kf_t: tl.constexpr, kf_h,
    query_weight, key_weight, query_map_heads, key_map_heads, query_bias, key_bias,
    query_log, key_log, far_bias, lag,
    gate_sums, steep,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    out_num, out_mass, out_log, out_far,
    out, residual, out_top, out_rden, out_relative,
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
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and normaliser or, if there is ``out_num``, sums, mass and log-scales of the far part alone.

    ``gate_sums``, ``steep``: see ``fold.gate_kernel``; EXACT takes the steep segments and no others.
    ``lag [B, T, Hkv]``: each query's log-decay over the GAP tokens behind it. ``out_log`` is the queries' own
    log-scale, ``out_far`` that of their sums beside it. Each program has BV of the values' columns; the first of a
    head's writes what belongs to rows.
    """
    head, left = locate_slice(tl.program_id(0), V, BV)
    pid = tl.program_id(1)
    kv_head = head // G
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    kv_heads = H // G
    DECAY: tl.constexpr = gate_sums is not None
    PROJECT: tl.constexpr = query_weight is not None
    BIAS: tl.constexpr = query_bias is not None
    PARTIAL: tl.constexpr = out_num is not None
    stat = origin * H + head
    key_stat = origin * kv_heads + kv_head
    if key_log is not None:
        key_log += key_stat
    if query_log is not None:
        query_log += stat

    v += row64 * v_b + start * v_t + kv_head * v_h + left
    if state_kv is not None:
        state_kv += left
    qf += row64 * qf_b + start * qf_t + head * qf_h
    kf += row64 * kf_b + start * kf_t + kv_head * kf_h
    qw0, qw1, ql0, ql1, qc0, qc1 = load_map(
        query_weight, query_bias, tl.where(query_map_heads == 1, 0, head), query_map_heads, DF, F, BDF, BF, ACT, OT
    )
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
    for i in range(begin, end):
        first = i * C
        rows = first + local
        at = first + GAP  # its queries
        there = rows + GAP < length
        xq = load_rows(qf, at, qf_t, there, DF, BDF)
        given_q = None
        if query_log is not None:
            given_q = tl.load(column(query_log, at, H, C), mask=there, other=0.0)

        # The keys of this chunk. Unless PAIRWISE, the weight of a pair is one factor of its key and one of its query,
        # both relative to the chunk's end.
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
        phi_q, log_q = operand_features(
            xq, given_q, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant,
            F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, None,
        )  # fmt: skip
        num = tl.dot(phi_q, tl.trans(S.to(OT)), input_precision=PRECISION)
        mass = mass_of(phi_q, z, OT, PRECISION)
        far = tl.zeros([C], tl.float32)
        if PAIRWISE:
            far += m

        # This chunk, token by token; then it joins the memory.
        if KEYS:
            seen = local[:, None] >= local[None, :]
            kernel = tl.dot(phi_q, tl.trans(phi_k), input_precision=PRECISION)
            if PAIRWISE:
                if SINKS > 0:
                    seen = seen & counts[None, :]
                log_w = tl.zeros([C, C], tl.float32) + log_k[None, :]
                log_weight = log_k
                step = 0.0
                if DECAY:
                    far += g
                    log_w += differences(g, g_low)
                    log_weight += to_end
                    step = gate
                log_w = tl.where(seen, log_w, EMPTY)
                new = tl.maximum(tl.maximum(far, tl.max(log_w, 1)), EMPTY / 2)
                scale = exp(far - new)
                far = new
                kernel = kernel * exp(log_w - new[:, None])
                num = num * scale[:, None]
                mass = mass * scale
                weight, keep, m = weigh(m, log_weight, counts, step, True)
                phi_k = (phi_k.to(tl.float32) * weight[:, None]).to(OT)
                S = S * keep
                z = z * keep
            else:
                kernel = tl.where(seen, kernel, 0.0)
                if DECAY:
                    far += g - gate
            # The normaliser sums what the products see, so that equal values average to themselves.
            kernel = rounded(kernel, OT)
            mass += tl.sum(kernel, 1)
            num = tl.dot(kernel.to(OT), xv, num, input_precision=PRECISION)
            S, z = join(S, z, phi_k, xv, counted, True, OT, PRECISION)

        if far_bias is not None:
            log_q += tl.load(far_bias + head)
        if lag is not None:
            log_q += tl.load(column(lag + key_stat, at, kv_heads, C), mask=there, other=0.0)
        leads = rows + GAP < tl.where(left == 0, length, 0)
        if PARTIAL:
            tl.store(column(out_mass + stat, at, H, C), mass, mask=leads)
            tl.store(column(out_log + stat, at, H, C), log_q, mask=leads)
            if KLOG or DECAY:
                tl.store(column(out_far + stat, at, H, C), far, mask=leads)
            store_rows(out_num + stat * V + left, at, H * V, there, num, V, BV)
        else:
            if KLOG:
                nothing = tl.zeros([C], tl.float32)
                num, top, rden = normalise(
                    tl.zeros([C, BV], tl.float32), nothing, nothing + EMPTY, num, mass, log_q + far, 0.0, True, False
                )
                relative = tl.where(rden == 0, EMPTY, log_q - top)
                tl.store(column(out_top + stat, at, H, C), top, mask=leads)
                tl.store(column(out_relative + stat, at, H, C), relative, mask=leads)
            else:
                weighs = tl.abs(mass) > LEAST_MASS
                rden = tl.where(weighs, 1.0 / tl.where(weighs, mass, 1.0), 0.0)
                num = num * rden[:, None]
                if DECAY:
                    rden = rden * exp(-far)
            tl.store(column(out_rden + stat, at, H, C), rden, mask=leads)
            place = stat * V + left
            store_output(out + place, None if residual is None else residual + place, at, H * V, there, num, V, BV)


@triton.jit
def features_kernel(
    x, x_b, x_t: tl.constexpr, x_h,
    weight, map_heads, bias,
    out, out_log,
    norm, constant, T, spans, span,
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
    """A feature map by itself: features ``[B, T, H, F]`` and, if there is ``out_log``, log-scales ``[B, T, H]``.

    One program takes ``span`` tokens of one head.
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
    for i in range(0, tl.cdiv(end - begin, C)):
        first = begin + i * C
        valid = first + tl.arange(0, C) < end
        xs = load_rows(x, first, x_t, valid, D, BD)
        phi, logs = operand_features(
            xs, None, w0, w1, l0, l1, c0, c1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, None
        )
        store_rows(out + stat * F, first, H * F, valid, phi, F, BF)
        if out_log is not None:
            tl.store(column(out_log + stat, first, H, C), logs, mask=valid)
