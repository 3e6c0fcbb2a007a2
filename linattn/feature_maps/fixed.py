"""Feature maps without parameters: one function for queries and keys alike."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from linattn.errors import FeatureMapError, ShapeError
from linattn.feature_maps._numerics import bounded, symmetric_square, widen
from linattn.feature_maps.base import FeatureMap, Features
from linattn.feature_maps.registry import register
from linattn.kernels.protocols import Projected


class FixedMap(FeatureMap):
    """A map whose queries and keys go through the same parameter-free :meth:`features`."""

    def features(self, x: Tensor) -> Features:
        """Features ``[B, T, heads, F]`` of ``x`` ``[B, T, heads, D]``."""
        raise NotImplementedError

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self.features(q)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self.features(k)


@register
class ELU(FixedMap):
    r"""ELU + 1, the first linear attention:

        φ(x) = elu(x) + 1 = exp(min(x, 0)) + max(x, 0)          F = D

    Non-negative and smooth, with a gradient everywhere; a poor stand-in for the softmax kernel (it cannot concentrate),
    meant for models trained with it. The scale does not enter.

    Reference: Katharopoulos et al. 2020, "Transformers are RNNs", eq. 7.

    Example:
        >>> phi = ELU(8)
        >>> phi.forward_queries(torch.zeros(1, 3, 1, 8)).values.shape
        torch.Size([1, 3, 1, 8])
    """

    name: ClassVar[str] = "elu"
    positive: ClassVar[bool] = True
    paper: ClassVar[str] = "Katharopoulos et al. 2020, arXiv:2006.16236"

    @property
    def feature_dim(self) -> int:
        return self.head_dim

    def features(self, x: Tensor) -> Features:
        wide = widen(x)
        return Features((wide.clamp_max(0).exp() + wide.relu()).to(x.dtype))

    def projected(self) -> Projected:
        return Projected("elu")


@register
class ReLU(FixedMap):
    r"""ReLU:

        φ(x) = max(x, 0)          F = D

    Non-negative and sparse. A query without positive coordinates attends to nothing. The scale does not enter.

    Reference: Cai et al. 2023, "EfficientViT". Choromanski et al. 2021 use the same function of a random projection.

    Example:
        >>> ReLU(2).forward_keys(torch.tensor([[[[-1.0, 2.0]]]])).values
        tensor([[[[0., 2.]]]])
    """

    name: ClassVar[str] = "relu"
    positive: ClassVar[bool] = True
    paper: ClassVar[str] = "Cai et al. 2023, arXiv:2205.14756"

    @property
    def feature_dim(self) -> int:
        return self.head_dim

    def features(self, x: Tensor) -> Features:
        return Features(x.relu())

    def projected(self) -> Projected:
        return Projected("relu")


@register
class SquaredReLU(FixedMap):
    r"""Squared ReLU:

        φ(x) = max(x, 0)²          F = D

    Sharper than ReLU at the same size. Squares leave half precision soon, so the magnitude goes into the log-scale.
    The scale does not enter.

    Reference: So et al. 2021, "Primer", as an activation; a kernel feature map in the works that followed.

    Example:
        >>> values, log_scale = SquaredReLU(2).forward_keys(torch.tensor([[[[-1.0, 2.0]]]]))
        >>> (values * log_scale.exp().unsqueeze(-1)).round()
        tensor([[[[0., 4.]]]])
    """

    name: ClassVar[str] = "relu2"
    positive: ClassVar[bool] = True
    log_scaled: ClassVar[bool] = True
    paper: ClassVar[str] = "So et al. 2021, arXiv:2109.08668"

    @property
    def feature_dim(self) -> int:
        return self.head_dim

    def features(self, x: Tensor) -> Features:
        return bounded(widen(x).relu().square(), x.dtype)


@register
class Taylor2(FixedMap):
    r"""The softmax kernel's Taylor series to second order, exactly:

        φ(x) = [1, y, (y ⊗ y) / √2],  y = √scale · x
        φ(q)·φ(k) = 1 + s + s²/2,  s = scale · q·k          F = 1 + D + D (D + 1) / 2

    The quadratic part keeps each product y_i y_j once, weighted by √2 where i ≠ j. Always positive
    (1 + s + s²/2 ≥ 1/2); close to exp(s) for |s| ≤ 1 and far below it beyond. F grows as D²/2, so the map suits small
    heads (16 to 32), or queries and keys projected to such.

    Reference: Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff"
    (Based), section 4.1.

    Example:
        >>> phi = Taylor2(4, scale=1.0)
        >>> q, k = torch.tensor([[[[0.0, 0.0, 1.0, 0.0]]]]), torch.tensor([[[[0.0, 3.0, 2.0, 0.0]]]])
        >>> (fq, aq), (fk, ak) = phi(q, k)
        >>> round((aq + ak).exp().item() * (fq * fk).sum().item(), 4)  # 1 + 2 + 2
        5.0
    """

    name: ClassVar[str] = "taylor2"
    positive: ClassVar[bool] = True
    log_scaled: ClassVar[bool] = True
    paper: ClassVar[str] = "Arora et al. 2024, arXiv:2402.18668"

    @property
    def feature_dim(self) -> int:
        return 1 + self.head_dim + self.head_dim * (self.head_dim + 1) // 2

    def features(self, x: Tensor) -> Features:
        y = widen(x) * math.sqrt(self.scale)
        quadratic = symmetric_square(y) * math.sqrt(0.5)
        return bounded(torch.cat([torch.ones_like(y[..., :1]), y, quadratic], dim=-1), x.dtype)

    def projected(self) -> Projected:
        # Every feature is a product of two affine functions: 1 · 1, y_i · 1, and y_i · y_j with its weight.
        eye = torch.eye(self.head_dim) * math.sqrt(self.scale)
        i, j = torch.triu_indices(self.head_dim, self.head_dim)
        linear = torch.cat([torch.zeros(self.head_dim, 1), eye], -1)
        weight = ((1 + (i != j)) / 2).sqrt()
        first, second = torch.cat([linear, eye[:, i] * weight], -1), torch.cat([linear * 0, eye[:, j]], -1)
        ones = torch.ones(self.head_dim + 1)
        ones_first = torch.cat([(ones.cumsum(0) == 1).float(), torch.zeros(len(i))])
        bias = torch.stack([ones_first, torch.cat([ones, torch.zeros(len(i))])])[:, None]
        both = torch.stack([first, second])[:, None]
        return Projected("product", both, both, bias, bias)


@register
class DPFP(FixedMap):
    r"""Deterministic parameter-free projection: products of rectified coordinates and their neighbours.

        r = max([x, −x], 0),  φ(x) = [r ⊙ roll(r, 1), …, r ⊙ roll(r, ν)]          F = 2 D ν

    Non-negative; different directions excite different features, which lets a fast-weight memory hold more items than
    D. The scale does not enter.

    Reference: Schlag et al. 2021, "Linear transformers are secretly fast weight programmers", where the
    map gets its name.

    Args:
        nu: number of shifts ν.

    Example:
        >>> make("dpfp", 8, nu=2).feature_dim
        32
    """

    name: ClassVar[str] = "dpfp"
    positive: ClassVar[bool] = True
    log_scaled: ClassVar[bool] = True
    paper: ClassVar[str] = "Schlag et al. 2021, arXiv:2102.11174"

    def __init__(self, head_dim: int, *, nu: int = 3, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        if not 1 <= nu < 2 * head_dim:
            raise FeatureMapError(f"DPFP: nu={nu}, expected 1 ≤ nu < 2 · head_dim = {2 * head_dim}.")
        self.nu = nu

    @property
    def feature_dim(self) -> int:
        return 2 * self.head_dim * self.nu

    def features(self, x: Tensor) -> Features:
        wide = widen(x)
        r = torch.cat([wide, -wide], dim=-1).relu()
        products = torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, self.nu + 1)], dim=-1)
        return bounded(products, x.dtype)

    def options(self) -> dict[str, Any]:
        return {"nu": self.nu}


@register
class CosFormer(FeatureMap):
    r"""ReLU features reweighted by the cosine of the distance:

        φ(x_i) = [max(x, 0) cos θ_i, max(x, 0) sin θ_i],  θ_i = (π/2) · min(i, M) / M          F = 2 D
        φ(q_i)·φ(k_j) = (max(q, 0)·max(k, 0)) · cos(θ_i − θ_j)

    M is ``max_length``. Weights fall with distance and are never negative: all angles lie in [0, π/2]. Positions past
    M share the angle π/2 (distances among them no longer count), so choose M no smaller than the longest sequence. The
    scale does not enter.

    Reference: Qin et al. 2022, "cosFormer: rethinking softmax in attention", where the
    re-weighting and its split into cosine and sine halves are derived.

    Args:
        max_length: M, in tokens.

    Example:
        >>> phi = CosFormer(8, max_length=128)
        >>> phi.forward_keys(torch.ones(1, 3, 1, 8), torch.arange(3)[None]).values.shape
        torch.Size([1, 3, 1, 16])
    """

    name: ClassVar[str] = "cosformer"
    positive: ClassVar[bool] = True
    positional: ClassVar[bool] = True
    paper: ClassVar[str] = "Qin et al. 2022, arXiv:2202.08791"

    def __init__(self, head_dim: int, *, max_length: int = 4096, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        if max_length < 1:
            raise FeatureMapError(f"CosFormer: max_length={max_length}, expected a positive number of tokens.")
        self.max_length = max_length

    @property
    def feature_dim(self) -> int:
        return 2 * self.head_dim

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self._features(q, positions)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self._features(k, positions)

    def _features(self, x: Tensor, positions: Tensor | None) -> Features:
        if positions is None or positions.shape != x.shape[:2]:
            got = None if positions is None else tuple(positions.shape)
            raise ShapeError(
                f"positions: got {got}, but CosFormer needs the position of every token, [B, T] = {tuple(x.shape[:2])}."
            )
        wide = widen(x).relu()
        angle = positions.clamp(0, self.max_length).to(wide.dtype) * (math.pi / 2 / self.max_length)
        angle = angle[..., None, None]
        return Features(torch.cat([wide * angle.cos(), wide * angle.sin()], dim=-1).to(x.dtype))

    def options(self) -> dict[str, Any]:
        return {"max_length": self.max_length}
