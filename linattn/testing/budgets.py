"""How far apart two results may be, and why: the one place where the contract suites get their tolerances.

Nothing here is tuned to an implementation. There are two kinds of comparison.

**Against an exact result**, in any dtype. Let ``exact`` be the result in float64 on the same (already rounded)
inputs, and ``low`` the result of an independent, naive implementation in the dtype under test. The naive one pays
what everybody must pay in that dtype (rounded features, rounded outputs, the conditioning of the problem), so

    |actual − exact| ≤ 2 · (|low − exact| + band)          maxima over the tensor

The factor 2 is for two implementations that round independently. The band is what the dtype may do to a result where
the naive implementation happened to be lucky:

    band = eps(dtype) · max|exact| + √n · eps(accumulator) · max|terms|

one rounding of the largest output, plus the random walk of n roundings in the accumulator (float32, or float64 for
float64 inputs; Higham & Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis"). ``terms`` bounds what
is added up: it matters where a sum cancels, such as the gradient of a query that sees one key only.

**Against an equal computation** in float64, one that does the same sums in another order or in other pieces: any order
of an n-term sum is within n · u · Σ|terms| of the exact one (Higham, "Accuracy and Stability of Numerical
Algorithms", §4.2), u = eps / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens are kept for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(x: Tensor) -> float:
    """max |x| as a float, 0 for an empty tensor; NaN if x holds one."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def error(actual: Tensor, exact: Tensor) -> float:
    """max |actual − exact| in float64."""
    return largest(actual.detach().double() - exact.detach().double())


def band(dtype: torch.dtype, *, exact: float, terms: float, count: int) -> float:
    """What ``dtype`` itself may do to a result.

    Args:
        dtype: of the inputs and the result.
        exact: largest absolute value of the exact result.
        terms: largest absolute value the sums can reach before they cancel; at least ``exact`` is used.
        count: how many terms are summed for one result.
    """
    walk = count**0.5 * torch.finfo(accumulator(dtype)).eps
    return torch.finfo(dtype).eps * exact + walk * max(terms, exact)


def low_precision(dtype: torch.dtype, exact: Tensor, low: Tensor, *, count: int, terms: float = 0.0) -> float:
    """Largest error allowed against ``exact`` when a naive implementation in ``dtype`` gave ``low``.

    For float64, where nothing more exact exists, ``low`` is the naive result in float32, and its error is scaled by the
    ratio of the two epsilons: rounding errors are proportional to eps at the same conditioning.
    """
    paid = error(low, exact)
    if dtype == torch.float64:
        paid *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * (paid + band(dtype, exact=largest(exact), terms=terms, count=count))


def reordered(exact: Tensor, *, count: int, terms: float = 0.0) -> float:
    """Largest difference allowed between two float64 computations of the same ``count``-term sums."""
    return count * torch.finfo(torch.float64).eps / 2 * max(terms, largest(exact))
