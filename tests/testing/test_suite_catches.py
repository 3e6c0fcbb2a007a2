"""Tests of the tests: maps and kernels broken on purpose, and the test of the shipped suite that notices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.errors import LinattnError
from linattn.feature_maps import ELU, FavorPlus, FeatureMap, Features, Linformer
from linattn.kernels import AttentionOutput, kernel_attention
from linattn.testing import FeatureMapContract, KernelContract, SequenceMapContract
from linattn.testing.kernel import HYBRID, Case

# Feature maps


class FutureMean(ELU):
    """Subtracts the mean over the sequence: each feature has seen all tokens."""

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return super().forward_keys(k - k.mean(1, keepdim=True))


class NextToken(ELU):
    """Keys look one token ahead."""

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return super().forward_keys(torch.cat([k[:, 1:], k[:, -1:]], 1))


class Signed(ELU):
    """Declares positive, but is the identity."""

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return Features(q)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return Features(k)


class WrongLogScale(FavorPlus):
    """Half of |x|² / 2 is missing from the log-scale of the keys."""

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        values, log_scale = super().forward_keys(k)
        assert log_scale is not None
        return Features(values, log_scale + self.scale * k.square().sum(-1).to(log_scale.dtype) / 4)


class HalfLogScale(FavorPlus):
    """Log-scales in the dtype of the input."""

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        values, log_scale = super().forward_queries(q)
        assert log_scale is not None
        return Features(values, log_scale.to(q.dtype))


class ClaimsUnbiased(ELU):
    """No estimator of softmax at all, and nothing to redraw."""

    random = True
    unbiased = True

    def redraw(self) -> None:
        pass


class Unseeded(FavorPlus):
    """Draws from torch's global generator."""

    def _draw(self, draw: int) -> None:
        if not self.omega.is_meta:
            self.omega.normal_()


