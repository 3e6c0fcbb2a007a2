"""Cross-entropy by position: the definition, known means and errors, and logits that never stand all at once."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
import transformers
from torch import Tensor, nn

from linattn import _heads
from linattn.audit import by_position, mean_over, position_losses, token_losses
from linattn.errors import DtypeError, OptionError, ShapeError


class Even(nn.Module):
    """Finds one of ``size`` tokens as likely as any other."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(float(size)))

    def forward(self, ids: Tensor, use_cache: bool) -> types.SimpleNamespace:
        assert not use_cache
        assert not self.training
        return types.SimpleNamespace(logits=torch.zeros(*ids.shape, int(self.size)))


def log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None])[..., 0]


def test_guessing_among_eight_costs_log_eight_everywhere():
    model = Even(8)
    result = position_losses(model, torch.randint(8, (2, 600)))
    assert [(b.start, b.stop, b.tokens, b.windows) for b in result.buckets] == [
        (0, 128, 2 * 127, 2),
        (128, 256, 2 * 128, 2),
        (256, 512, 2 * 256, 2),
        (512, 1024, 2 * 88, 2),
    ]
    assert [b.mean for b in result.buckets] == pytest.approx([math.log(8)] * 4)
    assert [b.standard_error for b in result.buckets] == pytest.approx([0.0] * 4)
    assert model.training


@pytest.mark.parametrize("logits_at_once", [1, 61 * 7, 2**25])
def test_losses_are_the_cross_entropy_of_each_token(llama, windows, monkeypatch, logits_at_once):
    monkeypatch.setattr(_heads, "LOGITS_AT_ONCE", logits_at_once)
    model, ids = llama(), windows()
    want = -log_likelihood(model, ids).float()
    torch.testing.assert_close(token_losses(model, ids), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(token_losses(model, ids, last=5, rows=2), want[:, -5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "logits_at_once"), [(61, 61 * 4), (997, 997 * 3)])
def test_only_a_slice_of_the_logits_exists_at_a_time(llama, windows, monkeypatch, vocabulary, logits_at_once):
    monkeypatch.setattr(_heads, "LOGITS_AT_ONCE", logits_at_once)
    model, sizes = llama(vocab_size=vocabulary), []
    # The first two calls find out, on 16 tokens, that the logits are the head's output.
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    token_losses(model, windows(2, 40))
    full, rest = divmod(39, logits_at_once // vocabulary)
    a_window = [logits_at_once] * full + [vocabulary * rest] * bool(rest)
    assert sizes == [vocabulary * 16] * 2 + a_window * 2


def test_what_a_model_does_to_its_logits_is_not_left_out(windows):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 0.5}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)
    want = -log_likelihood(model, windows()).float()
    torch.testing.assert_close(token_losses(model, windows()), want, rtol=1e-5, atol=1e-5)


def test_means_and_standard_errors():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 7.0, 8.0]])  # positions 1 … 4
    low, high = by_position(values, edges=(0, 3, 10)).buckets
    assert low == (0, 3, 2.5, pytest.approx(1.0), 4, 2)  # window means 1.5, 3.5: deviation √2, over √2
    assert high == (3, 10, 5.5, pytest.approx(2.0), 4, 2)  # 3.5, 7.5
    assert mean_over(values, start=4) == (4, 5, 6.0, pytest.approx(2.0), 2, 2)
    assert mean_over(values, first=9, start=11).mean == 5.5
    assert by_position(values, first=9, edges=(0, 3, 10)).buckets == ((3, 10, 2.0, pytest.approx(1.0), 2, 2),)


def test_sums_are_double():
    values = torch.full((1, 2**15), 0.1)
    values[0, 0] = 2.0**24
    exact = (2.0**24 + float(torch.tensor(0.1)) * (2**15 - 1)) / 2**15
    assert by_position(values, edges=(0, 2**16)).buckets[0].mean == pytest.approx(exact, rel=1e-12)


def test_as_dict_is_json():
    result = by_position(torch.ones(1, 3)).as_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == {
        "buckets": [{"start": 0, "stop": 128, "mean": 1.0, "standard_error": None, "tokens": 3, "windows": 1}]
    }


def test_progress_counts_windows(llama, windows):
    reports = []
    token_losses(llama(), windows(5, 8), rows=2, progress=lambda *report: reports.append(report))
    assert reports == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("tokens", "options", "error", "says"),
    [
        (torch.zeros(5), {}, DtypeError, "float32"),
        (torch.zeros(5, dtype=torch.long), {}, ShapeError, r"\(5,\)"),
        (torch.zeros(5, 1, dtype=torch.long), {}, ShapeError, r"\(5, 1\)"),
        (torch.zeros(0, 5, dtype=torch.long), {}, ShapeError, r"\(0, 5\)"),
        (torch.zeros(2, 5, dtype=torch.long), {"last": 5}, OptionError, "last=5"),
        (torch.zeros(2, 5, dtype=torch.long), {"last": 0}, OptionError, "last=0"),
        (torch.zeros(2, 5, dtype=torch.long), {"rows": 0}, OptionError, "rows=0"),
    ],
)
def test_bad_tokens_and_options_are_refused(tokens, options, error, says):
    with pytest.raises(error, match=says):
        token_losses(Even(4), tokens, **options)


@pytest.mark.parametrize("edges", [(5,), (0, 5, 5), (5, 0)])
def test_edges_must_rise(edges):
    with pytest.raises(OptionError, match="edges"):
        by_position(torch.ones(1, 3), edges=edges)


def test_a_mean_over_no_position_is_refused():
    with pytest.raises(ShapeError, match="positions 1 … 3"):
        mean_over(torch.ones(1, 3), start=4)
