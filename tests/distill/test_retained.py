"""Retained tokens under training: the split at the expiry and its losses against every pair of tokens; scores learn."""

from __future__ import annotations

import copy
import dataclasses
import heapq
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import linattn
from linattn import convert_model
from linattn.convert import ConvertedAttention
from linattn.convert.plan import LayerPlan
from linattn.convert.rotary import Rotation
from linattn.distill import Logits, Transfer, Windows, calibrate, distill, select_layers, split_attention, train
from linattn.distill import logits as logits_module
from linattn.distill import scores as scores_module
from linattn.distill import targets as targets_module
from linattn.distill import transfer as transfer_module
from linattn.distill.engine import Batch
from linattn.distill.layers import expiry, trainable_layers
from linattn.distill.scores import LookupRegression, attended, auc, explained, poisson_loss
from linattn.distill.transfer import LayerErrors, far_log_mass, far_output
from linattn.errors import ConversionError, OptionError

HERE = [str(Path(__file__).parent), str(Path(linattn.__file__).parents[1])]
LENGTH, WINDOW, SINKS, RETAINED = 31, 5, 2, 6
FAR = {"window": WINDOW, "sinks": SINKS}
KEEPS = FAR | {"retained": RETAINED}
FIRST = WINDOW + SINKS + RETAINED


def layer(feature_map: str, decay: str | None, far_rope: bool = True, **options: Any) -> ConvertedAttention:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 0.4, "far_rope": far_rope}
    sizes |= KEEPS | {"recency": 0.05} | options
    torch.manual_seed(0)
    plan = LayerPlan(0, "x", "X", "convert", feature_map=feature_map, decay=decay, **sizes)
    module = ConvertedAttention(plan, dtype=torch.float64)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 8)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * q, k, v


def embedded(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Rotation]:
    angle = torch.randn(1, LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 2)
    after = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin())
    q, k = (x.transpose(1, 2) for x in after)
    return q, k, Rotation(apply_rotary_pos_emb, angle.cos(), angle.sin())


