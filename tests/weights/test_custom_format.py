"""Number formats of the user's own: `FILE:NAME(OPTIONS)` as a scheme, without a run."""

import contextlib
import dataclasses
import functools
import linecache
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax import configuration, extensions, lora, trees, weights
from llm_jax.errors import UserError
from llm_jax.kernels import custom_format, number_formats
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.quant import finished_layers, post_training, qat
from llm_jax.weights import IN, OUT, Adapted, Encoded, FakeQuant

FORMAT = """
import dataclasses
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Steps:
    step: float = 0.25
    low: int = -100

    def encode(self, w):
        low = jnp.min(w, 0, keepdims=True)
        codes = jnp.round((w - low) / self.step)
        return {"codes": codes.astype(jnp.uint8), "low": low}

    def decode(self, parts):
        return parts["codes"] * self.step + parts["low"]

class Turned(Steps):
    def decode(self, parts): return super().decode(parts).T
class Integers(Steps):
    def decode(self, parts): return parts["codes"]
class Nothing(Steps):
    def decode(self, parts): return None
class Fails(Steps):
    def encode(self, w): raise KeyError("x")
class Branches(Steps):
    def encode(self, w): return {"w": w} if w[0, 0] > 0 else {"w": -w}
class OneArray(Steps):
    def encode(self, w): return w
class Vector(Steps):
    def encode(self, w): return super().encode(w) | {"low": jnp.min(w, 0)}
class Number(Steps):
    def encode(self, w): return super().encode(w) | {"low": 3.0}
class OnlyEncodes:
    def encode(self, w): return w
def function(w): return w
"""
STEPS = "my_steps.py:Steps(step=0.125)"


@pytest.fixture(autouse=True)
def directory(tmp_path, own_cache):
    (tmp_path / "my_steps.py").write_text(FORMAT)
    with contextlib.chdir(tmp_path):
        yield tmp_path


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def expected(w, axis, step=0.125):
    """The formula of the format in numpy."""
    w = np.asarray(w, np.float32)
    low = w.min(0 if axis == IN else 1, keepdims=True)
    return np.round((w - low) / np.float32(step)) * np.float32(step) + low


def refused(function) -> str:
    with pytest.raises(UserError) as error:
        function()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("axis", [IN, OUT])
def test_products_and_rows_are_those_of_the_decoded_weight(axis):
    w, x, y = normal(0, 24, 40), normal(1, 2, 3, 24), normal(2, 5, 40)
    q = weights.quantize(w, STEPS, axis)
    dense = expected(w, axis)
    assert isinstance(q, Encoded) and q.shape == (24, 40) and q.scheme.startswith(f"{STEPS}#")
    np.testing.assert_allclose(q.dense(), dense, rtol=1e-6, atol=1e-6)
    assert q.parts["low"].shape == ((1, 40) if axis == IN else (1, 24))
    np.testing.assert_allclose(weights.dot(x, q), x @ dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weights.dot(y, q, True), y @ dense.T, rtol=1e-4, atol=1e-4)
    rows = weights.take(q, jnp.array([[0, 5], [23, 24]]))
    np.testing.assert_allclose(rows[0], dense[[0, 5]], rtol=1e-6, atol=1e-6)
    assert jnp.isnan(rows[1, 1]).all()
    assert weights.bits_per_weight(q) == 8 + 32 / (24 if axis == IN else 40)
    half = weights.dot(x.astype(jnp.bfloat16), q)
    assert half.dtype == jnp.bfloat16 and np.abs(np.asarray(half, np.float32) - x @ dense).max() < 0.2


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_decoded_weight_and_save_codes_alone(transposed):
    w, x = normal(0, 24, 40), normal(1, 3, 40 if transposed else 24)
    q = weights.quantize(w, STEPS, IN)

    def loss(x, w):
        return jnp.sum(jnp.sin(weights.dot(x, w, transposed)))

    gradient, (codes,) = jax.grad(loss)(x, q), jax.tree.leaves(jax.grad(loss, 1, allow_int=True)(x, q).parts["low"])
    np.testing.assert_allclose(gradient, jax.grad(loss)(x, q.dense()), rtol=1e-4, atol=1e-4)
    assert not codes.any()
    saved = jax.tree.leaves(jax.eval_shape(lambda x, q: jax.vjp(lambda x: loss(x, q), x)[1], x, q))
    assert not any(leaf.shape == (24, 40) and leaf.dtype == jnp.float32 for leaf in saved)


def test_stacked_layers_are_scanned(make, tiny):
    """The logits of a scanned model in the format are those of the model with the decoded weights."""
    model, params = make(scan_layers=True)
    q = post_training.quantize_params(params, post_training.rules(STEPS, STEPS), "test")
    assert any(isinstance(w, Encoded) and len(w.shape) == 3 for w in trees.flatten(q).values())
    dense = trees.map_weights(lambda _, w: weights.dense(w), q)
    tokens = jnp.arange(24).reshape(2, 12)
    apply = jax.jit(lambda p: model.apply({"params": p}, tokens))
    np.testing.assert_allclose(apply(q), apply(dense), rtol=1e-4, atol=1e-4)
    assert np.abs(apply(q) - apply(params)).max() > 1e-3
    unstacked = trees.unstack(q)
    assert trees.describe(trees.restage(unstacked, [(1, tiny.model.num_layers)])).keys() == trees.describe(q).keys()


