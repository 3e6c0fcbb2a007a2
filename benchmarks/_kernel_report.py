"""What the rows that benchmarks/kernels.py has put on record amount to: bars, crossovers, tables, a plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _kernel_cases import (
    BOTH,
    COLD,
    CROSSOVER_MAPS,
    CROSSOVER_TOKENS,
    CUDNN,
    FLA,
    FLA_PLAIN,
    FLA_RAW,
    FLASH,
    FORWARD,
    HEADS,
    HYBRID,
    HYBRID_LENGTHS,
    RAW,
    SDPA,
    SHAPES,
    SINKS,
    WINDOW,
    Case,
)

BARS = {"shapes": (1, 2, 3), "hybrid": (4,), "crossover": (5,), "decode": (6,), "cold": (7,)}
"""The bars that each section decides."""


class Rows:
    """The rows on record, asked for by section, shape and contender."""

    def __init__(self, sections: dict[str, dict[str, Any]]) -> None:
        self._sections = sections

    def of(self, section: str) -> list[dict[str, Any]]:
        return self._sections.get(section, {}).get("rows", [])

    def find(self, section: str, shape: str, contender: str) -> dict[str, Any] | None:
        found = [r for r in self.of(section) if (r["shape"], r["contender"]) == (shape, contender)]
        return found[-1] if found else None

    def complete(self, section: str) -> bool:
        return bool(self._sections.get(section, {}).get("complete"))

    def figure(self, section: str, shape: str, contender: str, name: str, what: str) -> float | None:
        row = self.find(section, shape, contender)
        return None if row is None or name not in row else row[name][what]

    def curve(
        self, section: str, contender: str, name: str, what: str, head_dim: int = 64, tokens: int = 0
    ) -> dict[int, float]:
        """A figure by length; of calls of so many ``tokens`` in all, unless 0."""
        rows = [r for r in self.of(section) if r["contender"] == contender and r["head_dim"] == head_dim and name in r]
        rows = [r for r in rows if tokens in (0, r["batch"] * r["length"])]
        return {r["length"]: r[name][what] for r in rows if r[name][what] is not None}


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def bar(number: int, what: str, value: float | None, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """A claim with its figure; ``holds`` is None where it was not measured."""
    holds = None if value is None else (value >= limit if at_least else value <= limit)
    return {"bar": number, "what": what, "value": value, "at_least" if at_least else "at_most": limit, "holds": holds}


def speed_bars(rows: Rows, what: str) -> Iterator[dict[str, Any]]:
    """Bars 1 and 2 on the times ``what``, "ms" or "device_ms", and bar 3."""
    get = rows.figure
    for case in SHAPES:
        ours = {n: get("shapes", case.shape, case.title, n, what) for n in (FORWARD, BOTH)}
        for name, times_faster in ((FORWARD, 3.0), (BOTH, 2.2)):
            plain, normal = (get("shapes", case.shape, c, name, what) for c in (FLA_PLAIN, FLA))
            label = f"{case.shape} {name}"
            yield bar(1, f"{label}: time over fla un-normalised", ratio(ours[name], plain), 1.0)
            yield bar(1, f"{label}: faster than fla normalised", ratio(normal, ours[name]), times_faster, at_least=True)
            if what == "ms":
                mine, theirs = (get("shapes", case.shape, c, name, "extra_mib") for c in (case.title, FLA))
                yield bar(1, f"{label}: memory over fla normalised", ratio(mine, theirs), 0.5)
    for case in RAW:
        for name, times_faster in ((FORWARD, 4.0), (BOTH, 3.0)):
            mine, theirs = (get("shapes", case.shape, c, name, what) for c in (case.title, FLA_RAW))
            yield bar(2, f"{case.shape} {name}: faster", ratio(theirs, mine), times_faster, at_least=True)
    for case in (SHAPES[0], SHAPES[2]):
        for name, limit in ((FORWARD, 2.5), (BOTH, 3.5)):  # the floor knows no Python: the GPU's time, in both lists
            floor = get("shapes", case.shape, case.title, name, "floor_ms")
            mine = get("shapes", case.shape, case.title, name, "device_ms")
            yield bar(3, f"{case.shape} {name}: time over the byte floor", ratio(mine, floor), limit)


def crossover_bars(rows: Rows, what: str) -> Iterator[dict[str, Any]]:
    """Bar 5 on the times ``what``."""
    firsts = {dim: name for name, dim in reversed(CROSSOVER_MAPS)}
    for (head_dim, name), tokens in itertools.product(firsts.items(), CROSSOVER_TOKENS):
        title = Case(1, 1, head_dim, map=name).title
        curves = [rows.curve("crossover", c, BOTH, what, head_dim, tokens) for c in (title, CUDNN)]
        found = crossing(*curves) if rows.complete("crossover") else None
        yield bar(5, f"{title} D{head_dim}, {tokens} tokens a call: faster than cuDNN from length", found, 2048)


def other_bars(rows: Rows) -> Iterator[dict[str, Any]]:
    """Bars 4, 6 and 7."""
    soft = rows.figure("hybrid", Case(1, 131072).shape, CUDNN, BOTH, "ms")
    for decay in ("head", "token"):
        case = next(c for c in HYBRID if c.decay == decay and c.length == 131072)
        mine = rows.figure("hybrid", case.shape, case.title, BOTH, "ms")
        yield bar(4, f"{case.title}, 131072 tokens: ms", mine, 8.0)
        yield bar(4, f"{case.title}, 131072 tokens: faster than cuDNN", ratio(soft, mine), 30.0, at_least=True)
        for what, name in itertools.product(("ms", "extra_mib"), (FORWARD, BOTH)):
            worst = worst_doubling(rows.curve("hybrid", case.title, name, what), HYBRID_LENGTHS)
            yield bar(4, f"{case.title}, {name} {what}: worst doubling 8k … 1M", worst, 2.1)
    steps = {r["tokens"]: r["step"] for r in rows.of("decode") if "step" in r}
    counts = [r["launches"] for r in rows.of("decode") if r.get("launches")]
    for tokens in (1_000, 1_000_000):
        yield bar(6, f"after {tokens} tokens: time over the byte floor", steps.get(tokens, {}).get("over_floor"), 2.0)
    yield bar(6, "launches", max(counts, default=None), 1)
    long, short = (steps.get(t, {}).get("ms") for t in (1_000_000, 1_000))
    yield bar(6, "time after 1M over time after 1k tokens", ratio(long, short), 1.05)
    for case in COLD.values():
        row = rows.find("cold", case.shape, case.title)
        first = row["empty_cache"]["first_s"] if row and "empty_cache" in row else None
        yield bar(7, f"{case.title}: seconds of the first forward and backward", first, 15.0)


def worst_doubling(curve: dict[int, float], lengths: Sequence[int]) -> float | None:
    """The greatest growth from one length to the next; None unless all were measured."""
    if any(t not in curve for t in lengths):
        return None
    return max(curve[b] / curve[a] for a, b in itertools.pairwise(lengths))


def crossing(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """The first length from which ours is faster at every longer one; infinite if never, None if not measured."""
    lengths = sorted(set(ours) & set(theirs))
    if not lengths:
        return None
    slower = [t for t in lengths if ours[t] >= theirs[t]]
    if not slower:
        return lengths[0]
    return next((t for t in lengths if t > slower[-1]), math.inf)


def crossings(rows: Rows) -> dict[str, dict[str, Any]]:
    """Of every map, pass and softmax kernel."""
    found: dict[str, dict[str, Any]] = {}
    if not rows.complete("crossover"):
        return found
    for (name, head_dim), window, tokens in itertools.product(CROSSOVER_MAPS, (0, WINDOW), CROSSOVER_TOKENS):
        title = Case(1, 1, head_dim, map=name, window=window, sinks=SINKS if window else 0).title
        for contender, which in itertools.product(SDPA, (FORWARD, BOTH)):
            curves = [rows.curve("crossover", c, which, "ms", head_dim, tokens) for c in (title, contender)]
            length = crossing(*curves)
            found.setdefault(f"{title}, D{head_dim}, {tokens} tokens a call", {})[f"{contender}, {which}"] = (
                "never" if length == math.inf else length
            )
    return found


def summary(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the rows on record amount to."""
    rows = Rows(sections)
    bars = [*speed_bars(rows, "ms"), *crossover_bars(rows, "ms"), *other_bars(rows)]
    for b in bars:
        if b["value"] == math.inf:
            b["value"] = "never"
    queued = [*speed_bars(rows, "device_ms"), *crossover_bars(rows, "device_ms")]
    return {"bars": bars, "bars_with_work_queued": queued, "crossover": crossings(rows)}


