"""Scores of retained tokens under training: a regression of the attention that tokens get behind the window."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.convert import ConvertedAttention
from linattn.distill.engine import processes

FEWEST = 64
"""Queries that a token's share of attention is a mean over at least, where the sequence has as many to spare."""
FLOOR = 1e-6
"""Added to shares whose log is taken."""
TOP = 8.0
"""Nats over the log of the mean share from where on the loss grows linearly: one token with everything has log T."""
PASSES = 10
"""Over the first batch."""


class ScoreRegression:
    """Teaches layers with retained tokens what to retain, beside the optimizer that trains the rest.

    A score aims at the log of the share of attention that later queries give the token once it is behind the window:
    dropping the tokens of the least expected share costs the exact part the least mass. Shares are almost all tiny and
    a few are large, so the loss is Poisson's, exp(s) − share · s, which is least where exp(s) is the expected share.
    (Scores trained to evict from a cache: arXiv:2410.01805.)

    Nothing but the layer's keys and values enters, and no other loss reaches the scores: they have an Adam of their own
    (Kingma & Ba 2015), on float32 masters, which takes several steps on parts of every batch.

    Args:
        layers: converted modules by path, of which those without retained tokens are passed by.

    Attributes:
        layers: those with retained tokens.
        held: moments, steps and masters, for checkpoints: the scores' own tensors are the modules'.
    """

    def __init__(self, layers: dict[str, ConvertedAttention]) -> None:
        self.layers = {path: module for path, module in layers.items() if module.retained}
        self.held: dict[str, Tensor] = {}
        self._masters: dict[str, dict[str, Tensor]] = {}
        self._adams: dict[str, torch.optim.Adam] = {}
        for path, module in self.layers.items():
            parameters = dict(module.score.named_parameters())  # type: ignore[union-attr]
            # The same memory, where a parameter is float32 itself.
            masters = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()}
            adam = torch.optim.Adam(masters.values(), capturable=next(iter(masters.values())).is_cuda)
            for name, master in masters.items():
                state = {"step": torch.zeros((), device=master.device)}
                state |= {moment: torch.zeros_like(master) for moment in ("exp_avg", "exp_avg_sq")}
                adam.state[master] = state
                kept = state if master.dtype == parameters[name].dtype else state | {"master": master}
                self.held |= {f"{path}.linattn.score.{name}.{key}": t for key, t in kept.items()}
            self._masters[path], self._adams[path] = masters, adam

    @torch.no_grad()
    def prepare(self, path: str, k: Tensor, v: Tensor, share: Tensor, *, rate: float, steps: int) -> None:
        """Standardise a fresh score on its first batch, and let it learn from that one; arguments as of :meth:`fit`."""
        score = self.layers[path].score
        assert score is not None
        if not bool(score.mean.any()):
            x = score.inputs(k, v).flatten(0, 1)
            score.mean.copy_(x.mean(0))
            score.std.copy_(x.std(0).clamp_min(1e-3))
            self._masters[path]["bias"].copy_((share.mean((0, 1)) + FLOOR).log())
        for _ in range(PASSES):
            self.fit(path, k, v, share, rate=rate, steps=steps)

    def fit(self, path: str, k: Tensor, v: Tensor, share: Tensor, *, rate: float, steps: int) -> None:
        """Take some steps on a batch, each on other tokens of it.

        Args:
            k: ``[B, T, Hkv, D]`` what the score reads of keys. v: ``[B, T, Hkv, V]``.
            share: ``[B, T', Hkv]`` of the tokens that have one, by :func:`shares`.
        """
        k, v, share = (x[:, : share.shape[1]].flatten(0, 1) for x in (k, v, share))
        score, masters, adam = self.layers[path].score, self._masters[path], self._adams[path]
        assert score is not None
        adam.param_groups[0]["lr"] = rate
        for part in torch.randperm(len(k), device=k.device).chunk(steps):
            with torch.enable_grad():
                leaves = {name: master.requires_grad_() for name, master in masters.items()}
                found = torch.func.functional_call(score, leaves, (k[None, part], v[None, part]))[0]
                poisson_loss(found, share[part]).backward()
