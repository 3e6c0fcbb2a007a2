"""Windows of tokens by number, text files, and the teacher's own words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from linattn.distill.data import Windows, pack, read_texts, sample_from_teacher
from linattn.errors import CheckpointError, OptionError


class Letters:
    """A tokenizer of one token a letter."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 2**16 + 1 if self.eos_token_id is None else 128

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize("count", [40, 41, 43, 49, 12])
def test_an_epoch_hands_out_disjoint_windows_each_once(count):
    windows = Windows(np.arange(count, dtype=np.uint16), 10, seed=3)
    for epoch in range(6):
        seen = torch.cat([windows[epoch * len(windows) + i] for i in range(len(windows))])
        assert len(seen.unique()) == len(windows) * 10
        for i in range(len(windows)):
            window = windows[epoch * len(windows) + i]
            assert torch.equal(window, window[0] + torch.arange(10))
    assert len(windows) >= count // 10 - 1


def test_epochs_cut_elsewhere_and_seeds_differ():
    tokens = np.arange(1000, dtype=np.uint32)
    windows = Windows(tokens, 10)
    starts = [[int(windows[epoch * len(windows) + i][0]) for i in range(len(windows))] for epoch in range(8)]
    assert len({first[0] % 10 for first in starts}) > 3
    assert all(start != sorted(start) for start in starts)
    assert [int(Windows(tokens, 10, seed=1)[i][0]) for i in range(5)] != starts[0][:5]
    assert [int(Windows(tokens, 10)[i][0]) for i in range(5)] == starts[0][:5]
    assert [int(Windows(tokens, 10, seed=None)[i][0]) for i in (0, 1, 99, 100)] == [0, 10, 990, 0]


@pytest.mark.parametrize("part", [0.1, 0.5])
def test_passages_are_said_again_word_for_word(part):
    length = 4096
    plain = Windows(np.arange(20 * length, dtype=np.uint32), length)
    windows = Windows(plain.tokens, length, repeats=part)
    shares, distances = [], []
    for index in range(16):
        old, new = plain[index], windows[index]
        again = (old != new).nonzero().flatten()  # every token stands once in the plain window
        shares.append(len(again) / length)
        back = again - (new[again] - old[0])
        assert int(back.min()) > 0
        assert set(new.tolist()) <= set(old.tolist())
        # A passage keeps its distance: only where one begins, or copies across another's edge, does it change.
        assert int((back.diff() != 0).sum()) < len(again) / 8
        distances += back.tolist()
    assert sum(shares) / len(shares) == pytest.approx(part, rel=0.25)
    assert max(distances) > length / 2
    assert min(distances) < 512
    assert torch.equal(windows[3], Windows(plain.tokens, length, repeats=part)[3])
    assert not torch.equal(windows[3], Windows(plain.tokens, length, repeats=part, seed=1)[3])
    assert torch.equal(Windows(plain.tokens, 20, repeats=part)[0], Windows(plain.tokens, 20)[0])  # no room for any


def test_batches_of_processes_are_those_of_one():
    windows = Windows(np.arange(100, dtype=np.uint16), 5)
    whole = windows.batches(4)
    for index in range(6):
        parts = [windows.batches(2, rank=rank, processes=2)(index) for rank in range(2)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole(index).tokens)
        assert parts[0].windows + parts[1].windows == whole(index).windows
    assert whole(0).tokens.dtype == torch.int64


def test_texts_become_one_array(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in ("ab", "c")))
    assert list(read_texts([path, path])) == ["ab", "c"] * 2
    out = tmp_path / "tokens.npy"
    assert pack(read_texts(path), Letters(), out) == 5
    assert np.load(out).tolist() == [97, 98, 0, 99, 0]
    assert np.load(out).dtype == np.uint16
    assert Windows(out, 5, seed=None)[0].tolist() == [97, 98, 0, 99, 0]
    wide = Letters()
    wide.eos_token_id = None
    assert pack(["ab", "c"], wide, out) == 3
    assert np.load(out).dtype == np.uint32
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(OptionError, match=r"texts.jsonl:2: .*'text'"):
        list(read_texts(path))
    path.write_text('{"text": 3}\n')
    with pytest.raises(OptionError, match=r"texts.jsonl:1: 'text' is int"):
        list(read_texts(path))
    with pytest.raises(OptionError, match="no tokens"):
        pack([], Letters(), tmp_path / "tokens.npy")
    with pytest.raises(CheckpointError, match="pack"):
        Windows(tmp_path / "nothing.npy", 4)
    with pytest.raises(OptionError, match=r"length.*1 … 3"):
        Windows(np.arange(3), 4)
    with pytest.raises(OptionError, match="float64"):
        Windows(np.ones(5), 4)
    with pytest.raises(OptionError, match="repeats"):
        Windows(np.arange(5), 4, repeats=1.0)


def test_samples_come_from_the_teacher(llama, tmp_path):
    model = llama(gain=1.0)
    with torch.no_grad():  # says 5 after anything, or rarely 7
        model.lm_head.weight.zero_()
        model.lm_head = torch.nn.Linear(32, 61)
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-40.0)
        model.lm_head.bias[5], model.lm_head.bias[7] = 0.0, -1.0
    count = sample_from_teacher(model, 300, tmp_path / "a.npy", length=20, rows=4)
    tokens = np.load(tmp_path / "a.npy")
    assert count == len(tokens) == 320
    samples = tokens.reshape(-1, 20)
    assert (samples[:, 0] == 1).all()
    share = (samples[:, 1:] == 7).mean()
    assert abs(share - 1 / (1 + np.e)) < 0.1
    assert ((samples[:, 1:] == 5) | (samples[:, 1:] == 7)).all()
    sample_from_teacher(model, 300, tmp_path / "b.npy", length=20, rows=4)
    assert np.array_equal(np.load(tmp_path / "b.npy"), tokens)
    sample_from_teacher(model, 300, tmp_path / "c.npy", length=20, rows=4, top_p=0.5)
    assert (np.load(tmp_path / "c.npy").reshape(-1, 20)[:, 1:] == 5).all()
    sample_from_teacher(model, 300, tmp_path / "d.npy", length=20, rows=4, seed=1)
    assert not np.array_equal(np.load(tmp_path / "d.npy"), tokens)


def test_samples_end_where_the_teacher_ends_them(llama, tmp_path):
    model = llama(gain=1.0)
    model.generation_config.eos_token_id = 7
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(32, 61)
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-40.0)
        model.lm_head.bias[5], model.lm_head.bias[7] = 0.0, -1.0
    sample_from_teacher(model, 200, tmp_path / "a.npy", length=30, rows=4, prompts=[[3, 4], [4, 3]])
    tokens = np.load(tmp_path / "a.npy").tolist()
    text = "".join(map(str, tokens))
    samples = [s for s in text.replace("34", "|34").replace("43", "|43").split("|") if s]
    assert {s[:2] for s in samples} == {"34", "43"}
    assert all("7" not in s[:-1] and (s[-1] == "7" or len(s) == 30) for s in samples)
    with pytest.raises(OptionError, match="differ in length"):
        sample_from_teacher(model, 200, tmp_path / "b.npy", length=30, prompts=[[3], [4, 3]])
    with pytest.raises(OptionError, match="top_p"):
        sample_from_teacher(model, 200, tmp_path / "b.npy", top_p=0.0)
    model.config.bos_token_id = None
    with pytest.raises(OptionError, match="pass prompts"):
        sample_from_teacher(model, 200, tmp_path / "b.npy")
