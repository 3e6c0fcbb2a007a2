"""Softmax attention whose keys have an expiry, and how much attention a key gets.

Key j of a key/value head is near to the queries at entries j ≤ t < e_j and far to those at t ≥ e_j; one of expiry < 0
is neither. One program takes one block of queries (of keys, in their gradient) and reads all keys that may be seen:
work is O(T²), memory O(T). With p_tj = exp(s_tj − lse_t), o_t = Σ_j p_tj v_j and the cotangents do and dlse,

    ds_tj = p_tj (do_t · v_j − δ_t),   δ_t = do_t · o_t − dlse_t

gives dq_t = scale Σ_j ds_tj k_j, dk_j = scale Σ_t ds_tj q_t, and dv_j = Σ_t p_tj do_t. Exponents have base 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.errors import UnsupportedError
from linattn.kernels.triton.device import EMPTY, LOG2_E, exp2
from linattn.kernels.triton.launch import block, precision
from linattn.kernels.triton.runtime import INTERPRETED, launch
from linattn.kernels.triton.window import LN_2, attend_block, cap


@triton.jit
def rows_of(base, first, valid, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[C, BLOCK]`` of ``WIDTH`` contiguous columns at the C rows from ``first``, zeros where not ``valid [C]``."""
    columns = tl.arange(0, BLOCK)
    offsets = tl.arange(0, valid.shape[0])[:, None] * stride + columns[None, :]
    pointers = base + (tl.full([], 0, tl.int64) + first) * stride + offsets
    if BLOCK <= WIDTH:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    return tl.load(pointers, mask=valid[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def save_rows(base, first, valid, stride, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    offsets = tl.arange(0, valid.shape[0])[:, None] * stride + columns[None, :]
    pointers = base + (tl.full([], 0, tl.int64) + first) * stride + offsets
    tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def meet(t, at, ends, FAR: tl.constexpr):
    """Whether queries at entries ``t`` see keys ``at`` of expiry ``ends``."""
    if FAR:
        return (at <= t) & (ends >= 0) & (t >= ends)
    else:
        return (at <= t) & (t < ends)


@triton.jit
def forward(
    p_q, p_k, p_v, p_ends, p_start, p_out, p_lse, scale, softcap, queries, keys,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr, SOFTCAP: tl.constexpr, OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output ``[B, T, H, V]`` and log mass ``[B, T, H]`` of one block of C queries of one head."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * C  # the longest first
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // K)
    rows = first + tl.arange(0, C)
    own = rows < queries
    start = tl.load(p_start + b).to(tl.int32)
    t = start + rows
    b_q = rows_of(p_q + (b * queries * H + h) * D, first, own, H * D, D, BD).to(OT)
    acc = tl.zeros([C, BV], tl.float32)
    den = tl.zeros([C], tl.float32)
    top = tl.full([C], EMPTY, tl.float32)
    for j in range(0, tl.minimum(keys, start + first + C), N):
        at = j + tl.arange(0, N)
        there = at < keys
        b_k = rows_of(p_k + (b * keys * K + g) * D, j, there, K * D, D, BD)
        b_v = rows_of(p_v + (b * keys * K + g) * V, j, there, K * V, V, BV)
        ends = tl.load(p_ends + (b * K + g) * keys + at, mask=there, other=-1)
        seen = meet(t[:, None], at[None, :], ends[None, :], FAR)
        acc, den, top = attend_block(acc, den, top, b_q, b_k, b_v, seen, scale, softcap, SOFTCAP, OT, PRECISION)
    some = den > 0
    den = tl.where(some, den, 1.0)
    lse = tl.where(some, (top + tl.log2(den)) * LN_2, EMPTY)
    tl.store(p_lse + (b * queries + rows) * H + h, lse, mask=own)
    save_rows(p_out + (b * queries * H + h) * V, first, own, H * V, acc / den[:, None], V, BV)


@triton.jit
def backward_q(
    p_q, p_k, p_v, p_ends, p_start, p_lse, p_delta, p_dout, p_dq, scale, softcap, queries, keys,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr, SOFTCAP: tl.constexpr, OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient ``[B, T, H, D]`` of one block of queries: dq_t = scale Σ_j ds_tj k_j."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * C
    b, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    g = h // (H // K)
    rows = first + tl.arange(0, C)
    own = rows < queries
    start = tl.load(p_start + b).to(tl.int32)
    t = start + rows
    b_q = rows_of(p_q + (b * queries * H + h) * D, first, own, H * D, D, BD).to(OT)
    b_do = rows_of(p_dout + (b * queries * H + h) * V, first, own, H * V, V, BV).to(OT)
    lse = tl.load(p_lse + (b * queries + rows) * H + h, mask=own, other=0.0) * LOG2_E
    delta = tl.load(p_delta + (b * queries + rows) * H + h, mask=own, other=0.0)
    acc = tl.zeros([C, BD], tl.float32)
    for j in range(0, tl.minimum(keys, start + first + C), N):
        at = j + tl.arange(0, N)
        there = at < keys
        b_k = rows_of(p_k + (b * keys * K + g) * D, j, there, K * D, D, BD).to(OT)
        b_v = rows_of(p_v + (b * keys * K + g) * V, j, there, K * V, V, BV).to(OT)
        ends = tl.load(p_ends + (b * K + g) * keys + at, mask=there, other=-1)
        seen = meet(t[:, None], at[None, :], ends[None, :], FAR)
        s, slope = cap(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, softcap, SOFTCAP)
        p = exp2(tl.where(seen, s - lse[:, None], EMPTY))
        ds = p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - delta[:, None]) * slope
        acc = tl.dot(ds.to(OT), b_k, acc, input_precision=PRECISION)
    save_rows(p_dq + (b * queries * H + h) * D, first, own, H * D, acc * scale, D, BD)


@triton.jit
def backward_kv(
    p_q, p_k, p_v, p_ends, p_start, p_lse, p_delta, p_dout, p_dk, p_dv, scale, softcap, queries, keys,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, FAR: tl.constexpr, SOFTCAP: tl.constexpr, OT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients ``[B, L, Hkv, ·]`` of one block of N keys: dk_j = scale Σ_t ds_tj q_t, dv_j = Σ_t p_tj do_t."""
    b, g = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    at = tl.program_id(0) * N + tl.arange(0, N)
    own = at < keys
    start = tl.load(p_start + b).to(tl.int32)
    b_k = rows_of(p_k + (b * keys * K + g) * D, tl.program_id(0) * N, own, K * D, D, BD).to(OT)
    b_v = rows_of(p_v + (b * keys * K + g) * V, tl.program_id(0) * N, own, K * V, V, BV).to(OT)
    ends = tl.load(p_ends + (b * K + g) * keys + at, mask=own, other=-1)
    dk = tl.zeros([N, BD], tl.float32)
    dv = tl.zeros([N, BV], tl.float32)
    # Queries from the block's first key on; near keys have none after the last expiry.
    begin = tl.maximum(tl.program_id(0) * N - start, 0) // C * C
    stop = queries if FAR else tl.minimum(queries, tl.max(ends, 0) - start)
    for i in range(H // K):
        h = g * (H // K) + i
        for first in range(begin, stop, C):
            rows = first + tl.arange(0, C)
            there = rows < queries
            b_q = rows_of(p_q + (b * queries * H + h) * D, first, there, H * D, D, BD).to(OT)
            b_do = rows_of(p_dout + (b * queries * H + h) * V, first, there, H * V, V, BV).to(OT)
            lse = tl.load(p_lse + (b * queries + rows) * H + h, mask=there, other=0.0) * LOG2_E
            delta = tl.load(p_delta + (b * queries + rows) * H + h, mask=there, other=0.0)
            seen = meet((start + rows)[None, :], at[:, None], ends[:, None], FAR) & there[None, :]
            s, slope = cap(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), scale, softcap, SOFTCAP)
            p = exp2(tl.where(seen, s - lse[None, :], EMPTY))
            dv = tl.dot(p.to(OT), b_do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - delta[None, :]) * slope
            dk = tl.dot(ds.to(OT), b_q, dk, input_precision=PRECISION)
    save_rows(p_dk + (b * keys * K + g) * D, tl.program_id(0) * N, own, K * D, dk * scale, D, BD)
    save_rows(p_dv + (b * keys * K + g) * V, tl.program_id(0) * N, own, K * V, dv, V, BV)


@triton.jit
def received(
    p_q, p_k, p_lse, p_sums, scale, softcap, length, after,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr, LARGEST: tl.constexpr, OT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{t ≥ j + after} exp(s_tj − lse_t) ``[B, Hkv, T]`` of one block of N keys, a mean over the query heads.

    LARGEST: instead of sum and mean the maximum over these queries and heads.
    """
    b, g = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    at = tl.program_id(0) * N + tl.arange(0, N)
    own = at < length
    b_k = rows_of(p_k + (b * length * K + g) * D, tl.program_id(0) * N, own, K * D, D, BD).to(OT)
    total = tl.zeros([N], tl.float32)
    for i in range(H // K):
        h = g * (H // K) + i
        for first in range((tl.program_id(0) * N + after) // C * C, length, C):
            rows = first + tl.arange(0, C)
            there = rows < length
            b_q = rows_of(p_q + (b * length * H + h) * D, first, there, H * D, D, BD).to(OT)
            lse = tl.load(p_lse + (b * length + rows) * H + h, mask=there, other=0.0) * LOG2_E
            seen = (rows[None, :] - at[:, None] >= after) & there[None, :]
            s, _ = cap(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), scale, softcap, SOFTCAP)
            share = exp2(tl.where(seen, s - lse[None, :], EMPTY))
            if LARGEST:
                total = tl.maximum(total, tl.max(share, 1))
            else:
                total += tl.sum(share, 1)
    tl.store(p_sums + (b * K + g) * length + at, total if LARGEST else total / (H // K), mask=own)


# ------------------------------------------------------------------------------------------------------- launches


def _sizes(q: Tensor, k: Tensor, softcap: float) -> dict[str, Any]:
    found = precision(q.dtype, torch.backends.cuda.matmul.allow_tf32)
    tile = 64 if q.dtype == torch.bfloat16 or found["PRECISION"] == "tf32" else 32  # else registers run out
    tile = 16 if INTERPRETED and q.shape[1] <= 64 else tile
    return found | {
        "H": q.shape[2], "K": k.shape[2], "D": q.shape[3], "BD": block(q.shape[3]), "C": tile, "N": tile,
        "SOFTCAP": bool(softcap), "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def _run(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, start: Tensor, scale: float, softcap: float, far: bool
) -> tuple[Tensor, Tensor]:
    q, k, v, ends, start = (x.contiguous() for x in (q, k, v, ends, start))
    out, lse = _fake(q, k, v)
    sizes = _sizes(q, k, softcap) | {"V": v.shape[3], "BV": block(v.shape[3]), "FAR": far}
    queries, keys = q.shape[1], k.shape[1]
    grid = (triton.cdiv(queries, sizes["C"]), q.shape[0] * q.shape[2])
    if lse.numel():
        launch(forward, grid, q, k, v, ends, start, out, lse, scale, softcap or 1.0, queries, keys, **sizes)
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    return wide, wide.new_empty(q.shape[:3])


def _run_backward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, start: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float, softcap: float, far: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = ((out * dout).sum(-1) - dlse).contiguous()
    if q.dtype == torch.bfloat16:
        dout = dout.to(q.dtype)  # as the products take it, read once for every block of keys
    q, k, v, ends, start, lse, dout = (x.contiguous() for x in (q, k, v, ends, start, lse, dout))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    sizes = _sizes(q, k, softcap) | {"V": v.shape[3], "BV": block(v.shape[3]), "FAR": far}
    (batch, queries, heads, _), (keys, kv_heads) = q.shape, k.shape[1:3]
    given = (q, k, v, ends, start, lse, delta, dout)
    rest = (scale, softcap or 1.0, queries, keys)
    if dq.numel():
        launch(backward_q, (triton.cdiv(queries, sizes["C"]), batch * heads), *given, dq, *rest, **sizes)
    if dk.numel():
        launch(backward_kv, (triton.cdiv(keys, sizes["N"]), batch * kv_heads), *given, dk, dv, *rest, **sizes)
    return dq, dk, dv


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _run_received(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float, after: int, largest: bool) -> Tensor:
    q, k, lse = (x.contiguous() for x in (q, k, lse))
    sums = _fake_received(q, k)
    sizes = _sizes(q, k, softcap) | {"LARGEST": largest}
    grid = (triton.cdiv(q.shape[1], sizes["N"]), k.shape[0] * k.shape[2])
    if sums.numel():
        launch(received, grid, q, k, lse, sums, scale, softcap or 1.0, q.shape[1], after, **sizes)
    return sums


def _fake_received(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float32)


_library = torch.library.Library("linattn", "FRAGMENT")
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor expiry, Tensor start"
_SETTINGS = "float scale, float softcap, bool far"
for _name, _schema, _real, _imitation in (
    ("expiring_attention", f"({_GIVEN}, {_SETTINGS}) -> (Tensor, Tensor)", _run, _fake),
    (
        "expiring_attention_backward",
        f"({_GIVEN}, Tensor out, Tensor mass, Tensor dout, Tensor dmass, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
        _run_backward,
        _fake_backward,
    ),
    (
        "received_attention",
        "(Tensor q, Tensor k, Tensor mass, float scale, float softcap, SymInt after, bool largest) -> Tensor",
        _run_received,
        _fake_received,
    ),
):
    _library.define(_name + _schema)
    torch.library.impl(f"linattn::{_name}", "default", _real, lib=_library)
    torch.library.register_fake(f"linattn::{_name}", _imitation, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]


def _autograd(ctx: Any, dout: Tensor, dmass: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.linattn.expiring_attention_backward(*ctx.saved_tensors, dout, dmass, *ctx.settings)
    return (*grads, *(None,) * 5)


torch.library.register_autograd("linattn::expiring_attention", _autograd, setup_context=_setup_context, lib=_library)


def _check(q: Tensor) -> None:
    if not (q.is_cuda or INTERPRETED):
        raise UnsupportedError(f"q: is on {q.device}; Triton kernels need a GPU.")
    if q.dtype == torch.float64:
        raise UnsupportedError("q: got float64, which Triton kernels do not compute in; use float32 or less.")


def expiring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    expiry: Tensor,
    *,
    scale: float,
    far: bool = False,
    softcap: float | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that have not expired, and the logarithm of its mass.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, L, Hkv, D]``. v: ``[B, L, Hkv, V]``.
        expiry: ``[B, Hkv, L]`` int32, the first query to which each key is far; one of a negative number is nobody's.
        scale: of the logits. softcap: logits become softcap · tanh(logit / softcap).
        far: the expired keys instead of those that have not.
        start: ``[B]`` int64, the key that stands where the first query does; default 0, with L = T.

    Returns:
        ``[B, T, H, V]`` and ``[B, T, H]`` in float32, differentiable by q, k and v; 0 and −1e30 for a query without
        keys.
    """
    _check(q)
    if start is None:
        start = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    found = torch.ops.linattn.expiring_attention(q, k, v, expiry, start, scale, softcap or 0.0, far)
    return found[0], found[1]


@torch.no_grad()
def received_attention(
    q: Tensor,
    k: Tensor,
    mass: Tensor,
    *,
    scale: float,
    after: int,
    softcap: float | None = None,
    largest: bool = False,
) -> Tensor:
    """How much attention each key gets from the queries from ``after`` tokens behind it on.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, T, Hkv, D]``. mass: ``[B, T, H]`` float32, the log-sum-exp of each query's logits.

    Returns:
        ``[B, Hkv, T]`` float32: sums over the queries, means over the query heads of a key/value head; or the
        ``largest`` share that any single one of these queries and heads gives, 0 where there is none.
    """
    _check(q)
    found: Tensor = torch.ops.linattn.received_attention(q, k, mass.float(), scale, softcap or 0.0, after, largest)
    return found
