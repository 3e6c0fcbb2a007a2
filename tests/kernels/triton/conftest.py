"""Without a GPU these tests run in Triton's interpreter, in which the suite spends most of its time."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any


def hurry() -> None:
    """Spare the interpreter what changes no result: two thirds of its time.

    It prepares Triton's language for a kernel, and anew at every call of a device function. Those find it as their
    kernel does, except Triton's own, which know it by another name: for them it is prepared at the first call.
    It also computes sums and products of integers twice to tell of an overflow, which it does in debug mode only.
    """
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    hurry()
