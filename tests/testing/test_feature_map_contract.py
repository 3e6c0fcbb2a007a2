"""Every registered feature map inherits the shipped suite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import linattn.feature_maps as feature_maps
from linattn.feature_maps import FeatureMap, Features
from linattn.testing import FeatureMapContract, SequenceMapContract


class Exponent(FeatureMap):
    """A map as a user would write it: the least the contract asks for."""

    positive = True
    learned = True

    def __init__(self, head_dim: int, **head_sizes: Any) -> None:
        super().__init__(head_dim, **head_sizes)
        self.log_base = nn.Parameter(torch.empty(head_dim, **self._factory))
        self.reset_parameters()

    @property
    def feature_dim(self) -> int:
        return 2 * self.head_dim

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_base, 0.5)

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        z = self.log_base.float() * q.float()
        return Features(torch.cat([z, -z], -1).softmax(-1).to(q.dtype))

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self.forward_queries(k)


class TestOwnMap(FeatureMapContract):
    def make(self, **head_sizes: Any) -> FeatureMap:
        return Exponent(**head_sizes)


def suite(name: str, causal: bool) -> type:
    def make(self: Any, **head_sizes: Any) -> FeatureMap:
        return feature_maps.make(name, **head_sizes)

    title = "Test" + "".join(c if c.isalnum() else "_" for c in name.replace("+", "Plus").replace("#", "Sharp").title())
    return type(title, (FeatureMapContract if causal else SequenceMapContract,), {"make": make, "__module__": __name__})


for info in feature_maps.available():
    made = suite(info.name, info.causal)
    assert made.__name__ not in globals(), f"two maps would share {made.__name__}"
    globals()[made.__name__] = made
