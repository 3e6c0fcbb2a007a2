"""What MODEL names: a local directory, a .gguf file, or a hub id."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linattn.cli._errors import first_line
from linattn.errors import CheckpointError, LinattnError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from, in the terms of ``from_pretrained``."""

    name: str
    where: str
    gguf_file: str | None = None

    @classmethod
    def find(cls, name: str, what: str = "model") -> Source:
        """Raises CheckpointError where there is no ``what``: a model, or a tokenizer with or without one."""
        path = Path(name).expanduser()
        if path.is_dir():
            files = {"model": ["config.json"], "tokenizer": ["config.json", "tokenizer_config.json"]}[what]
            if not any((path / file).is_file() for file in files):
                raise CheckpointError(f"{name}: no saved {what}, there is no {files[-1]} in this directory.")
            return cls(name, str(path))
        if path.is_file():
            if path.suffix != ".gguf":
                raise CheckpointError(f"{name}: not a .gguf file; of other models, give the directory.")
            return cls(name, str(path.parent), path.name)
        if path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
            raise CheckpointError(f"{name}: no such file or directory.")
        return cls(name, name)

    def config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        with self._reading("configuration"):
            return AutoConfig.from_pretrained(self.where, **self._options)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        with self._reading("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.where, **self._options)
        # Without files, some families get a tokenizer that knows its special tokens only.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise CheckpointError(f"{self.name}: there is no tokenizer beside the model.")
        return tokenizer

    def outline(self) -> PreTrainedModel:
        """The model on the meta device: its structure, without reading its weights."""
        import torch

        config = self.config()
        with self._reading("model"), torch.device("meta"):
            return _model_class(config)._from_config(config)

    def model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model with its weights, in evaluation mode; ``dtype`` None keeps the one it was saved in."""
        from linattn.convert import load

        config = self.config()
        options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, **self._options}
        with self._reading("model"):
            if hasattr(config, "linattn"):
                return load(self.where, **options).eval()
            return _model_class(config).from_pretrained(self.where, **options).eval()

    @property
    def _options(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say in one line what could not be had, and from where."""
        _quiet()
        try:
            yield
        except LinattnError:
            raise
        except Exception as error:
            local = Path(self.where).exists()
            origin = "" if local else " is not a local path, and the Hugging Face hub did not give it"
            raise CheckpointError(f"{self.name}{origin}: cannot load the {what}: {first_line(error)}") from error


def _quiet() -> None:
    """The libraries' own progress bars and retries stay off the terminal; the command has its own."""
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity(40)
    huggingface_hub.utils.disable_progress_bars()


def _model_class(config: PretrainedConfig) -> Any:
    """The class the checkpoint was saved from; a causal language model where it does not say."""
    import transformers

    from linattn.convert import families

    for name in config.architectures or ():
        found = getattr(transformers, name, None) or getattr(families, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]
