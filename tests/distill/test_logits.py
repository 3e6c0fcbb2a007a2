"""Logits: KL in chunks equals KL at once, in value, gradient and all but memory; and every part that can train."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from linattn import convert_model
from linattn._heads import body_and_head
from linattn.convert import window_only
from linattn.distill import CachedTeacher, Logits, Transfer, Windows, cache_teacher, train
from linattn.distill.engine import Batch
from linattn.distill.logits import chunked_mean, forward_kl, top_k_kl
from linattn.errors import CheckpointError, ConversionError, OptionError

FAR = {"window": 5, "sinks": 2}
STAGE = Logits(steps=8, learning_rate=5e-3, rows=2, length=40)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_of_both_softmaxes(temperature):
    student, teacher = 3 * torch.randn(2, 7, 20).double()
    p, q = ((z / temperature).softmax(-1) for z in (teacher, student))
    want = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher, temperature=temperature).double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_likeliest_tokens_and_one_bucket(temperature):
    student, teacher = 3 * torch.randn(2, 7, 20)
    p, q = ((z / temperature).softmax(-1).double() for z in (teacher, student))
    top = p.topk(4, -1)
    p_cut, q_cut = (torch.cat([x.gather(1, top.indices), 1 - x.gather(1, top.indices).sum(1, True)], 1) for x in (p, q))
    got = top_k_kl(student, top.indices, p_cut.log().float(), temperature=temperature)
    want = temperature**2 * (p_cut * (p_cut / q_cut).log()).sum(-1)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert (got <= forward_kl(student, teacher, temperature=temperature)).all()
    same = top_k_kl(teacher, top.indices, p_cut.log().float(), temperature=temperature)
    torch.testing.assert_close(same, torch.zeros(7), rtol=0, atol=1e-5)


def large() -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, an output embedding and teacher logits."""
    return torch.randn(64, 8, requires_grad=True), nn.Linear(8, 1000), 3 * torch.randn(64, 1000)


@pytest.mark.parametrize("chunk", [1, 5, 64, 100])
def test_chunks_change_neither_value_nor_gradients(chunk):
    hidden, head, teacher = large()
    parameters = list(head.parameters())

    def loss(h: Tensor, rows: slice) -> Tensor:
        return forward_kl(head(h), teacher[rows])

    want = 3 * forward_kl(head(hidden), teacher).mean()
    got = 3 * chunked_mean(loss, hidden, parameters, chunk=chunk)
    torch.testing.assert_close(got, want)
    for mine, other in zip(
        torch.autograd.grad(got, [hidden, *parameters]), torch.autograd.grad(want, [hidden, *parameters]), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    head.weight.requires_grad_(False)
    got = chunked_mean(loss, hidden, parameters, chunk=chunk)
    (mine,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(3 * mine, torch.autograd.grad(want_again(hidden, head, teacher), hidden)[0])
    with torch.no_grad():
        assert not chunked_mean(loss, hidden, parameters, chunk=chunk).requires_grad


def want_again(hidden: Tensor, head: nn.Linear, teacher: Tensor) -> Tensor:
    return 3 * forward_kl(head(hidden), teacher).mean()


def test_all_logits_never_stand_in_memory_at_once():
    hidden, head, teacher = large()
    saved = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = chunked_mean(
            lambda h, rows: forward_kl(head(h), teacher[rows]), hidden, list(head.parameters()), chunk=4
        )
    assert loss.requires_grad
    assert 0 < max(saved) <= max(4 * 1000, head.weight.numel())  # all of them are 64,000
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward_kl(head(hidden), teacher)
    assert max(saved) == 64_000


def run(model: nn.Module, teacher, tokens_file, stage: Logits = STAGE, **options) -> list[float]:
    batches = Windows(tokens_file, 40).batches(2)
    with stage.objective(model, teacher) as objective:
        return train(model, objective, batches, stage, **options).losses


def change(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    assert model.state_dict().keys() == before.keys()
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


@pytest.mark.parametrize("parts", [("maps",), ("lora",), ("maps", "lora"), ("attention",), ("all",)], ids="+".join)
def test_the_divergence_falls_and_only_the_chosen_parameters_change(llama, tokens_file, parts):
    pytest.importorskip("peft")
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), keep_softmax=[1], **FAR)
    model.model.norm.weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    rate = 1e-2 if parts == ("maps",) else 3e-4
    stage = dataclasses.replace(STAGE, train=parts, steps=15, learning_rate=rate)
    batch = Windows(tokens_file, 40).batches(2)(0)
    with stage.objective(model, teacher) as objective:
        losses = train(model, objective, lambda index: batch, stage).losses
    assert losses[-1] < 0.97 * losses[0]
    attention = {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"}
    maps = {name for name in before if ".linattn." in name}
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    want = {"maps": maps, "lora": attention, "attention": attention | maps, "all": before.keys() - embeddings}
    assert change(model, before) == set().union(*(want[part] for part in parts))
    assert [type(module) for module in model.modules()] == modules
    assert not hasattr(model, "peft_config")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    with torch.no_grad():
        final = forward_kl(model(batch.tokens).logits.flatten(0, 1), teacher(batch.tokens).logits.flatten(0, 1)).mean()
    assert math.isclose(final, losses[-1], rel_tol=0.05)  # updates are merged


def test_attention_bound_to_a_window_is_trained_as_the_converted_one_is(llama, tokens_file):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), keep_softmax=[1], softmax_window=12, **FAR)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batch = Windows(tokens_file, 40).batches(2)(0)
    stage = dataclasses.replace(STAGE, train=("attention",), steps=15, learning_rate=3e-4)
    with stage.objective(model, teacher) as objective:
        losses = train(model, objective, lambda index: batch, stage).losses
    assert losses[-1] < 0.97 * losses[0]
    assert change(model, before) == {name for name in before if ".self_attn." in name}


