"""Time and memory of a decoding step against the length of the text before it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linattn._modes import evaluating
from linattn.audit.memory import cache_bytes, empty_cache, read_into
from linattn.audit.positions import Progress
from linattn.errors import OptionError, ShapeError

WARM_UP = 3
"""Steps at each length before those that are timed."""


class DecodeSpeed(NamedTuple):
    """A decoding step after ``length`` tokens.

    Attributes:
        ms: median milliseconds of a step, from its token to its logits. fastest, slowest: of the same steps.
        steps: how many were timed.
        bytes: that the cache holds after ``length`` tokens, of all sequences together.
    """

    length: int
    ms: float
    fastest: float
    slowest: float
    steps: int
    bytes: int


@torch.no_grad()
def decode_speed(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    lengths: Sequence[int],
    steps: int = 16,
    batch: int = 1,
    progress: Progress | None = None,
) -> list[DecodeSpeed]:
    """Time single-token steps of a model, converted or not, with caches that hold a text of each length.

    The text is read into one cache that grows from length to length; steps are ``model(token, past_key_values=cache)``,
    as in generation without its bookkeeping.

    Args:
        model: a causal model.
        tokens: ``[T]`` int64, repeated where a length is longer.
        lengths: rising, with more than ``steps + 3`` tokens from one to the next.
        steps: timed at each length. batch: sequences that step together, all with the same text.
        progress: called with (lengths done, lengths in all).

    Raises:
        ShapeError: ``tokens`` is no ``[T]`` tensor.
        OptionError: ``lengths`` do not rise so; ``steps`` or ``batch`` < 1.
    """
    if tokens.ndim != 1 or not len(tokens):
        raise ShapeError(f"tokens: got shape {tuple(tokens.shape)}, expected [T] with T ≥ 1.")
    if steps < 1 or batch < 1:
        raise OptionError(f"steps={steps}, batch={batch}: expected both ≥ 1.")
    taken = steps + WARM_UP
    if not lengths or any(b <= a + taken for a, b in zip((-taken, *lengths), lengths, strict=False)):
        raise OptionError(
            f"lengths={tuple(lengths)}: expected rising numbers, each more than steps + {WARM_UP} = {taken} above the "
            "one before."
        )
    device = next(model.parameters()).device
    text = tokens.to(device)[torch.arange(lengths[-1] + taken, device=device) % len(tokens)].expand(batch, -1)
    cache: Any = empty_cache(model)
    found: list[DecodeSpeed] = []
    read = 0
    with evaluating(model):
        for length in lengths:
            read_into(model, cache, text[:, read:length])
            held, times = sum(cache_bytes(cache)), []
            for at in range(length, length + taken):
                _wait(device)
                start = time.perf_counter()
                model(text[:, at : at + 1], past_key_values=cache, use_cache=True)
                _wait(device)
                times.append(1000 * (time.perf_counter() - start))
            read = length + taken
            timed = times[WARM_UP:]
            found.append(DecodeSpeed(length, statistics.median(timed), min(timed), max(timed), steps, held))
            if progress is not None:
                progress(len(found), len(lengths))
    return found


def faster_from(teacher: Sequence[DecodeSpeed], student: Sequence[DecodeSpeed]) -> int | None:
    """The first measured length from which on every measured step of the student is faster; None without one.

    Raises:
        OptionError: the two were measured at different lengths.
    """
    if [a.length for a in teacher] != [b.length for b in student]:
        raise OptionError("teacher, student: expected the same lengths in the same order.")
    first = None
    for a, b in zip(reversed(teacher), reversed(student), strict=True):
        if not b.ms < a.ms:
            break
        first = b.length
    return first


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
