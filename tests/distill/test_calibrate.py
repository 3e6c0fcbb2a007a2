"""Calibration: errors fall, the far branch starts with softmax's mass, and nothing else of the model changes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from linattn import convert_model
from linattn.convert import ConvertedAttention, window_only
from linattn.distill import calibrate
from linattn.errors import ConversionError, DtypeError, NonFiniteError, OptionError, ShapeError
from linattn.feature_maps import ELU, Features, registry

transformers.logging.set_verbosity_error()

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAR = {"window": 5, "sinks": 2}
MODELS = {
    "llama": ("Llama", {}, {}),
    "one-layer-kept": ("Llama", {}, {"keep_softmax": [1]}),
    "yarn": ("Llama", {"rope_parameters": YARN}, {"far_rope": False}),
    "sliding": ("Mistral", {"sliding_window": 12}, {"native_sliding": "convert"}),
    "softcap": ("Gemma2", {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1, "sliding_window": 8}, {}),
    "sink-logits": ("GptOss", EXPERTS | {"sliding_window": 8}, {}),
}


def build(kind: str = "Llama", **options: Any) -> transformers.PreTrainedModel:
    """A tiny model whose attention is far from uniform."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def batch(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def layers_of(model: nn.Module) -> list[ConvertedAttention]:
    return [module for module in model.modules() if isinstance(module, ConvertedAttention)]


@pytest.mark.parametrize("decay", [None, "fixed", "data"])
@pytest.mark.parametrize("feature_map", ["hedgehog", "exp"])
def test_errors_fall(feature_map, decay):
    model = convert_model(build(), feature_map=feature_map, decay=decay, **FAR)
    reports = []
    done = calibrate(model, [batch()] * 20, progress=lambda *report: reports.append(report))
    assert done.losses[-1] < 0.8 * done.losses[0]
    assert list(done.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert sum(done.layers.values()) / 2 == pytest.approx(done.losses[-1])
    assert reports == list(enumerate(done.losses, 1))
    assert done.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_train_in_single(dtype):
    def losses(dtype: torch.dtype) -> Tensor:
        model = convert_model(build().to(dtype), decay="data", **FAR)
        held = {name: t.dtype for name, t in model.state_dict().items()}
        done = calibrate(model, [batch()] * 20)
        assert {name: t.dtype for name, t in model.state_dict().items()} == held
        assert done.skipped == 0
        return torch.tensor(done.losses)

    torch.testing.assert_close(losses(dtype), losses(torch.float32), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("model", MODELS)
def test_layers_learn_on_what_the_original_would_have_given_them(model):
    kind, sizes, options = MODELS[model]
    model, seen = build(kind, **sizes), []
    with torch.no_grad():
        want = model(batch()).logits
    convert_model(model, **FAR, **options)
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    done = calibrate(model, [batch()] * 3)
    handle.remove()
    assert len(seen) == 4
    for logits in seen:
        torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert done.losses[-1] < done.losses[0]
    assert not torch.allclose(model(batch()).logits, want, rtol=1e-4, atol=1e-4)  # the student answers again


class KeyScaled(ELU):
    """A map whose keys alone carry a log-scale."""

    name = "key-scaled"

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return Features(super().forward_keys(k).values, k.float().sum(-1))


class QueryScaled(ELU):
    """A map whose queries alone carry a log-scale."""

    name = "query-scaled"

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return Features(super().forward_queries(q).values, q.float().sum(-1))


def difference_of_masses(
    layer: ConvertedAttention, q: Tensor, k: Tensor, q_far: Tensor, k_far: Tensor, softcap: float | None
) -> Tensor:
    """``[H, T]`` log(softmax's far mass) − log(the map's far mass) of one sequence; NaN where either is not positive.

    One pair at a time, in float64.
    """
    phi, length = layer.feature_map, q.shape[1]
    positions = torch.arange(length)[None] if phi.positional else None
    (f_q, a_q), (f_k, a_k) = phi.forward_queries(q_far, positions), phi.forward_keys(k_far, positions)
    gates = layer.log_gates(k_far)
    difference = torch.full((q.shape[2], length), math.nan, dtype=torch.float64)
    for h in range(q.shape[2]):
        kv = h // (q.shape[2] // k.shape[2])
        for t in range(length):
            exact = kernel = torch.zeros((), dtype=torch.float64)
            for i in range(layer.sinks, t - layer.window + 1):
                logit = phi.scale * (q[0, t, h].double() @ k[0, i, kv].double())
                logit = logit if softcap is None else softcap * torch.tanh(logit / softcap)
                if layer.native_window is None or t - i < layer.native_window:
                    exact = exact + logit.exp()
                weight = f_q[0, t, h].double() @ f_k[0, i, kv].double()
                if a_q is not None:
                    weight = weight * a_q[0, t, h].double().exp()
                if a_k is not None:
                    weight = weight * a_k[0, i, kv].double().exp()
                if gates is not None:
                    passed = gates[kv] * (t - i) if gates.ndim == 1 else gates[0, i + 1 : t + 1, kv].sum()
                    weight = weight * passed.double().exp()
                kernel = kernel + weight
            if exact > 0 and kernel > 0:
                difference[h, t] = exact.log() - kernel.log()
    return difference


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"feature_map": "elu", "decay": "fixed"}),
        ("llama", {"feature_map": "favor+", "decay": "data"}),
        ("llama", {"feature_map": "favor#"}),
        ("llama", {"feature_map": "hedgehog", "decay": "data", "far_rope": False}),
        ("llama", {"feature_map": "favor#", "far_rope": False}),
        ("yarn", {"feature_map": "elu", "far_rope": False}),
        ("llama", {"feature_map": "cosformer", "window": 0, "sinks": 0}),
        ("llama", {"feature_map": "key-scaled"}),
        ("llama", {"feature_map": "query-scaled", "window": 0}),
        ("llama", {"feature_map": "rff", "feature_map_options": {"num_features": 4}}),
        ("sliding", {"feature_map": "relu"}),
        ("softcap", {"feature_map": "elu", "sinks": 0}),
        ("sink-logits", {"feature_map": "hedgehog"}),
    ],
    ids=lambda x: x["feature_map"] if isinstance(x, dict) else x,
)
def test_the_far_branch_starts_with_the_mass_of_softmax(kind, options, monkeypatch):
    for cls in (KeyScaled, QueryScaled):
        monkeypatch.setitem(registry._MAPS, cls.name, cls)
    cls, sizes, converting = MODELS[kind]
    ids = batch(rows=1, length=20)
    sizes = sizes | {"sliding_window": 9} if "sliding_window" in sizes else sizes
    model = convert_model(build(cls, **sizes), **(FAR | converting | options))
    layer = layers_of(model)[0]
    if options.get("decay") == "data":
        nn.init.normal_(layer.gate_weight)
    seen = []
    handle = layer.register_forward_hook(
        lambda m, inputs, kwargs, output: seen.append((inputs, kwargs)), with_kwargs=True
    )
    calibrate(model, [ids], learning_rate=0.0)
    handle.remove()
    (q, k, _), kwargs = seen[0]
    if kind == "sink-logits":
        assert kwargs["sink_logits"] is not None
    with torch.no_grad():
        q_far, k_far = layer.far_inputs(q, k, kwargs["rotation"])
        want = difference_of_masses(layer, q, k, q_far, k_far, kwargs["softcap"]).nanmean(1)
    assert torch.equal(q, q_far) == layer.far_rope
    assert want.abs().min() > 1e-3
    torch.testing.assert_close(layer.far_bias.double(), want, rtol=1e-4, atol=1e-4)


