"""Random maps: what each estimates, with which variance, and that the same seed is the same map everywhere."""

import copy
import io
import math
import pickle

import pytest
import torch

from linattn.errors import FeatureMapError, NonFiniteError, OptionError, ShapeError
from linattn.feature_maps import available, make
from linattn.feature_maps.projections import PROJECTIONS, draw_projection

NAMES = [info.name for info in available() if info.random]
UNBIASED = ["favor+", "favor+hyp", "favor++", "favor#", "rff"]
EXACT = [kind for kind in PROJECTIONS if kind != "structured"]
HEADS = {"num_heads": 4, "num_kv_heads": 2}


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(phi, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """φ(q) · φ(k) / exp(scale q · k) for all pairs: ``[B, H, Tq, Tk]``."""
    (fq, aq), (fk, ak) = phi(q, k)
    group = phi.num_heads // phi.num_kv_heads
    fk, ak, k = (t.repeat_interleave(group, 2) for t in (fk, ak, k))
    log_scale = aq.transpose(1, 2)[..., :, None] + ak.transpose(1, 2)[..., None, :]
    exact = phi.scale * torch.einsum("bthd,bshd->bhts", q, k)
    return torch.einsum("bthf,bshf->bhts", fq, fk) * (log_scale - exact).exp()


def redrawn(phi, q: torch.Tensor, k: torch.Tensor, times: int) -> torch.Tensor:
    """Ratios of ``times`` redraws, ``[times, pairs]``."""
    ratios = []
    for _ in range(times):
        phi.redraw()
        ratios.append(estimate(phi, q, k).flatten())
    return torch.stack(ratios)


def assert_mean_is_one(ratios: torch.Tensor) -> None:
    """Within 6 standard errors, which are small enough to notice a bias of a few percent."""
    error = ratios.std(0) / len(ratios) ** 0.5
    assert error.max() < 0.08
    assert ((ratios.mean(0) - 1).abs() / error).max() < 6


def mse(name: str, q: torch.Tensor, k: torch.Tensor, times: int = 200, fit: bool = False, **options) -> torch.Tensor:
    """Squared relative errors of ``times`` redraws, averaged over pairs: ``[times]``."""
    phi = make(name, q.shape[-1], num_heads=q.shape[2], num_kv_heads=k.shape[2], dtype=torch.float64, **options)
    if fit:
        phi.fit(q, k)
    return (redrawn(phi, q, k, times) - 1).square().mean(1)


# Projections


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (3, 5), (12, 5), (16, 16), (40, 12)])
def test_projections_have_the_shape_asked_for_and_are_finite(kind, shape):
    omega = draw_projection(kind, *shape, seed=0)
    assert omega.shape == shape
    assert omega.dtype == torch.float64
    assert omega.isfinite().all()


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_each_row_of_a_projection_is_a_standard_normal(kind):
    """Moments of a row along the axes and along a diagonal, over 4,000 draws; the fourth only where it is exact."""
    draws = torch.stack([draw_projection(kind, 3, 6, seed=1, draw=i) for i in range(4000)])
    diagonal = draws.sum(-1, keepdim=True) / 6**0.5
    along = torch.cat([draws, diagonal], -1)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15)} | ({4: (3, 96)} if kind in EXACT else {})
    for power, (mean, variance) in moments.items():
        off = (along.pow(power).mean(0) - mean).abs().max()
        assert off < 6 * (variance / len(draws)) ** 0.5, f"moment {power}"


@pytest.mark.parametrize("kind", ["orthogonal", "structured"])
def test_rows_are_orthogonal_within_blocks_with_norms_of_gaussians(kind):
    omega = draw_projection(kind, 20, 8, seed=0)
    for block in omega.split(8):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag())
    norms = draw_projection(kind, 8000, 8, seed=1).square().sum(1)
    assert abs(norms.mean() - 8) < 6 * (16 / 8000) ** 0.5
    assert abs(norms.var() - 16) < 2


def test_quasi_monte_carlo_rows_fill_space_evenly():
    means = {
        kind: torch.stack([draw_projection(kind, 64, 4, seed=0, draw=i).mean(0) for i in range(50)]).square().mean()
        for kind in ("qmc", "iid")
    }
    assert means["qmc"] < means["iid"] / 10


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_projection_depends_on_seed_and_draw_alone(kind):
    expected = draw_projection(kind, 10, 5, seed=3, draw=2)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    with torch.device("meta"):
        again = draw_projection(kind, 10, 5, seed=3, draw=2)
    assert torch.equal(again, expected)
    assert torch.equal(torch.get_rng_state(), before)
    for seed, draw in ((2, 3), (3, 1), (3 + 2**32, 2)):
        assert not torch.equal(draw_projection(kind, 10, 5, seed=seed, draw=draw), expected)


