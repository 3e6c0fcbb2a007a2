"""Transfer: the far branch apart against every pair of tokens, and that it learns what it is told to."""

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
from linattn.distill import Transfer, Windows, split_attention, train, transfer
from linattn.distill.engine import Batch
from linattn.distill.transfer import LayerErrors, far_log_mass, far_output
from linattn.errors import ConversionError, OptionError, UnsupportedError

FAR = {"window": 5, "sinks": 2}
LENGTH = 27


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
    """Output and log mass of the far branch at the queries that have one, from the weights of all pairs of tokens."""
    (f_q, a_q), (f_k, a_k) = module.feature_map.forward_queries(q), module.feature_map.forward_keys(k)
    groups, at = q.shape[2] // k.shape[2], torch.arange(LENGTH)
    f_k, v = f_k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scale = module.far_bias[:, None, None].expand(len(q), -1, LENGTH, LENGTH)
    if a_q is not None:
        scale = scale + a_q.movedim(2, 1)[..., None]
    if a_k is not None:
        scale = scale + a_k.repeat_interleave(groups, 2).movedim(2, 1)[..., None, :]
    gates = module.log_gates(k)
    if gates is not None:
        clock = gates.expand(len(q), LENGTH, -1).repeat_interleave(groups, 2).movedim(2, 1).cumsum(2)
        scale = scale + clock[..., None] - clock[..., None, :]
    far = (at[:, None] - at >= module.window) & (at >= module.sinks) & (at <= at[:, None])
    weights = torch.where(far, scale.exp() * torch.einsum("bthf,bihf->bhti", f_q, f_k), 0.0)
    weights = weights[:, :, module.window + module.sinks :]
    mass = weights.sum(-1).movedim(1, 2)
    return torch.einsum("bhti,bihv->bthv", weights, v) / mass[..., None], mass.log()


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], module: ConvertedAttention, bound: float) -> None:
    """Values, and gradients of their sum under random weights."""
    generator, parameters = torch.Generator().manual_seed(1), dict(module.named_parameters())
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in want]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(xs, weights, strict=True)), list(parameters.values()))
        for xs in (got, want)
    ]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)
    for name, a, b in zip(parameters, *gradients, strict=True):
        assert b.abs().max() > 0, name
        assert (a - b).abs().max() <= bound * b.abs().max(), name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("decay", [None, "fixed", "data"])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "hedgehog"])
