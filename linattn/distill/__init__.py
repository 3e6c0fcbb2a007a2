"""Stages that recover the quality a conversion loses. Softmax attention on the same inputs is the teacher."""

from linattn.distill.calibrate import Calibration, calibrate
from linattn.distill.data import Windows, pack, read_texts, sample_from_teacher
from linattn.distill.engine import Stage, Trained, train
from linattn.distill.logits import CachedTeacher, Logits, cache_teacher
from linattn.distill.targets import SplitAttention, split_attention
from linattn.distill.transfer import Transfer

__all__ = [
    "CachedTeacher",
    "Calibration",
    "Logits",
    "SplitAttention",
    "Stage",
    "Trained",
    "Transfer",
    "Windows",
    "cache_teacher",
    "calibrate",
    "pack",
    "read_texts",
    "sample_from_teacher",
    "split_attention",
    "train",
]
