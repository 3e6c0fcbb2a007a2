from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linattn.attention import KernelAttention
from linattn.errors import (
    DtypeError,
    FeatureMapError,
    LinattnError,
    OptionError,
    ShapeError,
    StateError,
    UnsupportedError,
)
from linattn.feature_maps import make

E, H = 16, 4

VARIANTS: dict[str, dict[str, Any]] = {
    "pure": {},
    "hybrid": {"window": 4, "sinks": 2, "far_bias": True},
    "grouped": {"num_kv_heads": 2, "window": 3, "bias": False},
    "rope": {"window": 4, "sinks": 1, "rope": True, "decay": "fixed"},
    "rope far": {"rope": 1000.0, "rope_far": True, "num_kv_heads": 2},
    "gated": {"window": 4, "decay": "data", "qk_norm": True, "num_kv_heads": 1},
    "window alone": {"window": 4, "sinks": 2, "far": False, "rope": True, "feature_map": None},
    "head_dim": {"head_dim": 6, "decay": "fixed"},
}


def build(**options: Any) -> KernelAttention:
    """A float64 module whose learned constants are off their starting values."""
    attn = KernelAttention(E, H, **{"feature_map": "elu", "dtype": torch.float64} | options)
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return attn


@pytest.fixture(params=list(VARIANTS))
def attn(request: pytest.FixtureRequest) -> KernelAttention:
    return build(**VARIANTS[request.param])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 19, E, dtype=torch.float64)


# Equal to softmax attention as long as everything is near.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_multihead_attention_within_window(causal: bool, batch_first: bool, bias: bool) -> None:
    mha = nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first, dtype=torch.float64).eval()
    # Causally the sinks add to the window's reach; bidirectionally it must span the sequence by itself.
    tokens = 10 if causal else 8
    attn = KernelAttention.from_multihead_attention(mha, causal=causal, feature_map="elu", window=8, sinks=2)
    x = torch.randn(3, tokens, E, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    causal_mask = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=torch.float64) if causal else None
    expected, _ = mha(x, x, x, attn_mask=causal_mask)
    out, state = attn(x, x, x)
    torch.testing.assert_close(out, expected)
    assert state is None
    assert not attn.training


def test_equals_multihead_attention_with_padding() -> None:
    mha = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    attn = KernelAttention.from_multihead_attention(mha, causal=False, feature_map="elu", window=7)
    x = torch.randn(2, 7, E, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    expected, _ = mha(x, x, x, key_padding_mask=~mask)
    out, _ = attn(x, mask=mask)
    torch.testing.assert_close(out[mask], expected[mask])


def test_cross_attention_equals_multihead_attention_where_all_keys_are_sinks() -> None:
    mha = nn.MultiheadAttention(E, H, kdim=10, vdim=6, batch_first=True, dtype=torch.float64)
    attn = KernelAttention.from_multihead_attention(mha, causal=False, feature_map="elu", sinks=7)
    query, key, value = (torch.randn(2, n, d, dtype=torch.float64) for n, d in ((5, E), (7, 10), (7, 6)))
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    expected, _ = mha(query, key, value, key_padding_mask=~mask)
    torch.testing.assert_close(attn(query, key, value, mask=mask).out, expected)
    # Beyond the sinks the feature map takes over, and it is not softmax.
    attn.sinks = 2
    assert (attn(query, key, value, mask=mask).out - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 10, "vdim": 6}, {"batch_first": True, "dropout": 0.1}]
)
def test_weights_survive_the_way_there_and_back(options: dict[str, Any]) -> None:
    mha = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for p in mha.parameters():
            p.normal_()
    back = KernelAttention.from_multihead_attention(mha, causal=True, feature_map="elu").to_multihead_attention()
    assert back.state_dict().keys() == mha.state_dict().keys()
    for name, tensor in mha.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
        assert back.state_dict()[name].data_ptr() != tensor.data_ptr()
    for attribute in ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "training"):
        assert getattr(back, attribute) == getattr(mha, attribute)