# ------------------------------------------------------------------------------------------------------- tables, plot


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rows = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, *lines)
    ]
    return "\n".join(row.rstrip() for row in rows)


def number(x: Any, digits: int = 3) -> str:
    if x is None:
        return "-"
    if isinstance(x, str):
        return x
    return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def print_tables(data: dict[str, dict[str, Any]], chosen: Sequence[str], found: dict[str, Any]) -> None:
    """The chosen sections, compactly, and the bars they decide."""
    rows = Rows(data)
    for section in chosen:
        run = data[section]["run"]
        print(
            f"\n== {section}: {run['machine']}; {run['date']}; copy {run['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 "
            f"{run['bf16_flop_per_s'] / 1e12:.0f} TFLOP/s; complete: {data[section]['complete']}"
        )
        for what in data[section]["skipped"]:
            print(f"   skipped: {what}")
        for row in rows.of(section):
            if "error" in row:
                print(f"   {row['shape']} {row['contender']}: {row['error']}")
        if section in ("crossover", "hybrid", "scaling"):
            print_curves(rows, section)
        elif section == "shapes":
            print_shapes(rows)
        else:
            print_figures(rows.of(section))
    decided = [n for section in chosen for n in BARS.get(section, ())]
    wanted = [b for b in found["bars"] if b["holds"] is not None and b["bar"] in decided]
    if wanted:
        print_bars(wanted, found["bars_with_work_queued"])
    if "crossover" in chosen and found["crossover"]:
        header = ["faster, from tokens, than", *next(iter(found["crossover"].values()))]
        print(text_table(header, [[t, *map(number, where.values())] for t, where in found["crossover"].items()]))


