"""Make ``AutoModel.from_pretrained`` find converted checkpoints after ``import linattn``, at no cost to the import.

transformers maps the ``model_type`` of a config to its class through one table. A converted checkpoint has the model
type ``linattn_<type>``; the table learns it on first sight of such a name. If transformers is not imported yet, a
finder on ``sys.meta_path`` waits for the table's module and steps aside once it has met it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE_MODULE = "transformers.models.auto.configuration_auto"
PREFIX = "linattn_"


class ConvertedConfigs(dict[str, Any]):
    """The table's extra entries: a converted model type is built when it is first asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or self._build(key)

    def _build(self, key: object) -> bool:
        if not (isinstance(key, str) and key.startswith(PREFIX)):
            return False
        from linattn.convert.families import register_model_type

        return register_model_type(key.removeprefix(PREFIX))


class _TableFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _TableLoader(spec.loader)
        return spec


class _TableLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        extend(module)


def extend(table_module: ModuleType) -> None:
    """Let the table of ``table_module`` know converted model types."""
    table = table_module.CONFIG_MAPPING
    if not isinstance(table._extra_content, ConvertedConfigs):
        table._extra_content = ConvertedConfigs(table._extra_content)


def install() -> None:
    """Extend transformers' table of configs now if it is loaded, else as soon as it is."""
    module = sys.modules.get(TABLE_MODULE)
    if module is not None and hasattr(module, "CONFIG_MAPPING"):
        extend(module)
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())
