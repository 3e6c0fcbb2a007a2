"""Calls that come again are repeated from a record of what they did.

What a call allocates and launches follows from the sizes, strides, dtypes and alignment of its tensors and from its
settings. The first call of a kind runs as it is written, the second is recorded while it runs, and later ones allocate,
fill in the addresses and start the kernels. A plan holds no tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linattn.kernels.triton import precompile, runtime

Body: TypeAlias = Callable[..., Sequence[Tensor | None]]
Step: TypeAlias = Callable[[list[Any], list[Any], int], None]

MOST = 1024
"""Kinds of calls that are remembered, the latest used."""
_ALIGNED = 256
_SMALL = 1 << 16
"""Bytes that may stay allocated until the end of a call, where they were released before it."""
_SEEN, _NEVER = "seen once", "not to be planned"

_plans: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_lock = threading.Lock()


def run(body: Body, settings: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """``body(*settings, *tensors)``, which must depend on nothing else but the tf32 flag, without gradient.

    ``settings`` are hashable. The first tensor is never None.
    """
    if _is_watched() or torch.compiler.is_compiling():
        return body(*settings, *tensors)
    marks: list[Any] = [body, settings, tensors[0].get_device(), torch.backends.cuda.matmul.allow_tf32]  # type: ignore[union-attr]
    words: list[Any] = []
    for t in tensors:
        if t is None:
            marks.append(None)
            words.append(None)
        else:
            word = t.data_ptr()
            words.append(word)
            marks += (t.shape, t.stride(), t.dtype, word % 16)
    key = tuple(marks)
    with _lock:
        found = _plans.get(key)
        if found is not None:
            _plans.move_to_end(key)
    if found.__class__ is Plan:
        return found(tensors, words)
    if found is None:
        precompile.prepare(body, settings, tensors)
        _keep(key, _SEEN)
    elif found is _SEEN:
        tensors = _told_apart(tensors)
        recorder = Recorder(tensors)
        with recorder:
            results = body(*settings, *tensors)
        _keep(key, recorder.plan(results) or _NEVER)
        return results
    return body(*settings, *tensors)


def forget() -> None:
    """Drop all plans, as after a change of something that their keys do not hold."""
    with _lock:
        _plans.clear()


def _is_watched() -> bool:
    """Whether somebody looks at the operations of a call, or stands in for them."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _told_apart(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same tensors, none twice: one that is given as both query and key says nothing of later calls."""
    known: set[int] = set()
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.detach() if t is not None and id(t) in known else t)
        known.add(id(t))
    return found


def _keep(key: tuple[Any, ...], value: Any) -> None:
    with _lock:
        _plans[key] = value
        while len(_plans) > MOST:
            _plans.popitem(last=False)


class Plan:
    """What a call does: allocations, operations and launches on numbered slots, of which the inputs are the first.

    Attributes:
        steps: functions of the slots' tensors and of the words that launches pick their arguments from: an address for
            each slot, then constants. Off NVIDIA's chips a word is the tensor itself.
        slots: how many. constants: the words after those of the inputs, as they are before any step.
        results: slots of the results, −1 for None.
    """

    __slots__ = ("constants", "results", "slots", "steps")

    def __init__(self, steps: list[Step], slots: int, constants: list[Any], results: list[int]) -> None:
        self.steps, self.slots, self.constants, self.results = steps, slots, constants, results

    def __call__(self, tensors: Sequence[Tensor | None], words: list[Any]) -> list[Tensor | None]:
        slots = [*tensors, *[None] * (self.slots - len(tensors) + 1)]  # slot −1 stays None
        words = (words if runtime.NVIDIA else list(tensors)) + self.constants
        stream = runtime.stream()
        for step in self.steps:
            step(slots, words, stream)
        return [slots[i] for i in self.results]


_word: Callable[[Tensor], Any] = Tensor.data_ptr if runtime.NVIDIA else lambda t: t

_aten: Any = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_UNFORESEEN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)


class _Allocation:
    """An uninitialised tensor. ``seen``: something else than a launch takes it."""

    def __init__(self, slot: int, like: Tensor) -> None:
        self.slot, self.seen = slot, False
        self.shape, self.stride, self.dtype, self.device = tuple(like.shape), like.stride(), like.dtype, like.device
        self.dense = like.is_contiguous()
        self.bytes = like.numel() * like.element_size()


