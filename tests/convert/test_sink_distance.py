"""Sinks that keep a bounded rotary distance, against queries that the family itself embeds at nearer positions."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from linattn import ConversionPlan, convert_model, load, plan_model, revert_model
from linattn.audit.memory import equal_bytes_plan
from linattn.convert import ConvertedAttention, hf, prepare_cache, window_only
from linattn.errors import CheckpointError, ConversionError, OptionError
from linattn.kernels import kernel_attention

P = 11
OPTIONS = {"feature_map": "elu", "window": 6, "sinks": 3, "sink_distance": P}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = [
    *("llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "stablelm", "cohere", "phi", "gpt-neox"),
    "gpt-oss",
]
CACHED = ["llama", "qwen3", "gemma2", "gemma3", "gpt-neox", "cohere"]
WITHOUT_ROPE = ["gpt2", "opt"]


def build(family, **options):
    model = convert_model(family.build(), **(OPTIONS | family.convert | options)).double()
    model.set_experts_implementation("eager")  # the default has no float64
    return model


def layers_of(model: nn.Module) -> list[ConvertedAttention]:
    return [module for module in model.modules() if isinstance(module, ConvertedAttention)]


def calls(model, **inputs):
    """What the first converted layer is called with, and what it answers."""
    seen = []
    handle = layers_of(model)[0].register_forward_hook(
        lambda m, args, options, out: seen.append((*args, options, out)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.fixture
def passed(monkeypatch):
    """Whether each call of the operator had queries of the sinks' own."""
    found: list[bool] = []

    def recorded(*args, **options):
        found.append(options["q_sink"] is not None)
        return kernel_attention(*args, **options)

    monkeypatch.setattr(hf, "kernel_attention", recorded)
    return found


@pytest.mark.parametrize("far_rope", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_sinks_meet_what_the_family_embeds_at_the_nearer_position(families, name, far_rope):
    """The first layer's hidden states know no position: at others, the model itself says what its queries are."""
    model = build(families[name], keep_softmax=[1], native_sliding="convert", far_rope=far_rope)
    layer = layers_of(model)[0]
    tokens = families[name].inputs()["input_ids"]
    q, k, v, seen, out = calls(model, input_ids=tokens)
    at = torch.arange(tokens.shape[1]).clamp_max(P).expand_as(tokens)
    with torch.no_grad():
        layer.sink_distance = None
        q_sink, *_ = calls(model, input_ids=tokens, position_ids=at)
        layer.sink_distance = P
    torch.testing.assert_close(
        layer.sink_queries(q, seen["rotation"])[:, P:], q_sink[:, P:], rtol=1e-5, atol=1e-5 * q.abs().max().item()
    )
    assert torch.equal(layer.sink_queries(q, seen["rotation"])[:, : P + 1], q[:, : P + 1])
    far = layer.far_inputs(q, k, seen["rotation"]) if not far_rope else (None, None)
    options = {name: seen[name] for name in ("softcap", "sink_logits")}
    options |= {"feature_map": layer.feature_map, "window": 6, "sinks": 3, "far_bias": layer.far_bias}
    options |= {"scale": layer.feature_map.scale, "q_far": far[0], "k_far": far[1]}
    want = kernel_attention(q, k, v, **options, q_sink=q_sink, impl="reference").out
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, kernel_attention(q, k, v, **options).out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CACHED)
def test_prefill_and_steps_equal_one_pass(families, name):
    model = build(families[name], native_sliding="convert", decay="data")
    tokens = families[name].inputs(29)["input_ids"]
    want = logits(model, tokens, use_cache=False)
    for sizes in ([4, 1, 13, *[1] * 11], [29], [20, 9], [1] * 29):
        cache = prepare_cache(model, DynamicCache(config=model.config))
        parts = [logits(model, part, past_key_values=cache) for part in tokens.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", CACHED)
def test_padded_and_packed_sequences_are_read_as_alone(families, name, told):
    """Positions are those of a sequence's real tokens, whether the model is told of them or counts padding, too."""
    model = build(families[name], native_sliding="convert", far_rope=False)  # which shifts leave as it is
    tokens = families[name].inputs(40)["input_ids"]
    alone = [logits(model, tokens[:1], use_cache=False), logits(model, tokens[1:, 17:], use_cache=False)]

    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if told else {}
    cache = prepare_cache(model, DynamicCache(config=model.config))
    first = {name: x[:, :30] for name, x in positions.items()}
    padded = [logits(model, (tokens * mask)[:, :30], attention_mask=mask[:, :30], past_key_values=cache, **first)]
    for i in range(30, 40):
        now = {name: x[:, i : i + 1] for name, x in positions.items()}
        padded.append(
            logits(model, tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache, **now)
        )
    close = {"rtol": 1e-9, "atol": 1e-9} if told else {"rtol": 1e-4, "atol": 1e-4}  # angles are float32
    torch.testing.assert_close(torch.cat(padded, 1)[:1], alone[0], **close)
    torch.testing.assert_close(torch.cat(padded, 1)[1:, 17:], alone[1], **close)

    both = torch.cat([tokens[:1], tokens[1:, 17:]], 1)
    positions = torch.cat([torch.arange(40), torch.arange(23)])[None]
    packed = logits(model, both, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)
    padded_too = torch.cat([both, torch.zeros(1, 5, dtype=both.dtype)], 1)
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 40, 63, 68], dtype=torch.int32)}
    positions = torch.cat([positions, torch.arange(5)[None]], 1)
    packed = logits(model, padded_too, position_ids=positions, use_cache=False, **boundaries)[:, :63]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


