"""Arithmetic that feature maps share: float32 or wider inside, the input's dtype outside, magnitudes in log-scales."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from linattn.feature_maps.base import Features
from linattn.kernels.precision import autocast


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on the device of ``x`` if it is on, and leaves no trace in a graph if it is not."""
    return autocast(x, None)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x_h W_h for every head in at least float32, also under autocast: ``[B, T, H, D], [H, D, F] -> [B, T, H, F]``."""
    with full_precision(x):
        x = widen(x)
        return torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype))


def bounded(features: Tensor, dtype: torch.dtype, log_scale: Tensor | float = 0.0) -> Features:
    """exp(log_scale) · features as values of magnitude ≤ 1 in ``dtype`` and a log-scale per token.

    Args:
        features: ``[B, T, H, F]``. log_scale: ``[B, T, H]`` or a number.

    Large features are divided by a power of two, small ones left alone. A power of two changes no mantissa, and being
    piecewise constant it carries no gradient.
    """
    exponent = features.detach().abs().amax(-1).clamp_min(1).log2().ceil()
    values = features * torch.exp2(-exponent).unsqueeze(-1)
    return Features(values.to(dtype), exponent * math.log(2) + log_scale)


def bounded_exp(logits: Tensor, log_scale: Tensor | float, dtype: torch.dtype) -> Features:
    """exp(logits + log_scale) as values in (0, 1] in ``dtype`` and a log-scale per token.

    Args:
        logits: ``[B, T, H, F]``. log_scale: ``[B, T, H]`` or a number.

    The largest logit is rounded up to an integer, which makes it piecewise constant: no gradient flows through it.
    """
    top = logits.detach().amax(-1).ceil()
    return Features((logits - top.unsqueeze(-1)).exp().to(dtype), top + log_scale)


def symmetric_square(x: Tensor) -> Tensor:
    """x ⊗ x without its repeated half: ``[..., D] -> [..., D (D + 1) / 2]`` with φ(x)·φ(y) = (x·y)²."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = (1 + (i != j)).to(x.dtype).sqrt()
    return x.index_select(-1, i) * x.index_select(-1, j) * weight
