"""Tiny teachers whose attention is far from uniform, and tokens to teach on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], contextlib.AbstractContextManager[None]]:
    """While the context lasts, an objective of this class fails at its fourth step, and what runs it with it."""

    @contextlib.contextmanager
    def during(objective: type) -> Iterator[None]:
        call = objective.__call__

        def breaking(self: Any, batch: Any) -> Any:
            if batch.step == 3:
                raise RuntimeError("the power is gone")
            return call(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(objective, "__call__", breaking)
            with pytest.raises(RuntimeError, match="power"):
                yield

    return during


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, VOCABULARY, 2000).astype(np.uint16))
    return path
