"""An audit as tables, Markdown and plots, from the dict of :func:`linattn.audit.audit_model`."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from linattn.audit.sentences import PAIRS, mean_of
from linattn.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "teacher": "teacher",
    "student": "this model",
    "far_off": "window alone",
    "near_off": "far alone",
    "retained_off": "none retained",
    "attention_off": "no attention",
    "control": "equal bytes",
    "layer_control": "equal bytes, layer by layer",
    "trained_control": "equal bytes, trained",
}
STYLES = {
    "teacher": {"color": "0.25", "zorder": 2},
    "control": {"color": "tab:red", "zorder": 3},
    "layer_control": {"color": "tab:orange", "zorder": 3},
    "trained_control": {"color": "tab:purple", "zorder": 3},
    "student": {"color": "tab:blue", "zorder": 4},
    "far_off": {"color": "tab:orange", "zorder": 5, "linestyle": "--"},
    "retained_off": {"color": "tab:green", "zorder": 5, "linestyle": "--"},
}
"""Of the lines in plots, which leave out the models without a window: they would set the scale."""


class ReportTable(NamedTuple):
    """A part of a report: cells are text, the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def report_tables(report: dict[str, Any]) -> list[ReportTable]:
    """The measurements of a report, one table each, in the order of its parts."""
    makers: dict[str, Callable[[dict[str, Any]], ReportTable]] = {
        "models": _losses,
        "beyond_reach": _differences,
        "counterfactual": _counterfactual,
        "telemetry": _telemetry,
        "cache": _cache,
        "recall": _recall,
        "speed": _speed,
    }
    return [make(report) for part, make in makers.items() if report.get(part)]


def to_markdown(report: dict[str, Any], *, title: str = "Audit", images: tuple[str, ...] = ()) -> str:
    """The verdict, a table of each part, and ``images`` by file name."""
    lines = [f"# {title}", ""]
    lines += [f"{i}. {sentence}" for i, sentence in enumerate(report["verdict"], 1)]
    lines += ["", f"Measured on {report['windows']} windows of {report['length']} tokens.", ""]
    for table in report_tables(report):
        lines += [f"## {table.title}", "", _row(table.columns), _row(("---", *["---:"] * (len(table.columns) - 1)))]
        lines += [*map(_row, table.rows), ""]
    lines += [f"![{Path(name).stem.replace('_', ' ')}]({name})\n" for name in images]
    return "\n".join(lines).rstrip() + "\n"


def report_plots(report: dict[str, Any]) -> dict[str, Figure]:
    """Figures of what was measured: ``loss_by_position``, ``recall_by_distance``, ``far_mass`` and ``decoding``.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    _need_matplotlib()
    makers = {
        "loss_by_position": ("models", _plot_losses),
        "recall_by_distance": ("recall", _plot_recall),
        "far_mass": ("telemetry", _plot_far_mass),
        "decoding": ("speed", _plot_speed),
    }
    return {name: make(report) for name, (part, make) in makers.items() if part in report}


def save_report(
    report: dict[str, Any], directory: str | PathLike[str], *, title: str = "Audit", plots: bool = True
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and, with ``plots``, a PNG file of each figure; returns what was written.

    Raises:
        UnsupportedError: matplotlib is not installed, and ``plots`` asks for it.
    """
    if plots:
        _need_matplotlib()
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    figures = report_plots(report) if plots else {}
    images = [out / f"{name}.png" for name in figures]
    for path, figure in zip(images, figures.values(), strict=True):
        figure.savefig(path, dpi=150)
    markdown = to_markdown(report, title=title, images=tuple(path.name for path in images))
    (out / "report.md").write_text(markdown, encoding="utf-8")
    return [out / "report.json", out / "report.md", *images]


def _names(report: dict[str, Any]) -> dict[str, str]:
    return NAMES | ({"far_off": "exact tokens alone"} if report.get("retained") else {})


# Tables.