def by_stream(scores: Tensor) -> Tensor:
    """``[B, T, Hkv]`` → far ``[B, Hkv, T, T]`` bool: what leaves the window enters a heap, whose worst drops out."""
    far = torch.zeros(scores.shape[0], scores.shape[2], LENGTH, LENGTH, dtype=torch.bool)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[2]):
            heap: list[tuple[float, int]] = []
            for t in range(LENGTH):
                if (j := t - WINDOW) >= SINKS:
                    heapq.heappush(heap, (scores[b, j, h].item(), -j))
                    if len(heap) > RETAINED:
                        far[b, h, t:, -heapq.heappop(heap)[1]] = True
    return far


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log mass over the keys ``seen [B, Hkv, T, T]``, of ``log_weights [B, H, T, T]``."""
    groups = q.shape[2] // k.shape[2]
    log_weights = log_weights.masked_fill(~seen.repeat_interleave(groups, 1), -torch.inf)
    mass = log_weights.logsumexp(-1)
    weights = (log_weights - mass.nan_to_num(neginf=0.0)[..., None]).exp()
    return torch.einsum("bhti,bihv->bthv", weights, v.repeat_interleave(groups, 2)), mass.transpose(1, 2)


def logits(q: Tensor, k: Tensor, softcap: float | None = None) -> Tensor:
    found = torch.einsum("bthd,bihd->bhti", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * 0.4
    return found if softcap is None else softcap * torch.tanh(found / softcap)


def far_log_weights(module: ConvertedAttention, q: Tensor, k: Tensor) -> Tensor:
    """``[B, H, T, T]`` of the far branch, of every pair."""
    (f_q, a_q), (f_k, a_k) = module.feature_map.forward_queries(q), module.feature_map.forward_keys(k)
    groups = q.shape[2] // k.shape[2]
    found = torch.einsum("bthf,bihf->bhti", f_q, f_k.repeat_interleave(groups, 2)).log()
    found = found + module.far_bias[:, None, None]
    if a_q is not None:
        found = found + a_q.movedim(2, 1)[..., None]
    if a_k is not None:
        found = found + a_k.repeat_interleave(groups, 2).movedim(2, 1)[..., None, :]
    gates = module.log_gates(k)
    if gates is not None:
        clock = gates.expand(*k.shape[:3]).repeat_interleave(groups, 2).movedim(2, 1).cumsum(2)
        found = found + clock[..., None] - clock[..., None, :]
    return found


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], module: ConvertedAttention, bound: float) -> None:
    """Values, and gradients of their sum under random weights."""
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in module.named_parameters() if not name.startswith("score.")}
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in want]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(xs, weights, strict=True)), list(parameters.values()))
        for xs in (got, want)
    ]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    for name, a, b in zip(parameters, *gradients, strict=True):
        assert b.abs().max() > 0, name
        assert (a - b).abs().max() <= bound * b.abs().max(), name


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sink logits": {"sink_logits": torch.tensor([0.5, -1.0, 3.0, 8.0])},
    "native window": {"native_window": 17},
}


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("case", CASES)
def test_the_split_at_the_expiry_equals_a_dense_computation(case, chunk):
    module, (q, k, v), options = layer("hedgehog", None), inputs(), CASES[case]
    ends = expiry(module, k, v, {})
    far = by_stream(module.scores(k, v))
    at = torch.arange(LENGTH)
    assert torch.equal(at[:, None] >= ends[:, :, None], far)
    assert (far.sum(-1)[..., FIRST:] == at[FIRST:] - FIRST + 1).all()

    split = split_attention(q, k, v, window=WINDOW, sinks=SINKS, scale=0.4, expiry=ends, chunk=chunk, **options)
    seen = at[:, None] - at >= 0
    if "native_window" in options:
        seen = seen & (at[:, None] - at < options["native_window"])
    log_weights = logits(q, k, options.get("softcap"))
    for got, where in ((split[::2], seen & ~far), (split[1::2], seen & far)):
        out, mass = dense(q, k, v, where, log_weights)
        if "sink_logits" in options and where is not seen & far and got[0] is split.near:
            with_sink = torch.logaddexp(mass, options["sink_logits"].double())
            out, mass = out * (mass - with_sink).exp()[..., None], with_sink
        torch.testing.assert_close(got, (out, mass), rtol=1e-12, atol=1e-12)


def test_kernels_split_and_tell_the_attention_that_keys_get_alike():
    """What a GPU computes with; without one, in Triton's interpreter."""
    pytest.importorskip("triton")
    from linattn.kernels.triton.expiring import received_attention

    module, tensors = layer("hedgehog", None), inputs()
    ends = expiry(module, *tensors[1:], {})
    want = split_attention(*tensors, window=WINDOW, sinks=SINKS, scale=0.4, expiry=ends)
    mass = torch.logaddexp(want.log_near, want.log_far)
    keys_get = scores_module._received(module, *tensors[:2], mass, None)
    top = scores_module._received(module, *tensors[:2], mass, None, 8, largest=True)
    gpu = torch.cuda.is_available()
    device, dtype, bound = ("cuda", torch.float16, 1e-2) if gpu else ("cpu", torch.float32, 1e-4)
    q, k, v = (x.to(device, dtype) for x in tensors)
    split = targets_module._by_difference(q, k, v, FIRST, SINKS, 0.4, ends.to(device))
    got = received_attention(q, k, mass.to(device), scale=0.4, after=WINDOW).transpose(1, 2)
    largest = received_attention(q, k, mass.to(device), scale=0.4, after=8, largest=True).transpose(1, 2)
    for a, b in zip((*split, got, largest), (*want, keys_get, top), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("decay", [None, "fixed", "data"])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "hedgehog"])