def test_multihead_attention_with_more_or_less_than_weights_is_refused() -> None:
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(UnsupportedError, match=option):
            KernelAttention.from_multihead_attention(nn.MultiheadAttention(E, H, **{option: True}), causal=True)
    with pytest.raises(DtypeError, match="Linear"):
        KernelAttention.from_multihead_attention(nn.Linear(E, E), causal=True)  # type: ignore[arg-type]
    for options in ({"num_kv_heads": 2}, {"head_dim": 6}, {"rope": True, "window": 2}, {"qk_norm": True}):
        with pytest.raises(UnsupportedError, match="|".join(options)):
            build(**options).to_multihead_attention()


def test_rope_and_qk_norm_equal_those_of_qwen3() -> None:
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3", reason="needs transformers with Qwen3")
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=2, head_dim=4, rope_theta=500.0, rms_norm_eps=1e-6
    )
    config._attn_implementation = "sdpa"
    theirs = qwen3.Qwen3Attention(config, layer_idx=0).double().eval()
    ours = build(num_kv_heads=2, bias=False, rope=500.0, qk_norm=True, window=19)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(ours.get_parameter(name.replace("o_proj", "out_proj")))
    x = torch.randn(2, 19, E, dtype=torch.float64)
    rotary = qwen3.Qwen3RotaryEmbedding(config)(x, torch.arange(19)[None])
    expected, _ = theirs(x, position_embeddings=rotary, attention_mask=None)
    # Both compute their angles, of up to 18, in float32.
    torch.testing.assert_close(ours(x).out, expected, atol=18 * torch.finfo(torch.float32).eps, rtol=0)


# One answer however the sequence arrives.


