"""Several adapters of one base: switched, summed with weights, or different ones for every row of a batch.

`combine` concatenates them along the rank, once. `mix` changes values only, so that a jitted function is not
compiled again for another choice.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.lora.adapt import by_path


def plain(adapters: trees.Tree) -> dict[str, Any]:
    """Adapters for the original base: PiSSA's a b - start_a start_b becomes one adapter of twice the rank.

    Raises:
      UserError: the adapters are DoRA, whose update is not of low rank.
    """
    found: dict[str, Any] = {}
    for path, parts in by_path(adapters).items():
        if "magnitude" in parts:
            raise UserError(f"'{path}' has a magnitude (DoRA); its update is not of low rank and cannot be combined")
        a, b = parts["a"], parts["b"]
        if "start_a" in parts:
            a = jnp.concatenate([a, parts["start_a"]], -1)
            b = jnp.concatenate([b, -parts["start_b"]], -2)
        found |= {f"{path}/a": a, f"{path}/b": b, f"{path}/scale": parts["scale"]}
    return trees.unflatten(found)


def combine(*adapters: trees.Tree) -> dict[str, Any]:
    """Concatenates adapters for `mix`. They may adapt different weights with different ranks.

    Returns:
      An adapter tree of the summed ranks R, in which every path has `owner`, int32 (R,): the index of the adapter that
      a column of `a` belongs to.

    Raises:
      UserError: see `plain`.
    """
    several = [by_path(plain(one)) for one in adapters]
    found: dict[str, Any] = {}
    for path in dict.fromkeys(path for one in several for path in one):
        own = [(i, one[path]) for i, one in enumerate(several) if path in one]
        widths = [parts["a"].shape[-1] for _, parts in own]
        lead = own[0][1]["scale"].shape
        scales = [jnp.broadcast_to(p["scale"][..., None], (*lead, w)) for (_, p), w in zip(own, widths, strict=True)]
        owner = jnp.concatenate([jnp.full((*lead, w), i, jnp.int32) for (i, _), w in zip(own, widths, strict=True)], -1)
        found |= {
            f"{path}/a": jnp.concatenate([parts["a"] for _, parts in own], -1),
            f"{path}/b": jnp.concatenate([parts["b"] for _, parts in own], -2),
            f"{path}/scale": jnp.concatenate(scales, -1),
            f"{path}/owner": owner,
        }
    return trees.unflatten(found)


def mix(combined: trees.Tree, mixture: jax.Array) -> dict[str, Any]:
    """The weighted sum of combined adapters, for `attach`.

    Args:
      combined: see `combine`.
      mixture: float (N,), the weight of each of N adapters (one-hot to select one), or (B, N), weights per batch row.
    """
    found: dict[str, Any] = {}
    for path, parts in by_path(combined).items():
        strength = jnp.asarray(mixture)[..., parts["owner"]]  # (*B, *L, R)
        scale = parts["scale"]
        if mixture.ndim == 2:  # the layer axis comes first
            strength = jnp.moveaxis(strength, 0, -2)
            scale = scale[..., None, :]
        found |= {f"{path}/a": parts["a"], f"{path}/b": parts["b"], f"{path}/scale": scale * strength}
    return trees.unflatten(found)