@pytest.mark.parametrize(
    "parts", [("maps", "attention"), ("maps", "lora"), ("lora",), ("attention",), ("all",)], ids="+".join
)
def test_a_window_without_a_far_branch_learns_what_it_has(llama, tokens_file, parts):
    if "lora" in parts:
        pytest.importorskip("peft")
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), feature_map=None, keep_softmax=[1], **FAR)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batch = Windows(tokens_file, 40).batches(2)(0)
    stage = dataclasses.replace(STAGE, train=parts, steps=15, learning_rate=3e-4, maps_factor=10.0)
    with stage.objective(model, teacher) as objective:
        losses = train(model, objective, lambda index: batch, stage).losses
    assert losses[-1] < 0.97 * losses[0]
    attention = {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"}
    every = before.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert change(model, before) == (every if parts == ("all",) else attention)


def test_a_window_without_a_far_branch_has_no_maps_to_train(llama):
    model = convert_model(llama(), feature_map=None, **FAR)
    maps = dataclasses.replace(STAGE, train=("maps",))
    with pytest.raises(OptionError, match="no parameters of \\('maps',\\)"), maps.objective(model, llama()):
        pass
    with pytest.raises(ConversionError, match="nothing to learn"), Transfer(steps=1).objective(model, None):
        pass
    switched = convert_model(llama(), **FAR)
    with window_only(switched), pytest.raises(ConversionError, match="window_only"), STAGE.objective(switched, llama()):
        pass


def test_an_exception_drops_low_rank_updates(llama, tokens_file):
    pytest.importorskip("peft")
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def stop(done: int, metrics) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, teacher, tokens_file, dataclasses.replace(STAGE, train=("lora",)), progress=stop)
    assert change(model, before) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_stage_resumes_to_the_bit(llama, tokens_file, tmp_path, dtype):
    pytest.importorskip("peft")
    teacher = llama().to(dtype)
    stage = dataclasses.replace(STAGE, save_every=3)

    def stop(done: int, metrics) -> None:
        if done == 5:
            raise KeyboardInterrupt

    def student() -> nn.Module:
        return convert_model(copy.deepcopy(teacher), **FAR)

    whole, again = student(), student()
    want = run(whole, teacher, tokens_file, stage)
    with pytest.raises(KeyboardInterrupt):
        run(student(), teacher, tokens_file, stage, out=tmp_path, progress=stop)
    assert run(again, teacher, tokens_file, stage, out=tmp_path) == want
    assert change(again, whole.state_dict()) == set()


def test_a_cached_teacher_teaches_what_the_model_does(llama, tokens_file, tmp_path):
    teacher = llama()
    data = Windows(tokens_file, 40)
    seen = []
    cached = cache_teacher(
        teacher, data, windows=16, k=60, out=tmp_path / "t", shard=5, progress=lambda *x: seen.append(x)
    )
    assert seen == [(i, 16) for i in range(1, 17)]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [f"shard-0000{i}.safetensors" for i in range(4)] + [
        "teacher.json"
    ]
    stage = dataclasses.replace(STAGE, train=("maps",))
    models = [convert_model(copy.deepcopy(teacher), **FAR) for _ in range(2)]
    live, stored = (run(m, t, tokens_file, stage) for m, t in zip(models, (teacher, cached), strict=True))
    assert stored == pytest.approx(live, rel=1e-3)  # all but one token of 61 are there
    few = cache_teacher(teacher, data, windows=16, k=3, out=tmp_path / "few")
    less = run(convert_model(copy.deepcopy(teacher), **FAR), few, tokens_file, stage)
    assert 0 < less[0] < live[0]


def test_a_cache_of_something_else_is_refused(llama, tokens_file, tmp_path):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    stage = dataclasses.replace(STAGE, train=("maps",))
    cached = cache_teacher(teacher, Windows(tokens_file, 40, seed=1), windows=16, k=3, out=tmp_path)
    with pytest.raises(CheckpointError, match="other tokens"):
        run(model, cached, tokens_file, stage)
    with pytest.raises(OptionError, match="16 windows of 40 tokens, the stage reads 18"):
        run(model, cached, tokens_file, dataclasses.replace(stage, steps=9))
    with pytest.raises(OptionError, match="held_out"):
        run(model, cached, tokens_file, dataclasses.replace(stage, held_out="x"))
    with pytest.raises(OptionError, match=r"cached at 1\.0"):
        run(model, cached, tokens_file, dataclasses.replace(stage, temperature=2.0))
    with pytest.raises(OptionError, match=r"windows 0 … 15"):
        cached.read(Batch(torch.zeros(1, 40), (16,)), 1.0)
    with pytest.raises(OptionError, match=r"k: got 61, expected 1 … 60"):
        cache_teacher(teacher, Windows(tokens_file, 40), windows=1, k=61, out=tmp_path)
    with pytest.raises(CheckpointError, match="no finished cache"):
        CachedTeacher(tmp_path)


