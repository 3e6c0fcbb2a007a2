"""The package as a whole: what importing it costs, which room may import which, what it promises by name."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import linattn

PACKAGE = Path(linattn.__file__).parent

GROUND = {"errors", "state"}
TENSORS = GROUND | {"kernels", "feature_maps"}
MODELS = TENSORS | {"_heads", "_lazy", "_modes", "_version", "attention", "convert", "scores"}
MAY_IMPORT = {
    "_heads": set(),
    "_lazy": set(),
    "_modes": set(),
    "_version": set(),
    "errors": set(),
    "state": {"errors"},
    "kernels": GROUND,
    "feature_maps": GROUND | {"kernels"},
    "scores": GROUND | {"kernels"},
    "attention": TENSORS,
    "diagnostics": TENSORS,
    "distributed": TENSORS,
    "testing": TENSORS | {"attention"},
    "convert": MODELS - {"convert"},
    "distill": MODELS,
    "audit": MODELS,
    "export": MODELS,
    "cli": MODELS | {"distill", "audit", "export", "diagnostics"},
}
"""Which rooms a room may import, itself aside. The package's ``__init__`` imports lazily and is imported by no room."""

HEAVY = {"accelerate", "datasets", "gguf", "matplotlib", "peft", "rich", "transformers", "triton", "typer"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path) -> set[str]:
    """Every linattn module that a file imports, at its top or inside a function."""
    package = ".".join(["linattn", *path.relative_to(PACKAGE).parent.parts])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"linattn.{alias.name}" for alias in node.names} if name == "linattn" else {name}
    return {name for name in found if name.partition(".")[0] == "linattn"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    here = parts[0]
    assert here in MAY_IMPORT, f"a new room, {here}: say in MAY_IMPORT what it stands on"
    forbidden = {name for name in imported_modules(path) if room(name) not in MAY_IMPORT[here] | {here}}
    assert not forbidden, f"{here} may import {sorted(MAY_IMPORT[here])} only"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import linattn",
        "import linattn.kernels, linattn.feature_maps; linattn.KernelAttention",
    ],
)
def test_import_is_cheap_and_silent(statement: str) -> None:
    # torch goes first: what it imports by itself is not ours to count.
    found = run_python(
        f"""
import os, sys, torch
touched = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *a, name=name, **k: touched.append(name))
modules, environ = set(sys.modules), dict(os.environ)
import linattn
{statement}
new = {{m.partition(".")[0] for m in set(sys.modules) - modules}}
print(sorted(new & {HEAVY!r}), touched, dict(os.environ) == environ)
"""
    )
    assert found == "[] [] True"


@pytest.mark.parametrize("name", ["linattn.convert", "linattn.audit"])
def test_names_that_are_imported_when_used_are_listed_and_unknown_ones_refused(name: str) -> None:
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    assert package._HOME.keys() <= set(package.__all__)
    with pytest.raises(AttributeError, match=f"'{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_version_has_one_source() -> None:
    assert linattn.__version__ == importlib.import_module("linattn._version").__version__
    try:
        installed = importlib.metadata.version("linattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("linattn itself is not installed, only on the path")
    assert installed == linattn.__version__


MODULES = ["linattn", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "linattn."))]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name and missing.name.partition(".")[0] in HEAVY:
            pytest.skip(f"needs the package {missing.name}")
        raise
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    for public in names:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"
