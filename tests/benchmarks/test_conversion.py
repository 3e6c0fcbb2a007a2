"""The conversion benchmark: its variants differ where they say, and its smoke test fills the table."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "recipes"))
    return importlib.import_module("conversion")


def test_variants_differ_from_the_recipe_where_they_say(benchmark: ModuleType) -> None:
    found = benchmark.variants()
    base, hybrid, pure = (found[name] for name in ("window 128", "hybrid", "pure"))

    def changed(name: str) -> list[str]:
        return [key for key in base if key not in ("name", "control") and found[name][key] != base[key]]

    assert base["keep"] == 0
    controlled = ["hybrid", "pure", "retained", "retained for recall"]
    assert [name for name, config in found.items() if config.get("control")] == controlled
    assert (len(hybrid["keep"]), pure["keep"]) == (6, [])
    assert pure["student"] | {"window": 128, "softmax_window": 8188} == base["student"]
    assert hybrid["student"]["softmax_window"] == base["student"]["softmax_window"]
    retained = found["retained"]
    assert {str(config["stages"]) for config in (base, pure, retained)} == {str(base["stages"])}
    assert [64 + each for each in retained["student"]["retained"]] == pure["student"]["window"]
    assert retained["student"] | {"retained": 0} == pure["student"] | {"window": 64, "retained": 0}
    assert [found[f"window 128, {count} layers softmax"]["keep"] for count in (2, 4, 6)] == [2, 4, 6]
    assert changed("window 128, 4 layers softmax") == ["keep"]
    for name in ("no decay", "decay by data", "rotary embedding far", "token weights", "state per head"):
        assert changed(name) == ["student"]
    assert found["state per head"]["student"] == base["student"] | {"per_head": True}
    assert found["rotary embedding far"]["student"] == base["student"] | {"far_rope": True}
    assert changed("no transfer") == changed("no far target") == ["stages"]
    assert {stage["kind"] for stage in found["no transfer"]["stages"]} == {"logits"}
    lolcats = found["LoLCATs, cross-entropy"]
    assert lolcats["student"] == {"feature_map": "hedgehog", "window": 64, "sinks": 0}
    assert (lolcats["stages"][0]["far_weight"], lolcats["stages"][0]["mass_weight"]) == (0.0, 0.0)
    assert [found[name]["stages"][1]["cross_entropy"] for name in ("LoLCATs, cross-entropy", "LoLCATs, KL")] == [1, 0]
    for config in found.values():
        steps = [stage["steps"] for stage in benchmark.shortened(config, 0.1)["stages"]]
        assert steps == [stage["steps"] // 10 for stage in config["stages"]]


def smoke(benchmark: ModuleType, tmp_path: Path, *only: str) -> dict[str, Any]:
    chosen = [word for name in only for word in ("--only", name)]
    benchmark.main(["--smoke", "--out", str(tmp_path), "--results", str(tmp_path / "results"), *chosen])
    return json.loads((tmp_path / "results" / "conversion.json").read_text(encoding="utf-8"))


def test_the_parts_of_a_variant_get_its_config_and_all_that_was_asked(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(benchmark.recipe, "beside", lambda *args: called.append(args))
    monkeypatch.setattr(benchmark, "run", lambda *args: {"config": {}, "error": "cut short"})
    monkeypatch.setattr(benchmark.recipe, "load_teacher", lambda *args: (None, None))
    monkeypatch.setattr(benchmark, "show", lambda *args: None)
    data = ["--train", "t.npy", "--audit", "docs=d.npy", "--audit", "novel=n.npy", "--model", "m.gguf"]
    options = ["--out", str(tmp_path), "--results", str(tmp_path), "--device", "cpu", "--only", "retained", "--beside"]
    benchmark.main([*data, *options, "--part", "0.5"])
    ((command, config, audits, folder, _),) = called
    assert config == benchmark.shortened(benchmark.variants()["retained"], 0.5)
    assert json.loads(Path(command[2]).read_text(encoding="utf-8")) == config
    assert (audits, folder) == (["docs", "novel"], tmp_path / "retained")
    said = dict(zip(command[3::2], command[4::2], strict=True))  # the last audit stands for both
    assert said == {
        "--out": str(folder),
        "--train": "t.npy",
        "--model": "m.gguf",
        "--dtype": "bfloat16",
        "--device": "cpu",
        "--audit": "novel=n.npy",
    }
    assert command.count("--audit") == 2

    folder.mkdir()
    done = {"config": benchmark.recipe.CONFIG | config}
    (folder / "result.json").write_text(json.dumps(done), encoding="utf-8")
    benchmark.main([*data, *options, "--part", "0.5"])
    assert len(called) == 1  # what is done is not done again
    benchmark.main([*data, *options, "--part", "0.25"])
    assert len(called) == 2


@pytest.mark.slow
def test_every_variant_runs_and_the_table_has_what_was_measured(
    benchmark: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    found = benchmark.variants()
    found["broken"] = copy.deepcopy(found["no decay"])
    found["broken"]["student"]["decay"] = "some"
    monkeypatch.setattr(benchmark, "variants", lambda: found)
    written = smoke(benchmark, tmp_path)
    results = written["results"]
    assert written["smoke"] is True
    assert list(results) == list(found)
    assert [name for name, result in results.items() if "error" in result] == ["broken"]
    assert "decay" in results["broken"]["error"]
    assert [len(results[name]["kept"]) for name in ("hybrid", "pure", "window 128")] == [1, 0, 0]
    text = (tmp_path / "results" / "conversion.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("| **hybrid**")]
    losses = [row["losses"]["student"] for row in results["hybrid"]["audit"]]
    assert line.split(" | ")[-2:] == [f"{losses[0]:.4f}", f"{losses[1]:.4f} |"]
    for name, result in results.items():
        for row in result.get("audit", ()):
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} | random, {row['length']} |")]
            beyond = row["beyond_reach"]
            told = [
                benchmark.report._gain(beyond.get(over))
                for over in ("far_branch", "over_control", "over_trained_control")
            ]
            assert line.removesuffix(" |").split(" | ")[2:5] == told
    assert text.count("| — equal bytes, no training |") == len(found) - 3  # none of "broken" and the two "alone"
    assert text.count("| — equal bytes, trained |") == 4
    (shortest, *_), _ = (row["differences"]["over_trained_control"] for row in results["hybrid"]["audit"])
    (line,) = [line for line in text.splitlines() if line.startswith("| hybrid | random | ")]
    assert line == f"| hybrid | random | {benchmark.report._gain(shortest)} |"
    assert f"Not run: broken: {results['broken']['error']}" in text
    assert (tmp_path / "results" / "conversion.png").stat().st_size > 0

    # Kept layers share the transfer of the recipe; what is done is read, not done again.
    first = (tmp_path / "window-128" / "align" / "1-transfer.safetensors").read_bytes()
    assert (tmp_path / "window-128--2-layers-softmax" / "align" / "1-transfer.safetensors").read_bytes() == first
    monkeypatch.setattr(benchmark.recipe, "run", lambda *a, **k: pytest.fail("it is done already"))
    again = smoke(benchmark, tmp_path, "window 128", "pure")["results"]
    assert {name: again[name] for name in ("pure", "window 128")} == {
        name: results[name] for name in ("pure", "window 128")
    }

    # The table can be made again of what is on record.
    (tmp_path / "results" / "conversion.md").unlink()
    benchmark.main(["--table", "--results", str(tmp_path / "results")])
    assert (tmp_path / "results" / "conversion.md").read_text(encoding="utf-8").startswith("# Conversion")


def test_what_was_judged_on_other_windows_has_a_table_of_its_own(benchmark: ModuleType) -> None:
    record = json.loads((BENCHMARKS / "results" / "conversion.json").read_text(encoding="utf-8"))
    name, result = next(iter(record["results"].items()))
    other = copy.deepcopy(result)
    for row in other["audit"]:
        row["windows"] += 1
        row["losses"]["teacher"] += 1
    for cell in other["recall"]["teacher"]:
        cell["prompts"] += 1
    text = benchmark.report.markdown({name: result, "other": other, "third": result}, smoke=False)
    _, first, second = text.split("Cross-entropy on held-out texts")
    assert f"| **{name}** |" in first
    assert "| **third** |" in first
    assert "| **other** |" in second
    assert "| **other** |" not in first
    assert text.count("| teacher |") == 4
    assert f"of {other['recall']['teacher'][0]['prompts']} prompts" in text

    # One answer of a teacher more is rounding, two are other prompts.
    for more, tables in ((1, 1), (2, 2)):
        close = copy.deepcopy(result)
        close["recall"]["teacher"][0]["found"] += more
        text = benchmark.report.markdown({name: result, "close": close}, smoke=False)
        assert text.count(f"| of {result['recall']['teacher'][0]['prompts']} prompts |") == tables


def test_recall_is_drawn_where_it_was_asked(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = json.loads((BENCHMARKS / "results" / "conversion.json").read_text(encoding="utf-8"))
    assert benchmark.report.plot_recall(record["results"], tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 0
    silent = {name: result | {"recall": None} for name, result in record["results"].items()}
    assert not benchmark.report.plot_recall(silent, tmp_path / "none.png")


def test_jobs_run_a_variant_each_and_a_failed_one_is_told(benchmark, tmp_path, monkeypatch, capsys) -> None:
    started: list[list[str]] = []

    def process(command: list[str], **options: Any) -> Any:
        started.append(command)
        return type("Done", (), {"returncode": 3 if command[-3] == "pure" else 0})

    monkeypatch.setattr(benchmark.subprocess, "run", process)
    argv = ["--only=hybrid", "--only", "pure", "--jobs", "2"]
    benchmark.side_by_side(["hybrid", "pure"], 2, tmp_path, argv)
    assert {command[-3] for command in started} == {"hybrid", "pure"}
    assert {command[-1] for command in started} == {str(tmp_path / name / "table") for name in ("hybrid", "pure")}
    assert all(command[2:-4] == argv and command[-4] == "--alone" for command in started)
    assert capsys.readouterr().out.splitlines() == ["hybrid: done", "pure: stopped with 3, see its log"]
    assert (tmp_path / "hybrid.log").exists()


def test_a_variant_alone_is_the_only_one(benchmark: ModuleType, tmp_path: Path) -> None:
    command = ["--smoke", "--out", str(tmp_path), "--only", "pure", "--alone", "window 128", "--jobs", "2"]
    benchmark.main([*command, "--results", str(tmp_path / "table")])
    written = json.loads((tmp_path / "table" / "conversion.json").read_text(encoding="utf-8"))
    assert list(written["results"]) == ["window 128"]
