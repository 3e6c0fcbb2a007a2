"""What cannot be converted is said by layer, class, reason and remedy, and stays exactly what it was."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from linattn import convert_model, load, plan_model
from linattn.convert import LinattnCacheLayer
from linattn.errors import CheckpointError, ConversionError, UnsupportedError
from linattn.feature_maps import Hedgehog

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "pad_token_id": 0}
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = SMALL | LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 2}
DEEPSEEK |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
OWN = "computes its own softmax"
LATENT_REASON = "is latent attention (MLA)"
CROSS_REASON = "whose cross attention has no causal memory"

# model: (sizes, a layer the refusal names, its class, the reason)
REFUSED = {
    "FalconForCausalLM": (SMALL, "transformer.h.0.self_attention", "FalconAttention", OWN),
    "BloomForCausalLM": (
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "transformer.h.0.self_attention",
        "BloomAttention",
        OWN,
    ),
    "MptForCausalLM": (
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
        "transformer.blocks.0.attn",
        "MptAttention",
        OWN,
    ),
    "GPTJForCausalLM": (GPT | {"rotary_dim": 4}, "transformer.h.0.attn", "GPTJAttention", OWN),
    "CodeGenForCausalLM": (GPT | {"rotary_dim": 4}, "transformer.h.0.attn", "CodeGenAttention", OWN),
    "GPTNeoForCausalLM": (
        {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]]},
        "transformer.h.0.attn.attention",
        "GPTNeoSelfAttention",
        OWN,
    ),
    "DebertaForMaskedLM": (SMALL, "deberta.encoder.layer.0.attention.self", "DisentangledSelfAttention", OWN),
    "DebertaV2ForMaskedLM": (SMALL, "deberta.encoder.layer.0.attention.self", "DisentangledSelfAttention", OWN),
    "DeepseekV2ForCausalLM": (DEEPSEEK, "model.layers.0.self_attn", "DeepseekV2Attention", LATENT_REASON),
    "DeepseekV3ForCausalLM": (DEEPSEEK, "model.layers.0.self_attn", "DeepseekV3Attention", LATENT_REASON),
    "T5ForConditionalGeneration": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "d_ff": 48},
        "encoder.block.0.layer.0.SelfAttention",
        "T5Attention",
        CROSS_REASON,
    ),
    "T5EncoderModel": (
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "d_ff": 48},
        "encoder.block.0.layer.0.SelfAttention",
        "T5Attention",
        "relative position bias",
    ),
    "BartForConditionalGeneration": (BART, "model.encoder.layers.0.self_attn", "BartAttention", CROSS_REASON),
    "BartForCausalLM": (BART, "model.decoder.layers.0.encoder_attn", "BartAttention", "is cross attention"),
    "MambaForCausalLM": (
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "backbone.layers.0.mixer",
        "MambaMixer",
        "is linear already",
    ),
    "RwkvForCausalLM": (
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
        "rwkv.blocks.0.attention",
        "RwkvSelfAttention",
        "is linear already",
    ),
    "DogeForCausalLM": (GQA, "model.layers.0.self_attn", "DogeAttention", "makes a mask of its own"),
    "MistralForCausalLM": (
        GQA | {"sliding_window": 8},
        "model.layers.0.self_attn",
        "MistralAttention",
        "has a sliding window of its own (8)",
    ),
}


def build(name: str, sizes: dict[str, object]) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**sizes)).eval()


def answer(model):
    tokens = torch.arange(3, 19)[None]
    both = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(tokens, **both)[0]


def unchanged(model, before):
    """Whether ``model`` is what ``snapshot`` saw: class, config, modules, hooks, weights and answer."""
    kind, config, config_dict, modules, state, out = before
    assert type(model) is kind
    assert model.config is config
    assert model.config.to_dict() == config_dict
    now = {name: (type(m), set(vars(m)), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert now == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(answer(model), out)


def snapshot(model):
    modules = {name: (type(m), set(vars(m)), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return type(model), model.config, model.config.to_dict(), modules, state, answer(model)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_converted_is_refused_untouched(name):
    sizes, layer, attention, reason = REFUSED[name]
    model = build(name, sizes)
    answer(model)  # some families build buffers when they are first called
    before = snapshot(model)
    with pytest.raises(ConversionError) as refusal:
        convert_model(model, window=6, sinks=2)
    for part in (name, layer, f"{attention}: ", reason):
        assert part in str(refusal.value)
    unchanged(model, before)


REMEDIES = {
    "FalconForCausalLM": "let its class call ALL_ATTENTION_FUNCTIONS",
    "DeepseekV3ForCausalLM": "keep it softmax",
    "BartForConditionalGeneration": "convert an encoder or a decoder",
    "BartForCausalLM": "on_unsupported='keep' leaves them as they are",
    "MambaForCausalLM": "nothing is left to convert",
    "MistralForCausalLM": "native_sliding='convert' converts layers with a sliding window",
}


@pytest.mark.parametrize(("name", "remedy"), REMEDIES.items())
def test_the_refusal_says_what_to_do(name, remedy):
    with pytest.raises(ConversionError) as refusal:
        plan_model(build(name, REFUSED[name][0]))
    assert remedy in str(refusal.value)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.TransformerEncoderLayer(8, 2), None], ids=lambda model: type(model).__name__
)
def test_what_is_no_transformers_model_is_refused(model):
    with pytest.raises(ConversionError, match=rf"got {type(model).__name__}, expected a transformers PreTrainedModel"):
        convert_model(model)


def test_a_model_without_attention_is_refused():
    model = build("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]})
    with pytest.raises(ConversionError, match="ResNetModel has no attention layer"):
        convert_model(model)


def test_keeping_what_cannot_be_converted_converts_the_rest():
    sizes = SMALL | {"is_decoder": True, "add_cross_attention": True}
    model = build("BertLMHeadModel", sizes)
    with pytest.raises(ConversionError, match="cross attention") as refusal:
        plan_model(model)
    assert "bert.encoder.layer.0.crossattention.self" in str(refusal.value)
    assert "BertCrossAttention" in str(refusal.value)
    plan = plan_model(model, on_unsupported="keep")
    assert [layer.attention for layer in plan.converted] == ["BertSelfAttention"] * 2
    assert [layer.attention for layer in plan.kept] == ["BertCrossAttention"] * 2
    plan.layers[1].kind = "convert"
    with pytest.raises(ConversionError, match="cannot be converted"):
        convert_model(model, plan=plan)


@pytest.mark.parametrize("name", ["BartForCausalLM", "BertLMHeadModel"])
def test_kept_cross_attention_still_sees_the_encoder(name):
    sizes = BART if name.startswith("Bart") else SMALL | {"is_decoder": True, "add_cross_attention": True}
    model, tokens, encoded = build(name, sizes), torch.arange(3, 19)[None], torch.randn(1, 16, 32)

    def logits(tokens, **options):
        with torch.no_grad():
            return model(tokens, encoder_hidden_states=encoded, **options).logits

    before = logits(tokens)
    convert_model(model, window=12, sinks=4, on_unsupported="keep")
    assert (logits(tokens) - before).abs().max() < 1e-5
    assert not torch.equal(logits(tokens), answer(model))


@pytest.mark.parametrize("name", ["FalconForCausalLM", "DeepseekV3ForCausalLM", "MambaForCausalLM"])
def test_keeping_everything_is_no_conversion(name):
    model = build(name, REFUSED[name][0])
    before = snapshot(model)
    with pytest.raises(ConversionError, match="nothing is left to convert"):
        convert_model(model, on_unsupported="keep")
    unchanged(model, before)


def test_a_converted_model_is_refused_and_stays_converted(make_llama, tokens):
    model = convert_model(make_llama(), window=6, sinks=2)
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"LinattnLlamaForCausalLM is converted already; call revert_model"):
        convert_model(model, window=9)
    unchanged(model, before)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_map_that_fails_at_some_layer_leaves_the_model_as_it_was(make_llama, failing):
    model = make_llama()
    before = snapshot(model)

    def factory(layer):
        if layer.index == failing:
            raise RuntimeError("no map for this layer")
        return Hedgehog(layer.head_dim, num_heads=layer.heads, num_kv_heads=layer.kv_heads)

    with pytest.raises(RuntimeError, match="no map for this layer"):
        convert_model(model, feature_map=factory)
    unchanged(model, before)


def test_a_layer_that_caches_its_keys_elsewhere_says_so():
    """One module run several times a step, with a cache slot for each run, has no single memory."""
    model = build("HrmTextForCausalLM", GQA | {"num_hidden_layers": 1, "H_cycles": 1, "L_cycles": 2})
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(tokens).logits
        convert_model(model, window=12, sinks=4)
        assert (model(tokens, use_cache=False).logits - before).abs().max() < 1e-5
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            model(tokens)


def test_layers_that_share_their_keys_are_kept_out():
    sizes = GQA | {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    sizes |= {"vocab_size_per_layer_input": 64, "layer_types": ["sliding_attention", "full_attention"] * 3}
    model = build("Gemma4ForCausalLM", sizes)
    with pytest.raises(ConversionError, match="shares all its keys and values with other layers"):
        plan_model(model)
    plan = plan_model(model, on_unsupported="keep", window=6, sinks=2)
    assert [layer.index for layer in plan.converted] == [1]
    tokens = torch.arange(3, 24)[None]
    convert_model(model, plan=plan)
    with torch.no_grad():
        cached = model.generate(tokens, do_sample=False, max_new_tokens=8, eos_token_id=None)
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, tokens)


def test_a_cache_layer_of_another_size_is_told():
    layer = LinattnCacheLayer()
    layer.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    with pytest.raises(UnsupportedError, match="6 new tokens, of which its cache layer was given 5"):
        layer.fetch(6, torch.device("cpu"))


@pytest.fixture
def sharded(make_llama, tmp_path):
    convert_model(make_llama(), window=6, sinks=2).save_pretrained(tmp_path, max_shard_size="10KB")
    return tmp_path


def test_a_missing_shard_is_told(sharded):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(sharded)


def test_a_truncated_shard_is_told(sharded):
    shard = max(sharded.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "linattn_llama"}', '{"model_type": 3}'])
def test_a_config_that_is_none_is_told(sharded, text):
    (sharded / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(sharded)):
        load(sharded)


@pytest.mark.parametrize("value", [None, [], "plan", {"format": 1}, {"format": 1, "model_type": "llama", "layers": 3}])
@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
def test_a_plan_that_is_none_is_told_by_every_loader(sharded, value, loader):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"linattn": value}))
    with pytest.raises(CheckpointError):
        loader(sharded)


def test_weights_of_another_size_are_told(sharded, make_llama, tmp_path):
    other = convert_model(make_llama(hidden_size=64), window=6, sinks=2)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((sharded / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "other")


def test_a_module_that_attends_twice_is_refused_with_a_cache() -> None:
    """Its second call would find no cache and forget all that came before."""
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(**GQA)
    model = convert_model(transformers.DiffLlamaForCausalLM(config).eval(), window=4, sinks=1)
    tokens = torch.randint(1, 64, (1, 12))
    assert model(tokens, use_cache=False).logits.isfinite().all()
    with pytest.raises(UnsupportedError, match=r"DiffLlamaAttention attends more than once .* use_cache=False"):
        model(tokens, use_cache=True)
    with pytest.raises(UnsupportedError, match="more than once"):
        model.generate(tokens, max_new_tokens=2)
    assert model(tokens, use_cache=False).logits.isfinite().all()
