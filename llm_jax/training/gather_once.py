"""Weights that are gathered once per step instead of once per micro-batch (`train.gather_once`).

By default, `mesh.fsdp` gathers every weight before its products in every micro-batch. With `train.gather_once`, every
weight is gathered before the loop over micro-batches, and every device keeps a copy in the compute dtype for the whole
step. In both cases gradients are summed over the devices for every micro-batch.
"""

import re
from typing import Any

from jax.sharding import PartitionSpec as P

from llm_jax import trees, weights
from llm_jax.parallel import mesh as mesh_lib

COPIES = "copies"  # entry of the frozen parameters
_NOT_MULTIPLIED = re.compile(r"(.*/)?(position_[^/]*|types)")  # tables that are indexed by row


def before_micro_batches(params: Any, frozen: Any, dtype: Any, tied: bool) -> dict[str, Any]:
    """Returns the frozen parameters and gathered copies of the dense trainable weights.

    Args:
      params: the trainable weights, or adapters, which are not sharded.
      frozen: {name: parameters}.
      dtype: compute dtype, also of the copies; frozen weights keep their dtype.
      tied: whether the embedding table is also the output head.
    """

    def copied(path: str, w: Any) -> Any:
        spec = _spec(path, w, tied)
        return weights.gather(w.astype(dtype), spec) if spec is not None and weights.is_dense(w) else None

    def gathered(path: str, w: Any) -> Any:
        return weights.gather(w, _spec(path, w, tied))

    moved = {name: trees.map_weights(gathered, frozen[name]) for name in ("base", "reference") if name in frozen}
    return frozen | moved | {COPIES: trees.map_weights(copied, params)}


def _spec(path: str, w: Any, tied: bool) -> P | None:
    """The sharding of a weight during its matrix product; None for a weight without a matrix product."""
    stacked, spec = trees.layers_of(path) is not None, mesh_lib.gathered_spec(path)
    multiplied = len(w.shape) - stacked == 2 and not _NOT_MULTIPLIED.fullmatch(path) and (tied or path != "embed/table")
    return P(*(None,) * stacked, *spec) if multiplied and spec is not None else None


def attach(params: Any, frozen: Any) -> Any:
    """The parameters of the model with the copies from `before_micro_batches`."""
    if COPIES not in frozen:
        return params
    copies = trees.flatten(frozen[COPIES])
    return trees.map_weights(
        lambda path, w: w if copies.get(path) is None else weights.Gathered(w, copies[path]), params
    )
