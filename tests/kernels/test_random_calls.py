"""Random calls of the operator: the chunked implementation against the dense reference, whole and in random pieces.

Every seed draws sizes, options, a kind of batch and a feature map. Compared are outputs, gradients with respect to all
tensors, and states; in float64, where a wrong term is of order one and rounding far below ``TOLERANCE``.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.kernels import AttentionOutput, chunked, kernel_attention
from linattn.state import AttentionState
from linattn.testing.checks import check_same_state

TOLERANCE = 1e-9
KINDS = ("plain", "mask", "packed", "both", "both-mask", "both-packed", "cross")
TOKENWISE = ("q", "k", "v", "q_far", "k_far", "q_sink", "q_retained", "mask", "scores")


class RandomMap:
    """Features of random directions: elu + 1 or, log-scaled, exponentials; of the token's position too if asked."""

    causal, scale = True, 0.3

    def __init__(self, head_dim: int, feature_dim: int, *, log_scaled: bool, positional: bool) -> None:
        self.weight = torch.randn(head_dim, feature_dim, dtype=torch.float64)
        self.feature_dim, self.log_scaled, self.positional = feature_dim, log_scaled, positional

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = 0.7 * q.double() @ self.weight
        values, log_scale = torch.nn.functional.elu(x) + 1, None
        if self.log_scaled:
            log_scale = (3 * x).amax(-1).detach()
            values = (3 * x - log_scale[..., None]).exp()
        if positions is not None:
            values = values * (1.5 + torch.sin(positions.double())[..., None, None])
        return values, log_scale

    forward_keys = forward_queries


