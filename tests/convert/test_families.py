"""Every family through the whole path: plan, convert, train a step, generate, save and reload, revert."""

from __future__ import annotations

import pytest
import torch

from linattn import convert_model, load, plan_model, revert_model

FAR = {"window": 6, "sinks": 2}
NEW = 10
CHANGE = 1e-5


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def test_the_plan_tells_what_stays_softmax(family):
    plan = plan_model(family.build(), **FAR, **family.convert)
    assert tuple(layer.index for layer in plan.kept) == family.kept
    assert all("sliding window of its own" in layer.reason for layer in plan.kept)
    assert all(layer.causal == family.causal for layer in plan.converted)
    title, header, *rows = str(plan).splitlines()
    assert title == f"{plan.model_type}: {2 - len(family.kept)} of 2 attention layers converted"
    assert header.split() == ["#", "layer", "attention", "heads", "becomes", "window", "sinks", "decay", "why"]
    for layer, row in zip(plan.layers, rows, strict=True):
        assert [str(layer.index), layer.path, layer.attention] == row.split()[:3]
        assert ("hedgehog" in row) == (layer.kind == "convert")


def test_within_the_window_it_is_the_original(family):
    """Causal: up to window + sinks tokens. Bidirectional: up to window tokens, for the first of them see the last."""
    model, inputs = family.build(), family.inputs(24)
    before = logits(model, inputs)
    near = {"window": 20, "sinks": 4} if family.causal else {"window": 37, "sinks": 0}
    convert_model(model, **near, **family.convert)
    assert (logits(model, inputs) - before).abs().max() < 1e-5
    assert before.abs().max() > 0.1


def test_beyond_the_window_it_is_not(family):
    model, inputs = family.build(), family.inputs()
    before = logits(model, inputs)
    assert (logits(convert_model(model, **FAR, **family.convert), inputs) - before).abs().max() > 1e-3


def test_the_model_says_what_it_is(family):
    model = family.build()
    name = type(model).__name__
    text = repr(convert_model(model, **FAR, **family.convert))
    assert text.startswith(f"Linattn{name}(")
    assert "(linattn): ConvertedAttention(" in text
    assert "Hedgehog(" in text
    assert f"window=6, sinks=2, decay=None, causal={family.causal}" in text


def test_a_training_step_follows_a_true_gradient(family):
    """A step along the gradient changes the loss by what the gradient promises, for the new parameters and the old."""
    decay = "data" if family.causal else None
    model = convert_model(family.build(), **FAR, decay=decay, **family.convert).double()
    model.set_experts_implementation("eager")  # the default has no float64
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in family.inputs().items()}
    target = torch.roll(inputs["input_ids"], 5, 1) if "input_ids" in inputs else torch.tensor([1, 4])

    def loss():
        return torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, -2), target.flatten())

    loss().backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    new = [p for name, p in trained.items() if ".linattn." in name]
    old = [p for name, p in trained.items() if ".linattn." not in name]
    assert len(new) == sum(".linattn." in name for name, _ in model.named_parameters())
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    assert all(p.grad.abs().max() > 0 for p in new)
    for parameters in (new, old):
        slope = sum(p.grad.square().sum().item() for p in parameters)
        losses = []
        with torch.no_grad():
            for step in (1, -2):
                for p in parameters:
                    p.add_(p.grad, alpha=step * CHANGE / slope)
                losses.append(loss().item())
        assert losses[0] - losses[1] == pytest.approx(2 * CHANGE, rel=0.02)


def test_cached_generation_is_the_uncached_computation(decoder):
    model = convert_model(decoder.build(), **FAR, **decoder.convert)
    tokens = decoder.inputs(21)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    got = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    for step in range(NEW):
        want = logits(model, {"input_ids": tokens}, use_cache=False)[:, -1]
        assert (got.logits[step] - want).abs().max() < 1e-4
        tokens = torch.cat([tokens, want.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got.sequences, tokens)


def test_left_padding_changes_no_row(decoder):
    model = convert_model(decoder.build(), **FAR, **decoder.convert)
    tokens = decoder.inputs(21)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    got = model.generate(tokens * mask, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for row, start in ((0, 0), (1, 9)):
        alone = tokens[row : row + 1, start:]
        want = model.generate(alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=NEW)
        assert torch.equal(got[row : row + 1, start:], want)


def test_padding_changes_no_encoding(encoder):
    model, tokens = convert_model(encoder.build(), **FAR), encoder.inputs()["input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    batch = logits(model, {"input_ids": tokens * mask, "attention_mask": mask})
    assert (batch[1:, :20] - logits(model, {"input_ids": tokens[1:, :20]})).abs().max() < 1e-5


def test_saved_and_reloaded_it_is_bit_equal(family, tmp_path):
    model, inputs = family.build(), family.inputs()
    convert_model(model, **FAR, feature_map="favor+", **family.convert)
    want = logits(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    for loader in (load, family.auto.from_pretrained):
        loaded = loader(tmp_path, attn_implementation=family.kernel)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded, inputs), want)


def test_reverting_restores_it_bit_for_bit(family):
    model, inputs = family.build(), family.inputs()
    kind, names, config, before = type(model), list(model.state_dict()), model.config.to_dict(), logits(model, inputs)
    convert_model(model, **FAR, **family.convert)
    assert any(".linattn." in name for name in model.state_dict())
    revert_model(model)
    assert torch.equal(logits(model, inputs), before)
    assert type(model) is kind
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
