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
