"""The bytes a model's memory of a text takes, and the sliding window that takes as many."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from linattn._modes import evaluating
from linattn.audit.ablations import converted_layers
from linattn.convert import (
    ConversionPlan,
    ConvertedAttention,
    LayerPlan,
    LinattnCacheLayer,
    convert_model,
    prepare_cache,
    revert_model,
)
from linattn.convert.cache import held_bytes
from linattn.errors import OptionError, StateError

PROBE = 32
"""Tokens that a model is given to see what its cache holds of them."""
READ_AT_ONCE = 2048
"""Tokens of a sequence that are read into a cache at a time."""
LONGEST = 2**30
"""Tokens up to which a length is looked for."""


class StateBytes(NamedTuple):
    """Bytes that one sequence of ``length`` tokens leaves in the cache of a model.

    Attributes:
        linear: states of the converted layers and of those left softmax within a window (``softmax_window``), the same
            at every length: rings and pools of retained tokens are of full size from the first token on.
        softmax: keys and values of the other layers kept softmax; of those with a sliding window, up to it.
        length: tokens of the sequence.
    """

    linear: int
    softmax: int
    length: int

    @property
    def total(self) -> int:
        return self.linear + self.softmax

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "total": self.total}


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes that a cache holds now: in states, and in keys and values, as :class:`StateBytes` tells them apart."""
    linear = softmax = 0
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, LinattnCacheLayer):
            linear += layer.nbytes
        elif (keys := getattr(layer, "keys", None)) is not None:
            softmax += sum(t.numel() * t.element_size() for t in (keys, layer.values))
    return linear, softmax


def state_bytes(model: PreTrainedModel, length: int, *, probe: int = PROBE) -> StateBytes:
    """Bytes of memory per sequence of ``length`` tokens, converted or not.

    Measured from the cache that the model fills with ``probe`` tokens, and compared there with the formula: of a layer
    with a state, the tensors of an :class:`~linattn.AttentionState` of its sizes; of another, the bytes of a token's
    key and value times the tokens. The formula then gives the bytes at ``length``.

    Args:
        model: a causal model. length: tokens, ≥ 1.
        probe: tokens to measure with; ``probe = length`` measures the very thing, at the price of reading so many.

    Raises:
        OptionError: ``length`` or ``probe`` < 1.
        StateError: the cache does not hold what the formula says: the bytes at ``length`` would be a guess.
    """
    if length < 1 or probe < 1:
        raise OptionError(f"length={length}, probe={probe}: expected both ≥ 1.")
    return _measured(model, probe).at(length)


def cheaper_from(teacher: PreTrainedModel, student: PreTrainedModel) -> int | None:
    """The length in tokens from which the student's memory takes fewer bytes than the teacher's; None if it never does.

    Raises:
        StateError: see :func:`state_bytes`.
    """
    a, b = _measured(student, PROBE), _measured(teacher, PROBE)
    lengths = range(1, LONGEST + 1)
    # What the teacher adds per token the student adds at most, so that there is one crossing.
    first = bisect.bisect_left(lengths, True, key=lambda length: a.at(length).total < b.at(length).total)
    return lengths[first] if first < len(lengths) else None


class _Growth(NamedTuple):
    """Bytes of a cache as a function of length: of the states, and per token of each softmax layer, up to its limit."""

    linear: int
    per_token: list[tuple[int, int | None]]

    def at(self, length: int) -> StateBytes:
        softmax = sum(size * (length if limit is None else min(length, limit)) for size, limit in self.per_token)
        return StateBytes(self.linear, softmax, length)


def empty_cache(model: PreTrainedModel) -> Cache:
    """A cache that ``model``, converted or not, has yet to fill."""
    return prepare_cache(model, DynamicCache(config=model.config))


@torch.no_grad()
def read_into(model: PreTrainedModel, cache: Cache, ids: Tensor) -> None:
    """Let ``model`` read ``ids`` ``[B, T]`` into ``cache``, ``READ_AT_ONCE`` tokens at a time, without the logits."""
    for part in ids.split(READ_AT_ONCE, dim=1):
        model.base_model(part, past_key_values=cache, use_cache=True)


