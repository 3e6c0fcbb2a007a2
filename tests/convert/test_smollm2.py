"""SmolLM2-135M-Instruct from its GGUF file, converted: whatever the cache goes through, it answers as without one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from linattn import convert_model, load, revert_model
from linattn.convert import LinattnCacheLayer, load_state, save_state

WINDOW, SINKS = 32, 4
NEW = 16
TEXT = (
    "Attention compares every token of a text with every other one. A kernel writes the comparison as an inner product "
    "of features, so that the sum over the past can be kept as one matrix of fixed size, whatever the length. The last "
    "tokens and the first ones matter most: they are compared exactly, and the rest is an estimate that"
)
QUESTION = "What is the capital of France, which river flows through the middle of it, and what do people eat there?"


@pytest.fixture(scope="module")
def pretrained(smollm2_gguf):
    return {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}


@pytest.fixture(scope="module")
def tokenizer(pretrained):
    tokenizer = AutoTokenizer.from_pretrained(**pretrained, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def text(tokenizer):
    """More tokens than window + sinks."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape[1] > 2 * (WINDOW + SINKS) - 8
    return ids


@pytest.fixture(scope="module")
def question(tokenizer):
    """Fewer tokens than window + sinks, and more once it is answered."""
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    assert ids.shape[1] < WINDOW + SINKS < ids.shape[1] + NEW
    return ids


@pytest.fixture(scope="module")
def original_logits(text, pretrained):
    """The model, and its logits before it is converted."""
    model = AutoModelForCausalLM.from_pretrained(**pretrained, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(text).logits


@pytest.fixture(scope="module")
def model(original_logits):
    return convert_model(original_logits[0], feature_map="favor+", window=WINDOW, sinks=SINKS, decay="fixed")


def generate(model, tokens, new=NEW, **options):
    call = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": new} | options
    return model.generate(tokens, min_new_tokens=new, **call)


def check_greedy(model, sequences, new=NEW):
    """Each of the last ``new`` tokens is what the whole sequence before it, read without a cache, calls for."""
    with torch.no_grad():
        logits = model(sequences[:, :-1], use_cache=False).logits[:, -new:]
    logits[..., model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(sequences[:, -new:], logits.argmax(-1))


@pytest.fixture(scope="module")
def answers(model, text, question):
    """Both prompts, continued."""
    return [generate(model, tokens, return_dict_in_generate=True) for tokens in (question, text)]


def test_within_window_and_sinks_it_is_the_original(model, original_logits, text):
    before, near = original_logits[1], WINDOW + SINKS
    with torch.no_grad():
        after = model(text).logits
        alone = model(text[:, :near]).logits
    assert (after[:, :near] - before[:, :near]).abs().max() <= 1e-4
    assert (alone - before[:, :near]).abs().max() <= 1e-4
    assert (after[:, near:] - before[:, near:]).abs().max() > 0.1


def test_greedy(model, answers):
    for got in answers:
        check_greedy(model, got.sequences)
        assert all(isinstance(layer, LinattnCacheLayer) for layer in got.past_key_values.layers)


def test_beam_search(model, text, question):
    for tokens in (question, text):
        options = {"new": 8, "num_beams": 2, "num_return_sequences": 2}
        assert torch.equal(generate(model, tokens, **options), generate(model, tokens, use_cache=False, **options))


def stranger(model):
    """A random assistant, which is always wrong."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return convert_model(LlamaForCausalLM(LlamaConfig(vocab_size=model.config.vocab_size, **sizes)).eval())


@pytest.mark.parametrize("draft", ["prompt", "itself", "stranger"])
def test_assisted(model, text, question, answers, draft):
    options = {
        "prompt": {"prompt_lookup_num_tokens": 4},
        "itself": {"assistant_model": model},
        "stranger": {"assistant_model": stranger(model)},
    }
    for tokens, want in zip((question, text), answers, strict=True):
        assert torch.equal(generate(model, tokens, **options[draft]), want.sequences)


def test_left_padded_batch(model, tokenizer, text, question, answers):
    batch = tokenizer([QUESTION, TEXT], padding=True, return_tensors="pt")
    assert batch.attention_mask.sum(1).tolist() == [question.shape[1], text.shape[1]]
    got = generate(model, batch.input_ids, attention_mask=batch.attention_mask)
    for row, want in zip(got, answers, strict=True):
        assert torch.equal(row[-want.sequences.shape[1] :], want.sequences[0])


@pytest.mark.parametrize("prompt", [0, 1], ids=["question", "text"])
def test_a_conversation_resumes_from_its_saved_state(model, answers, tokenizer, prompt, tmp_path):
    sequences = answers[prompt].sequences
    first = generate(model, sequences[:, :-NEW], 6, return_dict_in_generate=True)
    assert torch.equal(first.sequences, sequences[:, : 6 - NEW])
    save_state(first.past_key_values, tmp_path / "state.safetensors")
    reply = tokenizer(" And so, to say it in other words:", return_tensors="pt").input_ids
    turn = torch.cat([first.sequences, reply], 1)
    got = generate(model, turn, 8, past_key_values=load_state(tmp_path / "state.safetensors"))
    assert torch.equal(got[:, :-8], turn)
    check_greedy(model, got, 8)


def test_saved_and_reloaded_it_is_bit_equal_and_reverts(model, original_logits, text, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(loaded(text).logits, model(text).logits)
        assert torch.equal(revert_model(loaded)(text).logits, original_logits[1])
    assert type(loaded) is LlamaForCausalLM
