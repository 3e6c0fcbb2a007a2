"""Convert a transformers model in place, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from linattn.convert.families import (
    CLASS_PREFIX,
    ConvertedModel,
    _base_of,
    converted_config_class,
    converted_model_class,
    register_model_type,
)
from linattn.convert.hf import (
    CACHE_ATTRIBUTE,
    KEPT_ATTRIBUTE,
    NAME,
    ROTATED_ATTRIBUTE,
    ROTATION_ATTRIBUTE,
    ConvertedAttention,
    Handover,
    hand_over,
)
from linattn.convert.plan import ConversionPlan, LayerPlan, MapSpec, plan_model
from linattn.convert.rotary import FAR_ROPE, ROTARY_ATTRIBUTE, TURNS_ATTRIBUTE, angles_for, embedding_of, rotary_of
from linattn.convert.seam import find_attention
from linattn.errors import CheckpointError, ConversionError, OptionError

Model = TypeVar("Model", bound=PreTrainedModel)

_QUANTIZED = ("hf_quantizer", "is_quantized", "quantization_method")
_DROPPED = "_linattn_dropped"


def convert_model(
    model: Model,
    *,
    feature_map: MapSpec = "hedgehog",
    window: int | Sequence[int] = 128,
    sinks: int = 4,
    retained: int | Sequence[int] = 0,
    recency: float = 0.002,
    decay: str | None = None,
    per_head: bool | Sequence[bool] = False,
    far_rope: bool = True,
    sink_distance: int | None = None,
    retained_distance: int | None = None,
    feature_map_options: dict[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    keep_softmax: Iterable[int] = (),
    softmax_window: int | Sequence[int] | None = None,
    native_sliding: str = "keep",
    on_unsupported: str = "error",
    plan: ConversionPlan | None = None,
) -> Model:
    """Replace the softmax attention of a transformers model by linear attention, in place.

    Every layer that goes through transformers' attention interface attends ``window`` recent tokens, ``sinks`` first
    ones and the ``retained`` best-scored ones between exactly, and the rest through a feature map (see
    :func:`linattn.kernels.kernel_attention`). For sequences of up to ``window + retained + sinks`` tokens
    (bidirectional: ``window``; the least sum of all layers) the logits are the original's. Projections, rotary
    embedding, norms, softcaps, learned sink logits, tied weights, dtype and device stay as they are; the new
    parameters live in ``<attention>.linattn``. The model's class becomes a subclass of the one it had, and its cache
    a constant-size one.

    Args:
        model: any ``PreTrainedModel`` whose attention goes through the interface, causal or bidirectional.
        plan: a :class:`ConversionPlan` to carry out, instead of the other arguments, which say what
            :func:`plan_model` says they do.

    Returns:
        ``model``, converted.

    Raises:
        ConversionError: the model, or one of its layers, cannot be converted as asked; the model is unchanged.
        OptionError, FeatureMapError: an option is outside its domain; the model is unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from linattn import convert_model, revert_model
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2)
        >>> model = convert_model(LlamaForCausalLM(config), feature_map="elu", window=16)
        >>> type(model).__name__
        'LinattnLlamaForCausalLM'
        >>> type(revert_model(model)).__name__
        'LlamaForCausalLM'
    """
    options: dict[str, Any] = {
        "feature_map": feature_map,
        "window": window,
        "sinks": sinks,
        "retained": retained,
        "recency": recency,
        "decay": decay,
        "per_head": per_head,
        "far_rope": far_rope,
        "sink_distance": sink_distance,
        "retained_distance": retained_distance,
        "feature_map_options": feature_map_options,
        "layers": layers,
        "keep_softmax": keep_softmax,
        "softmax_window": softmax_window,
        "native_sliding": native_sliding,
        "on_unsupported": on_unsupported,
    }
    if plan is None:
        plan = plan_model(model, **options)
    else:
        defaults = convert_model.__kwdefaults__ or {}
        if changed := [name for name, value in options.items() if value != defaults[name]]:
            raise OptionError(f"plan: it settles {', '.join(changed)} already; edit plan.layers instead.")
        plan = copy.deepcopy(plan)
        _check_fit(model, plan)

    for submodel in _submodels(model):
        converted_model_class(type(submodel))
    register_model_type(model.config.model_type)
    # Everything that can fail has been tried once the layers are built; installing them only sets attributes.
    children = {layer.path: _build(layer, model) for layer in plan.replaced}
    configs = _own_configs(model, plan)
    setattr(model, _DROPPED, _drop_gguf_quantizer(model))
    _attach(model, plan, children)
    for config in configs:
        config._attn_implementation_internal = NAME
    return model


def revert_model(model: Model) -> Model:
    """Undo :func:`convert_model` in place: classes, config and attention as they were; learned maps are dropped.

    Raises:
        ConversionError: ``model`` is not converted.
    """
    if not isinstance(model, ConvertedModel):
        raise ConversionError(f"{type(model).__name__} is not a model converted by linattn.")
    implementation = {}
    for module in model.modules():
        kept = module.__dict__.pop(KEPT_ATTRIBUTE, None)
        attributes = (CACHE_ATTRIBUTE, ROTATION_ATTRIBUTE, ROTATED_ATTRIBUTE, ROTARY_ATTRIBUTE, TURNS_ATTRIBUTE)
        for name in attributes:
            module.__dict__.pop(name, None)
        if kept is None:
            continue
        implementation[id(module.config)] = (module.config, kept)
        if NAME in module._modules:
            _remove_hook(module)
            del module._modules[NAME]
    for config, kept in implementation.values():
        config._attn_implementation_internal = kept
    config = model.config
    del config.linattn
    for submodel in _submodels(model):
        submodel.__class__ = _base_of(type(submodel))
    _set_config_class(config, _base_of(type(config)))
    config.architectures = [name.removeprefix(CLASS_PREFIX) for name in config.architectures or []] or None
    dropped = model.__dict__.pop(_DROPPED, {})
    if "quantization_config" in dropped:
        config.quantization_config = dropped.pop("quantization_config")
    for name, value in dropped.items():
        setattr(model, name, value)
    return model


def install(model: PreTrainedModel, plan: ConversionPlan) -> None:
    """Convert a model that is being built from its saved config, before its weights are loaded."""
    try:
        plan.check()
        paths = {layer.path: _resolve(model, layer.path) for layer in plan.layers}
        for layer in plan.layers:
            layer.path = paths[layer.path]
        children = {layer.path: _build(layer, model) for layer in plan.replaced}
    except (ConversionError, OptionError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint's conversion plan does not fit {type(model).__name__}: {error}"
        ) from error
    for submodel in _submodels(model):
        converted_model_class(_base_of(type(submodel)))
    _attach(model, plan, children)
    for layer in plan.replaced:
        _config(model, layer.path)._attn_implementation_internal = NAME


def _attach(model: PreTrainedModel, plan: ConversionPlan, children: dict[str, ConvertedAttention]) -> None:
    """Hang the built layers in, mark those kept, and give the models the classes that know of them."""
    switched = {id(_config(model, path)) for path in children}
    for layer in plan.layers:
        config = _config(model, layer.path)
        if id(config) in switched:
            setattr(model.get_submodule(layer.path), KEPT_ATTRIBUTE, config._attn_implementation)
    for path, child in children.items():
        module = model.get_submodule(path)
        module.add_module(NAME, child)
        module.__dict__[CACHE_ATTRIBUTE] = Handover()
        if not child.far_rope or angles_for(child) is not None:
            _attach_rotary(model, path, child)
        module.register_forward_pre_hook(hand_over, with_kwargs=True)
    for submodel in _submodels(model):
        if not isinstance(submodel, ConvertedModel):
            submodel.__class__ = converted_model_class(type(submodel))


def _attach_rotary(model: PreTrainedModel, path: str, child: ConvertedAttention) -> None:
    """Hand the module that makes a layer's angles over; without one, the layer's states keep the keys it would need."""
    asked = angles_for(child)
    try:
        rotary = rotary_of(model, path, asked or FAR_ROPE)
    except ConversionError:
        if asked is not None:
            raise
        return
    model.get_submodule(path).__dict__[ROTARY_ATTRIBUTE] = rotary
    if child.keeps_far_keys:
        child.keeps_far_keys = None


def _build(layer: LayerPlan, model: PreTrainedModel) -> ConvertedAttention:
    module = model.get_submodule(layer.path)
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    device, dtype = (None, None) if weight is None else (weight.device, weight.dtype)
    asked = angles_for(layer)
    if not layer.far_rope or asked is not None:
        embedding_of(module, FAR_ROPE if asked is None or not layer.far_rope else asked)
    if asked is not None:
        rotary_of(model, layer.path, asked)
    return ConvertedAttention(layer, device=device, dtype=dtype).train(module.training)


def _own_configs(model: PreTrainedModel, plan: ConversionPlan) -> list[PreTrainedConfig]:
    """Give the model configs of its own, of the converted class; returns those the replaced layers look at."""
    memo: dict[int, Any] = {}
    own = copy.deepcopy(model.config, memo)
    _set_config_class(own, converted_config_class(type(own)))
    own.linattn = plan.to_dict()
    for module in model.modules():
        if isinstance(config := module.__dict__.get("config"), PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, memo)
    return list({id(c): c for c in (_config(model, layer.path) for layer in plan.replaced)}.values())


def _set_config_class(config: PreTrainedConfig, cls: type[PreTrainedConfig]) -> None:
    """Change a config's class, and with it the model type, which configs read from a file also hold themselves."""
    config.__class__ = cls
    config.__dict__.pop("model_type", None)