def test_a_head_without_any_far_mass_starts_at_zero(monkeypatch):
    class Dark(ELU):
        name = "dark"

        def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
            values = super().forward_queries(q).values
            return Features(values * torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None])

    monkeypatch.setitem(registry._MAPS, "dark", Dark)
    model = convert_model(build(), feature_map="dark", **FAR)
    calibrate(model, [batch()], learning_rate=0.0)
    for layer in layers_of(model):
        assert layer.far_bias[0] == 0
        assert (layer.far_bias[1:] != 0).all()


class Power(ELU):
    """Keys' features to a power, which fitting sets to ``best``."""

    name = "power"
    best = 1.0
    calls: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def __init__(self, head_dim: int, *, power: float = 1.0, **common: Any) -> None:
        super().__init__(head_dim, **common)
        self.register_buffer("power", torch.tensor(power))

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        return Features(super().forward_keys(k).values ** self.power)

    def fit(self, q: Tensor, k: Tensor) -> None:
        self.calls.append((q, k))
        self.power.fill_(self.best)


def test_maps_are_fitted_where_that_lowers_the_error(monkeypatch):
    monkeypatch.setitem(registry._MAPS, "power", Power)

    def errors(start: float, best: float) -> Tensor:
        monkeypatch.setattr(Power, "best", best)
        model = convert_model(build(), feature_map="power", feature_map_options={"power": start}, **FAR)
        return torch.tensor(list(calibrate(model, [batch()], learning_rate=0.0).layers.values()))

    low, high = errors(1.0, 1.0), errors(3.0, 3.0)
    assert (low / high).log().abs().min() > 0.01
    assert torch.equal(errors(1.0, 3.0), low.minimum(high))
    assert torch.equal(errors(3.0, 1.0), low.minimum(high))


