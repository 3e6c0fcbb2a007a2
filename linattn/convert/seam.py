"""Find the attention layers of a transformers model by structure: who goes through the attention interface, and how.

A class goes through it when its ``forward`` looks up ``ALL_ATTENTION_FUNCTIONS``. Sizes are read off the module; names
vary by family.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from linattn.convert.plan import LINEAR, LayerPlan
from linattn.errors import ConversionError

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_LINEAR = re.compile(
    r"mamba|rwkv|deltanet|lightning|linear_?attn|linear_?attention|mixer2?$|rglru|retention", re.IGNORECASE
)
_CROSS = re.compile(r"cross_?att|encoder_attn|encdec", re.IGNORECASE)
_OWN_MASK = re.compile(r"attention_mask\s*=(?!=|\s*(?:encoder_attention_mask|None|attention_mask\s*[,)\n]))")
_PARTS = re.compile(r"norm|output|embedding|pool|dropout|layer$|block$|rotary|indexer|feedforward|mlp", re.IGNORECASE)


def find_attention(model: PreTrainedModel) -> Iterator[tuple[LayerPlan, nn.Module]]:
    """Every attention layer of ``model``, in module order: its entry in a plan, not yet decided, and its module.

    Layers that cannot be converted come with ``supported=False`` and the reason.

    Raises:
        ConversionError: ``model`` is no transformers model, has no attention at all, or is converted already.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(
            f"model: got {type(model).__name__}, expected a transformers PreTrainedModel (of a peft model, pass "
            "model.get_base_model())."
        )
    modules = list(model.named_modules())
    if any("linattn" in module._modules for _, module in modules):
        raise ConversionError(f"{type(model).__name__} is converted already; call revert_model(model) first.")
    found = [(path, module) for path, module in modules if _is_attention(module)]
    # A class that only wraps an attention layer is not one.
    found = [(path, m) for path, m in found if not any(p.startswith(path + ".") for p, _ in found if p != path)]
    if not found:
        raise ConversionError(f"{type(model).__name__} has no attention layer that linattn knows by its structure.")
    for index, (path, module) in enumerate(found):
        yield _describe(index, path, module, model.config), module


