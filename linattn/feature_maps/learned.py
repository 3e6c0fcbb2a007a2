"""Feature maps with trainable parameters, one set per head.

Query heads and key/value heads have parameters of their own (``query.*`` ``[H, …]`` and ``key.*`` ``[Hkv, …]``). At the
start the map of a key head equals the maps of the query heads that read it, so that training begins from one kernel.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linattn.errors import FeatureMapError
from linattn.feature_maps._numerics import bounded, bounded_exp, per_head, symmetric_square, widen
from linattn.feature_maps.base import FeatureMap, Features
from linattn.feature_maps.projections import draw_projection
from linattn.feature_maps.registry import register
from linattn.kernels.protocols import Projected

_START: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


class LearnedMap(FeatureMap):
    """A map with parameters per head: a subclass says what they are and how they start, and applies them.

    Parameters are bare ``nn.Parameter`` objects, never ``nn.Linear``: libraries that re-initialise the linear layers of
    a model leave them alone. A subclass's constructor ends with :meth:`build`.
    """

    learned: ClassVar[bool] = True

    def build(self) -> None:
        """Create the parameters for queries and keys and fill them."""
        start = self.start(self.num_kv_heads)
        self.query = self._empty(start, self.num_heads)
        self.key = self._empty(start, self.num_kv_heads)
        self._fill(start)

    def start(self, heads: int) -> dict[str, Tensor]:
        """Starting values of ``heads`` heads by parameter name: float32 tensors ``[heads, …]`` on the CPU."""
        raise NotImplementedError

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        """Features ``[B, T, heads, F]`` of ``x`` ``[B, T, heads, D]`` under the heads' ``parameters``."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        self._fill(self.start(self.num_kv_heads))

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self.features(q, self.query)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self.features(k, self.key)

    def _empty(self, like: dict[str, Tensor], heads: int) -> nn.ParameterDict:
        return nn.ParameterDict(
            {name: nn.Parameter(torch.empty(heads, *t.shape[1:], **self._factory)) for name, t in like.items()}
        )

    @torch.no_grad()
    def _fill(self, start: dict[str, Tensor]) -> None:
        for name, value in start.items():
            self.key[name].copy_(value)
            self.query[name].copy_(value.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0))

    def _positive_option(self, option: str, value: int) -> int:
        if value < 1:
            raise FeatureMapError(f"{type(self).__name__}: {option}={value}, expected a positive number.")
        return value


