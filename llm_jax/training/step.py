"""The training state and the update step of all kinds of training.

The trainable parameters are a separate tree, and the gradient is taken only with respect to this tree: the loss
builds the model's parameters from the trainable and the frozen ones. In pretraining and full fine-tuning the trainable
tree contains all weights; adapters are a small trainable tree over a frozen base.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.training import bad_steps

# (trainable, frozen, batch, step, key) -> (sum over the counted targets, number of targets), float32 () each.
# `step` is the number of previous updates; `key` is a function of (seed, step, micro-batch).
Loss = Callable[[Any, Any, Batch, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class TrainState(flax.struct.PyTreeNode):
    """The state of training, a pytree.

    Attributes:
      step: int32 (), the number of updates.
      params: the trainable parameters.
      opt_state: the state of the optimizer.
      ema: the exponential moving average of `params`, in float32 or wider, or None.
      frozen: the parameters that training does not change; {} in full training.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None
    frozen: Any = flax.struct.field(default_factory=dict)

    @property
    def eval_params(self) -> Any:
        """The trainable parameters for evaluation: their moving average if it exists, in the dtypes of `params`."""
        return self.params if self.ema is None else jax.tree.map(lambda e, p: e.astype(p.dtype), self.ema, self.params)


def init(optimizer: optax.GradientTransformation, params: Any, ema: bool = False) -> TrainState:
    """The state before the first step."""

    def copy(leaf: jax.Array) -> jax.Array:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    return TrainState(jnp.int32(0), params, optimizer.init(params), jax.tree.map(copy, params) if ema else None)


def average(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """d ema + (1 - d) params, where d = min(decay, (1 + step) / (10 + step)).

    The smaller d of the first steps reduces the influence of the initial values (the rule of TensorFlow's
    ExponentialMovingAverage).

    Args:
      step: number of previous updates.
    """
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: (d * e + (1 - d) * p.astype(e.dtype)).astype(e.dtype), ema, params)


def make(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    grad_accumulation: int,
    skip_bad: bool = False,
    update_norms: bool = False,
    ema_decay: float = 0.0,
    rows_together: int = 1,
    gather: Callable[[Any, Any], Any] | None = None,
    shardings: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the pure update function (state, frozen, batch, limit=inf) -> (state, metrics), to be jitted.

    A step is bad if the loss or the gradient is not finite, or if the loss exceeds `limit`, float32 ().

    Args:
      skip_bad: whether a bad step changes nothing except the step count.
      update_norms: whether the metrics include the norms of the updates.
      ema_decay: decay of the moving average, see `average`; unused if the state has no average.
      rows_together: number of consecutive rows that must be in the same micro-batch.
      gather: function (params, frozen) -> frozen parameters for all micro-batches, see `gather_once`.
      shardings: with `gather`, the shardings of the trainable parameters and of their gradients.

    The sums of losses and gradients over the micro-batches (in float32 or wider) are divided by the total number of
    counted targets. Up to rounding, the update equals the update of the whole batch.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(
        state: TrainState, frozen: Any, batch: Batch, limit: float | jax.Array = math.inf
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if grad_accumulation == 1:
            (total, count), grads = gradient(state.params, frozen, batch, state.step, jax.random.fold_in(key, 0))
        else:

            def split(array: jax.Array) -> jax.Array:
                # Group r is part of micro-batch r % A, so that every micro-batch is spread over all devices.
                groups = array.reshape(-1, grad_accumulation, rows_together, *array.shape[1:])
                return jnp.swapaxes(groups, 0, 1).reshape(grad_accumulation, -1, *array.shape[1:])

            micro = jax.tree.map(split, batch)
            if gather is not None:
                frozen = gather(state.params, frozen)

            def add(sums: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
                terms = gradient(state.params, frozen, part[1], state.step, jax.random.fold_in(key, part[0]))
                if gather is not None:
                    # Otherwise the sums of gradients would have the shardings of the gathered copies.
                    terms = (terms[0], jax.lax.with_sharding_constraint(terms[1], shardings))
                return jax.tree.map(jnp.add, sums, terms), None

            def zero(leaf: jax.Array) -> jax.Array:
                return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))

            sums = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(zero, state.params))
            ((total, count), grads), _ = jax.lax.scan(add, sums, (jnp.arange(grad_accumulation), micro))
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g, p: (g / count.astype(g.dtype)).astype(p.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        mean = total / count
        bad = ~(jnp.isfinite(norm) & (mean <= limit))
        metrics = {
            "loss": mean,
            "tokens": jnp.sum(batch["mask"]).astype(jnp.float32),
            # A batch without padding need not have segments.
            "input_tokens": jnp.sum(batch.get("segments", batch["mask"]) > 0).astype(jnp.float32),
            "grad_norm": norm,
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "bad": bad,
            "gradient_norms": bad_steps.norms(grads),
        }
        if update_norms:
            metrics["update_norms"] = bad_steps.norms(updates)
        ema = None if state.ema is None else average(state.ema, params, ema_decay, state.step)
        new = TrainState(state.step + 1, params, opt_state, ema)
        if skip_bad:
            new = jax.tree.map(lambda new, old: jnp.where(bad, old, new), new, state.replace(step=new.step))
        return new, metrics

    return step


def check_gather_once(gather_once: bool, grad_accumulation: int) -> None:
    """Raises UserError if `train.gather_once` has no effect."""
    if gather_once and grad_accumulation == 1:
        raise UserError(
            "train.gather_once=True has no effect with train.grad_accumulation=1, where each weight is gathered for "
            "one batch only; leave it out"
        )


def check_accumulation(batch_size: int, grad_accumulation: int, devices: int, rows_together: int = 1) -> None:
    """Raises UserError unless the batch divides into micro-batches that divide over the devices."""
    if grad_accumulation < 1 or batch_size % (grad_accumulation * devices * rows_together):
        raise UserError(
            f"train.batch_size={batch_size} cannot be split into train.grad_accumulation={grad_accumulation} "
            f"micro-batches over {devices} devices{f', {rows_together} rows together' if rows_together > 1 else ''}"
        )
