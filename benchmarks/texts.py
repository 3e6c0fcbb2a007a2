"""The texts of the conversion benchmark, out of Debian's documentation packages: no model or data hub is asked.

    python benchmarks/texts.py texts        train.jsonl, dev.jsonl, docs.jsonl and novel.jsonl in that folder
    linattn tokens texts/train.jsonl --tokenizer MODEL -o train.npy         and so on, for conversion.py

Models train on manuals, references and dictionaries, are measured on other manuals meanwhile, and are judged on what is
neither: handbooks of Debian's administrators, its kernel and Cockpit ("docs"), and Jane Austen's novels. Each line is a
document, {"source", "path", "text"}. Packages are fetched with apt-get, by name, and not installed. Other versions of
them are other texts, so their versions are printed.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

TEXTS: dict[str, dict[str, str]] = {
    "train": {
        "python3.11-doc": r"\.rst\.txt$",
        "postgresql-doc-15": r"\.html$",
        "git-doc": r"\.html$",
        "perl-doc": r"\.pod$",
        "rust-doc": r"/(book|reference|nomicon|cargo|rust-by-example|edition-guide|rustc)/.*\.html$",
        "debian-reference-en": r"\.html$",
        "anarchism": r"\.md\.gz$",
        "dict-gcide": r"\.dz$",
        "dict-foldoc": r"\.dz$",
        "dict-jargon": r"\.dz$",
    },
    "dev": {"manpages": r"\.gz$", "manpages-dev": r"\.gz$", "developers-reference": r"\.html$"},
    "docs": {"debian-handbook": r"/en-US/.*\.html$", "debian-kernel-handbook": r"\.html$", "cockpit-doc": r"\.html$"},
    "novel": {"r-cran-janeaustenr": r"/Rdata\.rdb$"},
}
"""Packages of each text, and which of their files are read."""
IN_ORDER = ("novel",)
"""Texts whose documents stand as they come; those of the others are shuffled."""
LONGEST, SHORTEST = 200_000, 500
"""Characters: a longer document becomes several, a shorter one none."""

STRINGS, CHARACTERS = 16, 9
"""Types of R's serialised objects: a vector of strings, and one of them."""


def fetch(package: str, folder: Path) -> str:
    """Unpack a package below ``folder``; its version."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", archive, folder / "files"], check=True)
    asked = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True)
    return asked.stdout.strip()


def documents(package: str, pattern: str, folder: Path) -> Iterator[dict[str, str]]:
    """Documents of a package that was unpacked in ``folder``."""
    for path in sorted((folder / "files").rglob("*")):
        name = str(path.relative_to(folder / "files"))
        if path.is_symlink() or not path.is_file() or not re.search(pattern, f"/{name}"):
            continue
        for text in contents(path):
            for part in (text[start : start + LONGEST] for start in range(0, len(text), LONGEST)):
                if len(part) >= SHORTEST:
                    yield {"source": package, "path": name, "text": part}


def contents(path: Path) -> list[str]:
    """The texts of a file: one, or those of a database of R's."""
    data = path.read_bytes()
    if path.suffix == ".rdb":
        return r_texts(data)
    text = (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", "ignore")
    if ".htm" in path.name:
        text = from_html(text)
    elif "man" in path.parts:
        text = from_manual(text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return [re.sub(r"\n(\s*\n){2,}", "\n\n", text).strip()]


def from_html(text: str) -> str:
    """What a browser shows of a page, less its navigation."""
    text = re.sub(r"(?is)<(script|style|nav|head)\b.*?</\1>", " ", text)
    text = re.sub(r"(?i)<(p|br|div|li|h\d|tr|pre)\b[^>]*>", "\n", text)
    return html.unescape(re.sub(r"<[^>]+>", "", text)).replace("¶", "")


def from_manual(text: str) -> str:
    """A manual page without its macros; those of fonts and headings leave their words."""
    text = re.sub(r"(?m)^\.(B|I|BR|IR|RB|RI|BI|IB|SM|SH|SS)\s+", "", text)
    return re.sub(r"(?m)^[.'].*?$|\\f[BIRP]|\\&", "", text).replace("\\-", "-")


def r_texts(data: bytes) -> list[str]:
    """The vectors of strings in a lazy-load database of R's, each as the lines of a text.

    It is one record after another: the length of what follows, zlib, and in that an object in XDR.
    """
    found = []
    while len(data) > 4:
        unzip = zlib.decompressobj()
        lines = r_strings(unzip.decompress(data[4:]))
        data = unzip.unused_data
        if lines:
            found.append("\n".join(lines))
    return found


def r_strings(data: bytes) -> list[str]:
    """A vector of strings that R serialised; empty for another object."""
    at = 14  # "X\n", the version of the format and two of R
    if struct.unpack_from(">i", data, 2) == (3,):
        at += 4 + struct.unpack_from(">i", data, at)[0]  # the name of an encoding
    kind, count = struct.unpack_from(">Bi", data, at + 3)
    if kind != STRINGS:
        return []
    at, lines = at + 8, []
    for _ in range(count):
        kind, length = struct.unpack_from(">Bi", data, at + 3)
        if kind != CHARACTERS:
            return []
        length = max(length, 0)  # −1: not available
        lines.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the texts")
    parser.add_argument("--only", nargs="+", default=list(TEXTS), choices=list(TEXTS), metavar="NAME")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        rows = []
        for package, pattern in TEXTS[name].items():
            with tempfile.TemporaryDirectory() as folder:
                version = fetch(package, Path(folder))
                found = list(documents(package, pattern, Path(folder)))
            characters = sum(len(row["text"]) for row in found)
            print(f"{name:5} {package} {version}: {len(found):,} documents, {characters:,} characters", flush=True)
            rows += found
        if name not in IN_ORDER:
            random.Random(0).shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
