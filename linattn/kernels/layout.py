"""Where each token stands: padded, packed and continued batches become rows of whole chunks, one sequence a chunk."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.kernels.validate import Call


@dataclasses.dataclass(frozen=True)
class Layout:
    """R rows of n chunks of C slots. A chunk holds tokens of one sequence, oldest first, without gaps between chunks.

    Slots are numbered through all rows. The dump slot ``R · n · C`` stands for nowhere.
    """

    rows: int
    chunks: int
    chunk_size: int
    positions: Tensor
    """``[R, n, C]`` position of the slot's token in its sequence, −1 in an empty slot."""
    sequence: Tensor
    """``[R, n]`` sequence of the chunk, −1 for an unused chunk."""
    start: Tensor
    """``[N]`` slot of each sequence's first token here, which has position ``base``."""
    base: Tensor
    """``[N]`` position of that token: earlier ones are in the state's sums and sinks."""
    past: Tensor
    """``[N]`` position of each sequence's first new token; those from ``base`` to here come from the ring."""
    length: Tensor
    """``[N]`` tokens of each sequence in all, earlier ones included."""
    source: Tensor | None
    """``[R · n · C]`` index into (ring tokens, new tokens, one zero row), or None where slots are tokens in order."""
    slot: Tensor | None
    """``[B · T]`` slot of each new token, or None likewise."""
    packed: bool
    """A row holds several sequences."""

    @property
    def slots(self) -> int:
        return self.rows * self.chunks * self.chunk_size

    def place(self, new: Tensor, ring: Tensor | None = None) -> Tensor:
        """Tokens ``new [B, T, ...]`` and ``ring [N, W, ...]`` in their slots ``[R, n · C, ...]``, zeros elsewhere."""
        width = self.chunks * self.chunk_size
        if self.source is None:
            return F.pad(new, [0, 0] * (new.ndim - 2) + [0, width - new.shape[1]]) if width > new.shape[1] else new
        parts = [new.flatten(0, 1), new.new_zeros(1, *new.shape[2:])]
        if ring is not None:
            parts.insert(0, ring.flatten(0, 1).to(new.dtype))
        return torch.cat(parts).index_select(0, self.source).view(self.rows, width, *new.shape[2:])

    def collect(self, placed: Tensor, batch: int, length: int) -> Tensor:
        """``[R, n · C, ...]`` back to the new tokens ``[B, T, ...]``; zeros for tokens that have no slot."""
        if self.slot is None:
            return placed[:, :length]
        flat = torch.cat([placed.flatten(0, 1), placed.new_zeros(1, *placed.shape[2:])])
        return flat.index_select(0, self.slot).view(batch, length, *placed.shape[2:])

    def gather(self, placed: Tensor, slots: Tensor) -> Tensor:
        """``[R, n · C, ...]`` at ``slots [N, M]``, zeros where a slot number lies outside."""
        inside = (slots >= 0) & (slots < self.slots)
        picked = placed.flatten(0, 1)[slots.clamp(0, self.slots - 1)]
        return torch.where(inside.view(*inside.shape, *[1] * (picked.ndim - 2)), picked, 0)

    def newest(self, count: int) -> Tensor:
        """``[N, count]`` slots of each sequence's last tokens, the newest last; −1 where it has none here."""
        last = self.length[:, None] - count + torch.arange(count, device=self.length.device)
        return torch.where(last >= self.base[:, None], self.start[:, None] + last - self.base[:, None], -1)


def build(call: Call, chunk_size: int) -> Layout:
    """Lay out the tokens of a call, the ring of its state before them."""
    batch, length = call.k.shape[:2]
    device, n_seq, c = call.k.device, call.sequences, chunk_size
    state = call.state
    past = state.length if state is not None else torch.zeros(n_seq, dtype=torch.int64, device=device)
    base = state.folded if state is not None else past
    ring = 0 if state is None else state.recent_k.shape[1]

    if call.cu_seqlens is None and call.mask is None and ring == 0:
        chunks = (length + c - 1) // c
        index = torch.arange(chunks * c, device=device)
        positions = torch.where(index < length, base[:, None] + index, -1).view(batch, chunks, c)
        order = torch.arange(batch, device=device)
        return Layout(
            rows=batch,
            chunks=chunks,
            chunk_size=c,
            positions=positions,
            sequence=order[:, None].expand(batch, chunks),
            start=order * chunks * c,
            base=base,
            past=past,
            length=past + length,
            source=None,
            slot=None,
            packed=False,
        )

    # Every source token's sequence, rank in it and validity: the ring's tokens first, then the new ones.
    in_ring = past - base
    ring_slot = torch.arange(ring, device=device)
    ring_rank = ring_slot - (ring - in_ring)[:, None]  # [N, W], negative where empty
    if call.cu_seqlens is not None:
        bounds = call.cu_seqlens.to(torch.int64)
        index = torch.arange(length, device=device)
        token_sequence = torch.searchsorted(bounds, index, right=True) - 1
        token_rank = in_ring[token_sequence] + index - bounds[token_sequence]
        token_valid = torch.ones_like(index, dtype=torch.bool)
        new = bounds[1:] - bounds[:-1]
        rows, chunks = 1, (n_seq * ring + length) // c + n_seq
        used = (in_ring + new + c - 1) // c
        start = (used.cumsum(0) - used) * c
    else:
        mask = call.mask if call.mask is not None else torch.ones(batch, length, dtype=torch.bool, device=device)
        token_valid = mask.flatten()
        token_rank = (in_ring[:, None] + mask.cumsum(1) - 1).flatten()
        token_sequence = torch.arange(batch, device=device).repeat_interleave(length)
        new = mask.sum(1)
        rows, chunks = batch, (ring + length + c - 1) // c
        start = torch.arange(batch, device=device) * chunks * c

    dump = rows * chunks * c
    ring_slots = torch.where(ring_rank >= 0, start[:, None] + ring_rank, dump).flatten()
    token_slots = torch.where(token_valid, start[token_sequence] + token_rank, dump)
    slots = torch.cat([ring_slots, token_slots])
    sequences = torch.cat([torch.arange(n_seq, device=device).repeat_interleave(ring), token_sequence])
    ranks = torch.cat([ring_rank.flatten(), token_rank])
    zero_row = slots.shape[0]
    source = torch.full((dump + 1,), zero_row, dtype=torch.int64, device=device)
    source = source.scatter(0, slots, torch.arange(zero_row, device=device))[:dump]
    positions = torch.full((dump + 1,), -1, dtype=torch.int64, device=device)
    positions = positions.scatter(0, slots, base[sequences] + ranks)[:dump].view(rows, chunks, c)
    owner = torch.full((dump + 1,), -1, dtype=torch.int64, device=device)
    owner = owner.scatter(0, slots, sequences)[:dump].view(rows, chunks, c)[:, :, 0]
    return Layout(
        rows=rows,
        chunks=chunks,
        chunk_size=c,
        positions=positions,
        sequence=owner,
        start=start,
        base=base,
        past=past,
        length=past + new,
        source=source,
        slot=token_slots,
        packed=call.cu_seqlens is not None,
    )
