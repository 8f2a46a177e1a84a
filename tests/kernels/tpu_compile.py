"""Compiles products for a TPU that this machine does not have, and prints what its compiler estimates, in JSON.

`python -m tests.kernels.tpu_compile CHIP PRODUCT...`, with the environment `topologies.environment()`. A product is
SCHEME/ROWS/INPUTS/OUTPUTS/CONTRACTED/HOW, where HOW is "kernel", "xla", or "dense" for a bfloat16 weight.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import weights
from llm_jax.kernels import matmul, number_formats, pallas
from llm_jax.parallel import hlo, topologies


def figures(product: str, mesh: Mesh) -> dict[str, object]:
    """The estimated cycles of a product, the bytes of its temporary arrays, and the number of kernels."""
    scheme, *sizes, how = product.split("/")
    rows, inputs, outputs, contracted = map(int, sizes)
    s = number_formats.scheme("int8" if how == "dense" else scheme)

    def compute(x, q):
        if how == "dense":
            y = jax.lax.dot_general(x, q, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
            return y.astype(jnp.bfloat16)
        if s.activations:
            return weights.dot(x, q)
        if how == "kernel":
            reason = pallas.unsupported_reason(x, q._stored(), s, weights.IN, contracted, jnp.float32)
            assert not reason, reason
            return pallas.product(x, q._stored(), s, weights.IN, contracted, jnp.bfloat16)
        return matmul.xla_product(x, q._stored(), s, weights.IN, contracted, jnp.float32).astype(jnp.bfloat16)

    dense = jax.ShapeDtypeStruct((inputs, outputs), jnp.bfloat16)
    weight = dense if how == "dense" else jax.eval_shape(lambda w: weights.to_qtensor(w, scheme, weights.IN), dense)
    x = jax.ShapeDtypeStruct((rows, (inputs, outputs)[contracted]), jnp.bfloat16)
    sharding = NamedSharding(mesh, P())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)  # noqa: E731
    with jax.set_mesh(mesh):
        compiled = jax.jit(compute).lower(*jax.tree.map(place, (x, weight))).compile()
    text = compiled.as_text()
    return {
        "cycles": hlo.cycles(hlo.parse(text)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }


if __name__ == "__main__":
    devices = topologies.devices(topologies.parse(sys.argv[1]))
    mesh = Mesh(np.array(devices[:1]), ("data",))
    results = {}
    for product in sys.argv[2:]:
        results[product] = figures(product, mesh)
        print(json.dumps(results), flush=True)
