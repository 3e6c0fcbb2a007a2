r"""How well a feature map approximates softmax attention on given queries and keys.

Everything here is dense, in float64, on the attention matrices themselves (O(T²) memory, O(T³) time for the ranks):
it measures the estimator, free of rounding, on some hundreds of tokens.

>>> import torch
>>> from linattn.diagnostics import measure
>>> from linattn.feature_maps import make
>>> q, k = torch.randn(2, 1, 64, 4, 16)
>>> found = measure(make("favor+", 16, num_heads=4, num_features=256), q, k, window=8, sinks=2)
>>> found.kl.shape  # one number per head
torch.Size([4])
>>> sorted(found.mean())[:3]  # averaged over heads
['effective_rank', 'entropy', 'kl']
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from linattn.errors import OptionError, ShapeError, UnsupportedError
from linattn.feature_maps import FeatureMap, SequenceMap, make

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Approximation",
    "ErrorAtSize",
    "error_by_features",
    "kernel_weights",
    "measure",
    "plot_attention",
    "plot_error_by_features",
    "softmax_weights",
]


class Approximation(NamedTuple):
    """How an approximate attention compares with softmax attention, per head, averaged over the batch.

    Attributes:
        output_error: ``[H]`` ‖approximate output − softmax output‖ / ‖softmax output‖ over all tokens (L2). Without
            values, of the attention matrices: the output error for values that are an orthonormal basis.
        kl: ``[H]`` KL(softmax ‖ approximation) in nats, averaged over queries. Infinite if the approximation gives no
            weight to a token that softmax does attend to; NaN if it gives a negative weight, because a row with
            negative weights is no distribution and has no divergence.
        entropy: ``[H]`` entropy of the approximation's rows in nats, averaged over queries; NaN as above.
        softmax_entropy: ``[H]`` the same of softmax attention.
        effective_rank: ``[H]`` of the approximate attention matrix: the exponential of the entropy of its normalised
            singular values (Roy and Vetterli 2007). Between 1 and T.
        softmax_effective_rank: ``[H]`` the same of softmax attention.
        negative_mass: ``[H]`` share of negative weights in the sum of absolute weights; 0 for a positive map.
    """

    output_error: Tensor
    kl: Tensor
    entropy: Tensor
    softmax_entropy: Tensor
    effective_rank: Tensor
    softmax_effective_rank: Tensor
    negative_mass: Tensor

    def mean(self) -> dict[str, float]:
        """Each measure averaged over heads."""
        return {name: value.mean().item() for name, value in self._asdict().items()}


class ErrorAtSize(NamedTuple):
    """Output error at one number of features: the median over draws and its quartiles, averaged over heads first."""

    num_features: int
    median: float
    low: float
    high: float


def softmax_weights(q: Tensor, k: Tensor, *, scale: float | None = None, causal: bool = True) -> Tensor:
    """Softmax attention as a matrix.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, Tk, Hkv, D]``, Tk = T if causal.
        scale: default ``D ** -0.5``.

    Returns:
        ``[B, H, T, Tk]`` float64, rows sum to one.
    """
    _check(q, k, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * _scores(q, k)
    return logits.masked_fill(~_seen(q, k, causal), -math.inf).softmax(-1)


def kernel_weights(
    feature_map: FeatureMap,
    q: Tensor,
    k: Tensor,
    *,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
) -> Tensor:
    """Attention through a feature map, near tokens exactly, as a matrix.

    Args:
        feature_map: φ. A :class:`~linattn.feature_maps.SequenceMap` needs ``causal=False`` and no window or sinks.
        q: ``[B, T, H, D]``. k: ``[B, Tk, Hkv, D]``, Tk = T unless cross attention.
        window, sinks: tokens attended exactly, as in :func:`linattn.kernels.kernel_attention`.

    Returns:
        ``[B, H, T, Tk]`` float64. Rows sum to one; a row whose every weight is zero (a query that a rectified map sends
        to the origin) stays zero. Weights are negative where a map that is not positive makes them so.
    """
    _check(q, k, causal)
    if min(window, sinks) < 0:
        raise OptionError(f"window={window}, sinks={sinks}: neither may be negative.")
    q, k = q.double(), k.double()
    feature_map.check_input("q", q, feature_map.num_heads)
    feature_map.check_input("k", k, feature_map.num_kv_heads)
    if isinstance(feature_map, SequenceMap):
        if causal or window or sinks:
            raise UnsupportedError(
                f"{type(feature_map).__name__} approximates whole bidirectional attention: measure it with "
                f"causal=False and without window and sinks (got causal={causal}, window={window}, sinks={sinks})."
            )
        basis = torch.eye(k.shape[1], dtype=torch.float64, device=k.device)
        basis = basis[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
        return feature_map.attend(q, k, basis).transpose(1, 2)

    at_q, at_k = (torch.arange(x.shape[1], device=x.device) for x in (q, k))
    positional = feature_map.positional
    phi_q, log_q = feature_map.forward_queries(q, *([at_q.expand(len(q), -1)] if positional else []))
    phi_k, log_k = feature_map.forward_keys(k, *([at_k.expand(len(k), -1)] if positional else []))
    kernel = _scores(phi_q, phi_k)
    log_far = kernel.abs().log()
    if log_q is not None:
        log_far = log_far + log_q.transpose(1, 2)[..., None]
    if log_k is not None:
        log_far = log_far + _per_query_head(log_k, q.shape[2]).transpose(1, 2)[:, :, None]

    gap = at_q[:, None] - at_k
    near = (gap.abs() < window) | (at_k < sinks)
    log_weights = torch.where(near, feature_map.scale * _scores(q, k), log_far)
    log_weights = log_weights.masked_fill(~_seen(q, k, causal), -math.inf)
    shift = log_weights.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
    weights = (log_weights - shift).exp() * torch.where(near, 1.0, kernel.sign())
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


@torch.no_grad()
def measure(
    feature_map: FeatureMap,
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
) -> Approximation:
    """Compare attention through ``feature_map`` with softmax attention.

    Args:
        feature_map: φ, built for these heads. Its ``scale`` is the softmax scale compared with.
        q: ``[B, T, H, D]``. k: ``[B, Tk, Hkv, D]``. v: ``[B, Tk, Hkv, V]``, optional.
        window, sinks: tokens attended exactly, as in :func:`linattn.kernels.kernel_attention`.
        causal: False for bidirectional and cross attention.

    Returns:
        :class:`Approximation`, one number per head and measure.

    Raises:
        ShapeError: heads or sizes do not match the map. UnsupportedError: a whole-sequence map asked to be causal.
    """
    exact = softmax_weights(q, k, scale=feature_map.scale, causal=causal)
    approximate = kernel_weights(feature_map, q, k, window=window, sinks=sinks, causal=causal)
    return Approximation(
        output_error=_relative_error(approximate, exact, v).mean(0),
        kl=_divergence(exact, approximate).mean((0, 2)),
        entropy=_entropy(approximate).mean((0, 2)),
        softmax_entropy=_entropy(exact).mean((0, 2)),
        effective_rank=_effective_rank(approximate).mean(0),
        softmax_effective_rank=_effective_rank(exact).mean(0),
        negative_mass=(approximate.clamp_max(0).abs().sum((2, 3)) / approximate.abs().sum((2, 3))).mean(0),
    )


@torch.no_grad()
def error_by_features(
    feature_map: str | type[FeatureMap],
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    num_features: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    draws: int = 5,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
    scale: float | None = None,
    **options: Any,
) -> list[ErrorAtSize]:
    """Output error against softmax attention as the number of features grows.

    Args:
        feature_map: name or class of a map with the option ``num_features``.
        q, k, v, window, sinks, causal: as in :func:`measure`.
        num_features: sizes to try.
        draws: projections to draw at each size; a map that is not random is measured once.
        scale: the softmax scale. options: further options of the map.

    Returns:
        One :class:`ErrorAtSize` per size.
    """
    _check(q, k, causal)
    if draws < 1:
        raise OptionError(f"draws={draws}, expected at least 1.")
    exact = softmax_weights(q, k, scale=scale, causal=causal)
    found = []
    for size in num_features:
        phi = make(
            feature_map,
            q.shape[3],
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            scale=scale,
            device=q.device,
            num_features=size,
            **options,
        )
        errors = []
        for draw in range(draws if phi.random else 1):
            if draw:
                cast(Any, phi).redraw()
            approximate = kernel_weights(phi, q, k, window=window, sinks=sinks, causal=causal)
            errors.append(_relative_error(approximate, exact, v).mean())
        low, median, high = torch.stack(errors).quantile(torch.tensor([0.25, 0.5, 0.75]).to(errors[0])).tolist()
        found.append(ErrorAtSize(size, median, low, high))
    return found


def plot_error_by_features(
    curves: Mapping[str, Sequence[ErrorAtSize]],
    *,
    levels: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw output error against the number of features, both logarithmic, with the 1/√F line for comparison.

    Args:
        curves: results of :func:`error_by_features` by label.
        levels: horizontal lines by label, such as the error of the window alone.
        ax: where to draw; default a new figure.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    plt = _pyplot()
    from matplotlib.ticker import LogLocator

    if ax is None:
        ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")[1]
    for label, points in curves.items():
        sizes = [p.num_features for p in points]
        (line,) = ax.plot(sizes, [p.median for p in points], "o-", markersize=4, label=label)
        ax.fill_between(sizes, [p.low for p in points], [p.high for p in points], color=line.get_color(), alpha=0.15)
    for (label, level), style in zip((levels or {}).items(), ["--", "-.", ":"] * len(levels or {}), strict=False):
        ax.axhline(level, color="0.35", linestyle=style, linewidth=1.2, label=label)
    first = next((points[0] for points in curves.values() if points), None)
    if first is not None:
        sizes = sorted({p.num_features for points in curves.values() for p in points})
        guide = [first.median * math.sqrt(first.num_features / size) for size in sizes]
        ax.plot(
            sizes, guide, color="0.6", linestyle=(0, (1, 1.5)), linewidth=1.2, label=r"$\propto 1/\sqrt{F}$", zorder=1
        )
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xlabel("number of features F")
    ax.set_ylabel("relative output error")
    ax.grid(True, which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax


@torch.no_grad()
def plot_attention(
    feature_map: FeatureMap,
    q: Tensor,
    k: Tensor,
    *,
    head: int = 0,
    row: int = 0,
    window: int = 0,
    sinks: int = 0,
    causal: bool = True,
) -> Figure:
    """Draw softmax attention, its approximation and their difference side by side.

    Args:
        feature_map, q, k, window, sinks, causal: as in :func:`measure`.
        head: query head to draw. row: sequence of the batch to draw.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    plt = _pyplot()
    from matplotlib.colors import LogNorm, SymLogNorm

    exact = softmax_weights(q, k, scale=feature_map.scale, causal=causal)[row, head].cpu()
    approximate = kernel_weights(feature_map, q, k, window=window, sinks=sinks, causal=causal)[row, head].cpu()
    difference = approximate - exact
    hidden = ~_seen(q, k, causal).cpu()
    top = max(exact.max().item(), approximate.max().item())
    floor, reach = top * 1e-4, max(difference.abs().max().item(), 1e-12)

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained", sharex=True, sharey=True)
    shared = LogNorm(floor, top)
    decade = 10.0 ** math.floor(math.log10(reach))
    signed = SymLogNorm(decade / 30, vmin=-reach, vmax=reach)
    name = f"{feature_map.name or type(feature_map).__name__}, F = {feature_map.feature_dim}"
    if window or sinks:
        name += f", window {window} + {sinks} sinks"
    panels = [
        ("softmax attention", exact.clamp_min(floor), "magma", shared),
        (name, approximate.clamp_min(floor), "magma", shared),
        ("difference", difference, "RdBu_r", signed),
    ]
    images = []
    for ax, (title, matrix, colours, norm) in zip(axes, panels, strict=True):
        image = ax.imshow(
            matrix.masked_fill(hidden, math.nan).numpy(), cmap=colours, norm=norm, interpolation="nearest"
        )
        ax.set_title(title)
        ax.set_xlabel("key")
        images.append(image)
    axes[0].set_ylabel("query")
    figure.colorbar(images[1], ax=axes[:2], label="weight", shrink=0.85, extend="min")
    ticks = [sign * decade / step for sign, step in ((-1, 1), (-1, 10), (0, 1), (1, 10), (1, 1))]
    bar = figure.colorbar(images[2], ax=axes[2], label="approximation − softmax", shrink=0.85)
    bar.set_ticks(ticks, labels=[f"{tick:+g}" if tick else "0" for tick in ticks])
    bar.minorticks_off()
    return figure


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as missing:
        raise UnsupportedError("Plots need matplotlib: pip install 'linattn[plots]'.") from missing
    return plt