@pytest.mark.parametrize(("window", "sinks"), [(5, 2), (4, 0), (0, 3)])
def test_the_far_branch_apart_equals_a_dense_computation(feature_map, decay, window, sinks, dtype, bound):
    module = layer(feature_map, decay, window, sinks).to(dtype)
    q, k, v = (x.to(dtype) for x in inputs())
    far, log_mass = dense_far(module, q, k, v)
    guess = log_mass.detach() + torch.randn(log_mass.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    got = far_output(module, q, k, v), far_log_mass(module, q, k, guess)
    close(got, (far, log_mass), module, bound)


@pytest.mark.parametrize("guess", [-30.0, 0.0, 30.0])
def test_any_guess_gives_the_log_mass(guess):
    module, (q, k, v) = layer("hedgehog", "fixed").float(), (x.float() for x in inputs())
    _, log_mass = dense_far(module, q, k, v)
    got = far_log_mass(module, q, k, torch.full_like(log_mass, guess))
    close((got, far_output(module, q, k, v)), (log_mass, dense_far(module, q, k, v)[0]), module, 1e-4)


@pytest.mark.parametrize("decay", ["fixed", "data"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_and_not_the_logit(dtype, decay):
    """A guess of 40 would lose a tenth of a nat to bfloat16."""
    module, (q, k, v) = layer("hedgehog", decay), inputs()
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    far, log_mass = dense_far(module, q, k, v)
    with torch.no_grad():
        module.far_bias += 40
    guess = (log_mass + 40 + torch.linspace(-1, 1, log_mass.shape[1])[:, None]).detach()
    got = far_log_mass(module, q.to(dtype), k.to(dtype), guess)
    assert got.dtype == torch.float32
    ulp = torch.finfo(dtype).eps
    assert (got - 40 - log_mass).abs().max() <= 3 * torch.finfo(torch.bfloat16).eps
    assert (far_output(module, q.to(dtype), k.to(dtype), v.to(dtype)) - far).abs().max() <= 3 * ulp * v.abs().max()


@pytest.mark.parametrize("native_window", [None, 12])
@pytest.mark.parametrize("far_rope", [True, False])
@pytest.mark.parametrize("decay", ["fixed", "data"])
def test_the_loss_is_that_of_its_terms(decay, far_rope, native_window):
    """Of a layer alone; without rotary embedding far, maps and gates see queries and keys before it."""
    module, (q_far, k_far, v) = layer("hedgehog", decay, far_rope=far_rope), inputs()
    module.native_window = native_window
    angle = torch.randn(1, LENGTH, 4, dtype=torch.float64).repeat(1, 1, 2)
    rotation = Rotation(apply_rotary_pos_emb, angle.cos(), angle.sin())
    after = apply_rotary_pos_emb(q_far.transpose(1, 2), k_far.transpose(1, 2), angle.cos(), angle.sin())
    q, k = (x.transpose(1, 2) for x in after)
    if far_rope:
        q_far, k_far = q, k
    options = {"softcap": None, "sink_logits": None, "rotation": rotation}
    stage = Transfer(steps=1, far_weight=0.7, mass_weight=0.2)
    found = LayerErrors({"layer": module}, stage, lambda *_, **__: module(q, k, v, **options))(Batch(torch.zeros(1, 1)))

    split = split_attention(q, k, v, window=5, sinks=2, scale=0.4, native_window=native_window)
    far, log_mass = dense_far(module, q_far, k_far, v)
    want_far, want_mass = split.far[:, 7:], split.log_far[:, 7:]
    hybrid = (module(q, k, v, rotation=rotation) - split.out).square().sum() / split.out.square().sum()
    terms = {
        "hybrid": hybrid,
        "far": (far - want_far).square().sum() / want_far.square().sum(),
        "mass": (log_mass - want_mass).square().mean(),
    }
    want = {"loss": hybrid + 0.7 * terms["far"] + 0.2 * terms["mass"]} | terms
    assert found == pytest.approx({name: value.item() for name, value in want.items()}, rel=1e-5)
    for (name, p), gradient in zip(
        module.named_parameters(), torch.autograd.grad(want["loss"], list(module.parameters())), strict=True
    ):
        assert (p.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("terms", [[], ["far"], ["mass"], ["far", "mass"]])
def test_a_term_without_weight_is_not_computed(llama, tokens_file, monkeypatch, terms):
    calls = set()
    for name, function in {"far": far_output, "mass": far_log_mass}.items():
        spy = lambda *tensors, name=name, function=function: calls.add(name) or function(*tensors)  # noqa: E731
        monkeypatch.setattr(transfer, function.__name__, spy)
    weights = {f"{name}_weight": float(name in terms) for name in ("far", "mass")}
    assert list(run(convert_model(llama(), **FAR), tokens_file, steps=1, **weights)) == ["loss", "hybrid", *terms]
    assert calls == set(terms)


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
def test_terms_of_no_weight_change_nothing_in_any_family(tokens_file, family):
    kind, sizes, options = FAMILIES[family]

    def errors(**weights: float) -> dict[str, list[float]]:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**(SIZES | sizes))
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(9) if p.ndim > 1 else p.add_(0.3 * torch.randn_like(p))
        seen = run(convert_model(model, **FAR, **options), tokens_file, steps=4, **weights)
        assert all(math.isfinite(value) for values in seen.values() for value in values)
        return seen

    alone, small = errors(far_weight=0.0, mass_weight=0.0), errors(far_weight=1e-12, mass_weight=1e-12)
    assert (list(alone), list(small)) == (["loss", "hybrid"], ["loss", "hybrid", "far", "mass"])
    assert small["hybrid"] == pytest.approx(alone["hybrid"], rel=1e-2)
    if family == "sliding no further":
        assert small["far"] == small["mass"] == [0.0] * 4


def test_a_layer_without_a_window_has_one_error(llama, tokens_file):
    seen = run(convert_model(llama(9.0), window=0, sinks=0, feature_map="exp"), tokens_file)
    assert list(seen) == ["loss", "hybrid"]
    assert seen["loss"][-1] < 0.9 * seen["loss"][0]


def test_the_distance_of_sinks_is_nothing_to_the_far_branch(llama, tokens_file):
    own, bounded = (run(convert_model(llama(), **FAR, sink_distance=at), tokens_file) for at in (None, 20))
    assert own["far"][0] == bounded["far"][0]
    assert own["mass"][0] == bounded["mass"][0]
    assert own["hybrid"][0] != bounded["hybrid"][0]


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
