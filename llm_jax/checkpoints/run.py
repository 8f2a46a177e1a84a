"""Checkpoints of runs, which `llm_jax.train`, `llm_jax.quantize` and `llm_jax.save` write.

    WORKDIR/checkpoints/400/
      config.json      the complete configuration
      tokenizer/       the tokenizer's files
      arrays/          parameters, their moving average if the run keeps one, and optimizer state, written by Orbax
      record.json      format version, step, held-out loss, hash of the corpus, and the kind, shape and dtype of every
                       weight; for adapters also the path and the hash of their base
      generation_config.json  default sampling options, if the source checkpoint has them
      manifest.json    the sha256 of every other file

A checkpoint is written under a temporary name and renamed once the manifest exists, so that a killed process leaves
the earlier checkpoints unchanged; `storage.py` does this on disks and in object stores. The manifest is verified before
anything is restored, because Orbax casts dtypes and returns flipped bits without an error.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax import configuration, files, object_store, tokenizers, trees, weights
from llm_jax.checkpoints import families, manifest, storage
from llm_jax.checkpoints.checkpoint import Checkpoint, Shardings, abstract_params, convert_layout
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.schema import Config, ModelConfig
from llm_jax.tokenizers import Tokenizer


class Run(Checkpoint):
    """A checkpoint with all parameters of a model, written by this package."""

    form = "run"

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The content of record.json, after every file has been verified against the manifest."""
        return manifest.verify(self.path)

    @functools.cached_property
    def run_config(self) -> Config:
        return read_config(self.path)

    @property
    def config(self) -> ModelConfig:
        return self.run_config.model

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizers.load(self.path / "tokenizer")

    @property
    def identity(self) -> str:
        """The manifest: the sha256 of every file."""
        try:
            return files.read(self.path / "manifest.json").decode()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: manifest.json cannot be read ({error})") from error

    @property
    def family(self) -> str:
        return families.first_family(self.config)

    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        saved = restore(self.path, self.record, config, shardings)
        return convert_layout(saved, config, shardings, as_stored, "" if as_stored else config.precision.params)


def read_config(directory: pathlib.Path) -> Config:
    """The configuration of a run or of one of its checkpoints. Raises UserError if it cannot be read."""
    path = directory / "config.json"
    mapping = files.read_json(path)
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: holds {type(mapping).__name__}; expected a JSON object, the configuration of a run")
    try:
        return configuration.build(configuration.upgrade(mapping))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def restore(directory: pathlib.Path, record: Mapping[str, Any], config: ModelConfig, shardings: Shardings) -> Any:
    """The parameters of a verified checkpoint, in the layout, kinds and dtypes in which they were saved.

    Returns the moving average of the parameters, in the parameters' dtype, if the run kept one.

    Args:
      record: from `manifest.verify`.
      config: the model they are for; it may have another layout.
      shardings: abstract parameters -> a sharding for every leaf.

    Raises:
      UserError: names or shapes do not fit the model.
    """
    saved = abstract_tree(record["params"])
    stacked = any(trees.layers_of(path) for path in record["params"])
    model = Transformer(dataclasses.replace(config, scan_layers=stacked))
    trees.check(_shapes(saved), _shapes(abstract_params(model)), str(directory))
    if "ema" not in record:
        return read_arrays(directory, params=with_shardings(saved, shardings(saved)))["params"]
    average = abstract_tree(record["ema"])
    average = read_arrays(directory, ema=with_shardings(average, shardings(saved)))["ema"]
    return jax.tree.map(lambda leaf, p: leaf.astype(p.dtype), average, saved)


def restore_state(
    directory: pathlib.Path, record: Mapping[str, Any], params: Any, optimizer: Any, ema: Any = None
) -> tuple[Any, Any, Any]:
    """The training state of a verified checkpoint. It must have exactly the shapes and dtypes of the abstract trees.

    Args:
      record: from `manifest.verify`.
      params, optimizer, ema: abstract trees, `jax.ShapeDtypeStruct` leaves with shardings; `ema` None: no average.

    Returns:
      (parameters, optimizer state, average or None).

    Raises:
      UserError: names, kinds, static fields, shapes or dtypes differ from those of the checkpoint.
    """
    trees.check(record["params"], trees.describe(params), str(directory))
    if record["optimizer"] != describe_leaves(optimizer):
        raise UserError(f"{directory}: the optimizer state does not fit the optim section of the configuration")
    trees.check(record.get("ema", {}), trees.describe(ema or {}), str(directory))
    arrays = read_arrays(directory, params=params, optimizer=optimizer, **({} if ema is None else {"ema": ema}))
    return arrays["params"], arrays["optimizer"], arrays["ema"] if ema is not None else None


def read_arrays(directory: pathlib.Path, **items: Any) -> Any:
    """{item name: tree} as Orbax reads them; `items` are abstract trees with shardings."""
    import orbax.checkpoint as ocp  # slow to import, and other forms of checkpoints do not need it

    def read() -> Any:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
            arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
            with storage.readable_by_orbax(directory / "arrays") as arrays:
                return orbax.restore(arrays, args=ocp.args.Composite(**arguments))

    if not object_store.is_object(directory):
        return read()
    with object_store.user_errors(directory, "cannot be read"):  # its files have been verified
        return object_store.bounded(directory, read)


def abstract_tree(records: Mapping[str, Any]) -> dict[str, Any]:
    """The abstract tree that `trees.describe` has recorded."""
    return trees.unflatten({path: weights.abstract(record) for path, record in records.items()})


def describe_leaves(tree: Any) -> dict[str, Any]:
    """{path: [shape, dtype]} of every leaf of any tree, as JSON values."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _shapes(tree: Any) -> dict[str, Any]:
    return {path: {"shape": weight.shape} for path, weight in trees.flatten(tree).items()}


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The abstract tree with a sharding on every leaf."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)
