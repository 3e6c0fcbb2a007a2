"""Transfer: every converted layer learns from its own softmax attention, all layers at once, one forward a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.convert import ConvertedAttention
from linattn.distill.engine import Batch, Objective, Stage, derived_seed
from linattn.distill.layers import WHOLE, answered, exact, expiry, indices, prepare, relative_error, trainable_layers
from linattn.distill.scores import LookupRegression, ScoreRegression, attended, explained
from linattn.distill.targets import SplitAttention
from linattn.errors import OptionError, UnsupportedError
from linattn.kernels import kernel_attention
from linattn.kernels.protocols import GivenFeatures, KernelFeatureMap

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

    Layers with retained tokens learn what to retain besides, see
    :class:`~linattn.distill.scores.ScoreRegression`: ``score_r2`` is the part of the variance of the log attention
    that tokens get which their scores tell, before they learn from the batch. With ``lookup_bonus`` they learn, too,
    which tokens a later query will look up (:class:`~linattn.distill.scores.LookupRegression`), best on windows that
    say passages again (``repeats``): ``lookup_auc`` is how likely they rank one that is above one that is not. A layer
    that retains tokens and has no far branch learns this alone.

    Attributes:
        far_weight: of the error of the far branch's own output. With it at 0, and ``mass_weight`` too, a good window
            leaves the far branch little to do.
        mass_weight: of the error of its log mass, in nats².
        window_dropout: probability at the first and the last step that a layer is trained without window and sinks,
            its far branch reading all tokens; linear between them.
        train: which of ``"maps"``, ``"decay"``, ``"far_bias"`` train.
        score_rate: learning rate of the scores at its highest; it rises and falls with the other.
        score_steps: their steps on each batch.
        lookup_bonus: what tokens that will be looked up gain in score: they outlast others by bonus / recency tokens.
            0 teaches nothing about them, and leaves what was taught.
        lookup_after: tokens from a token to the first query that counts as looking it up.
        lookup_share: of a query's attention, beyond which it looks a token up.
        lookup_part: of all tokens, how many gain it; with few slots, less.
        lookup_layers: indices of the layers that count as looking up, and that learn it; None: all with retained
            tokens. Few layers retrieve; the bonus costs the others slots.
    """

    far_weight: float = 1.0
    mass_weight: float = 0.1
    window_dropout: tuple[float, float] = (0.0, 0.0)
    train: tuple[str, ...] = ("maps", "decay", "far_bias")
    score_rate: float = 3e-3
    score_steps: int = 5
    lookup_bonus: float = 0.0
    lookup_after: int = 512
    lookup_share: float = 0.3
    lookup_part: float = 0.1
    lookup_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.far_weight < 0 or self.mass_weight < 0:
            raise OptionError(f"far_weight={self.far_weight}, mass_weight={self.mass_weight}: expected numbers ≥ 0.")
        if len(self.window_dropout) != 2 or not all(0 <= p <= 1 for p in self.window_dropout):
            raise OptionError(f"window_dropout: got {self.window_dropout}, expected two probabilities, first and last.")
        if not self.train or not set(self.train) <= PARTS.keys():
            raise OptionError(f"train: got {self.train}, expected some of {', '.join(PARTS)}.")
        if not (0 <= self.score_rate < math.inf and self.score_steps >= 1):
            raise OptionError(
                f"score_rate={self.score_rate}, score_steps={self.score_steps}: expected a number ≥ 0 and an integer "
                "≥ 1."
            )
        if not (0 <= self.lookup_bonus < math.inf and self.lookup_after >= 1):
            raise OptionError(
                f"lookup_bonus={self.lookup_bonus}, lookup_after={self.lookup_after}: expected a number ≥ 0 and an "
                "integer ≥ 1."
            )
        if not (0 < self.lookup_share < 1 and 0 < self.lookup_part < 1):
            raise OptionError(
                f"lookup_share={self.lookup_share}, lookup_part={self.lookup_part}: expected numbers between 0 and 1."
            )

    @contextlib.contextmanager
    def objective(self, model: nn.Module, teacher: Any = None) -> Iterator[LayerErrors]:
        """The loss on a converted ``model``; a ``teacher`` is not needed, and not looked at.

        Raises:
            ConversionError: ``model`` has no converted causal layer with a far branch or retained tokens.
            OptionError: ``length`` fits in what a layer attends exactly.
            UnsupportedError: a layer's feature map has no far mass of its own.
        """
        layers = trainable_layers(model, retained=True)
        nearest = max(module.reach for module in layers.values())
        if self.length <= nearest:
            raise OptionError(
                f"length: windows of {self.length} tokens fit in window + retained + sinks = {nearest}, where the far "
                "branch has no part; use longer ones."
            )
        first = self.lookup_after + max(module.sinks for module in layers.values())
        if self.lookup_bonus and self.length < first + 2:
            raise OptionError(
                f"length: windows of {self.length} tokens have no queries lookup_after + sinks = {first} tokens on to "
                "tell what is looked up; use longer ones, or a smaller lookup_after."
            )
        looking = {path: module for path, module in layers.items() if module.retained and self.lookup_bonus}
        if self.lookup_layers is not None and self.lookup_bonus:
            index = {i: path for path, i in indices(model, layers).items() if path in looking}
            if wrong := sorted(set(self.lookup_layers) - index.keys()):
                raise OptionError(f"lookup_layers: {wrong} retain no tokens; expected some of {sorted(index)}.")
            looking = {index[i]: layers[index[i]] for i in sorted(set(self.lookup_layers))}
        # The output embedding has no part in it.
        yield LayerErrors(layers, self, getattr(model, "base_model", model), looking)


