"""Plans: what is planned, what is refused and in which words, and that planning changes nothing."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from linattn import ConversionPlan, convert_model, plan_model
from linattn.errors import CheckpointError, ConversionError, FeatureMapError, OptionError, UnsupportedError
from linattn.feature_maps import ELU, FavorPlus, Hedgehog

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name: str, **options: object) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**options)
    for head in ("ForCausalLM", "ForConditionalGeneration", "Model"):
        if hasattr(transformers, name + head):
            return getattr(transformers, name + head)(config)
    raise AssertionError(name)


def test_a_plan_says_what_each_layer_becomes(make_llama):
    plan = plan_model(make_llama(), window=16, sinks=2, decay="fixed", keep_softmax=[1], feature_map="elu")
    assert [layer.kind for layer in plan.layers] == ["convert", "keep", "convert"]
    first = plan.layers[0]
    assert (first.path, first.attention) == ("model.layers.0.self_attn", "LlamaAttention")
    assert (first.heads, first.kv_heads, first.head_dim, first.scale) == (4, 2, 8, 8**-0.5)
    assert (first.feature_map, first.window, first.sinks, first.decay, first.causal) == ("elu", 16, 2, "fixed", True)
    table = str(plan).splitlines()
    assert table[0] == "llama: 2 of 3 attention layers converted"
    assert "elu" in table[2]
    assert "softmax" in table[3]
    assert "asked for" in table[3]


def test_planning_leaves_the_model_alone(make_llama, tokens):
    model = make_llama()
    before, names, config = model(tokens).logits, [n for n, _ in model.named_modules()], model.config.to_dict()
    plan_model(model, decay="data")
    assert torch.equal(model(tokens).logits, before)
    assert [n for n, _ in model.named_modules()] == names
    assert model.config.to_dict() == config


def test_a_plan_can_be_saved_edited_and_carried_out(make_llama, tmp_path):
    plan = plan_model(make_llama(), feature_map="elu")
    plan.save(tmp_path / "plan.json")
    loaded = ConversionPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    loaded.keep(0)
    loaded.layers[1].window = 7
    model = convert_model(make_llama(), plan=loaded)
    assert not hasattr(model.model.layers[0].self_attn, "linattn")
    assert model.model.layers[1].self_attn.linattn.window == 7
    assert model.config.linattn == loaded.to_dict()


def test_windows_differ_by_layer_where_a_list_says_so(make_llama, tokens):
    plan = plan_model(make_llama(), feature_map="elu", window=(4, 9, 6), sinks=2, keep_softmax=[1])
    assert [layer.window for layer in plan.converted] == [4, 6]
    model = convert_model(make_llama(), feature_map="elu", window=[4, 9, 6], sinks=2)
    assert [layer.self_attn.linattn.window for layer in model.model.layers] == [4, 9, 6]
    prompt, rest = tokens[:, :11], tokens[:, 11:]
    with torch.no_grad():
        whole, first = model(tokens).logits, model(prompt, use_cache=True)
        after = model(rest, past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(torch.cat([first.logits, after], 1), whole)
        exact = make_llama()(tokens).logits[:, :6]
    torch.testing.assert_close(whole[:, :6], exact)
    assert [layer.state.window for layer in first.past_key_values.layers] == [4, 9, 6]


def test_a_plan_of_another_model_is_refused(make_llama):
    plan = plan_model(make_llama())
    with pytest.raises(ConversionError, match="2 attention layers"):
        convert_model(make_llama(layers=2), plan=plan)
    with pytest.raises(ConversionError, match="heads=4"):
        convert_model(make_llama(num_attention_heads=8, num_key_value_heads=2), plan=plan)
    with pytest.raises(OptionError, match="window"):
        convert_model(make_llama(), plan=plan, window=5)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": 99}', '{"format": 1, "model_type": "x", "layers": [{}]}']
)
def test_what_is_no_plan_is_refused(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError):
        ConversionPlan.load(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="no conversion plan"):
        ConversionPlan.load(tmp_path / "absent.json")


def test_maps_come_by_name_class_or_factory(make_llama):
    model = make_llama()
    assert plan_model(model, feature_map=ELU).layers[0].feature_map == "elu"
    assert plan_model(model, feature_map="dpfp", feature_map_options={"nu": 2}).layers[0].feature_map_options == {
        "nu": 2
    }

    def factory(layer):
        return Hedgehog(layer.head_dim, num_heads=layer.heads, num_kv_heads=layer.kv_heads)

    assert {layer.feature_map for layer in plan_model(model, feature_map=factory).layers} == {"hedgehog"}
    with pytest.raises(OptionError, match="one instance"):
        plan_model(model, feature_map=ELU(8, num_heads=4, num_kv_heads=2))


@pytest.mark.parametrize("name", ["favor+", "nystrom"])
def test_every_layer_draws_its_own_random_features_and_the_same_ones_again(make_llama, name):
    def drawn(**options):
        model = convert_model(make_llama(), feature_map=name, **options)
        return [layer.self_attn.linattn.feature_map.state_dict() for layer in model.model.layers]

    def same(one, other):
        return all(torch.equal(one[key], other[key]) for key in ("omega", "landmarks") if key in one)

    layers, again, seeded = drawn(), drawn(), drawn(feature_map_options={"seed": 1})
    assert not any(same(layers[i], layers[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert all(map(same, layers, again))
    assert all(same(layer, layers[1]) for layer in seeded)


def test_the_plan_shows_the_seeds(make_llama):
    def seeds(**options):
        return [x.feature_map_options.get("seed") for x in plan_model(make_llama(), **options).layers]

    assert seeds(feature_map="favor+") == [0, 1, 2]
    assert seeds(feature_map="favor+", feature_map_options={"seed": 5}) == [5, 5, 5]
    assert seeds(feature_map="hedgehog") == [None] * 3  # takes none

    def factory(layer):
        return FavorPlus(layer.head_dim, num_heads=layer.heads, num_kv_heads=layer.kv_heads, seed=7 + layer.index)

    assert seeds(feature_map=factory) == [7, 8, 9]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"feature_map": "hedgehogg"}, FeatureMapError, "hedgehog"),
        ({"feature_map_options": {"wrong": 1}}, FeatureMapError, "wrong"),
        ({"feature_map": "linformer", "feature_map_options": {"max_length": 32}}, ConversionError, "causal"),
        ({"window": -1}, OptionError, "window"),
        ({"window": [4, 4]}, OptionError, "got 2 of them"),
        ({"window": [4, -1, 4]}, OptionError, "window: got -1"),
        ({"sinks": 1.5}, OptionError, "sinks"),
        ({"decay": "slow"}, OptionError, "decay"),
        ({"layers": [3]}, OptionError, "0 … 2"),
        ({"keep_softmax": [-1]}, OptionError, "keep_softmax"),
        ({"layers": [0], "keep_softmax": [0]}, OptionError, "both"),
        ({"keep_softmax": [0, 1, 2]}, ConversionError, "nothing is left"),
        ({"native_sliding": "drop"}, OptionError, "native_sliding"),
        ({"on_unsupported": "ignore"}, OptionError, "on_unsupported"),
    ],
)
def test_bad_options_name_themselves(options, error, says, make_llama):
    with pytest.raises(error, match=says):
        plan_model(make_llama(), **options)


def test_native_windows_are_kept_unless_asked():
    sizes = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    plan = plan_model(model)
    assert [layer.kind for layer in plan.layers] == ["keep", "convert"]
    assert "sliding window of its own (8)" in plan.layers[0].reason
    assert any("softcap" in note for note in plan.layers[1].notes)
    plan = plan_model(model, native_sliding="convert", window=128)
    assert [layer.window for layer in plan.layers] == [8, 128]


def test_bidirectional_layers_take_no_decay():
    model = transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=48))
    assert not plan_model(model).layers[0].causal
    with pytest.raises(ConversionError, match="bidirectional"):
        plan_model(model, decay="fixed")


def test_layers_that_are_linear_already_do_not_stand_in_the_way():
    sizes = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    model = build("Qwen3Next", **sizes, **experts, **linear, layer_types=["linear_attention", "full_attention"])
    plan = plan_model(model, window=6)
    assert "linear already" in plan.kept[0].reason
    # Its query projection carries a gate of the same width beside the queries.
    assert (plan.converted[0].heads, plan.converted[0].kv_heads) == (4, 2)
    assert torch.isfinite(convert_model(model, plan=plan)(torch.arange(3, 30)[None]).logits).all()


def test_maps_over_whole_sequences_replace_the_attention_as_a_whole():
    model = transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=48))
    plan = plan_model(model, feature_map="nystromformer")
    assert (plan.layers[0].window, plan.layers[0].sinks) == (0, 0)
    convert_model(model, plan=plan)
    tokens = torch.arange(3, 30)[None]
    assert model(tokens).last_hidden_state.shape == (1, 27, 32)
    with pytest.raises(UnsupportedError, match="whole sequence"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 10, 27]))