def test_nothing_is_turned_while_no_token_is_far(families, passed):
    model, tokens = build(families["llama"]), families["llama"].inputs(40)["input_ids"]
    plain = build(families["llama"], sink_distance=None)

    def moved(*args, **options) -> bool:
        passed.clear()
        logits(model, *args, **options)
        assert len(set(passed)) == 1
        return passed[0]

    assert torch.equal(logits(model, tokens[:, : P + 1]), logits(plain, tokens[:, : P + 1]))
    assert not moved(tokens[:, : P + 1], use_cache=False)
    assert moved(tokens[:, : P + 2], use_cache=False)
    positions = torch.cat([torch.arange(P + 1), torch.arange(P)])[None]
    assert moved(tokens[:1, : 2 * P + 1], position_ids=positions, use_cache=False)
    cache = prepare_cache(model, DynamicCache(config=model.config))
    assert not moved(tokens[:, :P], past_key_values=cache)
    assert not moved(tokens[:, P : P + 1], past_key_values=cache)
    assert moved(tokens[:, P + 1 : P + 2], past_key_values=cache)


def test_the_control_without_far_branch_has_the_same_sinks(families, passed):
    model, tokens = build(families["llama"]), families["llama"].inputs(40)["input_ids"]
    with window_only(model):
        bounded = logits(model, tokens, use_cache=False)
    assert all(passed)
    for layer in layers_of(model):
        layer.sink_distance = None
    with window_only(model):
        assert not torch.allclose(bounded[:, P + 1 :], logits(model, tokens, use_cache=False)[:, P + 1 :], rtol=1e-3)
    mixed = convert_model(families["llama"].build(), keep_softmax=[1], **OPTIONS)
    assert [layer.sink_distance for layer in equal_bytes_plan(mixed, length=64).layers] == [P, P]


def test_a_conversion_without_feature_map_has_the_same_sinks(families, passed):
    student = build(families["llama"])
    tokens = torch.randint(2, 60, (2, 40))
    with window_only(student):
        expected = logits(student, tokens)
    passed.clear()
    window = build(families["llama"], feature_map=None)
    assert torch.equal(logits(window, tokens), expected)
    assert passed
    assert all(passed)
    with pytest.raises(OptionError, match="sink_distance: got 2"):
        build(families["llama"], feature_map=None, sink_distance=2)


