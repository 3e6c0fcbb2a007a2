"""How kernels run: interpreted or compiled, and started at little cost once they are compiled."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Triton's interpreter runs the kernels on the CPU; it is chosen before Triton is imported."""
NVIDIA = torch.version.hip is None and not INTERPRETED
"""Kernels are compiled for a chip of this maker."""
_MOST = 8192

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
) -> None:
    """Start ``kernel`` on ``grid`` with ``args``, then ``constants`` for its last parameters.

    Triton describes every argument of every call by name to find what it compiled, which for a kernel of eighty of them
    takes longer than a small kernel runs. Here what it may have specialised on is the key itself: tensors count by
    dtype and alignment, everything else by value. The first argument is a tensor.
    """
    if not NVIDIA:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    rest = tuple([constants[name] for name in kernel.arg_names[len(args) :]])
    key: list[Any] = [kernel, args[0].get_device(), num_warps, num_stages, rest]
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
    if found is None:
        found = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        if len(_compiled) >= _MOST:
            _compiled.clear()
        if hasattr(found, "run"):
            _compiled[tuple(key)] = found
        return
    found[(*grid, 1, 1)[:3]](*values, *rest)
