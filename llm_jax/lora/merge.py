"""Merges adapters into dense weights and unmerges them; merges into quantized weights and measures the error."""

import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees, weights
from llm_jax.errors import UserError
from llm_jax.lora.adapt import attach, by_path, check, node
from llm_jax.weights import IN, Adapted, Decomposed, FakeQuant


def materialize(base: trees.Tree, adapters: trees.Tree, *, factors: str = "") -> dict[str, Any]:
    """Returns the base with W + scale * a b, in the shape and dtype of W, at every adapted path.

    Works on the parameters of any Flax model, including convolutions: a kernel (..., O) is flattened to a matrix
    (I, O), so that `a` is the kernel of a convolution to R channels, and `b` the kernel of a convolution of size 1.
    The result can be differentiated with respect to the adapters inside a jitted function. Unlike `attach`, this
    computes the gradient of the dense W + a b.

    Args:
      factors: see `attach`.

    Raises:
      UserError: the adapters are for another model.
    """
    check(base, adapters, "adapters")
    flat = trees.flatten(base)
    for path, parts in by_path(adapters).items():
        stacked = trees.layers_of(path) is not None
        merge_layer = functools.partial(_dense, factors=factors)
        flat[path] = (jax.vmap(merge_layer) if stacked else merge_layer)(weights.dense(flat[path]), parts)
    return trees.unflatten(flat)


merge = jax.jit(materialize, static_argnames="factors")


def _dense(base: jax.Array, parts: dict[str, Any], factors: str) -> jax.Array:
    return node(base.reshape(-1, base.shape[-1]), parts, factors).dense().reshape(base.shape)


def quantize_factors(adapters: trees.Tree, factors: str) -> dict[str, Any]:
    """Rounds a and b of adapters to the scheme `factors`, like every use of adapters that are attached with it."""
    if not factors:
        return trees.unflatten(trees.flatten(adapters))

    def round_leaf(path: str, leaf: Any) -> Any:
        is_factor = path.endswith(("/a", "/b"))
        return weights.dense(FakeQuant(leaf, None, None, None, factors, IN)) if is_factor else leaf

    return trees.map_weights(round_leaf, adapters)


def requantize(base: trees.Tree, adapters: trees.Tree, *, factors: str = "") -> tuple[dict[str, Any], dict[str, float]]:
    """Merges adapters into a base and quantizes merged weights of a quantized base again; see `merge_attached`."""
    return merge_attached(attach(base, adapters, factors=factors))


def merge_attached(params: trees.Tree) -> tuple[dict[str, Any], dict[str, float]]:
    """Merges attached adapters into their weights; merged quantized weights are quantized again by the same scheme.

    Returns:
      (parameters, {path: error}): for every quantized weight with an adapter, the norm of the rounding error of the
      merged weight divided by the norm of the update. An error of 1 means that the update is lost.
    """
    flat, costs = trees.flatten(params), {}
    for path, weight in flat.items():
        if isinstance(weight, (Adapted, Decomposed)):
            stacked = trees.layers_of(path) is not None
            flat[path], squares = (_folded_layers if stacked else _folded)(weight)
            if squares:
                lost, added = (float(jnp.sum(square)) for square in squares)
                costs[path] = math.sqrt(lost / max(added, sys.float_info.min))
    return trees.unflatten(flat), costs


@jax.jit
def _folded(weight: Adapted | Decomposed) -> tuple[Any, tuple[jax.Array, ...]]:
    """The merged weight, and the squared norms of its rounding error and of the update."""
    merged, q = weight.dense(), (weight.weight if isinstance(weight, Decomposed) else weight).base
    if not weights.is_quantized(q):
        return merged, ()
    requantized = weights.quantize(merged, q.scheme, q.axis)
    lost, added = weights.dense(requantized) - merged, merged - weights.dense(q)
    return requantized, (jnp.sum(jnp.square(lost)), jnp.sum(jnp.square(added)))


_folded_layers = jax.jit(jax.vmap(_folded))


@functools.partial(jax.jit, static_argnames="factors")
def unmerge(params: trees.Tree, adapters: trees.Tree, *, factors: str = "") -> dict[str, Any]:
    """The base of merged parameters: the inverse of `merge`, up to rounding in the dtype of the weights.

    Args:
      factors: the scheme that `merge` was called with.

    Raises:
      UserError: the adapters are DoRA, whose merged weights no longer determine the column norms of the base.
    """
    added = {path: parts | {"scale": -parts["scale"]} for path, parts in by_path(adapters).items()}
    if lost := [path for path, parts in added.items() if "magnitude" in parts]:
        raise UserError(f"'{lost[0]}' has a magnitude (DoRA) and cannot be unmerged; keep the base")
    flat = {f"{path}/{name}": leaf for path, parts in added.items() for name, leaf in parts.items()}
    return materialize(params, trees.unflatten(flat), factors=factors)
