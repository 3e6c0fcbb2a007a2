"""Every wrong argument has one clear error that names it; sizes of zero and one are not wrong."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.errors import (
    DtypeError,
    FeatureMapError,
    LinattnError,
    NonFiniteError,
    OptionError,
    ShapeError,
    StateError,
)
from linattn.feature_maps import make
from linattn.kernels import check_finite, chunked, dispatch, kernel_attention, linear_attention
from linattn.state import AttentionState

B, T, H, HKV, D, V = 2, 5, 4, 2, 8, 3
HEDGEHOG = make("hedgehog", D, num_heads=H, num_kv_heads=HKV)


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


def state(**changes: Any) -> AttentionState:
    sizes = {"num_kv_heads": HKV, "feature_dim": HEDGEHOG.feature_dim, "head_dim": D, "value_dim": V}
    batch_size = changes.pop("batch_size", B)
    return AttentionState.empty(batch_size, **{**sizes, **changes})


class Broken:
    """A feature map that gives whatever it is told to."""

    positional, causal, scale, feature_dim = False, True, 1.0, 8

    def __init__(self, give: Any) -> None:
        self.give = give

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Any:
        return self.give(q)

    forward_keys = forward_queries


def call(**changes: Any) -> Any:
    arguments = {"q": ones(B, T, H, D), "k": ones(B, T, HKV, D), "v": ones(B, T, HKV, V), "feature_map": HEDGEHOG}
    arguments |= changes
    return kernel_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


META = "meta"
PACKED = {"q": ones(1, 6, H, D), "k": ones(1, 6, HKV, D), "v": ones(1, 6, HKV, V)}
CROSS = {"causal": False, "k": ones(B, 7, HKV, D), "v": ones(B, 7, HKV, V)}

WRONG: list[tuple[type[LinattnError], str, dict[str, Any]]] = [
    # q, k, v
    (DtypeError, "q: got list", {"q": [1.0]}),
    (DtypeError, "v: got NoneType", {"v": None}),
    (ShapeError, "q: got 3 dimensions", {"q": ones(B, T, D)}),
    (ShapeError, "k: got 5 dimensions", {"k": ones(1, B, T, HKV, D)}),
    (DtypeError, r"k: got torch\.int64", {"k": ones(B, T, HKV, D, dtype=torch.int64)}),
    (DtypeError, r"q, k, v: got torch\.float32, torch\.float16", {"k": ones(B, T, HKV, D, dtype=torch.float16)}),
    (ShapeError, "k: is on meta, q on cpu", {"k": ones(B, T, HKV, D, device=META)}),
    (ShapeError, "k: got batch 3, expected 2", {"k": ones(3, T, HKV, D), "v": ones(3, T, HKV, V)}),
    (ShapeError, "k: got D=7, expected 8", {"k": ones(B, T, HKV, 7)}),
    (ShapeError, "k: got 3 heads for 4 query heads", {"k": ones(B, T, 3, D), "v": ones(B, T, 3, V)}),
    (ShapeError, "k: got 0 heads", {"k": ones(B, T, 0, D), "v": ones(B, T, 0, V)}),
    (ShapeError, r"v: got \(2, 4, 2, 3\)", {"v": ones(B, 4, HKV, V)}),
    (ShapeError, "k: got 7 tokens against 5 queries", {**CROSS, "causal": True}),
    # numbers
    (OptionError, "window: got -1", {"window": -1}),
    (OptionError, r"window: got 2\.0", {"window": 2.0}),
    (OptionError, "sinks: got True", {"sinks": True}),
    (OptionError, "lookback: got -3", {"lookback": -3, "return_state": True}),
    (OptionError, "lookback=3", {"lookback": 3}),
    (OptionError, "chunk_size: got 0", {"chunk_size": 0}),
    (OptionError, r"chunk_size: got 1\.5", {"chunk_size": 1.5}),
    (OptionError, "softcap: got 0", {"softcap": 0.0}),
    (OptionError, "softcap: got nan", {"softcap": float("nan")}),
    (OptionError, "scale: got 'big'", {"scale": "big"}),
    (OptionError, "impl: got 'fast', expected 'auto' or one of 'reference', 'chunked'", {"impl": "fast"}),
    # the feature map
    (OptionError, "feature_map: got None", {"feature_map": None}),
    (FeatureMapError, "feature_map: got 'favor'", {"feature_map": "favor"}),
    (FeatureMapError, "head_dim=4, this call has 8", {"feature_map": make("elu", 4)}),
    (FeatureMapError, "num_heads=3, this call has 4", {"feature_map": make("hedgehog", D, num_heads=3)}),
    (FeatureMapError, "cannot be causal", {"feature_map": make("nystromformer", D)}),
    (FeatureMapError, "window: ", {"feature_map": make("nystromformer", D), "causal": False, "window": 2}),
    (OptionError, "impl: got", {"feature_map": make("nystromformer", D), "causal": False, "impl": "fast"}),
    (FeatureMapError, "forward_queries returned a Tensor", {"feature_map": Broken(torch.exp)}),
    (FeatureMapError, "forward_queries returned a tuple", {"feature_map": Broken(lambda x: (x, None, None))}),
    (FeatureMapError, "feature_dim is 8", {"feature_map": Broken(lambda x: (x[..., :4], None))}),
    (FeatureMapError, "gave values", {"feature_map": Broken(lambda x: (x.mean(2, keepdim=True), None))}),
    (FeatureMapError, "gave a log_scale", {"feature_map": Broken(lambda x: (x, x.sum(-1, keepdim=True)))}),
    # the far branch
    (OptionError, "leaves nothing to attend to", {"far": False}),
    (OptionError, "decay and far_bias", {"far": False, "window": 2, "decay": -ones(HKV)}),
    (OptionError, "decay and far_bias", {"far": False, "window": 2, "far_bias": ones(H)}),
    (OptionError, "q_far and k_far come together", {"q_far": ones(B, T, H, D)}),
    (OptionError, "q_far and k_far feed", {"far": False, "window": 2, "q_far": ones(1), "k_far": ones(1)}),
    (ShapeError, "q_far: got shape", {"q_far": ones(B, 4, H, D), "k_far": ones(B, T, HKV, D)}),
    (ShapeError, "k_far: got shape", {"q_far": ones(B, T, H, D), "k_far": ones(B, T, HKV, 7)}),
    (FeatureMapError, "head_dim=8, this call has 6", {"q_far": ones(B, T, H, 6), "k_far": ones(B, T, HKV, 6)}),
    (ShapeError, "far_bias: got shape", {"far_bias": ones(HKV)}),
    (DtypeError, "far_bias: got float", {"far_bias": 0.5}),
    (ShapeError, "far_bias: is on meta", {"far_bias": ones(H, device=META)}),
    (ShapeError, "sink_logits: got shape", {"sink_logits": ones(H, 1)}),
    # decay
    (DtypeError, "decay: got float, expected a torch.Tensor", {"decay": -0.5}),
    (DtypeError, r"decay: got torch\.int64", {"decay": ones(HKV, dtype=torch.int64)}),
    (ShapeError, "decay: got shape", {"decay": -ones(H)}),
    (ShapeError, "decay: got shape", {"decay": -ones(B, T)}),
    (ShapeError, "decay: got shape", {"decay": -ones(B, T, H)}),
    (OptionError, "decay: is causal by nature", {"decay": -ones(HKV), "causal": False}),
    # bidirectional and cross
    (OptionError, "state: is causal by nature", {"causal": False, "state": state()}),
    (OptionError, "return_state: is causal by nature", {"causal": False, "return_state": True}),
    (OptionError, "window=2: a window is undefined", {**CROSS, "window": 2}),
    (OptionError, "cu_seqlens: packed cross attention", {
        "causal": False, **PACKED, "k": ones(1, 7, HKV, D), "v": ones(1, 7, HKV, V), "cu_seqlens": torch.tensor([0, 6]),
    }),
    # mask
    (DtypeError, "mask: got list", {"mask": [[True] * T] * B}),
    (DtypeError, r"mask: got torch\.int64, expected torch\.bool", {"mask": ones(B, T, dtype=torch.int64)}),
    (ShapeError, r"mask: got shape \(2, 4\), expected \(2, 5\)", {"mask": ones(B, 4, dtype=torch.bool)}),
    (ShapeError, r"mask: got shape \(2, 5\), expected \(2, 7\)", {**CROSS, "mask": ones(B, T, dtype=torch.bool)}),
    (ShapeError, "mask: is on meta", {"mask": ones(B, T, dtype=torch.bool, device=META)}),
    # packed sequences
    (DtypeError, "cu_seqlens: got list", {**PACKED, "cu_seqlens": [0, 6]}),
    (DtypeError, r"cu_seqlens: got torch\.float32", {**PACKED, "cu_seqlens": torch.tensor([0.0, 6.0])}),
    (ShapeError, "cu_seqlens: got shape", {**PACKED, "cu_seqlens": torch.tensor([6])}),
    (ShapeError, "cu_seqlens: got shape .* with batch 2", {"cu_seqlens": torch.tensor([0, 5])}),
    (ShapeError, r"cu_seqlens: got \[0, 3\]", {**PACKED, "cu_seqlens": torch.tensor([0, 3])}),
    (ShapeError, r"cu_seqlens: got \[1, 6\]", {**PACKED, "cu_seqlens": torch.tensor([1, 6])}),
    (ShapeError, r"cu_seqlens: got \[0, 4, 2, 6\]", {**PACKED, "cu_seqlens": torch.tensor([0, 4, 2, 6])}),
    (ShapeError, r"cu_seqlens: got \[0, 9\]", {**PACKED, "cu_seqlens": torch.tensor([0, 9])}),
    (ShapeError, "cu_seqlens: is on meta", {**PACKED, "cu_seqlens": torch.tensor([0, 6], device=META)}),
    (OptionError, "mask and cu_seqlens exclude", {
        **PACKED, "cu_seqlens": torch.tensor([0, 6]), "mask": ones(1, 6, dtype=torch.bool),
    }),
    # state
    (StateError, "state: got tuple", {"state": (ones(1), ones(1))}),
    (StateError, r"sequences 3 \(expected 2\)", {"state": state(batch_size=3)}),
    (StateError, r"sequences 2 \(expected 3\)", {
        **PACKED, "cu_seqlens": torch.tensor([0, 2, 4, 6]), "state": state(),
    }),
    (StateError, r"num_kv_heads 4 \(expected 2\)", {"state": state(num_kv_heads=4)}),
    (StateError, r"feature_dim 5 \(expected 16\)", {"state": state(feature_dim=5)}),
    (StateError, r"head_dim 6 \(expected 8\)", {"state": state(head_dim=6)}),
    (StateError, r"value_dim 8 \(expected 3\)", {"state": state(value_dim=8)}),
    (StateError, r"window 4 \(expected 0\), sinks 1 \(expected 0\)", {"state": state(window=4, sinks=1)}),
    (StateError, r"far_head_dim 8 \(expected None\)", {"state": state(far_head_dim=8)}),
    (StateError, r"decay False \(expected True\)", {"state": state(), "decay": -ones(HKV)}),
    (StateError, r"feature_dim 16 \(expected 0\)", {"far": False, "window": 2, "state": state(window=2)}),
    (ShapeError, "state: is on meta, q on cpu", {"state": state(device=META)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), WRONG, ids=[f"{i}-{m}" for i, (_, m, _) in enumerate(WRONG)])
def test_wrong_arguments(error: type[LinattnError], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


FEATURES = {"phi_q": ones(B, T, H, D), "phi_k": ones(B, T, HKV, D), "v": ones(B, T, HKV, V)}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (DtypeError, "phi_q: got NoneType", {"phi_q": None}),
        (ShapeError, r"phi_k: got 3 dimensions .*\[B, T, Hkv, F\]", {"phi_k": ones(B, T, D)}),
        (ShapeError, "phi_k: got F=7, expected 8 as in phi_q", {"phi_k": ones(B, T, HKV, 7)}),
        (ShapeError, "v: got .* as in phi_k", {"v": ones(B, 4, HKV, V)}),
        (DtypeError, r"phi_q, phi_k, v: got torch\.float16", {"phi_q": ones(B, T, H, D, dtype=torch.float16)}),
        (ShapeError, "log_scale_q: got", {"log_scale_q": ones(B, T, HKV)}),
        (ShapeError, "log_scale_k: got", {"log_scale_k": ones(B, T, HKV, 1)}),
        (OptionError, "impl: got 'fast'", {"impl": "fast"}),
        (StateError, r"value_dim 8 \(expected 3\)", {"state": state(feature_dim=D, value_dim=8)}),
    ],
)
def test_wrong_arguments_of_linear_attention(error: type[LinattnError], message: str, changes: dict[str, Any]) -> None:
    arguments = {**FEATURES, **changes}
    with pytest.raises(error, match=message):
        linear_attention(arguments.pop("phi_q"), arguments.pop("phi_k"), arguments.pop("v"), **arguments)


def test_maps_for_one_head_serve_any_number() -> None:
    assert call(feature_map=make("hedgehog", D)).out.shape == (B, T, H, V)


# ------------------------------------------------------------------------------------------------- not wrong

SIZES: list[dict[str, int]] = [{}, {"window": 3, "sinks": 2}]
IMPLEMENTATIONS = ["chunked", "reference"]


def inputs(batch: int, queries: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    keys = queries if keys is None else keys
    rng = torch.Generator().manual_seed(5)
    shapes = (batch, queries, H, D), (batch, keys, HKV, D), (batch, keys, HKV, V)
    q, k, v = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return q, k, v


DOUBLE = make("hedgehog", D, num_heads=H, num_kv_heads=HKV, dtype=torch.float64)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_in_nothing_out(impl: str, batch: int, length: int, sizes: dict[str, int]) -> None:
    q, k, v = inputs(batch, length)
    out, after = kernel_attention(q, k, v, feature_map=DOUBLE, impl=impl, return_state=True, lookback=1, **sizes)
    assert out.shape == (batch, length, H, V)
    assert after is not None
    assert after.batch_size == batch
    assert after.lookback == 1
    assert not after.length.any()
    again = kernel_attention(*inputs(batch, 3), feature_map=DOUBLE, impl=impl, state=after, return_state=True, **sizes)
    torch.testing.assert_close(again.out, kernel_attention(*inputs(batch, 3), feature_map=DOUBLE, **sizes).out)
    both = {"feature_map": DOUBLE, "causal": False, "impl": impl}
    assert kernel_attention(q, k, v, **both, **sizes).out.shape == (batch, length, H, V)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_queries_without_keys_get_zero(impl: str, sinks: int) -> None:
    options: dict[str, Any] = {"feature_map": DOUBLE, "causal": False, "sinks": sinks, "impl": impl}
    q, k, v = inputs(2, 3, 0)
    assert torch.equal(kernel_attention(q, k, v, **options).out, torch.zeros(2, 3, H, V, dtype=torch.float64))
    q, k, v = inputs(2, 0, 3)
    assert kernel_attention(q, k, v, **options).out.shape == (2, 0, H, V)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_first_token_answers_with_its_value(impl: str, sizes: dict[str, int]) -> None:
    q, k, v = inputs(2, 1)
    out = kernel_attention(q, k, v, feature_map=DOUBLE, impl=impl, **sizes).out
    torch.testing.assert_close(out, v.repeat_interleave(H // HKV, 2))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(0, 4, 3), (4, 0, 0, 3), (4, 3, 0), (0, 0), (7,)], ids=str)
def test_empty_packed_sequences(lengths: tuple[int, ...], causal: bool, impl: str, sizes: dict[str, int]) -> None:
    q, k, v = inputs(1, sum(lengths))
    for dtype in (torch.int32, torch.int64):
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
        options: dict[str, Any] = {"feature_map": DOUBLE, "causal": causal, "return_state": causal, **sizes}
        out, after = kernel_attention(q, k, v, cu_seqlens=bounds, impl=impl, **options)
        pieces = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        torch.testing.assert_close(out, torch.cat([kernel_attention(*piece, **options).out for piece in pieces], 1))
        if after is not None:
            assert after.length.tolist() == list(lengths)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_gate_of_minus_infinity_forgets(impl: str) -> None:
    """Also for what comes after, and in the state."""
    q, k, v = inputs(1, 20)
    gates = torch.full((1, 20, HKV), -0.1, dtype=torch.float64)
    kept = kernel_attention(*(x[:, 8:] for x in (q, k, v)), feature_map=DOUBLE, decay=gates[:, 8:], return_state=True)
    for gate in (-1e4, -1e30, -torch.inf):
        gates[:, 8] = gate
        out, after = kernel_attention(q, k, v, feature_map=DOUBLE, decay=gates, return_state=True, impl=impl)
        torch.testing.assert_close(out[:, 8:], kept.out)
        assert after is not None
        assert kept.state is not None
        torch.testing.assert_close(
            after.kv * after.log_scale.exp()[..., None, None],
            kept.state.kv * kept.state.log_scale.exp()[..., None, None],
        )


def test_a_window_longer_than_the_sequence_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    neighbours = []
    extend = chunked._extend

    def watched(x: Tensor, before: int, after: int, value: float = 0) -> Tensor:
        neighbours.append(max(before, after))
        return extend(x, min(before, 1), min(after, 1), value)

    monkeypatch.setattr(chunked, "_extend", watched)
    q, k, v = inputs(1, 20)
    for causal in (True, False):
        options: dict[str, Any] = {"feature_map": DOUBLE, "causal": causal, "chunk_size": 10}
        out = kernel_attention(q, k, v, window=10**9, **options).out
        torch.testing.assert_close(out, kernel_attention(q, k, v, window=20, **options).out)
    assert max(neighbours) == 1  # two chunks: one neighbour


# ------------------------------------------------------------------------------------------------- NaN


def test_check_finite() -> None:
    check_finite(a=ones(2), b=None)
    with pytest.raises(NonFiniteError, match="b: contains 1 NaN and 2 infinite values of 4"):
        check_finite(a=ones(2), b=torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("length", [1, 20])
def test_nan_stays_in_its_row(length: int, sizes: dict[str, int]) -> None:
    past = kernel_attention(*inputs(2, 9), feature_map=DOUBLE, return_state=True, **sizes).state
    for before in (None, past):
        q, k, v = inputs(2, length)
        clean = kernel_attention(q, k, v, feature_map=DOUBLE, state=before, return_state=True, **sizes)
        k[0, 0] = torch.nan
        out, after = kernel_attention(q, k, v, feature_map=DOUBLE, state=before, return_state=True, **sizes)
        assert out[0].isnan().any()
        assert torch.equal(out[1], clean.out[1])
        assert after is not None
        assert clean.state is not None
        assert all(torch.equal(t[1], getattr(clean.state, name)[1]) for name, t in after.tensors().items())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("length", [1, 4])
def test_padding_may_hold_nan_while_stepping(length: int, sizes: dict[str, int]) -> None:
    past = kernel_attention(*inputs(3, 9), feature_map=DOUBLE, return_state=True, **sizes).state
    assert past is not None
    past = past.detach()
    mask = torch.tensor([True, False, True])[:, None].expand(3, length)
    results = []
    for fill in (0.0, torch.nan):
        tensors = [x.clone() for x in inputs(3, length)]
        for x in tensors:
            x[1] = fill
            x.requires_grad_()
        out, after = kernel_attention(*tensors, feature_map=DOUBLE, state=past, mask=mask, return_state=True, **sizes)
        assert after is not None
        loss = out.square().sum() + after.kv.square().sum()
        results.append((out, *torch.autograd.grad(loss, [*tensors, *DOUBLE.parameters()]), *after.tensors().values()))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


# ------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(impl: str, dtype: torch.dtype) -> None:
    phi = make("hedgehog", D, num_heads=H, num_kv_heads=HKV)
    for length in (40, 1):
        q, k, v = (x.to(dtype) for x in inputs(2, length))
        options: dict[str, Any] = {"feature_map": phi, "window": 3, "sinks": 1, "return_state": True, "impl": impl}
        want = kernel_attention(q, k, v, **options)
        options["state"] = want.state
        want = kernel_attention(q, k, v, **options)
        with torch.autocast("cpu", torch.bfloat16):
            out, after = kernel_attention(q, k, v, **options)
        assert out.dtype == dtype
        assert torch.equal(out, want.out)
        assert after is not None
        assert want.state is not None
        for name, t in after.tensors().items():
            assert torch.equal(t, getattr(want.state, name)), name
            assert t.dtype == getattr(want.state, name).dtype, name


def test_the_feature_map_runs_under_the_callers_autocast() -> None:
    linear = torch.nn.Linear(D, 8)
    q, k, v = (x.bfloat16() for x in inputs(2, 5))
    seen = []

    def give(x: Tensor) -> tuple[Tensor, None]:
        seen.append(linear(x))  # float32 weights: fails on bfloat16 inputs without autocast
        return seen[-1].exp(), None

    with torch.autocast("cpu", torch.bfloat16):
        out = kernel_attention(q, k, v, feature_map=Broken(give)).out
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert out.dtype == torch.bfloat16


def test_autocast_settles_mixed_dtypes() -> None:
    """As rotary embedding leaves them: float32 queries and keys, bfloat16 values."""
    q, k, v = (x.bfloat16() for x in inputs(2, 5))
    want = kernel_attention(q, k, v, feature_map=HEDGEHOG).out
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel_attention(q.float(), k.float(), v, feature_map=HEDGEHOG).out, want)
        linear_attention(q.float().exp(), k.float().exp(), v)
    with pytest.raises(DtypeError, match="expected one dtype"):
        kernel_attention(q.float(), k.float(), v, feature_map=HEDGEHOG)


def test_float16_features_differentiate_under_vmap() -> None:
    q, k, v = (x.half() for x in inputs(3, 5))
    phi = make("elu", D)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel_attention(q[None], k[None], v[None], feature_map=phi).out.float().square().sum()

    rows = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    alone = torch.stack([torch.func.grad(loss)(*row) for row in zip(q, k, v, strict=True)])
    torch.testing.assert_close(rows, alone)


# ------------------------------------------------------------------------------------------------- auto


def test_auto_says_once_what_it_chose(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_announced", set())
    with caplog.at_level(logging.INFO, logger="linattn"):
        call()
        call()
        call(impl="reference")
    assert [record.getMessage() for record in caplog.records] == [
        "linattn: impl='auto' runs the chunked implementation"
    ]
