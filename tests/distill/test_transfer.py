"""Transfer: the far branch alone against every pair of tokens, and that it learns what it is told to."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from linattn import convert_model
from linattn.convert import ConvertedAttention
from linattn.convert.plan import LayerPlan
from linattn.convert.rotary import Rotation
from linattn.distill import Transfer, Windows, split_attention, train
from linattn.distill.engine import Batch
from linattn.distill.transfer import far_branch
from linattn.errors import ConversionError, OptionError, UnsupportedError

FAR = {"window": 5, "sinks": 2}
LENGTH = 24


def layer(
    feature_map: str, decay: str | None, window: int = 5, sinks: int = 2, far_rope: bool = True
) -> ConvertedAttention:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 0.4, "far_rope": far_rope}
    plan = LayerPlan(0, "x", "X", "convert", feature_map=feature_map, decay=decay, window=window, sinks=sinks, **sizes)
    module = ConvertedAttention(plan, dtype=torch.float64)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 6)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * q, k, v


def dense_far(module: ConvertedAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log mass of the far branch ``[B, T, …]``, one pair of tokens at a time."""
    (f_q, a_q), (f_k, a_k) = module.feature_map.forward_queries(q), module.feature_map.forward_keys(k)
    gates = module.log_gates(k)
    out, log_mass = q.new_zeros(2, LENGTH, 4, 6), q.new_full((2, LENGTH, 4), -math.inf)
    for b in range(2):
        for h in range(4):
            for t in range(module.window + module.sinks, LENGTH):
                mass = q.new_zeros(())
                for i in range(module.sinks, t - module.window + 1):
                    weight = module.far_bias[h].exp() * (f_q[b, t, h] @ f_k[b, i, h // 2])
                    weight = weight if a_q is None else weight * a_q[b, t, h].exp()
                    weight = weight if a_k is None else weight * a_k[b, i, h // 2].exp()
                    if gates is not None:
                        passed = gates[h // 2] * (t - i) if gates.ndim == 1 else gates[b, i + 1 : t + 1, h // 2].sum()
                        weight = weight * passed.exp()
                    out[b, t, h] += weight.detach() * v[b, i, h // 2]
                    mass = mass + weight.detach()
                out[b, t, h] /= mass
                log_mass[b, t, h] = mass.log()
    return out, log_mass


@pytest.mark.parametrize("decay", [None, "fixed", "data"])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "hedgehog"])
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (4, 0), (0, 3)])
def test_the_far_branch_apart_equals_a_dense_computation(feature_map, decay, window, sinks):
    module, (q, k, v) = layer(feature_map, decay, window, sinks), inputs()
    split = split_attention(q, k, v, window=window, sinks=sinks, scale=0.4)
    got = far_branch(module, q, k, v, split)
    far, log_mass = dense_far(module, q, k, v)
    rows = slice(window + sinks, None)
    torch.testing.assert_close(got.far, far[:, rows], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.log_mass, log_mass[:, rows], rtol=1e-9, atol=1e-9)
    hybrid = module(q, k, v)
    torch.testing.assert_close(got.out, hybrid, rtol=1e-9, atol=1e-9)

    parameters = dict(module.named_parameters())
    mine = torch.autograd.grad(got.out.square().sum(), list(parameters.values()))
    want = torch.autograd.grad(hybrid.square().sum(), list(parameters.values()))
    for name, a, b in zip(parameters, mine, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("decay", ["fixed", "data"])
def test_the_far_branch_apart_reads_what_the_layer_does(decay):
    """Queries and keys before rotary embedding, beside the exact attention of those after it."""
    module, (q_far, k_far, v) = layer("hedgehog", decay, far_rope=False), inputs()
    angle = torch.randn(1, LENGTH, 4, dtype=torch.float64).repeat(1, 1, 2)
    rotation = Rotation(apply_rotary_pos_emb, angle.cos(), angle.sin())
    after = apply_rotary_pos_emb(q_far.transpose(1, 2), k_far.transpose(1, 2), angle.cos(), angle.sin())
    q, k = (x.transpose(1, 2) for x in after)
    split = split_attention(q, k, v, window=5, sinks=2, scale=0.4)
    got = far_branch(module, *module.far_inputs(q, k, rotation), v, split)
    far, log_mass = dense_far(module, q_far, k_far, v)
    torch.testing.assert_close(got.far, far[:, 7:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.log_mass, log_mass[:, 7:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.out, module(q, k, v, rotation=rotation), rtol=1e-9, atol=1e-9)


def run(model: nn.Module, tokens_file, **options) -> dict[str, list[float]]:
    stage = Transfer(**({"steps": 15, "learning_rate": 0.02, "length": 40, "rows": 2} | options))
    seen: dict[str, list[float]] = {}

    def keep(done: int, metrics) -> None:
        for name, value in metrics.items():
            seen.setdefault(name, []).append(value)

    batch = Windows(tokens_file, 40).batches(2)(0)
    with stage.objective(model) as objective:
        train(model, objective, lambda index: batch, stage, progress=keep)
    return seen


def test_all_errors_fall(llama, tokens_file):
    seen = run(convert_model(llama(9.0), decay="fixed", **FAR), tokens_file, mass_weight=0.5)
    assert list(seen) == ["loss", "hybrid", "far", "mass"]
    for name, values in seen.items():
        assert sum(values[-4:]) < 0.85 * sum(values[:4]), name
    for loss, hybrid, far, mass in zip(*seen.values(), strict=True):
        assert loss == pytest.approx(hybrid + far + 0.5 * mass, rel=1e-5)


def test_a_target_of_its_own_gives_the_far_branch_more_to_do(llama, tokens_file):
    def far_error(**options) -> float:
        return sum(run(convert_model(llama(9.0), **FAR), tokens_file, steps=40, **options)["far"][-5:])

    assert far_error() < 0.9 * far_error(far_weight=1e-9, mass_weight=0.0)


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES = {
    "llama": ("Llama", {}, {"decay": "data"}),
    "no far rope": ("Llama", {}, {"decay": "data", "far_rope": False}),
    "sliding": ("Mistral", {"sliding_window": 12}, {"native_sliding": "convert"}),
    "sliding no further": ("Mistral", {"sliding_window": 5}, {"native_sliding": "convert"}),
    "softcap": ("Gemma2", {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1, "sliding_window": 8}, {}),
    "sink logits": ("GptOss", EXPERTS | {"sliding_window": 8}, {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_output_has_the_error_of_its_parts(tokens_file, family):
    kind, sizes, options = FAMILIES[family]

    def error(**weights: float) -> list[float]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes))
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(9) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
        seen = run(convert_model(model, **FAR, **options), tokens_file, steps=4, **weights)
        assert all(math.isfinite(value) for values in seen.values() for value in values)
        return seen["hybrid"]

    assert error()[0] == pytest.approx(error(far_weight=0.0, mass_weight=0.0)[0], rel=1e-3)
    only_hybrid = {"far_weight": 1e-12, "mass_weight": 0.0}
    assert error(**only_hybrid) == pytest.approx(error(far_weight=0.0, mass_weight=0.0), rel=1e-2)


def test_a_layer_without_a_window_has_one_error(llama, tokens_file):
    seen = run(convert_model(llama(9.0), window=0, sinks=0, feature_map="exp"), tokens_file)
    assert list(seen) == ["loss", "hybrid"]
    assert seen["loss"][-1] < 0.9 * seen["loss"][0]


def test_sinks_at_a_distance_that_softmax_does_not_have_are_refused(llama, tokens_file):
    model = convert_model(llama(), **FAR, sink_distance=38)
    with pytest.raises(OptionError, match=r"sink_distance=38: .* 40 tokens"):
        run(model, tokens_file)
    assert list(run(model, tokens_file, far_weight=0.0, mass_weight=0.0)) == ["loss", "hybrid"]


def test_half_precision_learns_as_single_does(llama, tokens_file):
    half, single = (run(convert_model(llama(9.0).to(x), **FAR), tokens_file) for x in (torch.bfloat16, torch.float32))
    for name in ("hybrid", "far", "mass"):
        assert half[name] == pytest.approx(single[name], rel=0.1), name


def test_windows_are_dropped_as_often_as_the_schedule_says(llama, tokens_file):
    seen = run(convert_model(llama(), **FAR), tokens_file, window_dropout=(1.0, 1.0))
    assert list(seen) == ["loss", "without_window"]
    assert sum(seen["loss"][-4:]) < sum(seen["loss"][:4])
    falling = run(convert_model(llama(), **FAR), tokens_file, steps=40, window_dropout=(1.0, 0.0))
    assert 20 < len(falling["without_window"]) < 40  # of one layer or of both
    assert 20 < len(falling["hybrid"]) < 40


def test_held_out_batches_keep_their_windows(llama, tokens_file):
    ids = Windows(tokens_file, 40)[0][None]
    with Transfer(steps=1, length=40, window_dropout=(1.0, 1.0)).objective(convert_model(llama(), **FAR)) as objective:
        assert list(objective(Batch(ids))) == ["loss", "without_window"]
        assert list(objective(Batch(ids, held_out=True))) == ["loss", "hybrid", "far", "mass"]


def test_layers_have_their_windows_again(llama, tokens_file):
    model = convert_model(llama(), **FAR)
    run(model, tokens_file, steps=2, window_dropout=(0.5, 0.5))
    for module in model.modules():
        if isinstance(module, ConvertedAttention):
            assert (module.window, module.sinks) == (5, 2)
            assert "forward" not in module.__dict__


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("maps", {"feature_map.query.weight", "feature_map.key.weight"}),
        ("decay", {"gate_weight", "gate_bias"}),
        ("far_bias", {"far_bias"}),
    ],
)
def test_only_the_chosen_part_trains(llama, tokens_file, part, names):
    def tensors() -> dict[str, Tensor]:
        return {name: t.clone() for name, t in model.state_dict().items()}

    model = convert_model(llama(), decay="data", **FAR)
    with Transfer(steps=1, length=40).objective(model) as objective:
        objective.prepare(Windows(tokens_file, 40).batches(2)(0))
    before = tensors()
    run(model, tokens_file, train=(part,))
    changed = {name.partition(".linattn.")[2] for name, t in tensors().items() if not torch.equal(t, before[name])}
    assert changed == names


def test_the_rest_of_the_model_sees_softmax_attention(llama):
    model, ids = llama(), torch.randint(3, 61, (2, 40))
    with torch.no_grad():
        want = model.model(ids).last_hidden_state
    convert_model(model, **FAR)
    seen = []
    model.model.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    with Transfer(steps=2, length=40, window_dropout=(0.5, 0.5)).objective(model) as objective:
        objective.prepare(Batch(ids))
        objective(Batch(ids))
    assert len(seen) == 2
    for hidden in seen:
        torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"far_weight": -1.0}, "far_weight"),
        ({"window_dropout": (0.5,)}, "window_dropout"),
        ({"window_dropout": (0.5, 1.5)}, "window_dropout"),
        ({"train": ("everything",)}, "everything"),
        ({"train": ()}, "train"),
    ],
)
def test_options_outside_their_domain_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        Transfer(steps=1, **options)


def test_models_that_cannot_be_trained_so_are_refused(llama):
    def objective(model: nn.Module, **options) -> None:
        with Transfer(**({"steps": 1, "length": 40} | options)).objective(model):
            pass

    with pytest.raises(ConversionError, match="convert_model first"):
        objective(llama())
    with pytest.raises(OptionError, match="7 tokens"):
        objective(convert_model(llama(), **FAR), length=7)
    with pytest.raises(OptionError, match="no parameters"):
        objective(convert_model(llama(), **FAR), train=("decay",))
    for feature_map, kind in (("cosformer", "positional"), ("rff", "not positive")):
        with pytest.raises(UnsupportedError, match=f"{kind}.*far_weight"):
            objective(convert_model(llama(), feature_map=feature_map, **FAR))
        objective(convert_model(llama(), feature_map=feature_map, **FAR), far_weight=0.0, mass_weight=0.0)
