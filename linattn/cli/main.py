"""The ``linattn`` command: thin, calls the rooms below. What is heavy is imported where it is used."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from enum import Enum
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from linattn._version import __version__
from linattn.cli._errors import EXIT_CODES, Commands
from linattn.cli._models import Source
from linattn.errors import CheckpointError, OptionError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PretrainedConfig

    from linattn.convert import LayerPlan
    from linattn.kernels.triton.tune import Trial, Tuned

LENGTHS = (1024, 4096, 16384, 65536, 131072)
WINDOWS = ("length", "seed", "repeats", "temperature", "segment", "teacher_context")
"""Options of a stage of logits that a cache of its teacher must share."""
AUDIT_PARTS = ("losses", "far_gain", "counterfactual", "telemetry", "cache", "recall", "speed")


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Decay(str, Enum):
    none = "none"
    fixed = "fixed"
    data = "data"


class Sliding(str, Enum):
    keep = "keep"
    convert = "convert"


class Method(str, Enum):
    alone = "alone"
    greedy = "greedy"
    uniform = "uniform"


app = typer.Typer(
    name="linattn",
    cls=Commands,
    help="Kernelized attention for pretrained transformers: plan a conversion, carry it out, train, generate, measure.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the ``linattn`` command."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"linattn {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local directory, a .gguf file, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
FeatureMap = Annotated[
    str, typer.Option(metavar="NAME", help="Feature map of the far branch; see `linattn maps`. none: no far branch.")
]
MapOptions = Annotated[
    list[str] | None,
    typer.Option("--map-option", metavar="KEY=VALUE", help="An option of the feature map; may be repeated."),
]
Window = Annotated[int, typer.Option(min=0, help="Recent tokens attended exactly.")]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens attended exactly.")]
Retained = Annotated[int, typer.Option(min=0, help="Best-scored tokens behind the window attended exactly.")]
Recency = Annotated[float, typer.Option(help="What a token's score gains with each position: older ones fade.")]
DecayOption = Annotated[Decay, typer.Option(help="Forgetting in the far branch: learned half-lives, or gated by data.")]
PerHead = Annotated[bool, typer.Option("--per-head", help="A state per query head, not per key/value head.")]
FarRope = Annotated[
    bool, typer.Option(help="Whether the far branch reads queries and keys after rotary embedding, or before it.")
]
SinkDistance = Annotated[
    int | None, typer.Option(help="Tokens of rotary distance that sinks keep at most; default, any.", min=1)
]
RetainedDistance = Annotated[
    int | None, typer.Option(help="Tokens of rotary distance that retained tokens keep at most; default, any.", min=1)
]
KeepLayers = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Attention layers left softmax, by index: 0,5,10-12."),
]
SoftmaxWindow = Annotated[
    int | None,
    typer.Option(min=1, metavar="TOKENS", help="Bounds layers left softmax to so many tokens and the sinks."),
]
NativeSliding = Annotated[Sliding, typer.Option(help="What becomes of layers with a sliding window of their own.")]
KeepUnsupported = Annotated[
    bool, typer.Option("--keep-unsupported", help="Leave layers that cannot be converted softmax, not refuse.")
]
Converted = Annotated[str, typer.Argument(metavar="CONVERTED", help="A converted model: a directory or a hub id.")]
Data = Annotated[Path, typer.Option(metavar="FILE", help="Tokens (.npy) that `linattn tokens` or `sample` wrote.")]
PLAN_OPTIONS = (
    "feature_map",
    "map_option",
    "window",
    "sinks",
    "retained",
    "recency",
    "decay",
    "per_head",
    "far_rope",
    "sink_distance",
    "retained_distance",
    "keep_layers",
    "softmax_window",
    "native_sliding",
    "keep_unsupported",
)


@app.command()
def plan(
    model: Model,
    feature_map: FeatureMap = "hedgehog",
    map_option: MapOptions = None,
    window: Window = 128,
    sinks: Sinks = 4,
    retained: Retained = 0,
    recency: Recency = 0.002,
    decay: DecayOption = Decay.none,
    per_head: PerHead = False,
    far_rope: FarRope = True,
    sink_distance: SinkDistance = None,
    retained_distance: RetainedDistance = None,
    keep_layers: KeepLayers = None,
    softmax_window: SoftmaxWindow = None,
    native_sliding: NativeSliding = Sliding.keep,
    keep_unsupported: KeepUnsupported = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the plan, to edit and `convert --plan`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a conversion would do, layer by layer, without reading the weights.

    Examples:

    - `linattn plan HuggingFaceTB/SmolLM2-135M-Instruct`

    - `linattn plan ./model --feature-map favor+ --window 64 --keep-layers 0,29 -o plan.json`

    - `linattn plan model.gguf --json`
    """
    source = Source.find(model)
    options = _plan_options(
        feature_map,
        map_option,
        window,
        sinks,
        retained,
        recency,
        decay,
        per_head,
        far_rope,
        sink_distance,
        retained_distance,
        keep_layers,
        softmax_window,
        native_sliding,
        keep_unsupported,
    )
    with _progress() as step, step(f"Reading {model}"):
        from linattn.convert import plan_model

        made = plan_model(source.outline(), **options)
    if output is not None:
        made.save(output)
    typer.echo(made.to_json() if as_json else str(made))


