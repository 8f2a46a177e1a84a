"""Optimizers and schedules by name, built on optax. An optimizer may be a custom function (`extensions`).

    gradients -> clipping -> update rule (`optim.kind`) -> times width scaling -> plus weight decay
              -> times `optim.lr_rules` -> times learning rate

Scanned layers are stacked in one array. Every update rule treats each layer as a separate weight, so that updates do
not depend on `model.scan_layers`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from optax import contrib

from llm_jax import extensions, trees, weights
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import OptimConfig, Rules, choice, derived


class UpdateRule(NamedTuple):
    """An update rule and the scaling of its learning rates with the width of the model.

    Attributes:
      make: returns the transformation from gradients to updates, before the learning rate.
      hidden: power of (base width / width) that multiplies the learning rate of hidden matrices (Yang et al. 2022,
        arXiv:2203.03466, table 8).
      vectors: power of (base width / width) that multiplies the learning rate of all other weights.
    """

    make: Callable[[OptimConfig], optax.GradientTransformation]
    hidden: float
    vectors: float


OPTIMIZERS: dict[str, UpdateRule] = {
    # Loshchilov and Hutter 2019, arXiv:1711.05101
    "adamw": UpdateRule(lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.eps), 1, 0),
    # Chen et al. 2023, arXiv:2302.06675; all entries have equal size, as in Adam, so table 8 applies as for Adam
    "lion": UpdateRule(lambda c: optax.scale_by_lion(c.beta1, c.beta2), 1, 0),
    "adafactor": UpdateRule(lambda c: _adafactor(), 1, 0),
    # The update is an orthogonal matrix times sqrt(width) and changes features by sqrt(width): half of Adam's power.
    "muon": UpdateRule(lambda c: _muon(c), 0.5, 0),
    "sgd": UpdateRule(lambda c: optax.trace(c.beta1), 0, -1),
}


def _inverse_sqrt(c: OptimConfig, steps: int) -> optax.Schedule:
    warm = max(c.warmup_steps, 1)
    return lambda step: c.lr * jnp.sqrt(warm / (step + c.warmup_steps + 1))


def _wsd(c: OptimConfig, steps: int) -> optax.Schedule:
    decay_steps = round(c.decay_fraction * (steps + c.warmup_steps))
    if decay_steps > steps:
        raise UserError(
            f"optim.decay_fraction={c.decay_fraction} of {steps + c.warmup_steps} steps and "
            f"optim.warmup_steps={c.warmup_steps} are more than all steps; lower one of them"
        )
    decay = optax.linear_schedule(c.lr, c.lr * c.final_lr_fraction, decay_steps)
    return optax.join_schedules([optax.constant_schedule(c.lr), decay], [steps - decay_steps])


SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "cosine": lambda c, steps: optax.cosine_decay_schedule(c.lr, steps, c.final_lr_fraction),
    "linear": lambda c, steps: optax.linear_schedule(c.lr, c.lr * c.final_lr_fraction, steps),
    "constant": lambda c, steps: optax.constant_schedule(c.lr),
    "wsd": _wsd,  # Hu et al. 2024, MiniCPM, arXiv:2404.06395, with linear decay
    "inverse_sqrt": _inverse_sqrt,  # Vaswani et al. 2017, arXiv:1706.03762, equation 3
}


def warmup_steps(config: OptimConfig, steps: int) -> int:
    """The number of warm-up steps: `optim.warmup_steps`, or a fourteenth of all steps if it is -1."""
    return derived.warmup_steps(steps) if config.warmup_steps < 0 else config.warmup_steps


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Returns the schedule: a linear warm-up from 0, then `optim.schedule` up to step `steps`.

    Raises:
      UserError: an unknown schedule, or a warm-up that is not shorter than the training.
    """
    config = dataclasses.replace(config, warmup_steps=warmup_steps(config, steps))
    main_schedule = choice("optim.schedule", config.schedule, SCHEDULES)
    if not 0 <= config.warmup_steps < max(steps, 1):
        raise UserError(f"config key 'optim.warmup_steps' is {config.warmup_steps}; expected less than {steps} steps")
    if not config.warmup_steps:
        return main_schedule(config, steps)
    # The first update uses the rate of step 1, because an update with rate 0 would have no effect.
    warmup = optax.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps - 1)
    return optax.join_schedules([warmup, main_schedule(config, steps - config.warmup_steps)], [config.warmup_steps])


