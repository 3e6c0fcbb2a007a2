"""A far branch that reads queries and keys before rotary embedding, against dense attention in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from linattn import ConversionPlan, convert_model, load, plan_model, revert_model
from linattn.convert import ConvertedAttention, load_state, prepare_cache, save_state
from linattn.convert.rotary import Rotation
from linattn.errors import CheckpointError, ConversionError, OptionError

FAR = {"window": 6, "sinks": 2, "far_rope": False}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
WITH_ROPE = [
    *("llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "smollm3", "stablelm", "cohere", "phi", "gpt-neox"),
    *("gpt-oss", "modernbert"),
]
CACHED = ["llama", "qwen3", "gemma2", "gpt-neox", "cohere"]
WITHOUT_ROPE = ["gpt2", "opt", "bert", "vit"]


def build(family, **options):
    model = convert_model(family.build(), **(FAR | family.convert | {"decay": "data"} | options)).double()
    model.set_experts_implementation("eager")  # the default has no float64
    for layer in layers_of(model):
        nn.init.normal_(layer.far_bias)
        if layer.decay == "data":
            nn.init.normal_(layer.gate_weight, std=0.3)
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


def dense(layer: ConvertedAttention, q, k, v, q_far, k_far, softcap=None, sink_logits=None) -> Tensor:
    """The layer's output from every pair of tokens: near ones by q and k, far ones by q_far and k_far."""
    (f_q, a_q), (f_k, a_k) = layer.feature_map.forward_queries(q_far), layer.feature_map.forward_keys(k_far)
    groups, at = q.shape[2] // k.shape[2], torch.arange(q.shape[1])
    k, v, f_k = (x.repeat_interleave(groups, 2) for x in (k, v, f_k))
    near = torch.einsum("bthd,bihd->bhti", q, k) * layer.feature_map.scale
    near = near if softcap is None else softcap * torch.tanh(near / softcap)
    far = torch.einsum("bthf,bihf->bhti", f_q, f_k).log() + layer.far_bias[:, None, None]
    far = far if a_q is None else far + a_q.transpose(1, 2)[..., None]
    far = far if a_k is None else far + a_k.repeat_interleave(groups, 2).transpose(1, 2)[..., None, :]
    gap = at[:, None] - at
    is_near = (gap.abs() < layer.window) | (at < layer.sinks)
    if layer.causal:
        clock = layer.log_gates(k_far).cumsum(1).repeat_interleave(groups, 2).transpose(1, 2)
        far = far + clock[..., None] - clock[..., None, :]
    weights = torch.where(is_near, near, far).masked_fill((gap < 0) & layer.causal, -torch.inf)
    if sink_logits is not None:
        weights = torch.cat([weights, sink_logits.view(1, -1, 1, 1).expand(*weights.shape[:3], 1)], -1)
    return torch.einsum("bhti,bihv->bthv", weights.softmax(-1)[..., : len(at)], v)


