"""Which tile sizes, warps and stages the kernels run with: JSON tables, one for each kind of chip, in ``tables``.

A table names ``architectures``, the ``shared_memory`` in bytes that its configs fit into, the ``largest_map`` that is
fastest inside them, the ``largest_pointwise`` memory beside which a map without projections is, the
``largest_lone_map`` that a kernel of its own holds, and ``entries``. An entry has a ``config``
(fields of :class:`Config`; what it leaves out is the default) and, under ``for``, the calls it is meant for:

    activation   "given" features, "fused" into the kernels, or computed with log-scales by a "lone" kernel before them
    dtype        "bfloat16" or "float32": the operands of the products, float32 for float16 inputs too
    window       true or false
    features, value_dim, head_dim        at most so many

What ``for`` leaves out may be anything. Of the entries that fit a call the one is taken that names the most of
activation, dtype and window; among equals the one that is nearest in size, counted in doublings; then the first.

Entries of the table at the path ``LINATTN_TABLE`` come before all shipped ones. A chip that no shipped table names has
the table with the most shared memory that its own can hold.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from linattn.errors import OptionError

logger = logging.getLogger("linattn")

TABLES = Path(__file__).parent / "tables"
INTERPRETER = "interpreter"
"""What Triton's interpreter has for an architecture."""


class Config(NamedTuple):
    """Tuning parameters of one call's launches.

    Attributes:
        chunk: tokens of a chunk in the forward pass and in dq. fold_chunk: in the segment sums.
        dkv_chunk: in dkv; 0 for as many as chunk. near_chunk: in the window's kernels; 0 for as many, at most 64.
        forward_slice, fold_slice: value columns of a program in the forward pass and the segment sums; dq_slice: given
            features of one in dq; dkv_slice: given features or value columns of one in dkv, which then runs once for
            the features' gradient and once for the values'; 0 for all.
        near_registers, near_dkv_registers, map_registers: of a thread, at most, so that more programs
            run side by side; 0 for as many as the compiler takes.
        programs: programs that fill the device; long sequences are cut into segments until there are as many. A table
            that leaves it out has two for each multiprocessor.
        shortest: tokens of the shortest segment worth its memory.
        fixed: tokens of a segment under ``torch.use_deterministic_algorithms``.
    """

    chunk: int = 64
    fold_chunk: int = 64
    dkv_chunk: int = 0
    near_chunk: int = 0
    forward_warps: int = 4
    forward_stages: int = 2
    fold_warps: int = 4
    fold_stages: int = 2
    dq_warps: int = 8
    dq_stages: int = 1
    dkv_warps: int = 8
    dkv_stages: int = 1
    near_warps: int = 4
    near_stages: int = 2
    near_dkv_stages: int = 2
    map_stages: int = 1
    forward_slice: int = 0
    fold_slice: int = 0
    dq_slice: int = 0
    dkv_slice: int = 0
    near_registers: int = 0
    near_dkv_registers: int = 0
    map_registers: int = 0
    programs: int = 256
    shortest: int = 256
    fixed: int = 512


class Key(NamedTuple):
    """What a table is asked: the kind of a call, and its sizes rounded up to powers of two."""

    activation: str
    dtype: str
    window: bool
    features: int
    value_dim: int
    head_dim: int


class Entry(NamedTuple):
    """One line of a table."""

    conditions: dict[str, Any]
    config: dict[str, int]

    def fits(self, key: Key) -> bool:
        return all(
            getattr(key, name) <= value if name in LARGEST else getattr(key, name) == value
            for name, value in self.conditions.items()
        )

    def rank(self, key: Key) -> tuple[int, float]:
        """The lower, the nearer to ``key``, which it fits."""
        named = sum(name in KINDS for name in self.conditions)
        sizes = (self.conditions.get(name, largest) / getattr(key, name) for name, largest in LARGEST.items())
        return -named, sum(map(math.log2, sizes))


class Table(NamedTuple):
    """A checked table.

    Attributes:
        path: where it came from. architectures: that it is for.
        shared_memory: bytes that its configs fit into. largest_map: numbers of a map's bfloat16 projections, padded,
            that fit beside them. largest_lone_map: numbers that fit a kernel of the map alone.
        largest_pointwise: features times value columns beside which a map without projections is fused.
    """

    path: Path
    architectures: list[str]
    shared_memory: int
    largest_map: int
    largest_lone_map: int
    largest_pointwise: int
    entries: list[Entry]

    def find(self, key: Key) -> dict[str, int] | None:
        """The fields that the entry nearest to ``key`` sets, or None if none fits."""
        fitting = [entry for entry in self.entries if entry.fits(key)]
        return min(fitting, key=lambda entry: entry.rank(key)).config if fitting else None


class Chip(NamedTuple):
    """What a table is chosen by. ``shared_memory``: bytes that one program may have."""

    architecture: str
    multiprocessors: int = 0
    shared_memory: int = 0