def goes_through_interface(module: nn.Module) -> bool:
    """Whether the module's ``forward`` looks its attention function up where linattn can answer."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and INTERFACE in code.co_names


def _is_attention(module: nn.Module) -> bool:
    if goes_through_interface(module):
        return True
    name = type(module).__name__
    if isinstance(module, PreTrainedModel) or next(module.parameters(), None) is None or _PARTS.search(name):
        return False
    return bool(_ATTENTION.search(name) or _LINEAR.search(name))


def _describe(index: int, path: str, module: nn.Module, model_config: Any) -> LayerPlan:
    layer = LayerPlan(index, path, type(module).__name__, kind="keep")
    config = getattr(module, "config", model_config)
    layer.reason = _obstacle(path, module, config, model_config)
    if layer.reason:
        layer.supported = False
        return layer
    layer.head_dim = _head_dim(module, config)
    layer.heads, layer.kv_heads = _heads(module, config, layer.head_dim)
    if not (layer.heads and layer.kv_heads and layer.head_dim):
        layer.supported, layer.reason = False, "its number of heads or their size cannot be read off the module"
        return layer
    layer.scale = _scale(module, layer.head_dim)
    layer.causal = bool(getattr(module, "is_causal", True))
    layer.native_window = _native_window(module, config)
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        layer.notes.append(f"softcap {softcap:g} stays on the exact part")
    if _dropout(module) > 0:
        layer.notes.append("attention dropout is not applied")
    return layer


def _obstacle(path: str, module: nn.Module, config: Any, model_config: Any) -> str:
    """Why a layer cannot be converted, and what to do instead; empty if it can."""
    name = type(module).__name__
    if _LINEAR.search(name) and not goes_through_interface(module):
        return LINEAR
    if not goes_through_interface(module):
        return (
            "computes its own softmax, where transformers' attention interface cannot be answered; keep it softmax, or "
            f"let its class call {INTERFACE}"
        )
    if getattr(model_config, "is_encoder_decoder", False):
        return (
            "belongs to an encoder-decoder, whose cross attention has no causal memory; convert an encoder or a decoder"
        )
    if (
        getattr(module, "is_cross_attention", False)
        or "CrossAttention" in name
        or _CROSS.search(path.rpartition(".")[2])
    ):
        return "is cross attention: its keys come from another sequence; keep it softmax"
    if any(hasattr(module, part) for part in ("kv_b_proj", "kv_a_proj_with_mqa", "kv_lora_rank")):
        return "is latent attention (MLA), which caches a compressed key already; keep it softmax"
    if any(hasattr(module, part) for part in ("relative_attention_bias", "rel_pos_bias", "relative_position_bias")):
        return "adds a relative position bias to every pair of tokens; keep it softmax"
    if "alibi" in inspect.signature(inspect.unwrap(type(module).forward)).parameters:
        return "adds ALiBi biases to every pair of tokens; keep it softmax"
    if hasattr(module, "indexer"):
        return "attends sparsely by an indexer; keep it softmax"
    if _layer_type(module, config) == "chunked_attention":
        return "attends within fixed chunks; keep it softmax"
    if getattr(module, "is_kv_shared_layer", False) or getattr(module, "store_full_length_kv", False):
        return "shares all its keys and values with other layers; keep it softmax"
    if _OWN_MASK.search(_source(module)):
        return "makes a mask of its own, one value per pair of tokens; keep it softmax"
    return ""


def _source(module: nn.Module) -> str:
    """Source of the module's ``forward``; empty where there is none to read."""
    try:
        return inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return ""


def _first(module: nn.Module, *names: str) -> int:
    return next((int(value) for name in names if isinstance(value := getattr(module, name, None), int)), 0)


def _head_dim(module: nn.Module, config: Any) -> int:
    named = _first(module, "head_dim", "head_size", "attention_head_size")
    return named or int(getattr(config, "head_dim", None) or 0)


def _heads(module: nn.Module, config: Any, head_dim: int) -> tuple[int, int]:
    """Query and key/value heads: from the key projection where there is one, else from what the module says.

    The query projection is no witness: it may carry a gate beside the queries.
    """
    groups = _first(module, "num_key_value_groups") or 1
    keys = next(
        (p for name in ("k_proj", "k_lin", "key") if isinstance(p := getattr(module, name, None), nn.Linear)), None
    )
    if keys is not None and head_dim:
        kv_heads = keys.out_features // head_dim
        return kv_heads * groups, kv_heads
    heads = _first(module, "num_heads", "num_attention_heads", "n_heads")
    heads = heads or int(getattr(config, "num_attention_heads", 0))
    return heads, heads // groups


def _scale(module: nn.Module, head_dim: int) -> float:
    """The softmax scale the module passes on: 1 where the queries are scaled before."""
    if re.search(r"\bscaling=1(\.0*)?\b", _source(module)):
        return 1.0
    scaling = getattr(module, "scaling", None)
    return float(scaling) if isinstance(scaling, int | float) else head_dim**-0.5


def _layer_type(module: nn.Module, config: Any) -> str | None:
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    return types[index] if types and isinstance(index, int) and index < len(types) else None


def _native_window(module: nn.Module, config: Any) -> int | None:
    if hasattr(module, "sliding_window"):
        return module.sliding_window  # type: ignore[return-value]
    layer_type = _layer_type(module, config)
    if layer_type is None or layer_type == "sliding_attention":
        return getattr(config, "sliding_window", None)
    return None


def _dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(module, name, None)
        value = value.p if isinstance(value, nn.Dropout) else value
        if isinstance(value, int | float):
            return float(value)
    return 0.0
