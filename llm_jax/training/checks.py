"""Checks of options that depend on each other, without devices, data or checkpoints."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax import configuration, object_store
from llm_jax.checkpoints import abstract_params
from llm_jax.errors import UserError
from llm_jax.model import attention_kernels, transformer
from llm_jax.model.transformer import Transformer
from llm_jax.schema import Config, choice, other_libraries
from llm_jax.training import bad_steps, losses, machine_choice, optim, run_pictures, step, trackers, trainable


@functools.partial(
    other_libraries.explain_unknown_keywords, within=other_libraries.within_overrides("llm_jax.config(RECIPE, {})")
)
def config(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config = "default",
    overrides: Mapping[str, Any] | None = None,
    cls: Any = Config,
) -> Any:
    """`configuration.load`, with the checks of options that depend on each other, as on the command line.

    Raises:
      UserError: see `configuration.load` and `check`.
    """
    loaded = configuration.load(source, overrides, cls)
    if isinstance(loaded, Config):
        check(loaded)
    return loaded


def check(config: Config) -> None:
    """Checks a configuration from shapes alone. With `init_from`, the model is not checked, because the checkpoint
    determines it.

    Raises:
      UserError: options contradict each other; the message names them.
    """
    check_training(config)
    if config.init_from:
        return
    transformer.check_length(config.model, config.train.seq_len)
    choice("model.attention_kernel", config.model.attention_kernel, attention_kernels.IMPLEMENTATIONS)
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size or 512
    # `auto` may select unrolled layers, for which rules may distinguish layers. The kernel does not change the weights,
    # and selecting one would initialize the devices.
    scan_layers = config.model.scan_layers is True
    model = dataclasses.replace(
        machine_choice.machine_independent(config.model),
        vocab_size=vocab_size,
        scan_layers=scan_layers,
        attention_kernel="plain",
    )
    method = trainable.training_method(config)
    base = abstract_params(Transformer(model))
    params, _ = jax.eval_shape(method.init, base, jax.random.key(0))
    method.optimizer(base, params)


def check_storage(workdir: pathlib.Path, config: Config, profile: bool, processes: int) -> None:
    """Raises UserError if an option or flag needs to write files that an object store does not support."""
    if not object_store.is_object(workdir):
        return
    if profile:
        raise UserError(
            f"--profile writes a trace to the workdir, which is not supported in {workdir}; use a local directory"
        )
    if "tensorboard" in config.report.to:
        raise UserError(
            f"report.to=tensorboard appends to files, which {workdir} does not support; use wandb or mlflow"
        )
    if processes > 1 and not object_store.has_orbax_driver(workdir):
        raise UserError(
            f"--workdir={workdir}: {processes} processes cannot write a checkpoint to s3://, because Orbax has no "
            "driver for it; use gs://, or a directory that all processes share"
        )


def check_training(config: Config) -> None:
    """Checks the options of training. Raises UserError, see `check`."""
    c = config.train
    losses.check(config)
    trackers.check(config.report.to)
    run_pictures.check(config.report.pictures, config.eval.prompts)
    bad_steps.check(c)
    step.check_gather_once(c.gather_once, c.grad_accumulation)
    step.check_accumulation(c.batch_size, c.grad_accumulation, 1, losses.rows_together(config.loss))
    optim.schedule(config.optim, c.steps)
    trainable.training_method(config)
