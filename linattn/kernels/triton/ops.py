"""The kernels as differentiable operators: eagerly plain autograd functions, in a compiled graph custom operators.

Three of them: attention, attention both ways (bidirectional with a window), and the memory after a sequence. A compiled
graph sees ``torch.ops.linattn.*``, whose outputs have shapes that depend on shapes of inputs alone; eager calls skip
their dispatch, which costs more than a small kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linattn.errors import UnsupportedError
from linattn.kernels.triton import launch, plan, precompile
from linattn.kernels.triton.config import Config
from linattn.kernels.triton.launch import Inputs, Memory, Options, Stats

COUNT = len(Inputs._fields)
_PER_TOKEN = ("q", "k", "v", "q_far", "k_far", "query_log", "key_log")


def attend(x: Inputs, o: Options, c: Config) -> Tensor:
    """Attention ``[B, T, H, V]``, differentiable by every floating point input."""
    if torch.compiler.is_compiling():
        return _call(torch.ops.linattn.attend, x, o, c)[0]
    names = tuple([n for n, t in zip(Inputs._fields, x, strict=True) if t is not None])
    given = [t for t in x if t is not None]
    if not (torch.is_grad_enabled() and any([t.requires_grad for t in given])):
        return plan.run(_attended, (o, c, names), given)[0]  # type: ignore[return-value]
    if torch._C._are_functorch_transforms_active():
        return _Attend.apply(o, c, *x)[0]
    return _AttendEagerly.apply((o, c, names), *given)


def attend_both_ways(x: Inputs, reverse: Tensor, o: Options, c: Config) -> Tensor:
    """Bidirectional attention with a window: every token sees those before it, itself, and those after it.

    ``reverse [R · L]`` is the slot that stands in each slot's place when every sequence runs backwards.
    """
    if torch.compiler.is_compiling():
        return _call(torch.ops.linattn.attend_both_ways, x, o, c, reverse)[0]
    return _BothWays.apply(o, c, reverse, *x)[0]


def final_memory(x: Inputs, o: Options, c: Config) -> Memory:
    """The memory after all keys; kv and k are differentiable, the log-scale is a constant they are relative to."""
    if torch.compiler.is_compiling():
        return Memory(*_call(torch.ops.linattn.final_memory, x, o, c)[:3])
    return Memory(*_Fold.apply(o, c, *x)[:3])


def _needs(needs: tuple[bool, ...]) -> dict[str, bool]:
    return dict(zip(Inputs._fields, needs, strict=True))


def _chosen(grads: dict[str, Tensor | None], needs: dict[str, bool]) -> tuple[Tensor | None, ...]:
    return tuple(grads.get(name) if needs[name] else None for name in Inputs._fields)


def _bound(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Keep the signature that torch looks up at every call: finding it takes longer than a small kernel."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def _once(
    run: Callable[..., tuple[Tensor | None, ...]], dout: Tensor, saved: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """A backward pass, as a function of its own where something may look into it."""
    return _Once.apply(run, dout, *saved) if torch.is_grad_enabled() else run(dout, *saved)


class _Once(torch.autograd.Function):
    """A backward pass as a function of its own: transforms of torch.func see through it, a second derivative stops."""

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("impl='triton' has no second derivatives; use impl='chunked' for them.")


@_bound
class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(o: Options, c: Config, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        out, stats = launch.attend(Inputs(*tensors), o, c, training=True)  # type: ignore[arg-type]
        return out, *stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        o, c, *tensors = inputs
        out, *stats = output
        ctx.options, ctx.config = o, c
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, *stats)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (COUNT + 2)
        needs, o, c = _needs(ctx.needs_input_grad[2:]), ctx.options, ctx.config

        def run(dout: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            x, out, stats = Inputs(*saved[:COUNT]), saved[COUNT], Stats(*saved[COUNT + 1 :])
            return _chosen(launch.attend_backward(x, o, c, out, stats, dout, needs), needs)

        return None, None, *_once(run, dout, ctx.saved_tensors)


class _AttendEagerly(torch.autograd.Function):
    """:class:`_Attend` outside transforms of torch.func, which is where statistics need not be outputs.

    ``tensors``: those inputs that are there; ``settings``: options, config and the names of these inputs.
    """

    @staticmethod
    def forward(ctx: Any, settings: tuple[Options, Config, tuple[str, ...]], *tensors: Tensor) -> Tensor:
        out, *stats = plan.run(_attended_training, settings, tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, *stats)
        return out  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:]
        if dout is None:
            return (None,) * (len(wanted) + 1)
        settings = *ctx.settings, wanted

        def run(*tensors: Tensor | None) -> Any:
            return plan.run(_attended_backward, settings, tensors)

        return None, *_once(run, dout, ctx.saved_tensors)


def _inputs(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Inputs:
    found: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return Inputs(**found)


def _attended(o: Options, c: Config, names: tuple[str, ...], *tensors: Any) -> tuple[Tensor]:
    return (launch.attend(_inputs(names, tensors), o, c, training=False)[0],)


def _attended_training(o: Options, c: Config, names: tuple[str, ...], *tensors: Any) -> tuple[Tensor | None, ...]:
    out, stats = launch.attend(_inputs(names, tensors), o, c, training=True)
    return out, *[t if t.numel() else None for t in stats]


def _attended_backward(
    o: Options, c: Config, names: tuple[str, ...], wanted: tuple[bool, ...], dout: Tensor, *saved: Any
) -> tuple[Tensor | None, ...]:
    count = len(names)
    x, out = _inputs(names, saved[:count]), saved[count]
    stats = [out.new_empty(0, dtype=torch.float32) if t is None else t for t in saved[count + 1 :]]
    needs = dict.fromkeys(Inputs._fields, False) | dict(zip(names, wanted, strict=True))
    grads = launch.attend_backward(x, o, c, out, Stats(*stats), dout, needs)
    return tuple([grads.get(name) if needs[name] else None for name in names])


def _following(settings: tuple[Any, ...], needs: tuple[bool, ...], tensors: Any, results: Any) -> Any:
    """The backward pass of a training forward pass."""
    dout = torch.empty(results[0].shape, dtype=results[0].dtype, device=results[0].device)
    return _attended_backward, (*settings, needs), (dout, *tensors, *results)


precompile.sequels[_attended_training] = _following


@_bound
class _BothWays(torch.autograd.Function):
    @staticmethod
    def forward(o: Options, c: Config, reverse: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _both_ways(Inputs(*tensors), reverse, o, c)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        o, c, reverse, *tensors = inputs
        ctx.options, ctx.config = o, c
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, reverse, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (COUNT + 3)
        needs, o, c = _needs(ctx.needs_input_grad[3:]), ctx.options, ctx.config

        def run(dout: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            x, reverse, output = Inputs(*saved[:COUNT]), saved[COUNT], saved[COUNT + 1 :]
            return _chosen(_both_ways_backward(x, reverse, o, c, output, dout, needs), needs)

        return None, None, None, *_once(run, dout, ctx.saved_tensors)


@_bound
class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(o: Options, c: Config, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        end, gate = launch.final_memory(Inputs(*tensors), o, c)  # type: ignore[arg-type]
        return *end, gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        o, c, *tensors = inputs
        _, _, m, gate = output
        ctx.options, ctx.config = o, c
        ctx.mark_non_differentiable(m, gate)
        ctx.save_for_backward(*tensors, m, gate)

    @staticmethod
    def backward(ctx: Any, dkv: Tensor, dk: Tensor, *_: Any) -> tuple[Any, ...]:
        needs, o, c = _needs(ctx.needs_input_grad[2:]), ctx.options, ctx.config

        def run(dkv: Tensor, dk: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
            x, m, gate = Inputs(*saved[:COUNT]), saved[COUNT], saved[COUNT + 1]
            return _chosen(launch.final_memory_backward(x, o, c, m, gate, dkv, dk, needs), needs)

        return None, None, *_Once.apply(run, dkv, dk, *ctx.saved_tensors)


# ---------------------------------------------------------------------------------------------------- both ways


def _turn(t: Tensor, reverse: Tensor) -> Tensor:
    return t.flatten(0, 1)[reverse].view(t.shape) if t.numel() else t


def _backwards(x: Inputs, reverse: Tensor) -> Inputs:
    """The same tokens from last to first. No sinks: those after a token lie in its window."""
    found = {name: getattr(x, name) for name in _PER_TOKEN}
    turned: dict[str, Any] = {name: None if t is None else _turn(t, reverse) for name, t in found.items()}
    return x._replace(**turned, sink_k=None, sink_v=None, sink_logits=None)


def _both_ways(x: Inputs, reverse: Tensor, o: Options, c: Config) -> tuple[Tensor, ...]:
    """Output, statistics of the joint normaliser, and the memories of both directions."""
    out, stats = launch.attend(x, o, c, training=True)
    back = launch.attend(_backwards(x, reverse), o._replace(strict=True, sinks=0), c, training=True)

    def parts(out: Tensor, s: Stats) -> list[Tensor]:
        wide = out.float() + s.residual if s.residual.numel() else out.float()
        return [wide, s.top.masked_fill(s.rden == 0, -1e30), torch.where(s.rden == 0, 0.0, 1 / s.rden)]

    first, top_first, mass_first = parts(out, stats)
    second, top_second, mass_second = (_turn(t, reverse) for t in parts(*back))
    top = torch.maximum(top_first, top_second)
    mass_first, mass_second = mass_first * (top_first - top).exp(), mass_second * (top_second - top).exp()
    mass = mass_first + mass_second
    rden = torch.where(mass == 0, 0.0, 1 / mass)

    def shifted(relative: Tensor, own: Tensor) -> Tensor:
        return torch.where(relative < -1e29, relative, relative + own - top) if relative.numel() else relative

    relatives = shifted(stats.relative, top_first), shifted(_turn(back[1].relative, reverse), top_second)
    wide = (first * mass_first[..., None] + second * mass_second[..., None]) * rden[..., None]
    out = wide.to(x.q.dtype)
    residual = (wide - out.float()).to(out.dtype) if stats.residual.numel() else stats.residual
    return out, top, *relatives, rden, residual, *stats[4:], *back[1][4:]


def _both_ways_backward(
    x: Inputs,
    reverse: Tensor,
    o: Options,
    c: Config,
    output: tuple[Tensor, ...],
    dout: Tensor,
    needs: dict[str, bool],
) -> dict[str, Tensor | None]:
    out, top, relative, relative_back, rden, residual, *memories = output
    stats = Stats(top, relative, rden, residual, *memories[:3])
    grads = launch.attend_backward(x, o, c, out, stats, dout, needs)
    turned = [_turn(t, reverse) for t in (top, relative_back, rden, residual)]
    back = launch.attend_backward(
        _backwards(x, reverse),
        o._replace(strict=True, sinks=0),
        c,
        _turn(out, reverse),
        Stats(*turned, *memories[3:]),
        _turn(dout, reverse),
        needs | {"sink_logits": False, "sink_k": False, "sink_v": False},
    )
    for name, g in back.items():
        if g is not None:
            g = _turn(g, reverse) if name in _PER_TOKEN else g
            known = grads.get(name)
            grads[name] = g if known is None else known + g
    return grads


# ------------------------------------------------------------------------------------------------ custom operators

_TENSORS = ", ".join(f"Tensor{'' if name == 'q' else '?'} {name}" for name in Inputs._fields)
_SETTINGS = "SymInt[] ints, float[] floats, str activation"
_FLOATS = ("scale", "softcap", "norm", "constant")
_INTS = tuple(name for name in Options._fields if name not in (*_FLOATS, "activation"))

_library = torch.library.Library("linattn", "DEF")


def _call(op: Any, x: Inputs, o: Options, c: Config, *extra: Tensor) -> tuple[Tensor, ...]:
    # By name throughout: torch 2.11 cannot trace how a named tuple is taken apart.
    tensors = [getattr(x, n) for n in Inputs._fields]
    ints = [getattr(o, n) for n in _INTS] + [getattr(c, n) for n in Config._fields]
    ints = [int(v) if isinstance(v, bool) else v for v in ints]
    return op(*tensors, *extra, ints, [getattr(o, n) for n in _FLOATS], o.activation)


def _settings(ints: list[int], floats: list[float], activation: str) -> tuple[Options, Config]:
    values: dict[str, Any] = dict(zip(_INTS, ints, strict=False)) | dict(zip(_FLOATS, floats, strict=True))
    for name in ("far", "key_log", "strict", "fused"):
        values[name] = bool(values[name])
    return Options(activation=activation, **values), Config(*ints[len(_INTS) :])


def _empty_like_stats(x: Inputs, o: Options) -> tuple[Tensor, ...]:
    """Output, top, relative, rden and residual, empty."""
    batch, length, heads, _ = x.q.shape
    out = x.q.new_empty(batch, length, heads, o.value_dim)
    rden = x.q.new_empty(batch, length, heads, dtype=torch.float32)
    top = x.q.new_empty(batch, length, heads if launch.has_top(x, o) else 0, dtype=torch.float32)
    residual = x.q.new_empty(batch, length, heads, 0 if x.q.dtype == torch.float32 else o.value_dim)
    relative = x.q.new_empty(top.shape if o.far else 0, dtype=torch.float32)
    return out, top, relative, rden, residual


def _define(
    name: str,
    outputs: int,
    run: Callable[..., tuple[Tensor, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
    run_backward: Callable[..., dict[str, Tensor | None]],
    gradients: int = 1,
    extra: int = 0,
) -> None:
    """Register operator ``name`` with ``outputs`` outputs, of which the first ``gradients`` carry gradients.

    ``extra``: further tensors between the inputs and the settings.
    """
    more = "".join(f", Tensor extra{i}" for i in range(extra))
    results = ", ".join(["Tensor"] * outputs)
    saved = "".join(f", Tensor saved{i}" for i in range(outputs)) + "".join(
        f", Tensor grad{i}" for i in range(gradients)
    )
    _library.define(f"{name}({_TENSORS}{more}, {_SETTINGS}) -> ({results})")
    _library.define(f"{name}_backward({_TENSORS}{more}{saved}, {_SETTINGS}, bool[] needs) -> Tensor[]")
    first = COUNT + extra

    def forward(*args: Any) -> tuple[Tensor, ...]:
        x = Inputs(*args[:COUNT])
        return run(x, *args[COUNT:first], *_settings(*args[first:]))

    def forward_fake(*args: Any) -> tuple[Tensor, ...]:
        return fake(Inputs(*args[:COUNT]), *_settings(*args[first:]))

    def backward(*args: Any) -> list[Tensor]:
        x, wanted = Inputs(*args[:COUNT]), _needs(args[-1])
        results = args[first : first + outputs]
        grads = args[first + outputs : first + outputs + gradients]
        found = run_backward(x, *args[COUNT:first], *_settings(*args[-4:-1]), results, *grads, wanted)
        like = ((getattr(x, n), found.get(n)) for n in Inputs._fields if wanted[n])
        return [torch.zeros_like(t) if g is None else g.reshape(t.shape).to(t.dtype).contiguous() for t, g in like]

    def backward_fake(*args: Any) -> list[Tensor]:
        return [
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t, needed in zip(args[:COUNT], args[-1], strict=True)
            if needed
        ]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings = inputs[first:]
        ctx.save_for_backward(*inputs[:first], *output)

    def autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needs = [bool(n) for n in ctx.needs_input_grad[:COUNT]]
        results = saved[first:]
        given = [torch.zeros_like(r) if g is None else g for g, r in zip(grads[:gradients], results, strict=False)]
        op = getattr(torch.ops.linattn, f"{name}_backward")
        found = iter(op(*saved, *given, *ctx.settings, needs))
        return (*(next(found) if needed else None for needed in needs), *(None,) * (extra + 3))

    for op, real, imitation in ((name, forward, forward_fake), (f"{name}_backward", backward, backward_fake)):
        torch.library.impl(f"linattn::{op}", "default", real, lib=_library)
        torch.library.register_fake(f"linattn::{op}", imitation, lib=_library)
    torch.library.register_autograd(f"linattn::{name}", autograd, setup_context=setup_context, lib=_library)


def _run_attend(x: Inputs, o: Options, c: Config) -> tuple[Tensor, ...]:
    out, stats = launch.attend(x, o, c, training=True)
    return _in_shape(_empty_like_stats(x, o), out, *stats[:4])


def _in_shape(like: tuple[Tensor, ...], *output: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.view(e.shape) for t, e in zip(output, like, strict=True))


def _run_attend_backward(
    x: Inputs, o: Options, c: Config, output: tuple[Tensor, ...], dout: Tensor, needs: dict[str, bool]
) -> dict[str, Tensor | None]:
    out, top, relative, rden, residual = output
    stats = Stats(top, relative, rden, residual, *launch.memory_before(x, o, c))
    return launch.attend_backward(x, o, c, out, stats, dout, needs)


def _run_both_ways(x: Inputs, reverse: Tensor, o: Options, c: Config) -> tuple[Tensor, ...]:
    return _in_shape(_fake_both_ways(x, o, c), *_both_ways(x, reverse, o, c)[:6])


def _run_both_ways_backward(
    x: Inputs, reverse: Tensor, o: Options, c: Config, output: tuple[Tensor, ...], dout: Tensor, needs: dict[str, bool]
) -> dict[str, Tensor | None]:
    there = launch.memory_before(x, o, c)
    back = launch.memory_before(_backwards(x, reverse), o._replace(strict=True, sinks=0), c)
    return _both_ways_backward(x, reverse, o, c, (*output, *there, *back), dout, needs)


def _run_final_memory(x: Inputs, o: Options, c: Config) -> tuple[Tensor, ...]:
    end, _ = launch.final_memory(x, o, c)
    return end.kv, end.k, end.m if o.key_log else end.k.new_zeros(end.k.shape[:2])


def _fake_final_memory(x: Inputs, o: Options, c: Config) -> tuple[Tensor, ...]:
    assert x.k is not None
    heads, n = x.k.shape[2], x.k.shape[0] if x.seg_first is None else x.seg_first.shape[0] - 1
    new = x.q.new_empty
    return (
        new(n, heads, o.features, o.value_dim, dtype=torch.float32),
        new(n, heads, o.features, dtype=torch.float32),
        new(n, heads, dtype=torch.float32),
    )


def _run_final_memory_backward(
    x: Inputs, o: Options, c: Config, output: tuple[Tensor, ...], dkv: Tensor, dk: Tensor, needs: dict[str, bool]
) -> dict[str, Tensor | None]:
    gate = launch.segment_gates(x, o, c)
    return launch.final_memory_backward(x, o, c, output[2], gate, dkv, dk, needs)


def _fake_attend(x: Inputs, o: Options, c: Config) -> tuple[Tensor, ...]:
    return _empty_like_stats(x, o)


def _fake_both_ways(x: Inputs, o: Options, c: Config) -> tuple[Tensor, ...]:
    out, top, relative, *rest = _empty_like_stats(x, o)
    return out, top, relative, torch.empty_like(relative), *rest


_define("attend", 5, _run_attend, _fake_attend, _run_attend_backward)
_define("attend_both_ways", 6, _run_both_ways, _fake_both_ways, _run_both_ways_backward, extra=1)
_define("final_memory", 3, _run_final_memory, _fake_final_memory, _run_final_memory_backward, gradients=2)
