"""Feature maps: what stands in for the softmax kernel.

>>> from linattn.feature_maps import available, make
>>> phi = make("elu", 64, num_heads=8, num_kv_heads=2)
"""

from linattn.feature_maps.base import FeatureMap, Features, SequenceMap
from linattn.feature_maps.registry import MapInfo, available, get, make, register

__all__ = [
    "FeatureMap",
    "Features",
    "MapInfo",
    "SequenceMap",
    "available",
    "get",
    "make",
    "register",
]
