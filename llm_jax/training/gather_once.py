"""Weights that are gathered once per step instead of once per micro-batch (`train.gather_once`).

Under `mesh.fsdp` every micro-batch gathers every weight before its products. Gathered before the loop over
micro-batches, a weight is moved once, and a copy in the dtype of the computation stays on every device for the whole
step. Gradients are summed over the devices for every micro-batch as before.
"""

import re
from typing import Any

from jax.sharding import PartitionSpec as P

from llm_jax import trees, weights
from llm_jax.parallel import mesh as mesh_lib

COPIES = "copies"  # entry of the frozen parameters
_NOT_MULTIPLIED = re.compile(r"(.*/)?(position_[^/]*|types)")  # tables of which rows are taken


def before_micro_batches(params: Any, frozen: Any, dtype: Any, tied: bool) -> dict[str, Any]:
    """The frozen parameters, gathered, with gathered copies of the trainable weights that are dense arrays.

    Args:
      params: the trainable weights, or those of adapters, which are not sharded.
      frozen: {name: parameters}.
      dtype: of the computation, and of the copies; frozen weights keep theirs.
      tied: whether the embedding table is the output head, too.
    """

    def copied(path: str, w: Any) -> Any:
        spec = _spec(path, w, tied)
        return weights.gather(w.astype(dtype), spec) if spec is not None and weights.is_dense(w) else None

    def gathered(path: str, w: Any) -> Any:
        return weights.gather(w, _spec(path, w, tied))

    moved = {name: trees.map_weights(gathered, frozen[name]) for name in ("base", "reference") if name in frozen}
    return frozen | moved | {COPIES: trees.map_weights(copied, params)}


def _spec(path: str, w: Any, tied: bool) -> P | None:
    """How a weight is sharded while a matrix product uses it; None for one that no product uses."""
    stacked, spec = trees.layers_of(path) is not None, mesh_lib.gathered(path)
    multiplied = len(w.shape) - stacked == 2 and not _NOT_MULTIPLIED.fullmatch(path) and (tied or path != "embed/table")
    return P(*(None,) * stacked, *spec) if multiplied and spec is not None else None


def attach(params: Any, frozen: Any) -> Any:
    """The parameters of the model with the copies that `before_micro_batches` has made."""
    if COPIES not in frozen:
        return params
    copies = trees.flatten(frozen[COPIES])
    return trees.map_weights(
        lambda path, w: w if copies.get(path) is None else weights.Gathered(w, copies[path]), params
    )
