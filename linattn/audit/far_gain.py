"""The far-gain ratio: how much of what its teacher gains from distant text a converted model gains."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linattn.audit.positions import Bucket, Progress, check_tokens, finite, mean_over, token_losses
from linattn.errors import OptionError, ShapeError

TOKENS_AT_ONCE = 8192
"""Tokens of truncated contexts that are read at once."""


class FarGain(NamedTuple):
    """What two models gain from text further back than ``context`` tokens, at positions from ``start`` on.

    Attributes:
        teacher, student: the gain of each in nats per token: cross-entropy with only the last tokens minus
            cross-entropy with all.
        ratio: student's gain over teacher's; NaN where the teacher gains nothing.
        standard_error: of ``ratio``, by leaving out one window at a time (jackknife); NaN of one window.
        context: tokens that a truncated context has at most.
        stride: tokens scored per truncated context, which has from ``context − stride + 1`` to ``context`` tokens.
    """

    teacher: Bucket
    student: Bucket
    ratio: float
    standard_error: float
    context: int
    stride: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; None where a number is not finite."""
        return {
            "teacher": self.teacher.as_dict(),
            "student": self.student.as_dict(),
            "ratio": finite(self.ratio),
            "standard_error": finite(self.standard_error),
            "context": self.context,
            "stride": self.stride,
        }


def far_gain(
    teacher: nn.Module,
    student: nn.Module,
    tokens: Tensor,
    *,
    context: int,
    start: int = 2048,
    stride: int | None = None,
    progress: Progress | None = None,
) -> FarGain:
    """The far-gain ratio of a converted model, on windows of a text.

    A model that has no use for its far branch has a ratio near 0, one that uses it as well as softmax attention 1. Both
    models read the same truncated contexts, cut out of the text and read from an empty cache, so that nothing before
    them can pass through the layers, as it would with a sliding-window mask.

    Args:
        teacher, student: causal models; see :func:`token_losses`.
        tokens: ``[N, T]`` int64, T > ``start``.
        context: tokens of a truncated context, among them what the student attends exactly: ``window + retained
            + sinks`` is a natural choice.
        start: first position scored, ≥ ``context``.
        stride: see :func:`truncated_losses`; the same approximation for both models. Default ``context // 4``.
        progress: called after each of four measurements with (measurements done, 4).
    """
    stride = max(1, context // 4) if stride is None else stride
    gains = []
    for done, model in enumerate((teacher, student)):
        truncated = truncated_losses(model, tokens, context=context, start=start, stride=stride)
        if progress is not None:
            progress(2 * done + 1, 4)
        gains.append(truncated - token_losses(model, tokens, last=tokens.shape[1] - start))
        if progress is not None:
            progress(2 * done + 2, 4)
    return gain_ratio(*gains, context=context, start=start, stride=stride)


def truncated_losses(model: nn.Module, tokens: Tensor, *, context: int, start: int, stride: int = 1) -> Tensor:
    """Cross-entropy in nats of the tokens at positions ``start`` … T − 1, given only the last ``context`` before each.

    The text is read in overlapping pieces of ``context`` tokens, each from an empty cache, of which the last ``stride``
    predictions count. With ``stride=1`` every token sees exactly its last ``context`` tokens, at the price of
    ``context`` tokens read for each. A larger stride is an approximation that costs 1/``stride`` of that: the tokens of
    a piece see ``context − stride + 1`` to ``context``, evenly spread, so that cross-entropy comes out too high rather
    than too low.

    Args:
        model: see :func:`token_losses`.
        tokens: ``[N, T]`` int64, T > ``start``.
        context: tokens seen, ≥ 1. start: first position scored, ≥ ``context``. stride: 1 … ``context``.

    Returns:
        ``[N, T − start]`` float32 on the CPU.
    """
    check_tokens(tokens)
    length = tokens.shape[1]
    if not 1 <= stride <= context <= start:
        raise OptionError(f"stride={stride}, context={context}, start={start}: expected 1 ≤ stride ≤ context ≤ start.")
    if length <= start:
        raise ShapeError(f"tokens: got {length} tokens a window, expected more than start = {start}.")
    scored = length - start
    stride = min(stride, scored)
    # The last piece ends with the text; it scores some tokens again, of which the ones before it keep their scores.
    ends = [*range(start + stride, length, stride), length]
    pieces = torch.stack([tokens[:, end - context - 1 : end] for end in ends], 1)  # [N, M, context + 1]
    rows = max(1, TOKENS_AT_ONCE // context)
    losses = token_losses(model, pieces.flatten(0, 1), last=stride, rows=rows).view(len(tokens), len(ends), stride)
    rest = scored - stride * (len(ends) - 1)
    return torch.cat([losses[:, :-1].flatten(1), losses[:, -1, stride - rest :]], 1)


def gain_ratio(teacher: Tensor, student: Tensor, *, context: int, start: int, stride: int = 1) -> FarGain:
    """The far-gain ratio of per-token gains ``[N, L]`` at positions from ``start`` on; see :func:`far_gain`."""
    means = torch.stack([teacher.double().mean(1), student.double().mean(1)])  # [2, N]
    count = means.shape[1]
    sums = means.sum(1)
    ratio = (sums[1] / sums[0]).item() if sums[0] > 0 else math.nan
    error = math.nan
    if count > 1:
        left = sums[:, None] - means
        spread = (left[1] / left[0]).sub((left[1] / left[0]).mean()).square().sum()
        error = math.sqrt((count - 1) / count * spread.item()) if math.isfinite(ratio) else math.nan
    buckets = [mean_over(gains, first=start, start=start) for gains in (teacher, student)]
    return FarGain(buckets[0], buckets[1], ratio, error, context, stride)