class LayerErrors(Objective):
    """The loss of :class:`Transfer`.

    Args:
        layers: converted modules by path. stage: with the options. run: the model that calls them.
        looking: those of ``layers`` that learn what is looked up.

    Attributes:
        errors: the last batch's relative error of each layer's output, by module path.
    """

    def __init__(
        self,
        layers: dict[str, ConvertedAttention],
        stage: Transfer,
        run: Callable[..., Any],
        looking: dict[str, ConvertedAttention] | None = None,
    ) -> None:
        self.layers, self.stage, self.run = layers, stage, run
        self.weights = {"far": stage.far_weight, "mass": stage.mass_weight}
        self.split = any(self.weights.values())
        for path, module in layers.items():
            phi = module.feature_map
            if self.split and module.far and module.reach and (phi.positional or not phi.positive):
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
        self.scores = ScoreRegression(layers, stage.score_rate, stage.score_steps)
        self.held = {key: t for key, (_, t) in tensors.items() if key not in self.parameters} | self.scores.held
        self.lookups: LookupRegression | None = None
        if looking:
            self.lookups = LookupRegression(
                looking,
                stage.score_rate,
                stage.score_steps,
                bonus=stage.lookup_bonus,
                after=stage.lookup_after,
                share=stage.lookup_share,
                passing=stage.lookup_part,
            )
            self.held |= self.lookups.held
        self.errors: dict[str, float] = {}
        if not self.parameters and not self.scores.layers:
            raise OptionError(f"train: these layers have no parameters of {stage.train}.")

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Settle scores, far biases, decays and maps that can be fitted; see :func:`linattn.distill.calibrate`."""

        def answer(path: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            if path in self.scores.layers:
                whole = exact(module, q, k, v, options, **WHOLE)
                self.scores.prepare(path, *attended(module, q, k, v, options, whole))
                if self.lookups is not None and path in self.lookups.layers:
                    self.lookups.see(path, q, k, v, options, whole)
            if not module.far:
                return whole.out.to(v.dtype)
            ends = expiry(module, k, v, options)
            split = exact(module, q, k, v, options, ends)
            prepare(module, split, q, k, v, options, ends)
            return split.out.to(v.dtype)

        self._forward(batch, answer)
        if self.lookups is not None:
            self.lookups.prepare()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, float]:
        first, last = self.stage.window_dropout
        rate = 0.0 if batch.held_out else first + (last - first) * batch.step / max(1, self.stage.steps - 1)
        draw = torch.Generator().manual_seed(derived_seed(self.stage.seed, "window dropout", batch.step))
        dropped = {path for path, m in self.layers.items() if torch.rand((), generator=draw).item() < rate and m.far}
        part = self.stage.rate(batch.step) / (self.stage.learning_rate or 1.0)
        terms: dict[str, dict[str, Tensor]] = {}

        def answer(path: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            apart = self.split and path not in dropped and module.far and module.reach > 0
            ends = expiry(module, k, v, options) if apart else None
            split = exact(module, q, k, v, options, ends, **({} if apart else WHOLE))
            with torch.set_grad_enabled(module.far):
                if path in dropped:
                    found = {"without_window": relative_error(_far_alone(module, q, k, v, options), split.out)}
                else:
                    out = ConvertedAttention.forward(module, q, k, v, **options)
                    found = {"hybrid": relative_error(out, split.out)}
                if apart:
                    q_far, k_far = module.far_inputs(q, k, options.get("rotation"))
                    found |= self._far_errors(module, q_far, k_far, v, split, ends)
                loss = torch.stack([self.weights.get(name, 1.0) * error for name, error in found.items()]).sum()
            if module.far:
                loss.backward()  # at once, to free the layer's activations
            terms[path] = {"loss": loss.detach()} | {name: error.detach() for name, error in found.items()}
            if path in self.scores.layers:
                keys, values, share = attended(module, q, k, v, options, split)
                assert module.score is not None
                x = module.score.standardised(module.score.inputs(keys, values))
                terms[path]["score_r2"] = explained(module.score.attention(x), share)
                if not batch.held_out:
                    self.scores(path, keys, values, share, part)
                if self.lookups is not None and path in self.lookups.layers:
                    self.lookups.see(path, q, k, v, options, split)
            return split.out.to(v.dtype)

        self._forward(batch, answer)
        if self.lookups is not None:
            for path, found in self.lookups(part, learn=not batch.held_out).items():
                terms[path]["lookup_auc"] = found
        flat = [(path, name) for path, found in terms.items() for name in found]
        values = torch.stack([terms[path][name] for path, name in flat]).tolist()  # one wait for the device
        self.errors = {path: value for (path, name), value in zip(flat, values, strict=True) if name == "hybrid"}
        by_name: dict[str, list[float]] = {}
        for (_, name), value in zip(flat, values, strict=True):
            by_name.setdefault(name, []).append(value)
        return {name: sum(found) / len(found) for name, found in by_name.items()}

    def _far_errors(
        self, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, split: SplitAttention, ends: Tensor | None
    ) -> dict[str, Tensor]:
        """Errors of the far output and of the log far mass, those that have a weight, of queries with something far."""
        rows = slice(module.reach, None)
        log_far, found = split.log_far[:, rows], {}
        held = log_far.isfinite()  # a sliding window of the layer's own may leave softmax nothing far
        if self.weights["far"]:
            far = torch.where(held[..., None], far_output(module, q, k, v, ends), 0.0)
            found["far"] = relative_error(far, split.far[:, rows])
        if self.weights["mass"]:
            target = torch.where(held, log_far, 0.0)
            error = torch.where(held, far_log_mass(module, q, k, target, ends) - target, 0.0)
            found["mass"] = error.square().sum() / held.sum().clamp_min(1)
        return found

    def _forward(self, batch: Batch, answer: Callable[..., Tensor]) -> None:
        with answered(self.layers, answer):
            device = next(next(iter(self.layers.values())).parameters()).device
            self.run(batch.tokens.to(device), use_cache=False)


def _far_alone(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The far branch over all tokens, without window, sinks and retained tokens."""
    window, sinks, retained = module.window, module.sinks, module.retained
    module.window = module.sinks = module.retained = 0
    try:
        return ConvertedAttention.forward(module, q, k, v, **options)
    finally:
        module.window, module.sinks, module.retained = window, sinks, retained