def _losses(report: dict[str, Any]) -> ReportTable:
    models = report["models"]
    rows = zip(*(model["buckets"] for model in models.values()), strict=True)
    cells = [(_span(row[0]), *(f"{bucket['mean']:.4f}" for bucket in row)) for row in rows]
    title = "Cross-entropy by position, nats per token"
    return ReportTable(title, ("position", *(_names(report)[name] for name in models)), cells)


def _differences(report: dict[str, Any]) -> ReportTable:
    names = _names(report)
    rows = [
        (" − ".join(names[model] for model in PAIRS[name]), _plus_minus(bucket))
        for name, bucket in report["beyond_reach"].items()
    ]
    if (gain := report.get("far_gain")) is not None:
        where = f"from position {gain['teacher']['start']}, beyond {gain['context']} tokens"
        rows.append((f"far-gain ratio {where}", _ratio(gain)))
    return ReportTable(f"Beyond {report['reach']} tokens, nats per token", ("difference", "mean"), rows)


def _ratio(gain: dict[str, Any]) -> str:
    if gain["ratio"] is None:
        return "–"
    error = gain["standard_error"]
    return f"{gain['ratio']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _counterfactual(report: dict[str, Any]) -> ReportTable:
    models = report["counterfactual"]["models"]
    rows = zip(*(model["buckets"] for model in models.values()), strict=True)
    cells = [(_span(row[0]), *(f"{bucket['mean']:.3g}" for bucket in row)) for row in rows]
    title = "Another past, KL of the predictions in nats"
    return ReportTable(title, ("intact tokens", *(_names(report)[name] for name in models)), cells)


def _telemetry(report: dict[str, Any]) -> ReportTable:
    rows = []
    for layer in report["telemetry"]["layers"]:
        rows.append(
            (
                str(layer["layer"]),
                *(f"{mean_of(layer[name]):.3f}" for name in ("far_mass", "teacher_far_mass")),
                _half_lives(layer["half_life"]),
                f"{mean_of(layer['effective_rank']):.1f} of {layer['greatest_rank']}",
            )
        )
    columns = ("layer", "far mass", "teacher's", "half-lives in tokens", "effective rank")
    return ReportTable("Layers", columns, rows)


def _half_lives(values: list[float | None] | None) -> str:
    if values is None:
        return "–"
    known = sorted(math.inf if value is None else value for value in values)
    return " … ".join(dict.fromkeys("∞" if value == math.inf else f"{value:,.0f}" for value in (known[0], known[-1])))


def _cache(report: dict[str, Any]) -> ReportTable:
    rows = [
        (
            f"{NAMES[name]}, {check['chunk']} at a time",
            f"{check['agree']:.2%}",
            f"{check['difference']:.2g}",
            f"{check['spread']:.2g}",
        )
        for name, checks in report["cache"].items()
        for check in checks
    ]
    columns = ("model", "same most likely token", "greatest difference", "logits' deviation")
    return ReportTable("With the cache against without", columns, rows)


def _recall(report: dict[str, Any]) -> ReportTable:
    models = report["recall"]
    rows = [
        (f"{row[0]['task']}, {row[0]['distance']:,} tokens", *map(_rate, row))
        for row in zip(*models.values(), strict=True)
    ]
    prompts = next(iter(models.values()))[0]["prompts"]
    return ReportTable(f"Recall, {prompts} prompts each", ("task", *(_names(report)[name] for name in models)), rows)


def _rate(row: dict[str, Any]) -> str:
    return f"{row['rate']:.2f} ± {row['standard_error']:.2f}"


def _speed(report: dict[str, Any]) -> ReportTable:
    models = ("teacher", "student")
    rows = [
        (f"{row[0]['length']:,}", *(f"{at['ms']:.3g} ms" for at in row), *(readable_bytes(at["bytes"]) for at in row))
        for row in zip(*(report["speed"][name] for name in models), strict=True)
    ]
    columns = ("tokens", *(f"step, {NAMES[name]}" for name in models), *(f"memory, {NAMES[name]}" for name in models))
    return ReportTable("Decoding", columns, rows)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _span(bucket: dict[str, Any]) -> str:
    return f"{bucket['start']:,} … {bucket['stop'] - 1:,}"


