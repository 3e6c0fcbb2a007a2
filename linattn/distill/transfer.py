"""Transfer: every converted layer learns from its own softmax attention, all layers at once, one forward a step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.convert import ConvertedAttention
from linattn.distill.engine import Batch, Objective, Stage, derived_seed
from linattn.distill.layers import answered, exact, prepare, relative_error, trainable_layers
from linattn.distill.targets import SplitAttention
from linattn.errors import OptionError, UnsupportedError
from linattn.kernels import kernel_attention

PARTS = {"maps": ("feature_map.",), "decay": ("log_half_life", "gate_"), "far_bias": ("far_bias",)}
"""What can be trained of a converted layer, and how its parameters' names begin."""


@dataclasses.dataclass(frozen=True)
class Transfer(Stage):
    """Fit the converted layers to the softmax attention they replaced, on the inputs that the teacher gives them.

    What a layer returns to the rest of the model is exact attention, so all layers train in parallel and no teacher
    model is kept. The loss of a layer, with far output and far mass as in :class:`SplitAttention`:

        |hybrid − softmax|² / |softmax|² + far_weight · |far − far*|² / |far*|² + mass_weight · mean (log m − log m*)²

    (Attention transfer: Zhang et al. 2024, arXiv:2410.10254; per-layer alignment on the teacher's inputs: Bick et al.
    2024, arXiv:2408.10189. Targets of the far branch's own and window dropout: arXiv:2510.05901.)

    A layer without window and sinks has nothing but a far branch, and its loss is the first term.

    Attributes:
        far_weight: of the error of the far branch's own output. With it at 0, and ``mass_weight`` too, a good window
            leaves the far branch little to do.
        mass_weight: of the error of its log mass, in nats².
        window_dropout: probability at the first and the last step that a layer is trained without window and sinks,
            its far branch reading all tokens; linear between them.
        train: which of ``"maps"``, ``"decay"``, ``"far_bias"`` train.
    """

    far_weight: float = 1.0
    mass_weight: float = 0.1
    window_dropout: tuple[float, float] = (0.0, 0.0)
    train: tuple[str, ...] = ("maps", "decay", "far_bias")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.far_weight < 0 or self.mass_weight < 0:
            raise OptionError(f"far_weight={self.far_weight}, mass_weight={self.mass_weight}: expected numbers ≥ 0.")
        if len(self.window_dropout) != 2 or not all(0 <= p <= 1 for p in self.window_dropout):
            raise OptionError(f"window_dropout: got {self.window_dropout}, expected two probabilities, first and last.")
        if not self.train or not set(self.train) <= PARTS.keys():
            raise OptionError(f"train: got {self.train}, expected some of {', '.join(PARTS)}.")

    @contextlib.contextmanager
    def objective(self, model: nn.Module, teacher: Any = None) -> Iterator[LayerErrors]:
        """The loss on a converted ``model``; a ``teacher`` is not needed, and not looked at.

        Raises:
            ConversionError: ``model`` has no converted causal layer with a far branch.
            OptionError: ``length`` fits in the window.
            UnsupportedError: a layer's feature map has no far mass of its own.
        """
        layers = trainable_layers(model)
        nearest = max(module.window + module.sinks for module in layers.values())
        if self.length <= nearest:
            raise OptionError(
                f"length: windows of {self.length} tokens fit in window + sinks = {nearest}, where the far branch has "
                "no part; use longer ones."
            )
        # The output embedding has no part in it.
        yield LayerErrors(layers, self, getattr(model, "base_model", model))


