"""The seam: what transformers calls in place of softmax attention, and what it hands over.

Two functions are registered under the name ``"linattn"``: an attention function and a mask function. The attention
function finds the :class:`ConvertedAttention` child of the module that calls it; a module without one was kept softmax
and is sent on to the implementation it had. A forward pre-hook hands over a converted module's cache layer and rotary
embedding, which the attention function would not see otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linattn.attention import starting_log_half_lives
from linattn.convert.cache import LinattnCacheLayer, adopt, shared, spread
from linattn.convert.plan import LayerPlan
from linattn.convert.rotary import (
    FAR_ROPE,
    PROBE_ATTRIBUTE,
    RETAINED_DISTANCE,
    SCORES,
    SINK_DISTANCE,
    TURNS_ATTRIBUTE,
    Rotation,
    Seen,
    angles_for,
    angles_hold,
    rotation_of,
)
from linattn.errors import ConversionError, ShapeError, UnsupportedError
from linattn.feature_maps import SequenceMap, make
from linattn.kernels import kernel_attention
from linattn.kernels.retain import FOREVER, expiry
from linattn.scores import TokenScore
from linattn.state import AttentionState

NAME = "linattn"
KEPT_ATTRIBUTE = "_linattn_kept"
"""Set on every attention module behind the seam: the implementation that softmax layers use."""
CACHE_ATTRIBUTE = "_linattn_cache_layer"
"""Holds a converted module's :class:`Handover`."""
ROTATION_ATTRIBUTE = "_linattn_rotation"
"""Holds the rotary embedding of a converted module's call for as long, where the layer turns queries or keys back."""
ROTATED_ATTRIBUTE = "_linattn_rotated"
"""Set on an attention module whose rotary embedding cannot be undone: scores see its keys as they are."""
PLAIN = "elu"
"""A feature map without parameters, for layers that have no use for one."""


