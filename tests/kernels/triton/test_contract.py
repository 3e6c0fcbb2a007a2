"""The shipped contract suite on the Triton kernels: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from linattn.testing import KernelContract

pytest.importorskip("triton", reason="Triton is not installed")


class TestTriton(KernelContract):
    impl = "triton"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter computes in float32 whatever the tensors are, and bfloat16 there is wrong.
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,)
