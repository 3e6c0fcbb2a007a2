"""Learned maps: their formulas, how they start, and that the start survives what frameworks do to modules."""

import copy

import pytest
import torch

from linattn.errors import FeatureMapError
from linattn.feature_maps import Features, make

NAMES = ["hedgehog", "weighted-hedgehog", "t2r", "rebased", "polysketch", "exp"]


def build(name: str, head_dim: int = 5, **options):
    return make(name, head_dim, num_heads=4, num_kv_heads=2, **options)


def expand(features: Features) -> torch.Tensor:
    values, log_scale = features
    return values if log_scale is None else values * log_scale.exp().unsqueeze(-1).to(values.dtype)


def shake(phi):
    """Move every parameter away from its start."""
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return phi


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 5, dtype=torch.float64)


def test_hedgehog_is_a_softmax_over_signed_projections(x):
    phi = shake(build("hedgehog", dtype=torch.float64))
    y = torch.stack([x[:, :, h] @ phi.query["weight"][h] for h in range(4)], dim=2)
    torch.testing.assert_close(phi.forward_queries(x).values, torch.cat([y, -y], -1).softmax(-1))


def test_weighted_hedgehog_is_hedgehog_times_the_weight_of_each_token(x):
    phi = shake(build("weighted-hedgehog", dtype=torch.float64))
    plain = build("hedgehog", dtype=torch.float64)
    plain.query["weight"].data.copy_(phi.query["weight"])
    weight = torch.stack([(x[:, :, h] @ phi.query["gain"][h]).exp() for h in range(4)], dim=2)
    torch.testing.assert_close(expand(phi.forward_queries(x)), weight[..., None] * plain.forward_queries(x).values)
    assert torch.equal(build("weighted-hedgehog").key["gain"], torch.zeros(2, 5))


def test_t2r_is_a_rectified_affine_map(x):
    phi = shake(build("t2r", num_features=7, dtype=torch.float64))
    y = torch.stack([x[:, :, h] @ phi.query["weight"][h] + phi.query["bias"][h] for h in range(4)], dim=2)
    torch.testing.assert_close(phi.forward_queries(x).values, y.relu())


def test_rebased_squares_an_affine_map_of_the_normalised_vector(x):
    phi = shake(build("rebased", dtype=torch.float64))
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(phi.forward_queries(x).values, (phi.query["gamma"] * y + phi.query["beta"]) ** 2)


def test_polysketch_squares_a_sketch(x):
    phi = shake(build("polysketch", sketch=3, scale=0.7, dtype=torch.float64))
    (matrices,) = phi.query.values()
    first, second = (torch.einsum("bthd,hdr->bthr", 0.7**0.5 * x, matrices[:, i]) for i in (0, 1))
    sketch = first * second / 3**0.5
    other = sketch.flip(1)
    squared = (sketch * other).sum(-1) ** 2
    features = expand(phi.forward_queries(x))
    torch.testing.assert_close((features * features.flip(1)).sum(-1), squared)


@pytest.mark.parametrize("degree", [4, 8])
def test_polysketch_starts_as_an_estimate_of_the_polynomial_kernel(degree):
    """The sketch of degree p / 2 is unbiased: its mean over many columns meets (scale · q·k)^(p / 2)."""
    q = torch.nn.functional.normalize(torch.randn(1, 1, 400, 6, dtype=torch.float64), dim=-1)
    phi = make("polysketch", 6, num_heads=400, num_kv_heads=1, scale=1.0, degree=degree, sketch=64)
    assert len(phi.query) == {4: 1, 8: 2}[degree]
    phi.reset_parameters()
    with torch.no_grad():  # an own draw for every head
        for level in phi.query.values():
            level.normal_()
    estimate = expand(phi.forward_queries(q[:, :, :1].expand_as(q))).square().sum(-1).sqrt().flatten()
    # (S·S)² of a vector with itself: S·S estimates |q|^p = 1.
    assert abs(estimate.mean() - 1) < 4 * estimate.std() / 20


def test_exponential_is_the_formula(x):
    phi = shake(build("exp", num_features=7, scale=0.7, dtype=torch.float64))
    y = 0.7**0.5 * x
    logits = torch.einsum("bthd,hdf->bthf", y, phi.query["weight"]) + phi.query["bias"]
    expected = (logits - y.square().sum(-1, keepdim=True) / 2).exp() / 7**0.5
    values, log_scale = phi.forward_queries(x)
    torch.testing.assert_close(expand(Features(values, log_scale)), expected)
    assert values.max() <= 1
    assert log_scale.dtype == torch.float64