# Estimators


@pytest.mark.parametrize("projection", EXACT)
@pytest.mark.parametrize("name", UNBIASED)
def test_mean_over_redraws_is_the_softmax_kernel(name, projection):
    phi = make(name, 5, **HEADS, num_features=64, projection=projection, dtype=torch.float64)
    assert_mean_is_one(redrawn(phi, normal(1, 4, 4, 5, size=0.4), normal(1, 4, 2, 5, seed=1, size=0.4), 300))


@pytest.mark.parametrize("name", UNBIASED)
def test_structured_projections_are_unbiased_to_the_accuracy_of_their_moments(name):
    phi = make(name, 12, **HEADS, num_features=32, projection="structured", dtype=torch.float64)
    ratios = redrawn(phi, normal(1, 4, 4, 12, size=0.5), normal(1, 4, 2, 12, seed=1, size=0.5), 300)
    assert (ratios.mean(0) - 1).abs().max() < 0.02 + 6 * (ratios.std(0) / 300**0.5).max()


@pytest.mark.parametrize("a", [-2.0, -0.1, 0.0, 0.05])
def test_favor_plus_plus_is_unbiased_for_every_a(a):
    phi = make("favor++", 3, num_features=96, a=a, dtype=torch.float64)
    assert_mean_is_one(redrawn(phi, normal(1, 4, 1, 3, size=0.5), normal(1, 4, 1, 3, seed=1, size=0.5), 300))


@pytest.mark.parametrize("name", ["favor++", "favor#"])
def test_fitted_maps_stay_unbiased_on_tokens_they_were_not_fitted_to(name):
    spread, mean = torch.tensor([2.0, 1, 0.5, 0.2, 0.1]), torch.tensor([0.3, -0.5, 0, 1, 0])
    q, k = normal(1, 400, 4, 5, size=0.6) * spread + mean, normal(1, 400, 2, 5, seed=1, size=0.6) / spread.sqrt() - mean
    phi = make(name, 5, **HEADS, num_features=64, dtype=torch.float64)
    phi.fit(q[:, 8:], k[:, 8:])
    assert_mean_is_one(redrawn(phi, q[:, :4], k[:, :4], 300))


def second_moment(name: str, s: float, dim: int, a: float) -> float:
    """Of one row, relative to the kernel squared, as the docstrings state it, for s = |x + y|²."""
    if name == "favor+hyp":
        return (1 - math.exp(-s)) / 2 * (math.exp(s) - 1) + 1
    rho = 1 / (1 - 8 * a)
    return math.exp(dim * math.log((1 + rho) / (2 * rho)) + dim / 2 * math.log(rho) + rho * s)


@pytest.mark.parametrize(("name", "a"), [("favor+", 0.0), ("favor+hyp", 0.0), ("favor++", -0.2), ("favor++", 0.01)])
def test_variance_of_one_row_is_the_documented_one(name, a):
    options = {"a": a} if name == "favor++" else {}
    x, y = torch.tensor([0.5, -0.2, 0.3]).double(), torch.tensor([0.1, 0.4, 0.2]).double()
    rows, pairs = 200_000, 2 if name == "favor+hyp" else 1
    phi = make(name, 3, num_features=rows * pairs, projection="iid", scale=1.0, dtype=torch.float64, **options)
    fx, fy = phi(x[None, None, None], y[None, None, None])
    products = (fx.values * fy.values)[0, 0, 0] * (fx.log_scale + fy.log_scale - x @ y).exp().item() * rows
    squares = products.view(pairs, rows).sum(0).square()
    expected = second_moment(name, float((x + y).square().sum()), 3, a)
    assert abs(squares.mean() - expected) < 6 * squares.std() / rows**0.5
    assert squares.std() / rows**0.5 < 0.02 * expected


def test_default_and_fitted_a_minimise_the_documented_variance():
    phi = make("favor++", 6, dtype=torch.float64)
    s = 2 * phi.scale * 6
    q, k = normal(1, 50, 1, 6, size=2.0) + 1, normal(1, 50, 1, 6, seed=1) - 0.3
    found = {s: phi.a[0, 0].item()}
    phi.fit(q, k)
    found[phi.scale * (q[:, :, None] + k[:, None]).square().sum(-1).mean().item()] = phi.a[0, 0].item()
    for s, a in found.items():
        best = second_moment("favor++", s, 6, a)
        assert all(best < second_moment("favor++", s, 6, a + step) for step in (-1e-2, -1e-3, 1e-3, 1e-2))