@app.command()
def convert(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write the converted model to.")],
    feature_map: FeatureMap = "hedgehog",
    map_option: MapOptions = None,
    window: Window = 128,
    sinks: Sinks = 4,
    retained: Retained = 0,
    recency: Recency = 0.002,
    decay: DecayOption = Decay.none,
    per_head: PerHead = False,
    far_rope: FarRope = True,
    sink_distance: SinkDistance = None,
    retained_distance: RetainedDistance = None,
    keep_layers: KeepLayers = None,
    softmax_window: SoftmaxWindow = None,
    native_sliding: NativeSliding = Sliding.keep,
    keep_unsupported: KeepUnsupported = False,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Carry out a saved plan instead of the options above.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the saved weights; default, the dtype they have.")] = None,
    seed: Annotated[int, typer.Option(help="Of learned maps that start at random; others keep the plan's.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write into OUT even if it is not empty.")] = False,
) -> None:
    """Convert a model and save it, tokenizer included.

    For sequences of up to window + retained + sinks tokens (an encoder: window) the result equals the original. Beyond
    them it loses quality until it is trained.

    Examples:

    - `linattn convert HuggingFaceTB/SmolLM2-135M-Instruct ./converted`

    - `linattn convert model.gguf ./converted --feature-map favor+ --window 256 --dtype bfloat16`

    - `linattn plan ./model -o plan.json`, edit it, then `linattn convert ./model ./converted --plan plan.json`
    """
    source = Source.find(model)
    options = _plan_options(
        feature_map,
        map_option,
        window,
        sinks,
        retained,
        recency,
        decay,
        per_head,
        far_rope,
        sink_distance,
        retained_distance,
        keep_layers,
        softmax_window,
        native_sliding,
        keep_unsupported,
    )
    if plan is not None:
        _refuse_beside_plan(ctx)
    _refuse_full(out, force)
    with _progress() as step:
        with step("Importing"):
            import torch

            from linattn.convert import ConversionPlan, convert_model

            torch.manual_seed(seed)
            if plan is not None:
                options = {"plan": ConversionPlan.load(plan)}
        with step(f"Loading {model}"):
            tokenizer = _optional(source.tokenizer)
            loaded = source.model(None if dtype is None else getattr(torch, dtype.value))
        with step("Converting"):
            convert_model(loaded, **options)
        with step(f"Saving to {out}"):
            loaded.save_pretrained(out)
            if tokenizer is not None:
                tokenizer.save_pretrained(out)
    done = ConversionPlan.from_dict(loaded.config.linattn)
    typer.echo(f"{out}: {len(done.converted)} of {len(done.layers)} attention layers converted. `linattn info {out}`")


@app.command()
def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; default, standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many new tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print tokens as they come; default, if writing to a terminal."),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample; default, the most likely token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampling.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from the top mass p.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in; default, the dtype of the weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text with a converted (or any other) model. Only the continuation is printed.

    Examples:

    - `linattn generate ./converted -p "The capital of France is"`

    - `linattn generate ./converted --chat --sample --temperature 0.7 --seed 1 < question.txt`

    - `linattn generate ./converted -p "Once" --max-new-tokens 20 --json`
    """
    if not sample and (given := _given(ctx, "temperature", "top_k", "top_p", "seed")):
        raise typer.BadParameter(f"{', '.join(given)} only matter with --sample.")
    if stream and as_json:
        raise typer.BadParameter("--stream and --json exclude each other.")
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give --prompt, or the text on standard input.")
        prompt = sys.stdin.read().removesuffix("\n")
    source = Source.find(model)
    with _progress() as step, step(f"Loading {model}"):
        import torch
        from transformers import TextStreamer

        tokenizer = source.tokenizer()
        where = _device(device)
        loaded: Any = source.model(None if dtype is None else getattr(torch, dtype.value)).to(where)
    if not loaded.can_generate():
        raise UnsupportedError(f"{model}: {type(loaded).__name__} does not generate text.")
    inputs = _encode(tokenizer, prompt, chat)
    if stream is None:
        stream = sys.stdout.isatty() and not as_json
    sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    torch.manual_seed(seed)
    tokens = loaded.generate(
        **inputs.to(where),
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **(sampling if sample else {}),
    )
    new = tokens[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if as_json:
        report = {"model": model, "prompt": prompt, "text": text, "new_tokens": len(new)}
        typer.echo(json.dumps(report | {"prompt_tokens": tokens.shape[1] - len(new)}, ensure_ascii=False))
    elif not stream:
        typer.echo(text)


@app.command()
def info(
    model: Model,
    length: Annotated[
        list[int] | None, typer.Option(min=1, metavar="TOKENS", help="A length to compare at; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what of a model is converted, and compare its memory with that of a key/value cache.

    Bytes are per sequence and in the dtype of the saved weights. A converted layer's state has one size at all lengths;
    a softmax layer's cache grows with each token. The weights are not read.

    Examples:

    - `linattn info ./converted`

    - `linattn info ./converted --length 8192 --length 1000000 --json`
    """
    source = Source.find(model)
    with _progress() as step, step(f"Reading {model}"):
        config = source.config()
        layers = _layers(source, config)
        dtype = _dtype(config)
        report = _memory(layers, dtype, length or list(LENGTHS), _keeping_far_keys(source, layers))
    about = {"model": model, "model_type": config.model_type, "dtype": str(dtype).removeprefix("torch.")}
    report = about | report
    typer.echo(json.dumps(report, indent=2, ensure_ascii=False)) if as_json else _print_info(report)


