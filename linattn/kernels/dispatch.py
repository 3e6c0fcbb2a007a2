"""Chooses the implementation of a checked call, and says what it chose."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linattn.errors import FeatureMapError, OptionError, UnsupportedError
from linattn.kernels import chunked, reference
from linattn.kernels.precision import autocast
from linattn.kernels.validate import Call
from linattn.state import AttentionState

logger = logging.getLogger("linattn")


def _triton_backend() -> Any:
    try:
        from linattn.kernels.triton import backend
    except ImportError as error:
        raise UnsupportedError(f"impl='triton': Triton cannot be imported ({error}); use impl='chunked'.") from error
    return backend


def _triton(call: Call) -> tuple[Tensor, AttentionState | None]:
    found: tuple[Tensor, AttentionState | None] = _triton_backend().attend(call)
    return found


IMPLEMENTATIONS: dict[str, Callable[[Call], tuple[Tensor, AttentionState | None]]] = {
    "reference": reference.attend,
    "chunked": chunked.attend,
    "triton": _triton,
}
_announced: set[str] = set()


def choose(call: Call) -> str:
    """The implementation ``impl="auto"`` stands for: Triton kernels on a GPU that they support, else plain PyTorch."""
    if call.q.device.type != "cuda":
        return "chunked"
    try:
        from linattn.kernels.triton import backend
    except ImportError:
        return "chunked"
    return "chunked" if backend.refusal(call) else "triton"


def dispatch(call: Call, impl: str) -> tuple[Tensor, AttentionState | None]:
    """Run a call on the implementation asked for; an explicit choice is never replaced by another."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise OptionError(f"impl: got {impl!r}, expected 'auto' or one of {', '.join(map(repr, IMPLEMENTATIONS))}.")
    attend = getattr(call.feature_map, "attend", None)
    if attend is not None:
        return _attend_whole_sequence(call, attend), None
    if impl == "auto":
        impl = choose(call)
        _announce(impl)
    run = IMPLEMENTATIONS[impl]
    if call.retained and impl != "reference":
        if impl == "triton":
            _triton_backend().check(call)
        run = functools.partial(_attend_retained, impl=impl)
    if call.autocast is None:
        return run(call)
    with autocast(call.q, None):  # sums and normalisers are float32 whatever the caller computes in
        return run(call)


def _attend_retained(call: Call, *, impl: str) -> tuple[Tensor, AttentionState | None]:
    from linattn.kernels import retain  # which calls this module for the far part

    return retain.attend(call, impl)


def _announce(impl: str) -> None:
    """Log the automatic choice once per process; a graph being compiled neither holds a log line nor asks for one."""
    if not torch.compiler.is_compiling() and impl not in _announced:
        _announced.add(impl)
        logger.info("linattn: impl='auto' runs the %s implementation", impl)


def _attend_whole_sequence(call: Call, attend: Callable[..., Tensor]) -> Tensor:
    """A map that replaces the operator as a whole (Nyströmformer, Linformer): it has no window, sinks or far part."""
    extras = {
        "window": call.window,
        "sinks": call.sinks,
        "retained": call.retained,
        "far_bias": call.far_bias is not None,
        "softcap": call.softcap is not None,
        "sink_logits": call.sink_logits is not None,
        "cu_seqlens": call.cu_seqlens is not None,
        "q_far": call.q_far is not None,
        "q_sink": call.q_sink is not None,
    }
    given = [name for name, value in extras.items() if value]
    if given:
        raise FeatureMapError(
            f"{', '.join(given)}: {type(call.feature_map).__name__} approximates the whole attention matrix and takes "
            "none of these; drop them, or choose a per-token feature map."
        )
    return attend(call.q, call.k, call.v, call.mask)
