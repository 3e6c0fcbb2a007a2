from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer", reason="needs the package typer")
from typer.testing import CliRunner

import linattn
from linattn.cli.main import app

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

WORDS = ["<unk>", "<s>", "</s>", *["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"]]
PROMPT = "the cat sat on the mat and"


def cli(*arguments: object, code: int = 0, **options: Any) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments], **options)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("models") / "llama"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0]['content'] }} then",
    ).save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "converted"
    cli("convert", saved, out, "--feature-map", "favor+", "--window", 4, "--sinks", 1, "--keep-layers", "1")
    return out


def test_help_is_quick_and_says_what_matters() -> None:
    code = (
        "import sys; from linattn.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("[]")
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "plan",
        "convert",
        "generate",
        "info",
        "maps",
        "audit",
        "tokens",
        "sample",
        "cache-teacher",
        "select-layers",
        "distill",
    ],
)
def test_every_command_has_examples(command: str) -> None:
    assert f"linattn {command}" in cli(command, "--help").output


def test_version() -> None:
    assert cli("--version").stdout.strip() == f"linattn {linattn.__version__}"


def test_maps() -> None:
    table = cli("maps").stdout
    listed = json.loads(cli("maps", "--json").stdout)
    assert [each["name"] for each in listed] == [info.name for info in linattn.feature_maps.available()]
    assert all(each["name"] in table for each in listed)
    favor = next(line for line in table.splitlines() if line.split()[:1] == ["favor+"])
    assert "unbiased" in favor
    assert "bidirectional only" in next(line for line in table.splitlines() if "linformer" in line)


