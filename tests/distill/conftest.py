"""Tiny teachers whose attention is far from uniform, and tokens to teach on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()

VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1}
SIZES |= {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def make(gain: float = 6.0, **options: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(SIZES | options))).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(gain) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
        return model

    return make


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, VOCABULARY, 2000).astype(np.uint16))
    return path
