"""Stages from a file, one after the other, stopped anywhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch

import linattn
from linattn import convert_model
from linattn.distill import Logits, Stage, Transfer, cache_teacher, distill, read_stages, write_stages
from linattn.distill import data as data_module
from linattn.distill import transfer as transfer_module
from linattn.distill.data import Windows
from linattn.distill.logits import forward_kl
from linattn.errors import CheckpointError, OptionError

FAR = {"window": 5, "sinks": 2}
COMMON = {"length": 40, "rows": 2, "save_every": 2}
STAGES = [
    Transfer(steps=5, learning_rate=1e-2, window_dropout=(0.5, 0.0), **COMMON),
    Logits(steps=5, learning_rate=1e-3, train=("maps", "lora"), **COMMON),
]


def numbers(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(autouse=True)
def _peft() -> None:
    pytest.importorskip("peft")


@pytest.mark.parametrize("broken_stage", ["transfer", "logits"])
def test_a_stopped_run_goes_on_to_the_same_model(llama, tokens_file, tmp_path, power_cut, broken_stage):
    teacher = llama()

    def student():
        return convert_model(copy.deepcopy(teacher), decay="data", **FAR)

    whole, again = student(), student()
    want = distill(whole, teacher, STAGES, out=tmp_path / "whole", data=tokens_file)
    loss = {"transfer": transfer_module.LayerErrors, "logits": linattn.distill.logits.Divergences}[broken_stage]
    with power_cut(loss):
        distill(student(), teacher, STAGES, out=tmp_path / "broken", data=tokens_file)
    assert not (tmp_path / "broken" / "model").exists()
    got = distill(again, teacher, STAGES, out=tmp_path / "broken", data=tokens_file)
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert [(stage.first, stage.last) for stage in got.stages] == [(stage.first, stage.last) for stage in want.stages]
    for name, t in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name


def test_what_a_run_leaves_behind(llama, tokens_file, tmp_path):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    measured = {"held_out": str(tokens_file), "held_out_windows": 3}
    stages = [dataclasses.replace(stage, **measured) for stage in STAGES]
    report = distill(model, teacher, stages, out=tmp_path / "out", data=tokens_file)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "1-transfer.safetensors",
        "2-logits.safetensors",
        "metrics.jsonl",
        "model",
        "report.json",
        "stages.json",
    }
    assert read_stages(tmp_path / "out" / "stages.json") == stages
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved == json.loads(json.dumps(dataclasses.asdict(report)))
    assert [stage.name for stage in report.stages] == ["1-transfer", "2-logits"]
    assert re.search(r"2-logits: loss 0\.\d+ → 0\.\d+ in 5 steps", str(report))
    losses = [line["loss"] for line in numbers(tmp_path / "out") if line["stage"] == "2-logits"]
    assert (report.stages[1].first, report.stages[1].last) == (losses[0], losses[-1])
    last = {line["stage"]: line for line in numbers(tmp_path / "out")}
    assert {"held_out_hybrid", "held_out_far"} <= last["1-transfer"].keys()
    ids = Windows(tokens_file, 40, seed=None)
    with torch.no_grad():
        kl = [forward_kl(model(ids[i][None]).logits[0], teacher(ids[i][None]).logits[0]).mean() for i in range(3)]
    want = (kl[0] + kl[1]) / 4 + kl[2] / 2  # batches of two and one
    assert last["2-logits"]["held_out_loss"] == pytest.approx(want.item(), rel=1e-3)
    ids = torch.randint(3, 61, (1, 40))
    again = linattn.load(report.model).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_beginning_anew_forgets_later_stages_too(llama, tokens_file, tmp_path, monkeypatch):
    teacher = llama()
    model = convert_model(copy.deepcopy(teacher), **FAR)
    distill(model, teacher, STAGES, out=tmp_path, data=tokens_file)

    def breaking(self, batch):
        raise RuntimeError("the power is gone")

    monkeypatch.setattr(transfer_module.LayerErrors, "__call__", breaking)
    with pytest.raises(RuntimeError, match="power"):
        distill(model, teacher, STAGES, out=tmp_path, data=tokens_file, resume=False)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_cached_teacher_and_data_of_a_stage_s_own(llama, tokens_file, tmp_path, monkeypatch):
    teacher = llama()
    cached = cache_teacher(teacher, Windows(tokens_file, 40), windows=10, k=8, out=tmp_path / "teacher")
    stages = [dataclasses.replace(stage, data=str(tokens_file)) for stage in STAGES]
    report = distill(convert_model(copy.deepcopy(teacher), **FAR), cached, stages, out=tmp_path / "out", progress=False)
    assert len(report.stages) == 2
    # A stage that says passages again reads what a teacher was cached on with the same share of them, and nothing else.
    monkeypatch.setattr(data_module, "PASSAGES", (2, 4))
    again = Windows(tokens_file, 40, repeats=0.3)
    cached = cache_teacher(teacher, again, windows=10, k=8, out=tmp_path / "again")
    stage = dataclasses.replace(stages[1], repeats=0.3)
    distill(convert_model(copy.deepcopy(teacher), **FAR), cached, [stage], out=tmp_path / "repeats", progress=False)
    with pytest.raises(CheckpointError, match="held other tokens"):
        distill(convert_model(teacher, **FAR), cached, stages[1:], out=tmp_path / "plain", progress=False)


def test_stages_are_what_the_file_says(tmp_path):
    path = tmp_path / "stages.json"
    path.write_text(
        """{"stages": [{"kind": "transfer", "steps": 7, "train": ["maps"], "window_dropout": [0.9, 0.5]},
                       {"kind": "logits", "steps": 3, "betas": [0.9, 0.95], "temperature": 2.0}]}"""
    )
    want = [
        Transfer(steps=7, train=("maps",), window_dropout=(0.9, 0.5)),
        Logits(steps=3, betas=(0.9, 0.95), temperature=2.0),
    ]
    assert read_stages(path) == want
    write_stages(want, path)
    assert read_stages(path) == want


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no stages there"),
        ("nothing", "no stages there"),
        ('{"stages": [{"kind": "magic"}]}', "stage 1 has kind='magic', expected one of transfer, logits"),
        ('{"stages": [{"kind": "logits", "stpes": 3}]}', r"stage 1 \(logits\) has no \['stpes'\]; it takes steps"),
        ('{"stages": [{"kind": "logits"}]}', r"stage 1 \(logits\): .*steps"),
        ('{"stages": [{"kind": "logits", "steps": "3"}]}', r"stage 1 \(logits\)"),
        ('{"stages": [{"kind": "logits", "steps": 0}]}', r"stage 1 \(logits\): steps: got 0"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, text, says):
    path = tmp_path / "stages.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=says):
        read_stages(path)


def test_runs_without_stages_or_data_are_refused(llama, tokens_file, tmp_path):
    model = convert_model(llama(), **FAR)
    with pytest.raises(OptionError, match="at least one"):
        distill(model, None, [], out=tmp_path / "out", data=tokens_file)
    with pytest.raises(OptionError, match="2-logits names no file"):
        distill(model, None, [dataclasses.replace(STAGES[0], data="x"), STAGES[1]], out=tmp_path / "out")
    with pytest.raises(OptionError, match="Transfer or Logits"):
        distill(model, None, [Stage(steps=1)], out=tmp_path / "out", data=tokens_file)
    assert not (tmp_path / "out").exists()