def test_exponential_starts_unbiased():
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64) * 0.8
    heads = 2000
    phi = make("exp", 4, num_heads=heads, num_features=8, scale=0.5)
    phi_q = expand(phi.forward_queries(q.expand(1, 1, heads, 4)))
    phi_k = expand(phi.forward_keys(k.expand(1, 1, heads, 4)))
    estimate = (phi_q * phi_k).sum(-1).flatten()
    exact = (0.5 * (q * k).sum()).exp()
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / heads**0.5


def test_exponential_does_not_explode_with_the_norm():
    """Features of long vectors are as bounded as those of short ones, and so are their gradients."""
    phi = make("exp", 64)
    for size in (1e-3, 1.0, 1e3):
        x = (torch.randn(1, 8, 1, 64) * size).requires_grad_()
        values, log_scale = phi.forward_queries(x)
        assert values.max() <= 1
        assert values.amax(-1).min() > 0.36  # the top feature of every token is in (1/e, 1]
        assert log_scale.isfinite().all()
        values.sum().backward()
        assert x.grad.isfinite().all()


def test_hedgehog_starts_from_the_identity():
    phi = build("hedgehog")
    for parameters, heads in ((phi.query, 4), (phi.key, 2)):
        assert torch.equal(parameters["weight"], torch.eye(5).repeat(heads, 1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_keys_start_with_the_map_of_the_queries_that_read_them(name):
    phi = build(name)
    k = torch.randn(2, 3, 2, 5)
    q = k.repeat_interleave(2, dim=2)
    torch.testing.assert_close(expand(phi.forward_queries(q)), expand(phi.forward_keys(k)).repeat_interleave(2, dim=2))
    for name_, key in phi.key.items():
        assert phi.query[name_].shape == (4, *key.shape[1:])
        assert key.shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
def test_starts_anew_after_a_meta_initialisation(name):
    torch.manual_seed(3)
    expected = build(name)
    phi = build(name, device="meta")
    assert all(p.is_meta for p in phi.parameters())
    phi = phi.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(3)
    with torch.device("meta"):  # as loaders do: the default device must not matter
        phi.reset_parameters()
    for key, value in expected.state_dict().items():
        assert torch.equal(phi.state_dict()[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_builds_under_a_default_dtype_of_bfloat16(name):
    torch.set_default_dtype(torch.bfloat16)
    try:
        phi = build(name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in phi.parameters()} == {torch.bfloat16}
    assert phi.forward_queries(torch.randn(1, 2, 4, 5, dtype=torch.bfloat16)).values.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_start_survives_a_hugging_face_initialisation(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    model = transformers.LlamaModel(config)
    model.layers[0].self_attn.feature_map = phi = build(name)
    before = copy.deepcopy(phi.state_dict())
    for module in model.modules():
        model._init_weights(module)
    assert before
    for key, value in before.items():
        assert torch.equal(phi.state_dict()[key], value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["queries", "keys"])
def test_gradients_of_inputs_and_parameters(name, kind):
    phi = shake(make(name, 3, num_heads=2, num_kv_heads=1, dtype=torch.float64))
    heads, parameters = (2, phi.query) if kind == "queries" else (1, phi.key)
    x = torch.randn(1, 2, heads, 3, dtype=torch.float64, requires_grad=True)

    def features(x, *values):
        return expand(phi.features(x, dict(zip(parameters, values, strict=True))))

    assert torch.autograd.gradcheck(features, (x, *parameters.values()))
    assert torch.equal(features(x, *parameters.values()), expand(getattr(phi, f"forward_{kind}")(x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e4])
def test_finite_in_half_precision(name, dtype, size):
    phi = build(name)
    x = (torch.randn(2, 3, 4, 5) * size).to(dtype)
    values, log_scale = phi.forward_queries(x)
    assert values.dtype == dtype
    assert values.isfinite().all()
    assert (values >= 0).all() or name == "polysketch"
    if log_scale is not None:
        assert log_scale.dtype == torch.float32
        assert log_scale.isfinite().all()
        assert values.abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_round_the_projection(name):
    phi = build(name)
    x = torch.randn(1, 3, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = phi.forward_queries(x)
    torch.testing.assert_close(expand(features), expand(phi.forward_queries(x)))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    phi = build(name)
    compiled = torch.compile(phi.forward_keys, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 2, 5)
    torch.testing.assert_close(expand(compiled(x)), expand(phi.forward_keys(x)))


def test_options_outside_their_domain_are_refused():
    with pytest.raises(FeatureMapError, match="T2R: num_features=0"):
        make("t2r", 8, num_features=0)
    with pytest.raises(FeatureMapError, match="Exponential: num_features=-1"):
        make("exp", 8, num_features=-1)
    with pytest.raises(FeatureMapError, match="PolySketch: sketch=0"):
        make("polysketch", 8, sketch=0)
    for degree in (0, 2, 3, 6):
        with pytest.raises(FeatureMapError, match=f"PolySketch: degree={degree}"):
            make("polysketch", 8, degree=degree)
