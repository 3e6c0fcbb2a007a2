"""Stages that recover the quality a conversion loses. Softmax attention on the same inputs is the teacher."""

from linattn.distill.calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
