"""Stages that recover the quality a conversion loses. Softmax attention on the same inputs is the teacher."""

from linattn.distill.calibrate import Calibration, calibrate
from linattn.distill.engine import Stage, Trained, train

__all__ = ["Calibration", "Stage", "Trained", "calibrate", "train"]
