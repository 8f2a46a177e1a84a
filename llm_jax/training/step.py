"""The training state and the one step that all kinds of training share.

What is trained is a tree of its own: `bind(frozen, trained)` gives the parameters that the model
sees. In pretraining and full fine-tuning the trained tree is all of them and nothing is frozen;
adapters train a small tree over a frozen base, and the gradient is taken with respect to that alone.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses

Bind = Callable[[Any, Any], Any]


class State(flax.struct.PyTreeNode):
    """What training changes.

    Attributes:
      step: int32 (), updates done.
      params: the trained tree.
      optimizer: the state of the optimizer.
    """

    step: Any
    params: Any
    optimizer: Any


def everything(frozen: Any, trained: Any) -> Any:
    """The `bind` of full training: the trained tree is the parameters."""
    return trained


def init(optimizer: optax.GradientTransformation, params: Any) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), params, optimizer.init(params))


def make(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    bind: Bind,
    grad_accumulation: int,
    loss_chunk: int,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """A pure function (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    Micro-batches add up sums of losses and gradients, which are divided by the number of all counted
    targets: the same update, up to rounding, as the batch in one piece.
    """

    def total(trained: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return losses.language_model(model, bind(frozen, trained), batch, loss_chunk)

    gradient = jax.value_and_grad(total, has_aux=True)

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        if grad_accumulation == 1:
            (loss, count), grads = gradient(state.params, frozen, batch)
        else:
            # Row r goes to micro-batch r % A, so that each is spread over all devices.
            micro = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, grad_accumulation, *a.shape[1:]), 0, 1), batch)

            def add(sums: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, gradient(state.params, frozen, part)), None

            zero = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), state.params))
            ((loss, count), grads), _ = jax.lax.scan(add, zero, micro)
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss / count,
            "tokens": count,
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return State(state.step + 1, params, optimizer_state), metrics

    return step


def check_accumulation(batch_size: int, grad_accumulation: int, ways: int) -> None:
    """Raises UserError unless a batch splits into micro-batches that each split over the devices."""
    if grad_accumulation < 1 or batch_size % (grad_accumulation * ways):
        raise UserError(
            f"train.batch_size={batch_size} cannot be split into train.grad_accumulation={grad_accumulation} "
            f"micro-batches over {ways} devices"
        )
