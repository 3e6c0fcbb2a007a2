"""A language model in two parts, so that the logits of a long text need not stand in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_AT_ONCE = 2**25
"""Logits that stand in memory as float32 at a time."""


@torch.no_grad()
def body_and_head(model: Any, sample: Tensor) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Functions ids ``[B, T]`` → hidden → logits: the output embedding apart where ``sample`` shows that it is all.

    A model that does more to its logits (a softcap, a scale) forms them whole in the first, in its own dtype. The first
    takes a cache too, which it reads and fills.
    """

    def whole(ids: Tensor, cache: Any = None) -> Tensor:
        return model(ids, **_with(cache)).logits

    base = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if base is model or not isinstance(head, nn.Linear):
        return whole, _same

    def body(ids: Tensor, cache: Any = None) -> Tensor:
        return base(ids, **_with(cache)).last_hidden_state

    # A softcap or a scale on the logits shows as a difference: the same operations would give the same bits.
    hidden = getattr(base(sample, use_cache=False), "last_hidden_state", None)
    return (body, head) if hidden is not None and torch.equal(head(hidden), whole(sample)) else (whole, _same)


def tokens_at_once(head: Any, hidden: Tensor, *, copies: int = 1) -> int:
    """Tokens of ``hidden [..., d]`` whose logits, so many times over, are at most ``LOGITS_AT_ONCE``; at least one."""
    return max(1, LOGITS_AT_ONCE // copies // (head.out_features if isinstance(head, nn.Linear) else hidden.shape[-1]))


def _with(cache: Any) -> dict[str, Any]:
    return {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}


def _same(logits: Tensor) -> Tensor:
    return logits
