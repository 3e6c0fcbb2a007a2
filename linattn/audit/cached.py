"""Reading with the cache against reading at once: two ways to the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linattn._modes import evaluating
from linattn.audit.memory import empty_cache
from linattn.audit.positions import check_tokens
from linattn.errors import OptionError


class CacheCheck(NamedTuple):
    """How the logits of a text read in chunks with the cache differ from those of one forward pass.

    Attributes:
        chunk: tokens read at a time; 1 is generation.
        difference: greatest absolute difference of a logit.
        spread: standard deviation of the logits, to read ``difference`` beside.
        agree: share of the positions at which both have the same most likely token.
        tokens: positions compared.
    """

    chunk: int
    difference: float
    spread: float
    agree: float
    tokens: int


@torch.no_grad()
def compare_cached(model: PreTrainedModel, tokens: Tensor, *, chunks: Sequence[int] = (1, 64)) -> list[CacheCheck]:
    """Compare one forward pass with reading in chunks from an empty cache.

    They differ by rounding, which a low-precision dtype makes visible: compare with what the teacher shows. Most likely
    tokens change where two are as likely as each other.

    Args:
        model: a causal model, converted or not.
        tokens: ``[N, T]`` int64. Of a converted model T should exceed ``window + retained + sinks``.
        chunks: sizes to read with.

    Raises:
        ShapeError, DtypeError: ``tokens`` is no ``[N, T]`` tensor of token ids.
        OptionError: a chunk size < 1, or none.
    """
    check_tokens(tokens)
    if not chunks or min(chunks) < 1:
        raise OptionError(f"chunks={tuple(chunks)}: expected one or more sizes ≥ 1.")
    ids = tokens.to(next(model.parameters()).device)
    found = []
    with evaluating(model):
        whole = model(ids, use_cache=False).logits
        for chunk in chunks:
            cache: Any = empty_cache(model)
            parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(chunk, dim=1)]
            logits = torch.cat(parts, 1)
            found.append(
                CacheCheck(
                    chunk,
                    (logits.float() - whole.float()).abs().max().item(),
                    whole.float().std().item(),
                    (logits.argmax(-1) == whole.argmax(-1)).double().mean().item(),
                    ids.numel(),
                )
            )
    return found
