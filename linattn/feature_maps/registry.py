"""Feature maps by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch

from linattn.errors import FeatureMapError
from linattn.feature_maps.base import FeatureMap

_MAPS: dict[str, type[FeatureMap]] = {}
_COMMON = frozenset({"self", "head_dim", "num_heads", "num_kv_heads", "scale", "device", "dtype"})

MapClass = TypeVar("MapClass", bound=type[FeatureMap])


class MapInfo(NamedTuple):
    """Declared properties of one registered feature map; see the attributes of :class:`FeatureMap`."""

    name: str
    positive: bool
    random: bool
    unbiased: bool
    log_scaled: bool
    learned: bool
    positional: bool
    causal: bool
    paper: str


class MapTable(list[MapInfo]):
    """A list of :class:`MapInfo` that prints as a table."""

    def __repr__(self) -> str:
        rows = [[field.replace("_", " ") for field in MapInfo._fields]]
        rows += [["yes" if cell is True else "" if cell is False else cell for cell in info] for info in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def register(cls: MapClass, *, replace: bool = False) -> MapClass:
    """Make a feature map available by its ``name``; usable as a class decorator.

    Args:
        cls: a :class:`FeatureMap` subclass with a ``name`` of its own.
        replace: let it take the place of a map already registered under that name.

    Returns:
        ``cls``.

    Raises:
        FeatureMapError: not a FeatureMap class, no name, or the name is taken.

    Example:
        >>> from linattn.feature_maps import ELU, available, register
        >>> @register
        ... class Shifted(ELU):
        ...     name = "elu-shifted"
        >>> available()[-1].name
        'elu-shifted'
    """
    if not (isinstance(cls, type) and issubclass(cls, FeatureMap)):
        raise FeatureMapError(f"register: got {cls!r}, expected a subclass of linattn.feature_maps.FeatureMap.")
    name = cls.__dict__.get("name", "")
    if not isinstance(name, str) or not name.strip():
        raise FeatureMapError(f'register: {cls.__name__} has no name of its own; give it a class attribute name = "…".')
    taken = _MAPS.get(name)
    if taken is not None and taken is not cls and not replace:
        raise FeatureMapError(
            f"register: the name {name!r} of {cls.__name__} belongs to {taken.__module__}.{taken.__qualname__}; "
            "choose another, or pass replace=True."
        )
    _MAPS[name] = cls
    return cls


def available() -> MapTable:
    """All registered maps and their declared properties, in order of registration."""
    return MapTable(MapInfo(**{field: getattr(cls, field) for field in MapInfo._fields}) for cls in _MAPS.values())


def get(name: str) -> type[FeatureMap]:
    """The class registered as ``name``.

    Raises:
        FeatureMapError: unknown name; the message lists close matches.
    """
    if name in _MAPS:
        return _MAPS[name]
    raise FeatureMapError(f"Unknown feature map {name!r}. {_suggest(str(name), _MAPS)}")


def make(
    feature_map: str | type[FeatureMap] | FeatureMap,
    head_dim: int,
    *,
    num_heads: int = 1,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> FeatureMap:
    """A feature map for the given heads.

    Args:
        feature_map: a registered name, a class, or an instance (returned as it is, once its sizes fit; ``device`` and
            ``dtype`` move it).
        head_dim: size D of one query or key head.
        num_heads: query heads H. num_kv_heads: key/value heads Hkv, default H.
        scale: the softmax scale the map stands in for, default ``head_dim ** -0.5``.
        device, dtype: of parameters.
        options: the map's own options.

    Raises:
        FeatureMapError: unknown name, an option the map does not take, or an instance built for other heads.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if isinstance(feature_map, FeatureMap):
        return _fitted(feature_map, head_dim, num_heads, num_kv_heads, scale, options).to(device=device, dtype=dtype)
    if isinstance(feature_map, type) and issubclass(feature_map, FeatureMap):
        cls = feature_map
    elif isinstance(feature_map, str):
        cls = get(feature_map)
    else:
        raise FeatureMapError(f"feature_map: got {feature_map!r}, expected a name, a FeatureMap class or an instance.")
    taken = option_names(cls)
    for option in options:
        if option not in taken:
            raise FeatureMapError(
                f"{cls.name or cls.__name__}: no option {option!r}. {_suggest(option, taken, 'It takes no options.')}"
            )
    return cls(
        head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        scale=scale,
        device=device,
        dtype=dtype,
        **options,
    )


def option_names(cls: type[FeatureMap]) -> tuple[str, ...]:
    """Names of the options ``cls`` takes beyond the head sizes, scale, device and dtype."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in base.__dict__:
            continue
        parameters = inspect.signature(base.__dict__["__init__"]).parameters.values()
        named = (p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        names.update(dict.fromkeys(name for name in named if name not in _COMMON))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(names)


def _fitted(
    feature_map: FeatureMap,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None,
    options: dict[str, Any],
) -> FeatureMap:
    label = type(feature_map).__name__
    if options:
        raise FeatureMapError(
            f"Options {sorted(options)} came with a {label} instance; set them when building it, or pass its name."
        )
    built = (feature_map.head_dim, feature_map.num_heads, feature_map.num_kv_heads)
    if built != (head_dim, num_heads, num_kv_heads):
        raise FeatureMapError(
            f"The {label} instance was built for (head_dim, num_heads, num_kv_heads) = {built}, but the attention has "
            f"{(head_dim, num_heads, num_kv_heads)}; build it for these, or pass its name."
        )
    if scale is not None and scale != feature_map.scale:
        raise FeatureMapError(
            f"The {label} instance stands in for scale={feature_map.scale}, but the attention has scale={scale}; "
            "build it with that scale, or pass its name."
        )
    return feature_map


def _suggest(wrong: str, known: Iterable[str], none: str = "") -> str:
    known = list(known)
    if not known:
        return none
    close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}Available: {', '.join(known)}."
