"""DecodeSlots: the memories of many sequences side by side, updated in place by one token at a time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from linattn.errors import OptionError, StateError
from linattn.state import EMPTY_LOG_SCALE, AttentionState


@dataclasses.dataclass(eq=False)
class DecodeSlots:
    """The memory of S sequences of one attention layer, allocated once: what a server decodes from.

    Unlike :class:`~linattn.AttentionState` it is mutable and its rings are circular, so that a new token writes one
    entry and moves nothing. It has no lookback: what leaves the window is folded at once.

    Attributes:
        kv: ``[S, Hkv, F, V]`` float32. k: ``[S, Hkv, F]`` float32. log_scale: ``[S, Hkv]`` float32. As in the state.
        length: ``[S, Hkv]`` int64 tokens seen, equal for all heads of a slot: each head counts its own.
        ring_k: ``[S, Hkv, W, D]`` keys of the last W = window tokens, position p at ``p % W``. ring_v:
            ``[S, Hkv, W, V]``.
        sink_k: ``[S, Hkv, sinks, D]`` the first tokens, from their arrival on. sink_v: ``[S, Hkv, sinks, V]``.
        ring_far_k: ``[S, Hkv, W, D']`` keys the feature map sees, where they differ from ``ring_k``; else None.
        ring_decay: ``[S, Hkv, W]`` float32 log-gates of the ring, or None without decay.
    """

    kv: Tensor
    k: Tensor
    log_scale: Tensor
    length: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    ring_far_k: Tensor | None = None
    ring_decay: Tensor | None = None

    @classmethod
    def empty(
        cls,
        slots: int,
        *,
        num_kv_heads: int,
        feature_dim: int,
        head_dim: int,
        value_dim: int | None = None,
        window: int = 0,
        sinks: int = 0,
        far_head_dim: int | None = None,
        decay: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> DecodeSlots:
        """Slots that have seen nothing. ``feature_dim``: 0 without a far branch. Others as in ``AttentionState``."""
        if slots < 0 or min(window, sinks) < 0:
            raise OptionError(f"slots={slots}, window={window}, sinks={sinks}: none may be negative.")
        value_dim = head_dim if value_dim is None else value_dim
        lead = (slots, num_kv_heads)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=dtype, device=device)

        return cls(
            kv=zeros(feature_dim, value_dim, dtype=torch.float32),
            k=zeros(feature_dim, dtype=torch.float32),
            log_scale=torch.full(lead, EMPTY_LOG_SCALE, dtype=torch.float32, device=device),
            length=zeros(dtype=torch.int64),
            ring_k=zeros(window, head_dim),
            ring_v=zeros(window, value_dim),
            sink_k=zeros(sinks, head_dim),
            sink_v=zeros(sinks, value_dim),
            ring_far_k=None if far_head_dim is None else zeros(window, far_head_dim),
            ring_decay=zeros(window, dtype=torch.float32) if decay else None,
        )

    @classmethod
    def from_state(cls, state: AttentionState, *, dtype: torch.dtype | None = None) -> DecodeSlots:
        """Slots that continue the sequences of ``state``, one each: independent copies, detached from autograd.

        Args:
            state: with ``lookback=0``.
            dtype: of the keys and values, the far keys excepted. Default that of the state.
        """
        return cls(**_slot_tensors(state, dtype))

    def to_state(self, slots: Tensor | None = None) -> AttentionState:
        """An independent :class:`~linattn.AttentionState` of the sequences at ``slots [N]`` (int64), default all."""
        chosen = {name: t.clone() if slots is None else t.index_select(0, slots) for name, t in self.tensors().items()}
        length, window = chosen["length"][:, 0], self.window
        at = length[:, None] - window + torch.arange(window, device=length.device)  # positions, oldest first

        def tokens_first(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous()

        def right_aligned(name: str) -> Tensor | None:
            if name not in chosen:
                return None
            ring = tokens_first(chosen[name])
            ring = _take(ring, at % max(window, 1))
            return torch.where((at >= 0).view(*at.shape, *[1] * (ring.ndim - 2)), ring, 0)

        recent_k, recent_v = right_aligned("ring_k"), right_aligned("ring_v")
        assert recent_k is not None
        assert recent_v is not None
        return AttentionState(
            kv=chosen["kv"],
            k=chosen["k"],
            log_scale=chosen["log_scale"],
            length=length.contiguous(),
            folded=(length - window).clamp_min(0),
            recent_k=recent_k,
            recent_v=recent_v,
            sink_k=tokens_first(chosen["sink_k"]),
            sink_v=tokens_first(chosen["sink_v"]),
            recent_far_k=right_aligned("ring_far_k"),
            recent_decay=right_aligned("ring_decay"),
            window=window,
        )

    def load(self, slots: Tensor, state: AttentionState) -> None:
        """Put the sequences of ``state`` (N of them, ``lookback=0``) into ``slots [N]`` (int64, no repeats)."""
        incoming, mine = _slot_tensors(state, self.ring_k.dtype), self.tensors()
        found = {name: tuple(t.shape[1:]) for name, t in incoming.items()}
        expected = {name: tuple(t.shape[1:]) for name, t in mine.items()}
        wrong = [
            f"{name} {found.get(name, 'absent')} (expected {expected.get(name, 'absent')})"
            for name in dict.fromkeys([*expected, *found])
            if found.get(name) != expected.get(name)
        ]
        if slots.shape != (state.batch_size,):
            wrong.append(f"{state.batch_size} sequences for slots {tuple(slots.shape)}")
        if wrong:
            raise StateError(
                f"state: does not fit these slots: {', '.join(wrong)}. Make both with the same layer and options."
            )
        for name, t in mine.items():
            t.index_copy_(0, slots, incoming[name])

    def reset(self, slots: Tensor | None = None) -> None:
        """Forget the sequences at ``slots [N]`` (int64), default all."""
        for name, t in self.tensors().items():
            value = EMPTY_LOG_SCALE if name == "log_scale" else 0
            if slots is None:
                t.fill_(value)
            else:
                t.index_fill_(0, slots, value)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, without the absent ones."""
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}

    @property
    def count(self) -> int:
        """Number of slots S."""
        return self.kv.shape[0]

    @property
    def window(self) -> int:
        return self.ring_k.shape[2]

    @property
    def sinks(self) -> int:
        return self.sink_k.shape[2]

    @property
    def feature_dim(self) -> int:
        return self.k.shape[2]


