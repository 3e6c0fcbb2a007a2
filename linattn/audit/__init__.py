"""Does a converted model deserve its memory? Measurements on real text.

Submodules that import transformers are loaded when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from linattn.audit.far_gain import FarGain, far_gain, gain_ratio, truncated_losses
from linattn.audit.perplexity import Perplexity, perplexity
from linattn.audit.positions import Bucket, PositionLosses, by_position, mean_over, position_losses, token_losses

if TYPE_CHECKING:
    from linattn.audit.ablations import attention_off, far_off, near_off
    from linattn.audit.memory import (
        StateBytes,
        cache_bytes,
        cheaper_from,
        equal_bytes_control,
        equal_bytes_plan,
        state_bytes,
    )
    from linattn.audit.report import audit_model, verdict

_HOME = {
    "StateBytes": "memory",
    "attention_off": "ablations",
    "audit_model": "report",
    "cache_bytes": "memory",
    "cheaper_from": "memory",
    "equal_bytes_control": "memory",
    "equal_bytes_plan": "memory",
    "far_off": "ablations",
    "near_off": "ablations",
    "state_bytes": "memory",
    "verdict": "report",
}

__all__ = [
    "Bucket",
    "FarGain",
    "Perplexity",
    "PositionLosses",
    "StateBytes",
    "attention_off",
    "audit_model",
    "by_position",
    "cache_bytes",
    "cheaper_from",
    "equal_bytes_control",
    "equal_bytes_plan",
    "far_gain",
    "far_off",
    "gain_ratio",
    "mean_over",
    "near_off",
    "perplexity",
    "position_losses",
    "state_bytes",
    "token_losses",
    "truncated_losses",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