@pytest.mark.parametrize("sizes", [[7, 1, 11], [1] * 19, [0, 19]], ids=["chunks", "steps", "empty first"])
def test_pieces_with_a_state_equal_the_whole(attn: KernelAttention, x: Tensor, sizes: list[int]) -> None:
    whole, last = attn(x, return_state=True)
    state, pieces = attn.new_state(2), []
    for piece in x.split(sizes, dim=1):
        out, state = attn(piece, state=state, return_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert state.nbytes == attn.new_state(2).nbytes == last.nbytes
    # A sum relative to another log-scale is the same sum: compare what comes next.
    torch.testing.assert_close(attn(x[:, :3], state=state).out, attn(x[:, :3], state=last).out)


def test_padding_changes_nothing(attn: KernelAttention, x: Tensor) -> None:
    lengths = torch.tensor([19, 12])
    real = torch.arange(19) < lengths[:, None]
    for mask in (real, real.flip(1)):
        row = x[1, mask[1]][None]
        padded, state = attn(x, mask=mask, return_state=True)
        alone, alone_state = attn(row, return_state=True)
        torch.testing.assert_close(padded[1, mask[1]][None], alone)
        following = torch.randn(2, 3, E, dtype=torch.float64)
        torch.testing.assert_close(attn(following, state=state).out[1:], attn(following[1:], state=alone_state).out)


def test_packed_sequences_equal_separate_ones(attn: KernelAttention, x: Tensor) -> None:
    bounds = torch.tensor([0, 5, 5, 13, 19], dtype=torch.int32)
    packed, state = attn(x[:1], cu_seqlens=bounds, return_state=True)
    pairs = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    separate = [attn(x[:1, a:b]).out for a, b in pairs]
    torch.testing.assert_close(packed, torch.cat(separate, 1))
    # and go on, each from its own length
    more, _ = attn(x[1:], cu_seqlens=bounds, state=state)
    longer = [attn(torch.cat([x[:1, a:b], x[1:, a:b]], 1)).out[:, b - a :] for a, b in pairs]
    torch.testing.assert_close(more, torch.cat(longer, 1))


def test_bidirectional_packed_and_padded(x: Tensor) -> None:
    attn = build(causal=False, window=3, sinks=1, rope=True)
    packed = attn(x[:1], cu_seqlens=torch.tensor([0, 8, 19])).out
    separate = [attn(x[:1, :8]).out, attn(x[:1, 8:]).out]
    torch.testing.assert_close(packed, torch.cat(separate, 1))
    mask = torch.zeros(1, 19, dtype=torch.bool)
    mask[:, 4:12] = True
    torch.testing.assert_close(attn(x[:1], mask=mask).out[:, 4:12], attn(x[:1, 4:12]).out)


def test_rollback(x: Tensor) -> None:
    attn = build(window=4, sinks=1, rope=True, decay="data")
    _, state = attn(x[:, :9], return_state=True)
    _, ahead = attn(x[:, 9:14], state=state, return_state=True, lookback=5)
    torch.testing.assert_close(attn(x[:, 9:], state=ahead.rollback(5)).out, attn(x).out[:, 9:])


def test_time_first_layout(x: Tensor) -> None:
    attn = build(window=4, rope=True)
    expected = attn(x)
    attn.batch_first = False
    torch.testing.assert_close(attn(x.transpose(0, 1)).out, expected.out.transpose(0, 1))


def test_empty_inputs(attn: KernelAttention) -> None:
    for shape in ((0, 5, E), (2, 0, E)):
        out, state = attn(torch.zeros(shape, dtype=torch.float64), return_state=True)
        assert out.shape == shape
        assert state.batch_size == shape[0]


# What the options mean.


def test_rope_stays_out_of_the_far_branch_unless_asked(x: Tensor) -> None:
    """With sinks only and none of them in reach, the exact branch is empty, and so is the effect of the base."""
    attn = build(sinks=1, rope=True)
    other = copy.deepcopy(attn)
    other.rope = 7.0
    _, state = attn(x, return_state=True)
    state = dataclasses.replace(state, sink_k=torch.zeros_like(state.sink_k))
    torch.testing.assert_close(attn(x, state=state).out, other(x, state=state).out)
    far = build(rope=True, rope_far=True)
    other = copy.deepcopy(far)
    other.rope = 7.0
    assert (far(x).out - other(x).out).abs().max() > 1e-6


def test_decays_start_log_spaced_and_alike() -> None:
    fixed, data = (KernelAttention(E, H, feature_map="elu", decay=kind) for kind in ("fixed", "data"))
    x = torch.randn(1, 3, E)
    half_lives = -torch.log(torch.tensor(2.0)) / fixed._log_gates(x)
    torch.testing.assert_close(half_lives[[0, -1]], torch.tensor([64.0, 8192.0]))
    torch.testing.assert_close(half_lives.log().diff(n=2), torch.zeros(H - 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(data._log_gates(x), fixed._log_gates(x).expand(1, 3, H))


def test_decay_forgets() -> None:
    attn = build(decay="fixed")
    with torch.no_grad():
        attn.log_half_life.fill_(-3.0)  # half of it gone every twentieth of a token
    x = torch.randn(1, 6, E, dtype=torch.float64)
    alone = attn(x[:, -1:]).out
    torch.testing.assert_close(attn(x).out[:, -1:], alone, atol=1e-4, rtol=0)


def test_dropout_only_while_training(x: Tensor) -> None:
    attn = build(dropout=0.5)
    assert not torch.equal(attn(x).out, attn(x).out)
    attn.eval()
    assert torch.equal(attn(x).out, attn(x).out)


def test_far_bias_moves_weight_between_branches(x: Tensor) -> None:
    attn = build(window=4, far_bias=True)
    window_alone = build(window=4, far=False, feature_map=None)
    window_alone.load_state_dict({k: v for k, v in attn.state_dict().items() if k in window_alone.state_dict()})
    with torch.no_grad():
        attn.far_bias.fill_(-50.0)
    torch.testing.assert_close(attn(x).out, window_alone(x).out)


def test_extra_repr_tells_the_truth() -> None:
    text = repr(build(num_kv_heads=2, window=3, sinks=1, rope=True, decay="data", causal=True, far_bias=True))
    for part in ("heads=4/2", "window=3", "sinks=1", "rope=10000", "rope_far=False", "decay='data'", "far_bias=True"):
        assert part in text
    text = build(
        causal=False, kdim=10, far=False, window=2, feature_map=None, batch_first=False, dropout=0.1
    ).extra_repr()
    for part in ("causal=False", "kdim=10", "far=False", "batch_first=False", "dropout=0.1"):
        assert part in text
    assert "rope" not in text
    assert "decay" not in text


# Being a good nn.Module.


def test_gradcheck(attn: KernelAttention) -> None:
    attn = copy.deepcopy(attn)
    x = torch.randn(1, 7, E, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*attn.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), (x,)).out

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def test_every_parameter_learns(attn: KernelAttention, x: Tensor) -> None:
    attn(x).out.square().sum().backward()
    # A bias of the keys cancels in softmax attention; it acts through the feature map alone.
    without = {n for n, p in attn.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-12}
    assert without <= ({"k_proj.bias"} if not attn.far else set())


@pytest.mark.parametrize("feature_map", ["elu", "favor+", "hedgehog"])
def test_meta_init_then_reset_equals_a_plain_start(feature_map: str) -> None:
    def make_one(device: str) -> KernelAttention:
        return KernelAttention(
            E, H, feature_map=feature_map, window=2, decay="data", far_bias=True, qk_norm=True, device=device
        )

    plain, meta = make_one("cpu"), make_one("meta")
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])
    meta = meta.to_empty(device="cpu")
    with torch.no_grad():
        for t in [*meta.parameters(), *meta.buffers()]:
            t.fill_(float("nan")) if t.is_floating_point() else t.zero_()
    torch.manual_seed(1)
    meta.reset_parameters()
    torch.manual_seed(1)
    plain.reset_parameters()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(meta.state_dict()[name], tensor), name
    assert meta(torch.randn(1, 9, E)).out.isfinite().all()


