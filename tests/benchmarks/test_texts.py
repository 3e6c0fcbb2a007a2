"""Texts of the conversion benchmark: what is read of pages, manuals and R's databases."""

from __future__ import annotations

import gzip
import importlib
import struct
import zlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("texts")


def serialised(lines: list[str | None], *, version: int = 3, kind: int = 16) -> bytes:
    """A vector as R's ``serialize`` writes it; None is not available."""
    data = b"X\n" + struct.pack(">3i", version, 0x040205, 0x030500)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">2i", kind, len(lines))
    for line in lines:
        raw = b"" if line is None else line.encode()
        data += struct.pack(">2i", 0x00040009, -1 if line is None else len(raw)) + raw
    return data


@pytest.mark.parametrize("version", [2, 3])
def test_novels_are_the_string_vectors_of_a_database(texts: ModuleType, version: int) -> None:
    objects = [
        serialised(["EMMA", "", "by Jane — Austen"], version=version),
        serialised([], version=version, kind=13),
        serialised([None, "PERSUASION"], version=version),
    ]
    data = b"".join(struct.pack(">i", len(each)) + zlib.compress(each) for each in objects)
    assert texts.r_texts(data) == ["EMMA\n\nby Jane — Austen", "\nPERSUASION"]


def test_pages_and_manuals_leave_their_words(texts: ModuleType, tmp_path: Path) -> None:
    page, manual = tmp_path / "a.html", tmp_path / "man" / "b.1.gz"
    page.write_text("<head>no</head><h1>Tea &amp; milk¶</h1><nav>no</nav><p>as <b>one</b>\n\n\n \nlikes  \nit", "utf-8")
    manual.parent.mkdir()
    manual.write_bytes(gzip.compress(b'.TH B 1\n.SH NAME\nb \\- \\fBboils\\fP water\n.\\" no\n'))
    assert texts.contents(page) == ["Tea & milk\nas one\n\nlikes\nit"]
    assert texts.contents(manual) == ["NAME\nb - boils water"]


def test_documents_are_cut_where_they_are_long_and_left_out_where_short(
    texts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LONGEST", 4)
    monkeypatch.setattr(texts, "SHORTEST", 3)
    folder = tmp_path / "files" / "usr"
    folder.mkdir(parents=True)
    for name, text in (("b.txt", "abcdefghij"), ("a.txt", "klm"), ("c.md", "left out")):
        (folder / name).write_text(text)
    found = list(texts.documents("package", r"\.txt$", tmp_path))
    assert [(each["path"], each["text"]) for each in found] == [
        ("usr/a.txt", "klm"),
        ("usr/b.txt", "abcd"),
        ("usr/b.txt", "efgh"),
    ]