@app.command()
def audit(
    model: Model,
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The model before its conversion.")],
    text: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Text that neither model was trained on; may be repeated.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write report.json, report.md and plots there.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Of a window of text.")] = 2048,
    windows: Annotated[int, typer.Option(min=2, help="Windows of text.")] = 8,
    parts: Annotated[
        str | None,
        typer.Option(metavar="LIST", help=f"What to measure, of {','.join(AUDIT_PARTS)}; default, all of it."),
    ] = None,
    control: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A trained window of equal bytes, to compare with as well.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="The far gain is beyond so many; default, those attended exactly."),
    ] = None,
    distance: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Of recall; may be repeated. Default 1/16, 1/4 and all of --length."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each recall task at each distance.")] = 16,
    candidates: Annotated[
        int, typer.Option(min=0, help="Rank so many answers instead of generating one; 0 generates.")
    ] = 0,
    decode_length: Annotated[
        list[int] | None, typer.Option(min=1, metavar="TOKENS", help="To time decoding at; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the recall prompts.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in; default, the dtype of the weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Write into DIR even if it is not empty.")] = False,
    as_json: Json = False,
) -> None:
    """Say in words and numbers whether a converted model uses its far branch, and what it lost and gained.

    Measured beside its teacher, itself without its parts and a sliding window of equal bytes: cross-entropy by
    position, gain from distant text, another past, recall by distance, layer by layer where the attention goes, the
    cache, time and bytes of decoding.

    Examples:

    - `linattn audit ./converted --teacher ./model --text book.txt --out report`

    - `linattn audit ./converted --teacher ./model --text a.txt --text b.txt --length 8192 --device cuda -o report`

    - `linattn audit ./converted --teacher ./model --text book.txt --parts losses,recall --distance 4096 --json`
    """
    if out is not None:
        _refuse_full(out, force)
    chosen = AUDIT_PARTS if parts is None else tuple(filter(None, parts.replace(" ", "").split(",")))
    if not chosen or {*chosen} - {*AUDIT_PARTS}:
        raise typer.BadParameter(f"--parts {parts}: expected some of {','.join(AUDIT_PARTS)}.")
    sources = {"model": Source.find(model), "teacher": Source.find(teacher)}
    if control is not None:
        sources["control"] = Source.find(control)
    with _progress() as step:
        with step("Reading the text"):
            import torch

            from linattn.audit import audit_model, save_report
            from linattn.cli._audit import default_distances, read_windows, recall_measure

            where = _device(device)
            tokenizer = sources["teacher"].tokenizer()
            tokens = read_windows(text, tokenizer, length=length, count=windows)
        models: dict[str, Any] = {}
        for name, source in sources.items():
            with step(f"Loading {source.name}"):
                models[name] = source.model(None if dtype is None else getattr(torch, dtype.value)).to(where)
        if len(dtypes := {str(each.dtype).removeprefix("torch.") for each in models.values()}) > 1:
            raise OptionError(f"The models are in {' and '.join(sorted(dtypes))}, whose bytes differ; pass --dtype.")
    recall = None
    if "recall" in chosen:
        recall = recall_measure(
            tokenizer,
            tokens.flatten(),
            distances=sorted(distance or default_distances(length)),
            prompts=prompts,
            candidates=candidates,
            seed=seed,
        )
    with _measurements() as watch:
        report = audit_model(
            models["teacher"],
            models["model"],
            tokens,
            parts=chosen,
            recall=recall,
            trained_control=models.get("control"),
            context=context,
            lengths=sorted(decode_length) if decode_length else None,
            progress=watch,
        )
    about: dict[str, Any] = {"model": model, "teacher": teacher, "dtype": dtypes.pop(), "device": str(where)}
    about |= {"text": [str(path) for path in text], "linattn": __version__}
    report = {**about, **report}
    if out is not None:
        title = f"{model}, converted from {teacher}"
        try:
            written = save_report(report, out, title=title)
        except UnsupportedError as error:
            typer.echo(f"note: {error}", err=True)
            written = save_report(report, out, title=title, plots=False)
        typer.echo(f"{out}: {', '.join(path.name for path in written)}", err=True)
    typer.echo(json.dumps(report, indent=2, ensure_ascii=False)) if as_json else _print_audit(report)


