"""Checkpoints: a directory that says what it is, and is whole or is not there.

    WORKDIR/checkpoints/400/
      config.json      the full configuration
      tokenizer/       the tokenizer's files
      arrays/          params, their average where the run keeps one, and optimizer state, by Orbax
      record.json      format version, step, held-out loss, hash of the corpus; what the params are; of adapters
                       also where their base is, and its hash
      manifest.json    the sha256 of every other file

A checkpoint is written under a temporary name and renamed when the manifest stands, so a killed
save leaves the earlier ones as they were. Nothing is restored before the manifest is verified: Orbax
casts dtypes and returns flipped bits without a word. The files, as files, are the affair of `directory.py`.
"""

import dataclasses
import errno
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llm_jax import configuration as config_lib
from llm_jax import schema, tokenizers, trees, weights
from llm_jax.checkpoints.directory import (
    FORMAT,
    find,
    make_directory,
    read_json,
    steps,
    verify,
    write_json,
    write_manifest,
)
from llm_jax.errors import UserError
from llm_jax.model.stages import layout
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Tokenizer

_PARTIAL = ".partial-"


class Loaded(NamedTuple):
    """A checkpoint ready for use."""

    model: Transformer
    params: dict[str, Any]
    tokenizer: Tokenizer


def load(path: str | os.PathLike[str], scan_layers: bool = False) -> Loaded:
    """The model, its parameters on the default device, and the tokenizer of a checkpoint.

    Args:
      path: a run (its last checkpoint is taken) or one checkpoint of it.
      scan_layers: the layout of the parameters; False, one entry per layer, is the fast one for decoding, and
        taken in any case where layers hold weights of different kinds.

    Raises:
      UserError: no checkpoint there, another format version, or a file that is damaged or missing.
    """
    directory = find(path)
    record = verify(directory)
    config = read_config(directory).model
    if "base" in record:
        raise UserError(f"{directory} holds adapters of {record['base']['path']}; llm_jax.load reads both")
    # How attention is computed is the machine's affair, not the checkpoint's.
    model = Transformer(dataclasses.replace(config, scan_layers=scan_layers, attention_kernel="auto"))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = restore(directory, record, config, lambda tree: jax.tree.map(lambda _: device, tree))
    return laid_out(model, params, tokenizers.load(directory / "tokenizer"))


def laid_out(model: Transformer, params: Any, tokenizer: Tokenizer) -> Loaded:
    """Parameters of any layout in that of the model; one entry per layer where layers hold different kinds."""
    if not trees.stackable(params, layout(model.config)):
        model = model.clone(config=dataclasses.replace(model.config, scan_layers=False))
    return Loaded(model, trees.restage(params, layout(model.config)), tokenizer)


