"""Tokens to distill on: one long array in a ``.npy`` file, read in windows by number."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linattn._modes import evaluating
from linattn.distill.engine import Batch, derived_seed, own_randomness, write_atomically
from linattn.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

PASSAGES = (16, 128)
"""Fewest and most tokens of a passage said again."""


class Windows:
    """Windows of T tokens out of one long array, without end and by number: a run resumes by knowing its step.

    An epoch cuts the array into disjoint windows from an offset drawn for that epoch and hands them out in an order
    drawn for it, so the next one cuts elsewhere. A document may begin and end within a window: nothing is padded.

    Args:
        tokens: ``[N]`` token ids, or the ``.npy`` file of them that :func:`pack` or :func:`sample_from_teacher` wrote,
            which is mapped into memory, not read.
        length: tokens T of a window.
        seed: of offsets and orders; None is the array's own order, always cut from its start.
        repeats: part of a window's tokens, below 1, that are replaced by passages of :data:`PASSAGES` tokens copied
            from anywhere before them in the window, each window in its own way. Only a memory that keeps tokens apart
            foretells a passage said again, and plain text seldom asks for one.

    Raises:
        CheckpointError: there is no such file.
        OptionError: the array is no list of token ids, or shorter than a window; or ``repeats`` is no such part.
    """

    def __init__(
        self,
        tokens: np.ndarray | Tensor | str | os.PathLike[str],
        length: int,
        *,
        seed: int | None = 0,
        repeats: float = 0.0,
    ) -> None:
        if isinstance(tokens, str | os.PathLike):
            try:
                array: np.ndarray = np.load(tokens, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{tokens}: no file of tokens there ({error}); write one with linattn.distill.data.pack."
                ) from error
        else:
            array = np.asarray(tokens)
        self.tokens = array
        self.length, self.seed, self.repeats = length, seed, repeats
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise OptionError(f"tokens: got {self.tokens.dtype} {self.tokens.shape}, expected [N] integer token ids.")
        if not 1 <= length <= len(self.tokens):
            raise OptionError(f"length: got {length!r}, expected 1 … {len(self.tokens)}, the number of tokens.")
        if not 0 <= repeats < 1:
            raise OptionError(f"repeats: got {repeats!r}, expected a part of the tokens: 0 ≤ repeats < 1.")

    def __len__(self) -> int:
        """Windows an epoch: one fewer than fit where the offset needs the room."""
        fit, rest = divmod(len(self.tokens), self.length)
        return fit if self.seed is None or fit == 1 or rest == self.length - 1 else fit - 1

    def __getitem__(self, index: int) -> Tensor:
        """``[T]`` int64, the window of any number ≥ 0."""
        epoch, position = divmod(index, len(self))
        offset = 0
        if self.seed is not None:
            offset, order = _epoch(self.seed, epoch, len(self), len(self.tokens) - len(self) * self.length, self.length)
            position = int(order[position])
        start = offset + position * self.length
        window = self.tokens[start : start + self.length].astype(np.int64)
        if self.repeats:
            _say_again(window, self.repeats, np.random.default_rng(derived_seed(self.seed or 0, "repeats", index)))
        return torch.from_numpy(window)

    def batches(self, rows: int, *, rank: int = 0, processes: int = 1) -> Callable[[int], Batch]:
        """Batches by number, of ``rows`` windows each; processes take turns."""

        def batch(index: int) -> Batch:
            first = (index * processes + rank) * rows
            windows = tuple(range(first, first + rows))
            return Batch(torch.stack([self[window] for window in windows]), windows)

        return batch


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, count: int, room: int, length: int) -> tuple[int, np.ndarray]:
    """Offset of the first window, among those that leave room for the last, and the order of the windows."""
    draw = np.random.default_rng(derived_seed(seed, "epoch", epoch))
    return int(draw.integers(min(room, length - 1) + 1)), draw.permutation(count)


def _say_again(window: np.ndarray, part: float, draw: np.random.Generator) -> None:
    """Overwrite ``part`` of a window, in place and from left to right, by passages that stand before them in it."""
    low, high = PASSAGES
    at = 0
    while True:
        size = int(low * (high / low) ** draw.random())
        at = max(at + round(draw.exponential(size * (1 - part) / part)), size)
        if at + size > len(window):
            return
        start = draw.integers(at - size + 1)
        window[at : at + size] = window[start : start + size]
        at += size


def read_texts(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], field: str = "text") -> Iterator[str]:
    """The texts of JSON lines files, in order: the string ``field`` of each line's object.

    Raises:
        OptionError: a line is no such object; the message names file and line.
    """
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)[field]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise OptionError(
                        f"{path}:{number}: expected a JSON object with the field {field!r}: {error!r}."
                    ) from error
                if not isinstance(text, str):
                    raise OptionError(f"{path}:{number}: {field!r} is {type(text).__name__}, expected a string.")
                yield text


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, out: str | os.PathLike[str]) -> int:
    """Write texts as one array of token ids: each text, then the tokenizer's end-of-sequence token, without padding.

    Args:
        texts: in this order; :func:`read_texts` reads them from JSON lines.
        tokenizer: called without special tokens.
        out: the ``.npy`` file to write: uint16 where the vocabulary fits, else uint32.

    Returns:
        The number of tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"] + end) for text in texts]
    return save_tokens(parts, out, vocabulary=len(tokenizer))