@app.command()
def tokens(
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXTS", help="JSON lines (.jsonl) with a text each, or plain text files.")
    ],
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="Whose tokenizer: a directory, .gguf file, hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .npy file to write.")],
    field: Annotated[str, typer.Option(help="Of the lines' objects: where the text is.")] = "text",
) -> None:
    """Write texts as one array of token ids, each followed by the end-of-sequence token: what `distill` trains on.

    Examples:

    - `linattn tokens train.jsonl --tokenizer ./model -o train.npy`

    - `linattn tokens a.txt b.txt --tokenizer model.gguf -o held-out.npy`
    """
    source = Source.find(tokenizer, "tokenizer")
    with _progress() as step, step("Tokenizing"):
        from linattn.distill import pack, read_texts

        def every() -> Iterator[str]:
            for path in texts:
                lines = path.suffix == ".jsonl"
                yield from read_texts(path, field) if lines else [path.read_text(encoding="utf-8", errors="replace")]

        count = pack(every(), source.tokenizer(), _npy(out))
    typer.echo(f"{out}: {count:,} tokens")


@app.command()
def sample(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="How many to write, at least.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .npy file to write.")],
    length: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Most tokens of a sample.")] = 2048,
    rows: Annotated[int, typer.Option(min=1, help="Samples drawn at once.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the softmax.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Mass of the likeliest tokens drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in; default, the dtype of the weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = "cpu",
) -> None:
    """Let a teacher write the tokens to train on, where there is no text like that which it was trained on.

    Examples:

    - `linattn sample ./model --tokens 5000000 -o sampled.npy --rows 256 --device cuda --dtype bfloat16`
    """
    source = Source.find(model)
    with _progress() as step, step(f"Loading {model}"):
        from linattn.distill import sample_from_teacher

        loaded = _loaded(source, dtype, _device(device))
    if not loaded.can_generate():
        raise UnsupportedError(f"{model}: {type(loaded).__name__} does not generate text.")
    with _count("Sampling") as watch:
        count = sample_from_teacher(
            loaded,
            tokens,
            _npy(out),
            length=length,
            rows=rows,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            progress=watch,
        )
    typer.echo(f"{out}: {count:,} tokens")


@app.command("cache-teacher")
def cache_teacher(
    ctx: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")],
    stages: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the options of windows below from its stages of logits.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many: steps × accumulate × rows of the stage.")] = 1024,
    length: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Of a window.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the windows' order; the stage's.")] = 0,
    repeats: Annotated[float, typer.Option(help="Part of a window that says itself again; the stage's.")] = 0.0,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the softmax; the stage's.")] = 1.0,
    segment: Annotated[int, typer.Option(min=0, metavar="TOKENS", help="Of a piece; the stage's.")] = 0,
    teacher_context: Annotated[
        int,
        typer.Option(min=0, metavar="TOKENS", help="Read up to a piece's end; 0, all of a window; the stage's."),
    ] = 0,
    k: Annotated[int, typer.Option(min=1, help="Likeliest tokens kept of each prediction.")] = 64,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in; default, the dtype of the weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Write into DIR even if it is not empty.")] = False,
) -> None:
    """Write down what a teacher predicts, to distil from without it: 8 k + 4 bytes a token.

    Examples:

    - `linattn cache-teacher ./model --data train.npy --stages stages.json -o teacher --device cuda`

    - `linattn cache-teacher ./model --data train.npy --windows 5000 --length 1024 --k 32 -o teacher`
    """
    source = Source.find(model)
    _refuse_full(out, force)
    if stages is not None and (given := _given(ctx, "windows", *WINDOWS)):
        raise typer.BadParameter(f"{', '.join(given)}: the stages settle that already.")
    with _progress() as step, step(f"Loading {model}"):
        from linattn.distill import Logits, Windows, read_stages
        from linattn.distill import cache_teacher as write

        if stages is not None:
            read = [stage for stage in read_stages(stages) if isinstance(stage, Logits)]
            settled = {tuple(getattr(stage, name) for name in WINDOWS) for stage in read}
            if len(settled) != 1:
                raise OptionError(
                    f"{stages}: {len(read)} stages of logits; expected one, or several of one {', '.join(WINDOWS)}."
                )
            length, seed, repeats, temperature, segment, teacher_context = settled.pop()
            windows = max(stage.steps * stage.accumulate * stage.rows for stage in read)
        cut = Windows(data, length, seed=seed, repeats=repeats)
        loaded = _loaded(source, dtype, _device(device))
    with _count("Caching") as watch:
        how: dict[str, Any] = {"temperature": temperature, "segment": segment, "teacher_context": teacher_context}
        write(loaded, cut, windows=windows, k=k, out=out, progress=watch, **how)
    typer.echo(f"{out}: {windows:,} windows of {length:,} tokens, {k} predictions each")


@app.command("select-layers")
def select_layers(
    model: Converted,
    data: Data,
    keep: Annotated[int, typer.Option(min=0, metavar="K", help="How many layers to leave softmax.")],
    method: Annotated[
        Method, typer.Option(help="Cost of each layer alone, measured anew after each choice, or even spacing.")
    ] = Method.alone,
    windows: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 4,
    length: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Of a window.")] = 1024,
    softmax_window: SoftmaxWindow = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the plan, for `convert --plan` on the original model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Save the model with these layers softmax.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in; default, the dtype of the weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Write into DIR even if it is not empty.")] = False,
    as_json: Json = False,
) -> None:
    """Choose the layers to leave softmax, by the KL from the teacher that each one's conversion costs.

    Run it on a model whose converted layers were trained (a stage of transfer will do), with nothing else trained.

    Examples:

    - `linattn select-layers ./transferred/model --data train.npy --keep 4 -o ./hybrid`

    - `linattn select-layers ./transferred/model --data train.npy --keep 4 --method greedy --plan plan.json --json`
    """
    source = Source.find(model)
    if out is not None:
        _refuse_full(out, force)
    with _progress() as step, step(f"Loading {model}"):
        import torch

        from linattn.distill import Windows, keep_softmax
        from linattn.distill import select_layers as select
        from linattn.distill.engine import finite

        cut = Windows(data, length, seed=None)
        read = torch.stack([cut[i] for i in range(min(windows, len(cut)))])
        loaded = _loaded(source, dtype, _device(device))
    with _count("Measuring") as watch:
        how: dict[str, Any] = {"method": method.value, "softmax_window": softmax_window}
        found = select(loaded, read, keep=keep, progress=watch, **how)
    if plan is not None:
        found.plan.save(plan)
    if out is not None:
        reason = f"chosen by KL ({method.value})"
        keep_softmax(loaded, *found.kept, reason=reason, softmax_window=softmax_window).save_pretrained(out)
        if (tokenizer := _optional(source.tokenizer)) is not None:
            tokenizer.save_pretrained(out)
    if as_json:

        def plain(cost: Any) -> dict[str, Any]:
            return {name: finite(x) if isinstance(x, float) else x for name, x in cost._asdict().items()}

        costs = {"costs": [plain(cost) for cost in found.costs], "chosen": plain(found.chosen)}
        costs["uniform"] = plain(found.uniform)
        typer.echo(json.dumps({"model": model, "method": method.value, "kept": found.kept} | costs, indent=2))
        return
    if found.costs:
        table = _table("layer", "module", "kept before", "KL", "± s.e.", right=True)
        for cost in found.costs:
            table.add_row(str(cost.layer), cost.path, str(cost.kept), f"{cost.kl:.5f}", f"{cost.standard_error:.5f}")
        _print(table)
    for name, choice in {"keep softmax": found.chosen, "evenly spaced": found.uniform}.items():
        if name == "keep softmax" or method is not Method.uniform:
            layers = ", ".join(map(str, choice.kept)) or "none"
            typer.echo(f"{name}: {layers}: KL {choice.kl:.5f} ± {choice.standard_error:.5f}")


@app.command()
def distill(
    model: Converted,
    stages: Annotated[Path, typer.Option(metavar="FILE", help='Stages: {"stages": [{"kind": "transfer", …}, …]}.')],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Checkpoints, metrics, and the model.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens (.npy) for the stages that name none.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model before conversion, or a folder that `cache-teacher` wrote."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of where DIR was left.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in; default, the dtype of the weights.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, …")] = "cpu",
    as_json: Json = False,
) -> None:
    """Train a converted model through stages, and save it in DIR/model.

    Stopped at any moment, the same command goes on from the last checkpoint.

    Examples:

    - `linattn distill ./converted --teacher ./model --stages stages.json --data train.npy -o run --device cuda`

    - `linattn distill ./converted --teacher ./cached --stages stages.json --data train.npy -o run --fresh`
    """
    source = Source.find(model)
    with _progress() as step:
        with step("Reading the stages"):
            from linattn.distill import CachedTeacher, read_stages
            from linattn.distill import distill as run

            read, where = read_stages(stages), _device(device)
        with step(f"Loading {model}"):
            student = _loaded(source, dtype, where)
        teaching: Any = None
        if teacher is not None:
            with step(f"Loading {teacher}"):
                cached = (Path(teacher) / "teacher.json").is_file()
                teaching = CachedTeacher(teacher) if cached else _loaded(Source.find(teacher), dtype, where)
    report = run(student, teaching, read, out=out, data=data, resume=not fresh)
    if (tokenizer := _optional(source.tokenizer)) is not None:
        tokenizer.save_pretrained(report.model)
    typer.echo(json.dumps(asdict(report), indent=2) if as_json else str(report))


