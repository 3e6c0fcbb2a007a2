"""Retained tokens: which are kept, what becomes of the others, and that pieces of a sequence equal the whole."""

from __future__ import annotations

import heapq
import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linattn.errors import DtypeError, LinattnError, OptionError, ShapeError, StateError, UnsupportedError
from linattn.feature_maps import make
from linattn.kernels import AttentionOutput, kernel_attention, retain
from linattn.kernels.retain import FOREVER, expiry
from linattn.kernels.slots import DecodeSlots
from linattn.state import AttentionState
from linattn.testing.checks import check_same_state, state_of
from linattn.testing.kernel import Case

LENGTH, WINDOW, SINKS, RETAINED = 44, 4, 2, 7
TOLERANCE: dict[str, float] = {"atol": 1e-10, "rtol": 1e-9}
TOKENWISE = ("q", "k", "v", "q_far", "k_far", "q_sink", "q_retained", "decay", "mask", "scores")


def by_heap(scores: list[float], window: int, retained: int) -> list[int]:
    """Stream: what leaves the window enters a heap; over M, the worst drops out, of equals the younger."""
    ends, heap = [FOREVER] * len(scores), []
    for t in range(len(scores) + window):
        j = t - window
        if not 0 <= j < len(scores):
            continue
        heapq.heappush(heap, (scores[j], -j))
        if len(heap) > retained:
            ends[-heapq.heappop(heap)[1]] = t
    return ends


