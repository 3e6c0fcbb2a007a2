"""The kernels under torch.compile, torch.func, checkpointing and opcheck, and what they refuse."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.errors import UnsupportedError
from linattn.feature_maps import make
from linattn.kernels import AttentionOutput, kernel_attention, linear_attention
from linattn.kernels.protocols import GivenFeatures

pytest.importorskip("triton", reason="Triton is not installed")
from linattn.kernels.triton import backend, launch, ops, plan
from linattn.kernels.triton.config import Config, choose, using
from linattn.kernels.triton.launch import Inputs, Options, tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYBRID = {"window": 5, "sinks": 2}


def inputs(length: int, *, grad: bool = True) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)
    shapes = ((2, length, 2, 8), (2, length, 1, 8), (2, length, 1, 6))
    return [torch.randn(s, generator=rng).to(DEVICE).requires_grad_(grad) for s in shapes]


def gates(length: int) -> Tensor:
    return (-0.2 * torch.rand(2, length, 1, generator=torch.Generator().manual_seed(1))).to(DEVICE).requires_grad_()


@pytest.mark.parametrize(
    "options",
    [
        *({}, HYBRID, {**HYBRID, "sink_queries": True}, {**HYBRID, "return_state": True}),
        *({"causal": False}, {"causal": False, "window": 5}),
    ],
    ids=["pure", "hybrid", "sink-queries", "state", "bidirectional", "bidirectional-window"],
)
def test_one_dynamic_graph_equals_eager(options: dict[str, Any]) -> None:
    phi = make("hedgehog", 8, num_heads=2, num_kv_heads=1).to(DEVICE)
    own_queries = "sink_queries" in options
    options = {name: value for name, value in options.items() if name != "sink_queries"}

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, q_sink: Tensor | None) -> AttentionOutput:
        return kernel_attention(q, k, v, feature_map=phi, decay=decay, q_sink=q_sink, impl="triton", **options)

    def loss(result: AttentionOutput) -> Tensor:
        total = result.out.square().sum()
        return total if result.state is None else total + result.state.kv.square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (21, 37):
        tensors = inputs(length)
        decay = gates(length) if options.get("causal", True) else None
        q_sink = inputs(length + 1)[0][:, 1:] if own_queries else None
        leaves = [*tensors, *(x for x in (decay, q_sink) if x is not None), *phi.parameters()]
        eager, graph = attend(*tensors, decay, q_sink), compiled(*tensors, decay, q_sink)
        torch.testing.assert_close(graph.out, eager.out)
        for a, b in zip(
            torch.autograd.grad(loss(graph), leaves), torch.autograd.grad(loss(eager), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"compiled {graphs} graphs for two lengths"


@pytest.mark.parametrize("forgets", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("options", [{}, HYBRID], ids=["pure", "hybrid"])
def test_mild_and_strong_decays_equal_the_reference(options: dict[str, Any], forgets: float) -> None:
    """Chunks that forget little have factors for weights; in the others every pair is weighed by itself."""
    phi = make("hedgehog", 8, num_heads=2, num_kv_heads=1).to(DEVICE)
    wide = make("hedgehog", 8, num_heads=2, num_kv_heads=1).to(DEVICE).double()
    wide.load_state_dict(phi.state_dict())
    decay = gates(40).detach()
    decay[:, 5::13] -= forgets

    def run(impl: str, map_: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs(40), decay)]
        out = kernel_attention(*leaves[:3], decay=leaves[3], feature_map=map_, impl=impl, **options).out
        return [out, *torch.autograd.grad(out.sin().sum(), [*leaves, *map_.parameters()])]

    for found, want in zip(run("triton", phi, torch.float32), run("reference", wide, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), want, atol=2e-6 * max(1.0, want.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 5, "sinks": 2, "decay": True}], ids=["pure", "hybrid-decay"])
@pytest.mark.parametrize("dkv_chunk", [32, 64])
def test_long_chunks_equal_the_reference(options: dict[str, Any], dkv_chunk: int) -> None:
    """Of 64 tokens, as on a GPU, where dkv of one query head a key head takes its products in another order."""
    config = Config(chunk=64, fold_chunk=64, near_chunk=16, dkv_chunk=dkv_chunk, programs=2, shortest=64)
    rng = torch.Generator().manual_seed(5)
    tensors = [torch.randn(1, 150, 1, 8, generator=rng).to(DEVICE) for _ in range(3)]
    decay = [-0.1 * torch.rand(1, 150, 1, generator=rng).to(DEVICE)] if "decay" in options else []
    options = {name: value for name, value in options.items() if name != "decay"}

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (*tensors, *decay)]
        phi = make("elu", 8)
        gate = leaves[3] if decay else None
        out = kernel_attention(*leaves[:3], decay=gate, feature_map=phi, impl=impl, **options).out
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    exact = run("reference", torch.float64)
    with using(config):
        results = run("triton", torch.float32)
    for found, want in zip(results, exact, strict=True):
        torch.testing.assert_close(found.double(), want, atol=2e-6 * max(1.0, want.abs().max().item()), rtol=1e-5)


@pytest.fixture
def no_map_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every map is computed by a kernel of its own."""
    monkeypatch.setattr(backend, "_fuses", lambda call, found: False)
    monkeypatch.setattr(backend, "_stands_alone", lambda call, found: True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("exp", {}),
        ("exp", {**HYBRID, "return_state": True}),
        ("hedgehog", {"mask": True}),
        ("favor+", {"causal": False}),
        ("exp", {"causal": False, "window": 5}),
    ],
    ids=["pure", "hybrid-state", "mask", "bidirectional", "bidirectional-window"],
)
def test_a_map_before_the_kernels_equals_the_reference(no_map_fits: None, kind: str, options: dict[str, Any]) -> None:
    phi = make(kind, 8, num_heads=2, num_kv_heads=1).to(DEVICE)
    wide = make(kind, 8, num_heads=2, num_kv_heads=1).to(DEVICE).double()
    wide.load_state_dict(phi.state_dict())
    decay = [gates(40)] if options.get("causal", True) else []
    if "mask" in options:
        options = {"mask": torch.arange(40, device=DEVICE) > torch.tensor([[-1], [7]], device=DEVICE)}

    def run(impl: str, map_: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs(40), *decay)]
        found = kernel_attention(*leaves[:3], decay=(*leaves, None)[3], feature_map=map_, impl=impl, **options)
        results = [found.out]
        if found.state is not None:
            scale = found.state.log_scale.exp()
            results += [found.state.kv * scale[..., None, None], found.state.k * scale[..., None]]
        grads = torch.autograd.grad(sum(r.sin().sum() for r in results), [*leaves, *map_.parameters()])
        return [*results, *grads]

    for found, want in zip(run("triton", phi, torch.float32), run("reference", wide, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), want, atol=4e-6 * max(1.0, want.abs().max().item()), rtol=1e-5)


