"""What the README and the documentation say is executed, and their tables agree with the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import linattn.convert
from linattn.feature_maps import available, get

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = re.compile(r"<!-- not run: .+ -->")
RUN = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': '__main__'})"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, list[str], bool]]:
    """The code blocks of a page: line before the first, lines, and whether to run it."""
    found, lines, fence = [], page.read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if fence is None and text.startswith("```"):
            fence, indent = number, line.index("`")
        elif fence is not None and text == "```":
            if lines[fence - 1].strip("` ").split(" ")[0] == language:
                before = [other.strip() for other in lines[: fence - 1] if other.strip()][-1:]
                body = [other[indent:] for other in lines[fence : number - 1]]
                found.append((fence, body, not (before and NOT_RUN.fullmatch(before[0]))))
            fence = None
    assert fence is None, f"{name(page)}:{fence}: the block has no end"
    return found


PAGES_WITH_PYTHON = [page for page in PAGES if any(run for *_, run in blocks(page, "python"))]


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=name)
def test_python_examples_run(page: Path, tmp_path: Path) -> None:
    # A page is one program. Its lines keep their numbers, so that a traceback points into the page.
    program = [""] * len(page.read_text(encoding="utf-8").splitlines())
    for start, body, run in blocks(page, "python"):
        compile("\n".join(body), f"{name(page)}:{start}", "exec")
        if run:
            program[start : start + len(body)] = body
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(page)],
        input="\n".join(program),
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_reference_lists_every_name_of_convert() -> None:
    page = (ROOT / "docs" / "api" / "convert.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: linattn\.convert\.(\w+)$", page, re.MULTILINE)) == sorted(linattn.convert.__all__)


def commands() -> list[tuple[str, list[str]]]:
    """Every ``linattn`` command line of the pages: where it stands, and its words up to a redirection."""
    found = []
    for page in PAGES:
        for start, body, _ in blocks(page, "console"):
            for offset, line in enumerate(body, 1):
                words = shlex.split(line)
                if words[:2] == ["$", "linattn"]:
                    stop = next((i for i, word in enumerate(words) if word in ("<", ">", "|")), len(words))
                    found.append((f"{name(page)}:{start + offset}", words[2:stop]))
    return found


@pytest.mark.parametrize(("where", "words"), [pytest.param(*command, id=command[0]) for command in commands()])
def test_command_lines_parse(where: str, words: list[str]) -> None:
    typer = pytest.importorskip("typer")
    from linattn.cli.main import app

    group = typer.main.get_command(app)
    # An unknown command, option or choice raises here; nothing is run.
    group.commands[words[0]].make_context(words[0], words[1:])


def map_table() -> str:
    """The feature maps of the package, as the pages show them."""
    rows = ["| name | properties | paper |", "|---|---|---|"]
    for info in available():
        if get(info.name).__module__.startswith("linattn."):
            flags = [name.replace("_", "-") for name, value in info._asdict().items() if value is True]
            flags = [flag for flag in flags if flag != "causal"] + ["bidirectional only"] * (not info.causal)
            rows.append(f"| `{info.name}` | {', '.join(flags)} | {info.paper} |")
    return "\n".join(rows)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "feature-maps.md"], ids=name)
def test_table_of_maps_is_that_of_the_registry(page: Path) -> None:
    shown = re.search(r"<!-- maps -->\n(.*?)\n?<!-- /maps -->", page.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1] == map_table(), f"the table of {name(page)} should read:\n{map_table()}"
