"""Config tables: which entry a call gets, what a wrong table says, and how sequences are cut."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from linattn.errors import OptionError
from linattn.kernels import linear_attention
from linattn.kernels.triton import config
from linattn.kernels.triton.config import Chip, Config, Key, choose, segment_tokens

CPU = torch.device("cpu")
CALL: dict[str, Any] = {
    "device": CPU,
    "dtype": torch.bfloat16,
    "activation": "given",
    "features": 128,
    "value_dim": 64,
    "head_dim": 128,
    "window": 0,
}
KEY = Key("given", "bfloat16", False, 128, 64, 128)


def table(path: Path, *entries: tuple[dict[str, Any], dict[str, int]], **fields: Any) -> Path:
    found = {"architectures": ["interpreter"], "entries": [{"for": f, "config": c} for f, c in entries]}
    path.write_text(json.dumps(found | fields))
    return path


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No table of the user's, and no answer remembered from another test's file."""
    monkeypatch.delenv("LINATTN_TABLE", raising=False)
    config._config.cache_clear()
    yield
    config._config.cache_clear()


def keys() -> list[Key]:
    sizes = ((16, 64, 128, 512), (16, 64, 256), (16, 64, 128, 256))
    return [Key(*k) for k in itertools.product(*config.KINDS.values(), *sizes)]


def test_shipped_tables_answer_every_call_of_every_chip() -> None:
    named = [name for t in config.shipped() for name in t.architectures]
    assert len(named) == len(set(named))
    for t in config.shipped():
        for key in keys():
            found = config._config(Chip(t.architectures[0], 100, 0), key, None)
            assert max(found.chunk, found.fold_chunk) % min(found.chunk, found.fold_chunk) == 0
            narrow = config._config(Chip(t.architectures[0], 100, 0), key._replace(dtype="bfloat16"), None)
            assert found.chunk <= narrow.chunk, "float32 operands take twice the room"


def test_the_interpreter_crosses_chunks_on_small_sizes() -> None:
    found = choose(**CALL)
    assert (found.chunk, found.fold_chunk) == (16, 16)
    assert segment_tokens(100, 4, found) == 32


def test_programs_follow_the_chip_unless_the_table_says() -> None:
    assert config._config(Chip("sm_90", 78), KEY, None).programs == 156
    assert config._config(Chip("interpreter"), KEY, None).programs == Config().programs


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        (Chip("sm_90", 132, 232448), "sm_90"),
        (Chip("sm_89", 128, 101376), "sm_86"),
        (Chip("sm_999", 1, 200000), "sm_80"),
        (Chip("sm_999", 1, 120000), "sm_86"),
        (Chip("sm_75", 40, 65536), "sm_86"),
        (Chip("gfx999", 1, 65536), "gfx"),
        (Chip("interpreter"), "interpreter"),
    ],
)
def test_a_chip_that_no_table_names_gets_one_that_fits(on: Chip, expected: str) -> None:
    assert config.shipped_for(on).path.stem == expected


@pytest.mark.parametrize(
    ("changes", "chunk"),
    [
        ({}, 32),  # the nearest in size that holds the call
        ({"features": 100, "value_dim": 33}, 32),
        ({"features": 256}, 64),  # larger than the nearest entry: never that one
        ({"features": 512}, 16),
        ({"dtype": torch.float32}, 128),  # an entry that names the dtype comes before one of a nearer size
        ({"dtype": torch.float16}, 128),  # whose products run on float32 operands
        ({"dtype": torch.float32, "window": 8}, 256),  # two conditions come before one
        ({"head_dim": 4}, 32),  # which given features without a window do not read
    ],
)
def test_the_nearest_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, chunk: int) -> None:
    path = table(
        tmp_path / "t.json",
        ({}, {"chunk": 16}),
        ({"features": 256}, {"chunk": 64}),
        ({"features": 128, "value_dim": 64, "head_dim": 128}, {"chunk": 32}),
        ({"dtype": "float32"}, {"chunk": 128}),
        ({"dtype": "float32", "window": True}, {"chunk": 256}),
    )
    monkeypatch.setenv("LINATTN_TABLE", str(path))
    found = choose(**CALL | changes)
    assert found == Config(chunk=chunk)


def test_entries_of_the_user_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "t.json", ({"features": 128, "dtype": "bfloat16"}, {"chunk": 128, "programs": 7}))
    shipped = choose(**CALL)
    monkeypatch.setenv("LINATTN_TABLE", str(path))
    assert choose(**CALL) == Config(chunk=128, programs=7)
    assert choose(**CALL | {"features": 256}) == shipped, "what no entry fits has the shipped config"


