"""Quantized weights in tiles: everything but their arrays is that of the weights in rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import checkpoints, trees, weights
from llm_jax.checkpoints.checkpoint import on_default_device
from llm_jax.kernels import tiles
from llm_jax.quant import post_training
from llm_jax.tokenizers.byte import ByteTokenizer
from llm_jax.weights import IN, OUT, QTensor, TiledQTensor, quantized, tiled

pytestmark = pytest.mark.usefixtures("compiled_kernels")
SCHEMES = ("int8", "int8:tensor", "int8_affine", "int4", "int4_affine", "int4+a8", "int2", "nf4", "nf4+a8", "mxfp4")


@pytest.fixture(autouse=True)
def readable(monkeypatch):
    """Kernels of every CPU read tiles, those of other instruction sets through a copy."""
    monkeypatch.setattr(tiles, "unusable_reason", lambda: "")


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def pair(scheme: str, axis: int = IN) -> tuple[QTensor, TiledQTensor]:
    q = quantized.to_qtensor(normal(0, *((192, 48) if axis == IN else (48, 192))), scheme, axis)
    tiled = weights.lay_out({"w": q})["w"]
    assert type(tiled) is TiledQTensor
    assert tiled.codes.shape[-2:] == (16, 4)
    return q, tiled


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(("scheme", "axis"), [(s, a) for s in SCHEMES for a in (IN, OUT) if (s[:3], a) != ("nf4", OUT)])
def test_products_and_gradients_equal_those_of_rows(scheme, axis, rows):
    """Those of one row bit for bit along IN; XLA may sum in another order after the kernel has expanded a weight."""
    q, tiled = pair(scheme, axis)
    x, g = normal(1, rows, 192), normal(2, rows, 48)
    transposed = axis == OUT

    @jax.jit
    def both(x, q):
        y, pull = jax.vjp(lambda x: weights.dot(x, q, transposed), x)
        return y, pull(g)[0], weights.dot(g, q, not transposed)

    w = np.abs(np.asarray(q.dense(), np.float64))
    w = w.T if transposed else w
    sizes = np.abs(x) @ w, np.abs(g) @ w.T, np.abs(g) @ w.T  # sums of the magnitudes of the terms
    for tiled_result, result, size in zip(both(x, tiled), both(x, q), sizes, strict=True):
        if not scheme.endswith("+a8"):
            assert (np.abs(tiled_result - result) / size).max() < 4e-7
        else:
            np.testing.assert_allclose(tiled_result, result, rtol=1e-5, atol=1e-5)
    if rows == 1 and axis == IN:
        np.testing.assert_array_equal(both(x, tiled)[0], both(x, q)[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_weight_is_rounded_to_the_dtype_of_the_activations(dtype):
    q, tiled = pair("int4")
    x = normal(1, 20, 192).astype(dtype)
    for rows in (1, 20):
        expected = weights.dot(x[:rows], q, out_dtype=jnp.float32)
        np.testing.assert_allclose(weights.dot(x[:rows], tiled, out_dtype=jnp.float32), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize(("scheme", "axis"), [(s, a) for s in SCHEMES for a in (IN, OUT) if (s[:3], a) != ("nf4", OUT)])
def test_the_numbers_are_those_of_rows(scheme, axis):
    q, tiled = pair(scheme, axis)
    assert tiled.shape == q.shape
    assert weights.num_bytes(tiled) == weights.num_bytes(q)
    np.testing.assert_array_equal(weights.dense(tiled), weights.dense(q))
    ids = jnp.array([[0, 5, -1], [47, q.shape[0], 17]])
    np.testing.assert_array_equal(weights.take(tiled, ids), weights.take(q, ids))
    again = weights.in_rows({"w": tiled})["w"]
    assert type(again) is QTensor
    jax.tree.map(np.testing.assert_array_equal, again, q)


def test_weights_in_tiles_and_in_rows_share_no_call():
    q, tiled = pair("int4")
    x = normal(1, 1, 192)
    for ws in ([tiled, tiled], [q, tiled], [tiled, q]):
        for y in jax.jit(lambda x, ws: weights.dots(x, ws, accumulate=jnp.float32, gathered=[None] * 2))(x, ws):
            np.testing.assert_array_equal(y, weights.dot(x, q))


def test_what_no_kernel_reads_in_tiles_stays_as_it_is(monkeypatch):
    w = normal(0, 192, 48)
    params = {
        "table": quantized.to_qtensor(normal(0, 48, 192), "nf4", OUT),
        "integers": quantized.to_qtensor(w, "w8a8", IN),
        "stacked": jax.vmap(lambda w: quantized.to_qtensor(w, "int4", IN))(jnp.stack([w, w])),
        "narrow": quantized.to_qtensor(w[:, :40], "int4", IN),
        "float8": quantized.to_qtensor(w, "fp8_e4m3", IN),
        "dense": w,
    }
    same = weights.lay_out(params)
    assert all(same[name] is params[name] for name in params)
    params["w"] = quantized.to_qtensor(w, "int4", IN)
    laid_out = weights.lay_out(params)
    assert [name for name in params if type(laid_out[name]) is TiledQTensor] == ["w"]
    monkeypatch.setattr(tiles, "unusable_reason", lambda: "XLA computes everything")
    assert weights.lay_out(params) is params


def test_the_base_of_adapters_is_laid_out():
    q, _ = pair("nf4")
    a, b = normal(3, 192, 4), normal(4, 4, 48)
    adapted = weights.Adapted(q, a, b, jnp.float32(1))
    laid_out = weights.lay_out({"w": adapted})["w"]
    assert type(laid_out.base) is TiledQTensor
    x = normal(5, 1, 192)
    np.testing.assert_allclose(weights.dot(x, laid_out), weights.dot(x, adapted), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_loaded_in_tiles_and_saved_in_rows(make, tmp_path):
    model, params = make(width=64, mlp_dim=128, scan_layers=False)
    params = post_training.quantize_params(params, post_training.rules("int4", "int8"), "weights")
    llm_jax.save(model, params, ByteTokenizer(), tmp_path / "rows")
    loaded = llm_jax.load(tmp_path / "rows")
    kinds = {type(w) for w in jax.tree.leaves(loaded.params, is_leaf=weights.is_quantized)}
    assert TiledQTensor in kinds
    llm_jax.save(loaded, tmp_path / "again")
    saved = checkpoints.open(tmp_path / "again").params(loaded.model.config, on_default_device)
    assert jax.tree.structure(saved) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, saved, params)


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_stacked_layers_are_those_of_rows(scheme):
    q, tiled_weight = pair(scheme)
    layers, stacked = (trees.restage({"layers": {"0": {"w": w}, "1": {"w": w}}}, ((1, 2),)) for w in (q, tiled_weight))
    (expected,), (weight,) = trees.flatten(layers).values(), trees.flatten(stacked).values()
    assert type(weight) is TiledQTensor
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weights.dense(weight), weights.dense(expected))
    jax.tree.map(np.testing.assert_array_equal, weights.in_rows(stacked), layers)


def test_loading_holds_one_weight_at_a_time_in_both_layouts(make, tmp_path, monkeypatch):
    model, params = make(width=64, mlp_dim=128, scan_layers=False)
    params = post_training.quantize_params(params, post_training.rules("int4", "int8"), "weights")
    llm_jax.save(model, params, ByteTokenizer(), tmp_path / "run")
    live, convert = [], tiled._tiled

    def measured(q):
        converted = jax.block_until_ready(convert(q))
        live.append(sum(a.nbytes for a in jax.live_arrays()))
        return converted

    monkeypatch.setattr(tiled, "_tiled", measured)
    before = sum(a.nbytes for a in jax.live_arrays())
    loaded = llm_jax.load(tmp_path / "run")
    assert len(live) > 4
    largest = max(weights.num_bytes(w) for w in jax.tree.leaves(params, is_leaf=weights.is_quantized))
    assert max(live) <= before + weights.num_bytes(loaded.params) + largest
