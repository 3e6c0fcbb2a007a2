"""Tiny models whose attention is far from uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()

VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def make(**options: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(SIZES | options))).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(6) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
        return model

    return make


@pytest.fixture
def windows() -> Callable[..., Tensor]:
    def make(count: int = 3, length: int = 40) -> Tensor:
        return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))

    return make
