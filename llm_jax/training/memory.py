"""What a training step takes, as it is compiled and without running it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import checkpoints
from llm_jax.model.transformer import Transformer
from llm_jax.schema import Config
from llm_jax.training import losses, optim, step
from llm_jax.training.trainable import Adapters, AllWeights

KINDS = ("forward", "full", "adapters")
STEPS = {"forward": "forward", "full": "full", "lora": "adapters", "fa": "adapters", "qlora": "adapters"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a compiled function.

    Attributes:
      arguments: weights, optimizer state and batch.
      temporaries: activations, gradients and the rest.
      outputs: those that do not take the place of an argument.
      optimizer: its state, which is part of the arguments.
    """

    arguments: int
    temporaries: int
    outputs: int
    optimizer: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs


def compiled(config: Config, kind: str) -> Memory:
    """The memory of one step of a micro-batch on one device of this machine.

    Args:
      kind: "forward" (the loss alone), "full" (all weights trained) or "adapters" (those of `config.lora`, over
        a base of `config.quant`).
    """
    base, rows = checkpoints.abstract_params(Transformer(config.model)), batch(config)
    if kind == "forward":
        return of(forward(config).lower(base, rows).compile(), 0)
    one, begin = training_step(config, kind)
    state, frozen = jax.eval_shape(begin, base)
    return of(one.lower(state, frozen, rows).compile(), _bytes(state.optimizer))


def forward(config: Config) -> Any:
    """The jitted loss of a micro-batch alone: (weights, batch) -> its sums."""
    model = Transformer(config.model)
    chunk, sparse = config.train.loss_chunk, losses.is_sparse(config)
    return jax.jit(lambda params, rows: losses.language_model(model, params, rows, chunk, sparse))


def batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """A micro-batch's shapes."""
    c = config.train
    names = ("inputs", "targets", "positions", "segments", "mask")
    shape = (c.batch_size // c.grad_accumulation, c.seq_len)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}


def training_step(config: Config, kind: str) -> tuple[Any, Callable[[Any], tuple[step.State, Any]]]:
    """(the jitted step of a micro-batch, base weights -> (state, frozen)); see `training.step`."""
    model = Transformer(config.model)
    base = checkpoints.abstract_params(model)
    what = Adapters(config.lora, config.quant) if kind == "adapters" else AllWeights(config.quant)

    def loss(trained, frozen, rows, count, key):
        chunk, sparse = config.train.loss_chunk, losses.is_sparse(config)
        return losses.language_model(model, what.whole(trained, frozen), rows, chunk, sparse)

    key = jax.random.key(0)
    abstract = jax.eval_shape(what.begin, base, key)[0]
    optimizer = optim.make(config.optim, 10**9, base, adapters=abstract if what.adapts else None)

    def begin(base):
        trained, fixed = what.begin(base, key)
        return step.init(optimizer, trained), what.freeze(base, fixed)

    return jax.jit(step.make(loss, optimizer, lambda _: 0.0, 0, 1), donate_argnums=0), begin


def variant(config: Config, name: str, remat: str) -> Config:
    """The configuration of one of `STEPS`: "qlora" has an NF4 base; adapters have rank 8 where none is said."""
    adapters = dataclasses.replace(config.lora, rank=config.lora.rank or 8, variant="fa" if name == "fa" else "lora")
    quant = dataclasses.replace(config.quant, scheme="nf4" if name == "qlora" else "")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat), lora=adapters, quant=quant)


def of(executable: Any, optimizer: int) -> Memory:
    """What a compiled function takes, of which `optimizer` bytes are the optimizer's."""
    found = executable.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, max(outputs, 0), optimizer)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