@app.command()
def maps(as_json: Json = False) -> None:
    """List the feature maps and what each promises.

    Examples:

    - `linattn maps`

    - `linattn maps --json`
    """
    from linattn.feature_maps import available

    if as_json:
        typer.echo(json.dumps([info._asdict() for info in available()], indent=2, ensure_ascii=False))
        return
    table = _table("name", "properties", "paper")
    for info in available():
        properties = [name.replace("_", " ") for name, holds in info._asdict().items() if holds is True]
        properties = ["bidirectional only"] * (not info.causal) + [name for name in properties if name != "causal"]
        table.add_row(info.name, ", ".join(properties), info.paper)
    _print(table)


@app.command()
def tune(
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")],
    head_dim: Annotated[int, typer.Option(min=1, help="Size of one query or key head.")],
    length: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Tokens of a sequence.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The table to write, or to add to.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads; default, --heads.")] = None,
    value_dim: Annotated[int | None, typer.Option(min=1, help="Size of one value head; default, --head-dim.")] = None,
    features: Annotated[
        str, typer.Option(metavar="NAME", help="A feature map (`linattn maps`), `given`, or `none`: no far branch.")
    ] = "hedgehog",
    map_option: MapOptions = None,
    feature_dim: Annotated[int, typer.Option(min=1, help="Of features that are given.")] = 128,
    window: Window = 0,
    sinks: Sinks = 0,
    decay: Annotated[bool, typer.Option("--decay", help="With a log-gate for each token and key head.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of queries, keys and values.")] = Dtype.bfloat16,
    as_json: Json = False,
) -> None:
    """Search for the fastest tiles, warps, stages and segments of the GPU kernels for your shapes, on your GPU.

    Output and gradients of every candidate are compared with float64 before it is timed. The table holds the config and
    the time of each candidate, or the reason why it has none; LINATTN_TABLE=FILE makes the kernels use it.

    Examples:

    - `linattn tune --heads 16 --head-dim 64 --length 131072 -o table.json`

    - `linattn tune --heads 32 --kv-heads 8 --head-dim 128 --length 8192 --window 128 --sinks 4 --decay -o table.json`

    - `linattn tune --heads 16 --head-dim 64 --length 2048 --batch 8 --features given --feature-dim 128 -o table.json`
    """
    kv_heads, value_dim = kv_heads or heads, value_dim or head_dim
    if heads % kv_heads:
        raise typer.BadParameter(f"--heads {heads}: expected a multiple of --kv-heads {kv_heads}.")
    if features == "none" and not window:
        raise typer.BadParameter("--features none: without a far branch there must be a --window.")
    with _progress() as step, step("Importing"):
        import torch

        from linattn.feature_maps import make

        try:
            from linattn.kernels.triton import tune as search
        except ImportError as error:
            raise UnsupportedError(f"tune: Triton cannot be imported ({error}).") from error
    options = dict(map(_key_value, map_option or ()))
    mapped = features not in ("given", "none")
    problem = search.Problem(
        batch=batch,
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        features=feature_dim if features == "given" else 0,
        window=window,
        sinks=sinks,
        decay=decay,
        dtype=getattr(torch, dtype.value),
    )
    with _trials() as watch:
        found = search.tune(problem, partial(make, features, head_dim, **options) if mapped else None, watch=watch)
    search.save(found, out)
    typer.echo(json.dumps(search.evidence(found), indent=2, ensure_ascii=False)) if as_json else _print_tuned(
        found, out
    )


