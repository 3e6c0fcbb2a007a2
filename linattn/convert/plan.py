"""What a conversion will do, layer by layer: printable, editable, saved beside the weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from linattn.errors import CheckpointError, ConversionError, LinattnError, OptionError
from linattn.feature_maps import FeatureMap, SequenceMap, get, make
from linattn.feature_maps.registry import option_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
KINDS = ("convert", "keep", "bound")
T = TypeVar("T")
DECAYS = (None, "fixed", "data")
LINEAR = "is linear already: its memory is of constant size"

MapSpec = str | type[FeatureMap] | Callable[["LayerPlan"], FeatureMap] | None


@dataclasses.dataclass
class LayerPlan:
    """One attention layer of a model and what becomes of it.

    Attributes:
        index: position among the model's attention layers, in module order.
        path: name of the attention module in the model.
        attention: its class.
        kind: ``"convert"``; ``"keep"`` for softmax attention as it was; ``"bound"`` for softmax attention of the last
            ``window`` tokens and the sinks, which counts as kept.
        reason: why it is kept; empty for a converted layer.
        supported: False where conversion is impossible; ``reason`` says why.
        heads, kv_heads, head_dim: sizes H, Hkv, D of its queries and keys.
        scale: its softmax scale.
        causal: False for bidirectional attention.
        feature_map: name of the registered feature map; None in a converted layer: window and sinks, nothing far, as
            in a bound one.
        feature_map_options: options of that map.
        window: tokens attended exactly, the query's own included.
        sinks: first tokens attended exactly by all.
        retained: tokens behind the window attended exactly by each key/value head: the best-scored ones. Whoever edits
            a plan may give some to a bound layer, too.
        recency: what a token's score gains with each position.
        decay: None, ``"fixed"`` (one learned half-life per key/value head) or ``"data"`` (gated by each key).
        per_head: every query head has a state of its own: what else is of a key/value head, its key features, decay,
            retained tokens and their scores, is then of a query head. Window and sinks are held once for all that
            share them.
        native_window: the layer's own sliding window, or None.
        far_rope: False lets the feature map, and the gates, read queries and keys before rotary embedding; window and
            sinks read them after it.
        sink_distance: tokens of rotary distance that sinks behind the window keep at most: a query at position t meets
            them as if it stood at min(t, sink_distance). None: their own distance.
        retained_distance: tokens of rotary distance that retained tokens keep at most: a query further behind one meets
            it as if it were so many tokens away. None: their own distance.
        notes: what changes beyond the attention itself.
    """

    index: int
    path: str
    attention: str
    kind: str
    reason: str = ""
    supported: bool = True
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    scale: float | None = None
    causal: bool = True
    feature_map: str | None = None
    feature_map_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    window: int = 0
    sinks: int = 0
    retained: int = 0
    recency: float = 0.002
    decay: str | None = None
    per_head: bool = False
    native_window: int | None = None
    far_rope: bool = True
    sink_distance: int | None = None
    retained_distance: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def repeats(self) -> int:
        """How often each key/value head of the model comes among the layer's: once, or for each of its query heads."""
        return self.heads // self.kv_heads if self.per_head else 1

    @property
    def state_heads(self) -> int:
        """Heads of its states: Hkv, or H with ``per_head``."""
        return self.kv_heads * self.repeats


