"""Fixed maps against the kernels their papers define."""

import math

import pytest
import torch

from linattn.errors import FeatureMapError, ShapeError
from linattn.feature_maps import Features, make

NAMES = ["elu", "relu", "relu2", "taylor2", "dpfp", "cosformer"]


def expand(features: Features) -> torch.Tensor:
    """The features with their log-scale multiplied in."""
    values, log_scale = features
    return values if log_scale is None else values * log_scale.exp().unsqueeze(-1).to(values.dtype)


def kernel(phi, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, T]`` φ(q)·φ(k) at positions 0, 1, …."""
    positions = torch.arange(q.shape[1])[None].expand(q.shape[0], -1)
    phi_q, phi_k = expand(phi.forward_queries(q, positions)), expand(phi.forward_keys(k, positions))
    return torch.einsum("bthf,bshf->bhts", phi_q, phi_k)


@pytest.fixture
def qk():
    return torch.randn(2, 5, 3, 6, dtype=torch.float64) * 2, torch.randn(2, 5, 3, 6, dtype=torch.float64) * 2


def test_elu(qk):
    q, k = qk
    expected = torch.einsum("bthf,bshf->bhts", torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1)
    torch.testing.assert_close(kernel(make("elu", 6, num_heads=3), q, k), expected)
    far_below_zero = make("elu", 1).forward_keys(torch.full((1, 1, 1, 1), -40.0)).values
    assert far_below_zero.item() == pytest.approx(math.exp(-40.0), rel=1e-5)  # elu(x) + 1 would cancel to 0


def test_relu_and_its_square(qk):
    q, k = qk
    relu = torch.einsum("bthf,bshf->bhts", q.relu(), k.relu())
    squared = torch.einsum("bthf,bshf->bhts", q.relu() ** 2, k.relu() ** 2)
    torch.testing.assert_close(kernel(make("relu", 6, num_heads=3), q, k), relu)
    torch.testing.assert_close(kernel(make("relu2", 6, num_heads=3), q, k), squared)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_taylor2_is_the_series_of_the_scaled_kernel(qk, scale):
    q, k = qk
    phi = make("taylor2", 6, num_heads=3, scale=scale)
    s = torch.einsum("bthf,bshf->bhts", q, k) * (6**-0.5 if scale is None else scale)
    torch.testing.assert_close(kernel(phi, q, k), 1 + s + s**2 / 2)
    assert phi.feature_dim == 1 + 6 + 21


@pytest.mark.parametrize("nu", [1, 3])
def test_dpfp_multiplies_rectified_neighbours(qk, nu):
    q, _ = qk
    features = expand(make("dpfp", 6, num_heads=3, nu=nu).forward_queries(q))
    r = torch.cat([q, -q], -1).relu()
    for shift in range(nu):
        for i in range(12):
            torch.testing.assert_close(features[..., 12 * shift + i], r[..., i] * r[..., i - shift - 1])


def test_cosformer_weighs_by_the_cosine_of_the_distance(qk):
    q, k = qk
    i = torch.arange(5, dtype=torch.float64)
    expected = torch.einsum("bthf,bshf->bhts", q.relu(), k.relu())
    expected = expected * torch.cos(math.pi / 2 * (i[:, None] - i) / 16)
    torch.testing.assert_close(kernel(make("cosformer", 6, num_heads=3, max_length=16), q, k), expected)


def test_cosformer_saturates_past_max_length():
    phi = make("cosformer", 4, max_length=8)
    x = torch.rand(1, 1, 1, 4)

    def at(position: int) -> torch.Tensor:
        return phi.forward_keys(x, torch.tensor([[position]])).values

    assert torch.equal(at(8), at(1_000_000))
    assert (at(3) * at(1_000_000)).sum() >= 0
    assert (at(8) * at(0)).sum().abs() < 1e-6  # a quarter turn apart


@pytest.mark.parametrize("positions", [None, torch.arange(3), torch.arange(4)[None]])
def test_cosformer_asks_for_positions(positions):
    with pytest.raises(ShapeError, match=r"positions: got .* \[B, T\] = \(1, 3\)"):
        make("cosformer", 4).forward_queries(torch.zeros(1, 3, 1, 4), positions)


def test_options_outside_their_domain_are_refused():
    with pytest.raises(FeatureMapError, match="nu=0"):
        make("dpfp", 8, nu=0)
    with pytest.raises(FeatureMapError, match="nu=16"):
        make("dpfp", 8, nu=16)
    with pytest.raises(FeatureMapError, match="max_length=0"):
        make("cosformer", 8, max_length=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_keeps_the_kernel_of_large_inputs(name, dtype):
    """Squares of 1e4 are no half-precision number; the log-scale must carry them."""
    phi = make(name, 6, num_heads=2)
    q, k = (torch.randn(1, 4, 2, 6).to(dtype) * 3e3 for _ in "qk")
    positions = torch.arange(4)[None]
    low = [phi.forward_queries(q, positions), phi.forward_keys(k, positions)]
    exact = kernel(phi, q.double(), k.double())
    wide = [Features(f.values.double(), None if f.log_scale is None else f.log_scale.double()) for f in low]
    assert all(f.values.dtype == dtype for f in low)
    approximate = torch.einsum("bthf,bshf->bhts", *(expand(f) for f in wide))
    # Each value is rounded once to its dtype (or to a subnormal of it), each log-scale once to float32.
    info, sides = torch.finfo(dtype), []
    for f in wide:
        log_error = 0.0 if f.log_scale is None else float(f.log_scale.abs().max()) * torch.finfo(torch.float32).eps
        error = f.values.abs() * (info.eps + log_error) + info.smallest_normal * info.eps
        sides.append((expand(f).abs(), expand(f._replace(values=error))))
    (size_q, error_q), (size_k, error_k) = sides
    allowed = torch.einsum("bthf,bshf->bhts", size_q + error_q, size_k + error_k)
    allowed = allowed - torch.einsum("bthf,bshf->bhts", size_q, size_k)
    assert ((approximate - exact).abs() <= allowed).all()
    assert allowed.max() < 0.1 * exact.max()


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    phi = make(name, 3, num_heads=2)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(2)[None]
    assert torch.autograd.gradcheck(lambda x: expand(phi.forward_queries(x, positions)), x)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    phi = make(name, 5, num_heads=2)
    compiled = torch.compile(phi.forward_keys, fullgraph=True, backend="aot_eager")
    x, positions = torch.randn(1, 3, 2, 5), torch.arange(3)[None]
    torch.testing.assert_close(expand(compiled(x, positions)), expand(phi.forward_keys(x, positions)))