KINDS: dict[str, tuple[Any, ...]] = {
    "activation": ("given", "fused", "lone"),
    "dtype": ("bfloat16", "float32"),
    "window": (False, True),
}
LARGEST = {"features": 512, "value_dim": 256, "head_dim": 256}
"""Sizes a table distinguishes, and the greatest that the kernels take."""


# ------------------------------------------------------------------------------------------------------- choosing


def choose(
    device: torch.device,
    dtype: torch.dtype,
    activation: str,
    features: int,
    value_dim: int,
    head_dim: int,
    window: int,
) -> Config:
    """The config of a call: from the user's table if an entry fits, else from the shipped one.

    Args:
        device: of the inputs; asked once for its properties. dtype: of the inputs.
        activation: of the map as the kernels compute it; ``"given"`` where they do not, ``"lone"`` where that leaves
            them log-scales to read.
        features: F, 0 without a far branch. value_dim, head_dim: V and D. window: tokens attended exactly.

    Raises:
        OptionError: the table at ``LINATTN_TABLE`` is missing or wrong; the message names the file and the field.
    """
    given = activation == "given"
    return _answer(
        device,
        activation if activation in ("given", "lone") else "fused",
        "bfloat16" if dtype == torch.bfloat16 else "float32",
        True if window > 0 else False,  # noqa: SIM210 (a symbolic size becomes a constant here)
        _power(features),
        _power(value_dim),
        _power(features if given and not window > 0 else head_dim),  # nothing but the features is read then
    )


def _power(size: int) -> int:
    """The power of two, at least 16, that holds ``size``; of a symbolic size it asks nothing but the range."""
    power = 16
    while power < size:
        power *= 2
    return power


def _answer(
    device: torch.device, activation: str, dtype: str, window: bool, features: int, value_dim: int, head_dim: int
) -> Config:
    key = Key(activation, dtype, window, features, value_dim, head_dim)
    forced = _forced.get()
    if forced is not None:
        forced.asked.append(key)
        return forced.config
    return _config(chip(device), key, os.environ.get("LINATTN_TABLE") or None)


# A compiled graph holds the answer as a constant. torch.compiler.assume_constant_result marks functions in the same
# way, and imports the whole compiler to do so.
_answer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fuses(device: torch.device, dtype: torch.dtype, parts: int, head_dim: int, columns: int) -> bool:
    """Whether the chip holds the projections ``[parts, head_dim, columns]`` of one head beside the rest.

    ``parts`` is 0 for a map without weights. Larger maps are computed before the kernels. float32 operands take twice
    the room.
    """
    size = parts * _power(head_dim) * _power(columns)
    return size * (1 if dtype == torch.bfloat16 else 2) <= _largest_maps(device)[0]


def stands_alone(device: torch.device, parts: int, head_dim: int, columns: int, trained: bool) -> bool:
    """Whether a kernel of the map alone holds one head's projections, and if ``trained`` their gradient."""
    size = parts * _power(head_dim) * _power(columns)
    return size * (2 if trained else 1) <= _largest_maps(device)[1]


def fuses_pointwise(device: torch.device, dtype: torch.dtype, features: int, value_dim: int) -> bool:
    """Whether a map without projections is faster inside the kernels than in one before them."""
    return dtype != torch.bfloat16 or _power(features) * _power(value_dim) <= _largest_maps(device)[2]


def _largest_maps(device: torch.device) -> tuple[int, int, int]:
    table = shipped_for(chip(device))
    return table.largest_map, table.largest_lone_map, table.largest_pointwise


_largest_maps._dynamo_marked_constant = True  # type: ignore[attr-defined]


