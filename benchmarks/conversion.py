"""What each part of a conversion is worth: one model through the recipe many times, a part changed each time.

    python benchmarks/conversion.py --out runs --train train.npy --dev dev.npy --audit docs=docs.npy [--jobs 4]
    python benchmarks/conversion.py --smoke

All variants train on the same tokens, through recipes/convert_smollm2.py: those of recipes/configs, with 6 layers left
softmax ("hybrid") and with none ("pure"), both beside a window of equal bytes trained as they were; the recipe with
windows of 128 in all layers and 0, 2 or 4 of them softmax, chosen by KL; that with none softmax less its transfer, its
far target, its decay, and with rotary embedding in the far branch; and LoLCATs (arXiv:2410.10254), with cross-entropy
as published, and with KL. --part 0.3 takes that part of all stages' steps.
Called again it goes on where it was stopped. Several --jobs share a GPU that one small model cannot fill. Writes
results/conversion.json, .md and .png: perplexity on held-out texts at several lengths, beside the teacher, the same
weights without their far branch, and windows of equal bytes, untrained and trained. --smoke runs all of it on the CPU
with a tiny random model and tokens; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, ROOT, write_results
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linattn.errors import LinattnError

sys.path.insert(0, str(ROOT / "recipes"))
import convert_smollm2 as recipe

CONFIGS = ROOT / "recipes" / "configs"
HYBRID, PURE = "hybrid", "pure"
"""The recipes, with a trained control each."""
BASE = "window 128"
OVER = {
    "far_branch": "far branch off",
    "over_control": "equal bytes, no training",
    "over_trained_control": "equal bytes, trained",
}
"""What a variant is compared with beyond its window, by the name of the difference in an audit."""
BARS = (
    ("student", "as it is", -0.27),
    ("far_off", "far branch off", 0.0),
    ("trained_control", "window of equal bytes, trained", 0.27),
)
"""Models of the plot, their labels, and where their bars stand."""
SMOKE_VOCABULARY, SMOKE_LAYERS = 64, 9
SMOKE = {"length": 32, "rows": 1, "steps": 2, "warmup": 0}


def variants() -> dict[str, dict[str, Any]]:
    """Configs by name."""
    hybrid, pure, lolcats = (
        json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")) for name in ("default", "pure", "lolcats")
    )
    alone = {"control": False, "audit": {key: hybrid["audit"][key] for key in ("lengths", "windows")}}
    base = hybrid | {"student": hybrid["student"] | {"window": 128}, "keep": 0} | alone
    transfers = [stage for stage in base["stages"] if stage["kind"] == "transfer"]
    rest = [stage for stage in base["stages"] if stage["kind"] != "transfer"]

    def student(**options: Any) -> dict[str, Any]:
        return base | {"student": base["student"] | options}

    no_target = [stage | {"far_weight": 0.0, "mass_weight": 0.0} for stage in transfers]
    by_kl = [stage | {"cross_entropy": 0.0} if stage["kind"] == "logits" else stage for stage in lolcats["stages"]]
    found = {
        HYBRID: hybrid,
        PURE: pure,
        BASE: base,
        **{f"{BASE}, {count} layers softmax": base | {"keep": count} for count in (2, 4)},
        "no transfer": base | {"stages": rest},
        "no far target": base | {"stages": no_target + rest},
        "no decay": student(decay=None),
        "decay by data": student(decay="data"),
        "rotary embedding far": student(far_rope=True),
        "LoLCATs, cross-entropy": lolcats,
        "LoLCATs, KL": lolcats | {"stages": by_kl},
    }
    return {name: copy.deepcopy(config) | {"name": name} for name, config in found.items()}


def shortened(config: dict[str, Any], part: float) -> dict[str, Any]:
    """The config with so much of its stages' steps."""
    return config | {"stages": [stage | {"steps": max(1, round(part * stage["steps"]))} for stage in config["stages"]]}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the sizes of the smoke test."""
    stages = [stage | SMOKE for stage in config["stages"]]
    windows = config["student"]["window"]
    window = [6 if each == min(windows) else 12 for each in windows[:SMOKE_LAYERS]] if isinstance(windows, list) else 6
    changes = {"student": config["student"] | {"window": window}, "stages": stages}
    if not isinstance(config.get("keep", []), list):
        changes["keep"] = {"count": config["keep"], "windows": 1, "length": 32}
    return config | changes | {"audit": {"lengths": [48, 96], "windows": 2}}


def run(
    config: dict[str, Any], teacher: PreTrainedModel, folder: Path, base: Path, data: Mapping[str, Any]
) -> dict[str, Any]:
    """A variant's result, or why it has none."""
    path = folder / "result.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["config"] == recipe.CONFIG | config:
            return result
    if not (folder / "align").exists() and (base / "result.json").exists() and _alike(config, base / "config.json"):
        shutil.copytree(base / "align", folder / "align")  # the same transfer of the same student
    try:
        return recipe.run(config, teacher, out=folder, log=lambda line: print(f"  {line}", flush=True), **data)
    except LinattnError as error:
        return {"config": config, "error": str(error).splitlines()[0]}