def test_copies_and_checkpoints_give_the_same(attn: KernelAttention, x: Tensor) -> None:
    expected = attn(x).out
    fresh = copy.deepcopy(attn)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(attn.state_dict())
    for other in (fresh, copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        assert torch.equal(other(x).out, expected)


def test_random_features_travel_in_the_checkpoint() -> None:
    a, b = (KernelAttention(E, H, feature_map="favor+") for _ in range(2))
    b.feature_map.redraw()
    x = torch.randn(1, 9, E)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x).out, b(x).out)


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    attn = build(window=4, sinks=2, rope=True, decay="data", far_bias=True, num_kv_heads=2, qk_norm=True).float()
    x = torch.randn(2, 19, E)
    whole = attn(x).out
    compiled = torch.compile(attn, fullgraph=True, backend="eager")
    out, state = compiled(x[:, :9], return_state=True)
    torch.testing.assert_close(out, whole[:, :9])
    torch.testing.assert_close(compiled(x[:, 9:], state=state).out, whole[:, 9:])


def test_half_precision_and_autocast(attn: KernelAttention) -> None:
    attn = copy.deepcopy(attn).float()
    x = torch.randn(2, 33, E)
    expected = attn(x).out
    with torch.autocast("cpu", torch.bfloat16):
        cast, state = attn(x, return_state=True)
        attn(x[:, :1], state=state)
    half = copy.deepcopy(attn).bfloat16()
    low, state = half(x.bfloat16(), return_state=True)
    assert cast.dtype == low.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    # Four roundings in a row (input, projections, heads, output) of values of this size.
    budget = 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item() * 2
    torch.testing.assert_close(cast.float(), expected, atol=budget, rtol=0)
    torch.testing.assert_close(low.float(), expected, atol=budget, rtol=0)


def test_a_feature_map_instance_is_used_as_it_is() -> None:
    phi = make("elu", 4, num_heads=4)
    assert KernelAttention(E, H, feature_map=phi).feature_map is phi
    with pytest.raises(FeatureMapError, match="built for"):
        KernelAttention(E, H, feature_map=phi, num_kv_heads=2)


def test_a_sequence_map_replaces_the_operator() -> None:
    attn = KernelAttention(E, H, feature_map="nystromformer", causal=False)
    x = torch.randn(2, 12, E)
    out, state = attn(x, mask=torch.ones(2, 12, dtype=torch.bool))
    assert out.shape == x.shape
    assert state is None
    with pytest.raises(UnsupportedError, match="cu_seqlens"):
        attn(x[:1], cu_seqlens=torch.tensor([0, 12]))
    with pytest.raises(OptionError, match="causal=False"):
        KernelAttention(E, H, feature_map="nystromformer")
    with pytest.raises(OptionError, match="window"):
        KernelAttention(E, H, feature_map="nystromformer", causal=False, window=4)