@dataclasses.dataclass
class Call:
    """One random call: tensors to differentiate, other options, and what it is, for the error message."""

    kind: str
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    lengths: list[int] | None

    @property
    def causal(self) -> bool:
        return bool(self.options.get("causal", True))

    def __str__(self) -> str:
        shapes = {name: tuple(t.shape) for name, t in self.leaves.items()}
        return f"{self.kind}, lengths={self.lengths}, {shapes}, {self.options}"

    def run(self, impl: str, span: slice = slice(None), **more: Any) -> AttentionOutput:
        """The call on the tokens of ``span``."""
        arguments = {**self.leaves, **self.options, **more}
        for name in TOKENWISE:
            if name in arguments:
                arguments[name] = arguments[name][:, span]
        if "decay" in arguments and arguments["decay"].ndim == 3:
            arguments["decay"] = arguments["decay"][:, span]
        return kernel_attention(**arguments, impl=impl, return_state=self.causal)

    def gradients(self, out: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
        if not out.numel():
            return {}
        found = torch.autograd.grad(out, list(self.leaves.values()), cotangent, allow_unused=True, retain_graph=True)
        pairs = zip(self.leaves.items(), found, strict=True)
        return {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def draw(rng: random.Random) -> Call:
    """A random call. Tensors come from the global generator, which the caller seeds."""
    kind = rng.choice(KINDS)
    causal = not kind.startswith(("both", "cross"))
    batch, length = rng.choice([1, 2, 3]), rng.choice([1, 2, 7, 16, 17, 40, 65])
    kv_heads, groups = rng.choice([1, 2]), rng.choice([1, 2, 3])
    heads, head_dim, value_dim, feature_dim = (
        kv_heads * groups,
        rng.choice([3, 4]),
        rng.choice([2, 5]),
        rng.choice([1, 6]),
    )
    options: dict[str, Any] = {
        "window": 0 if kind == "cross" else rng.choice([0, 0, 1, 3, 8, 30]),
        "sinks": rng.choice([0, 0, 1, 4]),
        "far": rng.random() < 0.8,
        "chunk_size": rng.choice([None, 1, 2, 4, 5, 8]),
        "causal": causal,
    }
    if not options["far"] and not options["window"] and not options["sinks"]:
        options["sinks" if kind == "cross" else "window"] = 3
    if rng.random() < 0.3:
        options["softcap"] = 2.0
    lengths = None
    if kind.endswith("packed"):
        lengths = [rng.choice([0, 1, 5, 9, 17]) for _ in range(rng.choice([1, 2, 4]))]
        batch, length = 1, sum(lengths)
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    keys = rng.choice([1, 5, 33]) if kind == "cross" else length
    if kind.endswith("mask") or (kind == "cross" and rng.random() < 0.5):
        mask = torch.rand(batch, keys) < rng.choice([0.2, 0.5, 0.9])
        side = rng.choice(["left", "right", "holes", "holes"])
        options["mask"] = mask if side == "holes" else mask.sort(-1, descending=side == "right").values

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    q_shape, k_shape = (batch, length, heads, head_dim), (batch, keys, kv_heads, head_dim)
    leaves = {"q": leaf(*q_shape), "k": leaf(*k_shape), "v": leaf(*k_shape[:3], value_dim)}
    if rng.random() < 0.3:
        leaves["sink_logits"] = leaf(heads)
    if options["far"]:
        flags = {"log_scaled": rng.random() < 0.5, "positional": rng.random() < 0.3}
        options["feature_map"] = RandomMap(head_dim, feature_dim, **flags)
        if rng.random() < 0.5:
            leaves["far_bias"] = leaf(heads)
        if rng.random() < 0.3:
            leaves |= {"q_far": leaf(*q_shape), "k_far": leaf(*k_shape)}
        strength = rng.choice([None, 0.0, 1.0, 20.0]) if causal else None
        if strength is not None:
            shape = rng.choice([(kv_heads,), (batch, length, kv_heads)])
            leaves["decay"] = (-strength * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    else:
        options["feature_map"] = None
    if causal and options["sinks"] and rng.random() < 0.5:
        leaves["q_sink"] = leaf(*q_shape)
    if causal and lengths is None and not getattr(options["feature_map"], "positional", False) and rng.random() < 0.5:
        options["retained"] = rng.choice([1, 4, 15, 60])
        options["scores"] = torch.randint(rng.choice([2, 10**6]), (batch, length, kv_heads)).float()
        if "k_far" in leaves and rng.random() < 0.5:
            leaves["q_retained"] = leaf(*q_shape)
            options["retained_distance"] = options["window"] + rng.choice([0, 1, 9])
    return Call(kind, leaves, options, lengths)


def check_close(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        limit = TOLERANCE * max(1.0, float(want.detach().abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(actual[name], want, atol=limit, rtol=0, msg=lambda m, n=name: f"{n} {what}\n{m}")


def check_states(actual: AttentionState | None, expected: AttentionState | None, what: str) -> None:
    assert actual is not None
    assert expected is not None
    largest = max(1.0, *(float(t.detach().abs().max()) for t in (expected.kv, expected.k) if t.numel()), 1.0)
    check_same_state(actual, expected, TOLERANCE * largest, f"state {what}", "the next call goes wrong.")


@pytest.mark.parametrize("seed", range(150))
def test_random_call(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    segment = rng.choice([5, 16, 2048])
    monkeypatch.setattr(chunked, "_segment", lambda call: segment)
    call = draw(rng)

    whole, expected = call.run("chunked"), call.run("reference")
    cotangent = torch.randn_like(expected.out)
    gradients = call.gradients(expected.out, cotangent)
    check_close({"out": whole.out}, {"out": expected.out}, f"of {call}")
    check_close(call.gradients(whole.out, cotangent), gradients, f"(gradient) of {call}")
    if not call.causal:
        return
    check_states(whole.state, expected.state, f"of {call}")
    if call.lengths is not None:
        check_packed_continuation(rng, call, whole.state, expected.state)
        return

    length = call.leaves["q"].shape[1]
    for impl in ("chunked", "reference"):
        cuts = sorted({0, length, *(rng.randrange(length + 1) for _ in range(rng.choice([1, 2, 5])))})
        if rng.random() < 0.5:
            cuts = sorted({*cuts, *range(max(length - 3, 0), length)})  # the last tokens one by one
        outs, state, lookback = [], None, 0
        for start, stop in itertools.pairwise(cuts):
            lookback = rng.choice([0, 0, 3])
            piece = call.run(impl, slice(start, stop), state=state, lookback=lookback)
            state = piece.state
            outs.append(piece.out)
        out = torch.cat(outs, 1)
        what = f"of {impl} in pieces {cuts}, {call}"
        check_close({"out": out}, {"out": expected.out}, what)
        check_close(call.gradients(out, cotangent), gradients, f"(gradient) {what}")
        if lookback == 0:
            check_states(state, expected.state, what)


def check_packed_continuation(
    rng: random.Random, call: Call, state: AttentionState | None, expected: AttentionState | None
) -> None:
    """Packed sequences go on from their states, each by another number of tokens."""
    assert call.lengths is not None
    lengths = [rng.choice([0, 1, 5]) for _ in call.lengths]
    more = {
        name: torch.randn(1, sum(lengths), *t.shape[2:], dtype=t.dtype) for name, t in call.leaves.items() if t.ndim > 1
    }
    if "decay" in more:
        more["decay"] = -more["decay"].abs()
    more["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
    after, want = call.run("chunked", state=state, **more), call.run("reference", state=expected, **more)
    check_close({"out": after.out}, {"out": want.out}, f"{lengths} tokens after {call}")
    check_states(after.state, want.state, f"{lengths} tokens after {call}")
