"""Where decays start: at the look-back of softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from linattn import convert_model
from linattn.distill.layers import _look_back, exact, half_lives, trainable_layers

LENGTH = 300


def mean_distances(half_life: float, count: Tensor) -> Tensor:
    means = []
    for n in count.tolist():
        distance = torch.arange(n, dtype=torch.float64)
        weight = 0.5 ** (distance / half_life)
        means.append((weight * distance).sum() / weight.sum())
    return torch.stack(means)


def test_half_lives_are_found_again() -> None:
    count, wanted = torch.arange(1, LENGTH), (9.0, 60.0, 2000.0)
    weight = torch.rand(len(count), 3, dtype=torch.float64)
    distance = torch.stack([mean_distances(h, count) for h in wanted], 1)
    found = half_lives((weight * distance).sum(0), weight, count)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)


def test_half_lives_stay_in_their_range() -> None:
    count = torch.arange(1, LENGTH)
    weight = torch.ones(len(count), 3, dtype=torch.float64)
    weight[:, 2] = 0
    found = half_lives(torch.tensor([0.0, 1e9, 0.0], dtype=torch.float64), weight, count)
    torch.testing.assert_close(found[:2], torch.tensor([8.0, 8192.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert found[2].isnan()


def test_layers_bound_to_a_window_have_nothing_to_learn_from_softmax(llama: Callable[..., LlamaForCausalLM]) -> None:
    model = convert_model(llama(num_hidden_layers=3), window=6, keep_softmax=[1], softmax_window=20)
    assert [path.split(".")[2] for path in trainable_layers(model)] == ["0", "2"]
    assert [path.split(".")[2] for path in trainable_layers(model, far=False)] == ["0", "1", "2"]


@pytest.mark.parametrize("decay", ["fixed", "data"])
@pytest.mark.parametrize(("window", "sinks"), [(20, 3), (0, 0)])
def test_decays_start_at_the_look_back_of_softmax(
    llama: Callable[..., LlamaForCausalLM], decay: str, window: int, sinks: int
) -> None:
    model = convert_model(llama(), window=window, sinks=sinks, decay=decay)
    module = next(iter(trainable_layers(model).values()))
    wanted = torch.tensor([30.0, 90.0])  # of the key heads
    # One query for all, and keys on a line: exp(logit) falls by half in so many tokens.
    q = torch.zeros(2, LENGTH, 4, 8)
    q[..., 0] = 1 / module.feature_map.scale
    k = torch.zeros(2, LENGTH, 2, 8)
    k[..., 0] = torch.arange(LENGTH)[:, None] * math.log(2) / wanted
    v, options = torch.randn(2, LENGTH, 2, 8), {"softcap": None, "sink_logits": None}
    with torch.no_grad():
        _look_back(module, exact(module, q, k, v, options), q[:1], k[:1], options)
        gates = module.log_gates(torch.zeros(1, 1, 2, 8)).reshape(2)
    torch.testing.assert_close(-math.log(2) / gates, wanted, rtol=1e-2, atol=0)
