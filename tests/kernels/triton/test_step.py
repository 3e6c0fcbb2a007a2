"""One token at a time on the Triton kernel: equal to the dense reference, in place, and to any state's continuation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from linattn.errors import DtypeError, LinattnError, OptionError, ShapeError, StateError
from linattn.feature_maps import FeatureMap, Features, make
from linattn.kernels import AttentionOutput, kernel_attention
from linattn.kernels.protocols import Projected
from linattn.kernels.slots import DecodeSlots
from linattn.kernels.triton import step
from linattn.kernels.validate import Call, resolve
from linattn.state import AttentionState
from linattn.testing import budgets
from linattn.testing.checks import check_identical, check_same_state, check_within, state_of
from linattn.testing.kernel import LogScaledMap, PlainMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 8, 6
MAPS = ("hedgehog", "exp", "t2r", "favor+", "favor+hyp", "elu", "relu", "taylor2", "relu2", "cosformer", "rff")
BROKEN = "decoding differs from attention over the whole sequence."


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feature_map(name: str | None, head_dim: int = HEAD_DIM) -> FeatureMap | None:
    sizes: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
    if name is None:
        return None
    if name == "plain":
        return PlainMap(head_dim, **sizes).double()
    if name == "log-scaled":
        return LogScaledMap(head_dim, strength=4.0, **sizes).double()
    activation, _, what = name.partition(" ")
    if what:
        return Written(activation, projects=what != "alone", mirrored=what == "mirrored").double()
    torch.manual_seed(0)  # the same random projection each time
    made = make(name, head_dim, **sizes).double()
    for seed, parameter in enumerate(made.parameters()):
        parameter.data += 0.3 * normal(*parameter.shape, seed=seed)  # query, key and every head of their own
    return made


@dataclasses.dataclass
class Run:
    """Tokens and options of one sequence of calls, in float64."""

    map: str | None = "hedgehog"
    window: int = 5
    sinks: int = 2
    decay: str = "token"
    extras: tuple[str, ...] = ()
    batch: int = 1
    length: int = 16
    value_dim: int = VALUE_DIM

    @property
    def far_dim(self) -> int:
        return HEAD_DIM + 2 * ("far_inputs" in self.extras)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        lead = (self.batch, self.length)
        found = {
            "q": normal(*lead, HEADS, HEAD_DIM, seed=1),
            "k": normal(*lead, KV_HEADS, HEAD_DIM, seed=2),
            "v": normal(*lead, KV_HEADS, self.value_dim, seed=3),
        }
        if "far_inputs" in self.extras:
            found["q_far"] = normal(*lead, HEADS, self.far_dim, seed=4)
            found["k_far"] = normal(*lead, KV_HEADS, self.far_dim, seed=5)
        if "sink_queries" in self.extras:
            found["q_sink"] = normal(*lead, HEADS, HEAD_DIM, seed=9)
        if self.decay != "none":
            shape = (KV_HEADS,) if self.decay == "constant" else (*lead, KV_HEADS)
            size = {"constant": 0.1, "token": 0.3, "strong": 8.0}[self.decay]
            found["decay"] = -size * normal(*shape, seed=6).abs()
        return found

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if "far_bias" in self.extras:
            found["far_bias"] = normal(HEADS, seed=7)
        if "sink_logits" in self.extras:
            found["sink_logits"] = normal(HEADS, seed=8)
        if "softcap" in self.extras:
            found["softcap"] = 1.5
        return found

    def attend(self, dtype: torch.dtype, impl: str, tokens: int | None = None) -> AttentionOutput:
        """The whole sequence, or its first ``tokens``, at once."""
        made = feature_map(self.map, self.far_dim)
        tensors = {name: t.to(dtype) for name, t in self.tensors.items()}
        if tokens is not None:
            tensors = {name: t if t.ndim == 1 else t[:, :tokens] for name, t in tensors.items()}
        options = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in self.options().items()}
        return kernel_attention(
            **tensors, **options, window=self.window, sinks=self.sinks, far=made is not None,
            feature_map=None if made is None else made.to(dtype), return_state=True, impl=impl,
        )  # fmt: skip

    def slots(self, count: int | None = None, dtype: torch.dtype = torch.float32) -> DecodeSlots:
        made = feature_map(self.map, self.far_dim)
        return DecodeSlots.empty(
            self.batch if count is None else count,
            num_kv_heads=KV_HEADS, feature_dim=0 if made is None else made.feature_dim, head_dim=HEAD_DIM,
            value_dim=self.value_dim, window=self.window, sinks=self.sinks, decay=self.decay != "none",
            far_head_dim=self.far_dim if "far_inputs" in self.extras else None, dtype=dtype, device=DEVICE,
        )  # fmt: skip

    def step_arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Everything but the tokens."""
        made = feature_map(self.map, self.far_dim)
        found = {name: t.float().to(DEVICE) if isinstance(t, Tensor) else t for name, t in self.options().items()}
        return {**found, "feature_map": None if made is None else made.to(dtype).to(DEVICE)}

    def token(self, t: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {
            name: (x if x.ndim == 1 else x[:, t]).to(torch.float32 if name == "decay" else dtype).to(DEVICE)
            for name, x in self.tensors.items()
        }

    def decode(self, slots: DecodeSlots, start: int = 0, stop: int | None = None, **more: Any) -> Tensor:
        arguments = self.step_arguments()
        outs = []
        for t in range(start, self.length if stop is None else stop):
            outs.append(step.decode_step(slots, **self.token(t), **arguments, **more))
        return torch.stack(outs, 1).cpu()

    @functools.cached_property
    def exact(self) -> AttentionOutput:
        return self.attend(torch.float64, "reference")

    @functools.cached_property
    def budget(self) -> float:
        """Of float32: twice what the dense reference pays in it."""
        exact, low = self.exact.out, self.attend(torch.float32, "reference").out
        made = feature_map(self.map, self.far_dim)
        count = self.length * (1 if made is None else made.feature_dim)
        found = budgets.low_precision(torch.float32, exact, low, count=count, terms=budgets.largest(self.tensors["v"]))
        assert found < 1e-4, "the dense reference is ill-conditioned here: this run would test nothing"
        return found

    def check(self, **more: Any) -> None:
        slots = self.slots()
        out = self.decode(slots, **more)
        check_within(out, self.exact.out, self.budget, "outputs of single steps", BROKEN)
        assert torch.equal(slots.length.cpu(), torch.full((self.batch, KV_HEADS), self.length))


@pytest.mark.parametrize(
    ("window", "sinks", "decay"),
    [(window, sinks, decay) for window, sinks in ((0, 0), (5, 2)) for decay in ("none", "constant", "token", "strong")]
    + [(0, 2, "strong"), (1, 0, "strong"), (8, 0, "token"), (30, 1, "constant")],
)
def test_steps_equal_the_reference(window: int, sinks: int, decay: str) -> None:
    Run("hedgehog", window, sinks, decay, length=22).check()


@pytest.mark.parametrize("name", [*MAPS, "plain", "log-scaled"])
def test_every_kind_of_map(name: str) -> None:
    Run(name).check()


class Written(FeatureMap):
    """φ as :class:`Projected` defines it, with projections and biases of every head's own."""

    log_scaled = True

    def __init__(self, activation: Any, *, projects: bool, mirrored: bool = False) -> None:
        super().__init__(HEAD_DIM, num_heads=HEADS, num_kv_heads=KV_HEADS)
        self.activation, self.projects, self.mirrored = activation, projects, mirrored
        parts = 2 if activation == "product" else 1
        for seed, (name, heads) in enumerate((("query", HEADS), ("key", KV_HEADS))):
            weight = normal(parts, heads, HEAD_DIM, self.feature_dim, seed=seed) if projects else None
            if weight is not None and mirrored:
                weight[..., 6:] = -weight[..., :6]
            self.register_buffer(f"{name}_weight", weight)
            bias = normal(parts, heads, self.feature_dim, seed=9 + seed) if projects else None
            self.register_buffer(f"{name}_bias", bias)

    @property
    def feature_dim(self) -> int:
        return (12 if self.mirrored else 11) if self.projects else HEAD_DIM

    def projected(self) -> Projected:
        columns = slice(0, 6 if self.mirrored else None)
        weights = (None if w is None else w[..., columns] for w in (self.query_weight, self.key_weight))
        biases = (self.query_bias, self.key_bias)
        return Projected(self.activation, *weights, *biases, norm=0.3, constant=-0.2, mirrored=self.mirrored)

    def written(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Features:
        z = [x] if weight is None else [torch.einsum("bthd,hdf->bthf", x, w) for w in weight]
        if bias is not None:
            z = [part + c for part, c in zip(z, bias, strict=True)]
        if self.activation == "exp":
            top = z[0].amax(-1)
            return Features((z[0] - top[..., None]).exp(), top - 0.3 * x.square().sum(-1) - 0.2)
        found = {
            "relu": lambda: z[0].relu(),
            "elu": lambda: torch.nn.functional.elu(z[0]) + 1,
            "softmax": lambda: z[0].softmax(-1),
            "product": lambda: z[0] * z[1],
        }
        return Features(found[self.activation]())

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self.written(q, self.query_weight, self.query_bias)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self.written(k, self.key_weight, self.key_bias)


@pytest.mark.parametrize("activation", ["relu", "elu", "softmax", "exp", "product"])
def test_every_activation_with_projections_of_each_head(activation: str) -> None:
    Run(f"{activation} projected", window=2, sinks=0, length=8).check()


@pytest.mark.parametrize("name", ["softmax mirrored", "exp mirrored", "softmax alone", "exp alone"])
def test_mirrored_projections_and_none(name: str) -> None:
    Run(name, window=2, sinks=0, length=8).check()


@pytest.mark.parametrize("name", ["favor+", "taylor2", "log-scaled", "cosformer"])
def test_maps_without_a_window(name: str) -> None:
    Run(name, window=0, sinks=0, decay="none").check()


@pytest.mark.parametrize(
    "extras",
    [("far_bias",), ("sink_logits",), ("softcap",), ("far_inputs",), ("sink_queries",)],
    ids=lambda extras: extras[0],
)
def test_extras(extras: tuple[str, ...]) -> None:
    Run("favor+", extras=extras).check()


@pytest.mark.parametrize("name", ["hedgehog", "plain", "log-scaled"])
@pytest.mark.parametrize("window", [0, 5])
def test_all_extras(name: str, window: int) -> None:
    Run(name, window, extras=("far_bias", "sink_logits", "softcap", "far_inputs", "sink_queries"), batch=2).check()


@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (6, 0), (0, 3)])
def test_without_a_far_branch(window: int, sinks: int) -> None:
    Run(None, window, sinks, "none", extras=("sink_logits", *(["sink_queries"] if sinks else []))).check()


