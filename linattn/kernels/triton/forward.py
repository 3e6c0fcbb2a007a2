"""The forward pass: one program walks one segment of one head, chunk by chunk, with the memory in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton.device import (
    DENOMINATOR_FLOOR,
    EMPTY,
    FAR_FLOOR,
    differences,
    exp,
    features,
    fold_chunk,
    gates,
    load_map,
    load_memory,
    load_rows,
    locate,
    store_rows,
    unseen,
)

LEAST_MASS = tl.constexpr(1e-34)
"""A row whose far mass is below this has no weight: its output is zero."""


@triton.jit
def exact_logits(
    q, k, seen, scale, softcap, SOFTCAP: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Softmax logits ``[C, N]``, EMPTY where not ``seen``."""
    s = tl.dot(q.to(OT), tl.trans(k.to(OT)), input_precision=PRECISION) * scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return tl.where(seen, s, EMPTY)


@triton.jit
def tanh(x):
    e = exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def accumulate(acc, den, top, s, v, OT: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax: one more block of logits ``s [C, N]`` and values ``v [N, BV]``."""
    new = tl.maximum(top, tl.max(s, 1))
    new = tl.maximum(new, EMPTY / 2)
    keep = exp(top - new)
    p = exp(s - new[:, None]).to(OT)
    den = den * keep + tl.sum(p.to(tl.float32), 1)
    acc = acc * keep[:, None] + tl.dot(p, v.to(OT), input_precision=PRECISION)
    return acc, den, new


@triton.jit
def attend_kernel(
    q, q_b, q_t, q_h,
    k, k_b, k_t, k_h,
    v, v_b, v_t, v_h,
    qf, qf_b, qf_t, qf_h,
    kf, kf_b, kf_t, kf_h,
    query_weight, key_weight, query_low, key_low, query_map_heads, key_map_heads, query_bias, key_bias,
    query_log, key_log, far_bias, sink_logits,
    decay, decay_b, decay_t, decay_h,
    sink_k, sink_v,
    state_kv, state_k, state_m,
    starts, lengths, bases, seg_sequence, seg_first,
    out, residual, out_top, out_rden,
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
    NEAR_BLOCKS: tl.constexpr = WINDOW // C  # blocks that lie in every query's window
    REACH: tl.constexpr = (WINDOW + C - 2) // C if WINDOW > 1 else 0
    LEAST: tl.constexpr = 1 if STRICT else 0  # tokens between a query and the newest key it sees
    FAR_GAP: tl.constexpr = WINDOW if WINDOW > LEAST else LEAST

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

    first = s * (segment // C)
    last = tl.minimum(first + segment // C, tl.cdiv(length, C))
    for i in range(first, last):
        rows = i * C + tl.arange(0, C)
        valid = rows < length
        stat = (origin * H + head) + rows.to(tl.int64) * H
        xq = load_rows(q, rows, q_t, valid, D, BD) if NEAR else 0.0
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

        # The exact part: whole blocks of the window.
        acc = tl.zeros([C, BV], tl.float32)
        den = tl.zeros([C], tl.float32)
        top = tl.full([C], EMPTY, tl.float32)
        if KEYS:
            if NEAR_BLOCKS > 0:
                for j in range(0, NEAR_BLOCKS):
                    key_rows = rows - j * C
                    key_valid = (key_rows >= 0) & (key_rows < length)
                    xk = load_rows(k, key_rows, k_t, key_valid, D, BD)
                    xv = load_rows(v, key_rows, v_t, key_valid, V, BV)
                    seen = rows[:, None] >= unseen(key_rows, key_valid)[None, :] + LEAST
                    logits = exact_logits(xq, xk, seen, scale, softcap, SOFTCAP, OT, PRECISION)
                    acc, den, top = accumulate(acc, den, top, logits, xv, OT, PRECISION)
                    if DECAY:
                        if j > 0:
                            _, passed = gates(decay, key_rows, decay_t, key_valid)
                            between += passed

        # The memory: everything before the blocks that the window's edge crosses.
        num = tl.zeros([C, BV], tl.float32)
        mass = tl.zeros([C], tl.float32)
        far_top = tl.zeros([C], tl.float32)
        if FAR:
            xf = load_rows(qf, rows, qf_t, valid, DF, BDF)
            phi_q, log_q = features(
                xf, qw0, qw1, ql0, ql1, qc0, qc1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
            )
            phi_q = phi_q.to(OT)
            if query_log is not None:
                log_q = tl.load(query_log + stat, mask=valid, other=0.0)
            num = tl.dot(phi_q, tl.trans(S.to(OT)), input_precision=PRECISION)
            mass = tl.sum(phi_q.to(tl.float32) * z[None, :], 1)
            if KLOG:
                far_top += m
            if DECAY:
                since = (g + lag).to(tl.float32)
                if KLOG:
                    far_top += since
                else:
                    num = num * exp(since)[:, None]
                    mass = mass * exp(since)

        # Those blocks: near and far, token by token.
        if KEYS:
            for j in tl.static_range(NEAR_BLOCKS, REACH + 1):
                key_rows = rows - j * C
                key_valid = (key_rows >= 0) & (key_rows < length)
                xv = load_rows(v, key_rows, v_t, key_valid, V, BV)
                if WINDOW > 0:
                    xk = load_rows(k, key_rows, k_t, key_valid, D, BD)
                    seen = rows[:, None] >= (unseen(key_rows, key_valid) if j > 0 else key_rows)[None, :] + LEAST
                    seen = seen & (rows[:, None] < key_rows[None, :] + WINDOW)
                    logits = exact_logits(xq, xk, seen, scale, softcap, SOFTCAP, OT, PRECISION)
                    acc, den, top = accumulate(acc, den, top, logits, xv, OT, PRECISION)
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
                    kernel = tl.dot(phi_q, tl.trans(phi_k), input_precision=PRECISION)
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
                        log_w = tl.where(is_far, log_w, EMPTY)
                        new = tl.maximum(tl.maximum(far_top, tl.max(log_w, 1)), EMPTY / 2)
                        keep = exp(far_top - new)
                        num = num * keep[:, None]
                        mass = mass * keep
                        far_top = new
                        kernel = kernel * exp(log_w - new[:, None])
                    else:
                        if DECAY:
                            kernel = kernel * exp(tl.where(is_far, log_w, EMPTY))
                        else:
                            kernel = tl.where(is_far, kernel, 0.0)
                    # The normaliser sums what the products see, so that equal values average to themselves.
                    kernel = kernel.to(OT)
                    mass += tl.sum(kernel.to(tl.float32), 1)
                    num = tl.dot(kernel, xv.to(OT), num, input_precision=PRECISION)

        # The newest block that every later query finds far joins the memory.
        if FAR and KEYS:
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
            logits = exact_logits(xq, sk, seen, scale, softcap, SOFTCAP, OT, PRECISION)
            acc, den, top = accumulate(acc, den, top, logits, sv, OT, PRECISION)

        # One normaliser.
        if TOP:
            if FAR:
                log_far = far_top + log_q
                if far_bias is not None:
                    log_far += tl.load(far_bias + head)
                new = tl.maximum(top, log_far + tl.log(tl.maximum(tl.abs(mass), FAR_FLOOR)))
            else:
                new = top
            if sink_logits is not None:
                sink_logit = tl.load(sink_logits + head).to(tl.float32)
                new = tl.maximum(new, sink_logit)
            new = tl.maximum(new, EMPTY / 2)
            keep = exp(top - new)
            acc = acc * keep[:, None]
            den = den * keep
            if FAR:
                take = exp(log_far - new)
                acc += num * take[:, None]
                den += mass * take
            if sink_logits is not None:
                den += exp(sink_logit - new)
            small = tl.where(den < 0, -DENOMINATOR_FLOOR, DENOMINATOR_FLOOR)
            rden = 1.0 / tl.where(tl.abs(den) < DENOMINATOR_FLOOR, small, den)
            rden = tl.where(new > EMPTY / 4, rden, 0.0)
            tl.store(out_top + stat, new, mask=valid)
        else:
            acc = num
            there = tl.abs(mass) > LEAST_MASS
            rden = tl.where(there, 1.0 / tl.where(there, mass, 1.0), 0.0)
        tl.store(out_rden + stat, rden, mask=valid)
        acc = acc * rden[:, None]
        store_rows(out + (origin * H + head) * V, rows, H * V, valid, acc, V, BV)
        if residual is not None:
            lost = acc - acc.to(out.dtype.element_ty).to(tl.float32)
            store_rows(residual + (origin * H + head) * V, rows, H * V, valid, lost, V, BV)
