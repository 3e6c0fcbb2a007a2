"""What benchmarks/kernels.py measures: problems, contenders, and the check that comes before every time of ours."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from linattn.feature_maps import FeatureMap, make
from linattn.kernels import kernel_attention, linear_attention

DTYPE = torch.bfloat16
HEADS = 16
FORWARD, BOTH = "forward", "forward+backward"
WINDOW, SINKS = 128, 4
LONGEST_CHECKED_GRADIENT = 131072

FLA_PLAIN, FLA = "fla un-normalised", "fla normalised"
FLA_RAW = "Hedgehog compiled + fla normalised"
CUDNN, FLASH, FLEX = "SDPA cuDNN", "SDPA Flash", "FlexAttention"


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: sizes, and what of the operator is switched on."""

    batch: int
    length: int
    head_dim: int = 64
    features: int = 128
    value_dim: int = 64
    map: str = "hedgehog"
    """``"given"``: the inputs are features; else the name of a feature map of raw q and k."""
    window: int = 0
    sinks: int = 0
    decay: str = ""
    """``"head"``: a log-gate per head; ``"token"``: per token and head."""
    heads: int = HEADS

    @property
    def shape(self) -> str:
        inner = f"F{self.features}" if self.map == "given" else f"D{self.head_dim} F{self.features}"
        return f"B{self.batch} T{self.length} H{self.heads} {inner} V{self.value_dim}"

    @property
    def title(self) -> str:
        """Ours on this case."""
        name = "linattn, features given" if self.map == "given" else f"linattn {self.map}"
        name += f", window {self.window} + {self.sinks}" if self.window else ""
        return name + (f", decay per {self.decay}" if self.decay else "")

    @property
    def width(self) -> int:
        """Columns of q and k."""
        return self.features if self.map == "given" else self.head_dim

    def floor_bytes(self, name: str) -> int:
        """Every tensor moved once: q, k, v, out; backward q, k, v, out, its gradient and three gradients."""
        forward = 2 * self.width + 2 * self.value_dim
        both = forward + 2 * (2 * self.width + self.value_dim) + 2 * self.value_dim
        return (forward if name == FORWARD else both) * self.batch * self.length * self.heads * DTYPE.itemsize

    def flop(self, name: str) -> int:
        """Of the recurrent form: update and read the state (backward: again, and five such products), map, window."""
        state = self.features * self.value_dim * (4 if name == FORWARD else 14)
        maps = {"given": 0, "elu": 0, "hedgehog": self.features // 2}.get(self.map, self.features)
        exact = min(self.window, self.length) * (self.head_dim + self.value_dim) * 2
        extra = 4 * self.head_dim * maps * (1 if name == FORWARD else 3) + exact * (1 if name == FORWARD else 3.5)
        return int((state + extra) * self.batch * self.length * self.heads)


class Tensors(NamedTuple):
    """The tensors of a case. q and k are features where those are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    decay: Tensor | None
    phi: FeatureMap | None

    def leaves(self) -> dict[str, Tensor]:
        """Everything that receives a gradient."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.decay is not None:
            found["decay"] = self.decay
        return found | ({} if self.phi is None else dict(self.phi.named_parameters()))

    def heads(self, heads: list[int], dtype: torch.dtype) -> Tensors:
        """The same problem of some heads: none sees another."""

        def cut(x: Tensor) -> Tensor:
            return x.detach()[:, :, heads].to(dtype)

        decay = self.decay
        if decay is not None:  # half precision would blur a long half-life
            decay = decay.detach()[..., heads].to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        q, k, v = (cut(x).requires_grad_() for x in (self.q, self.k, self.v))
        return Tensors(q, k, v, cut(self.dout), decay, None if self.phi is None else _map_of(self.phi, heads, dtype))


def _map_of(phi: FeatureMap, heads: list[int], dtype: torch.dtype) -> FeatureMap:
    """The map of some heads; what belongs to no head (a random projection) stays whole."""
    device = next((t.device for t in phi.state_dict().values()), None)  # elu has no tensors
    part = make(phi.name, phi.head_dim, num_heads=len(heads), device=device, dtype=dtype, **phi.options())
    fits = part.state_dict()
    part.load_state_dict({n: t if t.shape == fits[n].shape else t[heads] for n, t in phi.state_dict().items()})
    return part


def draw(case: Case, device: str) -> Tensors:
    """Random tensors of a case, the same at every call."""
    torch.manual_seed(case.length)
    b, t, h = case.batch, case.length, case.heads

    def normal(width: int) -> Tensor:
        return torch.randn(b, t, h, width, dtype=DTYPE, device=device)

    q, k, v, dout = normal(case.width), normal(case.width), normal(case.value_dim), normal(case.value_dim)
    if case.map == "given":
        q, k = q.softmax(-1), k.softmax(-1)
    decay, phi = None, None
    if case.decay:  # half-lives of 64 … 8192 tokens
        decay = -math.log(2) / torch.logspace(6, 13, h, base=2.0, device=device)
        if case.decay == "token":
            decay = decay * (2 * torch.rand(b, t, h, device=device))
        decay.requires_grad_()
    if case.map != "given":
        options = {} if case.map in ("hedgehog", "elu") else {"num_features": case.features}
        phi = make(case.map, case.head_dim, num_heads=h, device=device, dtype=DTYPE, **options)
        with torch.no_grad():
            for p in phi.parameters():
                p.add_(0.05 * torch.randn_like(p))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return Tensors(q, k, v, dout, decay, phi)


def attend(case: Case, x: Tensors, impl: str) -> Tensor:
    """Our operator."""
    if x.phi is None:
        return linear_attention(x.q, x.k, x.v, decay=x.decay, impl=impl).out
    return kernel_attention(
        x.q, x.k, x.v, feature_map=x.phi, window=case.window, sinks=case.sinks, decay=x.decay, impl=impl
    ).out


SHAPES = (
    Case(8, 2048, map="given"),
    Case(8, 4096, map="given", value_dim=128),
    Case(1, 131072, map="given"),
)
RAW = (Case(8, 2048), Case(1, 131072))
HYBRID_LENGTHS = tuple(1 << p for p in range(13, 21))
HYBRID = tuple(
    Case(1, t, window=WINDOW, sinks=SINKS, decay=decay) for decay in ("head", "token") for t in HYBRID_LENGTHS
)
CROSSOVER_MAPS = (("hedgehog", 64), ("elu", 128), ("exp", 128), ("favor+", 128))
"""Names and head dimensions; the first of a dimension is the one whose crossover a bar asks for."""
CROSSOVER_TOKENS = (16384, 65536)
"""Of all sequences of a call: with few, Python takes longer to issue a call than the GPU to run it."""
SDPA = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}
COLD = {
    "given": Case(8, 2048, map="given"),
    "raw": Case(8, 2048),
    "hybrid": Case(8, 2048, window=WINDOW, sinks=SINKS, decay="token"),
}


