"""What the kernels ask of a feature map."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class KernelFeatureMap(Protocol):
    """Per-token features; see :class:`linattn.feature_maps.FeatureMap` for the full contract."""

    scale: float
    positional: bool
    causal: bool

    @property
    def feature_dim(self) -> int: ...

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...