def _config(model: PreTrainedModel, path: str) -> Any:
    """The config that the attention module at ``path`` looks at; None if it has none."""
    return getattr(model.get_submodule(path), "config", None)


def _drop_gguf_quantizer(model: PreTrainedModel) -> dict[str, Any]:
    """Forget that a model came from a GGUF file once its weights are plain floats, which makes it savable.

    Returns what was dropped, for :func:`revert_model`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(model.config, "quantization_config", None) or getattr(quantizer, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    packed = any(not t.is_floating_point() for t in model.parameters())
    if method is None or str(getattr(method, "value", method)) != "gguf" or packed:
        return {}
    dropped = {name: model.__dict__.pop(name) for name in _QUANTIZED if name in model.__dict__}
    if hasattr(model.config, "quantization_config"):
        dropped["quantization_config"] = model.config.quantization_config
        del model.config.quantization_config
    return dropped


def _check_fit(model: PreTrainedModel, plan: ConversionPlan) -> None:
    """Raise unless ``plan`` was made for a model like ``model``."""
    here = [layer for layer, _ in find_attention(model)]
    plan.check()
    for mine, theirs in zip(here, plan.layers, strict=False):
        for field in ("path", "attention", "heads", "kv_heads", "head_dim"):
            if getattr(mine, field) != getattr(theirs, field):
                raise ConversionError(
                    f"plan: its layer {theirs.index} has {field}={getattr(theirs, field)!r}, the model's has "
                    f"{getattr(mine, field)!r}; make a plan for this model with plan_model(model)."
                )
    if len(here) != len(plan.layers):
        raise ConversionError(f"plan: it has {len(plan.layers)} layers, the model has {len(here)} attention layers.")


def _resolve(model: PreTrainedModel, path: str) -> str:
    """The path of a layer in ``model``, where the plan was saved with a head on the model or without."""
    prefix = model.base_model_prefix + "."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise ConversionError(f"there is no module {path!r}.")


def _submodels(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _remove_hook(module: nn.Module) -> None:
    hooks: dict[int, Callable[..., Any]] = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is hand_over]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