@pytest.mark.parametrize(("name", "fit"), [("favor+", False), ("favor++", True)])
def test_orthogonal_rows_have_less_error_than_independent_ones(name, fit):
    """Choromanski et al. 2021, Theorem 2: in any dimension, for at most D rows. The gap exceeds 3 standard errors."""
    q, k = normal(1, 8, 1, 6, size=0.3), normal(1, 8, 1, 6, seed=1, size=0.3)
    iid, orthogonal = (mse(name, q, k, 3000, fit=fit, num_features=6, projection=p) for p in ("iid", "orthogonal"))
    assert iid.mean() - orthogonal.mean() > 3 * ((iid.var() + orthogonal.var()) / 3000) ** 0.5


def test_hyperbolic_features_have_less_error_than_as_many_one_sided_ones():
    q, k = normal(1, 8, 1, 6, size=0.5), normal(1, 8, 1, 6, seed=1, size=0.5)
    one, both = (mse(name, q, k, num_features=24, projection="iid").mean() for name in ("favor+", "favor+hyp"))
    assert both < 0.8 * one


def test_optimal_features_have_less_error_at_moderate_norms_and_balanced_ones_on_uneven_heads():
    q, k = normal(1, 40, 2, 8), normal(1, 40, 2, 8, seed=1)
    assert mse("favor++", q, k, fit=True).mean() < 0.5 * mse("favor+", q, k).mean()
    spread = torch.logspace(0.3, -1, 8).double()
    q, k = q * spread + 0.7, k * spread.flip(0) - 0.4
    assert mse("favor#", q, k, fit=True).mean() < 0.3 * mse("favor++", q, k, fit=True).mean()


def test_favor_sharp_starts_as_favor_plus_plus():
    q, k = normal(2, 3, 4, 6), normal(2, 3, 2, 6, seed=1)
    sharp, plain = (make(name, 6, **HEADS, dtype=torch.float64) for name in ("favor#", "favor++"))
    for a, b in zip(sharp(q, k), plain(q, k), strict=True):
        torch.testing.assert_close(a.values * a.log_scale.exp()[..., None], b.values * b.log_scale.exp()[..., None])


