"""Scores of tokens: which of those behind the window are worth keeping exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from linattn.kernels.precision import autocast

LOOKUP_SLOPE = 4.0
"""Of the sigmoid: how sharply the readout of tokens to be looked up parts them at its threshold."""


class TokenScore(nn.Module):
    """What a token is worth keeping to each key/value head, of the keys and values of all of them:

        x = ([k, v] − mean) / std          s = W₂ silu(W₁ x + b₁) + b₂ + c σ(4 (w · x − t))

    Settled when the token is written, it says how much attention later queries will pay to it ("Locret",
    arXiv:2410.01805). That is a mean, in which one query's whole attention counts for little: a fact that nobody has
    asked about yet has had none. So tokens that a later query will look up, told by the readout w · x beyond its
    threshold t, gain up to c, alike for all heads. It is 0 until it is trained, and the term then absent.

    Choosing tokens has no gradient, so the parameters ask for none; what trains them sets their ``requires_grad``. As
    a fresh one is random, so are the tokens that it keeps.

    Args:
        num_kv_heads, head_dim, value_dim: Hkv, D, V. width: of the hidden layer.
        device, dtype: of the parameters; scores are computed in float32 at least.

    Attributes:
        mean, std: ``[Hkv · (D + V)]`` of the inputs, buffers; 0 and 1 until they are set.
        hidden_weight: ``[width, Hkv · (D + V)]``, W₁. hidden_bias: ``[width]``.
        weight: ``[Hkv, width]``, W₂. bias: ``[Hkv]``.
        lookup_weight: ``[Hkv · (D + V)]``, w. lookup_bias: ``[]``, −t. lookup_bonus: ``[]``, c, a buffer.
    """

    mean: Tensor
    std: Tensor
    lookup_bonus: Tensor

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        width: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = num_kv_heads * (head_dim + (head_dim if value_dim is None else value_dim))

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.register_buffer("mean", torch.empty(size, device=device, dtype=dtype))
        self.register_buffer("std", torch.empty(size, device=device, dtype=dtype))
        self.hidden_weight, self.hidden_bias = parameter(width, size), parameter(width)
        self.weight, self.bias = parameter(num_kv_heads, width), parameter(num_kv_heads)
        self.lookup_weight, self.lookup_bias = parameter(size), parameter()
        self.register_buffer("lookup_bonus", torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, in place."""
        self.mean.zero_()
        self.std.fill_(1.0)
        for weight, bias in ((self.hidden_weight, self.hidden_bias), (self.weight, self.bias)):
            draw = torch.randn(weight.shape, dtype=torch.float32, device="cpu")
            weight.copy_(draw / math.sqrt(weight.shape[1]))
            bias.zero_()
        for lookup in (self.lookup_weight, self.lookup_bias, self.lookup_bonus):
            lookup.zero_()

    def inputs(self, k: Tensor, v: Tensor) -> Tensor:
        """``[B, T, Hkv · (D + V)]`` of keys ``[B, T, Hkv, D]`` and values ``[B, T, Hkv, V]``, in float32 at least."""
        wide = torch.promote_types(k.dtype, torch.float32)
        return torch.cat([k.flatten(2).to(wide), v.flatten(2).to(wide)], -1)

    def standardised(self, x: Tensor) -> Tensor:
        """x of :meth:`inputs` ``[…, Hkv · (D + V)]``."""
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def attention(self, x: Tensor) -> Tensor:
        """``[…, Hkv]`` float32 of :meth:`standardised` inputs, the score without the last term."""
        with autocast(x, None):
            hidden = silu(linear(x, self.hidden_weight.to(x.dtype), self.hidden_bias.to(x.dtype)))
            return linear(hidden, self.weight.to(x.dtype), self.bias.to(x.dtype)).float()

    def lookup(self, x: Tensor) -> Tensor:
        """``[…]`` float32 of :meth:`standardised` inputs, w · x − t."""
        with autocast(x, None):
            return (x @ self.lookup_weight.to(x.dtype) + self.lookup_bias.to(x.dtype)).float()

    def of(self, x: Tensor) -> Tensor:
        """``[…, Hkv]`` float32 of :meth:`inputs` ``[…, Hkv · (D + V)]``."""
        x = self.standardised(x)
        bonus = self.lookup_bonus.float() * torch.sigmoid(LOOKUP_SLOPE * self.lookup(x))
        return self.attention(x) + bonus[..., None]

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        """``[B, T, Hkv]`` float32 of keys before rotary embedding ``[B, T, Hkv, D]`` and values ``[B, T, Hkv, V]``."""
        return self.of(self.inputs(k, v))
