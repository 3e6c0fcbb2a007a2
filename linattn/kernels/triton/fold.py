"""Memories of segments, and their running sums: what lets one long sequence fill a GPU.

``fold`` sums each segment by itself; ``scan`` turns the sums into the memory before (after, in reverse) each segment.
Keys fold into what queries read; in the backward pass queries fold, in reverse, into what keys read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton.device import (
    EMPTY,
    column,
    empty_memory,
    exp,
    gates,
    join,
    load_map,
    load_rows,
    locate,
    locate_slice,
    operand_features,
    weigh,
)


@triton.jit
def fold_kernel(
    x, x_b, x_t: tl.constexpr, x_h,
    y, y_b, y_t: tl.constexpr, y_h,
    weight, map_heads, bias,
    log_scale, relative, delta, rden,
    gate_sums,
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
    GAP: tl.constexpr,
    SKIPPED: tl.constexpr,
    PLACE: tl.constexpr,
    SINKS: tl.constexpr,
    ACT: tl.constexpr,
    LOW: tl.constexpr,
    LOG: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of one key head: keys and values, or in REVERSE its G heads of queries and output gradients.

    H is the number of heads of ``x``; in REVERSE ``y`` is the output's gradient, over the normaliser unless there is
    ``rden``, and the queries of a segment are those GAP rows later. SKIPPED leaves out the last (in REVERSE the first)
    segment of each sequence; sums go PLACE segments on. Each program has BV columns of ``y``.
    """
    head, left = locate_slice(tl.program_id(0), V, BV)
    pid = tl.program_id(1)
    if SKIPPED:
        pid += pid // (segments - 1) + (1 if REVERSE else 0)
    kv_heads = H // G if REVERSE else H
    n, s, row, start, length, base = locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED)
    row64 = row.to(tl.int64)
    origin = row64 * T + start  # the sequence's first token
    x += row64 * x_b + start * x_t
    y += row64 * y_b + start * y_t + left
    DECAY: tl.constexpr = gate_sums is not None
    if DECAY:
        gate_sums += origin * kv_heads + head
    begin = s * segment
    end = tl.minimum(begin + segment, length)
    S, z, m = empty_memory(BF, BV, LOG)
    chunks = tl.cdiv(tl.maximum(end - begin, 0), C)
    PROJECT: tl.constexpr = weight is not None
    BIAS: tl.constexpr = bias is not None
    BEFORE: tl.constexpr = REVERSE or not LOG  # weights are known before the features
    if not REVERSE:
        w0, w1, l0, l1, c0, c1 = load_map(
            weight, bias, tl.where(map_heads == 1, 0, head), map_heads, D, F, BD, BF, ACT, OT
        )
    for i in range(0, chunks):
        at = (chunks - 1 - i) if REVERSE else i
        first = begin + at * C
        rows = first + tl.arange(0, C)
        at_x = first + GAP
        valid = (rows < end) & (rows + GAP < length)
        counts = valid & (base + rows >= SINKS)
        for group in range(G if REVERSE else 1):
            hx = head * G + group if REVERSE else head
            if REVERSE:
                w0, w1, l0, l1, c0, c1 = load_map(
                    weight, bias, tl.where(map_heads == 1, 0, hx), map_heads, D, F, BD, BF, ACT, OT
                )
            stat = origin * H + hx
            xs = load_rows(x + hx * x_h, at_x, x_t, valid, D, BD)
            ys = load_rows(y + hx * y_h, at_x, y_t, counts, V, BV)
            given = None
            if log_scale is not None:
                given = tl.load(column(log_scale + stat, at_x, H, C), mask=valid, other=0.0)
            log_weight = tl.zeros([C], tl.float32)
            z_weight = counts.to(tl.float32)
            if REVERSE:
                z_weight = -tl.load(column(delta + stat, at_x, H, C), mask=valid, other=0.0)
                if relative is not None:
                    log_weight += tl.load(column(relative + stat, at_x, H, C), mask=valid, other=EMPTY)
                    counts = log_weight > EMPTY / 4
            step = tl.full([], 0.0, tl.float32)
            if DECAY:
                g, _, to_end, gate = gates(gate_sums, first, begin, end - 1, kv_heads, C)
                log_weight += g if REVERSE else to_end
                step = tl.where(group == 0, gate, 0.0)
            joining = None
            if BEFORE and ((LOG or DECAY) or relative is not None):
                joining, keep, m = weigh(m, log_weight, counts, step, LOG)
            if rden is not None:
                share = tl.load(column(rden + stat, at_x, H, C), mask=valid, other=0.0)
                joining = share if joining is None else joining * share
            phi, logs = operand_features(
                xs, given, w0, w1, l0, l1, c0, c1, norm, constant,
                F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, joining,
            )  # fmt: skip
            if not BEFORE:
                joins, keep, m = weigh(m, log_weight + logs, counts, step, LOG)
                phi = (phi.to(tl.float32) * joins[:, None]).to(OT)
            if LOG or DECAY:
                S = S * keep
                z = z * keep
            S, z = join(S, z, phi, ys, z_weight, not REVERSE, OT, PRECISION)
    f = tl.arange(0, BF)
    v = tl.arange(0, BV)
    place = (pid + PLACE).to(tl.int64) * kv_heads + head
    pointers = out_kv + (place * F + f[None, :]) * V + left + v[:, None]
    tl.store(pointers, S, mask=(f < F)[None, :] & (v < V)[:, None])
    if left == 0:
        tl.store(out_k + place * F + f, tl.sum(z, 0), mask=f < F)
        if LOG:
            tl.store(out_m + place, m)
        if DECAY:
            total = tl.load(gate_sums + (end - 1).to(tl.int64) * kv_heads, mask=end > begin, other=0.0)
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
        more = i < count - 1 if end_kv is None else i >= 0  # nobody reads the sum of all
        rest = tl.where(more, F, 0)
        part = tl.load(kv + pointers, mask=mask & (f < rest)[:, None], other=0.0)
        part_z = tl.load(k + place * F + f, mask=f < rest, other=0.0)
        tl.store(out_kv + pointers, S, mask=mask)
        tl.store(out_k + place * F + f, z, mask=fmask)
        step = tl.full([], 0.0, tl.float32)
        if DECAY:
            step = tl.load(gate + place, mask=more, other=0.0)
        if LOG:
            if block == 0:
                tl.store(out_m + place, top)
            part_m = tl.load(m + place, mask=more, other=EMPTY)
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


