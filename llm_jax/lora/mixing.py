"""Several adapters of one base model: selects one, sums them with weights, or does so for each batch row.

`combine` concatenates adapters along the rank. `mix` changes only values, so that a jitted function is not recompiled
for other mixing weights.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.lora.adapt import by_path


def to_lora(adapters: trees.Tree) -> dict[str, Any]:
    """Converts adapters to LoRA of the original base: PiSSA's a b - start_a start_b becomes a product of rank 2 R.

    Args:
      adapters: an adapter tree, `a` (*L, in, R), `b` (*L, R, out) and `scale` (*L,) for each adapted weight.

    Returns:
      An adapter tree of `a`, `b` and `scale` alone.

    Raises:
      UserError: the adapters are DoRA, whose update is not of low rank.
    """
    flat: dict[str, Any] = {}
    for path, parts in by_path(adapters).items():
        if "magnitude" in parts:
            raise UserError(f"'{path}' has a magnitude (DoRA); its update is not of low rank and cannot be combined")
        a, b = parts["a"], parts["b"]
        if "start_a" in parts:
            a = jnp.concatenate([a, parts["start_a"]], -1)
            b = jnp.concatenate([b, -parts["start_b"]], -2)
        flat |= {f"{path}/a": a, f"{path}/b": b, f"{path}/scale": parts["scale"]}
    return trees.unflatten(flat)


def combine(*adapters: trees.Tree) -> dict[str, Any]:
    """Concatenates adapters for `mix`. They may adapt different weights with different ranks.

    Returns:
      An adapter tree whose rank R is the sum of the ranks. For every path it holds `a` (*L, in, R), `b` (*L, R, out),
      `scale` (*L, R) and `owner`, int32 (*L, R): the index of the adapter that each column of `a` belongs to.

    Raises:
      UserError: see `to_lora`.
    """
    flat_adapters = [by_path(to_lora(adapter)) for adapter in adapters]
    flat: dict[str, Any] = {}
    for path in dict.fromkeys(path for adapter in flat_adapters for path in adapter):
        indices = [i for i, adapter in enumerate(flat_adapters) if path in adapter]
        factors = [flat_adapters[i][path] for i in indices]
        ranks = [parts["a"].shape[-1] for parts in factors]
        leading = factors[0]["scale"].shape
        scales = [
            jnp.broadcast_to(parts["scale"][..., None], (*leading, rank))
            for parts, rank in zip(factors, ranks, strict=True)
        ]
        owner = jnp.concatenate(
            [jnp.full((*leading, rank), i, jnp.int32) for i, rank in zip(indices, ranks, strict=True)], -1
        )
        flat |= {
            f"{path}/a": jnp.concatenate([parts["a"] for parts in factors], -1),
            f"{path}/b": jnp.concatenate([parts["b"] for parts in factors], -2),
            f"{path}/scale": jnp.concatenate(scales, -1),
            f"{path}/owner": owner,
        }
    return trees.unflatten(flat)


def mix(combined: trees.Tree, mixture: jax.Array) -> dict[str, Any]:
    """The weighted sum of combined adapters, for `attach`.

    Args:
      combined: the result of `combine`.
      mixture: float (N,), the weight of each of N adapters (one-hot to select one), or (B, N), weights per batch row.

    Returns:
      An adapter tree whose `scale` has shape (*L, R), or (*L, B, R), where L is the layer axis of stacked weights.
    """
    flat: dict[str, Any] = {}
    for path, parts in by_path(combined).items():
        selected = jnp.asarray(mixture)[..., parts["owner"]]  # (*B, *L, R)
        scale = parts["scale"]
        if mixture.ndim == 2:  # the layer axis comes first
            selected = jnp.moveaxis(selected, 0, -2)
            scale = scale[..., None, :]
        flat |= {f"{path}/a": parts["a"], f"{path}/b": parts["b"], f"{path}/scale": scale * selected}
    return trees.unflatten(flat)
