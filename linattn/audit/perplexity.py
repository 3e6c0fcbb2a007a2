"""Perplexity over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn._modes import evaluating
from linattn.errors import OptionError, ShapeError


class Perplexity(NamedTuple):
    """How well a model predicts a text.

    Attributes:
        loss: mean cross-entropy in nats per predicted token.
        tokens: predicted tokens.
    """

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Cross-entropy of a causal language model over consecutive, disjoint windows, each read from an empty cache.

    The model is measured in evaluation mode and left in the mode it was in.

    Args:
        model: called as ``model(ids, use_cache=False).logits``.
        token_ids: ``[T]`` int64, one text. A last partial window is left out.
        window: tokens a window; its first token is not predicted.
        max_windows: use only that many windows.
        progress: called with (windows done, windows in all).

    Raises:
        ShapeError: the text is shorter than one window.
        OptionError: ``window`` < 2, or ``max_windows`` < 1.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise OptionError(f"window={window}, max_windows={max_windows}: expected at least 2 and 1.")
    if token_ids.ndim != 1 or token_ids.shape[0] < window:
        raise ShapeError(f"token_ids: got shape {tuple(token_ids.shape)}, expected [T] with T ≥ window = {window}.")
    windows = token_ids[: token_ids.shape[0] // window * window].view(-1, window)[:max_windows]
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for done, ids in enumerate(windows):
            ids = ids[None].to(device)
            logits = model(ids, use_cache=False).logits
            total += F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
            if progress is not None:
                progress(done + 1, len(windows))
    tokens = len(windows) * (window - 1)
    return Perplexity(total / tokens, tokens)
