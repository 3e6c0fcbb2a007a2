"""Counterfactual text: how much a model's predictions change when its distant past is that of another document."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linattn._heads import body_and_head, tokens_at_once
from linattn._modes import evaluating
from linattn.audit.ablations import converted_layers
from linattn.audit.positions import Progress, check_tokens
from linattn.errors import OptionError, ShapeError


def stacked_reach(student: nn.Module) -> int:
    """Tokens of intact text beyond which the stacked windows of a converted model see nothing: Σ (window − 1) + 1.

    Layers kept softmax have no such limit, or a far wider one (``softmax_window``), nor have retained tokens; they are
    not counted.

    Raises:
        ConversionError: ``student`` is not converted.
    """
    return 1 + sum(max(layer.window - 1, 0) for layer in converted_layers(student))


@torch.no_grad()
def counterfactual_kl(
    model: nn.Module,
    tokens: Tensor,
    others: Tensor | None = None,
    *,
    boundary: int,
    sinks: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """KL(as it is ‖ with another past) of the next-token distributions after ``boundary``, in nats.

    The tokens from ``sinks`` up to ``boundary`` are replaced by those of another document; all else stays. A model that
    does not use what is further back than its windows gives zero from some number of intact tokens on: exactly, if it
    is a sliding window with sinks, and nothing else, and these are :func:`stacked_reach` or more.

    Args:
        model: a causal model, called as ``model(ids, use_cache=False).logits``.
        tokens: ``[N, T]`` int64. others: ``[N, T]`` the other documents; default, of each window the one before it.
        boundary: first position that is intact again, ``sinks < boundary < T``.
        sinks: first tokens that stay, because all later ones attend to them exactly.
        progress: called with (windows done, windows in all).

    Returns:
        ``[N, T − boundary]`` float64 on the CPU. Column j is of the prediction after ``j + 1`` intact tokens.

    Raises:
        ShapeError, DtypeError: ``tokens`` or ``others`` is no ``[N, T]`` tensor of token ids; a single window.
        OptionError: ``boundary`` or ``sinks`` is outside its domain.
    """
    check_tokens(tokens)
    if others is None:
        if len(tokens) < 2:
            raise ShapeError("tokens: got 1 window, expected at least 2, or others to replace its past by.")
        others = tokens.roll(1, 0)
    if others.shape != tokens.shape:
        raise ShapeError(f"others: got shape {tuple(others.shape)}, expected that of tokens, {tuple(tokens.shape)}.")
    count, length = tokens.shape
    if not 0 <= sinks < boundary < length:
        raise OptionError(f"boundary={boundary}, sinks={sinks}: expected 0 ≤ sinks < boundary < T = {length}.")
    changed = torch.cat([tokens[:, :sinks], others[:, sinks:boundary], tokens[:, boundary:]], 1)
    device = next(model.parameters()).device
    rows = []
    with evaluating(model):
        body, head = body_and_head(model, tokens[:1, :16].to(device))
        for row in range(count):
            hidden = [body(ids[row : row + 1].to(device))[0, boundary:] for ids in (tokens, changed)]
            width = tokens_at_once(head, hidden[0], copies=4)
            parts = zip(*(h.split(width) for h in hidden), strict=True)
            rows.append(torch.cat([_divergence(head(a), head(b)).cpu() for a, b in parts]))
            if progress is not None:
                progress(row + 1, count)
    return torch.stack(rows)


def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL of rows of logits, in float64; exactly zero where they are equal."""
    p, q = (x.double().log_softmax(-1) for x in (logits, other))
    return (p.exp() * (p - q)).sum(-1)
