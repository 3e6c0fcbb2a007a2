"""Every error the library raises on purpose: one type per cause, all under :class:`LinattnError`.

A message names the argument, what came, what was expected and what to try.
"""

from __future__ import annotations


class LinattnError(Exception):
    """Base of all errors raised by linattn."""


class ShapeError(LinattnError, ValueError):
    """A tensor has the wrong rank, size, or does not match its companions."""


class DtypeError(LinattnError, TypeError):
    """A tensor has a dtype (or an argument a type) the operation does not take."""


class OptionError(LinattnError, ValueError):
    """An option has a value outside its domain, or two options contradict each other."""


class NonFiniteError(LinattnError, ValueError):
    """A tensor contains NaN or infinity where the caller asked for it to be checked."""


class FeatureMapError(LinattnError, ValueError):
    """A feature map is unknown, misconfigured, or broke its contract."""


class StateError(LinattnError, ValueError):
    """An :class:`~linattn.AttentionState` does not fit the call, or cannot do what was asked."""


class UnsupportedError(LinattnError, NotImplementedError):
    """A valid request that this implementation does not cover; the message names the one that does."""


class ConversionError(LinattnError, ValueError):
    """A model, or one of its layers, cannot be converted or reverted as asked."""


class CheckpointError(LinattnError, ValueError):
    """A saved model or state is missing, corrupt, or was not written by linattn."""