def test_a_map_before_the_kernels_compiles(no_map_fits: None) -> None:
    phi = make("exp", 8, num_heads=2, num_kv_heads=1).to(DEVICE)
    tensors = inputs(21)

    def run(attend: Any) -> list[Tensor]:
        found = attend(*tensors, feature_map=phi, impl="triton", return_state=True, **HYBRID)
        loss = found.out.square().sum() + found.state.kv.square().sum()
        return [found.out, *torch.autograd.grad(loss, [*tensors, *phi.parameters()])]

    torch._dynamo.reset()
    compiled = torch.compile(kernel_attention, fullgraph=True, backend="aot_eager")
    for found, want in zip(run(compiled), run(kernel_attention), strict=True):
        torch.testing.assert_close(found, want)


def operator_arguments() -> tuple[Any, ...]:
    q, k, v = inputs(19)
    options = Options(5, 0, True, 8, 6, "given", False, 0.3, 0.0, 0.0, 0.0, False, 16)
    q, k = (x.detach().abs().requires_grad_() for x in (q, k))
    found = ops._call(lambda *a: a, Inputs(q=q, k=k, v=v, decay=gates(19)), options, Config(chunk=16, fold_chunk=16))
    return tuple(found)


@pytest.mark.parametrize("name", ["attend", "final_memory"])
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.linattn, name).default
    torch.library.opcheck(
        op, operator_arguments(), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_func_grad() -> None:
    q, k, v = inputs(21, grad=False)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q.abs(), k.abs(), v, impl="triton").out.square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_changes_nothing() -> None:
    tensors, phi = inputs(21), make("hedgehog", 8, num_heads=2, num_kv_heads=1).to(DEVICE)

    def attend(*x: Tensor) -> Tensor:
        return kernel_attention(*x, feature_map=phi, impl="triton", **HYBRID).out

    plain = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    kept = torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(kept.square().sum(), tensors), plain, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused() -> None:
    tensors = inputs(9)
    out = linear_attention(*(x.abs() for x in tensors[:2]), tensors[2], impl="triton").out
    first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivatives"):
        first[0].sum().backward()


def test_refusals_name_the_reason() -> None:
    q, k, v = inputs(9, grad=False)
    with pytest.raises(UnsupportedError, match="float64 is the reference's"):
        linear_attention(q.double(), k.double(), v.double(), impl="triton")
    wide = torch.rand(1, 3, 1, 600, device=DEVICE)
    with pytest.raises(UnsupportedError, match="600 features are more than 512"):
        linear_attention(wide, wide, wide[..., :8], impl="triton")
    phi = make("elu", 8, num_heads=2, num_kv_heads=1)
    with pytest.raises(UnsupportedError, match="6 sinks needs a window"):
        kernel_attention(q, k, v, feature_map=phi, window=5, sinks=6, causal=False, impl="triton")


