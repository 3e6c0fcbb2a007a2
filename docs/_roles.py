"""Sphinx roles in docstrings, as IDEs show them, become links of this site."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):`(~?)([\w.]+)`")


def link(match: re.Match[str]) -> str:
    short, target = match.groups()
    text = target.rpartition(".")[2] if short else target
    if not target.startswith("linattn."):
        return f"`{text}`"
    return f'<autoref identifier="{target}" optional><code>{text}</code></autoref>'


class Roles(Extension):
    """Replaces every role of every docstring."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