# ------------------------------------------------------------------------------------------------------- contenders


class Work(NamedTuple):
    """What is timed: a call, and everything that receives a gradient from it."""

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    dout: Tensor
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def run(self, name: str) -> Any:
        if name == FORWARD:
            with torch.no_grad():
                return self.call()
        out = self.call()
        return out, torch.autograd.grad(out, self.leaves, self.dout)


MakeWork = Callable[[Case, Tensors], Work]


def our_work(case: Case, x: Tensors, impl: str) -> Work:
    return Work(lambda: attend(case, x, impl), tuple(x.leaves().values()), x.dout)


def fla_work(case: Case, x: Tensors, *, normalize: bool) -> Work:
    from fla.ops.linear_attn import chunk_linear_attn

    return Work(lambda: chunk_linear_attn(x.q, x.k, x.v, scale=1.0, normalize=normalize)[0], (x.q, x.k, x.v), x.dout)


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """Features ``[B, T, H, 2D]``, written for torch.compile: one product, the rest in one kernel."""
    y = torch.einsum("bthd,hde->bthe", x, weight)
    return torch.cat([y, -y], -1).softmax(-1, dtype=torch.float32).to(x.dtype).contiguous()


def fla_raw_work(case: Case, x: Tensors) -> Work:
    from fla.ops.linear_attn import chunk_linear_attn

    features = torch.compile(hedgehog, dynamic=False)
    query, key = (
        nn.Parameter(torch.eye(case.head_dim, device=x.q.device, dtype=DTYPE).repeat(case.heads, 1, 1))
        for _ in range(2)
    )

    def call() -> Tensor:
        return chunk_linear_attn(features(x.q, query), features(x.k, key), x.v, scale=1.0, normalize=True)[0]

    return Work(call, (x.q, x.k, x.v, query, key), x.dout)


