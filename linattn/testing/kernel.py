"""What every implementation of the operator must do, as tests that a new backend inherits."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.feature_maps import FeatureMap, Features
from linattn.kernels import AttentionOutput, kernel_attention
from linattn.state import AttentionState
from linattn.testing import budgets
from linattn.testing.checks import check, check_finite, check_identical, check_same_state, check_within, state_of
from linattn.testing.feature_map import check_long_bf16, cotangent


class PlainMap(FeatureMap):
    """softplus(W x): positive features of size one."""

    positive = True
    learned = True

    def __init__(self, head_dim: int, *, num_features: int = 12, **head_sizes: Any) -> None:
        super().__init__(head_dim, **head_sizes)
        self.num_features = num_features
        rng = torch.Generator().manual_seed(11)
        self.weight = nn.Parameter(torch.randn(num_features, head_dim, generator=rng) / head_dim**0.5)

    @property
    def feature_dim(self) -> int:
        return self.num_features

    def project(self, x: Tensor) -> Tensor:
        wide = budgets.accumulator(x.dtype)
        return x.to(wide) @ self.weight.to(wide).T

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return Features(F.softplus(self.project(q)).to(q.dtype))

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return self.forward_queries(k)


class LogScaledMap(PlainMap):
    """exp(W x + s · 1ᵀx) as values of at most one and a log-scale, which the strength s makes as large as wanted."""

    log_scaled = True

    def __init__(self, head_dim: int, *, strength: float, **sizes: Any) -> None:
        super().__init__(head_dim, **sizes)
        self.strength = strength

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        z = self.project(q)
        top = z.amax(-1)
        return Features((z - top[..., None]).exp().to(q.dtype), top + self.strength * q.to(z.dtype).sum(-1))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator. ``str(case)`` names what is not default."""

    batch: int = 2
    length: int = 21
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 6
    features: int = 12
    strength: float = 0.0
    """0 for a map without log-scales; else the size of the log-scales."""
    window: int = 0
    sinks: int = 0
    far: bool = True
    decay: str = "none"
    """none, zero, constant (per head), token, strong (per token, about −5 a token)."""
    far_bias: bool = False
    sink_logits: bool = False
    softcap: bool = False
    far_inputs: bool = False
    """The map sees other queries and keys than the window does, of another size."""
    sink_queries: bool = False
    """Sinks behind the window meet queries of their own."""
    causal: bool = True
    keys: int | None = None
    """Cross attention to this many keys."""
    mask: str = "none"
    """none, left, right, scattered, empty (one row without a real token)."""
    packed: tuple[int, ...] = ()
    past: int = 0
    """Tokens that an initial state has seen."""
    lookback: int = 0
    retained: int = 0
    """Tokens behind the window attended exactly, by scores of few values, so that some are equal."""
    retained_distance: int = 0
    """Tokens back from which on retained ones show other keys to other queries; 0 for never."""
    chunk_size: int = 8

    def __str__(self) -> str:
        fields = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return ",".join(f"{name}={value}".replace(" ", "") for name, value, default in fields if value != default)

    @property
    def far_dim(self) -> int:
        return self.head_dim + int(self.far_inputs and not self.retained_distance)

    def tensors(self) -> dict[str, Tensor]:
        """Float64 tensors of the call by argument name."""
        rng = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        batch, length = (1, sum(self.packed)) if self.packed else (self.batch, self.length)
        keys = length if self.keys is None else self.keys
        found = {
            "q": normal(batch, length, self.heads, self.head_dim),
            "k": normal(batch, keys, self.kv_heads, self.head_dim),
            "v": normal(batch, keys, self.kv_heads, self.value_dim),
        }
        if self.far_inputs:
            found["q_far"] = normal(batch, length, self.heads, self.far_dim)
            found["k_far"] = normal(batch, keys, self.kv_heads, self.far_dim)
        if self.sink_queries:
            found["q_sink"] = normal(batch, length, self.heads, self.head_dim)
        if self.retained_distance:
            found["q_retained"] = normal(batch, length, self.heads, self.head_dim)
        shape = (self.kv_heads,) if self.decay == "constant" else (batch, length, self.kv_heads)
        if self.decay != "none":
            size = {"zero": 0.0, "constant": 0.1, "token": 0.3, "strong": 8.0}[self.decay]
            found["decay"] = -size * torch.rand(shape, generator=rng, dtype=torch.float64)
        if self.far_bias:
            found["far_bias"] = normal(self.heads)
        if self.sink_logits:
            found["sink_logits"] = normal(self.heads)
        return found

    def options(self) -> dict[str, Any]:
        """The arguments of the call that are no tensors to differentiate."""
        found: dict[str, Any] = {"window": self.window, "sinks": self.sinks, "far": self.far, "causal": self.causal}
        found["chunk_size"] = self.chunk_size
        if self.softcap:
            found["softcap"] = 2.0
        if self.packed:
            found["cu_seqlens"] = torch.tensor([0, *self.packed]).cumsum(0)
        if self.mask != "none":
            found["mask"] = self.real_tokens()
        if self.causal:
            found |= {"return_state": True, "lookback": self.lookback}
        if self.retained:
            shape, rng = (self.batch, self.length, self.kv_heads), torch.Generator().manual_seed(13)
            found |= {"retained": self.retained, "scores": torch.randint(9, shape, generator=rng).float()}
        if self.retained_distance:
            found["retained_distance"] = self.retained_distance
        return found

    def real_tokens(self) -> Tensor:
        keys = self.length if self.keys is None else self.keys
        at, row = torch.arange(keys), torch.arange(self.batch)[:, None]
        gaps = (row * 3 + 2) % max(keys, 1)
        if self.mask == "left":
            return at >= gaps
        if self.mask == "right":
            return at < keys - gaps
        scattered = (at * 7 + row * 3) % 5 > 1
        return scattered & (row > 0) if self.mask == "empty" else scattered

    def feature_map(self, dtype: torch.dtype) -> PlainMap | None:
        if not self.far:
            return None
        sizes: dict[str, Any] = {"num_features": self.features, "num_heads": self.heads, "num_kv_heads": self.kv_heads}
        head_dim = self.far_dim
        made = LogScaledMap(head_dim, strength=self.strength, **sizes) if self.strength else PlainMap(head_dim, **sizes)
        return made.double() if dtype == torch.float64 else made

    def initial_state(self) -> AttentionState | None:
        """The float64 state after ``past`` tokens (one fewer for each further sequence)."""
        if not self.past:
            return None
        n = len(self.packed) or self.batch
        before = dataclasses.replace(
            self, batch=n, length=self.past, packed=(), past=0, mask="none", lookback=self.lookback
        )
        arguments: dict[str, Any] = {**before.tensors(), **before.options(), "impl": "reference"}
        arguments["mask"] = torch.arange(self.past) >= torch.arange(n)[:, None]
        return state_of(kernel_attention(**arguments, feature_map=before.feature_map(torch.float64))).detach()