class _Release:
    def __init__(self, slot: int) -> None:
        self.slot = slot


class Recorder(TorchDispatchMode):
    """Writes down what a call does while it runs, in this thread."""

    collects = False

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.events: list[_Allocation | _Release | Step] = []
        self.slot_of: dict[int, int] = {}
        self.watched: dict[int, weakref.ref[Tensor]] = {}
        self.allocations: dict[int, _Allocation] = {}
        self.launches: list[tuple[int, Any, tuple[int, ...] | None, list[Any]]] = []
        self.slots, self.inputs = len(tensors), len(tensors)
        self.works = True
        self.rests = False
        """While a kernel is started: what its launcher does is its own."""
        for slot, t in enumerate(tensors):
            if t is not None:
                self.slot_of.setdefault(id(t), slot)

    def __enter__(self) -> Recorder:
        super().__enter__()
        runtime.local.recorder = self
        return self

    def __exit__(self, *error: Any) -> None:
        runtime.local.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.rests:
            return out
        if isinstance(out, Tensor) and func in _EMPTY and out.layout == torch.strided:
            slot = self._new(out)
            self.allocations[slot] = found = _Allocation(slot, out)
            self.events.append(found)
            return out
        if any(tag in func.tags for tag in _UNFORESEEN) and not _indexes_by_number(func, args):
            self.works = False
        spec, named = self._spec(args), {name: self._spec(value) for name, value in kwargs.items()}
        if isinstance(out, Tensor):
            self.events.append(_operation(func, spec, named, self._new(out)))
        elif isinstance(out, tuple | list) and all(isinstance(t, Tensor) for t in out):
            self.events.append(_operation(func, spec, named, [self._new(t) for t in out]))
        else:
            self.works = False
        return out

    def launched(self, start: Any, grid: tuple[int, ...] | None, arguments: tuple[Any, ...]) -> None:
        """A kernel was started: a compiled one on ``grid``, or a function that takes the arguments."""
        self.launches.append((len(self.events), start, grid, [self._launched(a) for a in arguments]))
        self.events.append(lambda slots, words, stream: None)  # its place, until all slots are known

    def _launched(self, argument: Any) -> Any:
        return _Slot(self._slot(argument)) if isinstance(argument, Tensor) else argument

    def _new(self, t: Tensor) -> int:
        known = self.slot_of.get(id(t))
        if known is not None:
            return known
        slot, name = self.slots, id(t)
        self.slots += 1
        self.slot_of[name] = slot

        def gone(_: Any) -> None:
            self.slot_of.pop(name, None)
            self.watched.pop(slot, None)
            self.events.append(_Release(slot))

        self.watched[slot] = weakref.ref(t, gone)
        return slot

    def _slot(self, t: Tensor) -> int:
        slot = self.slot_of.get(id(t))
        if slot is None:  # a tensor from elsewhere, which a plan must not hold
            self.works = False
            return -1
        return slot

    def _spec(self, argument: Any) -> Any:
        """An operation's argument, with slots for tensors."""
        if isinstance(argument, Tensor):
            slot = self._slot(argument)
            if slot in self.allocations:
                self.allocations[slot].seen = True
            return _Slot(slot)
        if isinstance(argument, tuple | list):
            found = [self._spec(a) for a in argument]
            return _Several(found) if any(isinstance(a, _Slot | _Several) for a in found) else argument
        return argument

    def _is_worth(self, release: _Release) -> bool:
        allocation = self.allocations.get(release.slot)
        return allocation is None or allocation.bytes > _SMALL

    def plan(self, results: Sequence[Tensor | None]) -> Plan | None:
        """The plan of a call that gave ``results``, or None if it does what cannot be foreseen."""
        kept = [-1 if t is None else self._slot(t) for t in results]
        if not self.works:
            return None
        events = list(self.events)  # what dies from here on dies with the results
        self.watched.clear()
        for slot in kept:
            if slot in self.allocations:
                self.allocations[slot].seen = True
        constants: list[Any] = [None] * (self.slots - self.inputs)
        for at, start, grid, arguments in self.launches:
            picked = []
            for a in arguments:
                if isinstance(a, _Slot):
                    picked.append(int(a))
                else:
                    picked.append(self.inputs + len(constants))
                    constants.append(a)
            events[at] = _launch(start, grid, itemgetter(*picked))
        events = [e for e in events if not isinstance(e, _Release) or self._is_worth(e)]
        while events and isinstance(events[-1], _Release):
            events.pop()  # released at the end of the call
        released = {e.slot for e in events if isinstance(e, _Release)}
        steps: list[Step] = []
        for stretch in _stretches(events):
            together = [
                e for e in stretch if isinstance(e, _Allocation) and not e.seen and e.slot not in released
            ]  # only launches see these
            if together:
                steps.append(_workspace(together))
            for event in stretch:
                if isinstance(event, _Release):
                    steps.append(_release(event.slot))
                elif not isinstance(event, _Allocation):
                    steps.append(event)
                elif event not in together:
                    steps.append(_allocation(event))
        return Plan(steps, self.slots, constants, kept)