def test_a_miscompiling_release_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "MISCOMPILED", (("3.5.0", "3.5.2", (9, 0), "wrong dk"),))
    backend.miscompiled.cache_clear()
    assert "Triton 3.5.1 miscompiles" in str(backend.miscompiled("3.5.1", (9, 0)))
    assert backend.miscompiled("3.6.0", (9, 0)) is None
    assert backend.miscompiled("3.5.1", (8, 0)) is None
    backend.miscompiled.cache_clear()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, HYBRID, {"decay": True, "return_state": True}], ids=["pure", "hybrid", "decay-state"]
)
def test_programs_with_slices_equal_the_reference(options: dict[str, Any], groups: int) -> None:
    """Each kernel's programs have 64 of 100 columns: the last slice begins inside the one before."""
    assert tile(100, 64) == (64, 2)
    chunk = 64 if DEVICE == "cuda" else 16
    slices = {"forward_slice": 64, "fold_slice": 64, "dq_slice": 64, "dkv_slice": 64}
    config = Config(chunk=chunk, fold_chunk=chunk, near_chunk=chunk, shortest=chunk, **slices)
    length = 3 * chunk - 8
    rng = torch.Generator().manual_seed(3)
    heads = (2, 2 // groups, 2 // groups, 2, 2 // groups)
    tensors = [
        torch.randn(1, length, h, n, generator=rng).to(DEVICE)
        for h, n in zip(heads, (8, 8, 100, 100, 100), strict=True)
    ]
    far = options.get("decay", False)
    options = {name: value for name, value in options.items() if name != "decay"}
    decay = [-0.2 * torch.rand(1, length, 2 // groups, generator=rng).to(DEVICE)] if far else []

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, q_far, k_far, *gate = leaves = [x.to(dtype).requires_grad_() for x in (*tensors, *decay)]
        phi = GivenFeatures(100, log_scaled=False)
        found = kernel_attention(
            q, k, v, q_far=q_far.abs(), k_far=k_far.abs(), feature_map=phi, decay=(*gate, None)[0], impl=impl, **options
        )
        results = [found.out, *([found.state.kv] if found.state is not None else [])]
        loss = sum(r.sin().sum() for r in results)
        return [*results, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

    exact = run("reference", torch.float64)
    with using(config):
        results = run("triton", torch.float32)
    for found, want in zip(results, exact, strict=True):
        torch.testing.assert_close(found.double(), want, atol=2e-6 * max(1.0, want.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["pure", "hybrid"])
@pytest.mark.parametrize("name", ["elu", "relu"])
def test_a_map_without_projections_before_the_kernels(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "fuses_pointwise", lambda *_: False)
    kinds: list[str] = []
    monkeypatch.setattr(backend, "choose", lambda *a: kinds.append(a[2]) or choose(*a))
    phi, tensors = make(name, 8), inputs(40)

    def run(impl: str) -> tuple[Tensor, ...]:
        out = kernel_attention(*tensors, feature_map=phi, decay=gates(40).detach(), impl=impl, **options).out
        return out, *torch.autograd.grad(out.sin().sum(), tensors)

    for found, expected in zip(run("triton"), run("chunked"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert kinds == ["given"]


def test_wide_values_go_in_slices() -> None:
    q, k, v = (torch.rand(1, 33, 1, 256, device=DEVICE).requires_grad_() for _ in range(3))
    found, expected = (linear_attention(q, k, v, impl=impl).out for impl in ("triton", "chunked"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_row_without_far_mass_under_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in bfloat16, where a chunk may decay by exp(60) before its pairs are weighed one by one.
    monkeypatch.setitem(launch.MILD, False, 60.0)
    plan.forget()
    q, k = torch.zeros(2, 1, 16, 1, 16, device=DEVICE)
    q[..., 0] = 2.0
    k[:, 1:, :, 0] = 2.0  # the first key, a sink, has no features and a logit of zero
    v = torch.ones(1, 16, 1, 16, device=DEVICE)
    options: dict[str, Any] = {"sinks": 1, "scale": 0.25, "decay": torch.full((1, 16, 1), -3.6, device=DEVICE)}
    relu = make("relu", 16, num_heads=1)
    for far_bias in (0.0, 25.0):
        options["far_bias"] = torch.tensor([far_bias], device=DEVICE)
        with using(Config(chunk=16, fold_chunk=16, near_chunk=16, programs=8, shortest=32)):
            out = kernel_attention(q, k, v, feature_map=relu, window=0, impl="triton", **options).out
        torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0)
    plan.forget()


@pytest.mark.parametrize("module", ["backward", "device", "fold", "forward", "step", "window"])
def test_constants_are_float32(module: str) -> None:
    """Triton takes a constant beyond float32's normal numbers for a double, and all that it meets; not interpreted."""
    path = Path(launch.__file__).with_name(f"{module}.py")
    found = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    limits = torch.finfo(torch.float32)
    wide = [x for x in found if isinstance(x, float) and x and not limits.tiny <= abs(x) <= limits.max]
    assert any(isinstance(x, float) for x in found)
    assert wide == []