def test_training_with_rounding_uses_the_format(make, tiny):
    _, params = make()
    config = dataclasses.replace(tiny.quant, qat=dataclasses.replace(tiny.quant.qat, scheme=STEPS), head=STEPS)
    tree = qat.prepare(params, config)
    name, node = next((n, w) for n, w in trees.flatten(tree).items() if isinstance(w, FakeQuant))
    assert node.scheme.startswith(f"{STEPS}#")
    w = trees.flatten(params)[name]
    np.testing.assert_allclose(weights.dense(node), expected(w, node.axis), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda n: jnp.sum(weights.dense(n) * 3))(node)
    np.testing.assert_array_equal(gradient.weight, jnp.full_like(w, 3))  # straight through
    assert isinstance(trees.flatten(post_training.replace_fake_quant(tree))[name], Encoded)
    learned = dataclasses.replace(config, qat=dataclasses.replace(config.qat, learned_step=True))
    assert "has no step to learn" in refused(lambda: qat.prepare(params, learned))


def test_adapters_over_a_base_in_the_format(make, tiny):
    """The product is base plus update; merging encodes again; factors may have the format too."""
    _, params = make(scan_layers=False)
    base = post_training.quantize_base(params, dataclasses.replace(tiny.quant, scheme=STEPS))
    options = {"lora.rank": 2, "lora.factors": "my_steps.py:Steps(step=0.0625)", "lora.targets": ("attention",)}
    config = configuration.replace(tiny, options).lora
    adapters = jax.tree.map(lambda leaf: leaf + 0.3, lora.init(jax.random.key(0), base, config, params))
    attached = lora.attach(base, adapters, factors=config.factors)
    path, weight = next((p, w) for p, w in trees.flatten(attached).items() if isinstance(w, Adapted))
    assert isinstance(weight.base, Encoded) and isinstance(weight.a, FakeQuant)
    x = normal(1, 3, weight.shape[0])
    np.testing.assert_allclose(weights.dot(x, weight), x @ weights.dense(weight), rtol=1e-3, atol=1e-3)
    folded, costs = lora.merge_attached(attached)
    assert isinstance(trees.flatten(folded)[path], Encoded) and costs[path] > 0


def test_a_sharded_weight(simulated, directory):
    products, expected, specs = simulated(2)(sharded, directory)
    for product in products:
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)
    assert specs == [("tensor", None), (None, None), (None, "tensor"), (None, "tensor")]


def sharded(directory):
    """In a process with two devices: products of a weight sharded by rows and by columns, and unsharded."""
    with contextlib.chdir(directory), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(directory / "own_cache"))
        w, x = normal(0, 24, 40), normal(1, 3, 24)
        q = weights.quantize(w, STEPS, IN)
        mesh = mesh_lib.make(mesh_lib.parse("tensor=2", configuration.default("mesh")))
        products, specs = [], []
        for axes in (("tensor", None), (None, "tensor")):
            placed = jax.device_put(q, mesh_lib.shardings({"w": q}, ((".*", axes),), mesh)["w"])
            specs += [tuple(placed.parts[name].sharding.spec) for name in ("codes", "low")]
            gathered = functools.partial(weights.dot, gathered=P(*axes))
            with jax.set_mesh(mesh):
                products += [jax.device_get(jax.jit(dot)(x, placed)) for dot in (weights.dot, gathered)]
        return products, jax.device_get(x @ q.dense()), specs


def test_the_record_of_a_weight_rebuilds_it(tmp_path):
    tree = {"layer": weights.quantize(normal(0, 24, 40), STEPS, IN), "norm": jnp.ones(4)}
    finished_layers.write(tmp_path / "saved", tree, [])
    restored, _ = finished_layers.read(tmp_path / "saved")
    assert trees.describe(restored) == trees.describe(tree)
    np.testing.assert_array_equal(weights.dense(restored["layer"]), tree["layer"].dense())
    assert weights.summary(tree["layer"]).startswith("Encoded(parts=(codes=uint8[24, 40], low=float32[1, 40])")

    record = trees.describe(tree)["layer"]
    without = record | {"static": {"scheme": STEPS, "axis": IN}}
    assert "must record the hash" in refused(lambda: weights.abstract(without))
    custom_format._pinned.cache_clear()  # as in another process
    (tmp_path / "my_steps.py").write_text(FORMAT + "\n")
    assert "my_steps.py has changed since the checkpoint" in refused(lambda: weights.abstract(record))
    (tmp_path / "my_steps.py").unlink()
    message = refused(lambda: weights.abstract(record))
    assert message.startswith(f"scheme={STEPS}: no file or module 'my_steps.py'")