class ConvertedAttention(nn.Module):
    """The linear attention of one converted layer: a feature map, a far bias and, if asked for, a decay.

    A layer whose plan has no feature map is a sliding window with sinks: it has no parameters, ``far`` is False, and
    its ``feature_map`` serves for the sizes alone. So is one left softmax within a window (``kind="bound"``).

    It lives as the child ``linattn`` of the attention module it serves; the projections, norms and rotary embedding
    stay that module's own. See :func:`linattn.kernels.kernel_attention` for the operator.

    It is called with keys and values of Hkv heads. With ``per_head`` in the plan these are the module's own, repeated:
    Hkv is H, and each query head has key features, a decay, scores and a state for itself.

    Args:
        layer: what the plan says about this layer.
        device, dtype: of the parameters.

    Attributes:
        far: False deletes the far branch, leaving a sliding window with sinks: the control a conversion must beat.
            See :func:`linattn.convert.window_only`.
        bound: True in a layer left softmax within a window: what looks at converted layers passes it by.
        retained: tokens behind the window that each key/value head attends exactly, the best-scored ones.
        recency: what a token's score gains with each position.
        repeats: how often each key/value head of the model comes among the Hkv: 1, or H over their number.
        score: tells the scores, recency left out; None in a layer built without retained tokens. It sees keys before
            rotary embedding, whatever ``far_rope`` is; where the embedding cannot be undone, after it.
        native_window: the sliding window that the softmax attention had, or None: what training aims at.
        far_rope: False where the far branch reads queries and keys before rotary embedding.
        sink_distance: tokens of rotary distance that sinks behind the window keep at most, or None.
        retained_distance: tokens of rotary distance that retained tokens keep at most, or None.
        keeps_far_keys: whether the state in a cache holds the window's keys before rotary embedding beside those after
            it. With ``far_rope=False`` they are turned back as they leave the window where the model's rotary module
            is known to make their angles; None until the layer's first call has told.
    """

    far_bias: nn.Parameter | None

    def __init__(
        self, layer: LayerPlan, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.window, self.sinks, self.decay, self.causal = layer.window, layer.sinks, layer.decay, layer.causal
        self.retained, self.recency, self.repeats = layer.retained, layer.recency, layer.repeats
        self.native_window, self.far_rope = layer.native_window, layer.far_rope
        self.sink_distance, self.retained_distance = layer.sink_distance, layer.retained_distance
        self.far, self.bound = layer.feature_map is not None, layer.kind == "bound"
        self.keeps_far_keys: bool | None = self.far and not self.far_rope
        self.feature_map = make(
            layer.feature_map or PLAIN,
            layer.head_dim,
            num_heads=layer.heads,
            num_kv_heads=layer.state_heads,
            scale=layer.scale,
            device=device,
            dtype=dtype,
            **layer.feature_map_options,
        )
        bias = torch.empty(layer.heads, device=device, dtype=dtype)
        self.far_bias = nn.Parameter(bias) if self.far else None
        if self.decay == "fixed":
            self.log_half_life = nn.Parameter(torch.empty(layer.state_heads, device=device, dtype=dtype))
        elif self.decay == "data":
            self.gate_weight = nn.Parameter(torch.empty(layer.state_heads, layer.head_dim, device=device, dtype=dtype))
            self.gate_bias = nn.Parameter(torch.empty(layer.state_heads, device=device, dtype=dtype))
        self.score: TokenScore | None = None
        if self.retained:
            self.score = TokenScore(layer.state_heads, layer.head_dim, device=device, dtype=dtype)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Fill the feature map's, the bias's, the decay's and the score's starting values, in place."""
        self.feature_map.reset_parameters()
        if self.score is not None:
            self.score.reset_parameters()
        self._reset_own_parameters()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        if self.far_bias is not None:
            self.far_bias.zero_()
        if self.decay is None:
            return
        log_half_life = starting_log_half_lives(self.feature_map.num_kv_heads)
        if self.decay == "fixed":
            self.log_half_life.copy_(log_half_life)
        else:
            rate = math.log(2) * torch.exp(-log_half_life)
            self.gate_weight.zero_()
            self.gate_bias.copy_(torch.log(torch.expm1(rate)))

    def log_gates(self, k: Tensor) -> Tensor | None:
        """Log-gates ≤ 0 of keys ``[B, T, Hkv, D]``: None, ``[Hkv]`` (fixed) or ``[B, T, Hkv]`` (data), in float32.

        They are the keys that the feature map sees; see :meth:`far_inputs`.
        """
        if self.decay is None:
            return None
        wide = torch.promote_types(k.dtype, torch.float32)
        if self.decay == "fixed":
            return -math.log(2) * torch.exp(-self.log_half_life.to(wide))
        gate = torch.einsum("bthd,hd->bth", k.to(wide), self.gate_weight.to(wide)) + self.gate_bias.to(wide)
        return -nn.functional.softplus(gate)

    def far_inputs(self, q: Tensor, k: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """What the feature map sees of queries and keys: themselves, or what they were before their ``rotation``.

        Raises:
            ConversionError: the layer's far branch does without rotary embedding, and there is no ``rotation``.
        """
        if self.far_rope:
            return q, k
        if rotation is None:
            raise _without_rotation(*FAR_ROPE)
        return rotation.undo(q, k)

    @property
    def turns_keys(self) -> bool:
        """Whether keys before rotary embedding are read: by the far branch, or of retained tokens far behind."""
        return not self.far_rope and (self.far or (self.retained > 0 and self.retained_distance is not None))

    @property
    def reach(self) -> int:
        """Tokens that are attended exactly."""
        return self.window + self.retained + self.sinks

    @torch.no_grad()
    def scores(
        self,
        k: Tensor,
        v: Tensor,
        rotation: Rotation | None = None,
        *,
        mask: Tensor | None = None,
        state: AttentionState | None = None,
    ) -> Tensor:
        """``[B, T, Hkv]`` float32, recency included, of keys ``[B, T, Hkv, D]`` and values ``[B, T, Hkv, V]``.

        Args:
            rotation: the rotary embedding that k comes from; without one, the keys are taken as they are.
            mask, state: as of :meth:`sink_queries`; a token's position counts the real ones before it in its row.
        """
        assert self.score is not None
        k = k if rotation is None else rotation.undo(k[:, :, :0], k)[1]
        at = _positions(k.shape[1], mask, None, state, k.device)
        return self.score(k, v) + self.recency * at[..., None].float()

    @torch.no_grad()
    def expiries(self, scores: Tensor) -> Tensor:
        """``[B, Hkv, T]`` int32, the first query to which each token is far, of the :meth:`scores` of whole sequences.

        Sinks, and tokens retained to the end, have ``FOREVER``.
        """
        ends = expiry(scores[:, self.sinks :].transpose(1, 2), window=self.window, retained=self.retained)
        ends = torch.where(ends < FOREVER, ends + self.sinks, FOREVER)
        return nn.functional.pad(ends, [min(self.sinks, scores.shape[1]), 0], value=FOREVER)

    def moves_sinks(self, tokens: float) -> bool:
        """Whether sinks are met by :meth:`sink_queries` in sequences of so many tokens."""
        return self.sink_distance is not None and self.sinks > 0 and tokens - 1 > self.sink_distance

    def sink_queries(
        self,
        q: Tensor,
        rotation: Rotation | None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: AttentionState | None = None,
    ) -> Tensor | None:
        """What sinks behind the window meet of queries ``[B, T, H, D]``: those at position t, turned to min(t, P).

        P is ``sink_distance``; positions count the real tokens of each sequence. With P = window + sinks − 1 sinks and
        window stand side by side (arXiv:2309.17453).

        Args:
            rotation: the rotary embedding that q comes from. state: the memory of the tokens before.
            mask, cu_seqlens: as of :meth:`forward`, in the shape of q.

        Returns:
            None where the layer embeds nothing.

        Raises:
            ConversionError: there is no ``rotation``.
        """
        assert self.sink_distance is not None
        if not _embeds(rotation, SINK_DISTANCE):
            return None
        at = _positions(q.shape[1], mask, cu_seqlens, state, q.device)
        return rotation.back(q, (at - self.sink_distance).clamp_min(0))

    def moves_retained(self, tokens: float) -> bool:
        """Whether retained tokens are met by :meth:`retained_queries` in sequences of so many tokens."""
        return self.retained_distance is not None and self.retained > 0 and tokens - 1 > self.retained_distance

    def retained_queries(self, q: Tensor, rotation: Rotation | None) -> Tensor | None:
        """What meets, of queries ``[B, T, H, D]``, retained tokens more than P = ``retained_distance`` tokens back.

        It meets their keys before rotary embedding, as if they were P tokens away.

        Args:
            rotation: the rotary embedding that q comes from.

        Returns:
            None where the layer embeds nothing.

        Raises:
            ConversionError: there is no ``rotation``.
        """
        assert self.retained_distance is not None
        if not _embeds(rotation, RETAINED_DISTANCE):
            return None
        return rotation.nearer(q, self.retained_distance)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache_layer: LinattnCacheLayer | None = None,
        rotation: Rotation | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Attention of new tokens over themselves and what ``cache_layer`` remembers.

        Args:
            q: ``[B, T, H, D]``. k: ``[B, T, Hkv, D]``. v: ``[B, T, Hkv, V]``.
            scale: the layer's softmax scale. softcap: its softcap. sink_logits: ``[H]``.
            mask: ``[B, T]`` bool, True for real tokens.
            cu_seqlens: ``[N + 1]`` boundaries of packed sequences over the flattened ``B · T`` tokens.
            cache_layer: where the state is read from and stored to.
            rotation: the rotary embedding that q and k come from, for :meth:`far_inputs`, :meth:`sink_queries`,
                :meth:`retained_queries` and :meth:`scores`.
            scores: ``[B, T, Hkv]`` instead of those; for values that are not the layer's own.

        Returns:
            ``[B, T, H, V]``.
        """
        phi = self.feature_map
        if isinstance(phi, SequenceMap):
            if cu_seqlens is not None or softcap is not None or sink_logits is not None:
                raise UnsupportedError(
                    f"{type(phi).__name__} approximates plain attention over one whole sequence per row: no "
                    "packing, softcap or sink logits. Choose a map with per-token features."
                )
            return phi.attend(q, k, v, mask)
        if scale is not None and not math.isclose(scale, phi.scale, rel_tol=1e-6):
            raise ConversionError(
                f"The layer calls attention with scaling={scale:g}, its feature map was built for {phi.scale:g}. Set "
                "that layer's scale in the plan (plan.layers[i].scale) and convert with it."
            )
        shape = q.shape
        if cu_seqlens is not None and self.retained:
            raise UnsupportedError(
                "Packed sequences (position_ids that restart, cu_seq_lens_q or seq_idx) came to a layer with "
                f"retained={self.retained} tokens, which keeps those of one sequence per row; pad them instead."
            )
        plain = cache_layer is None and mask is None and cu_seqlens is None and softcap is None and sink_logits is None
        moves = self.moves_sinks(shape[1]) or self.moves_retained(shape[1])
        exact = self.window if moves else self.window + self.retained
        if plain and self.causal and not self.far and shape[1] <= exact:
            return softmax_attention(q, k, v, phi.scale)
        q_far, k_far = self.far_inputs(q, k, rotation) if self.turns_keys else (None, None)
        if cu_seqlens is not None:
            if cache_layer is not None:
                raise UnsupportedError(
                    "Packed sequences (position_ids that restart, cu_seq_lens_q or seq_idx) came with a cache, which "
                    "holds one sequence per row; pass use_cache=False."
                )
            q, k, v = (t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v))
            q_far, k_far = (None if t is None else t.reshape(1, -1, *t.shape[2:]) for t in (q_far, k_far))
            mask = None if mask is None else mask.reshape(1, -1)
        state = None if cache_layer is None else cache_layer.fetch(shape[1], q.device)
        most = shape[1] if cache_layer is None else cache_layer.most_seen
        turns_back = False
        if cache_layer is not None and k_far is not None:
            turns_back = self.keeps_far_keys is False if state is None else state.recent_far_k is None
            if turns_back and (rotation is None or rotation.positions is None):
                raise ConversionError(
                    f"{FAR_ROPE[0]}: the layer was called without position_ids [B, T] beside its angles, which a cache "
                    "without the window's keys before rotary embedding needs; pass them, or use_cache=False."
                )
            if state is not None and turns_back and cache_layer.positions is not None:
                assert rotation is not None
                state = _with_far_keys(state, cache_layer, rotation, shape[1], whole=self.moves_retained(most))
        if not self.retained:
            scores = None
        elif scores is None:
            scores = self.scores(k, v, rotation, mask=mask, state=state)
        q_sink = q_retained = None
        if self.moves_sinks(most):
            q_sink = self.sink_queries(q, rotation, mask=mask, cu_seqlens=cu_seqlens, state=state)
        if self.moves_retained(most):
            q_retained = self.retained_queries(q, rotation)
        result = kernel_attention(
            q,
            k,
            v,
            feature_map=phi,
            window=self.window,
            sinks=self.sinks,
            retained=self.retained,
            scores=scores,
            far=self.far,
            decay=self.log_gates(k if k_far is None else k_far) if self.far else None,
            far_bias=self.far_bias if self.far else None,
            scale=phi.scale,
            softcap=softcap,
            sink_logits=sink_logits,
            q_far=q_far,
            k_far=k_far,
            q_sink=q_sink,
            q_retained=q_retained,
            retained_distance=None if q_retained is None else self.retained_distance,
            causal=self.causal,
            mask=mask,
            cu_seqlens=cu_seqlens,
            state=None if state is None else spread(state, self.repeats),
            return_state=cache_layer is not None,
            lookback=0 if cache_layer is None else cache_layer.lookback,
        )
        if cache_layer is not None and result.state is not None:
            after = shared(result.state, self.repeats)
            if turns_back:
                assert rotation is not None
                after = dataclasses.replace(after, recent_far_k=None, kept_far_k=None)
                cache_layer.commit(after, rotation.positions, mask, scores)
            else:
                cache_layer.commit(after)
        return result.out.reshape(*shape[:-1], v.shape[-1])

    def extra_repr(self) -> str:
        parts = [f"window={self.window}", f"sinks={self.sinks}", f"decay={self.decay!r}", f"causal={self.causal}"]
        parts += [f"retained={self.retained}", f"recency={self.recency}"] * (self.score is not None)
        parts += [f"repeats={self.repeats}"] * (self.repeats > 1)
        parts += ["softmax"] if self.bound else [f"far_rope={self.far_rope}"]
        parts += [f"sink_distance={self.sink_distance}"] * (self.sink_distance is not None)
        parts += [f"retained_distance={self.retained_distance}"] * (self.retained_distance is not None)
        return ", ".join(parts)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of whole sequences: q ``[B, T, H, D]``, k and v with Hkv heads → ``[B, T, H, V]``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def _with_far_keys(
    state: AttentionState, cache_layer: LinattnCacheLayer, rotation: Rotation, tokens: int, *, whole: bool
) -> AttentionState:
    """The state with its keys before rotary embedding: those that may be read as far, and zeros for the rest.

    ``whole``: all retained tokens' may be read.
    """
    assert cache_layer.positions is not None
    ring, leaving = state.recent_k.shape[1], state.lookback + tokens
    positions, far = cache_layer.positions.to(state.recent_k.device), min(leaving, ring)
    keys = rotation.undo_at(state.recent_k[:, :far], positions[:, :far])
    state = dataclasses.replace(state, recent_far_k=nn.functional.pad(keys, [0, 0, 0, 0, 0, ring - far]))
    if (at := cache_layer.kept_positions) is None or state.kept_k is None or state.kept_score is None:
        return state
    if whole:
        keys = rotation.undo_at(state.kept_k.flatten(1, 2)[:, :, None], at.to(state.kept_k.device).flatten(1, 2))
        return dataclasses.replace(state, kept_far_k=keys.view_as(state.kept_k))
    # As many as leave the window may take the place of the worst retained tokens.
    count = min(leaving, state.retained)
    worst = state.kept_score.argsort(dim=1, descending=True, stable=True)[:, -count:]  # [N, count, Hkv]
    entries = worst[..., None].expand(-1, -1, -1, state.kept_k.shape[-1])
    keys, at = state.kept_k.gather(1, entries), at.to(worst.device).gather(1, worst)
    keys = rotation.undo_at(keys.flatten(1, 2)[:, :, None], at.flatten(1, 2)).view_as(keys)
    return dataclasses.replace(state, kept_far_k=torch.zeros_like(state.kept_k).scatter(1, entries, keys))


