"""Far gain: truncated contexts token by token, known ratios, and models that can or cannot look back."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
from torch import Tensor, nn

from linattn import convert_model
from linattn.audit import far_gain, far_off, gain_ratio, token_losses, truncated_losses
from linattn.errors import OptionError, ShapeError


class Recall(nn.Module):
    """Knows the token that came ``period`` before, if it sees it; else finds all equally likely."""

    def __init__(self, period: int, size: int = 16) -> None:
        super().__init__()
        self.period, self.size = period, size
        self.confidence = nn.Parameter(torch.tensor(100.0))

    def forward(self, ids: Tensor, use_cache: bool) -> types.SimpleNamespace:
        logits = torch.zeros(*ids.shape, self.size)
        seen = ids[:, : max(ids.shape[1] - self.period + 1, 0)]
        if seen.numel():  # the token after position t came at t + 1 − period before
            logits[:, self.period - 1 :].scatter_(-1, seen[..., None], self.confidence.item())
        return types.SimpleNamespace(logits=logits)


def repeating(period: int, count: int = 3, length: int = 60) -> Tensor:
    ids = torch.randint(16, (count, period), generator=torch.Generator().manual_seed(1))
    return ids.repeat(1, length // period + 1)[:, :length]


@pytest.mark.parametrize("length", [40, 41, 43])
def test_truncated_losses_see_only_the_last_tokens(llama, windows, length):
    model, ids = llama(), windows(2, length)
    alone = [[token_losses(model, row[None, p - 10 : p + 1], last=1).item() for p in range(20, length)] for row in ids]
    got = truncated_losses(model, ids, context=10, start=20)
    torch.testing.assert_close(got, torch.tensor(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [40, 41, 43, 22])
@pytest.mark.parametrize("stride", [2, 4, 10])
def test_strides_leave_out_a_few_tokens_at_most(llama, windows, length, stride):
    model, ids = llama(), windows(2, length)
    got = truncated_losses(model, ids, context=10, start=20, stride=stride)
    exact = [truncated_losses(model, ids, context=c, start=20) for c in range(1, 11)]
    assert got.shape == (2, length - 20)
    for j in range(length - 20):
        near = [losses[:, j] for losses in exact[10 - stride :]]
        assert any(torch.allclose(got[:, j], other, rtol=1e-4, atol=1e-4) for other in near)
    complete = got[:, stride - 1 :: stride]  # the last token of each piece sees all of its context
    torch.testing.assert_close(complete, exact[-1][:, stride - 1 :: stride], rtol=1e-4, atol=1e-4)


def test_what_a_model_recalls_from_afar_is_its_gain():
    ids, near, far = repeating(20), Recall(5), Recall(20)
    sees = far_gain(far, far, ids, context=19, start=25, stride=1)
    assert (sees.teacher.mean, sees.ratio) == (pytest.approx(math.log(16)), pytest.approx(1.0))
    assert (sees.teacher.start, sees.teacher.tokens, sees.teacher.windows) == (25, 3 * 35, 3)
    reaches = far_gain(far, far, ids, context=20, start=25, stride=1)
    assert reaches.teacher.mean == pytest.approx(0.0, abs=1e-6)
    assert far_gain(far, near, ids, context=19, start=25).ratio == pytest.approx(0.0, abs=1e-6)


def test_a_teacher_that_gains_nothing_has_no_ratio():
    ids = torch.zeros(2, 40, dtype=torch.long)
    even = Recall(1000)
    result = far_gain(even, even, ids, context=10, start=20)
    assert math.isnan(result.ratio)
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["ratio"] is None
    assert result.as_dict()["teacher"]["mean"] == 0.0


def test_ratio_and_its_error():
    teacher = torch.tensor([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]])
    half = gain_ratio(teacher, teacher / 2, context=5, start=7)
    assert (half.ratio, half.standard_error) == (0.5, pytest.approx(0.0, abs=1e-12))
    student = torch.tensor([[1.0, 1.0], [4.0, 4.0], [1.0, 1.0]])
    result = gain_ratio(teacher, student, context=5, start=7, stride=2)
    assert result.ratio == pytest.approx(6 / 12)
    left = torch.tensor([5 / 10, 2 / 8, 5 / 6])
    assert result.standard_error == pytest.approx((2 / 3 * (left - left.mean()).square().sum()).sqrt().item())
    assert (result.teacher.mean, result.student.mean, result.context, result.stride) == (4.0, 2.0, 5, 2)
    assert math.isnan(gain_ratio(teacher[:1], student[:1], context=5, start=7).standard_error)


def test_a_window_alone_gains_what_passes_through_its_layers(llama, windows):
    model = convert_model(llama(num_hidden_layers=1), window=6, sinks=0)
    with far_off(model):
        ids = windows(2, 30)
        torch.testing.assert_close(
            truncated_losses(model, ids, context=6, start=10), token_losses(model, ids, last=20), rtol=1e-4, atol=1e-4
        )


def test_progress_counts_measurements():
    reports = []
    even = Recall(1000)
    options = {"context": 10, "start": 20, "progress": lambda *report: reports.append(report)}
    far_gain(even, even, torch.zeros(2, 40, dtype=torch.long), **options)
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"context": 10, "start": 9}, OptionError, "start=9"),
        ({"context": 0, "start": 9}, OptionError, "context=0"),
        ({"context": 4, "start": 9, "stride": 5}, OptionError, "stride=5"),
        ({"context": 10, "start": 40}, ShapeError, "start = 40"),
    ],
)
def test_bad_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        truncated_losses(Recall(5), torch.zeros(2, 40, dtype=torch.long), **options)