def test_a_table_for_another_chip_is_left_aside_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = choose(**CALL)
    monkeypatch.setenv("LINATTN_TABLE", str(table(tmp_path / "t.json", ({}, {"chunk": 128}), architectures=["sm_90"])))
    with caplog.at_level(logging.WARNING, logger="linattn"):
        assert choose(**CALL) == shipped
    assert "sm_90" in caplog.text
    assert "t.json" in caplog.text


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda t: t.pop("architectures"), "architectures is missing"),
        (lambda t: t.update(architectures="sm_90"), "architectures: got"),
        (lambda t: t.update(shared_memory=-1), "shared_memory: got -1"),
        (lambda t: t.update(largest_map=True), "largest_map: got true"),
        (lambda t: t.update(largest_lone_map=-1), "largest_lone_map: got -1"),
        (lambda t: t["entries"][0]["config"].update(dq_slice=48), r"dq_slice: got 48, expected 0, 16"),
        (
            lambda t: t["entries"][0]["config"].update(map_registers="168"),
            r'map_registers: got "168", expected 0, or 32',
        ),
        (lambda t: t.update(entries={}), "entries: got"),
        (lambda t: t["entries"].append(3), r"entries\[1\]: got 3"),
        (lambda t: t["entries"][0].pop("for"), r"entries\[0\].for is missing"),
        (lambda t: t["entries"][0].update(config=[]), r"entries\[0\].config: got"),
        (lambda t: t["entries"][0]["for"].update(heads=3), r"entries\[0\].for.heads: unknown"),
        (lambda t: t["entries"][0]["for"].update(activation="elu"), r'for.activation: got "elu".*"given" or "fused"'),
        (lambda t: t["entries"][0]["for"].update(window=1), r"for.window: got 1, expected false or true"),
        (lambda t: t["entries"][0]["for"].update(features=0), r"for.features: got 0"),
        (lambda t: t["entries"][0]["config"].update(chunks=64), r"config.chunks: unknown"),
        (lambda t: t["entries"][0]["config"].update(chunk=48), r"config.chunk: got 48, expected 16"),
        (lambda t: t["entries"][0]["config"].update(dq_warps=3), r"config.dq_warps: got 3"),
        (lambda t: t["entries"][0]["config"].update(fold_stages=1.5), r"config.fold_stages: got 1.5"),
        (lambda t: t["entries"][0]["config"].update(programs="many"), r'config.programs: got "many"'),
    ],
)
def test_a_wrong_table_names_the_file_and_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, where: str
) -> None:
    path = table(tmp_path / "mine.json", ({}, {"chunk": 64}))
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    monkeypatch.setenv("LINATTN_TABLE", str(path))
    with pytest.raises(OptionError, match=rf"mine\.json: .*{where}"):
        choose(**CALL)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_table_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("LINATTN_TABLE", str(path))
    with pytest.raises(OptionError, match=r"mine\.json: (No such file|not JSON|the table: got \[\])"):
        choose(**CALL)


def test_maps_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "chip", lambda device: Chip("sm_90", 132))
    assert config.fuses(CPU, torch.bfloat16, 1, 64, 128)
    assert not config.fuses(CPU, torch.bfloat16, 1, 64, 129), "padded to 256"
    assert not config.fuses(CPU, torch.bfloat16, 2, 64, 128)
    assert not config.fuses(CPU, torch.float16, 1, 64, 128), "float32 operands take twice the room"
    assert config.fuses(CPU, torch.float16, 1, 64, 64)
    assert config.fuses(CPU, torch.float32, 0, 256, 512), "no weights, nothing to hold"
    assert config.stands_alone(CPU, 1, 128, 128, trained=True)
    assert config.stands_alone(CPU, 2, 64, 153, trained=False)
    assert not config.stands_alone(CPU, 2, 64, 153, trained=True), "so does the gradient"
    monkeypatch.setattr(config, "chip", lambda device: Chip("sm_86", 84))
    assert not config.stands_alone(CPU, 1, 64, 64, trained=False), "not for chips it was not made for"


@pytest.mark.parametrize("length", [1, 63, 64, 1000, 131072])
@pytest.mark.parametrize("rows", [1, 16, 100000])
def test_segments_are_whole_chunks(length: int, rows: int) -> None:
    c = Config(chunk=32, fold_chunk=128, programs=256, shortest=200)
    tokens = segment_tokens(length, rows, c)
    assert tokens % 128 == 0
    assert tokens >= 200
    assert -(-length // tokens) <= max(1, 256 // rows)


def test_deterministic_segments_know_neither_batch_nor_length() -> None:
    c = Config(fixed=300)
    torch.use_deterministic_algorithms(True)
    try:
        found = {segment_tokens(length, rows, c) for length in (5, 700, 10**6) for rows in (1, 64, 10**5)}
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == {320}


def test_deterministic_results_do_not_depend_on_the_batch() -> None:
    q, k, v = torch.randn(3, 4, 100, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k = q.softmax(-1), k.softmax(-1)

    def first_of(rows: int) -> torch.Tensor:
        return linear_attention(q[:rows], k[:rows], v[:rows], impl="triton").out[0]

    with config.using(Config(chunk=16, fold_chunk=16, programs=16, shortest=32, fixed=32)) as asked:
        assert not torch.equal(first_of(1), first_of(4)), "other segments round differently, or this shows nothing"
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.equal(first_of(1), first_of(4))
        finally:
            torch.use_deterministic_algorithms(False)
    assert set(asked) == {Key("given", "float32", False, 16, 16, 16)}


def test_compiled_graphs_hold_the_config_as_a_constant() -> None:
    compiled = torch.compile(
        lambda x: x * choose(x.device, x.dtype, "softmax", x.shape[-1], x.shape[-1], x.shape[-1], 4).chunk,
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    for width in (3, 5, 20):
        assert torch.equal(compiled(torch.ones(2, width)), torch.full((2, width), 16.0))


def test_importing_it_asks_no_gpu() -> None:
    code = """
import torch
def asked(*a, **k): raise RuntimeError("a GPU was asked")
for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "_lazy_init"):
    setattr(torch.cuda, name, asked)
import linattn.kernels.triton.config
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