def test_the_far_branch_apart_equals_a_dense_computation(feature_map, decay, dtype, bound):
    module = layer(feature_map, decay)
    q, k, v = inputs()
    ends = expiry(module, k, v, {})
    out, log_mass = dense(q, k, v, by_stream(module.scores(k, v)), far_log_weights(module, q, k))
    want = [x[:, FIRST:].to(dtype) for x in (out, log_mass)]
    guess = want[1].detach() + torch.randn(want[1].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    module, (q, k, v) = copy.deepcopy(module).to(dtype), (x.to(dtype) for x in (q, k, v))
    out, log_mass = dense(q, k, v, torch.arange(LENGTH)[:, None] >= ends[:, :, None], far_log_weights(module, q, k))
    got = far_output(module, q, k, v, ends), far_log_mass(module, q, k, guess, ends)
    torch.testing.assert_close(got, tuple(want), rtol=bound, atol=bound)
    close(got, (out[:, FIRST:], log_mass[:, FIRST:]), module, bound)


@pytest.mark.parametrize("far_rope", [True, False])
@pytest.mark.parametrize("case", ["plain", "softcap", "native window"])
def test_the_loss_is_that_of_its_terms(case, far_rope):
    """Of a layer alone; scores, and without rotary embedding maps and gates, read queries and keys before it."""
    options = {"softcap": None, "sink_logits": None} | {x: y for x, y in CASES[case].items() if x == "softcap"}
    module = layer("hedgehog", "data", far_rope, native_window=CASES[case].get("native_window"))
    q_far, k_far, v = inputs()
    far = by_stream(module.scores(k_far, v))
    q, k, rotation = embedded(q_far, k_far)
    options["rotation"] = rotation
    if far_rope:
        q_far, k_far = q, k
    stage = Transfer(steps=1, far_weight=0.7, mass_weight=0.2)
    errors = LayerErrors({"layer": module}, stage, lambda *_, **__: module(q, k, v, **options))
    held_out = errors(Batch(torch.zeros(1, 1), held_out=True))
    module.zero_grad()
    scores = module.score(rotation.undo(q, k)[1], v)
    found = errors(Batch(torch.zeros(1, 1)))
    assert held_out == found
    assert not torch.equal(scores, module.score(rotation.undo(q, k)[1], v))

    at = torch.arange(LENGTH)
    gap = at[:, None] - at
    seen = (gap >= 0) & (gap < (module.native_window or LENGTH))
    log_weights = logits(q, k, options["softcap"])
    out, mass = dense(q, k, v, seen.expand(2, 2, -1, -1), log_weights)
    want_far, want_mass = (x[:, FIRST:] for x in dense(q, k, v, seen & far, log_weights))
    got_far, got_mass = (x[:, FIRST:] for x in dense(q_far, k_far, v, far, far_log_weights(module, q_far, k_far)))
    near = logits(q, k, options["softcap"]).masked_fill((far | (gap < 0)).repeat_interleave(2, 1), -torch.inf)
    both = torch.where(far.repeat_interleave(2, 1), far_log_weights(module, q_far, k_far), near)
    hybrid, _ = dense(q, k, v, (gap >= 0).expand(2, 2, -1, -1), both)
    some = want_mass.isfinite()
    terms = {
        "hybrid": (hybrid - out).square().sum() / out.square().sum(),
        "far": (torch.where(some[..., None], got_far, 0) - want_far).square().sum() / want_far.square().sum(),
        "mass": (got_mass - want_mass)[some].square().mean(),
    }
    share = (log_weights - mass.transpose(1, 2)[..., None]).exp() * (seen & (gap >= WINDOW))
    told = slice(SINKS, LENGTH - WINDOW - (LENGTH - WINDOW - SINKS) // 2)
    share = (share.unflatten(1, (2, 2)).mean(2).sum(2) / (LENGTH - WINDOW - at)).transpose(1, 2)[:, told]
    target = (share + 1e-6).log()
    target, predicted = (x - x.mean((0, 1)) for x in (target, scores[:, told]))
    r2 = 1 - (predicted - target).square().sum() / target.square().sum()
    want = {"loss": terms["hybrid"] + 0.7 * terms["far"] + 0.2 * terms["mass"]} | terms
    numbers = {name: value.item() for name, value in want.items()} | {"score_r2": r2.item()}
    assert found == pytest.approx(numbers, rel=1e-5)
    parameters = {name: p for name, p in module.named_parameters() if not name.startswith("score.")}
    for (name, p), gradient in zip(
        parameters.items(), torch.autograd.grad(want["loss"], list(parameters.values())), strict=True
    ):
        assert (p.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_the_loss_of_scores_is_least_at_the_log_of_the_expected_share():
    share = torch.tensor([[1e-5, 0.2], [3e-5, 0.0], [5e-5, 0.1]])
    best = share.mean(0).log()
    grid = torch.linspace(-12, 12, 97)
    losses = torch.stack([poisson_loss((best + x).expand(3, 2), share) for x in grid])
    assert grid[losses.argmin()] == 0
    assert (losses.diff().diff() >= -1e-2 * losses.diff().abs()[1:]).all()  # convex, also where it is linear
    assert losses.isfinite().all()
    assert poisson_loss(torch.full((3, 2), 1e3), share).isfinite()
    target = (share + 1e-6).log()[None]
    assert explained(target, share[None]) == pytest.approx(1)
    assert explained(target.mean(1, keepdim=True).expand(1, 3, 2), share[None]) == pytest.approx(0, abs=1e-6)


def rank_of_attention(model: nn.Module, tokens: Tensor) -> list[float]:
    """Of each layer that retains tokens, Spearman's correlation of scores and the attention that tokens get."""
    found = []

    def spying(module: ConvertedAttention, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, share = attended(module, *args)
        ranks = [x.argsort(1).argsort(1).double() for x in (module.score(keys, values), share)]
        a, b = (x - x.mean(1, keepdim=True) for x in ranks)
        found.append(((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).mean().item())
        return keys, values, share

    with pytest.MonkeyPatch.context() as patch, Transfer(steps=1, length=tokens.shape[1]).objective(model) as objective:
        patch.setattr(transfer_module, "attended", spying)
        objective(Batch(tokens, held_out=True))
        for p in objective.parameters.values():
            p.grad = None
    return found


def test_scores_learn_to_rank_tokens_that_were_not_trained_on(llama, tmp_path):
    tokens = np.random.default_rng(0).integers(3, 61, 14000).astype(np.uint16)
    np.save(tmp_path / "train.npy", tokens[:12000])
    unseen = torch.from_numpy(tokens[12000:13600].astype(np.int64)).view(10, 160)
    torch.manual_seed(0)
    model = convert_model(llama(9.0), retained=[8, 0], **FAR)
    (before,) = rank_of_attention(model, unseen)
    stage = Transfer(steps=30, learning_rate=1e-2, rows=2, length=160)
    distill(model, None, [stage], out=tmp_path / "out", data=tmp_path / "train.npy")
    (after,) = rank_of_attention(model, unseen)
    assert abs(before) < 0.25
    assert after > 0.5


LOOKUP: dict[str, Any] = {"lookup_bonus": 12.0, "lookup_after": 9, "lookup_share": 0.1, "lookup_part": 0.2}


@pytest.mark.parametrize("native_window", [None, 17])
def test_what_is_looked_up_equals_a_dense_computation(native_window):
    """One label for all layers, of those tokens that have queries enough behind them; the threshold is of all."""
    inner = layer("hedgehog", None, native_window=native_window)
    outer = layer("hedgehog", None, window=3)
    q, k, v = inputs()
    calls = {"inner": (inner, q, k, v, None), "outer": (outer, -2 * q, v, k, 4.0)}
    for module, *_ in calls.values():
        module.score.mean.normal_()
        module.score.lookup_weight.data.normal_(std=0.3)

    def run(*_: Any, **__: Any) -> None:
        for module, q, k, v, softcap in calls.values():
            module(q, k, v, softcap=softcap, sink_logits=None)

    stage = Transfer(steps=1, score_rate=0.0, **LOOKUP | {"lookup_share": 0.5})
    layers = {path: module for path, (module, *_) in calls.items()}
    errors = LayerErrors(layers, stage, run, layers)

    at = torch.arange(LENGTH)
    gap, label = at[:, None] - at, torch.zeros(2, LENGTH, dtype=torch.bool)
    alone = []
    for module, q_, k_, _, softcap in calls.values():
        seen = (gap >= 0) & (gap < (module.native_window or LENGTH))
        share = logits(q_, k_, softcap).masked_fill(~seen, -torch.inf).softmax(-1) * (gap >= 9)
        alone.append(share.amax((1, 2)) > 0.5)
        label |= alone[-1]
    told = slice(SINKS, LENGTH - 9 - (LENGTH - 9 - SINKS) // 2)
    assert all(not torch.equal(x[:, told], label[:, told]) for x in alone)
    areas, points, before = [], {}, {}
    starts = {path: -module.score.lookup_bias for path, (module, *_) in calls.items()}
    for path, (module, _, k_, v_, _) in calls.items():
        x = (torch.cat([k_.flatten(2), v_.flatten(2)], -1) - module.score.mean) / module.score.std
        g = x @ module.score.lookup_weight
        yes, no = g[:, told][label[:, told]], g[:, told][~label[:, told]]
        areas.append((yes[:, None] > no).double().mean())
        points[path], before[path] = g.quantile(0.8), module.scores(k_, v_)
    found = errors(Batch(torch.zeros(1, 1), held_out=True))
    assert found["lookup_auc"] == pytest.approx(torch.stack(areas).mean().item(), rel=1e-6)
    assert not any(module.score.lookup_bonus for module, *_ in calls.values())
    assert errors(Batch(torch.zeros(1, 1))) == found
    for path, (module, *_) in calls.items():
        torch.testing.assert_close(-module.score.lookup_bias, 0.9 * starts[path] + 0.1 * points[path])
    errors.prepare(Batch(torch.zeros(1, 1)))
    for path, (module, _, k_, v_, _) in calls.items():
        standard = module.score.standardised(module.score.inputs(k_, v_))
        torch.testing.assert_close(-module.score.lookup_bias, points[path])
        gain = module.scores(k_, v_) - before[path]
        torch.testing.assert_close(
            gain[..., 0], 12 * torch.sigmoid(4 * module.score.lookup(standard)), rtol=0, atol=1e-5
        )
        assert (module.score.lookup(standard) > 0).double().mean() == pytest.approx(0.2, abs=0.02)


def test_the_area_under_the_curve():
    label = torch.tensor([0.0, 1, 0, 1, 1])
    assert auc(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), label) == pytest.approx(5 / 6)
    assert auc(label, label) == 1
    assert auc(torch.zeros(5), torch.ones(5)).isnan()


def test_layers_learn_what_is_looked_up_in_one_of_them():
    """One head of the first layer asks, once each, for tokens whose keys and values say so in both layers."""
    length, after, layers = 120, 20, {name: layer("hedgehog", None) for name in ("asking", "other")}
    options = {"softcap": None, "sink_logits": None}
    mark = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def drawn(seed: int) -> tuple[dict[str, tuple[Tensor, ...]], Tensor]:
        rng = torch.Generator().manual_seed(seed)
        facts = torch.rand(4, length, generator=rng) < 0.1
        calls = {}
        for name in layers:
            k, v = (torch.randn(4, length, 2, 8, generator=rng, dtype=torch.float64) for _ in range(2))
            k, v = (x + facts[..., None, None] * m for x, m in zip((k, v), mark, strict=True))
            q = 0.1 * torch.randn(4, length, 4, 8, generator=rng, dtype=torch.float64)
            if name == "asking":
                for row, j in facts[:, : length - after - 20].nonzero().tolist():
                    q[row, j + after + j % 20, 3] = 6 * k[row, j, 1]
            calls[name] = q, k, v
        return calls, facts

    def see(calls: dict[str, tuple[Tensor, ...]]) -> None:
        for name, (q, k, v) in calls.items():
            split = split_attention(q, k, v, window=0, sinks=0, scale=0.4)
            lookups.see(name, q, k, v, options, split)

    lookups = LookupRegression(layers, 3e-3, 5, bonus=12.0, after=after, share=0.3, passing=0.1)
    unseen, facts = drawn(100)
    see(unseen)
    before = lookups(learn=False)
    see(drawn(0)[0])
    lookups.prepare()
    for seed in range(1, 20):
        see(drawn(seed)[0])
        lookups()
    see(unseen)
    for name, area in lookups(learn=False).items():
        assert before[name] == pytest.approx(0.5, abs=0.2)  # a random readout
        assert area > 0.9
        module, (_, k, v) = layers[name], unseen[name]
        gain = module.scores(k, v) - module.score.attention(module.score.standardised(module.score.inputs(k, v)))
        gain = (gain - module.recency * torch.arange(length)[:, None])[..., 0]
        assert gain[facts].mean() > 6
        assert gain[~facts].mean() < 1


def test_nothing_looked_up_gains_nothing(llama, tokens_file):
    model = student(llama())
    stage = Transfer(steps=2, length=40, rows=2, **LOOKUP | {"lookup_share": 1 - 1e-12})
    with stage.objective(model) as objective:
        train(model, objective, Windows(tokens_file, 40).batches(2), stage)
        assert np.isnan(objective(Batch(torch.randint(3, 61, (2, 40)), held_out=True))["lookup_auc"])
    found = {name.rpartition(".")[2]: t for name, t in scores_of(model).items()}
    assert found["lookup_weight"].any()
    assert not found["lookup_bonus"].any()


def test_some_layers_learn_what_is_looked_up(llama, tokens_file):
    model = student(llama(), retained=RETAINED)
    stage = Transfer(steps=2, length=40, rows=2, lookup_layers=(1,), **LOOKUP)
    with stage.objective(model) as objective:
        train(model, objective, Windows(tokens_file, 40).batches(2), stage)
    bonus = {name: t for name, t in scores_of(model).items() if name.endswith("lookup_bonus")}
    assert {name.split(".")[2]: t.item() for name, t in bonus.items()} == {"0": 0.0, "1": 12.0}
    with pytest.raises(OptionError, match=r"lookup_layers: \[1\] retain no tokens; expected some of \[0\]"):
        stage.objective(student(llama())).__enter__()
    with pytest.raises(OptionError, match=r"lookup_layers: \[1\] retain no tokens"):
        stage.objective(student(llama(), retained=0)).__enter__()


def test_layers_with_nothing_to_learn_are_passed_by(llama):
    model = student(llama(), feature_map=None, decay=None, retained=[0, RETAINED])
    with Transfer(steps=1, length=40, lookup_layers=(1,), **LOOKUP).objective(model) as objective:
        assert [path.split(".")[2] for path in objective.layers] == ["1"]
    with pytest.raises(ConversionError, match="nothing to learn"):
        Transfer(steps=1, length=40).objective(student(llama(), feature_map=None, decay=None, retained=0)).__enter__()


@pytest.mark.parametrize("feature_map", [None, "hedgehog"])
def test_layers_without_a_far_branch_learn_what_to_retain(llama, tokens_file, feature_map):
    torch.manual_seed(0)
    model = convert_model(llama().double(), feature_map=feature_map, window=4, sinks=2, retained=RETAINED)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stage = Transfer(steps=20, learning_rate=1e-2, length=40, rows=4, score_rate=1e-2, window_dropout=(0.5, 0.5))
    with stage.objective(model) as objective:
        done = train(model, objective, Windows(tokens_file, 40).batches(4), stage)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    trained = {name for name in changed if ".score." in name}
    assert len(trained) == 6 * 2  # mean, std and four weights of two layers
    assert feature_map is not None or changed == trained
    assert done.losses[-1] > 0


def test_scores_without_a_far_branch_are_those_beside_one(llama, tokens_file):
    """To a rounding: nothing that a score learns from knows of the far branch."""
    found = []
    for feature_map in (None, "hedgehog"):
        model = student(llama().double(), feature_map=feature_map, retained=RETAINED, decay=None)
        stage = Transfer(steps=3, learning_rate=1e-2, length=40, rows=2, **LOOKUP)
        with stage.objective(model) as objective:
            train(model, objective, Windows(tokens_file, 40).batches(2), stage)
        found.append(scores_of(model))
    for name, t in found[0].items():
        torch.testing.assert_close(t, found[1][name], msg=lambda m, n=name: f"{n}: {m}")


STAGES = [
    Transfer(
        steps=5,
        learning_rate=1e-2,
        window_dropout=(0.5, 0.0),
        length=40,
        rows=2,
        accumulate=2,
        save_every=2,
        repeats=0.3,
        **LOOKUP,
    ),
    Logits(steps=4, learning_rate=1e-3, train=("maps", "attention"), weight_decay=0.1, length=40, rows=2, save_every=2),
]


def student(teacher: nn.Module, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)  # scores are drawn
    return convert_model(copy.deepcopy(teacher), **({"decay": "fixed", "retained": [RETAINED, 0]} | FAR | options))


def scores_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if ".score." in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken_stage", ["transfer", "logits"])
def test_a_stopped_run_goes_on_to_the_same_model(llama, tokens_file, tmp_path, power_cut, broken_stage, dtype):
    """From scores drawn otherwise, too: the checkpoint has them."""
    teacher = llama().to(dtype)
    whole, again = student(teacher), student(teacher, seed=1)
    assert all(
        not torch.equal(t, scores_of(again)[name])
        for name, t in scores_of(whole).items()
        if name.endswith((".weight", "hidden_weight"))
    )
    distill(whole, teacher, STAGES, out=tmp_path / "whole", data=tokens_file)
    loss = {"transfer": transfer_module.LayerErrors, "logits": logits_module.Divergences}[broken_stage]
    with power_cut(loss):
        distill(student(teacher), teacher, STAGES, out=tmp_path / "broken", data=tokens_file)
    distill(again, teacher, STAGES, out=tmp_path / "broken", data=tokens_file)
    lines = [(tmp_path / each / "metrics.jsonl").read_text().splitlines() for each in ("whole", "broken")]
    numbers = [[{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in each] for each in lines]
    assert numbers[0] == numbers[1]
    for metric in ("score_r2", "lookup_auc"):
        assert [line["stage"] for line in numbers[0] if line.get(metric) is not None] == ["1-transfer"] * 5
    learnt = {name.rpartition(".")[2]: t for name, t in scores_of(whole).items()}
    assert learnt["lookup_weight"].all()
    assert learnt["lookup_bias"] != 0
    assert learnt["lookup_bonus"] == 12
    for model in (again, linattn.load(tmp_path / "broken" / "model", dtype=dtype)):
        assert model.state_dict().keys() == whole.state_dict().keys()
        for name, t in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], t), name
        if (
            dtype == torch.float32 or model is again
        ):  # a cast model has rounded rotary frequencies, a loaded one has not
            ids = torch.randint(3, 61, (2, 40))
            with torch.no_grad():
                assert torch.equal(model.eval()(ids).logits, whole.eval()(ids).logits)


@pytest.mark.slow
def test_two_processes_keep_the_same_scores(tokens_file, tmp_path):
    code = f"""
        import sys
        sys.path[:0] = {HERE!r}
        from conftest import SIZES
        from linattn.distill.engine import processes
        from safetensors.torch import save_file
        from transformers import LlamaConfig, LlamaForCausalLM
        from test_retained import *
        rank = processes().process_index
        model = student(LlamaForCausalLM(LlamaConfig(**SIZES)), seed=rank)
        stage = Transfer(steps=4, learning_rate=1e-2, length=40, **LOOKUP)
        distill(model, None, [stage], out={str(tmp_path / "out")!r}, data={str(tokens_file)!r}, progress=False)
        save_file(scores_of(model), f"{tmp_path}/{{rank}}.scores")
    """
    (tmp_path / "two.py").write_text(textwrap.dedent(code))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*run, str(tmp_path / "two.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.scores") for rank in range(2))
    assert first
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("train", [("maps",), ("attention",), ("all",), ("lora",)])
def test_predictions_leave_scores_alone(llama, tokens_file, tmp_path, train):
    if train == ("lora",):
        pytest.importorskip("peft")
    teacher = llama()
    model = student(teacher)
    before = model.state_dict()
    before = {name: t.clone() for name, t in before.items()}
    stage = Logits(steps=2, learning_rate=0.01, weight_decay=0.5, train=train, length=40)
    distill(model, teacher, [stage], out=tmp_path / "out", data=tokens_file)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed
    assert not [name for name in changed if ".score." in name]


def test_transfer_trains_scores_and_leaves_no_trace_on_them(llama, tokens_file):
    model = student(llama())
    layers = trainable_layers(model)
    assert [bool(module.retained) for module in layers.values()] == [True, False]
    before, flags = scores_of(model), [p.requires_grad for p in model.parameters()]
    stage = Transfer(steps=2, learning_rate=0.0, length=40, rows=2)
    batches = Windows(tokens_file, 40).batches(2)
    with stage.objective(model) as objective:
        train(model, objective, batches, stage)
        prepared = scores_of(model)
        assert all(torch.equal(t, prepared[name]) == ("lookup" in name) for name, t in before.items())
        assert not [name for name in objective.parameters if ".score." in name]
    calibrate(model, [batches(1).tokens], learning_rate=0.0)  # a score that is standardised stays so
    after = scores_of(model)
    assert [name for name, t in prepared.items() if torch.equal(t, after[name])] == [
        name for name in prepared if name.endswith(("mean", "std")) or "lookup" in name
    ]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    with dataclasses.replace(stage, score_rate=0.0, learning_rate=0.1).objective(model) as objective:
        train(model, objective, batches, stage)
    assert all(torch.equal(t, after[name]) for name, t in scores_of(model).items())


def test_a_batch_that_is_not_finite_teaches_scores_nothing(llama):
    model = student(llama())
    ids = torch.randint(3, 61, (2, 40))
    with Transfer(steps=1, length=40).objective(model) as objective:
        objective.prepare(Batch(ids))
        path = next(iter(objective.scores.layers))
        k, v, share = torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 8), torch.rand(1, 20, 2)
        objective.scores(path, k, v, share * torch.nan)
    assert all(t.isfinite().all() for t in scores_of(model).values())


def test_layers_are_chosen_and_calibrated_beside_retained_tokens(llama, tokens_file):
    model = student(llama(9.0), retained=RETAINED)
    tokens = torch.stack([Windows(tokens_file, 40)[i] for i in range(4)])
    errors = calibrate(model, [tokens] * 15, learning_rate=0.02).losses
    assert sum(errors[-4:]) < sum(errors[:4])
    found = select_layers(model, tokens, keep=1)
    assert all(cost.kl > 0 for cost in found.costs)
    for call in (lambda x: calibrate(model, [x]), lambda x: select_layers(model, x, keep=1)):
        with pytest.raises(OptionError, match=f"= {FIRST}"):
            call(tokens[:, :FIRST])


@pytest.mark.parametrize("options", [{"score_rate": -1.0}, {"score_rate": float("inf")}, {"score_steps": 0}])
def test_options_outside_their_domain_are_refused(options):
    with pytest.raises(OptionError, match="score_steps"):
        Transfer(steps=1, **options)


@pytest.mark.parametrize(
    "options", [{"lookup_bonus": -1.0}, {"lookup_after": 0}, {"lookup_share": 1.0}, {"lookup_part": 0.0}], ids=str
)
def test_lookup_options_outside_their_domain_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Transfer(steps=1, **options)


def test_windows_must_be_longer_than_what_is_looked_up(llama):
    stage = Transfer(steps=1, length=9 + SINKS + 1, **LOOKUP)
    model = student(llama(), retained=[2, 0], window=2)
    with pytest.raises(OptionError, match=f"lookup_after.*= {9 + SINKS} "), stage.objective(model):
        pass
    with dataclasses.replace(stage, length=stage.length + 1).objective(model) as objective:
        objective.prepare(Batch(torch.randint(3, 61, (2, stage.length + 1))))
        assert objective(Batch(torch.randint(3, 61, (2, stage.length + 1))))["loss"] > 0


def test_windows_must_be_longer_than_what_is_exact(llama):
    with (
        pytest.raises(OptionError, match=f"retained.*= {FIRST}"),
        Transfer(steps=1, length=FIRST).objective(student(llama())),
    ):
        pass