@pytest.mark.parametrize("name", WITH_ROPE)
def test_it_is_dense_attention_with_features_of_what_has_no_position(families, name):
    """At position 0 a rotary embedding scales at most: there the first layer shows its queries and keys before it."""
    family = families[name]
    options = {"keep_softmax": [1], "native_sliding": "convert"}
    options |= {} if family.causal else {"sinks": 0, "decay": None}
    model = build(family, **options)
    tokens = family.inputs()["input_ids"]
    q, k, v, seen, out = calls(model, input_ids=tokens)
    q_far, k_far = layers_of(model)[0].far_inputs(q, k, seen["rotation"])
    plain_q, plain_k, _, there, _ = calls(model, input_ids=tokens, position_ids=torch.zeros_like(tokens))
    plain_q, plain_k = (x / there["rotation"].cos[0, 0, 0].double() for x in (plain_q, plain_k))
    torch.testing.assert_close(q_far, plain_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_far, plain_k, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(q, plain_q, rtol=1e-2, atol=1e-2)
    want = dense(layers_of(model)[0], q, k, v, plain_q, plain_k, seen["softcap"], seen["sink_logits"])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


@pytest.mark.parametrize("name", CACHED)
def test_prefill_and_steps_equal_one_pass(families, name):
    model = build(families[name], native_sliding="convert")
    tokens = families[name].inputs(29)["input_ids"]
    cache = prepare_cache(model, DynamicCache(config=model.config))
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split([4, 1, 13, *[1] * 11], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, tokens, use_cache=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CACHED)
def test_padded_and_packed_sequences_are_read_as_alone(families, name):
    model = build(families[name], native_sliding="convert")
    tokens = families[name].inputs(40)["input_ids"]
    alone = [logits(model, tokens[:1], use_cache=False), logits(model, tokens[1:, 17:], use_cache=False)]

    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = logits(model, tokens * mask, attention_mask=mask, position_ids=positions, use_cache=False)
    torch.testing.assert_close(padded[:1], alone[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(padded[1:, 17:], alone[1], rtol=1e-9, atol=1e-9)

    both = torch.cat([tokens[:1], tokens[1:, 17:]], 1)
    positions = torch.cat([torch.arange(40), torch.arange(23)])[None]
    packed = logits(model, both, position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


def test_a_state_continues_exactly_after_rollback_reordering_and_storage(families, check_continuation):
    check_continuation(build(families["qwen3"]), families["qwen3"].inputs(30)["input_ids"])


@pytest.mark.parametrize("name", ["qwen3", "gpt-neox"])
def test_gradients_go_through_both_branches(families, name):
    """To the projections, along both forms of queries and keys: as finite differences say."""
    model = build(families[name])
    tokens = families[name].inputs()["input_ids"]
    weights = [p for path, p in model.named_parameters() if "k_proj" in path or "query_key_value.weight" in path]

    def loss() -> Tensor:
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


def test_scaled_angles_are_undone_with_their_scale(make_llama, tokens):
    model = make_llama(layers=1, rope_parameters=YARN).double()
    convert_model(model, **FAR)
    q, k, _, seen, _ = calls(model, input_ids=tokens)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
        want_q, want_k = (p(hidden).unflatten(2, (-1, 8)) for p in (attention.q_proj, attention.k_proj))
    assert seen["rotation"].cos[:, 0].min() > 1.1  # at position 0 it is the scale
    for got, want in zip(attention.linattn.far_inputs(q, k, seen["rotation"]), (want_q, want_k), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_more_at_most(make_llama, tokens, dtype):
    model = convert_model(make_llama(layers=1).to(dtype), **FAR)
    q, k, _, seen, _ = calls(model, input_ids=tokens)
    plain_q, plain_k, *_ = calls(model, input_ids=tokens, position_ids=torch.zeros_like(tokens))
    for got, want in zip(layers_of(model)[0].far_inputs(q, k, seen["rotation"]), (plain_q, plain_k), strict=True):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_a_layer_that_does_not_embed_is_left_as_it_is(families, make_llama):
    plan = plan_model(families["smollm3"].build(), **FAR)
    assert [layer.far_rope for layer in plan.layers] == [False, True]
    plan.layers[1].far_rope = False  # says the plan; the layer has nothing to undo
    model = convert_model(families["smollm3"].build(), plan=plan)
    want = convert_model(families["smollm3"].build(), **FAR)
    tokens = families["smollm3"].inputs()["input_ids"]
    torch.testing.assert_close(logits(model, tokens), logits(want, tokens), rtol=1e-5, atol=1e-5)


def test_trying_a_module_leaves_no_trace(make_llama, tokens):
    model = make_llama()
    before = logits(model, tokens)
    convert_model(model, **FAR).train()
    torch.manual_seed(5)
    model(tokens).logits.sum().backward()
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(()))
    copy.deepcopy(model)
    revert_model(model).eval()
    assert not any("_linattn" in name for module in model.modules() for name in module.__dict__)
    assert torch.equal(logits(model, tokens), before)


def test_it_is_saved_and_plans_without_it_mean_rotary_features(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), **FAR, decay="data")
    assert "far_rope=False" in repr(model)
    assert "no rotary embedding in the far branch" in str(ConversionPlan.from_dict(model.config.linattn))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), tokens), logits(model, tokens))

    plan = model.config.linattn
    for layer in plan["layers"]:
        assert layer.pop("far_rope") is False
    old = ConversionPlan.from_dict(plan)
    assert all(layer.far_rope for layer in old.layers)
    assert not torch.allclose(logits(convert_model(make_llama(), plan=old), tokens), logits(model, tokens))


