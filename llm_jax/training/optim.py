"""Optimizers and schedules by name, on optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from llm_jax import trees
from llm_jax.config import OptimConfig, choice
from llm_jax.errors import UserError

OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.eps),
    "sgd": lambda c: optax.trace(c.beta1),
}

SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "cosine": lambda c, steps: optax.cosine_decay_schedule(c.lr, steps, c.final_lr_fraction),
    "linear": lambda c, steps: optax.linear_schedule(c.lr, c.lr * c.final_lr_fraction, steps),
    "constant": lambda c, steps: optax.constant_schedule(c.lr),
}


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up from 0, then `optim.schedule` up to step `steps`.

    Raises:
      UserError: an unknown schedule, or a warm-up that is not shorter than the training.
    """
    after = choice("optim.schedule", config.schedule, SCHEDULES)
    if not 0 <= config.warmup_steps < max(steps, 1):
        raise UserError(f"config key 'optim.warmup_steps' is {config.warmup_steps}; expected less than {steps} steps")
    if not config.warmup_steps:
        return after(config, steps)
    # The first update has the rate of step 1: one of rate 0 would be wasted.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1)
    return optax.join_schedules([warmup, after(config, steps - config.warmup_steps)], [config.warmup_steps])


def make(
    config: OptimConfig, steps: int, params: Any, adapters: Any = None, b_lr_ratio: float = 1.0
) -> optax.GradientTransformation:
    """Clipping, the optimizer, decoupled weight decay by rules, and the learning rate, in this order.

    Args:
      params: the tree of the model's weights (or its abstract form); its names decide the decay.
      adapters: the trained tree where that is not `params`: the parts (`a`, `b`, ...) of adapters, which
        decay as the weight that they adapt.
      b_lr_ratio: what the learning rate of the parts `b` is multiplied by.

    Raises:
      UserError: an unknown kind, or a decay rule that matches nothing.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(choice("optim.kind", config.kind, OPTIMIZERS)(config))
    if config.weight_decay:
        factors = trees.match(config.decay_rules, params, "optim.decay_rules")
        if wrong := [f for f in factors.values() if not isinstance(f, (int, float))]:
            raise UserError(f"optim.decay_rules: {wrong[0]!r} is no factor; expected a number")
        if adapters is not None:
            factors = {path: factors[path.rsplit("/", 1)[0]] for path in trees.flatten(adapters)}
        parts.append(_decay({path: config.weight_decay * f for path, f in factors.items()}))
    if b_lr_ratio != 1.0:
        parts.append(_faster_b(b_lr_ratio))
    parts.append(optax.scale_by_learning_rate(schedule(config, steps)))
    return optax.chain(*parts)


def _decay(rates: dict[str, float]) -> optax.GradientTransformation:
    """Adds rate * parameter to the updates (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    def add(path: str, update: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: u + rates[path] * p, update, params) if rates[path] else update

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return trees.map_weights(add, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _faster_b(ratio: float) -> optax.GradientTransformation:
    """Multiplies the updates of the parts `b` of adapters (LoRA+: Hayou et al. 2024, arXiv:2402.12354)."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return trees.map_weights(lambda path, u: u * ratio if path.endswith("/b") else u, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
