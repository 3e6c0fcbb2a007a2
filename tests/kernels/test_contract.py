"""The shipped suite on every implementation of the operator."""

from __future__ import annotations

import torch

from linattn.testing import KernelContract


class TestChunked(KernelContract):
    impl = "chunked"


class TestReference(KernelContract):
    """What the reference can be held to without another: pieces, states, padding, gradients against differences."""

    impl = "reference"
    dtypes = (torch.float64,)
    test_equals_reference = None
