"""Windows in pieces: the loss of whole windows, gradients for which the past is constant, one piece in memory."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from linattn import convert_model
from linattn.convert import ConvertedAttention
from linattn.distill import CachedTeacher, Logits, Windows, cache_teacher, distill, read_stages, train
from linattn.distill import logits as logits_module
from linattn.distill.engine import Batch
from linattn.distill.layers import answered, trainable_layers
from linattn.distill.logits import forward_kl
from linattn.errors import OptionError, UnsupportedError

FAR = {"window": 5, "sinks": 2}
LENGTH = 60
EPS = torch.finfo(torch.float32).eps
"""Whatever the model is of, the part that a piece has in the loss is float32."""
WHOLE = Logits(steps=8, learning_rate=5e-3, rows=2, length=LENGTH, train=("maps", "attention"))
STUDENTS = {
    "plain": {},
    "hybrid": {"keep_softmax": [1], "decay": "fixed"},
    "bound": {"keep_softmax": [1], "softmax_window": 20},
    "no rope far": {"decay": "data", "far_rope": False},
    "random features": {"feature_map": "favor+", "decay": "fixed"},
}


def ids(length: int = LENGTH, rows: int = 2) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: nn.Module, teacher: Any, stage: Logits, tokens: Tensor) -> tuple[float, dict[str, Any]]:
    with stage.objective(model, teacher) as objective, torch.enable_grad():
        loss = float(objective(Batch(tokens))["loss"])
        found = {name: p.grad for name, p in objective.parameters.items()}
        for p in objective.parameters.values():
            p.grad = None
    return loss, found


@pytest.mark.parametrize("segment", [7, 25, 100])
@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_the_loss_is_that_of_whole_windows(llama, student, segment):
    teacher = llama().double()
    model = convert_model(copy.deepcopy(teacher), **FAR, **student)
    whole = dataclasses.replace(WHOLE, cross_entropy=0.3)
    want, _ = loss_and_gradients(model, teacher, whole, ids())
    got, _ = loss_and_gradients(model, teacher, dataclasses.replace(whole, segment=segment), ids())
    assert math.isclose(got, want, rel_tol=1e-6)  # the loss of a token is float32


def test_softcaps_sliding_windows_and_low_rank_updates():
    pytest.importorskip("peft")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 9, "initializer_range": 0.3}
    torch.manual_seed(0)
    teacher = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).eval()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    assert {layer["kind"] for layer in model.config.linattn["layers"]} == {"convert", "keep"}
    whole = dataclasses.replace(WHOLE, train=("maps", "lora"), cross_entropy=0.5)
    want, _ = loss_and_gradients(model, teacher, whole, ids())
    got, found = loss_and_gradients(model, teacher, dataclasses.replace(whole, segment=16), ids())
    assert math.isclose(got, want, rel_tol=1e-5)
    assert any(".lora_" in name and grad is not None and grad.abs().max() > 0 for name, grad in found.items())


# ----------------------------------------------------------------------------------------------- an own reference


def constant_before(t: Tensor, start: int) -> Tensor:
    return torch.cat([t[:, :start].detach(), t[:, start:]], 1)


def dense(name: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, *, start: int, **options) -> Tensor:
    """The operator token by token, where what a layer has seen before ``start`` is constant.

    A token that is still in the window then is kept as key and value, and its features are made of them anew; of one
    that has left it only its features are left.
    """
    rows, length, groups = q.shape[0], q.shape[1], q.shape[2] // k.shape[2]
    k, v = constant_before(k, start), constant_before(v, start)
    q_far, k_far = module.far_inputs(q, k, options["rotation"])
    features_q, log_q = module.feature_map.forward_queries(q_far)
    features_k, log_k = module.feature_map.forward_keys(k_far)
    log_q = q.new_zeros(q.shape[:3]) if log_q is None else log_q
    log_k = k.new_zeros(k.shape[:3]) if log_k is None else log_k
    left = max(0, start - module.window)
    features_k, log_k = constant_before(features_k, left), constant_before(log_k, left)
    gates = module.log_gates(k_far)
    gates = k.new_zeros(k.shape[:3]) if gates is None else gates.expand(rows, length, -1)
    clock = constant_before(gates, start).cumsum(1)
    k, v, features_k, log_k, clock = (t.repeat_interleave(groups, 2) for t in (k, v, features_k, log_k, clock))

    at = torch.arange(length)
    gap = at[:, None] - at
    near = (gap >= 0) & ((gap < module.window) | (at < module.sinks))
    exact = module.feature_map.scale * torch.einsum("bthd,bihd->bhti", q, k)
    log_far = log_q.transpose(1, 2)[..., None] + log_k.transpose(1, 2)[:, :, None] + module.far_bias[:, None, None]
    log_far = log_far + (clock.transpose(1, 2)[..., None] - clock.transpose(1, 2)[:, :, None])
    kernel = torch.einsum("bthf,bihf->bhti", features_q, features_k)
    zero = exact.new_zeros(())
    weights = torch.where(near, exact.exp(), torch.where(gap >= 0, kernel * log_far.exp(), zero))
    return torch.einsum("bhti,bihv->bthv", weights / weights.sum(-1, keepdim=True), v)


@contextlib.contextmanager
def kept_layers_constant_before(model: nn.Module, start: int) -> Iterator[None]:
    """Softmax layers see keys and values from before ``start`` without gradients."""
    converted = trainable_layers(model)
    hooks = [
        getattr(layer, name).register_forward_hook(lambda module, args, out: constant_before(out, start))
        for path, layer in ((f"model.layers.{i}.self_attn", x.self_attn) for i, x in enumerate(model.model.layers))
        if path not in converted
        for name in ("k_proj", "v_proj")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exact_kl(logits: Tensor, teacher: Tensor, **options: float) -> Tensor:
    """``forward_kl`` in float64."""
    log_p, wanted = (z.log_softmax(-1) for z in (logits, teacher))
    return (wanted.exp() * (wanted - log_p)).sum(-1)


def truncated(model: nn.Module, teacher: nn.Module, tokens: Tensor, segment: int) -> dict[str, Tensor]:
    """Gradients of the mean KL, each piece's through that piece alone: no cache, no kernels."""
    with torch.no_grad():
        target = teacher(tokens).logits
    for start in range(0, tokens.shape[1], segment):
        stop = min(start + segment, tokens.shape[1])

        def answer(name: str, module: ConvertedAttention, *qkv: Tensor, start: int = start, **options: Any) -> Tensor:
            return dense(name, module, *qkv, start=start, **options)

        with answered(trainable_layers(model), answer), kept_layers_constant_before(model, start):
            logits = model(tokens[:, :stop], use_cache=False).logits
        (exact_kl(logits[:, start:stop], target[:, start:stop]).sum() / tokens.numel()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("segment", [7, 25])
@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_gradients_are_those_of_truncated_back_propagation(llama, student, segment, monkeypatch):
    monkeypatch.setattr(logits_module, "forward_kl", exact_kl)
    teacher = llama(gain=3.0).double()
    model = convert_model(copy.deepcopy(teacher), **FAR, **student)
    stage = dataclasses.replace(WHOLE, segment=segment, train=("all",), chunk=9)
    _, got = loss_and_gradients(model, teacher, stage, ids())
    want = truncated(model, teacher, ids(), segment)
    _, whole = loss_and_gradients(model, teacher, dataclasses.replace(stage, segment=0), ids())
    distance = 0.0
    for name, mine in got.items():
        scale = want[name].abs().max()
        torch.testing.assert_close(mine, want[name], rtol=0, atol=EPS * scale, msg=lambda s, n=name: f"{n}: {s}")
        distance = max(distance, float((whole[name] - want[name]).abs().max() / scale))
    assert distance > 1e-2  # truncation is no rounding


def test_the_divergence_falls(llama):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    stage = dataclasses.replace(WHOLE, steps=10, learning_rate=3e-4, segment=16)
    with stage.objective(model, teacher) as objective:
        losses = train(model, objective, lambda index: Batch(ids()), stage).losses
    assert losses[-1] < 0.9 * losses[0]


def test_small_gradients_of_many_pieces_add_up_in_float32(llama):
    teacher = llama().bfloat16()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    weight = model.model.layers[0].self_attn.v_proj.weight
    parts: list[Tensor] = []
    hook = weight.register_hook(lambda grad: parts.append(grad.float()))
    _, found = loss_and_gradients(model, teacher, dataclasses.replace(WHOLE, segment=2), ids())
    hook.remove()
    assert len(parts) == LENGTH / 2
    got = found["model.layers.0.self_attn.v_proj.weight"]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, sum(parts[1:], parts[0]).bfloat16())
    assert not torch.equal(got, sum([part.bfloat16() for part in parts[1:]], parts[0].bfloat16()))


