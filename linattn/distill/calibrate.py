"""Calibration: the first stage, in one call and without files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from linattn.distill.engine import Batch, train
from linattn.distill.layers import trainable_layers
from linattn.distill.transfer import LayerErrors, Transfer
from linattn.errors import DtypeError, OptionError, ShapeError


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

    Each layer sees the teacher's inputs: what it returns to the rest of the model is exact attention, so the layers
    train in parallel and no teacher model is kept. Nothing but the parameters and buffers under ``<attention>.linattn``
    changes; decoding states made before do not fit after. Updates add up in float32, whatever the model is: half
    precision swallows small ones.

    This is :class:`~linattn.distill.Transfer` on the whole output alone.

    The first batch prepares every layer. Every head's far bias is set in closed form, so that the far branch starts
    with the mass that softmax gives it: to the mean, over the queries of the first sequence, of log(softmax's far
    mass) − log(the map's far mass). Queries to which the map gives no mass, or where it is not positive a negative one,
    have no part in that mean. Decays start where over tokens of equal features their mean look-back would be
    softmax's, unless that raises the layer's error. A feature map that can adapt to data (``fit(q, k)`` of ``favor++``,
    ``favor#`` and ``nystrom``) is fitted to the queries and keys that the far branch sees, and stays so where that
    lowers the layer's error: what is optimal for the kernel need not be for attention. Scores of retained tokens learn
    from the first batch before all this, and from every later one. Adam with a cosine schedule does the rest.

    Args:
        model: a converted causal model.
        batches: one ``[B, T]`` int64 batch of token ids a step, without padding; T should exceed window + retained +
            sinks several times. Each is read in one piece; the first one's T² numbers per head must fit in memory.
        learning_rate: of Adam, at the start. 0 only prepares.
        progress: called after each step with (steps done, loss).

    Raises:
        ConversionError: the model has no converted layer, or bidirectional ones, or is in ``window_only``.
        OptionError: ``batches`` is empty, or its sequences fit in the window, where there is nothing to learn;
            ``learning_rate`` is negative or not finite.
        ShapeError, DtypeError: a batch is no ``[B, T]`` tensor of token ids.
        NonFiniteError: no step gave finite gradients.
    """
    layers = trainable_layers(model)
    steps = _checked(batches, nearest=max(module.reach for module in layers.values()))
    if not 0 <= learning_rate < math.inf:
        raise OptionError(f"learning_rate: got {learning_rate!r}, expected a number ≥ 0.")
    stage = Transfer(
        steps=len(steps), learning_rate=learning_rate, far_weight=0.0, mass_weight=0.0, patience=len(steps)
    )
    objective = LayerErrors(layers, stage, model)
    report = None if progress is None else (lambda done, metrics: progress(done, metrics["loss"]))
    done = train(model, objective, lambda index: Batch(steps[index]), stage, name="calibrate", progress=report)
    return Calibration(done.losses, objective.errors, done.skipped)


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
                f"batches: sequences of {batch.shape[1]} tokens fit in window + retained + sinks = {nearest}, where "
                "the far branch has no part; use longer ones."
            )
    return steps
