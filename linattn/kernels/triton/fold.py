"""Memories of segments, and their running sums: what lets one long sequence fill a GPU.

``fold`` sums each segment by itself; ``scan`` turns the sums into the memory before (after, in reverse) each segment.
Keys fold into what queries read; in the backward pass queries fold, in reverse, into what keys read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton.device import (
    EMPTY,
    exp,
    features,
    fold_chunk,
    gates,
    load_map,
    load_memory,
    load_rows,
    locate,
)


@triton.jit
def fold_kernel(
    x, x_b, x_t, x_h,
    y, y_b, y_t, y_h,
    weight, low, map_heads, bias,
    log_scale, far_bias, top, delta,
    decay, decay_b, decay_t, decay_h,
    starts, lengths, bases, seg_sequence, seg_first,
    out_kv, out_k, out_m, out_g,
    norm, constant, T, segments, segment,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    REACH_TOKENS: tl.constexpr,
    SINKS: tl.constexpr,
    ACT: tl.constexpr,
    LOG: tl.constexpr,
    TOP: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one key head: keys and values, or in REVERSE its G heads of queries and output gradients.

    H is the number of heads of ``x``; in REVERSE ``y`` is the output's gradient over the normaliser.
    """
    head = tl.program_id(0)
    pid = tl.program_id(1)
    kv_heads = H // G if REVERSE else H
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    x += row64 * x_b + start * x_t
    y += row64 * y_b + start * y_t
    if decay is not None:
        decay += row64 * decay_b + start * decay_t
    if REVERSE:
        begin = tl.where(s == 0, 0, s * segment + REACH_TOKENS)
        end = tl.minimum((s + 1) * segment + REACH_TOKENS, length)
    else:
        begin = tl.maximum(s * segment - REACH_TOKENS, 0)
        end = tl.minimum((s + 1) * segment - REACH_TOKENS, length)
    S, z, m = load_memory(None, None, None, 0, F, V, BF, BV, LOG)
    total = tl.full([], 0.0, tl.float64)
    chunks = tl.cdiv(tl.maximum(end - begin, 0), C)
    DECAY: tl.constexpr = decay is not None
    PROJECT: tl.constexpr = weight is not None
    BIAS: tl.constexpr = bias is not None
    LOW: tl.constexpr = low is not None
    if not REVERSE:
        w0, w1, l0, l1, c0, c1 = load_map(
            weight, low, bias, tl.where(map_heads == 1, 0, head), map_heads, D, F, BD, BF, ACT
        )
    for i in range(0, chunks):
        at = (chunks - 1 - i) if REVERSE else i
        rows = begin + at * C + tl.arange(0, C)
        valid = rows < end
        counts = valid & (base + rows >= SINKS)
        if DECAY:
            g, gate64 = gates(decay + head * decay_h, rows, decay_t, valid)
            total += gate64
            gate = gate64.to(tl.float32)
            along = g.to(tl.float32) if REVERSE else (gate64 - g).to(tl.float32)
        else:
            gate = tl.full([], 0.0, tl.float32)
            along = tl.zeros([C], tl.float32)
        for group in range(G if REVERSE else 1):
            hx = head * G + group if REVERSE else head
            if REVERSE:
                w0, w1, l0, l1, c0, c1 = load_map(
                    weight, low, bias, tl.where(map_heads == 1, 0, hx), map_heads, D, F, BD, BF, ACT
                )
            xs = load_rows(x + hx * x_h, rows, x_t, valid, D, BD)
            ys = load_rows(y + hx * y_h, rows, y_t, counts, V, BV)
            phi, logs = features(
                xs, w0, w1, l0, l1, c0, c1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION
            )
            stat = (origin * H + hx) + rows.to(tl.int64) * H
            if log_scale is not None:
                logs = tl.load(log_scale + stat, mask=valid, other=0.0)
            log_weight = along
            if REVERSE:
                z_weight = -tl.load(delta + stat, mask=valid, other=0.0)
                if TOP:
                    row_top = tl.load(top + stat, mask=valid, other=EMPTY)
                    counts = row_top > EMPTY / 4
                    if far_bias is not None:
                        logs += tl.load(far_bias + hx)
                    log_weight += logs - row_top
                step = tl.where(group == 0, gate, 0.0)
            else:
                z_weight = counts.to(tl.float32)
                if LOG:
                    log_weight += logs
                step = gate
            S, z, m = fold_chunk(S, z, m, phi, ys, log_weight, counts, z_weight, step, LOG, DECAY, OT, PRECISION)
    f = tl.arange(0, BF)
    v = tl.arange(0, BV)
    place = pid.to(tl.int64) * kv_heads + head
    pointers = out_kv + (place * F + f[None, :]) * V + v[:, None]
    tl.store(pointers, S, mask=(f < F)[None, :] & (v < V)[:, None])
    tl.store(out_k + place * F + f, z, mask=f < F)
    if LOG:
        tl.store(out_m + place, m)
    if DECAY:
        tl.store(out_g + place, total.to(tl.float32))


@triton.jit
def scan_kernel(
    kv, k, m, gate,
    start_kv, start_k, start_m,
    out_kv, out_k, out_m,
    end_kv, end_k, end_m,
    segments, seg_first, kv_heads,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    LOG: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Running sums of the segments' memories along each sequence, exclusive; ``end``: the sum of them all.

    ``kv`` may be ``out_kv``, and ``k`` ``out_k``: each program reads a place before it writes it.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.program_id(2)
    if PACKED:
        first = tl.load(seg_first + n)
        count = tl.load(seg_first + n + 1) - first
    else:
        first = n * segments
        count = segments
    f = block * BF + tl.arange(0, BF)
    v = tl.arange(0, BV)
    fmask = f < F
    mask = fmask[:, None] & (v < V)[None, :]
    S = tl.zeros([BF, BV], tl.float32)
    z = tl.zeros([BF], tl.float32)
    top = tl.full([], 0.0, tl.float32)
    if LOG:
        top += EMPTY
    origin = n.to(tl.int64) * kv_heads + head
    if start_kv is not None:
        S += tl.load(start_kv + (origin * F + f[:, None]) * V + v[None, :], mask=mask, other=0.0)
        z += tl.load(start_k + origin * F + f, mask=fmask, other=0.0)
        if LOG:
            top = tl.load(start_m + origin)
    for i in range(0, count):
        at = first + (count - 1 - i if REVERSE else i)
        place = at.to(tl.int64) * kv_heads + head
        pointers = (place * F + f[:, None]) * V + v[None, :]
        part = tl.load(kv + pointers, mask=mask, other=0.0)
        part_z = tl.load(k + place * F + f, mask=fmask, other=0.0)
        tl.store(out_kv + pointers, S, mask=mask)
        tl.store(out_k + place * F + f, z, mask=fmask)
        step = tl.full([], 0.0, tl.float32)
        if DECAY:
            step = tl.load(gate + place)
        if LOG:
            if block == 0:
                tl.store(out_m + place, top)
            part_m = tl.load(m + place)
            new = tl.maximum(top + step, part_m)
            keep = exp(top + step - new)
            take = exp(part_m - new)
            S = S * keep + part * take
            z = z * keep + part_z * take
            top = new
        else:
            keep = exp(step)
            S = S * keep + part
            z = z * keep + part_z
    if end_kv is not None:
        tl.store(end_kv + (origin * F + f[:, None]) * V + v[None, :], S, mask=mask)
        tl.store(end_k + origin * F + f, z, mask=fmask)
        if LOG:
            if block == 0:
                tl.store(end_m + origin, top)
