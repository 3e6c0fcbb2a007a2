"""The kernels as differentiable operators: eagerly a plain autograd function, in a compiled graph a custom operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linattn.kernels.triton import launch
from linattn.kernels.triton.config import Config
from linattn.kernels.triton.launch import FIRST_TABLE, Inputs, Memory, Options, Stats

OPTIONS = len(Options._fields)


def attend(x: Inputs, o: Options, c: Config) -> Tensor:
    """Attention ``[B, T, H, V]``, differentiable by every floating point input."""
    if torch.compiler.is_compiling():
        return _attend_op(*x, *_encode(o, c))[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x[:FIRST_TABLE]):
        return _Attend.apply(o, c, *x)[0]
    return launch.attend(x, o, c, training=False)[0]


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        count = len(Inputs._fields)
        if dout is None:
            return (None,) * (count + 2)
        x, out, stats = Inputs(*saved[:count]), saved[count], Stats(*saved[count + 1 :])
        needs = dict(zip(Inputs._fields, ctx.needs_input_grad[2:], strict=True))
        grads = launch.attend_backward(x, ctx.options, ctx.config, out, stats, dout, needs)
        return (None, None, *(grads.get(name) if needs[name] else None for name in Inputs._fields))


def attend_both_ways(x: Inputs, reverse: Tensor, o: Options, c: Config) -> Tensor:
    """Bidirectional attention with a window: every token sees those before it, itself, and those after it.

    ``reverse [R · L]`` is the slot that stands in each slot's place when every sequence runs backwards.
    """
    return _BothWays.apply(o, c, reverse, *x)


def _backwards(x: Inputs, reverse: Tensor) -> Inputs:
    """The same tokens from last to first. No sinks: those after a token lie in its window."""
    turned = {name: _turn(getattr(x, name), reverse) for name in _PER_TOKEN}
    return x._replace(**turned, sink_k=None, sink_v=None, sink_logits=None)


_PER_TOKEN = ("q", "k", "v", "q_far", "k_far", "query_log", "key_log")


def _turn(t: Tensor | None, reverse: Tensor) -> Tensor | None:
    return None if t is None else t.flatten(0, 1)[reverse].view(t.shape)


class _BothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, c: Config, reverse: Tensor, *tensors: Tensor | None) -> Tensor:
        x = Inputs(*tensors)  # type: ignore[arg-type]
        back = _backwards(x, reverse)
        out, stats = launch.attend(x, o, c, training=True)
        out_back, stats_back = launch.attend(back, o._replace(strict=True, sinks=0), c, training=True)
        parts = []
        for t, s, turned in ((out, stats, False), (out_back, stats_back, True)):
            wide = t.float() + s.residual if s.residual.numel() else t.float()
            found = (wide, s.top, torch.where(s.rden == 0, 0.0, 1 / s.rden))
            parts.append([_turn(y, reverse) for y in found] if turned else list(found))
        (first, top_first, mass_first), (second, top_second, mass_second) = parts
        top = torch.maximum(
            top_first.masked_fill(mass_first == 0, -1e30), top_second.masked_fill(mass_second == 0, -1e30)
        )
        weights = [m * (t - top).clamp(max=0).exp() for m, t in ((mass_first, top_first), (mass_second, top_second))]
        mass = weights[0] + weights[1]
        rden = torch.where(mass == 0, 0.0, 1 / mass)
        wide = (first * weights[0][..., None] + second * weights[1][..., None]) * rden[..., None]
        out = wide.to(x.q.dtype)
        residual = (wide - out.float()).to(out.dtype) if out.dtype != torch.float32 else stats.residual
        ctx.options, ctx.config = o, c
        memories = (*stats[3:], *stats_back[3:])
        ctx.save_for_backward(*tensors, reverse, out, residual, top, rden, *memories)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        count = len(Inputs._fields)
        x, saved = Inputs(*ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        reverse, out, residual, top, rden, *memories = saved
        needs = dict(zip(Inputs._fields, ctx.needs_input_grad[3:], strict=True))
        o, c = ctx.options, ctx.config
        stats = Stats(top, rden, residual, *memories[:3])
        grads = launch.attend_backward(x, o, c, out, stats, dout, needs)
        turned = [_turn(t, reverse) if t.numel() else t for t in (top, rden, residual)]
        back = launch.attend_backward(
            _backwards(x, reverse),
            o._replace(strict=True, sinks=0),
            c,
            _turn(out, reverse),  # type: ignore[arg-type]
            Stats(*turned, *memories[3:]),  # type: ignore[arg-type]
            _turn(dout, reverse),  # type: ignore[arg-type]
            needs | {"sink_logits": False, "sink_k": False, "sink_v": False},
        )
        for name, g in back.items():
            if g is not None:
                g = _turn(g, reverse) if name in _PER_TOKEN else g
                known = grads.get(name)
                grads[name] = g if known is None else known + g
        return (None, None, None, *(grads.get(name) if needs[name] else None for name in Inputs._fields))


def final_memory(x: Inputs, o: Options, c: Config) -> Memory:
    """The memory after all keys; kv and k are differentiable, the log-scale is a constant they are relative to."""
    return Memory(*_Fold.apply(o, c, *x)[:3])


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dkv: Tensor, dk: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        count = len(Inputs._fields)
        x, m, gate = Inputs(*saved[:count]), saved[count], saved[count + 1]
        needs = dict(zip(Inputs._fields, ctx.needs_input_grad[2:], strict=True))
        end = Memory(dkv, dk, m)
        grads = launch.final_memory_backward(x, ctx.options, ctx.config, end, gate, dkv, dk, needs)
        return (None, None, *(grads.get(name) if needs[name] else None for name in Inputs._fields))


def _encode(o: Options, c: Config) -> tuple[Any, ...]:
    raise NotImplementedError


def _attend_op(*args: Any) -> tuple[Tensor, ...]:
    raise NotImplementedError
