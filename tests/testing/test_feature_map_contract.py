"""Every registered feature map inherits the shipped suite."""

from __future__ import annotations

from typing import Any

import linattn.feature_maps as feature_maps
from linattn.feature_maps import FeatureMap
from linattn.testing import FeatureMapContract, SequenceMapContract


def suite(name: str, causal: bool) -> type:
    def make(self: Any, **head_sizes: Any) -> FeatureMap:
        return feature_maps.make(name, **head_sizes)

    title = "Test" + "".join(c if c.isalnum() else "_" for c in name.replace("+", "Plus").replace("#", "Sharp").title())
    return type(title, (FeatureMapContract if causal else SequenceMapContract,), {"make": make, "__module__": __name__})


for info in feature_maps.available():
    made = suite(info.name, info.causal)
    assert made.__name__ not in globals(), f"two maps would share {made.__name__}"
    globals()[made.__name__] = made