@pytest.mark.parametrize("name", WITHOUT_ROPE)
def test_families_without_rotary_embedding_are_refused(families, name):
    model = families[name].build()
    kind = type(model)
    with pytest.raises(ConversionError, match=r"does not embed its queries and keys.*far_rope=True"):
        convert_model(model, far_rope=False)
    plan = plan_model(model)
    plan.layers[0].far_rope = False
    with pytest.raises(ConversionError, match="does not embed"):
        convert_model(model, plan=plan)
    assert type(model) is kind
    model = convert_model(model)
    model.config.linattn["layers"][0]["far_rope"] = False
    with pytest.raises(CheckpointError, match="does not embed"):
        type(model)(model.config)


def test_what_follows_the_embedding_is_found_at_the_first_call(tokens):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.HunYuanDenseV1Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.HunYuanDenseV1ForCausalLM(config).eval()
    nn.init.uniform_(model.model.layers[0].self_attn.key_layernorm.weight, 0.5, 1.5)
    convert_model(model, **FAR)
    for _ in range(2):
        with pytest.raises(ConversionError, match=r"relative error of .* in its keys: .*a norm after it"):
            logits(model, tokens)


def test_what_cannot_be_is_refused(make_llama):
    with pytest.raises(OptionError, match="far_rope: got 'no'"):
        convert_model(make_llama(), far_rope="no")
    with pytest.raises(OptionError, match=r"far_rope: .* replaces the attention as a whole"):
        convert_model(make_llama(), feature_map="nystromformer", far_rope=False)
    layer = layers_of(convert_model(make_llama(), **FAR))[0]
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    with pytest.raises(ConversionError, match="without the rotary embedding"):
        layer(q, k, k)
    attention = convert_model(make_llama(), **FAR).model.layers[0].self_attn
    with pytest.raises(ConversionError, match="called without position_embeddings"):
        attention(hidden_states=torch.randn(1, 20, 32), attention_mask=None)


def test_the_inverse_is_exact_whatever_the_scale():
    """x ↦ a R(θ) x and back, by a convention of pairs."""

    def embed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None]

        return turn(q), turn(k)

    q, k = torch.randn(2, 7, 4, 10, dtype=torch.float64), torch.randn(2, 7, 2, 10, dtype=torch.float64)
    angle = torch.randn(2, 7, 3, dtype=torch.float64).repeat_interleave(2, -1)
    rotation = Rotation(embed, 1.3 * angle.cos(), 1.3 * angle.sin(), size=6)
    turned = embed(q[..., :6].transpose(1, 2), k[..., :6].transpose(1, 2), rotation.cos, rotation.sin)
    q_after, k_after = (torch.cat([y.transpose(1, 2), x[..., 6:]], -1) for x, y in zip((q, k), turned, strict=True))
    assert not torch.allclose(q_after, q)
    torch.testing.assert_close(rotation.undo(q_after, k_after), (q, k))


def both_forms(model):
    """A copy of ``model`` whose states hold the window's keys before rotary embedding, too."""
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        layer.keeps_far_keys = True
    return model


def read(model, tokens, sizes, positions, mask=None, crop=0):
    """Logits of ``tokens``, a part of the given sizes after the other; after each, ``crop`` tokens are read anew."""
    cache = prepare_cache(model, DynamicCache(config=model.config))
    found, start = [], 0
    for size in sizes:
        there = slice(start, start + size)
        options = {"position_ids": positions[:, there], "past_key_values": cache}
        options |= {} if mask is None else {"attention_mask": mask[:, : there.stop]}
        if crop:
            cache.activate_past_recording()
            logits(model, tokens[:, there], **options)
            cache.crop(-min(crop, size))
            again = slice(max(start, there.stop - crop), there.stop)
            options["position_ids"] = positions[:, again]
            found.append(logits(model, tokens[:, again], **options))
        else:
            found.append(logits(model, tokens[:, there], **options))
        start = there.stop
    held = [layer.state.recent_far_k is not None for layer in cache.layers]
    return torch.cat(found, 1), held


POSITIONS = {
    "from 0": torch.arange(40),
    "from 900": torch.arange(900, 940),
    "with gaps": torch.arange(40) * 3 + (torch.arange(40) > 25) * 17,
}


