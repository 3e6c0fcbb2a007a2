"""Scores of retained tokens under training: a regression of the attention that tokens get behind the window."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from linattn.convert import ConvertedAttention
from linattn.distill.engine import processes
from linattn.distill.targets import SplitAttention
from linattn.scores import TokenScore

CHUNK = 128
"""Queries whose logits stand in memory at a time, where there is no kernel."""
FEWEST = 64
"""Queries behind the window that a token is told by at least, where half the tokens have as many."""
FLOOR = 1e-6
"""Added to shares whose log is taken."""
TOP = 8.0
"""Nats above the mean from where on the loss grows linearly: a token that every query attends alone has log T."""
PASSES = 10
"""Over the first batch."""


class ScoreRegression:
    """Teaches layers with retained tokens what to retain, beside the optimizer that trains the rest.

    A score aims at the log of the mean share of attention that all later queries give its token once it is behind the
    window: what is dropped first is what the exact part will miss least (scores trained to evict from a cache:
    arXiv:2410.01805). Nothing but keys and values enters, and no other loss reaches the scores: an Adam of their own
    (arXiv:1412.6980), on float32 masters, takes some steps on each batch.

    Args:
        layers: converted modules by path; those without retained tokens are passed by.
        rate: of Adam at its highest. steps: on each batch, each on other tokens of it.

    Attributes:
        layers: those with retained tokens.
        held: the masters and Adam's state, which a checkpoint needs beside the modules' own tensors.
    """

    def __init__(self, layers: dict[str, ConvertedAttention], rate: float, steps: int) -> None:
        self.layers = {path: module for path, module in layers.items() if module.retained}
        self.rate, self.steps = rate, steps
        self.held: dict[str, Tensor] = {}
        self._learners: dict[str, tuple[TokenScore, torch.optim.Adam]] = {}
        for path, module in self.layers.items():
            assert module.score is not None
            wide = torch.promote_types(module.score.bias.dtype, torch.float32)
            master = copy.deepcopy(module.score).to(wide).requires_grad_()
            adam = torch.optim.Adam(master.parameters(), capturable=master.bias.is_cuda)
            tensors = {f"{name}.master": t for name, t in master.state_dict().items()}
            for name, p in master.named_parameters():
                adam.state[p] = {x: torch.zeros_like(p) for x in ("exp_avg", "exp_avg_sq")}
                adam.state[p]["step"] = torch.zeros((), device=p.device)
                tensors |= {f"{name}.{x}": t for x, t in adam.state[p].items()}
            self._learners[path] = master, adam
            self.held |= {f"{path}.linattn.score.{name}": t for name, t in tensors.items()}

    @torch.no_grad()
    def prepare(self, path: str, k: Tensor, v: Tensor, share: Tensor) -> None:
        """Standardise a new score on the first batch, and let it learn from that; arguments as of a call."""
        (master, _), score = self._learners[path], self.layers[path].score
        assert score is not None
        if not bool(master.mean.any()):
            x = master.inputs(k, v).flatten(0, 1)
            score.mean.copy_(x.mean(0))
            score.std.copy_(x.std(0).clamp_min(1e-3))
            master.mean.copy_(score.mean)  # as the layer rounds it
            master.std.copy_(score.std)
            master.bias.copy_((share.mean((0, 1)) + FLOOR).log())
        for _ in range(PASSES):
            self(path, k, v, share)

    def __call__(self, path: str, k: Tensor, v: Tensor, share: Tensor, part: float = 1.0) -> None:
        """Let a layer's score learn from a batch.

        Args:
            k, v, share: see :func:`attended`.
            part: of the highest rate.
        """
        from accelerate.utils import reduce

        (master, adam), score = self._learners[path], self.layers[path].score
        assert score is not None
        parameters, several = list(master.parameters()), processes().num_processes > 1
        adam.param_groups[0]["lr"] = self.rate * part
        k, v, share = (x.flatten(0, 1) for x in (k, v, share))
        for some in torch.randperm(len(k), device=k.device).chunk(self.steps):
            with torch.enable_grad():
                loss = poisson_loss(master(k[None, some], v[None, some])[0], share[some])
                gradients = torch.autograd.grad(loss, parameters)
            for p, gradient in zip(parameters, gradients, strict=True):
                gradient = reduce(gradient, "mean") if several else gradient
                p.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a batch that is not finite teaches nothing
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
        score.load_state_dict(master.state_dict())


def poisson_loss(scores: Tensor, share: Tensor) -> Tensor:
    """Mean of exp(score) − share · score, least where exp(score) is the expected share, of ``[n, Hkv]`` both.

    Shares are almost all tiny and a few are large, so each head's are told in units of their mean.
    """
    mean = share.mean(0).clamp_min(1e-9)
    scores = scores - mean.log()
    expected = scores.clamp_max(TOP).exp() * (1 + (scores - TOP).clamp_min(0.0))
    return (expected - share / mean * scores).mean()


def explained(scores: Tensor, share: Tensor) -> Tensor:
    """R²: the part of the variance of the tokens' log shares that their scores explain, in ``[B, T, Hkv]`` both."""
    target = (share + FLOOR).log()
    scores, target = (x - x.mean((0, 1)) for x in (scores, target))
    return 1 - (scores - target).square().mean() / target.square().mean().clamp_min(1e-12)