def print_bars(wanted: list[dict[str, Any]], queued_bars: list[dict[str, Any]]) -> None:
    """Bars that were measured; "queued": the same on times with work queued."""
    print(f"\n== bars: {sum(b['holds'] for b in wanted)} of {len(wanted)} measured hold")
    queued = {b["what"]: b["value"] for b in queued_bars}
    lines = [
        [
            f"{b['bar']} {b['what']}",
            number(b["value"]),
            number(queued.get(b["what"])),
            f"≥ {b['at_least']:g}" if "at_least" in b else f"≤ {b['at_most']:g}",
            "yes" if b["holds"] else "NO",
        ]
        for b in wanted
    ]
    print(text_table(["", "value", "queued", "bar", "holds"], lines))


def print_shapes(rows: Rows) -> None:
    lines = []
    for row in rows.of("shapes"):
        if BOTH not in row:
            continue
        cells = [f"{row['shape']} {row['contender']}"]
        for name in (FORWARD, BOTH):
            x = row[name]
            cells += [number(x[n]) for n in ("ms", "device_ms", "host_ms", "over_floor")]
            cells += [
                number(x["bytes_per_s"] / 1e12 if "bytes_per_s" in x else None),
                number(x["flop_per_s"] / 1e12 if "flop_per_s" in x else None),
                number(x["extra_mib"]),
            ]
        cells.append(number(max(row["errors"].values()), 2) if row.get("errors") else "-")
        lines.append(cells)
    one = ["ms", "queued", "host", "×floor", "TB/s", "TF/s", "MiB"]
    print(text_table(["", *one, *(["f+b " + one[0], *one[1:]]), "error"], lines))


