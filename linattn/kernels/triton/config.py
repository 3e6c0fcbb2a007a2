"""Which tile sizes, warps and stages the kernels run with: measured for some chips, safe defaults for others."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """Tuning parameters of one call's launches.

    Attributes:
        chunk: tokens of a chunk in the forward and backward kernels. fold_chunk: in the segment sums.
        programs: programs that fill the device; long sequences are cut into segments until there are as many.
    """

    chunk: int = 64
    fold_chunk: int = 64
    forward_warps: int = 4
    forward_stages: int = 2
    fold_warps: int = 4
    fold_stages: int = 2
    dq_warps: int = 8
    dq_stages: int = 1
    dkv_warps: int = 8
    dkv_stages: int = 1
    programs: int = 256
    shortest: int = 256


def segment_tokens(length: int, rows: int, c: Config) -> int:
    """Tokens of a segment, whole chunks, for sequences of ``length`` and ``rows`` of them times heads."""
    wanted = max(1, c.programs // max(rows, 1))
    tokens = max(-(-length // wanted), c.shortest)
    unit = max(c.chunk, c.fold_chunk)
    return -(-tokens // unit) * unit
