"""What ``linattn audit`` reads: windows of text files, and the options of its recall tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linattn.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linattn.audit import Recall


def read_windows(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, *, length: int, count: int) -> Tensor:
    """``[count, length]`` tokens: disjoint windows of the texts, one of each in turn, from their beginnings on.

    Raises:
        OSError: a file cannot be read.
        OptionError: the texts hold fewer windows than that.
    """
    import torch

    texts = [
        torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False))
        for path in files
    ]
    cut = [text[: len(text) // length * length].view(-1, length).long() for text in texts]
    turns = max(map(len, cut))
    windows = [each[turn] for turn in range(turns) for each in cut if turn < len(each)][:count]
    if len(windows) < count:
        raise OptionError(
            f"--text: {sum(map(len, texts)):,} tokens in {len(files)} files make {len(windows)} windows of {length} "
            f"tokens, --windows asks for {count}; give more text, or shorter or fewer windows."
        )
    return torch.stack(windows)


def recall_measure(
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    *,
    distances: Sequence[int],
    prompts: int,
    candidates: int,
    seed: int,
) -> Callable[[PreTrainedModel], list[Recall]]:
    """Recall of the standard tasks in the words of ``tokenizer``, with its first special token if it sets one."""
    from linattn.audit import recall_by_distance, text_tasks

    def encode(words: str) -> list[int]:
        return tokenizer.encode(words, add_special_tokens=False)

    first: Any = tokenizer.encode("a")[:1]
    prefix = first if first and first[0] in tokenizer.all_special_ids else []

    def measure(model: PreTrainedModel) -> list[Recall]:
        return recall_by_distance(
            model,
            text_tasks(encode),
            text,
            distances=distances,
            prompts=prompts,
            candidates=candidates,
            prefix=prefix,
            seed=seed,
        )

    return measure


def default_distances(length: int) -> list[int]:
    """A sixteenth and a quarter of the windows' length, and all of it; none so short that no question fits."""
    return sorted({max(32, length // part) for part in (16, 4, 1)})
