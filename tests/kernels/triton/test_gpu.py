"""What only a GPU can show: long sequences, tensors past 2³¹ elements, poisoned memory, determinism, real precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.feature_maps import make
from linattn.kernels import kernel_attention, linear_attention
from linattn.kernels.protocols import GivenFeatures
from linattn.testing import budgets

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HYBRID = {"window": 128, "sinks": 4}


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    rng = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=rng, device="cuda").to(dtype)


def check(
    name: str, batch: int, length: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype,
    *, decay: bool | float = False, sink_queries: bool = False,
    options: dict[str, Any] | None = None, map_options: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Outputs and every gradient within twice the error of chunked attention in the same dtype, against float64."""
    torch.manual_seed(7)
    phi = make(name, dim, num_heads=heads, num_kv_heads=kv_heads, **(map_options or {})).cuda()
    tensors = [
        normal(batch, length, heads, dim, dtype=dtype, seed=1),
        normal(batch, length, kv_heads, dim, dtype=dtype, seed=2),
        normal(batch, length, kv_heads, value_dim, dtype=dtype, seed=3),
    ]
    gates = -0.05 * torch.rand(batch, length, kv_heads, device="cuda") if decay else None
    if gates is not None and decay is not True:  # some of the tokens forget so much
        gates = torch.where(torch.rand_like(gates) < 0.05, -float(decay), gates)
    cotangent = normal(batch, length, heads, value_dim, dtype=dtype, seed=4)
    others = normal(batch, length, heads, dim, dtype=dtype, seed=5)

    def run(impl: str, wide: bool) -> dict[str, Tensor]:
        cast = torch.float64 if wide else dtype
        map_ = make(name, dim, num_heads=heads, num_kv_heads=kv_heads, **(map_options or {})).cuda()
        map_.load_state_dict(phi.state_dict())
        map_ = map_.double() if wide else map_
        leaves = {n: t.to(cast).requires_grad_() for n, t in zip("qkv", tensors, strict=True)}
        extra = {} if gates is None else {"decay": gates.to(torch.float64 if wide else torch.float32).requires_grad_()}
        if sink_queries:
            extra["q_sink"] = others.to(cast).requires_grad_()
        out = kernel_attention(**leaves, **extra, feature_map=map_, impl=impl, **(options or {})).out
        watched = {**leaves, **extra, **dict(map_.named_parameters())}
        grads = torch.autograd.grad(out, list(watched.values()), cotangent.to(out.dtype))
        return {"output": out.detach(), **{f"gradient of {n}": g for n, g in zip(watched, grads, strict=True)}}

    exact, low, found = run("chunked", True), run("chunked", False), run("triton", False)
    for what, want in exact.items():
        # Before it cancels, a gradient is a cotangent times a value times a key.
        terms = float(cotangent.abs().max() * tensors[2].abs().max())
        budget = budgets.low_precision(dtype, want, low[what], count=length, terms=terms)
        assert budgets.error(found[what], want) <= budget, f"{what}: {budgets.error(found[what], want)} > {budget}"


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize(("features", "value_dim"), [(128, 64), (128, 128), (256, 64)])
def test_given_features_with_decay(features: int, value_dim: int, window: int, dtype: torch.dtype) -> None:
    length, heads = 700, 2
    tensors = [normal(1, length, heads, n, dtype=dtype, seed=n) for n in (features, features + 1, value_dim)]
    tensors = [tensors[0].abs(), tensors[1][..., :features].abs(), tensors[2]]
    near = [normal(1, length, heads, 64, dtype=dtype, seed=s) for s in (5, 6)]
    gates = -0.05 * torch.rand(1, length, heads, device="cuda")
    cotangent = normal(1, length, heads, value_dim, dtype=dtype, seed=4)

    def run(impl: str, cast: torch.dtype) -> list[Tensor]:
        phi_q, phi_k, v = leaves = [x.to(cast).requires_grad_() for x in tensors]
        leaves += [gates.to(torch.promote_types(cast, torch.float32)).requires_grad_()]
        if window:
            leaves += [x.to(cast).requires_grad_() for x in near]
            map_ = GivenFeatures(features, log_scaled=False)
            options: dict[str, Any] = {"q_far": phi_q, "k_far": phi_k, "window": window, "sinks": 4}
            out = kernel_attention(*leaves[4:], v, feature_map=map_, decay=leaves[3], impl=impl, **options).out
        else:
            out = linear_attention(phi_q, phi_k, v, decay=leaves[3], impl=impl).out
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    exact, low, found = run("chunked", torch.float64), run("chunked", dtype), run("triton", dtype)
    terms = float(cotangent.abs().max() * tensors[2].abs().max())
    for i, want in enumerate(exact):
        budget = budgets.low_precision(dtype, want, low[i], count=length, terms=terms)
        assert budgets.error(found[i], want) <= budget, f"{i}: {budgets.error(found[i], want)} > {budget}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, HYBRID], ids=["pure", "hybrid"])