class LayerErrors(Objective):
    """The loss of :class:`Transfer`.

    Attributes:
        errors: the last batch's relative error of each layer's output, by module path.
    """

    def __init__(self, layers: dict[str, ConvertedAttention], stage: Transfer, run: Callable[..., Any]) -> None:
        self.layers, self.stage, self.run = layers, stage, run
        self.split = stage.far_weight > 0 or stage.mass_weight > 0
        for path, module in layers.items():
            phi = module.feature_map
            if self.split and module.window + module.sinks and (phi.positional or not phi.positive):
                kind = "positional" if phi.positional else "not positive"
                raise UnsupportedError(
                    f"{path}: {type(phi).__name__} is {kind}, and its far branch has no output and mass of its own to "
                    "compare; set far_weight and mass_weight to 0."
                )
        tensors = {
            f"{path}.linattn.{name}": (name, t)
            for path, module in layers.items()
            for name, t in module.state_dict(keep_vars=True).items()
        }
        begins = tuple(start for part in stage.train for start in PARTS[part])
        self.parameters = {
            key: t for key, (name, t) in tensors.items() if isinstance(t, nn.Parameter) and name.startswith(begins)
        }
        self.held = {key: t for key, (_, t) in tensors.items() if key not in self.parameters}
        self.errors: dict[str, float] = {}
        if not self.parameters:
            raise OptionError(f"train: these layers have no parameters of {stage.train}.")

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Settle far biases, decays and maps that can be fitted; see :func:`linattn.distill.calibrate`."""

        def answer(path: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            split = exact(module, q, k, v, options)
            prepare(module, split, q, k, v, options)
            return split.out.to(v.dtype)

        self._forward(batch, answer)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, float]:
        first, last = self.stage.window_dropout
        rate = 0.0 if batch.held_out else first + (last - first) * batch.step / max(1, self.stage.steps - 1)
        draw = torch.Generator().manual_seed(derived_seed(self.stage.seed, "window dropout", batch.step))
        dropped = {path for path in self.layers if torch.rand((), generator=draw).item() < rate}
        terms: dict[str, dict[str, Tensor]] = {}

        def answer(path: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            edges = {"window": 0, "sinks": 0} if path in dropped else {}
            split = exact(module, q, k, v, options, **edges)
            with torch.enable_grad():
                if path in dropped:
                    loss = relative_error(_far_alone(module, q, k, v, options), split.out)
                    found = {"without_window": loss}
                elif self.split and module.window + module.sinks:
                    if module.moves_sinks(q.shape[1]):
                        raise OptionError(
                            f"sink_distance={module.sink_distance}: far_weight and mass_weight take window and sinks "
                            f"from softmax attention, whose sinks keep their distance in {q.shape[1]} tokens; train "
                            "shorter sequences, or set both to 0."
                        )
                    near = split
                    if module.native_window is not None and module.sinks:  # which sees sinks that softmax did not
                        near = exact(module, q, k, v, options, native_window=None)
                    q_far, k_far = module.far_inputs(q, k, options.get("rotation"))
                    found = _errors(split, far_branch(module, q_far, k_far, v, near))
                    loss = found["hybrid"] + self.stage.far_weight * found["far"]
                    loss = loss + self.stage.mass_weight * found["mass"]
                else:
                    loss = relative_error(ConvertedAttention.forward(module, q, k, v, **options), split.out)
                    found = {"hybrid": loss}
            loss.backward()  # at once, to free the layer's activations
            terms[path] = {"loss": loss.detach()} | {name: error.detach() for name, error in found.items()}
            return split.out.to(v.dtype)

        self._forward(batch, answer)
        flat = [(path, name) for path, found in terms.items() for name in found]
        values = torch.stack([terms[path][name] for path, name in flat]).tolist()  # one wait for the device
        self.errors = {path: value for (path, name), value in zip(flat, values, strict=True) if name == "hybrid"}
        by_name: dict[str, list[float]] = {}
        for (_, name), value in zip(flat, values, strict=True):
            by_name.setdefault(name, []).append(value)
        return {name: sum(found) / len(found) for name, found in by_name.items()}

    def _forward(self, batch: Batch, answer: Callable[..., Tensor]) -> None:
        with answered(self.layers, answer):
            self.run(batch.tokens.to(next(iter(self.parameters.values())).device), use_cache=False)


def _far_alone(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The far branch over all tokens, without window and sinks."""
    window, sinks = module.window, module.sinks
    module.window = module.sinks = 0
    try:
        return ConvertedAttention.forward(module, q, k, v, **options)
    finally:
        module.window, module.sinks = window, sinks


