"""Random features of the softmax kernel.

Throughout, x = √scale · q and y = √scale · k, so that the softmax kernel is exp(x · y); ω_1 … ω_M are the rows of the
projection; and φ(x) = exp(log_scale) · values, where the log-scale carries all of the magnitude.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from linattn.errors import FeatureMapError, OptionError
from linattn.feature_maps._numerics import bounded, bounded_exp, full_precision, per_head, widen
from linattn.feature_maps._samples import scaled_samples
from linattn.feature_maps.base import FeatureMap, Features
from linattn.feature_maps.projections import check_kind, draw_projection
from linattn.feature_maps.registry import register
from linattn.kernels.protocols import Projected


class RandomFeatureMap(FeatureMap):
    """What random maps share: one projection ω for all heads, drawn from (seed, draw), kept in the checkpoint.

    Args:
        num_features: features F of one head, the size of its state. Default ``2 * head_dim``. The number of rows M of
            ω is F divided by the features that the estimator makes of each row.
        projection: how ω is drawn, see :func:`~linattn.feature_maps.projections.draw_projection`.
        seed: any integer ≥ 0. Give layers different seeds if their errors should be independent.

    Attributes:
        omega: buffer ``[M, D]``, float32 or float64, persistent.
        draws: buffer ``[]`` int64, persistent: how often :meth:`redraw` was called.

    Raises:
        FeatureMapError: an option outside its domain, or a scale ≤ 0 (no x and y have that kernel).
    """

    random: ClassVar[bool] = True
    log_scaled: ClassVar[bool] = True
    features_per_row: ClassVar[int] = 1
    omega: Tensor
    draws: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        num_features: int | None = None,
        projection: str = "orthogonal",
        seed: int = 0,
        **heads: Any,
    ) -> None:
        super().__init__(head_dim, **heads)
        label = type(self).__name__
        num_features = 2 * head_dim if num_features is None else num_features
        if not isinstance(num_features, int) or num_features < 1 or num_features % self.features_per_row:
            multiple = f" multiple of {self.features_per_row}" if self.features_per_row > 1 else " integer"
            raise FeatureMapError(f"{label}: num_features={num_features!r}, expected a positive{multiple}.")
        if not isinstance(seed, int) or seed < 0:
            raise FeatureMapError(f"{label}: seed={seed!r}, expected an integer ≥ 0.")
        if not self.scale > 0:
            raise FeatureMapError(f"{label}: scale={self.scale}, expected a positive number.")
        self.num_features = num_features
        self.projection = check_kind(projection)
        self.seed = seed
        self._add_buffer("omega", num_features // self.features_per_row, head_dim)
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=self._factory["device"]))
        self._draw(0)

    @property
    def feature_dim(self) -> int:
        return self.num_features

    def options(self) -> dict[str, Any]:
        return {"num_features": self.num_features, "projection": self.projection, "seed": self.seed}

    def reset_parameters(self) -> None:
        self.draws.zero_()
        self._draw(0)

    def redraw(self) -> None:
        """Replace ω by the next draw of the same seed.

        Attention states made with the old ω do not fit the new one: start from empty states.
        """
        self.draws += 1
        self._draw(int(self.draws))

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self._features(self._scaled(q), q.dtype)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self._features(self._scaled(k), k.dtype)

    def _features(self, x: Tensor, dtype: torch.dtype) -> Features:
        """φ(x) of x ``[B, T, h, D]``, widened and scaled, with values in ``dtype``."""
        raise NotImplementedError

    def _scaled(self, q: Tensor) -> Tensor:
        return widen(q) * self.scale**0.5

    def _project(self, x: Tensor) -> Tensor:
        """ω · x: ``[B, T, h, D] -> [B, T, h, M]``."""
        with full_precision(x):
            return x @ self.omega.to(x.dtype).T

    @property
    def _log_mean(self) -> float:
        """log of the factor 1 / √M that makes φ(x) · φ(y) a mean over rows."""
        return -0.5 * math.log(len(self.omega))

    def _add_buffer(self, name: str, *shape: int) -> None:
        dtype = torch.promote_types(self._factory["dtype"] or torch.get_default_dtype(), torch.float32)
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self._factory["device"]))

    def _draw(self, draw: int) -> None:
        if not self.omega.is_meta:
            self.omega.copy_(draw_projection(self.projection, *self.omega.shape, seed=self.seed, draw=draw))


@register
class FavorPlus(RandomFeatureMap):
    """FAVOR+: positive random features of the softmax kernel.

        φ(x)_i = exp(ω_i · x − |x|² / 2) / √M                                                          (F = M)

    Unbiased: E φ(x) · φ(y) = exp(x · y). The variance of one row is exp(|x + y|²) − 1 relative to the kernel squared,
    so that M must grow with exp(|x + y|²); orthogonal rows have less variance than independent ones in any dimension.

    Buffers: ``omega [F, D]``, ``draws []``.

    Reference: Choromanski et al. 2021, "Rethinking Attention with Performers", Lemmas 1 and 2 and Theorem 2.

    Example:
        >>> phi = FavorPlus(64, num_heads=8, num_kv_heads=2, num_features=256)
        >>> phi.forward_keys(torch.zeros(1, 5, 2, 64)).values.shape
        torch.Size([1, 5, 2, 256])
    """

    name: ClassVar[str] = "favor+"
    positive: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    paper: ClassVar[str] = "Choromanski et al. 2021, arXiv:2009.14794"

    def _features(self, x: Tensor, dtype: torch.dtype) -> Features:
        return bounded_exp(self._project(x), self._log_mean - x.square().sum(-1) / 2, dtype)

    def projected(self) -> Projected:
        weight = (self.omega.T * self.scale**0.5)[None, None]
        return Projected("exp", weight, weight, norm=0.5 * self.scale, constant=self._log_mean)


@register
class FavorPlusHyperbolic(RandomFeatureMap):
    """Hyperbolic FAVOR+: each row of the projection is used in both directions.

        φ(x) = exp(−|x|² / 2) [exp(ω_i · x), exp(−ω_i · x)] / √(2M)                                    (F = 2M)

    Unbiased, and the variance is below that of FAVOR+ with as many features: the two directions are negatively
    correlated, Var_hyp(M rows) = (1 − exp(−|x + y|²)) / 2 · Var_FAVOR+(M rows) for independent rows.

    Buffers: ``omega [F / 2, D]``, ``draws []``.

    Reference: Choromanski et al. 2021, "Rethinking Attention with Performers", Lemmas 1 and 2.

    Example:
        >>> FavorPlusHyperbolic(64, num_features=256).omega.shape
        torch.Size([128, 64])
    """

    name: ClassVar[str] = "favor+hyp"
    positive: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    features_per_row: ClassVar[int] = 2
    paper: ClassVar[str] = "Choromanski et al. 2021, arXiv:2009.14794"

    def _features(self, x: Tensor, dtype: torch.dtype) -> Features:
        z = self._project(x)
        log_scale = self._log_mean - math.log(2) / 2 - x.square().sum(-1) / 2
        return bounded_exp(torch.cat([z, -z], dim=-1), log_scale, dtype)

    def projected(self) -> Projected:
        root = self.omega.T * self.scale**0.5
        weight = torch.cat([root, -root], -1)[None, None]
        constant = self._log_mean - math.log(2) / 2
        return Projected("exp", weight, weight, norm=0.5 * self.scale, constant=constant)


@register
class RandomFourier(RandomFeatureMap):
    """Trigonometric random Fourier features of the softmax kernel.

        φ(x) = exp(|x|² / 2) [cos(ω_i · x), sin(ω_i · x)] / √M                                         (F = 2M)

    Unbiased, by exp(x · y) = exp(|x|² / 2) exp(|y|² / 2) E cos(ω · (x − y)). Not positive, and the relative variance
    grows where the kernel is small: the normaliser of an attention row can come close to zero or below it. Here as the
    baseline that positive features replaced.

    Buffers: ``omega [F / 2, D]``, ``draws []``.

    Reference: Rahimi and Recht 2007, "Random Features for Large-Scale Kernel Machines"; for attention, Peng et al.
    2021, "Random Feature Attention".

    Example:
        >>> RandomFourier(64, num_features=256).omega.shape
        torch.Size([128, 64])
    """

    name: ClassVar[str] = "rff"
    unbiased: ClassVar[bool] = True
    features_per_row: ClassVar[int] = 2
    paper: ClassVar[str] = "Rahimi & Recht 2007, NeurIPS 20"

    def _features(self, x: Tensor, dtype: torch.dtype) -> Features:
        z = self._project(x)
        return Features(torch.cat([z.cos(), z.sin()], dim=-1).to(dtype), self._log_mean + x.square().sum(-1) / 2)


@register
class RandomReLU(RandomFeatureMap):
    """Performer-ReLU: rectified random projections, a kernel of their own and no estimate of softmax.

        φ(x)_i = (max(ω_i · x, 0) + ε) / √M                                                            (F = M)

    For ε = 0 the mean of φ(x) · φ(y) is the arc-cosine kernel |x| |y| (sin θ + (π − θ) cos θ) / 2π, θ the angle between
    x and y: the attention looks at directions, not at exp(x · y). ε > 0 keeps every normaliser positive.

    Args:
        epsilon: ε > 0.

    Buffers: ``omega [F, D]``, ``draws []``.

    Reference: Choromanski et al. 2021, "Rethinking Attention with Performers", section 2.2 and appendix on generalised
    attention; the kernel: Cho and Saul 2009, "Kernel Methods for Deep Learning".

    Example:
        >>> RandomReLU(64, num_features=96).feature_dim
        96
    """

    name: ClassVar[str] = "relu-random"
    positive: ClassVar[bool] = True
    paper: ClassVar[str] = "Choromanski et al. 2021, arXiv:2009.14794"

    def __init__(self, head_dim: int, *, epsilon: float = 1e-3, **common: Any) -> None:
        super().__init__(head_dim, **common)
        if not 0 < epsilon < math.inf:
            raise FeatureMapError(f"RandomReLU: epsilon={epsilon!r}, expected a positive number.")
        self.epsilon = float(epsilon)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "epsilon": self.epsilon}

    def _features(self, x: Tensor, dtype: torch.dtype) -> Features:
        values, exponent = bounded(self._project(x).relu() + self.epsilon, dtype)
        assert exponent is not None
        return Features(values, exponent + self._log_mean)


@register
class FavorPlusPlus(RandomFeatureMap):
    """FAVOR++: optimal positive random features, with bounded values and exponentially less variance.

        φ(x)_i = (1 − 4a)^(D/4) exp(a |ω_i|² + √(1 − 4a) ω_i · x − |x|² / 2) / √M                      (F = M)

    Unbiased for every fixed a < 1/4, by E exp(2a |ω|² + √(1 − 4a) ω · z) = (1 − 4a)^(−D/2) exp(|z|² / 2); a = 0 is
    FAVOR+. With ρ = 1 / (1 − 8a), the log of the second moment of one row is
    D log((1 + ρ) / 2ρ) + (D / 2) log ρ + ρ |x + y|² relative to the kernel squared, which for s = |x + y|² is least at

        ρ = (√((2s + D)² + 8sD) − 2s − D) / 4s.

    Args:
        a: a < 1/8 (the variance is finite there). Default: optimal for s = 2 · scale · D, that is, for queries and keys
            of unit variance. :meth:`fit` replaces it by the optimum for given queries and keys.

    Buffers: ``omega [F, D]``, ``a [Hkv, D]`` (one value per head), ``draws []``.

    Reference: Likhosherstov et al. 2022, "Chefs' Random Tables: Non-Trigonometric Random Features", generalised
    exponential and optimal positive features.

    Example:
        >>> phi = FavorPlusPlus(64, num_heads=8, num_kv_heads=2)
        >>> phi.fit(torch.randn(1, 100, 8, 64), torch.randn(1, 100, 2, 64))
    """

    name: ClassVar[str] = "favor++"
    positive: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    paper: ClassVar[str] = "Likhosherstov et al. 2022, arXiv:2205.15317"
    a: Tensor

    def __init__(self, head_dim: int, *, a: float | None = None, **common: Any) -> None:
        super().__init__(head_dim, **common)
        if a is not None and not -math.inf < a < 0.125:
            raise FeatureMapError(f"{type(self).__name__}: a={a!r}, expected a number below 1/8, or None.")
        self._start = a
        self._add_buffer("a", self.num_kv_heads, head_dim)
        self._reset_a()

    def options(self) -> dict[str, Any]:
        return {**super().options(), "a": self._start}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_a()

    @torch.no_grad()
    def fit(self, q: Tensor, k: Tensor) -> None:
        """Set ``a`` of each key/value head to the optimum for the mean |x + y|² over all pairs of the given tokens.

        Args:
            q: ``[B, Tq, H, D]`` sample queries, real tokens only. k: ``[B, Tk, Hkv, D]`` sample keys.

        Raises:
            ShapeError: heads or head_dim do not match. NonFiniteError: NaN or infinity among them.
        """
        x, y = scaled_samples(self, q, k)
        squares = x.square().sum(-1).mean(-1) + y.square().sum(-1).mean(-1)
        s = squares + 2 * (x.mean(1) * y.mean(1)).sum(-1)
        self.a.copy_(_optimal_a(s, self.head_dim)[:, None])

    def _reset_a(self) -> None:
        unit_variance = torch.tensor(2 * self.scale * self.head_dim, dtype=torch.float64, device="cpu")
        self.a.fill_(_optimal_a(unit_variance, self.head_dim).item() if self._start is None else self._start)

    def _features(self, x: Tensor, dtype: torch.dtype) -> Features:
        a = self.a.to(x.dtype).repeat_interleave(x.shape[2] // self.num_kv_heads, dim=0)
        with full_precision(x):
            logits = self._project(x * (1 - 4 * a).sqrt()) + a @ self.omega.to(x.dtype).square().T
        return bounded_exp(logits, self._log_mean + (1 - 4 * a).log().sum(-1) / 4 - x.square().sum(-1) / 2, dtype)


@register
class FavorSharp(FavorPlusPlus):
    """FAVOR#: optimal positive features with one a per direction, in coordinates balanced between queries and keys.

        x' = R (x − u),  y' = R⁻ᵀ (y − v),     x · y = x' · y' + (x − u / 2) · v + u · (y − v / 2)
        φ(x)_i = exp((x − u / 2) · v) ∏_l (1 − 4a_l)^(1/4) exp(a_l ω_il² + √(1 − 4a_l) ω_il x'_l − x'_l² / 2) / √M

    (F = M), and φ(y) likewise from y' with the factor exp(u · (y − v / 2)). Unbiased for every fixed R, u, v and
    a_l < 1/4, since the estimator of FAVOR++ factorises over directions. :meth:`fit` takes u and v as the means of x
    and y; R as the linear map under which both have the same diagonal covariance diag(c), which minimises E |x' + y'|²;
    and a_l as the optimum for one direction with s = 2 c_l. Before it R = I, u = v = 0 and a is as in FAVOR++: the two
    are then equal.

    Beyond FAVOR++ this takes the mean of queries and keys out of the variance altogether, and spends the rest where
    the data vary; both matter for the anisotropic heads of trained models.

    Buffers: ``omega [F, D]``, ``a [Hkv, D]``, ``query_basis``, ``key_basis [Hkv, D, D]`` (Rᵀ and R⁻¹), ``query_mean``,
    ``key_mean [Hkv, D]`` (u and v), ``draws []``.

    Reference: Likhosherstov et al. 2023, "FAVOR#: Sharp Attention Kernel Approximations via New Classes of Positive
    Random Features", dense-exponential features, symmetric and asymmetric; the means are an addition of this library.

    Example:
        >>> phi = FavorSharp(64, num_heads=8, num_kv_heads=2)
        >>> phi.fit(torch.randn(1, 100, 8, 64) + 1, torch.randn(1, 100, 2, 64) - 1)
    """

    name: ClassVar[str] = "favor#"
    paper: ClassVar[str] = "Likhosherstov et al. 2023, arXiv:2302.00787"
    query_basis: Tensor
    key_basis: Tensor
    query_mean: Tensor
    key_mean: Tensor

    def __init__(self, head_dim: int, *, a: float | None = None, **common: Any) -> None:
        super().__init__(head_dim, a=a, **common)
        for side in ("query", "key"):
            self._add_buffer(f"{side}_basis", self.num_kv_heads, head_dim, head_dim)
            self._add_buffer(f"{side}_mean", self.num_kv_heads, head_dim)
        self._reset_coordinates()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_coordinates()

    @torch.no_grad()
    def fit(self, q: Tensor, k: Tensor, *, ridge: float = 1e-3) -> None:
        """Set coordinates and ``a`` of each key/value head to the optimum for the given queries and keys.

        Args:
            q: ``[B, Tq, H, D]`` sample queries, real tokens only. k: ``[B, Tk, Hkv, D]`` sample keys.
            ridge: what is added to each covariance, as a share of its mean variance: keeps directions in which few
                samples do not vary from being stretched without bound.

        Raises:
            ShapeError: heads or head_dim do not match. NonFiniteError: NaN or infinity among them.
            OptionError: ridge ≤ 0.
        """
        if not ridge > 0:
            raise OptionError(f"fit: ridge={ridge!r}, expected a positive number.")
        means, roots = [], []
        for samples in scaled_samples(self, q, k):
            means.append(samples.mean(1))
            centred = samples - samples.mean(1, keepdim=True)
            covariance = centred.mT @ centred / samples.shape[1]
            variance = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
            covariance.diagonal(dim1=1, dim2=2).add_(ridge * variance[:, None])
            roots.append(torch.linalg.cholesky(covariance))
        # With Sx = Lx Lxᵀ, Sy = Ly Lyᵀ and Lyᵀ Lx = W diag(c) Vᵀ, R = diag(√c) Vᵀ Lx⁻¹ has R⁻ᵀ = diag(√c) Wᵀ Ly⁻¹ and
        # makes both covariances, R Sx Rᵀ and R⁻ᵀ Sy R⁻¹, equal to diag(c).
        left, c, right_t = torch.linalg.svd(roots[1].mT @ roots[0])
        identity = torch.eye(self.head_dim, dtype=torch.float64)
        for basis, vectors, root in ((self.query_basis, right_t.mT, roots[0]), (self.key_basis, left, roots[1])):
            inverse_t = torch.linalg.solve_triangular(root, identity.expand_as(root), upper=False).mT
            basis.copy_(inverse_t @ vectors * c.sqrt()[:, None, :])
        self.query_mean.copy_(means[0])
        self.key_mean.copy_(means[1])
        self.a.copy_(_optimal_a(2 * c, 1))

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self._in_coordinates(q, self.query_basis, self.query_mean, self.key_mean)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self._in_coordinates(k, self.key_basis, self.key_mean, self.query_mean)

    def _reset_coordinates(self) -> None:
        for basis in (self.query_basis, self.key_basis):
            basis.copy_(torch.eye(self.head_dim))
        for mean in (self.query_mean, self.key_mean):
            mean.zero_()

    def _in_coordinates(self, tokens: Tensor, basis: Tensor, mean: Tensor, other_mean: Tensor) -> Features:
        """φ of x or y in the balanced coordinates, where ``other_mean`` is the mean of the other side."""
        x = self._scaled(tokens)
        repeats = x.shape[2] // self.num_kv_heads
        basis, mean, other_mean = (t.to(x.dtype).repeat_interleave(repeats, dim=0) for t in (basis, mean, other_mean))
        values, log_scale = self._features(per_head(x - mean, basis), tokens.dtype)
        assert log_scale is not None
        return Features(values, log_scale + ((x - mean / 2) * other_mean).sum(-1))


def _optimal_a(s: Tensor, dim: int) -> Tensor:
    """The a of FAVOR++ with the least expected log-variance in ``dim`` dimensions for a mean |x + y|² of ``s``."""
    rho = 2 * dim / (2 * s + dim + ((2 * s + dim).square() + 8 * s * dim).sqrt())
    return (1 - 1 / rho) / 8