@register
class Hedgehog(LearnedMap):
    r"""Softmax over a learned projection and its negation, started from the identity:

        φ(x) = softmax([W x, −W x])          F = 2 D

    Positive, bounded by 1, and spiky like softmax attention; made to be trained to mimic a teacher's attention. The
    softmax runs over the features of one token, so its normaliser is part of the token's own features. The scale does
    not enter: the projection learns it.

    Parameters: ``weight`` ``[heads, D, D]``, started as the identity.

    Reference: Zhang et al. 2024, "The Hedgehog & the porcupine", section 4.1 (its numerically stable variant).

    Example:
        >>> phi = make("hedgehog", 64, num_heads=8, num_kv_heads=2)
        >>> phi.feature_dim, tuple(phi.key["weight"].shape)
        (128, (2, 64, 64))
    """

    name: ClassVar[str] = "hedgehog"
    positive: ClassVar[bool] = True
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2402.04347"

    def __init__(self, head_dim: int, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        self.build()

    @property
    def feature_dim(self) -> int:
        return 2 * self.head_dim

    def start(self, heads: int) -> dict[str, Tensor]:
        return {"weight": torch.eye(self.head_dim, **_START).repeat(heads, 1, 1)}

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        projected = per_head(x, parameters["weight"])
        # A product with the signs fuses into the softmax when compiled, where a concatenation is written out first.
        signs = 1 - 2 * torch.arange(2, dtype=projected.dtype, device=projected.device)
        mirrored = projected.unsqueeze(-2) * signs[:, None]
        return Features(mirrored.flatten(-2).softmax(-1).to(x.dtype))

    def projected(self) -> Projected | None:
        return Projected("softmax", self.query["weight"], self.key["weight"], mirrored=True)


@register
class WeightedHedgehog(Hedgehog):
    r"""Hedgehog features with a learned weight for every token:

        φ(x) = exp(g · x) softmax([W x, −W x])          F = 2 D

    Hedgehog's features say where a vector points; the mass of softmax attention also depends on how long it is. The
    weight of a key is its say in the memory. That of a query is the far branch's say in the joint normaliser, and
    leaves the branch's own output as it is. Neither takes memory. Kernels do not compute these features themselves, as
    they do Hedgehog's: they are written out first.

    Parameters: ``weight`` ``[heads, D, D]``, started as the identity, and ``gain`` ``[heads, D]``, started at zero,
    where the map is Hedgehog's.

    Example:
        >>> phi = make("weighted-hedgehog", 64, num_heads=8, num_kv_heads=2)
        >>> phi.feature_dim, tuple(phi.key["gain"].shape)
        (128, (2, 64))
    """

    name: ClassVar[str] = "weighted-hedgehog"
    log_scaled: ClassVar[bool] = True
    paper: ClassVar[str] = "after Zhang et al. 2024, arXiv:2402.04347"

    def start(self, heads: int) -> dict[str, Tensor]:
        return super().start(heads) | {"gain": torch.zeros(heads, self.head_dim, **_START)}

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        return Features(super().features(x, parameters).values, (widen(x) * widen(parameters["gain"])).sum(-1))

    def projected(self) -> Projected | None:
        return None


@register
class T2R(LearnedMap):
    r"""A learned rectified projection:

        φ(x) = max(W x + b, 0)

    Non-negative; the first map that fine-tuned pretrained transformers into recurrent ones. A query without active
    features attends to nothing. The scale does not enter.

    Parameters: ``weight`` ``[heads, D, F]`` and ``bias`` ``[heads, F]``, started uniform in ±1/√D.

    Reference: Kasai et al. 2021, "Finetuning pretrained transformers into RNNs", eq. 4.

    Args:
        num_features: number of features F. Default D.

    Example:
        >>> make("t2r", 64, num_features=32).feature_dim
        32
    """

    name: ClassVar[str] = "t2r"
    positive: ClassVar[bool] = True
    paper: ClassVar[str] = "Kasai et al. 2021, arXiv:2103.13076"

    def __init__(self, head_dim: int, *, num_features: int | None = None, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        self.num_features = self._positive_option("num_features", head_dim if num_features is None else num_features)
        self.build()

    @property
    def feature_dim(self) -> int:
        return self.num_features

    def start(self, heads: int) -> dict[str, Tensor]:
        bound = self.head_dim**-0.5
        return {
            "weight": torch.empty(heads, self.head_dim, self.num_features, **_START).uniform_(-bound, bound),
            "bias": torch.empty(heads, self.num_features, **_START).uniform_(-bound, bound),
        }

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        return Features((per_head(x, parameters["weight"]) + parameters["bias"]).relu().to(x.dtype))

    def projected(self) -> Projected:
        query, key = self.query, self.key
        return Projected("relu", query["weight"], key["weight"], query["bias"], key["bias"])

    def options(self) -> dict[str, Any]:
        return {"num_features": self.num_features}


@register
class ReBased(LearnedMap):
    r"""The square of a learned affine map of the normalised vector:

        φ(x) = (γ ⊙ norm(x) + β)²,  norm(x) = (x − mean(x)) / √(var(x) + 10⁻⁵)          F = D

    Non-negative, and its zero can be learned: a kernel that can ignore a token, which a Taylor series cannot. The
    normalisation removes the size of x, so the features stay bounded and the scale does not enter.

    Parameters: ``gamma`` ``[heads, D]`` started at one, ``beta`` ``[heads, D]`` started at zero.

    Reference: Aksenov et al. 2024, "Linear transformers with learnable kernel functions are better in-context models".
    The square is taken per coordinate.

    Example:
        >>> phi = make("rebased", 64)
        >>> sorted(name for name, _ in phi.named_parameters())
        ['key.beta', 'key.gamma', 'query.beta', 'query.gamma']
    """

    name: ClassVar[str] = "rebased"
    positive: ClassVar[bool] = True
    paper: ClassVar[str] = "Aksenov et al. 2024, arXiv:2402.10644"

    def __init__(self, head_dim: int, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        self.build()

    @property
    def feature_dim(self) -> int:
        return self.head_dim

    def start(self, heads: int) -> dict[str, Tensor]:
        return {
            "gamma": torch.ones(heads, self.head_dim, **_START),
            "beta": torch.zeros(heads, self.head_dim, **_START),
        }

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        normalised = nn.functional.layer_norm(widen(x), [self.head_dim])
        return Features((parameters["gamma"] * normalised + parameters["beta"]).square().to(x.dtype))


@register
class PolySketch(LearnedMap):
    r"""A learned sketch of the polynomial kernel of even degree p, squared so that it is never negative:

        S_1(x) = y = √scale · x,  S_2m(x) = r^(−1/2) (S_m(x) G) ⊙ (S'_m(x) G')
        φ(x) = S_{p/2}(x) ⊗ S_{p/2}(x)          F = r (r + 1) / 2,  r the sketch size
        φ(q)·φ(k) = (S_{p/2}(q)·S_{p/2}(k))²

    S_m and S'_m are independent sketches of the same vector. At the start the matrices G are standard normal, the same
    for queries and keys: then E[S_m(q)·S_m(k)] = (scale · q·k)^m, so φ(q)·φ(k) estimates (scale · q·k)^p (from above,
    by the variance of S). Training moves them; ``requires_grad_(False)`` keeps the random sketch. The square keeps each
    product once, weighted by √2 off the diagonal. Powers leave half precision, so magnitudes go into the log-scale.

    Parameters: ``level0``, ``level1``, …: the matrices of each level, ``[heads, p / 2 / 2^level, D or r, r]``.

    Reference: Kacham et al. 2024, "PolySketchFormer", algorithm 1 and theorem 1.1. The paper normalises queries and
    keys first; so should a model trained from scratch.

    Args:
        sketch: sketch size r.
        degree: p, a power of two ≥ 4.

    Example:
        >>> make("polysketch", 64, sketch=16).feature_dim
        136
    """

    name: ClassVar[str] = "polysketch"
    positive: ClassVar[bool] = True
    log_scaled: ClassVar[bool] = True
    paper: ClassVar[str] = "Kacham et al. 2024, arXiv:2310.01655"

    def __init__(self, head_dim: int, *, sketch: int = 16, degree: int = 4, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        if degree < 4 or degree & (degree - 1):
            raise FeatureMapError(f"PolySketch: degree={degree}, expected a power of two, 4 or more.")
        self.sketch = self._positive_option("sketch", sketch)
        self.degree = degree
        self.build()

    @property
    def feature_dim(self) -> int:
        return self.sketch * (self.sketch + 1) // 2

    def start(self, heads: int) -> dict[str, Tensor]:
        levels = self.degree.bit_length() - 2
        widths = [self.head_dim] + [self.sketch] * (levels - 1)
        return {
            f"level{level}": torch.randn(heads, self.degree >> (level + 1), width, self.sketch, **_START)
            for level, width in enumerate(widths)
        }

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        y = widen(x) * math.sqrt(self.scale)
        # φ is homogeneous of degree p: features of the direction, and p · log of the size.
        size = y.detach().abs().amax(-1).clamp_min(1).log2().ceil()
        y = y * torch.exp2(-size).unsqueeze(-1)
        nodes = [y] * (self.degree // 2)
        for level in range(len(parameters)):
            matrices = parameters[f"level{level}"].unbind(1)
            halves = [per_head(node, matrix) for node, matrix in zip(nodes, matrices, strict=True)]
            nodes = [a * b * self.sketch**-0.5 for a, b in zip(halves[::2], halves[1::2], strict=True)]
        return bounded(symmetric_square(nodes[0]), x.dtype, size * (self.degree * math.log(2)))

    def options(self) -> dict[str, Any]:
        return {"sketch": self.sketch, "degree": self.degree}


@register
class Exponential(LearnedMap):
    r"""Learned exponential features, started as an unbiased random estimate of the softmax kernel:

        φ_j(x) = F^(−1/2) exp(w_j · y + b_j − |y|²/2),  y = √scale · x

    At the start the rows w_j are normal vectors in orthogonal blocks, the same for queries and keys, and b = 0: the
    estimator of FAVOR+, whose expectation is exp(scale · q·k). The term |y|²/2 belongs to it: without it, long keys win
    whatever they point at, and features grow without bound as norms grow in training. The largest exponent of each
    token goes into the log-scale, so the values lie in (0, 1].

    Parameters: ``weight`` ``[heads, D, F]`` and ``bias`` ``[heads, F]``.

    Reference: Choromanski et al. 2021, "Rethinking attention with performers", lemma 1, for the start; exponential
    features as in Zhang et al. 2024 for learning them.

    Args:
        num_features: number of features F. Default 2 D.

    Example:
        >>> phi = make("exp", 64, num_heads=8, num_kv_heads=2, num_features=96)
        >>> phi.forward_keys(torch.randn(1, 5, 2, 64)).log_scale.shape
        torch.Size([1, 5, 2])
    """

    name: ClassVar[str] = "exp"
    positive: ClassVar[bool] = True
    log_scaled: ClassVar[bool] = True
    paper: ClassVar[str] = "Choromanski et al. 2021, arXiv:2009.14794"

    def __init__(self, head_dim: int, *, num_features: int | None = None, **heads: Any) -> None:
        super().__init__(head_dim, **heads)
        self.num_features = self._positive_option(
            "num_features", 2 * head_dim if num_features is None else num_features
        )
        self.build()

    @property
    def feature_dim(self) -> int:
        return self.num_features

    def start(self, heads: int) -> dict[str, Tensor]:
        seeds = torch.randint(2**31, (heads,), device="cpu").tolist()
        rows = [draw_projection("orthogonal", self.num_features, self.head_dim, seed=seed) for seed in seeds]
        return {"weight": torch.stack(rows).mT.float(), "bias": torch.zeros(heads, self.num_features, **_START)}

    def features(self, x: Tensor, parameters: nn.ParameterDict) -> Features:
        y = widen(x) * math.sqrt(self.scale)
        logits = per_head(y, parameters["weight"]) + parameters["bias"]
        log_scale = -0.5 * y.square().sum(-1) - 0.5 * math.log(self.num_features)
        return bounded_exp(logits, log_scale, x.dtype)

    def projected(self) -> Projected:
        root, (query, key) = math.sqrt(self.scale), (self.query, self.key)
        return Projected(
            "exp",
            query["weight"].float() * root,
            key["weight"].float() * root,
            query["bias"],
            key["bias"],
            norm=0.5 * self.scale,
            constant=-0.5 * math.log(self.num_features),
        )

    def options(self) -> dict[str, Any]:
        return {"num_features": self.num_features}
