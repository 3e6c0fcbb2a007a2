"""The operator on Triton kernels: a checked call becomes rows of tokens, a memory before them, and launches."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from linattn.errors import UnsupportedError
from linattn.kernels import chunked
from linattn.kernels import layout as layouts
from linattn.kernels.precision import autocast
from linattn.kernels.protocols import Projected
from linattn.kernels.retain import COLUMNS as RETAINED_COLUMNS
from linattn.kernels.triton import ops, step
from linattn.kernels.triton.config import Config, choose, fuses, fuses_pointwise, segment_tokens, stands_alone
from linattn.kernels.triton.launch import NARROWEST, Inputs, Memory, Options, block, changed, parts_of, rows
from linattn.kernels.triton.runtime import INTERPRETED
from linattn.kernels.validate import Call
from linattn.state import EMPTY_LOG_SCALE, AttentionState

MOST_FEATURES = 512
MOST_DIM = 256
STATE_TILE = 128 * 128
"""Features times value columns of one program's memory; wider values are attended in slices."""


MISCOMPILED: tuple[tuple[str, str, tuple[int, int], str], ...] = ()
"""Triton releases that miscompile these kernels on a chip: first and last version, compute capability, what is wrong.

Empty: the gradients of the suite are right on every combination it has run on.
"""


