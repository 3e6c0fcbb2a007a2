"""Cross-entropy by position: what a model predicts worse, or better, the longer the text before it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn._heads import body_and_head, tokens_at_once
from linattn._modes import evaluating
from linattn.errors import DtypeError, OptionError, ShapeError

EDGES = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Bounds of the position buckets, in tokens."""

Progress = Callable[[int, int], None]


class Bucket(NamedTuple):
    """A mean over the positions ``start ≤ p < stop``; p counts the tokens before the predicted one.

    Attributes:
        mean: over all tokens of the bucket, in nats.
        standard_error: of ``mean``, from how the windows differ, which are taken to be independent; NaN of one window.
        tokens: predicted tokens. windows: sequences they come from.
    """

    start: int
    stop: int
    mean: float
    standard_error: float
    tokens: int
    windows: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; None where a number is not finite."""
        return {name: finite(value) for name, value in self._asdict().items()}


class PositionLosses(NamedTuple):
    """Buckets in order of position, without those that no token falls into."""

    buckets: tuple[Bucket, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"buckets": [bucket.as_dict() for bucket in self.buckets]}


def finite(value: float) -> float | None:
    """``value``, or None, which JSON has in place of NaN and infinity."""
    return value if math.isfinite(value) else None


def position_losses(
    model: nn.Module, tokens: Tensor, *, edges: Sequence[int] = EDGES, progress: Progress | None = None
) -> PositionLosses:
    """Cross-entropy of a causal language model by position: :func:`by_position` of :func:`token_losses`.

    Args:
        model: see :func:`token_losses`.
        tokens: ``[N, T]`` int64, N windows of text, each read from an empty cache.
        edges: bounds of the buckets, rising; positions outside them are left out.
        progress: called with (windows done, windows in all).
    """
    return by_position(token_losses(model, tokens, progress=progress), edges=edges)


@torch.no_grad()
def token_losses(
    model: nn.Module, tokens: Tensor, *, last: int | None = None, rows: int = 1, progress: Progress | None = None
) -> Tensor:
    """Cross-entropy in nats of each token given all before it in its window.

    Where the logits are the output embedding of the last hidden state and nothing else, they are computed for a slice
    of the positions at a time; other models form them at once, in their own dtype. In neither case do all of them stand
    in memory as float32. The model is measured in evaluation mode and left in the mode it was in.

    Args:
        model: called as ``model(ids, use_cache=False).logits``.
        tokens: ``[N, T]`` int64, T ≥ 2. The first token of a window is not predicted.
        last: score only that many tokens at the end of each window. Default all T − 1.
        rows: windows read at once.
        progress: called with (windows done, windows in all).

    Returns:
        ``[N, last]`` float32 on the CPU.

    Raises:
        ShapeError, DtypeError: ``tokens`` is no ``[N, T]`` tensor of token ids with N ≥ 1 and T ≥ 2.
        OptionError: ``last`` is not among 1 … T − 1, or ``rows`` < 1.
    """
    check_tokens(tokens)
    count, length = tokens.shape
    last = length - 1 if last is None else last
    if not 1 <= last < length or rows < 1:
        raise OptionError(f"last={last}, rows={rows}: expected 1 ≤ last < T = {length} and rows ≥ 1.")
    device = next(model.parameters()).device
    losses = []
    with evaluating(model):
        body, head = body_and_head(model, tokens[:1, :16].to(device))
        for start in range(0, count, rows):
            ids = tokens[start : start + rows].to(device)
            hidden, targets = body(ids[:, :-1])[:, -last:].flatten(0, 1), ids[:, -last:].flatten()
            width = tokens_at_once(head, hidden)
            slices = zip(hidden.split(width), targets.split(width), strict=True)
            part = [F.cross_entropy(head(h).float(), t, reduction="none") for h, t in slices]
            losses.append(torch.cat(part).view(len(ids), last).cpu())
            if progress is not None:
                progress(min(start + rows, count), count)
    return torch.cat(losses)


def by_position(values: Tensor, *, first: int = 1, edges: Sequence[int] = EDGES) -> PositionLosses:
    """Means of per-token values by position: losses, or the differences of two models' losses.

    Args:
        values: ``[N, L]``, N windows. Column j belongs to position ``first + j``; summed in float64.
        first: position of the first column.
        edges: bounds of the buckets, rising; positions outside them are left out.
    """
    if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise OptionError(f"edges: got {tuple(edges)}, expected at least two rising numbers.")
    held = [(a, b) for a, b in itertools.pairwise(edges) if max(a, first) < min(b, first + values.shape[1])]
    return PositionLosses(tuple(mean_over(values, start=a, stop=b, first=first) for a, b in held))


def mean_over(values: Tensor, *, start: int, stop: int | None = None, first: int = 1) -> Bucket:
    """The mean of ``values`` (see :func:`by_position`) over the positions ``start ≤ p < stop``, default to the end."""
    end = first + values.shape[1]
    stop = end if stop is None else stop
    inside = values[:, max(start - first, 0) : max(stop - first, 0)].double()
    if inside.numel() == 0:
        raise ShapeError(f"values: hold positions {first} … {end - 1}, none of them in {start} … {stop - 1}.")
    means = inside.mean(1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Bucket(start, stop, means.mean().item(), error, inside.numel(), len(means))


def check_tokens(tokens: Tensor) -> None:
    """Raise unless ``tokens`` is ``[N, T]`` token ids, N ≥ 1, T ≥ 2."""
    if tokens.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"tokens: got {tokens.dtype}, expected int64 token ids.")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ShapeError(f"tokens: got shape {tuple(tokens.shape)}, expected [N, T] with N ≥ 1 and T ≥ 2.")
