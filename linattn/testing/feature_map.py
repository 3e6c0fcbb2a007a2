"""What every feature map must do, as tests that a user's own map inherits."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from linattn.errors import FeatureMapError, ShapeError, UnsupportedError
from linattn.feature_maps import FeatureMap, Features, SequenceMap
from linattn.kernels import AttentionOutput, kernel_attention
from linattn.state import AttentionState
from linattn.testing import budgets
from linattn.testing.checks import (
    check,
    check_finite,
    check_identical,
    check_same_state,
    check_within,
    fail,
    state_of,
)
from linattn.testing.dense import dense_attention, features

HEAD_SIZES: dict[str, Any] = {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}
LAYOUTS: dict[str, dict[str, Any]] = {"pure": {}, "hybrid": {"window": 5, "sinks": 2}}
CHUNK = 8
LENGTH = 21
"""Odd, and several chunks with a partial last one."""

each_layout = pytest.mark.parametrize("layout", list(LAYOUTS))


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor

    def map(self, fn: Any) -> Inputs:
        return Inputs(*(fn(x) for x in self))

    def leaves(self) -> Inputs:
        """Detached copies that collect gradients."""
        return self.map(lambda x: x.detach().clone().requires_grad_())


def draw(
    batch: int = 2,
    length: int = LENGTH,
    *,
    head_dim: int = 8,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    value_dim: int = 6,
    size: float = 0.5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Queries and keys of standard deviation ``size``, values of standard deviation 1."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return Inputs(
        size * normal(batch, length, num_heads, head_dim),
        size * normal(batch, length, num_kv_heads, head_dim),
        normal(batch, length, num_kv_heads, value_dim),
    ).map(lambda x: x.to(dtype))


def cotangent(out: Tensor, seed: int = 1) -> Tensor:
    """A fixed direction to differentiate along."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out)


def gradients(out: Tensor, inputs: Inputs, along: Tensor) -> dict[str, Tensor]:
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if out.requires_grad:  # an empty result hangs on nothing
        found = torch.autograd.grad(out, inputs, along, allow_unused=True, retain_graph=True)
    return {
        f"gradient of {name}": torch.zeros_like(x) if g is None else g
        for name, x, g in zip(Inputs._fields, inputs, found, strict=True)
    }


