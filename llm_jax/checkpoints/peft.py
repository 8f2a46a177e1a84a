"""Directories of the `peft` package: adapter_config.json and adapter_model.safetensors.

Supported are plain LoRA, rank-stabilized LoRA and DoRA of any matrix, including embeddings and head. Ranks and alphas
may differ by module. Other weights that peft trains along with the factors are read too: `modules_to_save`, biases,
rows of embedding tables (`trainable_token_indices`) and resized vocabularies.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from llm_jax import lora, tokenizers
from llm_jax.checkpoints import location, peft_config, peft_tensors
from llm_jax.checkpoints.checkpoint import (
    Checkpoint,
    Loaded,
    Shardings,
    check_vocabulary,
    convert_layout,
    on_default_device,
    place_like,
    unreadable_base,
)
from llm_jax.checkpoints.peft_config import CONFIG
from llm_jax.checkpoints.peft_tensors import AdapterTensors
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.schema import ModelConfig
from llm_jax.tokenizers import Tokenizer


class Peft(Checkpoint):
    """A peft directory. Its parameters are the base, which it names, with the adapters attached.

    Args:
      open_base: opens the checkpoint of a base from the name that the adapters record.
    """

    form = "peft"

    def __init__(self, path: pathlib.Path, name: str, open_base: Callable[[str], Checkpoint]):
        super().__init__(path, name)
        self._open_base = open_base

    @staticmethod
    def matches(path: pathlib.Path) -> bool:
        """Whether a directory holds adapters of peft."""
        return (path / CONFIG).is_file()

    @functools.cached_property
    def base(self) -> Checkpoint:
        """The checkpoint of the base. Raises UserError if none is named, or it cannot be opened."""
        config = peft_config.read_config(self.path)  # its errors are not those of the base
        try:
            base = self._open_base(config.get("base_model_name_or_path") or "")
        except UserError as error:
            raise unreadable_base(self.path, error) from error
        if (revision := config.get("revision")) not in (None, "", "main") and location.is_remote(base.name):
            note = f"note: {self.path}: trained over revision {revision!r} of the base; {base.name} is read"
            print(note, file=sys.stderr)
        return base

    @functools.cached_property
    def _tensors(self) -> AdapterTensors:
        return peft_tensors.read(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The base's configuration with the adapters' vocabulary size; untied if they change head or table alone."""
        config, tensors = self.base.config, self._tensors
        size = peft_tensors.vocab_size(tensors, self.family) or config.vocab_size
        tied = config.tie_embeddings and not peft_tensors.unties(tensors, self.family)
        return dataclasses.replace(config, vocab_size=size, tie_embeddings=tied)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the directory of the adapters (it may have new tokens or a chat template), or the base's."""
        if (self.path / "tokenizer" / "kind.json").is_file():
            tokenizer = tokenizers.load(self.path / "tokenizer")
            check_vocabulary(tokenizer, self.config, f"{self.path} over {self.base.name}")
            return tokenizer
        if not any((self.path / name).is_file() for name in tokenizers.PRETRAINED_FILES):
            return self.base.tokenizer
        # What ends a text is also written in files of the base.
        paths = [self.base.path / name for name in ("config.json", "generation_config.json")]
        try:
            inherited = {path.name: path.read_bytes() for path in paths if path.is_file()}
            tokenizer = tokenizers.from_files(inherited | tokenizers.read_files(self.path))
        except (UserError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(f"{self.path}: the tokenizer cannot be read ({error})") from error
        check_vocabulary(tokenizer, self.config, f"{self.path} over {self.base.name}")
        return tokenizer

    @property
    def family(self) -> str:
        return self.base.family

    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        base = self._base_params(config, shardings)
        adapters = place_like(peft_tensors.adapters(self._tensors, self.family, self.config, base), base)
        return convert_layout(lora.attach(base, adapters), config, shardings, as_stored)

    def separate(self) -> tuple[Loaded, dict[str, Any]]:
        """The base without the adapters, and the adapters, both with one entry per layer and in float32.

        Raises:
          UserError: as for `params`, or the adapters replace weights of the base.
        """
        config, tensors = self.config, self._tensors
        replaced = [*tensors.saved, *tensors.rows] or [n for n in tensors.factors if "bias" in tensors.factors[n]]
        if replaced:
            raise UserError(
                f"{self.path}: '{replaced[0]}' takes the place of a weight of the base; its adapters cannot be "
                "combined with others"
            )
        base = self._base_params(config, on_default_device)
        config = dataclasses.replace(config, scan_layers=False, attention_kernel="auto")
        return Loaded(Transformer(config), base, self.tokenizer), peft_tensors.adapters(
            tensors, self.family, config, base
        )

    def _base_params(self, config: ModelConfig, shardings: Shardings) -> dict[str, Any]:
        """The parameters over which the adapters were trained, one entry per layer."""
        base_config = dataclasses.replace(self.base.config, scan_layers=False, precision=config.precision)
        tensors, untied = self._tensors, self.base.config.tie_embeddings and not self.config.tie_embeddings
        try:
            base = self.base.params(base_config, shardings)
        except UserError as error:
            raise unreadable_base(self.path, error) from error
        return peft_tensors.changed_base(tensors, self.family, self.config, base, untied)
