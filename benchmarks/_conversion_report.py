"""Tables and plot of what conversion.py measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OVER = {
    "far_branch": "far branch off",
    "over_control": "equal bytes, no training",
    "over_trained_control": "equal bytes, trained",
}
"""What a variant is compared with beyond its window, by the name of the difference in an audit."""
MODELS = {
    "student": "as it is",
    "far_off": "far branch off",
    "trained_control": "window of equal bytes, trained",
    "control": "window of equal bytes, no training",
}
"""Models of a variant, and what the plot calls them."""
UNTRAINED = {"control": "— equal bytes, no training", "layer_control": "— equal bytes layer by layer, no training"}
"""Windows beside a variant as they come from its teacher; the second where a variant's windows differ by layer."""
NEAR = 0.1
"""Nats over the best variant within which a variant is on the chart with all that stands beside it."""
RECALLED = {"student": "**{}**", "control": "— equal bytes, no training", "trained_control": "— equal bytes, trained"}

Results = Mapping[str, Mapping[str, Any]]


def markdown(results: Results, *, smoke: bool) -> str:
    """Cross-entropies, gains beyond the window over windows alone, and recall by distance."""
    done = {name: result for name, result in results.items() if "error" not in result}
    machines = dict.fromkeys(f"{result['device']}, {result['dtype']}" for result in done.values())
    about = "A tiny random model: these numbers mean nothing." if smoke else f"Measured on: {'; '.join(machines)}."
    sections = [["# Conversion: what each part is worth", "", about], *map(_losses, _by_text(done)), _gains(done)]
    sections += [_positions(done), _recalls(done)]
    failed = [f"Not run: {name}: {result['error']}" for name, result in results.items() if "error" in result]
    return "\n\n".join(["\n".join(lines) for lines in sections if lines] + failed) + "\n"


def _by_text(done: Results) -> list[dict[str, Mapping[str, Any]]]:
    """The results in groups that were judged on the same windows of the same texts."""
    groups: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for name, result in done.items():
        # Of other texts a teacher has other losses; those of one text differ by rounding between machines.
        cut = tuple(
            (row["text"], row["length"], row["windows"], round(row["losses"]["teacher"], 2)) for row in result["audit"]
        )
        groups.setdefault(cut, {})[name] = result
    return list(groups.values())


def _losses(done: Results) -> list[str]:
    """Of results on the same windows."""
    rows: list[list[str]] = []

    def losses(result: Mapping[str, Any], model: str) -> list[str]:
        return [_loss(row["losses"][model]) for row in result["audit"]]

    for name, result in done.items():
        if not rows:
            rows += [["teacher", "", "", *losses(result, "teacher")]]
        rows += [[f"**{name}**", str(len(result["kept"])), _millions(result["stages"]), *losses(result, "student")]]
        if result["config"]["student"].get("feature_map", "hedgehog") is not None:
            rows += [["— far branch off", "", "", *losses(result, "far_off")]]
            for model, label in UNTRAINED.items():
                if all(model in row["losses"] for row in result["audit"]):
                    rows += [[label, "", "", *losses(result, model)]]
        if control := result["control"]:
            rows += [["— equal bytes, trained", "", _millions(control["stages"]), *losses(result, "trained_control")]]
    audit = next(iter(done.values()))["audit"]
    places = [f"{row['text']}, {row['length']:,}" for row in audit]
    cuts = ", ".join(str(row["windows"]) for row in audit)
    return [
        "Cross-entropy on held-out texts in nats per token, by window length (for softmax layers without a bound, "
        f"lengths beyond the teacher's are as foreign as for the teacher), of {cuts} windows:",
        "",
        *_table(["variant", "softmax layers", "M tokens", *places], rows),
    ]


def _gains(done: Results) -> list[str]:
    rows = [
        [
            name,
            f"{row['text']}, {row['length']:,}",
            *(_gain(row["beyond_reach"].get(over)) for over in OVER),
            _ratio(row),
        ]
        for name, result in done.items()
        for row in result["audit"]
    ]
    return [
        "Cross-entropy of windows alone less that of a variant, beyond its window, in nats per token, ± s.e.: its own "
        "window (far branch off), and the teacher's with as many bytes as the variant's state, untrained and trained "
        "on the tokens of the variant's stages of logits. Last, the part of its teacher's gain from text beyond the "
        "window that the variant has:",
        "",
        *_table(["variant", "text", *OVER.values(), "far-gain ratio"], rows),
    ]


def _positions(done: Results) -> list[str]:
    """Of variants with a trained control; each bucket from the shortest windows that have it: they are most."""
    found: dict[tuple[str, str], dict[tuple[int, int], Mapping[str, Any]]] = {}
    for name, result in done.items():
        for row in sorted(result["audit"], key=lambda row: row["length"]):
            for bucket in row.get("differences", {}).get("over_trained_control", ()):
                found.setdefault((name, row["text"]), {}).setdefault((bucket["start"], bucket["stop"]), bucket)
    if not found:
        return []
    places = sorted({place for by in found.values() for place in by})
    rows = [[name, text, *(_gain(by.get(place)) for place in places)] for (name, text), by in found.items()]
    return [
        "Cross-entropy of the window of equal bytes, trained, less that of a variant, by position, in nats per token, "
        "± s.e., of the shortest windows that have the position:",
        "",
        *_table(["variant", "text", *(f"{start:,}–{stop:,}" for start, stop in places)], rows),
    ]


