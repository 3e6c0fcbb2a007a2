"""What every kernel here shares: sequences and segments, features of raw inputs, and one chunk's step of the memory."""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.kernels.triton import runtime

EMPTY = tl.constexpr(-1e30)
"""Log-weight of nothing, as linattn.state.EMPTY_LOG_SCALE."""
FAR_FLOOR = tl.constexpr(1e-30)
SMALLEST, LARGEST_SCALE = tl.constexpr(1.2e-38), tl.constexpr(87.0)
"""The smallest mass, about, that float32 holds, and its logarithm without sign."""
MASS_ROWS = tl.constexpr(16)
"""Rows of the tensor cores' smallest tile."""
DENOMINATOR_FLOOR = tl.constexpr(1e-4)

GIVEN = tl.constexpr(0)
RELU = tl.constexpr(1)
ELU = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)
EXP = tl.constexpr(4)
PRODUCT = tl.constexpr(5)
MIRRORED = tl.constexpr(6)
"""softmax of [x W, −x W]: projections have half the features' columns, and F is a power of two."""

ACTIVATIONS = {"given": 0, "relu": 1, "elu": 2, "softmax": 3, "exp": 4, "product": 5, "mirrored": 6}


NVIDIA = tl.constexpr(runtime.NVIDIA)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    """2^x whose denormal results are zero, which saves most of its instructions; the interpreter has only the other."""
    if NVIDIA:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def exp(x):
    return exp2(x * LOG2_E)


@triton.jit
def rounded(x, OT: tl.constexpr):
    """``x`` in float32 after rounding to ``OT``. Pairs are converted at once: single values take the slow path."""
    if tl.bfloat16 == OT:
        if NVIDIA:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
                "=r,=r,r,r",
                [x],
                tl.float32,
                is_pure=True,
                pack=2,
            )
        else:
            return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x


@triton.jit
def locate(pid, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED: tl.constexpr):
    """Segment ``pid``: its sequence, number in it, batch row, first token's slot, tokens and first position."""
    if PACKED:
        n = tl.load(seg_sequence + pid)
        s = pid - tl.load(seg_first + n)
        row = n * 0
        start = tl.load(starts + n)
        length = tl.load(lengths + n).to(tl.int32)
    else:
        n = pid // segments
        s = pid % segments
        row = n
        start = n.to(tl.int64) * 0
        if lengths is None:
            length = (n * 0 + T).to(tl.int32)
        else:
            length = tl.load(lengths + n).to(tl.int32)
    if bases is None:
        base = n * 0
    else:
        base = tl.load(bases + n).to(tl.int32)
    return n, s, row, start, length, base