@functools.cache
def miscompiled(version: str, capability: tuple[int, int] | None) -> str | None:
    """Why this release of Triton must not run these kernels on this chip, or None."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:3])

    for first, last, chip, wrong in MISCOMPILED:
        if chip == capability and numbers(first) <= numbers(version) <= numbers(last):
            name = ".".join(map(str, chip))
            return f"Triton {version} miscompiles them for compute capability {name} ({wrong}); install another release"
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int] | None:
    return None if torch.version.hip else torch.cuda.get_device_capability(index)


def refusal(call: Call) -> str | None:
    """Why these kernels cannot run a call, or None."""
    if not call.q.is_cuda and not INTERPRETED:
        return f"the tensors are on {call.q.device}; Triton kernels need a GPU"
    if MISCOMPILED and call.q.is_cuda:
        wrong = miscompiled(triton.__version__, _capability(call.q.device.index or 0))
        if wrong:
            return wrong
    if call.q.dtype == torch.float64:
        return "float64 is the reference's; use float32, float16 or bfloat16"
    if call.feature_dim > MOST_FEATURES:
        return f"{call.feature_dim} features are more than {MOST_FEATURES}"
    if call.window + call.sinks and (widest := max(call.q.shape[-1], call.v.shape[-1])) > MOST_DIM:
        return f"head_dim or value_dim {widest} is more than {MOST_DIM}"
    if call.retained and call.feature_map is not None and (wide := call.v.shape[-1] + RETAINED_COLUMNS) > MOST_DIM:
        return f"with retained tokens, value_dim {wide - RETAINED_COLUMNS} is more than {MOST_DIM - RETAINED_COLUMNS}"
    if not call.causal and 0 < call.window < call.sinks:
        return f"bidirectional attention with {call.sinks} sinks needs a window of at least as many tokens"
    return None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the sequences' tokens lie in tensors ``[R, L, ...]``: N sequences, ``N = R`` unless packed.

    Attributes:
        first: ``[N]`` slot of each sequence's first token, counted through all rows.
        base: ``[N]`` its position. length: ``[N]`` tokens here. packed: R is 1 and ``first`` says where each begins.
        whole: every sequence fills its row.
        layout: how tokens got here, None where the call's tensors are used as they are.
    """

    first: Tensor
    base: Tensor
    length: Tensor
    packed: bool
    whole: bool
    layout: layouts.Layout | None

    def tables(self, length: Tensor, tokens: int, segment: int) -> dict[str, Tensor | None]:
        """The kernels' tables for the first ``length [N]`` tokens of each sequence, in rows of ``tokens`` slots."""
        if not self.packed:
            if self is NOWHERE:
                return {}
            full = self.whole and length is self.length
            return {"lengths": None if full else length, "bases": self.base}
        n = len(length)
        counts = -(-length // segment)
        seg_first = F.pad(counts.cumsum(0), (1, 0))
        pids = torch.arange(tokens // segment + n, device=length.device)
        return {
            "starts": F.pad(self.first, (0, 1)),
            "lengths": F.pad(length, (0, 1)),
            "bases": F.pad(self.base, (0, 1)),
            "seg_sequence": torch.searchsorted(seg_first[1:], pids, right=True).to(torch.int32),
            "seg_first": seg_first.to(torch.int32),
        }

    def reversal(self, count: int, tokens: int) -> Tensor:
        """``[count · tokens]`` slot that stands in each slot's place when every sequence runs backwards."""
        slots = torch.arange(count * tokens, device=self.first.device)
        owner = torch.searchsorted(self.first.contiguous(), slots, right=True) - 1
        first, length = self.first[owner], self.length[owner]
        return torch.where(slots < first + length, 2 * first + length - 1 - slots, slots)

    def gather(self, x: Tensor, ranks: Tensor) -> Tensor:
        """Tokens ``ranks [N, M]`` of each sequence from ``x [R, L, ...]``; zeros where there is no such token."""
        there = (ranks >= 0) & (ranks < self.length[:, None])
        slots = (self.first[:, None] + ranks).clamp(0, max(x.shape[0] * x.shape[1] - 1, 0))
        return torch.where(there.view(*there.shape, *[1] * (x.ndim - 2)), x.flatten(0, 1)[slots], 0)


NOWHERE = Rows(torch.empty(0), torch.empty(0), torch.empty(0), False, True, None)
"""Where every sequence fills its row from position 0 on, and nobody asks for more."""


def _positional(call: Call) -> bool:
    return call.feature_map is not None and call.feature_map.positional


def check(call: Call) -> None:
    """Raise where :func:`refusal` has a reason."""
    reason = refusal(call)
    if reason is not None:
        raise UnsupportedError(f"impl='triton': {reason}; impl='chunked' runs every call.")


def attend(call: Call) -> tuple[Tensor, AttentionState | None]:
    """Attention of a checked call that :func:`refusal` does not refuse."""
    check(call)
    if torch.compiler.is_compiling() or not call.q.is_cuda or call.q.get_device() == torch.cuda.current_device():
        return _attend(call)
    with torch.cuda.device_of(call.q):  # kernels start on the current device
        return _attend(call)


def _attend(call: Call) -> tuple[Tensor, AttentionState | None]:
    batch, length = call.q.shape[:2]
    if batch == 0 or length == 0 or call.k.shape[1] == 0:
        return chunked.attend(call)
    if not call.causal:
        return _attend_both_ways(call), None
    if call.state is not None and not torch.compiler.is_compiling() and step.takes(call):
        return step.attend_step(call)
    return _attend_causal(call)


def _rows(call: Call) -> Rows:
    batch, length = call.k.shape[:2]
    device, state, n = call.k.device, call.state, call.sequences
    if call.mask is not None or (state is not None and state.recent_k.shape[1]):
        lay = layouts.build(call, 16)
        return Rows(lay.start, lay.base, lay.length - lay.base, lay.packed, False, lay)
    asked = call.sinks > length or call.return_state or _positional(call)
    if call.causal and state is None and call.cu_seqlens is None and not asked:
        return NOWHERE
    base = torch.zeros(n, dtype=torch.int64, device=device) if state is None else state.length
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens.to(torch.int64)
        return Rows(bounds[:-1], base, bounds[1:] - bounds[:-1], True, False, None)
    first = torch.arange(batch, device=device) * length
    return Rows(first, base, torch.full_like(base, length), False, True, None)


def _attend_causal(call: Call) -> tuple[Tensor, AttentionState | None]:
    r = _rows(call)
    state = call.state

    def place(x: Tensor | None, ring: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return rows(x) if r.layout is None else r.layout.place(x, ring)

    def blank(x: Tensor | None, ring: Tensor | None) -> Tensor | None:
        """The ring holds no queries."""
        return None if x is None or ring is None else x.new_zeros(*ring.shape[:2], *x.shape[2:])

    ring = None if state is None else state.recent_k
    q, k = place(call.q, blank(call.q, ring)), place(call.k, ring)
    v = place(call.v, None if state is None else state.recent_v)
    assert q is not None and k is not None and v is not None
    q_sink = place(call.q_sink, blank(call.q_sink, ring))
    far_ring = None if state is None else state.recent_far_k
    q_far, k_far = place(call.q_far, blank(call.q_far, far_ring)), place(call.k_far, far_ring)
    decay = place(call.decay, None if state is None else state.recent_decay)

    mapped = _map(call, q, k, q_far, k_far, r)
    memory = _memory(call, mapped.key_log_scaled)
    sink_k, sink_v = _sinks(call, r, k, v)
    config = _config(call, mapped)
    tokens, heads = q.shape[1], q.shape[2]
    segment = segment_tokens(tokens, heads * (1 if r.packed else q.shape[0]), config)
    inputs = Inputs(
        q=q, k=k, v=v, decay=decay,
        sink_k=sink_k, sink_v=sink_v, q_sink=_contiguous(q_sink),
        far_bias=_float(call.far_bias) if call.feature_map is not None else None,
        sink_logits=_float(call.sink_logits),
        state_kv=memory.kv, state_k=memory.k, state_m=memory.m,
        **mapped.inputs, **r.tables(r.length, tokens, segment),
    )  # fmt: skip
    options = _options(call, mapped, segment)
    out = _in_slices(ops.attend, inputs, options, config)
    if r.layout is not None:
        out = r.layout.collect(out, *call.q.shape[:2])
    if not call.return_state:
        return out, None
    return out, _final_state(call, r, inputs, options, config)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)


class _Mapped(NamedTuple):
    """The feature map of a call as the kernels take it."""

    inputs: dict[str, Tensor | None]
    activation: str
    features: int
    key_log_scaled: bool
    norm: float = 0.0
    constant: float = 0.0
    fused: bool = True


def _map(
    call: Call,
    q: Tensor,
    k: Tensor,
    q_far: Tensor | None,
    k_far: Tensor | None,
    r: Rows,
    query_positions: Tensor | None = None,
) -> _Mapped:
    """By the kernels if the map is a projection and an activation, else as given features."""
    if call.feature_map is None:
        return _Mapped({}, "given", 0, False)
    far: dict[str, Tensor | None] = {"q_far": q_far, "k_far": k_far}
    projected = getattr(call.feature_map, "projected", None)
    found = None if projected is None else projected()
    if found is not None:
        if found.mirrored:
            found = _both_sides(found, call.feature_dim)
        fused = _fuses(call, found)
        if not (fused or _stands_alone(call, found)):
            found = None
    if found is not None:
        return _Mapped(
            far | _weights(found, q),
            found.activation,
            call.feature_dim,
            found.activation in ("exp", "product"),
            float(found.norm),
            float(found.constant),
            fused,
        )
    positions = at = None
    if call.feature_map.positional:
        positions = _positions(call, r, k)
        at = positions if query_positions is None else query_positions
    phi_q, log_q = _features(call, "queries", q if q_far is None else q_far, at)
    phi_k, log_k = _features(call, "keys", k if k_far is None else k_far, positions)
    log_scaled = log_k is not None
    given = {"q_far": phi_q, "k_far": phi_k, "query_log": log_q, "key_log": log_k}
    return _Mapped(given, "given", call.feature_dim, log_scaled)


def _both_sides(found: Projected, features: int) -> Projected:
    """A mirrored projection as the kernels take it: its half if halves of their tiles hold halves of the features."""
    plain = found.activation == "softmax" and found.query_bias is None
    if plain and 2 * block(features // 2) == features:
        return changed(found, activation="mirrored")
    whole = [None if w is None else torch.cat([w, -w], -1) for w in found[1:3]]
    return changed(found, query_weight=whole[0], key_weight=whole[1])


def _fuses(call: Call, found: Projected) -> bool:
    """Whether the kernels compute the map: its projections must fit, and keep the precision of the inputs."""
    if found.query_weight is None:
        fits = block(call.feature_dim) <= 256
        return fits and fuses_pointwise(call.q.device, call.q.dtype, call.feature_dim, call.v.shape[-1])
    parts, (dim, columns) = parts_of(found.query_weight), found.query_weight.shape[-2:]
    dtype = call.q.dtype
    if dtype == torch.float16 and found.activation == "exp":
        return False  # tf32 rounds its exponents by more than float16 rounds its values
    small = dtype == torch.bfloat16 or block(dim) * block(columns) <= 64 * 64
    return small and fuses(call.q.device, dtype, parts, block(dim), block(columns))


def _stands_alone(call: Call, found: Projected) -> bool:
    """Whether a kernel of its own computes a map that does not fuse, no less precisely than torch would."""
    if found.query_weight is None or found.key_weight is None:
        return block(call.feature_dim) <= 256
    parts, (dim, columns) = parts_of(found.query_weight), found.query_weight.shape[-2:]
    dtype = call.q.dtype
    small = dtype == torch.bfloat16 or (dtype == torch.float16 and block(dim) * block(columns) <= 64 * 64)
    trained = found.query_weight.requires_grad or found.key_weight.requires_grad
    return small and stands_alone(call.q.device, parts, block(dim), block(columns), trained)


def _weights(found: Projected, like: Tensor) -> dict[str, Tensor | None]:
    def there(w: Tensor | None) -> Tensor | None:
        if w is None:
            return None
        return (w if w.device == like.device else w.to(like.device)).contiguous()

    return {
        "query_weight": there(found.query_weight),
        "key_weight": there(found.key_weight),
        "query_bias": there(found.query_bias),
        "key_bias": there(found.key_bias),
    }


def _positions(call: Call, r: Rows, q: Tensor) -> Tensor:
    if r.layout is not None:
        return r.layout.positions.clamp_min(0).flatten(1)
    at = torch.arange(q.shape[1], device=q.device)
    if call.cu_seqlens is not None:
        owner = torch.searchsorted(r.first, at, right=True) - 1
        return (r.base[owner] + at - r.first[owner])[None]
    return r.base[:, None] + at


def _features(call: Call, kind: str, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Features in the dtype of the inputs, log-scales in float32."""
    map_ = call.feature_map
    assert map_ is not None
    forward = map_.forward_queries if kind == "queries" else map_.forward_keys
    with autocast(x, call.autocast) if call.autocast is not None else nullcontext():
        values, log_scale = forward(x, positions) if map_.positional else forward(x)
    if values.dtype != call.v.dtype:
        values = values.to(call.v.dtype)
    return rows(values), None if log_scale is None else log_scale.to(torch.float32).contiguous()


def _memory(call: Call, log_scaled: bool) -> Memory | _NoMemory:
    """The state's sums as seen from the first token of its ring."""
    state = call.state
    if state is None or call.feature_map is None:
        return _NoMemory()
    kv, k, log_scale = state.kv.float(), state.k.float(), state.log_scale.float()
    if state.recent_decay is not None:
        ring = state.recent_decay.float().sum(1)
        if ring.requires_grad:
            since = (ring.detach() - ring).exp()
            kv, k = kv * since[..., None, None], k * since[..., None]
        log_scale = log_scale - ring.detach()
    if not log_scaled:
        factor = log_scale.exp()
        return Memory((kv * factor[..., None, None]).contiguous(), (k * factor[..., None]).contiguous(), log_scale)
    empty = state.log_scale <= EMPTY_LOG_SCALE / 2
    return Memory(kv.contiguous(), k.contiguous(), log_scale.masked_fill(empty, EMPTY_LOG_SCALE).contiguous())


class _NoMemory(NamedTuple):
    kv: None = None
    k: None = None
    m: None = None


def _sinks(call: Call, r: Rows, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values ``[N, S, Hkv, ·]`` of each sequence's first tokens; None where they are those of the rows."""
    if not call.sinks or r is NOWHERE:
        return None, None
    at = torch.arange(call.sinks, device=k.device)
    found = [r.gather(x, at - r.base[:, None]) for x in (k, v)]
    if call.state is not None:
        kept = (at < r.base[:, None])[..., None, None]
        old = (call.state.sink_k, call.state.sink_v)
        found = [torch.where(kept, o.to(x.dtype), x) for o, x in zip(old, found, strict=True)]
    return found[0].contiguous(), found[1].contiguous()


def _options(call: Call, mapped: _Mapped, segment: int, *, strict: bool = False) -> Options:
    return Options(
        window=call.window,
        sinks=call.sinks,
        far=call.feature_map is not None,
        features=mapped.features,
        value_dim=call.v.shape[-1],
        activation=mapped.activation,
        key_log=mapped.key_log_scaled,
        scale=call.scale,
        softcap=call.softcap or 0.0,
        norm=mapped.norm,
        constant=mapped.constant,
        strict=strict,
        segment=segment,
        fused=mapped.fused,
    )


def _config(call: Call, mapped: _Mapped) -> Config:
    dims = (mapped.features, min(call.v.shape[-1], _value_slice(mapped.features)), call.k.shape[-1])
    lone = "lone" if mapped.key_log_scaled else "given"
    activation = mapped.activation if mapped.fused else lone
    return choose(call.q.device, call.q.dtype, activation, *dims, call.window)


def _value_slice(features: int) -> int:
    return max(NARROWEST, STATE_TILE // block(max(features, 1)))


def _in_slices(
    attend: Callable[[Inputs, Options, Config], Tensor], x: Inputs, o: Options, c: Config, width: int | None = None
) -> Tensor:
    """Attention with values in slices that fit a program's registers; each slice has the same weights."""
    width = width or _value_slice(o.features)
    if o.value_dim <= width or not o.far:
        return attend(x, o, c)
    outs = []
    for start in range(0, o.value_dim, width):
        stop = min(start + width, o.value_dim)

        def cut(t: Tensor | None, start: int = start, stop: int = stop) -> Tensor | None:
            return None if t is None else t[..., start:stop]

        part = changed(x, v=cut(x.v), sink_v=_contiguous(cut(x.sink_v)), state_kv=_contiguous(cut(x.state_kv)))
        outs.append(attend(part, changed(o, value_dim=stop - start), c))
    return torch.cat(outs, -1)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _final_state(call: Call, r: Rows, x: Inputs, o: Options, c: Config) -> AttentionState:
    assert x.k is not None and x.v is not None
    length = r.base + r.length
    folded = torch.maximum(r.base, length - call.ring)
    last = length[:, None] - call.ring + torch.arange(call.ring, device=x.k.device) - r.base[:, None]
    blank = chunked.empty_state(call)
    kv, k, log_scale = blank.kv, blank.k, blank.log_scale
    recent_decay = None if x.decay is None else r.gather(x.decay, last)
    if o.far:
        tokens = x.k.shape[1]
        count = folded - r.base
        tables: dict[str, Any] = {**r.tables(count, tokens, o.segment)}
        part = changed(x, **tables)
        memory = _sliced_memory(part, changed(o, window=0), c)
        kv, k = memory.kv, memory.k
        log_scale = memory.m if o.key_log else log_scale.masked_fill((folded > call.sinks)[:, None], 0.0)
        if recent_decay is not None:
            ring = recent_decay.sum(1)
            if ring.requires_grad:
                since = (ring - ring.detach()).exp()
                kv, k = kv * since[..., None, None], k * since[..., None]
            log_scale = log_scale + ring.detach()
        log_scale = log_scale.clamp_min(EMPTY_LOG_SCALE)
        if call.state is not None:  # an empty memory stays as it is
            kept = (folded > call.sinks)[:, None]
            kv = torch.where(kept[..., None, None], kv, call.state.kv.to(kv.dtype))
            k = torch.where(kept[..., None], k, call.state.k.to(k.dtype))
    return AttentionState(
        kv=kv,
        k=k,
        log_scale=log_scale,
        length=length,
        folded=folded,
        recent_k=r.gather(x.k, last),
        recent_v=r.gather(x.v, last),
        sink_k=blank.sink_k if x.sink_k is None else x.sink_k,
        sink_v=blank.sink_v if x.sink_v is None else x.sink_v,
        recent_far_k=None if call.k_far is None else _far_ring(call, r, last),
        recent_decay=recent_decay,
        window=call.window,
    )


def _far_ring(call: Call, r: Rows, last: Tensor) -> Tensor:
    assert call.k_far is not None
    ring = None if call.state is None else call.state.recent_far_k
    return r.gather(call.k_far if r.layout is None else r.layout.place(call.k_far, ring), last)


def _sliced_memory(x: Inputs, o: Options, c: Config) -> Memory:
    width = _value_slice(o.features)
    if o.value_dim <= width:
        return ops.final_memory(x, o, c)
    assert x.v is not None
    found = []
    for start in range(0, o.value_dim, width):
        stop = min(start + width, o.value_dim)
        state_kv = None if x.state_kv is None else x.state_kv[..., start:stop].contiguous()
        part = changed(x, v=x.v[..., start:stop], state_kv=state_kv)
        found.append(ops.final_memory(part, changed(o, value_dim=stop - start), c))
    # Every slice sums the same normaliser: one of them carries its gradient.
    return Memory(torch.cat([m.kv for m in found], -1), found[0].k, found[0].m)


def _attend_both_ways(call: Call) -> Tensor:
    """Bidirectional and cross attention."""
    if call.window == 0:
        return _attend_all(call)
    r = _rows(call)

    def place(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return rows(x) if r.layout is None else r.layout.place(x)

    q, k, v = place(call.q), place(call.k), place(call.v)
    assert q is not None and k is not None and v is not None
    mapped = _map(call, q, k, place(call.q_far), place(call.k_far), r)
    sink_k, sink_v = _sinks(call, r, k, v)
    config = _config(call, mapped)
    tokens, heads = q.shape[1], q.shape[2]
    segment = segment_tokens(tokens, heads * (1 if r.packed else q.shape[0]), config)
    inputs = Inputs(
        q=q, k=k, v=v, sink_k=sink_k, sink_v=sink_v,
        far_bias=_float(call.far_bias) if call.feature_map is not None else None,
        sink_logits=_float(call.sink_logits),
        **mapped.inputs, **r.tables(r.length, tokens, segment),
    )  # fmt: skip
    reverse = r.reversal(q.shape[0], tokens)
    options = _options(call, mapped, segment)
    out = _in_slices(lambda x, o, c: ops.attend_both_ways(x, reverse, o, c), inputs, options, config)
    return out if r.layout is None else r.layout.collect(out, *call.q.shape[:2])


def _attend_all(call: Call) -> Tensor:
    """Without a window every query reads one memory of all keys."""
    keys = dataclasses.replace(call, q=call.k[:, :0], state=None)
    r = _rows(keys)

    def place(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return rows(x) if r.layout is None else r.layout.place(x)

    k, v = place(call.k), place(call.v)
    assert k is not None and v is not None
    q, q_far = rows(call.q), None if call.q_far is None else rows(call.q_far)
    queries = _rows(dataclasses.replace(call, k=call.q, mask=None))
    at = _positions(call, queries, q)
    if call.mask is not None and q.shape[1] == call.k.shape[1]:
        at = (call.mask.cumsum(1) - 1).clamp_min(0)
    mapped = _map(call, q, k, q_far, place(call.k_far), r, query_positions=at)
    config = _config(call, mapped)
    names = ("k_far", "key_weight", "key_bias", "key_log")
    memory: dict[str, Tensor | None] = {}
    width = _value_slice(mapped.features)
    if call.feature_map is not None:
        segment = segment_tokens(k.shape[1], k.shape[2] * k.shape[0], config)
        tables = r.tables(r.length, k.shape[1], segment)
        x = Inputs(q=k, k=k, v=v, **{n: mapped.inputs.get(n) for n in names}, **tables)
        found = _sliced_memory(x, _options(call, mapped, segment), config)
        memory = {"state_kv": found.kv, "state_k": found.k, "state_m": found.m if mapped.key_log_scaled else None}
    sink_k, sink_v = _sinks(call, r, k, v)
    segment = segment_tokens(q.shape[1], q.shape[2] * q.shape[0], config)
    tables = queries.tables(queries.length, q.shape[1], segment)
    tables["bases"] = F.pad(r.length, (0, 1)) if r.packed else r.length
    x = Inputs(
        q=q, sink_k=sink_k, sink_v=sink_v,
        far_bias=_float(call.far_bias) if call.feature_map is not None else None,
        sink_logits=_float(call.sink_logits),
        **{n: t for n, t in mapped.inputs.items() if n not in ("k_far", "key_log")}, **memory, **tables,
    )  # fmt: skip
    if call.feature_map is None:
        x = changed(x, state_kv=v.new_zeros(x.q.shape[0], k.shape[2], 1, 1, dtype=torch.float32))
    options = _options(call, mapped, segment)
    return _in_slices(ops.attend, x, options, config, width)
