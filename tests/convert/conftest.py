"""Tiny random models of every family: weights large enough that attention is far from uniform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linattn.convert import load_state, prepare_cache, save_state

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 256}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
DECODER = SIZES | SPECIAL
GQA = DECODER | {"num_key_value_heads": 2}
ENCODER = SIZES | {"pad_token_id": 0}
GEMMA = GQA | {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 8}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT |= {"image_size": 24, "patch_size": 4, "num_labels": 5}


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between families.

    Attributes:
        model: its transformers class. sizes: of its config.
        convert: what ``convert_model`` must be told. kept: layers that stay softmax for their own sliding window.
        kernel: the softmax implementation of the original, where the default one leaves something out.
    """

    model: str
    sizes: dict[str, Any]
    convert: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: tuple[int, ...] = ()
    kernel: str | None = None

    @property
    def auto(self) -> type:
        """The Auto class that a user loads such a model with."""
        task = next((task for task in ("MaskedLM", "ImageClassification") if self.model.endswith(task)), "CausalLM")
        return getattr(transformers, f"AutoModelFor{task}")

    @property
    def causal(self) -> bool:
        return self.auto is transformers.AutoModelForCausalLM

    def build(self, **sizes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        cls = getattr(transformers, self.model)
        config = cls.config_class(**(self.sizes | sizes))
        return sharpen(cls._from_config(config, attn_implementation=self.kernel))

    def inputs(self, length: int = 37, rows: int = 2) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if "image_size" in self.sizes:
            return {"pixel_values": torch.randn(rows, 3, 24, 24, generator=generator)}
        return {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)}


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 2}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", GQA),
    "mistral": Family("MistralForCausalLM", GQA | {"sliding_window": None}),
    "mistral-sliding": Family("MistralForCausalLM", GQA | {"sliding_window": 24}, {"native_sliding": "convert"}),
    "mixtral": Family("MixtralForCausalLM", GQA | EXPERTS | {"sliding_window": None}),
    "qwen2": Family("Qwen2ForCausalLM", GQA),
    "qwen3": Family("Qwen3ForCausalLM", GQA | {"head_dim": 16}),
    "qwen3-moe": Family("Qwen3MoeForCausalLM", GQA | QWEN_EXPERTS | {"head_dim": 8}),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 1.0}, kept=(0,), kernel="eager"),
    "gemma3": Family("Gemma3ForCausalLM", GEMMA | SLIDING_THEN_FULL, kept=(0,)),
    "phi3": Family("Phi3ForCausalLM", GQA),
    "olmo2": Family("Olmo2ForCausalLM", GQA),
    "smollm3": Family("SmolLM3ForCausalLM", GQA | {"no_rope_layers": [1, 0]}),
    "stablelm": Family("StableLmForCausalLM", GQA | {"partial_rotary_factor": 0.25}),
    "cohere": Family("CohereForCausalLM", GQA | {"use_qk_norm": True, "logit_scale": 1.0}),
    "phi": Family("PhiForCausalLM", GQA | {"partial_rotary_factor": 0.5}),
    "gpt-neox": Family("GPTNeoXForCausalLM", DECODER | {"rotary_pct": 0.25}),
    "gpt2": Family("GPT2LMHeadModel", GPT2 | SPECIAL),
    "opt": Family("OPTForCausalLM", DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-oss": Family("GptOssForCausalLM", GQA | EXPERTS | {"head_dim": 8, "sliding_window": 8}, kept=(0,)),
    "bert": Family("BertForMaskedLM", ENCODER),
    "roberta": Family("RobertaForMaskedLM", ENCODER),
    "distilbert": Family("DistilBertForMaskedLM", DISTILBERT),
    "modernbert": Family("ModernBertForMaskedLM", ENCODER | LOCAL, kept=(1,)),
    "vit": Family("ViTForImageClassification", VIT),
}


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``family`` is each family in turn, ``decoder`` each causal one, ``encoder`` each bidirectional one of text."""
    groups = {
        "family": FAMILIES,
        "decoder": {name: family for name, family in FAMILIES.items() if family.causal},
        "encoder": {name: family for name, family in FAMILIES.items() if family.model.endswith("MaskedLM")},
    }
    for fixture, group in groups.items():
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, group.values(), ids=group.keys())


@pytest.fixture
def families() -> dict[str, Family]:
    return FAMILIES


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


@pytest.fixture
def check_continuation(tmp_path: Path) -> Callable[[PreTrainedModel, Tensor], None]:
    """A state of ``tokens [2, 30]`` continues exactly after rollback, repeating, reordering and storage."""

    def check(model: PreTrainedModel, tokens: Tensor) -> None:
        def logits(ids: Tensor, **options: Any) -> Tensor:
            with torch.no_grad():
                return model(ids, **options).logits

        cache = prepare_cache(model, DynamicCache(config=model.config))
        cache.activate_past_recording()
        logits(tokens, past_key_values=cache)
        cache.crop(-5)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        save_state(cache, tmp_path / "state.safetensors")
        rows = torch.cat([tokens[[1, 0, 0, 1], :25], tokens[[0, 1, 0, 1], :9]], 1)
        want = logits(rows, use_cache=False)[:, 25:]
        for held in (load_state(tmp_path / "state.safetensors"), cache):
            torch.testing.assert_close(logits(rows[:, 25:], past_key_values=held), want, rtol=1e-9, atol=1e-9)

    return check
