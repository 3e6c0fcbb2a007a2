"""What each part of a conversion is worth: one model through the recipe many times, a part changed each time.

    python benchmarks/conversion.py --out runs --train train.npy --dev dev.npy --audit docs=docs.npy [--jobs 4]
    python benchmarks/conversion.py --table        redraw table and plots from the JSON
    python benchmarks/conversion.py --smoke

All variants train on the same tokens, through recipes/convert_smollm2.py: those of recipes/configs, with 6 layers left
softmax ("hybrid"), with none ("pure"), with retained tokens in place of the latter's wide windows ("retained"), and
with more of them, chosen by what is looked up ("retained for recall"), all beside a window of equal bytes trained as
they were; "pure" and "retained" with nothing far, the bytes of "pure" as windows layer by layer ("windows alone",
"retained alone"); the recipe with windows of 128 in all layers and 0, 2, 4 or 6 of them softmax, chosen by KL; that
with none softmax less its transfer, its far target, its decay, with rotary embedding in the far branch, with weighted
features, and with a state per query head in place of one per key/value head ("state per head"); and LoLCATs
(arXiv:2410.10254), with cross-entropy as published, and with KL.
The tokens are those that `linattn tokens` makes of the texts that benchmarks/texts.py fetches.
--part 0.3 takes that part of all stages' steps. Several --jobs share a GPU that one small model cannot fill, and so do
the parts of each with --beside (see the recipe).

Called again it goes on where it was stopped. Adds to results/conversion.json and .md, and to the plot: cross-entropy
on held-out texts at several lengths, beside the teacher, the same weights without their far branch, and windows of
equal bytes, untrained and trained. --smoke runs it all on the CPU with a tiny random model; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _conversion_report as report
import numpy as np
import torch
from _common import IMAGES, RESULTS, ROOT, write_results
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linattn.errors import LinattnError

sys.path.insert(0, str(ROOT / "recipes"))
import convert_smollm2 as recipe

CONFIGS = ROOT / "recipes" / "configs"
RECIPES = {
    "hybrid": "default",
    "pure": "pure",
    "retained": "retained",
    "retained for recall": "recall",
    "windows alone": "windows",
    "LoLCATs, cross-entropy": "lolcats",
}
"""Configs of recipes/configs by the variant's name; the first four have a trained control each."""
BASE = "window 128"
ABLATION_TOKENS = 2**16
"""Of each text that variants of the base are judged on; they differ by more than those of recipes do."""
RECORD = "conversion.json"
SMOKE_VOCABULARY, SMOKE_LAYERS = 64, 9
SMOKE = {"length": 32, "rows": 1, "steps": 2, "warmup": 0}
SMOKE_LOOKUPS = {"lookup_after": 8, "lookup_layers": None}


def variants() -> dict[str, dict[str, Any]]:
    """Configs by name."""
    recipes = {
        name: json.loads((CONFIGS / f"{file}.json").read_text(encoding="utf-8")) for name, file in RECIPES.items()
    }
    hybrid, pure, retained, lolcats = (recipes[n] for n in ("hybrid", "pure", "retained", "LoLCATs, cross-entropy"))
    alone = {"control": False, "audit": {"lengths": pure["audit"]["lengths"], "tokens": ABLATION_TOKENS}}
    bound = {"window": 128, "softmax_window": hybrid["student"]["softmax_window"]}
    base = pure | {"student": pure["student"] | bound, "keep": 0} | alone
    transfers = [stage for stage in base["stages"] if stage["kind"] == "transfer"]
    rest = [stage for stage in base["stages"] if stage["kind"] != "transfer"]

    def student(**options: Any) -> dict[str, Any]:
        return base | {"student": base["student"] | options}

    no_target = [stage | {"far_weight": 0.0, "mass_weight": 0.0} for stage in transfers]
    exact = {key: x for key, x in retained["student"].items() if key not in ("feature_map", "decay", "far_rope")}
    by_kl = [stage | {"cross_entropy": 0.0} if stage["kind"] == "logits" else stage for stage in lolcats["stages"]]
    found = {
        **recipes,
        "retained alone": retained | {"student": exact | {"feature_map": None}, "control": False},
        BASE: base,
        **{f"{BASE}, {count} layers softmax": base | {"keep": count} for count in (2, 4, 6)},
        "no transfer": base | {"stages": rest},
        "no far target": base | {"stages": no_target + rest},
        "no decay": student(decay=None),
        "decay by data": student(decay="data"),
        "rotary embedding far": student(far_rope=True),
        "token weights": student(feature_map="weighted-hedgehog"),
        "state per head": student(per_head=True),
        "LoLCATs, KL": lolcats | {"stages": by_kl},
    }
    return {name: copy.deepcopy(config) | {"name": name} for name, config in found.items()}


