"""linattn: linear attention whose memory does not grow, as a module and as a retrofit for transformers models.

>>> from linattn import KernelAttention, convert_model

Names are imported when first used. Importing the package lets transformers' Auto classes load converted checkpoints;
it imports neither transformers nor torch for that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from linattn._version import __version__
from linattn.convert import autoload

if TYPE_CHECKING:
    from linattn import errors, feature_maps
    from linattn.attention import KernelAttention
    from linattn.convert import ConversionPlan, convert_model, load, plan_model, revert_model
    from linattn.kernels import kernel_attention, linear_attention
    from linattn.state import AttentionState

_HOME = {
    "AttentionState": "state",
    "ConversionPlan": "convert",
    "KernelAttention": "attention",
    "convert_model": "convert",
    "kernel_attention": "kernels",
    "linear_attention": "kernels",
    "load": "convert",
    "plan_model": "convert",
    "revert_model": "convert",
}
_ROOMS = ("errors", "feature_maps")

__all__ = [
    "AttentionState",
    "ConversionPlan",
    "KernelAttention",
    "__version__",
    "convert_model",
    "errors",
    "feature_maps",
    "kernel_attention",
    "linear_attention",
    "load",
    "plan_model",
    "revert_model",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoload.install()
