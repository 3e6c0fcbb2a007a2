"""Read converted models and saved conversation states. Weights and states are safetensors; nothing is unpickled."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from linattn.convert import families
from linattn.convert.cache import LinattnCacheLayer, decoder_cache
from linattn.errors import CheckpointError, StateError
from linattn.state import AttentionState

STATE_FORMAT = "linattn-state-1"
POSITIONS = "positions"
KEPT_POSITIONS = "kept_positions"
"""Names of a ring's and of retained tokens' positions beside the tensors of their state."""


def load(path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a converted model that ``save_pretrained`` or ``push_to_hub`` wrote, with the class it had.

    After ``import linattn``, transformers' own ``AutoModelForCausalLM.from_pretrained(path)`` does the same.

    Args:
        path: a folder, or the id of a model on the Hugging Face hub.
        kwargs: as for ``from_pretrained``: ``dtype``, ``device_map``, ``revision`` and so on.

    Raises:
        CheckpointError: nothing readable is there, it was not written by linattn, or weights are missing or corrupt.
    """
    hub = {
        name: kwargs[name]
        for name in ("revision", "token", "cache_dir", "subfolder", "local_files_only")
        if name in kwargs
    }
    try:
        config = AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no readable model config there: {error}") from error
    if not isinstance(config, families.ConvertedConfig):
        raise CheckpointError(
            f"{path}: a model of type {config.model_type!r}, not one that linattn converted; load it with transformers "
            "and pass it to convert_model."
        )
    name = (getattr(config, "architectures", None) or [""])[0]
    try:
        cls = getattr(families, name)
    except AttributeError as error:
        raise CheckpointError(
            f"{path}: config.json names the class {name!r}, which transformers does not have."
        ) from error
    try:
        model, report = cls.from_pretrained(path, output_loading_info=True, **kwargs)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the weights cannot be read: {error}") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        raise CheckpointError(f"{path}: {len(missing)} weights are missing: {shown}")
    return model


def save_state(cache: Cache, path: str | PathLike[str]) -> None:
    """Write what a model remembers of a conversation (``past_key_values``) to a safetensors file.

    Args:
        cache: a cache that a converted model filled; layers kept softmax are saved with their keys and values.
        path: the file to write.

    Raises:
        StateError: the cache holds a layer that cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    every: list[Any] = decoder_cache(cache).layers
    for i, layer in enumerate(every):
        entry: dict[str, Any] = {"type": type(layer).__name__, "length": int(layer.get_seq_length())}
        if isinstance(layer, LinattnCacheLayer):
            state = layer.state
            held = {} if state is None else state.tensors()
            positions = {POSITIONS: layer.positions, KEPT_POSITIONS: layer.kept_positions}
            held |= {name: t for name, t in positions.items() if t is not None}
            entry["window"] = 0 if state is None else state.window
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            held = {} if layer.keys is None else {"keys": layer.keys, "values": layer.values}
            entry["sliding_window"] = getattr(layer, "sliding_window", None)
        else:
            raise StateError(f"cache: layer {i} is a {type(layer).__name__}, which save_state cannot write.")
        layers.append(entry)
        # Tensors of a state may share memory, which the format does not allow.
        tensors |= {f"layers.{i}.{name}": t.detach().cpu().clone().contiguous() for name, t in held.items()}
    save_file(tensors, path, metadata={"format": STATE_FORMAT, "layers": json.dumps(layers)})


def load_state(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> DynamicCache:
    """Read what :func:`save_state` wrote: a cache to pass as ``past_key_values``, bit-equal to the saved one.

    Raises:
        CheckpointError: there is no such file, it is corrupt, or it was not written by :func:`save_state`.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != STATE_FORMAT:
                raise CheckpointError(f"{path}: not a conversation state that linattn saved.")
            entries = json.loads(metadata["layers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [_load_layer(i, entry, tensors) for i, entry in enumerate(entries)]
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{Path(path)}: no readable conversation state there: {error}") from error
    return cache


def _load_layer(index: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    prefix = f"layers.{index}."
    held = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if entry["type"] == LinattnCacheLayer.__name__:
        layer = LinattnCacheLayer()
        if held:
            layer.positions, layer.kept_positions = (held.pop(name, None) for name in (POSITIONS, KEPT_POSITIONS))
            layer.state = AttentionState(**held, window=entry["window"])
            layer.lazy_initialization(layer.state.kv, layer.state.kv)
            layer.seen = torch.tensor(entry["length"], dtype=torch.int64)
        return layer
    window = entry["sliding_window"]
    kept: Any = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    if held:
        kept.lazy_initialization(held["keys"], held["values"])
        kept.keys, kept.values = held["keys"], held["values"]
    if window is not None:
        kept.cumulative_length = entry["length"]
    return kept