def _without_rotation(option: str, remedy: str) -> ConversionError:
    return ConversionError(
        f"{option}: the layer was called without the rotary embedding to undo, which its attention module hands over "
        f"once a call. If that module attends several times a call, convert it with {remedy}."
    )


def _embeds(rotation: Rotation | None, asked: tuple[str, str]) -> TypeGuard[Rotation]:
    """Whether queries can be turned by ``rotation``: not where nothing is embedded.

    Raises:
        ConversionError: there is none; names the option that was ``asked`` for, and the remedy.
    """
    if rotation is None:
        raise _without_rotation(*asked)
    return rotation.angles is not None


def _positions(
    length: int, mask: Tensor | None, cu_seqlens: Tensor | None, state: AttentionState | None, device: torch.device
) -> Tensor:
    """``[B | 1, T]`` place of each token among the real ones of its sequence."""
    at = torch.arange(length, device=device)[None] if mask is None else mask.cumsum(1) - 1
    if cu_seqlens is not None:
        first = cu_seqlens[:-1].clamp_max(length - 1)
        before = first if mask is None else at[0, first] + 1 - mask[0, first].long()
        slots = torch.arange(length, device=device)
        at = at - before[torch.searchsorted(cu_seqlens, slots, right=True).clamp(1, len(before)) - 1]
    return at if state is None else at + state.length[:, None]


