"""Layers to keep: measured costs are KLs of the models they name, and a layer that matters is found."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from torch import Tensor

import linattn
from linattn import convert_model
from linattn.distill import head_costs, keep_softmax, select_layers
from linattn.distill.logits import forward_kl
from linattn.errors import OptionError, ShapeError

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
FAR = {"window": 5, "sinks": 2}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(3, 61, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher(llama):
    """Four layers, of which the third one's attention matters by far the most, and then the first one's."""
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        for layer, gain in zip(model.model.layers, (0.03, 0.001, 1.0, 0.001), strict=True):
            layer.self_attn.o_proj.weight.mul_(gain)
    return model


def kl(teacher, layers, windows) -> list[float]:
    """Mean KL of each window of a model of which only ``layers`` are converted."""
    student = convert_model(copy.deepcopy(teacher), layers=layers, **FAR)
    with torch.no_grad():
        both = zip(student(windows).logits, teacher(windows).logits, strict=True)
        return [forward_kl(a, b).mean().item() for a, b in both]


def test_a_layer_alone_costs_the_kl_of_the_model_that_converts_no_other(teacher, windows):
    seen = []
    model = convert_model(copy.deepcopy(teacher), **FAR).train()
    found = select_layers(model, windows, keep=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in (1, 2, 3, 4, 5, 6)]
    assert found.kept == (2, 0)
    assert (found.chosen.kept, found.uniform.kept) == ((2, 0), (1, 3))
    for cost in (found.chosen, found.uniform):
        want = torch.tensor(kl(teacher, sorted({0, 1, 2, 3} - {*cost.kept}), windows)).double()
        assert cost.kl == pytest.approx(want.mean().item(), rel=1e-3, abs=1e-7)
        assert cost.standard_error == pytest.approx(want.std().item() / math.sqrt(3), rel=1e-3, abs=1e-7)
    assert found.chosen.kl < found.uniform.kl
    assert [layer.kind for layer in found.plan.layers] == ["keep", "convert", "keep", "convert"]
    assert "by KL" in found.plan.layers[2].reason
    assert {cost.layer for cost in found.costs} == {0, 1, 2, 3}
    for cost in found.costs:
        want = torch.tensor(kl(teacher, [cost.layer], windows)).double()
        assert cost.kl == pytest.approx(want.mean().item(), rel=1e-3, abs=1e-7)
        assert cost.standard_error == pytest.approx(want.std().item() / math.sqrt(3), rel=1e-3, abs=1e-7)
        assert (cost.path, cost.kept) == (f"model.layers.{cost.layer}.self_attn", 0)
    # The model is as it was: converted in every layer, in its mode.
    assert model.training
    again = convert_model(copy.deepcopy(teacher), **FAR)
    assert torch.equal(model.eval()(windows).logits, again(windows).logits)
    assert math.isnan(select_layers(model, windows[:1], keep=1).costs[0].standard_error)


def test_greedy_measures_anew_beside_what_it_has_chosen(teacher, windows):
    model = convert_model(copy.deepcopy(teacher), **FAR)
    found = select_layers(model, windows, keep=2, method="greedy")
    assert [cost.kept for cost in found.costs] == [0, 0, 0, 0, 1, 1, 1]
    assert found.kept[0] == 2
    for cost in found.costs:
        kept = {cost.layer, *found.kept[: cost.kept]}
        want = torch.tensor(kl(teacher, sorted({0, 1, 2, 3} - kept), windows)).mean().item()
        assert cost.kl == pytest.approx(want, rel=1e-3, abs=1e-7)
    last = [cost for cost in found.costs if cost.kept == 1]
    assert found.kept[1] == min(last, key=lambda cost: cost.kl).layer
    assert found.chosen.kl == pytest.approx(min(cost.kl for cost in last), rel=1e-6)


def test_the_teacher_of_a_sliding_layer_is_its_own_window(windows):
    config = transformers.MistralConfig(**SIZES, sliding_window=9)
    teacher = transformers.MistralForCausalLM(config).eval()
    model = convert_model(copy.deepcopy(teacher), native_sliding="convert", **FAR)
    found = select_layers(model, windows, keep=1)
    for cost in found.costs:
        student = convert_model(copy.deepcopy(teacher), native_sliding="convert", layers=[cost.layer], **FAR)
        want = forward_kl(student(windows).logits.flatten(0, 1), teacher(windows).logits.flatten(0, 1)).mean().item()
        assert cost.kl == pytest.approx(want, rel=1e-2)


def test_uniform_layers_are_spaced_evenly(llama, windows):
    model = convert_model(llama(num_hidden_layers=6), **FAR)
    assert select_layers(model, windows, keep=2, method="uniform").kept == (1, 4)
    evenly = select_layers(model, windows, keep=3, method="uniform")
    assert evenly.kept == evenly.chosen.kept == (1, 3, 5)
    assert evenly.chosen == evenly.uniform
    none = select_layers(model, windows, keep=0)
    assert (none.kept, none.costs, none.plan) == ((), (), linattn.ConversionPlan.from_dict(model.config.linattn))


def test_indices_are_those_of_the_plan_where_layers_are_kept_already(teacher, windows):
    model = convert_model(copy.deepcopy(teacher), keep_softmax=(2,), **FAR)
    found = select_layers(model, windows, keep=1)
    assert found.kept == (0,)
    assert [layer.kind for layer in found.plan.layers] == ["keep", "convert", "keep", "convert"]


def test_a_head_costs_the_kl_of_its_own_conversion(teacher, windows):
    model = convert_model(copy.deepcopy(teacher), **FAR)
    with torch.no_grad():  # only head 1 of the third layer is let through
        for layer in model.model.layers:
            mask = torch.zeros_like(layer.self_attn.o_proj.weight)
            mask[:, 8:16] = layer.self_attn.layer_idx == 2
            layer.self_attn.o_proj.weight.mul_(mask)
    found = head_costs(model, windows[:1])
    assert list(found) == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert [len(heads) for heads in found.values()] == [4] * 4
    costs = torch.tensor([*found.values()])
    assert costs[2, 1] > 1e-3
    costs[2, 1] = 0
    assert costs.abs().max() < 1e-6


def test_kept_layers_leave_what_the_others_learned(teacher, windows):
    model = convert_model(copy.deepcopy(teacher), feature_map="favor+", decay="data", **FAR)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if ".linattn." in name else None
    frozen = dict(model.named_parameters())["model.embed_tokens.weight"].requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items() if ".linattn." in name}
    assert keep_softmax(model, 2, 0) is model
    after = {name: t for name, t in model.state_dict().items() if ".linattn." in name}
    assert after.keys() == {name for name in before if ".layers.1." in name or ".layers.3." in name}
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert [layer["kind"] for layer in model.config.linattn["layers"]] == ["keep", "convert", "keep", "convert"]
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.model.layers[1].self_attn.linattn.parameters())
    assert (
        model.model.layers[2]
        .self_attn(
            torch.ones(1, 3, 32),
            position_embeddings=model.model.rotary_emb(torch.ones(1), torch.arange(3)[None]),
            attention_mask=None,
        )[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("method", ["alone", "greedy"])
def test_layers_are_chosen_beside_bound_ones_and_bound_themselves(teacher, windows, method):
    model = convert_model(copy.deepcopy(teacher), decay="fixed", **FAR)
    with torch.no_grad():
        model.model.layers[1].self_attn.linattn.far_bias.add_(0.5)
    plain = copy.deepcopy(model)
    assert keep_softmax(model, 2, softmax_window=40) is model
    keep_softmax(plain, 2)
    assert torch.equal(model.state_dict()["model.layers.1.self_attn.linattn.far_bias"], torch.full((4,), 0.5))
    want, got = (select_layers(m, windows, keep=1, method=method, softmax_window=30) for m in (plain, model))
    assert got.kept == want.kept == (0,)
    assert sorted(cost.layer for cost in got.costs) == [0, 1, 3]
    for a, b in zip(got.costs, want.costs, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-7)
    assert [(x.kind, x.window) for x in got.plan.layers] == [
        ("bound", 30),
        ("convert", 5),
        ("bound", 40),
        ("convert", 5),
    ]
    keep_softmax(model, *got.kept, softmax_window=30)
    assert model.config.linattn["layers"][0]["kind"] == "bound"
    with torch.no_grad():
        tokens = windows[:, :30]
        torch.testing.assert_close(
            model(tokens).logits, keep_softmax(plain, *got.kept)(tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"keep": 4}, OptionError, "0 ≤ keep < 4"),
        ({"keep": -1}, OptionError, "keep=-1"),
        ({"keep": 1, "method": "guess"}, OptionError, "alone, greedy, uniform"),
    ],
)
def test_options_outside_their_domain_are_refused(teacher, windows, options, error, says):
    model = convert_model(teacher, **FAR)
    with pytest.raises(error, match=says):
        select_layers(model, windows, **options)


def test_tokens_that_measure_nothing_are_refused(teacher, windows):
    model = convert_model(teacher, **FAR)
    with pytest.raises(OptionError, match=r"fit in window \+ retained \+ sinks = 7"):
        select_layers(model, windows[:, :7], keep=1)
    with pytest.raises(ShapeError, match="expected \\[N, T\\]"):
        select_layers(model, windows[0], keep=1)
