"""Stages that recover the quality a conversion loses. Softmax attention on the same inputs is the teacher."""

from linattn.distill.calibrate import Calibration, calibrate
from linattn.distill.data import Windows, pack, read_texts, sample_from_teacher
from linattn.distill.engine import Batch, Objective, Stage, Trained, train
from linattn.distill.logits import CachedTeacher, Logits, cache_teacher
from linattn.distill.recipe import Report, StageReport, distill, read_stages, write_stages
from linattn.distill.select import KeptCost, LayerCost, Selection, head_costs, keep_softmax, select_layers
from linattn.distill.targets import SplitAttention, split_attention
from linattn.distill.transfer import Transfer

__all__ = [
    "Batch",
    "CachedTeacher",
    "Calibration",
    "KeptCost",
    "LayerCost",
    "Logits",
    "Objective",
    "Report",
    "Selection",
    "SplitAttention",
    "Stage",
    "StageReport",
    "Trained",
    "Transfer",
    "Windows",
    "cache_teacher",
    "calibrate",
    "distill",
    "head_costs",
    "keep_softmax",
    "pack",
    "read_stages",
    "read_texts",
    "sample_from_teacher",
    "select_layers",
    "split_attention",
    "train",
    "write_stages",
]