def side_by_side(names: Sequence[str], jobs: int, out: Path, argv: Sequence[str]) -> None:
    """Run variants in processes of their own, ``jobs`` at a time; each writes a log beside its folder."""

    def start(name: str) -> int:
        with (out / f"{_folder(name)}.log").open("w", encoding="utf-8") as log:
            own = ["--only", name, "--jobs", "1", "--results", str(out / _folder(name) / "table")]
            command = [sys.executable, str(Path(__file__)), *_without_only(argv), *own]
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        for name, code in zip(names, pool.map(start, names), strict=True):
            print(f"{name}: {'done' if code == 0 else f'stopped with {code}, see its log'}", flush=True)


def _without_only(argv: Sequence[str]) -> list[str]:
    return [word for at, word in enumerate(argv) if word != "--only" and (at == 0 or argv[at - 1] != "--only")]


def _alike(config: Mapping[str, Any], path: Path) -> bool:
    """Whether ``config`` has the student and the transfer of the config at ``path``."""
    other = json.loads(path.read_text(encoding="utf-8"))
    transfers = [[stage for stage in each["stages"] if stage["kind"] == "transfer"] for each in (config, other)]
    return transfers[0] == transfers[1] != [] and config["student"] == other["student"]


def perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):.2f}" if loss < 20 else "> 10⁸"


def markdown(results: Mapping[str, Mapping[str, Any]], about: str) -> str:
    """Two tables: perplexities, and what a variant is worth in nats beyond its window, over windows alone."""
    done = {name: result for name, result in results.items() if "error" not in result}
    places = [(row["text"], row["length"]) for result in list(done.values())[:1] for row in result["audit"]]
    header = [f"{text}, {length:,}" for text, length in places]
    rows: list[list[str]] = []

    def losses(result: Mapping[str, Any], model: str) -> list[str]:
        return [perplexity(row["losses"][model]) for row in result["audit"]]

    for name, result in done.items():
        if not rows:
            rows += [["teacher", "", "", *losses(result, "teacher")]]
        millions = sum(stage["tokens"] for stage in result["stages"]) / 1e6
        rows += [[f"**{name}**", str(len(result["kept"])), f"{millions:.1f}", *losses(result, "student")]]
        rows += [["— far branch off", "", "", *losses(result, "far_off")]]
        rows += [["— equal bytes, no training", "", "", *losses(result, "control")]]
        if control := result["control"]:
            millions = sum(stage["tokens"] for stage in control["stages"]) / 1e6
            rows += [["— equal bytes, trained", "", f"{millions:.1f}", *losses(result, "trained_control")]]
    lines = [
        "# Conversion: what each part is worth",
        "",
        about,
        "",
        "Perplexity on held-out texts, by window length:",
        "",
    ]
    lines += _table(["variant", "softmax layers", "M tokens", *header], rows)
    lines += [
        "",
        "Cross-entropy of windows alone less that of a variant, beyond its window, in nats per token, ± s.e.: its own "
        "window (far branch off), and the teacher's with as many bytes as the variant's state, untrained and trained "
        "on the tokens of the variant's stages of logits:",
        "",
    ]
    gains = [
        [name, f"{row['text']}, {row['length']:,}", *(_gain(row["beyond_reach"].get(over)) for over in OVER)]
        for name, result in done.items()
        for row in result["audit"]
    ]
    lines += _table(["variant", "text", *OVER.values()], gains)
    failed = {name: result["error"] for name, result in results.items() if "error" in result}
    lines += [line for name, why in failed.items() for line in ("", f"Not run: {name}: {why}")]
    return "\n".join(lines) + "\n"


