"""Feature maps: what stands in for the softmax kernel.

>>> from linattn.feature_maps import available, make
>>> phi = make("elu", 64, num_heads=8, num_kv_heads=2)
"""

from linattn.feature_maps.base import FeatureMap, Features, SequenceMap
from linattn.feature_maps.fixed import DPFP, ELU, CosFormer, ReLU, SquaredReLU, Taylor2
from linattn.feature_maps.learned import T2R, Exponential, Hedgehog, PolySketch, ReBased, WeightedHedgehog
from linattn.feature_maps.low_rank import Linformer, Nystrom, Nystromformer
from linattn.feature_maps.random import (
    FavorPlus,
    FavorPlusHyperbolic,
    FavorPlusPlus,
    FavorSharp,
    RandomFourier,
    RandomReLU,
)
from linattn.feature_maps.registry import MapInfo, available, get, make, register

__all__ = [
    "DPFP",
    "ELU",
    "T2R",
    "CosFormer",
    "Exponential",
    "FavorPlus",
    "FavorPlusHyperbolic",
    "FavorPlusPlus",
    "FavorSharp",
    "FeatureMap",
    "Features",
    "Hedgehog",
    "Linformer",
    "MapInfo",
    "Nystrom",
    "Nystromformer",
    "PolySketch",
    "RandomFourier",
    "RandomReLU",
    "ReBased",
    "ReLU",
    "SequenceMap",
    "SquaredReLU",
    "Taylor2",
    "WeightedHedgehog",
    "available",
    "get",
    "make",
    "register",
]
