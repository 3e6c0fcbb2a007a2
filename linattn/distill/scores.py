"""Scores of retained tokens under training: a regression of the attention that tokens get behind the window.

Beside it, another of whether a token is ever looked up from afar.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from linattn.convert import ConvertedAttention
from linattn.distill.engine import processes
from linattn.distill.targets import SplitAttention
from linattn.kernels.precision import autocast
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
PACE = 0.1
"""Part of the way that the threshold goes on each batch."""


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
            adam, tensors = _adam({name: p for name, p in master.named_parameters() if "lookup" not in name})
            tensors |= {f"{name}.master": t for name, t in master.named_buffers() if "lookup" not in name}
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
        (master, adam), score = self._learners[path], self.layers[path].score
        assert score is not None
        k, v, share = (x.flatten(0, 1) for x in (k, v, share))
        for some in torch.randperm(len(k), device=k.device).chunk(self.steps):
            with torch.enable_grad():
                x = master.standardised(master.inputs(k[None, some], v[None, some]))
                loss = poisson_loss(master.attention(x)[0], share[some])
            _descend(adam, loss, self.rate * part)
        score.load_state_dict({n: t for n, t in master.state_dict().items() if "lookup" not in n}, strict=False)


class LookupRegression:
    """Teaches layers with retained tokens which tokens a later query will look up, once their inputs are standardised.

    The mean of :class:`ScoreRegression` says rightly that a fact about which nobody has asked yet is worth little.
    What the tokens that are asked about have in common is told by those that any later query, of any head of any of
    the layers, gives a large share of its attention: one label for all layers, and in each a logistic regression on
    it. The tokens whose readout g is highest gain the bonus (:class:`~linattn.scores.TokenScore`).

    Args:
        layers: converted modules by path; those without retained tokens are passed by.
        rate, steps: as of :class:`ScoreRegression`.
        bonus: c, from when a token has been looked up. after: tokens from a token to the first query that counts.
        share: of a query's attention, beyond which a token is looked up.
        passing: part of all tokens that gain the bonus.

    Attributes:
        layers: those with retained tokens.
        held: the masters, thresholds and Adam's state, which a checkpoint needs beside the modules' own tensors.
    """

    def __init__(
        self,
        layers: dict[str, ConvertedAttention],
        rate: float,
        steps: int,
        *,
        bonus: float,
        after: int,
        share: float,
        passing: float,
    ) -> None:
        self.layers = {path: module for path, module in layers.items() if module.retained}
        self.rate, self.steps, self.bonus = rate, steps, bonus
        self.after, self.share, self.passing = after, share, passing
        self.held: dict[str, Tensor] = {}
        self._learners: dict[str, tuple[dict[str, Tensor], Tensor, torch.optim.Adam]] = {}
        self._seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for path, module in self.layers.items():
            assert module.score is not None
            wide = torch.promote_types(module.score.bias.dtype, torch.float32)
            weight = module.score.lookup_weight.detach().to(wide, copy=True)
            threshold = -module.score.lookup_bias.detach().to(wide)
            masters = {"weight": weight, "intercept": torch.zeros_like(threshold)}
            adam, tensors = _adam({name: t.requires_grad_() for name, t in masters.items()})
            self._learners[path] = masters, threshold, adam
            tensors["threshold"] = threshold
            self.held |= {f"{path}.linattn.score.lookup.{name}": t for name, t in tensors.items()}

    def see(self, path: str, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], split: SplitAttention) -> None:
        """Keep what a layer with retained tokens is called with until all are; arguments as of :func:`attended`."""
        tops = looked_up(self.layers[path], q, k, options, split, self.after)
        self._seen[path] = _unturned(k, options), v, tops

    @torch.no_grad()
    def prepare(self) -> None:
        """Learn from the first batch, whose layers have all been seen, and start the thresholds there."""
        for path, (x, told, label) in self._batch().items():
            masters, _, _ = self._learners[path]
            g = told @ masters["weight"].detach()
            # The labels' mean is that of sigmoid(g + intercept) where g is 0, and nearly where few are looked up.
            masters["intercept"].detach().copy_(label.mean().logit(FLOOR) - g.exp().mean().log())
            for _ in range(PASSES):
                self._learn(path, x, told, label, pace=1.0)

    @torch.no_grad()
    def __call__(self, part: float = 1.0, learn: bool = True) -> dict[str, Tensor]:
        """Learn from a batch whose layers have all been seen.

        Args:
            part: of the highest rate. learn: False only measures.

        Returns:
            Of each layer, before it learns from the batch, the AUC: how likely the readout of a token that is looked
            up is above that of one that is not; NaN where all or none are.
        """
        found = {}
        for path, (x, told, label) in self._batch().items():
            found[path] = auc(told @ self._learners[path][0]["weight"].detach(), label)
            if learn:
                self._learn(path, x, told, label, part)
        return found

    def _batch(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Of each layer the inputs ``[B · T, …]`` and, of the tokens told by enough queries, inputs and labels."""
        tops = [tops for _, _, tops in self._seen.values()]
        top = torch.stack([x.to(tops[0]) for x in tops]).amax(0)
        sinks, last = max(module.sinks for module in self.layers.values()), top.shape[1] - self.after
        told = slice(sinks, last - min(FEWEST, (last - sinks) // 2))
        found = {}
        for path, (keys, values, _) in self._seen.items():
            score = self.layers[path].score
            assert score is not None
            x = score.standardised(score.inputs(keys, values))
            label = (top[:, told] > self.share).to(x)
            found[path] = x.flatten(0, 1), x[:, told].flatten(0, 1), label.flatten()
        self._seen = {}
        return found

    def _learn(self, path: str, x: Tensor, told: Tensor, label: Tensor, part: float = 1.0, pace: float = PACE) -> None:
        from accelerate.utils import reduce

        (masters, threshold, adam), score = self._learners[path], self.layers[path].score
        assert score is not None
        for some in torch.randperm(len(told), device=told.device).chunk(self.steps):
            with torch.enable_grad(), autocast(told, None):
                g = told[some] @ masters["weight"] + masters["intercept"]
                loss = binary_cross_entropy_with_logits(g, label[some])
            _descend(adam, loss, self.rate * part)
        score.lookup_weight.copy_(masters["weight"])
        with autocast(x, None):
            point = torch.stack([(x @ score.lookup_weight.to(x)).quantile(1 - self.passing), label.mean()])
        if processes().num_processes > 1:
            point = reduce(point, "mean")
        threshold.lerp_(torch.where(point[0].isfinite(), point[0], threshold), pace)
        score.lookup_bias.copy_(-threshold)
        score.lookup_bonus.copy_(torch.where(point[1] > 0, self.bonus, score.lookup_bonus))


def _adam(parameters: dict[str, Tensor]) -> tuple[torch.optim.Adam, dict[str, Tensor]]:
    """Adam with its state in place, and the tensors of both."""
    adam = torch.optim.Adam(parameters.values(), capturable=next(iter(parameters.values())).is_cuda)
    tensors = {f"{name}.master": p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        adam.state[p] = {x: torch.zeros_like(p) for x in ("exp_avg", "exp_avg_sq")}
        adam.state[p]["step"] = torch.zeros((), device=p.device)
        tensors |= {f"{name}.{x}": t for x, t in adam.state[p].items()}
    return adam, tensors


def _descend(adam: torch.optim.Adam, loss: Tensor, rate: float) -> None:
    """A step of Adam, on the gradients of all processes."""
    from accelerate.utils import reduce

    (group,), several = adam.param_groups, processes().num_processes > 1
    group["lr"] = rate
    for p, gradient in zip(group["params"], torch.autograd.grad(loss, group["params"]), strict=True):
        gradient = reduce(gradient, "mean") if several else gradient
        p.grad = gradient.nan_to_num(0.0, 0.0, 0.0)  # a batch that is not finite teaches nothing
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    adam.step()


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


def auc(scores: Tensor, label: Tensor) -> Tensor:
    """Area under the ROC curve of ``scores [n]`` for the ``label [n]``, 0 or 1; NaN if all or none are 1."""
    rank, label = scores.argsort(stable=True).argsort().double() + 1, label.double()
    ones = label.sum()
    return (((rank * label).sum() - ones * (ones + 1) / 2) / (ones * (len(label) - ones))).float()


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
    length = q.shape[1]
    count = length - module.window - module.sinks  # tokens that get behind the window
    told = slice(module.sinks, length - module.window - min(FEWEST, count // 2))
    mass = torch.logaddexp(split.log_near, split.log_far)
    sums = _received(module, q, k, mass, options["softcap"])[:, told]
    queries = length - module.window - torch.arange(length, device=q.device)[told]
    return _unturned(k, options)[:, told], v[:, told], sums / queries[:, None]


@torch.no_grad()
def looked_up(
    module: ConvertedAttention, q: Tensor, k: Tensor, options: dict[str, Any], split: SplitAttention, after: int
) -> Tensor:
    """``[B, T]`` float32: the largest share of attention that each token gets from one head of a query ``after`` on.

    Arguments as of :func:`attended`.
    """
    mass = torch.logaddexp(split.log_near, split.log_far)
    return _received(module, q, k, mass, options["softcap"], after, largest=True).amax(2)


def _received(
    module: ConvertedAttention,
    q: Tensor,
    k: Tensor,
    mass: Tensor,
    softcap: float | None,
    after: int | None = None,
    *,
    largest: bool = False,
) -> Tensor:
    """``[B, T, Hkv]`` sums over the queries ``after`` a key (None: behind the window) of its shares, means over heads.

    Or the ``largest`` share of all these.
    """
    length, after, scale = q.shape[1], module.window if after is None else after, module.feature_map.scale
    limit = min(module.native_window or length, length)
    if q.is_cuda and limit == length:
        from linattn.kernels.triton.expiring import received_attention

        found = received_attention(q, k, mass, scale=scale, after=after, softcap=softcap, largest=largest)
        return found.transpose(1, 2)
    kv_heads, at = k.shape[2], torch.arange(length, device=q.device)
    sums = k.new_zeros(k.shape[:3], dtype=mass.dtype)
    keys = k.to(mass.dtype)
    for start in range(after, length, CHUNK):
        rows = slice(start, min(start + CHUNK, length))
        gap = at[rows, None] - at[: rows.stop - after]
        seen = (gap >= after) & (gap < limit)
        grouped = q[:, rows].to(mass.dtype).unflatten(2, (kv_heads, -1)) * scale
        logits = torch.einsum("btkgd,bskd->bkgts", grouped, keys[:, : gap.shape[1]])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits - mass[:, rows].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1)[..., None]
        share = logits.masked_fill(~seen, -torch.inf).exp()  # [B, Hkv, G, T', S]
        before = sums[:, : gap.shape[1]]
        if largest:
            before.copy_(torch.maximum(before, share.amax((2, 3)).transpose(1, 2)))
        else:
            before += share.mean(2).sum(2).transpose(1, 2)
    return sums


def _unturned(k: Tensor, options: dict[str, Any]) -> Tensor:
    """Keys as scores read them, before rotary embedding."""
    rotation = options.get("rotation")
    return k if rotation is None else rotation.undo(k[:, :, :0], k)[1]
