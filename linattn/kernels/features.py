"""What a call gets from its feature map: checked, in the accumulation dtype, under the caller's autocast."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from linattn.errors import FeatureMapError
from linattn.kernels.precision import autocast, widen
from linattn.kernels.validate import Call


def features_of(
    call: Call, kind: Literal["queries", "keys"], x: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Features ``[B, T, H, F]`` and log-scales ``[B, T, H]`` (None for zero) of ``x [B, T, H, D]``.

    Raises:
        FeatureMapError: the map gave something else than it promised.
    """
    map_ = call.feature_map
    if map_ is None:
        raise RuntimeError("features_of() was called without a feature map")
    forward = map_.forward_queries if kind == "queries" else map_.forward_keys
    with autocast(x, call.autocast):
        found = forward(x, positions) if map_.positional else forward(x)
    name = f"feature_map: {type(map_).__name__}.forward_{kind}"
    if not isinstance(found, tuple) or len(found) != 2:
        raise FeatureMapError(f"{name} returned a {type(found).__name__}, expected Features(values, log_scale).")
    values, log_scale = found
    if values.shape != (*x.shape[:3], map_.feature_dim):
        raise FeatureMapError(
            f"{name} gave values {tuple(values.shape)} for an input {tuple(x.shape)}, expected "
            f"{(*x.shape[:3], map_.feature_dim)}: feature_dim is {map_.feature_dim}."
        )
    if log_scale is not None and log_scale.shape != x.shape[:3]:
        raise FeatureMapError(
            f"{name} gave a log_scale {tuple(log_scale.shape)} for an input {tuple(x.shape)}, expected "
            f"{tuple(x.shape[:3])}: one number for each token and head."
        )
    return widen(values, call.sums), None if log_scale is None else log_scale.to(call.sums)
