"""Exact attention, split: against every pair of tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linattn.distill.targets import SplitAttention, split_attention
from linattn.errors import OptionError
from linattn.kernels import kernel_attention

LENGTH, HEADS, KV_HEADS = 37, 4, 2


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, HEADS, 8), (2, LENGTH, KV_HEADS, 8), (2, LENGTH, KV_HEADS, 6)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (3 * q).to(dtype), k.to(dtype), v.to(dtype)


CASES = {
    "hybrid": {"window": 5, "sinks": 2},
    "window": {"window": 9, "sinks": 0},
    "sinks": {"window": 0, "sinks": 3},
    "all far": {"window": 0, "sinks": 0},
    "all near": {"window": 40, "sinks": 2},
    "softcap": {"window": 5, "sinks": 2, "softcap": 2.0},
    "sink logits": {"window": 5, "sinks": 2, "sink_logits": torch.tensor([0.5, -1.0, 3.0, 8.0])},
    "native window": {"window": 5, "sinks": 2, "native_window": 11},
}


def dense(q, k, v, *, window, sinks, softcap=None, sink_logits=None, native_window=None):
    """One query of one head at a time."""
    length = q.shape[1]
    near, far = (torch.zeros(2, length, HEADS, v.shape[-1], dtype=torch.float64) for _ in range(2))
    masses = torch.full((2, 2, length, HEADS), -torch.inf, dtype=torch.float64)
    for b in range(2):
        for h in range(HEADS):
            for t in range(length):
                groups: tuple[list[int], list[int]] = ([], [])
                for i in range(t + 1):
                    if native_window is None or t - i < native_window:
                        groups[t - i >= window and i >= sinks].append(i)
                for part, (out, group) in enumerate(zip((near, far), groups, strict=True)):
                    logits = 0.3 * k[b, group, h // 2] @ q[b, t, h]
                    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                    extra = sink_logits is not None and part == 0
                    with_sink = torch.cat([logits, sink_logits[h : h + 1].double()]) if extra else logits
                    if len(with_sink):
                        masses[part, b, t, h] = with_sink.logsumexp(0)
                        out[b, t, h] = with_sink.softmax(0)[: len(group)] @ v[b, group, h // 2]
    return near, far, masses[0], masses[1]


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("case", CASES)
def test_both_parts_equal_a_dense_computation(case, chunk):
    q, k, v = inputs()
    got = split_attention(q, k, v, scale=0.3, chunk=chunk, **CASES[case])
    for mine, want in zip(got, dense(q, k, v, **CASES[case]), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["hybrid", "window", "sinks", "all far", "all near"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_attention_is_split_alike(case, dtype, monkeypatch):
    q, k, v = (x[..., :6] for x in inputs(dtype))
    want = SplitAttention(*dense(q.double(), k.double(), v.double(), **CASES[case]))
    monkeypatch.setattr(torch, "einsum", None)
    got = SplitAttention(*(x.double() for x in split_attention(q, k, v, scale=0.3, **CASES[case])))
    places = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    near, far = 1 - want.far_share, want.far_share
    torch.testing.assert_close(got.far, want.far, **places)
    torch.testing.assert_close(got.log_far, want.log_far, **places)
    torch.testing.assert_close(got.far_share, far, **places)
    torch.testing.assert_close(near[..., None] * got.near, near[..., None] * want.near, **places)
    assert torch.equal(got.log_near.isinf(), want.log_near.isinf())


@pytest.mark.parametrize("case", CASES)
def test_together_they_are_softmax_attention(case):
    q, k, v = inputs()
    options = dict(CASES[case])
    window = options.pop("native_window", LENGTH)
    del options["window"], options["sinks"]
    want = kernel_attention(q, k, v, feature_map=None, far=False, window=window, scale=0.3, **options).out
    got = split_attention(q, k, v, scale=0.3, **CASES[case])
    torch.testing.assert_close(got.out, want, rtol=1e-12, atol=1e-12)
    share = got.far_share
    assert ((share >= 0) & (share <= 1)).all()
    assert (share[:, : min(LENGTH, CASES[case]["window"])] == 0).all()


def test_half_precision_is_split_in_float32():
    got = split_attention(*inputs(torch.bfloat16), scale=0.3, window=5, sinks=2)
    want = split_attention(*(x.double() for x in inputs(torch.bfloat16)), scale=0.3, window=5, sinks=2)
    for mine, exact in zip(got, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_gradients_and_no_queries_by_keys_of_all(monkeypatch):
    q, k, v = (x.requires_grad_() for x in inputs())
    largest = 0
    einsum = torch.einsum

    def watched(equation: str, *operands: Tensor) -> Tensor:
        nonlocal largest
        out = einsum(equation, *operands)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "einsum", watched)
    got = split_attention(q, k, v, scale=0.3, window=5, sinks=2, chunk=4)
    assert not got.out.requires_grad
    assert 0 < largest <= 2 * HEADS * 4 * LENGTH
    with pytest.raises(OptionError, match="chunk"):
        split_attention(q, k, v, scale=0.3, window=5, sinks=2, chunk=0)
