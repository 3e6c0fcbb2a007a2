"""Sample queries and keys, as maps that adapt to data take them."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.errors import NonFiniteError, ShapeError
from linattn.feature_maps.base import FeatureMap


def scaled_samples(feature_map: FeatureMap, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """x = √scale · q and y = √scale · k of each key/value head, for fitting ``feature_map`` to them.

    Args:
        q: ``[B, Tq, H, D]``. k: ``[B, Tk, Hkv, D]``.

    Returns:
        ``[Hkv, B · Tq · H / Hkv, D]`` and ``[Hkv, B · Tk, D]``, float64 on the CPU, without gradient.

    Raises:
        ShapeError: heads or head_dim do not match, or there are no tokens. NonFiniteError: NaN or infinity among them.
    """
    samples = []
    for argument, tokens, heads in (("q", q, feature_map.num_heads), ("k", k, feature_map.num_kv_heads)):
        feature_map.check_input(argument, tokens, heads)
        if not tokens.numel():
            raise ShapeError(f"fit: {argument} of shape {tuple(tokens.shape)} holds no tokens.")
        if not bool(tokens.isfinite().all()):
            raise NonFiniteError(f"fit: {argument} contains NaN or infinity.")
        tokens = tokens.detach().to("cpu", torch.float64) * feature_map.scale**0.5
        grouped = tokens.unflatten(2, (feature_map.num_kv_heads, -1))
        samples.append(grouped.permute(2, 0, 1, 3, 4).flatten(1, 3))
    return samples[0], samples[1]
