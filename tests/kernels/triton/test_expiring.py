"""Attention to keys with an expiry: the kernels against every pair of tokens; on a GPU at real sizes too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.errors import UnsupportedError
from linattn.feature_maps import make
from linattn.kernels import kernel_attention
from linattn.kernels.retain import FOREVER
from linattn.testing import budgets

pytest.importorskip("triton", reason="Triton is not installed")
from linattn.kernels.triton.expiring import expiring_attention, received_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
gpu = pytest.mark.gpu


def drawn(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, value_dim: int = 5
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Tensors, expiry and start of two rows; one key is nobody's, one never expires."""
    rng = torch.Generator().manual_seed(queries)
    shapes = {"q": (queries, heads, dim), "k": (keys, kv_heads, dim), "v": (keys, kv_heads, value_dim)}
    tensors = {name: torch.randn(2, *shape, generator=rng) for name, shape in shapes.items()}
    expiry = torch.arange(keys) + 3 + torch.randint(0, 40, (2, kv_heads, keys), generator=rng)
    expiry[:, :, 1], expiry[:, :, -1], expiry[:, 0, 2] = -1, FOREVER, 2
    start = torch.tensor([keys - queries, (keys - queries) // 2])
    return {n: t.to(DEVICE) for n, t in tensors.items()}, expiry.int().to(DEVICE), start.to(DEVICE)


def dense(
    tensors: dict[str, Tensor], expiry: Tensor, start: Tensor, far: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
    q, k, v = (tensors[name].double() for name in "qkv")
    groups = q.shape[2] // k.shape[2]
    k, v, ends = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), expiry.repeat_interleave(groups, 1)
    t = (start[:, None] + torch.arange(q.shape[1], device=q.device))[:, None, :, None]
    at = torch.arange(k.shape[1], device=q.device)
    ends = ends[:, :, None]
    seen = (at <= t) & ((t >= ends) & (ends >= 0) if far else t < ends)
    s = torch.einsum("bthd,bjhd->bhtj", q, k) * SCALE
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    w = s.exp() * seen
    total = w.sum(-1)
    safe = torch.where(total > 0, total, 1.0)
    out = torch.einsum("bhtj,bjhv->bthv", w / safe[..., None], v)
    return out, torch.where(total > 0, safe.log(), -1e30).transpose(1, 2)


@pytest.mark.parametrize(
    ("queries", "keys", "sizes", "softcap"),
    [(70, 70, {}, None), (9, 40, {"heads": 3, "kv_heads": 1, "dim": 16, "value_dim": 20}, 1.5)],
    ids=["whole", "continued"],
)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_every_pair_of_tokens(queries: int, keys: int, sizes: dict[str, int], softcap: float | None, far: bool) -> None:
    tensors, expiry, start = drawn(queries, keys, **sizes)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    found = expiring_attention(**leaves, expiry=expiry, scale=SCALE, far=far, softcap=softcap, start=start)
    want = dense(leaves, expiry, start, far, softcap)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)
    there = want[1] > -1e29
    assert bool(there.all()) == (not far or queries < keys)
    up, down = (torch.randn_like(x) for x in want)
    grads = [
        torch.autograd.grad((out * up.to(out.dtype)).sum() + (mass * down.to(out.dtype))[there].sum(), leaves.values())
        for out, mass in (found, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_received_attention(softcap: float | None) -> None:
    tensors, _, _ = drawn(70, 70)
    q, k = tensors["q"].double(), tensors["k"].double().repeat_interleave(2, 2)
    s = torch.einsum("bthd,bjhd->bhtj", q, k) * SCALE
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    at = torch.arange(70, device=q.device)
    mass = s.masked_fill(at > at[:, None], -torch.inf).logsumexp(-1)
    share = (s - mass[..., None]).exp() * (at[:, None] - at >= 9)
    shares, given = share.unflatten(1, (2, 2)), (tensors["q"], tensors["k"], mass.transpose(1, 2))
    options: dict[str, Any] = {"scale": SCALE, "after": 9, "softcap": softcap}
    torch.testing.assert_close(
        received_attention(*given, **options).double(), shares.mean(2).sum(2), atol=1e-6, rtol=1e-5
    )
    largest = received_attention(*given, largest=True, **options)
    torch.testing.assert_close(largest.double(), shares.amax((2, 3)), atol=1e-6, rtol=1e-5)
    assert not largest[..., -9:].any()
    assert (largest[..., :-9] > 0).all()
    assert not received_attention(*given, scale=SCALE, after=70, largest=True).any()


def test_opcheck() -> None:
    tensors, expiry, start = drawn(20, 20)
    given = [t.requires_grad_() for t in tensors.values()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.linattn.expiring_attention.default, (*given, expiry, start, SCALE, 0.0, False), test_utils=tests
    )
    mass = torch.zeros(2, 20, 4, device=DEVICE)
    for largest in (False, True):
        torch.library.opcheck(
            torch.ops.linattn.received_attention.default, (*given[:2], mass, SCALE, 0.0, 3, largest), test_utils=tests
        )


def test_what_the_kernels_cannot_do_is_refused() -> None:
    tensors, expiry, start = drawn(5, 5)
    wide = {n: t.double() for n, t in tensors.items()}
    with pytest.raises(UnsupportedError, match="got float64"):
        expiring_attention(**wide, expiry=expiry, scale=SCALE, start=start)
    with pytest.raises(UnsupportedError, match="float64 is the reference's"):
        kernel_attention(
            **wide, feature_map=None, far=False, retained=2, scores=torch.zeros(2, 5, 2, device=DEVICE), impl="triton"
        )
    x = torch.zeros(1, 5, 1, 256, device=DEVICE)
    options: dict[str, Any] = {"retained": 2, "scores": x[..., 0], "impl": "triton"}
    with pytest.raises(UnsupportedError, match="with retained tokens, value_dim 256 is more than 240"):
        kernel_attention(x, x, x, feature_map=make("elu", 256), **options)
    assert kernel_attention(x, x, x, feature_map=None, far=False, **options).out.shape == x.shape


@pytest.mark.parametrize("aging", [False, True], ids=["plain", "aging"])
def test_pieces_equal_the_whole(aging: bool) -> None:
    """With a state between them, whose sums, slots and ring the kernels continue."""
    rng = torch.Generator().manual_seed(4)
    q, k, v, scores = (torch.randn(1, 50, *n, generator=rng).to(DEVICE) for n in ((4, 8), (2, 8), (2, 8), (2,)))
    options: dict[str, Any] = {"feature_map": make("elu", 8), "window": 4, "sinks": 2, "retained": 6, "impl": "triton"}
    options["decay"] = torch.tensor([-0.1, -0.01], device=DEVICE)
    tensors = {"q": q, "k": k, "v": v, "scores": scores}
    if aging:
        tensors |= {"q_far": q.flip(3), "k_far": k.flip(3), "q_retained": 2 * q}
        options["retained_distance"] = 11
    want = kernel_attention(**tensors, **options).out
    expected = kernel_attention(**{n: x.double() for n, x in tensors.items()}, **options | {"impl": "reference"}).out
    torch.testing.assert_close(want.double(), expected, atol=2e-6, rtol=1e-5)
    state, outs = None, []
    for part in (slice(0, 19), slice(19, 20), slice(20, 50)):
        cut = {name: x[:, part] for name, x in tensors.items()}
        out, state = kernel_attention(**cut, state=state, return_state=True, **options)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=2e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- on a GPU only


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim", "retained", "window"),
    [(2048, 9, 3, 64, 448, 64), (1500, 4, 1, 128, 192, 64), (700, 2, 2, 64, 1000, 32)],
)
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
def test_real_sizes(
    length: int, heads: int, kv_heads: int, dim: int, retained: int, window: int, decay: bool, dtype: torch.dtype
) -> None:
    """Outputs and every gradient within twice the error of chunked attention in the same dtype, against float64."""
    rng = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, length, *shape, generator=rng, device="cuda")

    tensors = {"q": normal(heads, dim), "k": normal(kv_heads, dim), "v": normal(kv_heads, dim)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    cotangent, scores = normal(heads, dim).to(dtype), normal(kv_heads)
    gates = torch.full((kv_heads,), -0.01, device="cuda")
    phi = make("hedgehog", dim, num_heads=heads, num_kv_heads=kv_heads).cuda()

    def run(impl: str, wide: bool) -> dict[str, Tensor]:
        leaves = {n: t.to(torch.float64 if wide else dtype).requires_grad_() for n, t in tensors.items()}
        map_ = make("hedgehog", dim, num_heads=heads, num_kv_heads=kv_heads).cuda()
        map_.load_state_dict(phi.state_dict())
        map_ = map_.double() if wide else map_
        if decay:
            leaves["decay"] = gates.to(torch.float64 if wide else torch.float32).requires_grad_()
        out = kernel_attention(
            **leaves, feature_map=map_, scores=scores, retained=retained, window=window, sinks=4, impl=impl
        ).out
        watched = leaves | dict(map_.named_parameters())
        grads = torch.autograd.grad(out, list(watched.values()), cotangent.to(out.dtype), allow_unused=True)
        named = {f"gradient of {n}": g for n, g in zip(watched, grads, strict=True) if g is not None}
        return {"output": out.detach(), **named}

    exact, low, found = run("chunked", True), run("chunked", False), run("triton", False)
    terms = float(cotangent.abs().max() * tensors["v"].abs().max())
    for what, want in exact.items():
        budget = budgets.low_precision(dtype, want, low[what], count=length, terms=terms)
        assert budgets.error(found[what], want) <= budget, f"{what}: {budgets.error(found[what], want)} > {budget}"


@gpu
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_bfloat16_of_long_rows(far: bool) -> None:
    tensors, expiry, start = drawn(1000, 1300, heads=8, kv_heads=2, dim=64, value_dim=64)
    half = {n: t.bfloat16().requires_grad_() for n, t in tensors.items()}
    out, mass = expiring_attention(**half, expiry=expiry, scale=SCALE, far=far, start=start)
    want, log = dense(half, expiry, start, far, None)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(mass.double(), log, atol=2e-2, rtol=1e-3)
