"""The kernel for TPUs, interpreted on a CPU, beside the reference, and the choice of its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llm_jax import weights
from llm_jax.kernels import matmul, number_formats, target, tpu_product
from llm_jax.weights import IN, OUT

FLOAT = jnp.dtype("float32")
_LAST_BITS = np.float32(2**-22)
# Rows, contracted, free; of a transposed product, a strip of the free axis holds eight groups or all of them.
ODD = {0: [(3, 256, 384), (40, 256, 128), (300, 128, 640)], 1: [(3, 256, 256), (40, 256, 128), (300, 128, 1024)]}
SCHEMES = ("int8", "int8:64", "int8_affine", "int4", "int4:128", "int4_affine", "int2", "nf4", "nf4:128", "mxfp4")


# Compiled as wholes: one operation at a time, each is compiled alone.
to_qtensor = jax.jit(weights.to_qtensor, static_argnums=(1, 2))
xla_product = jax.jit(matmul.xla_product, static_argnums=(2, 3, 4, 5))
dense = jax.jit(weights.dense)


def operands(scheme, rows, inputs, outputs, contracted, axis=IN):
    """(x, a quantized weight) of a product; float16 and double scales are those that checkpoints have."""
    shape = (inputs, outputs) if contracted == 0 else (outputs, inputs)
    w = jax.random.normal(jax.random.key(0), shape)
    return jax.random.normal(jax.random.key(1), (rows, inputs), jnp.bfloat16), to_qtensor(w, scheme, axis)


def tolerance(x, q, contracted):
    """The bound of a product's error: of float32 sums, and of weights that differ in the last bits of float32, as with
    a fused multiplication and addition, and therefore round to another bfloat16."""
    w = np.asarray(dense(q)) if contracted == 0 else np.asarray(dense(q)).T
    bits = _LAST_BITS * np.abs(w).max()
    low, high = ((w + side).astype(jnp.bfloat16).astype(np.float32) for side in (-bits, bits))
    return np.abs(np.asarray(x, np.float32)) @ (1e-6 * np.abs(w) + (high - low))


def check(scheme, rows, inputs, outputs, contracted, axis=IN, interpret=True):
    x, q = operands(scheme, rows, inputs, outputs, contracted, axis)
    s, codes = number_formats.scheme(scheme), q._stored()
    assert tpu_product.unsupported_reason(x, codes, s, axis, contracted, FLOAT) == ""
    y = jax.jit(lambda x, codes: tpu_product.product(x, codes, s, axis, contracted, interpret=interpret))(x, codes)
    expected = np.asarray(xla_product(x, codes, s, axis, contracted, FLOAT))
    assert y.shape == expected.shape and (np.abs(y - expected) <= tolerance(x, q, contracted)).all()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks with which small products have several of each."""
    monkeypatch.setattr(tpu_product, "_ROWS", 16)
    monkeypatch.setattr(tpu_product, "_CHUNK", 128)
    monkeypatch.setattr(tpu_product, "_STRIPS", (256, 128))


@pytest.mark.parametrize(("scheme", "contracted"), [("nf4", 0), ("int4_affine", 1)])
def test_products_over_several_blocks_equal_the_reference(small_blocks, scheme, contracted):
    x, q = operands(scheme, 40, 256, 640 if contracted else 384, contracted)
    b = tpu_product.blocks(x, q._stored(), number_formats.scheme(scheme), IN, contracted)
    assert (b.rows, b.steps, b.chunks) == (16, 3, 2)
    check(scheme, 40, 256, 640 if contracted else 384, contracted)


@pytest.mark.slow
@pytest.mark.parametrize("contracted", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_equals_the_reference(monkeypatch, scheme, contracted):
    for shape in ODD[contracted]:
        check(scheme, *shape, contracted)
    monkeypatch.setattr(tpu_product, "_ROWS", 16)
    monkeypatch.setattr(tpu_product, "_CHUNK", 128)
    for shape in ODD[contracted][:2]:
        check(scheme, *shape, contracted)


@pytest.mark.slow
def test_weights_of_which_no_side_is_a_multiple_of_a_register():
    for contracted in (0, 1):
        check("int4", 5, *((192, 576) if contracted else (576, 192)), contracted)
        check("int8", 5, 96, 200, contracted)


@pytest.mark.slow
@pytest.mark.parametrize("contracted", [0, 1])
def test_blocks_do_not_race(small_blocks, contracted):
    check(("nf4", "int4")[contracted], 20, 256, 512, contracted, interpret=pltpu.InterpretParams(detect_races=True))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(("axis", "small"), [(IN, True), pytest.param(OUT, False, marks=pytest.mark.slow)])
def test_products_of_integers_are_those_of_xla(axis, small, request):
    if small:
        request.getfixturevalue("small_blocks")
    x, q = operands("w8a8", 20, 256, 384, axis + 2, axis)
    x8, x_scale = matmul.quantize_rows(x)
    assert tpu_product.unsupported_integer_reason(x8, q.codes, axis) == ""
    y = tpu_product.integer_product(x8, x_scale, q.codes, q.scale, axis, interpret=True)
    total = np.asarray(x8, np.int32) @ np.asarray(q.codes if axis == IN else q.codes.T, np.int32)
    assert (y == total.astype(np.float32) * x_scale * q.scale.reshape(-1)).all()


def test_scales_are_decoded_as_the_reference_does():
    halves = np.arange(2**16, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    finite = np.isfinite(values)
    decoded = np.asarray(tpu_product._float(jnp.asarray(halves.view(np.int16)), jnp.float16))
    assert (decoded == values)[finite].all()
    table = np.asarray(number_formats.FORMATS["dynamic8"].values, np.float32)
    np.testing.assert_allclose(tpu_product._dynamic(jnp.arange(256)), table, rtol=3e-7)


@pytest.mark.parametrize(
    ("scheme", "rows", "inputs", "outputs", "axis", "dtype", "reason"),
    [
        ("int4", 1, 256, 256, IN, "float32", "float32 activations with float32 sums"),
        ("fp8_e4m3", 1, 256, 256, IN, "bfloat16", "the format e4m3 has no kernel"),
        ("int4", 1, 256, 256, OUT, "bfloat16", "the groups lie along the last axis"),
        ("int4:8", 1, 256, 256, IN, "bfloat16", "groups of 8 do not fill the rows of a register"),
        ("int8", 1, 2048 + 8, 256, IN, "bfloat16", "no blocks of it fit registers and VMEM"),
    ],
)
def test_what_the_kernel_does_not_serve_has_a_reason(scheme, rows, inputs, outputs, axis, dtype, reason):
    s = number_formats.scheme(scheme)
    q = jax.eval_shape(lambda: weights.to_qtensor(jnp.zeros((inputs, outputs)), scheme, axis))
    x = jax.ShapeDtypeStruct((rows, inputs), dtype)
    assert tpu_product.unsupported_reason(x, q._stored(), s, axis, 0, FLOAT).startswith(reason)


def test_a_v4_has_no_products_of_integers(monkeypatch):
    monkeypatch.setattr(target, "device_kind", lambda: "TPU v4")
    x, codes = jax.ShapeDtypeStruct((4, 256), "int8"), jax.ShapeDtypeStruct((256, 256), "int8")
    assert tpu_product.unsupported_integer_reason(x, codes, IN) == "a TPU v4 has no products of integers"
