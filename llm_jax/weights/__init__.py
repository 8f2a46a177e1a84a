"""Weights as typed values: dense arrays, low-rank adapters and quantized codes behind `dot`, `take` and `dense`."""

from llm_jax.weights.low_rank import Adapted, Decomposed, Dropped
from llm_jax.weights.nodes import NODES, Node, Weight, abstract, dense, dot, partition, take
from llm_jax.weights.quantized import IN, OUT, FakeQuant, QTensor, bits_per_weight, num_bytes, quantize

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
    "dense",
    "dot",
    "num_bytes",
    "partition",
    "quantize",
    "take",
]