# Reading options.


def _plan_options(
    feature_map: str,
    map_option: list[str] | None,
    window: int,
    sinks: int,
    retained: int,
    recency: float,
    decay: Decay,
    per_head: bool,
    far_rope: bool,
    sink_distance: int | None,
    retained_distance: int | None,
    keep_layers: str | None,
    softmax_window: int | None,
    native_sliding: Sliding,
    keep_unsupported: bool,
) -> dict[str, Any]:
    """The command's options in the terms of :func:`linattn.convert.plan_model`."""
    return {
        "feature_map": None if feature_map == "none" else feature_map,
        "feature_map_options": dict(map(_key_value, map_option or ())) or None,
        "window": window,
        "sinks": sinks,
        "retained": retained,
        "recency": recency,
        "decay": None if decay is Decay.none else decay.value,
        "per_head": per_head,
        "far_rope": far_rope,
        "sink_distance": sink_distance,
        "retained_distance": retained_distance,
        "keep_softmax": _indices(keep_layers or ""),
        "softmax_window": softmax_window,
        "native_sliding": native_sliding.value,
        "on_unsupported": "keep" if keep_unsupported else "error",
    }


def _key_value(text: str) -> tuple[str, Any]:
    """``features=128`` → ("features", 128); what is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"--map-option {text}: expected KEY=VALUE.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _indices(text: str) -> tuple[int, ...]:
    """``0,5,10-12`` → (0, 5, 10, 11, 12)."""
    indices: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise typer.BadParameter(f"--keep-layers {text}: expected indices and ranges, such as 0,5,10-12.")
        indices += range(int(first), int(last or first) + 1)
    return tuple(indices)


def _given(ctx: typer.Context, *names: str) -> list[str]:
    """The options among ``names`` that stand on the command line."""
    sources = ((name, ctx.get_parameter_source(name)) for name in names)
    return [f"--{name.replace('_', '-')}" for name, source in sources if source and source.name == "COMMANDLINE"]


def _refuse_beside_plan(ctx: typer.Context) -> None:
    if given := _given(ctx, *PLAN_OPTIONS):
        raise typer.BadParameter(f"{', '.join(given)}: the plan settles that already; edit the plan file instead.")


def _refuse_full(out: Path, force: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise OptionError(f"{out} exists and is not empty; choose another directory, or pass --force.")


def _device(name: str) -> Any:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {name}: {str(error).splitlines()[0]}") from None


def _loaded(source: Source, dtype: Dtype | None, device: Any) -> Any:
    import torch

    return source.model(None if dtype is None else getattr(torch, dtype.value)).to(device)


def _npy(out: Path) -> Path:
    if out.suffix != ".npy":
        raise typer.BadParameter(f"--out {out}: expected a name that ends in .npy.")
    return out


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
    elif tokenizer.chat_template is None:
        raise typer.BadParameter("--chat: this model's tokenizer has no chat template.")
    else:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if inputs["input_ids"].shape[1] == 0:
        raise typer.BadParameter("the prompt is empty.")
    return inputs


def _optional(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or None with a word on standard error."""
    try:
        return read()
    except CheckpointError as error:
        typer.echo(f"note: {error}", err=True)
        return None