def test_logits_that_are_more_than_an_embedding_are_formed_whole(llama):
    ids = torch.randint(3, 61, (1, 9))
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=0.1)
    capped = transformers.Gemma2ForCausalLM(config).eval()
    for model, apart in ((llama(), True), (capped, False)):
        body, head = body_and_head(model, ids)
        assert (head is model.get_output_embeddings()) == apart
        with torch.no_grad():
            assert torch.equal(head(body(ids)), model(ids).logits)


def test_activation_checkpointing_that_is_on_is_used(llama, tokens_file):
    def run_with(checkpointing: bool) -> tuple[list[float], int]:
        teacher = llama()
        model, calls = convert_model(copy.deepcopy(teacher), **FAR), []
        if checkpointing:
            model.gradient_checkpointing_enable()
        norm = model.model.layers[1].input_layernorm
        norm.register_forward_pre_hook(lambda module, *_: calls.append(module.training))
        losses = run(model, teacher, tokens_file, dataclasses.replace(STAGE, train=("maps",)))
        assert not any(calls)
        assert not any(module.training for module in model.modules())
        return losses, len(calls)

    (want, once), (got, twice) = run_with(False), run_with(True)
    assert got == pytest.approx(want, rel=1e-5)
    assert twice == once + STAGE.steps


def test_what_conversion_added_learns_at_a_rate_of_its_own(llama, tokens_file):
    teacher = llama()
    stage = dataclasses.replace(STAGE, train=("all",), maps_factor=10.0)
    with stage.objective(convert_model(copy.deepcopy(teacher), **FAR), teacher) as objective:
        rates = {name: objective.factor(name) for name in objective.parameters}
    assert {name for name, rate in rates.items() if rate == 10.0} == {name for name in rates if ".linattn." in name}
    assert set(rates.values()) == {1.0, 10.0}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"maps_factor": 0.0}, "maps_factor"),
        ({"train": ()}, "train"),
        ({"train": ("mlp",)}, "mlp"),
        ({"train": ("lora", "all")}, "lora"),
        ({"temperature": 0.0}, "temperature"),
        ({"cross_entropy": 1.5}, "cross_entropy"),
        ({"lora_rank": 0}, "lora_rank"),
    ],
)
def test_options_outside_their_domain_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        Logits(steps=1, **options)


def test_teachers_that_cannot_teach_are_refused(llama, tokens_file, monkeypatch):
    model = convert_model(llama(), **FAR)
    for teacher in (None, model):
        with pytest.raises(OptionError, match="before conversion"):
            run(model, teacher, tokens_file)
    with dataclasses.replace(STAGE, train=("maps",)).objective(model, llama(vocab_size=40)) as objective:
        ids = torch.randint(3, 40, (2, 40))
        with pytest.raises(OptionError, match="predicts 40 tokens, the student 61"):
            objective(Batch(ids))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"linattn\[peft\]"):
        run(model, llama(), tokens_file, STAGE)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_text_s_own_cross_entropy_can_have_a_part(llama, tokens_file, weight):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    batch = Windows(tokens_file, 40).batches(2)(0)
    stage = dataclasses.replace(STAGE, train=("maps",), cross_entropy=weight, chunk=7)
    with stage.objective(model, teacher if weight < 1 else None) as objective, torch.enable_grad():
        value = objective(batch)["loss"].item()
    with torch.no_grad():
        kl = forward_kl(model(batch.tokens).logits.flatten(0, 1), teacher(batch.tokens).logits.flatten(0, 1)).mean()
        text = model(batch.tokens, labels=batch.tokens).loss
    assert math.isclose(value, (1 - weight) * kl + weight * text, rel_tol=1e-5)


def test_gradients_are_those_of_the_dense_formula(llama, tokens_file):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    batch = Windows(tokens_file, 40).batches(2)(0)
    with dataclasses.replace(STAGE, train=("all",), chunk=7).objective(model, teacher) as objective:
        value = objective(batch)["loss"]
        mine = {name: p.grad for name, p in objective.parameters.items()}
    model.zero_grad()
    with torch.no_grad():
        wanted = F.log_softmax(teacher(batch.tokens).logits, -1)
    dense = F.kl_div(F.log_softmax(model(batch.tokens).logits, -1), wanted, log_target=True, reduction="none")
    dense = dense.sum(-1).mean()
    dense.backward()
    assert math.isclose(value, dense.item(), rel_tol=1e-5)
    for name, p in model.named_parameters():
        if name in mine:
            torch.testing.assert_close(
                mine[name], p.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