def segment_tokens(length: int, rows: int, c: Config) -> int:
    """Tokens of a segment, whole chunks, for sequences of ``length`` and ``rows`` of them times heads.

    Under ``torch.use_deterministic_algorithms`` neither counts: a sequence is cut, and so its sums are rounded, in the
    same way whatever shares its batch.
    """
    if torch.are_deterministic_algorithms_enabled():
        tokens = c.fixed
    else:
        wanted = max(1, c.programs // max(rows, 1))
        tokens = max(-(-length // wanted), c.shortest)
    unit = max(c.chunk, c.fold_chunk, c.dkv_chunk, c.near_chunk)
    return -(-tokens // unit) * unit


class Forced(NamedTuple):
    """A config that stands in for the tables, and what they were asked meanwhile."""

    config: Config
    asked: list[Key]


_forced: contextvars.ContextVar[Forced | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def using(config: Config) -> Iterator[list[Key]]:
    """Every call inside runs with ``config``; yields the list of what the tables would have been asked."""
    asked: list[Key] = []
    token = _forced.set(Forced(config, asked))
    try:
        yield asked
    finally:
        _forced.reset(token)


@functools.cache
def chip(device: torch.device) -> Chip:
    """The chip behind ``device``."""
    if device.type != "cuda":
        return Chip(INTERPRETER)
    found: Any = torch.cuda.get_device_properties(device)
    name = found.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    shared = getattr(found, "shared_memory_per_block_optin", 0) or getattr(found, "shared_memory_per_block", 0)
    return Chip(name, found.multi_processor_count, shared)


@functools.lru_cache(maxsize=1024)
def _config(on: Chip, key: Key, users: str | None) -> Config:
    found = None
    if users is not None:
        table = load(Path(users))
        if on.architecture in table.architectures:
            found = table.find(key)
        else:
            logger.warning(
                "linattn: LINATTN_TABLE=%s is for %s, not for %s: the shipped table is used",
                users,
                ", ".join(table.architectures),
                on.architecture,
            )
    if found is None:
        found = shipped_for(on).find(key)
    if found is None:  # every shipped table ends in an entry without conditions
        raise RuntimeError(f"no entry for {key} on {on.architecture}")
    programs = {"programs": 2 * on.multiprocessors} if on.multiprocessors else {}
    return Config(**(programs | found))


@functools.cache
def shipped_for(on: Chip) -> Table:
    """The shipped table that names the chip, or the one of its maker with the most shared memory that it can hold."""
    tables = shipped()
    for table in tables:
        if on.architecture in table.architectures:
            return table
    related = [t for t in tables if t.architectures[0][:2] == on.architecture[:2]] or tables
    smallest = min(related, key=lambda t: t.shared_memory)
    holding = [t for t in related if t.shared_memory <= on.shared_memory]
    return max(holding, key=lambda t: t.shared_memory, default=smallest)


@functools.cache
def shipped() -> list[Table]:
    """All tables of the package."""
    return [load(path) for path in sorted(TABLES.glob("*.json"))]


# ------------------------------------------------------------------------------------------------------- reading


def load(path: Path) -> Table:
    """Read and check a table.

    Raises:
        OptionError: no such file, no JSON, or a field that is missing, unknown or out of its domain; named.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(
            f"{path}: {error.strerror}; LINATTN_TABLE names a table that `linattn tune` wrote."
        ) from error
    except ValueError as error:
        raise OptionError(f"{path}: not JSON ({error}).") from error
    _check(path, "the table", isinstance(found, dict), found, "an object")
    names = _required(path, "", found, "architectures")
    good = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    _check(path, "architectures", good, names, 'a list of names, such as ["sm_90"]')
    shared = found.get("shared_memory", 0)
    _check(path, "shared_memory", _is_int(shared) and shared >= 0, shared, "a number of bytes")
    maps = {"largest_map": 0, "largest_lone_map": 0, "largest_pointwise": 1 << 20}
    maps = {name: found.get(name, size) for name, size in maps.items()}
    for name, size in maps.items():
        _check(path, name, _is_int(size) and size >= 0, size, "an integer ≥ 0")
    entries = _required(path, "", found, "entries")
    _check(path, "entries", isinstance(entries, list), entries, "a list")
    checked = [_entry(path, f"entries[{i}]", entry) for i, entry in enumerate(entries)]
    return Table(path, names, shared, entries=checked, **maps)


def _entry(path: Path, where: str, found: Any) -> Entry:
    _check(path, where, isinstance(found, dict), found, "an object")
    conditions, config = (_required(path, f"{where}.", found, name) for name in ("for", "config"))
    for name, values in (("for", conditions), ("config", config)):
        _check(path, f"{where}.{name}", isinstance(values, dict), values, "an object")
    for name, value in conditions.items():
        at = f"{where}.for.{name}"
        _known(path, at, name, (*KINDS, *LARGEST))
        if name in KINDS:
            allowed = KINDS[name]
            good = value in allowed and type(value) is type(allowed[0])
            _check(path, at, good, value, " or ".join(json.dumps(each) for each in allowed))
        else:
            _check(path, at, _is_int(value) and value >= 1, value, "an integer ≥ 1")
    for name, value in config.items():
        at = f"{where}.config.{name}"
        _known(path, at, name, Config._fields)
        if name.endswith("chunk"):
            good = value in (16, 32, 64, 128, 256) or (value == 0 and name in ("dkv_chunk", "near_chunk"))
            expected = "16, 32, 64, 128 or 256"
        elif name.endswith("_slice"):
            good, expected = value in (0, 16, 32, 64, 128), "0, 16, 32, 64 or 128"
        elif name.endswith("_registers"):
            good, expected = value == 0 or 32 <= value <= 255 if _is_int(value) else False, "0, or 32 to 255"
        elif name.endswith("_warps"):
            good, expected = value in (1, 2, 4, 8, 16, 32), "1, 2, 4, 8, 16 or 32"
        else:
            good, expected = value >= 1 if _is_int(value) else False, "an integer ≥ 1"
        _check(path, at, _is_int(value) and good, value, expected)
    return Entry(conditions, config)


def _required(path: Path, where: str, found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise OptionError(f"{path}: {where}{name} is missing.")
    return found[name]


def _known(path: Path, where: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise OptionError(f"{path}: {where}: unknown; expected one of {', '.join(names)}.")


def _check(path: Path, where: str, good: Any, value: Any, expected: str) -> None:
    if not good:
        raise OptionError(f"{path}: {where}: got {json.dumps(value)[:80]}, expected {expected}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
