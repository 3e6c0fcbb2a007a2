"""Logits: the converted model learns to predict what its teacher predicts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache
from transformers.cache_utils import Cache

from linattn._heads import body_and_head, tokens_at_once
from linattn._modes import evaluating
from linattn.convert import prepare_cache
from linattn.convert.cache import decoder_cache, detach
from linattn.distill.data import Progress, Windows
from linattn.distill.engine import Batch, Objective, Stage, own_randomness, write_atomically
from linattn.distill.layers import trainable_layers
from linattn.errors import CheckpointError, OptionError, UnsupportedError

PARTS = ("maps", "lora", "attention", "all")
CACHE_FORMAT = "linattn-teacher-1"
DESCRIPTION = "teacher.json"

Divergence = Callable[[Tensor, slice], Tensor]
"""(logits ``[n, V]`` of a slice of a piece's tokens, that slice) → KL ``[n]`` from the teacher, in nats."""


def forward_kl(logits: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each token, ``[n]`` float32 in nats, of logits ``[n, V]`` at a temperature τ.

    With p = softmax(z / τ) it is τ² Σ p* (log p* − log p): the factor keeps the size of the gradient (Hinton et al.
    2015, arXiv:1503.02531).
    """
    log_p, wanted = (F.log_softmax(z.float() / temperature, -1) for z in (logits, teacher))
    return temperature**2 * (wanted.exp() * (wanted - log_p)).sum(-1)


def top_k_kl(logits: Tensor, indices: Tensor, log_probs: Tensor, *, temperature: float = 1.0) -> Tensor:
    """:func:`forward_kl` over the teacher's k likeliest tokens and one bucket that holds the rest.

    It is never larger than the KL over all tokens.

    Args:
        logits: ``[n, V]`` of the student.
        indices: ``[n, k]`` the teacher's likeliest tokens.
        log_probs: ``[n, k + 1]`` their log-probabilities at this temperature, and that of all others together.

    Returns:
        ``[n]`` float32 in nats.
    """
    z = logits.float() / temperature
    rest = z.scatter(1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([z.gather(1, indices), rest], -1) - z.logsumexp(-1, keepdim=True)
    return temperature**2 * (log_probs.exp() * (log_probs.clamp_min(-1e4) - log_p)).sum(-1)


def chunked_mean(
    loss: Callable[[Tensor, slice], Tensor], hidden: Tensor, parameters: Sequence[nn.Parameter], *, chunk: int
) -> Tensor:
    """Mean of a loss per token through the output embedding, which never stands in memory for more than ``chunk``.

    The gradients are computed chunk by chunk in the forward pass, each chunk's logits freed before the next: what is
    kept for the backward pass has the size of ``hidden`` and of the parameters.

    Args:
        loss: (hidden states ``[n, d]`` of a slice, that slice) → loss ``[n]``.
        hidden: ``[N, d]``.
        parameters: what ``loss`` uses and gradients are wanted of.
        chunk: tokens at a time.

    Returns:
        A scalar in float32, differentiable once.
    """
    return _ChunkedMean.apply(loss, chunk, hidden, *parameters)


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Callable[[Tensor, slice], Tensor], chunk: int, hidden: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        count = hidden.shape[0]
        wanted = [p for p, needed in zip(parameters, ctx.needs_input_grad[3:], strict=True) if needed]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.zeros_like(hidden)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in wanted]
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                leaf = hidden[rows].detach().requires_grad_(any(ctx.needs_input_grad))
                value = loss(leaf, rows).sum() / count
            total += value.detach()
            if any(ctx.needs_input_grad):
                grads = torch.autograd.grad(value, [leaf, *wanted], allow_unused=True)
                to_hidden[rows] = grads[0]
                for held, grad in zip(sums, grads[1:], strict=True):
                    if grad is not None:
                        held += grad
        found = iter([s.to(p.dtype) for s, p in zip(sums, wanted, strict=True)])
        ctx.save_for_backward(to_hidden, *(next(found) if needed else None for needed in ctx.needs_input_grad[3:]))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if held is None else held * grad.to(held.dtype) for held in ctx.saved_tensors))


class Teacher(Protocol):
    """What the student's predictions are held against."""

    def read(self, batch: Batch, temperature: float) -> Callable[[slice], Divergence]:
        """A piece of the windows, n of their tokens → the divergence of its ``B · n`` tokens, row after row."""
        ...


class ModelTeacher:
    """A second model, which reads every batch too.

    Args:
        model: the teacher.
        sample: ``[B, T]`` tokens to try it on.
        context: tokens it reads for a piece, those before it included; 0 for the whole window at once.
    """

    def __init__(self, model: nn.Module, sample: Tensor, context: int = 0) -> None:
        self.model, self.context = model, context
        self.body, self.head = body_and_head(model, sample)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Callable[[slice], Tensor]:
        """A piece of windows ``[B, T]``, n of their tokens → ``[B, n, d]``."""
        tokens = tokens.to(next(self.model.parameters()).device)
        if not self.context:
            whole = self.body(tokens)
            return lambda piece: whole[:, piece]

        @torch.no_grad()
        def of(piece: slice) -> Tensor:
            seen = tokens[:, max(0, piece.stop - self.context) : piece.stop]
            return self.body(seen)[:, piece.start - piece.stop :]

        return of

    def read(self, batch: Batch, temperature: float) -> Callable[[slice], Divergence]:
        states = self.hidden(batch.tokens)

        def of(piece: slice) -> Divergence:
            hidden = states(piece).flatten(0, 1)

            def divergence(logits: Tensor, rows: slice) -> Tensor:
                with torch.no_grad():
                    teacher = self.head(hidden[rows]).to(logits.device)
                if teacher.shape != logits.shape:
                    raise OptionError(
                        f"teacher: predicts {teacher.shape[-1]} tokens, the student {logits.shape[-1]}; it must be the "
                        "model that was converted, or one with the same vocabulary."
                    )
                return forward_kl(logits, teacher, temperature=temperature)

            return divergence

        return of


class CachedTeacher:
    """What :func:`cache_teacher` wrote, read window by window.

    Args:
        path: the folder.

    Attributes:
        windows: how many there are. k: tokens kept of each prediction. length: tokens of a window.
        temperature: at which the teacher predicted.
        segment, teacher_context: what the teacher read, as in :class:`Logits`.

    Raises:
        CheckpointError: there is no such folder, or it was not finished.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            about = json.loads((self.path / DESCRIPTION).read_text(encoding="utf-8"))
            if about["format"] != CACHE_FORMAT:
                raise CheckpointError(f"{path}: format {about['format']!r}, expected {CACHE_FORMAT!r}.")
            self.windows, self.k, self.length = (int(about[name]) for name in ("windows", "k", "length"))
            self.temperature, self.shard = float(about["temperature"]), int(about["shard"])
            self.segment, self.teacher_context = (int(about.get(name, 0)) for name in ("segment", "teacher_context"))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: no finished cache of a teacher there: {error!r}.") from error

    def read(self, batch: Batch, temperature: float) -> Callable[[slice], Divergence]:
        if temperature != self.temperature:
            raise OptionError(f"temperature: got {temperature}, the teacher was cached at {self.temperature}.")
        held = [self._window(window, row) for window, row in zip(batch.windows, batch.tokens, strict=True)]
        found = [torch.stack(parts) for parts in zip(*held, strict=True)]

        def of(piece: slice) -> Divergence:
            indices, log_probs = (t[:, piece].flatten(0, 1) for t in found)

            def divergence(logits: Tensor, rows: slice) -> Tensor:
                where = logits.device
                return top_k_kl(logits, indices[rows].to(where), log_probs[rows].to(where), temperature=temperature)

            return divergence

        return of

    def _window(self, window: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Indices ``[T, k]`` int64 and log-probabilities ``[T, k + 1]`` of one window."""
        if not 0 <= window < self.windows:
            raise OptionError(f"{self.path}: holds windows 0 … {self.windows - 1} of the data, asked for {window}.")
        shard, row = divmod(window, self.shard)
        try:
            with safe_open(_shard(self.path, shard), framework="pt") as file:
                checksum = int(file.get_slice("checksums")[row : row + 1])
                indices = file.get_slice("indices")[row : row + 1][0]
                log_probs = file.get_slice("log_probs")[row : row + 1][0]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: shard {shard} cannot be read: {error}") from error
        if checksum != _checksum(tokens):
            raise CheckpointError(
                f"{self.path}: window {window} held other tokens when the teacher read it; distil on the data, length "
                "and seed that it was cached on."
            )
        return indices.long(), log_probs


@torch.no_grad()
def cache_teacher(
    model: nn.Module,
    data: Windows,
    *,
    windows: int,
    k: int = 64,
    out: str | os.PathLike[str],
    temperature: float = 1.0,
    segment: int = 0,
    teacher_context: int = 0,
    shard: int = 256,
    progress: Progress | None = None,
) -> CachedTeacher:
    """Write a teacher's k likeliest tokens for every position of the data's first windows, to distil without it.

    Takes 8 k + 4 bytes a token, in safetensors shards: int32 indices, float32 log-probabilities of these tokens and of
    all others together.

    Args:
        model: the teacher.
        data: the windows that the stage will read, of the same length, seed and repeats.
        windows: how many: ``steps · accumulate · rows`` on each process.
        k: tokens kept of each prediction, less than the vocabulary.
        out: the folder to write.
        temperature: of the softmax; the stage must use the same.
        segment, teacher_context: what the teacher reads, as in :class:`Logits`; the stage must use the same.
        shard: windows a file.
        progress: called with (windows done, windows in all).
    """
    _check_context(segment, teacher_context)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    device = next(model.parameters()).device
    with evaluating(model):
        teacher = ModelTeacher(model, data[0][None, :16].to(device), teacher_context)
        for start in range(0, windows, shard):
            rows: list[tuple[Tensor, ...]] = []
            for window in range(start, min(start + shard, windows)):
                tokens = data[window]
                states, parts = teacher.hidden(tokens[None]), []
                for piece in _pieces(data.length, segment):
                    hidden = states(piece)[0]
                    some = hidden.split(tokens_at_once(teacher.head, hidden))
                    parts += [_top_k(teacher.head(h), k, temperature) for h in some]
                indices, log_probs = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
                rows.append((indices, log_probs, torch.tensor(_checksum(tokens))))
                if progress is not None:
                    progress(window + 1, windows)
            names = ("indices", "log_probs", "checksums")
            tensors = {name: torch.stack(part) for name, part in zip(names, zip(*rows, strict=True), strict=True)}
            path = _shard(folder, start // shard)
            write_atomically(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))  # type: ignore[misc]
    about = {"format": CACHE_FORMAT, "windows": windows, "k": k, "length": data.length}
    about |= {"segment": segment, "teacher_context": teacher_context}
    text = json.dumps(about | {"temperature": temperature, "shard": shard}) + "\n"
    write_atomically(folder / DESCRIPTION, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return CachedTeacher(folder)


def _top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    if not 1 <= k < logits.shape[-1]:
        raise OptionError(f"k: got {k!r}, expected 1 … {logits.shape[-1] - 1}, less than the vocabulary.")
    log_p = F.log_softmax(logits.float() / temperature, -1)
    top = log_p.topk(k, -1)
    rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return top.indices.int(), torch.cat([top.values, rest], -1)


def _pieces(length: int, segment: int) -> Iterator[slice]:
    """Windows of ``length`` tokens in pieces of ``segment``, of which the last may be shorter; 0: whole."""
    for start in range(0, length, segment or length):
        yield slice(start, min(start + (segment or length), length))


def _check_context(segment: int, teacher_context: int) -> None:
    for name, value in (("segment", segment), ("teacher_context", teacher_context)):
        if not isinstance(value, int) or value < 0:
            raise OptionError(f"{name}: got {value!r}, expected an integer ≥ 0, where 0 is the whole window.")
    if teacher_context and not 0 < segment <= teacher_context:
        raise OptionError(
            f"teacher_context: got {teacher_context} with segment={segment}; of what the teacher reads, a piece of "
            "segment tokens is the end: expected teacher_context ≥ segment ≥ 1, or 0."
        )


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _checksum(tokens: Tensor) -> int:
    return zlib.crc32(tokens.cpu().contiguous().numpy().tobytes())


@dataclasses.dataclass(frozen=True)
class Logits(Stage):
    """Forward KL from teacher to student on every token.

    Which parameters train, all in place: ``"maps"``, what conversion added (maps, gates, far biases; nothing in layers
    without a far branch); ``"lora"``, low-rank updates of the linear layers of the converted attention (Hu et al. 2021,
    arXiv:2106.09685; in linear conversions: arXiv:2410.10254), merged at the end, which takes peft; ``"attention"``,
    the converted attention modules; ``"all"``, everything but the embeddings. Distillation of the logits with all
    weights is stage 3 of arXiv:2408.10189. Scores of retained tokens stay as they are: choosing has no gradient.

    Activation checkpointing that the model has switched on (``gradient_checkpointing_enable``) is used.

    Windows too long for one pass are read in pieces of ``segment`` tokens, each from the model's own cache and with a
    backward pass of its own: truncated back-propagation through time (Williams & Peng 1990). The loss of a step is that
    of whole windows; its gradient is that of a memory which is a constant at the start of each piece. What the student
    takes is one piece, the states of converted layers, and the keys and values of layers kept softmax, which alone grow
    with ``length``. A teacher trained on shorter texts is asked with ``teacher_context``, which bounds what it takes,
    too.

    Attributes:
        train: one or more of these.
        temperature: of both softmaxes.
        cross_entropy: weight w of the next tokens' cross-entropy in (1 − w) KL + w cross-entropy; at 1 there need be
            no teacher. The text then pulls the student away from its teacher: to compare with, not to recommend.
        maps_factor: how many times the learning rate applies to what conversion added, which starts from nothing
            where the weights start from a trained model.
        lora_rank: of the updates. lora_alpha: their scale is lora_alpha / lora_rank.
        chunk: tokens whose logits stand in memory at a time; 0 as many as make 2²⁵ logits.
        segment: tokens of a piece, the last of a window being what is left; 0 reads whole windows.
        teacher_context: tokens that the teacher reads, the piece at their end, to predict a piece; beyond the first of
            a window each prediction has at least ``teacher_context − segment`` tokens before it. 0 reads whole windows.
    """

    train: tuple[str, ...] = ("maps", "lora")
    temperature: float = 1.0
    cross_entropy: float = 0.0
    maps_factor: float = 1.0
    lora_rank: int = 8
    lora_alpha: int = 16
    chunk: int = 0
    segment: int = 0
    teacher_context: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_context(self.segment, self.teacher_context)
        if not self.train or not set(self.train) <= set(PARTS):
            raise OptionError(f"train: got {self.train}, expected some of {', '.join(PARTS)}.")
        if "lora" in self.train and {"attention", "all"} & set(self.train):
            raise OptionError(f"train: got {self.train}; 'lora' updates weights that the others train themselves.")
        if not 0 <= self.cross_entropy <= 1:
            raise OptionError(f"cross_entropy: got {self.cross_entropy!r}, expected a weight 0 … 1.")
        if not (self.temperature > 0 and self.maps_factor > 0 and self.lora_rank > 0 and self.chunk >= 0):
            raise OptionError(
                f"temperature={self.temperature}, maps_factor={self.maps_factor}, lora_rank={self.lora_rank}, "
                f"chunk={self.chunk}: expected positive numbers, of which chunk may be 0."
            )

    @contextlib.contextmanager
    def objective(self, model: nn.Module, teacher: nn.Module | CachedTeacher | None) -> Iterator[Divergences]:
        """The loss on a converted ``model``; low-rank updates are merged at the end, or dropped after an exception.

        Args:
            teacher: the model before conversion, a copy of it, or a :class:`CachedTeacher`.

        Raises:
            ConversionError: ``model`` has no converted causal layer, or is in ``window_only``.
            OptionError: there is no teacher, it is the model itself, its cache is too small or of another context, or
                the model has no parameters of those that should train.
            UnsupportedError: ``segment`` of a model that cannot be read in pieces, or checkpoints its activations.
        """
        paths = tuple(f"{path}." for path in trainable_layers(model, far=False))
        sample = torch.zeros(1, min(16, self.length), dtype=torch.int64, device=next(model.parameters()).device)
        if (teacher is None and self.cross_entropy < 1) or teacher is model:
            raise OptionError(
                f"teacher: got {'the student itself' if teacher is model else teacher}, expected the model before "
                "conversion (a copy made with copy.deepcopy, or loaded again), or a CachedTeacher."
            )
        with contextlib.ExitStack() as stack:
            source: Teacher | None = None
            if isinstance(teacher, CachedTeacher):
                if self.held_out:
                    raise OptionError(
                        f"held_out: {teacher.path} knows its own data only; pass the model as the teacher."
                    )
                needed = self.steps * self.accumulate * self.rows
                if needed > teacher.windows or self.length != teacher.length:
                    raise OptionError(
                        f"teacher: {teacher.path} holds {teacher.windows} windows of {teacher.length} tokens, the "
                        f"stage reads {needed} of {self.length}."
                    )
                context = (self.teacher_context, self.segment if self.teacher_context else 0)
                cached = (teacher.teacher_context, teacher.segment if teacher.teacher_context else 0)
                if context != cached:
                    raise OptionError(
                        f"teacher: {teacher.path} was cached with (teacher_context, segment) = {cached}, the stage has "
                        f"{context}."
                    )
                source = teacher
            elif teacher is not None:
                stack.enter_context(evaluating(teacher))
                source = ModelTeacher(teacher, sample.to(next(teacher.parameters()).device), self.teacher_context)
            with evaluating(model):
                body, head = body_and_head(model, sample)
                if self.segment:
                    _check_memory(model, body, sample)
            if "lora" in self.train:
                stack.enter_context(_low_rank(model, paths, self))
            embeddings = {
                id(p)
                for module in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
                if module is not None
                for p in module.parameters()
            }
            chosen = {
                name: p
                for name, p in model.named_parameters()
                if ".linattn.score." not in name
                and (
                    ("maps" in self.train and ".linattn." in name)
                    or ("lora" in self.train and ".lora_" in name)
                    or ("attention" in self.train and name.startswith(paths))
                    or ("all" in self.train and id(p) not in embeddings)
                )
            }
            if not chosen:
                raise OptionError(f"train: the model has no parameters of {self.train}; it has no far branch.")
            yield Divergences(self, source, model, body, head, chosen)


class Divergences(Objective):
    """The loss of :class:`Logits`."""

    def __init__(
        self,
        stage: Logits,
        teacher: Teacher | None,
        model: nn.Module,
        body: Callable[..., Tensor],
        head: Callable[[Tensor], Tensor],
        parameters: dict[str, nn.Parameter],
    ) -> None:
        self.stage, self.teacher, self.model, self.body, self.head = stage, teacher, model, body, head
        self.parameters, self.held = parameters, {}
        self.checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]

    def factor(self, name: str) -> float:
        return self.stage.maps_factor if ".linattn." in name else 1.0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        losses, length = self._losses(batch), batch.tokens.shape[1]
        for module in self.checkpointed:
            module.training = True  # or transformers forgoes it; what is in the module stays in evaluation mode
        tokens = batch.tokens.to(next(iter(self.parameters.values())).device)
        cache = _empty_cache(self.model) if self.stage.segment else None
        total, sums = torch.zeros((), dtype=torch.float64, device=tokens.device), dict[str, Tensor]()
        for piece in _pieces(length, self.stage.segment):
            of_piece = losses(piece)
            hidden = self.body(tokens[:, piece], cache).flatten(0, 1)
            if cache is not None:
                detach(cache)
            loss = self._mean(of_piece, hidden) * ((piece.stop - piece.start) / length)
            loss.backward()
            total += loss.detach()
            if cache is not None:
                self._add_to(sums)
        for name, held in sums.items():
            self.parameters[name].grad = held.to(self.parameters[name].dtype)
        return {"loss": total}

    def _mean(self, losses: Divergence, hidden: Tensor) -> Tensor:
        of_head = list(self.head.parameters()) if isinstance(self.head, nn.Module) else []
        chunk = self.stage.chunk or tokens_at_once(self.head, hidden)
        return chunked_mean(lambda h, rows: losses(self.head(h), rows), hidden, of_head, chunk=chunk)

    def _add_to(self, sums: dict[str, Tensor]) -> None:
        """Move the gradients of a piece to ``sums``, in float32: many small ones are lost in a narrow dtype."""
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            if name in sums:
                sums[name] += p.grad
            else:
                sums[name] = p.grad.to(torch.promote_types(p.dtype, torch.float32))
            p.grad = None

    def _losses(self, batch: Batch) -> Callable[[slice], Divergence]:
        """A piece → (logits of a slice of its tokens, that slice → the loss of each, whose mean is the piece's)."""
        weight, length = self.stage.cross_entropy, batch.tokens.shape[1]
        reading = self.teacher.read(batch, self.stage.temperature) if self.teacher and weight < 1 else None
        # The last token of a window has no next one: the others stand for it.
        following = torch.cat([batch.tokens[:, 1:], torch.full_like(batch.tokens[:, :1], -100)], 1)
        scale = length / max(1, length - 1)

        def of(piece: slice) -> Divergence:
            divergence = None if reading is None else reading(piece)
            wanted = following[:, piece].flatten()

            def losses(logits: Tensor, rows: slice) -> Tensor:
                kl = divergence(logits, rows) if divergence is not None else torch.zeros((), device=logits.device)
                if not weight:
                    return kl
                targets = wanted[rows].to(logits.device)
                return (1 - weight) * kl + weight * scale * F.cross_entropy(logits.float(), targets, reduction="none")

            return losses

        return of


def _empty_cache(model: Any) -> Cache:
    return prepare_cache(model, DynamicCache(config=model.config))


@torch.no_grad()
def _check_memory(model: nn.Module, body: Callable[..., Tensor], sample: Tensor) -> None:
    """Raise unless a cache carries all that ``model`` remembers from one piece of ``sample`` to the next."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise UnsupportedError(
            "segment: layers that checkpoint their activations read no cache; call gradient_checkpointing_disable(), "
            "and choose a segment whose activations fit."
        )
    cache = _empty_cache(model)
    for piece in sample.split(max(1, sample.shape[1] // 2), 1):
        body(piece, cache)
        detach(cache)
    layer: Any
    for index, layer in enumerate(decoder_cache(cache).layers):
        if layer.get_seq_length() != sample.shape[1]:
            raise UnsupportedError(
                f"segment: layer {index} of {type(model).__name__} remembers {int(layer.get_seq_length())} of "
                f"{sample.shape[1]} tokens in its cache; train it on whole windows, with segment=0."
            )


@contextlib.contextmanager
def _low_rank(model: Any, paths: tuple[str, ...], stage: Logits) -> Iterator[None]:
    """Low-rank updates on the linear layers of the attention at ``paths``: merged at the end, or dropped."""
    try:
        import peft
    except ImportError as error:
        raise OptionError("train: 'lora' needs the package peft; pip install 'linattn[peft]'.") from error
    flags = [(p, p.requires_grad) for p in model.parameters()]
    linear = [n for n, m in model.named_modules() if n.startswith(paths) and isinstance(m, nn.Linear)]
    config = peft.LoraConfig(r=stage.lora_rank, lora_alpha=stage.lora_alpha, target_modules=linear)
    with own_randomness(model, stage.seed, "lora"):
        adapted = peft.get_peft_model(model, config)
    try:
        yield
    except BaseException:
        adapted.unload()
        raise
    else:
        adapted.merge_and_unload()
    finally:
        for p, required in flags:
            p.requires_grad_(required)