def test_maps_are_fitted_to_what_the_far_branch_sees(monkeypatch):
    monkeypatch.setitem(registry._MAPS, "power", Power)
    monkeypatch.setattr(Power, "calls", [])
    model, seen = convert_model(build(), feature_map="power", **FAR), []
    layers_of(model)[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    calibrate(model, [batch()] * 2)
    assert len(Power.calls) == 2  # once a layer
    q, k, _ = seen[0]
    assert torch.equal(Power.calls[0][0], q[:, 7:])  # queries with something far
    assert torch.equal(Power.calls[0][1], k[:, 2:35])  # keys that are far to somebody


@pytest.mark.parametrize("feature_map", ["favor++", "favor#", "nystrom"])
def test_maps_of_the_package_that_can_be_fitted_never_start_worse(feature_map, monkeypatch):
    def start() -> Tensor:
        model = convert_model(build(), feature_map=feature_map, **FAR)
        return torch.tensor(list(calibrate(model, [batch()], learning_rate=0.0).layers.values()))

    fitted = start()
    assert torch.equal(start(), fitted)  # nothing in it is left to chance
    monkeypatch.setattr(registry.get(feature_map), "fit", None)
    unfitted = start()
    assert (fitted <= unfitted).all()


class Stop(Exception):
    pass


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_else_changes(interrupted):
    model = convert_model(build(), feature_map="favor++", decay="fixed", keep_softmax=[0], **FAR).train()
    frozen = [model.model.embed_tokens.weight, layers_of(model)[0].far_bias]
    for p in frozen:
        p.requires_grad_(False)
    model.model.norm.eval()
    gradient = torch.randn_like(model.lm_head.weight)
    model.lm_head.weight.grad = gradient
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]

    def progress(done: int, loss: float) -> None:
        if interrupted:
            raise Stop

    if interrupted:
        with pytest.raises(Stop):
            calibrate(model, [batch()] * 3, progress=progress)
    else:
        calibrate(model, [batch()] * 3, progress=progress)

    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {f"model.layers.1.self_attn.linattn.{x}" for x in ("far_bias", "log_half_life", "feature_map.a")}
    assert all(module.training == mode for module, mode in modes)
    assert [p for p in model.parameters() if not p.requires_grad] == frozen
    assert [p for p in model.parameters() if p.grad is not None] == [model.lm_head.weight]
    assert model.lm_head.weight.grad is gradient
    assert not any("forward" in layer.__dict__ for layer in layers_of(model))


def test_the_callers_gradient_mode_and_input_gradients_do_not_matter():
    def fitted(prepare: Any = None) -> Tensor:
        model = convert_model(build(), **FAR)
        if prepare is not None:
            prepare(model)
        calibrate(model, [batch()] * 2)
        return layers_of(model)[1].far_bias.detach()

    want = fitted()
    assert torch.equal(fitted(lambda model: model.enable_input_require_grads()), want)
    with torch.no_grad():
        assert torch.equal(fitted(), want)


def test_dropout_is_off():
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
    model = convert_model(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0.5)), **FAR)
    first, second = (calibrate(model.train(), [batch()], learning_rate=0.0).losses for _ in range(2))
    assert first == second


def test_steps_without_finite_gradients_are_skipped():
    model = convert_model(build(), decay="data", **FAR)
    bias = layers_of(model)[0].gate_bias
    start = bias.detach().clone()

    def progress(done: int, loss: float) -> None:
        bias.data.copy_(torch.full_like(start, math.nan) if done == 1 else start)

    done = calibrate(model, [batch()] * 3, progress=progress)
    assert done.skipped == 1
    assert [math.isfinite(loss) for loss in done.losses] == [True, False, True]
    assert all(p.isfinite().all() for p in model.parameters())
    bias.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="learning_rate"):
        calibrate(model, [batch()] * 2)


@pytest.mark.parametrize(
    ("batches", "error", "says"),
    [
        ([], OptionError, "at least one"),
        ([batch(length=7)], OptionError, "fit in window"),
        ([batch(), batch(length=6)], OptionError, "6 tokens"),
        ([batch()[0]], ShapeError, r"\(40,\)"),
        ([batch()[:0]], ShapeError, "B ≥ 1"),
        ([batch().float()], DtypeError, "float32"),
        ([batch().tolist()], DtypeError, "list"),
    ],
)
def test_bad_batches_are_refused(batches, error, says):
    model = convert_model(build(), **FAR)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=says):
        calibrate(model, batches)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("rate", [-1e-3, math.nan, math.inf])
def test_bad_learning_rates_are_refused(rate):
    with pytest.raises(OptionError, match="learning_rate"):
        calibrate(convert_model(build(), **FAR), [batch()], learning_rate=rate)


def test_models_without_a_causal_far_branch_are_refused():
    with pytest.raises(ConversionError, match="convert_model first"):
        calibrate(build(), [batch()])
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    encoder = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=1))
    with pytest.raises(ConversionError, match="bidirectional"):
        calibrate(convert_model(encoder), [batch()])
    model = convert_model(build(), **FAR)
    with window_only(model), pytest.raises(ConversionError, match="window_only"):
        calibrate(model, [batch()])
