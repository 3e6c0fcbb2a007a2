"""What the kernels ask of a feature map."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return q[..., : self.feature_dim], None

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return k[..., : self.feature_dim], k[..., -1] if self.log_scaled else None
