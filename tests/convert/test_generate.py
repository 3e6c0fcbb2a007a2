"""Everything ``generate`` does, over maps, decays, hybrids, native windows: the tokens of the uncached computation."""

from __future__ import annotations

import contextlib

import pytest
import torch

from linattn import convert_model
from linattn.convert import LinattnCacheLayer, load_state, save_state

NEW = 12
VARIANTS = {
    "hedgehog": ("llama", {}),
    "favor+": ("llama", {"feature_map": "favor+"}),
    "elu-fixed-decay": ("llama", {"feature_map": "elu", "decay": "fixed"}),
    "data-decay": ("llama", {"decay": "data"}),
    "first-kept": ("qwen3", {"keep_softmax": [0]}),
    "last-kept": ("llama", {"keep_softmax": [1]}),
    "native-windows-kept": ("gpt-oss", {}),
    "softcaps": ("gemma2", {"decay": "data"}),
    "no-far-rope": ("qwen3", {"far_rope": False, "decay": "data"}),
    "no-far-rope-of-a-part": ("gpt-neox", {"far_rope": False}),
    "near-sinks": ("qwen3", {"sink_distance": 9}),
    "retained": ("qwen3", {"retained": 7, "far_rope": False, "decay": "fixed"}),
    "native-windows-converted": ("mistral-sliding", {"native_sliding": "convert"}),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request, families):
    family, options = request.param
    return convert_model(families[family].build(), window=6, sinks=2, **options)


@pytest.fixture
def another(families):
    """A smaller assistant, which seldom agrees."""
    return convert_model(families["llama"].build(num_hidden_layers=1), window=4, sinks=1)


def uncached(model, tokens, new=NEW, mask=None):
    """Greedy continuation, every token computed from the whole sequence."""
    call = {}
    with torch.no_grad():
        for _ in range(new):
            if mask is not None:
                seen = torch.cat([mask, mask.new_ones(len(tokens), tokens.shape[1] - mask.shape[1])], 1)
                call = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp_min(0)}
            logits = model(tokens, use_cache=False, **call).logits[:, -1:]
            tokens = torch.cat([tokens, logits.argmax(-1)], 1)
    return tokens


def greedy(model, tokens, new=NEW, **options):
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False} | options
    return model.generate(tokens, max_new_tokens=new, **options)


@pytest.mark.parametrize("length", [1, 5, 8, 30])
def test_greedy(model, tokens, length):
    tokens = tokens[:, :length]
    assert torch.equal(greedy(model, tokens), uncached(model, tokens))


def test_sampling(model, tokens):
    def sample(**options):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "temperature": 0.8} | options
        return greedy(model, tokens, **options)

    got = sample()
    assert got.shape == (6, tokens.shape[1] + NEW)
    assert torch.equal(got, sample(use_cache=False))
    assert not torch.equal(got[0], got[1])


def test_left_padded_batch(model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    got = greedy(model, tokens * mask, attention_mask=mask)
    assert torch.equal(got, uncached(model, tokens * mask, mask=mask))
    assert torch.equal(got[1:, 7:], uncached(model, tokens[1:, 7:]))
    assert torch.equal(got[:1], uncached(model, tokens[:1]))


def test_beam_search(model, tokens):
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(greedy(model, tokens, **options), greedy(model, tokens, use_cache=False, **options))


def test_beam_search_of_a_left_padded_batch(model, tokens):
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    got = greedy(model, tokens * mask, attention_mask=mask, num_beams=3)
    assert torch.equal(got[1:, 7:], greedy(model, tokens[1:, 7:], use_cache=False, num_beams=3))


def test_prompt_lookup(model, tokens):
    tokens = tokens[:1].repeat(1, 3)
    assert torch.equal(greedy(model, tokens, prompt_lookup_num_tokens=5), uncached(model, tokens))


@pytest.mark.parametrize("draft", ["itself", "another"])
def test_assisted(model, another, tokens, draft):
    assistant = model if draft == "itself" else another
    got = greedy(model, tokens[:1], assistant_model=assistant)
    assert torch.equal(got, uncached(model, tokens[:1]))


def test_conversation_continues_from_a_saved_state(model, tokens, tmp_path):
    first = greedy(model, tokens, 8, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens[:, :9]], 1)
    want = uncached(model, turn, 8)
    save_state(first.past_key_values, tmp_path / "state.safetensors")
    restored = load_state(tmp_path / "state.safetensors")
    for cache in (restored, first.past_key_values):
        assert torch.equal(greedy(model, turn, 8, past_key_values=cache), want)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_cache_implementations(model, tokens, implementation):
    got = greedy(model, tokens, cache_implementation=implementation, return_dict_in_generate=True)
    assert torch.equal(got.sequences, uncached(model, tokens))
    assert any(isinstance(layer, LinattnCacheLayer) for layer in got.past_key_values.layers)


@pytest.mark.parametrize("size", [4, 13])
def test_prompt_in_chunks(model, tokens, size):
    assert torch.equal(greedy(model, tokens, prefill_chunk_size=size), uncached(model, tokens))


class Stream(contextlib.nullcontext):
    """A CUDA stream's stand-in: on the CPU every copy is finished when it returns."""

    def wait_stream(self, other):
        pass


def test_offloaded_cache(model, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Stream", lambda *args: Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args: Stream())
    got = greedy(model, tokens, cache_implementation="offloaded", return_dict_in_generate=True)
    assert torch.equal(got.sequences, uncached(model, tokens))
    layers = [layer for layer in got.past_key_values.layers if isinstance(layer, LinattnCacheLayer)]
    assert layers
    assert all(layer._offloaded for layer in layers)


@pytest.mark.parametrize("decay", [None, "data"])
def test_the_cache_is_as_large_after_500_tokens_as_after_50(families, decay):
    model = convert_model(families["llama"].build(max_position_embeddings=512), window=6, sinks=2, decay=decay)
    tokens = families["llama"].inputs(495)["input_ids"]

    def held(length):
        cache = greedy(model, tokens[:, :length], 5, return_dict_in_generate=True).past_key_values
        assert cache.get_seq_length() == length + 4
        return [layer.nbytes for layer in cache.layers]

    assert held(495) == held(45)
