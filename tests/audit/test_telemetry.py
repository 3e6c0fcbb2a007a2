"""Telemetry against the dense attention matrices it stands for."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from linattn import convert_model, plan_model
from linattn.audit import layer_telemetry, telemetry
from linattn.convert import ConvertedAttention, LinattnCacheLayer
from linattn.diagnostics import kernel_weights, softmax_weights
from linattn.errors import ConversionError, ShapeError

WINDOW, SINKS, LENGTH = 5, 2, 40


def calls(model, ids):
    """Queries and keys of every converted layer."""
    seen, layers = [], [m for m in model.modules() if isinstance(m, ConvertedAttention)]
    hooks = [layer.register_forward_hook(lambda m, args, out: seen.append((m, *args[:2]))) for layer in layers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def far_share(weights):
    """Mean mass of far tokens over the queries that have any, of weights [1, H, T, T] whose rows sum to one."""
    at = torch.arange(weights.shape[-1])
    far = (at[:, None] - at >= WINDOW) & (at >= SINKS)
    return (weights * far).sum(-1)[:, :, WINDOW + SINKS :].mean((0, 2))


def test_far_mass_is_that_of_the_attention_matrices(llama, windows):
    student, ids = convert_model(llama(), window=WINDOW, sinks=SINKS), windows(3, LENGTH)
    found = layer_telemetry(llama(), student, ids)
    assert [layer.path for layer in found] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    whole = convert_model(llama(), window=LENGTH, sinks=0)  # softmax attention on its own queries and keys
    for i, layer in enumerate(found):
        ours = [calls(student, row[None])[i] for row in ids]
        want = [far_share(kernel_weights(m.feature_map, q, k, window=WINDOW, sinks=SINKS)) for m, q, k in ours]
        torch.testing.assert_close(torch.tensor(layer.far_mass), torch.stack(want).mean(0).float(), rtol=1e-4, atol=0)
        theirs = [calls(whole, row[None])[i] for row in ids]
        want = [far_share(softmax_weights(q, k)) for _, q, k in theirs]
        got = torch.tensor(layer.teacher_far_mass)
        torch.testing.assert_close(got, torch.stack(want).mean(0).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("feature_map", ["elu", None])
def test_retained_tokens_are_not_far(llama, windows, feature_map):
    """In the first layer, where student and teacher have the same queries and keys."""
    retained, ids = 6, windows(2, LENGTH)
    options = {"feature_map": feature_map, "window": WINDOW, "sinks": SINKS, "retained": retained}
    student = convert_model(llama().double(), **options)
    first, second = layer_telemetry(llama().double(), student, ids)
    seen, layer = [], student.model.layers[0].self_attn.linattn
    layer.register_forward_hook(lambda m, args, options, out: seen.append((*args, options)), with_kwargs=True)
    with torch.no_grad():
        student(ids, use_cache=False)
        ((q, k, v, options),) = seen
        scores = layer.scores(k, v, options["rotation"]).repeat_interleave(2, 2).mT  # [B, H, T]
        at = torch.arange(LENGTH)
        behind = (at[:, None] - at >= WINDOW) & (at >= SINKS)
        ranked = scores[:, :, None].masked_fill(~behind, -torch.inf)
        worst = ranked.topk(retained).values[..., -1:]  # [B, H, T, 1]
        far = behind & (ranked < worst)
        exact = softmax_weights(q, k)
        teacher = (exact * far).sum(-1)[:, :, layer.reach :].mean((0, 2))
        phi = layer.feature_map
        features = [phi.forward_queries(q)[0], phi.forward_keys(k)[0].repeat_interleave(2, 2)]
        logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * phi.scale
        estimate = torch.einsum("bthf,bshf->bhts", *features) * (feature_map is not None)
        weights = torch.where(far, estimate, logits.exp()).tril()
        ours = ((weights * far).sum(-1) / weights.sum(-1))[:, :, layer.reach :].mean((0, 2))
    torch.testing.assert_close(torch.tensor(first.teacher_far_mass), teacher.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(first.far_mass), ours.float(), rtol=1e-4, atol=1e-7)
    assert (max(second.far_mass) > 0) == (feature_map is not None)


@pytest.mark.parametrize("at_once", [7, 256])
def test_the_teacher_reads_as_it_does_without_being_watched(llama, windows, monkeypatch, at_once):
    monkeypatch.setattr(telemetry, "QUERIES_AT_ONCE", at_once)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": 20}
    softcap = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_logit_softcapping=0.5))
    sinks = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1))
    for teacher in (llama(), softcap.eval(), sinks.eval()):
        with torch.no_grad():
            for p in teacher.parameters():
                p.copy_(torch.randn_like(p) / 3)
        plan = plan_model(teacher, window=WINDOW, sinks=SINKS, native_sliding="convert")
        outs = []
        hook = teacher.base_model.register_forward_hook(lambda m, args, out: outs.append(out.last_hidden_state))  # noqa: B023
        telemetry._teacher_masses(teacher, plan, windows(1, LENGTH))
        with torch.no_grad():
            teacher(windows(1, LENGTH), use_cache=False)
        hook.remove()
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_sink_logits_take_their_share_of_the_mass(windows):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"])
    torch.manual_seed(0)
    teacher, ids = GptOssForCausalLM(config).eval(), windows(1, LENGTH)
    student = copy.deepcopy(teacher)
    convert_model(student, window=WINDOW, sinks=SINKS)
    for model in (teacher, student):
        torch.nn.init.constant_(model.model.layers[0].self_attn.sinks, -1e4)
    (without,) = layer_telemetry(teacher, student, ids)
    for model in (teacher, student):
        torch.nn.init.constant_(model.model.layers[0].self_attn.sinks, math.log(LENGTH))
    (with_sinks,) = layer_telemetry(teacher, student, ids)
    ((layer, q, k),) = calls(student, ids)  # the first layer's are the teacher's
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * layer.feature_map.scale
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    column = torch.full((1, 2, LENGTH, 1), math.log(LENGTH))
    want = far_share(torch.cat([scores, column], -1).softmax(-1)[..., :LENGTH])
    torch.testing.assert_close(torch.tensor(with_sinks.teacher_far_mass), want, rtol=1e-4, atol=0)
    # All weights are near one here, as the model's are small: D of them, and as much as LENGTH of them is added.
    for a, b in zip(without.far_mass, with_sinks.far_mass, strict=True):
        assert (WINDOW + SINKS) / (WINDOW + SINKS + LENGTH) * a < b < 0.5 * a


def test_a_far_branch_without_weight_has_no_mass(llama, windows):
    student = convert_model(llama(), window=WINDOW, sinks=SINKS)
    with torch.no_grad():
        student.model.layers[1].self_attn.linattn.far_bias.sub_(60)
    first, second = layer_telemetry(llama(), student, windows(2, LENGTH))
    assert min(first.far_mass) > 1e-4
    assert max(second.far_mass) < 1e-12
    assert min(second.teacher_far_mass) > 1e-4


def test_a_far_branch_without_rotary_embedding_is_measured_as_such(llama, windows):
    options = {"feature_map": "elu", "window": WINDOW, "sinks": SINKS, "decay": "data", "far_rope": False}
    student, ids = convert_model(llama(), **options), windows(1, LENGTH)
    layer, seen = student.model.layers[0].self_attn.linattn, []
    torch.nn.init.normal_(layer.gate_weight, std=0.1)
    hook = layer.register_forward_hook(lambda m, args, kw, out: seen.append((*args, kw["rotation"])), with_kwargs=True)
    with torch.no_grad():
        student(ids, use_cache=False)
        student(ids, use_cache=False, position_ids=torch.zeros_like(ids))  # where rotary embedding changes nothing
    hook.remove()
    (q, k, *_), (q_far, k_far, *_) = seen
    assert not torch.allclose(k, k_far, atol=0.1)
    near = torch.einsum("bthd,bihd->bhti", q, k.repeat_interleave(2, 2)).mul(layer.feature_map.scale).exp()
    gates = layer.log_gates(k_far)
    clock = gates.cumsum(1).repeat_interleave(2, 2).transpose(1, 2)
    f_q, f_k = layer.feature_map.forward_queries(q_far).values, layer.feature_map.forward_keys(k_far).values
    far = torch.einsum("bthf,bihf->bhti", f_q, f_k.repeat_interleave(2, 2))
    far = far * (clock[..., None] - clock[..., None, :]).exp()
    at = torch.arange(LENGTH)
    weights = torch.where((at[:, None] - at < WINDOW) | (at < SINKS), near, far).tril()
    found = layer_telemetry(llama(), student, ids)[0]
    want = far_share(weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(torch.tensor(found.far_mass), want, rtol=1e-3, atol=0)
    want = -math.log(2) / gates.mean((0, 1))
    torch.testing.assert_close(torch.tensor(found.half_life), want, rtol=1e-4, atol=0)


def test_half_lives(llama, windows):
    ids = windows(2, LENGTH)
    assert layer_telemetry(llama(), convert_model(llama(), window=5), ids)[0].half_life is None
    fixed = convert_model(llama(), window=WINDOW, decay="fixed")
    with torch.no_grad():
        fixed.model.layers[0].self_attn.linattn.log_half_life.copy_(torch.tensor([math.log(8), math.log(300)]))
    assert layer_telemetry(llama(), fixed, ids)[0].half_life == pytest.approx((8, 300), rel=1e-5)
    data = convert_model(llama(), window=WINDOW, decay="data")
    with torch.no_grad():
        for p in (layer := data.model.layers[0].self_attn.linattn).parameters():
            p.add_(0.1 * torch.randn_like(p))
        gates = torch.stack([layer.log_gates(calls(data, row[None])[0][2]) for row in ids])
    want = (-math.log(2) / gates.double().mean((0, 1, 2))).tolist()
    assert layer_telemetry(llama(), data, ids)[0].half_life == pytest.approx(want, rel=1e-5)


def test_effective_rank_is_that_of_the_state(llama, windows):
    student, ids = convert_model(llama(), window=WINDOW, sinks=SINKS), windows(1, LENGTH)
    with torch.no_grad():
        cache = student(ids, use_cache=True).past_key_values
    for layer, held in zip(layer_telemetry(llama(), student, ids), cache.layers, strict=True):
        assert isinstance(held, LinattnCacheLayer)
        s = torch.linalg.svdvals(held.state.kv[0])
        want = torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1).exp()
        torch.testing.assert_close(torch.tensor(layer.effective_rank), want, rtol=1e-4, atol=0)
        assert layer.greatest_rank == 8
        assert all(1 < rank < 8 for rank in layer.effective_rank)


@pytest.mark.parametrize("bound", [None, 9])
def test_layers_kept_softmax_are_left_out_and_models_given_back(llama, windows, bound):
    options = {"window": WINDOW, "sinks": SINKS}
    teacher, student = llama().train(), convert_model(llama(), keep_softmax=[0], softmax_window=bound, **options)
    before = [dict(module.__dict__) for module in student.modules()]
    (layer,) = layer_telemetry(teacher, student, windows(2, LENGTH))
    assert layer.layer == 1
    every = layer_telemetry(llama(), convert_model(llama(), **options), windows(2, LENGTH))
    assert layer.teacher_far_mass == pytest.approx(every[1].teacher_far_mass)  # the teacher has no bound
    assert [dict(module.__dict__) for module in student.modules()] == before
    assert type(teacher) is type(llama())
    assert teacher.training
    torch.testing.assert_close(dict(teacher.state_dict()), dict(llama().state_dict()), rtol=0, atol=0)


def test_refusals(llama, windows):
    student = convert_model(llama(), window=WINDOW, sinks=SINKS)
    with pytest.raises(ShapeError, match="window \\+ sinks = 7"):
        layer_telemetry(llama(), student, windows(2, 7))
    with pytest.raises(ConversionError, match="no converted layer"):
        layer_telemetry(llama(), llama(), windows(2))
    with pytest.raises(ConversionError, match="converted already"):
        layer_telemetry(student, student, windows(2))
