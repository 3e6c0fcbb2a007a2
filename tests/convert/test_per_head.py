"""A state per query head: the conversion of a model whose keys are repeated, with each window held once."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import linattn
from linattn import ConversionPlan, convert_model, plan_model
from linattn.audit import (
    equal_bytes_plan,
    far_off,
    layer_telemetry,
    state_bytes,
)
from linattn.convert import ConvertedAttention, prepare_cache
from linattn.distill import Logits, Transfer, Windows, calibrate, select_layers, train
from linattn.errors import OptionError

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 3
WINDOW, SINKS, RETAINED = 5, 2, 6
NEAR = {"window": WINDOW, "sinks": SINKS}
FORMS = {
    "plain": {},
    "data-decay": {"decay": "data"},
    "no-far-rope": {"decay": "fixed", "far_rope": False},
    "near-sinks": {"far_rope": False, "sink_distance": 9},
    "log-scaled": {"feature_map": "favor+"},
    "positional": {"feature_map": "cosformer"},
}
RETAINING = {
    "retained": {"retained": RETAINED, "decay": "fixed", "far_rope": False},
    "evicting": {"retained": RETAINED, "feature_map": None},
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ConvertedAttention)]


def stirred(model):
    """The model with parameters that differ from head to head."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in layers_of(model):
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def expanded(make_llama, **options):
    """The model of ``make_llama`` with every key/value head written once for each of its query heads."""
    model, plain = make_llama(num_key_value_heads=HEADS, **options).double(), make_llama(**options).double()
    weights = plain.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.unflatten(0, (KV_HEADS, DIM)).repeat_interleave(HEADS // KV_HEADS, 0).flatten(0, 1)
    model.load_state_dict(weights)
    return model


def twins(make_llama, **options):
    """A student of a state per query head, and the same of the :func:`expanded` model, in float64."""
    model = convert_model(make_llama().double(), **(NEAR | options), per_head=True)
    return model, alike(convert_model(expanded(make_llama), **(NEAR | options)), model)


def alike(wide, model):
    """``wide`` with the feature maps, decays and scores of ``model``."""
    for mine, theirs in zip(layers_of(model), layers_of(wide), strict=True):
        theirs.load_state_dict(mine.state_dict())
    return wide


@pytest.fixture(params=(FORMS | RETAINING).values(), ids=(FORMS | RETAINING).keys())
def form(request):
    return NEAR | request.param


@pytest.fixture
def tokens():
    return torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))


def test_it_is_the_conversion_of_a_model_whose_keys_are_written_for_every_head(make_llama, form, tokens):
    model, wide = twins(make_llama, **form)
    alike(wide, stirred(model))
    torch.testing.assert_close(logits(model, tokens), logits(wide, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "qwen3", "mistral-sliding", "phi3"])
def test_softcaps_sink_logits_and_windows_of_a_family_stay(families, name):
    """With one window's tokens it is softmax, with all of them and equal parameters what it was."""
    family = families[name]
    ids, before = family.inputs(40)["input_ids"], family.build()
    plain, model = (convert_model(family.build(), **family.convert, **NEAR, per_head=own) for own in (False, True))
    torch.testing.assert_close(logits(model, ids)[:, :WINDOW], logits(before, ids)[:, :WINDOW], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-4, atol=1e-4)
    assert {layer.repeats for layer in layers_of(model)} == {2}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_with_equal_parameters_of_heads_that_share_keys_it_is_the_student_of_one_state(make_llama, form, tokens):
    plain = stirred(convert_model(make_llama().double(), **NEAR, **form))
    model = convert_model(make_llama().double(), **NEAR, **form, per_head=True)
    for mine, theirs in zip(layers_of(model), layers_of(plain), strict=True):
        weights = theirs.state_dict()
        for key, want in mine.state_dict().items():
            if weights[key].shape != want.shape:
                weights[key] = weights[key].repeat_interleave(HEADS // KV_HEADS, 0)
        mine.load_state_dict(weights)
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-9, atol=1e-9)
    stirred(model)
    assert not torch.allclose(logits(model, tokens), logits(plain, tokens), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "rope"),
    [*((form, {}) for form in (FORMS | RETAINING).values()), (RETAINING["retained"], DYNAMIC)],
    ids=[*FORMS, *RETAINING, "keys kept twice"],
)
def test_read_in_pieces_it_says_what_it_says_at_once(make_llama, options, rope, tokens, check_continuation):
    model = stirred(convert_model(make_llama(**rope).double(), **NEAR, **options, per_head=True))
    want, cache = logits(model, tokens, use_cache=False), prepare_cache(model, DynamicCache(config=model.config))
    edges = [0, 11, 12, 13, 14, 21, 30]
    got = [logits(model, tokens[:, a:b], past_key_values=cache) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-9, atol=1e-9)
    for layer, held in zip(layers_of(model), cache.layers, strict=True):
        state = held.state
        assert state.kv.shape[1] == state.k.shape[1] == HEADS
        assert state.recent_k.shape[2] == state.recent_v.shape[2] == state.sink_k.shape[2] == KV_HEADS
        assert (state.recent_far_k is not None) == bool(rope)
        if layer.retained:
            assert state.kept_k.shape[2] == state.kept_score.shape[2] == HEADS
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **told), model.generate(tokens, **told, use_cache=False))
    check_continuation(model, tokens)