@pytest.mark.parametrize("decay", [False, True], ids=["no-decay", "decay"])
@pytest.mark.parametrize(
    ("name", "dim", "value_dim", "map_options"),
    [
        ("hedgehog", 64, 64, {}),
        ("hedgehog", 16, 32, {}),
        ("exp", 64, 128, {"num_features": 96}),
        ("favor+", 128, 128, {"num_features": 128}),
        ("elu", 64, 64, {}),
        ("relu", 128, 256, {}),
        ("taylor2", 16, 64, {}),
        ("nystrom", 64, 64, {"num_features": 32}),
    ],
)
def test_maps(
    name: str,
    dim: int,
    value_dim: int,
    map_options: dict[str, Any],
    decay: bool,
    options: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    check(name, 2, 333, 4, 2, dim, value_dim, dtype, decay=decay, options=options, map_options=map_options)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("groups", [1, 4])
def test_lengths_and_groups(length: int, groups: int) -> None:
    check("hedgehog", 1, length, 4, 4 // groups, 64, 64, torch.bfloat16, decay=True, options=HYBRID)
    check("hedgehog", 1, length, 4, 4 // groups, 64, 64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 130, 1000])
@pytest.mark.parametrize(
    ("name", "dim", "value_dim", "options"),
    [
        ("hedgehog", 64, 64, HYBRID),
        ("hedgehog", 128, 128, {"window": 256, "sinks": 4}),
        ("hedgehog", 64, 64, {"sinks": 7, "softcap": 3.0}),
        ("exp", 64, 128, HYBRID),
        ("elu", 16, 32, {"window": 20, "sinks": 17}),
    ],
)
def test_sinks_that_meet_queries_of_their_own(
    name: str, dim: int, value_dim: int, options: dict[str, Any], length: int, dtype: torch.dtype
) -> None:
    check(name, 2, length, 4, 2, dim, value_dim, dtype, decay=True, sink_queries=True, options=options)


def test_steps_whose_sinks_meet_queries_of_their_own() -> None:
    phi = make("hedgehog", 64, num_heads=6, num_kv_heads=2).cuda()
    q, q_sink, k, v = (normal(3, 700, h, 64, dtype=torch.bfloat16, seed=s) for s, h in enumerate((6, 6, 2, 2)))

    def steps(impl: str, dtype: torch.dtype) -> Tensor:
        map_ = make("hedgehog", 64, num_heads=6, num_kv_heads=2).cuda().to(dtype)
        map_.load_state_dict(phi.state_dict())
        outs, state = [], None
        for first, last in ((0, 680), *((i, i + 1) for i in range(680, 700))):
            tensors = (x[:, first:last].to(dtype) for x in (q, k, v, q_sink))
            names = ("q", "k", "v", "q_sink")
            given = dict(zip(names, tensors, strict=True))
            done = kernel_attention(**given, feature_map=map_, state=state, return_state=True, impl=impl, **HYBRID)
            outs, state = [*outs, done.out], done.state
        return torch.cat(outs, 1)

    with torch.no_grad():
        exact = steps("chunked", torch.float64)
        low, found = steps("chunked", torch.bfloat16), steps("triton", torch.bfloat16)
    terms = float(v.abs().max())
    budget = budgets.low_precision(torch.bfloat16, exact, low, count=700, terms=terms)
    assert budgets.error(found, exact) <= budget


@pytest.mark.parametrize("forgets", [3.0, 70.0, 1e4])
@pytest.mark.parametrize("options", [{}, HYBRID], ids=["pure", "hybrid"])
@pytest.mark.parametrize("name", ["hedgehog", "exp"])
def test_strong_decays(name: str, options: dict[str, Any], forgets: float) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(name, 1, 700, 2, 1, 64, 64, dtype, decay=forgets, options=options)


def test_gradients_of_a_final_state() -> None:
    phi = make("hedgehog", 64, num_heads=4, num_kv_heads=2).cuda()
    tensors = [normal(1, 3000, h, 64, dtype=torch.float32, seed=h) for h in (4, 2, 2)]
    gates = -0.05 * torch.rand(1, 3000, 2, device="cuda")

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (*tensors, gates)]
        map_ = make("hedgehog", 64, num_heads=4, num_kv_heads=2).cuda().to(dtype)
        map_.load_state_dict(phi.state_dict())
        done = kernel_attention(*leaves[:3], decay=leaves[3], feature_map=map_, return_state=True, impl=impl, **HYBRID)
        weights = torch.linspace(0.5, 1.5, done.state.kv.numel(), device="cuda", dtype=dtype).view_as(done.state.kv)
        loss = (done.out**2).mean() + (done.state.kv * weights).mean() + done.state.k.square().mean()
        return list(torch.autograd.grad(loss, leaves))

    for found, want in zip(run("triton", torch.float32), run("chunked", torch.float64), strict=True):
        assert budgets.error(found, want) <= 2e-5 * want.abs().max().item() + 1e-12


def test_a_million_tokens() -> None:
    length = 1 << 20
    q, k = (normal(1, length, 1, 64, dtype=torch.bfloat16, seed=s) for s in (1, 2))
    v = normal(1, length, 1, 64, dtype=torch.bfloat16, seed=3)
    phi = make("hedgehog", 64).cuda()
    for options in ({}, HYBRID):
        found = kernel_attention(q, k, v, feature_map=phi, impl="triton", **options).out
        wide = [x.double() for x in (q, k, v)]
        want = kernel_attention(*wide, feature_map=make("hedgehog", 64).cuda().double(), impl="chunked", **options).out
        tail = slice(length - 4096, length)
        for part in (slice(0, 4096), tail):
            size = want[:, part].abs().max().item()
            worst = (found[:, part].double() - want[:, part]).abs().max().item()
            assert worst <= 0.02 * size, f"off by {worst} at {part} for outputs up to {size}, {options}"


def test_more_than_two_to_the_31_elements() -> None:
    length, heads = (1 << 20) + 64, 16  # q and k have 2³¹ + 2¹⁷ elements
    q = torch.rand(1, length, heads, 128, device="cuda", dtype=torch.bfloat16)
    v = torch.rand(1, length, heads, 16, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    out = linear_attention(q, q, v, impl="triton").out
    want = linear_attention(q[:, :, -1:], q[:, :, -1:], v[:, :, -1:], impl="triton").out
    torch.testing.assert_close(out[:, -4096:, -1:], want[:, -4096:], atol=2e-3, rtol=2e-2)


def test_no_uninitialised_memory_is_read() -> None:
    poison = torch.full((1 << 28,), float("nan"), device="cuda")  # 1 GiB of NaN that later allocations reuse
    del poison
    phi = make("hedgehog", 64, num_heads=4, num_kv_heads=2).cuda()
    for options in (
        {},
        HYBRID,
        {"mask": torch.arange(777, device="cuda")[None] >= torch.tensor([[3], [40]], device="cuda")},
    ):
        leaves = [normal(2, 777, h, 64, dtype=torch.bfloat16, seed=h).requires_grad_() for h in (4, 2, 2)]
        out = kernel_attention(*leaves, feature_map=phi, impl="triton", **options).out
        for t in (out, *torch.autograd.grad(out, [*leaves, *phi.parameters()], torch.ones_like(out))):
            assert bool(torch.isfinite(t).all())


def test_runs_repeat_bit_for_bit() -> None:
    phi = make("hedgehog", 64, num_heads=4, num_kv_heads=2).cuda()
    leaves = [normal(2, 3000, h, 64, dtype=torch.bfloat16, seed=h).requires_grad_() for h in (4, 2, 2)]
    decay = (-0.1 * torch.rand(2, 3000, 2, device="cuda")).requires_grad_()

    def run() -> list[Tensor]:
        out = kernel_attention(*leaves, decay=decay, feature_map=phi, impl="triton", **HYBRID).out
        return [out, *torch.autograd.grad(out, [*leaves, decay, *phi.parameters()], torch.ones_like(out))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_packed_sequences_equal_separate_ones() -> None:
    lengths = [700, 1, 0, 1300, 64]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    phi = make("hedgehog", 64, num_heads=4, num_kv_heads=2).cuda()
    tensors = [normal(1, sum(lengths), h, 64, dtype=torch.bfloat16, seed=h) for h in (4, 2, 2)]
    packed = kernel_attention(*tensors, feature_map=phi, cu_seqlens=bounds, impl="triton", **HYBRID).out
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if stop > start:
            alone = kernel_attention(*(x[:, start:stop] for x in tensors), feature_map=phi, impl="triton", **HYBRID).out
            torch.testing.assert_close(packed[:, start:stop], alone, atol=1e-2, rtol=1e-2)
