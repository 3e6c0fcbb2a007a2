"""KernelAttention: the one operator as an nn.Module, weights interchangeable with torch.nn.MultiheadAttention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linattn.errors import DtypeError, OptionError, ShapeError, StateError, UnsupportedError
from linattn.feature_maps import FeatureMap, SequenceMap, make
from linattn.kernels import AttentionOutput, kernel_attention
from linattn.kernels.validate import check_is_state, check_tensor
from linattn.state import AttentionState

SHORTEST_HALF_LIFE, LONGEST_HALF_LIFE = 64.0, 8192.0
"""Half-lives in tokens between which the decays of a layer's key/value heads start, log-spaced."""


def starting_log_half_lives(heads: int) -> Tensor:
    """``[heads]`` float64: logs of the half-lives at which decays start; one head alone takes the middle."""
    shortest, longest = math.log(SHORTEST_HALF_LIFE), math.log(LONGEST_HALF_LIFE)
    if heads == 1:
        shortest = longest = (shortest + longest) / 2
    return torch.linspace(shortest, longest, heads, dtype=torch.float64)


class KernelAttention(nn.Module):
    """Multi-head attention with a memory of fixed size: exact near, through feature maps far.

    For query t, the ``sinks`` first tokens and the last ``window`` ones are attended exactly as in softmax attention,
    all others through the feature map φ, under one normaliser (see :func:`linattn.kernels.kernel_attention`). As long
    as T ≤ window + sinks (bidirectional: T ≤ window) this *is* softmax attention. ``window=0, sinks=0`` is pure kernel
    attention; ``far=False`` is sliding-window attention with sinks.

    It is called like :class:`torch.nn.MultiheadAttention`, ``out, _ = attn(x)`` or ``attn(query, key, value)``, with
    these differences: ``batch_first`` and ``causal`` are True unless said otherwise; ``mask`` is True where a token is
    real (``key_padding_mask`` is True where it is not); the second of the two results is the state, because attention
    weights never exist.

    Args:
        embed_dim: size E of the input and output.
        num_heads: query heads H.
        feature_map: φ as a registered name (:func:`linattn.feature_maps.available`), a class, or an instance. A
            :class:`~linattn.feature_maps.SequenceMap` replaces the operator as a whole and takes neither window,
            sinks, decay nor state. None only with ``far=False``.
        num_kv_heads: key/value heads Hkv; H is a multiple of it. Default H.
        head_dim: size D of one head. Default ``embed_dim / num_heads``.
        feature_map_options: options of the map when it is given by name or class.
        window: recent tokens attended exactly, the query's own included; bidirectional: those with |t − i| < window.
        sinks: first tokens of each sequence, attended exactly by all.
        far: False deletes the far branch.
        decay: forgetting in the far branch, per key/value head, causal only. ``"fixed"``: one learned half-life,
            started log-spaced over 64 … 8192 tokens. ``"data"``: each token's gate is sigmoid(W x + b), started at the
            same half-lives with W = 0.
        far_bias: learn c, the log-weight of the far branch, for each query head (starts at 0).
        bias: biases in the four projections.
        rope: rotary position embedding: True for base 10,000, or the base.
        rope_far: also rotate what the feature map sees. False, the default, keeps rotation to the exact branch: rotated
            features do harm beyond the trained length. Pure kernel attention has no exact branch and needs True.
        qk_norm: RMSNorm over each query and key head, one weight for all heads, before the rotation.
        dropout: probability of zeroing an element of the heads' outputs while training (attention weights, which
            MultiheadAttention drops, never exist).
        causal: False for bidirectional and cross attention.
        kdim, vdim: sizes of the ``key`` and ``value`` inputs. Default E.
        batch_first: inputs and output are ``[B, T, E]``; False: ``[T, B, E]``.
        impl: implementation of the operator, see :func:`linattn.kernels.kernel_attention`.
        device, dtype: of the parameters.

    Raises:
        OptionError: a value outside its domain, or two options that contradict each other.
        FeatureMapError: the feature map is unknown, or does not fit the heads.

    Example:
        >>> attn = KernelAttention(64, 4, feature_map="favor+", window=16, sinks=2, rope=True)
        >>> x = torch.randn(2, 100, 64)
        >>> out, _ = attn(x)                                          # the whole sequence
        >>> first, state = attn(x[:, :60], return_state=True)         # or in pieces
        >>> second, state = attn(x[:, 60:], state=state, return_state=True)
        >>> torch.allclose(out, torch.cat([first, second], 1), atol=1e-5)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        feature_map: str | type[FeatureMap] | FeatureMap | None = "favor+",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_map_options: dict[str, Any] | None = None,
        window: int = 0,
        sinks: int = 0,
        far: bool = True,
        decay: str | None = None,
        far_bias: bool = False,
        bias: bool = True,
        rope: bool | float = False,
        rope_far: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        causal: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(embed_dim, num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise OptionError(
                f"embed_dim={embed_dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}: all must be positive and "
                "num_heads a multiple of num_kv_heads."
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise OptionError(
                    f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}; pass head_dim to choose the "
                    "heads' size yourself."
                )
            head_dim = embed_dim // num_heads
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window = window
        self.sinks = sinks
        self.far = far
        self.decay = decay
        self.rope = 10_000.0 if rope is True else float(rope) if rope else None
        self.rope_far = rope_far
        self.dropout = dropout
        self.causal = causal
        self.batch_first = batch_first
        self.impl = impl
        self._check_options(feature_map, feature_map_options, far_bias)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(self.vdim, num_kv_heads * head_dim, bias=bias, **factory)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **factory)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, **factory) if qk_norm else None
        self.feature_map = (
            None
            if feature_map is None
            else make(
                feature_map,
                head_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                **factory,
                **(feature_map_options or {}),
            )
        )
        if self.feature_map is not None and not self.feature_map.causal:
            self._check_bidirectional_map()
        # The large constant part of a gate is a parameter of its own, so that half precision rounds only the small
        # part that depends on the input.
        self.decay_proj = nn.Linear(embed_dim, num_kv_heads, bias=False, **factory) if decay == "data" else None
        self.decay_bias = nn.Parameter(torch.empty(num_kv_heads, **factory)) if decay == "data" else None
        self.log_half_life = nn.Parameter(torch.empty(num_kv_heads, **factory)) if decay == "fixed" else None
        self.far_bias = nn.Parameter(torch.empty(num_heads, **factory)) if far_bias else None
        self._reset_own_parameters()

    def _check_options(self, feature_map: object, feature_map_options: object, far_bias: bool) -> None:
        if min(self.kdim, self.vdim, self.head_dim) < 1 or min(self.window, self.sinks) < 0:
            raise OptionError(
                f"kdim={self.kdim}, vdim={self.vdim}, head_dim={self.head_dim} must be positive, window={self.window} "
                f"and sinks={self.sinks} not negative."
            )
        near = self.window > 0 or self.sinks > 0
        if not 0.0 <= self.dropout < 1.0:
            raise OptionError(f"dropout={self.dropout}: expected a probability in [0, 1).")
        if self.decay not in (None, "fixed", "data"):
            raise OptionError(f"decay={self.decay!r}: expected None, 'fixed' or 'data'.")
        if self.decay and not self.causal:
            raise OptionError(f"decay={self.decay!r} needs causal=True: forgetting has a direction.")
        if self.far and feature_map is None:
            raise OptionError("feature_map=None leaves the far branch without features; name one, or pass far=False.")
        if feature_map is None and feature_map_options:
            raise OptionError("feature_map_options came without a feature_map.")
        if not self.far:
            if not near:
                raise OptionError("far=False with window=0 and sinks=0 attends nothing; give a window.")
            if self.decay or far_bias or self.rope_far:
                raise OptionError("decay, far_bias and rope_far shape the far branch, which far=False deletes.")
        if far_bias and not near:
            raise OptionError("far_bias cancels in the normaliser when window=0 and sinks=0; give a window.")
        if self.rope is not None:
            if self.rope <= 0:
                raise OptionError(f"rope={self.rope}: expected True, False or a positive base.")
            if self.head_dim % 2:
                raise OptionError(f"rope rotates pairs and needs an even head_dim, got {self.head_dim}.")
            if not near and not self.rope_far:
                raise OptionError(
                    "rope acts on the exact branch alone, and window=0, sinks=0 leaves none; give a window, or pass "
                    "rope_far=True to rotate what the feature map sees."
                )
        elif self.rope_far:
            raise OptionError("rope_far=True needs rope.")

    def _check_bidirectional_map(self) -> None:
        name = type(self.feature_map).__name__
        if self.causal:
            raise OptionError(f"{name} is not usable causally; pass causal=False, or choose another feature map.")
        if isinstance(self.feature_map, SequenceMap) and (self.window or self.sinks):
            raise OptionError(f"{name} replaces the whole operator and takes neither window nor sinks.")

    def reset_parameters(self) -> None:
        """Fill all parameters and buffers with their starting values, in place (also after ``to_empty``)."""
        self._reset_own_parameters()
        if self.feature_map is not None:
            self.feature_map.reset_parameters()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.far_bias is not None:
            nn.init.zeros_(self.far_bias)
        log_half_life = starting_log_half_lives(self.num_kv_heads)
        if self.log_half_life is not None:
            self.log_half_life.copy_(log_half_life)
        if self.decay_proj is not None and self.decay_bias is not None:
            nn.init.zeros_(self.decay_proj.weight)
            # logsigmoid(b) = −ln 2 / half-life
            self.decay_bias.copy_(-torch.log(torch.expm1(math.log(2.0) * torch.exp(-log_half_life))))

    def new_state(
        self,
        batch_size: int,
        *,
        lookback: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> AttentionState:
        """The state of ``batch_size`` sequences before their first token.

        Args:
            batch_size: number of sequences N.
            lookback: tokens that it can roll back, see :class:`~linattn.AttentionState`.
            dtype: of keys and values in the window; that of the projections unless autocast changes it.
            device: default, that of the parameters.
        """
        self._check_stateful()
        return AttentionState.empty(
            batch_size,
            num_kv_heads=self.num_kv_heads,
            feature_dim=self.feature_map.feature_dim if self.far and self.feature_map is not None else 0,
            head_dim=self.head_dim,
            window=self.window,
            sinks=self.sinks,
            lookback=lookback,
            far_head_dim=self.head_dim if self._far_differs else None,
            decay=self.decay is not None,
            dtype=self.k_proj.weight.dtype if dtype is None else dtype,
            device=self.k_proj.weight.device if device is None else device,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: AttentionState | None = None,
        return_state: bool = False,
        lookback: int = 0,
    ) -> AttentionOutput:
        """Attend.

        Args:
            query: ``[B, T, E]`` (``[T, B, E]`` without ``batch_first``, here and below).
            key: ``[B, Tk, kdim]``, default ``query``. Tk ≠ T is cross attention: ``causal=False``, no window, no rope.
            value: ``[B, Tk, vdim]``, default ``key``.
            mask: ``[B, Tk]`` bool, True for real tokens. Padding may stand anywhere: it takes no position and leaves
                the state untouched; at padded queries the heads' outputs are zero.
            cu_seqlens: ``[N + 1]`` int32/int64 boundaries of N sequences packed along T, with B = 1.
            state: memory of earlier tokens, from ``return_state`` or :meth:`new_state`.
            return_state: also return the memory after the last token.
            lookback: tokens that the returned state can roll back.

        Returns:
            :class:`~linattn.kernels.AttentionOutput`: ``out`` in the shape of ``query``, and ``state`` or None.

        Raises:
            ShapeError: an input has the wrong rank or size.
            StateError: the state does not fit this module or batch.
            OptionError: a state without ``causal=True``.
        """
        if value is not None and key is None:
            raise OptionError("value came without key; pass both, or neither for self-attention.")
        key = query if key is None else key
        value = key if value is None else value
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if not isinstance(x, Tensor):
                raise DtypeError(f"{name}: got {type(x).__name__}, expected a torch.Tensor.")
            if x.ndim != 3 or x.shape[-1] != size:
                layout = "[B, T, {}]" if self.batch_first else "[T, B, {}]"
                raise ShapeError(f"{name}: got shape {tuple(x.shape)}, expected {layout.format(size)}.")
        check_tensor("mask", mask, query.device)
        check_tensor("cu_seqlens", cu_seqlens, query.device)
        check_is_state(state, query.device)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        q = self.q_proj(query).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(key).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(value).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast normalises in float32

        if isinstance(self.feature_map, SequenceMap):
            if state is not None or return_state or cu_seqlens is not None:
                raise UnsupportedError(
                    f"{type(self.feature_map).__name__} sees whole sequences of one length: no state, no cu_seqlens."
                )
            q, k = self._rotate(q, k, self._positions(query, key, mask, None, None))
            attended = AttentionOutput(self.feature_map.attend(q, k, v, mask))
        else:
            if state is not None or return_state:
                self._check_stateful()
            far_q, far_k = (q, k) if self._far_differs else (None, None)
            if self.rope is not None:
                q, k = self._rotate(q, k, self._positions(query, key, mask, cu_seqlens, state))
            attended = kernel_attention(
                q,
                k,
                v,
                feature_map=self.feature_map,
                window=self.window,
                sinks=self.sinks,
                far=self.far,
                decay=self._log_gates(query),
                far_bias=self.far_bias,
                q_far=far_q,
                k_far=far_k,
                causal=self.causal,
                mask=mask,
                cu_seqlens=cu_seqlens,
                state=state,
                return_state=return_state,
                lookback=lookback,
                impl=self.impl,
            )
        heads = F.dropout(attended.out.flatten(2), self.dropout, self.training)
        out = self.out_proj(heads)
        return AttentionOutput(out if self.batch_first else out.transpose(0, 1), attended.state)

    @property
    def _far_differs(self) -> bool:
        """The feature map sees other queries and keys than the exact branch."""
        return self.far and self.rope is not None and not self.rope_far

    def _check_stateful(self) -> None:
        if not self.causal:
            raise OptionError("A state is a memory of the past and needs causal=True.")

    def _log_gates(self, x: Tensor) -> Tensor | None:
        """``[Hkv]`` or ``[B, T, Hkv]`` log-gates ≤ 0, at least float32."""
        if self.log_half_life is not None:
            return -math.log(2.0) * torch.exp(-_at_least_float32(self.log_half_life))
        if self.decay_proj is not None and self.decay_bias is not None:
            return F.logsigmoid(_at_least_float32(self.decay_proj(x)) + _at_least_float32(self.decay_bias))
        return None

    def _positions(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: AttentionState | None,
    ) -> Tensor:
        """``[B or 1, T]`` positions of the tokens in their own sequences, counted on from the state."""
        tokens = query.shape[1]
        if key.shape[1] != tokens:
            raise ShapeError(
                f"key: got {key.shape[1]} tokens for {tokens} queries, but rope relates positions of one sequence; "
                "cross attention needs rope=False."
            )
        if mask is not None and mask.shape != query.shape[:2]:
            raise ShapeError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(query.shape[:2])}.")
        if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2):
            raise ShapeError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [N + 1].")
        sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is not None and state.batch_size != sequences:
            raise StateError(f"state: holds {state.batch_size} sequences, but {sequences} were given.")
        positions = torch.arange(tokens, device=query.device)[None]
        if cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens[1:-1].to(positions), positions, right=True)
            positions = positions - cu_seqlens.to(positions)[sequence]
            return positions if state is None else positions + state.length[sequence]
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
        return positions if state is None else positions + state.length[:, None]

    def _rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding (Su et al., 2021, arXiv:2104.09864), pairs (i, i + D/2) as in GPT-NeoX and Llama."""
        if self.rope is None:
            return q, k
        half = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float32) / self.head_dim
        angles = positions[..., None, None] * self.rope**-half
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        return rotate(q), rotate(k)

    @classmethod
    def from_multihead_attention(
        cls,
        mha: nn.MultiheadAttention,
        *,
        causal: bool,
        feature_map: str | type[FeatureMap] | FeatureMap | None = "favor+",
        feature_map_options: dict[str, Any] | None = None,
        window: int = 0,
        sinks: int = 0,
        far: bool = True,
        decay: str | None = None,
        far_bias: bool = False,
        impl: str = "auto",
    ) -> KernelAttention:
        """A kernel attention with a copy of the weights of ``mha``, in its layout, dtype, device and training mode.

        For T ≤ window + sinks (bidirectional: T ≤ window) the outputs are those of ``mha``, called with the causal mask
        if ``causal``.

        Args:
            mha: the module to take weights from.
            causal: whether ``mha`` was used with a causal mask. It has no default because ``mha`` does not know.
            feature_map, feature_map_options, window, sinks, far, decay, far_bias, impl: see :class:`KernelAttention`.

        Raises:
            DtypeError: ``mha`` is not a :class:`torch.nn.MultiheadAttention`.
            UnsupportedError: ``mha`` was built with ``add_bias_kv`` or ``add_zero_attn``.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise DtypeError(f"mha: got {type(mha).__name__}, expected torch.nn.MultiheadAttention.")
        for option, on in (("add_bias_kv", mha.bias_k is not None), ("add_zero_attn", mha.add_zero_attn)):
            if on:
                raise UnsupportedError(
                    f"mha was built with {option}=True, an extra token that KernelAttention does not have; "
                    f"use a MultiheadAttention without {option}."
                )
        weight = mha.out_proj.weight
        attn = cls(
            mha.embed_dim,
            mha.num_heads,
            feature_map=feature_map,
            feature_map_options=feature_map_options,
            window=window,
            sinks=sinks,
            far=far,
            decay=decay,
            far_bias=far_bias,
            bias=mha.in_proj_bias is not None,
            dropout=mha.dropout,
            causal=causal,
            kdim=mha.kdim,
            vdim=mha.vdim,
            batch_first=mha.batch_first,
            impl=impl,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for ours, theirs in attn._matching_parameters(mha):
                ours.copy_(theirs)
        return attn.train(mha.training)

    def to_multihead_attention(self) -> nn.MultiheadAttention:
        """A :class:`torch.nn.MultiheadAttention` with a copy of these weights: exact attention over all tokens.

        Raises:
            UnsupportedError: grouped key/value heads, another ``head_dim`` than E / H, rope or qk_norm, none of which
                MultiheadAttention has.
        """
        for option, on in (
            (f"num_kv_heads={self.num_kv_heads}", self.num_kv_heads != self.num_heads),
            (f"head_dim={self.head_dim}", self.head_dim * self.num_heads != self.embed_dim),
            (f"rope={self.rope}", self.rope is not None),
            ("qk_norm=True", self.q_norm is not None),
        ):
            if on:
                raise UnsupportedError(f"torch.nn.MultiheadAttention has no counterpart of {option}.")
        weight = self.out_proj.weight
        mha = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.q_proj.bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for ours, theirs in self._matching_parameters(mha):
                theirs.copy_(ours)
        return mha.train(self.training)

    def _matching_parameters(self, mha: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor]]:
        """Pairs (this module's tensor, the view of ``mha`` that it corresponds to)."""
        if mha.in_proj_weight is not None:
            weights = mha.in_proj_weight.chunk(3)
        else:
            weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        pairs = [(ours.weight, theirs) for ours, theirs in zip(projections, weights, strict=True)]
        pairs.append((self.out_proj.weight, mha.out_proj.weight))
        if mha.in_proj_bias is not None:
            pairs += [(ours.bias, theirs) for ours, theirs in zip(projections, mha.in_proj_bias.chunk(3), strict=True)]
            pairs.append((self.out_proj.bias, mha.out_proj.bias))
        return pairs

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"heads={self.num_heads}/{self.num_kv_heads}"]
        parts += [f"head_dim={self.head_dim}", f"causal={self.causal}"]
        parts += [
            f"{name}={size}" for name, size in (("kdim", self.kdim), ("vdim", self.vdim)) if size != self.embed_dim
        ]
        parts += [f"window={self.window}", f"sinks={self.sinks}"]
        if not self.far:
            parts.append("far=False")
        if self.decay is not None:
            parts.append(f"decay={self.decay!r}")
        if self.far_bias is not None:
            parts.append("far_bias=True")
        if self.rope is not None:
            parts += [f"rope={self.rope:g}", f"rope_far={self.rope_far}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if not self.batch_first:
            parts.append("batch_first=False")
        if self.impl != "auto":
            parts.append(f"impl={self.impl!r}")
        return ", ".join(parts)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
