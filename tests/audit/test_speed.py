"""Decoding time and bytes: what is timed is what is said, and the crossover is where it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from linattn import convert_model
from linattn.audit import decode_speed, faster_from, speed, state_bytes
from linattn.audit.speed import DecodeSpeed
from linattn.errors import OptionError, ShapeError


@pytest.mark.parametrize("converted", [False, True])
def test_steps_follow_the_text_at_each_length(llama, windows, monkeypatch, converted):
    model, text, reports = llama(), windows(1, 30)[0], []
    if converted:
        model = convert_model(model, window=5, sinks=2)
    steps, forward = [], type(model).forward

    def counted(self, ids, past_key_values, **options):
        steps.append((ids.tolist(), past_key_values.get_seq_length()))
        return forward(self, ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    found = decode_speed(model, text, lengths=(8, 40), steps=2, batch=2, progress=lambda *r: reports.append(r))
    wanted = [at for length in (8, 40) for at in range(length, length + 5)]
    assert steps == [([[text[at % 30].item()]] * 2, at) for at in wanted]
    assert reports == [(1, 2), (2, 2)]
    for at in found:
        assert at.steps == 2
        assert 0 < at.fastest <= at.ms <= at.slowest
        assert at.bytes == 2 * state_bytes(model, at.length).total


def test_times_are_those_of_the_steps_after_the_warm_up(llama, windows, monkeypatch):
    took = [9.0, 8.0, 7.0, 0.004, 0.001, 0.002]  # seconds of each step, the first three to warm up
    clock = [t for start, each in enumerate(took) for t in (100.0 * start, 100.0 * start + each)]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=iter(clock).__next__))
    (at,) = decode_speed(llama(), windows()[0], lengths=[8], steps=3)
    assert (at.ms, at.fastest, at.slowest) == pytest.approx((2.0, 1.0, 4.0))


def measured(*ms: float) -> list[DecodeSpeed]:
    return [DecodeSpeed(2**i, each, each, each, 9, 0) for i, each in enumerate(ms)]


@pytest.mark.parametrize(
    ("student", "first"),
    [((5, 5, 5), None), ((1, 3, 5), None), ((5, 1, 1), 2), ((5, 5, 1), 4), ((1, 1, 1), 1), ((1, 5, 1), 4)],
)
def test_faster_from(student, first):
    assert faster_from(measured(2, 3, 4), measured(*student)) == first


def test_refusals(llama, windows):
    for lengths in ((), (0,), (8, 12), (40, 8)):
        with pytest.raises(OptionError, match="lengths"):
            decode_speed(llama(), windows()[0], lengths=lengths, steps=2)
    with pytest.raises(OptionError, match="steps=0"):
        decode_speed(llama(), windows()[0], lengths=[8], steps=0)
    with pytest.raises(ShapeError, match="expected \\[T\\]"):
        decode_speed(llama(), windows(), lengths=[8])
    with pytest.raises(OptionError, match="same lengths"):
        faster_from(measured(1), measured(1, 2))
    with pytest.raises(OptionError, match="same lengths"):
        faster_from(measured(1), [measured(1)[0]._replace(length=torch.iinfo(torch.int32).max)])
