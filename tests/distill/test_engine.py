"""The loop: what it trains, what it writes, and that a killed run resumes to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import linattn
from linattn.distill.data import Windows
from linattn.distill.engine import METRICS, Batch, Objective, Stage, derived_seed, train
from linattn.errors import CheckpointError, NonFiniteError, OptionError

HERE = [str(Path(__file__).parent), str(Path(linattn.__file__).parents[1])]
STAGE = Stage(steps=12, learning_rate=0.05, warmup=3, weight_decay=0.01, rows=2, length=8, save_every=5)


class Regression(Objective):
    """A small network that learns to say how large tokens are, with noise drawn in the step."""

    def __init__(self, model: nn.Sequential, break_at: int | None = None, how: str = "raise") -> None:
        self.model, self.break_at, self.how = model, break_at, how
        self.parameters = dict(model[0].named_parameters())
        self.held = dict(model.named_buffers())

    def prepare(self, batch: Batch) -> None:
        self.model[2].running_mean.fill_(batch.tokens.float().mean())

    def __call__(self, batch: Batch) -> dict[str, float]:
        x = batch.tokens.to(self.model[0].weight.dtype) / 32
        x = x + 0.1 * torch.randn_like(x)
        loss = (self.model(x).float() - x.float().mean(1, keepdim=True)).square().mean()
        loss.backward()
        if batch.step == self.break_at:
            if self.how == "raise":
                raise RuntimeError("the power is gone")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            self.model[0].weight.grad.fill_(math.nan)
        return {"loss": loss.item(), "noise": x.mean().item()}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 1)).to(dtype)


def batches(index: int) -> Batch:
    return Batch(torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(index)))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def check_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def numbers(out: Path) -> list[dict]:
    """The metrics without the clock."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("break_at", [3, 7, 10])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path, dtype, break_at):
    whole, broken = network(dtype), network(dtype)
    stage = dataclasses.replace(STAGE, accumulate=2)
    want = train(whole, Regression(whole), batches, stage, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power"):
        train(broken, Regression(broken, break_at), batches, stage, out=tmp_path / "broken")
    again = network(dtype)
    torch.manual_seed(99)  # the caller's random numbers play no part, and go on
    done = train(again, Regression(again), batches, stage, out=tmp_path / "broken")
    drawn = torch.rand(3)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(3), drawn)
    assert done.resumed_at == break_at // 5 * 5
    assert done.losses == want.losses
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    check_equal(tensors(again), tensors(whole))
    finished = network(dtype)
    assert train(finished, Regression(finished), batches, stage, out=tmp_path / "broken").losses == want.losses
    check_equal(tensors(finished), tensors(whole))


