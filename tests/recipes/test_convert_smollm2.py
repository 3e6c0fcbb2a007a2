"""The recipe's whole path on a tiny model: resumed to the bit, its steps settled once, its layers kept, its audits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import linattn
from linattn.audit import audit_model, by_position, equal_bytes_plan, token_losses
from linattn.distill import Windows
from linattn.distill import logits as logits_module
from linattn.distill import transfer as transfer_module
from linattn.errors import OptionError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
COMMON = {"length": 32, "rows": 2, "save_every": 2}
CONFIG: dict[str, Any] = {
    "student": {"feature_map": "hedgehog", "window": 6, "sinks": 2, "decay": "fixed"},
    "keep": {"count": 1, "windows": 2, "length": 32},
    "stages": [
        {"kind": "transfer", "steps": 4, "learning_rate": 0.01, "warmup": 0.5, **COMMON},
        {"kind": "logits", "steps": 4, "train": ["maps", "attention"], **COMMON},
    ],
    "audit": {"lengths": [40, 4000], "tokens": 120},
}


@pytest.fixture(scope="module")
def recipe(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("convert_smollm2")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model that reads bytes."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tiny")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.5}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    draw = np.random.default_rng(0)
    texts = ["".join(chr(97 + c) for c in draw.integers(0, 26, 300)) for _ in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    np.save(tmp_path / "dev.npy", draw.integers(0, 256, 400).astype(np.uint16))
    return {"train": tmp_path / "train.jsonl", "dev": tmp_path / "dev.npy"}


def command(tiny: Path, files: dict[str, Path], out: Path, config: dict[str, Any]) -> list[str]:
    path = out.with_suffix(".json")
    path.write_text(json.dumps(config))
    data = ["--train", files["train"], "--dev", files["dev"], "--audit", f"held={files['dev']}"]
    return list(map(str, [path, "--out", out, "--model", tiny, "--dtype", "float32", "--device", "cpu", *data]))


def test_a_stopped_run_goes_on_to_the_same_model(recipe, tiny, files, tmp_path, monkeypatch, capsys):
    recipe.main(command(tiny, files, tmp_path / "whole", CONFIG))
    said = capsys.readouterr().out
    assert "audit held: 400 tokens are no two windows of 4,000; left out" in said
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    layers = json.loads((tmp_path / "whole" / "layers.json").read_text())
    assert result["kept"] == layers["kept"]
    assert sorted(cost["layer"] for cost in layers["costs"]) == [0, 1, 2]
    assert [stage["options"]["warmup"] for stage in result["stages"]] == [2, 0]
    assert all({"held_out_loss", "tokens_per_second"} <= stage.keys() for stage in result["stages"])
    assert [stage["tokens"] for stage in result["stages"]] == [4 * 64] * 2
    (row,) = result["audit"]
    assert (row["text"], row["length"], row["windows"]) == ("held", 40, 3)
    assert {"teacher", "student", "far_off", "control"} <= row["losses"].keys()
    assert (tmp_path / "whole" / "audit" / "held-40" / "report.md").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "whole" / "model").encode("ab")
    want = linattn.load(tmp_path / "whole" / "model")
    assert [layer["kind"] for layer in want.config.linattn["layers"]].count("keep") == 1

    call = transfer_module.LayerErrors.__call__

    def breaking(self, batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return call(self, batch)

    again = command(tiny, files, tmp_path / "again", CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(transfer_module.LayerErrors, "__call__", breaking)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(again)
    recipe.main(again)
    got = linattn.load(tmp_path / "again" / "model").state_dict()
    assert got.keys() == want.state_dict().keys()
    assert all(torch.equal(got[name], t) for name, t in want.state_dict().items())
    recipe.main(again)  # all of it is done: read, not made again
    assert all(torch.equal(t, got[name]) for name, t in linattn.load(tmp_path / "again" / "model").state_dict().items())

    other = CONFIG | {"student": CONFIG["student"] | {"window": 7}}
    with pytest.raises(SystemExit, match="other student"):
        recipe.main(command(tiny, files, tmp_path / "again", other))


WITH_CONTROL = CONFIG | {"control": True, "audit": {"lengths": [40], "tokens": 120}}


def test_the_control_is_a_window_of_equal_bytes_trained_alike(recipe, tiny, files, tmp_path, monkeypatch):
    teacher, tokenizer = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    data = recipe.tokens_of(files["train"], tmp_path, tokenizer)
    inputs = {"train_data": data, "dev_data": files["dev"], "audits": {"held": files["dev"]}, "log": lambda line: None}
    seen: list[tuple[str, bytes]] = []
    call = logits_module.Divergences.__call__

    def reading(self, batch):
        if not batch.held_out:
            kind = "student" if any(".linattn." in name for name in self.parameters) else "control"
            seen.append((kind, batch.tokens.numpy().tobytes()))
        return call(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(logits_module.Divergences, "__call__", reading)
        result = recipe.run(WITH_CONTROL, teacher, out=tmp_path / "a", **inputs)
    student, control = ([tokens for who, tokens in seen if who == kind] for kind in ("student", "control"))
    assert len(student) == 4
    assert control == student
    (stage,) = result["control"]["stages"]
    assert stage["options"] == result["stages"][1]["options"]
    assert stage["tokens"] == result["stages"][1]["tokens"]

    model, made = linattn.load(tmp_path / "a" / "model"), linattn.load(tmp_path / "a" / "control" / "model").eval()
    assert made.config.linattn == equal_bytes_plan(model).to_dict()
    assert [layer["kind"] for layer in made.config.linattn["layers"]] == [
        "keep" if i in result["kept"] else "convert" for i in range(3)
    ]
    trained = {name for name, t in made.state_dict().items() if not torch.equal(t, teacher.state_dict()[name])}
    paths = tuple(f"model.layers.{i}.self_attn." for i in range(3) if i not in result["kept"])
    assert {name for name in teacher.state_dict() if name.startswith(paths)} == trained

    (row,) = result["audit"]
    assert {"teacher", "student", "far_off", "control", "trained_control"} <= row["losses"].keys()
    assert row["by_position"].keys() == row["losses"].keys()
    windows = Windows(files["dev"], 40, seed=None)
    losses = token_losses(made, torch.stack([windows[i] for i in range(3)]))
    assert row["by_position"]["trained_control"] == by_position(losses).as_dict()["buckets"]
    assert row["losses"]["trained_control"] == pytest.approx(losses.mean().item())
    assert row["losses"]["trained_control"] != row["losses"]["control"]
    assert {"over_control", "over_trained_control"} <= row["beyond_reach"].keys()
    assert row["bytes"]["trained_control"] == row["bytes"]["control"]
    assert row["bytes"]["control"]["total"] <= row["bytes"]["student"]["total"]

    def breaking(self, batch):
        if batch.step == 3 and not any(".linattn." in name for name in self.parameters):
            raise KeyboardInterrupt
        return call(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(logits_module.Divergences, "__call__", breaking)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(WITH_CONTROL, teacher, out=tmp_path / "b", **inputs)
    again = recipe.run(WITH_CONTROL, teacher, out=tmp_path / "b", **inputs)
    assert again["audit"] == result["audit"]


def test_a_control_can_come_later_and_be_trained_by_stages_of_its_own(recipe, tiny, files, tmp_path):
    teacher, _ = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    inputs = {"train_data": files["dev"], "audits": {"held": files["dev"]}, "log": lambda line: None}
    without = recipe.run(WITH_CONTROL | {"control": False}, teacher, out=tmp_path / "a", **inputs)
    assert without["control"] is None
    assert "trained_control" not in without["audit"][0]["losses"]
    own = [{"kind": "logits", "steps": 2, "train": ["all"], "length": 24, "rows": 1}]
    result = recipe.run(WITH_CONTROL | {"control": own}, teacher, out=tmp_path / "a", **inputs)
    assert [stage["tokens"] for stage in result["control"]["stages"]] == [2 * 24]
    (before,), (after,) = without["audit"], result["audit"]
    assert {name: after["losses"][name] for name in before["losses"]} == before["losses"]
    assert "trained_control" in after["losses"]
    with pytest.raises(OptionError, match="other control"):
        recipe.run(WITH_CONTROL, teacher, out=tmp_path / "a", **inputs)


@pytest.mark.parametrize("keep", [CONFIG["keep"], [1]], ids=["chosen", "named"])
def test_layers_left_softmax_are_bound_to_a_window(recipe, tiny, files, tmp_path, keep):
    student = CONFIG["student"] | {"softmax_window": 30, "sink_distance": 31}
    config = WITH_CONTROL | {"student": student, "keep": keep}
    teacher, _ = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    inputs = {"train_data": files["dev"], "audits": {"held": files["dev"]}, "log": lambda line: None}
    result = recipe.run(config, teacher, out=tmp_path / "run", **inputs)
    assert len(result["kept"]) == 1
    for name in ("model", "control/model"):
        model = linattn.load(tmp_path / "run" / name)
        (layer,) = linattn.ConversionPlan.from_dict(model.config.linattn).kept
        assert (layer.index, layer.kind, layer.window) == (*result["kept"], "bound", 30)
        assert (layer.sinks, layer.sink_distance) == (2, 31)
        assert recipe._reach(model) < 30
    assert len(result["control"]["windows"]) == 2
    sizes = {name: held["total"] for name, held in result["audit"][0]["bytes"].items()}
    assert sizes["trained_control"] == sizes["control"] <= sizes["student"]


def test_retained_tokens_are_trained_and_audited_beside_their_bytes_in_windows(recipe, tiny, files, tmp_path):
    config = json.loads((RECIPES / "configs" / "retained.json").read_text(encoding="utf-8"))
    student = config["student"] | {"window": 6, "retained": [0, 9, 5], "sinks": 2, "sink_distance": 7}
    stages = [stage | COMMON | {"steps": 2, "warmup": 0} for stage in config["stages"]]
    asked = {"tasks": ["passkey"], "distances": [64], "prompts": 2}
    audit = {"lengths": [80], "tokens": 400, "parts": config["audit"]["parts"], "recall": asked}
    config |= {"student": student, "stages": stages, "audit": audit}
    recipe.main(command(tiny, files, tmp_path / "run", config))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(math.isfinite(result["stages"][0][f"held_out_{name}"]) for name in ("hybrid", "far", "mass", "score_r2"))
    model = linattn.load(tmp_path / "run" / "model")
    assert [layer["retained"] for layer in model.config.linattn["layers"]] == [0, 9, 5]
    assert recipe._reach(model) == 6 + 9 + 2
    made = linattn.load(tmp_path / "run" / "control" / "model")
    assert [layer["retained"] for layer in made.config.linattn["layers"]] == [0, 0, 0]
    (row,) = result["audit"]
    sizes = {name: held["total"] for name, held in row["bytes"].items()}
    assert sizes["trained_control"] == sizes["control"] <= sizes["student"]
    assert {"retained_off", "trained_control"} <= row["losses"].keys()
    assert row["far_gain"]["context"] == 17
    assert result["recall"].keys() == {"teacher", "student", "control", "trained_control"}


def test_recall_is_measured_of_all_models_and_read_again(recipe, tiny, files, tmp_path, monkeypatch):
    asked = {"distances": [64, 96], "tasks": ["passkey"], "prompts": 2}
    config = CONFIG | {"keep": [], "control": True, "audit": {"lengths": [], "recall": asked}}
    recipe.main(command(tiny, files, tmp_path / "run", config))
    found = json.loads((tmp_path / "run" / "result.json").read_text())["recall"]
    assert found.keys() == {"teacher", "student", "control", "trained_control"}
    for rows in found.values():
        assert [(row["task"], row["distance"], row["prompts"]) for row in rows] == [
            ("passkey", 64, 2),
            ("passkey", 96, 2),
        ]
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "audit_model", lambda *args, **options: pytest.fail("it is written already"))
        recipe.main(command(tiny, files, tmp_path / "run", config))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["recall"] == found
    config["audit"]["recall"] = asked | {"distances": [32]}
    recipe.main(command(tiny, files, tmp_path / "run", config))
    found = json.loads((tmp_path / "run" / "result.json").read_text())["recall"]
    assert {row["distance"] for rows in found.values() for row in rows} == {32}


@pytest.mark.parametrize("change", [{"tokens": 80}, {"parts": ["losses"]}, {"context": 9}], ids=str)
def test_an_audit_that_asks_for_something_else_is_made_again(recipe, tiny, files, tmp_path, monkeypatch, change):
    teacher, _ = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    inputs = {"out": tmp_path, "train_data": files["dev"], "log": lambda line: None}
    audit = {"lengths": [40], "tokens": 120, "parts": ["losses", "far_gain"], "context": 6}
    config = CONFIG | {"keep": [], "audit": audit}
    texts = {"held": files["dev"]}
    before = recipe.run(config, teacher, audits=texts, **inputs)["audit"]
    asked = []

    def counted(*args, **options):
        asked.append(options)
        return audit_model(*args, **options)

    monkeypatch.setattr(recipe, "audit_model", counted)
    assert recipe.run(config, teacher, audits=texts, **inputs)["audit"] == before
    assert not asked
    after = recipe.run(config | {"audit": audit | change}, teacher, audits=texts, **inputs)["audit"]
    assert len(asked) == 1
    assert after != before
    np.save(tmp_path / "other.npy", np.load(files["dev"])[::-1])
    other = recipe.run(config, teacher, audits={"held": tmp_path / "other.npy"}, **inputs)["audit"]
    assert other[0]["losses"]["teacher"] != before[0]["losses"]["teacher"]


def test_parts_side_by_side_do_what_a_whole_run_does(recipe, tiny, files, tmp_path):
    audit = {"lengths": [40], "tokens": 120, "recall": {"tasks": ["passkey"], "distances": [60], "prompts": 1}}
    config = CONFIG | {"control": True, "audit": audit}
    recipe.main(command(tiny, files, tmp_path / "whole", config))
    recipe.main([*command(tiny, files, tmp_path / "parts", config), "--beside"])
    whole, parts = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert sorted(path.name for path in (tmp_path / "parts" / "log").iterdir()) == [
        "control",
        "held@40",
        "recall",
        "student",
    ]
    for key in ("kept", "audit", "recall"):
        assert parts[key] == whole[key]
    assert [stage["last"] for stage in parts["stages"]] == [stage["last"] for stage in whole["stages"]]


def test_a_part_that_fails_says_why(recipe, tiny, files, tmp_path):
    broken = CONFIG | {"stages": [{"kind": "transfer", "steps": 1, "length": 4}]}
    with pytest.raises(SystemExit, match=r"student failed, see .*: windows of 4 tokens fit"):
        recipe.main([*command(tiny, files, tmp_path / "broken", broken), "--beside"])


def test_minutes_become_steps_once_and_leave_the_student_as_it_was(recipe, tiny, files, tmp_path, monkeypatch):
    teacher, tokenizer = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    student = linattn.convert_model(recipe.copy.deepcopy(teacher), **CONFIG["student"])
    before = {name: t.clone() for name, t in student.state_dict().items()}
    data = recipe.tokens_of(files["train"], tmp_path / "out", tokenizer)
    assert np.load(data).size == 900
    entries = [{**entry, "minutes": 0.5} for entry in CONFIG["stages"]]
    for entry in entries:
        del entry["steps"], entry["save_every"]
    clock = iter(range(10**6))
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: next(clock) / 2)  # ticks at each call
    settle = recipe._stages
    stages = settle(entries, student, teacher, tmp_path / "out", data, None, lambda line: None)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    assert all(stage.steps >= 1 and stage.save_every >= 1 for stage in stages)
    assert [stage.learning_rate for stage in stages] == [0.01, 1e-3]
    assert stages[0].warmup == stages[0].steps // 2
    monkeypatch.setattr(recipe, "_seconds_a_step", lambda *a: pytest.fail("the steps are settled"))
    assert settle(entries, student, teacher, tmp_path / "out", data, None, lambda line: None) == stages


def test_minutes_are_divided_by_the_time_of_a_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_seconds_a_step", lambda *a: 0.25)
    entries = [{"kind": "transfer", "minutes": 2.0}, {"kind": "logits", "minutes": 1.0, "warmup": 0.1}]
    stages = recipe._stages(entries, None, None, tmp_path, None, None, lambda line: None)
    assert [stage.steps for stage in stages] == [int(480 * recipe.MARGIN), int(240 * recipe.MARGIN)]
    assert [stage.save_every for stage in stages] == [240, 240]
    assert stages[1].warmup == int(0.1 * stages[1].steps)


def test_a_converted_student_and_layers_by_name(recipe, tiny, files, tmp_path):
    teacher, tokenizer = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    data = recipe.tokens_of(files["train"], tmp_path, tokenizer)
    config = CONFIG | {"keep": [1], "audit": {"lengths": []}}
    result = recipe.run(config, teacher, out=tmp_path / "a", train_data=data, log=lambda line: None)
    assert (result["kept"], result["audit"]) == ([1], [])
    rest = {key: value for key, value in config.items() if key not in ("student", "keep")}
    student = linattn.load(tmp_path / "a" / "model").eval()
    result = recipe.run(rest, teacher, out=tmp_path / "b", train_data=data, student=student, log=lambda line: None)
    assert result["kept"] == [1]
    with pytest.raises(OptionError, match="leave one of them out"):
        recipe.run(config, teacher, out=tmp_path / "c", train_data=data, student=student)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"student": {"windw": 3}}, "student has no windw"),
        ({"stagse": []}, "has no stagse"),
        ({"audit": {"length": 3}}, "audit has no length"),
        ({"audit": {"recall": {"prompt": 3}}}, "recall has no prompt"),
        ({"keep": {"number": 3}}, "keep has no number"),
        ({"control": 3}, "control is 3"),
        ({"control": True, "stages": CONFIG["stages"][:1]}, "control takes stages of logits"),
        ({"control": CONFIG["stages"]}, "control takes stages of logits"),
        ({"control": [{"kind": "logits", "steps": 1, "train": ["maps"]}]}, "control has no maps"),
        ({"stages": [{"kind": "transfer"}]}, "either steps or minutes"),
        ({"stages": [{"kind": "transfer", "steps": 3, "minutes": 3}]}, "either steps or minutes"),
    ],
)
def test_configs_that_say_something_else_are_refused(recipe, tiny, files, tmp_path, change, says):
    teacher, _ = recipe.load_teacher(str(tiny), torch.float32, "cpu")
    with pytest.raises(OptionError, match=says):
        recipe.run(CONFIG | change, teacher, out=tmp_path / "out", train_data=files["dev"], log=lambda line: None)


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_valid(recipe, path, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_seconds_a_step", lambda *a: 0.25)
    config = recipe._checked(json.loads(path.read_text(encoding="utf-8")), None)
    assert config["name"]
    for number, entry in enumerate(config["stages"]):
        recipe._stages([entry], None, None, tmp_path / str(number), None, None, lambda line: None)
    if not isinstance(config["keep"], list):
        recipe._fields(config["keep"])
