"""Transfer: every converted layer learns from its own softmax attention, all layers at once, one forward a step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

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

    The hybrid output is the layer's own, as it answers when it is used. A term of no weight is not computed, and not
    among the metrics ``hybrid``, ``far``, ``mass``, means over the layers. A layer without window and sinks has nothing
    but a far branch, and its loss is the first term; ``without_window`` is that of the layers whose window is dropped.

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
        self.weights = {"far": stage.far_weight, "mass": stage.mass_weight}
        self.split = any(self.weights.values())
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
            apart = self.split and path not in dropped and module.window + module.sinks > 0
            split = exact(module, q, k, v, options, **({} if apart else {"window": 0, "sinks": 0}))
            with torch.enable_grad():
                if path in dropped:
                    found = {"without_window": relative_error(_far_alone(module, q, k, v, options), split.out)}
                else:
                    out = ConvertedAttention.forward(module, q, k, v, **options)
                    found = {"hybrid": relative_error(out, split.out)}
                if apart:
                    q_far, k_far = module.far_inputs(q, k, options.get("rotation"))
                    found |= self._far_errors(module, q_far, k_far, v, split)
                loss = torch.stack([self.weights.get(name, 1.0) * error for name, error in found.items()]).sum()
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

    def _far_errors(
        self, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, split: SplitAttention
    ) -> dict[str, Tensor]:
        """Errors of the far output and of the log far mass, those that have a weight, of queries with something far."""
        rows, _ = _far_tokens(module, q)
        log_far, found = split.log_far[:, rows], {}
        held = log_far.isfinite()  # a sliding window of the layer's own may leave softmax nothing far
        if self.weights["far"]:
            far = torch.where(held[..., None], far_output(module, q, k, v), 0.0)
            found["far"] = relative_error(far, split.far[:, rows])
        if self.weights["mass"]:
            target = torch.where(held, log_far, 0.0)
            error = torch.where(held, far_log_mass(module, q, k, target) - target, 0.0)
            found["mass"] = error.square().sum() / held.sum().clamp_min(1)
        return found

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


def far_output(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output of the far branch normalised by itself, of the queries t ≥ window + sinks: ``[B, T', H, V]``.

    What is far from query t are the keys sinks ≤ i ≤ t − window, so with queries from ``window + sinks`` on and keys
    from ``sinks`` to T − ``window`` it is causal attention without a window, in the dtype of ``v``. Decay over the
    window is a factor of each query and head, and so is the far bias: both cancel.

    Args:
        module: a converted layer whose map is positive and not positional.
        q, k: what its feature map sees (:meth:`ConvertedAttention.far_inputs`). v: as it is called with.
    """
    rows, keys = _far_tokens(module, q)
    gates = module.log_gates(k)
    return kernel_attention(
        q[:, rows],
        k[:, keys],
        v[:, keys],
        feature_map=module.feature_map,
        decay=gates if gates is None or gates.ndim == 1 else gates[:, keys],
    ).out


def far_log_mass(module: ConvertedAttention, q: Tensor, k: Tensor, guess: Tensor) -> Tensor:
    """Log mass of the far branch at the queries t ≥ window + sinks: ``[B, T', H]``, in float32 at least.

    The queries and keys of :func:`far_output` after one more token, a sink whose logit for each query is ``guess``.
    Values that say which is which give both shares of the common normaliser:

        log F = guess + log far share − log sink share

    Decay runs over the window too: exp(Σ log-gates of the last ``window`` tokens) divides the sink's mass instead.
    The shares are computed in the dtype of ``q``, float16 excepted, whose range they leave; so that its precision is
    theirs, the logit is the sum of two numbers, itself and the rest of its rounding.

    Args:
        module, q, k: as in :func:`far_output`.
        guess: ``[B, T', H]`` finite, within some 80 nats of the log mass.
    """
    rows, keys = _far_tokens(module, q)
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    guess = guess.to(torch.promote_types(dtype, torch.float32))
    q, k = q.to(dtype), k.to(dtype)
    logit, gates = guess, module.log_gates(k)
    if gates is not None:
        clock = F.pad(gates.expand(*k.shape[:3]).cumsum(1), [0, 0, 1, 0])
        over_window = clock[:, rows.start + 1 :] - clock[:, keys.start + 1 : keys.stop + 1]
        logit = guess - over_window.repeat_interleave(q.shape[2] // k.shape[2], 2)
        gates = gates if gates.ndim == 1 else _after_one(gates[:, keys])
    rounded = logit.to(dtype)
    sink = F.pad(torch.zeros_like(k[:, keys, :, 0]), [0, 0, 1, 0], value=1.0)
    shares = kernel_attention(
        _after_one(torch.stack([rounded, (logit - rounded).to(dtype)], -1)),
        torch.stack([sink, sink], -1),
        torch.stack([1 - sink, sink], -1),
        feature_map=module.feature_map,
        sinks=1,
        decay=gates,
        far_bias=module.far_bias,
        scale=1.0,
        q_far=_after_one(q[:, rows]),
        k_far=_after_one(k[:, keys]),
    ).out[:, 1:]
    far, other = shares.to(guess.dtype).clamp_min(torch.finfo(dtype).tiny).log().unbind(-1)
    return guess + far - other


def _far_tokens(module: ConvertedAttention, q: Tensor) -> tuple[slice, slice]:
    """The queries to which something is far, and the keys that are far from some query."""
    length = q.shape[1]
    return slice(module.window + module.sinks, length), slice(module.sinks, length - module.window)


def _after_one(x: Tensor) -> Tensor:
    """``[B, T, …]`` after one token of zeros."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [1, 0])