def test_a_killed_process_resumes_to_the_bit(tmp_path):
    code = f"""
        import sys
        sys.path[:0] = {HERE!r}
        from test_engine import *
        model = network()
        train(model, Regression(model, 8, "kill"), batches, STAGE, out={str(tmp_path / "killed")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [line["step"] for line in lines(tmp_path / "killed")] == list(range(1, 9))
    with (tmp_path / "killed" / METRICS).open("a") as file:
        file.write('{"stage": "train", "st')  # a line that was being written
    whole, again = network(), network()
    want = train(whole, Regression(whole), batches, STAGE, out=tmp_path / "whole")
    got = train(again, Regression(again), batches, STAGE, out=tmp_path / "killed")
    assert (got.resumed_at, got.losses) == (5, want.losses)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    check_equal(tensors(again), tensors(whole))


def test_it_is_adamw_with_a_warm_up_and_a_cosine():
    model, other = network(), network()
    objective = Regression(other)
    train(model, Regression(model), batches, STAGE)
    objective.prepare(batches(0))
    other.eval()
    optimizer = torch.optim.AdamW(other[0].parameters(), weight_decay=0.01)
    for step in range(12):
        torch.manual_seed(derived_seed(0, step, 0))
        optimizer.zero_grad()
        objective(batches(step))
        nn.utils.clip_grad_norm_(other[0].parameters(), 1.0)
        wave = (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        optimizer.param_groups[0]["lr"] = 0.05 * ((step + 1) / 3 if step < 3 else wave)
        optimizer.step()
    for name, t in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], t)


def test_masters_keep_what_bfloat16_would_swallow():
    def final(dtype: torch.dtype) -> Tensor:
        model = network(dtype)
        with torch.no_grad():
            model[0].weight.copy_(network().bfloat16()[0].weight)
        train(model, Regression(model), batches, Stage(steps=60, learning_rate=1e-4, length=8, rows=2))
        return model[0].weight.detach().float() - network().bfloat16()[0].weight.float()

    half, single = final(torch.bfloat16), final(torch.float32)
    assert single.abs().mean() < 4e-3  # less than half a bfloat16 step of most weights
    torch.testing.assert_close(half.mean(), single.mean(), rtol=0.3, atol=2e-4)
    assert half.abs().mean() > 0.5 * single.abs().mean()


def test_only_the_chosen_parameters_train_and_flags_come_back():
    model = network().train()
    model[3].weight.requires_grad_(False)
    gradient = torch.ones_like(model[3].bias)
    model[3].bias.grad = gradient
    before = tensors(model)
    seen = []
    train(model, Regression(model), batches, STAGE, progress=lambda done, metrics: seen.append((done, metrics["loss"])))
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"0.weight", "0.bias", "2.running_mean"}
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["3.weight"]
    assert model[3].bias.grad is gradient
    assert model[0].weight.grad is None
    assert [done for done, _ in seen] == list(range(1, 13))


def test_steps_without_finite_gradients_are_skipped_and_counted(tmp_path):
    model = network()
    done = train(model, Regression(model, 4, "nan"), batches, STAGE, out=tmp_path)
    assert done.skipped == 1
    assert [line["skipped"] for line in lines(tmp_path)] == [0] * 4 + [1] * 8
    assert lines(tmp_path)[4]["grad_norm"] is None
    assert all(t.isfinite().all() for t in model.state_dict().values())


class Broken(Regression):
    def __call__(self, batch: Batch) -> dict[str, float]:
        super().__call__(batch)
        return {"loss": math.nan if batch.step > 1 else 1.0}


def test_too_many_skipped_steps_in_a_row_end_the_stage():
    model = network()
    with pytest.raises(NonFiniteError, match=r"last 3 steps \(up to step 5\).*learning_rate"):
        train(model, Broken(model), batches, dataclasses.replace(STAGE, patience=3))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model = network()
    train(model, Regression(model), batches, STAGE, out=tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate 0\.05, now 0\.1"):
        train(model, Regression(model), batches, dataclasses.replace(STAGE, learning_rate=0.1), out=tmp_path)
    with pytest.raises(CheckpointError, match="the first batch"):
        train(model, Regression(model), lambda i: batches(i + 1), STAGE, out=tmp_path)
    with torch.no_grad():
        model[3].weight.add_(1)
    with pytest.raises(CheckpointError, match="the frozen weights"):
        train(model, Regression(model), batches, STAGE, out=tmp_path)
    done = train(model, Regression(model), batches, STAGE, out=tmp_path, resume=False)
    assert done.resumed_at == 0
    assert len(lines(tmp_path)) == 12
    with pytest.raises(RuntimeError, match="power"):
        train(model, Regression(model, 2), batches, STAGE, out=tmp_path, resume=False)
    assert train(model, Regression(model), batches, STAGE, out=tmp_path).resumed_at == 0
    (tmp_path / "train.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        train(model, Regression(model), batches, STAGE, out=tmp_path)


def test_two_stages_share_one_file_of_metrics(tmp_path):
    model = network()
    for name in ("first", "second"):
        train(model, Regression(model), batches, STAGE, name=name, out=tmp_path)
    train(model, Regression(model), batches, STAGE, name="second", out=tmp_path, resume=False)
    assert [line["stage"] for line in lines(tmp_path)] == ["first"] * 12 + ["second"] * 12


def test_held_out_batches_are_measured_and_change_nothing(tmp_path):
    class Careful(Plain):
        def __call__(self, batch: Batch) -> dict[str, float]:
            assert batch.held_out == (batch.tokens.shape[0] == 3)
            return super().__call__(batch)

    held_out = [Batch(torch.full((3, 8), i)) for i in (4, 9)]
    plain, watched = network(), network()
    train(plain, Careful(plain), batches, STAGE)
    stage = dataclasses.replace(STAGE, measure_every=5)
    train(watched, Careful(watched), batches, stage, held_out=held_out, out=tmp_path)
    check_equal(tensors(watched), tensors(plain))
    assert [line["step"] for line in lines(tmp_path) if "held_out_loss" in line] == [5, 10, 12]
    objective = Plain(watched.eval())
    want = sum(objective(batch)["loss"] for batch in held_out) / 2
    assert lines(tmp_path)[-1]["held_out_loss"] == pytest.approx(want)


def test_parameters_learn_at_rates_of_their_own():
    class Uneven(Plain):
        def factor(self, name: str) -> float:
            return 4.0 if name == "bias" else 1.0

    def moved(objective: type[Plain]) -> list[Tensor]:
        model = network()
        train(model, objective(model), batches, Stage(steps=1, learning_rate=0.01, rows=2, length=8))
        return [(p - q).abs() for p, q in zip(model[0].parameters(), network()[0].parameters(), strict=True)]

    (weight, bias), (uneven_weight, uneven_bias) = moved(Plain), moved(Uneven)
    torch.testing.assert_close(uneven_weight, weight)
    torch.testing.assert_close(uneven_bias, 4 * bias, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": 3, "warmup": 4}, "warmup"),
        ({"steps": 3, "learning_rate": math.nan}, "learning_rate"),
        ({"steps": 3, "weight_decay": -1.0}, "weight_decay"),
        ({"steps": 3, "clip": 0.0}, "clip"),
        ({"steps": 3, "repeats": 1.0}, "repeats"),
    ],
)
def test_options_outside_their_domain_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        Stage(**options)


class Plain(Regression):
    """Without noise, which every process would draw for itself."""

    def __call__(self, batch: Batch) -> dict[str, float]:
        x = batch.tokens.to(self.model[0].weight.dtype) / 32
        loss = (self.model(x) - x.mean(1, keepdim=True)).square().mean()
        loss.backward()
        return {"loss": loss.item()}


def rows(count: int, rank: int = 0, processes: int = 1) -> Callable[[int], Batch]:
    return Windows(np.arange(600) % 32, 8).batches(count, rank=rank, processes=processes)


def test_accumulated_batches_are_one_large_one():
    def trained(count: int, accumulate: int) -> dict[str, Tensor]:
        model = network()
        objective = Plain(model)
        objective.prepare = lambda batch: None
        train(model, objective, rows(count), dataclasses.replace(STAGE, accumulate=accumulate))
        return tensors(model)

    want = trained(4, 1)
    for name, t in trained(1, 4).items():
        torch.testing.assert_close(t, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_on_all_their_rows(tmp_path):
    code = f"""
        import atexit, os, pathlib, sys
        import torch
        sys.path[:0] = {HERE!r}
        left = pathlib.Path(f"{tmp_path}/{{os.environ['RANK']}}.left")
        atexit.register(lambda: left.write_text(str(torch.distributed.is_initialized())))  # after all others
        from linattn.distill.engine import processes
        from safetensors.torch import save_file
        from test_engine import *
        state, model = processes(), network()
        assert state.num_processes == 2
        done = train(model, Plain(model), rows(1, state.process_index, 2), STAGE, out={str(tmp_path)!r})
        save_file(dict(model.state_dict()), f"{tmp_path}/{{state.process_index}}.model")
    """
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(code))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.left").read_text() for rank in range(2)] == ["False", "False"]  # its threads can abort
    first, second = (load_file(tmp_path / f"{rank}.model") for rank in range(2))
    check_equal(first, second)
    assert [line["tokens"] for line in lines(tmp_path)] == [16 * step for step in range(1, 13)]

    whole = network()
    objective = Plain(whole)
    objective.prepare = lambda batch: Plain.prepare(objective, batch._replace(tokens=batch.tokens[:1]))
    want = train(whole, objective, rows(2), STAGE)
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(want.losses, rel=1e-4)
    for name, t in first.items():
        torch.testing.assert_close(t, whole.state_dict()[name], rtol=1e-4, atol=1e-5)
