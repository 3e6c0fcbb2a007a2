"""The words that the parts add to a verdict."""

from __future__ import annotations

import pytest

from linattn.audit.sentences import part_sentences


def kl(mean, stack=None):
    return {"beyond_reach": {"mean": mean}, "beyond_stack": None if stack is None else {"mean": stack}}


def past(**models):
    return {"reach": 10, "counterfactual": {"stacked_reach": 17, "models": models}}


def test_another_past():
    (says,) = part_sentences(past(student=kl(0.02), teacher=kl(0.3), far_off=kl(0.001)))
    assert "further back than 10 tokens changes its predictions by 0.02 nats (KL), its teacher's by 0.3 nats" in says
    assert says.endswith("those of its windows alone by 0.001 nats.")
    for stack, words in ((0.0, "changes them not at all, its teacher's by 0.2."), (0.05, "changes them by 0.05 nats")):
        _, says = part_sentences(past(student=kl(0.02, stack), teacher=kl(0.3, 0.2), far_off=kl(0.001, 0.0)))
        assert "Further back than 17 tokens" in says
        assert words in says
    _, says = part_sentences(past(student=kl(0.02, 0.05), teacher=kl(0.3, 0.2), far_off=kl(0.001, 0.01)))
    assert "by 0.05 nats (by 0.01 without the far branch, through layers kept softmax), its teacher's" in says
    nothing = {"beyond_reach": None, "beyond_stack": None}
    assert part_sentences(past(student=nothing, teacher=nothing, far_off=nothing)) == []


def test_far_mass():
    masses = [((0.2, 0.4), (0.5, 0.5)), ((0.0, 0.02), (0.2, 0.4)), ((0.03, 0.03), (0.3, 0.3))]
    layers = [{"far_mass": [*a], "teacher_far_mass": [*b]} for a, b in masses]
    (says,) = part_sentences({"reach": 10, "telemetry": {"layers": layers}})
    assert "Of its attention 11.3% goes beyond window and sinks, of its teacher's 36.7%" in says
    assert "in 1 of 3 converted layers" in says


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ((1.0, 0.995), "it says what it says without: read 64 tokens at a time"),
        ((1.0, 1.0), "it says what it says without: read token by token, its most likely token is that"),
        ((1.0, 0.98), "Its cache changes what it says: read 64 tokens at a time"),
    ],
)
def test_cache(student, says):
    checks = [{"chunk": chunk, "agree": agree} for chunk, agree in zip((1, 64), student, strict=True)]
    (sentence,) = part_sentences({"reach": 10, "cache": {"student": checks, "teacher": checks[:1]}})
    assert says in sentence
    assert "its teacher's at 100.0%" in sentence


def recalled(*rows, task="passkey", chance=0.0):
    return [dict(zip(("distance", "found", "prompts"), row, strict=True), task=task, chance=chance) for row in rows]


def test_recall_pools_the_distances_beyond_reach():
    found = {
        "student": recalled((5, 16, 16), (20, 8, 16), (40, 4, 16)),
        "teacher": recalled((5, 16, 16), (20, 16, 16), (40, 16, 16)),
        "control": recalled((5, 16, 16), (20, 0, 16), (40, 0, 16)),
    }
    (says,) = part_sentences({"reach": 10, "recall": found})
    assert "Task passkey: beyond 10 tokens it recalls 0.38 ± 0.08, its teacher 1.00 ± 0.03" in says
    assert says.endswith("the untrained window of equal bytes 0.00 ± 0.03.")
    # Every task has a sentence.
    both = {name: rows + recalled((20, 1, 2), task="needle") for name, rows in found.items()}
    assert [says.split(":")[0] for says in part_sentences({"reach": 10, "recall": both})] == [
        "Task passkey",
        "Task needle",
    ]


def test_recall_that_says_nothing_is_said_to():
    guesses = {name: recalled((20, 5, 16), chance=0.25) for name in ("student", "teacher")}
    (says,) = part_sentences({"reach": 10, "recall": guesses})
    assert "a guess 0.25" in says
    assert says.endswith("this says nothing of the conversion.")
    near = {name: recalled((5, 16, 16)) for name in ("student", "teacher")}
    assert part_sentences({"reach": 10, "recall": near}) == [
        "Task passkey: 1.00 ± 0.05 recalled, at distances of at most 10 tokens only."
    ]


def test_speed():
    rows = {
        "teacher": [{"length": 256, "ms": 1.0}, {"length": 4096, "ms": 3.0}],
        "student": [{"length": 256, "ms": 2.0}, {"length": 4096, "ms": 2.0}],
    }
    (says,) = part_sentences({"reach": 10, "speed": rows | {"faster_from": 4096}})
    assert "faster than its teacher's from 4096 tokens on, of the lengths measured: 2 ms against 3 ms" in says
    (says,) = part_sentences({"reach": 10, "speed": rows | {"faster_from": None}})
    assert "not faster than its teacher's at the longest text measured" in says