def check_long_bf16(attend: Callable[..., AttentionOutput], feature_map: FeatureMap) -> None:
    """Dense, chunked and stepwise agree in bfloat16 within the budget, at 16,384 tokens.

    Values drift from −1 to 1 along the sequence, so that a state that stops summing (as a bfloat16 one does once it is
    256 times what it adds) shows. Steps: the last 32 after a chunked prefill, and 512 from an empty state.

    Args:
        attend: the operator, as :func:`linattn.kernels.kernel_attention`.
        feature_map: of one head of size 16.
    """
    tail = 32
    for length, prefill in ((16_384, 16_384 - tail), (512, 0)):
        x = draw(1, length, head_dim=16, num_heads=1, num_kv_heads=1, value_dim=4)
        x = x._replace(v=0.5 * x.v + torch.linspace(-1, 1, length)[None, :, None, None]).map(lambda t: t.bfloat16())
        places = {"first": 0, "middle": length // 2, "last": length - tail}
        rows = torch.cat([start + torch.arange(tail) for start in places.values()])
        with torch.no_grad():
            low = dense_attention(*x, feature_map=feature_map, rows=rows).split(tail, 1)
            wide = copy.deepcopy(feature_map).double()
            exact = dense_attention(*x.map(Tensor.double), feature_map=wide, rows=rows).split(tail, 1)
            options: dict[str, Any] = {"feature_map": feature_map, "chunk_size": 128}
            chunked = attend(*x, **options).out[:, rows].split(tail, 1)
            steps, state = [], None
            if prefill:
                start = (t[:, :prefill] for t in x)
                state = attend(*start, return_state=True, **options).state
            for token in zip(*(t[:, prefill:].split(1, 1) for t in x), strict=True):
                out, state = attend(*token, state=state, return_state=True, **options)
                steps.append(out)
        stepwise = torch.cat(steps[-tail:], 1)
        found = [("chunked", place, chunked[i], i) for i, place in enumerate(places)]
        found.append(("stepwise", "last", stepwise, 2))
        for how, place, out, i in found:
            check_within(
                out.double(),
                exact[i],
                budgets.low_precision(torch.bfloat16, exact[i], low[i], count=length),
                f"{how} in bfloat16, {place} {tail} of {length} tokens, against float64",
                "long contexts lose what they have seen: sums or normalisers are not kept in float32.",
            )


class _MapContract:
    """What holds for every map, whatever it computes: it can be copied, saved, rebuilt and initialised on meta."""

    def make(self, **head_sizes: Any) -> FeatureMap:
        """A new map with the given ``head_dim``, ``num_heads``, ``num_kv_heads``, and ``device`` where asked for.

        It is also called with inputs of other dtypes than its parameters: cast inside, and return the input's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__}.make(**head_sizes) must return the feature map under test.")

    def evaluate(self, feature_map: Any) -> Iterator[tuple[str, Tensor]]:
        """Named results that two equal maps have in common."""
        raise NotImplementedError

    def check_equal_maps(self, actual: FeatureMap, expected: FeatureMap, what: str, meaning: str) -> None:
        for (name, mine), (_, other) in zip(self.evaluate(actual), self.evaluate(expected), strict=True):
            check_identical(mine, other, f"{what}: {name}", meaning)

    def make_changed(self) -> FeatureMap:
        """A map that is no longer as it was built."""
        feature_map = self.make(**HEAD_SIZES)
        if feature_map.random:
            cast(Any, feature_map).redraw()
        rng = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in feature_map.parameters():
                p.add_(torch.randn(p.shape, generator=rng), alpha=0.1)
        return feature_map

    def test_is_deterministic(self) -> None:
        feature_map = self.make(**HEAD_SIZES)
        self.check_equal_maps(
            feature_map, feature_map, "two calls on the same input", "results would not be reproducible."
        )

    def test_deepcopy(self) -> None:
        feature_map = self.make_changed()
        self.check_equal_maps(
            copy.deepcopy(feature_map), feature_map, "deepcopy", "a copied or reverted model would answer differently."
        )

    def test_pickle(self) -> None:
        feature_map = self.make_changed()
        # Here the bytes are our own, so unpickling them is safe.
        again = pickle.loads(pickle.dumps(feature_map))
        self.check_equal_maps(again, feature_map, "pickle", "worker processes would compute something else.")

    def test_state_dict_round_trip(self) -> None:
        feature_map = self.make_changed()
        file = io.BytesIO()
        torch.save(feature_map.state_dict(), file)
        file.seek(0)
        loaded = self.make(**HEAD_SIZES)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        meaning = (
            "a saved and reloaded model would answer differently: keep what was drawn or learned in the state_dict."
        )
        self.check_equal_maps(loaded, feature_map, "after load_state_dict", meaning)
        if feature_map.random:
            cast(Any, feature_map).redraw()
            cast(Any, loaded).redraw()
            what = "redraw after load_state_dict, which must bring the redraw counter"
            self.check_equal_maps(loaded, feature_map, what, meaning)

    def test_meta_init(self) -> None:
        torch.manual_seed(0)
        direct = self.make(**HEAD_SIZES)
        meta = self.make(**HEAD_SIZES, device="meta")
        tensors = {**dict(meta.named_parameters()), **dict(meta.named_buffers())}
        elsewhere = [name for name, t in tensors.items() if t.device.type != "meta"]
        meaning = "loading a pretrained model builds it on the meta device first, and would end up with garbage here."
        check(not elsewhere, f"device='meta' left {elsewhere} on another device.", meaning)
        meta.to_empty(device="cpu")
        for t in (*meta.parameters(), *meta.buffers()):
            with torch.no_grad():
                t.fill_(torch.nan if t.is_floating_point() else 77)  # what uninitialised memory may hold
        torch.manual_seed(0)
        meta.reset_parameters()
        self.check_equal_maps(meta, direct, "meta, to_empty, reset_parameters", meaning)

    def test_options_rebuild_the_map(self) -> None:
        feature_map = self.make_changed()
        options = feature_map.options()
        meaning = "a checkpoint could not rebuild the map: options() must hold every constructor option."
        check(json.loads(json.dumps(options)) == options, f"options() = {options} does not survive JSON.", meaning)
        try:
            again = type(feature_map)(**HEAD_SIZES, scale=feature_map.scale, **options)
        except TypeError as error:
            fail(f"{type(feature_map).__name__}(**head_sizes, **{options}): {error}.", meaning)
        check(again.options() == options, f"options() became {again.options()}, was {options}.", meaning)
        again.load_state_dict(feature_map.state_dict())
        self.check_equal_maps(again, feature_map, "rebuilt from options() and state_dict()", meaning)

    def test_declares_learning(self) -> None:
        feature_map = self.make(**HEAD_SIZES)
        trainable = [name for name, p in feature_map.named_parameters() if p.requires_grad]
        check(
            bool(trainable) == feature_map.learned,
            f"learned={feature_map.learned}, but the trainable parameters are {trainable}.",
            "training would miss the map's parameters, or look for some that do not exist.",
        )


class FeatureMapContract(_MapContract):
    """Tests that every causal feature map passes. A subclass defines :meth:`make`, and pytest does the rest:

        class TestMine(FeatureMapContract):
            def make(self, **head_sizes):
                return Mine(**head_sizes)

    They prove that attention with the map is causal, that it is the same computed at once, in pieces, token by token,
    padded or packed, that results stay finite, that what the map declares about itself is true, and that it can be
    saved and rebuilt. Tolerances are derived in :mod:`linattn.testing.budgets`.
    """

    impl: ClassVar[str] = "chunked"
    """Kernel the map is tested with."""
    huge: ClassVar[dict[torch.dtype, float]] = {torch.float16: 100.0, torch.bfloat16: 1e4}
    """Largest entries of queries and keys that must give finite results."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionOutput:
        """The operator under test."""
        return kernel_attention(q, k, v, impl=self.impl, chunk_size=options.pop("chunk_size", CHUNK), **options)

    def evaluate(self, feature_map: FeatureMap) -> Iterator[tuple[str, Tensor]]:
        x = draw(dtype=torch.float32)
        for side, phi in zip(("query", "key"), features(feature_map, x.q, x.k), strict=True):
            yield f"{side} features", phi.values
            if phi.log_scale is not None:
                yield f"{side} log_scale", phi.log_scale

    # Features

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_shapes_and_dtypes(self, dtype: torch.dtype) -> None:
        feature_map = self.make(**HEAD_SIZES)
        check(feature_map.causal, "causal is False.", "sequence-wise maps inherit SequenceMapContract.")
        for module in (feature_map, copy.deepcopy(feature_map).to(dtype)):
            x = draw(dtype=dtype)
            for side, tokens, phi in zip("qk", x, features(module, x.q, x.k), strict=False):
                meaning = f"{type(feature_map).__name__} breaks the tensor contract every kernel relies on."
                expected = (*tokens.shape[:3], module.feature_dim)
                check(
                    phi.values.shape == expected and phi.values.dtype == dtype,
                    f"features of {side}: {tuple(phi.values.shape)} {phi.values.dtype}, expected {expected} {dtype}.",
                    meaning,
                )
                check(
                    (phi.log_scale is not None) == feature_map.log_scaled,
                    f"log_scaled={feature_map.log_scaled}, but log_scale of {side} is {type(phi.log_scale).__name__}.",
                    meaning,
                )
                if phi.log_scale is not None:
                    wide = budgets.accumulator(dtype)
                    check(
                        phi.log_scale.shape == tokens.shape[:3] and phi.log_scale.dtype == wide,
                        f"log_scale of {side}: {tuple(phi.log_scale.shape)} {phi.log_scale.dtype}, expected "
                        f"{tuple(tokens.shape[:3])} {wide}.",
                        meaning,
                    )

    def test_refuses_other_heads(self) -> None:
        feature_map = self.make(**HEAD_SIZES)
        x = draw()
        for name, q, k in (
            ("head_dim", x.q[..., :-1], x.k[..., :-1]),
            ("heads", x.q[:, :, :-1], x.k),
            ("rank", x.q[0], x.k),
        ):
            try:
                feature_map(q, k)
            except ShapeError:
                continue
            shapes = f"q {tuple(q.shape)} and k {tuple(k.shape)}"
            fail(f"forward took {shapes}: wrong {name}.", "wrong shapes must end in ShapeError, not in numbers.")

    def test_features_are_per_token(self) -> None:
        feature_map = self.make(**HEAD_SIZES).double()
        x = draw()
        keep = torch.arange(LENGTH) % 3 == 0
        other = draw(seed=5, size=4.0).map(lambda t: t.clone())
        for mine, theirs in zip(other, x, strict=True):
            mine[:, keep] = theirs[:, keep]
        meaning = "the map mixes tokens: attention with it sees the future and cannot run step by step."
        before, after = features(feature_map, x.q, x.k), features(feature_map, other.q, other.k)
        for side, new, old in zip(("query", "key"), after, before, strict=True):
            what = f"{side} features of some tokens after other tokens changed"
            check_identical(new.values[:, keep], old.values[:, keep], what, meaning)
            if new.log_scale is not None and old.log_scale is not None:
                check_identical(new.log_scale[:, keep], old.log_scale[:, keep], f"{what}: log_scale", meaning)

    def test_uses_positions_as_declared(self) -> None:
        feature_map = self.make(**HEAD_SIZES).double()
        q = draw().q
        at = torch.arange(LENGTH).expand(2, -1)
        here, there = (feature_map.forward_queries(q, at + shift).values for shift in (0, 3))
        if feature_map.positional:
            check(
                not torch.equal(here, there),
                "positional=True, but positions change nothing.",
                "declare positional=False.",
            )
        else:
            check_identical(here, there, "positional=False, features at other positions", "declare positional=True.")

    @torch.no_grad()
    def test_kernel_is_as_declared(self) -> None:
        """φ(q)·φ(k) ≥ 0 if ``positive``, on random and adverse pairs; its mean is exp(scale · q·k) if ``unbiased``."""
        feature_map = self.make(head_dim=8, num_heads=4, num_kv_heads=4).double()
        if feature_map.positive:
            self._check_positive(feature_map)
        if feature_map.unbiased:
            self._check_unbiased(feature_map)

    def _check_positive(self, feature_map: FeatureMap) -> None:
        x = draw(1, 48, num_kv_heads=4, seed=3).q
        axes = torch.eye(8, dtype=x.dtype)[None, :, None].expand(-1, -1, 4, -1)
        tokens = torch.cat([x, -x, 8 * x, -8 * x, axes, -axes, 30 * axes, -30 * axes, 0 * axes, x.sign(), -x.sign()], 1)
        phi_q, phi_k = (phi.values[0].transpose(0, 1) for phi in features(feature_map, tokens, tokens))
        rounding = budgets.reordered(axes, count=phi_q.shape[-1]) * (phi_q.abs() @ phi_k.abs().mT)
        lowest = float((phi_q @ phi_k.mT + rounding).amin())
        meaning = "attention weights would be negative and the normaliser could cross zero."
        check(lowest >= 0, f"positive=True, but φ(q)·φ(k) falls to {lowest:.3g}.", meaning)

    def _check_unbiased(self, feature_map: FeatureMap) -> None:
        """The mean over redraws lies within 6 standard errors: 64 pairs exceed that by chance once in 10⁷ runs."""
        meaning = "the map does not estimate softmax attention: more features will not bring it closer."
        check(feature_map.random, "unbiased=True, but random=False.", meaning)
        q, k = (t[:, :, :1].expand(-1, -1, 4, -1) for t in draw(1, 8, num_kv_heads=4, size=0.4)[:2])
        exact = (feature_map.scale * q[0, :, 0] @ k[0, :, 0].T).exp()
        samples = []
        for _ in range(200):
            cast(Any, feature_map).redraw()
            phi_q, phi_k = features(feature_map, q, k)
            kernel = torch.einsum("bthf,bshf->hts", phi_q.values, phi_k.values)
            if phi_q.log_scale is not None and phi_k.log_scale is not None:
                kernel = kernel * (phi_q.log_scale[0].T[:, :, None] + phi_k.log_scale[0].T[:, None]).exp()
            samples.append(kernel.mean(0))  # one sample per redraw: heads may share what is drawn
        estimates = torch.stack(samples)
        standard_error = estimates.std(0) / len(samples) ** 0.5
        uncertain = float((standard_error / exact).max())
        check(uncertain < 0.1, f"the mean of 200 redraws is still {uncertain:.0%} uncertain.", meaning)
        off = (estimates.mean(0) - exact).abs()
        # A map whose redraws all agree has no spread: there rounding is all that may be off.
        worst, relative = float((off / (standard_error + 1e-12 * exact)).max()), float((off / exact).max())
        check(
            worst < 6,
            f"unbiased=True, but the mean of 200 redraws is off by {worst:.1f} standard errors ({relative:.1%}).",
            meaning,
        )

    def test_redraw(self) -> None:
        torch.manual_seed(0)
        feature_map = self.make(**HEAD_SIZES)
        if not feature_map.random:
            check(not hasattr(feature_map, "redraw"), "random=False, but it has redraw().", "declare random=True.")
            return
        torch.manual_seed(1)
        twin = self.make(**HEAD_SIZES)
        meaning = "ranks of one job would use different features: draw from the map's own seed and counter."
        self.check_equal_maps(twin, feature_map, "built under another global seed", meaning)
        before = next(iter(self.evaluate(feature_map)))[1]
        global_state = torch.get_rng_state()
        cast(Any, feature_map).redraw()
        check(torch.equal(torch.get_rng_state(), global_state), "redraw() advanced torch's global generator.", meaning)
        check(
            not torch.equal(next(iter(self.evaluate(feature_map)))[1], before),
            "redraw() changed nothing.",
            "random features would never be refreshed.",
        )
        cast(Any, twin).redraw()
        self.check_equal_maps(twin, feature_map, "after one redraw each", meaning)

    # Attention with the map

    @each_layout
    def test_equals_dense(self, layout: str) -> None:
        feature_map, x = self.make(**HEAD_SIZES).double(), draw().leaves()
        out = self.attend(*x, feature_map=feature_map, **LAYOUTS[layout]).out
        exact = dense_attention(*x, feature_map=feature_map, **LAYOUTS[layout])
        self.check_equal(out, exact, x, x, feature_map, "against one weight per pair of tokens", "the result is wrong.")

    @each_layout
    def test_causal_outputs(self, layout: str) -> None:
        feature_map, x = self.make(**HEAD_SIZES).double(), draw()
        seen = 11
        other = draw(seed=5, size=4.0).map(lambda t: t.clone())
        for mine, theirs in zip(other, x, strict=True):
            mine[:, :seen] = theirs[:, :seen]
        before, after = (self.attend(*t, feature_map=feature_map, **LAYOUTS[layout]).out[:, :seen] for t in (x, other))
        check_identical(
            after,
            before,
            "outputs before a token that changed",
            "they see the future: training looks too good, and generation differs from it.",
        )

    @each_layout
    def test_causal_gradients(self, layout: str) -> None:
        feature_map, x = self.make(**HEAD_SIZES).double(), draw().leaves()
        seen = 11
        out = self.attend(*x, feature_map=feature_map, **LAYOUTS[layout]).out[:, :seen]
        for name, gradient in gradients(out, x, cotangent(out)).items():
            check_identical(
                gradient[:, seen:],
                torch.zeros_like(gradient[:, seen:]),
                f"{name} at later tokens",
                "the loss at a token depends on its future: training learns to cheat.",
            )

    @each_layout
    @pytest.mark.parametrize("sizes", [(1, 20), (8, 13), (3, 1, 10, 7)], ids=str)
    def test_split_resume(self, layout: str, sizes: tuple[int, ...]) -> None:
        feature_map, options = self.make(**HEAD_SIZES).double(), LAYOUTS[layout]
        x, y = draw().leaves(), draw().leaves()
        whole = self.attend(*x, feature_map=feature_map, return_state=True, **options)
        outs, state = [], None
        for piece in zip(*(t.split(sizes, 1) for t in y), strict=True):
            result = self.attend(*piece, feature_map=feature_map, state=state, return_state=True, **options)
            outs.append(result.out)
            state = result.state
        out = torch.cat(outs, 1)
        what, meaning = (
            f"pieces of {sizes} tokens against the whole",
            "a conversation resumed from its state goes elsewhere.",
        )
        self.check_equal(out, whole.out, y, x, feature_map, what, meaning)
        self.check_equal_states(state_of(result), state_of(whole), feature_map, what, meaning)

    @pytest.mark.parametrize("side", ["left", "right"])
    @each_layout
    def test_padding(self, layout: str, side: str) -> None:
        feature_map, lengths = self.make(**HEAD_SIZES).double(), (LENGTH, 9, 1)
        options: dict[str, Any] = {"feature_map": feature_map, "return_state": True, **LAYOUTS[layout]}
        real = [draw(1, n, seed=n) for n in lengths]
        spans = [slice(LENGTH - n, None) if side == "left" else slice(0, n) for n in lengths]
        x = draw(len(lengths), seed=9, size=9.0).map(lambda t: t.clone())
        mask = torch.zeros(len(lengths), LENGTH, dtype=torch.bool)
        for row, (tokens, span) in enumerate(zip(real, spans, strict=True)):
            mask[row, span] = True
            for t, own in zip(x, tokens, strict=True):
                t[row, span] = own[0]
        x = x.leaves()
        padded = self.attend(*x, mask=mask, **options)
        meaning = f"an answer would depend on how long its neighbours in the batch are ({side} padding)."
        check_identical(padded.out[~mask], torch.zeros_like(padded.out[~mask]), "outputs at padding", meaning)
        for row, (tokens, span) in enumerate(zip(real, spans, strict=True)):
            alone = tokens.leaves()
            expected = self.attend(*alone, **options)
            what = f"{lengths[row]} tokens padded to {LENGTH} against unpadded"
            out = padded.out[row : row + 1, span]
            self.check_equal(out, expected.out, x, alone, feature_map, what, meaning, part=(slice(row, row + 1), span))
            state = state_of(padded).select(torch.tensor([row]))
            self.check_equal_states(state, state_of(expected), feature_map, what, meaning)

    @each_layout
    def test_packed(self, layout: str) -> None:
        feature_map, lengths = self.make(**HEAD_SIZES).double(), (7, 1, 0, 16)
        options: dict[str, Any] = {"feature_map": feature_map, "return_state": True, **LAYOUTS[layout]}
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        x = draw(1, sum(lengths)).leaves()
        packed = self.attend(*x, cu_seqlens=bounds, **options)
        for n, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            alone = x.map(lambda t, span=slice(start, stop): t[:, span]).leaves()
            expected = self.attend(*alone, **options)
            what, meaning = f"sequence {n} of a packed batch against itself alone", "documents leak into each other."
            part = (slice(None), slice(start, stop))
            self.check_equal(packed.out[part], expected.out, x, alone, feature_map, what, meaning, part=part)
            state = state_of(packed).select(torch.tensor([n]))
            self.check_equal_states(state, state_of(expected), feature_map, what, meaning)

    @each_layout
    def test_grouped_queries(self, layout: str) -> None:
        feature_map = self.make(**HEAD_SIZES).double()
        x, y = draw().leaves(), draw().leaves()
        group = HEAD_SIZES["num_heads"] // HEAD_SIZES["num_kv_heads"]
        k, v = (t.repeat_interleave(group, 2) for t in (y.k, y.v))
        out = self.attend(*x, feature_map=feature_map, **LAYOUTS[layout]).out
        repeated = self.attend(y.q, k, v, feature_map=RepeatedHeads(feature_map), **LAYOUTS[layout]).out
        what, meaning = "grouped queries against repeated keys and values", "grouped-query models would be wrong."
        self.check_equal(out, repeated, x, y, feature_map, what, meaning)

    @each_layout
    @pytest.mark.parametrize("length", [0, 1])
    def test_shortest(self, layout: str, length: int) -> None:
        feature_map, x = self.make(**HEAD_SIZES).double(), draw(length=length)
        out = self.attend(*x, feature_map=feature_map, **LAYOUTS[layout]).out
        phi_q, phi_k = features(feature_map, x.q, x.k)
        kernel = (phi_q.values * phi_k.values.repeat_interleave(2, 2)).sum(-1, keepdim=True)
        expected = x.v.repeat_interleave(2, 2)  # one token attends to itself,
        if layout == "pure":  # unless its kernel is zero, as it may be with rectified features
            expected = torch.where(kernel == 0, 0, expected)
        budget = budgets.reordered(expected, count=feature_map.feature_dim)
        check_within(out, expected, budget, f"{length} tokens", "the first token of a sequence is wrong.")

    @each_layout
    @pytest.mark.parametrize("size", ["zero", "tiny", "huge"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_finite(self, dtype: torch.dtype, size: str, layout: str) -> None:
        feature_map = self.make(**HEAD_SIZES)
        factor = {"zero": 0.0, "tiny": torch.finfo(dtype).tiny ** 0.5, "huge": self.huge[dtype] / 2}[size]
        q, k, v = draw()
        x = Inputs(factor * q.clamp(-2, 2), factor * k.clamp(-2, 2), v).map(lambda t: t.to(dtype)).leaves()
        out = self.attend(*x, feature_map=feature_map, **LAYOUTS[layout]).out
        meaning = f"{size} queries and keys in {dtype} break a forward or backward pass, and with it a training run."
        check_finite(out, f"outputs at {size} inputs in {dtype}", meaning)
        out.backward(cotangent(out))
        for name, t in (*x._asdict().items(), *feature_map.named_parameters()):
            if t.grad is not None:
                check_finite(t.grad, f"gradient of {name} at {size} inputs in {dtype}", meaning)

    def test_long_bf16(self) -> None:
        check_long_bf16(self.attend, self.make(head_dim=16, num_heads=1, num_kv_heads=1))

    # Comparing two float64 computations of the same thing

    @staticmethod
    def reordered(expected: Tensor, feature_map: FeatureMap) -> float:
        return budgets.reordered(expected, count=LENGTH * feature_map.feature_dim, terms=1.0)

    def check_equal(
        self,
        out: Tensor,
        expected: Tensor,
        inputs: Inputs,
        expected_inputs: Inputs,
        feature_map: FeatureMap,
        what: str,
        meaning: str,
        part: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> None:
        """Outputs, and gradients at ``part`` of ``inputs``, are equal up to the order of summation."""
        check_within(out, expected, self.reordered(expected, feature_map), what, meaning)
        along = cotangent(expected)
        mine, theirs = gradients(out, inputs, along), gradients(expected, expected_inputs, along)
        terms = budgets.largest(along) * budgets.largest(expected_inputs.v)
        for name, exact in theirs.items():
            budget = budgets.reordered(exact, count=LENGTH * feature_map.feature_dim, terms=terms)
            check_within(mine[name][part], exact, budget, f"{what}: {name}", meaning)

    def check_equal_states(
        self, state: AttentionState, expected: AttentionState, feature_map: FeatureMap, what: str, meaning: str
    ) -> None:
        check_same_state(state, expected, self.reordered(expected.kv, feature_map), f"{what}: state", meaning)


class RepeatedHeads:
    """A grouped map as the kernel of repeated keys: one key head per query head."""

    positional: bool
    causal = True

    def __init__(self, inner: FeatureMap) -> None:
        self.inner = inner
        self.scale = inner.scale
        self.positional = inner.positional
        self.group = inner.num_heads // inner.num_kv_heads

    @property
    def feature_dim(self) -> int:
        return self.inner.feature_dim

    def forward_queries(self, q: Tensor, positions: Tensor | None = None) -> Features:
        return self.inner.forward_queries(q, positions)

    def forward_keys(self, k: Tensor, positions: Tensor | None = None) -> Features:
        values, log_scale = self.inner.forward_keys(k[:, :, :: self.group], positions)
        repeat = self.group
        return Features(
            values.repeat_interleave(repeat, 2), None if log_scale is None else log_scale.repeat_interleave(repeat, 2)
        )


class SequenceMapContract(_MapContract):
    """Tests that every :class:`~linattn.feature_maps.SequenceMap` passes: used as :class:`FeatureMapContract`."""

    huge: ClassVar[dict[torch.dtype, float]] = FeatureMapContract.huge

    def attend(self, feature_map: FeatureMap, x: Inputs, mask: Tensor | None = None) -> Tensor:
        """The approximation under test."""
        return cast(SequenceMap, feature_map).attend(*x, mask=mask)

    def evaluate(self, feature_map: Any) -> Iterator[tuple[str, Tensor]]:
        yield "outputs", self.attend(feature_map, draw(dtype=torch.float32))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("length", [1, 7, LENGTH])
    def test_shapes_and_dtypes(self, dtype: torch.dtype, length: int) -> None:
        feature_map = self.make(**HEAD_SIZES)
        check(not feature_map.causal, "causal is True.", "per-token maps inherit FeatureMapContract.")
        for module in (feature_map, copy.deepcopy(feature_map).to(dtype)):
            x = draw(length=length, dtype=dtype)
            out = self.attend(module, x)
            expected = (*x.q.shape[:3], x.v.shape[-1])
            check(
                out.shape == expected and out.dtype == dtype,
                f"outputs: {tuple(out.shape)} {out.dtype}, expected {expected} {dtype}.",
                f"{type(feature_map).__name__} breaks the tensor contract.",
            )
            check_finite(out, f"outputs of {length} tokens in {dtype}", "the layer breaks the model.")

    def test_refuses_to_be_causal(self) -> None:
        feature_map, x = self.make(**HEAD_SIZES), draw(dtype=torch.float32)
        try:
            kernel_attention(*x, feature_map=feature_map, causal=True)
        except (FeatureMapError, UnsupportedError):
            return
        fail(
            "kernel_attention(causal=True) took a map that sees the whole sequence.",
            "a language model would be trained on its own future.",
        )

    def test_padded_tokens_change_nothing(self) -> None:
        feature_map, x, other = self.make(**HEAD_SIZES).double(), draw(), draw(seed=4, size=9.0)
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, 13:] = mask[1, :4] = False
        changed = Inputs(*(torch.where(mask[..., None, None], a, b) for a, b in zip(x, other, strict=True)))
        before, after = (self.attend(feature_map, t.leaves(), mask) for t in (x, changed))
        meaning = "what stands in the padding leaks into the answer."
        check_within(
            after[mask], before[mask], budgets.reordered(before, count=LENGTH**2), "outputs at real tokens", meaning
        )

    def test_right_padding(self) -> None:
        feature_map, lengths = self.make(**HEAD_SIZES).double(), (LENGTH, 9, 1)
        x = draw(len(lengths), seed=2)
        mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        out = self.attend(feature_map, x, mask)
        for row, n in enumerate(lengths):
            expected = self.attend(feature_map, x.map(lambda t, row=row, n=n: t[row : row + 1, :n]))
            check_within(
                out[row : row + 1, :n],
                expected,
                budgets.reordered(expected, count=LENGTH**2),
                f"{n} tokens padded to {LENGTH} against unpadded",
                "an answer would depend on how long its neighbours in the batch are.",
            )

    def test_grouped_queries(self) -> None:
        feature_map, x = self.make(**HEAD_SIZES).double(), draw()
        out = self.attend(feature_map, x)
        q = x.q.clone()
        q[:, :, 2:] += 1.0  # the second group of query heads
        changed = self.attend(feature_map, x._replace(q=q))
        meaning = "grouped-query models would be wrong."
        check_identical(changed[:, :, :2], out[:, :, :2], "heads 0–1 after queries of heads 2–3 changed", meaning)
        k = x.k.clone()
        k[:, :, 1] += torch.linspace(0, 2, LENGTH, dtype=k.dtype)[:, None]
        changed = self.attend(feature_map, x._replace(k=k))
        check_identical(changed[:, :, :2], out[:, :, :2], "heads 0–1 after key head 1 changed", meaning)
        check(not torch.equal(changed[:, :, 2:], out[:, :, 2:]), "key head 1 does not reach heads 2–3.", meaning)

    @pytest.mark.parametrize("size", ["zero", "tiny", "huge"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_finite(self, dtype: torch.dtype, size: str) -> None:
        feature_map = self.make(**HEAD_SIZES)
        factor = {"zero": 0.0, "tiny": torch.finfo(dtype).tiny ** 0.5, "huge": self.huge[dtype] / 2}[size]
        q, k, v = draw()
        x = Inputs(factor * q.clamp(-2, 2), factor * k.clamp(-2, 2), v).map(lambda t: t.to(dtype)).leaves()
        out = self.attend(feature_map, x)
        meaning = f"{size} queries and keys in {dtype} break a forward or backward pass, and with it a training run."
        check_finite(out, f"outputs at {size} inputs in {dtype}", meaning)
        out.backward(cotangent(out))
        for name, t in (*x._asdict().items(), *feature_map.named_parameters()):
            if t.grad is not None:
                check_finite(t.grad, f"gradient of {name} at {size} inputs in {dtype}", meaning)
