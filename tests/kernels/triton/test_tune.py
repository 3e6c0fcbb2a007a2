"""The search for configs: what is wrong or does not run is never timed, and what is found can be used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from linattn.errors import OptionError, UnsupportedError
from linattn.feature_maps import make
from linattn.kernels.triton import backend, config, tune
from linattn.kernels.triton.config import Chip, Config
from linattn.kernels.triton.tune import BOTH, FORWARD, Problem, Step, Trial

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not backend.INTERPRETED, reason="needs TRITON_INTERPRET=1 where there is a GPU"
)

TINY = Problem(1, 20, 1, 1, 4, 4, dtype=torch.float16)
HEDGEHOG = functools.partial(make, "hedgehog", 4)
Search = Callable[[Problem, Config, Chip], list[Step]]


def search(*candidates: dict[str, int]) -> Search:
    return lambda problem, start, on: [Step("chunk", BOTH, candidates)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Stands in for the clock: larger chunks are faster. What was timed, in order."""
    found: list[Config] = []

    def ms(call: Any, candidate: Config, what: str) -> float:
        found.append(candidate)
        return 100.0 / candidate.chunk

    monkeypatch.setattr(tune, "_ms", ms)
    monkeypatch.delenv("LINATTN_TABLE", raising=False)
    return found


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any], Any]], None]:
    """Makes the kernels do something else where the chunk is the one given."""

    def install(chunk: int, change: Callable[[Any], Any]) -> None:
        real = backend.attend

        def attend(call: Any) -> Any:
            out, state = real(call)
            forced = config._forced.get()
            return (change(out) if forced is not None and forced.config.chunk == chunk else out), state

        monkeypatch.setattr(backend, "attend", attend)

    return install


def test_a_wrong_candidate_is_recorded_and_never_timed(timed: list[Config], sabotage: Any) -> None:
    sabotage(64, lambda out: out * 1.02)
    found = tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32}, {"chunk": 64}))
    start, kept, wrong = found.trials
    assert (start.changes, start.reason) == ({}, None)
    assert (kept.changes, kept.kept, kept.reason) == ({"chunk": 32}, True, None)
    assert kept.worst is not None
    assert kept.worst <= 1
    assert (wrong.changes, wrong.kept, wrong.ms) == ({"chunk": 64}, False, None)
    assert wrong.reason is not None
    assert wrong.reason.startswith("wrong: ")
    assert {c.chunk for c in timed} == {16, 32}
    assert found.best == found.start._replace(chunk=32)


def test_a_gradient_alone_can_be_wrong(timed: list[Config], sabotage: Any) -> None:
    sabotage(32, lambda out: out + (out - out.detach()) * 0.02)
    found = tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32}))
    assert str(found.trials[1].reason).startswith("wrong: gradient of ")
    assert found.best == found.start


def test_nan_is_wrong(timed: list[Config], sabotage: Any) -> None:
    sabotage(32, lambda out: out * torch.nan)
    assert "wrong" in str(tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32})).trials[1].reason)


def test_what_does_not_run_is_recorded_and_the_search_goes_on(timed: list[Config], sabotage: Any) -> None:
    def fail(out: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nmore")

    sabotage(16, fail)  # the shipped config itself
    seen: list[tuple[Trial, int]] = []
    found = tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32}), watch=lambda *trial: seen.append(trial))
    assert found.trials[0].reason == "RuntimeError: out of resource: shared memory"
    assert found.best.chunk == 32
    assert found.ms[BOTH] == (None, 100 / 32)
    assert [trial for trial, _ in seen] == found.trials
    assert {total for _, total in seen} == {2}

    sabotage(32, fail)
    with pytest.raises(UnsupportedError, match="no candidate runs: RuntimeError: out of resource"):
        tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32}))


def test_a_slower_candidate_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_ms", lambda call, candidate, what: 10.0 if candidate.chunk == 16 else 9.95)
    found = tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32}))
    assert not found.trials[1].kept, "less than one per cent"
    assert found.best == found.start