def _gain(bucket: Mapping[str, Any] | None) -> str:
    if bucket is None:
        return ""
    error = bucket["standard_error"]
    return f"{bucket['mean']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Loss over the teacher's of each variant, with its far branch and without, and of its trained control, if any.

    False without matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    done = {name: result for name, result in results.items() if "error" not in result}
    rows = next(iter(done.values()))["audit"]
    figure, axes = plt.subplots(
        1,
        len(rows),
        figsize=(2.2 + 3.2 * len(rows), 1.2 + 0.34 * len(done)),
        sharey=True,
        squeeze=False,
        layout="tight",
    )
    for at, (row, ax) in enumerate(zip(rows, axes[0], strict=True)):
        for model, label, offset in BARS:
            losses = [result["audit"][at]["losses"] for result in done.values()]
            values = [each.get(model, math.nan) - each["teacher"] for each in losses]
            ax.barh([i + offset for i in range(len(done))], values, 0.26, label=label)
        control = row["losses"]["control"] - row["losses"]["teacher"]
        ax.axvline(control, color="grey", linestyle="--", label="window of equal bytes, no training")
        ax.set_title(f"{row['text']}, windows of {row['length']:,}", fontsize=9)
        ax.set_xlabel("nats over the teacher")
    axes[0][0].set_yticks(range(len(done)), list(done))
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def smoke_inputs(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A tiny random model, and tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": SMOKE_VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": SMOKE_LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, SMOKE_VOCABULARY, 1000).astype(np.uint16))
    tokens = folder / "tokens.npy"
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()
    return teacher, {"train_data": tokens, "dev_data": tokens, "audits": {"random": tokens}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--train", type=Path, help=".npy tokens to train on")
    parser.add_argument("--dev", type=Path, help=".npy tokens to measure while training and to choose layers by")
    parser.add_argument("--audit", action="append", default=[], metavar="NAME=FILE", help="held-out .npy tokens")
    parser.add_argument("--model", help="directory, .gguf file or hub name; default SmolLM2-135M-Instruct")
    parser.add_argument("--part", type=float, default=1.0, help="of the steps of all stages")
    parser.add_argument("--jobs", type=int, default=1, help="variants that run at once")
    parser.add_argument("--only", action="append", metavar="NAME", choices=list(variants()), help="repeatable")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, help="folder of the tables; default benchmarks/results")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model on the CPU")
    args = parser.parse_args(argv)
    if not args.smoke and not (args.out and args.train and args.audit):
        parser.error("--out, --train and --audit are needed, or --smoke.")

    chosen = {name: config for name, config in variants().items() if not args.only or name in args.only}
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            teacher, data = smoke_inputs(out)
            chosen = {name: small(config) for name, config in chosen.items()}
            where = args.results or out
        else:
            teacher, tokenizer = recipe.load_teacher(args.model, getattr(torch, args.dtype), args.device)
            audits = dict(each.split("=", 1) for each in args.audit)
            data = {"train_data": args.train, "dev_data": args.dev, "tokenizer": tokenizer}
            data |= {"audits": {name: Path(file) for name, file in audits.items()}}
            chosen = {name: shortened(config, args.part) for name, config in chosen.items()}
            if args.jobs > 1:
                side_by_side(list(chosen), args.jobs, out, sys.argv[1:] if argv is None else argv)
            where = args.results or RESULTS
        results = {}
        base = out / _folder(BASE)
        for name, config in chosen.items():
            print(name, flush=True)
            results[name] = run(config, teacher, out / _folder(name), base, data)
            if "error" in results[name]:
                print(f"  not run: {results[name]['error']}", flush=True)
            if any("error" not in result for result in results.values()):  # what is there is written at once
                where.mkdir(parents=True, exist_ok=True)
                about = f"{args.part:g} of the steps of the configs, {next(_devices(results))}."
                if args.smoke:
                    about = "A tiny random model: these numbers mean nothing."
                write_results(where / "conversion.json", {"smoke": args.smoke, "results": results}, "transformers")
                (where / "conversion.md").write_text(markdown(results, about), encoding="utf-8")
        if not (where / "conversion.md").exists():
            sys.exit("error: no variant could be run")
        if not plot(results, where / "conversion.png"):
            print("no matplotlib: there is no plot")
        print((where / "conversion.md").read_text(encoding="utf-8"))


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _devices(results: Mapping[str, Mapping[str, Any]]) -> Any:
    return (f"{result['device']}, {result['dtype']}" for result in results.values() if "error" not in result)


if __name__ == "__main__":
    main()