def far_output(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None = None) -> Tensor:
    """Output of the far branch normalised by itself, of the queries t ≥ R that have something far: ``[B, T', H, V]``.

    Decay between a query and its slot is a factor of each query and head, and so is the far bias: both cancel.

    Args:
        module: a converted layer whose map is positive and not positional.
        q, k: what its feature map sees (:meth:`ConvertedAttention.far_inputs`). v: as it is called with.
        ends: the expiry of its tokens (:func:`linattn.distill.layers.expiry`) if it retains some.
    """
    far = far_branch(module, q, k, ends)
    out = kernel_attention(far.q, far.k, far.take(v).to(far.k.dtype), feature_map=far.feature_map, decay=far.decay).out
    return out.to(v.dtype)


def far_log_mass(module: ConvertedAttention, q: Tensor, k: Tensor, guess: Tensor, ends: Tensor | None = None) -> Tensor:
    """Log mass of the far branch at the queries t ≥ R: ``[B, T', H]``, in float32 at least.

    The queries and keys of :func:`far_output` after one more token, a sink whose logit for each query is ``guess``.
    Values that say which is which give both shares of the common normaliser:

        log F = guess + log far share − log sink share

    What all far weights of a query have in common beyond those of the slots divides the sink's mass instead. The shares
    are computed in the dtype of ``q``, float16 excepted, whose range they leave; so that its precision is theirs, the
    logit is the sum of two numbers, itself and the rest of its rounding.

    Args:
        module, q, k, ends: as in :func:`far_output`.
        guess: ``[B, T', H]`` finite, within some 80 nats of the log mass.
    """
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    far = far_branch(module, q.to(dtype), k.to(dtype), ends)
    dtype = far.k.dtype
    guess = guess.to(torch.promote_types(dtype, torch.float32))
    logit = guess if far.log_factor is None else guess - far.log_factor
    rounded = logit.to(dtype)
    sink = F.pad(torch.zeros_like(far.k[..., 0]), [0, 0, 1, 0], value=1.0)
    gates = far.decay
    shares = kernel_attention(
        _after_one(torch.stack([rounded, (logit - rounded).to(dtype)], -1)),
        torch.stack([sink, sink], -1),
        torch.stack([1 - sink, sink], -1),
        feature_map=far.feature_map,
        sinks=1,
        decay=gates if gates is None or gates.ndim == 1 else _after_one(gates),
        far_bias=module.far_bias,
        scale=1.0,
        q_far=_after_one(far.q),
        k_far=_after_one(far.k),
    ).out[:, 1:]
    share, other = shares.to(guess.dtype).clamp_min(torch.finfo(dtype).tiny).log().unbind(-1)
    return guess + share - other