@pytest.mark.parametrize(
    ("name", "positions", "crop"),  # each family takes tokens back, each kind of positions is taken back
    [(n, p, 3 * ((i + j) % 2)) for i, n in enumerate([*CACHED, "yarn"]) for j, p in enumerate(POSITIONS)],
)
def test_keys_turned_back_as_they_leave_the_window_are_those_kept_before_rotary_embedding(
    families, make_llama, name, positions, crop
):
    if name == "yarn":
        model = convert_model(make_llama(rope_parameters=YARN), **FAR, decay="data")
    else:
        model = build(families[name], native_sliding="convert").float()
    tokens, positions = families["llama"].inputs(40)["input_ids"] % 64, POSITIONS[positions].expand(2, -1)
    logits(model, tokens)
    assert [layer.keeps_far_keys for layer in layers_of(model)] == [False] * len(layers_of(model))
    for sizes in ([17, 1, 1, 4, 9, *[1] * 8], [1] * 40):
        got, held = read(model, tokens, sizes, positions, crop=crop)
        want, kept = read(both_forms(model), tokens, sizes, positions, crop=crop)
        assert (any(held), all(kept)) == (False, True)
        assert torch.equal(got, want)
    alone = {"position_ids": positions, "attention_mask": torch.ones_like(tokens)}  # gaps divide no sequence
    torch.testing.assert_close(got, logits(model, tokens, **alone, use_cache=False), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("crop", [0, 2])
def test_padding_anywhere_leaves_each_key_its_position(families, told, crop):
    """Before the tokens, between them, and in a row whose new tokens are all padding."""
    model = build(families["qwen3"])
    tokens = families["qwen3"].inputs(40, rows=4)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, :17] = 0
    if not crop:  # which takes back as many tokens of every row
        mask[2, 12:20], mask[3, 9:30] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0) if told else torch.arange(40).expand(4, -1)
    logits(model, tokens)
    for sizes in ([20, 3, 7, 10], [20, *[1] * 20], [12, 3, 5, 10, 10])[: 2 if crop else 3]:
        got, held = read(model, tokens * mask, sizes, positions, mask, crop)
        want, kept = read(both_forms(model), tokens * mask, sizes, positions, mask, crop)
        assert (any(held), all(kept)) == (False, True)
        assert torch.equal(got, want)
    if not crop:
        whole = logits(model, tokens * mask, position_ids=positions, attention_mask=mask, use_cache=False)
        real = mask.bool()
        torch.testing.assert_close(got[real], whole[real], rtol=1e-9, atol=1e-9)


def test_one_decoding_step_turns_one_key_back(families, monkeypatch):
    model, tokens = build(families["llama"]), families["llama"].inputs(30)["input_ids"]
    cache = prepare_cache(model, DynamicCache(config=model.config))
    logits(model, tokens, past_key_values=cache)
    turned = []
    undo_at = Rotation.undo_at
    monkeypatch.setattr(Rotation, "undo_at", lambda self, k, at: turned.append(k.shape[1]) or undo_at(self, k, at))
    logits(model, tokens[:, :1], past_key_values=cache)
    assert turned == [1, 1]


def without_positions(module, args, options):
    return args, options | {"position_ids": None}


def with_other_angles(module, args, options):
    cos, sin = options["position_embeddings"]
    return args, options | {"position_embeddings": (cos, -sin)}


CHANGES = {"other angles": with_other_angles, "no positions": without_positions}
"""What the attention modules are called with, changed."""


def kept_by(model) -> set[bool | None]:
    return {layer.keeps_far_keys for layer in layers_of(model)}


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "no module", "other angles", "no positions"])
def test_both_forms_are_kept_where_the_angles_cannot_be_made_again(make_llama, tokens, kind):
    more = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | (more if kind == "longrope" else {})
    model = make_llama(**({"rope_parameters": parameters} if kind in ("dynamic", "longrope") else {}))
    if kind == "no module":
        model.model.__dict__["rotary_emb"] = model.model._modules.pop("rotary_emb")  # called, and not to be found
    convert_model(model, **FAR, decay="data")
    for layer in model.model.layers if kind in CHANGES else ():
        layer.self_attn.register_forward_pre_hook(CHANGES[kind], with_kwargs=True, prepend=True)
    assert kept_by(model) == ({None} if kind in CHANGES else {True})
    cache = prepare_cache(model, DynamicCache(config=model.config))
    parts = [logits(model, part, past_key_values=cache) for part in tokens.split([9, 1, 13, *[1] * 7], 1)]
    assert kept_by(model) == {True}
    assert all(layer.state.recent_far_k is not None for layer in cache.layers)
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, tokens, use_cache=False), rtol=1e-3, atol=1e-3)


