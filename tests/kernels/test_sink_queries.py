"""Sinks behind the window that meet queries of their own, against a dense computation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from linattn.errors import OptionError, ShapeError
from linattn.kernels import chunked, kernel_attention
from linattn.testing.kernel import Case

WINDOW, SINKS = 5, 3


def arguments(case: Case) -> dict:
    found = {**case.tensors(), **case.options()}
    found["q_sink"] = torch.randn_like(found["q"])
    return found | {"feature_map": case.feature_map(torch.float64)}


def dense(q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor, feature_map, decay: Tensor | None, softcap: float | None):
    """Output ``[T, H, V]`` of one sequence, from every pair of its tokens."""
    groups, at = q.shape[1] // k.shape[1], torch.arange(len(q))
    f_q = feature_map.forward_queries(q[None])[0][0]
    f_k = feature_map.forward_keys(k[None])[0][0].repeat_interleave(groups, 1)
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    gap = at[:, None] - at
    behind = (gap >= WINDOW) & (at < SINKS)
    own, sink = (torch.einsum("thd,ihd->hti", x, k) * feature_map.scale for x in (q, q_sink))
    near = torch.where(behind, sink, own)
    near = near if softcap is None else softcap * torch.tanh(near / softcap)
    far = torch.einsum("thf,ihf->hti", f_q, f_k).log()
    if decay is not None:
        clock = decay.cumsum(0).repeat_interleave(groups, 1).T
        far = far + clock[:, :, None] - clock[:, None]
    weights = torch.where((gap < WINDOW) | behind, near, far).masked_fill(gap < 0, -torch.inf)
    return torch.einsum("hti,ihv->thv", weights.softmax(-1), v)


CASES = {
    "plain": {},
    "softcap": {"softcap": True, "decay": "token"},
    "packed": {"packed": (9, 1, 14), "decay": "token"},
    "left-padded": {"mask": "left"},
    "scattered": {"mask": "scattered", "decay": "token"},
}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_every_pair_of_tokens(options, impl):
    case = Case(window=WINDOW, sinks=SINKS, **options)
    given = arguments(case)
    tensors = ("q", "k", "v", "q_sink", *(["decay"] if "decay" in given else []))
    leaves = {name: given[name].requires_grad_() for name in tensors}
    out = kernel_attention(**given, impl=impl).out
    want = torch.zeros_like(out)
    real = given.get("mask", torch.ones(out.shape[:2], dtype=torch.bool))
    rows = [(b, torch.arange(out.shape[1])[real[b]]) for b in range(len(out))]
    if case.packed:
        ends = given["cu_seqlens"].tolist()
        rows = [(0, torch.arange(a, b)) for a, b in itertools.pairwise(ends)]
    for row, at in rows:
        pick = {name: leaf[row, at] for name, leaf in leaves.items()}
        want[row, at] = dense(
            **({"decay": None} | pick), feature_map=given["feature_map"], softcap=given.get("softcap")
        )
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    theirs = torch.autograd.grad((want * weight).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.allclose(out, kernel_attention(**{**given, "q_sink": None}, impl=impl).out)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_parts_and_steps_equal_one_pass(impl, mask):
    case = Case(window=WINDOW, sinks=SINKS, decay="token", mask=mask, length=30)
    given = arguments(case)
    want = kernel_attention(**given, impl=impl).out
    state, outs, start = None, [], 0
    for size in (1, 3, 12, 1, 1, 2, 10):
        part = slice(start, start + size)
        cut = {name: given[name][:, part] for name in ("q", "k", "v", "q_sink", "decay", "mask") if name in given}
        out, state = kernel_attention(**{**given, **cut}, state=state, impl=impl)
        outs.append(out)
        start += size
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-9, atol=1e-9)


def test_long_sequences_in_segments(monkeypatch):
    monkeypatch.setattr(chunked, "SEGMENT_TOKENS", 64)
    given = arguments(Case(window=WINDOW, sinks=SINKS, length=200))
    got, want = (kernel_attention(**given, impl=impl).out for impl in ("chunked", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_is_refused():
    given = arguments(Case(window=WINDOW, sinks=SINKS))
    with pytest.raises(OptionError, match="q_sink meets the sinks"):
        kernel_attention(**{**given, "sinks": 0})
    with pytest.raises(ShapeError, match="q_sink: got shape"):
        kernel_attention(**{**given, "q_sink": given["q_sink"][..., :3]})
