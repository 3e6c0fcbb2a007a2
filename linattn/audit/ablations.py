"""A converted model without one of its parts, for a while: what the part was worth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from linattn.convert import ConvertedAttention
from linattn.errors import ConversionError, UnsupportedError
from linattn.feature_maps import SequenceMap


def far_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Delete the far branch while the context lasts: what is attended exactly stays, with the same weights.

    As with all ablations here: only converted layers change, one kept softmax, within a window or not, stays as it is;
    on exit, also by an exception, every layer is as it was; caches do not carry over from one form to another;
    ablations nest.

    Raises:
        ConversionError: the model has no converted layer.
        UnsupportedError: a layer's feature map replaces the attention as a whole and has no branches.
    """
    return _switched(model, far=False)


def near_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Take all that is attended exactly away while the context lasts: the far branch reads every token.

    See :func:`far_off`.
    """
    return _switched(model, window=0, sinks=0, retained=0)


def retained_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Retain no tokens while the context lasts: the far branch reads all behind the window. See :func:`far_off`."""
    return _switched(model, retained=0)


def attention_off(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Converted layers attend to nothing while the context lasts: their output is zero. See :func:`far_off`."""
    return _switched(model, far=False, window=0, sinks=0, retained=0)


def converted_layers(model: nn.Module) -> list[ConvertedAttention]:
    """The converted attention of ``model``, in module order, without layers left softmax within a window.

    Raises:
        ConversionError: it has none.
        UnsupportedError: a layer's feature map replaces the attention as a whole and has no branches.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvertedAttention) and not module.bound]
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no converted layer; call convert_model first.")
    for layer in layers:
        if isinstance(layer.feature_map, SequenceMap):
            raise UnsupportedError(
                f"{type(layer.feature_map).__name__} replaces the attention as a whole: there is no near or far branch "
                "to take away. Audit a model converted with a map that has per-token features."
            )
    return layers


@contextlib.contextmanager
def _switched(model: nn.Module, **values: Any) -> Iterator[None]:
    """Give the converted layers other ``values`` of their attributes; a layer left with no part answers zero."""
    layers = converted_layers(model)
    before = [({name: getattr(layer, name) for name in values}, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            _set(layer, values)
            if not (layer.far or layer.window or layer.sinks):
                layer.__dict__["forward"] = _nothing
        yield
    finally:
        for layer, (old, forward) in zip(layers, before, strict=True):
            _set(layer, old)
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward


def _set(layer: ConvertedAttention, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(layer, name, value)


def _nothing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention over no token: ``[B, T, H, V]`` zeros."""
    return v.new_zeros(*q.shape[:-1], v.shape[-1])
