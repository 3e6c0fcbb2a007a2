"""Ablations: each takes away what it names, nothing else, and gives it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from linattn import convert_model
from linattn.audit import attention_off, far_off, near_off
from linattn.convert import ConvertedAttention, window_only
from linattn.errors import ConversionError, UnsupportedError
from linattn.kernels import kernel_attention

FAR = {"window": 5, "sinks": 2}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[tuple[Tensor, ...], Tensor]]]:
    """What goes into the converted layers and what comes out."""
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, ConvertedAttention)]
    hooks = [layer.register_forward_hook(lambda module, args, out: calls.append((args, out))) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("decay", [None, "fixed", "data"])
def test_far_off_is_the_window_alone(llama, windows, decay):
    model = convert_model(llama(), decay=decay, **FAR)
    other = convert_model(llama(), feature_map="elu", **FAR)  # without a far branch its map does not matter
    with far_off(model), window_only(other):
        got = logits(model, windows())
        assert torch.equal(got, logits(other, windows()))
    assert not torch.allclose(got[:, 7:], logits(model, windows())[:, 7:], atol=0.1)


def test_near_off_reads_every_token_through_the_feature_map(llama, windows):
    model = convert_model(llama(), decay="fixed", **FAR)
    with near_off(model), recorded(model) as calls:
        logits(model, windows())
    layers = [module for module in model.modules() if isinstance(module, ConvertedAttention)]
    for layer, ((q, k, v), out) in zip(layers, calls, strict=True):
        phi, decay = layer.feature_map, layer.log_gates(k)
        want = kernel_attention(q, k, v, feature_map=phi, decay=decay, far_bias=layer.far_bias, scale=phi.scale).out
        assert torch.equal(out, want)


def test_with_attention_off_the_layers_add_nothing(llama, windows):
    model = convert_model(llama(), **FAR)
    with attention_off(model), recorded(model) as calls:
        got = logits(model, windows())
    assert len(calls) == 2
    assert all(not out.any() and out.shape == q.shape for (q, *_), out in calls)
    bare = llama()
    with torch.no_grad():
        for layer in bare.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert torch.equal(got, logits(bare, windows()))


def test_ablations_nest(llama, windows):
    model = convert_model(llama(), **FAR)
    before = logits(model, windows())
    with attention_off(model):
        nothing = logits(model, windows())
    with far_off(model):
        window = logits(model, windows())
        with near_off(model):
            assert torch.equal(logits(model, windows()), nothing)
        assert torch.equal(logits(model, windows()), window)
    assert torch.equal(logits(model, windows()), before)


@pytest.mark.parametrize("bound", [None, 40])
def test_layers_kept_softmax_stay(llama, windows, bound):
    model = convert_model(llama(), keep_softmax=[0], softmax_window=bound, **FAR)
    bare = llama()
    with torch.no_grad():
        bare.model.layers[1].self_attn.o_proj.weight.zero_()
    with attention_off(model):
        torch.testing.assert_close(logits(model, windows()), logits(bare, windows()), rtol=1e-5, atol=1e-5)
    layer = model.model.layers[0].self_attn._modules.get("linattn")
    for off in (far_off, near_off, attention_off):
        with off(model):
            assert layer is None or (layer.window, layer.sinks, "forward" in vars(layer)) == (40, FAR["sinks"], False)


@pytest.mark.parametrize("off", [far_off, near_off, attention_off])
@pytest.mark.parametrize("error", [None, KeyError])
def test_the_model_is_given_back_as_it_was(llama, windows, off, error):
    model = convert_model(llama(), **FAR)
    layer = model.model.layers[0].self_attn.linattn
    layer.far = False  # one that is off already stays so
    before = [dict(module.__dict__) for module in model.modules()]
    answers = logits(model, windows())
    with contextlib.suppress(KeyError), off(model):
        assert not torch.equal(logits(model, windows()), answers)
        if error is not None:
            raise error
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(logits(model, windows()), answers)


@pytest.mark.parametrize("off", [far_off, near_off, attention_off])
def test_models_without_branches_are_refused(llama, off):
    with pytest.raises(ConversionError, match="no converted layer"), off(llama()):
        pass


def test_maps_that_replace_the_attention_are_refused():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = convert_model(BertForMaskedLM(BertConfig(**sizes, num_attention_heads=4)), feature_map="nystromformer")
    with pytest.raises(UnsupportedError, match="as a whole"), far_off(model):
        pass
