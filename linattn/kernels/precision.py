"""Which precision the operator works in, whatever its inputs and the caller's autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on the device of ``x``, or None while it is off."""
    device = _device_type(x)
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to ``dtype`` (None: off) on the device of ``x``; leaves no trace in a graph if nothing changes."""
    if autocast_dtype(x) == dtype:
        return nullcontext()
    return torch.autocast(_device_type(x), dtype=dtype, enabled=dtype is not None)


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type


def widen(features: Tensor, dtype: torch.dtype) -> Tensor:
    """``features`` in ``dtype``; on the way back, the gradient of float16 features saturates instead of overflowing.

    The gradient with respect to a feature is relative to the normaliser of its row, which features of little overlap
    make small: beyond float16's 65504 it would be infinite, and times an underflowed feature NaN.
    """
    return _Saturating.apply(features, dtype) if features.dtype == torch.float16 else features.to(dtype)


class _Saturating(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, dtype: torch.dtype) -> Tensor:
        return features.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = torch.finfo(torch.float16).max
        return gradient.clamp(-largest, largest).to(torch.float16), None
