"""Low-rank maps: exact where theory says so, causal or refusing to be, blind to padding."""

import pytest
import torch

from linattn.errors import DtypeError, FeatureMapError, NonFiniteError, ShapeError
from linattn.feature_maps import make
from linattn.kernels import kernel_attention

HEADS = {"num_heads": 4, "num_kv_heads": 2}
SEQUENCE = ["nystromformer", "linformer"]


def normal(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(length: int = 11, dim: int = 6, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normal(batch, length, 4, dim), normal(batch, length, 2, dim, seed=1), normal(batch, length, 2, 5, seed=2)


def softmax_attention(q, k, v, mask=None):
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bhts,bshv->bthv", logits.softmax(-1), v)


def kernel(phi, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """φ(x) · φ(y) of one head for tokens ``[n, D]`` and ``[m, D]``."""
    (fx, ax), (fy, ay) = phi(x[None, :, None], y[None, :, None])
    return (fx[0, :, 0] @ fy[0, :, 0].T) * (ax[0] + ay[0].T).exp()


# Nyström


def test_nystrom_is_the_projection_onto_the_landmarks():
    """K(x, L) (K(L, L) + ε diag K(L, L))⁻¹ K(L, y), computed plainly."""
    phi = make("nystrom", 5, num_features=7, epsilon=1e-3, dtype=torch.float64)
    x, y, landmarks = normal(9, 5), normal(8, 5, seed=1), phi.landmarks[0].detach()
    xl, ly, ll = ((phi.scale * a @ b.T).exp() for a, b in ((x, landmarks), (landmarks, y), (landmarks, landmarks)))
    expected = xl @ torch.linalg.solve(ll + 1e-3 * ll.diagonal().diag(), ly)
    torch.testing.assert_close(kernel(phi, x, y), expected)


def test_nystrom_is_exact_at_its_landmarks():
    phi = make("nystrom", 5, num_features=7, epsilon=1e-6, dtype=torch.float64)
    x, landmarks = normal(9, 5), phi.landmarks[0].detach()
    for a, b in ((x, landmarks), (landmarks, x)):
        torch.testing.assert_close(kernel(phi, a, b), (phi.scale * a @ b.T).exp(), rtol=1e-3, atol=1e-3)


def test_nystrom_attention_with_all_tokens_as_landmarks_is_softmax_attention():
    q, k, v = normal(1, 9, 1, 6), normal(1, 9, 1, 6, seed=1), normal(1, 9, 1, 5, seed=2)
    phi = make("nystrom", 6, num_features=18, epsilon=1e-6, dtype=torch.float64)
    phi.fit(q, k, iterations=0)
    for causal in (False, True):
        out = kernel_attention(q, k, v, feature_map=phi, causal=causal).out
        mask = torch.ones(9, 9).tril().bool() if causal else torch.ones(9, 9).bool()
        logits = (q[0, :, 0] @ k[0, :, 0].T * phi.scale).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(out[0, :, 0], logits.softmax(-1) @ v[0, :, 0], rtol=1e-3, atol=1e-3)


def test_nystrom_attention_is_causal():
    q, k, v = tokens()
    phi = make("nystrom", 6, **HEADS, dtype=torch.float64)
    before = kernel_attention(q, k, v, feature_map=phi).out[:, :6]
    for t in (q, k, v):
        t[:, 6:] = 3 * normal(*t[:, 6:].shape, seed=9)
    assert torch.equal(kernel_attention(q, k, v, feature_map=phi).out[:, :6], before)


def test_fitted_landmarks_have_less_error_than_the_starting_ones_and_more_of_them_less():
    centres = normal(6, 8, size=1.5)
    q, k = (centres[torch.arange(200) % 6][None, :, None] + normal(1, 200, 1, 8, seed=s, size=0.4) for s in (1, 2))
    exact = (8**-0.5 * q[0, :, 0] @ k[0, :, 0].T).exp()
    errors = []
    for fit, features in ((False, 16), (True, 8), (True, 16), (True, 64)):
        phi = make("nystrom", 8, num_features=features, dtype=torch.float64)
        if fit:
            phi.fit(q, k)
        errors.append(((kernel(phi, q[0, :, 0], k[0, :, 0]) - exact).norm() / exact.norm()).item())
    start, eight, sixteen, many = errors
    assert many < sixteen < eight < 0.2
    assert sixteen < start / 3


def test_fit_is_deterministic_and_by_key_head():
    q, k, _ = tokens(40)
    phi, twin = (make("nystrom", 6, **HEADS, num_features=8) for _ in range(2))
    phi.fit(q, k)
    torch.manual_seed(5)
    twin.fit(q, k)
    assert torch.equal(phi.landmarks, twin.landmarks)
    q[:, :, 2:], k[:, :, 1:] = 5.0, normal(*k[:, :, 1:].shape, seed=4)
    twin.fit(q, k)
    assert torch.equal(phi.landmarks[0], twin.landmarks[0])
    assert not torch.equal(phi.landmarks[1], twin.landmarks[1])


def test_landmarks_start_from_the_seed_and_learn():
    phi, twin, other = (make("nystrom", 5, **HEADS, num_features=4, seed=s, dtype=torch.float64) for s in (1, 1, 2))
    assert torch.equal(phi.landmarks, twin.landmarks)
    assert not torch.equal(phi.landmarks, other.landmarks)
    assert not torch.equal(phi.landmarks[0], phi.landmarks[1])
    q, k, _ = tokens(3, 5, 1)

    def features(landmarks):
        return [
            f.values * f.log_scale.exp()[..., None]
            for f in torch.func.functional_call(phi, {"landmarks": landmarks}, (q, k))
        ]

    assert torch.autograd.gradcheck(features, (phi.landmarks,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 1e4])
def test_nystrom_is_finite_in_every_dtype_also_with_landmarks_that_coincide(size, dtype):
    phi = make("nystrom", 6, **HEADS)
    with torch.no_grad():
        phi.landmarks[:, 1:] = phi.landmarks[:, :1]
    phi = phi.to(dtype)
    q, k, _ = ((size * t).clamp(-1e4, 1e4).to(dtype) for t in tokens())
    for values, log_scale in phi(q, k):
        assert values.dtype == dtype
        assert log_scale.dtype == torch.float32
        assert values.isfinite().all()
        assert log_scale.isfinite().all()


def test_fit_refuses_what_it_cannot_use():
    phi, (q, k, _) = make("nystrom", 6, **HEADS, num_features=20), tokens(5, batch=1)
    with pytest.raises(ShapeError, match="15 distinct tokens for 20 landmarks"):
        phi.fit(q, k)
    with pytest.raises(NonFiniteError, match="k contains"):
        phi.fit(q, k * torch.nan)
    with pytest.raises(ShapeError, match="q"):
        phi.fit(k, k)


# Nyströmformer


@pytest.mark.parametrize(("iterations", "tolerance"), [(0, 1e-9), (30, 1e-4)])
def test_nystromformer_of_few_tokens_is_softmax_attention(iterations, tolerance):
    q, k, v = tokens()
    phi = make("nystromformer", 6, **HEADS, num_landmarks=16, pinv_iterations=iterations)
    torch.testing.assert_close(phi.attend(q, k, v), softmax_attention(q, k, v), rtol=0, atol=tolerance)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = mask[1, 7] = False
    out, expected = phi.attend(q, k, v, mask), softmax_attention(q, k, v, mask)
    torch.testing.assert_close(out[mask], expected[mask], rtol=0, atol=tolerance)


def test_nystromformer_landmarks_beyond_the_tokens_change_nothing():
    q, k, v = tokens()
    enough, more = (make("nystromformer", 6, **HEADS, num_landmarks=m).attend(q, k, v) for m in (11, 50))
    torch.testing.assert_close(enough, more)


def test_nystromformer_of_segments_is_the_papers_formula():
    """Equation 13 with landmarks of 2 tokens each, for one head."""
    q, k, v = normal(1, 8, 1, 6), normal(1, 8, 1, 6, seed=1), normal(1, 8, 1, 5, seed=2)
    out = make("nystromformer", 6, num_landmarks=4, pinv_iterations=0).attend(q, k, v)[0, :, 0]
    q, k, v = (t[0, :, 0] for t in (q, k, v))
    qm, km = (t.view(4, 2, 6).mean(1) for t in (q, k))
    left, middle, right = ((6**-0.5 * a @ b.T).softmax(-1) for a, b in ((q, km), (qm, km), (qm, k)))
    torch.testing.assert_close(out, left @ torch.linalg.pinv(middle) @ right @ v)


def test_nystromformer_with_the_iterated_inverse_approaches_the_exact_one():
    q, k, v = tokens(40)
    exact = make("nystromformer", 6, **HEADS, num_landmarks=4, pinv_iterations=0).attend(q, k, v)
    errors = [
        (make("nystromformer", 6, **HEADS, num_landmarks=4, pinv_iterations=n).attend(q, k, v) - exact).abs().max()
        for n in (2, 6, 20)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_nystromformer_weights_sum_to_one_and_nothing_real_gives_zero():
    q, k, v = tokens(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1] = False
    phi = make("nystromformer", 6, **HEADS, num_landmarks=5, pinv_iterations=0)
    out = phi.attend(q, k, torch.ones_like(v), mask)
    torch.testing.assert_close(out[0], torch.ones_like(out[0]))
    assert out[1].eq(0).all()


# Linformer


def test_linformer_with_the_identity_as_projection_is_softmax_attention():
    q, k, v = tokens()
    phi = make("linformer", 6, **HEADS, num_landmarks=11, max_length=11, dtype=torch.float64)
    with torch.no_grad():
        for projection in phi.parameters():
            projection.copy_(torch.eye(11))
    torch.testing.assert_close(phi.attend(q, k, v), softmax_attention(q, k, v))


@pytest.mark.parametrize("share_heads", [True, False])
@pytest.mark.parametrize("share_key_value", [True, False])
def test_linformer_projects_along_the_sequence(share_heads, share_key_value):
    options = {"share_heads": share_heads, "share_key_value": share_key_value}
    phi = make("linformer", 6, **HEADS, num_landmarks=3, max_length=16, **options, dtype=torch.float64)
    shape = (1 if share_heads else 2, 3, 16)
    assert [tuple(p.shape) for p in phi.parameters()] == [shape] * (1 if share_key_value else 2)
    q, k, v = tokens()
    e = phi.key_projection.expand(2, -1, -1)[..., :11]
    f = e if share_key_value else phi.value_projection.expand(2, -1, -1)[..., :11]
    expected = softmax_attention(q, torch.einsum("hmt,bthd->bmhd", e, k), torch.einsum("hmt,bthv->bmhv", f, v))
    torch.testing.assert_close(phi.attend(q, k, v), expected)


def test_linformer_refuses_sequences_longer_than_it_was_built_for():
    q, k, v = tokens()
    with pytest.raises(ShapeError, match=r"11 tokens.*max_length=10"):
        make("linformer", 6, **HEADS, max_length=10).attend(q, k, v)


# Both


@pytest.mark.parametrize("name", SEQUENCE)
def test_padding_anywhere_equals_no_padding_whatever_it_holds(name):
    q, k, v = tokens(12)
    phi = make(name, 6, **HEADS, num_landmarks=4, dtype=torch.float64)
    keep = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]).bool()
    expected = phi.attend(*(t[:, keep] for t in (q, k, v)))
    for t in (q, k, v):
        t[:, ~keep] = torch.nan
    out = phi.attend(q, k, v, keep.expand(2, -1))[:, keep]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", SEQUENCE)
def test_cross_attention_takes_other_lengths(name):
    q, k, v = tokens(12)
    out = make(name, 6, **HEADS, num_landmarks=4).attend(q[:, :5].float(), k.float(), v.float())
    assert out.shape == (2, 5, 4, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", SEQUENCE)
def test_gradients(name):
    phi = make(name, 3, num_landmarks=2, dtype=torch.float64)
    inputs = [normal(1, 5, 1, 3, seed=s).requires_grad_() for s in range(3)]
    mask = torch.tensor([[True, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda q, k, v: phi.attend(q, k, v, mask)[mask], inputs)


@pytest.mark.parametrize("name", SEQUENCE)
def test_causal_attention_is_refused(name):
    q, k, v = tokens()
    with pytest.raises(FeatureMapError, match="causal"):
        kernel_attention(q, k, v, feature_map=make(name, 6, **HEADS), causal=True)


@pytest.mark.parametrize("name", SEQUENCE)
def test_shapes_that_do_not_fit_are_refused(name):
    q, k, v = tokens()
    phi = make(name, 6, **HEADS)
    with pytest.raises(ShapeError, match="tokens and heads of k"):
        phi.attend(q, k, v[:, 1:])
    with pytest.raises(ShapeError, match="one batch size"):
        phi.attend(q[:1], k, v)
    with pytest.raises(ShapeError, match="mask"):
        phi.attend(q, k, v, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(DtypeError, match="mask"):
        phi.attend(q, k, v, torch.ones(2, 11))


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("nystrom", {"num_features": 0}, "num_features=0"),
        ("nystrom", {"epsilon": 0}, "epsilon=0"),
        ("nystrom", {"seed": -3}, "seed=-3"),
        ("nystrom", {"scale": 0.0}, "scale=0.0"),
        ("nystromformer", {"num_landmarks": -1}, "num_landmarks=-1"),
        ("nystromformer", {"pinv_iterations": -1}, "pinv_iterations=-1"),
        ("linformer", {"num_landmarks": 1.5}, "num_landmarks=1.5"),
        ("linformer", {"max_length": 0}, "max_length=0"),
        ("linformer", {"length": 8}, "no option 'length'"),
    ],
)
def test_bad_options_are_named(name, options, named):
    with pytest.raises(FeatureMapError, match=named):
        make(name, 8, **options)


@pytest.mark.parametrize("name", ["nystrom", *SEQUENCE])
def test_rebuilt_from_its_options(name):
    options = {"nystrom": {"num_features": 6, "epsilon": 0.01, "seed": 3}, "nystromformer": {"num_landmarks": 3}}
    phi = make(name, 6, **HEADS, **options.get(name, {"share_heads": False, "share_key_value": True}))
    twin = type(phi)(6, **HEADS, **phi.options())
    twin.load_state_dict(phi.state_dict())
    assert twin.options() == phi.options()
    assert twin.feature_dim == phi.feature_dim