@contextlib.contextmanager
def window_only(model: nn.Module) -> Iterator[None]:
    """Delete the far branch of a converted model's layers while the context lasts: a sliding window with sinks.

    Retained tokens stay. The control that a conversion must beat, with the same weights. Caches do not carry over
    between the two forms.
    """
    layers = [module for module in model.modules() if isinstance(module, ConvertedAttention)]
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no converted layer; call convert_model first.")
    before = [layer.far for layer in layers]
    try:
        for layer in layers:
            layer.far = False
        yield
    finally:
        for layer, far in zip(layers, before, strict=True):
            layer.far = far


class TokenMask:
    """What the mask function hands every layer in place of a ``[B, 1, T, Tk]`` mask: a description, linear in T.

    Converted layers read ``padding`` and ``cu_seqlens``; a layer kept softmax has its implementation's own mask built
    by :meth:`build`, once for all layers that share it.

    Attributes:
        padding: ``[B, T]`` bool over the new tokens, True for real ones; None if all are.
        cu_seqlens: ``[N + 1]`` boundaries of packed sequences over the flattened ``B · T`` tokens, or None.
        causal: whether a token sees only itself and earlier ones.
        exact: whether the three say all there is to say; False under a custom mask pattern, or for some queries only.
    """

    def __init__(
        self, padding: Tensor | None, cu_seqlens: Tensor | None, causal: bool, exact: bool, recipe: dict[str, Any]
    ) -> None:
        self.padding = padding
        self.cu_seqlens = cu_seqlens
        self.causal = causal
        self.exact = exact
        self._recipe = recipe
        self._built: dict[tuple[str, int], Any] = {}
        self._part: Any = None

    def __getitem__(self, part: Any) -> TokenMask:
        """``mask[:, :, rows, :]``, for a model that runs its last layers, kept softmax, on some queries only."""
        mask = TokenMask(self.padding, self.cu_seqlens, self.causal, False, self._recipe)
        mask._part = part
        return mask

    def build(self, implementation: str, keys: int) -> Any:
        """The mask that ``implementation`` wants for ``keys`` key positions."""
        if (implementation, keys) not in self._built:
            recipe = dict(self._recipe)
            if recipe["kv_offset"] == 0:
                recipe["kv_length"] = keys
            if keys > recipe["q_offset"] + recipe["q_length"] or self._part is not None:
                # Unfilled slots of a preallocated cache, or queries left out: no implementation may skip the mask.
                recipe["allow_is_causal_skip"] = False
            mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**recipe)
            self._built[implementation, keys] = mask if mask is None or self._part is None else mask[self._part]
        return self._built[implementation, keys]

    def to(self, device: torch.device | str | int, **kwargs: Any) -> TokenMask:
        """The same mask on another device: what multi-device dispatch asks of a layer's inputs."""

        def move(t: Any) -> Any:
            return t.to(device, **kwargs) if isinstance(t, Tensor) else t

        recipe = {name: move(value) for name, value in self._recipe.items()} | {"device": torch.device(device)}
        mask = TokenMask(move(self.padding), move(self.cu_seqlens), self.causal, self.exact, recipe)
        mask._part = self._part
        return mask