@triton.jit
def locate_chunk(
    chunk, segments, segment, T, starts, lengths, bases, seg_sequence, seg_first, C: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Chunk ``chunk`` of all segments: its sequence, first row in it, batch row, first slot, tokens and base."""
    per = segment // C
    n, s, row, start, length, base = locate(
        chunk // per, segments, T, starts, lengths, bases, seg_sequence, seg_first, PACKED
    )
    return n, (s * per + chunk % per) * C, row.to(tl.int64), start, length, base


@triton.jit
def locate_slice(pid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The head of program ``pid``, and the first of its BLOCK columns: programs side by side share a head's WIDTH.

    The last of them starts early enough for a full tile: columns that two programs hold are the same in both.
    """
    SLICES: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    left = pid % SLICES * BLOCK
    if SLICES > 1 and WIDTH % BLOCK != 0:
        left = tl.minimum(left, WIDTH - BLOCK)
    return pid // SLICES, left


@triton.jit
def load_rows(base, first, stride, valid, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[C, BLOCK]`` of ``WIDTH`` contiguous columns at the C rows from ``first``, zeros where not ``valid [C]``.

    64 bits for the first row alone: offsets from there fit 32, and are the same for every chunk.
    """
    columns = tl.arange(0, BLOCK)
    offsets = tl.arange(0, valid.shape[0])[:, None] * stride + columns[None, :]
    pointers = base + first.to(tl.int64) * stride + offsets
    if BLOCK <= WIDTH:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(base, first, stride, valid, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    offsets = tl.arange(0, valid.shape[0])[:, None] * stride + columns[None, :]
    pointers = base + first.to(tl.int64) * stride + offsets
    mask = valid[:, None] & (columns < WIDTH)[None, :] if BLOCK > WIDTH else valid[:, None]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def column(base, first, stride, C: tl.constexpr):
    """Pointers to the C rows from ``first`` of one column."""
    return base + first.to(tl.int64) * stride + tl.arange(0, C) * stride


@triton.jit
def two_terms(x, OT: tl.constexpr):
    """``x`` as two terms of type ``OT``."""
    high = x.to(OT)
    return high, (x - rounded(x, OT)).to(OT)


@triton.jit
def load_weight(w, head, part, heads, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr):
    """``[BD, BF]`` of the projections ``[parts, heads, D, F]``."""
    d = tl.arange(0, BD)
    f = tl.arange(0, BF)
    pointers = w + ((part * heads + head) * D + d[:, None]) * F + f[None, :]
    return tl.load(pointers, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)


@triton.jit
def load_bias(c, head, part, heads, F: tl.constexpr, BF: tl.constexpr):
    f = tl.arange(0, BF)
    return tl.load(c + (part * heads + head) * F + f, mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def load_map(
    w,
    c,
    head,
    heads,
    D: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    ACT: tl.constexpr,
    OT: tl.constexpr,
):
    """The projections of one head, their low parts and biases: (w0, w1, l0, l1, c0, c1); a number where there is none.

    Weights wider than the tensor cores' operands come as two terms: the rounded weight and what rounding took.
    """
    P: tl.constexpr = F // 2 if ACT == MIRRORED else F
    BP: tl.constexpr = BF // 2 if ACT == MIRRORED else BF
    w0 = 0.0
    w1 = 0.0
    l0 = 0.0
    l1 = 0.0
    c0 = 0.0
    c1 = 0.0
    if w is not None:
        w0, l0 = two_terms(load_weight(w, head, 0, heads, D, P, BD, BP).to(tl.float32), OT)
        if ACT == PRODUCT:
            w1, l1 = two_terms(load_weight(w, head, 1, heads, D, P, BD, BP).to(tl.float32), OT)
    if c is not None:
        c0 = load_bias(c, head, 0, heads, P, BP)
        if ACT == PRODUCT:
            c1 = load_bias(c, head, 1, heads, P, BP)
    return w0, w1, l0, l1, c0, c1


@triton.jit
def project(x, w, low, c, LOW: tl.constexpr, BIAS: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr):
    """x W + c."""
    z = tl.dot(x.to(OT), w.to(OT), input_precision=PRECISION)
    if LOW:
        z = tl.dot(x.to(OT), low.to(OT), z, input_precision=PRECISION)
    if BIAS:
        z += c[None, :]
    return z


@triton.jit
def beside(a, b):
    """``[a, b]`` along the columns."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def sides(x):
    """The two halves of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def features(
    x,
    w0,
    w1,
    l0,
    l1,
    c0,
    c1,
    norm,
    constant,
    F: tl.constexpr,
    BF: tl.constexpr,
    ACT: tl.constexpr,
    PROJECT: tl.constexpr,
    LOW: tl.constexpr,
    BIAS: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
    weight=None,
):
    """Features ``[C, BF]`` and log-scale ``[C]`` of inputs ``x [C, BD]``; padded features are zero.

    Features are multiplied by ``weight [C]``, which costs nothing where the map normalises them. Computed ones are
    float32; given ones without weight stay as they are.
    """
    log_scale = tl.zeros([x.shape[0]], tl.float32)
    if PROJECT:
        z = project(x, w0, l0, c0, LOW, BIAS, OT, PRECISION)
    else:
        z = x.to(tl.float32)
    real = tl.arange(0, BF) < F
    if ACT == GIVEN:
        phi = x
    elif ACT == RELU:
        phi = tl.maximum(z, 0.0)
    elif ACT == ELU:
        phi = exp(tl.minimum(z, 0.0)) + tl.maximum(z, 0.0)
        if BF != F:
            phi = tl.where(real[None, :], phi, 0.0)
    elif ACT == SOFTMAX:
        if BF != F:
            z = tl.where(real[None, :], z, EMPTY)
        phi = exp2(z * LOG2_E - (tl.max(z, 1) * LOG2_E)[:, None])
        share = 1.0 / tl.sum(phi, 1)
        if weight is not None:
            share *= weight
        phi = phi * share[:, None]
    elif ACT == MIRRORED:
        top = (tl.max(tl.abs(z), 1) * LOG2_E)[:, None]
        up = exp2(z * LOG2_E - top)
        down = exp2(z * -LOG2_E - top)
        share = 1.0 / tl.sum(up + down, 1)
        if weight is not None:
            share *= weight
        phi = beside(up * share[:, None], down * share[:, None])
    elif ACT == EXP:
        if BF != F:
            z = tl.where(real[None, :], z, EMPTY)
        top = tl.max(z, 1)
        phi = exp2(z * LOG2_E - (top * LOG2_E)[:, None])
        wide = x.to(tl.float32)
        log_scale = top - norm * tl.sum(wide * wide, 1) + constant
    else:
        phi = z * project(x, w1, l1, c1, LOW, BIAS, OT, PRECISION)
        top = tl.maximum(tl.max(tl.abs(phi), 1), 1.0)
        phi = phi / top[:, None]
        log_scale = tl.log(top)
    if (weight is not None and ACT != SOFTMAX) and ACT != MIRRORED:
        phi = phi.to(tl.float32) * weight[:, None]
    return phi, log_scale


@triton.jit
def operand_features(
    x, log_scale, w0, w1, l0, l1, c0, c1, norm, constant,
    F: tl.constexpr, BF: tl.constexpr, ACT: tl.constexpr, PROJECT: tl.constexpr, LOW: tl.constexpr,
    BIAS: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr, weight,
):  # fmt: skip
    """:func:`features` in the type of operands; the log-scale is the given one, unless that is None."""
    phi, found = features(
        x, w0, w1, l0, l1, c0, c1, norm, constant, F, BF, ACT, PROJECT, LOW, BIAS, OT, PRECISION, weight
    )
    if log_scale is not None:
        found = log_scale
    return phi.to(OT), found


@triton.jit
def features_backward(
    x,
    phi,
    dphi,
    w0,
    w1,
    l0,
    l1,
    c0,
    c1,
    norm,
    ACT: tl.constexpr,
    PROJECT: tl.constexpr,
    LOW: tl.constexpr,
    BIAS: tl.constexpr,
    OT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of x ``[C, BD]`` and of both projections' outputs, float32, from that of the features ``[C, BF]``.

    Log-scales cancel: the gradient of exp(log_scale) · φ is given relative to exp(log_scale).
    """
    dz1 = 0.0
    if ACT == GIVEN:
        dz = dphi
    elif ACT == RELU:
        dz = tl.where(phi > 0, dphi, 0.0)
    elif ACT == ELU:
        dz = dphi * tl.minimum(phi, 1.0)
    elif ACT == SOFTMAX:
        dz = phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    elif ACT == MIRRORED:
        up, down = sides(phi * (dphi - tl.sum(phi * dphi, 1)[:, None]))
        dz = up - down
    elif ACT == EXP:
        dz = phi * dphi
    else:
        z0 = project(x, w0, l0, c0, LOW, BIAS, OT, PRECISION)
        z1 = project(x, w1, l1, c1, LOW, BIAS, OT, PRECISION)
        shrunk = dphi / tl.maximum(tl.max(tl.abs(z0 * z1), 1), 1.0)[:, None]
        dz = shrunk * z1
        dz1 = shrunk * z0
    if PROJECT:
        dx = tl.dot(dz.to(OT), tl.trans(w0.to(OT)), input_precision=PRECISION)
        if ACT == PRODUCT:
            dx += tl.dot(dz1.to(OT), tl.trans(w1.to(OT)), input_precision=PRECISION)  # type: ignore[attr-defined]
    else:
        dx = dz
    if ACT == EXP:
        dx -= (2.0 * norm * tl.sum(dz, 1))[:, None] * x.to(tl.float32)
    return dx, dz, dz1


@triton.jit
def gates(sums, first, begin, last, stride, C: tl.constexpr):
    """Running log-decay ``[C]`` in the chunk, each token's own gate included, in two terms, and from each to its end.

    The chunk's total comes last. ``sums`` are running sums from ``begin`` on, in float64: differences of later tokens
    stay exact behind a gate that forgets everything. Rows after ``last`` have no gates.
    """
    base = sums + first.to(tl.int64) * stride
    left = last - first
    found = tl.load(base + tl.minimum(tl.arange(0, C), left) * stride)
    before = tl.load(base - stride, mask=first > begin, other=0.0)
    after = tl.load(base + tl.minimum(C - 1, left) * stride)
    g = found - before
    high = g.to(tl.float32)
    return (
        high,
        (g - high.to(tl.float64)).to(tl.float32),
        (after - found).to(tl.float32),
        (after - before).to(tl.float32),
    )


@triton.jit
def differences(high, low):
    """g_t − g_i ``[C, C]`` of sums ``[C]`` in two terms, as exact as the difference is small."""
    return (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])


@triton.jit
def empty_memory(BF: tl.constexpr, BV: tl.constexpr, LOG: tl.constexpr):
    """A memory as the kernels hold it: transposed sums ``[BV, BF]``, normaliser ``[MASS_ROWS, BF]``, log-scale.

    The normaliser is the sum of its rows, which one product of the tensor cores brings up to date.
    """
    S = tl.zeros([BV, BF], tl.float32)
    z = tl.zeros([MASS_ROWS, BF], tl.float32)
    m = tl.full([], 0.0, tl.float32)
    if LOG:
        m += EMPTY
    return S, z, m


@triton.jit
def load_memory(
    kv, k, m, place, there,
    F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """The memory at ``place`` as the kernels hold it; empty unless ``there``, and if ``kv`` is None."""
    S, z, top = empty_memory(BF, BV, LOG)
    if kv is not None:
        f = tl.arange(0, BF)
        v = tl.arange(0, BV)
        fmask = f < tl.where(there, F, 0)
        S += tl.load(kv + (place * F + f[None, :]) * V + v[:, None], mask=fmask[None, :] & (v < V)[:, None], other=0.0)
        first = tl.arange(0, MASS_ROWS) == 0
        row = tl.load(k + place * F + f, mask=fmask, other=0.0)
        z += tl.where(first[:, None], row[None, :], 0.0)
        if LOG:
            top = tl.where(there, tl.load(m + place), EMPTY)
    return S, z, top


@triton.jit
def mass_of(phi, z, OT: tl.constexpr, PRECISION: tl.constexpr):
    """The normaliser ``[C]`` of features ``phi [C, BF]`` of type ``OT``: φ · Σ of the rows of ``z``."""
    high, low = two_terms(z, OT)
    phi = tl.trans(phi)
    found = tl.dot(high, phi, input_precision=PRECISION)
    if tl.bfloat16 == OT:
        found = tl.dot(low, phi, found, input_precision=PRECISION)
    return tl.sum(found, 0)


@triton.jit
def weigh(m, log_weight, counts, gate, LOG: tl.constexpr):
    """Weights ``[C]`` with which a chunk joins a memory of log-scale ``m`` that moves away by ``gate``.

    Between them and the new log-scale comes what the memory is multiplied by. Tokens that do not count weigh nothing.
    """
    keep = exp(gate)
    if LOG:
        new = tl.maximum(m + gate, tl.max(tl.where(counts, log_weight, EMPTY), 0))
        keep = exp(m + gate - new)
        log_weight -= new
        m = new
    return exp(tl.where(counts, log_weight, EMPTY)), keep, m


@triton.jit
def join(S, z, phi, y, z_weight, WHOLE: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr):
    """The memory after one more chunk of weighed features ``phi [C, BF]`` and values ``y [C, BV]``.

    In z they count ``z_weight`` times, 0 or 1 if WHOLE. Tokens that do not count have no ``z_weight``, and no features
    or no values. S is transposed and the weights go to the features, so that the values reach the tensor cores as they
    were loaded.
    """
    row = tl.arange(0, MASS_ROWS)[:, None]
    if WHOLE:
        weights = tl.where(row == 0, z_weight[None, :], 0.0).to(OT)
    else:
        high = rounded(z_weight, OT)
        weights = tl.where(row == 0, high[None, :], tl.where(row == 1, (z_weight - high)[None, :], 0.0)).to(OT)
    z = tl.dot(weights, phi, z, input_precision=PRECISION)
    S = tl.dot(tl.trans(y.to(OT)), phi, S, input_precision=PRECISION)
    return S, z


@triton.jit
def tanh(x):
    e = exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def normalise(
    acc, den, top, num, mass, log_far, sink_logit, FAR: tl.constexpr, SINK_LOGIT: tl.constexpr
):  # fmt: skip
    """One normaliser for exact sums relative to exp(top), far ones relative to exp(log_far), and a sink's logit.

    Returns the output ``[C, BV]``, the log-scale of its rows and one over the normaliser, 0 in rows without weight.
    """
    new = top
    if FAR:
        # Beside decay a mass may be small and its log-scale large; none has no say.
        size = tl.abs(mass)
        new = tl.maximum(new, tl.where(size > 0, log_far + tl.log(tl.maximum(size, SMALLEST)), EMPTY))
    if SINK_LOGIT:
        new = tl.maximum(new, sink_logit)
    new = tl.maximum(new, EMPTY / 2)
    keep = exp(top - new)
    acc = acc * keep[:, None]
    den = den * keep
    if FAR:
        take = exp(tl.minimum(log_far - new, LARGEST_SCALE))
        acc += num * take[:, None]
        den += mass * take
    if SINK_LOGIT:
        den += exp(sink_logit - new)
    small = tl.where(den < 0, -DENOMINATOR_FLOOR, DENOMINATOR_FLOOR)
    rden = 1.0 / tl.where(tl.abs(den) < DENOMINATOR_FLOOR, small, den)
    rden = tl.where(new > EMPTY / 4, rden, 0.0)
    return acc * rden[:, None], new, rden


@triton.jit
def store_output(out, residual, first, stride, valid, acc, V: tl.constexpr, BV: tl.constexpr):
    """Rows of the output, and what rounding took from them."""
    store_rows(out, first, stride, valid, acc, V, BV)
    if residual is not None:
        store_rows(residual, first, stride, valid, acc - rounded(acc, out.dtype.element_ty), V, BV)