def _plus_minus(bucket: dict[str, Any]) -> str:
    error = bucket["standard_error"]
    return f"{bucket['mean']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def readable_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.4g} {units[0]}"


# Plots.


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("Plots need matplotlib: pip install 'linattn[plots]'.")


def _figure(columns: int = 1, *, share: bool = False) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns if columns == 1 else 4.6 * columns, 4.2), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=share, squeeze=False)[0]


def _finish(ax: Any, x: str, y: str) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")


def _plot_losses(report: dict[str, Any]) -> Figure:
    figure, (ax,) = _figure()
    for name, model in report["models"].items():
        if name in STYLES:
            centres = [math.sqrt(max(bucket["start"], 1) * bucket["stop"]) for bucket in model["buckets"]]
            means = [bucket["mean"] for bucket in model["buckets"]]
            ax.plot(centres, means, marker="o", markersize=4, label=_names(report)[name], **STYLES[name])
    ax.axvline(report["reach"], color="0.6", linestyle=":", label="attended exactly")
    _finish(ax, "position in tokens", "cross-entropy, nats per token")
    return figure


def _plot_recall(report: dict[str, Any]) -> Figure:
    tasks = list(dict.fromkeys(row["task"] for row in report["recall"]["student"]))
    figure, axes = _figure(len(tasks), share=True)
    for ax, task in zip(axes, tasks, strict=True):
        for i, (name, rows) in enumerate(report["recall"].items()):
            mine = [row for row in rows if row["task"] == task]
            x, y, error = ([row[key] for row in mine] for key in ("distance", "rate", "standard_error"))
            apart = [each * 1.02 ** (i - 1) for each in x]  # lines at the same height stay visible
            ax.errorbar(
                apart, y, error, marker="o", markersize=4, capsize=2, label=_names(report)[name], **STYLES[name]
            )
        ax.axvline(report["reach"], color="0.6", linestyle=":", label="attended exactly")
        if chance := report["recall"]["student"][0]["chance"]:
            ax.axhline(chance, color="0.6", linestyle="--", label="a guess")
        ax.set_ylim(-0.03, 1.03)
        ax.set_title(task)
        _finish(ax, "distance in tokens", "recalled" if ax is axes[0] else "")
    return figure


def _plot_far_mass(report: dict[str, Any]) -> Figure:
    layers = report["telemetry"]["layers"]
    panels = {"far_mass": "this model", "teacher_far_mass": "teacher"}
    heads = max(len(layer["far_mass"]) for layer in layers)
    most = max(mass or 0 for layer in layers for name in panels for mass in layer[name])
    figure, axes = _figure(2, share=True)
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        mass = [[math.nan if m is None else m for m in layer[name]] for layer in layers]
        mass = [row + [math.nan] * (heads - len(row)) for row in mass]
        image = ax.imshow(mass, vmin=0, vmax=most, cmap="viridis", aspect="auto", interpolation="nearest")
        ax.set_title(title)
        ax.set_xlabel("head")
    axes[0].set_ylabel("layer")
    step = max(1, len(layers) // 12)
    axes[0].set_yticks(range(0, len(layers), step), [str(layer["layer"]) for layer in layers[::step]])
    figure.colorbar(image, ax=axes, label="attention beyond what is exact")
    return figure


def _plot_speed(report: dict[str, Any]) -> Figure:
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(2)
    for name in ("teacher", "student"):
        rows = report["speed"][name]
        lengths = [row["length"] for row in rows]
        spread = [[row["ms"] - row["fastest"] for row in rows], [row["slowest"] - row["ms"] for row in rows]]
        style = {"marker": "o", "markersize": 4, "label": NAMES[name], **STYLES[name]}
        axes[0].errorbar(lengths, [row["ms"] for row in rows], spread, capsize=2, **style)
        axes[1].plot(lengths, [row["bytes"] / 2**20 for row in rows], **style)
    for ax, y in zip(axes, ("decoding step, ms (median, range)", "memory, MiB"), strict=True):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        _finish(ax, "tokens before it", y)
    return figure