def test_the_table_is_used(timed: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    found = tune.tune(TINY, HEDGEHOG, search=search({"chunk": 32}))
    tune.save(found, path)
    monkeypatch.setenv("LINATTN_TABLE", str(path))
    asked = (torch.device("cpu"), torch.float16, "softmax", 8, 4, 4, 0)
    assert config.choose(*asked) == found.best
    assert config.choose(*asked[:-1], 5) != found.best, "tuned without a window"

    entry = json.loads(path.read_text())["entries"][0]
    evidence = entry["evidence"]
    assert {"device", "versions", "date", "problem", "start", "ms", "trials"} <= set(evidence)
    assert [t.get("ms") for t in evidence["trials"]] == [100 / 16, 100 / 32]

    tune.save(found._replace(best=found.best._replace(chunk=64)), path)
    tune.save(found._replace(key=found.key._replace(window=True)), path)
    entries = json.loads(path.read_text())["entries"]
    assert [(e["for"]["window"], e["config"]["chunk"]) for e in entries] == [(False, 64), (True, 32)]
    assert config.choose(*asked).chunk == 64

    path.write_text(json.dumps({"architectures": ["sm_90"], "entries": []}))
    with pytest.raises(OptionError, match=r"table\.json: a table for sm_90"):
        tune.save(found, path)


def test_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tune.tune(Problem(1, 20, 1, 1, 4, 4, features=8, dtype=torch.float16), search=search())
    assert all(before > 0 and after > 0 for before, after in found.ms.values() if before is not None)
    assert set(found.ms) == {FORWARD, BOTH}


@pytest.mark.parametrize("name", ["hedgehog", "exp", "favor+", "given", "none"])
def test_heads_can_be_compared_alone(name: str) -> None:
    problem = Problem(
        2, 30, 6, 3, 4, 5, features=7 if name == "given" else 0, window=9, sinks=2, decay=True, dtype=torch.float64
    )
    make_map = functools.partial(make, name, 4) if name not in ("given", "none") else None
    if name == "none":
        problem = Problem(2, 30, 6, 3, 4, 5, window=9, sinks=2, dtype=torch.float64)
    whole = tune._draw(problem, make_map, torch.device("cpu"))
    expected = tune._Call(problem, whole.tensors, whole.dout, whole.phi, "chunked").run(BOTH)
    for group in range(3):
        part = whole.part(group, torch.float64, "reference", make_map).run(BOTH)
        assert set(part) == set(expected)
        for label, t in part.items():
            dim = 0 if "query." in label or "key." in label else 2
            same = tune._of_group(expected[label], dim, problem, group)
            torch.testing.assert_close(t.to(same.dtype), same)  # decays stay float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [100, 131072])
@pytest.mark.parametrize("window", [0, 128])
def test_shipped_search(dtype: torch.dtype, length: int, window: int, tmp_path: Path) -> None:
    problem = Problem(1, length, 16, 16, 64, 64, window=window, dtype=dtype)
    start = Config()
    plan = tune.steps(problem, start, Chip("sm_90", 132, 232448))
    near = ["near", "near registers", "near dkv"] if window else []
    assert [step.name for step in plan] == ["chunk", "segments", "forward", "fold", "dq", "dkv", *near, "map"]
    counts = [c["programs"] // 16 for c in plan[1].candidates]
    assert counts == [1] if length == 100 else counts[:3] == [1, 2, 4]
    for step in plan:
        path = tmp_path / f"{step.name}.json"
        entries = [{"for": {}, "config": start._replace(**c)._asdict()} for c in step.candidates]
        path.write_text(json.dumps({"architectures": ["sm_90"], "entries": entries}))
        assert len({tuple(e.config.values()) for e in config.load(path).entries}) == len(step.candidates)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="tune: torch sees no GPU"):
        tune.tune(TINY, HEDGEHOG)


def test_the_interpreter_has_no_bfloat16() -> None:
    with pytest.raises(UnsupportedError, match="bfloat16"):
        tune.tune(Problem(1, 20, 1, 1, 4, 4), HEDGEHOG)


def test_command(timed: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typer_testing = pytest.importorskip("typer.testing", reason="needs the package typer")
    from linattn.cli.main import app

    monkeypatch.setattr(tune, "steps", search({"chunk": 32}))
    path = tmp_path / "table.json"
    words = ["tune", "--heads", "1", "--head-dim", "4", "--length", "20", "--dtype", "float16", "--out", str(path)]
    done = typer_testing.CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "kept  chunk: chunk 32: 3.125 ms" in done.stdout
    assert f"LINATTN_TABLE={path}" in done.stdout
    assert "start: as shipped: 6.250 ms" in done.stderr
    assert config.load(path).entries[0].config["chunk"] == 32

    for wrong in (["--heads", "3", "--kv-heads", "2"], ["--features", "none"]):
        assert typer_testing.CliRunner().invoke(app, [*words, *wrong]).exit_code == 2