@torch.no_grad()
def attended(
    module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], split: SplitAttention
) -> tuple[Tensor, Tensor, Tensor]:
    """What a score learns from: the tokens that have queries enough behind them to tell how much attention they get.

    Args:
        q, k, v, options: what the layer was called with. split: its softmax attention, at any edges.

    Returns:
        Their keys as the score reads them ``[B, T', Hkv, D]``, their values ``[B, T', Hkv, V]``, and ``[B, T', Hkv]``
        float32: the mean share of attention, over the queries from ``window`` tokens on and over the heads of the
        kv head, that each gets.
    """
    length, rotation = q.shape[1], options.get("rotation")
    count = length - module.window - module.sinks  # tokens that get behind the window
    told = slice(module.sinks, length - module.window - min(FEWEST, count // 2))
    mass = torch.logaddexp(split.log_near, split.log_far)
    sums = _received(module, q, k, mass, options["softcap"])[:, told]
    queries = length - module.window - torch.arange(length, device=q.device)[told]
    keys = k if rotation is None else rotation.undo(k[:, :, :0], k)[1]
    return keys[:, told], v[:, told], sums / queries[:, None]


def _received(module: ConvertedAttention, q: Tensor, k: Tensor, mass: Tensor, softcap: float | None) -> Tensor:
    """``[B, T, Hkv]`` sums over the queries behind the window of the shares that keys get, means over the heads."""
    length, window, scale = q.shape[1], module.window, module.feature_map.scale
    limit = min(module.native_window or length, length)
    if q.is_cuda and limit == length:
        from linattn.kernels.triton.expiring import received_attention

        return received_attention(q, k, mass, scale=scale, after=window, softcap=softcap).transpose(1, 2)
    kv_heads, at = k.shape[2], torch.arange(length, device=q.device)
    sums = k.new_zeros(k.shape[:3], dtype=mass.dtype)
    keys = k.to(mass.dtype)
    for start in range(window, length, CHUNK):
        rows = slice(start, min(start + CHUNK, length))
        gap = at[rows, None] - at[: rows.stop - window]
        seen = (gap >= window) & (gap < limit)
        grouped = q[:, rows].to(mass.dtype).unflatten(2, (kv_heads, -1)) * scale
        logits = torch.einsum("btkgd,bskd->bkgts", grouped, keys[:, : gap.shape[1]])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits - mass[:, rows].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1)[..., None]
        share = logits.masked_fill(~seen, -torch.inf).exp().mean(2).sum(2)  # [B, Hkv, S]
        sums[:, : gap.shape[1]] += share.transpose(1, 2)
    return sums
