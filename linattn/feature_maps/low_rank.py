"""Low-rank approximations: Nyström features of the softmax kernel, and two that replace bidirectional attention."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linattn.errors import DtypeError, FeatureMapError, ShapeError
from linattn.feature_maps._numerics import bounded_exp, full_precision, per_head, widen
from linattn.feature_maps._samples import scaled_samples
from linattn.feature_maps.base import FeatureMap, Features, SequenceMap
from linattn.feature_maps.projections import draw_projection
from linattn.feature_maps.registry import register


@register
class Nystrom(FeatureMap):
    """Nyström features of the softmax kernel at landmarks, token by token and so usable causally.

        φ(x) = C⁻¹ k(L, x),    C Cᵀ = K(L, L) + ε diag K(L, L),    k(l, x) = exp(l · x)

    with x = √scale · q (or k) and landmarks L of each key/value head, in the same units. φ(x) · φ(y) is the best
    approximation of exp(x · y) within the span of the landmarks: exact (up to ε) where x or y is a landmark, and never
    above |x| |y| in the kernel's own norm. It is computed as the equal

        φ(x) = G⁻¹ exp(L x − |L|² / 2),    G Gᵀ = exp(−|l_i − l_j|² / 2) + ε I

    in which no landmark's norm enters the factor, so that it is well conditioned; G⁻¹ stands for K(L, L)^(−1/2), from
    which it differs by a rotation of the features only, and has a stable gradient. Not positive: away from the
    landmarks the kernel's estimate can pass below zero, and with it a normaliser. Landmarks that cover queries and keys
    matter more than their number: train them or :meth:`fit` them to data.

    Args:
        num_features: landmarks per key/value head, F. Default ``2 * head_dim``.
        epsilon: ε > 0, relative to the kernel's diagonal.
        seed: of the starting landmarks, which are Gaussian as if queries and keys had unit variance.

    Parameters: ``landmarks [Hkv, F, D]``, in the units of q and k.

    Reference: Williams and Seeger 2001, "Using the Nyström Method to Speed Up Kernel Machines".

    Raises:
        FeatureMapError: an option outside its domain, or a scale ≤ 0.

    Example:
        >>> phi = Nystrom(64, num_heads=8, num_kv_heads=2, num_features=32)
        >>> phi.fit(torch.randn(1, 100, 8, 64), torch.randn(1, 100, 2, 64))
        >>> phi.forward_keys(torch.randn(1, 5, 2, 64)).values.shape
        torch.Size([1, 5, 2, 32])
    """

    name: ClassVar[str] = "nystrom"
    log_scaled: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    paper: ClassVar[str] = "Williams & Seeger 2001, NeurIPS 13"

    def __init__(
        self, head_dim: int, *, num_features: int | None = None, epsilon: float = 1e-4, seed: int = 0, **heads: Any
    ) -> None:
        super().__init__(head_dim, **heads)
        num_features = 2 * head_dim if num_features is None else num_features
        _check_count("Nystrom", "num_features", num_features)
        if not 1e-6 <= epsilon < math.inf:
            raise FeatureMapError(f"Nystrom: epsilon={epsilon!r}, expected at least 1e-6 (float32 resolves no less).")
        if not isinstance(seed, int) or seed < 0:
            raise FeatureMapError(f"Nystrom: seed={seed!r}, expected an integer ≥ 0.")
        if not self.scale > 0:
            raise FeatureMapError(f"Nystrom: scale={self.scale}, expected a positive number.")
        self.num_features = num_features
        self.epsilon = float(epsilon)
        self.seed = seed
        self.landmarks = nn.Parameter(torch.empty(self.num_kv_heads, num_features, head_dim, **self._factory))
        self.reset_parameters()

    @property
    def feature_dim(self) -> int:
        return self.num_features

    def options(self) -> dict[str, Any]:
        return {"num_features": self.num_features, "epsilon": self.epsilon, "seed": self.seed}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.landmarks.is_meta:
            return
        for head, landmarks in enumerate(self.landmarks):
            landmarks.copy_(draw_projection("orthogonal", *landmarks.shape, seed=self.seed, draw=head))

    @torch.no_grad()
    def fit(self, q: Tensor, k: Tensor, *, iterations: int = 10) -> None:
        """Set the landmarks of each key/value head to cluster centres of the given queries and keys together.

        The centres are those of k-means, started by k-means++ from the map's seed (Zhang, Tsang and Kwok 2008 bound the
        Nyström error by the quantisation error).

        Args:
            q: ``[B, Tq, H, D]`` sample queries, real tokens only. k: ``[B, Tk, Hkv, D]`` sample keys.
            iterations: of k-means after its start; 0 keeps the sampled points themselves.

        Raises:
            ShapeError: heads or head_dim do not match, or fewer distinct tokens than landmarks.
            NonFiniteError: NaN or infinity among them.
        """
        x, y = scaled_samples(self, q, k)
        for head, points in enumerate(torch.cat([x, y], dim=1)):
            generator = torch.Generator().manual_seed(self.seed + head)
            centres = _k_means(points, self.num_features, iterations, generator)
            self.landmarks[head].copy_(centres / self.scale**0.5)

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self._features(q)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self._features(k)

    def _features(self, tokens: Tensor) -> Features:
        x = widen(tokens) * self.scale**0.5
        landmarks = self.landmarks.to(x.dtype) * self.scale**0.5
        with full_precision(x):
            distance = torch.cdist(landmarks, landmarks, compute_mode="donot_use_mm_for_euclid_dist")
            identity = torch.eye(self.num_features, dtype=x.dtype, device=x.device)
            factor = torch.linalg.cholesky((-distance.square() / 2).exp() + self.epsilon * identity)
            inverse_t = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).mT
        repeats = x.shape[2] // self.num_kv_heads
        landmarks, inverse_t = (t.repeat_interleave(repeats, dim=0) for t in (landmarks, inverse_t))
        logits = per_head(x, landmarks.mT) - landmarks.square().sum(-1) / 2
        values, log_scale = bounded_exp(logits, 0.0, x.dtype)
        return Features(per_head(values, inverse_t).to(tokens.dtype), log_scale)


@register
class Nystromformer(SequenceMap):
    """Nyströmformer: the attention matrix through segment means of queries and of keys, for bidirectional attention.

        out = softmax(s Q K̃ᵀ) · softmax(s Q̃ K̃ᵀ)⁺ · softmax(s Q̃ Kᵀ) · V

    where Q̃ and K̃ are the means of M contiguous, nearly equal segments of the real tokens, found for every sequence of
    a batch by itself. With at most M real tokens each is its own landmark and the result is softmax attention (to the
    accuracy of the inverse). The paper's depthwise convolution of V, a skip connection, is left to the caller.

    Args:
        num_landmarks: M.
        pinv_iterations: steps of the paper's third-order iteration for the pseudo-inverse; 0 computes it exactly.

    No parameters. Memory O(T M). Where there are as many queries as keys they are taken to be the same tokens, and the
    mask of the keys to hold for the queries.

    Reference: Xiong et al. 2021, "Nyströmformer: A Nyström-based Algorithm for Approximating Self-Attention", equations
    13 and 14.

    Raises:
        FeatureMapError: an option outside its domain.

    Example:
        >>> q, k, v = torch.randn(3, 2, 50, 4, 16)
        >>> Nystromformer(16, num_heads=4, num_landmarks=8).attend(q, k, v).shape
        torch.Size([2, 50, 4, 16])
    """

    name: ClassVar[str] = "nystromformer"
    paper: ClassVar[str] = "Xiong et al. 2021, arXiv:2102.03902"

    def __init__(self, head_dim: int, *, num_landmarks: int = 64, pinv_iterations: int = 6, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        _check_count("Nystromformer", "num_landmarks", num_landmarks)
        if not isinstance(pinv_iterations, int) or pinv_iterations < 0:
            raise FeatureMapError(f"Nystromformer: pinv_iterations={pinv_iterations!r}, expected an integer ≥ 0.")
        self.num_landmarks = num_landmarks
        self.pinv_iterations = pinv_iterations

    @property
    def feature_dim(self) -> int:
        return self.num_landmarks

    def options(self) -> dict[str, Any]:
        return {"num_landmarks": self.num_landmarks, "pinv_iterations": self.pinv_iterations}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        check_sequence(self, q, k, v, mask)
        with full_precision(q):
            real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if mask is None else mask
            k, v = _without_padding(k, mask), _without_padding(v, mask)
            if q.shape[1] == k.shape[1]:
                q = _without_padding(q, mask)
            queries, keys, values = _grouped(q, self.num_kv_heads) * self.scale, _heads_first(k), _heads_first(v)
            key_segments = _segments(real, self.num_landmarks, keys.dtype)
            if q.shape[1] == k.shape[1]:
                query_segments = key_segments
            else:
                query_segments = _segments(real.new_ones(q.shape[:2]), self.num_landmarks, keys.dtype)
            key_means = key_segments[:, None] @ keys
            query_means = query_segments[:, None, None] @ queries
            used_keys = (key_segments > 0).any(-1)[:, None, None, None]
            used_queries = (query_segments > 0).any(-1)[:, None, None, :, None]
            keys, values, key_means = (t[:, :, None] for t in (keys, values, key_means))
            to_means = _softmax(queries @ key_means.mT, used_keys)
            between = _softmax(query_means @ key_means.mT, used_keys) * used_queries
            to_keys = _softmax(query_means @ keys.mT, real[:, None, None, None])
            out = to_means @ (self._pseudo_inverse(between) @ (to_keys @ values))
        return out.flatten(1, 2).transpose(1, 2).to(v.dtype)

    def _pseudo_inverse(self, matrix: Tensor) -> Tensor:
        if not self.pinv_iterations:
            return torch.linalg.pinv(matrix)
        tiny = torch.finfo(matrix.dtype).tiny
        bound = matrix.abs().sum(-1).amax(-1) * matrix.abs().sum(-2).amax(-1)
        inverse = matrix.mT / bound.clamp_min(tiny)[..., None, None]
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        for _ in range(self.pinv_iterations):
            product = matrix @ inverse
            inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
        return inverse


@register
class Linformer(SequenceMap):
    """Linformer: keys and values projected along the sequence to M learned mixtures, for bidirectional attention.

        out = softmax(s Q (E K)ᵀ) F V

    Token number r among the real tokens of its sequence takes column r of E and F, wherever padding stands.

    Args:
        num_landmarks: M, the projected length.
        max_length: the longest sequence, the number of columns.
        share_heads: one E and F for all heads; False for one per key/value head.
        share_key_value: F = E.

    Parameters: ``key_projection [1 or Hkv, M, max_length]`` (E), and ``value_projection`` (F) unless shared, started
    from N(0, 1 / M).

    Reference: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", equation 7 and Theorem 2.

    Raises:
        FeatureMapError: an option outside its domain. ShapeError: more keys than ``max_length``.

    Example:
        >>> q, k, v = torch.randn(3, 2, 50, 4, 16)
        >>> Linformer(16, num_heads=4, num_landmarks=8, max_length=64).attend(q, k, v).shape
        torch.Size([2, 50, 4, 16])
    """

    name: ClassVar[str] = "linformer"
    learned: ClassVar[bool] = True
    paper: ClassVar[str] = "Wang et al. 2020, arXiv:2006.04768"

    def __init__(
        self,
        head_dim: int,
        *,
        num_landmarks: int = 64,
        max_length: int = 2048,
        share_heads: bool = True,
        share_key_value: bool = False,
        **heads: Any,
    ) -> None:
        super().__init__(head_dim, **heads)
        _check_count("Linformer", "num_landmarks", num_landmarks)
        _check_count("Linformer", "max_length", max_length)
        self.num_landmarks = num_landmarks
        self.max_length = max_length
        self.share_heads = share_heads
        self.share_key_value = share_key_value
        shape = (1 if share_heads else self.num_kv_heads, num_landmarks, max_length)
        self.key_projection = nn.Parameter(torch.empty(shape, **self._factory))
        self.value_projection = None if share_key_value else nn.Parameter(torch.empty(shape, **self._factory))
        self.reset_parameters()

    @property
    def feature_dim(self) -> int:
        return self.num_landmarks

    def options(self) -> dict[str, Any]:
        return {
            "num_landmarks": self.num_landmarks,
            "max_length": self.max_length,
            "share_heads": self.share_heads,
            "share_key_value": self.share_key_value,
        }

    def reset_parameters(self) -> None:
        for projection in self.parameters():
            nn.init.normal_(projection, std=self.num_landmarks**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        check_sequence(self, q, k, v, mask)
        if k.shape[1] > self.max_length:
            raise ShapeError(
                f"k: got {k.shape[1]} tokens, but Linformer was built for max_length={self.max_length}; build it "
                "with a larger one."
            )
        with full_precision(q):
            queries = _grouped(q, self.num_kv_heads) * self.scale
            value_projection = self.key_projection if self.value_projection is None else self.value_projection
            keys = self._project(self.key_projection, k, mask)
            values = self._project(value_projection, v, mask)
            out = (queries @ keys[:, :, None].mT).softmax(-1) @ values[:, :, None]
        return out.flatten(1, 2).transpose(1, 2).to(v.dtype)

    @staticmethod
    def _project(projection: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mixtures of tokens: ``[1 | Hkv, M, max_length], [B, T, Hkv, D] -> [B, Hkv, M, D]``."""
        tokens = _heads_first(_without_padding(x, mask))
        weight = projection.to(tokens.dtype)
        if mask is None:
            return weight[:, :, : tokens.shape[2]] @ tokens
        rank = (mask.cumsum(1) - 1).clamp_min(0)
        return weight[:, :, rank].permute(2, 0, 1, 3) @ tokens