def token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> TokenMask:
    """The mask function registered as ``"linattn"``; arguments as transformers passes them to every mask function."""
    # Caches count tokens in place, and a kept layer's mask is built after they have counted the new ones.
    q_offset, kv_offset = (t.clone() if isinstance(t, Tensor) else t for t in (q_offset, kv_offset))
    recipe = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
        **kwargs,
    }
    causal, cu_seqlens = mask_function is not bidirectional_mask_function, None
    if not use_vmap and mask_function not in (causal_mask_function, bidirectional_mask_function):
        causal, cu_seqlens = _read_pattern(mask_function, batch_size, q_length, q_offset, device)
    padding = None if attention_mask is None else _new_tokens(attention_mask, q_length, q_offset)
    return TokenMask(padding, cu_seqlens, causal, not use_vmap, recipe)


def _new_tokens(attention_mask: Tensor, q_length: int, q_offset: int | Tensor) -> Tensor | None:
    """The columns of a 2-D padding mask that belong to the new tokens; None if all of them are real."""
    end = q_offset + q_length
    if attention_mask.ndim != 2 or attention_mask.shape[1] < end:
        raise ShapeError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected [B, {int(end)}]: the "
            f"{int(q_offset)} cached tokens and the {q_length} new ones."
        )
    padding = attention_mask[:, q_offset:end].bool()
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding


