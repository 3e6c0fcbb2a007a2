"""Recall by distance: what a model still finds in its memory of a long prompt, by generation with the cache."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from linattn._modes import evaluating
from linattn.audit.memory import empty_cache, read_into
from linattn.audit.positions import Progress
from linattn.errors import DtypeError, OptionError, ShapeError

TOKENS_AT_ONCE, ON_A_GPU = 2**14, 2**17
"""Tokens of prompts that are read at once: many rows cost a GPU hardly more time than one."""
MOST_RIVALS = 31
"""Wrong answers that a prompt comes with."""
CITIES = ("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Cairo", "Tokyo", "Lima", "Boston", "Delhi")


class RecallTask(NamedTuple):
    """A fact stated in a long text, and a question about it at the end.

    Attributes:
        name: of the task.
        statement: (key, value) to the token ids that state the fact.
        ask: (key, value) to the token ids of the question, with which the prompt ends, and of its answer.
        keys, values: how many of each there are; tasks are given them as integers from 0 on.
        others: statements of other facts in the same prompt; None for as many as fit, instead of other text.
    """

    name: str
    statement: Callable[[int, int], Sequence[int]]
    ask: Callable[[int, int], tuple[Sequence[int], Sequence[int]]]
    keys: int = 1
    values: int = 90000
    others: int | None = 0


class RecallPrompt(NamedTuple):
    """A prompt ``context + question``, its answer, and (question, answer) of wrong ones, those in the context first.

    The statement asked for ends ``distance`` tokens before the end of the prompt.
    """

    context: list[int]
    question: list[int]
    answer: list[int]
    rivals: list[tuple[list[int], list[int]]]


class Recall(NamedTuple):
    """How many of ``prompts`` prompts of a task a model answered, its fact ``distance`` tokens before the answer.

    Attributes:
        chance: rate of a model that guesses.
    """

    task: str
    distance: int
    found: int
    prompts: int
    chance: float

    @property
    def rate(self) -> float:
        return self.found / self.prompts

    @property
    def standard_error(self) -> float:
        """Of ``rate``, from one success and one failure more than there were: not zero where all or none succeed."""
        p = (self.found + 1) / (self.prompts + 2)
        return math.sqrt(p * (1 - p) / (self.prompts + 2))

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "rate": self.rate, "standard_error": self.standard_error}


def text_tasks(encode: Callable[[str], Sequence[int]]) -> tuple[RecallTask, ...]:
    """Passkey, multi-key needle and key–value lookup in words.

    - ``passkey``: one number in a text.
    - ``needle``: the numbers of four cities in a text, one of which is asked for.
    - ``lookup``: nothing but numbered entries, one of which is asked for.

    Args:
        encode: text to token ids, without special tokens: ``lambda text: tokenizer.encode(text,
            add_special_tokens=False)``.
    """

    def task(name: str, states: str, asks: str, names: Sequence[str], others: int | None) -> RecallTask:
        def statement(key: int, value: int) -> Sequence[int]:
            return encode(states.format(key=names[key], value=value + 10000))

        def ask(key: int, value: int) -> tuple[Sequence[int], Sequence[int]]:
            # Tokens do not always break where the answer begins: what question and answer share is the question.
            question = encode(asks.format(key=names[key]))
            whole = encode(asks.format(key=names[key]) + f" {value + 10000}")
            shared = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
            return whole[:shared], whole[shared:]

        return RecallTask(name, statement, ask, keys=len(names), others=others)

    return (
        task("passkey", "\nThe pass key is {value}. Remember it.\n", "\nThe pass key is", [""], 0),
        task("needle", "\nThe number of {key} is {value}.\n", "\nThe number of {key} is", CITIES, 3),
        task("lookup", "\nEntry {key}: {value}.", "\nEntry {key}:", [str(i) for i in range(1000, 10000)], None),
    )


def make_prompt(
    task: RecallTask, text: Tensor, *, distance: int, lead: int = 128, prefix: Sequence[int] = (), seed: int | str = 0
) -> RecallPrompt:
    """One prompt of ``len(prefix) + lead + distance`` tokens, the same for the same seed.

    Args:
        task: what is stated and asked.
        text: ``[T]`` token ids that fill the space between statements, from a random place on, repeated if need be.
        distance: tokens from the end of the statement asked for to the end of the prompt, the question's included.
        lead: tokens before that, the statement's included. prefix: tokens that stand first, such as the one that
            begins a text.
        seed: of the keys, the values and the places.

    Raises:
        OptionError: the question does not fit into ``distance``, or the statements into ``lead`` and ``distance``.
    """
    rng = random.Random(str(seed))
    count = 1 + (lead + distance if task.others is None else task.others)
    if task.others is None:
        count = min(count, task.keys, task.values)
    elif count > min(task.keys, task.values):
        raise OptionError(f"task {task.name!r}: {count} statements need as many keys and values.")
    keys, values = rng.sample(range(task.keys), count), rng.sample(range(task.values), count)
    question, answer = (list(ids) for ids in task.ask(keys[0], values[0]))
    needle = list(task.statement(keys[0], values[0]))
    room = [lead - len(needle), distance - len(question)]
    if min(room) < 0:
        raise OptionError(
            f"lead={lead}, distance={distance}: task {task.name!r} needs at least {len(needle)} tokens for its "
            f"statement and {len(question)} for its question."
        )
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    for key, value in zip(keys[1:], values[1:], strict=True):
        statement = list(task.statement(key, value))
        fits = [side for side in (0, 1) if len(statement) <= room[side]]
        if not fits:
            if task.others is None:
                break
            raise OptionError(f"lead={lead}, distance={distance}: too short for {count} statements of {task.name!r}.")
        # By the room there is: the fact asked for is neither always the first nor always the last.
        side = fits[0] if len(fits) == 1 else rng.choices((0, 1), room)[0]
        sides[side].append(statement)
        room[side] -= len(statement)
    before, after = (_filled(s, text, r, rng, dense=task.others is None) for s, r in zip(sides, room, strict=True))
    wrong = [*values[1:], *_unused(task.values, values, rng)][:MOST_RIVALS]
    rivals = [(list(asked), list(told)) for asked, told in (task.ask(keys[0], value) for value in wrong)]
    return RecallPrompt([*prefix, *before, *needle, *after], question, answer, rivals)


def _unused(count: int, taken: Sequence[int], rng: random.Random) -> list[int]:
    """Some more values, none of them taken."""
    drawn = rng.sample(range(count), min(count, MOST_RIVALS + len(taken)))
    return [value for value in drawn if value not in set(taken)]


def _filled(statements: list[list[int]], text: Tensor, room: int, rng: random.Random, *, dense: bool) -> list[int]:
    """The statements in order, with ``room`` tokens of text around them; in a dense list, before them."""
    start = rng.randrange(len(text))
    filler = text[(start + torch.arange(room)) % len(text)].tolist()
    cuts = [room] * len(statements) if dense else sorted(rng.randint(0, room) for _ in statements)
    parts: list[int] = []
    at = 0
    for cut, statement in zip(cuts, statements, strict=True):
        parts += filler[at:cut] + statement
        at = cut
    return parts + filler[at:]


@torch.no_grad()
def recall_by_distance(
    model: PreTrainedModel,
    tasks: Sequence[RecallTask],
    text: Tensor,
    *,
    distances: Sequence[int],
    prompts: int = 16,
    candidates: int = 0,
    lead: int = 128,
    prefix: Sequence[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Recall]:
    """How often a model recalls a fact that stands a number of tokens back, by task and distance.

    The prompt is read into the cache and the answer generated from it, greedily: what the model does in use. A small
    model may know an answer that it does not say; with ``candidates``, the answer counts as found where it is the most
    likely of so many, those that stand in the prompt among them.

    Args:
        model: a causal model, converted or not.
        tasks: of :func:`text_tasks`, or your own in token ids.
        text: ``[T]`` token ids that fill the prompts; of another text than the facts.
        distances: in tokens; see :func:`make_prompt`. Beyond ``window + sinks`` the fact is in the far branch or
            retained, beyond layers × window nowhere else.
        prompts: of each task at each distance. The same seed gives all models the same ones.
        candidates: 0 to generate; ≥ 2 to rank so many answers by their log-likelihood.
        lead, prefix, seed: see :func:`make_prompt`. The statement should stand behind the sinks.
        progress: called with (prompts done, prompts in all).

    Raises:
        DtypeError, ShapeError: ``text`` is no ``[T]`` tensor of token ids.
        OptionError: no tasks, distances or prompts; ``candidates`` is 1 or more than there are; or see
            :func:`make_prompt`.
    """
    if text.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"text: got {text.dtype}, expected int64 token ids.")
    if text.ndim != 1 or not len(text):
        raise ShapeError(f"text: got shape {tuple(text.shape)}, expected [T] with T ≥ 1.")
    if not tasks or not distances or prompts < 1:
        raise OptionError(f"{len(tasks)} tasks, {len(distances)} distances, prompts={prompts}: expected one or more.")
    if candidates and not 2 <= candidates <= MOST_RIVALS + 1:
        raise OptionError(f"candidates={candidates}: expected 0, or 2 … {MOST_RIVALS + 1}.")
    found = []
    cells = [(task, distance) for task in tasks for distance in distances]
    with evaluating(model):
        for done, (task, distance) in enumerate(cells):
            made = [
                make_prompt(
                    task, text, distance=distance, lead=lead, prefix=prefix, seed=f"{seed} {task.name} {distance} {i}"
                )
                for i in range(prompts)
            ]
            if candidates:
                if len(made[0].rivals) < candidates - 1:
                    raise OptionError(f"candidates={candidates}: task {task.name!r} has {task.values} values.")
                right = sum(_ranks_first(model, prompt, candidates) for prompt in made)
            else:
                right = sum(_generates(model, made))
            found.append(Recall(task.name, distance, right, prompts, 1 / candidates if candidates else 0.0))
            if progress is not None:
                progress((done + 1) * prompts, len(cells) * prompts)
    return found


def _generates(model: PreTrainedModel, prompts: list[RecallPrompt]) -> Iterator[bool]:
    """Whether each prompt is continued with its answer. All are of one length."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.context + prompt.question for prompt in prompts])
    rows = max(1, (TOKENS_AT_ONCE if device.type == "cpu" else ON_A_GPU) // ids.shape[1])
    longest = max(len(prompt.answer) for prompt in prompts)
    with _greedy(model, longest) as generate:
        for start in range(0, len(ids), rows):
            part = ids[start : start + rows].to(device)
            said = generate(part, attention_mask=torch.ones_like(part))[:, ids.shape[1] :].tolist()
            for prompt, new in zip(prompts[start : start + rows], said, strict=True):
                yield new[: len(prompt.answer)] == prompt.answer


@contextlib.contextmanager
def _greedy(model: PreTrainedModel, tokens: int) -> Iterator[Callable[..., Tensor]]:
    """``model.generate`` for ``tokens`` most likely tokens, whatever penalties and samplers the model comes with."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=None if own is None else own.eos_token_id,
        pad_token_id=0,
    )
    try:
        yield cast(Callable[..., Tensor], model.generate)
    finally:
        model.generation_config = own


def _ranks_first(model: PreTrainedModel, prompt: RecallPrompt, candidates: int) -> bool:
    """Whether the answer is more likely than ``candidates − 1`` others, each read after the same cached context."""
    device = next(model.parameters()).device
    endings = [q + a for q, a in [(prompt.question, prompt.answer), *prompt.rivals[: candidates - 1]]]
    *context, last = prompt.context
    cache = empty_cache(model)
    read_into(model, cache, torch.tensor([context], device=device))
    cache.batch_repeat_interleave(candidates)
    longest = max(map(len, endings))
    ids = torch.tensor([[last, *ending] + [0] * (longest - len(ending)) for ending in endings], device=device)
    logits = model(ids, past_key_values=cache, use_cache=True).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    there = torch.arange(longest, device=device) < torch.tensor([[len(ending)] for ending in endings], device=device)
    scores = -(losses * there).sum(1)
    return bool((scores[0] > scores[1:]).all())
