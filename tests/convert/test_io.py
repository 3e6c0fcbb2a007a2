"""Saving and loading: bit-equal, by transformers' own Auto classes, in any order of import; broken files are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import linattn
from linattn import convert_model, load, revert_model
from linattn.errors import CheckpointError

ROOT = Path(linattn.__file__).parent.parent


@pytest.fixture
def saved(make_llama, tmp_path):
    model = convert_model(make_llama(tie_word_embeddings=True), window=6, sinks=2, decay="data", keep_softmax=[1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linattn" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
def test_reloaded_models_are_bit_equal(saved, tokens, shard, loader):
    model, path = saved
    model.save_pretrained(path, max_shard_size=shard)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    assert not [f for f in path.iterdir() if f.suffix in (".bin", ".pt", ".py")]
    loaded = loader(path)
    assert type(loaded) is type(model)
    assert loaded.config.linattn == model.config.linattn
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_config_file_tells_the_truth(saved):
    _, path = saved
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == "linattn_llama"
    assert config["architectures"] == ["LinattnLlamaForCausalLM"]
    assert "auto_map" not in config
    assert [layer["kind"] for layer in config["linattn"]["layers"]] == ["convert", "keep", "convert"]


def test_a_loaded_model_reverts_to_the_original_class(saved, make_llama, tokens):
    _, path = saved
    original = make_llama(tie_word_embeddings=True)
    reverted = revert_model(load(path))
    assert type(reverted) is LlamaForCausalLM
    assert torch.equal(reverted(tokens).logits, original(tokens).logits)
    assert reverted.config.model_type == "llama"
    assert reverted.config.architectures == ["LlamaForCausalLM"]
    reverted.save_pretrained(path / "original")
    again = convert_model(AutoModelForCausalLM.from_pretrained(path / "original"), window=6)
    assert again.config.model_type == "linattn_llama"


def test_loading_options_reach_transformers(saved):
    _, path = saved
    model = load(path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert revert_model(model).config._attn_implementation == "eager"


def test_the_inner_model_loads_alone(saved, tokens):
    model, path = saved
    inner = AutoModel.from_pretrained(path)
    assert type(inner).__name__ == "LinattnLlamaModel"
    assert torch.equal(inner(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_absent_maps_start_as_fresh_ones(make_llama, tokens, tmp_path):
    make_llama().save_pretrained(tmp_path)
    fresh = convert_model(make_llama(), window=6, sinks=2, decay="fixed")
    model = type(fresh).from_pretrained(tmp_path, config=fresh.config)
    for (name, got), want in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert torch.equal(model(tokens).logits, fresh(tokens).logits)


def test_a_new_model_is_built_from_a_config(saved):
    model, _ = saved
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model)
    assert torch.equal(fresh.model.layers[0].self_attn.linattn.far_bias, torch.zeros(4))


def test_random_features_are_saved(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), feature_map="favor+", window=6, sinks=2)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    assert torch.equal(load(tmp_path)(tokens).logits, model(tokens).logits)


def test_encoders_load_by_their_own_class(tokens, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = convert_model(BertForMaskedLM(BertConfig(**sizes, intermediate_size=48)).eval(), window=4, sinks=1)
    model.save_pretrained(tmp_path)
    for loader in (load, AutoModelForMaskedLM.from_pretrained):
        assert torch.equal(loader(tmp_path)(tokens).logits, model(tokens).logits)


def test_families_whose_files_differ_from_their_modules(tokens, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "original")
    model = convert_model(MixtralForCausalLM.from_pretrained(tmp_path / "original"), window=6, sinks=2)
    model.save_pretrained(tmp_path / "converted")
    assert torch.equal(load(tmp_path / "converted")(tokens).logits, model(tokens).logits)


ORDERS = {
    "linattn-first": "import linattn, sys; assert 'transformers' not in sys.modules; import transformers",
    "transformers-first": "import transformers, linattn",
    "auto-classes-first": "import transformers.models.auto.modeling_auto, linattn",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_auto_classes_know_converted_models_in_a_new_process(saved, tokens, imports):
    model, path = saved
    torch.save({"tokens": tokens, "logits": model(tokens).logits.detach()}, path / "want.pt")
    code = f"""
import torch
{imports}
from transformers import AutoModelForCausalLM
want = torch.load({str(path / "want.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(path)!r})
assert torch.equal(model(want["tokens"]).logits, want["logits"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_is_not_ours_is_refused(make_llama, tmp_path):
    with pytest.raises(CheckpointError, match="no readable model config"):
        load(tmp_path / "absent")
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="'llama', not one that linattn converted"):
        load(tmp_path)
    with pytest.raises(ValueError, match="linattn_nothing"):
        AutoConfig.for_model("linattn_nothing")


def edit(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("linattn"), "no conversion plan"),
        (lambda c: c["linattn"].update(format=99), "format 99"),
        (lambda c: c["linattn"]["layers"][0].update(path="model.layers.9.self_attn"), "no module"),
        (lambda c: c["linattn"]["layers"][0].update(feature_map="gone"), "gone"),
        (lambda c: c.update(architectures=["LinattnGoneForCausalLM"]), "LinattnGoneForCausalLM"),
        (lambda c: c.update(architectures=[]), "names the class"),
    ],
)
def test_a_broken_plan_is_told(saved, change, says):
    _, path = saved
    edit(path, change)
    with pytest.raises(CheckpointError, match=says):
        load(path)


def test_broken_weights_are_told(saved):
    _, path = saved
    file = path / "model.safetensors"
    weights = load_file(file)
    absent = next(name for name in weights if name.endswith("linattn.far_bias"))
    save_file({k: v for k, v in weights.items() if k != absent}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 weights are missing"):
        load(path)
    save_file(weights | {absent: torch.zeros(7)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
