"""The constant-size cache under everything generation does: always the tokens of the uncached computation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from linattn import convert_model
from linattn.convert import load_state, prepare_cache, save_state
from linattn.convert.cache import MAX_LOOKBACK, LinattnCacheLayer
from linattn.errors import CheckpointError, StateError

NEW = 24
VARIANTS = {
    "all": {},
    "data-decay": {"decay": "data"},
    "fixed-decay": {"decay": "fixed"},
    "random-map": {"feature_map": "favor+"},
    "first-kept": {"keep_softmax": [0]},
    "last-kept": {"keep_softmax": [2]},
    "no-far-rope": {"far_rope": False, "decay": "data"},
    "near-sinks": {"sink_distance": 9},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request, make_llama):
    return convert_model(make_llama(), window=6, sinks=2, **request.param)


def test_chunked_prefill_equals_one_pass(model, tokens):
    cache = prepare_cache(model, DynamicCache(config=model.config))
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([4, 1, 11, 14], 1)]
        assert (torch.cat(parts, 1) - model(tokens, use_cache=False).logits).abs().max() < 1e-4


def fill(model, tokens):
    cache = prepare_cache(model, DynamicCache(config=model.config))
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


def test_bytes_do_not_grow(make_llama, tokens):
    model = convert_model(make_llama(), window=6, sinks=2, decay="data")
    cache = fill(model, tokens)
    before = [layer.nbytes for layer in cache.layers]
    with torch.no_grad():
        model(tokens.repeat(1, 6), past_key_values=cache)
    assert [layer.nbytes for layer in cache.layers] == before
    assert cache.get_seq_length() == 7 * tokens.shape[1]
    assert cache.batch_size == 2


@pytest.mark.parametrize("count", [0, 1, 5, torch.tensor(3)])
def test_rollback_forgets_exactly(model, tokens, count):
    cache = prepare_cache(model, DynamicCache(config=model.config))
    cache.activate_past_recording()
    keep = tokens.shape[1] - int(count)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        cache.crop(0)
        model(tokens[:, 20:], past_key_values=cache)
        cache.crop(-count)
        assert int(cache.get_seq_length()) == keep
        got = model(tokens[:, :6], past_key_values=cache).logits
        want = model(torch.cat([tokens[:, :keep], tokens[:, :6]], 1), use_cache=False).logits[:, keep:]
    assert (got - want).abs().max() < 1e-4


def test_rollback_says_when_it_cannot(make_llama, tokens):
    model = convert_model(make_llama(), window=6, sinks=2)
    cache = fill(model, tokens)
    with pytest.raises(StateError, match="lookback"):
        cache.crop(-2)
    with pytest.raises(StateError, match="minus the"):
        cache.crop(4)


def test_recording_keeps_a_bounded_ring(make_llama):
    model = convert_model(make_llama(layers=1, max_position_embeddings=2048), window=6, sinks=2)
    cache = prepare_cache(model, DynamicCache(config=model.config))
    cache.activate_past_recording()
    with torch.no_grad():
        model(torch.randint(3, 64, (1, MAX_LOOKBACK + 100)), past_key_values=cache)
    assert cache.layers[0].state.lookback == MAX_LOOKBACK


def test_rows_are_selected_and_repeated(make_llama, tokens):
    model = convert_model(make_llama(), window=6, sinks=2, keep_softmax=[1])
    probe = torch.full((1, 1), 7)
    with torch.no_grad():
        want = [model(probe, past_key_values=fill(model, row)).logits for row in tokens.split(1)]
        cache = fill(model, tokens)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
        cache.batch_select_indices(torch.tensor([0, 1, 2]))
        got = model(probe.repeat(3, 1), past_key_values=cache).logits
    assert (got - torch.cat([want[1], want[0], want[1]])).abs().max() < 1e-4


def test_reset_begins_anew(make_llama, tokens):
    model = convert_model(make_llama(), window=6, sinks=2)
    cache = fill(model, tokens)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        got = model(tokens, past_key_values=cache).logits
        assert torch.equal(got, model(tokens, past_key_values=DynamicCache()).logits)


def test_a_cache_of_keys_and_values_is_refused(make_llama, tokens):
    cache = DynamicCache()
    make_llama()(tokens, past_key_values=cache)
    with pytest.raises(StateError, match="holds 30 tokens as keys and values"):
        convert_model(make_llama())(tokens, past_key_values=cache)


def test_a_cache_of_fewer_layers_is_refused(make_llama, tokens):
    cache = DynamicCache()
    cache.layer_class_to_replicate, cache.layers = None, [LinattnCacheLayer()]
    with pytest.raises(StateError, match="has 1 layers, the model asks for layer 1"):
        convert_model(make_llama())(tokens, past_key_values=cache)


def test_saved_states_are_checked(make_llama, tokens, tmp_path):
    from safetensors.torch import save_file
    from transformers import StaticCache

    path = tmp_path / "state.safetensors"
    with pytest.raises(CheckpointError, match="no readable"):
        load_state(path)
    path.write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match="no readable"):
        load_state(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a conversation state"):
        load_state(path)
    model = make_llama()
    static = StaticCache(model.config, max_cache_len=8)
    with pytest.raises(StateError, match="StaticLayer"):
        save_state(static, path)
