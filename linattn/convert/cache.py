"""The constant-size cache layer of a converted attention layer, in the shape transformers' caches expect."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from linattn.errors import StateError, UnsupportedError
from linattn.state import AttentionState

MAX_LOOKBACK = 512
"""Tokens that stay retractable while a cache records its past: an upper bound on a draft of assisted decoding."""
POSITION = torch.int32
"""Dtype of the ring's positions."""
SHARED = ("recent_k", "recent_v", "recent_far_k", "sink_k", "sink_v")
"""Tensors ``[N, ·, Hkv, ·]`` of a state that are the same for all query heads of a key/value head of the model."""


class LinattnCacheLayer(CacheLayerMixin):
    """The memory of one converted layer: an :class:`~linattn.AttentionState` instead of keys and values.

    It takes the place of a layer of any transformers cache and does all that generation asks of one: reordering and
    repeating for beam search, rollback for assisted decoding, offloading, and the length that masks are made from.
    ``update`` hands the new keys and values through; the attention function stores the state with :meth:`commit`.

    Attributes:
        state: the memory, or None before the first token. In a layer with ``per_head``, window and sinks have the heads
            of the model's keys, all else those of the queries (:func:`shared`).
        positions: ``[N, W]`` int32, the rotary positions of the state's ring, where the layer turns its keys back
            instead of holding them before rotary embedding too; else None.
        kept_positions: ``[N, M, Hkv]`` int32, those of the state's retained tokens beside them.
        seen: 0-dim int64 on the CPU, tokens seen including padding.
        record_past: keep recent tokens retractable until the next :meth:`crop`.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, record_past: bool = False) -> None:
        super().__init__()
        self.state: AttentionState | None = None
        self.positions: Tensor | None = None
        self.kept_positions: Tensor | None = None
        self.seen = torch.zeros((), dtype=torch.int64)
        self.record_past = record_past
        self.device: torch.device | None = None
        self._retractable = self._arrived = 0
        self._offloaded = False

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("batch_size is unknown before the first token")
        return self.state.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of the state and its positions: the same after 100 and after 100,000 tokens."""
        held = [t for t in (self.positions, self.kept_positions) if t is not None]
        positions = sum(t.numel() * t.element_size() for t in held)
        return 0 if self.state is None else self.state.nbytes + positions

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens; return keys and values as they came: older ones live in the state only."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        self.seen = self.seen + tokens
        self._arrived += tokens
        if self.record_past:
            self._retractable = min(self._retractable + tokens, MAX_LOOKBACK)
        return key_states, value_states

    @property
    def lookback(self) -> int:
        """Tokens the next state must be able to take back."""
        return self._retractable if self.record_past else 0

    @property
    def most_seen(self) -> float:
        """Tokens of a sequence at most, padding included; inf in a compiled graph, in which they are no number."""
        return math.inf if torch.compiler.is_compiling() else int(self.seen)

    def fetch(self, tokens: int, device: torch.device) -> AttentionState | None:
        """The state before the ``tokens`` that :meth:`update` has just counted, on ``device``.

        Raises:
            UnsupportedError: the attention module gave its new keys to another layer of the cache, or to none.
        """
        arrived, self._arrived = self._arrived, 0
        if arrived != tokens:
            raise UnsupportedError(
                f"A converted layer attends over {tokens} new tokens, of which its cache layer was given {arrived}. "
                "The model runs the layer several times a step, or caches its keys elsewhere; pass use_cache=False, or "
                "keep it softmax."
            )
        return None if self.state is None else self.state.to(device)

    def commit(
        self,
        state: AttentionState,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Store the state after the newest token; where the cache offloads, away from the accelerator.

        Args:
            positions: ``[N | 1, T]`` of the new tokens, where those of the ring are to be known.
            mask: ``[N, T]`` bool, True for real ones.
            scores: ``[N, T, Hkv]`` of them, where those of the retained tokens are to be known, too.
        """
        held = kept = None
        if positions is not None:
            positions = positions.to(POSITION)
            kept = None if scores is None else self._pool_positions(state, positions, mask, scores)
            held = self._ring_positions(state, positions, mask)
        self.state, self.positions, self.kept_positions = state, held, kept
        if self._offloaded:
            self._each_tensor(lambda state: state.to("cpu"), lambda held: held.to("cpu"))

    def _ring_positions(self, state: AttentionState, positions: Tensor, mask: Tensor | None) -> Tensor:
        held, ring = positions.expand(state.batch_size, -1), state.recent_k.shape[1]
        if self.positions is not None:
            held = torch.cat([self.positions.to(held.device), held], 1)
        if mask is not None:
            old = mask.new_ones(len(mask), held.shape[1] - mask.shape[1])
            held = held.gather(1, torch.cat([old, mask], 1).long().argsort(dim=1, stable=True))  # real tokens last
        return F.pad(held, [ring - held.shape[1], 0])  # the newest: a negative pad leaves out

    def _pool_positions(self, state: AttentionState, positions: Tensor, mask: Tensor | None, scores: Tensor) -> Tensor:
        """``[N, M, Hkv]`` positions of what ``state`` retains: the best of what it did and of what left the ring."""
        assert state.kept_score is not None
        count, tokens, heads = scores.shape
        new = positions.new_ones(count, tokens, dtype=torch.bool) if mask is None else mask
        index = new.cumsum(1) - 1
        best, held = scores, positions.expand(count, -1)
        old: Any = self.state
        if old is not None:
            assert self.positions is not None
            old, ring = old.to(scores.device), self.positions.to(scores.device)
            ages = old.length[:, None] - ring.shape[1] + torch.arange(ring.shape[1], device=scores.device)
            index = torch.cat([ages, old.length[:, None] + index], 1)
            new = torch.cat([ages >= old.folded[:, None], new], 1)
            best, held = torch.cat([old.recent_score, scores], 1), torch.cat([ring, held], 1)
        left = new & (index >= state.sinks) & (index < state.folded[:, None])
        best = best.masked_fill(~left[..., None], -math.inf)
        held = held[..., None].expand(-1, -1, heads)
        if old is not None:
            assert self.kept_positions is not None
            best = torch.cat([old.kept_score, best], 1)
            held = torch.cat([self.kept_positions.to(held.device), held], 1)
        if (missing := state.retained - best.shape[1]) > 0:
            best, held = F.pad(best, [0, 0, 0, missing], value=-math.inf), F.pad(held, [0, 0, 0, missing])
        chosen = best.argsort(dim=1, descending=True, stable=True)[:, : state.retained]
        # In order of age, empty ones last; the state's slots are in that order, wherever it has its empty ones.
        chosen = chosen + best.shape[1] * best.gather(1, chosen).isneginf()
        chosen = chosen.sort(1).values % best.shape[1]
        rank = ((~state.kept_score.isneginf()).cumsum(1) - 1).clamp_min(0)
        return held.gather(1, chosen).gather(1, rank)

    def _each_tensor(self, state: Callable[[AttentionState], AttentionState], held: Callable[[Tensor], Tensor]) -> None:
        """Change the memory: the state by ``state``, its positions by ``held``."""
        if self.state is not None:
            self.state = state(self.state)
        if self.positions is not None:
            self.positions = held(self.positions)
        if self.kept_positions is not None:
            self.kept_positions = held(self.kept_positions)

    def get_seq_length(self) -> int:
        if torch.compiler.is_compiling():
            return self.seen  # type: ignore[return-value]
        return int(self.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        self._offloaded = True
        self._each_tensor(lambda state: state.to("cpu"), lambda held: held.to("cpu"))

    def prefetch(self) -> None:
        if (device := self.device) is not None:
            self._each_tensor(lambda state: state.to(device), lambda held: held.to(device))

    def reset(self) -> None:
        self.state = self.positions = self.kept_positions = None
        self.is_initialized = False
        self.seen = torch.zeros_like(self.seen)
        self._retractable = self._arrived = 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last ``-tokens_to_remove`` tokens exactly, and settle the ones before them.

        Raises:
            StateError: a positive count, or more tokens than the layer kept retractable.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise StateError(
                f"crop({tokens_to_remove}): a length cannot be restored from a constant-size state; pass minus the "
                "number of tokens to take back."
            )
        self._retractable = 0
        if tokens_to_remove == 0 or self.state is None:
            return
        back = -tokens_to_remove
        self.state = self.state.rollback(back)
        if self.positions is not None:
            self.positions = F.pad(self.positions, [back, -back])
        self.seen = self.seen + tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._each_tensor(
            lambda state: state.select(indices), lambda held: held.index_select(0, indices.to(held.device))
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_tensor(lambda state: state.repeat(repeats), lambda held: held.repeat_interleave(repeats, dim=0))


def shared(state: AttentionState, repeats: int) -> AttentionState:
    """A state per query head, each key/value head of which comes ``repeats`` times, with window and sinks held once."""
    if repeats == 1:
        return state
    return _each_shared(state, lambda t: t[:, :, ::repeats].contiguous())


def held_bytes(*, repeats: int = 1, turns_back: bool = False, **sizes: Any) -> int:
    """Bytes that a cache holds of one layer for one sequence, of any length.

    Args:
        repeats: see :func:`shared`. turns_back: it holds positions by which keys are turned back, too.
        sizes: of the layer's state, as :meth:`AttentionState.empty` takes them.
    """
    state = AttentionState.empty(1, device="meta", **sizes)
    positions = sizes["window"] + sizes.get("retained", 0) * sizes["num_kv_heads"]
    return shared(state, repeats).nbytes + (positions * POSITION.itemsize if turns_back else 0)


def spread(state: AttentionState, repeats: int) -> AttentionState:
    """The state that :func:`shared` was given."""
    if repeats == 1:
        return state
    return _each_shared(state, lambda t: t.repeat_interleave(repeats, 2))


def _each_shared(state: AttentionState, change: Callable[[Tensor], Tensor]) -> AttentionState:
    changed: dict[str, Any] = {name: change(t) for name, t in state.tensors().items() if name in SHARED}
    return dataclasses.replace(state, **changed)


def decoder_cache(cache: Cache) -> Cache:
    """The self-attention part of a cache."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def detach(cache: Cache) -> None:
    """Cut a cache off from the graph that filled it: to what reads it next it is a constant.

    Raises:
        UnsupportedError: a layer of it holds more than a state, or keys and values.
    """
    layer: Any
    for layer in decoder_cache(cache).layers:
        if isinstance(layer, LinattnCacheLayer):
            layer.state = None if layer.state is None else layer.state.detach()
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedError(
                f"{type(layer).__name__}: what a layer that was left as it was remembers can be cut off from its "
                "gradients only where that is keys and values."
            )
        elif layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def adopt(cache: Cache, layer_idx: int) -> LinattnCacheLayer:
    """The converted layer of ``cache`` at ``layer_idx``, put in place of an empty layer of another kind if need be.

    Raises:
        StateError: there is no such layer, or it already holds keys and values of an unconverted layer.
    """
    cache = decoder_cache(cache)
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    if layer_idx >= len(cache.layers):
        raise StateError(
            f"past_key_values: has {len(cache.layers)} layers, the model asks for layer {layer_idx}: the cache "
            "of another model?"
        )
    current: Any = cache.layers[layer_idx]
    if isinstance(current, LinattnCacheLayer):
        return current
    if current.get_seq_length() > 0:
        raise StateError(
            f"past_key_values: layer {layer_idx} holds {int(current.get_seq_length())} tokens as keys and values "
            f"({type(current).__name__}), but the model's layer is converted and keeps an AttentionState. Start from "
            "an empty cache, or from one that this model filled."
        )
    layer = LinattnCacheLayer(record_past=getattr(current, "record_past", False))
    cache.layers[layer_idx] = layer
    return layer
