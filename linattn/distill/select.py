"""Which layers stay softmax: those whose conversion costs most, measured by KL and not guessed from their position."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linattn._heads import body_and_head, tokens_at_once
from linattn._modes import evaluating
from linattn.convert import ConversionPlan, ConvertedAttention, convert_model, revert_model
from linattn.convert.hf import softmax_attention
from linattn.distill.layers import answered, exact, indices, trainable_layers
from linattn.distill.logits import forward_kl
from linattn.errors import OptionError, ShapeError

METHODS = ("alone", "greedy", "uniform")

Progress = Callable[[int, int], None]


class LayerCost(NamedTuple):
    """KL from the teacher in nats per token of a model in which some layers are converted and all others exact.

    Attributes:
        layer: index in the plan. path: of the attention module.
        kept: how many layers the method had chosen before this measurement.
        kl: mean over the windows. With ``"alone"``, of the model in which this layer alone is converted; with
            ``"greedy"``, in which all are but this one and those chosen before.
        standard_error: of ``kl``, from how the windows differ; NaN of one window.
    """

    layer: int
    path: str
    kept: int
    kl: float
    standard_error: float


class KeptCost(NamedTuple):
    """KL from the teacher in nats per token of the model that leaves some layers exact and converts all others.

    Attributes:
        kept: their indices in the plan.
        kl: mean over the windows. standard_error: of it, from how the windows differ; NaN of one window.
    """

    kept: tuple[int, ...]
    kl: float
    standard_error: float


class Selection(NamedTuple):
    """What :func:`select_layers` chose.

    Attributes:
        kept: indices of the layers to leave softmax, in the order of the choice; uniform ones from first to last.
        plan: the model's plan with those kept. :func:`keep_softmax` applies it to the model as it is.
        costs: the measurements, in order; none of ``"uniform"``.
        chosen: what the model costs with those kept. uniform: with as many kept that are evenly spaced.
    """

    kept: tuple[int, ...]
    plan: ConversionPlan
    costs: tuple[LayerCost, ...]
    chosen: KeptCost
    uniform: KeptCost


@torch.no_grad()
def select_layers(
    model: nn.Module,
    tokens: Tensor,
    *,
    keep: int,
    method: str = "alone",
    softmax_window: int | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose the layers of a converted model to leave softmax, by the forward KL that each one's conversion costs.

    The teacher is the model itself with exact attention in every converted layer, as long as nothing but the parameters
    under ``<attention>.linattn`` was trained. Run it after :class:`~linattn.distill.Transfer`: what an untrained layer
    costs says little about a trained one. (Hybrids by measured layer importance: arXiv:2510.05901; kept layers are the
    largest single lever of a conversion.)

    Args:
        model: converted and causal.
        tokens: ``[N, T]`` int64, a few windows of text, T well beyond window + sinks.
        keep: how many of the converted layers to leave softmax; fewer than there are.
        method: ``"alone"`` converts one layer at a time and keeps those that cost most, in as many passes as there are
            layers. ``"greedy"`` starts with all layers converted and keeps, one after the other, the layer whose
            exact attention leaves the lowest KL: ``keep`` times as many passes, and it sees that two layers can
            make up for each other. ``"uniform"`` spaces them evenly. Two passes more, or one, measure the choice and
            evenly spaced layers.
        softmax_window: of the plan, where it bounds the chosen layers; costs are those of unbounded softmax.
        progress: called with (passes done, passes in all).

    Raises:
        ConversionError: the model has no converted causal layer with a far branch.
        OptionError: ``keep`` is not among 0 … layers − 1, ``method`` is unknown, or a window has nothing far.
        ShapeError: ``tokens`` is no ``[N, T]``.
    """
    layers, index = _layers(model, tokens)
    if method not in METHODS or not 0 <= keep < len(layers):
        raise OptionError(
            f"method={method!r}, keep={keep!r}: expected one of {', '.join(METHODS)}, and 0 ≤ keep < {len(layers)}, "
            "the number of converted layers."
        )
    paths, costs = list(layers), list[LayerCost]()
    evenly = [paths[int((i + 0.5) * len(paths) / keep)] for i in range(keep)]
    rounds = {"alone": min(keep, 1), "greedy": keep, "uniform": 0}[method]
    total = sum(len(paths) - done for done in range(rounds)) + (1 if method == "uniform" else 2)
    kept_costs: list[KeptCost] = []
    chosen = evenly if method == "uniform" else list[str]()
    with _Measure(model, layers, tokens) as measure:

        def told() -> None:
            if progress is not None:
                progress(len(costs) + len(kept_costs), total)

        for done in range(rounds):
            found = []
            for path in paths:
                if path not in chosen:
                    converted = {path} if method == "alone" else {*paths} - {*chosen, path}
                    found.append(LayerCost(index[path], path, done, *measure(converted)))
                    costs.append(found[-1])
                    told()
            found.sort(key=lambda cost: cost.kl, reverse=method == "alone")
            chosen += [cost.path for cost in (found[:keep] if method == "alone" else found[:1])]
        for these in [chosen] if method == "uniform" else [chosen, evenly]:
            kept_costs.append(KeptCost(tuple(index[path] for path in these), *measure({*paths} - {*these})))
            told()
    kept = kept_costs[0].kept
    plan = ConversionPlan.from_dict(model.config.linattn)  # type: ignore[union-attr,arg-type]
    reason = "spaced evenly" if method == "uniform" else f"its conversion costs most, by KL ({method})"
    plan = plan.keep(*kept, reason=reason, softmax_window=softmax_window)
    return Selection(kept, plan, tuple(costs), kept_costs[0], kept_costs[-1])