def cast_state(state: AttentionState, dtype: torch.dtype) -> AttentionState:
    """The state of inputs of ``dtype``: keys and values in it, sums in its accumulator."""
    sums = {"kv", "k", "log_scale", "recent_decay", "kept_decay"}
    found: dict[str, Any] = {
        name: t
        if not t.is_floating_point() or name.endswith("score")
        else t.to(budgets.accumulator(dtype) if name in sums else dtype)
        for name, t in state.tensors().items()
    }
    return dataclasses.replace(state, **found)


HYBRID: dict[str, Any] = {"window": 5, "sinks": 2}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"window": 5},
    HYBRID,
    {"sinks": 3},
    {"window": 1},
    {"window": 50, "sinks": 1},
)
DECAYS = ("none", "zero", "constant", "token", "strong")
EXTRAS: tuple[dict[str, Any], ...] = (
    {"far_bias": True},
    {"sink_logits": True},
    {"softcap": True},
    {"far_inputs": True},
    {"far_bias": True, "sink_logits": True, "softcap": True, "far_inputs": True, "decay": "token"},
)
DIMS: tuple[dict[str, Any], ...] = (
    {"heads": 1, "kv_heads": 1, "head_dim": 1, "value_dim": 1, "features": 1},
    {"heads": 6, "kv_heads": 1, "head_dim": 5, "value_dim": 3, "features": 7},
    {"heads": 3, "kv_heads": 3, "head_dim": 2, "value_dim": 9},
)