def print_curves(rows: Rows, section: str) -> None:
    """Contenders by length: milliseconds forward, forward and backward, and memory."""
    found = rows.of(section)
    lengths = sorted({r["length"] for r in found})
    crossover = section == "crossover"
    contenders = dict.fromkeys(
        (r["contender"], r["head_dim"], r["batch"] * r["length"] if crossover else 0) for r in found
    )
    whats = (
        (FORWARD, "ms"),
        (BOTH, "ms"),
        *(((BOTH, "extra_mib"),) if section != "crossover" else ((BOTH, "device_ms"),)),
    )
    names = {"ms": "ms", "device_ms": "ms queued", "extra_mib": "MiB"}
    for name, what in whats:
        lines = []
        for contender, head_dim, tokens in contenders:
            curve = rows.curve(section, contender, name, what, head_dim, tokens)
            label = f"{contender} D{head_dim}" + (f", {tokens} tokens" if tokens else "")
            lines.append([label, *(number(curve.get(t)) for t in lengths)])
        print(text_table([f"{name}, {names[what]}", *map(_short, lengths)], lines))


def _short(tokens: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit:
            return f"{tokens // unit}{name}"
    return str(tokens)


def print_figures(found: list[dict[str, Any]]) -> None:
    for row in found:
        figures = {k: v for k, v in row.items() if k in ("tokens", "launches", "step", "empty_cache", "filled_cache")}
        flat = {
            f"{k} {n}".strip(): x
            for k, v in figures.items()
            for n, x in (v.items() if isinstance(v, dict) else (("", v),))
        }
        print(f"{row['contender']}:", ", ".join(f"{k} {number(v)}" for k, v in flat.items()))


def plot(sections: dict[str, dict[str, Any]], path: Path) -> None:
    """Time and memory against length, forward and backward, of one sequence of 16 heads of 64."""
    import matplotlib.pyplot as plt

    rows = Rows(sections)
    token = next(c for c in HYBRID if c.decay == "token")
    series = (
        ("scaling", Case(1, 1).title, "linattn, Hedgehog features", "tab:blue"),
        ("hybrid", token.title, f"linattn, window {WINDOW} + {SINKS} sinks, decay", "tab:green"),
        ("scaling", CUDNN, "softmax (SDPA, cuDNN)", "tab:red"),
        ("scaling", FLASH, "softmax (SDPA, Flash)", "tab:orange"),
        ("scaling", FLA, "fla normalised, features given", "tab:gray"),
    )
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, what, scale in ((axes[0], "ms", 1e-3), (axes[1], "extra_mib", 1.0)):
        for section, contender, label, colour in series:
            curve = rows.curve(section, contender, BOTH, what)
            if curve:
                axis.plot(list(curve), [x * scale for x in curve.values()], "-o", color=colour, label=label, ms=3.5)
        axis.set(yscale="log", xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=7.5, loc="upper left")
    ours, softmax = (rows.curve("scaling", contender, BOTH, "ms") for contender in (Case(1, 1).title, CUDNN))
    tokens = crossing(ours, softmax)
    if tokens is not None and math.isfinite(tokens):
        axes[0].axvline(tokens, color="tab:blue", ls=":", lw=1)
        axes[0].annotate(f" faster from {tokens:,}", (tokens, 0.02), xycoords=("data", "axes fraction"), fontsize=7.5)
    axes[0].set(ylabel="seconds, forward and backward", title="Time")
    axes[1].set(ylabel="MiB added to the inputs", title="Peak memory")
    run = next((sections[s]["run"] for s in ("scaling", "hybrid") if s in sections), None)
    machine = run["machine"].split(", ")[-1] if run else ""
    figure.suptitle(f"{machine}, bfloat16, one sequence, {HEADS} heads × 64, 128 features", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
