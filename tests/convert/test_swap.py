"""Converting in place and back: equal where it must be, atomic, and with the seam honouring masks and packing."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from transformers import LlamaForCausalLM

from linattn import convert_model, feature_maps, plan_model, revert_model
from linattn.convert import swap
from linattn.errors import ConversionError, ShapeError, UnsupportedError

SHORT = {"window": 16, "sinks": 4}
FAR = {"window": 6, "sinks": 2}
HYBRIDS = pytest.mark.parametrize("keep", [(), (0,), (1,)], ids=["all", "first-kept", "second-kept"])


@HYBRIDS
@pytest.mark.parametrize("decay", [None, "fixed", "data"])
def test_short_sequences_are_untouched_and_long_ones_are_not(make_llama, tokens, keep, decay):
    model = make_llama()
    with torch.no_grad():
        short, full = model(tokens[:, :20]).logits, model(tokens).logits
        convert_model(model, **SHORT, keep_softmax=keep, decay=decay)
        assert (model(tokens[:, :20]).logits - short).abs().max() < 1e-5
        assert (model(tokens).logits - full).abs().max() > 1e-3


def test_the_model_stays_what_it_was_and_says_what_it_is(make_llama):
    model = convert_model(make_llama())
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LinattnLlamaForCausalLM"
    assert model.config.model_type == "linattn_llama"
    assert "ConvertedAttention" in repr(model)
    assert "window=128, sinks=4" in repr(model)


def test_reverting_restores_everything(make_llama, tokens):
    model, original = make_llama(), make_llama()
    convert_model(model, **FAR, decay="data", keep_softmax=[1])
    assert revert_model(model) is model
    assert type(model) is LlamaForCausalLM
    assert type(model.model) is type(original.model)
    assert model.config.to_dict() == original.config.to_dict()
    assert model.config._attn_implementation == original.config._attn_implementation
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    attention = model.model.layers[0].self_attn
    assert not attention._forward_pre_hooks
    assert not attention._forward_pre_hooks_with_kwargs
    assert vars(attention).keys() == vars(original.model.layers[0].self_attn).keys()
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    with pytest.raises(ConversionError, match="not a model converted"):
        revert_model(model)


def test_a_failure_half_way_leaves_the_model_as_it_was(make_llama, tokens, monkeypatch):
    model = make_llama()
    before, config = model(tokens).logits, model.config
    build, calls = swap._build, []

    def fail_on_the_last(layer, module):
        calls.append(layer)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return build(layer, module)

    monkeypatch.setattr(swap, "_build", fail_on_the_last)
    with pytest.raises(RuntimeError, match="out of memory"):
        convert_model(model)
    assert type(model) is LlamaForCausalLM
    assert model.config is config
    assert not any("linattn" in name for name, _ in model.named_modules())
    assert torch.equal(model(tokens).logits, before)


def test_models_that_share_a_config_do_not_share_a_conversion(make_llama, tokens):
    first = make_llama()
    second = LlamaForCausalLM(first.config).eval()
    before = second(tokens).logits
    convert_model(first, **FAR)
    assert torch.equal(second(tokens).logits, before)
    assert second.config._attn_implementation != "linattn"
    assert not hasattr(second.config, "linattn")


def test_converting_twice_is_refused(make_llama):
    model = make_llama()
    plan = plan_model(model)
    convert_model(model)
    for options in ({}, {"plan": plan}):
        with pytest.raises(ConversionError, match="converted already"):
            convert_model(model, **options)


def test_dtype_device_and_tied_weights_stay(make_llama):
    model = make_llama(tie_word_embeddings=True).to(torch.bfloat16)
    convert_model(model, decay="fixed")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()


@HYBRIDS
def test_padding_anywhere_changes_nothing(make_llama, tokens, keep):
    model = convert_model(make_llama(), **FAR, keep_softmax=keep)
    row = tokens[:1]
    alone = model(row).logits
    pad = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(row)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    left = model(torch.cat([pad, row], 1), attention_mask=mask, position_ids=positions).logits[:, 5:]
    right = model(torch.cat([row, pad], 1), attention_mask=mask.flip(1)).logits[:, :-5]
    assert (left - alone).abs().max() < 1e-4
    assert (right - alone).abs().max() < 1e-4


@HYBRIDS
def test_packed_documents_do_not_see_each_other(make_llama, tokens, keep):
    model = convert_model(make_llama(), **FAR, keep_softmax=keep)
    first, second = tokens[:1, :13], tokens[1:, :17]
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    want = torch.cat([model(first).logits, model(second).logits], 1)
    got = model(packed, position_ids=positions, use_cache=False).logits
    assert (got - want).abs().max() < 1e-4
    rows = model(packed.repeat(2, 1), position_ids=positions.repeat(2, 1), use_cache=False).logits
    assert (rows - want).abs().max() < 1e-4


def test_boundaries_that_collators_pass_are_honoured(make_llama, tokens):
    model = convert_model(make_llama(), **FAR)
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    call = {"position_ids": positions, "attention_mask": torch.ones(1, 30, dtype=torch.long), "use_cache": False}
    want = model(tokens[:1], position_ids=positions, use_cache=False).logits
    lengths = torch.tensor([0, 13, 30], dtype=torch.int32)
    index = torch.tensor([[0] * 13 + [1] * 17])
    assert not torch.equal(model(tokens[:1], **call).logits, want)
    assert torch.equal(model(tokens[:1], **call, cu_seq_lens_q=lengths).logits, want)
    assert torch.equal(model(tokens[:1], **call, seq_idx=index).logits, want)
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model(tokens[:1], cu_seq_lens_q=lengths, use_cache=True)


def test_what_a_converted_layer_cannot_do_is_said(make_llama, tokens, monkeypatch):
    model = convert_model(make_llama())
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(UnsupportedError, match="pair of tokens"):
        model(tokens, attention_mask=torch.zeros(2, 1, 30, 30))
    with pytest.raises(ShapeError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(2, 20, dtype=torch.long))
    parallel = types.SimpleNamespace(cp_enabled=True, sp_enabled=False)
    state = types.SimpleNamespace(
        AcceleratorState=types.SimpleNamespace(_shared_state={"parallelism_config": parallel})
    )
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    with pytest.raises(UnsupportedError, match="Context parallelism"):
        model(tokens)


def test_a_scale_that_the_layer_does_not_use_is_an_error(make_llama, tokens):
    plan = plan_model(make_llama())
    plan.layers[0].scale = 1.0
    model = convert_model(make_llama(), plan=plan)
    with pytest.raises(ConversionError, match=r"scaling=0\.353553"):
        model(tokens)


def test_hidden_states_are_still_recorded(make_llama, tokens):
    model = make_llama()
    want = len(model(tokens, output_hidden_states=True).hidden_states)
    assert len(convert_model(make_llama())(tokens, output_hidden_states=True).hidden_states) == want


def test_kept_layers_follow_the_chosen_implementation(make_llama, tokens):
    model = convert_model(make_llama(), **FAR, keep_softmax=[1])
    before = model(tokens).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "linattn"
    after = model(tokens).logits
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < 1e-5
    assert revert_model(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_reaches_every_parameter_and_checkpointing_changes_no_gradient(make_llama, tokens, reentrant):
    model = convert_model(make_llama(), **FAR, decay="data", keep_softmax=[1]).train()

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    assert all(torch.isfinite(g).all() for g in plain.values())
    assert all(g.abs().max() > 0 for name, g in plain.items() if "linattn" in name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_autocast_trains_and_decodes(make_llama, tokens):
    """Rotary embedding leaves float32 queries and keys beside bfloat16 values; sums stay float32 all the same."""
    model = convert_model(make_llama(), window=8, sinks=2, decay="data")
    exact = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens, use_cache=True)
        step = model(tokens[:, :1], past_key_values=out.past_key_values)
    out.loss.backward()
    assert step.logits.isfinite().all()
    torch.testing.assert_close(out.logits.float(), exact, atol=0.05, rtol=0.05)
    state = out.past_key_values.layers[0].state
    assert {state.kv.dtype, state.k.dtype, state.log_scale.dtype, state.recent_decay.dtype} == {torch.float32}
    assert state.recent_v.dtype == torch.bfloat16


def test_a_converted_model_can_be_copied_and_pickled(make_llama, tokens):
    model = convert_model(make_llama(), **FAR, keep_softmax=[1])
    want = model(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, want)
        assert twin.config is not model.config
        revert_model(twin)
    assert torch.equal(model(tokens).logits, want)


@pytest.mark.parametrize("saved", ["feature_map", "linattn"])
def test_lora_trains_and_merges(make_llama, tokens, saved):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    model = convert_model(make_llama(), **FAR)
    converted = model(tokens).logits
    idle = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=[saved])
    wrapped = peft.get_peft_model(copy.deepcopy(model), idle).eval()
    assert torch.equal(wrapped(tokens).logits, converted), "an adapter that adds nothing changes nothing"
    cached = wrapped.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, wrapped.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=[saved], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted(tokens, labels=tokens).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert any(f"{saved}.modules_to_save" in name for name in trained)
    assert saved == "feature_map" or any("far_bias" in name for name in trained)
    adapted.eval()
    want = adapted(tokens).logits
    merged = adapted.merge_and_unload()
    assert (merged(tokens).logits - want).abs().max() < 1e-4
    assert type(merged).__name__ == "LinattnLlamaForCausalLM"


@pytest.mark.parametrize("name", [info.name for info in feature_maps.available() if info.causal])
def test_every_causal_map_converts_and_steps(make_llama, tokens, name):
    from transformers import DynamicCache

    model = convert_model(make_llama(layers=2), feature_map=name, **FAR)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([17, 1, 12], 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4