class FarBranch(NamedTuple):
    """A far branch as causal attention without a window: far from the query of a slot are the keys up to that slot.

    Attributes:
        q: ``[B, T', H, D']``, k: ``[B, T', Hkv, D']`` what ``feature_map`` sees. take: picks the slots of what is laid
            out as keys are.
        decay: from slot to slot, as the operator takes it.
        log_factor: ``[B, T', H]`` what the log far weights of each query are beyond those of the slots; None for 0.
    """

    q: Tensor
    k: Tensor
    take: Callable[[Tensor], Tensor]
    feature_map: KernelFeatureMap
    decay: Tensor | None
    log_factor: Tensor | None


def far_branch(module: ConvertedAttention, q: Tensor, k: Tensor, ends: Tensor | None) -> FarBranch:
    """The queries t ≥ R = window + retained + sinks, and the keys that are far from some of them, in slots.

    Without retained tokens these are the keys sinks ≤ i ≤ T − window, and decay over the window is a factor of each
    query. With them one key expires with every query from R on: in order of expiry, each in the slot of the query to
    which it is far first, keys come as features with their decay until then. Arguments as of :func:`far_output`.
    """
    phi, length, groups = module.feature_map, q.shape[1], q.shape[2] // k.shape[2]
    rows, gates, log_factor = slice(module.reach, length), module.log_gates(k), None
    clock = None if gates is None else gates.expand(*k.shape[:3]).cumsum(1)
    if ends is None:
        keys = slice(module.sinks, length - module.window)
        if gates is not None and clock is not None:
            log_factor = (clock[:, rows] - clock[:, keys]).repeat_interleave(groups, 2)
            gates = gates if gates.ndim == 1 else gates[:, keys]
        return FarBranch(q[:, rows], k[:, keys], lambda x: x[:, keys], phi, gates, log_factor)

    order = ends.argsort(-1)[..., : length - module.reach].transpose(1, 2)  # [B, T', Hkv]

    def take(x: Tensor) -> Tensor:
        return x.gather(1, order[..., None].expand(-1, -1, -1, x.shape[-1]))

    queries, log_factor = phi.forward_queries(q[:, rows])
    features, log_scale = phi.forward_keys(take(k))
    wide = torch.promote_types(features.dtype, torch.float32)
    if gates is not None and clock is not None:
        waited = clock[:, rows] - clock.gather(1, order)
        if log_scale is None:
            features = (features.to(wide) * waited.exp()[..., None]).to(features.dtype)
        else:
            log_scale = log_scale + waited
        gates = gates if gates.ndim == 1 else gates[:, rows]
    queries, features, given = GivenFeatures.beside(queries, features, log_scale, wide)
    return FarBranch(queries, features, take, given, gates, log_factor)


def _after_one(x: Tensor) -> Tensor:
    """``[B, T, …]`` after one token of zeros."""
    return F.pad(x, [0, 0] * (x.ndim - 2) + [1, 0])