def _heads_first(x: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v ``[B, H, T, D]`` as softmax attention likes them best, and the output's gradient."""
    q, k, v, dout = (t.detach().transpose(1, 2).contiguous() for t in (x.q, x.k, x.v, x.dout))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def sdpa_work(case: Case, x: Tensors, backend: SDPBackend) -> Work:
    q, k, v, dout = _heads_first(x)
    return Work(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dout, lambda: sdpa_kernel(backend)
    )


def flex_work(case: Case, x: Tensors) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return q_index >= k_index

    q, k, v, dout = _heads_first(x)
    mask = create_block_mask(causal, None, None, case.length, case.length, device=x.q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Work(lambda: compiled(q, k, v, block_mask=mask), (q, k, v), dout)


# ------------------------------------------------------------------------------------------------------- correctness


def results(x: Tensors, out: Callable[[], Tensor], backward: bool) -> dict[str, Tensor]:
    """The output and, by name, the gradient of every leaf."""
    if not backward:
        with torch.no_grad():
            return {"out": out()}
    leaves = x.leaves()
    found = out()
    return {"out": found.detach()} | dict(
        zip(leaves, torch.autograd.grad(found, list(leaves.values()), x.dout), strict=True)
    )


def of_heads(found: dict[str, Tensor], heads: list[int]) -> dict[str, Tensor]:
    """Results of some heads: heads are dimension 2 of activations, the last of decays, the first of parameters."""
    dims = {"out": 2, "q": 2, "k": 2, "v": 2, "decay": -1}
    return {n: t.index_select(dims.get(n, 0), torch.tensor(heads, device=t.device)) for n, t in found.items()}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Greatest difference over greatest value, by name; the difference itself where zero is expected throughout."""
    return {n: _ratio((found[n].double() - e).abs().max(), e.abs().max()) for n, e in expected.items()}


def rms_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of the value, by name."""
    return {n: _ratio((found[n].double() - e).norm(), e.norm()) for n, e in expected.items()}


def _ratio(difference: Tensor, scale: Tensor) -> float:
    return float(difference) / float(scale) if scale else float(difference)


class Check(NamedTuple):
    """Relative errors against float64 by tensor, and what they may be: greatest ones, and root mean squares.

    Both may be twice those of an independent computation in the same dtype, and a rounding more: of the greatest value
    for the greatest error, which one element out of millions decides (:mod:`linattn.testing.budgets`), and half of it
    in the mean.
    """

    errors: dict[str, float]
    bounds: dict[str, float]
    rms: dict[str, float]
    rms_bounds: dict[str, float]

    @classmethod
    def of(
        cls,
        found: dict[str, Tensor],
        independent: dict[str, Tensor],
        expected: dict[str, Tensor],
        sums: Sequence[str] = (),
    ) -> Check:
        """``sums``: names of what is kept in float32; the rest is rounded on its way."""
        eps = {n: torch.finfo(torch.float32 if n in sums else DTYPE).eps for n in expected}
        bounds = {n: 2 * (e + eps[n]) for n, e in relative_errors(independent, expected).items()}
        rms_bounds = {n: 2 * e + eps[n] / 2 for n, e in rms_errors(independent, expected).items()}
        return cls(relative_errors(found, expected), bounds, rms_errors(found, expected), rms_bounds)

    @property
    def holds(self) -> bool:
        pairs = [(e, self.bounds[n]) for n, e in self.errors.items()]
        pairs += [(e, self.rms_bounds[n]) for n, e in self.rms.items()]
        return all(error <= bound for error, bound in pairs)  # NaN does not

    def __str__(self) -> str:
        def worst(errors: dict[str, float], bounds: dict[str, float]) -> str:
            n = max(errors, key=lambda n: (not math.isfinite(errors[n]), errors[n] / bounds[n]))
            return f"{n} {errors[n]:.1e} (may be {bounds[n]:.1e})"

        return f"{worst(self.errors, self.bounds)}, rms {worst(self.rms, self.rms_bounds)}"


class Oracle:
    """float64 results of a case on two of its heads, kept for the case asked last."""

    def __init__(self) -> None:
        self._key: tuple[Case, bool] | None = None
        self._expected: dict[str, Tensor] = {}

    def heads(self, case: Case) -> list[int]:
        return [0, case.heads - 1] if case.length <= LONGEST_CHECKED_GRADIENT else [case.heads - 1]

    def expected(self, case: Case, x: Tensors, backward: bool) -> dict[str, Tensor]:
        if self._key != (case, backward):
            wide = x.heads(self.heads(case), torch.float64)
            impl = "reference" if case.length <= 2048 and case.batch <= 8 else "chunked"
            self._expected = results(wide, lambda: attend(case, wide, impl), backward)
            self._key = (case, backward)
        return self._expected

    def check(self, case: Case, x: Tensors, impl: str) -> Check:
        """Compare ours; of very long sequences the output alone."""
        heads, backward = self.heads(case), case.length <= LONGEST_CHECKED_GRADIENT
        expected = self.expected(case, x, backward)
        narrow = x.heads(heads, DTYPE)
        independent = results(narrow, lambda: attend(case, narrow, "chunked"), backward)
        return Check.of(of_heads(results(x, lambda: attend(case, x, impl), backward), heads), independent, expected)

    def peer_errors(self, case: Case, x: Tensors, work: Work) -> dict[str, float]:
        """Errors of a peer that computes the same function of the same features."""
        return relative_errors(of_heads(results(x, work.call, True), self.heads(case)), self.expected(case, x, True))
