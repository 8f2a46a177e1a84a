"""Weights as typed values: dense arrays, low-rank adapters and quantized codes behind `dot`, `take` and `dense`."""

from llm_jax.weights.low_rank import Adapted, Decomposed, Dropped, repeat_rows
from llm_jax.weights.nodes import (
    NODES,
    Node,
    Weight,
    abstract,
    cast,
    decay_mask,
    dense,
    dot,
    is_dense,
    kind,
    num_bytes,
    partition,
    summary,
    take,
)
from llm_jax.weights.quantized import IN, OUT, FakeQuant, QTensor, bits_per_weight, is_quantized, to_qtensor

__all__ = [
    "IN",
    "NODES",
    "OUT",
    "Adapted",
    "Decomposed",
    "Dropped",
    "FakeQuant",
    "Node",
    "QTensor",
    "Weight",
    "abstract",
    "bits_per_weight",
    "cast",
    "decay_mask",
    "dense",
    "dot",
    "is_dense",
    "is_quantized",
    "kind",
    "num_bytes",
    "partition",
    "repeat_rows",
    "summary",
    "take",
    "to_qtensor",
]
