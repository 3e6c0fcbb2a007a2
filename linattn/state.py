"""AttentionState: the fixed-size memory of one attention layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linattn.errors import OptionError, StateError

EMPTY_LOG_SCALE = -1e30
"""Log-scale of an empty sum: finite, so that differences of two empty sums are zero and not NaN."""


@dataclasses.dataclass(eq=False)
class AttentionState:
    """What one attention layer remembers of N sequences after any number of tokens.

    A token that arrives enters the ring of recent tokens (right-aligned: the newest is last). When it leaves the ring
    it becomes a sink (if it is one of the first tokens) or is folded into ``kv`` and ``k``. The ring holds
    ``window + lookback`` tokens: the last ``window`` of them are attended exactly, the ``lookback`` older ones through
    their features, un-folded, so that :meth:`rollback` can take back up to ``lookback`` tokens.

    All tensors are treated as immutable: every method and every attention call returns a new state. A state is a pytree
    of its tensors: ``torch.export``, ``torch.func`` and everything else that maps over nested inputs looks inside.

    Attributes:
        kv: ``[N, Hkv, F, V]`` float32, Σ exp(decay + log_scale_i − log_scale) φ_k(k_i) v_iᵀ over folded tokens.
        k: ``[N, Hkv, F]`` float32, the same sum without v: the normaliser.
        log_scale: ``[N, Hkv]`` float32, the running maximum the sums are relative to, at the time of the last token.
        length: ``[N]`` int64, tokens seen.
        folded: ``[N]`` int64, tokens that have left the ring. A ring slot j holds token ``length − W + j`` and is
            valid where that is ≥ ``folded``.
        recent_k: ``[N, W, Hkv, D]`` keys of the ring, in their own dtype; W = window + lookback.
        recent_v: ``[N, W, Hkv, V]``.
        recent_far_k: ``[N, W, Hkv, D']`` keys the feature map sees, where they differ from ``recent_k``; else None.
        recent_decay: ``[N, W, Hkv]`` float32 log-gates of the ring, or None without decay.
        sink_k: ``[N, S, Hkv, D]``. sink_v: ``[N, S, Hkv, V]``.
        window: tokens attended exactly.
        kept_k, kept_v, kept_far_k: ``[N, M, Hkv, ·]`` the M retained tokens of each head among those that have left the
            ring, older first, empty slots before them; their far keys where ``recent_far_k`` is. What is kept is not
            folded. None, like all that follow, where no tokens are retained.
        kept_score: ``[N, M, Hkv]`` float32 their scores, −∞ in an empty slot.
        kept_at: ``[N, M, Hkv]`` int32 how many tokens came before each of them.
        kept_decay: ``[N, M, Hkv]`` float32 log-gates summed over the tokens since each of them, or None without decay.
        recent_score: ``[N, W, Hkv]`` float32 scores of the ring.
    """

    kv: Tensor
    k: Tensor
    log_scale: Tensor
    length: Tensor
    folded: Tensor
    recent_k: Tensor
    recent_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    recent_far_k: Tensor | None = None
    recent_decay: Tensor | None = None
    window: int = 0
    kept_k: Tensor | None = None
    kept_v: Tensor | None = None
    kept_far_k: Tensor | None = None
    kept_score: Tensor | None = None
    kept_at: Tensor | None = None
    kept_decay: Tensor | None = None
    recent_score: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        *,
        num_kv_heads: int,
        feature_dim: int,
        head_dim: int,
        value_dim: int | None = None,
        window: int = 0,
        sinks: int = 0,
        lookback: int = 0,
        far_head_dim: int | None = None,
        decay: bool = False,
        retained: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> AttentionState:
        """A state that has seen nothing. ``far_head_dim``: size of separate far keys, None if they are the keys."""
        if min(window, sinks, lookback, retained) < 0:
            sizes = f"window={window}, sinks={sinks}, lookback={lookback}, retained={retained}"
            raise OptionError(f"{sizes}: none may be negative.")
        value_dim = head_dim if value_dim is None else value_dim
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        n, h, w = batch_size, num_kv_heads, window + lookback

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        kept: dict[str, Tensor] = {}
        if retained:
            kept = {"kept_k": zeros(n, retained, h, head_dim, dtype=dtype)}
            kept["kept_v"] = zeros(n, retained, h, value_dim, dtype=dtype)
            kept["kept_score"] = torch.full((n, retained, h), -torch.inf, device=device)
            kept["kept_at"] = zeros(n, retained, h, dtype=torch.int32)
            kept["recent_score"] = zeros(n, w, h, dtype=torch.float32)
            if far_head_dim is not None:
                kept["kept_far_k"] = zeros(n, retained, h, far_head_dim, dtype=dtype)
            if decay:
                kept["kept_decay"] = zeros(n, retained, h, dtype=sums)
        return cls(
            kv=zeros(n, h, feature_dim, value_dim, dtype=sums),
            k=zeros(n, h, feature_dim, dtype=sums),
            log_scale=torch.full((n, h), EMPTY_LOG_SCALE, dtype=sums, device=device),
            length=zeros(n, dtype=torch.int64),
            folded=zeros(n, dtype=torch.int64),
            recent_k=zeros(n, w, h, head_dim, dtype=dtype),
            recent_v=zeros(n, w, h, value_dim, dtype=dtype),
            sink_k=zeros(n, sinks, h, head_dim, dtype=dtype),
            sink_v=zeros(n, sinks, h, value_dim, dtype=dtype),
            recent_far_k=None if far_head_dim is None else zeros(n, w, h, far_head_dim, dtype=dtype),
            recent_decay=zeros(n, w, h, dtype=sums) if decay else None,
            window=window,
            **kept,
        )

    @property
    def batch_size(self) -> int:
        return self.kv.shape[0]

    @property
    def sinks(self) -> int:
        return self.sink_k.shape[1]

    @property
    def retained(self) -> int:
        """Slots M for tokens behind the ring that are attended exactly."""
        return 0 if self.kept_k is None else self.kept_k.shape[1]

    @property
    def lookback(self) -> int:
        """Tokens that :meth:`rollback` can take back."""
        return self.recent_k.shape[1] - self.window

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: the same after 100 and after 100,000 tokens."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by field name, without the absent ones."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "window")
        return {name: value for name, value in fields if value is not None}

    def map(self, fn: Callable[[Tensor], Tensor]) -> AttentionState:
        """A state whose every tensor is ``fn`` of this one's."""
        return self._with({name: fn(t) for name, t in self.tensors().items()})

    def select(self, indices: Tensor) -> AttentionState:
        """The sequences at ``indices`` ``[M]`` (int64, repeats allowed): beam reordering, or dropping finished rows."""
        if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
            raise StateError(
                f"indices: got {indices.dtype} {tuple(indices.shape)}, expected int64 [M]; of a boolean one, pass "
                "its .nonzero().flatten()."
            )
        return self.map(lambda t: t.index_select(0, indices.to(t.device)))

    def repeat(self, repeats: int) -> AttentionState:
        """Each sequence ``repeats`` times, adjacent: [a, b] becomes [a, a, b, b]."""
        if repeats < 1:
            raise StateError(f"repeats={repeats}: expected a positive number.")
        return self.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def snapshot(self) -> AttentionState:
        """An independent copy, detached from autograd."""
        return self.map(lambda t: t.detach().clone())

    def detach(self) -> AttentionState:
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> AttentionState:
        return self.map(lambda t: t.to(device))

    def with_lookback(self, lookback: int) -> AttentionState:
        """The same state with a ring of ``window + lookback`` tokens.

        From then on up to ``lookback`` tokens can be taken back. A ring does not shrink here: folding needs the
        feature map, so the next attention call with a smaller ``lookback`` does it.
        """
        grow = lookback - self.lookback
        if grow < 0:
            raise StateError(f"lookback={lookback} is less than the state's {self.lookback}; a ring only grows here.")
        return self._shift_ring(grow, 0)

    def rollback(self, tokens: int) -> AttentionState:
        """The state before the last ``tokens`` tokens arrived, exactly: decay and sums included.

        Raises:
            StateError: if some sequence has folded too far to go back (``lookback`` was shorter than ``tokens``).
        """
        if tokens < 0:
            raise StateError(f"rollback({tokens}): expected the number of tokens to take back.")
        if tokens == 0:
            return self
        length = self.length - tokens
        if bool((length < 0).any()):
            raise StateError(f"rollback({tokens}): the sequences hold {self.length.tolist()} tokens.")
        if bool((self.folded > (length - self.window).clamp_min(0)).any()):
            raise StateError(
                f"rollback({tokens}): the state keeps lookback={self.lookback} tokens un-folded; ask for a larger "
                "lookback before the tokens arrive, or take a snapshot()."
            )
        log_scale, kept_decay = self.log_scale, self.kept_decay
        if self.recent_decay is not None:
            undone = self.recent_decay[:, -tokens:].sum(1)
            log_scale = log_scale - undone
            kept_decay = None if kept_decay is None else kept_decay - undone[:, None]
        back = self._shift_ring(tokens, tokens)
        return dataclasses.replace(back, length=length, log_scale=log_scale, kept_decay=kept_decay)

    def _shift_ring(self, front: int, back: int) -> AttentionState:
        """Add ``front`` empty slots before the oldest token, drop the ``back`` newest."""

        def shift(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, [0, 0] * (t.ndim - 2) + [front, -back])

        ring = {name: shift(t) for name, t in self.tensors().items() if name.startswith("recent_")}
        return self._with(ring)

    def _with(self, tensors: dict[str, Tensor]) -> AttentionState:
        return AttentionState(**{**self.tensors(), **tensors}, window=self.window)


def _flatten(state: AttentionState) -> tuple[list[Any], Any]:
    tensors = state.tensors()
    return list(tensors.values()), [list(tensors), state.window]


def _flatten_with_keys(state: AttentionState) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _flatten(state)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(context[0], values, strict=True)], context


def _unflatten(values: Iterable[Any], context: Any) -> AttentionState:
    names, window = context
    return AttentionState(**dict(zip(names, values, strict=True)), window=window)


pytree.register_pytree_node(
    AttentionState,
    _flatten,
    _unflatten,
    serialized_type_name="linattn.AttentionState",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([AttentionState])