def _read_pattern(
    mask_function: Callable[..., Any], batch_size: int, q_length: int, q_offset: int | Tensor, device: Any
) -> tuple[bool, Tensor | None]:
    """Whether an index-based mask function is causal, and the boundaries of the sequences it keeps apart.

    Asking it about neighbours only, T questions instead of T²: a token that does not see the one before it begins a
    sequence; one that sees the one after it is not causal.
    """
    if q_length < 2:
        return True, None
    rows = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(rows)
    after = torch.arange(1, q_length, device=device)[None] + q_offset
    before = after - 1
    joined = torch.as_tensor(mask_function(rows, head, after, before), device=device)
    causal = not bool(torch.as_tensor(mask_function(rows, head, before, after)).any())
    if bool(joined.all()):
        return causal, None
    starts = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    starts[:, 1:] = ~joined
    return causal, _boundaries(starts)


def _boundaries(starts: Tensor) -> Tensor:
    """``[B, T]`` bool, True where a sequence begins → ``[N + 1]`` boundaries over the flattened tokens."""
    total = torch.full((1,), starts.numel(), dtype=torch.int64, device=starts.device)
    return torch.cat([starts.flatten().nonzero().flatten(), total])


def _packing(shape: torch.Size, cu_seq_lens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """Boundaries over the flattened tokens from what a packing collator passes along, or None."""
    if cu_seq_lens is not None:
        return cu_seq_lens.flatten().long()
    if seq_idx is None:
        return None
    seq_idx = seq_idx.expand(shape[0], shape[1])
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return _boundaries(starts)


class Handover:
    """A cache layer on its way from a module's forward pre-hook to the attention function.

    Attributes:
        layer: the one to use, None without a cache. spent: one was used in this call of the module.
    """

    def __init__(self) -> None:
        self.layer: LinattnCacheLayer | None = None
        self.spent = False


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as ``"linattn"``.

    Args:
        module: the attention module that calls.
        query: ``[B, H, T, D]``. key, value: ``[B, Hkv, T, D]``, of the new tokens only in a converted layer.
        attention_mask: a :class:`TokenMask`, or None.
        kwargs: what the family adds: ``softcap``, ``s_aux``, packing boundaries and others.

    Returns:
        ``[B, T, H, V]``, contiguous as some families expect it, and None for the attention weights, never formed.
    """
    # An adapter library may have wrapped the ConvertedAttention: whatever the child is, the layer is converted.
    converted: Any = module._modules.get(NAME)
    if PROBE_ATTRIBUTE in module.__dict__:
        raise Seen(query, key)
    if converted is None:
        return _kept_forward(module, query, key, value, attention_mask, scaling, is_causal, kwargs)
    handover: Handover = module.__dict__[CACHE_ATTRIBUTE]
    if handover.spent:
        raise UnsupportedError(
            f"{type(module).__name__} attends more than once in a call, and a converted layer's cache holds one state; "
            "pass use_cache=False, or keep these layers softmax."
        )
    cache_layer = handover.layer
    handover.layer, handover.spent = None, cache_layer is not None
    rotation = module.__dict__.pop(ROTATION_ATTRIBUTE, None)
    _refuse_unsupported(query, attention_mask, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    padding, cu_seqlens = None, None
    if isinstance(attention_mask, TokenMask):
        padding, cu_seqlens, causal = attention_mask.padding, attention_mask.cu_seqlens, attention_mask.causal
    if causal != converted.causal:
        told = {True: "causal", False: "bidirectional"}
        raise UnsupportedError(
            f"{type(module).__name__} was converted as {told[converted.causal]} attention and is called as "
            f"{told[causal]}; convert the model in the form it is used in."
        )
    if converted.repeats > 1:
        key, value = (t.repeat_interleave(converted.repeats, dim=1) for t in (key, value))
    packing = _packing(query.transpose(1, 2).shape, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
    out = converted(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        mask=padding,
        cu_seqlens=cu_seqlens if packing is None else packing,
        cache_layer=cache_layer,
        rotation=rotation,
    )
    return out.contiguous(), None


def _refuse_unsupported(query: Tensor, attention_mask: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_bias") is not None:
        raise UnsupportedError("position_bias: a bias per pair of positions has no constant-size memory.")
    if isinstance(attention_mask, Tensor):
        raise UnsupportedError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}; a converted layer takes a padding mask [B, T] "
            "(and position_ids or cu_seq_lens_q for packing), not one value per pair of tokens."
        )
    if isinstance(attention_mask, TokenMask) and not attention_mask.exact:
        raise UnsupportedError(
            "A custom mask pattern (or_mask_function / and_mask_function) cannot be applied by a converted layer; "
            "keep the layers it is for softmax."
        )
    distributed_tensor = sys.modules.get("torch.distributed.tensor")
    if distributed_tensor is not None and isinstance(query, distributed_tensor.DTensor):
        raise UnsupportedError("The queries are a DTensor: sharding a sequence over ranks would give wrong attention.")


def _kept_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of a layer the plan keeps, by the implementation the model had."""
    implementation: str | None = getattr(module, KEPT_ATTRIBUTE, None)
    if implementation is None:
        raise ConversionError(
            f"{type(module).__name__} runs with attn_implementation='linattn' but belongs to no converted model; use "
            "linattn.convert_model, which sets it where it applies."
        )
    if implementation == "sdpa" and kwargs.get("softcap") is not None:
        implementation = "eager"  # sdpa has no softcap, and ignores or refuses one depending on its version
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if isinstance(attention_mask, TokenMask):
        attention_mask = attention_mask.build(implementation, key.shape[2])
    if is_causal is not None:
        kwargs["is_causal"] = is_causal
    return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def hand_over(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a converted attention module: find its cache, whatever its name, and its rotary embedding."""
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    layer_idx: Any = getattr(module, "layer_idx", None)
    handover: Handover = module.__dict__[CACHE_ATTRIBUTE]
    handover.layer, handover.spent = None if cache is None else adopt(cache, layer_idx), False
    converted: Any = module._modules[NAME]
    with_angles = angles_for(converted)
    if not converted.far_rope or with_angles is not None:
        asked = FAR_ROPE if with_angles is None or not converted.far_rope else with_angles
        first = TURNS_ATTRIBUTE not in module.__dict__
        rotation = rotation_of(module, args, kwargs, asked, with_angles=with_angles)
        if converted.keeps_far_keys is None and (first or not torch.compiler.is_compiling()):
            _settle_far_keys(converted, rotation)
        module.__dict__[ROTATION_ATTRIBUTE] = rotation
    elif converted.score is not None and ROTATED_ATTRIBUTE not in module.__dict__:
        module.__dict__[ROTATION_ATTRIBUTE] = _known_rotation(module, args, kwargs)


def _known_rotation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotation | None:
    """The rotary embedding of a call, None where it cannot be undone, which the module's first call settles."""
    settled = TURNS_ATTRIBUTE in module.__dict__
    try:
        return rotation_of(module, args, kwargs, SCORES)
    except ConversionError:
        if settled:
            raise
    module.__dict__[ROTATED_ATTRIBUTE] = True
    return None


@torch.compiler.disable
def _settle_far_keys(converted: nn.Module, rotation: Rotation) -> None:
    """Let the first call that can tell say whether the layer turns the keys of its window back."""
    hold = angles_hold(rotation)
    for layer in converted.modules() if hold is not None else ():
        if isinstance(layer, ConvertedAttention):
            layer.keeps_far_keys = not hold


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, token_mask)