@triton.jit
def gate_kernel(
    decay, decay_b, decay_t, decay_h,
    out, steep, starts, lengths, bases, seg_sequence, seg_first, T, segments, segment, heads,
    MILD: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Running sums in float64 of the log-decay of each segment's tokens, their own included, ``out [B, T, heads]``.

    ``steep [segments, heads]``: whether a chunk of C tokens decays by more than MILD.
    """
    head = tl.program_id(0)
    n, s, row, start, length, base = locate(
        tl.program_id(1), segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED
    )
    row64 = row.to(tl.int64)
    decay += row64 * decay_b + start * decay_t + head * decay_h
    out += (row64 * T + start) * heads + head
    end = tl.minimum((s + 1) * segment, length)
    total = tl.full([], 0.0, tl.float64)
    least = tl.full([], 0.0, tl.float64)
    for first in range(s * segment, end, BLOCK):
        rows = (first + tl.arange(0, BLOCK)).to(tl.int64)
        valid = rows < end
        g = tl.load(decay + rows * decay_t, mask=valid, other=0.0).to(tl.float64)
        tl.store(out + rows * heads, total + tl.cumsum(g, 0), mask=valid)
        total += tl.sum(g, 0)
        least = tl.minimum(least, tl.min(tl.sum(tl.reshape(g, (BLOCK // C, C)), 1), 0))
    tl.store(steep + tl.program_id(1).to(tl.int64) * heads + head, (least <= -MILD).to(tl.int32))


@triton.jit
def lag_kernel(
    decay, decay_b, decay_t, decay_h,
    out, starts, lengths, T, blocks, heads,
    GAP: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Σ of the log-decay of each token and the GAP − 1 before it in its sequence, ``out [B, T, heads]``."""
    head = tl.program_id(0)
    n = tl.program_id(1) // blocks
    row = n.to(tl.int64) * 0 if PACKED else n.to(tl.int64)
    start = tl.load(starts + n) if PACKED else row * 0
    length = (n * 0 + T).to(tl.int32) if lengths is None else tl.load(lengths + n).to(tl.int32)
    decay += row * decay_b + start * decay_t + head * decay_h
    for block in range(tl.program_id(1) % blocks, tl.cdiv(length, BLOCK), blocks):
        first = block * BLOCK
        rows = first + tl.arange(0, BLOCK)
        total = tl.full([], 0.0, tl.float64)
        for j in range(0, tl.cdiv(GAP, BLOCK)):
            before = first - GAP + j * BLOCK + tl.arange(0, BLOCK)
            there = (before >= 0) & (before < first)
            total += tl.sum(tl.load(decay + before.to(tl.int64) * decay_t, mask=there, other=0.0).to(tl.float64), 0)
        valid = rows < length
        new = tl.load(decay + rows.to(tl.int64) * decay_t, mask=valid, other=0.0).to(tl.float64)
        left = rows - GAP
        old = tl.load(decay + left.to(tl.int64) * decay_t, mask=valid & (left >= 0), other=0.0).to(tl.float64)
        sums = total + tl.cumsum(new - old, 0)
        tl.store(out + (row * T + start + rows.to(tl.int64)) * heads + head, sums.to(tl.float32), mask=valid)
