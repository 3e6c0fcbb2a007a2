"""Random projections ω ``[rows, head_dim]`` of random feature maps: the same numbers on every rank and device.

Every kind is drawn on the CPU in float64 from (seed, draw) alone, whatever the default device, dtype or global
generator. The estimators of :mod:`linattn.feature_maps.random` are unbiased if each row alone is N(0, I); how the rows
depend on each other decides their variance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from linattn.errors import FeatureMapError


def draw_projection(kind: str, rows: int, head_dim: int, *, seed: int, draw: int = 0) -> Tensor:
    """Draw a projection.

    ===============  =================================================================  ==============================
    kind             rows                                                               each row
    ===============  =================================================================  ==============================
    ``orthogonal``   orthogonal within blocks of head_dim, norms of independent         N(0, I)
                     Gaussians (Yu et al. 2016; Choromanski et al. 2021, section 3)
    ``iid``          independent                                                        N(0, I)
    ``qmc``          scrambled Sobol points through the inverse normal distribution     N(0, I)
                     (Avron et al. 2016)
    ``structured``   blocks H D₁ H D₂ H D₃ of Hadamard matrices and random signs,       moments of N(0, I) up to the
                     norms of independent Gaussians (Yu et al. 2016, section 4);        third; the fourth up to
                     head_dim is padded to a power of two                               O(1 / head_dim)
    ===============  =================================================================  ==============================

    Args:
        kind: a name of the table. rows, head_dim: the shape. seed, draw: any integers ≥ 0; another pair, other numbers.

    Returns:
        ``[rows, head_dim]`` float64 on the CPU.

    Raises:
        FeatureMapError: unknown kind.

    Example:
        >>> draw_projection("orthogonal", 8, 4, seed=0).shape
        torch.Size([8, 4])
    """
    sample = PROJECTIONS[check_kind(kind)]
    # A CPU generator keeps 32 bits of its seed, hence the hash: (0, 1) and (1, 0) must not meet.
    digest = hashlib.sha256(f"{seed}/{draw}".encode()).digest()
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return sample(rows, head_dim, generator)


def check_kind(kind: str) -> str:
    """``kind`` if it names a projection, else :class:`FeatureMapError`."""
    if kind not in PROJECTIONS:
        raise FeatureMapError(f"projection: got {kind!r}, expected one of {', '.join(map(repr, PROJECTIONS))}.")
    return kind


def _normal(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _orthogonal(rows: int, head_dim: int, generator: Generator) -> Tensor:
    blocks = -(-rows // head_dim)
    gaussian = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # uniform over the orthogonal group
    return q.flatten(0, 1)[:rows] * _normal(rows, head_dim, generator).norm(dim=1, keepdim=True)


def _structured(rows: int, head_dim: int, generator: Generator) -> Tensor:
    size = 1 << (head_dim - 1).bit_length()
    blocks = -(-rows // size)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / 2**0.5
    signs = 2.0 * torch.randint(2, (3, blocks, 1, size), generator=generator) - 1
    product = (hadamard * signs[0]) @ (hadamard * signs[1]) @ (hadamard * signs[2])
    norms = _normal(rows, size, generator).norm(dim=1, keepdim=True)
    return product.flatten(0, 1)[:rows, :head_dim] * norms


def _qmc(rows: int, head_dim: int, generator: Generator) -> Tensor:
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    engine = torch.quasirandom.SobolEngine(head_dim, scramble=True, seed=seed)
    points = engine.draw(rows, dtype=torch.float64)
    # Scrambled points lie on a grid of 2^-MAXBIT; a uniform offset within the cell makes each exactly uniform.
    offset = torch.rand(rows, head_dim, generator=generator, dtype=torch.float64)
    points = points + offset * 2.0**-engine.MAXBIT
    smallest = torch.finfo(torch.float64).eps
    return torch.special.ndtri(points.clamp(smallest, 1 - smallest))


PROJECTIONS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "orthogonal": _orthogonal,
    "iid": _normal,
    "qmc": _qmc,
    "structured": _structured,
}
