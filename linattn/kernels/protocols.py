"""What the kernels ask of a feature map."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Projected(NamedTuple):
    """A map that a kernel can compute from the raw input: φ(x) = exp(log_scale) · activation(x W + c).

    ``softmax`` runs over the features; ``exp`` keeps its largest exponent in the log-scale, which is
    ``top − norm · |x|² + constant``; ``product`` multiplies two projections, W_0 and W_1; ``elu`` is elu + 1.

    Attributes:
        activation: the function of the projection, or of x itself without weights.
        query_weight: ``[parts, H | 1, D, F]`` or None. key_weight: ``[parts, Hkv | 1, D, F]`` or None.
        query_bias: ``[parts, H | 1, F]`` or None. key_bias: ``[parts, Hkv | 1, F]`` or None. All of them without
            ``parts`` where that is one.
        norm, constant: of ``exp``.
        mirrored: the weights are the first half of the projection; the second is their negative.
    """

    activation: Literal["relu", "elu", "softmax", "exp", "product"]
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    norm: float = 0.0
    constant: float = 0.0
    mirrored: bool = False


class KernelFeatureMap(Protocol):
    """Per-token features; see :class:`linattn.feature_maps.FeatureMap` for the full contract."""

    scale: float

    @property
    def positional(self) -> bool: ...

    @property
    def causal(self) -> bool: ...

    @property
    def feature_dim(self) -> int: ...

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...


class GivenFeatures:
    """The map of features that are already there: the identity, which splits off a log-scale kept as last column."""

    scale = 1.0
    positional = False
    causal = True

    def __init__(self, feature_dim: int, *, log_scaled: bool) -> None:
        self.feature_dim = feature_dim
        self.log_scaled = log_scaled

    @classmethod
    def beside(
        cls, queries: Tensor, keys: Tensor, log_scale: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, GivenFeatures]:
        """Features ``[..., F]`` as the operator is to read them, and the map that does.

        The keys' ``log_scale`` is the last column of all, in ``dtype``: it needs float32.
        """
        given = cls(queries.shape[-1], log_scaled=log_scale is not None)
        if log_scale is None:
            return queries, keys, given
        return F.pad(queries.to(dtype), [0, 1]), torch.cat([keys.to(dtype), log_scale[..., None].to(dtype)], -1), given

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return _columns(q, self.feature_dim), None

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return _columns(k, self.feature_dim), k[..., -1] if self.log_scaled else None


def _columns(x: Tensor, count: int) -> Tensor:
    """The first columns; all of them without a slice, whose gradient would be a copy."""
    return x if x.shape[-1] == count else x[..., :count]
