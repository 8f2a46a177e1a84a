"""Checks the hooks of a custom position scheme, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.extensions import Extension

_B, _T, _S = 2, 3, 5  # sizes of the batch, the queries and the keys in the traces


def check(extension: Extension, scheme: Any, head_dim: int) -> None:
    """Traces every hook that the scheme overrides, and compares the shapes that it returns.

    Args:
      scheme: an instance of the class of the extension.
      head_dim: width of an attention head.

    Raises:
      UserError: a hook raises an exception, or returns an array whose shape differs from the one in `Position`.
    """
    heads, width = scheme.config.num_heads, scheme.config.width
    dtype = scheme.config.precision.compute
    q_positions, k_positions = jax.ShapeDtypeStruct((_B, _T), jnp.int32), jax.ShapeDtypeStruct((_B, _S), jnp.int32)
    table, layer_table = (
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in extension.call(declare).items()}
        for declare in (scheme.declare, scheme.declare_layer)
    )
    x = jax.ShapeDtypeStruct((_B, _T, extension.call(scheme.token_width)), dtype)
    queries = jax.ShapeDtypeStruct((_B, _T, heads, head_dim), dtype)
    probabilities = jax.ShapeDtypeStruct((_B, heads, _T, _S), dtype)
    scores = {"batch": _B, "heads": heads, "queries": _T, "keys": _S}
    vectors = {"batch": _B, "tokens": _T, "heads": heads, "head_dim": head_dim}

    def values(q: Any, k: Any, weights: Any, probs: Any) -> Any:
        add = scheme.values(q, k, weights)
        return None if add is None else add(probs)

    extension.check_output("embed", scheme.embed, (x, q_positions, table), {"batch": _B, "tokens": _T, "width": width})
    extension.check_output("rotate", scheme.rotate, (queries, q_positions, q_positions), vectors)
    extension.check_output("bias", scheme.bias, (q_positions, k_positions, table), scores, broadcasts=True)
    extension.check_output("keys", scheme.keys, (queries, q_positions, k_positions, layer_table), scores, True)
    extension.check_output("values", values, (q_positions, k_positions, layer_table, probabilities), vectors)