def make(
    config: OptimConfig,
    steps: int,
    params: Any,
    width_ratio: float = 1.0,
    adapters: Any = None,
    b_lr_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """Returns the transformation: clipping, the optimizer, decoupled weight decay by rules, and the learning rate.

    Args:
      params: the parameter tree of the model (arrays or shapes); the rules match its names.
      width_ratio: base width / width (`transformer.width_ratio`). It scales the updates of the update rule but not the
        weight decay, which shrinks weights by the same factor at every width.
      adapters: the trainable tree if it is not `params`: the parts (a, b, ...) of adapters. They have the decay and the
        learning rate of the adapted weight.
      b_lr_ratio: factor on the learning rate of the parts b (LoRA+: Hayou et al. 2024, arXiv:2402.12354).

    Raises:
      UserError: an unknown kind, a rule that matches nothing, or a rule whose value is not a number.
    """

    def factors_of(rules: Rules, source: str) -> dict[str, float]:
        factors = _factors(rules, params, source)
        return factors if adapters is None else {p: factors[p.rsplit("/", 1)[0]] for p in trees.flatten(adapters)}

    trainable = params if adapters is None else adapters
    rule = _update_rule(config.kind)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(rule.make(config))
    if config.kind not in OPTIMIZERS:
        _check_custom(config.kind, parts[-1], trainable)
    if width_ratio != 1 and adapters is None:
        powers = _map(lambda path, leaf: rule.hidden if _is_hidden(path, leaf) else rule.vectors, params)
        parts.append(_scaled(jax.tree.map(lambda power: width_ratio**power, powers)))
    if config.weight_decay:
        factors = factors_of(config.decay_rules, "optim.decay_rules")
        parts.append(_decay({path: config.weight_decay * f for path, f in factors.items()}))
    rates = factors_of(config.lr_rules, "optim.lr_rules")
    if b_lr_ratio != 1:
        rates = {path: rate * (b_lr_ratio if path.endswith("/b") else 1.0) for path, rate in rates.items()}
    if set(rates.values()) != {1.0}:
        parts.append(_scaled(_map(lambda path, leaf: rates[path], trainable)))
    parts.append(optax.scale_by_learning_rate(schedule(config, steps)))
    return optax.chain(*parts)


def _update_rule(kind: str) -> UpdateRule:
    """The update rule of `optim.kind`. The learning rates of a custom optimizer scale with the width like Adam's."""
    rule = extensions.select("optim.kind", kind, OPTIMIZERS)
    if not isinstance(rule, extensions.Extension):
        return rule
    make = rule.bind(rule.target)

    def custom_rule(config: OptimConfig) -> optax.GradientTransformation:
        transformation = rule.call(make, config)
        if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
            raise rule.error(f"it returns {type(transformation).__name__}; expected an optax transformation")
        return transformation

    return UpdateRule(custom_rule, 1, 0)


def _check_custom(kind: str, transformation: optax.GradientTransformation, params: Any) -> None:
    """Traces the update of a custom optimizer, and compares its sign with that of gradients of 1 on small weights.

    Raises:
      UserError: the update raises an exception, has other shapes than the gradients, or has the opposite sign: the
        function returns a complete optimizer such as `optax.adam`, and the trainer would change the sign again.
    """
    extension = extensions.load("optim.kind", kind)

    def update(params: Any) -> Any:
        return transformation.update(params, transformation.init(params), params)[0]

    updates = extension.call(jax.eval_shape, update, params)
    shapes, expected = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (updates, params))
    if shapes != expected:
        raise extension.error("the updates have other shapes than the gradients")
    with jax.ensure_compile_time_eval():
        small = jax.tree.map(lambda leaf: jnp.ones([min(size, 2) for size in leaf.shape], leaf.dtype), params)
        try:
            total = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(update(small)))
        except extensions.FAILURES:  # user code may depend on the real shapes
            return
    if total < 0:
        raise extension.error(
            "the updates have the opposite sign of the gradients; leave out the learning rate and the sign, which the "
            "trainer applies (optax.scale_by_adam() instead of optax.adam(lr))"
        )


def shardings(state: Any, params: Any, params_shardings: Any, replicated: NamedSharding) -> Any:
    """Returns the shardings of an optimizer state; an entry that belongs to a weight is sharded like the weight.

    A state contains trees like the parameters; some have axes of size 1 (factored moments), and some lack the weights
    of other update rules. The end of a leaf's path is the path of its weight.

    Args:
      state, params: trees of shapes.
      params_shardings: tree of the shardings of the parameters.
      replicated: the sharding of everything else (step counts).
    """
    weights, _ = jax.tree_util.tree_flatten_with_path(params)
    known = {
        keys: (len(leaf.shape), s) for (keys, leaf), s in zip(weights, jax.tree.leaves(params_shardings), strict=True)
    }

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(keys)):
            rank, sharding = known.get(keys[start:], (-1, replicated))
            if rank == len(leaf.shape):
                return NamedSharding(sharding.mesh, mesh_lib.divisible_spec(sharding.spec, leaf.shape, sharding.mesh))
        return replicated

    return jax.tree_util.tree_map_with_path(place, state)


def _is_hidden(path: str, leaf: Any) -> bool:
    """Whether a weight is a hidden matrix: not an embedding, head, bias, norm or position table."""
    name, rank = trees.expand(path)[0], len(leaf.shape) - (trees.layers_of(path) is not None)
    return rank == 2 and re.fullmatch(r"(.*/)?layers/\d+/(?!.*position_).*", name) is not None


