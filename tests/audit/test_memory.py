"""State bytes: counted by hand, measured from caches, and the window that takes as many."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from linattn import convert_model, plan_model
from linattn.audit import cheaper_from, equal_bytes_control, equal_bytes_plan, far_off, memory, state_bytes
from linattn.convert import ConvertedAttention
from linattn.errors import ConversionError, OptionError, StateError

HEADS, DIM, LAYERS = 2, 8, 2  # key/value heads and their size, attention layers
PAIR = 2 * HEADS * DIM * 4  # bytes of a token's key and value in a layer


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("length", [1, 32, 100])
def test_softmax_keeps_every_key_and_value(llama, length):
    assert state_bytes(llama(), length) == (0, LAYERS * PAIR * length, length)
    assert state_bytes(llama().bfloat16(), length).total == LAYERS * PAIR * length // 2


@pytest.mark.parametrize("far_rope", [True, False])
@pytest.mark.parametrize("decay", [None, "data"])
def test_a_state_has_the_bytes_of_its_tensors(llama, decay, far_rope):
    model = convert_model(llama(), feature_map="elu", window=5, sinks=3, decay=decay, far_rope=far_rope)
    features = 8
    sums = HEADS * (features * DIM + features + 1) * 4  # kv, k, log-scale
    want = LAYERS * (sums + 2 * 8 + (5 + 3) * PAIR + (0 if decay is None else 5 * HEADS * 4))
    want += 0 if far_rope else LAYERS * 5 * 4  # positions, to turn the window's keys back by
    assert state_bytes(model, 10**6) == (want, 0, 10**6)
    with far_off(model):
        assert state_bytes(model, 10**6).linear == LAYERS * (HEADS * 4 + 2 * 8 + (5 + 3) * PAIR)


@pytest.mark.parametrize("kind", ["teacher", "student", "hybrid", "bound", "half", "no-far-rope"])
def test_the_formula_says_what_the_cache_holds_at_that_length(llama, kind):
    model = llama()
    if kind != "teacher":
        options = {"keep_softmax": [1] if kind in ("hybrid", "bound") else [], "far_rope": kind != "no-far-rope"}
        convert_model(model, window=5, decay="fixed", softmax_window=50 if kind == "bound" else None, **options)
    if kind == "half":
        model.bfloat16()
    for length in (3, 77):
        assert state_bytes(model, length) == state_bytes(model, length, probe=length)


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_keys_in_both_forms_count_where_the_state_holds_them(llama, rope_type):
    """Angles that follow the length cannot be had later: the window's keys stay before rotary embedding, too."""
    options = {"feature_map": "elu", "window": 5, "far_rope": False}
    angles = {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}}
    student, plain = convert_model(llama(**angles), **options), convert_model(llama(), **(options | {"far_rope": True}))
    control = equal_bytes_plan(student)  # asked before the model was ever called
    assert state_bytes(student, 77) == state_bytes(student, 77, probe=77)
    more = LAYERS * 5 * (4 if rope_type == "default" else PAIR // 2)
    assert state_bytes(student, 77).linear == state_bytes(plain, 77).linear + more
    assert equal_bytes_plan(student) == control
    for layer in (module for module in student.modules() if isinstance(module, ConvertedAttention)):
        assert layer.keeps_far_keys == (rope_type == "dynamic")


@pytest.mark.parametrize(("kept", "bound"), [([], None), ([0], None), ([0], 50)])
def test_a_constant_memory_is_cheaper_from_some_length_on(llama, kept, bound):
    options = {"keep_softmax": kept, "softmax_window": bound}
    teacher, student = llama(), convert_model(llama(), window=5, decay="fixed", **options)
    length = cheaper_from(teacher, student)
    assert state_bytes(student, length).total < state_bytes(teacher, length).total
    assert state_bytes(student, length - 1).total >= state_bytes(teacher, length - 1).total
    assert cheaper_from(teacher, teacher) is None


def test_a_layer_with_a_window_of_its_own_keeps_no_more_than_it():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    assert [state_bytes(model, length).total for length in (5, 100)] == [2 * PAIR * 5, 2 * PAIR * 11]
    assert state_bytes(model, 100) == state_bytes(model, 100, probe=100)


def test_a_formula_that_is_off_is_not_believed(llama, monkeypatch):
    model = convert_model(llama(), window=5)
    monkeypatch.setattr(memory, "_linear_bytes", lambda model: 1000)
    with pytest.raises(StateError, match="1000"):
        state_bytes(model, 100)


@pytest.mark.parametrize("options", [{"length": 0}, {"length": 5, "probe": 0}])
def test_bad_lengths_are_refused(llama, options):
    with pytest.raises(OptionError, match="length="):
        state_bytes(llama(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("far_rope", [True, False])
@pytest.mark.parametrize("kept", [[], [0]])
def test_the_control_has_the_largest_window_that_fits(llama, dtype, kept, far_rope):
    options = {"window": 5, "sinks": 3, "decay": "fixed", "keep_softmax": kept, "far_rope": far_rope}
    student = convert_model(llama().to(dtype), **options)
    teacher = llama().to(dtype)
    with equal_bytes_control(teacher, student) as control:
        layers = [module for module in control.modules() if isinstance(module, ConvertedAttention)]
        assert [(layer.window, layer.sinks) for layer in layers] == [(layers[0].window, 3)] * (LAYERS - len(kept))
        for length in (50, 500):
            got, budget = state_bytes(control, length), state_bytes(student, length)
            assert got.softmax == budget.softmax
            more = len(layers) * PAIR * dtype.itemsize // 4  # one token more in each window
            assert got.linear <= budget.linear < got.linear + more
    assert type(teacher) is transformers.LlamaForCausalLM


def test_the_control_is_the_teacher_with_a_sliding_window(llama, windows):
    student, teacher, ids = convert_model(llama(), window=5, sinks=0), llama(), windows()
    window = equal_bytes_plan(student).layers[0].window
    sliding = transformers.MistralForCausalLM(
        transformers.MistralConfig(**llama().config.to_dict() | {"model_type": "mistral", "sliding_window": window})
    ).eval()
    sliding.load_state_dict(teacher.state_dict())
    before = logits(teacher, ids)
    with equal_bytes_control(teacher, student) as control:
        torch.testing.assert_close(logits(control, ids), logits(sliding, ids), rtol=1e-4, atol=1e-4)
    assert 5 < window < ids.shape[1] - 5
    assert not torch.allclose(logits(sliding, ids), before, atol=0.1)
    assert torch.equal(logits(teacher, ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_control_is_a_model_of_its_own(llama, windows, dtype):
    student = convert_model(llama().to(dtype), window=5, sinks=3, decay="fixed", keep_softmax=[0], far_rope=False)
    plan = equal_bytes_plan(student)
    assert [(layer.kind, layer.feature_map) for layer in plan.layers] == [("keep", None), ("convert", None)]
    control, teacher = convert_model(llama().to(dtype), plan=plan), llama().to(dtype)
    assert state_bytes(control, 77) == state_bytes(control, 77, probe=77)
    assert state_bytes(control, 77).softmax == state_bytes(student, 77).softmax
    assert equal_bytes_plan(control) == plan  # its bytes buy itself
    with equal_bytes_control(teacher, student) as made:
        assert torch.equal(logits(made, windows()), logits(control, windows()))
    assert not [name for name, _ in control.named_parameters() if "linattn" in name]


@pytest.mark.parametrize("far_rope", [True, False])
def test_each_layer_can_have_a_window_of_its_own_bytes(llama, far_rope):
    teacher = llama()
    layers = len(plan_model(teacher).layers)
    windows = [5 + 7 * index for index in range(layers)]
    student = convert_model(llama(), window=windows, sinks=2, far_rope=far_rope)
    plan = equal_bytes_plan(student, by_layer=True)
    for index, window in enumerate(windows):  # what a student with that window everywhere gets
        alike = convert_model(llama(), window=window, sinks=2, far_rope=far_rope)
        assert plan.converted[index].window == equal_bytes_plan(alike).converted[index].window > window
    assert all(layer.feature_map is None and layer.sinks == 2 for layer in plan.converted)
    with equal_bytes_control(teacher, student, by_layer=True) as control:
        assert state_bytes(control, 500).linear <= state_bytes(student, 500).linear
    with pytest.raises(OptionError, match="by_layer"):
        equal_bytes_plan(student, by_layer=True, length=100)


def test_at_a_given_length_kept_layers_become_windows_too(llama):
    student = convert_model(llama(), window=5, sinks=3, keep_softmax=[0])
    with equal_bytes_control(llama(), student, length=200) as control:
        got, budget = state_bytes(control, 200), state_bytes(student, 200)
        assert got.softmax == 0
        assert got.total <= budget.total < got.total + LAYERS * PAIR


def test_the_control_of_a_bound_layer_keeps_it_as_it_is(llama):
    options = {"window": 5, "sinks": 3, "decay": "fixed", "keep_softmax": [0]}
    student, plain = (convert_model(llama(), **options, softmax_window=window) for window in (50, None))
    ring = (50 + 3) * PAIR + HEADS * 4 + 2 * 8
    assert state_bytes(student, 10**6).total == state_bytes(plain, 10**6).linear + ring
    plan = equal_bytes_plan(student)
    assert [(x.kind, x.feature_map, x.sinks) for x in plan.layers] == [("bound", None, 3), ("convert", None, 3)]
    assert [x.window for x in plan.layers] == [50, equal_bytes_plan(plain).layers[1].window]
    assert equal_bytes_plan(convert_model(llama(), plan=plan)) == plan
    with equal_bytes_control(llama(), student, length=200) as control:
        layers = [module for module in control.modules() if isinstance(module, ConvertedAttention)]
        assert not any(layer.bound for layer in layers)
        assert layers[0].window == layers[1].window
        got, budget = state_bytes(control, 200).total, state_bytes(student, 200).total
        assert got <= budget < got + LAYERS * PAIR


def test_the_teacher_is_given_back_after_an_exception(llama, windows):
    teacher, ids = llama(), windows()
    before = logits(teacher, ids)
    with pytest.raises(KeyError), equal_bytes_control(teacher, convert_model(llama(), window=5)):
        raise KeyError
    assert type(teacher) is transformers.LlamaForCausalLM
    assert torch.equal(logits(teacher, ids), before)


def test_no_window_is_smaller_than_nothing(llama):
    student = convert_model(llama(), feature_map="elu", window=0, sinks=0)
    student.bfloat16()
    assert equal_bytes_plan(student).layers[0].window > 0
    with far_off(student), pytest.raises(OptionError, match="no control"):
        equal_bytes_plan(student)


def test_a_teacher_has_no_bytes_to_match(llama):
    with pytest.raises(ConversionError, match="no converted layer"):
        equal_bytes_plan(llama())
    with pytest.raises(OptionError, match="length"):
        equal_bytes_plan(convert_model(llama()), length=0)
