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


BOUND = {"feature_map": "elu", "window": 6, "sinks": 2, "keep_softmax": [1], "softmax_window": 9}


def test_a_softmax_window_changes_nothing_within_it(family):
    """Logits of up to so many tokens are those of the layer left softmax, whatever the family, read at once or not."""
    inputs, kept = family.inputs(), 0 if 1 in family.kept else 1
    options = {"feature_map": "elu", "window": 6, "sinks": 2, "keep_softmax": [kept], "native_sliding": "convert"}
    plain, bound = (convert_model(family.build(), **options, softmax_window=each) for each in (None, 37))
    layer = bound.config.linattn["layers"][kept]
    assert layer["kind"] == ("bound" if layer["native_window"] is None else "keep")
    calls = [{}]
    if family.causal:
        padded = torch.ones_like(inputs["input_ids"])
        padded[1, :8] = 0
        calls += [{"use_cache": True}, {"attention_mask": padded}]
    for more in calls:
        with torch.no_grad():
            got, want = bound(**inputs, **more).logits, plain(**inputs, **more).logits
        there = more.get("attention_mask", torch.ones(got.shape[:2])).bool() if got.ndim == 3 else ...
        torch.testing.assert_close(got[there], want[there], rtol=1e-3, atol=1e-3)


def test_packed_sequences_are_bound_one_by_one(make_llama, tokens):
    model = convert_model(make_llama(), **BOUND)
    tokens = tokens[:1]
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    with torch.no_grad():
        got = model(tokens, position_ids=positions, use_cache=False).logits
        want = [model(part, use_cache=False).logits for part in tokens.split([13, 17], dim=1)]
    torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-4, atol=1e-4)


def test_beyond_it_a_bound_layer_attends_to_the_window_and_the_sinks(make_llama, tokens, monkeypatch):
    def dense(module, query, key, value, mask, scaling, is_causal, kwargs):
        key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
        at = torch.arange(query.shape[2])
        gap = at[:, None] - at
        seen = (gap >= 0) & ((gap < 9) | (at < 2))
        weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    bound, plain = (
        convert_model(make_llama(), **BOUND),
        convert_model(make_llama(), **(BOUND | {"softmax_window": None})),
    )
    with torch.no_grad():
        got, unbound = bound(tokens, use_cache=False).logits, plain(tokens, use_cache=False).logits
        monkeypatch.setattr("linattn.convert.hf._kept_forward", dense)
        want = plain(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:, :9], unbound[:, :9], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[:, 12:], unbound[:, 12:], atol=0.1)


@pytest.mark.parametrize("options", [{}, {"far_rope": False, "decay": "data", "sink_distance": 10}], ids=["", "rope"])
def test_a_bound_layer_is_a_converted_one_without_a_far_branch(make_llama, tokens, options):
    bound = convert_model(make_llama(), **BOUND, **options)
    plan = ConversionPlan.from_dict(bound.config.linattn)
    plan.layers[1].kind = "convert"
    converted = convert_model(make_llama(), plan=plan)
    converted.load_state_dict(bound.state_dict())
    with torch.no_grad():
        assert torch.equal(bound(tokens).logits, converted(tokens).logits)
    assert bound.model.layers[1].self_attn.linattn.sink_distance == options.get("sink_distance")


def test_a_bound_memory_is_of_full_size_from_the_first_token(make_llama, tokens, check_continuation):
    model = convert_model(make_llama(), **BOUND)
    sizes = []
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        for pieces in ([3], [7, 1, 1, 21]):
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in tokens[:, : sum(pieces)].split(pieces, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), want[:, : sum(pieces)], rtol=1e-4, atol=1e-4)
            sizes.append(cache.layers[1].nbytes)
    assert sizes == [2 * ((9 + 2) * 2 * 2 * 8 * 4 + 2 * 4 + 2 * 8)] * 2
    said = model.generate(tokens, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(said[:, :-1]).logits[:, tokens.shape[1] - 1 :].argmax(-1), said[:, tokens.shape[1] :])
    check_continuation(model.double(), tokens)


def test_a_bound_layer_is_saved_loaded_and_reverted(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), **BOUND)
    model.save_pretrained(tmp_path)
    again = linattn.load(tmp_path).eval()
    assert [layer.self_attn.linattn.bound for layer in again.model.layers] == [False, True, False]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert torch.equal(revert_model(model)(tokens).logits, make_llama()(tokens).logits)


def test_a_plan_says_what_softmax_is_bound_to(make_llama):
    plan = plan_model(make_llama(), **BOUND)
    assert ConversionPlan.from_json(plan.to_json()) == plan
    header, _, _, row, _ = str(plan).splitlines()
    assert header == "llama: 2 of 3 attention layers converted"
    assert "softmax  9       2" in row
    assert row.endswith("asked for; softmax of the last 9 tokens and 2 sinks")
    assert ([x.index for x in plan.converted], [x.index for x in plan.kept]) == ([0, 2], [1])
    later = plan_model(make_llama(), **(BOUND | {"keep_softmax": [], "decay": "fixed", "sink_distance": 8}))
    assert [layer.kind for layer in later.layers] == ["convert"] * 3
    again = later.keep(1).keep(1, softmax_window=9).layers[1]
    assert (again.kind, again.window, again.sinks, again.sink_distance, again.decay) == ("bound", 9, 2, 8, None)
    assert later.keep(1).layers[1].kind == "keep"


def test_only_layers_that_can_be_converted_are_bound(families):
    options = {"window": 6, "sinks": 2, "softmax_window": 9, "feature_map": "elu"}
    plan = plan_model(families["gemma3"].build(), keep_softmax=[0], **options)
    assert [layer.kind for layer in plan.layers] == ["keep", "convert"]
    plan.keep(0, softmax_window=9)
    assert plan.layers[0].kind == "keep"
    plan = plan_model(families["smollm3"].build(), keep_softmax=[1], sink_distance=7, **options)
    assert [(layer.kind, layer.sink_distance) for layer in plan.layers] == [("convert", 7), ("bound", None)]


def test_each_softmax_layer_can_have_a_window_of_its_own(make_llama):
    options = {"feature_map": "elu", "window": 6, "sinks": 2}
    model = convert_model(make_llama(), **options, keep_softmax=[0, 1], softmax_window=[9, 21, 1])
    one_by_one = plan_model(make_llama(), **options)
    one_by_one.keep(0, softmax_window=9).keep(1, softmax_window=21)
    assert model.config.linattn == one_by_one.to_dict()
    assert [(layer.kind, layer.window) for layer in one_by_one.layers] == [("bound", 9), ("bound", 21), ("convert", 6)]
    with pytest.raises(OptionError, match="softmax_window: got 2 of them, the model has 3"):
        plan_model(make_llama(), keep_softmax=[0], softmax_window=[9, 21])


@pytest.mark.parametrize("window", [0, -3, True, 8.0])
def test_softmax_windows_outside_their_domain_are_refused(make_llama, window):
    with pytest.raises(OptionError, match="softmax_window"):
        plan_model(make_llama(), keep_softmax=[0], softmax_window=window)
    with pytest.raises(OptionError, match="softmax_window"):
        plan_model(make_llama()).keep(0, softmax_window=window)


def test_a_bound_layer_has_no_feature_map(make_llama):
    plan = plan_model(make_llama())
    plan.layers[0].kind = "bound"
    with pytest.raises(OptionError, match="kind='bound' has no far branch"):
        convert_model(make_llama(), plan=plan)
