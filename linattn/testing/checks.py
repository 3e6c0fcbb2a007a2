"""Assertions that say which property is broken and what that means for the user."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.kernels import AttentionOutput
from linattn.state import AttentionState
from linattn.testing import budgets


def fail(what: str, meaning: str) -> None:
    """Raise AssertionError with the broken property and its consequence."""
    raise AssertionError(f"{what}\nWhat this means: {meaning}")


def check(condition: bool, what: str, meaning: str) -> None:
    if not condition:
        fail(what, meaning)


def check_identical(actual: Tensor, expected: Tensor, what: str, meaning: str) -> None:
    """Same shape, dtype and bits."""
    check(
        actual.shape == expected.shape and actual.dtype == expected.dtype,
        f"{what}: got {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}.",
        meaning,
    )
    if not torch.equal(actual, expected):
        fail(f"{what}: differs by up to {budgets.error(actual, expected):.3g}, expected not a bit.", meaning)


def check_within(actual: Tensor, expected: Tensor, budget: float, what: str, meaning: str) -> None:
    """Same shape, and max |actual − expected| ≤ budget; a NaN on either side fails."""
    check(
        actual.shape == expected.shape,
        f"{what}: got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}.",
        meaning,
    )
    difference = budgets.error(actual, expected)
    if not difference <= budget:
        fail(f"{what}: differs by up to {difference:.3g}, allowed are {budget:.3g}.", meaning)


def check_finite(x: Tensor, what: str, meaning: str) -> None:
    bad = int((~torch.isfinite(x)).sum())
    check(bad == 0, f"{what}: {bad} of {x.numel()} values are NaN or infinite.", meaning)


def state_of(result: AttentionOutput) -> AttentionState:
    """The state that a call with ``return_state=True`` must have given."""
    if result.state is None:
        raise AssertionError("return_state=True gave no state.\nWhat this means: nothing could be continued.")
    return result.state


def check_same_state(actual: AttentionState, expected: AttentionState, budget: float, what: str, meaning: str) -> None:
    """Two states remember the same: sums relative to one log-scale, the valid part of the ring, sinks, counters."""
    for name in ("length", "folded"):
        check_identical(getattr(actual, name), getattr(expected, name), f"{what}, {name}", meaning)
    for name in ("kept_k", "kept_v", "kept_far_k", "kept_score", "kept_decay"):
        mine, other = getattr(actual, name), getattr(expected, name)
        check((mine is None) == (other is None), f"{what}, {name}: present in one state only.", meaning)
        if mine is not None and actual.kept_score is not None and expected.kept_score is not None:
            held = expected.kept_score.isfinite()
            check(torch.equal(actual.kept_score.isfinite(), held), f"{what}: other slots are filled.", meaning)
            check_within(mine[held], other[held], budget, f"{what}, {name}", meaning)
    rescale = (actual.log_scale - expected.log_scale).exp()
    check_within(actual.kv * rescale[..., None, None], expected.kv, budget, f"{what}, kv", meaning)
    check_within(actual.k * rescale[..., None], expected.k, budget, f"{what}, k", meaning)
    seen = expected.sink_k.new_tensor(range(expected.sinks)) < expected.length[:, None]
    slots = expected.recent_k.shape[1]
    valid = expected.length[:, None] - slots + torch.arange(slots, device=expected.length.device)
    valid = valid >= expected.folded[:, None]
    for name, where in (
        ("recent_k", valid),
        ("recent_v", valid),
        ("recent_far_k", valid),
        ("recent_decay", valid),
        ("recent_score", valid),
        ("sink_k", seen),
        ("sink_v", seen),
    ):
        mine, other = getattr(actual, name), getattr(expected, name)
        if mine is None and other is None:
            continue
        check((mine is None) == (other is None), f"{what}, {name}: present in one state only.", meaning)
        check(mine.shape == other.shape, f"{what}, {name}: {tuple(mine.shape)} against {tuple(other.shape)}.", meaning)
        check_within(mine[where], other[where], budget, f"{what}, {name}", meaning)
