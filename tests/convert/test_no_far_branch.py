"""Layers converted to a window with sinks and nothing else: no parameters, no sums, and otherwise like all others."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import linattn
from linattn import ConversionPlan, convert_model, plan_model, revert_model
from linattn.convert import ConvertedAttention, LinattnCacheLayer, window_only
from linattn.errors import OptionError

NEAR = {"feature_map": None, "window": 6, "sinks": 2}


def test_every_family_becomes_what_deleting_the_far_branch_makes_it(family):
    inputs = family.inputs()
    near = convert_model(family.build(), **(NEAR | family.convert))
    other = convert_model(family.build(), **(NEAR | family.convert | {"feature_map": "elu"}))
    with torch.no_grad(), window_only(other):
        assert torch.equal(near(**inputs).logits, other(**inputs).logits)
    assert [layer.index for layer in ConversionPlan.from_dict(near.config.linattn).kept] == list(family.kept)
    assert near.state_dict().keys() == family.build().state_dict().keys()


def test_without_sinks_it_is_the_sliding_window_of_transformers(make_llama, tokens):
    model = make_llama()
    sliding = MistralForCausalLM(
        MistralConfig(**model.config.to_dict() | {"model_type": "mistral", "sliding_window": 6})
    ).eval()
    sliding.load_state_dict(model.state_dict())
    convert_model(model, feature_map=None, window=6, sinks=0)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, sliding(tokens).logits, rtol=1e-4, atol=1e-4)


def test_it_decodes_from_a_ring_of_the_window_and_the_sinks(make_llama, tokens):
    model = convert_model(make_llama(), **NEAR, keep_softmax=[1])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([11, *[1] * 12, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)
    assert [isinstance(layer, LinattnCacheLayer) for layer in cache.layers] == [True, False, True]
    state = cache.layers[0].state
    assert state.kv.numel() == 0
    assert state.nbytes == 2 * ((6 + 2) * 2 * 2 * 8 * 4 + 2 * 4 + 2 * 8)  # rows of: keys and values, scales, counts


def test_it_generates_what_it_predicts(make_llama, tokens):
    model = convert_model(make_llama(), **NEAR)
    said = model.generate(tokens, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(said[:, :-1]).logits[:, tokens.shape[1] - 1 :].argmax(-1), said[:, tokens.shape[1] :])


def test_it_is_saved_and_loaded(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), **NEAR, keep_softmax=[1])
    model.save_pretrained(tmp_path)
    for again in (linattn.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        modules = [module for module in again.modules() if isinstance(module, ConvertedAttention)]
        assert [(module.far, module.window, module.sinks) for module in modules] == [(False, 6, 2)] * 2
        with torch.no_grad():
            assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)
    original = make_llama()
    assert type(revert_model(model)) is LlamaForCausalLM
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_its_plan_says_so(make_llama):
    plan = plan_model(make_llama(), **NEAR, keep_softmax=[0])
    assert str(plan).count("window only") == 2
    assert ConversionPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decay": "fixed"}, "far branch that decay is for"),
        ({"far_rope": False}, "far branch that far_rope is for"),
        ({"feature_map_options": {"features": 8}}, "far branch that feature_map_options is for"),
        ({"window": 0}, "a window ≥ 1"),
    ],
)
def test_what_only_a_far_branch_has_is_refused(make_llama, options, says):
    model = make_llama()
    with pytest.raises(OptionError, match=says):
        convert_model(model, **(NEAR | options))
    assert type(model) is LlamaForCausalLM


def test_a_kept_layer_does_not_become_a_window_by_its_kind_alone(make_llama):
    plan = plan_model(make_llama(), keep_softmax=[0])
    edited = copy.deepcopy(plan)
    edited.layers[0].kind = "convert"
    with pytest.raises(OptionError, match="needs a feature_map"):
        convert_model(make_llama(), plan=edited)
