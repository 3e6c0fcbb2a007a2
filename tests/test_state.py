"""AttentionState: what can be done to a memory between two calls."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linattn import AttentionState, KernelAttention
from linattn.errors import OptionError, StateError
from linattn.feature_maps import make
from linattn.kernels import chunked, dispatch, kernel_attention

LAYOUTS = [{}, {"window": 4, "sinks": 2}, {"window": 4}, {"sinks": 3}]
TOKENS = 12


class Layer:
    """One layer with decay and separate far keys, fed from a fixed sequence of three rows."""

    def __init__(self, *, decay: bool = True, length: int = 40, dtype: torch.dtype = torch.float64, **options: int):
        rng = torch.Generator().manual_seed(0)
        names = ("q", "k", "v", "q_far", "k_far")
        self.tensors = {n: torch.randn(3, length, 2, 4, generator=rng, dtype=torch.float64).to(dtype) for n in names}
        if decay:
            self.tensors["decay"] = -torch.rand(3, length, 2, generator=rng, dtype=torch.float64)
        self.options = {**options, "feature_map": make("favor+", 4, num_heads=2).to(dtype), "return_state": True}

    def run(
        self,
        start: int,
        stop: int,
        state: AttentionState | None = None,
        *,
        lookback: int = 0,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        pieces = {n: t[:, start:stop] if rows is None else t[rows, start:stop] for n, t in self.tensors.items()}
        out, state = kernel_attention(**pieces, **self.options, state=state, lookback=lookback)
        assert state is not None
        return out, state


def assert_continues(layer: Layer, state: AttentionState, expected: AttentionState) -> None:
    """Both states, after ``TOKENS`` tokens, answer the rest of the sequence alike, in one call and token by token."""
    torch.testing.assert_close(layer.run(TOKENS, 40, state)[0], layer.run(TOKENS, 40, expected)[0])
    for t in range(TOKENS, TOKENS + 8):
        out, state = layer.run(t, t + 1, state)
        want, expected = layer.run(t, t + 1, expected)
        torch.testing.assert_close(out, want)


# ------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_empty(dtype: torch.dtype) -> None:
    state = AttentionState.empty(
        3,
        num_kv_heads=2,
        feature_dim=5,
        head_dim=4,
        value_dim=6,
        window=7,
        sinks=2,
        lookback=1,
        far_head_dim=3,
        decay=True,
        dtype=dtype,
    )
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in state.tensors().items()}
    assert shapes == {
        "kv": ((3, 2, 5, 6), sums),
        "k": ((3, 2, 5), sums),
        "log_scale": ((3, 2), sums),
        "length": ((3,), torch.int64),
        "folded": ((3,), torch.int64),
        "recent_k": ((3, 8, 2, 4), dtype),
        "recent_v": ((3, 8, 2, 6), dtype),
        "sink_k": ((3, 2, 2, 4), dtype),
        "sink_v": ((3, 2, 2, 6), dtype),
        "recent_far_k": ((3, 8, 2, 3), dtype),
        "recent_decay": ((3, 8, 2), sums),
    }
    assert (state.batch_size, state.window, state.sinks, state.lookback) == (3, 7, 2, 1)


@pytest.mark.parametrize("option", ["window", "sinks", "lookback"])
def test_empty_refuses_negative_sizes(option: str) -> None:
    with pytest.raises(OptionError, match=f"{option}=-1"):
        AttentionState.empty(1, num_kv_heads=1, feature_dim=1, head_dim=1, **{option: -1})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_empty_state_is_no_past(layout: dict[str, int]) -> None:
    layer = Layer(**layout)
    empty = AttentionState.empty(
        3, num_kv_heads=2, feature_dim=layer.options["feature_map"].feature_dim, head_dim=4, far_head_dim=4, decay=True,
        dtype=torch.float64, **layout,
    )  # fmt: skip
    torch.testing.assert_close(layer.run(0, 40, empty)[0], layer.run(0, 40)[0])
    torch.testing.assert_close(layer.run(0, 5, empty)[0], layer.run(0, 5)[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bytes_do_not_grow(layout: dict[str, int]) -> None:
    layer = Layer(dtype=torch.bfloat16, **layout)
    first = state = layer.run(0, 1)[1]
    for t in range(1, 40):
        state = layer.run(t, t + 1, state)[1]
    for other in (state, layer.run(0, 40)[1]):
        assert other.nbytes == first.nbytes
        for name, t in other.tensors().items():
            was = getattr(first, name)
            assert (t.shape, t.dtype) == (was.shape, was.dtype), name
            # What a tensor keeps alive beyond its own bytes is bounded by one short call.
            assert t.untyped_storage().nbytes() - t.numel() * t.element_size() <= chunked.STEP_TOKENS * 3 * 2 * 4 * 4


def test_states_compare_by_identity() -> None:
    layer = Layer()
    a, b = layer.run(0, 5)[1], layer.run(0, 5)[1]
    assert a == a
    assert a != b
    assert len({a, b}) == 2


# ------------------------------------------------------------------------------------------------- rows and copies


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_select_and_repeat(layout: dict[str, int]) -> None:
    layer = Layer(**layout)
    state = layer.run(0, TOKENS)[1]
    for rows, chosen in (
        (torch.tensor([2, 0, 2, 1]), state.select(torch.tensor([2, 0, 2, 1]))),
        (torch.tensor([0, 0, 1, 1, 2, 2]), state.repeat(2)),
    ):
        assert chosen.batch_size == len(rows)
        whole = layer.run(0, 40, rows=rows)[0]
        torch.testing.assert_close(layer.run(TOKENS, 40, chosen, rows=rows)[0], whole[:, TOKENS:])


def test_select_and_repeat_refuse() -> None:
    state = Layer().run(0, 5)[1]
    with pytest.raises(StateError, match=r"indices: got torch\.bool"):
        state.select(torch.tensor([True, False, True]))
    with pytest.raises(StateError, match="indices: got"):
        state.select(torch.tensor([[0]]))
    with pytest.raises(StateError, match="repeats=0"):
        state.repeat(0)


def test_snapshot_is_independent() -> None:
    layer = Layer(window=4, sinks=2)
    layer.tensors = {name: t.requires_grad_() for name, t in layer.tensors.items()}
    state = layer.run(0, TOKENS)[1]
    assert state.kv.requires_grad
    for copy in (state.snapshot(), state.detach()):
        assert not any(t.requires_grad for t in copy.tensors().values())
    copy, before = state.snapshot(), layer.run(TOKENS, 40, state)[0].detach()
    for t in copy.tensors().values():
        t.zero_()
    torch.testing.assert_close(layer.run(TOKENS, 40, state)[0].detach(), before)


def test_calls_leave_a_state_as_it_was() -> None:
    layer = Layer(window=4, sinks=2)
    state = layer.run(0, TOKENS)[1]
    before = state.snapshot()
    layer.run(TOKENS, TOKENS + 1, state)
    layer.run(TOKENS, 40, state)
    state.with_lookback(3)
    for name, t in state.tensors().items():
        assert torch.equal(t, getattr(before, name)), name


def test_no_graph_survives_no_grad() -> None:
    layer = Layer(window=4, sinks=2)
    layer.tensors = {name: t.requires_grad_() for name, t in layer.tensors.items()}
    with torch.no_grad():
        state = layer.run(0, TOKENS)[1]
        state = layer.run(TOKENS, TOKENS + 1, state)[1]
    assert not any(t.requires_grad for t in state.tensors().values())


def test_to_moves_every_tensor() -> None:
    moved = Layer(window=4).run(0, 5)[1].to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.window == 4


@pytest.mark.parametrize("old", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 20])
def test_a_state_of_another_dtype_takes_the_new_one(old: torch.dtype, new: int) -> None:
    past, layer = Layer(window=4, sinks=2, dtype=old), Layer(window=4, sinks=2, dtype=torch.float32)
    out, state = layer.run(TOKENS, TOKENS + new, past.run(0, TOKENS)[1])
    want, kept = layer.run(TOKENS, TOKENS + new, layer.run(0, TOKENS)[1])
    assert {n: t.dtype for n, t in state.tensors().items()} == {n: t.dtype for n, t in kept.tensors().items()}
    torch.testing.assert_close(out, want, atol=0.05, rtol=0.05)


# ------------------------------------------------------------------------------------------------- going back


@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_with_lookback(layout: dict[str, int], decay: bool) -> None:
    layer = Layer(decay=decay, **layout)
    state = layer.run(0, TOKENS)[1]
    wide = state.with_lookback(5)
    assert (wide.lookback, wide.window) == (5, state.window)
    assert_continues(layer, wide, state)
    after = layer.run(TOKENS, TOKENS + 5, wide, lookback=5)[1]
    assert_continues(layer, after.rollback(5), state)
    with pytest.raises(StateError, match="lookback=2 is less than the state's 5"):
        wide.with_lookback(2)


@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_rollback(layout: dict[str, int], decay: bool, tokens: int) -> None:
    layer = Layer(decay=decay, **layout)
    straight = layer.run(0, TOKENS, lookback=6)[1]
    after = layer.run(TOKENS, TOKENS + tokens, straight, lookback=6)[1]
    back = after.rollback(tokens)
    assert torch.equal(back.length, straight.length)
    assert_continues(layer, back, straight)
    with pytest.raises(StateError, match=r"lookback=6 tokens un-folded"):
        after.rollback(7)


def test_rollback_of_the_first_tokens() -> None:
    layer = Layer(window=4, sinks=3)
    state = layer.run(0, 5, lookback=5)[1]
    start = state.rollback(5)
    assert start.length.tolist() == [0, 0, 0]
    torch.testing.assert_close(layer.run(0, 40, start)[0], layer.run(0, 40)[0])
    back = state.rollback(4)  # takes back sinks
    torch.testing.assert_close(layer.run(1, 40, back)[0], layer.run(0, 40)[0][:, 1:])
    with pytest.raises(StateError, match=r"rollback\(6\): the sequences hold \[5, 5, 5\] tokens"):
        state.rollback(6)
    with pytest.raises(StateError, match=r"rollback\(-1\)"):
        state.rollback(-1)
    assert state.rollback(0) is state


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("length", [16, 17, 20, 33])
def test_lookback_reaches_over_segments(monkeypatch: pytest.MonkeyPatch, layout: dict[str, int], length: int) -> None:
    """A lookback longer than what the last segment of a long sequence holds."""
    monkeypatch.setattr(chunked, "_segment", lambda call: 8)
    layer = Layer(**layout)
    back = layer.run(0, length, lookback=11)[1].rollback(11)
    want = layer.run(0, 40)[0][:, length - 11 :]
    torch.testing.assert_close(layer.run(length - 11, 40, back)[0], want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("lookback", [0, 2, 5, 9])
def test_no_tokens_settle_the_lookback(layout: dict[str, int], packed: bool, lookback: int) -> None:
    """A call without tokens returns a state of the lookback asked for, like any other call."""
    layer = Layer(**layout)
    state = layer.run(0, TOKENS, lookback=5)[1]
    if packed:
        nothing = {name: t[:1, :0] for name, t in layer.tensors.items()}
        cu_seqlens = torch.zeros(4, dtype=torch.int64)
        out, after = kernel_attention(**nothing, **layer.options, state=state, cu_seqlens=cu_seqlens, lookback=lookback)
    else:
        out, after = layer.run(0, 0, state, lookback=lookback)
    assert out.shape == (1 if packed else 3, 0, 2, 4)
    assert after.lookback == lookback
    assert_continues(layer, after, state)


# ------------------------------------------------------------------------------------------------- graphs and files


@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_is_a_pytree_of_its_tensors(decay: bool) -> None:
    state = Layer(window=4, decay=decay).run(0, 5)[1]
    leaves, spec = pytree.tree_flatten((state, 1))
    assert len(leaves) == len(state.tensors()) + 1
    again = pytree.tree_unflatten(leaves, spec)[0]
    assert again.window == 4
    assert (again.recent_decay is None) == (not decay)
    assert again.tensors().keys() == state.tensors().keys()
    assert all(a is b for a, b in zip(again.tensors().values(), state.tensors().values(), strict=True))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    assert paths[:2] == [".kv", ".k"]


def test_torch_saves_and_loads_it() -> None:
    state, file = Layer(window=4).run(0, 5)[1], io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert again.window == 4
    assert all(torch.equal(t, getattr(again, name)) for name, t in state.tensors().items())


def test_vmap_over_states() -> None:
    layer = Layer(window=4, sinks=2)
    state = layer.run(0, TOKENS)[1]
    inputs = {name: t[:, None, TOKENS : TOKENS + 3] for name, t in layer.tensors.items()}

    def step(inputs: dict[str, Tensor], state: AttentionState) -> tuple[Tensor, AttentionState]:
        out, after = kernel_attention(**inputs, **layer.options, state=state)
        assert after is not None
        return out, after

    out, after = torch.func.vmap(step)(inputs, state.map(lambda t: t[:, None]))
    want, expected = layer.run(TOKENS, TOKENS + 3, state)
    torch.testing.assert_close(out[:, 0], want)
    torch.testing.assert_close(after.kv[:, 0], expected.kv)


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = KernelAttention(8, 2, feature_map="hedgehog", window=4, sinks=2, decay="data", rope=True)

    def forward(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        out, after = self.attn(x, state=state, return_state=True)
        assert after is not None
        return out, after


@torch.no_grad()
def test_a_decode_step_compiles_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_announced", set())  # as in a process whose first call is compiled
    torch.compiler.reset()
    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    state = expected = step.attn.new_state(2)
    for t in range(10):
        x = torch.full((2, 1, 8), float(t)).sin()
        out, state = compiled(x, state)
        want, expected = step(x, expected)
        torch.testing.assert_close(out, want)
    assert isinstance(state, AttentionState)
    torch.testing.assert_close(dataclasses.asdict(state), dataclasses.asdict(expected))


@torch.no_grad()
def test_a_decode_step_exports() -> None:
    step, x = Step(), torch.randn(2, 1, 8)
    state = step.attn(torch.randn(2, 9, 8), return_state=True).state
    program, file = torch.export.export(step, (x, state)), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    out, after = torch.export.load(file).module()(x, state)
    want, expected = step(x, state)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(after.kv, expected.kv)
    assert after.window == 4