def _errors(split: SplitAttention, student: FarBranch) -> dict[str, Tensor]:
    """Errors of the hybrid output, the far output and the log far mass, over queries to which something is far."""
    rows = slice(split.out.shape[1] - student.far.shape[1], None)
    log_far = split.log_far[:, rows]
    held = log_far.isfinite()  # a sliding window of the layer's own may leave softmax nothing far
    far = torch.where(held[..., None], student.far, 0.0)
    mass = torch.where(held, student.log_mass - log_far, 0.0).square().sum() / held.sum().clamp_min(1)
    return {
        "hybrid": relative_error(student.out, split.out),
        "far": relative_error(far, split.far[:, rows]),
        "mass": mass,
    }


class FarBranch(NamedTuple):
    """A converted layer's answer, and its far branch for the queries t ≥ window + sinks, T' of them.

    Attributes:
        out: ``[B, T, H, V]`` of both branches.
        far: ``[B, T', H, V]`` of the far branch, normalised by itself.
        log_mass: ``[B, T', H]`` log of its mass, on the scale of :class:`SplitAttention`.
    """

    out: Tensor
    far: Tensor
    log_mass: Tensor


def far_branch(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, split: SplitAttention) -> FarBranch:
    """Both branches of a layer apart, in one call of the operator, with gradients to the layer's parameters.

    What is near needs no parameters: it is the teacher's (``split``). What is far from query t are the keys
    sinks ≤ i ≤ t − window, so with keys from ``sinks`` on and queries from ``window + sinks`` on the far branch is
    causal attention without a window. One more token, a sink whose value is 0 and whose logit for each query is the log
    of the near mass, makes its normaliser that of both branches; a column of ones in the values gives the far share s:

        s = F / (F + N),  far = (Σ_far w v / (F + N)) / s,  log F = log N + log s − log(1 − s)

    Decay runs over the window too: exp(Σ log-gates of the last ``window`` tokens) divides the near mass instead.

    Args:
        module: a converted layer whose map is positive and not positional.
        q, k: what its feature map sees (:meth:`ConvertedAttention.far_inputs`). v: as it is called with. Computed in
            float32 at least.
        split: softmax attention split at the layer's window and sinks, with no other limit: what is near to it.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    length, window, sinks = q.shape[1], module.window, module.sinks
    rows, keys = slice(window + sinks, None), slice(sinks, length - window)
    log_near, gates = split.log_near[:, rows], module.log_gates(k)
    logit = log_near
    if gates is not None:
        each = gates if gates.ndim == 3 else gates.expand(k.shape[0], length, -1)
        clock = F.pad(each.cumsum(1), [0, 0, 1, 0])
        over_window = clock[:, window + sinks + 1 :] - clock[:, sinks + 1 : length - window + 1]
        logit = log_near - over_window.repeat_interleave(q.shape[2] // k.shape[2], 2)
        gates = gates if gates.ndim == 1 else _after_one(gates[:, keys])
    ones = torch.ones_like(v[:, keys, :, :1])
    is_sink = torch.zeros(*k[:, keys].shape[:3], 1, dtype=wide, device=k.device)
    result = kernel_attention(
        _after_one(logit[..., None]),
        F.pad(is_sink, [0, 0, 0, 0, 1, 0], value=1.0),
        _after_one(torch.cat([v[:, keys], ones], -1)),
        feature_map=module.feature_map,
        sinks=1,
        decay=gates,
        far_bias=module.far_bias,
        scale=1.0,
        q_far=_after_one(q[:, rows]),
        k_far=_after_one(k[:, keys]),
    ).out[:, 1:]
    weighted, share = result[..., :-1], result[..., -1]
    smallest = torch.finfo(wide).tiny
    share, rest = share.clamp_min(smallest), (1 - share).clamp_min(torch.finfo(wide).eps)
    return FarBranch(
        torch.cat([split.near[:, : window + sinks], weighted + rest[..., None] * split.near[:, rows]], 1),
        weighted / share[..., None],
        log_near + share.log() - rest.log(),
    )


def _after_one(x: Tensor) -> Tensor:
    """``[B, T, …]`` after one token of zeros."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [1, 0])
