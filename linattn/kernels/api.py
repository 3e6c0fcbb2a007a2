"""The public functions of the one operator."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from linattn.errors import ShapeError
from linattn.kernels.dispatch import dispatch
from linattn.kernels.protocols import GivenFeatures, KernelFeatureMap
from linattn.kernels.validate import accumulation_dtype, check_qkv, resolve
from linattn.state import AttentionState


class AttentionOutput(NamedTuple):
    """Result of an attention call.

    Attributes:
        out: ``[B, T, H, V]`` in the dtype of ``v``. Zero at padded queries where they have a position (causal, or with
            a window); bidirectional without a window, a mask is about keys only and every query is answered.
        state: the memory after the last token if ``return_state``, else None.
    """

    out: Tensor
    state: AttentionState | None = None


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: KernelFeatureMap | None,
    window: int = 0,
    sinks: int = 0,
    far: bool = True,
    decay: Tensor | None = None,
    far_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    q_far: Tensor | None = None,
    k_far: Tensor | None = None,
    q_sink: Tensor | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    lookback: int = 0,
    retained: int = 0,
    scores: Tensor | None = None,
    q_retained: Tensor | None = None,
    retained_distance: int | None = None,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    """Attention over ``window`` recent tokens and ``sinks`` exactly, over the rest through feature maps.

    For query t, near(t) = sinks ∪ the last ``window`` tokens (t included) ∪ the ``retained`` best-scored tokens behind
    them, and far(t) = every earlier token not near:

        out_t = Σ_i w_ti v_i / Σ_i w_ti,   w_ti = exp(scale · q_t·k_i)                        for i in near(t)
                                           w_ti = exp(far_bias + G_t − G_i) φ_q(q_t)·φ_k(k_i)  for i in far(t)

    with G the running sum of ``decay``. One normaliser for both, computed in log space, in float32 also under autocast
    (which the feature map itself runs under, and which settles the dtype where q, k and v differ).

    Args:
        q: ``[B, T, H, D]``. k: ``[B, Tk, Hkv, D]``. v: ``[B, Tk, Hkv, V]``. H a multiple of Hkv. Tk = T unless cross
            attention (``causal=False`` and no window).
        feature_map: φ, an object with ``forward_queries`` and ``forward_keys`` (a
            :class:`~linattn.feature_maps.FeatureMap`). May be None only with ``far=False``.
        window: tokens attended exactly, the query's own included. Bidirectional: |t − i| < window.
        sinks: first tokens of each sequence attended exactly by all.
        far: False deletes the far branch: sliding-window attention with sinks.
        decay: log-gates ≤ 0: ``[Hkv]`` (the same for every token) or ``[B, T, Hkv]``. Causal only. Token i's weight at
            t is multiplied by exp(Σ_{i<j≤t} decay_j), in the far branch. −∞ forgets everything.
        far_bias: ``[H]`` the log-weight c of the far branch. Default 0.
        scale: softmax scale. Default the feature map's ``scale``, else D ** -0.5.
        softcap: near logits become softcap · tanh(logit / softcap).
        sink_logits: ``[H]`` learned logits that enter the normaliser with no value (as in GPT-OSS).
        q_far, k_far: ``[B, T, H, D']``, ``[B, T, Hkv, D']`` what the feature map sees, if not q and k (queries and keys
            before rotary embedding, say).
        q_sink: ``[B, T, H, D]`` what meets the sinks that the window has left behind, if not q: queries at other
            rotary positions, say. Causal only.
        causal: False for bidirectional and cross attention.
        mask: ``[B, Tk]`` bool, True for real tokens. Padded tokens may stand anywhere; they take no position, no part
            in the window, and leave the state untouched.
        cu_seqlens: ``[N + 1]`` int32/int64 boundaries of N sequences packed along T, with B = 1.
        state: memory of earlier tokens, N = B (or N = the packed sequences).
        return_state: also return the memory after the last token.
        lookback: tokens that the returned state can roll back.
        retained: tokens M behind the window that are attended exactly, for each key/value head the best-scored so far,
            sinks not counted; of equal scores the older. A score is settled when its token is written, so one that
            drops out never comes back: it goes on in the far branch, decayed by its true age. ("Locret",
            arXiv:2410.01805, trains such scores for evicting a cache.) Causal only.
        scores: ``[B, T, Hkv]`` floating point, what each token is worth keeping; read without gradients. With
            ``retained`` only.
        q_retained: ``[B, T, H, D]`` what meets the ``k_far`` of retained tokens more than ``retained_distance`` tokens
            back, which q and k have no part in any more: queries at that rotary distance, say, from keys before rotary
            embedding. Both together, of an integer ≥ window.
        chunk_size: tokens per chunk of the chunked implementation.
        impl: ``"reference"`` (dense), ``"chunked"`` (PyTorch, O(T) memory), ``"triton"`` (GPU kernels; raises
            :class:`~linattn.errors.UnsupportedError` with the reason where they cannot run) or ``"auto"``: Triton
            kernels on a GPU that they support, else chunked.

    Returns:
        :class:`AttentionOutput`.
    """
    call = resolve(
        q,
        k,
        v,
        feature_map=feature_map,
        window=window,
        sinks=sinks,
        far=far,
        decay=decay,
        far_bias=far_bias,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        q_far=q_far,
        k_far=k_far,
        q_sink=q_sink,
        causal=causal,
        mask=mask,
        cu_seqlens=cu_seqlens,
        state=state,
        return_state=return_state,
        lookback=lookback,
        chunk_size=chunk_size,
        retained=retained,
        scores=scores,
        q_retained=q_retained,
        retained_distance=retained_distance,
    )
    return AttentionOutput(*dispatch(call, impl))


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    log_scale_q: Tensor | None = None,
    log_scale_k: Tensor | None = None,
    decay: Tensor | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: AttentionState | None = None,
    return_state: bool = False,
    lookback: int = 0,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    """Normalised linear attention on given features: :func:`kernel_attention` with no exact part.

        out_t = Σ_{i≤t} w_ti v_i / Σ_{i≤t} w_ti,   w_ti = exp(a_t + b_i + G_t − G_i) φ_q,t · φ_k,i

    (Katharopoulos et al. 2020, eq. 8, with decay and log-scales.)

    Args:
        phi_q: ``[B, T, H, F]``. phi_k: ``[B, Tk, Hkv, F]``. v: ``[B, Tk, Hkv, V]``.
        log_scale_q: ``[B, T, H]`` the queries' log-scale a. It cancels in the output and is accepted for symmetry.
        log_scale_k: ``[B, Tk, Hkv]`` the keys' log-scale b.
        decay, causal, mask, cu_seqlens, state, return_state, lookback, chunk_size, impl: as in
            :func:`kernel_attention`.

    Returns:
        :class:`AttentionOutput`.
    """
    phi_q, phi_k, v = check_qkv(phi_q, phi_k, v, ("phi_q", "phi_k", "v"), "F")
    if log_scale_q is not None and log_scale_q.shape != phi_q.shape[:3]:
        raise ShapeError(f"log_scale_q: got {tuple(log_scale_q.shape)}, expected {tuple(phi_q.shape[:3])}.")
    if log_scale_k is not None and log_scale_k.shape != phi_k.shape[:3]:
        raise ShapeError(f"log_scale_k: got {tuple(log_scale_k.shape)}, expected {tuple(phi_k.shape[:3])}.")
    wide = accumulation_dtype(v)
    q, k, given = GivenFeatures.beside(phi_q, phi_k, log_scale_k, wide)
    values = v if log_scale_k is None else v.to(wide)
    call = resolve(
        q,
        k,
        values,
        feature_map=given,
        window=0,
        sinks=0,
        far=True,
        decay=decay,
        far_bias=None,
        scale=None,
        softcap=None,
        sink_logits=None,
        q_far=None,
        k_far=None,
        q_sink=None,
        causal=causal,
        mask=mask,
        cu_seqlens=cu_seqlens,
        state=state,
        return_state=return_state,
        lookback=lookback,
        chunk_size=chunk_size,
        checked=True,
    )
    out, end = dispatch(call, impl)
    return AttentionOutput(out if out.dtype == v.dtype else out.to(v.dtype), end)