# Memory.


def _layers(source: Source, config: PretrainedConfig) -> list[LayerPlan]:
    """The attention layers of a model as its plan has them, or as they are where it is not converted."""
    from linattn.convert import ConversionPlan
    from linattn.convert.seam import find_attention

    saved = getattr(config, "linattn", None)
    if saved is not None:
        return ConversionPlan.from_dict(saved).layers
    return [layer for layer, _ in find_attention(source.outline())]


def _dtype(config: PretrainedConfig) -> torch.dtype:
    import torch

    return getattr(torch, str(config.dtype or "float32").removeprefix("torch."))


class LayerMemory(NamedTuple):
    state: int
    """Bytes of the state; 0 for a softmax layer without a window."""
    token: int
    """Bytes of one token in a key/value cache."""
    limit: int | None
    """Tokens that cache keeps at most, by a sliding window of the layer's own."""


def _layer_memory(layer: LayerPlan, dtype: torch.dtype, keeps: bool) -> LayerMemory:
    token = 2 * layer.kv_heads * layer.head_dim * dtype.itemsize
    return LayerMemory(_state_bytes(layer, dtype, keeps) if layer.kind != "keep" else 0, token, layer.native_window)


def _keeping_far_keys(source: Source, layers: list[LayerPlan]) -> dict[str, bool | None]:
    """By path, of layers with no rotary embedding in the far branch: what ``ConvertedAttention.keeps_far_keys`` says.

    It is None where the model's structure does not tell.
    """
    from linattn.convert.swap import _resolve

    paths = [layer.path for layer in layers if layer.kind == "convert" and not layer.far_rope]
    if not paths:
        return {}
    model = source.outline()
    converted: dict[str, Any] = {path: model.get_submodule(f"{_resolve(model, path)}.linattn") for path in paths}
    return {path: layer.keeps_far_keys for path, layer in converted.items()}


def _state_bytes(layer: LayerPlan, dtype: torch.dtype, keeps_far_keys: bool) -> int:
    from linattn.convert.cache import held_bytes
    from linattn.feature_maps import make

    features = 0
    if layer.feature_map is not None:
        sizes: dict[str, Any] = {"num_heads": layer.heads, "num_kv_heads": layer.state_heads, "device": "meta"}
        features = make(layer.feature_map, layer.head_dim, **sizes, **layer.feature_map_options).feature_dim
    return held_bytes(
        num_kv_heads=layer.state_heads,
        feature_dim=features,
        head_dim=layer.head_dim,
        window=layer.window,
        sinks=layer.sinks,
        retained=layer.retained,
        decay=layer.decay is not None,
        far_head_dim=layer.head_dim if keeps_far_keys else None,
        dtype=dtype,
        repeats=layer.repeats,
        turns_back=not layer.far_rope and not keeps_far_keys,
    )


