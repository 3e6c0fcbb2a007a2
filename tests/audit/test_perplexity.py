"""Perplexity: the definition, window by window, and a model left as it was."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from linattn.audit import Perplexity, perplexity
from linattn.errors import OptionError, ShapeError


class Constant(nn.Module):
    """Predicts one distribution, whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.training_seen: list[bool] = []

    def forward(self, ids: Tensor, use_cache: bool) -> types.SimpleNamespace:
        assert not use_cache
        self.training_seen.append(self.training)
        return types.SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_guessing_among_eight_has_perplexity_eight():
    result = perplexity(Constant(torch.zeros(8)), torch.randint(8, (50,)), window=10)
    assert result.value == pytest.approx(8.0)
    assert result.tokens == 5 * 9


def test_it_is_the_mean_cross_entropy_of_separate_windows():
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    tokens = torch.randint(31, (26,))
    result = perplexity(model, tokens, window=8)
    with torch.no_grad():
        log_p = model(tokens[:24].view(3, 8)).logits.double().log_softmax(-1)
    picked = log_p[:, :-1].gather(-1, tokens[:24].view(3, 8)[:, 1:, None])
    assert result.loss == pytest.approx(-picked.mean().item(), rel=1e-6)
    assert result.tokens == 21
    first = perplexity(model, tokens, window=8, max_windows=1)
    assert first.loss == pytest.approx(-picked[0].mean().item(), rel=1e-6)


def test_progress_counts_windows():
    reports = []
    perplexity(
        Constant(torch.zeros(4)), torch.zeros(25, dtype=torch.long), window=6, progress=lambda *x: reports.append(x)
    )
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_model_is_measured_in_evaluation_mode_and_left_as_it_was():
    inner = Constant(torch.zeros(4))
    model = nn.ModuleDict({"inner": inner, "frozen": nn.Dropout().eval()})
    model.forward = inner.forward
    perplexity(model, torch.zeros(12, dtype=torch.long), window=6)
    assert inner.training_seen == [False, False]
    assert (model.training, inner.training, model["frozen"].training) == (True, True, False)
    assert inner.logits.grad is None


def test_a_hopeless_model_is_infinitely_perplexed():
    assert Perplexity(1e4, 1).value == math.inf
    assert Perplexity(0.0, 1).value == 1.0


@pytest.mark.parametrize(
    ("shape", "options", "error", "says"),
    [
        ((5,), {"window": 6}, ShapeError, "window = 6"),
        ((2, 12), {"window": 6}, ShapeError, r"\(2, 12\)"),
        ((12,), {"window": 1}, OptionError, "window=1"),
        ((12,), {"window": 6, "max_windows": 0}, OptionError, "max_windows=0"),
    ],
)
def test_bad_texts_and_windows_are_refused(shape, options, error, says):
    with pytest.raises(error, match=says):
        perplexity(Constant(torch.zeros(4)), torch.zeros(shape, dtype=torch.long), **options)
