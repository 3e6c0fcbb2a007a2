"""Reports as tables, Markdown and pictures: every measurement appears, with its number."""

from __future__ import annotations

import importlib.util
import json
import struct

import pytest
import torch

from linattn import convert_model
from linattn.audit import (
    RecallTask,
    audit_model,
    recall_by_distance,
    report_plots,
    report_tables,
    save_report,
    to_markdown,
)
from linattn.audit.sentences import part_sentences
from linattn.errors import UnsupportedError

plots = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs the package matplotlib")
TITLES = ["Cross-entropy", "Beyond", "Another past", "Layers", "With the cache", "Recall", "Decoding"]


@pytest.fixture
def report(llama, windows):
    facts = RecallTask("facts", lambda key, value: [1, 30 + value], lambda key, value: ([1], [30 + value]), values=5)
    return audit_model(
        llama(),
        convert_model(llama(), window=6, sinks=2, decay="fixed"),
        windows(2, 48),
        edges=(0, 16, 32, 64),
        lengths=[8, 32],
        recall=lambda model: recall_by_distance(
            model, [facts, facts._replace(name="more")], torch.arange(3, 9), distances=[6, 30], prompts=2, lead=8
        ),
    )


def test_tables_hold_the_numbers(report):
    tables = report_tables(report)
    assert [table.title.startswith(title) for table, title in zip(tables, TITLES, strict=True)] == [True] * 7
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}
    losses, beyond, _, layers, cache, recall, speed = tables
    assert [row[0] for row in losses.rows] == ["0 … 15", "16 … 31", "32 … 63"]
    assert losses.rows[1][2] == f"{report['models']['student']['buckets'][1]['mean']:.4f}"
    far = report["beyond_reach"]["far_branch"]
    assert beyond.rows[0] == ("window alone − this model", f"{far['mean']:+.4f} ± {far['standard_error']:.4f}")
    assert [row[0] for row in layers.rows] == ["0", "1"]
    life = report["telemetry"]["layers"][0]["half_life"]
    assert layers.rows[0][3] == f"{min(life):,.0f} … {max(life):,.0f}"
    assert [row[0] for row in cache.rows][:2] == ["teacher, 1 at a time", "teacher, 64 at a time"]
    assert [row[0] for row in recall.rows][1:3] == ["facts, 30 tokens", "more, 6 tokens"]
    assert recall.columns[1:] == ("teacher", "this model", "equal bytes")
    assert [row[0] for row in speed.rows] == ["8", "32"]
    assert speed.rows[1][1] == f"{report['speed']['teacher'][1]['ms']:.3g} ms"


def test_parts_that_were_not_measured_are_left_out(report):
    del report["models"], report["beyond_reach"], report["speed"]
    assert [table.title.split(",")[0] for table in report_tables(report)] == [
        "Another past",
        "Layers",
        "With the cache against without",
        "Recall",
    ]


@plots
def test_numbers_that_are_not_finite_are_no_obstacle(report, tmp_path):
    report["far_gain"] |= {"standard_error": None}
    first = report["telemetry"]["layers"][0]
    first |= {"far_mass": [None, *first["far_mass"][1:]], "half_life": [None, 5.0], "effective_rank": [None, None]}
    for bucket in report["beyond_reach"].values():
        bucket["standard_error"] = None
    save_report(report, tmp_path)
    rows = report_tables(report)[3].rows
    assert rows[0][1:] == (f"{sum(first['far_mass'][1:]) / 3:.3f}", rows[0][2], "5 … ∞", "nan of 8")
    assert part_sentences(report)


def test_markdown(report):
    text = to_markdown(report, title="A model", images=("far_mass.png",))
    assert text.startswith(f"# A model\n\n1. {report['verdict'][0]}\n")
    for table in report_tables(report):
        assert f"## {table.title}\n\n| {' | '.join(table.columns)} |\n| --- |" in text
        assert all(f"| {' | '.join(row)} |" in text for row in table.rows)
    assert text.endswith("![far mass](far_mass.png)\n")


@plots
def test_saved_reports(report, tmp_path):
    out = tmp_path / "a" / "report"
    written = save_report(report, out)
    names = ["loss_by_position", "recall_by_distance", "far_mass", "decoding"]
    assert [path.name for path in written] == ["report.json", "report.md", *(f"{name}.png" for name in names)]
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    text = (out / "report.md").read_text(encoding="utf-8")
    assert all(f"({name}.png)" in text for name in names)
    for path in written[2:]:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > height > 400
    bare = save_report(report, tmp_path / "bare", plots=False)
    assert [path.name for path in bare] == ["report.json", "report.md"]
    assert "![" not in bare[1].read_text(encoding="utf-8")


@plots
def test_figures_show_what_was_measured(report):
    figures = report_plots(report)
    ours = next(line for line in figures["loss_by_position"].axes[0].lines if line.get_label() == "this model")
    assert [*ours.get_ydata()] == [bucket["mean"] for bucket in report["models"]["student"]["buckets"]]
    assert [ax.get_title() for ax in figures["recall_by_distance"].axes] == ["facts", "more"]
    shown = figures["far_mass"].axes[1].images[0].get_array()
    assert shown.tolist() == [layer["teacher_far_mass"] for layer in report["telemetry"]["layers"]]
    memory = figures["decoding"].axes[1].lines[0].get_ydata()
    assert [each * 2**20 for each in memory] == [row["bytes"] for row in report["speed"]["teacher"]]
    assert report_plots({"reach": 8, "speed": report["speed"]}).keys() == {"decoding"}


def test_without_matplotlib_plots_are_refused(report, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="linattn\\[plots\\]"):
        save_report(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_report(report, tmp_path / "out", plots=False)