def test_a_state_continues_exactly_after_rollback_reordering_and_storage(families, check_continuation):
    check_continuation(build(families["qwen3"]), families["qwen3"].inputs(30)["input_ids"])


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox"])
def test_gradients_are_those_of_finite_differences(families, name):
    model = build(families[name])
    tokens = families[name].inputs()["input_ids"]
    weights = [p for path, p in model.named_parameters() if "q_proj" in path or "query_key_value.weight" in path]

    def loss() -> torch.Tensor:
        return model(tokens, use_cache=False).logits.square().mean()

    gradients = torch.autograd.grad(loss(), weights)
    slope = sum(g.square().sum().item() for g in gradients)
    assert slope > 0
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, g in zip(weights, gradients, strict=True):
                p.add_(g, alpha=step / slope)
            ends.append(loss().item())
    assert ends[0] - ends[1] == pytest.approx(2e-5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_more_at_most(make_llama, dtype):
    model = convert_model(make_llama(layers=1, rope_parameters=YARN).to(dtype), **OPTIONS)
    tokens = torch.randint(3, 64, (1, 200), generator=torch.Generator().manual_seed(1))
    q, _, _, seen, _ = calls(model, input_ids=tokens)
    wide = seen["rotation"]
    got = layers_of(model)[0].sink_queries(q, wide)
    want = layers_of(model)[0].sink_queries(q.double(), wide)
    assert got.dtype == dtype
    assert (got - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def test_a_layer_that_does_not_embed_is_left_as_it_is(families):
    plan = plan_model(families["smollm3"].build(), **OPTIONS)
    assert [layer.sink_distance for layer in plan.layers] == [P, None]
    plan.layers[1].sink_distance = P  # says the plan; the layer has nothing to turn
    model = convert_model(families["smollm3"].build(), plan=plan)
    want = convert_model(families["smollm3"].build(), **OPTIONS)
    tokens = families["smollm3"].inputs()["input_ids"]
    assert torch.equal(logits(model, tokens), logits(want, tokens))


def test_it_leaves_no_trace_and_copies_are_independent(make_llama, tokens):
    model = make_llama()
    before = logits(model, tokens)
    convert_model(model, **OPTIONS)
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    assert sorted(twin.state_dict()) == sorted(model.state_dict())
    nn.init.zeros_(model.model.rotary_emb.inv_freq)
    assert torch.equal(logits(twin, tokens), expected)
    model = revert_model(twin)
    assert not any("_linattn" in name for module in model.modules() for name in module.__dict__)
    assert torch.equal(logits(model, tokens), before)


def test_it_is_shown_and_saved_and_plans_without_it_mean_none(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), **OPTIONS)
    assert f"sink_distance={P}" in repr(model)
    assert f"sinks at most {P} tokens away" in str(ConversionPlan.from_dict(model.config.linattn))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens), logits(model, tokens))
    plan = model.config.linattn
    for layer in plan["layers"]:
        assert layer.pop("sink_distance") == P
    assert all(layer.sink_distance is None for layer in ConversionPlan.from_dict(plan).layers)


@pytest.mark.parametrize("name", WITHOUT_ROPE)
def test_families_without_rotary_embedding_are_refused(families, name):
    model = families[name].build()
    with pytest.raises(ConversionError, match=r"sink_distance: .*does not embed its queries and keys"):
        convert_model(model, **OPTIONS)
    plan = plan_model(model)
    plan.layers[0].sink_distance = P
    with pytest.raises(ConversionError, match="does not embed"):
        convert_model(model, plan=plan)
    model = convert_model(model)
    model.config.linattn["layers"][0]["sink_distance"] = P
    with pytest.raises(CheckpointError, match="does not embed"):
        type(model)(model.config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_refused(make_llama, kind):
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | (more if kind == "longrope" else {})
    with pytest.raises(ConversionError, match=rf"sink_distance: .*rope_type='{kind}'"):
        convert_model(make_llama(rope_parameters=parameters), **OPTIONS)


def test_what_follows_the_embedding_is_found_at_the_first_call(tokens):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.HunYuanDenseV1Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.HunYuanDenseV1ForCausalLM(config).eval()
    nn.init.uniform_(model.model.layers[0].self_attn.key_layernorm.weight, 0.5, 1.5)
    convert_model(model, **OPTIONS)
    with pytest.raises(ConversionError, match=r"sink_distance: .*a norm after it.*sink_distance=None"):
        logits(model, tokens)


def test_what_cannot_be_is_refused(make_llama, families):
    for wrong in (2, True, "far", 11.0):
        with pytest.raises(OptionError, match="sink_distance: got"):
            convert_model(make_llama(), **(OPTIONS | {"sink_distance": wrong}))
    with pytest.raises(OptionError, match=r"sink_distance: .*set sinks > 0"):
        convert_model(make_llama(), **(OPTIONS | {"sinks": 0}))
    with pytest.raises(OptionError, match=r"sink_distance: .* replaces the attention as a whole"):
        convert_model(make_llama(), **(OPTIONS | {"feature_map": "nystromformer"}))
    with pytest.raises(ConversionError, match=r"sink_distance: .* is bidirectional"):
        convert_model(families["modernbert"].build(), **OPTIONS)
    model = convert_model(make_llama(), **OPTIONS)
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    with pytest.raises(ConversionError, match=r"sink_distance: .*without the rotary embedding"):
        layers_of(model)[0](q, k, k)
    attention, hidden = model.model.layers[0].self_attn, torch.randn(1, 20, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(20)[None])
    call = {"hidden_states": hidden, "attention_mask": None, "position_embeddings": angles}
    with pytest.raises(ConversionError, match=r"sink_distance: .*without position_ids"):
        attention(**call)
    with pytest.raises(ConversionError, match=r"sink_distance: .*with other angles"):
        attention(**call, position_ids=torch.arange(1, 21)[None])
    attention(**call, position_ids=torch.arange(20)[None])
    bare = dataclasses.replace(plan_model(make_llama(), **OPTIONS))
    alone = make_llama()
    del alone.model.rotary_emb
    with pytest.raises(ConversionError, match="sink_distance: no module above"):
        convert_model(alone, plan=bare)
