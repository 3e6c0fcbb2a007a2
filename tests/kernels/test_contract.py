"""The shipped suite on every implementation of the operator."""

from __future__ import annotations

import torch

from linattn.testing import KernelContract


class TestChunked(KernelContract):
    impl = "chunked"


class TestReference(KernelContract):
    """What the oracle is the only judge of in itself: states, padding, pieces, gradients against differences."""

    impl = "reference"
    dtypes = (torch.float64,)
