"""Exit codes, and exceptions turned into one message on standard error."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from linattn.errors import CheckpointError, LinattnError

REFUSED, UNREADABLE, UNEXPECTED, INTERRUPTED = 1, 3, 4, 130

EXIT_CODES = """\
**Exit codes:** 0 done; 1 linattn refuses what was asked, the message says why and what to try; 2 wrong usage of the
command; 3 a model or file is missing or unreadable, or the hub cannot be reached; 4 an unexpected error,
`linattn --debug …` shows where; 130 interrupted. Results go to standard output, progress and errors to standard error.
"""


class Commands(TyperGroup):
    """A command group whose exceptions end in a message and an exit code, with ``--debug`` in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # Usage errors carry an exit code of their own and know how to show themselves.
            if hasattr(error, "exit_code") or ctx.params.get("debug"):
                raise
            message, code = _explain(error)
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(code) from None


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, LinattnError):
        return str(error), UNREADABLE if isinstance(error, CheckpointError) else REFUSED
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else first_line(error), UNREADABLE
    return f"{type(error).__name__}: {first_line(error)} (unexpected; `linattn --debug …` shows where)", UNEXPECTED


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