@torch.no_grad()
def head_costs(model: nn.Module, tokens: Tensor, *, progress: Progress | None = None) -> dict[str, list[float]]:
    """KL from the teacher, in nats per token, with one head converted and everything else exact: by path and head.

    Takes as many passes as the model has query heads in all; see :func:`select_layers`. No plan leaves single heads
    softmax: the numbers say whether a layer's cost is that of few heads.
    """
    layers, _ = _layers(model, tokens)
    heads = {path: module.feature_map.num_heads for path, module in layers.items()}
    found: dict[str, list[float]] = {path: [] for path in layers}
    with _Measure(model, layers, tokens) as measure:
        for path, count in heads.items():
            for head in range(count):
                found[path].append(measure({path}, head=head)[0])
                if progress is not None:
                    progress(sum(map(len, found.values())), sum(heads.values()))
    return found


def keep_softmax(
    model: Any, *indices: int, reason: str = "asked for", softmax_window: int | Sequence[int] | None = None
) -> Any:
    """Turn converted layers of a model back to softmax, in place; the others keep what they learned.

    Args:
        model: a converted model.
        indices: of its plan's layers. reason: what the plan says of them.
        softmax_window: bounds them to so many tokens and the sinks; see :func:`linattn.plan_model`.

    Returns:
        ``model``.
    """
    plan = ConversionPlan.from_dict(model.config.linattn).keep(*indices, reason=reason, softmax_window=softmax_window)
    plan.check()
    held = {name: t.clone() for name, t in model.state_dict().items() if ".linattn." in name}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    convert_model(revert_model(model), plan=plan)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name in held:
                t.copy_(held[name])
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name])
    return model


def _layers(model: nn.Module, tokens: Tensor) -> tuple[dict[str, ConvertedAttention], dict[str, int]]:
    """The converted layers and their indices in the plan, by path, in the plan's order."""
    if tokens.ndim != 2 or not len(tokens) or tokens.is_floating_point():
        raise ShapeError(f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, expected [N, T] token ids with N ≥ 1.")
    layers = trainable_layers(model)
    nearest = max(module.reach for module in layers.values())
    if tokens.shape[1] <= nearest:
        raise OptionError(f"tokens: windows of {tokens.shape[1]} tokens fit in window + retained + sinks = {nearest}.")
    return layers, indices(model, layers)


class _Measure(contextlib.ExitStack):
    """KL from the teacher, with its standard error, of the model with some layers converted and all others exact."""

    def __init__(self, model: nn.Module, layers: dict[str, ConvertedAttention], tokens: Tensor) -> None:
        super().__init__()
        self.converted: Collection[str] = ()
        self.head: int | None = None
        self.tokens = tokens.to(next(model.parameters()).device)
        self.enter_context(evaluating(model))
        self.enter_context(answered(layers, self._answer))
        self.body, self.to_logits = body_and_head(model, self.tokens[:1, :16])
        self.teacher = [self.body(window[None])[0] for window in self.tokens]

    def __call__(self, converted: Collection[str], head: int | None = None) -> tuple[float, float]:
        self.converted, self.head = converted, head
        means = torch.stack([self._kl(*each) for each in zip(self.tokens, self.teacher, strict=True)]).double()
        error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return means.mean().item(), error

    def _kl(self, window: Tensor, teacher: Tensor) -> Tensor:
        hidden = self.body(window[None])[0]
        width = tokens_at_once(self.to_logits, hidden, copies=2)
        parts = zip(hidden.split(width), teacher.split(width), strict=True)
        return sum(forward_kl(self.to_logits(a), self.to_logits(b)).sum() for a, b in parts) / len(window)  # type: ignore[return-value]

    def _answer(self, path: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if path in self.converted and self.head is None:
            return ConvertedAttention.forward(module, q, k, v, **options)
        out = _softmax(module, q, k, v, options)
        if path in self.converted:
            out[:, :, self.head] = ConvertedAttention.forward(module, q, k, v, **options)[:, :, self.head]
        return out


def _softmax(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The layer's softmax attention: at once where torch has a kernel for it, else in pieces."""
    if module.native_window is not None or options["softcap"] is not None or options["sink_logits"] is not None:
        return exact(module, q, k, v, options).out.to(v.dtype)
    return softmax_attention(q, k, v, module.feature_map.scale)