def _recalls(done: Results) -> list[str]:
    asked = {name: result["recall"] for name, result in done.items() if result.get("recall")}
    if not asked:
        return []
    about = ["Recall of a fact so many tokens back, by generation with the cache:"]
    for recalls in _by_prompts(asked):
        cells = next(iter(recalls.values()))["teacher"]
        rows = [["teacher", *_rates(cells)]]
        for name, recall in recalls.items():
            rows += [[label.format(name), *_rates(recall[m])] for m, label in RECALLED.items() if m in recall]
        header = [f"{cell['task']}, {cell['distance']:,}" for cell in cells]
        about += ["", *_table([f"of {cells[0]['prompts']} prompts", *header], rows)]
    return about


def _by_prompts(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recalls in groups that were asked the same prompts: where the teacher found as many at each distance.

    One more or less is rounding: generation on a GPU does not repeat to the bit.
    """
    groups: list[dict[str, Any]] = []
    for name, recall in asked.items():
        for group in groups:
            if _same_prompts(next(iter(group.values()))["teacher"], recall["teacher"]):
                group[name] = recall
                break
        else:
            groups.append({name: recall})
    return groups


def _same_prompts(teacher: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    questions = [[(cell["task"], cell["distance"], cell["prompts"]) for cell in cells] for cells in (teacher, other)]
    return questions[0] == questions[1] and all(
        abs(a["found"] - b["found"]) <= 1 for a, b in zip(teacher, other, strict=True)
    )


def _rates(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{cell['rate']:.2f}" for cell in cells]


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _millions(stages: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(stage['tokens'] for stage in stages) / 1e6:.1f}"


def _gain(bucket: Mapping[str, Any] | None) -> str:
    if bucket is None:
        return ""
    error = bucket["standard_error"]
    return f"{bucket['mean']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _ratio(row: Mapping[str, Any]) -> str:
    gain = row.get("far_gain")
    return "" if gain is None or gain["ratio"] is None else f"{gain['ratio']:.2f} ± {gain['standard_error']:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def plot(results: Results, path: Path) -> bool:
    """Cross-entropy of each variant and of the models beside it, by text and length; the teacher's as a line.

    Of those that were judged on the first one's windows. False without matplotlib, or where nothing was measured.
    """
    done = {name: result for name, result in results.items() if "error" not in result}
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    if not done:
        return False
    done = _by_text(done)[0]
    rows = next(iter(done.values()))["audit"]
    texts, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("text", "length"))
    size = (2.4 + 3.2 * len(lengths), 0.8 + (0.6 + 0.5 * len(done)) * len(texts))
    figure, grid = plt.subplots(
        len(texts), len(lengths), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for at, row in enumerate(rows):
        ax = grid[texts.index(row["text"])][lengths.index(row["length"])]
        losses = [result["audit"][at]["losses"] for result in done.values()]
        best = min((each["student"] for each in losses if math.isfinite(each["student"])), default=math.inf)
        near = [each for each in losses if each["student"] <= best + NEAR] or losses
        shown = [each[model] for each in near for model in MODELS if math.isfinite(each.get(model, math.nan))]
        for place, (model, label) in enumerate(MODELS.items()):
            values = [each.get(model, math.nan) for each in losses]
            ax.barh([i + 0.2 * (place - 1.5) for i in range(len(done))], values, 0.2, label=label)
        low, high, teacher = min(shown), max(shown), row["losses"]["teacher"]
        edge, title = high + 0.2 * (high - low), f"{row['text']}, windows of {row['length']:,}"
        if teacher < edge:
            ax.axvline(teacher, color="black", linestyle="--", label="teacher")
            low = min(low, teacher)
        else:
            title += f" (teacher {teacher:.2f})"
        ax.set_xlim(low - 0.1 * (high - low), edge)
        for bar in ax.patches:
            if bar.get_width() > edge:  # off the chart, so in words
                y = bar.get_y() + bar.get_height() / 2
                ax.annotate(f"{bar.get_width():.2f} ", (edge, y), ha="right", va="center", fontsize=7, color="white")
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("nats per token", fontsize=8)
    grid[0][0].set_yticks(range(len(done)), list(done))
    grid[0][0].invert_yaxis()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_recall(results: Results, path: Path) -> bool:
    """Recall by distance of the variants that were asked the first one's prompts, their controls and the teacher.

    False without matplotlib, or where nothing was asked.
    """
    asked = {name: result["recall"] for name, result in results.items() if result.get("recall")}
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    if not asked:
        return False
    recalls = _by_prompts(asked)[0]
    curves = {"teacher": (next(iter(recalls.values()))["teacher"], "k--")}
    for number, (name, recall) in enumerate(recalls.items()):
        curves[name] = (recall["student"], f"C{number}o-")
        control = next(model for model in ("trained_control", "control") if model in recall)
        curves[f"{name}: {MODELS[control]}"] = (recall[control], f"C{number}s:")
    figure, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
    for label, (cells, style) in curves.items():
        cells = [cell for cell in cells if cell["task"] == cells[0]["task"]]
        distances, rates, errors = ([cell[key] for cell in cells] for key in ("distance", "rate", "standard_error"))
        ax.errorbar(distances, rates, errors, fmt=style, label=label, markersize=4, linewidth=1.2, capsize=2)
    ax.set_xscale("log", base=2)
    ax.set_xticks([cell["distance"] for cell in cells], [f"{cell['distance']:,}" for cell in cells], fontsize=8)
    ax.set_xlabel(f"distance of the {cells[0]['task']} in tokens")
    ax.set_ylabel(f"recalled, of {cells[0]['prompts']} prompts")
    ax.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
