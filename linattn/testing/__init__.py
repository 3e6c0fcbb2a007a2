"""Contract suites that ship with the package: a new feature map or kernel backend inherits its tests from here.

    from linattn.testing import FeatureMapContract

    class TestMine(FeatureMapContract):
        def make(self, **head_sizes):
            return Mine(**head_sizes)

Needs pytest. Tolerances are derived, and explained, in :mod:`linattn.testing.budgets`.
"""

from linattn.testing.feature_map import FeatureMapContract, SequenceMapContract
from linattn.testing.kernel import KernelContract

__all__ = ["FeatureMapContract", "KernelContract", "SequenceMapContract"]