def test_an_edited_file_is_another_format(directory):
    w = normal(0, 24, 40)
    first = weights.quantize(w, STEPS, IN)
    (directory / "my_steps.py").write_text(FORMAT.replace("jnp.round", "jnp.ceil"))
    second = weights.quantize(w, STEPS, IN)
    assert first.scheme != second.scheme and jnp.max(jnp.abs(first.dense() - second.dense())) > 0.05
    np.testing.assert_allclose(first.dense(), expected(w, IN), rtol=1e-6, atol=1e-6)  # the code that encoded it
    recorded = (((".*", first.scheme),),)  # of the base of adapters
    assert "has changed since the checkpoint" in refused(lambda: post_training.plan({"mlp": w}, *recorded, "test"))


CASES = {
    "my_steps.py:Turned": "decode returns float32 of shape (32, 16); expected floats of shape (16, 32) = (inputs, ",
    "my_steps.py:Integers": "decode returns uint8 of shape (16, 32); expected floats of shape (16, 32)",
    "my_steps.py:Nothing": "decode returns NoneType; expected an array",
    "my_steps.py:Fails": "it fails (KeyError: 'x', my_steps.py line",
    "my_steps.py:Branches": "it fails (TracerBoolConversionError: ",
    "my_steps.py:OneArray": "encode returns DynamicJaxprTracer; expected a dict of arrays, with at least one",
    "my_steps.py:Vector": "encode returns 'low' of shape (32,); expected two axes, which may have size 1",
    "my_steps.py:Number": "encode returns float as 'low'; expected names with arrays",
    "my_steps.py:OnlyEncodes": "expected a class with the methods encode(w) and decode(parts); it lacks decode",
    "my_steps.py:function": "expected a class with the methods encode(w) and decode(parts); it lacks encode",
    "my_steps.py:Steps(stp=1.0)": "it has no option 'stp'; its options are step, low",
    "my_steps.py:Steps(step='a')": "option 'step' is 'a'; expected float",
    "my_steps.py:Missing": "my_steps.py defines no 'Missing'",
    "no_such.py:Steps": "no file or module 'no_such.py'",
}


@pytest.mark.parametrize("scheme", CASES)
def test_refused(scheme):
    """Shapes are checked from shapes alone."""
    params = {"mlp": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    message = refused(lambda: post_training.plan(params, ((".*", scheme),), "test"))
    assert message.startswith(f"scheme={scheme}: ") and CASES[scheme] in message


def test_names_of_built_in_schemes_are_no_files():
    assert number_formats.scheme("int4:64").group == 64 and not number_formats.scheme("int8:tensor+a8").custom
    assert number_formats.scheme(STEPS).custom and "FILE:NAME" in refused(lambda: number_formats.scheme("int44"))
    assert "gives no QTensor" in refused(lambda: weights.to_qtensor(jnp.ones((4, 4)), STEPS, IN))
    assert "no weight supports" not in refused(
        lambda: weights.with_activations(weights.quantize(jnp.ones((4, 4)), STEPS, IN), "int8")
    )


def test_a_class_of_a_notebook(monkeypatch):
    """The kernel's `__main__` has no file; the sources of cells are in linecache, by the file name of their code."""
    notebook = types.ModuleType("__main__")

    def run(cell):
        name = f"<cell {hash(cell)}>"
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell, name, "exec"), vars(notebook))
        return weights.quantize(w, "__main__:Steps(step=0.125)", IN)

    w = normal(0, 24, 40)
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    first, second = run(FORMAT), run(FORMAT.replace("jnp.round", "jnp.ceil"))
    assert first.scheme != second.scheme and first.scheme.startswith("__main__:Steps(step=0.125)#")
    assert jnp.max(jnp.abs(first.dense() - second.dense())) > 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers/.*=int4:32+a8", ("layers/.*", "int4:32+a8")),
        ("a=none", ("a", "none")),
        ("a(?=b)c=int4", ("a(?=b)c", "int4")),
        ("a(?=b(c))=f.py:T(x=1)", ("a(?=b(c))", "f.py:T(x=1)")),
        ("a=d/f.py:T(x=0.5, y=(2, 4))", ("a", "d/f.py:T(x=0.5, y=(2, 4))")),
        ("a=f:T(x='b=(c)')", ("a", "f:T(x='b=(c)')")),
        ("a=my formats/f.py:T", ("a", "my formats/f.py:T")),
        ("a(?=b)c=my formats/f, g's.py:T(x='a b=(c)')", ("a(?=b)c", "my formats/f, g's.py:T(x='a b=(c)')")),
        ("=int4", None),
        ("int4", None),
    ],
)
def test_a_rule_is_divided_before_the_options_of_its_value(text, expected):
    assert extensions.split_rule(text) == expected