class Forgetful(FavorPlus):
    """Leaves its projection out of the checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._non_persistent_buffers_set |= {"omega", "draws"}


class Overflowing(ELU):
    """exp(10 x) without a log-scale."""

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return Features((10 * q).exp())

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self.forward_queries(k)


class Uninitialised(FavorPlus):
    """Draws when built, and not in reset_parameters."""

    def reset_parameters(self) -> None:
        pass


class SecretOption(FavorPlus):
    """Leaves its number of features and its seed out of its options."""

    def options(self) -> dict[str, Any]:
        return {"projection": self.projection}


class CountsTokens(ELU):
    """Uses positions without saying so."""

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        values, _ = super().forward_queries(q)
        return Features(values if positions is None else values * (1 + positions[..., None, None]))


BROKEN_MAPS: list[tuple[type[FeatureMap], str, tuple[Any, ...], str]] = [
    (FutureMean, "test_features_are_per_token", (), "mixes tokens"),
    (FutureMean, "test_causal_outputs", ("pure",), "see the future"),
    (FutureMean, "test_causal_gradients", ("hybrid",), "gradient of k at later tokens"),
    (FutureMean, "test_split_resume", ("pure", (8, 13)), "against the whole"),
    (NextToken, "test_features_are_per_token", (), "mixes tokens"),
    (NextToken, "test_causal_gradients", ("pure",), "gradient of k at later tokens"),
    (Signed, "test_kernel_is_as_declared", (), "positive=True, but"),
    (WrongLogScale, "test_kernel_is_as_declared", (), "unbiased=True, but"),
    (HalfLogScale, "test_shapes_and_dtypes", (torch.bfloat16,), "log_scale of q"),
    (ClaimsUnbiased, "test_kernel_is_as_declared", (), "unbiased=True, but"),
    (ClaimsUnbiased, "test_redraw", (), "changed nothing"),
    (Unseeded, "test_redraw", (), "another global seed"),
    (Forgetful, "test_state_dict_round_trip", (), "after load_state_dict"),
    (Overflowing, "test_finite", (torch.float16, "huge", "pure"), "NaN or infinite"),
    (Uninitialised, "test_meta_init", (), "meta, to_empty, reset_parameters"),
    (CountsTokens, "test_uses_positions_as_declared", (), "positional=False"),
]


def suite(cls: type[FeatureMap], attend: Callable[..., AttentionOutput] = kernel_attention) -> FeatureMapContract:
    class Suite(FeatureMapContract):
        def make(self, **head_sizes: Any) -> FeatureMap:
            return cls(**head_sizes)

        def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
            return attend(q, k, v, **{"impl": "chunked", "chunk_size": 8, **options})

    return Suite()


def run(contract: Any, test: str, arguments: tuple[Any, ...]) -> None:
    """Call one test of a suite with the values pytest would give its parameters."""
    function = getattr(contract, test)
    names = [name for name in function.__code__.co_varnames[: function.__code__.co_argcount] if name != "self"]
    function(**dict(zip(names, arguments, strict=True)))


@pytest.mark.parametrize(("cls", "test", "arguments", "message"), BROKEN_MAPS)
def test_broken_maps_are_caught(cls: type[FeatureMap], test: str, arguments: tuple[Any, ...], message: str) -> None:
    sound = next(base for base in cls.__mro__[1:] if base.__module__.startswith("linattn"))
    run(suite(sound), test, arguments)
    with pytest.raises(AssertionError, match=message):
        run(suite(cls), test, arguments)


def test_missing_options_are_caught() -> None:
    class Suite(FeatureMapContract):
        def make(self, **head_sizes: Any) -> FeatureMap:
            return SecretOption(**head_sizes, num_features=24, seed=5)

    with pytest.raises((AssertionError, RuntimeError, LinattnError)):
        Suite().test_options_rebuild_the_map()


# Kernels


def without_normaliser(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Σ φ(q)·φ(k) v, divided by nothing."""
    phi_q, _ = options["feature_map"].forward_queries(q)
    phi_k, _ = options["feature_map"].forward_keys(k)
    weights = torch.einsum("bthf,bshf->bhts", phi_q, phi_k.repeat_interleave(q.shape[2] // k.shape[2], 2)).tril()
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return AttentionOutput(torch.einsum("bhts,bshv->bthv", weights, values))


def constant_normaliser(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Right outputs, but the normaliser carries no gradient."""
    feature_map = options["feature_map"]
    out = without_normaliser(q, k, v, feature_map=feature_map).out
    return AttentionOutput(out / without_normaliser(q, k, torch.ones_like(v), feature_map=feature_map).out.detach())


def bfloat16_state(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Keeps the sums in bfloat16 between calls."""
    out, state = kernel_attention(q, k, v, **options)
    if state is not None:
        state = dataclasses.replace(state, kv=state.kv.bfloat16().float(), k=state.k.bfloat16().float())
    return AttentionOutput(out, state)


def bfloat16_normaliser(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Keeps only the normaliser in bfloat16."""
    out, state = kernel_attention(q, k, v, **options)
    if state is not None:
        state = dataclasses.replace(state, k=state.k.bfloat16().float())
    return AttentionOutput(out, state)


def leave_out(name: str, value: Any = None) -> Callable[..., AttentionOutput]:
    """A kernel that ignores one of its arguments."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
        return kernel_attention(q, k, v, **{**options, name: value} if name in options else options)

    return attend


def wide_window(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """One token too many in the window."""
    if options.get("window"):
        options["window"] += 1
    return kernel_attention(q, k, v, **options)


def global_shift(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Rounds in a way that depends on the largest value of the whole sequence, later tokens included."""
    size = v.detach().abs().amax()
    out, state = kernel_attention(q, k, v / size, **options)
    return AttentionOutput(out * size, state)


@pytest.mark.parametrize(
    ("attend", "test", "arguments", "message"),
    [
        (without_normaliser, "test_equals_dense", ("pure",), "one weight per pair"),
        (without_normaliser, "test_shortest", ("pure", 1), "1 tokens"),
        (constant_normaliser, "test_equals_dense", ("pure",), "gradient of q"),
        (bfloat16_state, "test_long_bf16", (), "stepwise in bfloat16"),
        (bfloat16_normaliser, "test_long_bf16", (), "stepwise in bfloat16"),
        (leave_out("mask"), "test_padding", ("pure", "left"), "padding"),
        (leave_out("mask"), "test_padding", ("hybrid", "right"), "padding"),
        (leave_out("cu_seqlens"), "test_packed", ("pure",), "of a packed batch"),
        (leave_out("state"), "test_split_resume", ("pure", (1, 20)), "against the whole"),
        (wide_window, "test_equals_dense", ("hybrid",), "one weight per pair"),
        (global_shift, "test_causal_outputs", ("pure",), "see the future"),
    ],
)
def test_broken_kernels_are_caught_by_a_map(
    attend: Callable[..., AttentionOutput], test: str, arguments: tuple[Any, ...], message: str
) -> None:
    run(suite(ELU), test, arguments)
    with pytest.raises(AssertionError, match=message):
        run(suite(ELU, attend), test, arguments)


class Broken(KernelContract):
    """The chunked implementation behind a fault."""

    impl = "chunked"

    def __init__(self, fault: Callable[..., AttentionOutput]) -> None:
        self.fault = fault

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
        return self.fault(q, k, v, impl=self.impl, **options)


def unscaled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Ignores the log-scales of the features."""
    feature_map = options["feature_map"]

    class Bare:
        scale, positional, causal, feature_dim = feature_map.scale, False, True, feature_map.feature_dim

        def forward_queries(self, q: Tensor) -> Features:
            return Features(feature_map.forward_queries(q).values)

        def forward_keys(self, k: Tensor) -> Features:
            return Features(feature_map.forward_keys(k).values)

    return kernel_attention(q, k, v, **{**options, "feature_map": Bare()})


def halves_the_decay(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    return kernel_attention(q, k, v, **{**options, "decay": options["decay"] / 2})


def detached_bias(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    return kernel_attention(q, k, v, **{**options, "far_bias": options["far_bias"].detach()})


def half_precision_out(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Rounds to float16 where float32 was asked for."""
    out, state = kernel_attention(q, k, v, **options)
    return AttentionOutput(out.half().float() if out.dtype == torch.float32 else out, state)


def half_state(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    out, state = kernel_attention(q, k, v, **options)
    return AttentionOutput(out, None if state is None else dataclasses.replace(state, kv=state.kv.to(v.dtype)))


def zero_times_padding(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Multiplies the padding by zero, which leaves NaN what it is."""
    real = options["mask"][..., None, None].to(q.dtype)
    return kernel_attention(q, k * real, v * real, **{**options, "mask": None})


def contiguous_only(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
    """Reads the memory of q as if it were contiguous."""
    q = torch.as_strided(q, q.shape, torch.empty(q.shape, device="meta").stride())
    return kernel_attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("fault", "test", "arguments", "message"),
    [
        (leave_out("mask"), "test_equals_reference", (Case(batch=3, mask="scattered"),), "output in"),
        (leave_out("mask"), "test_padding_may_hold_nan", (HYBRID, "left"), "output with NaN"),
        (zero_times_padding, "test_padding_may_hold_nan", ({}, "right"), "output with NaN"),
        (leave_out("decay"), "test_equals_reference", (Case(decay="strong"),), "decay"),
        (halves_the_decay, "test_equals_reference", (Case(decay="token"),), "output in"),
        (unscaled, "test_equals_reference", (Case(strength=2.0),), "output in"),
        (detached_bias, "test_equals_reference", (Case(**HYBRID, far_bias=True),), "gradient of far_bias"),
        (leave_out("sink_logits"), "test_equals_reference", (Case(sink_logits=True),), "output in"),
        (leave_out("softcap"), "test_equals_reference", (Case(**HYBRID, softcap=True),), "output in"),
        (wide_window, "test_equals_reference", (Case(**HYBRID),), "output in"),
        (half_precision_out, "test_equals_reference", (Case(),), "output in torch.float32"),
        (half_state, "test_state_is_float32", ({},), "expected float32"),
        (bfloat16_state, "test_long_bf16", (), "stepwise in bfloat16"),
        (contiguous_only, "test_strides_do_not_matter", ({},), "non-contiguous"),
        (leave_out("state"), "test_pieces_equal_whole", ((20, 1), "token", {}), "against the whole"),
        (leave_out("lookback", 0), "test_rollback", (1, {}, "none"), "un-folded"),
    ],
)
def test_broken_kernels_are_caught(
    fault: Callable[..., AttentionOutput], test: str, arguments: tuple[Any, ...], message: str
) -> None:
    run(Broken(kernel_attention), test, arguments)
    with pytest.raises((AssertionError, LinattnError), match=message):
        run(Broken(fault), test, arguments)


# Sequence maps


class ReadsPadding(Linformer):
    """Ignores the mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().attend(q, k, v)


class ClaimsCausal(Linformer):
    """Declares causal, and sees the whole sequence."""

    causal = True


@pytest.mark.parametrize(
    ("cls", "test", "arguments", "message"),
    [
        (ReadsPadding, "test_padded_tokens_change_nothing", (), "leaks into the answer"),
        (ReadsPadding, "test_right_padding", (), "against unpadded"),
        (ClaimsCausal, "test_shapes_and_dtypes", (torch.float32, 7), "causal is True"),
    ],
)
def test_broken_sequence_maps_are_caught(
    cls: type[Linformer], test: str, arguments: tuple[Any, ...], message: str
) -> None:
    def suite(cls: type[Linformer]) -> SequenceMapContract:
        return type("Suite", (SequenceMapContract,), {"make": lambda self, **sizes: cls(**sizes)})()

    run(suite(Linformer), test, arguments)
    with pytest.raises(AssertionError, match=message):
        run(suite(cls), test, arguments)