@dataclasses.dataclass
class ConversionPlan:
    """Which layers of a model are converted, how, and what stays softmax and why.

    Make one with :func:`plan_model`, print it, edit ``plan.layers[i]`` or call :meth:`keep`, and pass it to
    :func:`~linattn.convert_model`. A converted model carries it in ``model.config.linattn``.
    """

    model_type: str
    layers: list[LayerPlan]

    @property
    def converted(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.kind == "convert"]

    @property
    def kept(self) -> list[LayerPlan]:
        """The layers left softmax, those that are bound to a window among them."""
        return [layer for layer in self.layers if layer.kind != "convert"]

    @property
    def replaced(self) -> list[LayerPlan]:
        """The layers whose attention changes: the converted ones, and those left softmax within a window."""
        return [layer for layer in self.layers if layer.kind != "keep"]

    def keep(
        self, *indices: int, reason: str = "asked for", softmax_window: int | Sequence[int] | None = None
    ) -> ConversionPlan:
        """Leave the layers at ``indices`` softmax; returns the plan.

        Args:
            softmax_window: bounds them to so many tokens and the sinks, as in :func:`plan_model`. A layer that was
                softmax takes the sinks of the converted ones.
        """
        _check_indices("indices", indices, self.layers)
        bounds = _bounds(softmax_window, len(self.layers))
        sinks, distance = self.farthest_sinks
        for index in indices:
            layer = self.layers[index]
            if layer.kind == "keep" and bounds[index] is not None:
                layer.sinks, layer.sink_distance = sinks, distance
            _leave(layer, reason, bounds[index])
        return self

    @property
    def farthest_sinks(self) -> tuple[int, int | None]:
        """``sinks`` and ``sink_distance`` of the converted layers, the most of each."""
        distances = [layer.sink_distance for layer in self.converted if layer.sink_distance is not None]
        return max((layer.sinks for layer in self.converted), default=0), max(distances, default=None)

    def check(self) -> None:
        """Raise unless every entry is complete and its feature map can be built.

        Raises:
            ConversionError: a layer that cannot be converted is marked so, or none is.
            OptionError, FeatureMapError: a field is outside its domain.
        """
        for layer in self.layers:
            if layer.kind not in KINDS:
                raise OptionError(f"{layer.path}: kind={layer.kind!r}, expected one of {', '.join(map(repr, KINDS))}.")
            if layer.kind == "bound" and layer.feature_map is not None:
                raise OptionError(
                    f"{layer.path}: kind='bound' has no far branch for feature_map={layer.feature_map!r}; "
                    f"plan.keep({layer.index}, softmax_window=…) makes such a layer."
                )
            if layer.kind != "keep":
                _check_layer(layer)
        if not self.converted:
            raise ConversionError(f"{self.model_type}: nothing is left to convert.\n{_refusals(self.layers)}")

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "model_type": self.model_type, "layers": [dataclasses.asdict(x) for x in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionPlan:
        """The plan :meth:`to_dict` wrote.

        Raises:
            CheckpointError: ``data`` is not such a plan.
        """
        try:
            if data["format"] != FORMAT:
                raise CheckpointError(f"Plan format {data['format']!r}; this version reads format {FORMAT}.")
            return cls(data["model_type"], [LayerPlan(**layer) for layer in data["layers"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"Not a conversion plan: {error!r}.") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ConversionPlan:
        """Inverse of :meth:`to_json`. Raises :class:`CheckpointError` if ``text`` is not a plan."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"Not a conversion plan: {error}.") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ConversionPlan:
        """Read what :meth:`save` wrote. Raises :class:`CheckpointError` if there is no plan at ``path``."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: no conversion plan there: {error}.") from error

    def __str__(self) -> str:
        header = ("#", "layer", "attention", "heads", "becomes", "window", "sinks", "decay", "why")
        rows = [header]
        for layer in self.layers:
            notes = [*layer.notes, "no rotary embedding in the far branch"] if not layer.far_rope else layer.notes
            if layer.sink_distance is not None:
                notes = [*notes, f"sinks at most {layer.sink_distance} tokens away"]
            if layer.kind != "keep" and layer.retained:
                bound = "" if layer.retained_distance is None else f" at most {layer.retained_distance} tokens away"
                notes = [*notes, f"{layer.retained} retained tokens{bound}"]
            if layer.kind != "keep" and layer.per_head:
                notes = [*notes, "a state per query head"]
            if layer.kind == "bound":
                notes = [f"softmax of the last {layer.window} tokens and {layer.sinks} sinks", *notes]
            why = "; ".join([layer.reason] * bool(layer.reason) + notes)
            heads = f"{layer.heads}/{layer.kv_heads}×{layer.head_dim}" if layer.heads else ""
            how = ("softmax", "", "", "", why)
            if layer.kind != "keep":
                becomes = "softmax" if layer.kind == "bound" else layer.feature_map or "window only"
                how = (becomes, str(layer.window), str(layer.sinks), str(layer.decay or "-"), why)
            rows.append((str(layer.index), layer.path, layer.attention, heads, *how))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        title = f"{self.model_type}: {len(self.converted)} of {len(self.layers)} attention layers converted"
        return "\n".join([title, *lines])


def plan_model(
    model: PreTrainedModel,
    *,
    feature_map: MapSpec = "hedgehog",
    window: int | Sequence[int] = 128,
    sinks: int = 4,
    retained: int | Sequence[int] = 0,
    recency: float = 0.002,
    decay: str | None = None,
    per_head: bool | Sequence[bool] = False,
    far_rope: bool = True,
    sink_distance: int | None = None,
    retained_distance: int | None = None,
    feature_map_options: dict[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    keep_softmax: Iterable[int] = (),
    softmax_window: int | Sequence[int] | None = None,
    native_sliding: str = "keep",
    on_unsupported: str = "error",
) -> ConversionPlan:
    """What :func:`~linattn.convert_model` would do with these arguments, without doing it.

    Args:
        model: a transformers model; it is not changed.
        feature_map: a registered name, a :class:`~linattn.feature_maps.FeatureMap` class, or a factory that is called
            with each layer's plan once, to learn the name and options of the map it returns. None leaves the far branch
            out: a sliding window with sinks, without parameters of its own.
        window: tokens attended exactly; a list has one for each attention layer of the model, in order, kept ones
            included. sinks: first tokens attended exactly by all.
        retained: tokens behind the window that stay attended exactly; a list as of ``window``. Which ones each
            key/value head keeps is told by a :class:`~linattn.scores.TokenScore` of the layer, random until trained.
            Causal attention only.
        recency: added to the score of each later token, so that older ones fade.
        decay: None, ``"fixed"`` or ``"data"``; see :class:`LayerPlan`.
        per_head: True gives every query head a state of its own where grouped ones would share one; a list as of
            ``window``. See :class:`LayerPlan`.
        far_rope: False keeps rotary embedding out of the far branch; see :class:`LayerPlan`. Layers that say they have
            none (``use_rope``) are left at True.
        sink_distance: bounds the rotary distance of sinks, which else grows beyond what a model was trained on; see
            :class:`LayerPlan`. Layers that say they have no rotary embedding are left at None.
        retained_distance: bounds that of retained tokens alike: at least the window, with ``far_rope=False``. Layers
            that retain none, or say they have no rotary embedding, are left at None.
        feature_map_options: options of the feature map. A map that takes a ``seed`` and is given none gets the layer's
            index, so that every layer draws its own.
        layers: indices of the attention layers to convert; default all that can be.
        keep_softmax: indices of the attention layers to leave softmax.
        softmax_window: bounds these to the last so many tokens and the ``sinks``, at ``sink_distance``: their memory
            stops growing, and at most the length the model was trained on, none of these tokens stands at a rotary
            distance it never met. Sequences of so many tokens are attended as before. Layers that cannot be converted,
            or have a sliding window of their own, stay as they are. A list has one for each attention layer, as of
            ``window``.
        native_sliding: ``"keep"`` leaves layers with a sliding window of their own as they are; ``"convert"``
            converts them with the smaller of the two windows.
        on_unsupported: ``"error"`` refuses a model in which a chosen layer cannot be converted; ``"keep"`` leaves
            that layer softmax.

    Raises:
        ConversionError: nothing can be converted, or a layer cannot, or it has no rotary embedding that the far branch
            could do without, or sinks or retained tokens come nearer by; layer, class, reason and remedy are named.
        OptionError: an option is outside its domain.
        FeatureMapError: the feature map is unknown, or refuses its options.
    """
    from linattn.convert.seam import find_attention

    found = list(find_attention(model))
    modules = {layer.index: module for layer, module in found}
    entries = [layer for layer, _ in found]
    windows, pools = _each("window", window, len(entries)), _each("retained", retained, len(entries))
    alone = _each("per_head", per_head, len(entries))
    for each, pool, own in dict.fromkeys(zip(windows, pools, alone, strict=True)) or [(0, 0, False)]:
        _check_options(each, sinks, pool, recency, decay, own, far_rope, sink_distance, native_sliding, on_unsupported)
    widest = max((each for each, pool in zip(windows, pools, strict=True) if pool), default=0)
    _check_retained_distance(retained_distance, widest, max(pools, default=0), far_rope, feature_map is not None)
    bounds = _bounds(softmax_window, len(entries))
    keep_softmax = tuple(keep_softmax)
    chosen = None if layers is None else tuple(layers)
    _check_indices("layers", chosen or (), entries)
    _check_indices("keep_softmax", keep_softmax, entries)
    if chosen is not None and (both := sorted(set(chosen) & set(keep_softmax))):
        raise OptionError(f"layers and keep_softmax both name {both}; a layer is converted or kept.")

    refused = []
    for layer in entries:
        if layer.index in keep_softmax:
            _leave(layer, "asked for", bounds[layer.index])
            if layer.kind == "bound":
                layer.sinks = sinks
                if getattr(modules[layer.index], "use_rope", True):
                    _settle_rope(layer, model, True, sink_distance, None)
        elif chosen is not None and layer.index not in chosen:
            layer.kind, layer.reason = "keep", "not among the layers asked for"
        elif not layer.supported:
            refused.append(layer)
        elif layer.native_window is not None and native_sliding == "keep":
            layer.kind, layer.reason = "keep", f"has a sliding window of its own ({layer.native_window})"
        else:
            layer.retained, layer.recency, layer.per_head = pools[layer.index], recency, alone[layer.index]
            _fill(layer, feature_map, feature_map_options or {}, windows[layer.index], sinks, decay)
            if getattr(modules[layer.index], "use_rope", True):
                _settle_rope(layer, model, far_rope, sink_distance, retained_distance if layer.retained else None)
    plan = ConversionPlan(model.config.model_type, entries)
    # A layer that is linear already is no obstacle to converting the others.
    blocking = [layer for layer in refused if layer.reason != LINEAR]
    if blocking and on_unsupported == "error":
        remedy = "on_unsupported='keep' leaves them as they are, keep_softmax=[…] names them"
        if len(blocking) == len(entries):
            remedy = "no layer of this model can be converted"
        raise ConversionError(
            f"{type(model).__name__} has layers that cannot be converted ({remedy}).\n{_refusals(blocking)}"
        )
    if not plan.converted:
        native = [layer for layer in entries if layer.native_window is not None and layer.supported]
        remedy = " native_sliding='convert' converts layers with a sliding window." if native else ""
        raise ConversionError(f"{type(model).__name__}: nothing is left to convert.{remedy}\n{_refusals(entries)}")
    plan.check()
    return plan


def _fill(
    layer: LayerPlan, feature_map: MapSpec, options: dict[str, Any], window: int, sinks: int, decay: str | None
) -> None:
    """Settle how a layer is converted."""
    layer.kind, layer.reason = "convert", ""
    layer.window, layer.sinks, layer.decay = window, sinks, decay
    layer.feature_map_options = dict(options)
    if feature_map is None or isinstance(feature_map, str):
        layer.feature_map = feature_map
    elif isinstance(feature_map, type) and issubclass(feature_map, FeatureMap):
        layer.feature_map = feature_map.name
    elif callable(feature_map) and not isinstance(feature_map, FeatureMap):
        factory: Any = feature_map
        built = factory(layer)
        if not isinstance(built, FeatureMap):
            raise OptionError(f"feature_map: the factory returned {built!r}, expected a FeatureMap.")
        layer.feature_map, layer.feature_map_options = built.name, built.options() | layer.feature_map_options
    else:
        raise OptionError(
            f"feature_map: got {feature_map!r}, expected a registered name, a FeatureMap class, a factory or None; one "
            "instance cannot serve several layers."
        )
    if layer.native_window is not None:
        layer.window = min(window, layer.native_window)
        instead = "a window" if layer.feature_map is None else "the far branch"
        layer.notes.append(f"its own sliding window of {layer.native_window} gives way to {instead}")
    if layer.feature_map is None:
        return
    if "seed" in option_names(get(layer.feature_map)):
        layer.feature_map_options.setdefault("seed", layer.index)  # layers that draw alike would err alike
    if issubclass(get(layer.feature_map), SequenceMap):
        layer.window = layer.sinks = 0
        layer.notes.append(f"{layer.feature_map} replaces the attention as a whole: no window, no sinks")


def _leave(layer: LayerPlan, reason: str, window: int | None) -> None:
    """Leave a layer softmax, within a window where there is one and the layer can have it."""
    layer.kind, layer.reason = "keep", reason
    if window is not None and layer.supported and layer.native_window is None:
        layer.kind, layer.window = "bound", window
        layer.feature_map, layer.feature_map_options, layer.decay, layer.far_rope = None, {}, None, True
        layer.retained, layer.retained_distance, layer.per_head = 0, None, False


def _settle_rope(
    layer: LayerPlan,
    model: PreTrainedModel,
    far_rope: bool,
    sink_distance: int | None,
    retained_distance: int | None,
) -> None:
    from linattn.convert.rotary import angles_for, embedding_of, rotary_of

    layer.far_rope, layer.sink_distance, layer.retained_distance = far_rope, sink_distance, retained_distance
    module = model.get_submodule(layer.path)
    try:
        if not far_rope:
            embedding_of(module)
        if (asked := angles_for(layer)) is not None:
            embedding_of(module, asked)
            rotary_of(model, layer.path, asked)
    except ConversionError as error:
        raise ConversionError(f"{layer.path}: {error}") from error


def _check_options(
    window: int,
    sinks: int,
    retained: int,
    recency: float,
    decay: str | None,
    per_head: bool,
    far_rope: bool,
    sink_distance: int | None,
    native_sliding: str,
    on_unsupported: str,
) -> None:
    for name, value in (("window", window), ("sinks", sinks), ("retained", retained)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"{name}: got {value!r}, expected an integer ≥ 0.")
    if isinstance(recency, bool) or not isinstance(recency, int | float) or not math.isfinite(recency):
        raise OptionError(f"recency: got {recency!r}, expected a finite number.")
    if decay not in DECAYS:
        raise OptionError(f"decay: got {decay!r}, expected one of {', '.join(map(repr, DECAYS))}.")
    for name, value in (("per_head", per_head), ("far_rope", far_rope)):
        if not isinstance(value, bool):
            raise OptionError(f"{name}: got {value!r}, expected True or False.")
    _check_sink_distance(sink_distance, sinks)
    if native_sliding not in ("keep", "convert"):
        raise OptionError(f"native_sliding: got {native_sliding!r}, expected 'keep' or 'convert'.")
    if on_unsupported not in ("error", "keep"):
        raise OptionError(f"on_unsupported: got {on_unsupported!r}, expected 'error' or 'keep'.")


def _each(argument: str, value: T | Sequence[T], layers: int) -> list[T]:
    """An option of each layer: one value for all of them, or a list."""
    each = list(value) if isinstance(value, Sequence) else [value] * layers
    if len(each) != layers:
        raise OptionError(f"{argument}: got {len(each)} of them, the model has {layers} attention layers.")
    return each


def _bounds(windows: int | Sequence[int] | None, layers: int) -> Sequence[int | None]:
    """``softmax_window`` of each layer."""
    each = _each("softmax_window", windows, layers)
    for window in each:
        unbounded = window is None and windows is None
        if not unbounded and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise OptionError(f"softmax_window: got {window!r}, expected None, an integer ≥ 1 or a list of them.")
    return each


def _check_sink_distance(sink_distance: int | None, sinks: int) -> None:
    if sink_distance is not None:
        if isinstance(sink_distance, bool) or not isinstance(sink_distance, int) or sink_distance < sinks:
            raise OptionError(f"sink_distance: got {sink_distance!r}, expected None or an integer ≥ sinks = {sinks}.")
        if not sinks:
            raise OptionError("sink_distance: bounds the distance of sinks; set sinks > 0, or leave it None.")


def _check_retained_distance(distance: int | None, window: int, retained: int, far_rope: bool, far: bool) -> None:
    if distance is None:
        return
    if isinstance(distance, bool) or not isinstance(distance, int) or distance < window:
        raise OptionError(f"retained_distance: got {distance!r}, expected None or an integer ≥ window = {window}.")
    if not retained:
        raise OptionError(
            "retained_distance: bounds the distance of retained tokens; set retained > 0, or leave it None."
        )
    if far_rope or not far:
        raise OptionError(
            "retained_distance: needs the keys from before rotary embedding, which layers with a feature map and "
            "far_rope=False have; set both, or leave it None."
        )


def _check_indices(argument: str, indices: Iterable[int], layers: list[LayerPlan]) -> None:
    wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(layers)]
    if wrong:
        raise OptionError(f"{argument}: {wrong} are no attention layers of this model; it has 0 … {len(layers) - 1}.")


def _check_layer(layer: LayerPlan) -> None:
    if not layer.supported:
        raise ConversionError(f"The plan converts a layer that cannot be converted.\n{_refusals([layer])}")
    settled = (layer.window, layer.sinks, layer.retained, layer.recency, layer.decay, layer.per_head, layer.far_rope)
    _check_options(*settled, None, "keep", "error")
    far = layer.feature_map is not None
    try:
        _check_retained_distance(layer.retained_distance, layer.window, layer.retained, layer.far_rope, far)
    except OptionError as error:
        raise OptionError(f"{layer.path}: {error}") from error
    if layer.retained and not layer.causal:
        raise ConversionError(
            f"retained: {layer.path} ({layer.attention}) is bidirectional, and nothing of it is behind; use retained=0."
        )
    if layer.sink_distance is not None and not layer.causal:
        raise ConversionError(
            f"sink_distance: {layer.path} ({layer.attention}) is bidirectional; use sink_distance=None."
        )
    if layer.feature_map is None:
        given = {"decay": layer.decay, "far_rope": not layer.far_rope, "feature_map_options": layer.feature_map_options}
        if named := [name for name, value in given.items() if value]:
            raise OptionError(f"{layer.path}: feature_map=None leaves out the far branch that {named[0]} is for.")
        if layer.window < 1:
            raise OptionError(f"{layer.path}: kind={layer.kind!r} needs a feature_map, or without one a window ≥ 1.")
        _check_sink_distance(layer.sink_distance, layer.sinks)
        return
    try:
        built = make(
            layer.feature_map,
            layer.head_dim,
            num_heads=layer.heads,
            num_kv_heads=layer.state_heads,
            scale=layer.scale,
            device="meta",
            **layer.feature_map_options,
        )
    except LinattnError as error:
        error.args = (f"{layer.path} ({layer.attention}): {error}",)
        raise
    if not layer.far_rope and isinstance(built, SequenceMap):
        raise OptionError(
            f"far_rope: {layer.path}: {layer.feature_map} replaces the attention as a whole and has no far branch that "
            "could read other queries and keys; use far_rope=True."
        )
    if layer.sink_distance is not None and isinstance(built, SequenceMap):
        raise OptionError(
            f"sink_distance: {layer.path}: {layer.feature_map} replaces the attention as a whole and has no sinks; use "
            "sink_distance=None."
        )
    if layer.retained and isinstance(built, SequenceMap):
        raise OptionError(
            f"retained: {layer.path}: {layer.feature_map} replaces the attention as a whole and attends nothing "
            "exactly; use retained=0."
        )
    if layer.retained and built.positional:
        raise OptionError(
            f"retained: {layer.path}: features of {layer.feature_map} are of a position, and tokens become far in the "
            "order they drop out; use retained=0, or a map without positions."
        )
    _check_sink_distance(layer.sink_distance, layer.sinks)
    if layer.causal and not built.causal:
        raise ConversionError(
            f"{layer.path} ({layer.attention}) is causal, and {layer.feature_map!r} mixes tokens along the sequence; "
            "choose a map whose causal property is True (linattn.feature_maps.available())."
        )
    if layer.decay is not None and not layer.causal:
        raise ConversionError(
            f"{layer.path} ({layer.attention}) is bidirectional, and a decay needs a direction; use decay=None."
        )


def _refusals(layers: Iterable[LayerPlan]) -> str:
    lines: dict[str, list[str]] = {}
    for layer in layers:
        lines.setdefault(f"{layer.attention}: {layer.reason}", []).append(layer.path)
    return "\n".join(f"  {_span(paths)}  {what}" for what, paths in lines.items())


def _span(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)} layers)"
