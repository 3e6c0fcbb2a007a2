"""Calls repeated from a record equal calls made anew, and only calls of the same kind are repeated."""

from __future__ import annotations

import gc
import threading
import weakref
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.feature_maps import make
from linattn.kernels import kernel_attention, linear_attention

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from linattn.kernels.triton import ops, plan, runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYBRID = {"window": 5, "sinks": 2}


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> list[plan.Plan]:
    """Plans that ran, in a cache that begins empty."""
    monkeypatch.setattr(plan, "_plans", type(plan._plans)())
    ran: list[plan.Plan] = []
    repeat = plan.Plan.__call__

    def counted(self: plan.Plan, *args: Any) -> Any:
        ran.append(self)
        return repeat(self, *args)

    monkeypatch.setattr(plan.Plan, "__call__", counted)
    return ran


def inputs(length: int, *, seed: int = 0, dim: int = 8) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((2, length, 2, dim), (2, length, 1, dim), (2, length, 1, 6))
    return [torch.randn(s, generator=rng).to(DEVICE).requires_grad_() for s in shapes]


def gates(length: int) -> Tensor:
    return (-0.2 * torch.rand(2, length, 1, generator=torch.Generator().manual_seed(1))).to(DEVICE).requires_grad_()


def run(leaves: list[Tensor], name: str = "hedgehog", seed: int = 0, **options: Any) -> list[Tensor]:
    """Output and all gradients."""
    torch.manual_seed(seed)
    phi = make(name, leaves[0].shape[-1], num_heads=2, num_kv_heads=1).to(DEVICE)
    done = kernel_attention(*leaves[:3], feature_map=phi, impl="triton", **options)
    loss = done.out.sin().sum()
    if done.state is not None:
        loss = loss + done.state.kv.square().sum() + done.state.k.sum()
    wanted = [*leaves, *phi.parameters()]
    wanted += [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    return [done.out, *torch.autograd.grad(loss, wanted)]


OPTIONS: dict[str, Any] = {
    "pure": {},
    "decay": {"decay": True},
    "hybrid": HYBRID,
    "hybrid-decay": {**HYBRID, "decay": True, "far_bias": True, "sink_logits": True},
    "sink-queries": {**HYBRID, "decay": True, "q_sink": True},
    "mask": {**HYBRID, "mask": True},
    "packed": {"packed": True, "decay": True, "window": 3},
    "packed-sinks": {"packed": True, **HYBRID},
    "state": {**HYBRID, "return_state": True},
    "exp": {"name": "exp", "decay": True},
    "features": {"name": "rebased"},
}


def prepared(options: dict[str, Any], seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    leaves, found = inputs(20, seed=seed), dict(options)
    vector = torch.linspace(-1, 1, 2, device=DEVICE) * (1 + seed)
    for name in ("far_bias", "sink_logits"):
        if found.pop(name, False):
            found[name] = vector.clone().requires_grad_()
    if found.pop("q_sink", False):
        found["q_sink"] = inputs(20, seed=10 + seed)[0]
    if found.pop("decay", False):
        found["decay"] = (gates(20).detach() * (1 + seed)).requires_grad_()
    if found.pop("mask", False):
        found["mask"] = torch.arange(20, device=DEVICE)[None] >= torch.tensor([[3 + seed], [9]], device=DEVICE)
    if found.pop("packed", False):
        leaves = [x.detach()[:1].requires_grad_() for x in leaves]
        found["cu_seqlens"] = torch.tensor([0, 7 + seed, 7 + seed, 20], device=DEVICE)
        if "decay" in found:
            found["decay"] = found["decay"].detach()[:1].requires_grad_()
    return leaves, found


@pytest.mark.parametrize("kind", OPTIONS)
def test_replay_equals_a_call_made_anew(kind: str, replays: list[plan.Plan]) -> None:
    for _ in range(2):  # seen, recorded: with other numbers
        leaves, options = prepared(OPTIONS[kind], seed=1)
        run(leaves, **options)
    assert not replays
    leaves, options = prepared(OPTIONS[kind], seed=0)
    found = run(leaves, **options)
    assert len(replays) == 2, "a pass was not repeated"
    count = len(replays)
    plan.forget()
    want = run(leaves, **options)
    assert len(replays) == count
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def test_replay_without_gradient(replays: list[plan.Plan]) -> None:
    with torch.no_grad():
        phi_q, phi_k, v = (x.square() for x in inputs(40))
        outs = [linear_attention(phi_q, phi_k, v, impl="triton").out for _ in range(4)]
    assert len(replays) == 2
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert len({out.data_ptr() for out in outs}) == 4, "outputs share memory"


def test_other_calls_are_not_mistaken_for_one(replays: list[plan.Plan]) -> None:
    """Each differs from the first in one thing; none of them may be repeated from its plan."""
    leaves = [x.detach() for x in inputs(40)]
    wide = torch.randn(2, 40, 2, 9, device=DEVICE)
    moved = torch.empty(leaves[0].numel() + 1, device=DEVICE)[1:].view_as(leaves[0]).copy_(leaves[0])
    longer = [x.detach() for x in inputs(41)]

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        torch.manual_seed(0)
        phi = make("hedgehog", 8, num_heads=2, num_kv_heads=1).to(DEVICE)
        with torch.no_grad():
            return kernel_attention(q, k, v, feature_map=phi, impl="triton", **options).out

    for _ in range(3):
        attend(*leaves)
    assert len(replays) == 1
    others: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([wide[..., :8], *leaves[1:]], {}),
        ([wide[..., 1:], *leaves[1:]], {}),
        ([moved, *leaves[1:]], {}),
        (longer, {}),
        ([x.half() for x in leaves], {}),
        (leaves, {"decay": gates(40).detach()}),
        (leaves, {"window": 3}),
        (leaves, {"window": 4}),
        (leaves, {"window": 3, "softcap": 2.0}),
    ]
    for tensors, options in others:
        found = attend(*tensors, **options)
        assert len(replays) == 1
        kept = dict(plan._plans)
        plan.forget()
        assert torch.equal(found, attend(*tensors, **options))
        plan._plans.update(kept)
    attend(*leaves)
    assert len(replays) == 2


def test_one_tensor_given_twice_is_not_expected_again(replays: list[plan.Plan]) -> None:
    def difference(a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (a - b,)

    a, b = torch.ones(3, device=DEVICE), torch.arange(3.0, device=DEVICE)
    for _ in range(3):
        assert torch.equal(plan.run(difference, (), (a, a))[0], a - a)
    assert torch.equal(plan.run(difference, (), (a, b))[0], a - b)
    assert len(replays) == 2


def test_gradients_that_are_not_needed_make_another_plan(replays: list[plan.Plan]) -> None:
    leaves = [x.square().detach().requires_grad_() for x in inputs(40)]
    for needed in ((0, 1, 2), (2,), (0,), (1, 2)):
        tensors = [x.detach().requires_grad_(i in needed) for i, x in enumerate(leaves)]
        wanted = [tensors[i] for i in needed]
        found = []
        for _ in range(3):
            out = linear_attention(*tensors, impl="triton").out
            found.append(torch.autograd.grad(out.sin().sum(), wanted))
        for a, b in zip(found[0], found[2], strict=True):
            assert torch.equal(a, b)
    assert len({p for p in replays if len(p.results) < 8}) == 4, "backward plans were shared"


def test_no_tensor_is_kept(replays: list[plan.Plan]) -> None:
    def once() -> list[weakref.ref[Tensor]]:
        leaves = inputs(40)
        tensors = [*leaves, *run(leaves, **HYBRID)]
        return [weakref.ref(t) for t in tensors]

    for _ in range(3):
        kept = once()
        gc.collect()
        assert not any(ref() is not None for ref in kept)
    assert replays


def test_storage_is_released(replays: list[plan.Plan]) -> None:
    """Views of one storage would not show as tensors that are kept."""

    def held() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) and o.shape[:2] == (2, 43) for o in gc.get_objects())

    before = held()
    for _ in range(3):
        run(inputs(43), **HYBRID)
    assert replays
    assert held() == before