class _Slot(int):
    """The tensor in a slot, among constants."""


class _Several(list[Any]):
    """A list with tensors in it."""


def _filled(spec: Any, slots: list[Any]) -> Any:
    if spec.__class__ is _Slot:
        return slots[spec]
    return [_filled(s, slots) for s in spec] if spec.__class__ is _Several else spec


def _indexes_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation that could find any number of elements finds as many as its indices have."""
    return func is _aten.index.Tensor and all(i is None or i.dtype in (torch.int32, torch.int64) for i in args[1])


def _stretches(events: list[Any]) -> list[list[Any]]:
    """Events up to each release: what is allocated in between may come earlier, as nothing makes room meanwhile."""
    stretches: list[list[Any]] = [[]]
    for event in events:
        stretches[-1].append(event)
        if isinstance(event, _Release):
            stretches.append([])
    return stretches


def _allocation(a: _Allocation) -> Step:
    slot, shape, stride, dense = a.slot, a.shape, a.stride, a.dense
    kind: dict[str, Any] = {"dtype": a.dtype, "device": a.device}

    def step(slots: list[Any], words: list[Any], stream: int) -> None:
        t = torch.empty(shape, **kind) if dense else torch.empty_strided(shape, stride, **kind)
        slots[slot] = t
        words[slot] = _word(t)

    return step


def _workspace(together: list[_Allocation]) -> Step:
    """One tensor for several that only kernels see."""
    places, size = [], 0
    for a in together:
        places.append((a.slot, size if a.bytes else 0, a))
        size += -(-a.bytes // _ALIGNED) * _ALIGNED
    keeper, device = together[0].slot, together[0].device

    def step(slots: list[Any], words: list[Any], stream: int) -> None:
        slots[keeper] = t = torch.empty(size, dtype=torch.uint8, device=device)
        if runtime.NVIDIA:
            base = t.data_ptr()
            for slot, offset, _ in places:
                words[slot] = base + offset
        else:
            for slot, offset, a in places:
                words[slot] = t[offset : offset + a.bytes].view(a.dtype)

    def nothing(slots: list[Any], words: list[Any], stream: int) -> None:
        for slot, _, _ in places:
            words[slot] = 0

    return nothing if runtime.NVIDIA and size == 0 else step


def _release(slot: int) -> Step:
    def step(slots: list[Any], words: list[Any], stream: int) -> None:
        slots[slot] = words[slot] = None

    return step


def _operation(func: Any, spec: list[Any], named: dict[str, Any], out: int | list[int]) -> Step:
    def single(slots: list[Any], words: list[Any], stream: int) -> None:
        t = slots[out] = func(*[_filled(s, slots) for s in spec], **named)  # type: ignore[index]
        words[out] = _word(t)  # type: ignore[index]

    def several(slots: list[Any], words: list[Any], stream: int) -> None:
        filled = {name: _filled(s, slots) for name, s in named.items()}
        found = func(*[_filled(s, slots) for s in spec], **filled)
        for slot, t in ((out, found),) if isinstance(out, int) else zip(out, found, strict=True):
            slots[slot] = t
            words[slot] = _word(t)

    plain = isinstance(out, int) and not any(isinstance(s, _Slot | _Several) for s in named.values())
    return single if plain else several


def _launch(start: Any, grid: tuple[int, ...] | None, pick: Callable[[list[Any]], tuple[Any, ...]]) -> Step:
    if grid is None:
        return lambda slots, words, stream: start(*pick(words))
    return runtime.prepared(start, grid, pick)