@pytest.mark.parametrize("length", [1, 5, 64, 300])
@pytest.mark.parametrize(("window", "retained"), [(3, 4), (0, 1), (1, 1), (8, 30), (2, 63), (2, 400)])
def test_expiry(length: int, window: int, retained: int) -> None:
    scores = torch.randint(0, 12, (2, 3, length)) + 0.05 * torch.arange(length)
    scores[0, 0, ::3] = -torch.inf
    found = expiry(scores, window=window, retained=retained)
    for row, ends in zip(scores.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert ends.tolist() == by_heap(row.tolist(), window, retained)
        assert ends[ends < length].sort().values.tolist() == list(range(window + retained, length))  # one a step


# ------------------------------------------------------------------------------------------------ token by token


def by_token(case: Case, given: dict[str, Any]) -> Tensor:
    """Output ``[B, T, H, V]`` from the definition: every query's tokens, one by one, by a heap of scores."""
    groups, phi = case.heads // case.kv_heads, given["feature_map"]
    out = torch.zeros(*given["q"].shape[:3], case.value_dim, dtype=torch.float64)
    if phi is not None:
        far_q, far_k = (given.get(f"{name}_far", given[name]) for name in "qk")
        (f_q, log_q), (f_k, log_k) = phi.forward_queries(far_q), phi.forward_keys(far_k)
    for b in range(case.batch):
        real = [t for t in range(case.length) if "mask" not in given or given["mask"][b, t]]
        for h in range(case.heads):
            g, heap = h // groups, []
            for place, t in enumerate(real):
                if place - WINDOW >= SINKS:
                    left = real[place - WINDOW]
                    heapq.heappush(heap, (float(given["scores"][b, left, g]), -left))
                    if len(heap) > case.retained:
                        heapq.heappop(heap)
                near = {*real[:SINKS], *real[max(place - WINDOW + 1, 0) : place + 1], *(-minus for _, minus in heap)}
                weights, values = [], []
                for i in real[: place + 1]:
                    if i in {-minus for _, minus in heap} and place - real.index(i) > (case.retained_distance or 10**6):
                        afar = given["q_retained"][b, t, h] @ given["k_far"][b, i, g]
                        weights.append((afar * (phi or HALF).scale).exp())
                    elif i in near:
                        weights.append((given["q"][b, t, h] @ given["k"][b, i, g] * (phi or HALF).scale).exp())
                    elif phi is not None:
                        log = 0 if log_q is None else log_q[b, t, h] + log_k[b, i, g]
                        if "decay" in given:
                            gates = given["decay"]
                            gates = gates.expand(case.batch, case.length, -1) if gates.ndim == 1 else gates
                            log = log + sum(gates[b, j, g] for j in real[: place + 1] if j > i)
                        weights.append(f_q[b, t, h] @ f_k[b, i, g] * torch.as_tensor(log).exp())
                    else:
                        continue
                    values.append(given["v"][b, i, g])
                w = torch.stack(weights)
                out[b, t, h] = w @ torch.stack(values) / w.sum()
    return out


class HALF:
    scale = 8**-0.5


def arguments(case: Case, **more: Any) -> dict[str, Any]:
    found = {**case.tensors(), **case.options(), "feature_map": case.feature_map(torch.float64)}
    return {name: x for name, x in found.items() if name != "chunk_size"} | more


def base(**options: Any) -> Case:
    return Case(**{"length": LENGTH, "window": WINDOW, "sinks": SINKS, "retained": RETAINED} | options)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(
    "options",
    [
        {"decay": "constant", "length": 20},
        {"decay": "token", "strength": 1.0},
        {"mask": "scattered"},
        {"far": False},
        {"mask": "scattered", "far_inputs": True, "retained_distance": 9},
    ],
    ids=str,
)
def test_equals_the_definition(options: dict[str, Any], impl: str) -> None:
    case = base(**{"length": 30} | options)
    given = arguments(case)
    out = kernel_attention(**given, impl=impl).out
    torch.testing.assert_close(out, by_token(case, given), **TOLERANCE)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("length", [WINDOW + RETAINED + SINKS, 12, 1])
def test_short_sequences_are_softmax_attention(length: int, impl: str) -> None:
    given = arguments(base(length=length, decay="token", far_bias=True))
    groups = (given[name].transpose(1, 2) for name in "qkv")
    scale = given["feature_map"].scale
    want = torch.nn.functional.scaled_dot_product_attention(*groups, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(kernel_attention(**given, impl=impl).out, want.transpose(1, 2), **TOLERANCE)
    longer = arguments(base(length=WINDOW + RETAINED + SINKS + 1))
    groups = (longer[name].transpose(1, 2) for name in "qkv")
    want = torch.nn.functional.scaled_dot_product_attention(*groups, is_causal=True, scale=scale, enable_gqa=True)
    assert not torch.allclose(kernel_attention(**longer, impl=impl).out, want.transpose(1, 2))


# --------------------------------------------------------------------------------------------------------- pieces


def run(
    given: dict[str, Any], start: int, stop: int, state: AttentionState | None = None, **more: Any
) -> AttentionOutput:
    cut = {
        name: x[:, start:stop] if name in TOKENWISE and x is not None and x.ndim > 1 else x for name, x in given.items()
    }
    return kernel_attention(**cut | more, state=state)


def in_pieces(given: dict[str, Any], cuts: list[int], **more: Any) -> tuple[Tensor, AttentionState]:
    outs, state = [], None
    for start, stop in itertools.pairwise(cuts):
        out, state = run(given, start, stop, state, **more)
        outs.append(out)
    assert state is not None
    return torch.cat(outs, 1), state


def relative(state: AttentionState, like: AttentionState) -> list[Tensor]:
    """The sums of a state, as of the log-scale of another, and what it keeps."""
    factor = (state.log_scale - like.log_scale.detach()).exp()
    kept = [getattr(state, name) for name in ("kept_k", "kept_v", "kept_at", "kept_decay", "recent_v", "sink_k")]
    return [state.kv * factor[..., None, None], state.k * factor[..., None], *(x for x in kept if x is not None)]


SEQUENCES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"decay": "token", "strength": 2.0},
    "constant": {"decay": "constant", "window": 0, "sinks": 0},
    "extras": {
        "decay": "strong", "strength": 2.0, "far_bias": True, "sink_logits": True, "softcap": True, "far_inputs": True,
        "sink_queries": True,
    },
    "left": {"mask": "left", "batch": 3, "decay": "token"},
    "scattered": {"mask": "scattered", "batch": 3, "decay": "token", "strength": 2.0},
    "near-only": {"far": False},
    "aging": {"far_inputs": True, "retained_distance": 9, "decay": "token", "mask": "left", "batch": 3},
    "short": {"length": 10, "decay": "token"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("lookback", "cuts"), [(0, [0]), (0, [0, 4, 4, 13]), (0, None), (3, [0, 1, 5, 6, 7, 20, 21]), (3, [0, 13])], ids=str
)
@pytest.mark.parametrize("name", SEQUENCES)
def test_pieces_equal_the_whole_of_the_reference(name: str, lookback: int, cuts: list[int] | None) -> None:
    """Outputs, states, and gradients through both; cut anywhere, or (None) everywhere."""
    case = base(**SEQUENCES[name])
    given = arguments(case, lookback=lookback)
    leaves = {n: given[n].requires_grad_() for n in case.tensors()}
    watched = [*leaves.values(), *([given["feature_map"].weight] if case.far else [])]
    cuts = list(range(case.length)) if cuts is None else [c for c in cuts if c < case.length]
    want = kernel_attention(**given, impl="reference")
    out, state = in_pieces(given, [*cuts, case.length], impl="chunked", chunk_size=8 if lookback else None)
    torch.testing.assert_close(out, want.out, **TOLERANCE)
    end = state_of(want)
    check_same_state(state, end, 1e-9, f"state of {name}, cut at {cuts}", "generation differs from training.")
    cotangent = torch.randn_like(out)
    results = []
    for o, s in ((out, state), (want.out, end)):
        loss = (o * cotangent).sum() + sum(x.sin().sum() for x in relative(s, end))
        found = torch.autograd.grad(loss, watched, allow_unused=True)
        results.append([torch.zeros_like(x) if g is None else g for x, g in zip(watched, found, strict=True)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9 * max(1.0, float(theirs.abs().max())), rtol=1e-8)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("back", [1, 3])
@pytest.mark.parametrize("seen", [0, 3, 11, 30])
def test_rollback_is_never_having_seen_the_tokens(seen: int, back: int, impl: str) -> None:
    given = arguments(base(decay="token", strength=1.0), lookback=3, impl=impl)
    straight = state_of(run(given, 0, seen))
    other = {name: x.flip(1) if name in TOKENWISE else x for name, x in given.items()}
    returned = state_of(run(other, 5, 5 + back, straight)).rollback(back)
    for steps in ([seen, LENGTH], [*range(seen, seen + 12), LENGTH]):
        states = {}
        for which, state in (("returned", returned), ("straight", straight)):
            outs = []
            for start, stop in itertools.pairwise(steps):
                out, state = run(given, start, stop, state)
                outs.append(out)
            states[which] = torch.cat(outs, 1), state_of(AttentionOutput(out, state))
        torch.testing.assert_close(states["returned"][0], states["straight"][0], **TOLERANCE)
        check_same_state(states["returned"][1], states["straight"][1], 1e-10, "after a rollback", "it is not exact.")


@pytest.mark.parametrize("lookback", [0, 3])
def test_a_lookback_grows_and_shrinks(lookback: int) -> None:
    given = arguments(base(decay="token"), impl="chunked")
    want = kernel_attention(**given).out[:, 20:]
    given.pop("lookback")
    state = state_of(run(given, 0, 20, lookback=3 - lookback))
    state = state.with_lookback(3) if lookback == 3 else state
    shrunk = state_of(run(given, 20, 20, state, lookback=lookback))
    assert (shrunk.lookback, shrunk.retained) == (lookback, RETAINED)
    torch.testing.assert_close(run(given, 20, LENGTH, shrunk, lookback=lookback).out, want, **TOLERANCE)


def test_long_sequences_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(base(length=200, decay="token"))
    want = kernel_attention(**given, impl="reference").out
    monkeypatch.setattr(retain, "GROUP_TOKENS", 32)
    for chunk_size in (5, 16, None):
        torch.testing.assert_close(
            kernel_attention(**given, chunk_size=chunk_size, impl="chunked").out, want, **TOLERANCE
        )


# --------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_of_equal_scores_the_older_stays(impl: str) -> None:
    given = arguments(base(), impl=impl)
    equal = given | {"scores": torch.zeros_like(given["scores"])}
    falling = given | {"scores": -torch.arange(LENGTH).float()[None, :, None].expand_as(given["scores"])}
    torch.testing.assert_close(kernel_attention(**equal).out, kernel_attention(**falling).out, atol=0, rtol=0)
    state = state_of(kernel_attention(**equal))
    torch.testing.assert_close(state.kept_k, given["k"][:, SINKS : SINKS + RETAINED])
    torch.testing.assert_close(in_pieces(equal, list(range(LENGTH + 1)))[1].kept_k, state.kept_k)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_scores_are_read_without_gradients_and_nan_counts_least(impl: str) -> None:
    given = arguments(base(), impl=impl)
    scores = given["scores"].clone().requires_grad_()
    out = kernel_attention(**given | {"scores": scores}).out
    given["q"].requires_grad_()
    assert not out.requires_grad or torch.autograd.grad(out.sum(), scores, allow_unused=True)[0] is None
    bad = given["scores"].clone()
    bad[:, 5] = torch.nan
    low = given["scores"].clone()
    low[:, 5] = -torch.inf
    for cuts in ([0, LENGTH], list(range(LENGTH + 1))):
        results = [in_pieces(given | {"scores": x}, cuts)[0] for x in (bad, low)]
        assert torch.equal(*results)
        assert results[0].isfinite().all()


def test_padding_may_hold_anything() -> None:
    given = arguments(base(mask="left", batch=3, decay="token"), impl="chunked")
    results = []
    for fill in (0.0, torch.nan):
        poisoned = dict(given)
        for name in ("q", "k", "v", "decay", "scores"):
            mask = given["mask"].view(*given["mask"].shape, *[1] * (given[name].ndim - 2))
            poisoned[name] = given[name].masked_fill(~mask, fill)
        results.append(in_pieces(poisoned, [0, 3, 4, 30, 31, LENGTH])[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_none_retained_is_the_operator_as_it_was(impl: str) -> None:
    given = arguments(base(retained=0, decay="token"), impl=impl)
    out, state = kernel_attention(**given)
    again, kept = kernel_attention(**given, retained=0, scores=None)
    assert torch.equal(out, again)
    assert (
        state_of(AttentionOutput(out, kept)).tensors().keys() == state_of(AttentionOutput(out, state)).tensors().keys()
    )
    assert not any(name.startswith("kept") for name in kept.tensors())
    scores = torch.randn(2, LENGTH, 2)
    assert not torch.allclose(kernel_attention(**given, retained=RETAINED, scores=scores).out, out)


def test_aged_tokens_that_show_the_same_to_the_same_are_as_they_were() -> None:
    given = arguments(base(decay="token"), impl="chunked")
    same = given | {"q_far": given["q"], "k_far": given["k"]}
    aging = same | {"q_retained": given["q"], "retained_distance": WINDOW}
    torch.testing.assert_close(run(aging, 0, LENGTH).out, run(same, 0, LENGTH).out, **TOLERANCE)
    far = same | {"q_retained": 3 * given["q"], "retained_distance": LENGTH - 1}
    assert torch.equal(run(far, 0, LENGTH).out, run(same, 0, LENGTH).out)
    assert not torch.allclose(run(far | {"retained_distance": 20}, 0, LENGTH).out, run(same, 0, LENGTH).out)


# ---------------------------------------------------------------------------------------------------------- state


def test_the_state() -> None:
    given = arguments(base(decay="token", far_inputs=True), impl="chunked")
    first = state_of(run(given, 0, 1))
    state = state_of(run(given, 0, LENGTH))
    empty = AttentionState.empty(
        2, num_kv_heads=2, feature_dim=12, head_dim=8, value_dim=6, window=WINDOW, sinks=SINKS, far_head_dim=9,
        decay=True, retained=RETAINED, dtype=torch.float64,
    )  # fmt: skip
    for other in (first, state):
        assert {n: (t.shape, t.dtype) for n, t in other.tensors().items()} == {
            n: (t.shape, t.dtype) for n, t in empty.tensors().items()
        }
        assert (other.retained, other.nbytes) == (RETAINED, empty.nbytes)
    torch.testing.assert_close(run(given, 0, LENGTH, empty).out, run(given, 0, LENGTH).out, **TOLERANCE)
    assert AttentionState.empty(1, num_kv_heads=1, feature_dim=1, head_dim=1).retained == 0
    with pytest.raises(OptionError, match="retained=-1"):
        AttentionState.empty(1, num_kv_heads=1, feature_dim=1, head_dim=1, retained=-1)

    leaves, spec = pytree.tree_flatten(state)
    assert pytree.tree_unflatten(leaves, spec).retained == RETAINED
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert torch.equal(again.kept_score, state.kept_score)

    half = state_of(run(given, 0, 20))
    rows = torch.tensor([1, 0, 1])
    picked = {name: x[rows] if name in TOKENWISE else x for name, x in given.items()}
    want = run(picked, 0, LENGTH).out[:, 20:]
    torch.testing.assert_close(run(picked, 20, LENGTH, half.select(rows)).out, want, **TOLERANCE)
    twice = {name: x.repeat_interleave(2, 0) if name in TOKENWISE else x for name, x in given.items()}
    want = run(twice, 0, LENGTH).out[:, 20:]
    torch.testing.assert_close(run(twice, 20, LENGTH, half.repeat(2).snapshot()).out, want, **TOLERANCE)
    with pytest.raises(StateError, match=r"retained 7 \(expected 0\)"):
        run({**given, "retained": 0, "scores": None}, 20, LENGTH, half)
    with pytest.raises(StateError, match="retained=7 tokens, slots none"):
        DecodeSlots.from_state(half)


@pytest.mark.parametrize("steps", [1, 9])
def test_compiles_as_one_graph(steps: int) -> None:
    aging = base(decay="token", far_inputs=True, retained_distance=9)
    given = arguments(aging, impl="chunked", feature_map=make("elu", 8))
    past, stop = state_of(run(given, 0, 20)), 20 + steps

    def attend(state: AttentionState, **tensors: Tensor) -> AttentionOutput:
        return kernel_attention(
            **tensors, state=state, return_state=True, feature_map=given["feature_map"], retained_distance=9,
            window=WINDOW, sinks=SINKS, retained=RETAINED, impl="chunked",
        )  # fmt: skip

    pieces = {name: x[:, 20:stop] for name, x in given.items() if name in TOKENWISE}
    torch.compiler.reset()
    out, state = torch.compile(attend, fullgraph=True, backend="eager")(past, **pieces)
    want = attend(past, **pieces)
    torch.testing.assert_close(out, want.out)
    assert state is not None
    check_same_state(state, state_of(want), 1e-12, "compiled", "a compiled step differs.")


# -------------------------------------------------------------------------------------------------------- refused


class Positional:
    scale, positional, causal, feature_dim = 1.0, True, True, 8

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, None]:
        return q, None

    forward_keys = forward_queries


AGING = {
    "retained_distance": 9,
    "q_retained": torch.zeros(2, LENGTH, 4, 8),
    "q_far": torch.zeros(2, LENGTH, 4, 8),
    "k_far": torch.zeros(2, LENGTH, 2, 8),
}
WRONG: list[tuple[type[LinattnError], str, dict[str, Any]]] = [
    (OptionError, "retained: got -1, expected an integer", {"retained": -1}),
    (OptionError, "retained: got True, expected an integer", {"retained": True}),
    (OptionError, "retained=7: needs scores", {"scores": None}),
    (OptionError, "scores: choose which tokens are retained, and retained=0", {"retained": 0}),
    (ShapeError, r"scores: got shape \(2, 44\), expected \(2, 44, 2\)", {"scores": torch.zeros(2, LENGTH)}),
    (ShapeError, r"scores: got shape \(2, 44, 4\)", {"scores": torch.zeros(2, LENGTH, 4)}),
    (ShapeError, "scores: is on meta", {"scores": torch.zeros(2, LENGTH, 2, device="meta")}),
    (DtypeError, r"scores: got torch\.int64", {"scores": torch.zeros(2, LENGTH, 2, dtype=torch.int64)}),
    (DtypeError, "scores: got list", {"scores": [0.0]}),
    (OptionError, "q_retained and retained_distance come together", {"retained_distance": 9}),
    (OptionError, "retained_distance: got 3, expected an integer ≥ window=4", AGING | {"retained_distance": 3}),
    (OptionError, "got retained=7 and k_far=None", AGING | {"q_far": None, "k_far": None}),
    (ShapeError, r"q_retained: got shape \(2, 44, 2, 8\)", AGING | {"q_retained": torch.zeros(2, LENGTH, 2, 8)}),
    (UnsupportedError, "retained=7: .* causal by nature", {"causal": False, "return_state": False, "lookback": 0}),
    (UnsupportedError, "retained=7: Positional asks for positions", {"feature_map": Positional()}),
]


@pytest.mark.parametrize(("error", "message", "changes"), WRONG, ids=[m for _, m, _ in WRONG])
def test_wrong_arguments(error: type[LinattnError], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        kernel_attention(**arguments(base()) | changes)


def test_packed_sequences_are_refused() -> None:
    given = arguments(base(batch=1))
    with pytest.raises(UnsupportedError, match="retained=7: packed sequences"):
        kernel_attention(**given, cu_seqlens=torch.tensor([0, 10, LENGTH]))


def test_nothing_in_nothing_out() -> None:
    for length, batch in ((0, 2), (5, 0)):
        given = arguments(base(length=length, batch=batch))
        out, state = kernel_attention(**given, impl="chunked")
        assert out.shape == (batch, length, 4, 6)
        assert state_of(AttentionOutput(out, state)).retained == RETAINED
    assert math.isinf(float(state_of(kernel_attention(**arguments(base(length=0)))).kept_score.max()))
