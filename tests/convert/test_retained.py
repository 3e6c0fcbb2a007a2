"""Retained tokens in converted models: exact as far as they reach, the same cached and uncached, bytes as planned."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

import linattn
from linattn import ConversionPlan, convert_model, plan_model, revert_model
from linattn.audit import cache_bytes, equal_bytes_plan, far_off, near_off, retained_off, state_bytes
from linattn.convert import ConvertedAttention, LinattnCacheLayer, hf, prepare_cache, window_only
from linattn.convert.rotary import Rotation
from linattn.errors import ConversionError, OptionError, UnsupportedError
from linattn.kernels import kernel_attention
from linattn.scores import TokenScore

WINDOW, SINKS, RETAINED = 5, 2, 9
REACH = WINDOW + SINKS + RETAINED
NEAR = {"window": WINDOW, "sinks": SINKS, "retained": RETAINED}
FAR = NEAR | {"far_rope": False}
FORMS = {
    "rope": {},
    "no-far-rope": {"far_rope": False},
    "data-decay": {"far_rope": False, "decay": "data"},
    "near-sinks": {"far_rope": False, "decay": "fixed", "sink_distance": 19},
    "near-retained": {"far_rope": False, "decay": "data", "retained_distance": 13},
    "window-only": {"feature_map": None},
    "log-scaled": {"feature_map": "favor+", "far_rope": False},
    "per-layer": {"retained": [0, 4, 13], "far_rope": False, "decay": "fixed"},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 50), generator=torch.Generator().manual_seed(1))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, ConvertedAttention)]


def empty_cache(model):
    return prepare_cache(model, DynamicCache(config=model.config))


def read(model, ids, sizes, mask=None):
    """Logits of ``ids`` read into a cache in parts of the given sizes, and the cache."""
    cache, found, start = empty_cache(model), [], 0
    for size in itertools.chain(sizes, [ids.shape[1] - sum(sizes)]):
        part, stop = ids[:, start : start + size], start + size
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:stop]
        found.append(logits(model, part, past_key_values=cache, **options))
        start = stop
    return torch.cat(found, 1), cache


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def model(request, make_llama):
    return convert_model(make_llama().double(), **(NEAR | request.param))


def test_sequences_up_to_window_retained_and_sinks_are_softmax(families, tokens):
    for name in ("llama", "qwen3", "gemma2", "gpt-oss", "gpt-neox", "gpt2"):
        family = families[name]
        ids = family.inputs(40)["input_ids"]
        want = logits(family.build(), ids)
        got = logits(convert_model(family.build(), **NEAR), ids)
        torch.testing.assert_close(got[:, :REACH], want[:, :REACH], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[:, REACH:], want[:, REACH:], atol=1e-2)


@pytest.mark.parametrize("sizes", [[11, *[1] * 12, 7], [30], [3, 20, 1, 1]])
def test_read_in_pieces_it_says_what_it_says_at_once(model, tokens, sizes):
    got, cache = read(model, tokens, sizes)
    torch.testing.assert_close(got, logits(model, tokens, use_cache=False), rtol=1e-9, atol=1e-9)
    for layer, held in zip(layers_of(model), cache.layers, strict=True):
        assert held.state.retained == layer.retained
        assert (held.kept_positions is not None) == (bool(layer.retained) and layer.far and not layer.far_rope)


@pytest.mark.parametrize("pad", ["left", "between"])
def test_padding_takes_no_place_in_the_pool(model, tokens, pad):
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    if pad == "between":
        mask[0, 20:33], mask[1, 30:34] = 0, 0
    there = mask.bool()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    want = logits(model, tokens * mask, attention_mask=mask, position_ids=positions, use_cache=False)[there]
    got, _ = read(model, tokens * mask, [20, 1, 1, 8, 1], mask)
    torch.testing.assert_close(got[there], want, rtol=1e-9, atol=1e-9)
    alone = [logits(model, row[real][None], use_cache=False)[0] for row, real in zip(tokens, there, strict=True)]
    torch.testing.assert_close(want, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_a_state_continues_after_rollback_reordering_and_storage(model, tokens, check_continuation):
    check_continuation(model, tokens[:, :30])


def test_what_is_taken_back_may_be_much(model, tokens):
    """A draft as long as the pool and more, refused, again and again."""
    cache = empty_cache(model)
    logits(model, tokens[:, :20], past_key_values=cache)
    found = []
    for start in range(20, 50, 3):
        cache.activate_past_recording()
        wrong = tokens.flip(1)[:, :14].clone()
        wrong[:, :3] = tokens[:, start : start + 3]
        found.append(logits(model, wrong, past_key_values=cache)[:, :3])
        cache.crop(-11)
    want = logits(model, tokens, use_cache=False)[:, 20:]
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-9, atol=1e-9)


def chosen(layer, scores, query):
    """Tokens that each key/value head of a row retains at ``query``, the plain way."""
    at = range(layer.sinks, query - layer.window + 1)
    return [{*sorted(at, key=lambda i: -scores[i, head])[: layer.retained]} for head in range(scores.shape[1])]


@pytest.mark.parametrize("recency", [0.0, 0.5])
def test_it_attends_to_the_best_scored_tokens(make_llama, tokens, recency):
    model = convert_model(make_llama(layers=1).double(), **NEAR, feature_map=None, recency=recency)
    (layer,) = layers_of(model)
    seen = []
    layer.register_forward_hook(lambda m, args, options, out: seen.append((*args, options, out)), with_kwargs=True)
    logits(model, tokens, use_cache=False)
    ((q, k, v, options, out),) = seen
    unturned = options["rotation"].undo(q, k)[1]
    scores = layer.score(unturned, v) + recency * torch.arange(50)[:, None]
    torch.testing.assert_close(layer.scores(k, v, options["rotation"]), scores, rtol=1e-5, atol=1e-5)
    ends = layer.expiries(scores)
    for row, query in itertools.product(range(2), (17, 30, 49)):
        window, sinks = {*range(query - WINDOW + 1, query + 1)}, {*range(SINKS)}
        for head, kept in enumerate(chosen(layer, scores[row], query)):
            near = sorted(window | sinks | kept)
            assert near == [j for j in range(query + 1) if query < ends[row, head, j]]
            for group in (2 * head, 2 * head + 1):
                weights = (k[row, near, head] @ q[row, query, group] * layer.feature_map.scale).softmax(0)
                torch.testing.assert_close(out[row, query, group], weights @ v[row, near, head], rtol=1e-9, atol=1e-9)
    late = [sum(kept, 0.0) / len(kept) for kept in chosen(layer, scores[0], 49)]
    assert (min(late) > 38) == (recency > 0)  # older ones fade


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox", "smollm3", "gpt2"])
def test_scores_see_keys_before_rotary_embedding_where_there_is_a_way(families, name):
    """Whatever the far branch reads: the same tokens are retained in one form and the other."""
    family = families[name]
    model, ids = convert_model(family.build().double(), **NEAR), family.inputs(40)["input_ids"]
    layer, seen = layers_of(model)[0], []
    layer.register_forward_hook(lambda m, args, options, out: seen.append((args, options)), with_kwargs=True)
    positions = torch.arange(40).expand(2, -1)
    for offset in (0, 100):
        logits(model, ids, position_ids=positions + offset, attention_mask=torch.ones_like(ids), use_cache=False)
    first, second = (layer.scores(*args[1:], options.get("rotation")) for args, options in seen)
    rotated, _ = (layer.scores(*args[1:]) for args, _ in seen)
    if name == "gpt2":  # learned positions
        assert seen[0][1]["rotation"] is None
    else:
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(first, rotated, atol=1e-2)


def test_an_embedding_that_cannot_be_undone_is_left_in_the_scores(make_llama, tokens, monkeypatch):
    def fail(*args, **kwargs):
        raise ConversionError("it cannot be undone")

    monkeypatch.setattr("linattn.convert.rotary.verify", fail)
    model = convert_model(make_llama().double(), **NEAR)
    want = logits(model, tokens, use_cache=False)
    assert torch.isfinite(want).all()
    got, _ = read(model, tokens, [20, 1, 1])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    monkeypatch.undo()
    assert not torch.allclose(logits(convert_model(make_llama().double(), **NEAR), tokens), want)
    assert "_linattn_rotated" not in revert_model(model).model.layers[0].self_attn.__dict__


@pytest.mark.parametrize("parameters", [{}, {"rope_parameters": YARN}, {"rope_parameters": {"rope_type": "dynamic"}}])
def test_keys_turned_back_as_they_drop_out_are_those_kept_before_rotary_embedding(make_llama, tokens, parameters):
    if parameters.get("rope_parameters", {}).get("rope_type") == "dynamic":
        parameters = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    model = convert_model(make_llama(**parameters), **FAR, decay="data")
    logits(model, tokens)
    both = copy.deepcopy(model)
    for layer in layers_of(both):
        layer.keeps_far_keys = True
    for sizes in ([17, 1, 1, 4, 9], [1] * 40):
        (got, cache), (want, held) = read(model, tokens, sizes), read(both, tokens, sizes)
        assert torch.equal(got, want)
        turned = not layers_of(model)[0].keeps_far_keys
        assert turned == (parameters.get("rope_parameters", {}).get("rope_type") != "dynamic")
        for one, other in zip(cache.layers, held.layers, strict=True):
            assert (one.state.kept_far_k is None) == turned
            assert torch.equal(one.state.kept_k, other.state.kept_k)


def test_positions_in_the_cache_are_those_of_the_retained_tokens(make_llama, tokens):
    model = convert_model(make_llama().double(), **FAR)
    layer, calls = layers_of(model)[0], []
    layer.register_forward_hook(lambda m, args, options, out: calls.append((*args, options)), with_kwargs=True)
    positions = torch.arange(50).expand(2, -1) * 3 + 7
    cache = empty_cache(model)
    for part, at in zip(tokens.split([23, 1, 1, 25], 1), positions.split([23, 1, 1, 25], 1), strict=True):
        logits(model, part, position_ids=at, past_key_values=cache)
    k, held = torch.cat([k for _, k, _, _ in calls], 1), cache.layers[0]
    for row, head in itertools.product(range(2), range(2)):
        index = (held.kept_positions[row, :, head] - 7) // 3
        assert index.unique().numel() == RETAINED
        assert torch.equal(held.state.kept_k[row, :, head], k[row, index, head])


def test_one_step_turns_back_one_key_of_the_window_and_one_of_each_pool(make_llama, tokens, monkeypatch):
    model, turned = convert_model(make_llama(layers=1), **FAR), []
    cache = empty_cache(model)
    logits(model, tokens, past_key_values=cache)
    undo_at = Rotation.undo_at
    monkeypatch.setattr(Rotation, "undo_at", lambda self, k, at: turned.append(tuple(k.shape)) or undo_at(self, k, at))
    logits(model, tokens[:, :1], past_key_values=cache)
    assert turned == [(2, 1, 2, 8), (2, 2, 1, 8)]


def test_it_is_saved_and_loaded(model, tokens, tmp_path):
    model = model.float()
    model.save_pretrained(tmp_path)
    for again in (linattn.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(again.eval(), tokens), logits(model, tokens))
        for mine, loaded in zip(layers_of(model), layers_of(again), strict=True):
            assert (loaded.retained, loaded.recency) == (mine.retained, mine.recency)
            assert (loaded.score is None) == (mine.retained == 0)
    assert type(revert_model(model)) is LlamaForCausalLM
    assert not any("score" in name for name in model.state_dict())


def test_a_base_checkpoint_fills_the_scores_of_a_converted_model(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model = convert_model(make_llama(), **NEAR)
    again, report = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert any(name.endswith("linattn.score.hidden_weight") for name in report["missing_keys"])
    for layer in layers_of(again):
        assert 0.5 < layer.score.weight.std() * layer.score.weight.shape[1] ** 0.5 < 2
        assert torch.equal(layer.score.std, torch.ones_like(layer.score.std))


def test_layers_may_retain_as_many_as_each_likes(make_llama):
    plan = plan_model(make_llama(), window=5, retained=[0, 4, 13], recency=0.01, keep_softmax=[1], softmax_window=9)
    assert [layer.retained for layer in plan.layers] == [0, 0, 13]  # the kept one has none
    assert "13 retained tokens" in str(plan).splitlines()[4]
    assert str(plan).count("retained tokens") == 1
    assert ConversionPlan.from_json(plan.to_json()) == plan
    data = plan.to_dict()
    for layer in data["layers"]:
        del layer["retained"], layer["recency"]
    assert [layer.retained for layer in ConversionPlan.from_dict(data).layers] == [0, 0, 0]  # an older plan
    assert [layer.retained for layer in plan.keep(2).layers if layer.kind == "convert"] == [0]


def test_a_bound_layer_retains_what_its_plan_gives_it(make_llama, tokens):
    plan = plan_model(make_llama(), **FAR, keep_softmax=[1], softmax_window=6)
    plan.layers[1].retained = 8
    model = convert_model(make_llama().double(), plan=plan)
    assert [layer.retained for layer in layers_of(model)] == [9, 8, 9]
    got, cache = read(model, tokens, [20, 1, 1])
    torch.testing.assert_close(got, logits(model, tokens, use_cache=False), rtol=1e-9, atol=1e-9)
    assert cache.layers[1].state.retained == 8
    assert state_bytes(model, 77) == state_bytes(model, 77, probe=77)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"retained": -1}, OptionError, "retained: got -1"),
        ({"retained": 2.0}, OptionError, "retained: got 2.0"),
        ({"retained": [3, 4]}, OptionError, "retained: got 2 of them"),
        ({"recency": float("nan")}, OptionError, "recency: got nan"),
        ({"recency": "slow"}, OptionError, "recency: got 'slow'"),
        ({"feature_map": "cosformer"}, OptionError, "retained: .*a position"),
        ({"retained_distance": 4, "far_rope": False}, OptionError, "retained_distance: got 4, .* window = 5"),
        ({"retained_distance": True, "far_rope": False}, OptionError, "retained_distance: got True"),
        ({"retained_distance": 9.0, "far_rope": False}, OptionError, "retained_distance: got 9.0"),
        ({"retained_distance": 9, "far_rope": False, "retained": 0}, OptionError, "retained_distance: .*retained > 0"),
        ({"retained_distance": 9}, OptionError, "retained_distance: .*far_rope=False"),
        ({"retained_distance": 9, "feature_map": None}, OptionError, "retained_distance: .*far_rope=False"),
    ],
)
def test_refusals_of_a_plan(make_llama, options, error, says):
    model = make_llama()
    with pytest.raises(error, match=says):
        convert_model(model, **(NEAR | options))
    assert type(model) is LlamaForCausalLM


def test_bidirectional_and_packed_attention_retain_nothing(families, make_llama, tokens):
    with pytest.raises(ConversionError, match=r"retained: .*bidirectional"):
        convert_model(families["bert"].build(), window=5, sinks=0, retained=3)
    model = convert_model(make_llama(), **NEAR)
    packed = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with pytest.raises(UnsupportedError, match="retained=9"):
        logits(model, tokens[:1], position_ids=packed, use_cache=False)


def test_bytes_are_those_of_the_plan_at_every_length(model, tokens):
    held = []
    for length in (3, REACH, 50):
        _, cache = read(model, tokens[:1, :length], [2])
        held.append(cache_bytes(cache)[0])
    assert held == [state_bytes(model, 10**6).linear] * 3


def test_bytes_of_retained_tokens(make_llama):
    """Key, value, score, both positions and summed decay of each head's tokens, and a score for the window's."""
    options = {"far_rope": False, "decay": "fixed"}
    plain, model = (convert_model(make_llama(), **options, window=5, retained=m) for m in (0, 9))
    more = state_bytes(model, 99).linear - state_bytes(plain, 99).linear
    assert more == 3 * 2 * (9 * (2 * 8 + 4) + 5) * 4  # layers, key/value heads, 4 bytes each
    bound = convert_model(make_llama(), **options, window=5, retained=9, retained_distance=20)
    with far_off(bound):  # whose retained keys are turned back all the same
        assert state_bytes(bound, 40) == state_bytes(bound, 40, probe=40)


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_equal_bytes_are_paid_for_the_pool(make_llama, by_layer, dtype):
    student = convert_model(make_llama().to(dtype), **(FAR | {"retained": [0, 9, 20]}), decay="fixed")
    budget = state_bytes(student, 99).linear
    plan = equal_bytes_plan(student, by_layer=by_layer)
    assert {(layer.feature_map, layer.retained) for layer in plan.layers} == {(None, 0)}
    windows = [layer.window for layer in plan.layers]
    assert sorted(set(windows)) == (sorted(windows) if by_layer else windows[:1])
    control = convert_model(make_llama().to(dtype), plan=plan)
    one = 3 * 2 * 2 * 8 * dtype.itemsize  # a token more in all layers
    assert budget - one < state_bytes(control, 99).linear <= budget
    assert all(layer.score is None for layer in layers_of(control))


def test_each_ablation_takes_its_part_away(make_llama, tokens):
    model = convert_model(make_llama(), **FAR, decay="fixed")
    plain = convert_model(make_llama(), **(FAR | {"retained": 0}), decay="fixed")
    alone = convert_model(make_llama(), **NEAR, feature_map=None)
    for mine, other in zip(layers_of(model), layers_of(alone), strict=True):
        other.score.load_state_dict(mine.score.state_dict())
    before = logits(model, tokens)
    with retained_off(model):
        torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=0, atol=0)
        torch.testing.assert_close(read(model, tokens, [20, 1])[0], logits(plain, tokens), rtol=1e-3, atol=1e-3)
    for off in (far_off, window_only):
        with off(model):
            torch.testing.assert_close(logits(model, tokens), logits(alone, tokens), rtol=1e-4, atol=1e-4)
    with near_off(model), near_off(plain):
        assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert torch.equal(logits(model, tokens), before)
    assert not torch.allclose(before, logits(plain, tokens), atol=1e-2)


def test_a_layer_by_itself_is_the_operator_with_its_scores(make_llama, tokens):
    layer = layers_of(convert_model(make_llama(), **NEAR, decay="fixed"))[0]
    q, k, v = torch.randn(2, 30, 4, 8), torch.randn(2, 30, 2, 8), torch.randn(2, 30, 2, 8)
    cache = LinattnCacheLayer()
    parts = []
    for part in (slice(0, 20), slice(20, 30)):
        cache.update(k[:, part].transpose(1, 2), v[:, part].transpose(1, 2))
        parts.append(layer(q[:, part], k[:, part], v[:, part], cache_layer=cache))
    options = {"feature_map": layer.feature_map, "decay": layer.log_gates(k), "far_bias": layer.far_bias}
    want = kernel_attention(q, k, v, **NEAR, **options, scores=layer.scores(k, v), impl="reference").out
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)
    assert layer.reach == REACH
    with pytest.raises(UnsupportedError, match="Packed sequences"):
        layer(q, k, v, cu_seqlens=torch.tensor([0, 30, 60]))


def test_gradients_pass_by_the_scores(make_llama, tokens):
    model = convert_model(make_llama(), **FAR, decay="fixed")
    assert all(not p.requires_grad for layer in layers_of(model) for p in layer.score.parameters())
    for p in model.parameters():
        p.requires_grad_(True)
    model(tokens, use_cache=False).logits.square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (".score." in name), name


def test_a_score_reads_all_heads_standardised():
    torch.manual_seed(0)
    score = TokenScore(2, 4, 3, width=16)
    k, v = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 3)
    out = score(k, v)
    assert (out.shape, out.dtype) == ((2, 5, 2), torch.float32)
    mean, std = torch.randn(14), torch.rand(14) + 0.5
    score.mean.copy_(mean)
    score.std.copy_(std)
    x = torch.cat([k.flatten(2), v.flatten(2)], -1)
    torch.testing.assert_close(score.of(x * std + mean), out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(score(k, v), out)
    half = copy.deepcopy(score).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = half(k.bfloat16(), v.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, half.float()(k.bfloat16(), v.bfloat16()), rtol=0, atol=0)
    again = {name: t.clone() for name, t in score.state_dict().items()}
    score.reset_parameters()
    assert not torch.equal(score.weight, again["weight"])
    assert not score.mean.any()


def test_tokens_to_be_looked_up_gain_a_bonus_for_all_heads_alike():
    torch.manual_seed(0)
    score = TokenScore(2, 4, 3, width=16)
    k, v = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 3)
    score.mean.normal_()
    score.std.uniform_(0.5, 1.5)
    plain = score(k, v)
    score.lookup_weight.data.normal_()
    score.lookup_bias.data.fill_(-0.7)
    x = (torch.cat([k.flatten(2), v.flatten(2)], -1) - score.mean) / score.std
    assert torch.equal(score(k, v), plain)
    assert torch.equal(score.attention(x), plain)
    score.lookup_bonus.fill_(12.0)
    gain = 12 * torch.sigmoid(4 * ((x * score.lookup_weight).sum(-1) - 0.7))
    assert gain.min() < 1 < 11 < gain.max()
    torch.testing.assert_close(score(k, v), plain + gain[..., None], rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(score).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = half(k.bfloat16(), v.bfloat16())
    torch.testing.assert_close(got, half.float()(k.bfloat16(), v.bfloat16()), rtol=0, atol=0)
    score.reset_parameters()
    assert not any(t.any() for name, t in score.state_dict().items() if "lookup" in name)


P = 13
BOUNDED = FAR | {"retained_distance": P}


@pytest.fixture
def passed(monkeypatch):
    """What each call of the operator had of q_retained and retained_distance."""
    found = []

    def recorded(*args, **options):
        found.append((options["q_retained"], options["retained_distance"]))
        return kernel_attention(*args, **options)

    monkeypatch.setattr(hf, "kernel_attention", recorded)
    return found


def inputs_of(model, ids, **options):
    """Queries, keys and the other inputs of the first converted layer in a call of ``model``."""
    seen = []
    hook = layers_of(model)[0].register_forward_pre_hook(
        lambda m, args, options: seen.append((*args[:2], options)), with_kwargs=True
    )
    logits(model, ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama", "yarn", "qwen3", "stablelm", "gpt-neox", "cohere"])
def test_far_retained_tokens_are_met_as_the_family_embeds_them_that_far_away(families, name, passed):
    """The first layer's hidden states know no position: at others, the model itself says what queries and keys are."""
    family = families["llama" if name == "yarn" else name]
    model = family.build(**({"rope_parameters": YARN} if name == "yarn" else {}))
    layer = layers_of(convert_model(model.double(), **BOUNDED))[0]
    ids = family.inputs(40)["input_ids"]
    q, k, seen = inputs_of(model, ids)
    used, distance = passed[0]
    assert distance == P
    far_q, _, _ = inputs_of(model, ids, position_ids=torch.full_like(ids, P))
    _, far_k, _ = inputs_of(model, ids, position_ids=torch.zeros_like(ids))
    _, plain = layer.far_inputs(q, k, seen["rotation"])

    def products(queries, keys):
        groups = queries.shape[2] // keys.shape[2]
        return torch.einsum("bqhd,bkhd->bhqk", queries, keys.repeat_interleave(groups, 2))

    want = products(far_q, far_k)
    for got in (used, layer.retained_queries(q, seen["rotation"])):
        torch.testing.assert_close(products(got, plain), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    half = layer.retained_queries(q.bfloat16(), seen["rotation"])
    assert half.dtype == torch.bfloat16
    assert (half - used).abs().max() <= 2 * torch.finfo(half.dtype).eps * used.abs().max()


def test_the_distance_alone_counts_not_the_positions(make_llama, tokens):
    model, free = (convert_model(make_llama().double(), **FAR, retained_distance=at) for at in (P, None))
    want, mask = logits(model, tokens, use_cache=False), torch.ones_like(tokens)
    shifted = torch.arange(50).expand(2, -1) + 7
    got = logits(model, tokens, attention_mask=mask, position_ids=shifted, use_cache=False)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)  # angles are float32
    assert not torch.allclose(want, logits(free, tokens, use_cache=False), rtol=1e-2, atol=1e-2)


