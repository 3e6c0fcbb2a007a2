"""Reading in chunks with the cache gives the logits of one forward pass, and where it does not, that is seen."""

from __future__ import annotations

import pytest
import torch

from linattn import convert_model
from linattn.audit import compare_cached
from linattn.convert import LinattnCacheLayer
from linattn.errors import OptionError, ShapeError


@pytest.mark.parametrize("converted", [False, True])
def test_cached_is_uncached(llama, windows, converted):
    model = llama().double()
    if converted:
        model = convert_model(model, window=5, sinks=2, keep_softmax=[1])
    found = compare_cached(model, windows(2, 40), chunks=(1, 7, 40))
    assert [check.chunk for check in found] == [1, 7, 40]
    for check in found:
        # Float64 sums are rounded to float32 in the comparison alone.
        assert check.difference <= 1e-5 * check.spread
        assert (check.agree, check.tokens) == (1.0, 80)


def test_a_cache_that_forgets_is_seen(llama, windows, monkeypatch):
    model = convert_model(llama(), window=5, sinks=2)
    monkeypatch.setattr(LinattnCacheLayer, "commit", lambda self, state: None)
    one, all_at_once = compare_cached(model, windows(2, 40), chunks=(1, 40))
    assert one.difference > one.spread / 10
    assert one.agree < 0.9
    assert all_at_once.agree == 1.0


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_difference_is_the_greatest_of_either_sign(llama, windows, sign):
    model = llama()
    model.lm_head.register_forward_hook(lambda m, args, out: out + 3 * sign if out.shape[1] == 1 else out)
    one, _ = compare_cached(model, windows(2, 40), chunks=(1, 8))
    assert one.difference == pytest.approx(3, rel=1e-3)
    assert one.agree == 1.0


def test_the_figures_are_those_of_the_logits(llama, windows):
    model, ids = llama(), windows(2, 40)
    with torch.no_grad():
        logits = model(ids).logits
    (check,) = compare_cached(model, ids, chunks=[64])
    assert check.spread == pytest.approx(logits.std().item())


def test_refusals(llama, windows):
    with pytest.raises(OptionError, match="chunks"):
        compare_cached(llama(), windows(), chunks=(0,))
    with pytest.raises(ShapeError, match="expected \\[N, T\\]"):
        compare_cached(llama(), windows()[0])
