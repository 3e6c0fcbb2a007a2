"""Retrofit: transformers models with linear attention, in place and reversible.

Submodules that import transformers are loaded when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._lazy import lazy

if TYPE_CHECKING:
    from linattn.convert.cache import LinattnCacheLayer
    from linattn.convert.families import prepare_cache
    from linattn.convert.hf import ConvertedAttention, window_only
    from linattn.convert.io import load, load_state, save_state
    from linattn.convert.plan import ConversionPlan, LayerPlan, plan_model
    from linattn.convert.swap import convert_model, revert_model

_HOME = {
    "ConversionPlan": "plan",
    "ConvertedAttention": "hf",
    "LayerPlan": "plan",
    "LinattnCacheLayer": "cache",
    "convert_model": "swap",
    "load": "io",
    "load_state": "io",
    "plan_model": "plan",
    "prepare_cache": "families",
    "revert_model": "swap",
    "save_state": "io",
    "window_only": "hf",
}

__all__ = [
    "ConversionPlan",
    "ConvertedAttention",
    "LayerPlan",
    "LinattnCacheLayer",
    "convert_model",
    "load",
    "load_state",
    "plan_model",
    "prepare_cache",
    "revert_model",
    "save_state",
    "window_only",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