def cases() -> Iterator[Case]:
    """Every call that a backend is compared on."""
    for layout in LAYOUTS:
        for decay in DECAYS:
            for strength in (0.0, 2.0):
                yield Case(**layout, decay=decay, strength=strength)
        yield Case(**layout, strength=200.0, decay="token")
    layouts: tuple[dict[str, Any], ...] = ({}, HYBRID)
    for length in (1, 7, 65, 129):
        for layout in layouts:
            yield Case(batch=1, length=length, strength=2.0, chunk_size=16, **layout)
    for layout in ({"window": 5}, HYBRID, {"window": 50}):
        yield Case(**layout, far=False)
    for extras in EXTRAS:
        yield Case(**{**HYBRID, **extras})
        yield Case(**extras, strength=2.0)
    yield from cases_of_sink_queries()
    yield from cases_of_retained()
    for layout in layouts:
        for dims in DIMS:
            yield Case(**layout, **dims)
        for chunk_size in (1, 5, 64):
            yield Case(**layout, chunk_size=chunk_size, decay="token")
        for decay in ("none", "token"):
            for mask in ("left", "right", "scattered", "empty"):
                yield Case(**layout, batch=3, mask=mask, decay=decay, strength=2.0)
            yield Case(**layout, packed=(7, 0, 1, 16, 0), decay=decay, strength=2.0)
            for length in (1, 3, 17):
                yield Case(**layout, length=length, past=11, decay=decay, strength=2.0)
            yield Case(**layout, length=9, past=3, decay=decay, lookback=4)
            yield Case(**layout, batch=3, past=4, mask="scattered", decay=decay, lookback=4)
            yield Case(**layout, packed=(3, 0, 9), past=6, decay=decay, lookback=2)
        yield Case(**{**layout, **EXTRAS[-1]}, past=11, length=9, strength=2.0)
    for strength in (0.0, 2.0):
        for layout in LAYOUTS:
            yield Case(**layout, causal=False, strength=strength)
        for sinks in (0, 3):
            yield Case(sinks=sinks, causal=False, keys=13, strength=strength)
            yield Case(sinks=sinks, causal=False, keys=13, mask="scattered", strength=strength)
        yield Case(**HYBRID, causal=False, mask="scattered", batch=3, strength=strength)
        yield Case(**HYBRID, causal=False, packed=(7, 0, 1, 16), strength=strength)
        yield Case(causal=False, packed=(7, 0, 1, 16), strength=strength)


def cases_of_sink_queries() -> Iterator[Case]:
    """Calls whose sinks meet queries of their own."""
    own: dict[str, Any] = {**HYBRID, "sink_queries": True}
    yield Case(**own, decay="token", strength=2.0)
    yield Case(**{**own, "window": 0})
    yield Case(**{**own, "window": 50})
    yield Case(**{**own, "sinks": 5, "window": 3}, far=False)
    yield Case(**own, **EXTRAS[-1])
    yield Case(**own, batch=1, length=129, chunk_size=16, strength=2.0)
    for dims in DIMS:
        yield Case(**own, **dims)
    for mask in ("left", "scattered", "empty"):
        yield Case(**own, batch=3, mask=mask, decay="token")
    yield Case(**own, packed=(7, 0, 1, 16, 0), decay="token", strength=2.0)
    yield Case(**own, packed=(3, 0, 9), past=6)
    for length in (1, 3, 17):
        yield Case(**own, length=length, past=11, decay="token", strength=2.0)
    yield Case(**own, length=9, past=3, lookback=4)


def cases_of_retained() -> Iterator[Case]:
    """Calls with retained tokens."""
    for decay in ("none", "token"):
        yield Case(**HYBRID, retained=6, length=30, decay=decay)
    yield Case(retained=4, decay="token", strength=2.0)
    yield Case(window=3, sinks=1, retained=4, far=False)
    yield Case(window=2, retained=30)
    yield Case(**{**HYBRID, **EXTRAS[-1], "decay": "strong"}, sink_queries=True, retained=5, strength=2.0)
    yield Case(**HYBRID, **DIMS[1], retained=3)
    yield Case(**HYBRID, batch=1, length=65, retained=17, chunk_size=16, strength=2.0)
    yield Case(**HYBRID, batch=3, retained=4, mask="empty", decay="constant", strength=2.0)
    for length in (1, 17):
        yield Case(**HYBRID, length=length, past=17, retained=4, decay="token", strength=2.0)
    yield Case(window=3, sinks=1, batch=3, past=8, retained=4, mask="scattered", decay="token", lookback=2)
    aging: dict[str, Any] = {**HYBRID, "far_inputs": True, "retained": 6, "retained_distance": 9}
    yield Case(**aging, length=30, decay="token", strength=2.0)
    yield Case(**{**aging, **EXTRAS[-1], "decay": "strong"}, sink_queries=True, length=30, strength=2.0)
    yield Case(**aging, batch=1, length=65, chunk_size=16)
    yield Case(**aging, length=30, far=False)
    yield Case(**aging, length=7, past=17, far=False)
    yield Case(**{**aging, **DIMS[1], "retained_distance": 5}, length=30)
    yield Case(**aging, batch=3, mask="empty", length=30, decay="constant")
    for length in (1, 5, 30):
        yield Case(**aging, length=length, past=17, decay="token", strength=2.0)
    yield Case(**aging, batch=3, past=19, mask="scattered", decay="token", lookback=2)


