"""One new token of many sequences, in place: fold the token that leaves the window, write the new one, read, store."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.errors import DtypeError, OptionError, ShapeError, StateError
from linattn.kernels.precision import autocast, autocast_dtype
from linattn.kernels.protocols import KernelFeatureMap, Projected
from linattn.kernels.slots import DecodeSlots
from linattn.kernels.triton.device import (
    ACTIVATIONS,
    DENOMINATOR_FLOOR,
    ELU,
    EMPTY,
    EXP,
    FAR_FLOOR,
    PRODUCT,
    RELU,
    SOFTMAX,
    load_bias,
    tanh,
)
from linattn.kernels.triton.runtime import NVIDIA
from linattn.kernels.validate import STRONGEST_DECAY, Call
from linattn.state import AttentionState

STRONGEST = tl.constexpr(STRONGEST_DECAY)


@triton.jit
def by_lane(N: tl.constexpr, LANES: tl.constexpr):
    """The numbers below N as ``[LANES, N / LANES]``."""
    return tl.arange(0, LANES)[:, None] * (N // LANES) + tl.arange(0, N // LANES)[None, :]


@triton.jit
def project_token(
    x,
    live,
    w,
    head,
    heads,
    D: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    LANES: tl.constexpr,
    ACT: tl.constexpr,
    MIRROR: tl.constexpr,
):
    """Terms ``[LANES, BF]`` of both projections of ``x [D]`` and ``[LANES]`` of its square, times ``live`` (0, 1).

    MIRROR: columns of a projection; features beyond have their negatives. Sums stay in a thread: nothing waits here.
    """
    f = tl.arange(0, BF)
    if w is None:
        z = tl.load(x + f, mask=f < F * live, other=0.0).to(tl.float32)[None, :]
        z1 = z
        squares = tl.sum(z * z, 1)
    else:
        head = tl.where(heads == 1, 0, head)
        z = tl.zeros([LANES, BF], tl.float32)
        z1 = tl.zeros([LANES, BF], tl.float32)
        squares = tl.zeros([LANES], tl.float32)
        columns = tl.max_contiguous(f, 4)
        if MIRROR < F:
            whole: tl.constexpr = 4 if MIRROR % 4 == 0 else 1
            columns = tl.max_contiguous(tl.multiple_of(f % MIRROR, whole), whole)
        for start in range(0, D, BD):
            d = start + by_lane(BD, LANES)
            real = (d < D)[:, :, None] & (f < F)[None, None, :]
            cells = w + head * D * MIRROR + d[:, :, None] * MIRROR + columns[None, None, :]
            first = tl.load(cells, mask=real, other=0.0)
            xd = tl.load(x + d, mask=d < D * live, other=0.0).to(tl.float32)
            squares += tl.sum(xd * xd, 1)
            z += tl.sum(first.to(tl.float32) * xd[:, :, None], 1)
            if ACT == PRODUCT:
                second = tl.load(cells + heads * D * MIRROR, mask=real, other=0.0)
                z1 += tl.sum(second.to(tl.float32) * xd[:, :, None], 1)
        if MIRROR < F:
            sign = tl.where(f < MIRROR, 1.0, -1.0)[None, :]
            z *= sign
            z1 *= sign
    return z, z1, squares


@triton.jit
def activate(
    z,
    z1,
    squares,
    c,
    head,
    heads,
    norm,
    constant,
    F: tl.constexpr,
    BF: tl.constexpr,
    LANES: tl.constexpr,
    ACT: tl.constexpr,
):
    """Features ``[LANES, BF / LANES]`` and log-scale in float32 of what :func:`project_token` found."""
    f = tl.arange(0, BF)
    z = tl.sum(z, 0)
    if ACT == PRODUCT:
        z1 = tl.sum(z1, 0)
    if c is not None:
        head = tl.where(heads == 1, 0, head)
        z += load_bias(c, head, 0, heads, F, BF)
        if ACT == PRODUCT:
            z1 += load_bias(c, head, 1, heads, F, BF)
    phi = z
    log_scale = 0.0
    if ACT == RELU:
        phi = tl.maximum(z, 0.0)
    elif ACT == ELU:
        phi = tl.exp(tl.minimum(z, 0.0)) + tl.maximum(z, 0.0)
    elif ACT == SOFTMAX:
        z = tl.where(f < F, z, EMPTY)
        phi = tl.exp(z - tl.max(z, 0))
        phi = phi / tl.sum(phi, 0)
    elif ACT == EXP:
        z = tl.where(f < F, z, EMPTY)
        top = tl.max(z, 0)
        phi = tl.exp(z - top)
        log_scale = top - norm * tl.sum(squares, 0) + constant
    elif ACT == PRODUCT:
        phi = z * z1
        top = tl.maximum(tl.max(tl.abs(phi), 0), 1.0)
        phi = phi / top
        log_scale = tl.log(top)
    return tl.reshape(tl.where(f < F, phi, 0.0), (LANES, BF // LANES)), log_scale


@triton.jit
def load_rows(base, rows, seen, columns, WIDTH: tl.constexpr):
    """The ``seen`` of ``rows [LANES, N]`` of a matrix of ``WIDTH`` columns at ``base``, zeros elsewhere."""
    cells = rows[:, :, None] * WIDTH + columns[None, None, :]
    return tl.load(base + cells, mask=seen[:, :, None] & (columns < WIDTH)[None, None, :], other=0.0)


@triton.jit
def is_seen(rows, at, recent, WINDOW: tl.constexpr):
    """Which ``rows`` of a ring hold the ``recent`` tokens before the new one, whose place is ``at``."""
    age = tl.where(rows <= at, at - rows, at - rows + WINDOW)
    return (rows < WINDOW) & (age > 0) & (age <= recent)


@triton.jit
def attend_rows(acc, den, top, xq, k, v, seen, softcap, SOFTCAP: tl.constexpr, xs=None, plain=None):
    """Online softmax, in each lane its own, of a scaled query ``xq [BD]``: more keys and values ``[LANES, N, ...]``.

    Of two queries, if ``xs [BD]`` is given: keys that are not ``plain [LANES, N]`` meet that one.
    """
    x = xq[None, None, :]
    if xs is not None:
        x = tl.where(plain[:, :, None], x, xs[None, None, :])
    s = tl.sum(k.to(tl.float32) * x, 2)
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    s = tl.where(seen, s, EMPTY)
    new = tl.maximum(top, tl.max(s, 1))
    keep = tl.exp(top - new)
    p = tl.exp(s - new[:, None])
    acc = acc * keep[:, None] + tl.sum(p[:, :, None] * v.to(tl.float32), 1)
    return acc, den * keep + tl.sum(p, 1), new


@triton.jit
def step_kernel(
    q, q_n, q_h,
    k, k_n, k_h,
    v, v_n, v_h,
    qf, qf_n, qf_h,
    kf, kf_n, kf_h,
    q_sink,
    phi, log_phi, log_q,
    query_weight, key_weight, query_map_heads, key_map_heads, query_bias, key_bias,
    far_bias, sink_logits,
    decay, decay_n, decay_h,
    kv, z, m, length, ring_k, ring_v, ring_f, ring_decay, sink_k, sink_v, index,
    out, out_n, out_h,
    scale, softcap, norm, constant, heads,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    DF: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BDF: tl.constexpr,
    BF: tl.constexpr,
    PART: tl.constexpr,
    LANES: tl.constexpr,
    MAP_LANES: tl.constexpr,
    WINDOW: tl.constexpr,
    BW: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    FAR: tl.constexpr,
    ACT: tl.constexpr,
    MIRROR: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One key/value head of one sequence: its state passes through registers once.

        S ← e^γ S + [p − W ≥ sinks] e^b φ_k vᵀ        k, v of the token p − W that leaves the window
        out = (Σ_near e^s v + e^c φ_q S) / (Σ_near e^s + e^c φ_q z)

    with γ the new token's gate, b the leaving token's log-scale plus the gates of the W tokens after it, S and z
    relative to exp(m). No other program touches its part of the memory; here, all threads read before any writes.

    Tiles are ``[LANES, rows, columns]`` with a thread's rows all in one lane: sums over tokens and features stay in the
    thread, and lanes meet once, at the end.
    """
    pid = tl.program_id(0)
    head = pid % heads
    row = (pid // heads).to(tl.int64)
    slot = row
    if index is not None:
        slot = tl.load(index + row).to(tl.int64)
    q += row * q_n + head * G * q_h
    k += row * k_n + head * k_h
    v += row * v_n + head * v_h
    qf += row * qf_n + head * G * qf_h
    kf += row * kf_n + head * kf_h
    out += row * out_n + head * G * out_h
    # Four columns a thread whatever the dtype, as float32 states are loaded: no tile has to change its layout.
    d = tl.max_contiguous(tl.arange(0, BD), 4)
    columns = tl.max_contiguous(tl.arange(0, BV), 4)
    f = by_lane(BF, LANES)
    if slot < 0:
        for g in range(G):
            for first in range(0, V, BV):
                nothing = tl.zeros([BV], out.dtype.element_ty)
                tl.store(out + g * out_h + first + columns, nothing, mask=first + columns < V)
        return

    place = slot * heads + head
    kv += place * F * V
    z += place * F
    ring_k += place * WINDOW * D
    ring_v += place * WINDOW * V
    sink_k += place * SINKS * D
    sink_v += place * SINKS * V
    if ring_f is not None:
        ring_f += place * WINDOW * DF
    if ring_decay is not None:
        ring_decay += place * WINDOW
    p = tl.load(length + place)  # the new token's position
    is_sink = p < SINKS
    folds = p - WINDOW >= SINKS  # a token leaves the window, and is no sink
    near = is_sink  # the new token is attended exactly
    at = 0  # its place in the ring, where the leaving token is until then
    recent = 0
    if WINDOW > 0:
        near = p >= 0
        at = (p % WINDOW).to(tl.int32)
        recent = tl.minimum(p, WINDOW).to(tl.int32)
    ring = by_lane(BW, LANES)
    ring_seen = is_seen(ring, at, recent, WINDOW)
    sinks = by_lane(BS, LANES)  # and behind them the new token, which is not in the ring yet
    sink_seen = (sinks < SINKS) & (sinks < p) & (p - sinks >= WINDOW)
    k_new = tl.load(k + d, mask=d < D, other=0.0)

    gate = 0.0
    if decay is not None:
        gate = tl.maximum(tl.load(decay + row * decay_n + head * decay_h).to(tl.float32), STRONGEST)

    for part in tl.static_range((V + BV - 1) // BV):  # one part unless F · V is large: each computes the same weights
        first = part * BV
        c = first + columns

        # Large tiles are asked for before anything is waited for: the barrier keeps the assembler from moving them.
        if FAR:
            S = load_rows(kv, f, f < F, c, V)
            z_old = tl.load(z + f, mask=f < F, other=0.0)
            before = tl.load(m + place) + gate
        if WINDOW > 0:
            ring_ks = load_rows(ring_k, ring, ring < WINDOW, d, D)
        tl.debug_barrier()
        if WINDOW > 0:
            ring_vs = load_rows(ring_v, ring, ring_seen, c, V)
        v_new = tl.load(v + c, mask=c < V, other=0.0)
        is_new = sinks == SINKS
        sink_ks = tl.where(is_new[:, :, None], k_new[None, None, :], load_rows(sink_k, sinks, sink_seen, d, D))
        sink_vs = tl.where(is_new[:, :, None], v_new[None, None, :], load_rows(sink_v, sinks, sink_seen, c, V))

        # Fold. S goes back as soon as every thread has it, which frees its registers after the read-out.
        if FAR:
            if G == 1:
                z_q, z1_q, squares_q = project_token(
                    qf, 1, query_weight, head, query_map_heads, DF, F, PART, BF, MAP_LANES, ACT, MIRROR
                )
            leaving_v = v_new
            if WINDOW > 0:
                leaving_v = tl.load(ring_v + at * V + c, mask=c < tl.where(folds, V, 0), other=0.0)
            if phi is not None:
                leaving = phi + (row * heads + head) * F
            elif WINDOW == 0:
                leaving = kf
            elif ring_f is not None:
                leaving = ring_f + at * DF
            else:
                leaving = ring_k + at * D
            z_k, z1_k, squares_k = project_token(
                leaving, tl.where(folds, 1, 0), key_weight, head, key_map_heads, DF, F, PART, BF, MAP_LANES, ACT, MIRROR
            )
            phi_k, log_k = activate(
                z_k, z1_k, squares_k, key_bias, head, key_map_heads, norm, constant, F, BF, LANES, ACT
            )
            if log_phi is not None:
                log_k = tl.load(log_phi + row * heads + head)
            if WINDOW > 0:
                if decay is not None:
                    entries = tl.arange(0, triton.next_power_of_2(WINDOW))
                    behind = (entries < WINDOW) & (entries != at)
                    log_k += gate + tl.sum(tl.load(ring_decay + entries, mask=behind, other=0.0), 0)
            log_k = tl.where(folds, log_k, EMPTY)
            m_new = tl.maximum(tl.maximum(before, log_k), EMPTY)
            keep = tl.exp(before - m_new)
            phi_k = phi_k * tl.where(folds, tl.exp(log_k - m_new), 0.0)
            z_new = z_old * keep + phi_k
            S = S * keep + phi_k[:, :, None] * leaving_v.to(tl.float32)[None, None, :]
            tl.debug_barrier()
            tl.store(kv + f[:, :, None] * V + c[None, None, :], S, mask=(f < F)[:, :, None] & (c < V)[None, None, :])

        for g in range(G):
            if FAR:
                h = head * G + g
                if G > 1:
                    z_q, z1_q, squares_q = project_token(
                        qf + g * qf_h, 1, query_weight, h, query_map_heads, DF, F, PART, BF, MAP_LANES, ACT, MIRROR
                    )
                phi_q, log_far = activate(
                    z_q, z1_q, squares_q, query_bias, h, query_map_heads, norm, constant, F, BF, LANES, ACT
                )
                log_far += m_new
                if log_q is not None:
                    log_far += tl.load(log_q + (row * heads + head) * G + g)
                if far_bias is not None:
                    log_far += tl.load(far_bias + head * G + g).to(tl.float32)
                masses = tl.sum(phi_q * z_new, 1)
                num = tl.sum(S * phi_q[:, :, None], 1)
                mass = tl.sum(masses, 0)

            xq = tl.load(q + g * q_h + d, mask=d < D, other=0.0).to(tl.float32) * scale
            xs = None
            in_window = is_new
            if q_sink is not None:
                in_window = is_new & (WINDOW > 0)
                rows_before = (row * heads + head) * G + g
                xs = tl.load(q_sink + rows_before * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
            acc = tl.zeros([LANES, BV], tl.float32)
            dens = tl.zeros([LANES], tl.float32)
            tops = tl.full([LANES], EMPTY / 2, tl.float32)
            acc, dens, tops = attend_rows(
                acc, dens, tops, xq, sink_ks, sink_vs, sink_seen | (is_new & near), softcap, SOFTCAP, xs, in_window
            )
            if WINDOW > 0:
                acc, dens, tops = attend_rows(acc, dens, tops, xq, ring_ks, ring_vs, ring_seen, softcap, SOFTCAP)
            for start in range(BW, WINDOW, BW):
                seen = is_seen(start + ring, at, recent, WINDOW)
                ks = load_rows(ring_k, start + ring, seen, d, D)
                vs = load_rows(ring_v, start + ring, seen, c, V)
                acc, dens, tops = attend_rows(acc, dens, tops, xq, ks, vs, seen, softcap, SOFTCAP)

            # One normaliser.
            top = tl.max(tops, 0)
            if FAR:
                top = tl.maximum(top, log_far + tl.log(tl.maximum(tl.abs(mass), FAR_FLOOR)))
            if sink_logits is not None:
                sink_logit = tl.load(sink_logits + head * G + g).to(tl.float32)
                top = tl.maximum(top, sink_logit)
            weights = tl.exp(tops - top)
            acc = acc * weights[:, None]
            dens = dens * weights
            if FAR:
                take = tl.exp(log_far - top)
                acc += num * take
                dens += masses * take
            acc = tl.sum(acc, 0)
            den = tl.sum(dens, 0)
            if sink_logits is not None:
                den += tl.exp(sink_logit - top)
            floor = tl.where(den < 0, -DENOMINATOR_FLOOR, DENOMINATOR_FLOOR)
            acc = acc / tl.where(tl.abs(den) < DENOMINATOR_FLOOR, floor, den)
            tl.store(out + g * out_h + c, acc.to(out.dtype.element_ty), mask=c < V)

        tl.debug_barrier()
        if WINDOW > 0:
            tl.store(ring_v + at * V + c, v_new, mask=c < V)
        if SINKS > 0:
            tl.store(sink_v + p * V + c, v_new, mask=c < tl.where(is_sink, V, 0))

    # What every part has read.
    if FAR:
        tl.store(z + f, z_new, mask=f < F)
        tl.store(m + place, m_new)
    if WINDOW > 0:
        tl.store(ring_k + at * D + d, k_new, mask=d < D)
        if ring_f is not None:
            df = tl.arange(0, BDF)
            tl.store(ring_f + at * DF + df, tl.load(kf + df, mask=df < DF, other=0.0), mask=df < DF)
        if decay is not None:
            tl.store(ring_decay + at, gate)
    if SINKS > 0:
        tl.store(sink_k + p * D + d, k_new, mask=d < tl.where(is_sink, D, 0))
    tl.store(length + place, p + 1)


# ---------------------------------------------------------------------------------------------------------- launch

STATE_TILE = 128 * 256
"""Largest part ``[BF, BV]`` of a state that one program holds in its registers."""
STATE_NUMBERS, OTHER_BYTES = 64, 32
"""Numbers a thread holds of the state where 16 warps are enough, bytes of a block of the ring or of a projection."""
REGISTERS = {4: 168, 8: 128, 16: 128}
"""Of a thread, by warps: three programs fit a multiprocessor, or two; some load while others compute."""


@torch.no_grad()
def decode_step(
    slots: DecodeSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: KernelFeatureMap | Projected | None,
    decay: Tensor | None = None,
    far_bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_far: Tensor | None = None,
    k_far: Tensor | None = None,
    q_sink: Tensor | None = None,
    slot_indices: Tensor | None = None,
    out: Tensor | None = None,
    num_warps: int | None = None,
    window_block: int | None = None,
    registers: int | None = None,
) -> Tensor:
    """Attention of one new token per sequence, and its entry into the memory, which is changed in place.

    One kernel launch where the map is a :class:`Projected`; without waiting for the device and with all sizes fixed, so
    it can be captured in a CUDA graph. Not differentiable. Options and results are those of
    :func:`~linattn.kernels.kernel_attention` with ``T = 1``.

    Args:
        slots: the memory; it settles the window, the sinks, and whether there is decay or a far branch.
        q: ``[N, H, D]``. k: ``[N, Hkv, D]``. v: ``[N, Hkv, V]``: float16, bfloat16 or float32, that of the slots.
        feature_map: φ, or its ``projected()``, made once: then nothing but this kernel runs (``scale`` is required).
            None if the slots have no features.
        decay: ``[Hkv]`` or ``[N, Hkv]`` log-gates ≤ 0 of the new tokens.
        far_bias, sink_logits: ``[H]``. softcap, scale: as in ``kernel_attention``.
        q_far, k_far: ``[N, H, D']``, ``[N, Hkv, D']`` what the map sees, if not q and k.
        q_sink: ``[N, H, D]`` what meets the sinks that the window has left behind, if not q.
        slot_indices: ``[N]`` int32 or int64, the slot of each row, without repeats; a negative one is an idle row: it
            answers zero and touches nothing. Default: row i is slot i.
        out: ``[N, H, V]`` to write to.
        num_warps: warps of a program. Default by the size of the state. window_block: rows of the window at a time, a
            power of two. registers: the most a thread may have.

    Returns:
        ``[N, H, V]`` in the dtype of v.
    """
    _check(slots, q, k, v, feature_map, decay, q_far, k_far, q_sink, slot_indices, out)
    if far_bias is not None and feature_map is None:
        raise OptionError("far_bias: shapes the far branch, which the slots do not have; drop it.")
    if scale is None:
        if isinstance(feature_map, Projected):
            raise OptionError("scale: a Projected does not know it; pass scale=feature_map.scale.")
        scale = q.shape[-1] ** -0.5 if feature_map is None else feature_map.scale
    return _step(
        slots, q, k, v, feature_map, decay, far_bias, sink_logits, softcap, scale, q_far, k_far, q_sink, slot_indices,
        out, autocast_dtype(q), num_warps, window_block, registers,
    )  # fmt: skip


def takes(call: Call) -> bool:
    """Whether :func:`attend_step` can answer a call: one more token after a state, nothing to roll back or train."""
    tensors: tuple[Tensor | None, ...] = (call.q, call.k, call.v, call.q_far, call.k_far, call.q_sink)
    tensors += (call.decay, call.far_bias, call.sink_logits)
    parameters = getattr(call.feature_map, "parameters", lambda: ())()
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *parameters))
    if call.state is None or trains or any(t.requires_grad for t in call.state.tensors().values()):
        return False
    plain = call.causal and call.mask is None and call.cu_seqlens is None
    return plain and call.q.shape[1] == 1 and call.lookback == 0 == call.state.lookback


@torch.no_grad()
def attend_step(call: Call) -> tuple[Tensor, AttentionState | None]:
    """A call that :func:`takes` accepts, on a copy of its state."""
    if call.state is None:
        raise RuntimeError("attend_step() was called without a state")

    def token(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, 0]

    state = call.state
    if call.k_far is not None and state.recent_far_k is not None:
        state = dataclasses.replace(state, recent_far_k=state.recent_far_k.to(call.k_far.dtype))
    slots = DecodeSlots.from_state(state, dtype=call.k.dtype)
    out = _step(
        slots, call.q[:, 0], call.k[:, 0], call.v[:, 0], call.feature_map, token(call.decay), call.far_bias,
        call.sink_logits, call.softcap, call.scale, token(call.q_far), token(call.k_far), token(call.q_sink), None,
        None, call.autocast,
    )  # fmt: skip
    return out[:, None], slots.to_state() if call.return_state else None


def _step(
    slots: DecodeSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: KernelFeatureMap | Projected | None,
    decay: Tensor | None,
    far_bias: Tensor | None,
    sink_logits: Tensor | None,
    softcap: float | None,
    scale: float,
    q_far: Tensor | None,
    k_far: Tensor | None,
    q_sink: Tensor | None,
    slot_indices: Tensor | None,
    out: Tensor | None,
    autocast_to: torch.dtype | None,
    num_warps: int | None = None,
    window_block: int | None = None,
    registers: int | None = None,
) -> Tensor:
    n, heads, head_dim = q.shape
    kv_heads, value_dim, features = k.shape[1], v.shape[2], slots.feature_dim
    if out is None:
        out = v.new_empty(n, heads, value_dim)
    if n == 0:
        return out
    qf, kf = q if q_far is None else q_far, k if k_far is None else k_far
    found = feature_map
    if found is not None and not isinstance(found, Projected):
        found = getattr(feature_map, "projected", lambda: None)()
    phi = log_phi = log_q = None
    weights: list[Tensor | None] = [None] * 4
    if found is not None:
        weights = [None if w is None else w.detach().to(q.device).contiguous() for w in found[1:5]]
    elif feature_map is not None and not isinstance(feature_map, Projected):
        at, leaving = _leaving(slots, kf, slot_indices)
        qf, log_q = _given(feature_map, "queries", qf, at, autocast_to)
        phi, log_phi = _given(feature_map, "keys", leaving, (at - slots.window).clamp_min(0), autocast_to)

    q, k, v, qf, kf = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, qf, kf))
    if decay is not None:
        decay = decay.expand(n, kv_heads)
    window, sinks = slots.window, slots.sinks
    bf, bd, bv = (triton.next_power_of_2(max(size, 16)) for size in (features, head_dim, value_dim))
    while features and bf * bv > STATE_TILE and bv > 16:
        bv //= 2
    bdf = triton.next_power_of_2(kf.shape[-1])
    if num_warps is None:
        num_warps = min(max(bf * bv // (32 * STATE_NUMBERS), 4), 16) if features else 4
    threads = 32 * num_warps
    lanes, map_lanes = (max(4 * threads // size, 1) for size in (bv, bf))
    bf = max(bf, lanes)
    block = threads * OTHER_BYTES // (2 if bf * bv > threads * STATE_NUMBERS else 1)
    if window_block is None:
        window_block = min(triton.next_power_of_2(max(window, 1)), block // (max(bd, bv) * k.element_size()))
    weight_size = 4 if weights[0] is None else weights[0].element_size()
    most = registers or REGISTERS.get(num_warps, 128)
    options = {"maxnreg": min(most, 65536 // threads)} if NVIDIA else {}
    weight_heads = [0 if w is None else w.shape[-3] for w in weights[:2]]
    step_kernel[(n * kv_heads,)](
        q, q.stride(0), q.stride(1),
        k, k.stride(0), k.stride(1),
        v, v.stride(0), v.stride(1),
        qf, qf.stride(0), qf.stride(1),
        kf, kf.stride(0), kf.stride(1),
        None if q_sink is None else q_sink.contiguous(),
        phi, log_phi, log_q,
        weights[0], weights[1], *weight_heads, weights[2], weights[3],
        far_bias if features else None, sink_logits,
        decay, *((0, 0) if decay is None else decay.stride()),
        slots.kv, slots.k, slots.log_scale, slots.length,
        slots.ring_k, slots.ring_v, slots.ring_far_k, slots.ring_decay, slots.sink_k, slots.sink_v, slot_indices,
        out, out.stride(0), out.stride(1),
        scale, softcap or 0.0, found.norm if found is not None else 0.0, found.constant if found is not None else 0.0,
        kv_heads,
        G=heads // kv_heads, D=head_dim, V=value_dim, DF=kf.shape[-1], F=features,
        BD=bd, BV=bv, BDF=bdf, BF=bf, PART=max(min(bdf, block // (bf * weight_size)), map_lanes),
        WINDOW=window, BW=max(window_block, lanes),
        SINKS=sinks, BS=max(triton.next_power_of_2(sinks + 1), lanes), LANES=lanes, MAP_LANES=map_lanes,
        FAR=features > 0, ACT=ACTIVATIONS["given" if found is None else found.activation],
        MIRROR=features // 2 if found is not None and found.mirrored else features, SOFTCAP=bool(softcap),
        num_warps=num_warps, **options,
    )  # fmt: skip
    return out


def _leaving(slots: DecodeSlots, kf: Tensor, slot_indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Position ``[N]`` of each new token, and the key ``[N, Hkv, D']`` that leaves the window for it."""
    rows = torch.arange(len(kf), device=kf.device) if slot_indices is None else slot_indices.long().clamp_min(0)
    at = slots.length[rows, 0]
    if slots.window == 0:
        return at, kf
    ring = slots.ring_k if slots.ring_far_k is None else slots.ring_far_k
    return at, ring[rows, :, at % slots.window]


def _given(
    feature_map: KernelFeatureMap, kind: str, x: Tensor, positions: Tensor, autocast_to: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Features ``[N, H, F]`` and log-scales ``[N, H]`` of one token a row, from the map itself."""
    forward = feature_map.forward_queries if kind == "queries" else feature_map.forward_keys
    with autocast(x, autocast_to):
        values, log_scale = forward(x[:, None], positions[:, None]) if feature_map.positional else forward(x[:, None])
    return values[:, 0].contiguous(), None if log_scale is None else log_scale[:, 0].float().contiguous()


def _check(
    slots: DecodeSlots,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: KernelFeatureMap | Projected | None,
    decay: Tensor | None,
    q_far: Tensor | None,
    k_far: Tensor | None,
    q_sink: Tensor | None,
    slot_indices: Tensor | None,
    out: Tensor | None,
) -> None:
    kv_heads, head_dim, value_dim = slots.kv.shape[1], slots.ring_k.shape[-1], slots.ring_v.shape[-1]
    n, heads = q.shape[:2]
    far_dim = None if slots.ring_far_k is None else slots.ring_far_k.shape[-1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
        "q": (q, (n, heads, head_dim)),
        "k": (k, (n, kv_heads, head_dim)),
        "v": (v, (n, kv_heads, value_dim)),
        "q_far": (q_far, None if far_dim is None else (n, heads, far_dim)),
        "k_far": (k_far, None if far_dim is None else (n, kv_heads, far_dim)),
    }
    for name, (t, shape) in expected.items():
        if (t is None) != (shape is None) or (t is not None and t.shape != shape):
            got = None if t is None else tuple(t.shape)
            raise ShapeError(f"{name}: got {got}, expected {shape}, which the slots were made for.")
        dtype = slots.ring_far_k.dtype if slots.ring_far_k is not None and name == "k_far" else slots.ring_k.dtype
        if t is not None and name != "q_far" and t.dtype != dtype:
            raise DtypeError(f"{name}: got {t.dtype}, expected {dtype} as in the slots; cast it.")
    if q_sink is not None:
        if not slots.sinks:
            raise OptionError("q_sink: meets the sinks, which the slots do not have; drop it.")
        if q_sink.shape != q.shape:
            raise ShapeError(f"q_sink: got {tuple(q_sink.shape)}, expected {tuple(q.shape)} as q has.")
    if heads % kv_heads:
        raise ShapeError(f"q: got {heads} heads, expected a multiple of the slots' {kv_heads} key/value heads.")
    if (decay is None) != (slots.ring_decay is None):
        raise StateError(
            f"decay: {'missing' if decay is None else 'given'}, but the slots were made with "
            f"decay={slots.ring_decay is not None}."
        )
    if decay is not None and decay.shape not in ((kv_heads,), (n, kv_heads)):
        raise ShapeError(f"decay: got {tuple(decay.shape)}, expected {(kv_heads,)} or {(n, kv_heads)}.")
    if (feature_map is None) != (slots.feature_dim == 0):
        raise StateError(f"feature_map: got {feature_map!r} for slots with feature_dim={slots.feature_dim}.")
    if slot_indices is None:
        if n != slots.count:
            raise ShapeError(
                f"q: got {n} rows for {slots.count} slots; pass slot_indices= to say which slots they are."
            )
    elif slot_indices.dtype not in (torch.int32, torch.int64) or slot_indices.shape != (n,):
        raise ShapeError(
            f"slot_indices: got {slot_indices.dtype} {tuple(slot_indices.shape)}, expected int32 or int64 {(n,)}."
        )
    if out is not None and (out.shape != (n, heads, value_dim) or out.stride(-1) != 1):
        raise ShapeError(
            f"out: got {tuple(out.shape)} with strides {out.stride()}, expected {(n, heads, value_dim)} with "
            "contiguous last dimension."
        )
