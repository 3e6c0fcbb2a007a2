"""Calibration: every converted layer learns from its own softmax attention, all layers at once, one forward a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linattn.convert import ConvertedAttention
from linattn.errors import ConversionError, NonFiniteError, OptionError
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
    but the parameters under ``<attention>.linattn`` changes. The first batch sets every head's far bias in closed form,
    so that the far branch starts with the mass softmax gives it; Adam with a cosine schedule does the rest.

    Args:
        model: a converted causal model.
        batches: one ``[B, T]`` int64 batch of token ids a step; T should exceed window + sinks several times.
        learning_rate: of Adam, at the start.
        progress: called after each step with (steps done, loss).

    Raises:
        ConversionError: the model has no converted layer, or bidirectional ones.
        OptionError: ``batches`` is empty, or its sequences fit in the window, where there is nothing to learn.
        NonFiniteError: no step gave finite gradients.
    """
    layers = {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, ConvertedAttention)
    }
    if not layers:
        raise ConversionError(f"{type(model).__name__} has no converted layer; call convert_model first.")
    if any(not module.causal for module in layers.values()):
        raise ConversionError(f"{type(model).__name__} has bidirectional converted layers; calibration is causal.")
    trained = [p for module in layers.values() for p in module.parameters()]
    steps = list(batches)
    if not steps:
        raise OptionError("batches: got none, expected at least one [B, T] batch of token ids.")
    shortest, nearest = min(b.shape[1] for b in steps), max(m.window + m.sinks for m in layers.values())
    if shortest <= nearest:
        raise OptionError(
            f"batches: sequences of {shortest} tokens fit in window + sinks = {nearest}, where the far branch has no "
            "part; use longer ones."
        )

    device = trained[0].device
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    losses: list[float] = []
    errors: dict[str, float] = {}
    skipped = 0

    def learn(name: str, *call: Any) -> Tensor:
        target, errors[name] = _learn(*call)
        return target

    with _only_trainable(model, trained):
        with _hooked(layers, _match_far_mass), torch.no_grad():
            model(steps[0].to(device), use_cache=False)
        for done, batch in enumerate(steps):
            optimizer.zero_grad()
            errors.clear()
            with _hooked(layers, learn):
                model(batch.to(device), use_cache=False)
            losses.append(sum(errors.values()) / len(errors))
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            if math.isfinite(norm):
                optimizer.step()
            else:
                skipped += 1
            schedule.step()
            if progress is not None:
                progress(done + 1, losses[-1])
    if skipped == len(steps):
        raise NonFiniteError(f"batches: none of {skipped} steps gave finite gradients; lower learning_rate.")
    return Calibration(losses, errors, skipped)


@contextlib.contextmanager
def _only_trainable(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for ``trained`` alone; as it was afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    wanted = {id(p) for p in trained}
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in wanted)
        model.eval()
        yield
    finally:
        for p, value in before:
            p.requires_grad_(value)
            p.grad = None
        model.train(training)


@contextlib.contextmanager
def _hooked(layers: dict[str, ConvertedAttention], hook: Callable[..., Tensor]) -> Iterator[None]:
    """Run ``hook(name, module, inputs, options, output)`` in place of each layer's output."""
    handles = []
    try:
        for name, module in layers.items():

            def call(
                module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor, name: str = name
            ) -> Tensor:
                return hook(name, module, inputs, options, output)

            handles.append(module.register_forward_hook(call, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _softmax(module: ConvertedAttention, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    """The softmax attention the layer stands for: the same operator with everything in the window."""
    q, k, v = inputs
    return kernel_attention(
        q,
        k,
        v,
        feature_map=None,
        far=False,
        window=q.shape[1],
        scale=module.feature_map.scale,
        softcap=options["softcap"],
        sink_logits=options["sink_logits"],
        causal=module.causal,
        mask=options["mask"],
        cu_seqlens=options["cu_seqlens"],
    ).out


def _learn(
    module: ConvertedAttention, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor
) -> tuple[Tensor, float]:
    """The teacher's output, to pass on, and the layer's error, back-propagated at once to free its activations."""
    target = _softmax(module, inputs, options)
    loss = (output.float() - target.float()).square().mean() / target.float().square().mean().clamp_min(1e-12)
    loss.backward()
    return target, loss.item()


@torch.no_grad()
def _match_far_mass(
    name: str, module: ConvertedAttention, inputs: tuple[Tensor, ...], options: dict[str, Any], output: Tensor
) -> Tensor:
    """Set each head's far bias to the mean of log(softmax's far mass) − log(the map's far mass), over the queries."""
    q, k, _ = (t[:1].float() for t in inputs)
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    at = torch.arange(length, device=q.device)
    gap = at[:, None] - at
    far = (gap.abs() >= module.window) & (at >= module.sinks)
    if module.causal:
        far &= gap >= 0
    rows = far.any(1)
    features_q, log_q = module.feature_map.forward_queries(q, *([at[None]] if module.feature_map.positional else []))
    features_k, log_k = module.feature_map.forward_keys(k, *([at[None]] if module.feature_map.positional else []))
    gates = module.log_gates(k)
    for head in range(q.shape[2]):
        kv = head // groups
        exact = (q[0, :, head] @ k[0, :, kv].T) * module.feature_map.scale
        if options["softcap"] is not None:
            exact = options["softcap"] * torch.tanh(exact / options["softcap"])
        kernel = features_q[0, :, head].float() @ features_k[0, :, kv].float().T
        log_kernel = kernel.clamp_min(1e-30).log()
        if log_q is not None and log_k is not None:
            log_kernel = log_kernel + log_q[0, :, head, None] + log_k[0, None, :, kv]
        if gates is not None:
            clock = (gates.expand(length, -1) if gates.ndim == 1 else gates[0])[:, kv].cumsum(0)
            log_kernel = log_kernel + clock[:, None] - clock
        wanted, got = (x.masked_fill(~far, -torch.inf)[rows].logsumexp(1) for x in (exact, log_kernel))
        module.far_bias[head] = (wanted - got).mean()
    return _softmax(module, inputs, options)
