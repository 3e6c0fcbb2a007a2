"""Recall: prompts are what they say, answers are counted right, by generation and by rank."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from linattn import convert_model
from linattn.audit import Recall, RecallTask, make_prompt, recall_by_distance, text_tasks
from linattn.errors import DtypeError, OptionError, ShapeError

TEXT = torch.arange(3, 9)  # token ids 3 … 8 are text
MARK, ASK = 1, 2


def task(**options):
    """Statements ``1 key value value+1``, asked as ``2 key``: keys are ids from 10 on, values from 30 on."""
    statement = lambda key, value: [MARK, 10 + key, 30 + value, 31 + value]  # noqa: E731
    ask = lambda key, value: ([ASK, 10 + key], [30 + value, 31 + value])  # noqa: E731
    return RecallTask("facts", statement, ask, **({"keys": 15, "values": 30} | options))


def facts(context):
    """Key, value and end of every statement of a prompt."""
    starts = [i for i, token in enumerate(context) if token == MARK]
    assert all(context[i + 3] == context[i + 2] + 1 for i in starts)
    return [(context[i + 1], context[i + 2], i + 4) for i in starts]


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("distance", [12, 40])
def test_a_prompt_states_the_fact_at_its_distance(others, distance):
    places = []
    for seed in range(50):
        prompt = make_prompt(task(others=others), TEXT, distance=distance, lead=20, prefix=[60], seed=seed)
        whole = prompt.context + prompt.question
        assert len(whole) == 1 + 20 + distance
        assert whole[0] == 60
        stated = facts(prompt.context)
        assert len(stated) == len({key for key, *_ in stated}) == len({value for _, value, _ in stated}) == 1 + others
        key = prompt.question[1]
        (mine,) = [fact for fact in stated if fact[0] == key]
        assert (prompt.answer, mine[2]) == ([mine[1], mine[1] + 1], len(whole) - distance)
        text = [token for token in prompt.context if 3 <= token < 9]
        assert len(text) == 20 + distance - 2 - 4 * (1 + others)
        wrong = [answer[0] for _, answer in prompt.rivals]
        assert len(set(wrong)) == len(wrong) == 29
        assert {value for _, value, _ in stated} <= {*wrong[:others], prompt.answer[0]}
        assert all(question == prompt.question for question, _ in prompt.rivals)
        places.append(stated.index(mine))
    after = (distance - 2) // 4  # statements that fit behind the one asked for
    assert set(places) == set(range(max(0, others - after), 1 + others))


def test_a_lookup_is_all_statements():
    prompt = make_prompt(task(others=None), TEXT, distance=30, lead=14)
    assert len(facts(prompt.context)) == 3 + 7
    assert sum(3 <= token < 9 for token in prompt.context) == 14 % 4 + (30 - 2) % 4


def test_prompts_are_a_function_of_the_seed():
    made = [make_prompt(task(others=3), TEXT, distance=40, lead=20, seed=seed) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_text_tasks_are_what_they_say():
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    text = torch.tensor(encode("lorem ipsum "))
    for asked in text_tasks(encode):
        prompt = make_prompt(asked, text, distance=400, lead=200)
        whole, answer = decode(prompt.context + prompt.question), decode(prompt.answer)
        assert len(answer) == 6
        question = decode(prompt.question).strip()
        assert whole.endswith(question)
        assert question + answer in whole[-450:-400]  # stated in the words of the question
        assert whole.count(answer) == 1
        numbers = {"passkey": 1, "needle": 4}
        if asked.name in numbers:
            assert sum(word.strip(".").isdigit() for word in whole.split()) == numbers[asked.name]
        else:
            assert whole.count("Entry") > 20


def test_where_tokens_join_question_and_answer_what_they_share_is_asked():
    joined = lambda text: [len(word) for word in text.replace("is 1", "is-1").split()]  # noqa: E731
    question, answer = text_tasks(joined)[0].ask(0, 5)
    assert [*question, *answer] == [3, 4, 3, 8]
    assert len(answer) == 1


class Reader(nn.Module):
    """Finds the last statement of the key asked for among the last ``reach`` tokens; else it says 9."""

    def __init__(self, reach: int, second: int = 1) -> None:
        super().__init__()
        self.second = second
        self.reach, self.weight = reach, nn.Parameter(torch.zeros(1))
        self.generation_config = SimpleNamespace(eos_token_id=0)

    def generate(self, ids, attention_mask):
        assert attention_mask.all()
        assert not self.training
        said = []
        for row in ids.tolist():
            known = {key: value for key, value, end in facts(row[:-2]) if len(row) - end < self.reach}
            value = known.get(row[-1], 8)
            said.append([*row, value, value + self.second])
        return torch.tensor(said)


def test_generation_finds_what_the_model_remembers():
    reports = []
    found = recall_by_distance(
        Reader(reach=30),
        [task(others=3), task(others=None)._replace(name="lookup", keys=30)],
        TEXT,
        distances=(29, 30, 80),
        prompts=5,
        lead=20,
        progress=lambda *report: reports.append(report),
    )
    assert [(each.task, each.distance, each.rate) for each in found] == [
        ("facts", 29, 1.0),
        ("facts", 30, 0.0),
        ("facts", 80, 0.0),
        ("lookup", 29, 1.0),
        ("lookup", 30, 0.0),
        ("lookup", 80, 0.0),
    ]
    assert reports == [(5 * i, 30) for i in range(1, 7)]


def test_half_an_answer_is_none():
    (found,) = recall_by_distance(Reader(reach=99, second=2), [task()], TEXT, distances=[20], prompts=4, lead=20)
    assert found.found == 0


def test_standard_errors():
    half, none = Recall("t", 1, 8, 16, 0.0), Recall("t", 1, 0, 16, 0.0)
    assert half.standard_error == pytest.approx(math.sqrt(0.25 / 18))
    assert none.rate == 0
    assert none.standard_error == pytest.approx(math.sqrt(1 / 18 * 17 / 18 / 18))
    assert half.as_dict() == {**half._asdict(), "rate": 0.5, "standard_error": half.standard_error}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("candidates", [0, 4])
def test_answers_of_a_model_are_those_of_its_full_forward_pass(llama, converted, candidates):
    model = llama()
    if converted:
        model = convert_model(model, window=6, sinks=2)
    options = {"distance": 40, "lead": 20, "prefix": [60]}
    count, right = 24, 0
    # One value in three is the right one by chance, which a random model does not miss in all prompts.
    asked = task(others=1, values=3 if not candidates else 30)
    asked = asked._replace(ask=lambda key, value: ([ASK, 10 + key], [30 + value]))
    with torch.no_grad():
        if not candidates:  # a model that answers with one of the values, whatever else it thinks
            bias = torch.full((61,), -1e4)
            bias[30:33] = 0
            model.lm_head = nn.Linear(32, 61)
            model.lm_head.weight.copy_(torch.randn(61, 32))
            model.lm_head.bias.copy_(bias)
        for i in range(count):
            prompt = make_prompt(asked, TEXT, seed=f"3 facts 40 {i}", **options)
            if candidates:
                endings = [(prompt.question, prompt.answer), *prompt.rivals[: candidates - 1]]
                likely = [
                    model(torch.tensor([prompt.context + q]), use_cache=False).logits[0, -1, a] for q, a in endings
                ]
                right += int(torch.cat(likely).argmax()) == 0
            else:
                logits = model(torch.tensor([prompt.context + prompt.question]), use_cache=False).logits[0, -1]
                right += logits.argmax().item() == prompt.answer[0]
    options.pop("distance")
    (found,) = recall_by_distance(
        model, [asked], TEXT, distances=[40], prompts=count, candidates=candidates, seed=3, **options
    )
    assert 0 < right < count
    assert found == Recall("facts", 40, right, count, 1 / candidates if candidates else 0.0)


def test_answers_are_greedy_whatever_the_model_is_set_to(llama, monkeypatch):
    model, said = llama(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: said.append(generate(*a, **k)) or said[-1])
    asked = task()._replace(ask=lambda key, value: ([ASK, 10 + key], [30 + value] * 4))
    recall_by_distance(model, [asked], TEXT, distances=[30], prompts=4, lead=8)
    own = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "repetition_penalty": 50.0}
    model.generation_config.update(**own, no_repeat_ngram_size=1, suppress_tokens=[*range(40)], max_length=7)
    config = model.generation_config
    recall_by_distance(model, [asked], TEXT, distances=[30], prompts=4, lead=8)
    assert torch.equal(*said)
    assert said[0].shape == (4, 8 + 30 + 4)
    assert model.generation_config is config


def test_longer_answers_are_ranked_by_all_their_tokens(llama):
    model = llama()
    asked = task(others=0)._replace(
        ask=lambda key, value: ([ASK, 10 + key], [30 + value % 2, 31 + value, 5][: 2 + value % 2])
    )
    count, right = 16, 0
    with torch.no_grad():
        for i in range(count):
            prompt = make_prompt(asked, TEXT, distance=20, lead=10, seed=f"0 facts 20 {i}")
            scores = []
            for question, answer in [(prompt.question, prompt.answer), *prompt.rivals[:3]]:
                ids = torch.tensor([prompt.context + question + answer])
                logs = model(ids, use_cache=False).logits[0].log_softmax(-1)
                scores.append(sum(logs[-1 - n, ids[0, -n]].item() for n in range(1, len(answer) + 1)))
            right += max(range(4), key=scores.__getitem__) == 0
    (found,) = recall_by_distance(model, [asked], TEXT, distances=[20], prompts=count, lead=10, candidates=4)
    assert found.found == right
    assert right > 0


def test_refusals(llama):
    with pytest.raises(OptionError, match="at least 4 tokens for its statement and 2 for its question"):
        make_prompt(task(), TEXT, distance=1, lead=9)
    with pytest.raises(OptionError, match="too short for 4 statements"):
        make_prompt(task(others=3), TEXT, distance=6, lead=6)
    with pytest.raises(OptionError, match="as many keys and values"):
        make_prompt(task(others=3, keys=2), TEXT, distance=60)
    ask = {"distances": [40], "lead": 9}
    with pytest.raises(OptionError, match="0 tasks"):
        recall_by_distance(llama(), [], TEXT, **ask)
    with pytest.raises(OptionError, match="candidates=1"):
        recall_by_distance(llama(), [task()], TEXT, candidates=1, **ask)
    with pytest.raises(OptionError, match="has 3 values"):
        recall_by_distance(llama(), [task(values=3)], TEXT, candidates=4, **ask)
    with pytest.raises(ShapeError, match="text"):
        recall_by_distance(llama(), [task()], TEXT[None], **ask)
    with pytest.raises(DtypeError, match="text"):
        recall_by_distance(llama(), [task()], TEXT.float(), **ask)
