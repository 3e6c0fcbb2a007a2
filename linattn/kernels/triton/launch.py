"""One call of the kernels: tensors and options in, launches out. No autograd and no checks here."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language
from torch import Tensor

from linattn.kernels.triton import backward, fold, forward, window
from linattn.kernels.triton.config import Config
from linattn.kernels.triton.device import ACTIVATIONS
from linattn.kernels.triton.runtime import INTERPRETED, launch

Fields = TypeVar("Fields", bound=tuple[Any, ...])


def changed(x: Fields, **changes: Any) -> Fields:
    """A named tuple with some fields changed; ``_replace`` iterates it, which torch 2.11 cannot trace."""
    names = x._fields  # type: ignore[attr-defined]
    return type(x)(*[changes[name] if name in changes else getattr(x, name) for name in names])


class Inputs(NamedTuple):
    """Tensors of a call, in the order of the operator's schema. None where absent.

    Attributes:
        q: ``[B, T, H, D]``. k: ``[B, T, Hkv, D]``. v: ``[B, T, Hkv, V]``. Packed sequences have B = 1. A call whose
            queries read nothing but a state has no k and v.
        q_far, k_far: ``[B, T, H | Hkv, D']`` inputs of the map, or the features themselves; None: q and k.
        query_weight, key_weight, query_bias, key_bias: as in :class:`linattn.kernels.protocols.Projected`.
        query_log, key_log: ``[B, T, H]``, ``[B, T, Hkv]`` float32 log-scales of given features.
        far_bias, sink_logits: ``[H]`` float32. decay: ``[B, T, Hkv]`` float32.
        sink_k, sink_v: ``[N, S, Hkv, D | V]``; None for the first of each row of k and v.
        q_sink: ``[B, T, H, D]``, contiguous: what sinks behind the window meet instead of q.
        state_kv, state_k, state_m: ``[N, Hkv, F, V]``, ``[N, Hkv, F]``, ``[N, Hkv]`` float32: the memory before each
            sequence, seen from its first token; without log-scales relative to one.
        starts: ``[N + 1]`` first slot of each packed sequence. lengths: ``[N (+ 1)]`` tokens. bases: ``[N (+ 1)]``
            position of the first token. seg_sequence: ``[segments]`` and seg_first: ``[N + 1]`` of packed sequences.
            All int64 but the last two, which are int32. Packed, entry N stands for nothing: it has no tokens.
    """

    q: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    q_far: Tensor | None = None
    k_far: Tensor | None = None
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    query_log: Tensor | None = None
    key_log: Tensor | None = None
    far_bias: Tensor | None = None
    sink_logits: Tensor | None = None
    decay: Tensor | None = None
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None
    q_sink: Tensor | None = None
    state_kv: Tensor | None = None
    state_k: Tensor | None = None
    state_m: Tensor | None = None
    starts: Tensor | None = None
    lengths: Tensor | None = None
    bases: Tensor | None = None
    seg_sequence: Tensor | None = None
    seg_first: Tensor | None = None


FIRST_TABLE = Inputs._fields.index("starts")
"""Inputs from here on are integers without gradient."""


class Options(NamedTuple):
    """What the kernels are compiled for, beside shapes."""

    window: int
    sinks: int
    far: bool
    features: int
    """F; 0 without a far branch."""
    value_dim: int
    activation: str
    key_log: bool
    """The map has log-scales: sums keep a running maximum."""
    scale: float
    softcap: float
    """0 for none."""
    norm: float
    constant: float
    strict: bool
    """Exclude each query's own token."""
    segment: int
    """Tokens of a segment."""
    fused: bool = True
    """The kernels compute the map themselves; otherwise it is computed once, before them."""


class Stats(NamedTuple):
    """What the backward pass needs beside inputs and output.

    Attributes:
        top: ``[B, T, H]`` float32 log-scale of each row's weights; ``[0]`` where it is zero throughout.
        relative: ``[B, T, H]`` float32 log-scale of each query's far weights less top, −1e30 in rows without weight;
            ``[0]`` where it is zero throughout.
        rden: ``[B, T, H]`` float32, one over the normaliser relative to exp(top); 0 in rows without weight.
        residual: ``[B, T, H, V]`` what rounding took from the output; ``[0]`` in float32.
        kv, k, m: memory before each segment, ``[segments, Hkv, F, V]`` and so on; ``[0]`` where it is the given state.
    """

    top: Tensor
    relative: Tensor
    rden: Tensor
    residual: Tensor
    kv: Tensor
    k: Tensor
    m: Tensor


class Memory(NamedTuple):
    kv: Tensor
    k: Tensor
    m: Tensor


NARROWEST = 16 if INTERPRETED else 64
"""Columns of the narrowest tile: Triton 3.6 reads outside shared memory in some products of narrower ones on Hopper."""


def block(width: int) -> int:
    """Columns of a tile that holds ``width`` of them."""
    return max(NARROWEST, 1 << (width - 1).bit_length())


def tile(width: int, columns: int) -> tuple[int, int]:
    """Columns of each program's tile, at most so many unless 0, and how many programs share ``width`` of them."""
    if not 0 < columns < width:
        return block(width), 1
    columns = max(columns, NARROWEST)
    return (columns, -(-width // columns)) if columns < width else (block(width), 1)


def sink_rows(sinks: int) -> int:
    """Rows of the tile that holds the sinks."""
    return max(16, 1 << (sinks - 1).bit_length()) if sinks else 16


def strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


LAG_BLOCK = 256
GATE_BLOCK = 1024
SUM_BLOCK, SUM_ROWS = 64, 32
SINK_ROWS = 16 if INTERPRETED else 64
MAP_CHUNK = 16 if INTERPRETED else 64
WIDE_MAP_CHUNK = 16 if INTERPRETED else 32
MAP_PROGRAMS = 1024
LONE_PROGRAMS = 256
"""Of a map that is not fused: few, as each reads its projections and writes their gradient."""
MILD = {True: 60.0, False: 4.0}
"""Log-decay of a chunk, at most, that factors into one of its keys and one of its queries: by range in bfloat16, by
precision in float32."""
FARTHEST = 1 << 22
"""Numbers between two tokens, at most: offsets within a chunk fit 32 bits."""


def rows(x: Tensor) -> Tensor:
    """``x`` with contiguous last dimension, and tokens near each other."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(1) <= FARTHEST else x.contiguous()


def precision(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """The tensor cores' operand type and precision for inputs of ``dtype``.

    float16 goes through tf32, whose range sums over tokens do not leave, in three terms: one cuts off half a unit of
    float16's last place.
    """
    if dtype == torch.bfloat16:
        return {"OT": triton.language.bfloat16, "PRECISION": "ieee"}
    if dtype == torch.float16:
        return {"OT": triton.language.float32, "PRECISION": "tf32x3"}
    return {"OT": triton.language.float32, "PRECISION": "tf32" if tf32 else "ieee"}


class _Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    far_dim: int
    sequences: int
    segments: int
    """Of each sequence; of all, if packed."""
    total: int
    packed: bool
    top: bool


def has_top(x: Inputs, o: Options) -> bool:
    """Whether rows have a log-scale of their own."""
    return o.key_log or o.window > 0 or o.sinks > 0 or x.sink_logits is not None


def shape_of(x: Inputs, o: Options) -> _Shape:
    batch, length, heads, head_dim = x.q.shape
    packed = x.seg_first is not None
    if x.k is not None:
        kv_heads = x.k.shape[2]
    else:
        assert x.state_kv is not None
        kv_heads = x.state_kv.shape[1]
    far = x.q_far if x.q_far is not None else x.k_far
    far_dim = head_dim if far is None else far.shape[-1]
    sequences = x.seg_first.shape[0] - 1 if x.seg_first is not None else batch
    segments = x.seg_sequence.shape[0] if x.seg_sequence is not None else -(-length // o.segment)
    total = segments if packed else sequences * segments
    return _Shape(
        batch,
        length,
        heads,
        kv_heads,
        head_dim,
        o.value_dim,
        far_dim,
        sequences,
        segments,
        total,
        packed,
        has_top(x, o),
    )


def is_near(x: Inputs, o: Options) -> bool:
    """Whether the kernels of the window end the call: something enters the normaliser exactly, or there is no more."""
    return o.window > 0 or o.sinks > 0 or x.sink_logits is not None or not o.far


def gap_of(o: Options) -> int:
    """Tokens from the newest far key to its query."""
    return max(o.window, 1 if o.strict else 0)


def near_chunk(c: Config) -> int:
    """Tokens of a chunk in the kernels of the window: their tiles fit the registers of four warps."""
    return c.near_chunk or min(c.chunk, 64)


@functools.lru_cache(maxsize=1024)
def _far_dims(s: _Shape, o: Options, keys: bool, low: bool, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    return {
        "H": s.heads,
        "G": s.heads // s.kv_heads,
        "V": s.value_dim,
        "DF": s.far_dim,
        "F": o.features,
        "BV": block(s.value_dim),
        "BDF": block(s.far_dim),
        "BF": block(o.features),
        "GAP": gap_of(o) if keys else 0,
        "SINKS": o.sinks if keys else 0,
        "ACT": ACTIVATIONS[o.activation],
        "LOW": low,
        "KLOG": o.key_log,
        "PACKED": s.packed,
        **precision(dtype, tf32),
    }


@functools.lru_cache(maxsize=1024)
def _near_dims(s: _Shape, o: Options, c: Config, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    widest = max(s.head_dim, s.value_dim)
    return {
        "H": s.heads,
        "G": s.heads // s.kv_heads,
        "D": s.head_dim,
        "V": s.value_dim,
        "BD": block(s.head_dim),
        "BV": block(s.value_dim),
        "WINDOW": o.window,
        "STRICT": o.strict,
        "SOFTCAP": o.softcap > 0,
        "PACKED": s.packed,
        "C": near_chunk(c),
        "num_warps": c.near_warps if widest <= 128 else 8,
        "num_stages": c.near_stages if widest <= 64 else 1,
        "registers": c.near_registers,
        **precision(dtype, tf32),
    }


def _tf32() -> bool:
    return torch.backends.cuda.matmul.allow_tf32


def _tables(x: Inputs) -> tuple[Tensor | None, ...]:
    return x[FIRST_TABLE:]


def _heads_of(weight: Tensor | None, bias: Tensor | None) -> int:
    if weight is not None:
        return weight.shape[-3]
    return 1 if bias is None else bias.shape[-2]


def parts_of(weight: Tensor) -> int:
    """Projections that are multiplied: the dimension may be left out for one."""
    return weight.shape[0] if weight.dim() > 3 else 1


def _is_wider(weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a map's weights have bits that the operands of the products do not hold."""
    return weight is not None and dtype == torch.bfloat16 and weight.dtype != torch.bfloat16


def _starts_empty(x: Inputs, s: _Shape) -> bool:
    """Whether the memory before the first segment of a sequence is nothing, and not stored."""
    return x.state_kv is None and s.segments > 1 and not s.packed


def _lag(x: Inputs, o: Options, s: _Shape) -> Tensor | None:
    """Each query's log-decay over the tokens between it and its newest far key ``[B, T, Hkv]``."""
    gap = gap_of(o)
    if x.decay is None or gap == 0 or x.k is None:
        return None
    out = torch.empty(s.batch, s.length, s.kv_heads, dtype=torch.float32, device=x.q.device)
    blocks = max(1, min(-(-s.length // LAG_BLOCK), 4096 // s.sequences))
    launch(
        fold.lag_kernel, (s.kv_heads, s.sequences * blocks),
        x.decay, *strides(x.decay), out, x.starts, x.lengths, s.length, blocks, s.kv_heads,
        GAP=gap, BLOCK=LAG_BLOCK, PACKED=s.packed,
    )  # fmt: skip
    return out


class _Gates(NamedTuple):
    """Running sums of the segments' log-decay ``[B, T, Hkv]``, float64, and which are steep ``[segments, Hkv]``."""

    sums: Tensor | None = None
    steep: Tensor | None = None


def _gates(x: Inputs, o: Options, s: _Shape, c: Config) -> _Gates:
    if x.decay is None or not o.far:
        return _Gates()
    device = x.q.device
    sums = torch.empty(s.batch, s.length, s.kv_heads, dtype=torch.float64, device=device)
    steep = torch.empty(s.total, s.kv_heads, dtype=torch.int32, device=device)
    launch(
        fold.gate_kernel, (s.kv_heads, s.total),
        x.decay, *strides(x.decay), sums, steep, *_tables(x), s.length, s.segments, o.segment, s.kv_heads,
        MILD=MILD[x.q.dtype == torch.bfloat16], C=max(c.chunk, c.dkv_chunk), BLOCK=GATE_BLOCK, PACKED=s.packed,
    )  # fmt: skip
    return _Gates(sums, None if o.key_log else steep)


def _kinds(gates: _Gates) -> tuple[bool, ...]:
    """Values of EXACT to launch: steep segments have kernels of their own."""
    return (False,) if gates.steep is None else (False, True)


def _fold(
    x: Inputs, o: Options, s: _Shape, c: Config, gates: _Gates, *, skip: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each segment's own memory of keys: kv, k, m and its total decay. ``skip``: not the last one's of a sequence."""
    assert x.v is not None
    source = x.k_far if x.k_far is not None else x.k
    assert source is not None
    parts = _empty_parts(x, o, s, log=o.key_log)
    columns, slices = tile(s.value_dim, c.fold_slice)
    launch(
        fold.fold_kernel, (s.kv_heads * slices, s.total - s.sequences if skip else s.total),
        source, *strides(source), x.v, *strides(x.v),
        x.key_weight, _heads_of(x.key_weight, x.key_bias), x.key_bias,
        x.key_log, None, None, None,
        gates.sums,
        *_tables(x),
        *parts,
        o.norm, o.constant, s.length, s.segments, o.segment,
        H=s.kv_heads, G=s.heads // s.kv_heads, D=s.far_dim, F=o.features, V=s.value_dim,
        BD=block(s.far_dim), BF=block(o.features), BV=columns, C=c.fold_chunk, GAP=0, SKIPPED=skip,
        PLACE=1 if skip and s.segments == 2 and x.state_kv is None else 0,
        SINKS=o.sinks, ACT=ACTIVATIONS[o.activation], LOW=_is_wider(x.key_weight, x.q.dtype), LOG=o.key_log,
        REVERSE=False, PACKED=s.packed,
        num_warps=c.fold_warps, num_stages=c.fold_stages, **precision(x.q.dtype, _tf32()),
    )  # fmt: skip
    return parts


def _empty_parts(x: Inputs, o: Options, s: _Shape, *, log: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f32: dict[str, Any] = {"dtype": torch.float32, "device": x.q.device}
    return (
        torch.empty(s.total, s.kv_heads, o.features, s.value_dim, **f32),
        torch.empty(s.total, s.kv_heads, o.features, **f32),
        torch.empty((s.total, s.kv_heads) if log else (0,), **f32),
        torch.empty((s.total, s.kv_heads) if x.decay is not None else (0,), **f32),
    )


def _scan(
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    start: Memory | None,
    x: Inputs,
    s: _Shape,
    *,
    log: bool,
    reverse: bool,
    end: bool,
) -> tuple[Memory, Memory | None]:
    """Memories before (in reverse: after) each segment, in place, and the sum of them all if ``end``."""
    kv, k, m, gate = parts
    if s.segments == 2 and not s.packed and start is None and not end:
        return Memory(kv, k, m), None  # the other segment's sums lie where they are read
    features, value_dim = kv.shape[2:]
    out_m = torch.empty_like(m)
    total = None
    if end:
        n = s.sequences
        total = Memory(
            kv.new_empty(n, *kv.shape[1:]), k.new_empty(n, *k.shape[1:]), m.new_empty((n, s.kv_heads) if log else (0,))
        )
    rows_at_once = max(1, min(block(features), 4096 // block(value_dim)))
    launch(
        fold.scan_kernel, (-(-features // rows_at_once), s.kv_heads, s.sequences),
        kv, k, m, gate,
        *((None, None, None) if start is None else start),
        kv, k, out_m,
        *((None, None, None) if total is None else total),
        s.segments, x.seg_first, s.kv_heads,
        F=features, V=value_dim, BF=rows_at_once, BV=block(value_dim),
        LOG=log, DECAY=x.decay is not None, REVERSE=reverse, PACKED=s.packed, num_warps=4,
    )  # fmt: skip
    return Memory(kv, k, out_m), total


def _start(x: Inputs) -> Memory | None:
    if x.state_kv is None or x.state_k is None:
        return None
    return Memory(x.state_kv, x.state_k, x.state_m if x.state_m is not None else x.state_k)


def with_sinks(x: Inputs, o: Options) -> Inputs:
    """A call with its sinks beside its keys."""
    if not o.sinks or x.sink_k is not None or x.k is None or x.v is None:
        return x
    return changed(x, sink_k=x.k[:, : o.sinks].contiguous(), sink_v=x.v[:, : o.sinks].contiguous())


def featured(x: Inputs, o: Options, *, queries: bool = True) -> tuple[Inputs, Options]:
    """A call whose map is not fused, with its features given instead; of the keys alone without ``queries``.

    Every pass computes them anew: kept for the backward pass, they would take the memory of q and k once more.
    """
    if o.fused or o.activation == "given":
        return x, o
    q_far = k_far = query_log = key_log = None
    if queries:
        q_far, query_log = _features(x.q if x.q_far is None else x.q_far, x.query_weight, x.query_bias, o)
    if x.k is not None:
        k_far, key_log = _features(x.k if x.k_far is None else x.k_far, x.key_weight, x.key_bias, o)
    without = dict.fromkeys(("query_weight", "key_weight", "query_bias", "key_bias"))
    x = changed(x, q_far=q_far, k_far=k_far, query_log=query_log, key_log=key_log, **without)
    return x, changed(o, activation="given", fused=True)


def _features(x: Tensor, weight: Tensor | None, bias: Tensor | None, o: Options) -> tuple[Tensor, Tensor | None]:
    """Features ``[B, T, H, F]`` as the products take them, and log-scales ``[B, T, H]`` if the map has any."""
    batch, length, heads, dim = x.shape
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    phi = torch.empty(batch, length, heads, o.features, dtype=dtype, device=x.device)
    log = torch.empty(batch, length, heads, dtype=torch.float32, device=x.device) if o.key_log else None
    spans, span = _spans(batch, length, heads, LONE_PROGRAMS if weight is not None else MAP_PROGRAMS)
    narrow = _is_narrow(x, weight)
    launch(
        forward.features_kernel, (heads, batch * spans),
        x, *strides(x), weight, _heads_of(weight, bias), bias,
        phi, log,
        o.norm, o.constant, length, spans, span,
        H=heads, D=dim, F=o.features, BD=block(dim), BF=block(o.features),
        C=MAP_CHUNK if narrow else WIDE_MAP_CHUNK,
        ACT=ACTIVATIONS[o.activation], LOW=_is_wider(weight, x.dtype), **precision(x.dtype, _tf32()),
        num_warps=4 if narrow else 8, num_stages=2 if narrow else 1,
    )  # fmt: skip
    return phi, log


def _spans(batch: int, length: int, heads: int, programs: int) -> tuple[int, int]:
    """Spans of each sequence and tokens of a span, one for each program of a map."""
    span = max(MAP_CHUNK, -(-batch * length * heads // programs // MAP_CHUNK) * MAP_CHUNK)
    return -(-length // span), span


def _is_narrow(x: Tensor, weight: Tensor | None) -> bool:
    """Whether projections of MAP_CHUNK rows fit the registers."""
    return weight is None or (x.dtype == torch.bfloat16 and parts_of(weight) == 1 and block(weight.shape[-1]) <= 128)


def memory_before(x: Inputs, o: Options, c: Config, gates: _Gates | None = None) -> Memory:
    """The memory before each segment, each tensor ``[0]`` where it is the given state or nothing."""
    x, o = featured(x, o, queries=False)
    s = shape_of(x, o)
    if o.far and x.v is not None and (s.segments > 1 or s.packed):
        parts = _fold(x, o, s, c, _gates(x, o, s, c) if gates is None else gates, skip=not s.packed)
        return _scan(parts, _start(x), x, s, log=o.key_log, reverse=False, end=False)[0]
    nothing = torch.empty(0, dtype=torch.float32, device=x.q.device)
    return Memory(nothing, nothing, nothing)


def _memory_before(x: Inputs, o: Options, s: _Shape, found: Memory) -> tuple[Tensor | None, ...]:
    """The memory before each segment, as the kernels take it."""
    if not o.far:
        return None, None, None
    if found.kv.numel():
        return found
    start = _start(x)
    if start is not None and s.packed:
        owner = x.seg_sequence.clamp_max(s.sequences - 1)  # type: ignore[union-attr]
        return tuple(t[owner] for t in start)
    if start is not None and s.segments > 1:  # queries alone: every segment reads the same
        return tuple(t.repeat_interleave(s.segments, 0) for t in start)
    return start or (None, None, None)


def final_memory(x: Inputs, o: Options, c: Config) -> tuple[Memory, Tensor]:
    """The memory after each sequence's ``lengths`` keys, the state before it included, and each segment's decay.

    ``q`` stands for heads only: it is not read.
    """
    x, o = featured(x, o, queries=False)
    s = shape_of(x, o)
    parts = _fold(x, o, s, c, _gates(x, o, s, c))
    _, end = _scan(parts, _start(x), x, s, log=o.key_log, reverse=False, end=True)
    assert end is not None
    return end, parts[3]


def segment_gates(x: Inputs, o: Options, c: Config) -> Tensor:
    """Each segment's total decay ``[segments, Hkv]``, ``[0]`` without."""
    if x.decay is None:
        return torch.empty(0, dtype=torch.float32, device=x.q.device)
    x, o = featured(x, o, queries=False)
    s = shape_of(x, o)
    return _fold(x, o, s, c, _gates(x, o, s, c))[3]


def final_memory_backward(
    x: Inputs, o: Options, c: Config, m: Tensor, gate: Tensor, dkv: Tensor, dk: Tensor, needs: dict[str, bool]
) -> dict[str, Tensor | None]:
    """Gradients by input name, of a final memory's gradient ``dkv [N, Hkv, F, V]``, ``dk [N, Hkv, F]``.

    ``m``: the final memory's log-scale. ``gate``: the segments' decay, see :func:`segment_gates`.
    """
    raw, map_ = x, o
    x, o = featured(x, o, queries=False)
    assert x.k is not None and x.v is not None
    s = shape_of(x, o)
    dtype, device = x.v.dtype, x.v.device
    f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    start = Memory(dkv.contiguous(), dk.contiguous(), -m)
    parts = (
        torch.zeros(s.total, *dkv.shape[1:], **f32),
        torch.zeros(s.total, *dk.shape[1:], **f32),
        torch.full((s.total, s.kv_heads), -1e30, **f32) if o.key_log else torch.empty(0, **f32),
        gate,
    )
    memory, total = _scan(parts, start, x, s, log=o.key_log, reverse=True, end=True)
    assert total is not None
    shared = raw.k_far is None
    k_far = x.k if x.k_far is None else x.k_far
    grads: dict[str, Tensor | None] = {}
    given = map_.activation == "given"
    wide = dtype if given or dtype == torch.bfloat16 else torch.float32
    dphi = torch.zeros(s.batch, s.length, s.kv_heads, o.features, dtype=wide, device=device)
    dv = torch.zeros(s.batch, s.length, s.kv_heads, s.value_dim, dtype=dtype, device=device)
    dlog = torch.zeros(s.batch, s.length, s.kv_heads, **f32) if needs["key_log"] or needs["decay"] else None
    heads = _heads_of(x.key_weight, x.key_bias)
    gates = _gates(x, o, s, c)
    dims = _far_dims(s, o, True, _is_wider(x.key_weight, dtype), dtype, _tf32()) | {"GAP": 0, "H": s.kv_heads, "G": 1}
    launch(
        backward.dkv_kernel, (s.kv_heads, s.total),
        x.v, *strides(x.v), k_far, 0, 0, 0, k_far, *strides(k_far),
        x.key_weight, x.key_weight, heads, heads, x.key_bias, x.key_bias,
        x.key_log,
        gates.sums, None,
        *memory,
        *_tables(x),
        None, None, None, None,
        dphi, dv, dlog if o.activation == "given" else None,
        o.norm, o.constant, s.length, s.segments, o.segment,
        C=c.dkv_chunk or c.chunk, QUERIES=False, LAST_EMPTY=False, TOP=o.key_log, EXACT=False,
        **dims,
        num_warps=c.dkv_warps, num_stages=c.dkv_stages,
    )  # fmt: skip
    if not given:
        dphi, grads["key_weight"], grads["key_bias"] = _keys_through_map(
            raw, map_, c, k_far, dphi, needs, dlog if map_.fused else None
        )
    grads["k" if shared else "k_far"], grads["v"], grads["key_log"] = dphi, dv, dlog
    begin: Tensor | float = 0.0
    if x.state_kv is not None and x.state_k is not None:
        factor = 1.0 if x.state_m is None or not o.key_log else (total.m + x.state_m).clamp(max=80.0).exp()
        state_kv = total.kv * (factor if isinstance(factor, float) else factor[..., None, None])
        state_k = total.k * (factor if isinstance(factor, float) else factor[..., None])
        grads["state_kv"], grads["state_k"] = state_kv, state_k
        begin = (state_kv * x.state_kv).sum((2, 3)) + (state_k * x.state_k).sum(2)  # [N, Hkv]
    if needs["decay"]:
        assert dlog is not None
        grads["decay"] = _sums_before(dlog, begin, x)
    return grads


def attend(x: Inputs, o: Options, c: Config, *, training: bool) -> tuple[Tensor, Stats]:
    """Output ``[B, T, H, V]`` and what the backward pass needs (if ``training``)."""
    x, o = featured(with_sinks(x, o), o)
    s = shape_of(x, o)
    device, dtype = x.q.device, x.q.dtype
    out = torch.empty(s.batch, s.length, s.heads, s.value_dim, dtype=dtype, device=device)
    rounds = training and dtype != torch.float32
    residual = torch.empty(out.shape if rounds else (0,), dtype=dtype, device=device)
    rden = torch.empty(s.batch, s.length, s.heads, dtype=torch.float32, device=device)
    top = torch.empty(rden.shape if s.top else (0,), dtype=torch.float32, device=device)
    relative = torch.empty(rden.shape if s.top and o.far else (0,), dtype=torch.float32, device=device)
    if x.lengths is not None:  # slots of no sequence
        out.zero_()
        residual.zero_()
        rden.zero_()
        top.zero_()
        relative.zero_()
    gates = _gates(x, o, s, c)
    found = memory_before(x, o, c, gates)
    keys, near, tf32 = x.k is not None, is_near(x, o), _tf32()
    k, v = (x.q, x.q) if x.k is None or x.v is None else (x.k, x.v)
    num = mass = log = far = None
    if o.far:
        if near:
            num = torch.empty(out.shape, dtype=torch.float32, device=device)
            mass, log = torch.empty_like(rden), torch.empty_like(rden)
            far = torch.empty_like(rden) if o.key_log or x.decay is not None else None
        q_far, k_far = x.q if x.q_far is None else x.q_far, k if x.k_far is None else x.k_far
        query_heads, key_heads = _heads_of(x.query_weight, x.query_bias), _heads_of(x.key_weight, x.key_bias)
        lag = _lag(x, o, s)
        columns, slices = tile(s.value_dim, c.forward_slice)
        dims = _far_dims(s, o, keys, _is_wider(x.query_weight, dtype), dtype, tf32) | {"BV": columns}
        for steep in _kinds(gates):
            launch(
                forward.attend_kernel, (s.heads * slices, s.total),
                v, *strides(v), q_far, *strides(q_far), k_far, *strides(k_far),
                x.query_weight, x.key_weight, query_heads, key_heads, x.query_bias, x.key_bias,
                x.query_log, x.key_log, x.far_bias, lag,
                gates.sums, gates.steep,
                *_memory_before(x, o, s, found),
                *_tables(x),
                num, mass, log, far,
                out, residual if rounds else None, top, rden, relative,
                o.norm, o.constant, s.length, s.segments, o.segment,
                C=c.chunk, EXACT=steep, KEYS=keys, FIRST_EMPTY=keys and _starts_empty(x, s), **dims,
                num_warps=c.forward_warps, num_stages=c.forward_stages,
            )  # fmt: skip
    if near:
        chunk = near_chunk(c)
        launch(
            window.near_kernel, (s.heads * s.total * (o.segment // chunk),),
            x.q, *strides(x.q), k, *strides(k), v, *strides(v),
            x.sink_k, x.sink_v, x.q_sink, x.sink_logits,
            num, mass, log, far,
            *_tables(x),
            out, residual if rounds else None, top, rden, relative,
            o.scale, o.softcap, s.length, s.segments, o.segment,
            SINKS=o.sinks, BS=sink_rows(o.sinks), KEYS=keys, GAP=gap_of(o) if keys else 0, TOP=s.top,
            **_near_dims(s, o, c, dtype, tf32),
        )  # fmt: skip
    return out, Stats(top, relative, rden, residual, *found)


def attend_backward(
    x: Inputs, o: Options, c: Config, out: Tensor, stats: Stats, dout: Tensor, needs: dict[str, bool]
) -> dict[str, Tensor | None]:
    """Gradients by input name, for those that ``needs`` marks."""
    own_sinks = o.sinks > 0 and x.sink_k is None
    x = with_sinks(x, o)
    raw, map_ = x, o
    x, o = featured(x, o)
    s = shape_of(x, o)
    device, dtype = x.q.device, x.q.dtype
    dout = dout.contiguous()
    f32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    grads: dict[str, Tensor | None] = {}
    delta = torch.empty_like(stats.rden)
    scaled = dout
    rden: Tensor | None = stats.rden
    given = map_.activation == "given"
    plain = given and not s.top and x.decay is None  # features reach the products as they are
    if plain:
        scaled = torch.empty_like(dout, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        rden = None
    count = delta.numel()
    if count:
        launch(
            backward.delta_kernel, (-(-count // 64),),
            out, stats.residual if stats.residual.numel() else None, dout, stats.rden,
            scaled if plain else None, delta, count,
            V=s.value_dim, BV=block(s.value_dim), R=64, TOP=s.top,
        )  # fmt: skip
    if x.sink_logits is not None and needs["sink_logits"]:
        grads["sink_logits"] = -((x.sink_logits.float() - stats.top).exp() * delta * stats.rden).sum((0, 1))

    shared = raw.q_far is None
    keys = x.k is not None
    k, v = (x.q, x.q) if x.k is None or x.v is None else (x.k, x.v)
    q_far, k_far = x.q if x.q_far is None else x.q_far, k if x.k_far is None else x.k_far
    query_heads, key_heads = _heads_of(x.query_weight, x.query_bias), _heads_of(x.key_weight, x.key_bias)
    near, tf32, gap = is_near(x, o), _tf32(), gap_of(o) if keys else 0
    chunk = near_chunk(c)
    chunks = s.total * (o.segment // chunk)
    far_dims = _far_dims(s, o, keys, _is_wider(x.query_weight, dtype), dtype, tf32)
    near_dims = _near_dims(s, o, c, dtype, tf32)
    zeroed = x.lengths is not None
    gates = _gates(x, o, s, c)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        """Zeros where the kernels do not write every slot."""
        return (torch.zeros if zeroed else torch.empty)(shape, dtype=dtype, device=device)

    # Queries. Features get their gradient first, then what they were computed from.
    exact = o.window > 0 or o.sinks > 0 or not o.far  # the window's kernels add to what the far part left
    relative = stats.relative if s.top else None
    wide = dtype if dtype == torch.bfloat16 else torch.float32
    dq = dq_far = dlog_q = None
    if o.far:
        # Without exact part the log-scales of queries cancel in the normaliser.
        if near and any(needs[n] for n in ("query_log", "key_log", "decay", "far_bias")):
            dlog_q = make(s.batch, s.length, s.heads, dtype=torch.float32)
        dphi = make(s.batch, s.length, s.heads, o.features, dtype=dtype if given else wide)
        columns, slices = tile(o.features, c.dq_slice if o.activation == "given" and dlog_q is None else 0)
        dims = far_dims | {"BF": columns, "BDF": columns if slices > 1 else far_dims["BDF"]}
        for steep in _kinds(gates):
            launch(
                backward.dq_kernel, (s.heads * slices, s.total),
                v, *strides(v), q_far, *strides(q_far), k_far, *strides(k_far),
                x.key_weight, key_heads, x.key_bias,
                x.key_log,
                gates.sums, gates.steep,
                *_memory_before(x, o, s, Memory(stats.kv, stats.k, stats.m)),
                *_tables(x),
                scaled, relative, delta, rden,
                dphi, dlog_q if o.activation == "given" else None,
                o.norm, o.constant, s.length, s.segments, o.segment,
                C=c.chunk, EXACT=steep, KEYS=keys, FIRST_EMPTY=keys and _starts_empty(x, s), TOP=s.top, **dims,
                num_warps=c.dq_warps, num_stages=c.dq_stages,
            )  # fmt: skip
        if not given:
            dphi, grads["query_weight"], grads["query_bias"] = _through_map(
                raw.q if raw.q_far is None else raw.q_far,
                None if map_.fused else q_far,
                dphi,
                raw.query_weight,
                raw.query_bias,
                map_,
                c,
                dlog_q if map_.fused else None,
                ("query_weight", "query_bias"),
                needs,
            )
        dq, dq_far = (dphi, None) if shared else (None, dphi)
    if dq is None and exact:
        dq = make(s.batch, s.length, s.heads, s.head_dim)
    dsink_k = dsink_v = None
    if x.q_sink is not None and needs["q_sink"]:
        grads["q_sink"] = make(s.batch, s.length, s.heads, s.head_dim)
    if o.sinks:  # packed, chunks behind a sequence's end are summed too
        new = torch.zeros if s.packed else torch.empty
        dsink_k, dsink_v = (new(chunks, s.heads, o.sinks, dim, **f32) for dim in (s.head_dim, s.value_dim))
    if exact:
        launch(
            window.near_dq_kernel, (s.heads * chunks,),
            x.q, *strides(x.q), k, *strides(k), v, *strides(v),
            x.sink_k, x.sink_v, x.q_sink,
            *_tables(x),
            scaled, stats.top, delta, rden,
            dq, grads.get("q_sink"), dsink_k, dsink_v,
            o.scale, o.softcap, s.length, s.segments, o.segment,
            SINKS=o.sinks, BS=sink_rows(o.sinks), KEYS=keys, GAP=gap, TOP=s.top, ADD=o.far and shared, **near_dims,
        )  # fmt: skip
    grads["q"], grads["q_far"] = dq, dq_far
    # Keys, with the queries' memory after each segment.
    memory = end = None
    want_state = start_given = x.state_kv is not None and o.far
    want_state = start_given and (needs["state_kv"] or needs["state_k"])
    if o.far and ((keys and (s.segments > 1 or s.packed)) or want_state):
        skip = keys and not s.packed and not want_state
        logs = s.top and o.key_log
        sums = _empty_parts(x, o, s, log=logs)
        columns, slices = tile(s.value_dim, c.fold_slice)
        launch(
            fold.fold_kernel, (s.kv_heads * slices, s.total - s.sequences if skip else s.total),
            q_far, *strides(q_far), scaled, *strides(scaled),
            x.query_weight, query_heads, x.query_bias,
            None, relative, delta, rden,
            gates.sums,
            *_tables(x),
            *sums,
            o.norm, o.constant, s.length, s.segments, o.segment,
            H=s.heads, G=s.heads // s.kv_heads, D=s.far_dim, F=o.features, V=s.value_dim,
            BD=block(s.far_dim), BF=block(o.features), BV=columns, C=c.fold_chunk, GAP=gap, SKIPPED=skip,
            PLACE=-1 if skip and s.segments == 2 else 0,
            SINKS=0, ACT=ACTIVATIONS[o.activation], LOW=_is_wider(x.query_weight, dtype), LOG=logs,
            REVERSE=True, PACKED=s.packed,
            num_warps=c.fold_warps, num_stages=c.fold_stages, **precision(dtype, tf32),
        )  # fmt: skip
        memory, end = _scan(sums, None, x, s, log=logs, reverse=True, end=want_state)
    if want_state:
        assert end is not None
        grads["state_kv"], grads["state_k"] = end.kv, end.k
        if s.top and o.key_log:
            log = end.m if x.state_m is None else end.m + x.state_m
            factor = torch.where(end.m > -1e29, log.clamp(max=80.0).exp(), 0.0)
            grads["state_kv"], grads["state_k"] = end.kv * factor[..., None, None], end.k * factor[..., None]

    dlog_k = None
    if keys:
        dk = dk_far = None
        dv = make(s.batch, s.length, s.kv_heads, s.value_dim) if o.far or o.window else None
        if o.far:
            if needs["key_log"] or needs["decay"]:
                dlog_k = make(s.batch, s.length, s.kv_heads, dtype=torch.float32)
            dphi = make(s.batch, s.length, s.kv_heads, o.features, dtype=dtype if given else wide)
            runs: list[tuple[int, Tensor | None, Tensor | None, dict[str, Any]]] = [(1, dphi, dv, far_dims)]
            sliced = o.activation == "given"
            late = not sliced or c.dkv_slice > 0  # a slice of the features' gradient does not give that of log-scales
            if c.dkv_slice:
                columns, slices = tile(o.features, c.dkv_slice if sliced else 0)
                to_features = far_dims | ({"BF": columns, "BDF": columns} if slices > 1 else {})
                columns, more = tile(s.value_dim, c.dkv_slice if sliced else 0)
                runs = [(slices, dphi, None, to_features), (more, None, dv, far_dims | {"BV": columns})]
            for (count, to_phi, to_v, dims), steep in itertools.product(runs, _kinds(gates)):
                launch(
                    backward.dkv_kernel, (s.kv_heads * count, s.total),
                    v, *strides(v), q_far, *strides(q_far), k_far, *strides(k_far),
                    x.query_weight, x.key_weight, query_heads, key_heads, x.query_bias, x.key_bias,
                    x.key_log,
                    gates.sums, gates.steep,
                    *((None, None, None) if memory is None else memory),
                    *_tables(x),
                    scaled, relative, delta, rden,
                    to_phi, to_v, None if late else dlog_k,
                    o.norm, o.constant, s.length, s.segments, o.segment,
                    C=c.dkv_chunk or c.chunk, EXACT=steep, QUERIES=True,
                    LAST_EMPTY=s.segments > 1 and not s.packed, TOP=s.top, **dims,
                    num_warps=c.dkv_warps, num_stages=c.dkv_stages,
                )  # fmt: skip
            if not given:
                dphi, grads["key_weight"], grads["key_bias"] = _keys_through_map(
                    raw, map_, c, k_far, dphi, needs, dlog_k if late else None
                )
            elif dlog_k is not None and late:
                _row_products(k_far, dphi, dlog_k)
            dk, dk_far = (dphi, None) if shared else (None, dphi)
        if dk is None and o.window:
            dk = make(s.batch, s.length, s.kv_heads, s.head_dim)
        if o.window:
            launch(
                window.near_dkv_kernel, (s.kv_heads * chunks,),
                x.q, *strides(x.q), k, *strides(k), v, *strides(v),
                *_tables(x),
                scaled, stats.top, delta, rden,
                dk, dv,
                o.scale, o.softcap, s.length, s.segments, o.segment,
                ADD_K=o.far and shared, ADD_V=o.far,
                **near_dims | {
                    "num_stages": c.near_dkv_stages if max(s.head_dim, s.value_dim) <= 64 else 1,
                    "registers": c.near_dkv_registers,
                },
            )  # fmt: skip
        grads["k"], grads["v"], grads["k_far"] = dk, dv, dk_far

    if dsink_k is not None and dsink_v is not None:
        assert x.sink_k is not None and x.sink_v is not None
        if s.packed:
            grads["sink_k"], grads["sink_v"] = (
                _sum_chunks(d, x, s, like) for d, like in ((dsink_k, x.sink_k), (dsink_v, x.sink_v))
            )
        else:
            names, likes = (("k", "v"), (k, v)) if own_sinks else (("sink_k", "sink_v"), (x.sink_k, x.sink_v))
            for name, like in zip(names, likes, strict=True):
                found = grads.get(name)
                grads[name] = (torch.zeros_like if own_sinks else torch.empty_like)(like) if found is None else found
            into_k, into_v = (grads[name] for name in names)
            assert into_k is not None and into_v is not None
            launch(
                window.sum_sinks_kernel, (s.sequences * s.kv_heads * o.sinks,),
                dsink_k, dsink_v, into_k, *strides(into_k), into_v, *strides(into_v), x.lengths,
                s.length, s.segments * (o.segment // chunk),
                H=s.heads, G=s.heads // s.kv_heads, D=s.head_dim, V=s.value_dim,
                BD=block(s.head_dim), BV=block(s.value_dim), C=chunk, R=SINK_ROWS, SINKS=o.sinks, ADD=own_sinks,
            )  # fmt: skip

    if dlog_q is not None:
        if needs["far_bias"]:
            grads["far_bias"] = dlog_q.sum((0, 1))
        if needs["query_log"]:
            grads["query_log"] = dlog_q
    if dlog_k is not None:
        if needs["key_log"]:
            grads["key_log"] = dlog_k
        if needs["decay"]:
            before = Memory(stats.kv, stats.k, stats.m)
            boundaries = _across(before, memory, o, s) if memory is not None and stats.kv.numel() else None
            grads["decay"] = _decay_gradient(dlog_q, dlog_k, boundaries, x, o, s, gap)
    return grads


def _row_products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Fill ``out [...]`` with the sums over the last dimension of ``a · b [..., F]``."""
    launch(
        backward.delta_kernel, (-(-out.numel() // 64),),
        a.contiguous(), None, b, None, None, out, out.numel(),
        V=a.shape[-1], BV=block(a.shape[-1]), R=64, TOP=False,
    )  # fmt: skip


def _sum_chunks(d: Tensor, x: Inputs, s: _Shape, like: Tensor) -> Tensor:
    """Shares ``[chunks, H, S, ·]`` of the sinks' gradient, of packed sequences, to ``[N, S, Hkv, ·]``."""
    assert x.seg_sequence is not None
    d = d.unflatten(1, (s.kv_heads, -1)).unflatten(0, (s.total, -1)).sum((1, 3))
    found = d.new_zeros(s.sequences + 1, *d.shape[1:])
    d = found.index_add(0, x.seg_sequence.long(), d)[: s.sequences]
    return d.transpose(1, 2).to(like.dtype)


def _sum_shares(shares: Tensor, heads: int, like: Tensor | None) -> Tensor:
    """Programs' shares ``[programs, H, parts, ...]`` of the gradient of a map's ``like [parts, heads, ...]``."""
    assert like is not None
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    programs, head_count, parts = shares.shape[:3]
    numbers = like.numel() // (parts * heads)
    launch(
        backward.sum_kernel, (-(-numbers // SUM_BLOCK), parts * heads),
        shares, out, programs * (head_count // heads), heads, parts, numbers,
        R=SUM_ROWS, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    return out


def _across(before: Memory, after: Memory, o: Options, s: _Shape) -> Tensor:
    """What queries behind each segment's end read from before it ``[segments, Hkv]``; see the kernel."""
    out = torch.empty(s.total, s.kv_heads, dtype=torch.float32, device=before.kv.device)
    launch(
        backward.across_kernel, (s.kv_heads, s.total),
        before.kv, before.k, before.m if o.key_log else None,
        after.kv, after.k, after.m if o.key_log and s.top else None,
        out, s.total, s.kv_heads,
        F=o.features, V=s.value_dim, ROWS=min(block(o.features), max(1, 4096 // block(s.value_dim))),
        BV=block(s.value_dim),
    )  # fmt: skip
    return out


def _decay_gradient(
    d: Tensor | None, minus: Tensor, boundaries: Tensor | None, x: Inputs, o: Options, s: _Shape, gap: int
) -> Tensor:
    """Gradient of the log-decays ``[B, T, Hkv]`` from those of queries' log-scales, ``d [B, T, H]``, and of keys'."""
    out = (torch.empty_like if x.lengths is None else torch.zeros_like)(minus)
    launch(
        backward.decay_kernel, (s.kv_heads, s.total),
        minus if d is None else d, minus, boundaries, out, *_tables(x), s.length, s.segments, o.segment, s.kv_heads,
        G=s.heads // s.kv_heads, GAP=gap, BLOCK=GATE_BLOCK, PACKED=s.packed, STATE=x.state_kv is not None,
        PLUS=d is not None,
    )  # fmt: skip
    return out


def _through_map(
    x: Tensor,
    known: Tensor | None,
    dphi: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    o: Options,
    c: Config,
    dlog: Tensor | None,
    names: tuple[str, str],
    needs: dict[str, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a map's input ``x [B, T, H, D]``, weights and biases from that of its features ``dphi``.

    ``known``: the features, if they are there. Fills ``dlog``, the gradient of the log-scale.
    """
    batch, length, heads, dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    lone = known is not None and weight is not None
    narrow = not lone or _is_narrow(x, weight)
    spans, span = _spans(batch, length, heads, LONE_PROGRAMS if lone else MAP_PROGRAMS)
    dw = dc = None
    if weight is not None and (needs[names[0]] or needs[names[1]]):
        shares = (batch * spans, heads, parts_of(weight))
        dw = torch.empty(*shares, *weight.shape[-2:], dtype=torch.float32, device=x.device)
        if bias is not None:
            dc = dw.new_empty(*shares, weight.shape[-1])
    count = _heads_of(weight, bias)
    launch(
        backward.map_kernel, (heads, batch * spans),
        x, *strides(x), known, dphi, weight, count, bias,
        dx, dlog, dw, dc,
        o.norm, length, spans, span,
        H=heads, D=dim, F=o.features, BD=block(dim), BF=block(o.features),
        C=MAP_CHUNK if narrow else WIDE_MAP_CHUNK,
        ACT=ACTIVATIONS[o.activation], LOW=_is_wider(weight, x.dtype), **precision(x.dtype, _tf32()),
        num_warps=8 if lone else 4, num_stages=c.map_stages if narrow else 1, registers=0 if lone else c.map_registers,
    )  # fmt: skip
    return (
        dx,
        None if dw is None else _sum_shares(dw, count, weight),
        None if dc is None else _sum_shares(dc, count, bias),
    )


def _keys_through_map(
    x: Inputs, o: Options, c: Config, k_far: Tensor, dphi: Tensor, needs: dict[str, bool], dlog: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    k = x.k if x.k_far is None else x.k_far
    assert k is not None
    known = None if o.fused else k_far
    return _through_map(k, known, dphi, x.key_weight, x.key_bias, o, c, dlog, ("key_weight", "key_bias"), needs)


def _sums_before(d: Tensor, begin: Tensor | float, x: Inputs) -> Tensor:
    """``begin [N, Hkv]`` plus Σ of ``d [B, T, Hkv]`` over the tokens before each in its sequence; 0 behind its end."""
    total = d.double().cumsum(1) - d.double()
    slots = torch.arange(d.shape[1], device=d.device)
    if x.starts is not None and x.lengths is not None:
        owner = (torch.searchsorted(x.starts[:-1].contiguous(), slots, right=True) - 1).clamp_min(0)
        total = total - total[0, x.starts[:-1].clamp_max(d.shape[1] - 1)][owner][None]
        inside = (slots < (x.starts + x.lengths)[owner])[None, :, None]
        first = begin if isinstance(begin, float) else begin[owner][None]
    else:
        inside = torch.ones_like(slots, dtype=torch.bool)[None, :, None]
        if x.lengths is not None:
            inside = (slots < x.lengths[:, None])[..., None]
        first = begin if isinstance(begin, float) else begin[:, None]
    return torch.where(inside, total + first, 0.0).to(torch.float32)