# ------------------------------------------------------------------------------------------------------- memory


class Held:
    """A tensor that waits for a backward pass; counts its bytes for as long as it does."""

    now = most = 0

    def __init__(self, t: Tensor) -> None:
        self.t = t.detach()  # a saved output would hold the graph that holds it
        size = t.numel() * t.element_size()
        Held.now += size
        Held.most = max(Held.most, Held.now)
        weakref.finalize(self, Held.release, size)

    @classmethod
    def release(cls, size: int) -> None:
        cls.now -= size


def most_bytes(model: nn.Module, teacher: Any, stage: Logits, length: int) -> int:
    """The most that waits for backward passes at a time."""
    Held.now = Held.most = 0
    stage = dataclasses.replace(stage, length=length)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.t):
        loss_and_gradients(model, teacher, stage, ids(length, rows=1))
    assert Held.now == 0
    return Held.most


def test_one_piece_stands_in_memory_whatever_the_length(llama):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR, decay="fixed")
    stage = dataclasses.replace(WHOLE, segment=32, teacher_context=48)
    short, long = (most_bytes(model, teacher, stage, length) for length in (96, 960))
    assert long == short > 0
    assert most_bytes(model, teacher, WHOLE, 960) > 10 * short


def test_the_memory_handed_on_is_constant_in_size_and_has_no_history(llama, monkeypatch):
    model = convert_model(llama(), keep_softmax=[1], **FAR)
    sizes, cut = [], logits_module.detach

    def watching(cache) -> None:
        cut(cache)
        state, kept = cache.layers[0].state, cache.layers[1]
        assert not any(t.requires_grad for t in (*state.tensors().values(), kept.keys, kept.values))
        sizes.append((state.nbytes, kept.keys.shape[2]))

    with dataclasses.replace(WHOLE, segment=20, cross_entropy=1.0).objective(model, None) as objective:
        monkeypatch.setattr(logits_module, "detach", watching)
        with torch.enable_grad():
            objective(Batch(ids()))
    assert [kept for _, kept in sizes] == [20, 40, 60]  # softmax layers keep every token
    assert len({state for state, _ in sizes}) == 1


