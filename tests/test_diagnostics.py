"""Diagnostics against the operator itself and against attention matrices whose measures are known."""

import builtins
import math

import pytest
import torch

from linattn.diagnostics import (
    error_by_features,
    kernel_weights,
    measure,
    plot_attention,
    plot_error_by_features,
    softmax_weights,
)
from linattn.errors import FeatureMapError, OptionError, ShapeError, UnsupportedError
from linattn.feature_maps import ELU, Features, available, make
from linattn.kernels import kernel_attention


class Exact(ELU):
    """φ(x) = the standard basis of given tokens: any kernel matrix over T tokens, as a map."""

    name = "exact"

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor):
        super().__init__(head_dim=3)
        self.tables = queries, keys

    def forward_queries(self, q, positions=None):
        return Features(self.tables[0][None, :, None])

    def forward_keys(self, k, positions=None):
        return Features(self.tables[1][None, :, None])


@pytest.fixture
def qkv():
    q = torch.randn(2, 24, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 24, 2, 8, dtype=torch.float64)
    return q, k, v


def test_softmax_weights_give_softmax_attention(qkv):
    q, k, v = qkv
    out = torch.einsum("bhts,bshv->bthv", softmax_weights(q, k), v.repeat_interleave(2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))), is_causal=True
    )
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("info", [info for info in available() if info.causal], ids=lambda info: info.name)
@pytest.mark.parametrize(("window", "sinks", "causal"), [(0, 0, True), (5, 2, True), (3, 1, False)])
def test_kernel_weights_are_those_of_the_operator(qkv, info, window, sinks, causal):
    q, k, v = qkv
    phi = make(info.name, 8, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    weights = kernel_weights(phi, q, k, window=window, sinks=sinks, causal=causal)
    expected = kernel_attention(
        q, k, v, feature_map=phi, window=window, sinks=sinks, causal=causal, impl="reference"
    ).out
    out = torch.einsum("bhts,bshv->bthv", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, expected)
    if info.positive:
        assert weights.min() >= 0


@pytest.mark.parametrize("name", ["nystromformer", "linformer"])
def test_whole_sequence_maps_are_measured_through_their_attention(qkv, name):
    q, k, v = qkv
    phi = make(name, 8, num_heads=4, num_kv_heads=2, num_landmarks=6, dtype=torch.float64)
    weights = kernel_weights(phi, q, k, causal=False)
    out = torch.einsum("bhts,bshv->bthv", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, phi.attend(q, k, v))
    assert measure(phi, q, k, causal=False).output_error.shape == (4,)
    with pytest.raises(UnsupportedError, match="causal=False"):
        measure(phi, q, k)


def test_a_perfect_map_has_no_error(qkv):
    q, k, v = qkv
    phi = make("elu", 8, num_heads=4, num_kv_heads=2)
    found = measure(phi, q, k, v, window=24)
    for name in ("output_error", "kl", "negative_mass"):
        torch.testing.assert_close(getattr(found, name), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(found.entropy, found.softmax_entropy)
    torch.testing.assert_close(found.effective_rank, found.softmax_effective_rank)
    assert set(found.mean()) == set(found._fields)


def test_measures_of_known_matrices():
    """Softmax of zero queries is uniform; a map that attends to the own token alone is the identity."""
    t = 6
    zeros, eye = torch.zeros(1, t, 1, 3), torch.eye(t, dtype=torch.float64)
    identity = measure(Exact(eye, eye), zeros, zeros, causal=False)
    assert identity.softmax_entropy.item() == pytest.approx(math.log(t))
    assert identity.entropy.item() == pytest.approx(0)
    assert identity.softmax_effective_rank.item() == pytest.approx(1)
    assert identity.effective_rank.item() == pytest.approx(t)
    assert identity.kl.item() == math.inf  # softmax attends where the map does not
    assert identity.output_error.item() == pytest.approx(math.sqrt(t - 1))  # ‖I − 11ᵀ/t‖ / ‖11ᵀ/t‖

    mixed = 0.5 * eye + 0.5 / t  # half on itself, half everywhere
    found = measure(Exact(eye, mixed), zeros, zeros, causal=False)
    own, other = 0.5 + 0.5 / t, 0.5 / t
    assert found.kl.item() == pytest.approx(-math.log(t) - (math.log(own) + (t - 1) * math.log(other)) / t)


def test_negative_weights_have_no_divergence():
    t = 4
    eye = torch.eye(t, dtype=torch.float64)
    signed = torch.full((t, t), 0.5, dtype=torch.float64) - eye  # −0.5 on itself, 0.5 elsewhere: rows sum to one
    found = measure(Exact(eye, signed), torch.zeros(1, t, 1, 3), torch.zeros(1, t, 1, 3), causal=False)
    assert math.isnan(found.kl.item())
    assert math.isnan(found.entropy.item())
    assert found.negative_mass.item() == pytest.approx(0.25)
    assert math.isfinite(found.output_error.item())


def test_a_query_that_attends_to_nothing_gives_zeros():
    q, k = -torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1, 4)
    assert torch.equal(kernel_weights(make("relu", 4), q, k), torch.zeros(1, 1, 3, 3, dtype=torch.float64))


def test_error_by_features_falls_and_is_reproducible(qkv):
    q, k, v = (0.5 * x for x in qkv)
    found = error_by_features("favor+", q, k, v, num_features=(8, 512), draws=3)
    assert [point.num_features for point in found] == [8, 512]
    assert found[1].median < found[0].median / 3
    assert all(point.low <= point.median <= point.high for point in found)
    assert found[0].low < found[0].high  # draws differ
    assert error_by_features("favor+", q, k, v, num_features=(8, 512), draws=3) == found
    (once,) = error_by_features("t2r", q, k, num_features=[4], draws=3)
    assert once.low == once.high


def test_bad_input_is_refused(qkv):
    q, k, v = qkv
    phi = make("elu", 8, num_heads=4, num_kv_heads=2)
    with pytest.raises(ShapeError, match=r"v: got \(2, 5, 2, 8\)"):
        measure(phi, q, k, v[:, :5])
    with pytest.raises(ShapeError, match="24 queries and 9 keys"):
        measure(phi, q, k[:, :9])
    with pytest.raises(ShapeError, match=r"\[B, T, H, D\]"):
        softmax_weights(q[0], k[0])
    with pytest.raises(ShapeError, match="ELU was built for"):
        measure(phi, k, k)
    with pytest.raises(OptionError, match="window=-1"):
        measure(phi, q, k, window=-1)
    with pytest.raises(OptionError, match="draws=0"):
        error_by_features("favor+", q, k, draws=0)
    with pytest.raises(FeatureMapError, match="no option 'num_features'"):
        error_by_features("elu", q, k)


def test_plots_show_what_was_measured(qkv):
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    q, k, _ = qkv
    phi = make("favor+", 8, num_heads=4, num_kv_heads=2)
    figure = plot_attention(phi, q, k, head=3, row=1, window=4)
    softmax, approximate, difference = (ax.images[0].get_array() for ax in figure.axes[:3])
    expected = kernel_weights(phi, q, k, window=4)[1, 3] - softmax_weights(q, k)[1, 3]
    below = torch.ones(24, 24, dtype=torch.bool).tril()
    torch.testing.assert_close(torch.tensor(difference.filled(math.nan))[below], expected[below])
    assert softmax.mask[0, 1]  # the future is blank
    assert approximate.shape == (24, 24)
    assert figure.axes[1].get_title() == "favor+, F = 16, window 4 + 0 sinks"

    points = error_by_features("favor+", q, k, num_features=(8, 16), draws=2)
    ax = plot_error_by_features({"FAVOR+": points}, levels={"window": 0.5})
    assert list(ax.lines[0].get_ydata()) == [point.median for point in points]
    assert [text.get_text() for text in ax.get_legend().get_texts()][:2] == ["FAVOR+", "window"]
    plt.close("all")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnsupportedError, match=r"linattn\[plots\]"):
        plot_error_by_features({})
