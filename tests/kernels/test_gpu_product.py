"""The kernel for GPUs, interpreted on a CPU, beside the reference, and translated for CUDA as far as Triton."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import weights
from llm_jax.kernels import gpu_product, number_formats
from llm_jax.weights import IN, OUT
from tests.kernels.test_tpu_product import to_qtensor, tolerance, xla_product

FLOAT = jnp.dtype("float32")
SCHEMES = ("int8", "int8:64", "int8_affine", "int4", "int4:channel", "int4_affine", "int2:64", "nf4", "mxfp4")

H100 = jax.sharding.AbstractMesh(
    (1,),
    ("data",),
    (jax.sharding.AxisType.Auto,),
    abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
)


def setup(scheme, axis, contracted, rows=3, inputs=256, outputs=192):
    shape = (inputs, outputs) if axis == IN else (outputs, inputs)
    q = to_qtensor(jax.random.normal(jax.random.key(0), shape), scheme, axis)
    return jax.random.normal(jax.random.key(1), (rows, shape[contracted]), jnp.bfloat16), q


def check(scheme, axis, contracted, rows=3):
    x, q = setup(scheme, axis, contracted, rows)
    s, codes = number_formats.scheme(scheme), q._stored()
    assert gpu_product.unsupported_reason(x, codes, s, axis, contracted, FLOAT) == ""
    y = jax.jit(lambda x, codes: gpu_product.product(x, codes, s, axis, contracted, interpret=True))(x, codes)
    expected = np.asarray(xla_product(x, codes, s, axis, contracted, FLOAT))
    assert y.shape == expected.shape and (np.abs(y - expected) <= tolerance(x, q, contracted)).all()


@pytest.mark.parametrize(("scheme", "axis", "contracted"), [("nf4", IN, 0), ("int4_affine", IN, 1)])
def test_products_equal_the_reference(scheme, axis, contracted):
    check(scheme, axis, contracted)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [IN, OUT])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_and_orientation_equals_the_reference(scheme, axis):
    for contracted in (0, 1):
        check(scheme, axis, contracted)
    check(scheme, axis, 0, rows=33)


@pytest.mark.parametrize(("scheme", "contracted"), [("nf4", 0), ("mxfp4", 1)])
def test_the_kernel_is_translated_for_cuda(scheme, contracted):
    x, q = setup(scheme, IN, contracted)
    s = number_formats.scheme(scheme)
    product = jax.jit(lambda x, codes: gpu_product.product(x, codes, s, IN, contracted))
    with jax.sharding.use_abstract_mesh(H100):  # from JAX 0.12 on, Triton's lowering reads the kind of the device
        text = product.trace(x, q._stored()).lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text or "triton_kernel_call" in text


@pytest.mark.parametrize(
    ("scheme", "rows", "dtype", "outputs", "reason"),
    [
        ("int4", 65, "bfloat16", 64, "65 rows of activations; the kernel takes 1 to 64"),
        ("int4", 1, "float32", 64, "float32 activations with float32 sums"),
        ("fp8_e5m2", 1, "bfloat16", 64, "the format e5m2 has no kernel"),
        ("int4", 1, "bfloat16", 40, "groups of 32 in codes of the shape (64, 40) have no tiles of 16"),
    ],
)
def test_what_the_kernel_does_not_serve_has_a_reason(scheme, rows, dtype, outputs, reason):
    q = jax.eval_shape(lambda: weights.to_qtensor(jnp.zeros((128, outputs)), scheme, IN))
    x, s = jax.ShapeDtypeStruct((rows, 128), dtype), number_formats.scheme(scheme)
    assert gpu_product.unsupported_reason(x, q._stored(), s, IN, 0, FLOAT).startswith(reason)
