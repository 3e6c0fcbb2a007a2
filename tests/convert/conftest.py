"""Tiny random models: weights large enough that attention is far from uniform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model.eval()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    def make(layers: int = 3, seed: int = 0, **options: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
        heads = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
        tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        return sharpen(LlamaForCausalLM(LlamaConfig(**(sizes | heads | tokens | options))))

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
