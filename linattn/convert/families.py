"""Model and config classes of converted models, made from the classes they extend when they are first needed.

``LinattnLlamaForCausalLM`` extends ``LlamaForCausalLM``, has the config class ``LinattnLlamaConfig`` with the model
type ``linattn_llama``, and differs in what generation, weight initialisation and loading need to know. Both are known
to the ``AutoConfig`` / ``AutoModel…`` classes from then on.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from linattn.convert.autoload import PREFIX
from linattn.convert.cache import adopt
from linattn.convert.hf import KEPT_ATTRIBUTE, NAME, ConvertedAttention
from linattn.errors import CheckpointError, UnsupportedError
from linattn.feature_maps import FeatureMap
from linattn.scores import TokenScore

CLASS_PREFIX = "Linattn"
_CLASSES: dict[type, Any] = {}


class ConvertedConfig:
    """Mixin of a converted model's config; ``linattn`` holds the :class:`ConversionPlan` as a dict."""


class ConvertedModel:
    """Mixin of a converted model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        from linattn.convert.plan import ConversionPlan
        from linattn.convert.swap import install

        plan = getattr(config, "linattn", None)
        if plan is None:
            raise CheckpointError(
                f"{type(self).__name__}: its config has no conversion plan (config.linattn); it was not written by "
                "linattn, or the plan was removed."
            )
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = None
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, ConversionPlan.from_dict(plan))  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):  # type: ignore[attr-defined]
            raise UnsupportedError(
                "output_attentions=True: a converted layer never forms the attention matrix. Use revert_model, or "
                "linattn.diagnostics on the queries and keys of a layer."
            )
        _refuse_context_parallelism()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            prepare_cache(self, cache)  # type: ignore[arg-type]
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return prepared

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, FeatureMap | ConvertedAttention | TokenScore):
            super()._init_weights(module)  # type: ignore[misc]
            return
        tensors = [*module.parameters(), *module.buffers()]
        loaded = [(t, t.detach().clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
        if len(loaded) == len(tensors):
            return
        with torch.no_grad():
            module.reset_parameters()
            for tensor, value in loaded:
                tensor.copy_(value)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the implementation of the layers that were kept softmax; converted layers stay converted."""
        behind = [m for m in self.modules() if hasattr(m, KEPT_ATTRIBUTE)]  # type: ignore[attr-defined]
        for module in behind:
            module.config._attn_implementation_internal = getattr(module, KEPT_ATTRIBUTE)
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        finally:
            chosen = [module.config._attn_implementation for module in behind]
            for module, implementation in zip(behind, chosen, strict=True):
                setattr(module, KEPT_ATTRIBUTE, implementation)
            for module in behind:
                module.config._attn_implementation_internal = NAME

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return _base_of(cls)._can_set_attn_implementation()


def prepare_cache(model: PreTrainedModel, cache: Cache) -> Cache:
    """Put the constant-size layers of ``model`` in place in an empty ``cache``; returns it."""
    for module in model.modules():
        if NAME in module._modules and isinstance(index := getattr(module, "layer_idx", None), int):
            adopt(cache, index)
    return cache


def _refuse_context_parallelism() -> None:
    """Raise under context or sequence parallelism, which would split a sequence over ranks unseen by the layers."""
    state = sys.modules.get("accelerate.state")
    parallelism = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    if parallelism is not None and (
        getattr(parallelism, "cp_enabled", False) or getattr(parallelism, "sp_enabled", False)
    ):
        raise UnsupportedError(
            "Context parallelism splits each sequence over ranks, and a converted layer would attend within its own "
            "part only. Use data, tensor or pipeline parallelism."
        )


def _config_class(base: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    return base.config_class or PreTrainedConfig


def _base_of(cls: type) -> Any:
    """The class a converted class extends."""
    return next(base for base in cls.__mro__ if base.__module__ != __name__)


def converted_model_class(base: type[PreTrainedModel]) -> Any:
    """``Linattn`` + ``base``: the class of a converted ``base``."""
    if base in _CLASSES:
        return _CLASSES[base]
    name = CLASS_PREFIX + base.__name__
    body = {
        "__module__": __name__,
        "__doc__": f"A :class:`{base.__name__}` with layers of linear attention.",
        "config_class": converted_config_class(_config_class(base)),
    }
    cls: Any = type(name, (ConvertedModel, base), body)
    _CLASSES[base] = cls
    _copy_weight_conversions(base.__name__, name)
    registry: Any = _CAN_RECORD_REGISTRY
    dict.__setitem__(registry, str(cls), cls._can_record_outputs)
    return cls


def converted_config_class(base: type[PreTrainedConfig]) -> Any:
    """``Linattn`` + ``base``: the config class of a converted model, known to ``AutoConfig``."""
    if base in _CLASSES:
        return _CLASSES[base]
    body = {
        "__module__": __name__,
        "__doc__": f"A :class:`{base.__name__}` with a conversion plan in ``linattn``.",
        "model_type": PREFIX + base.model_type,
    }
    cls: Any = type(CLASS_PREFIX + base.__name__, (ConvertedConfig, base), body)
    _CLASSES[base] = cls
    AutoConfig.register(cls.model_type, cls, exist_ok=True)
    _copy_weight_conversions(base.model_type, cls.model_type)
    return cls


@functools.cache
def register_model_type(model_type: str) -> bool:
    """Make the converted form of a model type known to transformers' Auto classes; False if there is no such type."""
    if model_type not in CONFIG_MAPPING:
        return False
    base = CONFIG_MAPPING[model_type]
    converted = converted_config_class(base)
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and base in mapping:
            models = mapping[base]
            models = models if isinstance(models, tuple | list) else (models,)
            registered = tuple(converted_model_class(model) for model in models)
            mapping.register(converted, registered if len(registered) > 1 else registered[0], exist_ok=True)
    if base in TOKENIZER_MAPPING:
        TOKENIZER_MAPPING.register(converted, TOKENIZER_MAPPING[base], exist_ok=True)
    return True


def _copy_weight_conversions(base: str, converted: str) -> None:
    """Checkpoints of a converted model go by the file layout of the family they come from."""
    mapping = get_checkpoint_conversion_mapping(base)
    if mapping is not None:
        register_checkpoint_conversion_mapping(converted, mapping, overwrite=True)


def __getattr__(name: str) -> type:
    """Converted classes by name, so that they can be pickled: ``families.LinattnLlamaForCausalLM``."""
    base = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        register_model_type(_config_class(base).model_type)
        return converted_model_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        register_model_type(base.model_type)
        return converted_config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
