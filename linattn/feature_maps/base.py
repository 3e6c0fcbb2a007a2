"""The contract every feature map fulfils."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from linattn.errors import FeatureMapError, ShapeError, UnsupportedError
from linattn.kernels.protocols import Projected


class Features(NamedTuple):
    """Features of a batch of queries or keys: φ(x) = exp(log_scale) · values.

    Attributes:
        values: ``[B, T, H, F]`` in the dtype of the input, bounded when ``log_scale`` is given.
        log_scale: ``[B, T, H]`` float32 (float64 for float64 inputs), or None for zero.
    """

    values: Tensor
    log_scale: Tensor | None = None


class FeatureMap(nn.Module):
    """A map φ such that φ_q(q) · φ_k(k) stands in for the softmax kernel exp(scale · q · k).

    A subclass defines :attr:`feature_dim`, :meth:`forward_queries` and :meth:`forward_keys`, calls
    ``super().__init__`` and declares its properties as class attributes. Parameters and buffers are created with
    ``device=`` and ``dtype=`` as given and filled in :meth:`reset_parameters`, which must work after
    ``to_empty`` so that meta-device initialisation works. Features of one token depend on that token alone
    (and its position, if :attr:`positional`): this is what makes causal attention causal.

    Args:
        head_dim: size D of one query or key head.
        num_heads: number of query heads H.
        num_kv_heads: number of key/value heads Hkv; H must be a multiple of it. Default H.
        scale: the softmax scale the kernel stands in for. Default ``head_dim ** -0.5``.
        device: where parameters and buffers live.
        dtype: dtype of parameters.
    """

    name: ClassVar[str] = ""
    """Registry name."""
    positive: ClassVar[bool] = False
    """φ_q(q) · φ_k(k) ≥ 0 for every q and k."""
    random: ClassVar[bool] = False
    """Has a random projection and :meth:`redraw`."""
    unbiased: ClassVar[bool] = False
    """E over redraws of φ_q(q) · φ_k(k) equals exp(scale · q · k)."""
    log_scaled: ClassVar[bool] = False
    """Returns a per-token ``log_scale``."""
    learned: ClassVar[bool] = False
    """Has trainable parameters."""
    positional: ClassVar[bool] = False
    """Needs ``positions``."""
    causal: ClassVar[bool] = True
    """Usable in causal attention."""
    paper: ClassVar[str] = ""
    """Where the estimator comes from."""

    def __init__(
        self,
        head_dim: int,
        *,
        num_heads: int = 1,
        num_kv_heads: int | None = None,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim < 1 or num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise FeatureMapError(
                f"{type(self).__name__}: head_dim={head_dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}; "
                "all must be positive and num_heads a multiple of num_kv_heads."
            )
        if scale is not None and not 0 < scale < float("inf"):
            raise FeatureMapError(f"{type(self).__name__}: scale={scale!r}, expected a positive number or None.")
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.scale = head_dim**-0.5 if scale is None else float(scale)
        self._factory: dict[str, Any] = {"device": device, "dtype": dtype}

    @property
    def feature_dim(self) -> int:
        """Number of features F of one head."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fill parameters and buffers with their starting values, in place."""

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        """Features of queries ``[B, T, H, D]``; ``positions`` ``[B, T]`` int64 only for positional maps."""
        raise NotImplementedError

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        """Features of keys ``[B, T, Hkv, D]``; ``positions`` ``[B, T]`` int64 only for positional maps."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor) -> tuple[Features, Features]:
        """Features of queries and of keys."""
        self.check_input("q", q, self.num_heads)
        self.check_input("k", k, self.num_kv_heads)
        return self.forward_queries(q), self.forward_keys(k)

    def projected(self) -> Projected | None:
        """The same map as a projection and an activation, which GPU kernels compute themselves; None if it is not one.

        Optional: it saves the features' way through memory and must equal :meth:`forward_queries` and
        :meth:`forward_keys`, gradients of the parameters included.
        """
        return None

    def check_input(self, argument: str, x: Tensor, heads: int) -> None:
        """Raise :class:`ShapeError` unless ``x`` is ``[B, T, heads, head_dim]``."""
        if x.ndim != 4 or x.shape[2] != heads or x.shape[3] != self.head_dim:
            raise ShapeError(
                f"{argument}: got shape {tuple(x.shape)}, but {type(self).__name__} was built for "
                f"[B, T, {heads}, {self.head_dim}] (heads, head_dim)."
            )

    def options(self) -> dict[str, Any]:
        """Constructor options beyond the head sizes, JSON-serialisable: what a checkpoint needs to rebuild the map."""
        return {}

    def extra_repr(self) -> str:
        parts = [
            f"head_dim={self.head_dim}",
            f"heads={self.num_heads}/{self.num_kv_heads}",
            f"features={self.feature_dim}",
        ]
        return ", ".join(parts + [f"{k}={v!r}" for k, v in self.options().items()])


class SequenceMap(FeatureMap):
    """A low-rank approximation over the whole sequence, for bidirectional attention only.

    It has no per-token features, hence no state, no window and no causal form: it replaces the operator as a whole.
    """

    causal: ClassVar[bool] = False

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        raise UnsupportedError(f"{type(self).__name__} has no per-token features; call attend(q, k, v, mask).")

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        raise UnsupportedError(f"{type(self).__name__} has no per-token features; call attend(q, k, v, mask).")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Approximate attention output.

        Args:
            q: ``[B, Tq, H, D]``. k: ``[B, Tk, Hkv, D]``. v: ``[B, Tk, Hkv, V]``.
            mask: ``[B, Tk]`` bool, True where the key is a real token.

        Returns:
            ``[B, Tq, H, V]``.
        """
        raise NotImplementedError
