"""Tensors of GGUF files that stay quantized: their values are those that the gguf package reads."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.checkpoints import gguf_blocks
from llm_jax.kernels import cpu_product, number_formats

pytestmark = pytest.mark.usefixtures("compiled_kernels")
GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "kernels" / "blocks_golden.npz")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", gguf_blocks.READABLE)
def test_values_and_products_are_those_of_the_file(name, transposed):
    numbers = GOLDEN[f"{name}_numbers"].astype(np.float32)
    q = jax.tree.map(jnp.asarray, gguf_blocks.from_rows(name, GOLDEN[f"{name}_bytes"], transposed))
    w = numbers.T if transposed else numbers
    assert q.shape == w.shape and jax.tree.leaves(q)[0].dtype.itemsize == 1
    np.testing.assert_array_equal(q.dense(), w)
    inputs = w.shape[0] if transposed else w.shape[1]  # the products that a model forms with groups along its inputs
    x = jax.random.normal(jax.random.key(0), (3, inputs))
    arguments = x, q._stored(), number_formats.scheme(q.scheme), q.axis, int(not transposed), "float32"
    assert cpu_product.unsupported_reason(*arguments) == ""
    exact = np.asarray(x, np.float64) @ (w if transposed else w.T)
    bound = np.abs(x) @ np.abs(w if transposed else w.T)
    got = weights.dot(x, q, transposed=not transposed)
    # The terms of offsets cancel those of codes: the bound is that of both.
    assert np.max(np.abs(got - exact) / (bound + 1e-30)) < 1e-5