def test_the_number_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch, replays: list[plan.Plan]) -> None:
    monkeypatch.setattr(plan, "MOST", 4)
    with torch.no_grad():
        usual = [x.square() for x in inputs(32)]
        for length in range(17, 25):
            q, k, v = (x.square() for x in inputs(length))
            linear_attention(q, k, v, impl="triton")
            linear_attention(*usual, impl="triton")
            assert len(plan._plans) <= 4
    assert len(replays) == 6, "the latest used were not kept"


def test_an_error_leaves_no_plan(monkeypatch: pytest.MonkeyPatch, replays: list[plan.Plan]) -> None:
    leaves = [x.square().detach() for x in inputs(40)]
    real = ops.launch.memory_before

    def fails(*args: Any) -> Any:
        real(*args)
        raise RuntimeError("out of memory")

    with torch.no_grad():
        want = linear_attention(*leaves, impl="triton").out
        monkeypatch.setattr(ops.launch, "memory_before", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            linear_attention(*leaves, impl="triton")
        monkeypatch.setattr(ops.launch, "memory_before", real)
        assert not any(isinstance(p, plan.Plan) for p in plan._plans.values())
        for _ in range(3):
            assert torch.equal(linear_attention(*leaves, impl="triton").out, want)
    assert len(replays) == 2


def body_of(tensor: Tensor) -> Any:
    def outsider(x: Tensor) -> tuple[Tensor]:
        return (x + tensor,)

    return outsider


def reads(x: Tensor) -> tuple[Tensor]:
    return (x * float(x.sum()),)


def counts(x: Tensor) -> tuple[Tensor]:
    return (x[x > 0],)


@pytest.mark.parametrize(
    "body", [body_of(torch.ones(3, device=DEVICE)), reads, counts], ids=["outside", "item", "sizes"]
)
def test_what_metadata_does_not_settle_is_never_planned(body: Any, replays: list[plan.Plan]) -> None:
    for numbers in ([1.0, -2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, -3.0], [4.0, 5.0, 6.0]):
        x = torch.tensor(numbers, device=DEVICE)
        assert torch.equal(plan.run(body, (), (x,))[0], body(x)[0])
    assert not replays


def chained(x: Tensor) -> tuple[Tensor | None, ...]:
    first = torch.empty_like(x).copy_(x)
    second = first * 2
    del first
    third = torch.zeros(3, device=x.device)
    third += second
    return third, None, x, torch.cat([second, third]).view(2, 3).t()


def test_operations_in_between(replays: list[plan.Plan]) -> None:
    for i in range(4):
        x = torch.arange(3.0, device=DEVICE) + i
        third, none, same, both = plan.run(chained, (), (x,))
        assert torch.equal(third, 2 * x)
        assert none is None
        assert same is x
        assert torch.equal(both, torch.stack([2 * x, 2 * x], 1))
        assert both.stride() == (1, 3)
    assert len(replays) == 2


def test_threads_record_for_themselves(replays: list[plan.Plan]) -> None:
    """What another thread does in the middle of a recording is not part of it."""
    inside, done = threading.Event(), threading.Event()

    def waits(x: Tensor) -> tuple[Tensor]:
        first = x + 1
        inside.set()
        assert done.wait(60)
        return (first * 2,)

    found: list[Tensor] = []
    x = torch.arange(3.0, device=DEVICE)
    done.set()
    plan.run(waits, (), (x,))
    inside.clear()
    done.clear()
    thread = threading.Thread(target=lambda: found.extend(plan.run(waits, (), (x,))))
    thread.start()
    assert inside.wait(60)
    for _ in range(2):
        plan.run(chained, (), (x,))
    done.set()
    thread.join()
    assert torch.equal(found[0], (x + 1) * 2)
    assert not replays
    assert torch.equal(plan.run(waits, (), (x + 1,))[0], (x + 2) * 2)
    assert torch.equal(plan.run(chained, (), (x + 1,))[0], 2 * (x + 1))
    assert len(replays) == 2
    assert len(replays[0].steps) == 2


class CudaLauncher:
    """Stands in for Triton's of this name, which starts a compiled kernel."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.started.append(args)


class OtherLauncher(CudaLauncher):
    pass


class Compiled:
    function, packed_metadata = 12, ("metadata",)

    def __init__(self, run: CudaLauncher) -> None:
        self.run = run
        self.asked: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.asked.append((grid, *args))


def test_compiled_kernels_are_started_without_detours() -> None:
    kernel = Compiled(CudaLauncher())
    start = runtime.prepared(kernel, (5,), itemgetter(1, 0, 2))
    start([], [10, 20, 30], 7)
    assert kernel.run.started == [(5, 1, 1, 7, 12, ("metadata",), None, None, None, 20, 10, 30)]
    assert not kernel.asked


@pytest.mark.parametrize(("launcher", "stream"), [(CudaLauncher, -1), (OtherLauncher, 7)], ids=["profiled", "unknown"])
def test_triton_starts_what_it_must_see(launcher: type[CudaLauncher], stream: int) -> None:
    kernel = Compiled(launcher())
    runtime.prepared(kernel, (5, 2), itemgetter(1, 0))([], [10, 20], stream)
    assert kernel.asked == [((5, 2, 1), 20, 10)]
    assert not kernel.run.started


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_is_noticed(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        get_current_device = staticmethod(lambda: 3)
        get_current_stream = staticmethod(lambda device: 100 + device)

    monkeypatch.setattr(runtime, "NVIDIA", True)
    monkeypatch.setattr(type(triton.runtime.driver), "active", Driver)
    assert runtime.stream() == 103
    where = triton.compiler.CompiledKernel if runtime._knobs is None else runtime._knobs.runtime
    known = getattr(where, hook)
    if hasattr(known, "calls"):
        monkeypatch.setattr(known, "calls", [print])
    else:
        monkeypatch.setattr(where, hook, print)
    assert runtime.stream() == -1
