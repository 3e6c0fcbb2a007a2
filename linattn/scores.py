"""Scores of tokens: which of those behind the window are worth keeping exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from linattn.kernels.precision import autocast


class TokenScore(nn.Module):
    """What a token is worth keeping to each key/value head, of the keys and values of all of them:

        x = ([k, v] − mean) / std          s = W₂ silu(W₁ x + b₁) + b₂

    Settled when the token is written, it says how much attention later queries will pay to it ("Locret",
    arXiv:2410.01805). Choosing tokens has no gradient, so the parameters ask for none; what trains them sets their
    ``requires_grad``. As a fresh one is random, so are the tokens that it keeps.

    Args:
        num_kv_heads, head_dim, value_dim: Hkv, D, V. width: of the hidden layer.
        device, dtype: of the parameters; scores are computed in float32 at least.

    Attributes:
        mean, std: ``[Hkv · (D + V)]`` of the inputs, buffers; 0 and 1 until they are set.
        hidden_weight: ``[width, Hkv · (D + V)]``, W₁. hidden_bias: ``[width]``.
        weight: ``[Hkv, width]``, W₂. bias: ``[Hkv]``.
    """

    mean: Tensor
    std: Tensor

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

    def inputs(self, k: Tensor, v: Tensor) -> Tensor:
        """``[B, T, Hkv · (D + V)]`` of keys ``[B, T, Hkv, D]`` and values ``[B, T, Hkv, V]``, in float32 at least."""
        wide = torch.promote_types(k.dtype, torch.float32)
        return torch.cat([k.flatten(2).to(wide), v.flatten(2).to(wide)], -1)

    def of(self, x: Tensor) -> Tensor:
        """``[…, Hkv]`` float32 of :meth:`inputs` ``[…, Hkv · (D + V)]``."""
        with autocast(x, None):
            x = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
            hidden = silu(linear(x, self.hidden_weight.to(x.dtype), self.hidden_bias.to(x.dtype)))
            return linear(hidden, self.weight.to(x.dtype), self.bias.to(x.dtype)).float()

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        """``[B, T, Hkv]`` float32 of keys before rotary embedding ``[B, T, Hkv, D]`` and values ``[B, T, Hkv, V]``."""
        return self.of(self.inputs(k, v))