# What it refuses.


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"embed_dim": 15}, "head_dim"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 0}, "head_dim"),
        ({"kdim": 0}, "kdim"),
        ({"window": -1}, "window"),
        ({"sinks": -1}, "sinks"),
        ({"dropout": 1.0}, "dropout"),
        ({"decay": "slow"}, "decay"),
        ({"decay": "fixed", "causal": False}, "causal"),
        ({"feature_map": None}, "feature_map"),
        ({"feature_map": None, "far": False, "window": 2, "feature_map_options": {"a": 1}}, "feature_map_options"),
        ({"feature_map": "hedghog"}, "hedgehog"),
        ({"feature_map_options": {"colour": 3}}, "colour"),
        ({"far": False}, "window"),
        ({"far": False, "window": 2, "decay": "data"}, "decay"),
        ({"far_bias": True}, "far_bias"),
        ({"rope": -1.0}, "rope"),
        ({"rope": True}, "rope_far"),
        ({"rope_far": True}, "rope"),
        ({"rope": True, "window": 2, "head_dim": 5}, "even"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], word: str) -> None:
    options = {"embed_dim": E, "num_heads": H, "feature_map": "elu"} | options
    with pytest.raises(LinattnError, match=word):
        KernelAttention(options.pop("embed_dim"), options.pop("num_heads"), **options)


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="windw"):
        KernelAttention(E, H, windw=3)  # type: ignore[call-arg]


def test_inputs_that_do_not_fit(x: Tensor) -> None:
    attn = build(window=3, rope=True)
    _, state = attn(x, return_state=True)
    for error, arguments, options in (
        (ShapeError, (x[0],), {}),
        (ShapeError, (x[..., :-1],), {}),
        (ShapeError, (x, x[:, :5]), {}),
        (ShapeError, (x[:1], x), {}),
        (ShapeError, (x,), {"mask": torch.ones(2, 5, dtype=torch.bool)}),
        (DtypeError, (x,), {"mask": torch.ones(2, 19)}),
        (ShapeError, (x[:1],), {"cu_seqlens": torch.tensor([0, 5])}),
        (ShapeError, (x,), {"cu_seqlens": torch.tensor([0, 19])}),
        (ShapeError, (x[:1],), {"cu_seqlens": torch.tensor([[0, 19]])}),
        (OptionError, (x[:1],), {"cu_seqlens": torch.tensor([0, 19]), "mask": torch.ones(1, 19, dtype=torch.bool)}),
        (StateError, (x[:1],), {"state": state}),
        (StateError, (x[:1],), {"state": state, "cu_seqlens": torch.tensor([0, 4, 9, 19])}),
        (StateError, (x,), {"state": build(window=4, rope=True).new_state(2)}),
        (StateError, (x,), {"state": attn(x, return_state=True)}),
        (ShapeError, (x,), {"state": state.to("meta")}),
        (DtypeError, (x.tolist(),), {}),
        (DtypeError, (x,), {"mask": [[True] * 19] * 2}),
        (DtypeError, (x[:1],), {"cu_seqlens": [0, 19]}),
        (ShapeError, (x[:1],), {"cu_seqlens": torch.tensor([], dtype=torch.int64)}),
    ):
        with pytest.raises(error):
            attn(*arguments, **options)
    with pytest.raises(OptionError, match="key"):
        attn(x, value=x)
    with pytest.raises(LinattnError, match="impl"):
        build(impl="magic")(x)
    with pytest.raises(ShapeError, match="rope"):
        build(causal=False, sinks=1, rope=True)(x, x[:, :5])
    with pytest.raises(OptionError, match="causal"):
        build(causal=False)(x, return_state=True)
    with pytest.raises(OptionError, match="causal"):
        build(causal=False).new_state(1)