def _slot_tensors(state: AttentionState, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of the state's tensors as slots hold them."""
    if state.lookback:
        raise StateError(
            f"state: keeps lookback={state.lookback} tokens un-folded, slots keep none; make it with lookback=0."
        )
    if state.retained:
        raise StateError(
            f"state: holds retained={state.retained} tokens, slots none; pass it to kernel_attention instead."
        )
    state = state.detach()
    length, window, heads = state.length, state.window, state.kv.shape[1]
    age = torch.arange(window, device=length.device) - length[:, None]

    def heads_first(x: Tensor, dtype: torch.dtype | None = dtype) -> Tensor:
        return x.transpose(1, 2).to(dtype or x.dtype).clone(memory_format=torch.contiguous_format)

    def circular(x: Tensor) -> Tensor:
        return _take(x, age % max(window, 1))

    found = {
        "kv": state.kv,
        "k": state.k,
        "log_scale": state.log_scale,
        "length": length[:, None].expand(-1, heads),
    }
    found = {
        name: t.to(t.dtype if name == "length" else torch.float32).clone(memory_format=torch.contiguous_format)
        for name, t in found.items()
    }
    found |= {
        "ring_k": heads_first(circular(state.recent_k)),
        "ring_v": heads_first(circular(state.recent_v)),
        "sink_k": heads_first(state.sink_k),
        "sink_v": heads_first(state.sink_v),
    }
    if state.recent_far_k is not None:
        found["ring_far_k"] = heads_first(circular(state.recent_far_k), None)
    if state.recent_decay is not None:
        found["ring_decay"] = heads_first(circular(state.recent_decay), torch.float32)
    return found


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[n, index[n, j]]`` of ``x [N, W, ...]`` and ``index [N, W]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]