def test_left_padding_changes_nothing(make_llama, form, tokens):
    model = stirred(convert_model(make_llama().double(), **form, per_head=True))
    padded = torch.nn.functional.pad(tokens[:1], [7, 0])
    mask = torch.nn.functional.pad(torch.ones_like(tokens[:1]), [7, 0])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(got[:, 7:], model.generate(tokens[:1], **options))


def test_saved_and_loaded_it_is_the_same_and_older_checkpoints_share_states(make_llama, tmp_path, tokens):
    model = stirred(convert_model(make_llama(), **NEAR, decay="data", retained=RETAINED, per_head=[True, False, True]))
    model.save_pretrained(tmp_path)
    again = linattn.load(tmp_path)
    assert [layer.repeats for layer in layers_of(again)] == [2, 1, 2]
    assert [layer.gate_bias.numel() for layer in layers_of(again)] == [HEADS, KV_HEADS, HEADS]
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert ConversionPlan.from_dict(again.config.linattn) == ConversionPlan.from_dict(model.config.linattn)

    convert_model(make_llama(), **NEAR).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for layer in config["linattn"]["layers"]:
        del layer["per_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not any(layer.per_head for layer in ConversionPlan.from_dict(linattn.load(tmp_path).config.linattn).layers)


def test_the_plan_says_and_checks_it(make_llama):
    plan = plan_model(make_llama(), per_head=True, **NEAR)
    assert {(layer.kv_heads, layer.state_heads, layer.repeats) for layer in plan.layers} == {(KV_HEADS, HEADS, 2)}
    assert str(plan).count("a state per query head") == LAYERS
    assert ConversionPlan.from_json(plan.to_json()) == plan
    bound = plan.keep(0, softmax_window=9).layers[0]
    assert (bound.per_head, bound.state_heads) == (False, KV_HEADS)
    for wrong in (1, "yes", None, [True, False, 0]):
        with pytest.raises(OptionError, match="per_head"):
            plan_model(make_llama(), per_head=wrong)
    plan.layers[1].per_head = 2
    with pytest.raises(OptionError, match="per_head: got 2"):
        plan.check()
    with pytest.raises(OptionError, match="per_head: got 1 of them"):
        plan_model(make_llama(), per_head=[True])


def test_without_grouped_queries_it_changes_nothing(make_llama, tokens):
    plain, model = (
        stirred(convert_model(make_llama(num_key_value_heads=HEADS), **NEAR, decay="data", per_head=own))
        for own in (False, True)
    )
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert state_bytes(model, 100) == state_bytes(plain, 100)


@pytest.mark.parametrize("rope", [{}, DYNAMIC], ids=["turned-back", "kept-twice"])
@pytest.mark.parametrize("retained", [0, RETAINED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_cache(make_llama, retained, dtype, rope):
    options = {**NEAR, "feature_map": "elu", "decay": "fixed", "far_rope": False, "retained": retained}
    plain, model = (convert_model(make_llama(**rope).to(dtype), **options, per_head=own) for own in (False, True))
    for length in (3, 77):
        assert state_bytes(model, length) == state_bytes(model, length, probe=length)
    more = (DIM * DIM + DIM + 1) * 4 + 4 * WINDOW  # sums with their log-scale, the window's log-gates
    if retained:
        more += (
            retained * (2 * DIM * dtype.itemsize + 4 + 4 + 4) + 4 * WINDOW
        )  # pairs, scores, places, ages; the window's scores
        more += retained * (4 if not rope else DIM * dtype.itemsize)  # positions, or keys before rotary embedding
    difference = state_bytes(model, 100).linear - state_bytes(plain, 100).linear
    assert difference == LAYERS * (HEADS - KV_HEADS) * more
    with far_off(model):
        assert state_bytes(model, 77) == state_bytes(model, 77, probe=77)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("retained", [0, RETAINED])
def test_windows_of_equal_bytes_hold_each_key_once(make_llama, retained, by_layer):
    student = convert_model(make_llama(), **NEAR, retained=retained, decay="fixed", per_head=[True, True, False])
    plan = equal_bytes_plan(student, by_layer=by_layer)
    assert not any(layer.per_head for layer in plan.layers)
    spent = state_bytes(student, 500).linear
    control = convert_model(make_llama(), plan=plan)
    pair = 2 * KV_HEADS * DIM * 4
    assert 0 <= spent - state_bytes(control, 500, probe=500).linear < LAYERS * pair
    fixed = 4 * KV_HEADS + 2 * 8 + SINKS * pair  # log-scales, counts, sinks
    if not by_layer:
        assert {layer.window for layer in plan.layers} == {(spent - LAYERS * fixed) // (LAYERS * pair)}
    else:
        assert plan.layers[0].window == plan.layers[1].window > plan.layers[2].window


def test_a_control_of_a_length_has_windows_for_layers_left_softmax(make_llama):
    student = convert_model(make_llama(), **NEAR, keep_softmax=[1], softmax_window=20, per_head=True)
    plan = equal_bytes_plan(student, length=100)
    control = convert_model(make_llama(), plan=plan)
    spent, pair = state_bytes(student, 500).total, 2 * KV_HEADS * DIM * 4
    assert 0 <= spent - state_bytes(control, 500, probe=500).total < LAYERS * pair


STAGES = {
    "transfer": (
        Transfer,
        {"lookup_bonus": 2.0, "lookup_after": 8},
        {"retained": RETAINED, "decay": "data", "far_rope": False},
    ),
    "transfer, decay": (Transfer, {}, {"decay": "fixed", "feature_map": "exp"}),
    "logits": (Logits, {"train": ("maps",)}, {"decay": "data", "far_rope": False}),
}


@pytest.mark.parametrize(("kind", "options", "form"), STAGES.values(), ids=STAGES.keys())
def test_it_learns_as_the_student_whose_keys_are_written_for_every_head(make_llama, kind, options, form, tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 64, 2000).astype(np.uint16))
    stage = kind(steps=4, learning_rate=1e-2, rows=2, length=40, **options)
    model, wide = twins(make_llama, **form)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    losses = []
    for student in (model, wide):
        torch.manual_seed(0)
        with stage.objective(student, make_llama().double()) as objective:
            losses.append(train(student, objective, Windows(path, 40).batches(2), stage).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, start[name])}
    assert {name.rpartition(".")[2] for name in changed} >= {
        "gate_bias" if form["decay"] == "data" else "log_half_life"
    }
    for mine, theirs in zip(layers_of(model), layers_of(wide), strict=True):
        for name, got in mine.state_dict().items():
            torch.testing.assert_close(got, theirs.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("feature_map", ["hedgehog", "favor#"])
def test_calibration_fits_every_head(make_llama, feature_map):
    batches = list(torch.randint(3, 64, (12, 2, 60), generator=torch.Generator().manual_seed(2)))
    model, wide = twins(make_llama, feature_map=feature_map, decay="fixed")
    found, want = calibrate(model, batches), calibrate(wide, batches)
    assert found.losses == pytest.approx(want.losses, rel=1e-3)
    for layer in layers_of(model):
        assert layer.log_half_life.unique().numel() == HEADS


def test_audits_tell_of_each_query_head(make_llama, tokens):
    student, wide = twins(make_llama, decay="fixed", retained=RETAINED)
    alike(wide, stirred(student))
    found = layer_telemetry(make_llama().double(), student, tokens)
    for got, want in zip(found, layer_telemetry(expanded(make_llama), wide, tokens), strict=True):
        assert len(got.half_life) == len(got.effective_rank) == HEADS
        for name in ("far_mass", "teacher_far_mass", "half_life", "effective_rank"):
            assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-3)


def test_layers_that_cost_most_are_found(make_llama):
    windows = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(1))
    model, wide = twins(make_llama)
    mine, theirs = (select_layers(student, windows, keep=1) for student in (model, wide))
    assert mine.kept == theirs.kept
    assert [c.kl for c in mine.costs] == pytest.approx([c.kl for c in theirs.costs], rel=1e-5)