def test_one_token_at_position_0_settles_nothing(make_llama, tokens):
    """All frequencies agree there: a cache that begins so, before any other call, keeps both forms."""
    model = convert_model(make_llama(), **FAR)
    caches = [prepare_cache(model, DynamicCache(config=model.config)) for _ in range(2)]
    parts = [logits(model, part, past_key_values=caches[0]) for part in tokens.split([1, 12, *[1] * 17], 1)]
    want = logits(model, tokens, past_key_values=caches[1])
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-3, atol=1e-3)
    assert [{layer.state.recent_far_k is None for layer in cache.layers} for cache in caches] == [{False}, {True}]
    assert kept_by(model) == {False}


def test_saved_states_of_either_form_are_continued_by_a_model_yet_uncalled(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), **FAR, decay="data")
    logits(model, tokens)
    want = logits(model, tokens, use_cache=False)[:, 20:]
    for source in (model, both_forms(model)):
        cache = prepare_cache(source, DynamicCache(config=model.config))
        logits(source, tokens[:, :20], past_key_values=cache)
        save_state(cache, tmp_path / "state.safetensors")
        held = load_state(tmp_path / "state.safetensors")
        assert [layer.nbytes for layer in held.layers] == [layer.nbytes for layer in cache.layers]
        fresh = convert_model(make_llama(), **FAR, decay="data")
        fresh.load_state_dict(model.state_dict())
        got = [logits(fresh, part, past_key_values=held) for part in tokens[:, 20:].split([1, 1, 5, 3], 1)]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-3, atol=1e-3)


def test_a_state_without_keys_before_rotary_embedding_needs_the_angles(make_llama, tokens):
    model = convert_model(make_llama(), **FAR)
    cache = prepare_cache(model, DynamicCache(config=model.config))
    logits(model, tokens, past_key_values=cache)
    for layer in model.model.layers:
        del layer.self_attn.__dict__["_linattn_rotary"]
    with pytest.raises(ConversionError, match=r"far_rope=False: .*the angles to turn them back are not known"):
        logits(model, tokens[:, :1], past_key_values=cache)
    model = convert_model(make_llama(), **FAR)
    cache = prepare_cache(model, DynamicCache(config=model.config))
    logits(model, tokens, past_key_values=cache)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(without_positions, with_kwargs=True, prepend=True)
    with pytest.raises(ConversionError, match="without position_ids"):
        logits(model, tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt-neox", "cohere", "smollm3", "yarn"])
def test_angles_made_again_are_the_bits_of_the_call(families, make_llama, name, dtype):
    tokens = torch.randint(3, 64, (2, 50), generator=torch.Generator().manual_seed(1))
    model = make_llama(rope_parameters=YARN) if name == "yarn" else families[name].build()
    convert_model(model.to(dtype), **(FAR | {"native_sliding": "convert"}))
    for offset in (0, 3000):
        q, k, _, seen, _ = calls(model, input_ids=tokens, position_ids=torch.arange(50).expand(2, -1) + offset)
        rotation = seen["rotation"]
        at = torch.arange(7, 20, dtype=torch.int32).expand(2, -1) + offset
        assert torch.equal(rotation.undo_at(k[:, 7:20], at), rotation.undo(q, k)[1][:, 7:20])
        assert not torch.equal(rotation.undo_at(k[:, 7:20], at + 1), rotation.undo(q, k)[1][:, 7:20])


def test_gradients_go_through_keys_turned_back(families):
    """Into the part that a cache read before, as in one pass."""
    model = build(families["qwen3"])
    tokens = families["qwen3"].inputs(30)["input_ids"]
    weights = [p for path, p in model.named_parameters() if "k_proj" in path]
    want = torch.autograd.grad(model(tokens, use_cache=False).logits[:, 20:].square().mean(), weights)
    cache = prepare_cache(model, DynamicCache(config=model.config))
    parts = [model(part, past_key_values=cache).logits for part in tokens.split([20, 4, 1, 5], 1)]
    assert cache.layers[0].state.recent_far_k is None
    got = torch.autograd.grad(torch.cat(parts, 1)[:, 20:].square().mean(), weights)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