@torch.no_grad()
def _measured(model: PreTrainedModel, probe: int) -> _Growth:
    """How the cache of ``model`` grows, from what it holds after ``probe`` tokens, checked against the formula."""
    _settle(model)
    cache = _probed(model, probe)
    per_token: list[tuple[int, int | None]] = []
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, LinattnCacheLayer) or getattr(layer, "keys", None) is None:
            continue
        held = [t for t in (layer.keys, layer.values) if t.shape[-2]]
        size = sum(t.numel() * t.element_size() // t.shape[-2] for t in held)
        # A sliding layer keeps what the next token sees besides itself.
        per_token.append((size, layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None))
    converted = any(isinstance(layer, LinattnCacheLayer) for layer in cache.layers)
    growth = _Growth(_linear_bytes(model) if converted else 0, per_token)
    measured, (linear, softmax, _) = cache_bytes(cache), growth.at(probe)
    if measured != (linear, softmax):
        raise StateError(
            f"After {probe} tokens the cache of {type(model).__name__} holds {measured[0]} bytes of states and "
            f"{measured[1]} of keys and values, where {linear} and {softmax} were expected; fill a cache with as many "
            "tokens as you mean and measure it with cache_bytes."
        )
    return growth


def equal_bytes_plan(student: PreTrainedModel, *, length: int | None = None, by_layer: bool = False) -> ConversionPlan:
    """The conversion to sliding windows with sinks, and nothing else, that takes at most the student's bytes.

    All converted layers have the student's sinks and one window: the largest with which their states take together no
    more bytes than the student's, retained tokens and their scores included. The layers that the student keeps softmax
    are kept as they are, those bound to a window with it, so that this holds for texts of any length. Given a
    ``length``, they become windows too, and their keys and values of so many tokens, or their states, count among the
    bytes to spend. A layer with a sliding window of its own gets no larger one than that.

    With ``by_layer`` each layer has a window of its own, that which takes its state's bytes: the control of a student
    whose layers differ, or retain tokens, which says what far branches and retained tokens are worth where the other
    says what the whole layout is.

    ``convert_model(teacher, plan=equal_bytes_plan(student))``, in the student's dtype, is the control: it trains, saves
    and loads like any converted model. :func:`equal_bytes_control` makes the untrained one for a while.

    Raises:
        ConversionError: ``student`` is not converted.
        OptionError: the student's states are smaller than those of windows of one token; ``length`` < 1, or given
            ``by_layer``, which has no use for it.
    """
    if length is not None and (length < 1 or by_layer):
        raise OptionError(f"length: got {length}, expected a number of tokens ≥ 1, and none with by_layer.")
    layers = converted_layers(student)
    _settle(student)
    budgets, dtype = [_layer_bytes(student, layer) for layer in layers], _dtype(student, layers[0])
    budget = sum(budgets)
    plan = ConversionPlan.from_dict(student.config.linattn)
    sinks, distance = plan.farthest_sinks
    for layer in plan.kept if length else ():
        if layer.supported and layer.native_window is None:
            pairs = 2 * layer.kv_heads * layer.head_dim * dtype.itemsize * (length or 0)
            budget += _window_bytes(layer, layer.window, dtype, layer.retained) if layer.kind == "bound" else pairs
            if layer.kind == "keep":
                layer.sinks, layer.sink_distance = sinks, distance
            layer.kind, layer.reason = "convert", ""

    def largest(entries: list[LayerPlan], budget: int) -> int:
        """The largest window that ``entries`` can have for so many bytes together."""
        none, one = (sum(_window_bytes(layer, window, dtype) for layer in entries) for window in (0, 1))
        if (window := (budget - none) // (one - none)) < 1:
            raise OptionError(f"student: its states take {budget} bytes, windows of one token {one}: no control.")
        return window

    entries = plan.converted
    for layer in entries:
        layer.feature_map, layer.feature_map_options, layer.decay, layer.far_rope = None, {}, None, True
        layer.retained, layer.retained_distance, layer.per_head = 0, None, False
    groups = (
        [([entry], each) for entry, each in zip(entries, budgets, strict=True)] if by_layer else [(entries, budget)]
    )
    for group, bytes_ in groups:
        window = largest(group, bytes_)
        for layer in group:
            layer.window = window if layer.native_window is None else min(window, layer.native_window)
    return plan


@contextlib.contextmanager
def equal_bytes_control(
    teacher: PreTrainedModel, student: PreTrainedModel, *, length: int | None = None, by_layer: bool = False
) -> Iterator[PreTrainedModel]:
    """``teacher`` as :func:`equal_bytes_plan` of ``student`` makes it, untrained, while the context lasts.

    Raises:
        ConversionError: ``teacher`` is converted, or no model like the one the student was made of.
    """
    control = convert_model(teacher, plan=equal_bytes_plan(student, length=length, by_layer=by_layer))
    try:
        yield control
    finally:
        revert_model(control)


@torch.no_grad()
def _probed(model: PreTrainedModel, tokens: int) -> Cache:
    """What the cache of ``model`` holds after so many tokens."""
    cache = empty_cache(model)
    device = next(model.parameters()).device
    with evaluating(model):
        model(torch.zeros(1, tokens, dtype=torch.int64, device=device), past_key_values=cache, use_cache=True)
    return cache


def _settle(model: PreTrainedModel) -> None:
    """Have every converted layer know what its states hold: where only its first call can tell, by calling it."""
    if any(isinstance(layer, ConvertedAttention) and layer.keeps_far_keys is None for layer in model.modules()):
        _probed(model, PROBE)


def _linear_bytes(model: PreTrainedModel) -> int:
    """Bytes of all states, by formula."""
    converted_layers(model)  # whose feature maps have states
    _settle(model)
    return sum(_layer_bytes(model, layer) for layer in model.modules() if isinstance(layer, ConvertedAttention))


def _layer_bytes(model: PreTrainedModel, layer: ConvertedAttention) -> int:
    phi = layer.feature_map
    return held_bytes(
        num_kv_heads=phi.num_kv_heads,
        feature_dim=phi.feature_dim if layer.far else 0,
        head_dim=phi.head_dim,
        window=layer.window,
        sinks=layer.sinks,
        retained=layer.retained,
        far_head_dim=phi.head_dim if layer.turns_keys and layer.keeps_far_keys else None,
        decay=layer.far and layer.decay is not None,
        dtype=_dtype(model, layer),
        repeats=layer.repeats,
        turns_back=layer.turns_keys and not layer.keeps_far_keys,
    )


def _dtype(model: nn.Module, layer: ConvertedAttention) -> torch.dtype:
    """Of the keys and values of a converted layer, which one without a far branch has no tensor to tell by."""
    if layer.far_bias is not None:
        return layer.far_bias.dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _window_bytes(layer: LayerPlan, window: int, dtype: torch.dtype, retained: int = 0) -> int:
    """Bytes of the state of a sliding window with the sinks of ``layer``."""
    return held_bytes(
        num_kv_heads=layer.state_heads,
        feature_dim=0,
        head_dim=layer.head_dim,
        window=window,
        sinks=layer.sinks,
        retained=retained,
        dtype=dtype,
        repeats=layer.repeats,
    )