def shortened(config: dict[str, Any], part: float) -> dict[str, Any]:
    """The config with so much of its stages' steps."""
    return config | {"stages": [stage | {"steps": max(1, round(part * stage["steps"]))} for stage in config["stages"]]}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the sizes of the smoke test."""
    stages = [stage | SMOKE | (SMOKE_LOOKUPS if "lookup_bonus" in stage else {}) for stage in config["stages"]]
    student = dict(config["student"])
    for name, least in (("window", 6), ("retained", 0)):
        if isinstance(sizes := student.get(name), list):
            student[name] = [least if each == min(sizes) else least + 6 for each in sizes[:SMOKE_LAYERS]]
        elif sizes is not None:
            student[name] = 6
    changes = {"student": student, "stages": stages}
    keep = config.get("keep", [])
    few = {"count": keep, "windows": 1, "length": 32}
    changes["keep"] = [each for each in keep if each < SMOKE_LAYERS] if isinstance(keep, list) else few
    return config | changes | {"audit": {"lengths": [48, 96], "tokens": 192}}


def run(
    config: dict[str, Any], teacher: PreTrainedModel, folder: Path, base: Path, data: Mapping[str, Any]
) -> dict[str, Any]:
    """A variant's result, or why it has none."""
    if (result := finished(config, folder)) is not None:
        return result
    if not (folder / "align").exists() and (base / "result.json").exists() and _alike(config, base / "config.json"):
        shutil.copytree(base / "align", folder / "align")  # the same transfer of the same student
    try:
        return recipe.run(config, teacher, out=folder, log=_say, **data)
    except LinattnError as error:
        return {"config": config, "error": str(error).splitlines()[0]}


def finished(config: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The result of a variant that has run; None of one that has not, or with another config."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["config"] == recipe.CONFIG | config else None


def in_parts(config: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    """Run the parts of a variant side by side, for :func:`run` to find; what fails of them is said, and left to it."""
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(config), encoding="utf-8")
    options = {"--out": folder, "--train": args.train, "--dev": args.dev, "--model": args.model}
    options |= {"--dtype": args.dtype, "--device": args.device}
    command = [sys.executable, recipe.__file__, path]
    command += [word for name, value in options.items() if value is not None for word in (name, value)]
    command += [word for each in args.audit for word in ("--audit", each)]
    try:
        recipe.beside([*map(str, command)], config, [each.split("=", 1)[0] for each in args.audit], folder, _say)
    except LinattnError as error:
        _say(str(error))


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def side_by_side(names: Sequence[str], jobs: int, out: Path, argv: Sequence[str]) -> None:
    """Run variants in processes of their own, ``jobs`` at a time; each writes a log beside its folder."""

    def start(name: str) -> int:
        with (out / f"{_folder(name)}.log").open("w", encoding="utf-8") as log:
            own = ["--alone", name, "--results", str(out / _folder(name) / "table")]
            command = [sys.executable, str(Path(__file__)), *argv, *own]
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        for name, code in zip(names, pool.map(start, names), strict=True):
            print(f"{name}: {'done' if code == 0 else f'stopped with {code}, see its log'}", flush=True)


def _alike(config: Mapping[str, Any], path: Path) -> bool:
    """Whether ``config`` has the student and the transfer of the config at ``path``."""
    other = json.loads(path.read_text(encoding="utf-8"))
    transfers = [[stage for stage in each["stages"] if stage["kind"] == "transfer"] for each in (config, other)]
    return transfers[0] == transfers[1] != [] and config["student"] == other["student"]


def smoke_inputs(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A tiny random model, and tokens."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": SMOKE_VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": SMOKE_LAYERS,
    }
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
    parser.add_argument(
        "--beside", action="store_true", help="of each, control beside student, then all audits at once"
    )
    parser.add_argument("--only", action="append", metavar="NAME", choices=list(variants()), help="repeatable")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one of --jobs: this variant, whatever --only says
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, help="folder of the tables; default benchmarks/results")
    parser.add_argument("--table", action="store_true", help="only redraw table and plots of what is on record")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model on the CPU")
    args = parser.parse_args(argv)
    where = args.results or RESULTS
    if args.table:
        return show(json.loads((where / RECORD).read_text(encoding="utf-8")), where)
    if not args.smoke and not (args.out and args.train and args.audit):
        parser.error("--out, --train and --audit are needed, or --smoke.")

    only = [args.alone] if args.alone else args.only
    chosen = {name: config for name, config in variants().items() if not only or name in only}
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
            if args.jobs > 1 and not args.alone:
                side_by_side(list(chosen), args.jobs, out, sys.argv[1:] if argv is None else argv)
        base = out / _folder(BASE)
        record: dict[str, Any] = {}
        for name, config in chosen.items():
            print(name, flush=True)
            if args.beside and not args.smoke and finished(config, out / _folder(name)) is None:
                in_parts(config, args, out / _folder(name))
            result = run(config, teacher, out / _folder(name), base, data)
            if "error" in result:
                print(f"  not run: {result['error']}", flush=True)
            record = add(name, result, where / RECORD, smoke=args.smoke)  # at once: a run may be cut short
        show(record, where)


def add(name: str, result: dict[str, Any], path: Path, *, smoke: bool) -> dict[str, Any]:
    """Put a variant's result on record, the same variant's in its place; what is on record now."""
    on_record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    others = on_record["results"] if on_record.get("smoke") == smoke else {}
    results = others | {name: result | {"date": datetime.date.today().isoformat()}}
    ordered = {each: results[each] for each in (*variants(), *results) if each in results}
    record = {"smoke": smoke, "results": ordered}
    write_results(path, record, "transformers")
    return record


def show(record: Mapping[str, Any], where: Path) -> None:
    """Write and print the table, and draw the plots."""
    text = report.markdown(record["results"], smoke=record["smoke"])
    (where / "conversion.md").write_text(text, encoding="utf-8")
    images = IMAGES if where == RESULTS else where
    if not report.plot(record["results"], images / "conversion.png"):
        print("no matplotlib or nothing measured: there is no plot")
    report.plot_recall(record["results"], images / "recall.png")
    print(text)


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


if __name__ == "__main__":
    main()