# ------------------------------------------------------------------------------------------------------ teachers


def test_the_teacher_reads_no_more_than_it_is_allowed(llama):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    read: list[int] = []
    teacher.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    stage = dataclasses.replace(WHOLE, segment=16, teacher_context=24)
    with stage.objective(model, teacher) as objective, torch.enable_grad():
        read.clear()
        got = float(objective(Batch(ids()))["loss"])
    assert read == [16, 24, 24, 24]
    total = 0.0
    with torch.no_grad():
        student = model(ids()).logits
        for start, stop, first in ((0, 16, 0), (16, 32, 8), (32, 48, 24), (48, 60, 36)):
            target = teacher(ids()[:, first:stop]).logits[:, start - first :]
            total += float(forward_kl(student[:, start:stop].flatten(0, 1), target.flatten(0, 1)).sum())
    assert math.isclose(got, total / ids().numel(), rel_tol=1e-5)
    whole, _ = loss_and_gradients(model, teacher, dataclasses.replace(stage, teacher_context=0), ids())
    assert not math.isclose(got, whole, rel_tol=1e-3)
    everything, _ = loss_and_gradients(model, teacher, dataclasses.replace(stage, teacher_context=LENGTH), ids())
    assert math.isclose(everything, whole, rel_tol=1e-5)