def test_plan_reads_no_weights_and_can_be_saved(saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(saved / "config.json", bare)
    file = tmp_path / "plan.json"
    options = ("--feature-map", "elu", "--window", 7, "--keep-layers", "0,2-2", "--decay", "fixed", "--no-far-rope")
    options += ("--sink-distance", 63, "--softmax-window", 20, "--retained", 9, "--recency", 0.01, "--per-head")
    options += ("--retained-distance", 99)
    text = cli("plan", bare, *options, "--output", file).stdout
    expected = linattn.plan_model(
        transformers.LlamaForCausalLM.from_pretrained(saved),
        feature_map="elu",
        window=7,
        keep_softmax=(0, 2),
        decay="fixed",
        far_rope=False,
        sink_distance=63,
        retained_distance=99,
        softmax_window=20,
        retained=9,
        recency=0.01,
        per_head=True,
    )
    assert text == f"{expected}\n"
    assert linattn.ConversionPlan.load(file) == expected
    assert json.loads(cli("plan", bare, *options, "--json").stdout) == expected.to_dict()


def test_map_options_reach_the_map(saved: Path) -> None:
    plan = json.loads(cli("plan", saved, "--feature-map", "favor+", "--map-option", "num_features=12", "--json").stdout)
    assert plan["layers"][0]["feature_map_options"] == {"num_features": 12, "seed": 0}
    assert (
        "num_featurs" in cli("plan", saved, "--feature-map", "favor+", "--map-option", "num_featurs=1", code=1).stderr
    )


def test_convert_saves_what_convert_model_makes(saved: Path, converted: Path) -> None:
    model = linattn.load(converted)
    torch.manual_seed(0)
    expected = linattn.convert_model(
        transformers.LlamaForCausalLM.from_pretrained(saved), feature_map="favor+", window=4, sinks=1, keep_softmax=(1,)
    )
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(model.eval()(tokens).logits, expected.eval()(tokens).logits)


def test_convert_by_a_plan_and_to_a_dtype(saved: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "out"
    cli("plan", saved, "--feature-map", "elu", "-o", file)
    edited = json.loads(file.read_text())
    edited["layers"][2]["window"] = 5
    file.write_text(json.dumps(edited))
    cli("convert", saved, out, "--plan", file, "--dtype", "bfloat16")
    model = linattn.load(out)
    assert model.dtype == torch.bfloat16
    assert model.config.linattn["layers"][2]["window"] == 5
    # What is there is not overwritten, and a plan is not contradicted.
    assert "--force" in cli("convert", saved, out, code=1).stderr
    assert "--window" in cli("convert", saved, out, "--plan", file, "--window", 3, "--force", code=2).stderr
    cli("convert", saved, out, "--plan", file, "--force")
    assert linattn.load(out).dtype == torch.float32


def test_generate_prints_the_continuation_alone(converted: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    tokens = tokenizer(PROMPT, return_tensors="pt")
    new = linattn.load(converted).eval().generate(**tokens, max_new_tokens=9, do_sample=False, pad_token_id=2)
    expected = tokenizer.decode(new[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(expected.split()) >= 5
    ask = ("generate", converted, "--max-new-tokens", 9)
    assert cli(*ask, "-p", PROMPT).stdout == f"{expected}\n"
    assert cli(*ask, input=PROMPT + "\n").stdout == f"{expected}\n"
    assert cli(*ask, "-p", PROMPT, "--stream").stdout.split() == expected.split()
    report = json.loads(cli(*ask, "-p", PROMPT, "--json").stdout)
    assert (report["text"], report["prompt_tokens"], report["new_tokens"]) == (expected, 7, 9)
    templated = json.loads(cli(*ask, "-p", "the cat", "--chat", "--json").stdout)
    assert templated["prompt_tokens"] == 3


def test_sampling_is_seeded(converted: Path) -> None:
    ask = ("generate", converted, "-p", PROMPT, "--max-new-tokens", 12, "--sample", "--temperature", 3.0)
    first, again, other = (cli(*ask, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("far", ["favor+", "none", "bound"])
def test_info_counts_the_bytes_that_generation_holds(saved: Path, converted: Path, tmp_path: Path, far: str) -> None:
    if far != "favor+":
        converted = tmp_path / "near"
        options = ("--feature-map", "none") if far == "none" else ("--feature-map", "favor+", "--softmax-window", 20)
        cli("convert", saved, converted, *options, "--window", 4, "--sinks", 1, "--keep-layers", "1")
    tokens = torch.arange(3, 15)[None]
    held = {}
    for path in (saved, converted):
        model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
        layers = model.generate(
            tokens, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, pad_token_id=2
        ).past_key_values.layers
        held[path] = [x.nbytes if hasattr(x, "nbytes") else x.keys.nbytes + x.values.nbytes for x in layers]
    report = json.loads(cli("info", converted, "--length", 12, "--length", 10**6, "--json").stdout)
    assert (report["converted_layers"], report["softmax_layers"]) == (2, 1)
    assert report["state_bytes"] == held[converted][0] + held[converted][2]
    assert report["memory"][0] == {"length": 12, "cache_bytes": sum(held[saved]), "bytes": sum(held[converted])}
    per_token = (held[saved][0] + held[saved][2]) / 12
    assert (report["equal_at_tokens"] - 1) * per_token < report["state_bytes"] <= report["equal_at_tokens"] * per_token
    text = cli("info", converted).stdout
    assert f"2 × {'no far branch' if far == 'none' else 'favor+'}, window 4, sinks 1" in text
    assert f"1 × softmax{', window 20, sinks 1' if far == 'bound' else ''}\n" in text
    assert f"{report['equal_at_tokens']:,} tokens" in text


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_info_counts_the_window_s_keys_in_the_forms_that_the_state_holds(
    saved: Path, tmp_path: Path, rope_type: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    model.config.rope_parameters |= {"rope_type": rope_type, "factor": 2.0}
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "converted"
    options = ("--keep-layers", "1", "--no-far-rope", "--decay", "data", "--per-head", "--retained", 3)
    cli("convert", tmp_path / "model", out, "--window", 4, *options)
    report = json.loads(cli("info", out, "--json").stdout)
    model = linattn.load(out)
    cache = model(torch.arange(3, 15)[None], use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if hasattr(layer, "nbytes")]
    assert report["state_bytes"] == sum(layer.nbytes for layer in layers)
    for layer in layers:
        assert (layer.state.recent_far_k is not None) == (rope_type == "dynamic")
        assert (layer.state.kept_far_k is not None) == (rope_type == "dynamic")
    assert "2 × hedgehog, window 4, sinks 4, 3 retained, data decay, a state per query head" in cli("info", out).stdout
    told = "which the first call tells" in cli("info", out).stdout
    assert told == (report["most_state_bytes"] > report["state_bytes"]) == (rope_type == "default")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two texts, of 200 and of 60 words that the tokenizer knows."""
    paths = []
    for name, count in (("long", 200), ("short", 60)):
        paths.append(tmp_path_factory.mktemp("texts") / f"{name}.txt")
        words = torch.randint(3, len(WORDS), (count,), generator=torch.Generator().manual_seed(count))
        paths[-1].write_text(" ".join(WORDS[i] for i in words), encoding="utf-8")
    return paths


AUDIT = ("--length", 48, "--windows", 4, "--prompts", 2, "--distance", 40, "--distance", 10)


def test_audit_writes_and_prints_what_audit_model_measures(
    saved: Path, converted: Path, texts: list[Path], tmp_path: Path
) -> None:
    from linattn.audit import audit_model

    out = tmp_path / "report"
    files = [word for path in texts for word in ("--text", path)]
    ask = ("audit", converted, "--teacher", saved, *files, *AUDIT)
    done = cli(*ask, "--decode-length", 30, "--decode-length", 4, "--out", out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert [line[2:] for line in done.stdout.splitlines() if line.startswith("• ")] == report["verdict"]
    for title in ("Cross-entropy by position", "Layers", "Recall, 2 prompts each", "Decoding"):
        assert title in done.stdout
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert markdown.startswith(f"# {converted}, converted from {saved}\n\n1. {report['verdict'][0]}")
    if importlib.util.find_spec("matplotlib") is not None:
        assert len(list(out.glob("*.png"))) == 4
        assert "(far_mass.png)" in markdown
    assert (report["model"], report["teacher"], report["dtype"]) == (str(converted), str(saved), "float32")
    assert [(each["task"], each["distance"]) for each in report["recall"]["student"]] == [
        (task, distance) for task in ("passkey", "needle", "lookup") for distance in (10, 40)
    ]
    assert [row["length"] for row in report["speed"]["student"]] == [4, 30]

    # The windows are those of the texts in turn, up to the end of the shorter one.
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    long, short = (torch.tensor(tokenizer.encode(path.read_text(), add_special_tokens=False)) for path in texts)
    tokens = torch.stack([long[:48], short[:48], long[48:96], long[96:144]])
    teacher = transformers.AutoModelForCausalLM.from_pretrained(saved)
    parts = ["losses", "far_gain", "counterfactual", "telemetry", "cache"]
    expected = audit_model(teacher, linattn.load(converted), tokens, parts=parts)
    for part in ("models", "beyond_reach", "far_gain", "counterfactual", "telemetry", "cache", "cheaper_from"):
        assert report[part] == expected[part]

    assert "--force" in cli(*ask, "--out", out, code=1).stderr
    gain = json.loads(cli(*ask, "--parts", "far_gain", "--context", 3, "--json").stdout)["far_gain"]
    assert gain == audit_model(teacher, linattn.load(converted), tokens, parts=["far_gain"], context=3)["far_gain"]
    again = cli(*ask, "--out", out, "--force", "--parts", "cache,telemetry", "--json").stdout
    assert json.loads(again) == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert not {"models", "recall", "speed"} & json.loads(again).keys()


def test_audit_compares_with_a_trained_control(saved: Path, converted: Path, texts: list[Path], tmp_path: Path) -> None:
    from linattn.audit import equal_bytes_plan

    plan = equal_bytes_plan(linattn.load(converted))
    plan.save(tmp_path / "plan.json")
    cli("convert", saved, tmp_path / "control", "--plan", tmp_path / "plan.json")
    ask = ("audit", converted, "--teacher", saved, "--text", texts[0], *AUDIT, "--parts", "losses", "--json")
    report = json.loads(cli(*ask, "--control", tmp_path / "control").stdout)
    assert report["models"]["trained_control"] == report["models"]["control"]  # it is not trained here
    cli("convert", saved, tmp_path / "bf16", "--plan", tmp_path / "plan.json", "--dtype", "bfloat16")
    assert "pass --dtype" in cli(*ask, "--control", tmp_path / "bf16", code=1).stderr


def test_the_parts_of_an_audit_are_those_of_the_library() -> None:
    from linattn.audit.report import PARTS
    from linattn.cli.main import AUDIT_PARTS

    assert AUDIT_PARTS == PARTS


@pytest.mark.parametrize(("special", "prefix"), [([1], [1]), ([2], [])])
def test_recall_prompts_begin_as_the_tokenizer_begins(
    monkeypatch: pytest.MonkeyPatch, special: list[int], prefix: list[int]
) -> None:
    from linattn.cli._audit import recall_measure

    class Tokenizer:
        all_special_ids = special

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1] * add_special_tokens + [ord(c) for c in text]

    asked: dict[str, Any] = {}
    monkeypatch.setattr("linattn.audit.recall_by_distance", lambda *a, **k: asked.update(k, model=a[0]), raising=False)
    options = {"distances": [9], "prompts": 2, "candidates": 4, "seed": 5}
    recall_measure(Tokenizer(), torch.arange(9), **options)("a model")  # type: ignore[arg-type]
    assert asked == {**options, "prefix": prefix, "model": "a model"}


def test_an_audit_without_plots_says_so(
    saved: Path, converted: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    ask = ("audit", converted, "--teacher", saved, "--text", texts[0], *AUDIT, "--parts", "cache")
    assert "linattn[plots]" in cli(*ask, "--out", tmp_path / "out").stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]


def test_info_of_a_model_as_it_is(saved: Path) -> None:
    assert "Not converted" in cli("info", saved).stdout
    report = json.loads(cli("info", saved, "--json").stdout)
    assert report["converted_layers"] == report["state_bytes"] == 0
    assert report["equal_at_tokens"] is None
    assert all(row["cache_bytes"] == row["bytes"] for row in report["memory"])


def test_an_encoder_converts_but_does_not_generate(saved: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    done = cli("convert", tmp_path / "bert", tmp_path / "out", "--feature-map", "elu")
    assert "note:" in done.stderr  # it has no tokenizer
    assert type(linattn.load(tmp_path / "out")).__name__ == "LinattnBertForMaskedLM"
    for file in saved.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "out")
    assert "does not generate" in cli("generate", tmp_path / "out", "-p", "the cat", code=1).stderr


def test_gguf_is_planned_without_its_weights(smollm2_gguf: Path) -> None:
    plan = json.loads(cli("plan", smollm2_gguf, "--json").stdout)
    assert len(plan["layers"]) == 30
    assert {(layer["heads"], layer["kv_heads"], layer["head_dim"]) for layer in plan["layers"]} == {(9, 3, 64)}


# Distilling.

STAGES = """{"stages": [
    {"kind": "transfer", "steps": 3, "length": 24, "rows": 2, "learning_rate": 0.01},
    {"kind": "logits", "steps": 3, "length": 24, "rows": 2, "train": ["maps"], "seed": 5}
]}"""


@pytest.fixture(scope="module")
def student(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "student"
    cli("convert", saved, out, "--window", 4, "--sinks", 1)
    return out


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stages") / "stages.json"
    path.write_text(STAGES)
    return path


@pytest.fixture(scope="module")
def data(saved: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "tokens.npy"
    lines = out.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps({"words": path.read_text()}) + "\n" for path in texts), encoding="utf-8")
    said = cli("tokens", lines, texts[1], "--tokenizer", saved, "--field", "words", "-o", out).stdout
    assert said == f"{out}: {200 + 1 + 60 + 1 + 60 + 1:,} tokens\n"
    return out


def test_tokens_are_those_of_the_texts_in_order(saved: Path, texts: list[Path], data: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    long, short = (tokenizer.encode(path.read_text(), add_special_tokens=False) for path in texts)
    assert np.load(data).tolist() == [*long, 2, *short, 2, *short, 2]


def test_a_tokenizer_needs_no_model_beside_it(saved: Path, texts: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / "tokenizer"
    transformers.AutoTokenizer.from_pretrained(saved).save_pretrained(alone)
    assert not (alone / "config.json").exists()
    cli("tokens", texts[1], "--tokenizer", alone, "-o", tmp_path / "alone.npy")
    cli("tokens", texts[1], "--tokenizer", saved, "-o", tmp_path / "beside.npy")
    assert np.load(tmp_path / "alone.npy").tolist() == np.load(tmp_path / "beside.npy").tolist()


def test_samples_are_those_of_the_library(saved: Path, tmp_path: Path) -> None:
    from linattn.distill import sample_from_teacher

    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    count = sample_from_teacher(model, 40, tmp_path / "want.npy", length=16, rows=2, top_p=0.9, seed=3)
    ask = ("sample", saved, "--tokens", 40, "--length", 16, "--rows", 2, "--top-p", 0.9, "--seed", 3)
    assert cli(*ask, "-o", tmp_path / "got.npy").stdout == f"{tmp_path / 'got.npy'}: {count} tokens\n"
    assert np.array_equal(np.load(tmp_path / "got.npy"), np.load(tmp_path / "want.npy"))


def test_distill_trains_the_stages_and_goes_on_where_it_stopped(
    saved: Path, student: Path, stages: Path, data: Path, tmp_path: Path
) -> None:
    from linattn.distill import distill, read_stages

    ask = ("distill", student, "--teacher", saved, "--stages", stages, "--data", data, "--out", tmp_path / "run")
    assert "1-transfer: loss" in cli(*ask).stdout
    teacher = transformers.AutoModelForCausalLM.from_pretrained(saved)
    want = linattn.load(student)
    distill(want, teacher, read_stages(stages), out=tmp_path / "want", data=data)
    got = linattn.load(tmp_path / "run" / "model")
    assert all(torch.equal(t, got.state_dict()[name]) for name, t in want.state_dict().items())
    assert "the" in transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").get_vocab()

    # A finished run is read, not trained again, unless it is asked for.
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    report = json.loads(cli(*ask, "--json").stdout)
    assert [stage["name"] for stage in report["stages"]] == ["1-transfer", "2-logits"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    cli(*ask, "--fresh")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != before  # its seconds are others


def test_a_cached_teacher_fits_the_stages(saved: Path, student: Path, stages: Path, data: Path, tmp_path: Path) -> None:
    ask = ("cache-teacher", saved, "--data", data, "--stages", stages, "--k", 6, "--out", tmp_path / "teacher")
    assert "6 windows of 24 tokens" in cli(*ask).stdout
    assert "--force" in cli(*ask, code=1).stderr
    assert "--windows" in cli(*ask, "--force", "--windows", 9, code=2).stderr
    run = ("distill", student, "--stages", stages, "--data", data, "--out", tmp_path / "run")
    assert "2-logits: loss" in cli(*run, "--teacher", tmp_path / "teacher").stdout
    assert "expected the model before" in cli(*run, "--fresh", code=1).stderr
    pieces = tmp_path / "pieces.json"
    pieces.write_text(STAGES.replace('"kind": "logits",', '"kind": "logits", "segment": 10, "teacher_context": 16,'))
    run = ("distill", student, "--stages", pieces, "--data", data, "--out", tmp_path / "long")
    assert "was cached with" in cli(*run, "--teacher", tmp_path / "teacher", code=1).stderr
    cli(*ask[:4], "--stages", pieces, "--k", 6, "-o", tmp_path / "bounded")
    assert "2-logits: loss" in cli(*run, "--teacher", tmp_path / "bounded").stdout
    assert "--segment" in cli(*ask[:6], "--segment", 9, "-o", tmp_path / "x", code=2).stderr
    two = tmp_path / "two.json"
    two.write_text(STAGES.replace('"transfer", ', '"logits", '))
    assert "2 stages of logits" in cli(*ask[:4], "--stages", two, "-o", tmp_path / "x", code=1).stderr


def test_layers_are_selected_and_left_softmax(student: Path, data: Path, tmp_path: Path) -> None:
    from linattn.distill import Windows, select_layers

    windows = Windows(data, 24, seed=None)
    want = select_layers(linattn.load(student), torch.stack([windows[i] for i in range(3)]), keep=1)
    ask = ("select-layers", student, "--data", data, "--keep", 1, "--windows", 3, "--length", 24)
    report = json.loads(cli(*ask, "--json").stdout)
    assert report["kept"] == list(want.kept)
    assert [cost["kl"] for cost in report["costs"]] == pytest.approx([cost.kl for cost in want.costs])
    assert [report[name]["kl"] for name in ("chosen", "uniform")] == pytest.approx([want.chosen.kl, want.uniform.kl])
    out, plan = tmp_path / "hybrid", tmp_path / "plan.json"
    said = cli(*ask, "--out", out, "--plan", plan).stdout
    told = [f"{each.kept[0]}: KL {each.kl:.5f} ± {each.standard_error:.5f}" for each in (want.chosen, want.uniform)]
    assert said.endswith(f"keep softmax: {told[0]}\nevenly spaced: {told[1]}\n")
    assert f"{want.costs[2].kl:.5f}" in said
    assert linattn.ConversionPlan.load(plan) == want.plan
    kinds = [layer["kind"] for layer in linattn.load(out).config.linattn["layers"]]
    assert kinds == [layer.kind for layer in want.plan.layers]
    assert cli(*ask, "--method", "uniform").stdout == f"keep softmax: {told[1]}\n"
    assert cli(*ask, "--keep", 0).stdout.startswith("keep softmax: none: KL 0.")
    cli(*ask, "--out", tmp_path / "bound", "--plan", plan, "--softmax-window", 16)
    made = linattn.load(tmp_path / "bound").config.linattn["layers"][want.kept[0]]
    planned = linattn.ConversionPlan.load(plan).layers[want.kept[0]]
    assert (made["kind"], made["window"]) == (planned.kind, planned.window) == ("bound", 16)
    assert "0 ≤ keep < 3" in cli(*ask, "--keep", 3, code=1).stderr


# What goes wrong ends in one message and the documented code.

BESIDE = ("--teacher", "MODEL", "--text", "TEXT", "--windows", "2", "--length", "20")


@pytest.mark.parametrize(
    ("code", "word", "arguments"),
    [
        (1, "hedgehog", ("plan", "MODEL", "--feature-map", "hedghog")),
        (1, "0 … 2", ("plan", "MODEL", "--keep-layers", "7")),
        (1, "nothing is left", ("plan", "MODEL", "--keep-layers", "0-2")),
        (1, "causal", ("plan", "MODEL", "--feature-map", "linformer")),
        (1, "revert_model", ("plan", "CONVERTED")),
        (2, "MODEL", ("plan",)),
        (2, "windw", ("plan", "MODEL", "--windw", "3")),
        (2, "window", ("plan", "MODEL", "--window", "-3")),
        (2, "KEY=VALUE", ("plan", "MODEL", "--map-option", "features")),
        (2, "0,5,10-12", ("plan", "MODEL", "--keep-layers", "one")),
        (2, "--sample", ("generate", "MODEL", "-p", "the", "--temperature", "0.5")),
        (2, "exclude", ("generate", "MODEL", "-p", "the", "--stream", "--json")),
        (2, "empty", ("generate", "MODEL", "-p", "")),
        (1, "make 2 windows of 20", ("audit", "CONVERTED", *BESIDE, "--windows", "3")),
        (1, "no converted layer", ("audit", "MODEL", *BESIDE)),
        (1, "converted already", ("audit", "CONVERTED", "--teacher", "CONVERTED", *BESIDE[2:])),
        (1, "window + sinks = 5", ("audit", "CONVERTED", *BESIDE[:-1], "6")),
        (2, "--teacher", ("audit", "CONVERTED", "--text", "TEXT")),
        (2, "--parts speeed", ("audit", "CONVERTED", *BESIDE, "--parts", "speeed")),
        (3, "nowhere.txt", ("audit", "CONVERTED", "--teacher", "MODEL", "--text", "nowhere.txt")),
        (2, "ends in .npy", ("tokens", "TEXT", "--tokenizer", "MODEL", "-o", "OUT/tokens.txt")),
        (2, "ends in .npy", ("sample", "MODEL", "--tokens", "9", "-o", "OUT")),
        (3, "nowhere.npy", ("select-layers", "CONVERTED", "--data", "nowhere.npy", "--keep", "1")),
        (1, "no stages there", ("distill", "CONVERTED", "--stages", "TEXT", "--data", "TEXT", "-o", "OUT")),
        (1, "names no file of tokens", ("distill", "CONVERTED", "--stages", "STAGES", "-o", "OUT")),
        (2, "--device", ("generate", "MODEL", "-p", "the", "--device", "abacus")),
        (3, "no such file", ("info", "./nowhere")),
        (3, "no such file", ("info", "nowhere.gguf")),
        (3, "config.json", ("info", "EMPTY")),
        (3, "no saved tokenizer", ("tokens", "TEXT", "--tokenizer", "EMPTY", "-o", "OUT/tokens.npy")),
        (3, "not a .gguf", ("info", "MODEL/config.json")),
        (3, "hub", ("info", "nobody/nothing")),
        (3, "broken", ("info", "BROKEN")),
        (3, "no conversion plan", ("convert", "MODEL", "OUT", "--plan", "nowhere.json")),
        (3, "cannot load the model", ("generate", "WEIGHTLESS", "-p", "the")),
    ],
)
def test_errors(saved: Path, converted: Path, tmp_path: Path, code: int, word: str, arguments: tuple[str, ...]) -> None:
    for name in ("empty", "broken", "weightless"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for file in saved.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "weightless")
    (tmp_path / "text").write_text("the cat sat " * 14, encoding="utf-8")
    (tmp_path / "stages").write_text(STAGES, encoding="utf-8")
    places = {"MODEL": saved, "CONVERTED": converted, "OUT": tmp_path / "out", "TEXT": tmp_path / "text"}
    places["STAGES"] = tmp_path / "stages"
    places |= {name.upper(): tmp_path / name for name in ("empty", "broken", "weightless")}
    first, *rest = arguments
    result = cli(first, *(_fill(places, a) for a in rest), code=code)
    assert word in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def _fill(places: dict[str, Path], argument: str) -> str:
    head, slash, tail = argument.partition("/")
    return f"{places[head]}{slash}{tail}" if head in places else argument


def test_the_unexpected_is_named_and_debug_shows_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("linattn.convert.plan.plan_model", fail)
    assert "ZeroDivisionError: by design" in cli("plan", saved, code=4).stderr
    debug = CliRunner().invoke(app, ["--debug", "plan", str(saved)])
    assert isinstance(debug.exception, ZeroDivisionError)


def test_interruption(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("linattn.convert.plan.plan_model", interrupt)
    cli("plan", saved, code=130)
