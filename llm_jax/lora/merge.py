"""Adapters folded into dense weights, and out of them again."""

from typing import Any

import jax

from llm_jax import trees, weights
from llm_jax.errors import UserError
from llm_jax.lora.adapt import by_path, check
from llm_jax.weights import Adapted, Decomposed


def materialize(base: trees.Tree, adapters: trees.Tree) -> dict[str, Any]:
    """The base with W + scale * a b, as an array of W's shape and dtype, wherever there is an adapter.

    Works on the parameters of any Flax model, convolutions included: a kernel (..., O) is the matrix
    (I, O) of its flattened axes, so that `a` is the kernel of a convolution to R channels and `b` one
    of size 1 (the last axis is what comes out). Inside a jitted function it can be differentiated with
    respect to the adapters; the gradient of a dense W + a b is then formed, which `attach` avoids.

    Raises:
      UserError: the adapters are for another model.
    """
    check(base, adapters, "adapters")
    flat = trees.flatten(base)
    for path, parts in by_path(adapters).items():
        stacked = trees.layers_of(path) is not None
        flat[path] = (jax.vmap(_dense) if stacked else _dense)(weights.dense(flat[path]), parts)
    return trees.unflatten(flat)


merge = jax.jit(materialize)


def _dense(base: jax.Array, parts: dict[str, Any]) -> jax.Array:
    return _node(base, parts).dense().reshape(base.shape)


def _node(base: jax.Array, parts: dict[str, Any]) -> Any:
    node = Adapted(base.reshape(-1, base.shape[-1]), parts["a"], parts["b"], parts["scale"])
    return Decomposed(node, parts["magnitude"], parts["squares"]) if "magnitude" in parts else node


@jax.jit
def unmerge(params: trees.Tree, adapters: trees.Tree) -> dict[str, Any]:
    """The base again out of `merge`d parameters, up to the rounding of both in the weights' dtype.

    Raises:
      UserError: DoRA, which forgets how long the columns of the base were.
    """
    added = {path: parts | {"scale": -parts["scale"]} for path, parts in by_path(adapters).items()}
    if lost := [path for path, parts in added.items() if "magnitude" in parts]:
        raise UserError(f"'{lost[0]}' has a magnitude (DoRA) and cannot be unmerged; keep the base")
    flat = {f"{path}/{name}": leaf for path, parts in added.items() for name, leaf in parts.items()}
    return materialize(params, trees.unflatten(flat))
