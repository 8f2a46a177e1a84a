"""Writes checkpoints of runs, in the background during training. `run.py` describes the directory.

Every process writes its shards of the arrays. Process 0 writes the rest, renames the directory when all shards are
written, and removes old checkpoints; the other processes wait for it.
"""

import contextlib
import errno
import itertools
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import configuration, files, object_store, tokenizers, trees
from llm_jax.checkpoints import generation_config, storage
from llm_jax.checkpoints.manifest import FORMAT, steps, write_manifest
from llm_jax.checkpoints.run import describe_leaves
from llm_jax.errors import UserError
from llm_jax.parallel import processes
from llm_jax.schema import Config
from llm_jax.tokenizers import Tokenizer


class Writer:
    """Writes the checkpoints of one run in the background, and removes those that are not kept.

    Args:
      workdir: the run directory.
      corpus: the sha256 of the training text, which the records keep.
      reference: `trees.fingerprint` of the frozen model in the loss, which the records keep, or "".
      base: for adapters, {"path", "sha256"} of the weights that they adapt, which the records keep.
      generation: the content of generation_config.json; no such file is written if it is empty.
      lock: the `files.lock` of the run. Once another trainer has taken over the lock, nothing is written or removed.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        tokenizer: Tokenizer,
        corpus: str,
        reference: str = "",
        base: dict[str, str] | None = None,
        generation: Mapping[str, Any] | None = None,
        lock: Any = None,
    ):
        import orbax.checkpoint as ocp  # slow to import, and loading most checkpoints does not need it

        self.directory = workdir / "checkpoints"
        self._config, self._tokenizer, self._corpus = config, tokenizer, corpus
        self._reference, self._base = reference, base
        self._generation, self._lock = generation, lock
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._unanswered = False  # whether the store has stopped answering
        self._abandoned: pathlib.Path | None = None  # an unfinished checkpoint that was removed
        self._name, self._saves = processes.unique_name("saves"), itertools.count()
        with processes.main_first("to open the checkpoints"):
            if processes.is_main():
                files.check_lock(lock)
                files.make_directory(self.directory)
                storage.remove_unfinished(self.directory)

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        validation_loss: float | None,
        validation_rows: float | None = None,
        skipped_batches: int = 0,
        ema: Any = None,
    ) -> None:
        """Starts writing checkpoint `step`, after the previous one has finished. The arrays may be donated afterwards.

        Args:
          params: weights of any kind, in any layout.
          optimizer: the optimizer state; {} without training.
          validation_loss: in nats per token, over the rows of the periodic evaluations; None if it was not measured.
          validation_rows: the number of these rows. Losses over different rows are not compared.
          skipped_batches: batches that training has skipped so far.
          ema: the moving average of `params`, if the run keeps one.

        Raises:
          UserError: this checkpoint or the previous one cannot be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        partial = storage.begin(self.directory, step)
        record = {
            "format": FORMAT,
            "step": step,
            "corpus": self._corpus,
            "skipped_batches": skipped_batches,
            "validation_loss": validation_loss,
            "validation_rows": validation_rows,
            "params": trees.describe(params),
            "optimizer": describe_leaves(optimizer),
        }
        arrays = {"params": params, "optimizer": optimizer}
        if ema is not None:
            arrays["ema"], record["ema"] = ema, trees.describe(ema)
        if self._reference:
            record["other"] = self._reference  # the key of this fingerprint in all versions
        if self._base:
            record["base"] = self._base
        if jax.default_backend() == "cpu":  # Orbax reads the buffers themselves, which the next step overwrites
            arrays = jax.tree.map(jnp.copy, arrays)
        items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items() if jax.tree.leaves(tree)}
        key = f"{self._name}/{next(self._saves)}"
        try:
            with processes.main_first("to begin a checkpoint"):
                if processes.is_main():
                    files.check_lock(self._lock)
                    storage.create(partial)
            arguments = ocp.args.Composite(**items)
            arrays_path = files.absolute(partial) / "arrays"
            object_store.bounded(partial, lambda: self._orbax.save(arrays_path, args=arguments))
        except Exception as error:
            # ValueError comes from TensorStore, others from the client of an object store.
            if not isinstance(error, OSError | ValueError) and not object_store.is_object(self.directory):
                raise
            raise self._unwritten(partial, error) from error
        self._thread = threading.Thread(target=self._finish, args=(partial, record, key))
        self._thread.start()

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete. Raises UserError if that fails."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if not self._unanswered:  # otherwise Orbax would wait for its writes
                with contextlib.suppress(Exception):  # Orbax raises again an error that `wait` has already raised
                    self._orbax.close()
                if self._abandoned:  # a write that was in flight may have created a file after the removal
                    storage.abandon(self._abandoned)

    def discard(self, after: int) -> None:
        """Removes the checkpoints of later steps than `after`, from which training does not resume."""
        self.wait()
        with processes.main_first("to remove checkpoints"):
            for step in steps(self.directory.parent) if processes.is_main() else []:
                if step > after:
                    storage.remove(self.directory / str(step))

    def _finish(self, partial: pathlib.Path, record: dict[str, Any], key: str) -> None:
        try:
            object_store.bounded(partial, self._orbax.wait_until_finished)
            if not processes.is_main():
                processes.broadcast(None, key, "to complete a checkpoint")
                return
            files.check_lock(self._lock)
            tokenizers.save(self._tokenizer, partial / "tokenizer")
            files.write_json(partial / "config.json", configuration.as_dict(self._config))
            files.write_json(partial / "record.json", record)
            if self._generation:
                files.write_json(partial / generation_config.FILE, self._generation)
            write_manifest(partial)
            storage.commit(partial, self.directory / str(record["step"]))
            self._prune()
            processes.broadcast(None, key)
        except BaseException as error:  # raised by `wait`, in the caller's thread
            self._error = self._unwritten(partial, error)

    def _unwritten(self, partial: pathlib.Path, error: BaseException) -> UserError:
        self._unanswered = self._unanswered or isinstance(error, object_store.Unanswered)
        try:
            files.check_lock(self._lock)
            storage.abandon(partial)
            self._abandoned = partial
            finished = steps(self.directory.parent)
            last = f"the last checkpoint is of step {finished[-1]}" if finished else "the run has no earlier checkpoint"
        except object_store.StoreError:
            last = "the last finished checkpoint stays"
        except UserError as lost:  # what is at `partial` now belongs to another trainer
            return lost
        number = getattr(error.__cause__ or error, "errno", 0)
        lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        full = number == errno.ENOSPC or "RESOURCE_EXHAUSTED" in str(error)
        reason = "no space left on the device" if full else lines[0]
        return UserError(f"{self.directory}: the checkpoint cannot be written ({reason}); {last}")

    def _prune(self) -> None:
        keep = self._config.checkpoint
        finished = steps(self.directory.parent)
        records = {step: files.read_json(self.directory / str(step) / "record.json") for step in finished}
        kept = set(finished[-max(keep.keep_last, 1) :])
        rows = {step: record.get("validation_rows") for step, record in records.items()}
        for count in set(rows.values()):  # a resumed run may evaluate other rows, see eval.rows
            losses = {s: r["validation_loss"] for s, r in records.items() if rows[s] == count}
            measured = [step for step, loss in losses.items() if loss is not None]
            kept.update(sorted(measured, key=lambda step: (losses[step], step))[: keep.keep_best])
        for step in set(finished) - kept:
            storage.remove(self.directory / str(step))