def test_favor_sharp_balances_the_covariances_of_queries_and_keys():
    q, k = normal(1, 200, 4, 5) @ normal(5, 5, seed=2) + 1, normal(1, 200, 2, 5, seed=1) @ normal(5, 5, seed=3)
    phi = make("favor#", 5, **HEADS, dtype=torch.float64)
    phi.fit(q, k, ridge=1e-9)
    torch.testing.assert_close(phi.query_basis @ phi.key_basis.mT, torch.eye(5).double().expand(2, 5, 5))
    for head in range(2):
        x, y = q[0, :, 2 * head : 2 * head + 2].flatten(0, 1), k[0, :, head]
        x, y = (x @ phi.query_basis[head] * phi.scale**0.5, y @ phi.key_basis[head] * phi.scale**0.5)
        cx, cy = torch.cov(x.T, correction=0), torch.cov(y.T, correction=0)
        torch.testing.assert_close(cx, cx.diagonal().diag(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cx, cy, rtol=1e-6, atol=1e-6)
        for c, a in zip(cx.diagonal().tolist(), phi.a[head].tolist(), strict=True):
            best = second_moment("favor++", 2 * c, 1, a)
            assert all(best < second_moment("favor++", 2 * c, 1, a + step) for step in (-1e-3, 1e-3))


def test_relu_features_converge_to_the_arc_cosine_kernel():
    x, y = normal(1, 1, 1, 4), normal(1, 1, 1, 4, seed=1)
    phi = make("relu-random", 4, num_features=100_000, projection="iid", epsilon=1e-9, scale=1.0, dtype=torch.float64)
    fx, fy = phi(x, y)
    products = (fx.values * fy.values).flatten() * (fx.log_scale + fy.log_scale).exp().item() * 100_000
    lengths = x.norm() * y.norm()
    angle = ((x * y).sum() / lengths).acos()
    expected = lengths * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    assert abs(products.mean() - expected) < 6 * products.std() / 100_000**0.5


@pytest.mark.parametrize("name", [n for n in NAMES if n != "rff"])
def test_positive_features_are_not_negative(name):
    phi = make(name, 7)
    for x in phi(normal(1, 9, 1, 7, size=5).float(), normal(1, 9, 1, 7, size=5).float()):
        assert x.values.min() >= 0
        assert x.values.amax(-1).min() > 0


# Numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_features_are_bounded_and_finite_in_every_dtype(name, size, dtype):
    phi = make(name, 9, **HEADS)
    q, k = ((size * t).clamp(-1e4, 1e4).to(dtype) for t in (normal(2, 3, 4, 9), normal(2, 3, 2, 9)))
    for values, log_scale in phi(q, k):
        assert values.dtype == dtype
        assert log_scale.dtype == torch.float32
        assert values.isfinite().all()
        assert values.abs().max() <= 1
        assert log_scale.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    phi, q, k = make(name, 6), normal(1, 3, 1, 6).float(), normal(1, 3, 1, 6, seed=1).float()
    expected = phi(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(
            torch.equal(a, b) for x, y in zip(phi(q, k), expected, strict=True) for a, b in zip(x, y, strict=True)
        )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_kernel_estimate(name):
    phi = make(name, 3, **HEADS, num_features=8, dtype=torch.float64)
    q, k = normal(1, 2, 4, 3).requires_grad_(), normal(1, 2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: estimate(phi, q, k), (q, k))


# One seed, one map


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_rebuilt_from_its_options_and_redrawn_alike(name, projection):
    phi = make(name, 5, **HEADS, num_features=14, projection=projection, seed=7)
    torch.manual_seed(5)
    twin = type(phi)(5, **HEADS, scale=phi.scale, **phi.options())
    assert same(phi, twin)
    first = phi.omega.clone()
    phi.redraw()
    assert phi.draws == 1
    assert not torch.equal(phi.omega, first)
    loaded = make(name, 5, **HEADS, num_features=14, projection=projection, seed=7)
    file = io.BytesIO()
    torch.save(phi.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    copies = [twin, loaded, pickle.loads(pickle.dumps(phi)), copy.deepcopy(phi)]
    twin.redraw()
    assert all(same(phi, other) for other in copies)
    for other in (phi, *copies):
        other.redraw()
    assert phi.draws == 2
    assert all(same(phi, other) for other in copies)
    phi.reset_parameters()
    assert torch.equal(phi.omega, first)
    assert phi.draws == 0


@pytest.mark.parametrize("name", NAMES)
def test_built_on_meta_and_filled_later(name):
    expected = make(name, 5, **HEADS)
    with torch.device("meta"):
        phi = make(name, 5, **HEADS)
    assert all(t.is_meta for t in phi.state_dict().values())
    phi.to_empty(device="cpu").reset_parameters()
    assert same(phi, expected)


def test_all_heads_share_one_projection_kept_in_at_least_float32():
    phi = make("favor+", 6, **HEADS, dtype=torch.bfloat16)
    assert phi.omega.shape == (12, 6)
    assert phi.omega.dtype == torch.float32
    assert set(phi.state_dict()) == {"omega", "draws"}


def test_fit_survives_saving_and_differs_by_head():
    q, k = normal(1, 60, 4, 5), normal(1, 60, 2, 5, seed=1)
    q[:, :, 2:] *= 3
    for name in ("favor++", "favor#"):
        phi = make(name, 5, **HEADS)
        phi.fit(q, k)
        assert (phi.a[0] > phi.a[1]).all()
        loaded = type(phi)(5, **HEADS, **phi.options())
        assert not same(phi, loaded)
        loaded.load_state_dict(phi.state_dict())
        assert same(phi, loaded)


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("favor+", {"num_features": 0}, "num_features=0"),
        ("favor+", {"num_features": 2.5}, "num_features=2.5"),
        ("favor+hyp", {"num_features": 7}, "multiple of 2"),
        ("rff", {"num_features": 7}, "multiple of 2"),
        ("favor+", {"projection": "orthognal"}, "'orthogonal', 'iid'"),
        ("favor+", {"seed": -1}, "seed=-1"),
        ("favor+", {"seed": 0.5}, "seed=0.5"),
        ("favor+", {"scale": -1.0}, "scale=-1.0"),
        ("favor++", {"a": 0.2}, "a=0.2"),
        ("favor#", {"a": math.nan}, "FavorSharp: a=nan"),
        ("relu-random", {"epsilon": 0}, "epsilon=0"),
        ("favor+", {"features": 8}, "no option 'features'"),
    ],
)
def test_bad_options_are_named(name, options, named):
    with pytest.raises(FeatureMapError, match=named):
        make(name, 8, **options)


def test_bad_samples_are_refused():
    phi, q, k = make("favor#", 5, **HEADS), normal(1, 6, 4, 5), normal(1, 6, 2, 5)
    with pytest.raises(ShapeError, match="k"):
        phi.fit(q, q)
    with pytest.raises(ShapeError, match="no tokens"):
        phi.fit(q[:, :0], k)
    with pytest.raises(NonFiniteError, match="q"):
        phi.fit(q / 0, k)
    with pytest.raises(OptionError, match="ridge"):
        phi.fit(q, k, ridge=0)
