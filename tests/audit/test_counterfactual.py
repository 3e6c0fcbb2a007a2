"""Counterfactual text: a window forgets at its reach exactly, what reads further does not."""

from __future__ import annotations

import pytest
import torch

from linattn import convert_model
from linattn.audit import counterfactual_kl, far_off, stacked_reach
from linattn.errors import ConversionError, OptionError, ShapeError

WINDOW, SINKS = 5, 2


def test_a_window_only_model_gives_zero_beyond_its_stacked_windows_and_not_before(llama, windows):
    model = convert_model(llama(), window=WINDOW, sinks=SINKS)
    reach = stacked_reach(model)
    assert reach == 2 * (WINDOW - 1) + 1
    with far_off(model):
        kl = counterfactual_kl(model, windows(3, 40), boundary=20, sinks=SINKS)
    assert kl.shape == (3, 20)
    # Column j has j + 1 intact tokens.
    assert not kl[:, reach - 1 :].any()
    assert (kl[:, : reach - 1] > 0).any(0).all()


def test_the_far_branch_and_softmax_see_the_change(llama, windows):
    for model in (llama(), convert_model(llama(), window=WINDOW, sinks=SINKS)):
        assert (counterfactual_kl(model, windows(3, 40), boundary=20, sinks=SINKS) > 1e-9).all()


def test_it_is_the_divergence_of_the_two_forward_passes(llama, windows):
    model, ids, others = llama(), windows(2, 24), windows(4, 24)[2:]
    reports = []
    got = counterfactual_kl(model, ids, others, boundary=9, sinks=1, progress=lambda *r: reports.append(r))
    changed = ids.clone()
    changed[:, 1:9] = others[:, 1:9]
    with torch.no_grad():
        p, q = (model(x, use_cache=False).logits[:, 9:].double().log_softmax(-1) for x in (ids, changed))
    torch.testing.assert_close(got, (p.exp() * (p - q)).sum(-1))
    assert reports == [(1, 2), (2, 2)]
    default = counterfactual_kl(model, ids, boundary=9, sinks=1)
    assert torch.equal(default, counterfactual_kl(model, ids, ids[[1, 0]], boundary=9, sinks=1))


def test_the_same_past_changes_nothing(llama, windows):
    ids = windows(1, 24)
    assert not counterfactual_kl(llama(), ids, ids, boundary=9).any()


def test_what_cannot_be_compared_is_refused(llama, windows):
    with pytest.raises(ShapeError, match="got 1 window"):
        counterfactual_kl(llama(), windows(1), boundary=9)
    with pytest.raises(ShapeError, match="others"):
        counterfactual_kl(llama(), windows(2), windows(3), boundary=9)
    for options in ({"boundary": 40}, {"boundary": 2, "sinks": 2}):
        with pytest.raises(OptionError, match="sinks < boundary"):
            counterfactual_kl(llama(), windows(2, 40), **options)
    with pytest.raises(ConversionError, match="no converted layer"):
        stacked_reach(llama())