def check_sequence(feature_map: SequenceMap, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raise an error unless the arguments of :meth:`SequenceMap.attend` fit the map and each other."""
    feature_map.check_input("q", q, feature_map.num_heads)
    feature_map.check_input("k", k, feature_map.num_kv_heads)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or len(q) != len(k):
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: expected one batch size for all, and for v "
            "the tokens and heads of k."
        )
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise DtypeError(f"mask: got {mask.dtype}, expected torch.bool, True for real tokens.")
    if mask.shape != k.shape[:2]:
        raise ShapeError(f"mask: got shape {tuple(mask.shape)}, expected [B, Tk] = {list(k.shape[:2])}.")


def _check_count(label: str, argument: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise FeatureMapError(f"{label}: {argument}={value!r}, expected a positive integer.")


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` ``[B, T, h, D]`` with zeros where ``mask`` ``[B, T]`` does not hold, whatever stands there."""
    return x if mask is None else x.masked_fill(~mask[:, :, None, None], 0)


def _heads_first(x: Tensor) -> Tensor:
    """``[B, T, h, D] -> [B, h, T, D]`` in at least float32."""
    return widen(x).transpose(1, 2)


def _grouped(q: Tensor, num_kv_heads: int) -> Tensor:
    """Queries by the key/value head they share: ``[B, T, H, D] -> [B, Hkv, H / Hkv, T, D]`` in at least float32."""
    return _heads_first(q).unflatten(1, (num_kv_heads, -1))


def _segments(real: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Weights ``[B, count, T]`` that average ``count`` contiguous segments of the real tokens ``[B, T]``.

    Segments differ by one token at most; with fewer tokens than segments some rows are zero.
    """
    rank = real.cumsum(1) - 1
    segment = rank * count // real.sum(1, keepdim=True).clamp_min(1)
    member = (segment[:, None] == torch.arange(count, device=real.device)[:, None]) & real[:, None]
    return member.to(dtype) / member.sum(-1, keepdim=True).clamp_min(1)


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries where ``mask`` holds, zero elsewhere, also where it holds nowhere."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1) * mask


def _k_means(points: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centres ``[count, D]`` of points ``[n, D]``: k-means++ and Lloyd's iterations."""
    chosen = [points[int(torch.randint(len(points), (), generator=generator))]]
    distance = (points - chosen[0]).square().sum(-1)
    while len(chosen) < count:
        if not bool(distance.sum() > 0):
            raise ShapeError(f"fit: {len(chosen)} distinct tokens for {count} landmarks; give more tokens.")
        chosen.append(points[int(torch.multinomial(distance, 1, generator=generator))])
        distance = distance.minimum((points - chosen[-1]).square().sum(-1))
    centres = torch.stack(chosen)
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres
