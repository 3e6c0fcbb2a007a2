"""Calibration: every converted layer learns from its own softmax attention, all layers at once, one forward a step."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linattn._modes import evaluating
from linattn.convert import ConvertedAttention
from linattn.errors import ConversionError, DtypeError, NonFiniteError, OptionError, ShapeError
from linattn.kernels import kernel_attention


class Calibration(NamedTuple):
    """What a calibration did.

    Attributes:
        losses: mean relative error of the layers at each step: |student − teacher|² / |teacher|².
        layers: the last step's error of each converted layer, by module path.
        skipped: steps left out because a gradient was not finite.
    """

    losses: list[float]
    layers: dict[str, float]
    skipped: int


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    learning_rate: float = 1e-2,
    progress: Callable[[int, float], None] | None = None,
) -> Calibration:
    """Fit the feature maps, far biases and decays of a converted model to the softmax attention they replaced.

    Each layer sees the teacher's inputs: what it returns to the rest of the model is exact attention, computed by the
    same operator with a window over everything, so the layers train in parallel and no teacher model is kept. Nothing
    but the parameters and buffers under ``<attention>.linattn`` changes; decoding states made before do not fit after.
    Parameters are float32 while they train, whatever the model is: half precision swallows small updates.

    The first batch prepares every layer. Every head's far bias is set in closed form, so that the far branch starts
    with the mass that softmax gives it: to the mean, over the queries of the first sequence, of log(softmax's far
    mass) − log(the map's far mass). Queries to which the map gives no mass, or where it is not positive a negative one,
    have no part in that mean. A feature map that can adapt to data (``fit(q, k)`` of ``favor++``, ``favor#`` and
    ``nystrom``) is fitted to the queries and keys that the far branch sees, and stays so where that lowers the layer's
    error: what is optimal for the kernel need not be for attention. Adam with a cosine schedule does the rest.

    Args:
        model: a converted causal model.
        batches: one ``[B, T]`` int64 batch of token ids a step, without padding; T should exceed window + sinks
            several times. Each is read in one piece; the first one's T² numbers per head must fit in memory.
        learning_rate: of Adam, at the start. 0 only prepares.
        progress: called after each step with (steps done, loss).

    Raises:
        ConversionError: the model has no converted layer, or bidirectional ones, or is in ``window_only``.
        OptionError: ``batches`` is empty, or its sequences fit in the window, where there is nothing to learn;
            ``learning_rate`` is negative or not finite.
        ShapeError, DtypeError: a batch is no ``[B, T]`` tensor of token ids.
        NonFiniteError: no step gave finite gradients.
    """
    layers = _layers(model)
    steps = _checked(batches, nearest=max(module.window + module.sinks for module in layers.values()))
    if not 0 <= learning_rate < math.inf:
        raise OptionError(f"learning_rate: got {learning_rate!r}, expected a number ≥ 0.")
    trained = [p for module in layers.values() for p in module.parameters()]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    losses: list[float] = []
    errors: dict[str, float] = {}
    skipped = 0

    def prepare(name: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        target = _softmax(module, q, k, v, options)
        _prepare(module, target, q, k, v, options)
        return target

    def learn(name: str, module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        target = _softmax(module, q, k, v, options)
        with torch.enable_grad():
            loss = _error(ConvertedAttention.forward(module, q, k, v, **options), target)
        loss.backward()  # at once, to free the layer's activations
        errors[name] = loss.item()
        return target

    with torch.no_grad(), evaluating(model), _trainable(trained):
        with _answered(layers, prepare):
            model(steps[0].to(trained[0].device), use_cache=False)
        for done, batch in enumerate(steps):
            optimizer.zero_grad()
            with _answered(layers, learn):
                model(batch.to(trained[0].device), use_cache=False)
            losses.append(sum(errors.values()) / len(errors))
            if math.isfinite(nn.utils.clip_grad_norm_(trained, 1.0)):
                optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * done / len(steps))) / 2
                optimizer.step()
            else:
                skipped += 1
            if progress is not None:
                progress(done + 1, losses[-1])
    if skipped == len(steps):
        raise NonFiniteError(f"batches: none of {skipped} steps gave finite gradients; lower learning_rate.")
    return Calibration(losses, errors, skipped)


def _layers(model: nn.Module) -> dict[str, ConvertedAttention]:
    """The converted attention modules by the path of the module they serve."""
    layers = {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, ConvertedAttention)
    }
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no converted layer; call convert_model first.")
    if any(not module.causal for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has bidirectional converted layers; calibration is causal.")
    if any(not module.far for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has no far branch to calibrate; leave window_only first.")
    return layers


def _checked(batches: Iterable[Tensor], *, nearest: int) -> list[Tensor]:
    steps = list(batches)
    if not steps:
        raise OptionError("batches: got none, expected at least one [B, T] batch of token ids.")
    for batch in steps:
        if not isinstance(batch, Tensor) or batch.is_floating_point():
            got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise DtypeError(f"batches: got {got}, expected int64 tensors of token ids.")
        if batch.ndim != 2 or not batch.shape[0]:
            raise ShapeError(f"batches: got shape {tuple(batch.shape)}, expected [B, T] with B ≥ 1.")
        if batch.shape[1] <= nearest:
            raise OptionError(
                f"batches: sequences of {batch.shape[1]} tokens fit in window + sinks = {nearest}, where the far "
                "branch has no part; use longer ones."
            )
    return steps


@contextlib.contextmanager
def _trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``parameters``, in float32 or wider; afterwards none, and dtypes and flags as before."""
    before = [(p, p.requires_grad, p.dtype) for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        yield
    finally:
        for p, required, dtype in before:
            p.grad = None
            p.data = p.data.to(dtype)
            p.requires_grad_(required)


@contextlib.contextmanager
def _answered(layers: dict[str, ConvertedAttention], answer: Callable[..., Tensor]) -> Iterator[None]:
    """Call ``answer(name, module, …)`` in place of each layer's ``forward(…)``."""
    before = [module.__dict__.get("forward") for module in layers.values()]
    try:
        for name, module in layers.items():
            module.__dict__["forward"] = functools.partial(answer, name, module)
        yield
    finally:
        for module, forward in zip(layers.values(), before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _softmax(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The softmax attention the layer stands for: the same operator with all that softmax saw in the window."""
    return kernel_attention(
        q,
        k,
        v,
        feature_map=None,
        far=False,
        window=q.shape[1] if module.native_window is None else module.native_window,
        scale=module.feature_map.scale,
        softcap=options["softcap"],
        sink_logits=options["sink_logits"],
    ).out


def _error(out: Tensor, target: Tensor) -> Tensor:
    """|out − target|² / |target|²."""
    return (out.float() - target.float()).square().mean() / target.float().square().mean().clamp_min(1e-12)


def _prepare(
    module: ConvertedAttention, target: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> None:
    """Set the far bias, and fit the feature map where it can be fitted and the layer's error falls by it."""

    def error() -> float:
        return _error(ConvertedAttention.forward(module, q, k, v, **options), target).item()

    module.far_bias.copy_(_matching_bias(module, q[:1], k[:1], options["softcap"]))
    fit = getattr(module.feature_map, "fit", None)
    if fit is None:
        return
    before, unfitted = {name: t.clone() for name, t in module.state_dict().items()}, error()
    fit(q[:, module.window + module.sinks :], k[:, module.sinks : k.shape[1] - module.window])
    module.far_bias.copy_(_matching_bias(module, q[:1], k[:1], options["softcap"]))
    if not error() < unfitted:
        module.load_state_dict(before)


def _matching_bias(module: ConvertedAttention, q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    """``[H]`` mean over queries of log(softmax's far mass) − log(the map's far mass); 0 where no query has both."""
    phi, length, groups = module.feature_map, q.shape[1], q.shape[2] // k.shape[2]
    at = torch.arange(length, device=q.device)
    positions = (at[None],) if phi.positional else ()
    features_q, log_q = phi.forward_queries(q, *positions)
    features_k, log_k = phi.forward_keys(k, *positions)
    log_q = q.new_zeros(q.shape[:3], dtype=torch.float32) if log_q is None else log_q
    log_k = k.new_zeros(k.shape[:3], dtype=torch.float32) if log_k is None else log_k
    gates = module.log_gates(k)
    if gates is not None:
        clock = gates.expand(1, length, -1).cumsum(1)
        log_q, log_k = log_q + clock.repeat_interleave(groups, 2), log_k - clock

    rows = slice(module.window + module.sinks, None)  # the queries that see anything far
    gap = at[rows, None] - at
    far = (gap >= module.window) & (at >= module.sinks)
    within = far if module.native_window is None else far & (gap < module.native_window)
    bias = q.new_zeros(q.shape[2], dtype=torch.float32)
    for head in range(q.shape[2]):
        kv = head // groups
        exact = q[0, rows, head].float() @ k[0, :, kv].float().T * phi.scale
        if softcap is not None:
            exact = softcap * torch.tanh(exact / softcap)
        wanted = exact.masked_fill(~within, -torch.inf).logsumexp(1)
        kernel = features_q[0, rows, head].float() @ features_k[0, :, kv].float().T
        log_scale = (log_q[0, rows, head, None] + log_k[0, :, kv]).masked_fill(~far, -torch.inf)
        top = log_scale.amax(1, keepdim=True)
        mass = ((log_scale - top).exp() * kernel).sum(1)
        both = (mass > 0) & wanted.isfinite()
        if bool(both.any()):
            bias[head] = (wanted - mass.log() - top[:, 0])[both].mean()
    return bias
