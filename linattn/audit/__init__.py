"""Does a converted model deserve its memory? Measurements on real text.

Submodules that import transformers are loaded when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._lazy import lazy
from linattn.audit.far_gain import FarGain, far_gain, gain_ratio, truncated_losses
from linattn.audit.perplexity import Perplexity, perplexity
from linattn.audit.positions import Bucket, PositionLosses, by_position, mean_over, position_losses, token_losses

if TYPE_CHECKING:
    from linattn.audit.ablations import attention_off, far_off, near_off, retained_off
    from linattn.audit.cached import CacheCheck, compare_cached
    from linattn.audit.counterfactual import counterfactual_kl, stacked_reach
    from linattn.audit.memory import (
        StateBytes,
        cache_bytes,
        cheaper_from,
        equal_bytes_control,
        equal_bytes_plan,
        state_bytes,
    )
    from linattn.audit.recall import Recall, RecallPrompt, RecallTask, make_prompt, recall_by_distance, text_tasks
    from linattn.audit.render import ReportTable, report_plots, report_tables, save_report, to_markdown
    from linattn.audit.report import audit_model, verdict
    from linattn.audit.speed import DecodeSpeed, decode_speed, faster_from
    from linattn.audit.telemetry import LayerTelemetry, layer_telemetry

_HOME = {
    "CacheCheck": "cached",
    "DecodeSpeed": "speed",
    "LayerTelemetry": "telemetry",
    "Recall": "recall",
    "RecallPrompt": "recall",
    "RecallTask": "recall",
    "ReportTable": "render",
    "StateBytes": "memory",
    "attention_off": "ablations",
    "audit_model": "report",
    "cache_bytes": "memory",
    "cheaper_from": "memory",
    "compare_cached": "cached",
    "counterfactual_kl": "counterfactual",
    "decode_speed": "speed",
    "equal_bytes_control": "memory",
    "equal_bytes_plan": "memory",
    "far_off": "ablations",
    "faster_from": "speed",
    "layer_telemetry": "telemetry",
    "make_prompt": "recall",
    "near_off": "ablations",
    "recall_by_distance": "recall",
    "report_plots": "render",
    "report_tables": "render",
    "retained_off": "ablations",
    "save_report": "render",
    "stacked_reach": "counterfactual",
    "state_bytes": "memory",
    "text_tasks": "recall",
    "to_markdown": "render",
    "verdict": "report",
}

__all__ = [
    "Bucket",
    "CacheCheck",
    "DecodeSpeed",
    "FarGain",
    "LayerTelemetry",
    "Perplexity",
    "PositionLosses",
    "Recall",
    "RecallPrompt",
    "RecallTask",
    "ReportTable",
    "StateBytes",
    "attention_off",
    "audit_model",
    "by_position",
    "cache_bytes",
    "cheaper_from",
    "compare_cached",
    "counterfactual_kl",
    "decode_speed",
    "equal_bytes_control",
    "equal_bytes_plan",
    "far_gain",
    "far_off",
    "faster_from",
    "gain_ratio",
    "layer_telemetry",
    "make_prompt",
    "mean_over",
    "near_off",
    "perplexity",
    "position_losses",
    "recall_by_distance",
    "report_plots",
    "report_tables",
    "retained_off",
    "save_report",
    "stacked_reach",
    "state_bytes",
    "text_tasks",
    "to_markdown",
    "token_losses",
    "truncated_losses",
    "verdict",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
