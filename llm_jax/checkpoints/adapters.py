"""Runs that trained low-rank adapters: the adapters, and a reference to their base."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax import lora, trees
from llm_jax.checkpoints import families
from llm_jax.checkpoints.checkpoint import (
    Checkpoint,
    Loaded,
    Shardings,
    convert_layout,
    on_default_device,
    place_like,
    unreadable_base,
)
from llm_jax.checkpoints.run import Run, abstract_tree, read_arrays, with_shardings
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.quant import post_training
from llm_jax.schema import ModelConfig


class Adapters(Run):
    """A checkpoint of a run with `lora.rank` above 0. Its parameters are the base with the adapters attached.

    The hash of the base is checked whenever the parameters are read.

    Args:
      open_base: opens the checkpoint of the base from the path that the run records.
    """

    form = "adapters"

    def __init__(self, path: pathlib.Path, name: str, open_base: Callable[[str], Checkpoint]):
        super().__init__(path, name)
        self._open_base = open_base

    @functools.cached_property
    def base(self) -> Checkpoint:
        """The checkpoint of the base. Raises UserError if it no longer exists."""
        try:
            return self._open_base(self.record["base"]["path"])
        except UserError as error:
            raise unreadable_base(self.path, error) from error

    @property
    def family(self) -> str:
        return self.base.family if self.base.run_config is None else families.first_family(self.config)

    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        """Like `Checkpoint.params`, but with the dtypes of the run that trained the adapters."""
        base, adapters = self._separate(shardings)
        frozen = post_training.quantize_base(lora.subtract_start(base, adapters), self.run_config.quant)
        params = lora.attach(frozen, adapters, factors=self.run_config.lora.factors)
        return convert_layout(params, config, shardings, as_stored)

    def separate(self) -> tuple[Loaded, dict[str, Any]]:
        """The base without the adapters, and the adapters as they are applied (factors rounded as in training).

        Both have one entry per layer. The base is quantized by the run's quant.scheme.

        Raises:
          UserError: as for `params`, or the base was quantized after PiSSA had subtracted the first factors from it.
        """
        config = self.run_config
        base, adapters = self._separate(on_default_device)
        adapters = lora.quantize_factors(adapters, config.lora.factors)
        if any(path.endswith("/start_a") for path in trees.flatten(adapters)):
            if config.quant.scheme:
                raise UserError(
                    f"{self.path}: its base was quantized after lora.variant=pissa had subtracted the first factors; "
                    "base and adapters cannot be separated"
                )
            adapters = lora.to_lora(adapters)
        model = Transformer(dataclasses.replace(config.model, scan_layers=False, attention_kernel="auto"))
        return Loaded(model, post_training.quantize_base(base, config.quant), self.tokenizer), adapters

    def adapters(self) -> dict[str, Any]:
        """The adapter tree, one entry per layer, on the default device."""
        return trees.unstack(restore_adapters(self.path, self.record))

    def _separate(self, shardings: Shardings) -> tuple[dict[str, Any], dict[str, Any]]:
        """(full weights of the base, adapters), one entry per layer."""
        config = dataclasses.replace(self.base.config, scan_layers=False, precision=self.config.precision)
        try:
            base = self.base.params(config, shardings)
        except UserError as error:
            raise unreadable_base(self.path, error) from error
        check_base(self.path, self.record, self.base.name, trees.fingerprint(base))
        return base, place_like(self.adapters(), base)


def restore_adapters(directory: pathlib.Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter tree of a verified checkpoint, on the default device, in the layout in which it was saved.

    Args:
      record: from `manifest.verify`.
    """

    def read(name: str) -> dict[str, Any]:
        saved = abstract_tree(record[name])
        return trees.flatten(read_arrays(directory, **{name: with_shardings(saved, on_default_device(saved))})[name])

    adapters = read("params")
    averages = read("ema") if "ema" in record else {}  # only the trained part has an average
    return trees.unflatten(adapters | {path: leaf.astype(adapters[path].dtype) for path, leaf in averages.items()})


def check_base(adapters: pathlib.Path, record: Mapping[str, Any], path: str, sha256: str) -> None:
    """Raises UserError unless `adapters` were trained over the base at `path` with the `trees.fingerprint` `sha256`."""
    base = record["base"]
    if sha256 != base["sha256"]:
        raise UserError(
            f"{adapters}: its adapters are for the base of sha256 {base['sha256'][:12]}, which was {base['path']}; "
            f"{'now that' if path == base['path'] else path} has {sha256[:12]}"
        )