def test_nothing_is_moved_while_no_token_is_that_far(make_llama, tokens, passed):
    model, free = (convert_model(make_llama(), **FAR, retained_distance=at) for at in (P, None))

    def moved(*args, **options):
        passed.clear()
        logits(model, *args, **options)
        assert len({found is None for pair in passed for found in pair}) == 1
        return passed[0][0] is not None

    assert torch.equal(logits(model, tokens[:, : P + 1]), logits(free, tokens[:, : P + 1]))
    assert not moved(tokens[:, : P + 1], use_cache=False)
    assert moved(tokens[:, : P + 2], use_cache=False)
    cache = empty_cache(model)
    assert not moved(tokens[:, :P], past_key_values=cache)
    assert not moved(tokens[:, P : P + 1], past_key_values=cache)
    assert moved(tokens[:, P + 1 : P + 2], past_key_values=cache)
    with retained_off(model):
        assert not moved(tokens, use_cache=False)


def test_the_control_without_far_branch_has_the_same_distances(make_llama, tokens, passed):
    model, free = (convert_model(make_llama().double(), **FAR, retained_distance=at) for at in (P, None))
    with window_only(free):
        unbounded = logits(free, tokens, use_cache=False)
    for length in (P + 1, P + 2):  # shorter than window and retained tokens, which else are plain softmax
        with window_only(model):
            got = logits(model, tokens[:, :length], use_cache=False)
        torch.testing.assert_close(got[:, : P + 1], unbounded[:, : P + 1], rtol=1e-9, atol=1e-9)
    passed.clear()
    with window_only(model):
        want = logits(model, tokens, use_cache=False)
        assert all(distance == P for _, distance in passed)
        got, _ = read(model, tokens, [10, 1, 1, 20, 1])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(want, unbounded, rtol=1e-2, atol=1e-2)
    assert {layer.retained_distance for layer in equal_bytes_plan(model).layers} == {None}


