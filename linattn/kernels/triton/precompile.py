"""Kernels of a new kind of call, compiled side by side.

Triton compiles a kernel when it is first started, so the first call of a process would compile all of its kernels one
after the other. Here a call of a new kind runs once on meta tensors, which collects its launches; threads compile what
they need, and the call that follows finds it. A training forward pass has the kernels of its backward pass compiled,
too, and does not wait for them. The passes of the compiler, ptxas and the C compiler run outside Python's lock.

Nothing here is needed for a result: what is not foreseen, or fails, Triton compiles when it is started.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode

from linattn.kernels.triton import runtime

Body: TypeAlias = Callable[..., Sequence[Tensor | None]]
Tensors: TypeAlias = Sequence[Tensor | None]
Sequel: TypeAlias = Callable[
    [tuple[Any, ...], tuple[bool, ...], Tensors, Tensors], tuple[Body, tuple[Any, ...], Tensors]
]

logger = logging.getLogger("linattn")

IN_THREADS = runtime.NVIDIA and hasattr(triton, "AsyncCompileMode")
"""This release of Triton is made to compile in threads; 3.3 is not, and makes other code in several than in one."""
MOST_THREADS = 16
_MOST = 8192

sequels: dict[Body, Sequel] = {}
"""What follows a call of a body, from its settings, which tensors need a gradient, the tensors and the results."""

_kinds: set[tuple[Any, ...]] = set()
_compiling: dict[tuple[Any, ...], Future[None]] = {}
_lock = threading.Lock()


class _Pointer:
    """What Triton asks a tensor for before it compiles."""

    def __init__(self, t: Tensor) -> None:
        self.dtype = t.dtype
        self._address = int(t.storage_offset()) * t.element_size() % 16

    def data_ptr(self) -> int:
        return self._address


class _Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    """And constants."""

    def key(self, device: int) -> tuple[Any, ...]:
        """Equal for launches that Triton compiles alike."""
        return self.kernel, device, *map(_specialised, self.args), *self.options.items()


class _Collector(TorchFunctionMode):
    """In a recorder's place: launches of this thread are written down, not started."""

    collects = True

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[_Launch] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like and args[0].is_contiguous():  # on meta tensors it imports symbolic algebra
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="meta")
        return func(*args, **kwargs)

    def collect(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        args = tuple([_Pointer(a) if isinstance(a, Tensor) else a for a in args])
        self.launches.append(_Launch(kernel, args, options))

    def __enter__(self) -> _Collector:
        super().__enter__()
        self._before, runtime.local.recorder = runtime.local.recorder, self
        return self

    def __exit__(self, *error: Any) -> None:
        runtime.local.recorder = self._before
        super().__exit__(*error)


def prepare(body: Body, settings: tuple[Any, ...], tensors: Tensors) -> None:
    """Compile the kernels that ``body(*settings, *tensors)`` will start, unless a call of its kind was here before."""
    threads = min(_cpus(), MOST_THREADS)
    if not IN_THREADS or threads < 2 or torch.cuda.is_current_stream_capturing():
        return
    device = tensors[0].get_device()  # type: ignore[union-attr]
    try:
        kind = (body, settings, device, torch.backends.cuda.matmul.allow_tf32, *map(_kind, tensors))
        if kind in _kinds:
            return
        now, soon = _foreseen(body, settings, tensors)
        for kernel in {launch.kernel for launch in (*now, *soon)}:
            _ready(kernel, device)
        with _lock:
            pool: ThreadPoolExecutor | None = None
            for launch in (*_largest_first(now), *_largest_first(soon)):
                key = launch.key(device)
                if key not in _compiling:
                    pool = pool or ThreadPoolExecutor(threads, "linattn-compile")
                    _compiling[key] = pool.submit(_compile, launch, device)
            awaited = [_compiling[launch.key(device)] for launch in now]
        if pool is not None:
            pool.shutdown(wait=False)  # its threads end with their work
        wait(awaited)
        with _lock:
            if max(len(_kinds), len(_compiling)) >= _MOST:
                _kinds.clear()
                _compiling.clear()
            _kinds.add(kind)
    except Exception:
        logger.debug("linattn: kernels of %s were not foreseen; they are compiled as they start", body, exc_info=True)


def _foreseen(body: Body, settings: tuple[Any, ...], tensors: Tensors) -> tuple[list[_Launch], list[_Launch]]:
    """Launches of a call, and of the one that follows it."""
    twins: Tensors = [None if t is None else _twin(t) for t in tensors]
    with _Collector() as call:
        results = body(*settings, *twins)
    sequel = sequels.get(body)
    if sequel is None:
        return call.launches, []
    needs = tuple([t is not None and t.requires_grad for t in tensors])
    body, settings, twins = sequel(settings, needs, twins, results)
    with _Collector() as following:
        body(*settings, *twins)
    return call.launches, following.launches


def _largest_first(launches: list[_Launch]) -> list[_Launch]:
    """Kernels of many arguments take longest to compile."""
    return sorted(launches, key=lambda launch: -len(launch.args))


def _twin(t: Tensor) -> Tensor:
    """A meta tensor like ``t``, as far from the start of its storage as ``t`` is from an address that 16 divides."""
    offset = t.data_ptr() % 16 // t.element_size()
    size = offset + 1 + sum([(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)]) if t.numel() else offset
    return torch.empty(size, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), offset)


def _ready(kernel: Any, device: int) -> None:
    """Have a kernel make, in one thread, what it makes once: two threads would make it twice and lose one."""
    kernel.cache_key  # noqa: B018
    kernel.device_caches[device]


def _compile(launch: _Launch, device: int) -> None:
    kernel, args, options = launch
    try:
        with torch.cuda.device(device):  # threads begin on the first one
            compiled = kernel.warmup(*args, grid=(1,), **options)
            if compiled is not None:  # some releases compile a launcher for each signature
                triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception:
        logger.debug("linattn: %s was not compiled beforehand; it is when it starts", kernel, exc_info=True)


def _specialised(argument: Any) -> Any:
    """What a kernel is compiled for of an argument."""
    if isinstance(argument, _Pointer):
        return argument.dtype, argument.data_ptr() == 0
    if isinstance(argument, int) and not isinstance(argument, bool):
        return argument == 1, argument % 16 == 0, argument.bit_length() < 32
    return float if isinstance(argument, float) else argument


def _kind(t: Tensor | None) -> Any:
    """What kernels are chosen by of a tensor: nearly so of its first two sizes, which may differ in every call."""
    if t is None:
        return None
    sizes = [((n - 1).bit_length(), n % 16 == 0) for n in t.shape[:2]]
    return t.dtype, t.data_ptr() % 16, *sizes, t.shape[2:], *map(_specialised, t.stride())


def _cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