def _check(q: Tensor, k: Tensor, causal: bool) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"q and k: got {tuple(q.shape)} and {tuple(k.shape)}, expected [B, T, H, D] and [B, Tk, Hkv, D] with H a "
            "multiple of Hkv."
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ShapeError(
            f"q and k: got {q.shape[1]} queries and {k.shape[1]} keys; causal attention needs as many. "
            "Pass causal=False for cross attention."
        )


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """``[B, T, Hkv, ...] -> [B, T, H, ...]``."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Inner products ``[B, H, T, Tk]`` in float64."""
    return torch.einsum("bthf,bshf->bhts", q.double(), _per_query_head(k.double(), q.shape[2]))


def _seen(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """``[T, Tk]``: which keys a query may attend to."""
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    return seen.tril() if causal else seen


def _relative_error(approximate: Tensor, exact: Tensor, v: Tensor | None) -> Tensor:
    """``[B, H]``."""
    if v is not None:
        if v.ndim != 4 or v.shape[:2] != (exact.shape[0], exact.shape[3]) or exact.shape[1] % v.shape[2]:
            raise ShapeError(f"v: got {tuple(v.shape)}, expected [B, Tk, Hkv, V] that matches k.")
        values = _per_query_head(v.double(), exact.shape[1]).transpose(1, 2)
        approximate, exact = approximate @ values, exact @ values
    return (approximate - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)


def _divergence(p: Tensor, other: Tensor) -> Tensor:
    """KL(p ‖ other) of rows: ``[B, H, T]``."""
    ratio = p * (p.log() - other.log())  # the logarithm of a negative weight is NaN
    return torch.where(p == 0, 0.0, ratio).sum(-1).masked_fill((other < 0).any(-1), math.nan)


def _entropy(p: Tensor) -> Tensor:
    """Entropy of rows: ``[B, H, T]``."""
    return torch.special.entr(p).sum(-1).masked_fill((p < 0).any(-1), math.nan)


def _effective_rank(matrix: Tensor) -> Tensor:
    """``[B, H]``."""
    singular = torch.linalg.svdvals(matrix)
    singular = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(singular).sum(-1).exp()
