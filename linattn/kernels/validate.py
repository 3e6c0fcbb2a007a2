"""Every shape, dtype and option error of the kernels, in one place, and the resolved call the backends receive."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from linattn.errors import (
    DtypeError,
    FeatureMapError,
    NonFiniteError,
    OptionError,
    ShapeError,
    StateError,
    UnsupportedError,
)
from linattn.kernels.precision import autocast_dtype
from linattn.kernels.protocols import KernelFeatureMap
from linattn.state import AttentionState

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

STRONGEST_DECAY = -1e4
"""A log-gate below this counts as this: it forgets everything, and running sums of gates stay finite and exact."""


@dataclasses.dataclass  # not frozen, which takes four times as long to create
class Call:
    """A checked call of the operator: what every backend receives. Shapes as in :func:`kernel_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_far: Tensor | None
    """What the feature map sees instead of q and k; None where it sees q and k themselves."""
    k_far: Tensor | None
    q_sink: Tensor | None
    """What sinks behind the window meet instead of q."""
    feature_map: KernelFeatureMap | None
    """None without a far branch."""
    window: int
    sinks: int
    decay: Tensor | None
    """``[B, T, Hkv]`` in the accumulation dtype."""
    far_bias: Tensor | None
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    causal: bool
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: AttentionState | None
    return_state: bool
    lookback: int
    chunk_size: int | None
    autocast: torch.dtype | None
    """The caller's autocast dtype, which the feature map runs under; None while autocast is off."""
    retained: int = 0
    scores: Tensor | None = None
    """``[B, T, Hkv]`` float32, finite and without gradients, where tokens are retained."""
    q_retained: Tensor | None = None
    """What meets the far keys of retained tokens more than ``retained_distance`` tokens back instead of q and k."""
    retained_distance: int = 0

    @property
    def sums(self) -> torch.dtype:
        """Dtype of sums and normalisers: float32, or float64 for float64 inputs."""
        return accumulation_dtype(self.v)

    @property
    def ring(self) -> int:
        """Tokens the returned state keeps un-folded."""
        return self.window + self.lookback

    @property
    def sequences(self) -> int:
        """Number of sequences N."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def feature_dim(self) -> int:
        return 0 if self.feature_map is None else self.feature_map.feature_dim


def accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def resolve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: KernelFeatureMap | None,
    window: int,
    sinks: int,
    far: bool,
    decay: Tensor | None,
    far_bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    q_far: Tensor | None,
    k_far: Tensor | None,
    q_sink: Tensor | None,
    causal: bool,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: AttentionState | None,
    return_state: bool,
    lookback: int,
    chunk_size: int | None,
    retained: int = 0,
    scores: Tensor | None = None,
    q_retained: Tensor | None = None,
    retained_distance: int | None = None,
    checked: bool = False,
) -> Call:
    """Check the arguments of :func:`kernel_attention` and settle its defaults.

    ``checked``: :func:`check_qkv` has seen q, k and v.
    """
    if not checked:
        q, k, v = check_qkv(q, k, v)
    for name, t in (
        ("decay", decay),
        ("far_bias", far_bias),
        ("sink_logits", sink_logits),
        ("q_far", q_far),
        ("k_far", k_far),
        ("q_sink", q_sink),
        ("mask", mask),
        ("cu_seqlens", cu_seqlens),
        ("scores", scores),
        ("q_retained", q_retained),
    ):
        if t is not None:
            check_tensor(name, t, q.device)
    if state is not None:
        check_is_state(state, q.device)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]

    for name, value in (("window", window), ("sinks", sinks), ("lookback", lookback), ("retained", retained)):
        if type(value) is int and value >= 0:
            continue
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < 0:
            raise OptionError(f"{name}: got {value!r}, expected an integer ≥ 0.")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise OptionError(f"chunk_size: got {chunk_size!r}, expected a positive integer or None.")
    if softcap is not None and not softcap > 0:
        raise OptionError(f"softcap: got {softcap!r}, expected a positive number or None.")

    if far:
        if feature_map is None:
            raise OptionError(
                "feature_map: got None with far=True; pass a feature map, or far=False for a window alone."
            )
        _check_interface(feature_map)
        if causal and not feature_map.causal:
            raise FeatureMapError(
                f"feature_map: {type(feature_map).__name__} mixes tokens along the sequence and cannot be causal; "
                "use it with causal=False, or choose a map whose causal property is True."
            )
    else:
        feature_map = None
        if window == 0 and sinks == 0 and retained == 0:
            raise OptionError("far=False with window=0 and sinks=0 leaves nothing to attend to; set window > 0.")
        if decay is not None or far_bias is not None:
            raise OptionError("decay and far_bias shape the far branch; drop them, or set far=True.")
    if feature_map is not None and scale is None:
        scale = feature_map.scale
    try:
        scale = head_dim**-0.5 if scale is None else float(scale)
    except (TypeError, ValueError) as error:
        raise OptionError(f"scale: got {scale!r}, expected a number or None.") from error

    if (q_far is None) != (k_far is None):
        raise OptionError("q_far and k_far come together: pass both, or neither to use q and k.")
    if q_far is not None and k_far is not None:
        if not far and not retained:
            raise OptionError("q_far and k_far feed the far branch; drop them, or set far=True.")
        _check_shape("q_far", q_far, (batch, length, heads, None))
        _check_shape("k_far", k_far, (batch, k.shape[1], kv_heads, q_far.shape[-1]))
    if q_sink is not None:
        if not sinks or not causal:
            raise OptionError("q_sink meets the sinks of causal attention; drop it, or set sinks > 0 and causal=True.")
        _check_shape("q_sink", q_sink, tuple(q.shape))
    if feature_map is not None:
        _check_sizes(feature_map, head_dim if q_far is None else q_far.shape[-1], heads, kv_heads)
    if far_bias is not None:
        _check_shape("far_bias", far_bias, (heads,))
    if sink_logits is not None:
        _check_shape("sink_logits", sink_logits, (heads,))

    cross = k.shape[1] != length
    if causal and cross:
        raise ShapeError(
            f"k: got {k.shape[1]} tokens against {length} queries; causal attention needs the same number. "
            "Pass earlier tokens as state=, or causal=False for cross attention."
        )
    if not causal:
        for name, given in (("decay", decay is not None), ("state", state is not None), ("return_state", return_state)):
            if given:
                raise OptionError(f"{name}: is causal by nature; drop it, or set causal=True.")
        if cross and window:
            raise OptionError(
                f"window={window}: a window is undefined between sequences of different length; use window=0."
            )
        if cross and cu_seqlens is not None:
            raise OptionError("cu_seqlens: packed cross attention is not defined; pad and pass mask=.")

    if mask is not None:
        if mask.dtype != torch.bool:
            raise DtypeError(f"mask: got {mask.dtype}, expected torch.bool with True for real tokens; try mask.bool().")
        _check_shape("mask", mask, (batch, k.shape[1]))
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, batch, length, mask)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    if decay is not None:
        if not decay.is_floating_point():
            raise DtypeError(f"decay: got {decay.dtype}, expected floating point log-gates ≤ 0.")
        if decay.ndim == 1:
            _check_shape("decay", decay, (kv_heads,))
            decay = decay.expand(batch, length, kv_heads)
        _check_shape("decay", decay, (batch, length, kv_heads))
        decay = decay.to(accumulation_dtype(v)).clamp_min(STRONGEST_DECAY)

    if retained or scores is not None:
        scores = _check_retained(retained, scores, (batch, length, kv_heads), feature_map, causal, cu_seqlens)
    if q_retained is not None or retained_distance is not None:
        _check_retained_queries(q_retained, retained_distance, retained, window, q, k_far)

    if lookback and not (return_state or state is not None):
        raise OptionError(f"lookback={lookback}: is a property of the returned state; pass return_state=True.")
    if state is not None:
        far_dim = None if k_far is None else k_far.shape[-1]
        feature_dim = 0 if feature_map is None else feature_map.feature_dim
        _check_state(
            state,
            sequences,
            kv_heads,
            feature_dim,
            head_dim,
            v.shape[-1],
            window,
            sinks,
            far_dim,
            decay is not None,
            retained,
        )

    return Call(
        q=q,
        k=k,
        v=v,
        q_far=q_far,
        k_far=k_far,
        q_sink=q_sink,
        feature_map=feature_map,
        window=window,
        sinks=sinks,
        decay=decay,
        far_bias=far_bias,
        scale=scale,
        softcap=None if softcap is None else float(softcap),
        sink_logits=sink_logits,
        causal=causal,
        mask=mask,
        cu_seqlens=cu_seqlens,
        state=state,
        return_state=return_state,
        lookback=lookback,
        chunk_size=chunk_size,
        autocast=autocast_dtype(q),
        retained=retained,
        scores=scores,
        q_retained=q_retained,
        retained_distance=retained_distance or 0,
    )


def check_finite(**tensors: Tensor | None) -> None:
    """Raise :class:`NonFiniteError` for the first tensor with a NaN or an infinity. Waits for the device."""
    for name, t in tensors.items():
        if t is not None and not bool(torch.isfinite(t).all()):
            raise NonFiniteError(
                f"{name}: contains {int(torch.isnan(t).sum())} NaN and {int(torch.isinf(t).sum())} infinite values "
                f"of {t.numel()}; look at the layer before, or at the learning rate."
            )


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = ("q", "k", "v"), dim: str = "D"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, T, H, D]``, keys ``[B, Tk, Hkv, D]`` and values ``[B, Tk, Hkv, V]`` that fit, in one dtype."""
    name_q, name_k, name_v = names
    device = q.device if isinstance(q, Tensor) else None
    for name, t, dims in zip(
        names, (q, k, v), (f"[B, T, H, {dim}]", f"[B, T, Hkv, {dim}]", "[B, T, Hkv, V]"), strict=True
    ):
        if not isinstance(t, Tensor):
            raise DtypeError(f"{name}: got {type(t).__name__}, expected a torch.Tensor {dims}.")
        if t.ndim != 4:
            raise ShapeError(f"{name}: got {t.ndim} dimensions {tuple(t.shape)}, expected {dims}.")
        if t.dtype not in DTYPES:
            raise DtypeError(f"{name}: got {t.dtype}, expected one of float16, bfloat16, float32, float64.")
        if t.device != device:
            raise ShapeError(f"{name}: is on {t.device}, {name_q} on {device}; move them to one device.")
    if not q.dtype == k.dtype == v.dtype:
        # Under autocast, rotary embedding leaves float32 queries and keys beside values of half precision.
        autocast = autocast_dtype(q)
        if autocast is None:
            raise DtypeError(f"{', '.join(names)}: got {q.dtype}, {k.dtype}, {v.dtype}, expected one dtype; cast them.")
        q, k, v = q.to(autocast), k.to(autocast), v.to(autocast)
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"{name_v}: got {tuple(v.shape)}, expected [B, T, Hkv] = {tuple(k.shape[:3])} as in {name_k}.")
    if q.shape[0] != k.shape[0]:
        raise ShapeError(f"{name_k}: got batch {k.shape[0]}, expected {q.shape[0]} as in {name_q}.")
    if q.shape[3] != k.shape[3]:
        raise ShapeError(f"{name_k}: got {dim}={k.shape[3]}, expected {q.shape[3]} as in {name_q}.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"{name_k}: got {k.shape[2]} heads for {q.shape[2]} query heads; grouped-query attention needs the query "
            "heads to be a multiple of the key/value heads. Is the layout [B, T, H, D], not [B, H, T, D]?"
        )
    return q, k, v


def check_tensor(name: str, t: object, device: torch.device) -> None:
    """Raise unless ``t`` is None or a tensor on ``device``."""
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise DtypeError(f"{name}: got {type(t).__name__}, expected a torch.Tensor or None.")
    if t.device != device:
        raise ShapeError(f"{name}: is on {t.device}, q on {device}; move them to one device.")


def check_is_state(state: object, device: torch.device) -> None:
    """Raise unless ``state`` is None or an :class:`AttentionState` on ``device``."""
    if state is None:
        return
    if not isinstance(state, AttentionState):
        raise StateError(f"state: got {type(state).__name__}, expected an AttentionState (the .state of an output).")
    check_tensor("state", state.kv, device)


def _check_interface(feature_map: KernelFeatureMap) -> None:
    if not hasattr(feature_map, "forward_queries") or not hasattr(feature_map, "forward_keys"):
        raise FeatureMapError(
            f"feature_map: got {feature_map!r}, expected an object with forward_queries and forward_keys; "
            "linattn.feature_maps.make(name, head_dim) builds one from its name."
        )


def _check_sizes(feature_map: KernelFeatureMap, head_dim: int, heads: int, kv_heads: int) -> None:
    """A map may say which heads it was built for; one built for a single head serves any number."""
    for size, given in (("head_dim", head_dim), ("num_heads", heads), ("num_kv_heads", kv_heads)):
        built = getattr(feature_map, size, given)
        if built != given and (built != 1 or size == "head_dim"):
            raise FeatureMapError(
                f"feature_map: {type(feature_map).__name__} was built with {size}={built}, this call has {given}."
            )


def _check_shape(name: str, t: Tensor, expected: tuple[int | None, ...]) -> None:
    if t.ndim != len(expected) or any(e is not None and s != e for s, e in zip(t.shape, expected, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ShapeError(f"{name}: got shape {tuple(t.shape)}, expected ({wanted}).")


def _check_retained(
    retained: int,
    scores: Tensor | None,
    shape: tuple[int, int, int],
    feature_map: KernelFeatureMap | None,
    causal: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The scores in float32, all finite, so that −∞ can stand for no token at all: one that is NaN counts least."""
    if not retained:
        raise OptionError("scores: choose which tokens are retained, and retained=0; drop them, or set retained > 0.")
    if scores is None:
        raise OptionError(f"retained={retained}: needs scores [B, T, Hkv], what each token is worth keeping.")
    if not scores.is_floating_point():
        raise DtypeError(f"scores: got {scores.dtype}, expected floating point; try scores.float().")
    _check_shape("scores", scores, shape)
    if not causal:
        raise UnsupportedError(
            f"retained={retained}: tokens are retained as they leave the window, which is causal by nature; "
            "set causal=True, or retained=0."
        )
    if cu_seqlens is not None:
        raise UnsupportedError(f"retained={retained}: packed sequences are not there; pad them and pass mask=.")
    if feature_map is not None and feature_map.positional:
        raise UnsupportedError(
            f"retained={retained}: {type(feature_map).__name__} asks for positions, which tokens are kept without; "
            "choose a map whose positional property is False."
        )
    limit = torch.finfo(torch.float32).max
    return scores.detach().float().nan_to_num(nan=-limit, posinf=limit, neginf=-limit)


def _check_retained_queries(
    q_retained: Tensor | None, distance: int | None, retained: int, window: int, q: Tensor, k_far: Tensor | None
) -> None:
    if q_retained is None or distance is None:
        raise OptionError("q_retained and retained_distance come together: pass both, or neither.")
    if isinstance(distance, bool) or not isinstance(distance, int) or distance < window:
        raise OptionError(f"retained_distance: got {distance!r}, expected an integer ≥ window={window}.")
    if not retained or k_far is None:
        raise OptionError(
            f"q_retained: meets the far keys of retained tokens; got retained={retained} and "
            f"k_far={'None' if k_far is None else 'a tensor'}; set both, or drop it."
        )
    _check_shape("q_retained", q_retained, tuple(q.shape))
    _check_shape("k_far", k_far, (None, None, None, q.shape[-1]))


def _check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int, mask: Tensor | None) -> None:
    if mask is not None:
        raise OptionError("mask and cu_seqlens exclude each other: a packed batch has no padding.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"cu_seqlens: got {cu_seqlens.dtype}, expected int32 or int64.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or batch != 1:
        raise ShapeError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} with batch {batch}, expected [N + 1] boundaries of "
            "sequences packed along T with batch 1."
        )
    # Reading values would make an accelerator wait; there the boundaries are the caller's word.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ShapeError(f"cu_seqlens: got {bounds}, expected a rising sequence from 0 to T = {length}.")


def _check_state(
    state: AttentionState,
    sequences: int,
    kv_heads: int,
    feature_dim: int,
    head_dim: int,
    value_dim: int,
    window: int,
    sinks: int,
    far_head_dim: int | None,
    decay: bool,
    retained: int,
) -> None:
    far_k = state.recent_far_k
    found = {
        "sequences": state.batch_size,
        "num_kv_heads": state.kv.shape[1],
        "feature_dim": state.kv.shape[2],
        "head_dim": state.recent_k.shape[-1],
        "value_dim": state.kv.shape[3],
        "window": state.window,
        "sinks": state.sinks,
        "far_head_dim": None if far_k is None else far_k.shape[-1],
        "decay": state.recent_decay is not None,
        "retained": state.retained,
    }
    expected = {
        "sequences": sequences,
        "num_kv_heads": kv_heads,
        "feature_dim": feature_dim,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "window": window,
        "sinks": sinks,
        "far_head_dim": far_head_dim,
        "decay": decay,
        "retained": retained,
    }
    wrong = [f"{name} {found[name]} (expected {want})" for name, want in expected.items() if found[name] != want]
    if wrong:
        raise StateError(
            f"state: does not fit this call: {', '.join(wrong)}. A state continues the same layer with the same "
            "options; start a new one with state=None."
        )