def abstract_params(model: Transformer) -> dict[str, Any]:
    """Shapes and dtypes of the model's dense parameters, without computing them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return variables["params"]


def read_config(directory: pathlib.Path) -> schema.Config:
    """The configuration of a checkpoint (or of a run, which has the same file)."""
    try:
        return config_lib.build(config_lib.upgrade(read_json(directory / "config.json")))
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from error


def restore(
    directory: pathlib.Path,
    record: Mapping[str, Any],
    config: schema.ModelConfig,
    shardings: Callable[[Any], Any],
) -> Any:
    """The model of a verified checkpoint, in the layout and of the kinds that it was saved in.

    It is the moving average of the params where the run kept one, else the params.

    Args:
      config: of the model they are for; its layout may be another one.
      shardings: gives the wanted sharding of every leaf of an abstract tree.

    Raises:
      UserError: names or shapes do not fit the model.
    """
    saved = trees.unflatten({path: weights.abstract(r) for path, r in record["params"].items()})
    fitting = dataclasses.replace(config, scan_layers=any(trees.layers_of(path) for path in record["params"]))
    trees.check(_shapes(saved), _shapes(abstract_params(Transformer(fitting))), str(directory))
    if "ema" not in record:
        return _read_arrays(directory, params=_placed(saved, shardings(saved)))["params"]
    wide = trees.unflatten({path: weights.abstract(r) for path, r in record["ema"].items()})
    average = _read_arrays(directory, ema=_placed(wide, shardings(saved)))["ema"]
    return jax.tree.map(lambda leaf, p: leaf.astype(p.dtype), average, saved)


def restore_adapters(directory: pathlib.Path, record: Mapping[str, Any]) -> Any:
    """The adapter tree of a verified checkpoint, on the default device, in the layout it was saved in."""

    def read(name: str, key: str) -> dict[str, Any]:
        saved = trees.unflatten({path: weights.abstract(r) for path, r in record[key].items()})
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return trees.flatten(
            _read_arrays(directory, **{name: _placed(saved, jax.tree.map(lambda _: device, saved))})[name]
        )

    found = read("params", "params")
    averages = read("ema", "ema") if "ema" in record else {}  # of what is trained
    return trees.unflatten(found | {path: leaf.astype(found[path].dtype) for path, leaf in averages.items()})


def check_base(source: pathlib.Path | None, record: Mapping[str, Any], found: str) -> None:
    """Raises UserError unless `found`, the `trees.fingerprint` of a base, is what the adapters were trained on."""
    base = record["base"]
    if found != base["sha256"]:
        raise UserError(
            f"{source}: its adapters are for the base of sha256 {base['sha256'][:12]}, which was {base['path']}; "
            f"now that has {found[:12]}"
        )


def restore_state(
    directory: pathlib.Path, record: Mapping[str, Any], params: Any, optimizer: Any, ema: Any = None
) -> tuple[Any, Any, Any]:
    """(params, optimizer state, average or None) of a verified checkpoint, exactly as the abstract trees say.

    Raises:
      UserError: names, kinds, static fields, shapes or dtypes differ from those of the checkpoint.
    """
    trees.check(record["params"], trees.describe(params), str(directory))
    if record["optimizer"] != _leaves(optimizer):
        raise UserError(f"{directory}: the optimizer state is not that of the config's optim section")
    trees.check(record.get("ema", {}), trees.describe(ema or {}), str(directory))
    arrays = _read_arrays(directory, params=params, optimizer=optimizer, **({} if ema is None else {"ema": ema}))
    return arrays["params"], arrays["optimizer"], arrays["ema"] if ema is not None else None


class Writer:
    """Writes the checkpoints of one run in the background, and removes those that are not to be kept.

    Args:
      corpus: sha256 of the text that the run trains on, kept in the records.
      other: `trees.fingerprint` of the loss's frozen model, or "", kept in the records.
      base: of adapters: {"path", "sha256"} of the weights that they adapt, kept in the records.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: schema.Config,
        tokenizer: Tokenizer,
        corpus: str,
        other: str = "",
        base: dict[str, str] | None = None,
    ):
        self.directory = workdir / "checkpoints"
        self._config, self._tokenizer, self._corpus, self._other, self._base = config, tokenizer, corpus, other, base
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        make_directory(self.directory)
        for leftover in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)

    def save(
        self, step: int, params: Any, optimizer: Any, validation_loss: float | None, jumped: int = 0, ema: Any = None
    ) -> None:
        """Starts writing checkpoint `step`, once the one before is finished. The arrays may be donated after.

        Args:
          optimizer: its state; {} for weights that are not in training.
          jumped: batches that have been passed over so far.
          ema: the average of params, where the run keeps one.

        Raises:
          UserError: this one or the one before cannot be written.
        """
        self.wait()
        partial = self.directory / f"{_PARTIAL}{step}"
        record = {
            "format": FORMAT,
            "step": step,
            "corpus": self._corpus,
            "jumped": jumped,
            "validation_loss": validation_loss,
            "params": trees.describe(params),
            "optimizer": _leaves(optimizer),
        }
        arrays = {"params": params, "optimizer": optimizer}
        if ema is not None:
            arrays["ema"], record["ema"] = ema, trees.describe(ema)
        if self._other:
            record["other"] = self._other
        if self._base:
            record["base"] = self._base
        if jax.default_backend() == "cpu":  # there Orbax reads the very buffers that the next step is given
            arrays = jax.tree.map(jnp.copy, arrays)
        parts = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items() if jax.tree.leaves(tree)}
        try:
            partial.mkdir()
            self._orbax.save(partial.absolute() / "arrays", args=ocp.args.Composite(**parts))
        except (OSError, ValueError) as error:  # ValueError is TensorStore's
            raise self._unwritten(partial, error) from error
        self._thread = threading.Thread(target=self._finish, args=(partial, record))
        self._thread.start()

    def wait(self) -> None:
        """Waits for the checkpoint under way.

        Raises:
          UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        self.wait()
        self._orbax.close()

    def _finish(self, partial: pathlib.Path, record: dict[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()
            tokenizers.save(self._tokenizer, partial / "tokenizer")
            write_json(partial / "config.json", config_lib.as_dict(self._config))
            write_json(partial / "record.json", record)
            write_manifest(partial)
            os.sync()
            os.rename(partial, self.directory / str(record["step"]))
            self._prune()
        except BaseException as error:  # raised by `wait`, in the caller's thread
            self._error = self._unwritten(partial, error)

    def _unwritten(self, partial: pathlib.Path, error: BaseException) -> UserError:
        shutil.rmtree(partial, ignore_errors=True)
        full = "RESOURCE_EXHAUSTED" in str(error) or getattr(error, "errno", 0) == errno.ENOSPC
        lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = "no space left on the device" if full else lines[0]
        left = steps(self.directory.parent)
        said = f"the last one is of step {left[-1]}" if left else "there is none before it"
        return UserError(f"{self.directory}: the checkpoint cannot be written ({reason}); {said}")

    def _prune(self) -> None:
        keep = self._config.checkpoint
        found = steps(self.directory.parent)
        losses = {step: read_json(self.directory / str(step) / "record.json")["validation_loss"] for step in found}
        best = sorted((s for s in found if losses[s] is not None), key=lambda s: (losses[s], s))[: keep.keep_best]
        for step in set(found) - set(found[-max(keep.keep_last, 1) :]) - set(best):
            self._remove(step)

    def discard(self, after: int) -> None:
        """Removes the checkpoints of later steps than `after`, which are not gone on from."""
        self.wait()
        for step in steps(self.directory.parent):
            if step > after:
                self._remove(step)

    def _remove(self, step: int) -> None:
        doomed = self.directory / f"{_PARTIAL}{step}-old"
        os.rename(self.directory / str(step), doomed)
        shutil.rmtree(doomed)


def _read_arrays(directory: pathlib.Path, **items: Any) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        return orbax.restore(directory.absolute() / "arrays", args=ocp.args.Composite(**wanted))


def _shapes(tree: Any) -> dict[str, Any]:
    return {path: {"shape": weight.shape} for path, weight in trees.flatten(tree).items()}


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def _leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}
