"""The memory of a compiled training step, without running it."""

import dataclasses
import math
from typing import Any

import jax

from llm_jax import weights
from llm_jax.model import transformer
from llm_jax.schema import Config
from llm_jax.training import trainable
from llm_jax.training.setup import Setup, num_parameters, setup

# Kinds of training that `plan --memory` compares with the configured one; see `variant`.
KINDS = ("forward", "full", "lora", "fa", "qlora")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a compiled function on one device, in bytes.

    Attributes:
      arguments: weights, optimizer state and batch.
      temporaries: activations, gradients and the rest.
      outputs: outputs that do not reuse the memory of an argument.
      optimizer: the part of the arguments that is optimizer state or the moving average of the weights.
    """

    arguments: int
    temporaries: int
    outputs: int
    optimizer: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def of_executable(executable: Any, optimizer: int = 0) -> Memory:
    """The memory of a compiled function; `optimizer` is the size of the optimizer state in bytes."""
    analysis = executable.memory_analysis()
    outputs = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    return Memory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, outputs, optimizer)


def of_training_step(setup: Setup) -> Memory:
    """The memory of one update of the trainer, including all micro-batches and the moving average of the weights."""
    state = setup.state.replace(frozen={})
    limit = jax.ShapeDtypeStruct((), "float32")
    compiled = setup.train_step.lower(state, setup.state.frozen, setup.batch, limit).compile()
    return of_executable(compiled, shard_bytes((state.opt_state, state.ema)))


def of_forward_pass(setup: Setup) -> Memory:
    """The memory of the loss of a batch without its gradient."""
    return of_executable(setup.loss.lower(setup.state.params, setup.state.frozen, setup.batch).compile())


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """The size and FLOPs of a training step on one device, computed from shapes without compiling.

    Attributes:
      parameters, trainable: number of entries of all weights, and of the trainable weights.
      flops: floating-point operations of a step; see `transformer.flops_per_token`.
      weights, optimizer, gradients: sizes in bytes.
    """

    parameters: int
    trainable: int
    flops: float
    weights: int
    optimizer: int
    gradients: int


def step_sizes(config: Config) -> StepSizes:
    """The `StepSizes` of a configuration with a `model.vocab_size`."""
    parts = setup(_with_placeholder_base(config) if config.lora.rank else config)
    state, c = parts.state, config.train
    return StepSizes(
        parameters=num_parameters(parts.base),
        trainable=num_parameters(state.params),
        flops=transformer.flops_per_token(parts.config.model, c.seq_len) * c.batch_size * c.seq_len,
        weights=weights.num_bytes((state.params, state.frozen)),
        optimizer=weights.num_bytes((state.opt_state, state.ema)),
        gradients=weights.num_bytes(state.params),
    )


def describe(e: StepSizes, config: Config) -> str:
    """The sizes as text."""
    c, mib = config.train, 2**20
    total = (e.weights + e.optimizer + e.gradients) / mib
    size = f"{c.batch_size} x {c.seq_len} = {c.batch_size * c.seq_len:,} tokens"
    memory = f"weights {e.weights / mib:,.1f}, optimizer {e.optimizer / mib:,.1f}, gradients {e.gradients / mib:,.1f}"
    return "\n".join(
        [
            f"{e.parameters:,} parameters, {e.trainable:,} trainable",
            f"{e.flops:.3g} FLOPs per step of {size}, {c.steps * e.flops:.3g} in {c.steps:,} steps",
            f"{total:,.1f} MiB on one device: {memory}",
            "without activations; --memory compiles the step and reports its total memory",
        ]
    )


def of_variant(config: Config, kind: str) -> Memory:
    """The memory of the step of one of `KINDS`, or "as given" of the configured step; needs `model.vocab_size`."""
    config = config if kind == "as given" else variant(config, kind)
    parts = setup(_with_placeholder_base(config) if config.lora.rank else config)
    return of_forward_pass(parts) if kind == "forward" else of_training_step(parts)


def variant(config: Config, kind: str) -> Config:
    """The configuration for one of `KINDS`; adapters have rank 8 if `lora.rank` is 0, and "qlora" has an NF4 base."""
    adapters = kind in ("lora", "fa", "qlora")
    if not adapters:  # no adapters, and default values of their options
        lora = dataclasses.replace(config.lora, rank=0, **trainable.ADAPTERS_ONLY)
    else:
        lora = dataclasses.replace(config.lora, rank=config.lora.rank or 8, variant="fa" if kind == "fa" else "lora")
    quant = dataclasses.replace(config.quant, scheme="nf4" if kind == "qlora" else "")
    if adapters:
        quant = dataclasses.replace(quant, qat=dataclasses.replace(quant.qat, scheme=""))
    return _with_placeholder_base(dataclasses.replace(config, lora=lora, quant=quant))


def _with_placeholder_base(config: Config) -> Config:
    """Sets a placeholder as `init_from` of adapters; it is not read, because only shapes are needed."""
    return dataclasses.replace(config, init_from=config.init_from or "unnamed")


def with_remat(config: Config, remat: str) -> Config:
    """The configuration with another `model.remat`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def shard_bytes(tree: Any) -> int:
    """The bytes on one device of all arrays of a tree; leaves are `jax.ShapeDtypeStruct`s with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