@pytest.mark.parametrize(("name", "window"), [("favor+", 20), ("taylor2", 3)])
def test_tiles_smaller_than_the_tensors(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in several parts, the ring in several blocks, the projection in several pieces."""
    monkeypatch.setattr(step, "STATE_TILE", 1)
    monkeypatch.setattr(step, "OTHER_BYTES", 1)
    Run(name, window, length=window + 5, value_dim=20, extras=("far_inputs",)).check()


@pytest.mark.parametrize(("num_warps", "window_block"), [(1, 16), (2, None), (8, 8), (16, 32)])
def test_tiles_of_other_shapes(num_warps: int, window_block: int | None) -> None:
    Run("hedgehog", 20, length=25).check(num_warps=num_warps, window_block=window_block, registers=96)


def test_strided_inputs() -> None:
    """Views cut out of one projection, as models have them."""
    run = Run(decay="none")
    slots, arguments, outs = run.slots(), run.step_arguments(), []
    for t in range(run.length):
        wide = torch.cat([x.flatten(1) for x in run.token(t).values()], -1)
        q, k, v = wide.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * VALUE_DIM], -1)
        q, k = (x.unflatten(1, (-1, HEAD_DIM)) for x in (q, k))
        v = v.unflatten(1, (VALUE_DIM, -1)).transpose(1, 2)  # last dimension strided
        outs.append(step.decode_step(slots, q, k, v, **arguments))
    other = run.tensors
    other["v"] = other["v"].flatten(2).unflatten(2, (VALUE_DIM, -1)).transpose(2, 3)
    exact = kernel_attention(**other, feature_map=feature_map("hedgehog"), window=5, sinks=2, impl="reference").out
    check_within(torch.stack(outs, 1).cpu(), exact, run.budget, "outputs of strided inputs", "strides are assumed.")


def test_float16() -> None:
    run = Run("favor+", extras=("far_bias",))
    slots, arguments, outs = run.slots(dtype=torch.float16), run.step_arguments(), []
    for t in range(run.length):
        outs.append(step.decode_step(slots, **run.token(t, torch.float16), **arguments))
    rounded = {name: t.half().double() if name in "qkv" else t for name, t in run.tensors.items()}
    made = feature_map("favor+")
    options = {**run.options(), "feature_map": made, "window": 5, "sinks": 2}
    exact = kernel_attention(**rounded, **options, impl="reference").out
    # Sums and features are float32: what remains is one rounding of the output.
    budget = torch.finfo(torch.float16).eps * budgets.largest(exact) + run.budget
    out = torch.stack(outs, 1).cpu()
    assert out.dtype == torch.float16
    check_within(out, exact, budget, "outputs in float16", BROKEN)


# ---------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize(
    ("past", "extras"), [(0, ()), (1, ("far_inputs",)), (4, ("sink_queries",)), (9, ("far_inputs",))]
)
def test_continues_a_state_and_gives_one_back(past: int, extras: tuple[str, ...]) -> None:
    run = Run("favor+", extras=extras, batch=2, length=14)
    start = state_of(run.attend(torch.float32, "chunked", past)) if past else run.slots().to_state()
    slots = DecodeSlots.from_state(start.to(DEVICE))
    out = run.decode(slots, past)
    exact = run.exact
    check_within(out, exact.out[:, past:], run.budget, f"outputs after a prefill of {past}", BROKEN)
    budget = 2 * budgets.band(torch.float32, exact=budgets.largest(exact.state.kv), terms=0.0, count=run.length)
    meaning = "a sequence cannot move between decoding and other calls."
    final = slots.to_state().to("cpu")
    check_same_state(final, exact.state, max(budget, run.budget), "state after decoding", meaning)
    expected = state_of(run.attend(torch.float32, "chunked"))
    for name in ("recent_k", "recent_v", "sink_k", "sink_v", "recent_far_k", "recent_decay", "length", "folded"):
        mine, other = getattr(final, name), getattr(expected, name)
        assert (mine is None) == (other is None)
        if mine is not None:
            check_identical(mine, other, name, meaning)


def test_a_state_survives_the_round_trip() -> None:
    for tokens in (1, 3, 5, 12):
        before = state_of(Run(batch=2, extras=("far_inputs",)).attend(torch.float32, "chunked", tokens))
        slots = DecodeSlots.from_state(before)
        after = slots.to_state()
        assert before.tensors().keys() == after.tensors().keys()
        for name, t in before.tensors().items():
            check_identical(after.tensors()[name], t, f"{name} after {tokens} tokens", "states are changed by a copy.")
        for name, t in slots.tensors().items():
            assert t.is_contiguous(), name
            t.zero_()
        assert all(t.any() for name, t in after.tensors().items() if name not in ("folded", "kv", "k")), "shared memory"


def test_slots_are_independent_and_idle_rows_touch_nothing() -> None:
    run = Run("favor+", batch=3, length=12, extras=("sink_logits", "far_inputs"))
    slots = run.slots(5)
    for name, t in slots.tensors().items():  # what nobody may touch must be recognisable
        if name not in ("length", "log_scale"):
            t.uniform_(-1, 1, generator=torch.Generator(DEVICE).manual_seed(0))
    order = torch.tensor([4, 0, 2], device=DEVICE)
    slots.reset(order)
    untouched = {name: t[[1, 3]].clone() for name, t in slots.tensors().items()}
    exact = run.exact.out
    seen = [0, 0, 0]
    arguments, all_tokens = run.step_arguments(), run.tensors
    for turn in range(run.length + 5):
        rows = [2, 0, 1] if turn % 2 else [0, 1, 2]
        active = [seen[row] < run.length and (turn + row) % 5 != 0 for row in rows]
        index = torch.tensor([int(order[row]) if a else -1 for row, a in zip(rows, active, strict=True)], device=DEVICE)
        token = {
            name: torch.stack([x[row, min(seen[row], run.length - 1)] for row in rows]).float().to(DEVICE)
            for name, x in all_tokens.items()
        }
        kind = torch.int32 if turn % 2 else torch.int64
        out = torch.full((3, HEADS, VALUE_DIM), torch.nan, device=DEVICE)
        given = step.decode_step(slots, **token, **arguments, slot_indices=index.to(kind), out=out)
        assert given is out
        for at, (row, is_active) in enumerate(zip(rows, active, strict=True)):
            if not is_active:
                assert not out[at].any()
                continue
            expected = exact[row, seen[row]]
            check_within(out[at].cpu(), expected, run.budget, f"row {row}, token {seen[row]}", BROKEN)
            seen[row] += 1
    assert min(seen) > 10
    for name, t in slots.tensors().items():
        check_identical(t[[1, 3]], untouched[name], f"{name} of other slots", "sequences overwrite each other.")
    assert slots.to_state(order).length.tolist() == seen


def test_a_loaded_slot_forgets_what_it_held() -> None:
    run = Run(batch=1)
    slots = run.slots(3)
    for name, t in slots.tensors().items():
        t.fill_(7 if name == "length" else torch.inf)
    place = torch.tensor([2], device=DEVICE)
    slots.load(place, state_of(run.attend(torch.float32, "chunked", 9)).to(DEVICE))
    exact = run.exact.out
    out = run.decode(slots, 9, slot_indices=place)
    check_within(out, exact[:, 9:], run.budget, "outputs of a loaded slot", BROKEN)
    slots.reset(place)
    out = run.decode(slots, slot_indices=place)
    check_within(out, exact, run.budget, "outputs of a slot that was reset", BROKEN)
    slots.reset()
    for name, t in run.slots(3).tensors().items():
        check_identical(slots.tensors()[name], t, f"{name} after reset()", "a slot remembers its last sequence.")


def test_a_projection_made_once_is_the_map() -> None:
    run = Run("exp")
    first, second = run.slots(), run.slots()
    arguments = run.step_arguments()
    made = arguments.pop("feature_map")
    projected = made.projected()
    for t in range(8):
        expected = step.decode_step(first, **run.token(t), feature_map=made, **arguments)
        out = step.decode_step(second, **run.token(t), feature_map=projected, scale=made.scale, **arguments)
        check_identical(out, expected, "outputs with a map's projection", "the projection is another map.")


# ----------------------------------------------------------------------------------------------------- functional


def call_after(run: Run, past: int, **changes: Any) -> Call:
    made = feature_map(run.map, run.far_dim)
    tensors = {
        name: (t if t.ndim == 1 else t[:, past : past + 1]).float().to(DEVICE) for name, t in run.tensors.items()
    }
    options: dict[str, Any] = {
        "feature_map": None if made is None else made.float().to(DEVICE).requires_grad_(False),
        "window": run.window, "sinks": run.sinks, "far": made is not None, "state": None, "return_state": True,
        "lookback": 0, "causal": True, "mask": None, "cu_seqlens": None, "chunk_size": None, "scale": None,
        "q_far": None, "k_far": None, "q_sink": None, "decay": None, "far_bias": None, "sink_logits": None,
        "softcap": None,
    }  # fmt: skip
    if past:
        options["state"] = state_of(run.attend(torch.float32, "chunked", past)).to(DEVICE).detach()
    return resolve(**{**options, **tensors, **changes})


@pytest.mark.parametrize("name", ["favor+", "log-scaled", None])
def test_attend_step_leaves_its_state_alone(name: str | None) -> None:
    run = Run(name, decay="none" if name is None else "token", batch=2, length=12, extras=("sink_queries",))
    call = call_after(run, 11)
    assert call.state is not None
    assert step.takes(call)
    before = call.state.snapshot()
    out, after = step.attend_step(call)
    exact = run.exact
    check_within(out.cpu(), exact.out[:, 11:], run.budget, "the answer", BROKEN)
    assert after is not None
    check_same_state(after.to("cpu"), exact.state, 10 * run.budget, "the state", BROKEN)
    for field, t in before.tensors().items():
        check_identical(call.state.tensors()[field], t, field, "a state given to a call is changed by it.")
    assert step.attend_step(dataclasses.replace(call, return_state=False))[1] is None


def test_takes_only_what_it_can_answer() -> None:
    run = Run(length=12)
    call = call_after(run, 11)
    assert step.takes(call)
    assert call.state is not None
    assert not step.takes(call_after(run, 0))
    assert not step.takes(dataclasses.replace(call, mask=torch.ones(1, 1, dtype=torch.bool)))
    assert not step.takes(dataclasses.replace(call, lookback=2))
    assert not step.takes(dataclasses.replace(call, state=call.state.with_lookback(1)))
    assert not step.takes(dataclasses.replace(call, q=call.q.expand(-1, 2, -1, -1)))
    trained = dataclasses.replace(call, q=call.q.clone().requires_grad_())
    assert not step.takes(trained)
    with torch.no_grad():
        assert step.takes(trained)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"q": normal(1, HEADS, HEAD_DIM + 1).float()}, ShapeError, "q: got"),
        ({"q": normal(1, KV_HEADS + 1, HEAD_DIM).float()}, ShapeError, "multiple"),
        ({"k": normal(2, KV_HEADS, HEAD_DIM).float()}, ShapeError, "k: got"),
        ({"v": normal(1, KV_HEADS, VALUE_DIM)}, DtypeError, "v: got torch.float64"),
        ({"k_far": normal(1, KV_HEADS, HEAD_DIM).float()}, ShapeError, "k_far: got"),
        ({"decay": None}, StateError, "decay: missing"),
        ({"decay": -torch.ones(HEADS + 1)}, ShapeError, "decay: got"),
        ({"feature_map": None}, StateError, "feature_map: got None"),
        ({"slot_indices": torch.zeros(2, dtype=torch.int64)}, ShapeError, "slot_indices"),
        ({"slot_indices": torch.zeros(1)}, ShapeError, "slot_indices"),
        ({"q_sink": normal(1, KV_HEADS, HEAD_DIM).float()}, ShapeError, "q_sink: got"),
        ({"out": torch.zeros(1, HEADS, VALUE_DIM + 1)}, ShapeError, "out: got"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[LinattnError], says: str) -> None:
    run = Run()
    slots = run.slots()
    before = {name: t.clone() for name, t in slots.tensors().items()}
    changes = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in changes.items()}
    with pytest.raises(error, match=says):
        step.decode_step(slots, **{**run.token(0), **run.step_arguments(), **changes})
    for name, t in slots.tensors().items():
        check_identical(t, before[name], name, "a refused call changes the memory.")


def test_more_wrong_arguments() -> None:
    run = Run("exp")
    slots, arguments = run.slots(2), run.step_arguments()
    with pytest.raises(ShapeError, match="slot_indices="):
        step.decode_step(slots, **run.token(0), **arguments)
    projected = arguments["feature_map"].projected()
    with pytest.raises(OptionError, match=r"scale=feature_map\.scale"):
        step.decode_step(run.slots(), **run.token(0), feature_map=projected)
    window = Run(None, decay="none")
    far_bias = torch.zeros(HEADS, device=DEVICE)
    with pytest.raises(OptionError, match="far_bias"):
        step.decode_step(window.slots(), **window.token(0), feature_map=None, far_bias=far_bias)
    state = state_of(run.attend(torch.float32, "chunked", 3)).to(DEVICE)
    with pytest.raises(StateError, match="lookback=1"):
        DecodeSlots.from_state(state.with_lookback(1))
    with pytest.raises(StateError, match="ring_k"):
        dataclasses.replace(run, window=7).slots().load(torch.tensor([0], device=DEVICE), state)
    with pytest.raises(StateError, match="1 sequences"):
        slots.load(torch.tensor([0, 1], device=DEVICE), state)
    with pytest.raises(OptionError, match="window=-1"):
        DecodeSlots.empty(1, num_kv_heads=1, feature_dim=4, head_dim=4, window=-1)


def test_no_rows() -> None:
    run = Run()
    slots, token = run.slots(), {name: t[:0] for name, t in run.token(0).items()}
    index = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out = step.decode_step(slots, **token, **run.step_arguments(), slot_indices=index)
    assert out.shape == (0, HEADS, VALUE_DIM)
    assert not slots.length.any()


# ------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hedgehog", "favor+", "taylor2", "plain", None])
def test_a_captured_graph_replays_the_same_steps(name: str | None) -> None:
    """bfloat16, slots in another order, one row idle every other time."""
    run = Run(name, window=16, decay="none" if name is None else "token", batch=3, length=48)
    dtype = torch.bfloat16
    eager, graphed = run.slots(6, dtype), run.slots(6, dtype)
    order = torch.tensor([5, 0, 3], device=DEVICE)
    arguments = run.step_arguments()
    made = arguments.pop("feature_map")
    projected = None if made is None else made.projected()
    if projected is not None:
        weights = {f: t.to(DEVICE) for f, t in projected._asdict().items() if isinstance(t, Tensor)}
        arguments |= {"feature_map": projected._replace(**weights), "scale": made.scale}
    else:
        arguments["feature_map"] = made

    static = run.token(0, dtype)
    index, out = order.clone(), torch.empty(3, HEADS, VALUE_DIM, dtype=dtype, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles before the capture
        step.decode_step(graphed, **static, **arguments, slot_indices=index, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.decode_step(graphed, **static, **arguments, slot_indices=index, out=out)
    graphed.reset()

    for t in range(run.length):
        here = order.clone()
        here[t % 3] = -1 if t % 2 else here[t % 3]
        for field, x in run.token(t, dtype).items():
            static[field].copy_(x)
        index.copy_(here)
        graph.replay()
        expected = step.decode_step(eager, **run.token(t, dtype), **arguments, slot_indices=here)
        check_identical(out, expected, f"token {t}", "a captured step is another step.")
    for field, x in eager.tensors().items():
        check_identical(graphed.tensors()[field], x, field, "a captured step changes the memory otherwise.")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hedgehog", "favor+", None])
def test_bfloat16_steps_equal_the_reference(name: str | None) -> None:
    run = Run(name, window=16, decay="none" if name is None else "token", batch=2, length=64)
    slots, arguments = run.slots(dtype=torch.bfloat16), run.step_arguments()
    outs = [step.decode_step(slots, **run.token(t, torch.bfloat16), **arguments) for t in range(run.length)]
    rounded = {name: t.bfloat16().double() if name in "qkv" else t for name, t in run.tensors.items()}
    made = feature_map(run.map)
    options = {"feature_map": made, "far": made is not None, "window": 16, "sinks": 2}
    exact = kernel_attention(**rounded, **options, impl="reference").out
    # Sums and features are float32: what remains is one rounding of the output.
    budget = torch.finfo(torch.bfloat16).eps * budgets.largest(exact) + run.budget
    check_within(torch.stack(outs, 1).cpu(), exact, budget, "outputs in bfloat16", BROKEN)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last slot of a state of more than 2³¹ numbers."""
    features, value_dim, heads = 256, 256, 8
    count = 2**31 // (features * value_dim * heads) + 2
    free = torch.cuda.mem_get_info()[0]
    if free < 4 * count * features * value_dim * heads * 1.2:
        pytest.skip(f"needs {4 * count * features * value_dim * heads * 1.2 / 2**30:.0f} GiB of device memory")
    sizes: dict[str, Any] = {"num_kv_heads": heads, "feature_dim": features, "head_dim": 256, "value_dim": value_dim}
    large, small = (DecodeSlots.empty(n, **sizes, window=4, device=DEVICE) for n in (count, 1))
    made = make("elu", 256).to(DEVICE)
    last = torch.tensor([count - 1], device=DEVICE)
    for t in range(8):
        q, k, v = (normal(1, heads, 256, seed=10 * t + i).float().to(DEVICE) for i in range(3))
        out = step.decode_step(large, q, k, v, feature_map=made, slot_indices=last)
        check_identical(out, step.decode_step(small, q, k, v, feature_map=made), f"token {t}", "offsets overflow.")
    state: AttentionState = large.to_state(last)
    for name, t in small.to_state().tensors().items():
        check_identical(state.tensors()[name], t, name, "offsets overflow.")
    assert not large.kv[0].any()
