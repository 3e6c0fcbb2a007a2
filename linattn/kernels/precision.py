"""Features in the accumulation dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widen(features: Tensor, dtype: torch.dtype) -> Tensor:
    """``features`` in ``dtype``; on the way back, the gradient of float16 features saturates instead of overflowing.

    The gradient with respect to a feature is relative to the normaliser of its row, which features of little overlap
    make small: beyond float16's 65504 it would be infinite, and times an underflowed feature NaN.
    """
    return _Saturating.apply(features, dtype) if features.dtype == torch.float16 else features.to(dtype)


class _Saturating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, dtype: torch.dtype) -> Tensor:
        return features.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = torch.finfo(torch.float16).max
        return gradient.clamp(-largest, largest).to(torch.float16), None