def test_a_plan_says_how_far_and_older_ones_do_not(make_llama, families):
    options = {"window": 5, "far_rope": False, "retained": [0, 4, 13], "retained_distance": P}
    plan = plan_model(make_llama(), **options)
    assert [layer.retained_distance for layer in plan.layers] == [None, P, P]
    assert f"4 retained tokens at most {P} tokens away" in str(plan)
    assert ConversionPlan.from_json(plan.to_json()) == plan
    data = plan.to_dict()
    for layer in data["layers"]:
        del layer["retained_distance"]
    assert {layer.retained_distance for layer in ConversionPlan.from_dict(data).layers} == {None}
    plan.layers[2].far_rope = True
    with pytest.raises(OptionError, match=r"layers\.2\.self_attn: retained_distance: .*far_rope=False"):
        plan.check()
    assert plan.keep(2, softmax_window=9).layers[2].retained_distance is None
    without = plan_model(families["smollm3"].build(), **BOUNDED)
    assert [layer.retained_distance for layer in without.layers] == [P, None]  # the second embeds nothing


def test_it_is_shown_and_kept(make_llama, tokens, tmp_path):
    model = convert_model(make_llama(), **BOUNDED)
    assert f"retained_distance={P}" in repr(model)
    model.save_pretrained(tmp_path)
    again = linattn.load(tmp_path)
    assert [layer.retained_distance for layer in layers_of(again)] == [P] * 3
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_distance_needs_the_angles(make_llama):
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ConversionError, match=r"retained_distance: .*rope_type='dynamic'.*retained_distance=None"):
        convert_model(make_llama(rope_parameters=parameters), **BOUNDED)
    plan, alone = plan_model(make_llama(), **BOUNDED), make_llama()
    del alone.model.rotary_emb
    with pytest.raises(ConversionError, match="retained_distance: no module above"):
        convert_model(alone, plan=plan)
    model = convert_model(make_llama(), **BOUNDED)
    attention, hidden = model.model.layers[0].self_attn, torch.randn(1, 20, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(20)[None])
    call = {"hidden_states": hidden, "attention_mask": None, "position_embeddings": angles}
    with pytest.raises(ConversionError, match=r"retained_distance: .*without position_ids"):
        attention(**call)
    with pytest.raises(ConversionError, match=r"retained_distance: .*with other angles"):
        attention(**call, position_ids=torch.arange(1, 21)[None])