def save_tokens(parts: Sequence[np.ndarray], out: str | os.PathLike[str], *, vocabulary: int) -> int:
    """Write the concatenated ``parts`` to a ``.npy`` file whole or not at all; returns the number of tokens."""
    if not sum(map(len, parts)):
        raise OptionError("texts: there are none, or they hold no tokens.")
    tokens = np.concatenate([part.astype(np.uint16 if vocabulary <= 2**16 else np.uint32) for part in parts])

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, tokens, allow_pickle=False)

    write_atomically(Path(out), write)
    return len(tokens)


@torch.no_grad()
def sample_from_teacher(
    model: PreTrainedModel,
    tokens: int,
    out: str | os.PathLike[str],
    *,
    length: int = 2048,
    rows: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """Write text that the teacher itself says: where its training data cannot be had, its own words stand in for it.

    Each sample is drawn with a cache from the beginning-of-sequence token, or from a prompt, to the end of sequence or
    to ``length`` tokens. (Data-free distillation on the teacher's samples: Liu et al. 2023, arXiv:2305.17888.)

    Args:
        model: the teacher, or any causal model that generates.
        tokens: how many to write, at least; the last samples are written whole.
        out: the ``.npy`` file to write, as :func:`pack` does.
        length: most tokens of a sample, its prompt included. rows: samples drawn at once.
        temperature: of the softmax. top_p: mass of the likeliest tokens that are drawn from.
        prompts: token ids that samples begin with, in turn; those drawn together must be of one length. Default the
            beginning-of-sequence token alone.
        seed: of the draws.
        progress: called with (tokens so far, tokens in all).

    Returns:
        The number of tokens written.

    Raises:
        OptionError: an option is outside its domain, or the model names no beginning-of-sequence token.
    """
    from transformers import GenerationConfig

    config = model.config.get_text_config()
    if prompts is None:
        if config.bos_token_id is None:
            raise OptionError(f"prompts: {type(model).__name__} has no beginning-of-sequence token; pass prompts.")
        prompts = [[config.bos_token_id]]
    if not prompts or not all(0 < len(prompt) < length for prompt in prompts):
        raise OptionError(f"prompts: expected at least one, each of 1 … length − 1 = {length - 1} token ids.")
    if tokens < 1 or rows < 1 or not temperature > 0 or not 0 < top_p <= 1:
        raise OptionError(
            f"tokens={tokens}, rows={rows}, temperature={temperature}, top_p={top_p}: expected tokens ≥ 1, rows ≥ 1, "
            "temperature > 0 and 0 < top_p ≤ 1."
        )
    end = model.generation_config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0, "repetition_penalty": 1.0}
    how = GenerationConfig(do_sample=True, max_length=length, eos_token_id=end, pad_token_id=0, **sampling)
    device = next(model.parameters()).device
    parts: list[np.ndarray] = []
    written = 0
    with own_randomness(model, seed, "samples"), evaluating(model):
        while written < tokens:
            begun = [list(prompts[(len(parts) + row) % len(prompts)]) for row in range(rows)]
            if len({len(prompt) for prompt in begun}) > 1:
                raise OptionError("prompts: those drawn together differ in length; pass rows=1, or cut them to one.")
            ids = torch.tensor(begun, device=device)
            drawn = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), generation_config=how, use_cache=True
            )
            for sample in drawn.cpu().numpy():
                stops = np.flatnonzero(np.isin(sample[ids.shape[1] :], ends))
                parts.append(sample[: ids.shape[1] + stops[0] + 1] if len(stops) else sample)
                written += len(parts[-1])
            if progress is not None:
                progress(min(written, tokens), tokens)
    return save_tokens(parts, out, vocabulary=config.vocab_size)