def _memory(
    layers: list[LayerPlan], dtype: torch.dtype, lengths: list[int], keeping: dict[str, bool | None]
) -> dict[str, Any]:
    memory = [_layer_memory(layer, dtype, bool(keeping.get(layer.path))) for layer in layers]
    most = [_layer_memory(layer, dtype, keeping.get(layer.path, False) is not False) for layer in layers]

    def cache(tokens: int, kept: LayerMemory) -> int:
        return kept.token * min(tokens, kept.limit or tokens)

    rows = []
    for tokens in lengths:
        before = sum(cache(tokens, each) for each in memory)
        now = sum(each.state or cache(tokens, each) for each in memory)
        rows.append({"length": tokens, "cache_bytes": before, "bytes": now})
    converted = [layer.kind == "convert" for layer in layers]
    state = sum(each.state for each in compress(memory, converted))
    per_token = sum(each.token for each in compress(memory, converted))
    how: dict[str, int] = {}
    for layer in layers:
        text = "softmax" if layer.kind != "convert" else layer.feature_map or "no far branch"
        if layer.kind != "keep":
            text += f", window {layer.window}, sinks {layer.sinks}"
            text += f", {layer.retained} retained" if layer.retained else ""
            text += f", {layer.decay} decay" if layer.decay else ""
            text += ", a state per query head" if layer.per_head else ""
        how[text] = how.get(text, 0) + 1
    return {
        "converted_layers": sum(converted),
        "softmax_layers": len(layers) - sum(converted),
        "unknown_layers": sum(not layer.heads for layer in layers),
        "most_state_bytes": sum(each.state for each in compress(most, converted)),
        "attention": how,
        "state_bytes": state,
        "equal_at_tokens": -(-state // per_token) if per_token else None,
        "memory": rows,
    }


def _print_info(report: dict[str, Any]) -> None:
    from linattn.audit.render import readable_bytes

    total = report["converted_layers"] + report["softmax_layers"]
    typer.echo(f"{report['model']}: {report['model_type']}, {report['dtype']}, {total} attention layers")
    for how, count in report["attention"].items():
        typer.echo(f"  {count} × {how}")
    if report["unknown_layers"]:
        typer.echo(f"  {report['unknown_layers']} of them of unknown size, left out below")
    if not report["converted_layers"]:
        typer.echo("Not converted: every token adds to the key/value cache. `linattn plan` shows what could be.")
    else:
        typer.echo(
            f"State of the converted layers: {readable_bytes(report['state_bytes'])} per sequence at every length, as "
            f"much as their key/value cache would take at {report['equal_at_tokens']:,} tokens."
        )
        if report["most_state_bytes"] > report["state_bytes"]:
            typer.echo(
                f"It is {readable_bytes(report['most_state_bytes'])} if the model makes its rotary angles in a way of "
                "its own, which the first call tells."
            )
    table = _table("tokens", "softmax model", "this model", "ratio", right=True)
    for row in report["memory"]:
        ratio = row["cache_bytes"] / row["bytes"] if row["bytes"] else 1.0
        table.add_row(
            f"{row['length']:,}", readable_bytes(row["cache_bytes"]), readable_bytes(row["bytes"]), f"{ratio:.2f}×"
        )
    _print(table)


# Auditing.


@contextlib.contextmanager
def _measurements() -> Iterator[Callable[[int, int], None]]:
    """Measurements done on standard error: a bar on a terminal, else a line each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stderr=False) as progress:
        task = progress.add_task("Measuring", total=None)

        def watch(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if not console.is_terminal:
                typer.echo(f"Measured {done} of {total}", err=True)

        yield watch


@contextlib.contextmanager
def _count(description: str) -> Iterator[Callable[[int, int], None]]:
    """Many small steps on standard error: a bar with the time left on a terminal, else a line every tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, tenths = Console(stderr=True), -1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stderr=False) as progress:
        task = progress.add_task(description, total=None)

        def watch(done: int, total: int) -> None:
            nonlocal tenths
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and tenths < (tenths := 10 * done // total):
                typer.echo(f"{description}: {done} of {total}", err=True)

        yield watch


def _print_audit(report: dict[str, Any]) -> None:
    from linattn.audit import report_tables

    for sentence in report["verdict"]:
        typer.echo(f"• {sentence}")
    for part in report_tables(report):
        typer.echo(f"\n{part.title}")
        table = _table(*part.columns, right=True)
        table.columns[0].justify = "left"
        for row in part.rows:
            table.add_row(*row)
        _print(table)


# Tuning.


def _trial(trial: Trial) -> str:
    """One candidate in a line: what it changes, and its time or why it has none."""
    changes = ", ".join(f"{name} {value}" for name, value in trial.changes.items()) or "as shipped"
    return f"{trial.step}: {changes}: {trial.reason if trial.ms is None else f'{trial.ms:.3f} ms'}"


@contextlib.contextmanager
def _trials() -> Iterator[Callable[[Trial, int], None]]:
    """Candidates on standard error: a bar and what failed or led on a terminal, else a line each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("the shipped config, checked against float64")

        def watch(trial: Trial, total: int) -> None:
            progress.update(task, description=_trial(trial), total=total, advance=1)
            if not console.is_terminal:
                typer.echo(_trial(trial), err=True)

        yield watch


def _print_tuned(found: Tuned, out: Path) -> None:
    for trial in found.trials:
        if trial.kept:
            typer.echo(f"kept  {_trial(trial)}")
    for timed, (before, after) in found.ms.items():
        start = "does not run" if before is None else f"{before:.3f} ms"
        typer.echo(f"{timed}: shipped {start}, tuned {after:.3f} ms")
    left_out = sum(trial.ms is None for trial in found.trials)
    typer.echo(
        f"{len(found.trials)} candidates, {left_out} of them wrong or not runnable. LINATTN_TABLE={out} uses it."
    )


# Showing.


def _table(*columns: str, right: bool = False) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if right else "left", no_wrap=column == columns[0])
    return table


def _print(table: Table) -> None:
    """On a terminal in its width, into a pipe or file with whole lines."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
    """Steps on standard error: with a spinner and their time on a terminal, else a line each."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    # Bars that other libraries draw would become a line per refresh if they were redirected.
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stderr=False) as progress:

        @contextlib.contextmanager
        def step(description: str) -> Iterator[None]:
            if not console.is_terminal:
                typer.echo(f"{description} …", err=True)
            task = progress.add_task(description, total=1)
            try:
                yield
            except BaseException:
                progress.remove_task(task)
                raise
            progress.update(task, completed=1)

        yield step


if __name__ == "__main__":
    main()