def test_a_cached_teacher_knows_what_it_read(llama, tokens_file, tmp_path):
    teacher = llama()
    stage = dataclasses.replace(WHOLE, steps=2, segment=16, teacher_context=24)
    data = Windows(tokens_file, LENGTH, seed=stage.seed)

    def write(name: str, **options: int):
        return cache_teacher(teacher, data, windows=4, k=60, out=tmp_path / name, **options)

    def losses(source: Any, stage: Logits = stage) -> list[float]:
        model = convert_model(copy.deepcopy(teacher), **FAR)
        with stage.objective(model, source) as objective:
            return train(model, objective, data.batches(2), stage).losses

    assert losses(write("bounded", segment=16, teacher_context=24)) == pytest.approx(losses(teacher), rel=1e-3)
    unbounded = dataclasses.replace(stage, teacher_context=0)
    assert losses(write("whole"), unbounded) == pytest.approx(losses(teacher, unbounded), rel=1e-3)
    for wrong, name in ((stage, "whole"), (unbounded, "bounded"), (dataclasses.replace(stage, segment=8), "bounded")):
        with pytest.raises(OptionError, match=r"cached with \(teacher_context, segment\)"):
            losses(CachedTeacher(tmp_path / name), wrong)


# -------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stopped_stage_resumes_to_the_bit(llama, tokens_file, tmp_path, dtype):
    path = tmp_path / "stages.json"
    path.write_text(
        """{"stages": [{"kind": "logits", "steps": 6, "segment": 16, "teacher_context": 24, "length": 60, "rows": 2,
                        "train": ["maps", "attention"], "learning_rate": 5e-3, "save_every": 2}]}"""
    )
    stages = read_stages(path)
    assert (stages[0].segment, stages[0].teacher_context) == (16, 24)
    teacher = llama().to(dtype)

    def student() -> nn.Module:
        return convert_model(copy.deepcopy(teacher), keep_softmax=[1], decay="data", **FAR)

    def breaking(self, batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return call(self, batch)

    whole, again, call = student(), student(), logits_module.Divergences.__call__
    measured = [dataclasses.replace(stages[0], held_out=str(tokens_file), held_out_windows=2)]
    want = distill(whole, teacher, measured, out=tmp_path / "whole", data=tokens_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_module.Divergences, "__call__", breaking)
        with pytest.raises(KeyboardInterrupt):
            distill(student(), teacher, measured, out=tmp_path / "broken", data=tokens_file)
    got = distill(again, teacher, measured, out=tmp_path / "broken", data=tokens_file)
    assert (got.stages[0].first, got.stages[0].last) == (want.stages[0].first, want.stages[0].last)
    for name, t in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"segment": -1}, "segment: got -1"),
        ({"segment": 2.5}, "segment: got 2.5"),
        ({"teacher_context": -8, "segment": 4}, "teacher_context: got -8"),
        ({"teacher_context": 64}, "teacher_context: got 64 with segment=0"),
        ({"teacher_context": 64, "segment": 65}, "teacher_context ≥ segment"),
    ],
)
def test_options_outside_their_domain_are_refused(options, says, llama, tokens_file, tmp_path):
    with pytest.raises(OptionError, match=says):
        Logits(steps=1, **options)
    with pytest.raises(OptionError, match=says):
        cache_teacher(llama(), Windows(tokens_file, LENGTH), windows=1, out=tmp_path, **options)


def test_models_that_cannot_be_read_in_pieces_are_refused(llama):
    stage, teacher = dataclasses.replace(WHOLE, segment=16), llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient_checkpointing_disable"), stage.objective(model, teacher):
        pass
    model.gradient_checkpointing_disable()
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"past_key_values": None}), with_kwargs=True, prepend=True
    )
    with (
        pytest.raises(UnsupportedError, match=r"layer 1 of .* 0 of 16 tokens"),
        stage.objective(model, teacher),
    ):
        pass
