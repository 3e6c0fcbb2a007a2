"""The operator on tensors: exact near, kernelised far, one normaliser."""

from linattn.kernels.api import AttentionOutput, kernel_attention, linear_attention
from linattn.kernels.dispatch import IMPLEMENTATIONS
from linattn.kernels.validate import check_finite

__all__ = ["IMPLEMENTATIONS", "AttentionOutput", "check_finite", "kernel_attention", "linear_attention"]