def _map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Applies `function(path of the weight, leaf, *others)` to every leaf of every weight."""
    return trees.map_weights(lambda path, *w: jax.tree.map(lambda *leaf: function(path, *leaf), *w), tree, *rest)


def _factors(rules: Rules, params: Any, source: str) -> dict[str, float]:
    factors = trees.match(rules, params, source)
    for factor in factors.values():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise UserError(f"{source}: {factor!r} is not a factor; expected a number of at least 0")
    return {path: float(factor) for path, factor in factors.items()}


def _scaled(factors: Any) -> optax.GradientTransformation:
    """Multiplies every leaf by its factor."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))


def _decay(rates: dict[str, float]) -> optax.GradientTransformation:
    """Adds rate * parameter to the updates (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    def add(path: str, update: Any, params: Any) -> Any:
        if not rates[path]:
            return update
        mask = weights.decay_mask(params)
        return jax.tree.map(lambda u, p, decays: u + rates[path] * p if decays else u, update, params, mask)

    return optax.stateless(lambda updates, params: trees.map_weights(add, updates, params))


def _muon(c: OptimConfig) -> optax.GradientTransformation:
    """Momentum orthogonalized by Newton-Schulz iterations for hidden matrices, and Adam for all other weights.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The update of an (in, out) matrix is
    multiplied by 0.2 sqrt(max(in, out)), so that its RMS matches AdamW's, with the same learning rate and
    weight decay (Liu et al. 2025, arXiv:2502.16982, equation 4).
    """

    def axes(updates: Any) -> Any:  # all other axes are batch axes (layers)
        return jax.tree.map(lambda leaf: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), updates)

    def resized(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * (0.2 * max(leaf.shape[-2:]) ** 0.5), updates)

    matrices = optax.chain(
        contrib.scale_by_muon(beta=c.momentum, weight_dimension_numbers=axes), optax.stateless(resized)
    )
    return optax.partition(
        {"matrices": matrices, "others": optax.scale_by_adam(c.beta1, c.beta2, c.eps)},
        lambda params: _map(lambda path, leaf: "matrices" if _is_hidden(path, leaf) else "others", params),
    )


class FactoredMoments(NamedTuple):
    """The state of Adafactor.

    Attributes:
      steps: int32 (), number of updates.
      rows: float; for matrices (..., in, out), the moving mean square of every row, (..., in, 1); for other weights, of
        every entry.
      columns: float; for matrices, the moving mean square of every column, (..., 1, out); for other weights, unused and
        of size 1.
    """

    steps: jax.Array
    rows: Any
    columns: Any


def _adafactor() -> optax.GradientTransformation:
    """Adam without momentum, with second moments factored into rows and columns.

    Algorithm 4 of Shazeer and Stern 2018 (arXiv:1804.04235), with the decay 1 - t^-0.8 and the clipping
    of updates to an RMS of 1 of its sections 6 and 7.2. Learning rates are absolute. optax's version is
    not used, because it factors the two longest axes and so mixes the layers of a scan.
    """

    def layer_axes(path: str, leaf: Any) -> tuple[int, ...]:
        """The axes of one layer's weight."""
        return tuple(range(trees.layers_of(path) is not None, leaf.ndim))

    def rows_of(path: str, square: jax.Array) -> jax.Array:
        return jnp.mean(square, -1, keepdims=True) if len(layer_axes(path, square)) > 1 else square

    def columns_of(path: str, square: jax.Array) -> jax.Array:
        axes = layer_axes(path, square)
        return jnp.mean(square, -2, keepdims=True) if len(axes) > 1 else jnp.zeros((1,) * square.ndim, square.dtype)

    def init(params: Any) -> FactoredMoments:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return FactoredMoments(jnp.int32(0), _map(rows_of, zeros), _map(columns_of, zeros))

    def divided(path: str, gradient: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        axes = layer_axes(path, gradient)
        if len(axes) > 1:  # separate roots, because the product of two small moments would underflow to 0
            update = gradient * jax.lax.rsqrt(rows / jnp.mean(rows, -2, keepdims=True)) * jax.lax.rsqrt(columns)
        else:
            update = gradient * jax.lax.rsqrt(rows)
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True))
        return update / jnp.maximum(rms, 1.0)

    def update(updates: Any, state: FactoredMoments, params: Any = None) -> tuple[Any, FactoredMoments]:
        steps = state.steps + 1
        beta = 1.0 - steps.astype(jnp.float32) ** -0.8

        def moving(mean: Callable[..., jax.Array], path: str, old: jax.Array, gradient: jax.Array) -> jax.Array:
            new = mean(path, jnp.square(gradient) + 1e-30)
            return (beta * old + (1 - beta) * new).astype(old.dtype)

        rows = _map(lambda *a: moving(rows_of, *a), state.rows, updates)
        columns = _map(lambda *a: moving(columns_of, *a), state.columns, updates)
        return _map(divided, updates, rows, columns), FactoredMoments(steps, rows, columns)

    return optax.GradientTransformation(init, update)
