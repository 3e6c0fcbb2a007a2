"""How kernels run: interpreted or compiled, and started at little cost once they are compiled."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Triton's interpreter runs the kernels on the CPU; it is chosen before Triton is imported."""
NVIDIA = torch.version.hip is None and not INTERPRETED
"""Kernels are compiled for a chip of this maker."""
_MOST = 8192

_compiled: dict[tuple[Any, ...], Any] = {}


class _Local(threading.local):
    recorder: Any = None
    """Who is told of this thread's launches, or takes them in their place."""


local = _Local()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    registers: int = 0,
    **constants: Any,
) -> None:
    """Start ``kernel`` on ``grid`` with ``args``, then ``constants`` for its last parameters.

    ``registers``: of a thread, at most, on NVIDIA's chips; 0 for as many as the compiler takes.

    Triton describes every argument of every call by name to find what it compiled, which for a kernel of eighty of them
    takes longer than a small kernel runs. Here what it may have specialised on is the key itself: tensors count by
    dtype and alignment, everything else by value. The first argument is a tensor.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if registers and NVIDIA:
        options["maxnreg"] = registers
    recorder = local.recorder
    if recorder is None:
        _launch(kernel, grid, args, options, constants)
        return
    if recorder.collects:
        recorder.collect(kernel, args, options | constants)
        return
    recorder.rests = True
    try:
        found = _launch(kernel, grid, args, options, constants)
    finally:
        recorder.rests = False
    if found is None:
        start = functools.partial(kernel[grid], **options, **constants)
        recorder.launched(start, None, args)
    else:
        recorder.launched(found, grid, (*args, *_rest(kernel, args, constants)))


def _rest(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([constants[name] for name in kernel.arg_names[len(args) :]])


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    options: dict[str, int],
    constants: dict[str, Any],
) -> Any:
    """The compiled kernel that was started; None where it takes tensors and finds out for itself."""
    if not NVIDIA:
        kernel[grid](*args, **options, **constants)
        return None
    rest = _rest(kernel, args, constants)
    key: list[Any] = [kernel, args[0].get_device(), *options.values(), rest]
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            values.append(pointer)  # Triton's launcher takes an address as it is, and asks a tensor for it
            key.append((arg.dtype, pointer % 16))
        else:
            values.append(arg)
            key.append(arg)
    found = _compiled.get(tuple(key))
    if found is not None:
        found[(*grid, 1, 1)[:3]](*values, *rest)
        return found
    found = kernel[grid](*args, **options, **constants)
    if not hasattr(found, "run"):
        return None
    if len(_compiled) >= _MOST:
        _compiled.clear()
    _compiled[tuple(key)] = found
    return found


def prepared(
    kernel: Any, grid: tuple[int, ...], pick: Callable[[list[Any]], tuple[Any, ...]]
) -> Callable[[list[Any], list[Any], int], None]:
    """A function that starts a compiled ``kernel`` with what ``pick`` takes from its second argument.

    Its third argument is the stream; −1 where a profiler asks to be told of launches.
    """
    grid = (*grid, 1, 1)[:3]
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    x, y, z = grid
    known = type(run).__name__ == "CudaLauncher"

    def start(slots: list[Any], words: list[Any], stream: int) -> None:
        if known and stream >= 0:
            run(x, y, z, stream, function, metadata, None, None, None, *pick(words))
        else:
            kernel[grid](*pick(words))

    return start


_knobs: Any = getattr(triton, "knobs", None)


def stream() -> int:
    """The current stream as Triton's launcher takes it; −1 where a profiler asks to be told of launches."""
    if not NVIDIA:
        return 0
    where = triton.compiler.CompiledKernel if _knobs is None else _knobs.runtime
    for hook in (where.launch_enter_hook, where.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return -1
    active = triton.runtime.driver.active
    return active.get_current_stream(active.get_current_device())