CASES = list(cases())


class Result(NamedTuple):
    """Output, gradients and state sums of one call by name, and its final state."""

    tensors: dict[str, Tensor]
    state: AttentionState | None


def evaluate(attend: Any, case: Case, dtype: torch.dtype, rounded: torch.dtype, like: AttentionState | None) -> Result:
    """Run ``case`` in ``dtype`` on inputs rounded to ``rounded``, and differentiate the output and the final state.

    State sums are taken relative to the log-scale of ``like``, so that they can be compared.
    """
    leaves = {name: t.to(rounded).to(dtype).requires_grad_() for name, t in case.tensors().items()}
    state, feature_map = case.initial_state(), case.feature_map(dtype)
    watched = dict(leaves)
    if state is not None:
        state = cast_state(cast_state(state, rounded), dtype)
        watched |= {"state.kv": state.kv.requires_grad_(), "state.k": state.k.requires_grad_()}
    if feature_map is not None:
        watched["feature map's weight"] = feature_map.weight
    out, final = attend(**leaves, feature_map=feature_map, state=state, **case.options())
    found = {"output": out}
    loss = (out.to(budgets.accumulator(dtype)) * cotangent(out)).sum()
    if final is not None and case.far:
        relative = final.log_scale.detach() - (final if like is None else like).log_scale.to(final.log_scale)
        found["final state.kv"] = final.kv * relative.exp()[..., None, None]
        found["final state.k"] = final.k * relative.exp()[..., None]
        for name in ("final state.kv", "final state.k"):
            loss = loss + (found[name] * cotangent(found[name], 2)).sum()
    grads = torch.autograd.grad(loss, list(watched.values()), allow_unused=True) if loss.requires_grad else ()
    for (name, t), g in zip(watched.items(), grads, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(t) if g is None else g
    return Result({name: t.detach().cpu() for name, t in found.items()}, None if final is None else final.detach())


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> tuple[Result, Result]:
    """The reference in float64 on inputs of ``dtype``, and the reference in ``dtype`` itself (float32 for float64)."""
    reference = functools.partial(kernel_attention, impl="reference")
    exact = evaluate(reference, case, torch.float64, dtype, None)
    low = evaluate(reference, case, torch.float32 if dtype == torch.float64 else dtype, dtype, exact.state)
    return exact, low


class KernelContract:
    """Tests that every implementation of the operator passes. A subclass names it, and pytest does the rest:

        class TestMine(KernelContract):
            impl = "mine"

    The implementation is compared to ``impl="reference"`` in float64, on outputs, on gradients of everything that has
    one, and on states. Tolerances are derived in :mod:`linattn.testing.budgets`.
    """

    impl: ClassVar[str] = ""
    """Name of the implementation under test."""
    device: ClassVar[str] = "cpu"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32, torch.bfloat16)
    """What the implementation computes in; the first is used where one is enough."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
        """The operator under test."""
        return kernel_attention(q, k, v, impl=self.impl, **options)

    def attend_on_device(self, **arguments: Any) -> AttentionOutput:
        """:meth:`attend` with every argument moved to :attr:`device`, and the result moved back."""
        if self.device == "cpu":
            return self.attend(**arguments)
        moved: dict[str, Any] = {
            name: x.to(self.device) if isinstance(x, Tensor | AttentionState | nn.Module) else x
            for name, x in arguments.items()
        }
        out, state = self.attend(**moved)
        return AttentionOutput(out.cpu(), None if state is None else state.to("cpu"))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_reference(self, case: Case) -> None:
        count = (case.length + case.past) * case.features * case.heads
        meaning = f"impl={self.impl!r} computes something else than the operator."
        for dtype in self.dtypes:
            exact, low = expected(case, dtype)
            actual = evaluate(self.attend_on_device, case, dtype, dtype, exact.state)
            out = actual.tensors["output"]
            check(out.dtype == dtype, f"output is {out.dtype} for {dtype} inputs and {case}.", meaning)
            # Before it cancels, a gradient is a cotangent times a value times the slope of the log-features.
            terms = budgets.largest(cotangent(out)) * budgets.largest(case.tensors()["v"]) * (1 + case.strength)
            for name, want in exact.tensors.items():
                budget = budgets.low_precision(dtype, want, low.tensors[name], count=count, terms=terms)
                check_within(actual.tensors[name].double(), want, budget, f"{name} in {dtype} for {case}", meaning)
            if exact.state is not None:
                check(actual.state is not None, "return_state=True gave no state.", "nothing could be continued.")
                for name in ("length", "folded"):
                    mine, want = getattr(actual.state, name), getattr(exact.state, name)
                    check_identical(mine, want, f"state.{name} for {case}", "tokens are miscounted.")

    @pytest.mark.parametrize("layout", [{}, HYBRID], ids=["pure", "hybrid"])
    def test_state_is_float32(self, layout: dict[str, Any]) -> None:
        dtype = next((d for d in (torch.bfloat16, torch.float16) if d in self.dtypes), None)
        if dtype is None:
            pytest.skip(f"{type(self).__name__} has no half precision")
        sizes = []
        for length in (3, 40):
            case = Case(length=length, decay="token", **layout)
            tensors = {name: t.to(dtype) for name, t in case.tensors().items()}
            options = {**case.options(), "feature_map": case.feature_map(dtype)}
            state = state_of(self.attend_on_device(**tensors, **options))
            for name in ("kv", "k", "log_scale"):
                check(
                    getattr(state, name).dtype == torch.float32,
                    f"state.{name} is {getattr(state, name).dtype}, expected float32.",
                    "sums stop growing after a few hundred tokens.",
                )
            sizes.append(state.nbytes)
        check(
            sizes[0] == sizes[1],
            f"a state takes {sizes} bytes after 3 and 40 tokens.",
            "memory grows with the context.",
        )

    def test_long_bf16(self) -> None:
        if torch.bfloat16 not in self.dtypes:
            pytest.skip(f"{type(self).__name__}.dtypes leaves out bfloat16")

        def attend(q: Tensor, k: Tensor, v: Tensor, *, feature_map: FeatureMap, **options: Any) -> AttentionOutput:
            there = copy.deepcopy(feature_map)  # moving a module moves it for everyone
            return self.attend_on_device(q=q, k=k, v=v, feature_map=there, **options)

        check_long_bf16(attend, PlainMap(16))

    @pytest.mark.parametrize("mask", ["left", "right", "scattered", "empty"])
    @pytest.mark.parametrize(
        "layout", [{}, HYBRID, {**HYBRID, "causal": False}, {"causal": False}], ids=["pure", "hybrid", "both", "full"]
    )
    def test_padding_may_hold_nan(self, layout: dict[str, Any], mask: str) -> None:
        case = Case(batch=3, mask=mask, strength=2.0, decay="token" if "causal" not in layout else "none", **layout)
        dtype = self.dtypes[0]
        padding = ~case.real_tokens()
        # Without a window the mask speaks of keys only, as in cross attention.
        masked = {"k", "v"} if not case.causal and not case.window else {"q", "k", "v", "decay"} & set(case.tensors())
        meaning = "one NaN in the padding (from an earlier layer, say) ruins the batch or the gradients."
        results = []
        for fill in (0.0, torch.nan):
            tensors = {name: t.to(dtype) for name, t in case.tensors().items()}
            for name in masked:
                tensors[name][padding] = fill
            for t in tensors.values():
                t.requires_grad_()
            feature_map = case.feature_map(dtype)
            assert feature_map is not None
            out, state = self.attend_on_device(**tensors, feature_map=feature_map, **case.options())
            loss = (out * cotangent(out)).sum() + (0 if state is None else state.kv.sum())
            grads = [g.cpu() for g in torch.autograd.grad(loss, [*tensors.values(), feature_map.weight])]
            results.append({"output": out, **dict(zip([*tensors, "weight"], grads, strict=True))})
        clean, poisoned = results
        for name, t in poisoned.items():
            label = name if name == "output" else f"gradient of {name}"
            check_identical(t, clean[name], f"{label} with NaN instead of zeros in the padding", meaning)
            if name in masked:
                check_identical(t[padding], torch.zeros_like(t[padding]), f"{label} at padding", meaning)

    @pytest.mark.parametrize("decay", ["none", "token"])
    @pytest.mark.parametrize("layout", [{}, HYBRID, {"sinks": 3}, {"window": 5}], ids=str)
    @pytest.mark.parametrize("back", [1, 4])
    def test_rollback(self, back: int, layout: dict[str, Any], decay: str) -> None:
        dtype = self.dtypes[0]
        case = Case(**layout, decay=decay, strength=2.0, lookback=4)
        tensors = {name: t.to(dtype) for name, t in case.tensors().items()}
        options = {**case.options(), "feature_map": case.feature_map(dtype)}

        def run(start: int, stop: int, state: AttentionState | None) -> AttentionOutput:
            return self.attend_on_device(**{n: t[:, start:stop] for n, t in tensors.items()}, state=state, **options)

        for kept in (1, 13):
            straight = state_of(run(0, kept, None))
            returned = state_of(run(kept, kept + back, straight)).rollback(back)
            check_identical(returned.length, straight.length, "length after rollback", "positions would be wrong.")
            again, want = run(kept, 21, returned), run(kept, 21, straight)
            what = f"after {kept} tokens, {back} more and rollback({back}), for {case}"
            meaning = "assisted decoding would go on from rejected tokens."
            budget = budgets.reordered(want.out, count=21 * case.features, terms=1.0)
            budget *= torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
            check_within(again.out, want.out, budget, f"outputs {what}", meaning)
            budget *= max(1.0, budgets.largest(state_of(want).kv))
            check_same_state(state_of(again), state_of(want), budget, f"state {what}", meaning)

    @pytest.mark.parametrize("layout", [{}, HYBRID], ids=["pure", "hybrid"])
    @pytest.mark.parametrize("decay", ["token", "strong"])
    @pytest.mark.parametrize("sizes", [(1,) * 21, (20, 1), (3, 0, 8, 10)], ids=["steps", "tail", "pieces"])
    def test_pieces_equal_whole(self, sizes: tuple[int, ...], decay: str, layout: dict[str, Any]) -> None:
        dtype = self.dtypes[0]
        case = Case(**layout, decay=decay, strength=20.0, far_bias=True, sink_logits=True)
        tensors = {name: t.to(dtype) for name, t in case.tensors().items()}
        fixed = {name: tensors.pop(name) for name in ("far_bias", "sink_logits")}
        options = {**case.options(), **fixed, "feature_map": case.feature_map(dtype)}
        whole = self.attend_on_device(**tensors, **options)
        outs, state = [], None
        for pieces in zip(*(t.split(sizes, 1) for t in tensors.values()), strict=True):
            out, state = self.attend_on_device(**dict(zip(tensors, pieces, strict=True)), state=state, **options)
            outs.append(out)
        # Log-scales of some tens enter exponents: their rounding is relative to their size.
        budget = budgets.reordered(whole.out, count=21 * case.features, terms=100.0)
        budget *= torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
        meaning = "generation differs from training."
        check_within(torch.cat(outs, 1), whole.out, budget, f"pieces of {sizes} against the whole, {case}", meaning)
        assert state is not None
        budget *= max(1.0, budgets.largest(state_of(whole).kv))
        check_same_state(state, state_of(whole), budget, f"state after pieces of {sizes}, {case}", meaning)

    @pytest.mark.parametrize("case", [Case(length=0), Case(batch=0), Case(batch=0, length=0)], ids=str)
    @pytest.mark.parametrize("layout", [{}, HYBRID], ids=["pure", "hybrid"])
    @pytest.mark.parametrize("past", [0, 6])
    def test_empty(self, past: int, layout: dict[str, Any], case: Case) -> None:
        dtype = self.dtypes[0]
        case = dataclasses.replace(case, past=past if case.batch else 0, decay="token", strength=2.0, **layout)
        tensors = {name: t.to(dtype).requires_grad_() for name, t in case.tensors().items()}
        state = case.initial_state()
        state = None if state is None else cast_state(state, dtype)
        options = {**case.options(), "feature_map": case.feature_map(dtype), "state": state}
        out, final = self.attend_on_device(**tensors, **options)
        expected_shape = (*tensors["q"].shape[:3], tensors["v"].shape[-1])
        meaning = "the last, empty piece of a stream or an empty shard raises."
        check(out.shape == expected_shape, f"output is {tuple(out.shape)}, expected {expected_shape}.", meaning)
        check(final is not None and final.batch_size == case.batch, "the state has another batch size.", meaning)
        if state is not None and final is not None:
            check_same_state(final, state, 0.0, "state after no tokens", meaning)

    @pytest.mark.parametrize("layout", [{}, HYBRID], ids=["pure", "hybrid"])
    def test_strides_do_not_matter(self, layout: dict[str, Any]) -> None:
        case, dtype = Case(decay="token", strength=2.0, **layout), self.dtypes[0]
        tensors = {name: t.to(dtype) for name, t in case.tensors().items()}
        views = {  # laid out as [B, H, T, D] and cut out of a wider one, as projections and caches do
            name: F.pad(t.transpose(1, 2), (0, 3))[..., :-3].transpose(1, 2).requires_grad_()
            for name, t in tensors.items()
        }
        check(not views["q"].is_contiguous(), "the test's own views are contiguous.", "the test is void.")
        tensors = {name: t.requires_grad_() for name, t in tensors.items()}
        results = []
        for arguments in (tensors, views):
            out = self.attend_on_device(**arguments, feature_map=case.feature_map(dtype), **case.options()).out
            grads = torch.autograd.grad(out, list(arguments.values()), cotangent(out))
            results.append((out, *grads))
        for name, plain, strided in zip(("output", *tensors), *results, strict=True):
            budget = budgets.reordered(plain, count=21 * case.features, terms=budgets.largest(cotangent(results[0][0])))
            budget *= torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
            check_within(strided, plain, budget, f"{name} of non-contiguous inputs", "strides are taken for granted.")

    def test_is_deterministic(self) -> None:
        case, dtype = Case(decay="token", strength=2.0, **HYBRID), self.dtypes[0]
        first, second = (evaluate(self.attend_on_device, case, dtype, dtype, None) for _ in range(2))
        for name, t in first.tensors.items():
            check_identical(second.tensors[name], t, f"{name} of the same call again", "runs cannot be repeated.")

    def test_large_values(self) -> None:
        if torch.float16 not in self.dtypes and torch.bfloat16 not in self.dtypes:
            pytest.skip(f"{type(self).__name__} has no half precision")
        for dtype, size in ((torch.float16, 3e4), (torch.bfloat16, 1e30)):
            if dtype not in self.dtypes:
                continue
            case = Case(**HYBRID, length=40)
            tensors = {name: t.to(dtype) for name, t in case.tensors().items()}
            tensors["v"] = tensors["v"].sign() * size
            out = self.attend_on_device(**tensors, feature_map=case.feature_map(dtype), **case.options()).out
            check_finite(
                out, f"outputs for values of ±{size:g} in {dtype}", "sums overflow: they are not kept in float32."
            )

    def test_gradcheck(self) -> None:
        if torch.float64 not in self.dtypes:
            pytest.skip(f"{type(self).__name__}.dtypes leaves out float64")
        case = Case(**{**EXTRAS[-1], "window": 2, "sinks": 1}, batch=1, length=7, past=5, strength=1.0, chunk_size=3)
        tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
        state, feature_map = case.initial_state(), case.feature_map(torch.float64)
        assert state is not None
        kv, k = state.kv.requires_grad_(), state.k.requires_grad_()

        def call(kv: Tensor, k: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            start = dataclasses.replace(state, kv=kv, k=k)
            arguments = dict(zip(tensors, values, strict=True))
            result = self.attend_on_device(**arguments, feature_map=feature_map, state=start, **case.options())
            out, final = result.out, state_of(result)
            factor = final.log_scale.detach().exp()
            return out, final.kv * factor[..., None, None], final.k * factor[..., None]

        torch.autograd.gradcheck(call, (kv, k, *tensors.values()), fast_mode=True)
