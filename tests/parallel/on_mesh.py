"""What tests run in the process that has eight simulated devices, see the fixture `simulated`."""

import dataclasses
import functools
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import configuration, weights
from llm_jax.parallel import hlo
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training.setup import setup
from tests import compilation

TRIPS = 5


def tiny(**changes: Any) -> Any:
    """The configuration of tests/tiny.py with the byte tokenizer's vocabulary and other values by dotted key."""
    mapping = runpy.run_path("tests/tiny.py")["get_config"]()
    return configuration.replace(configuration.build(mapping), {"model.vocab_size": 264, **changes})


@functools.cache
def compiled_step(sizes: tuple[tuple[str, int], ...], options: tuple[tuple[str, Any], ...] = ()) -> Any:
    """(setup, executable) of the tiny model's training step on a mesh."""
    parts = setup(tiny(**{f"mesh.{axis}": size for axis, size in sizes}, **dict(options)))
    state, limit = parts.state.replace(frozen={}), jax.ShapeDtypeStruct((), "float32")
    lowered = parts.train_step.lower(state, parts.state.frozen, parts.batch, limit)
    return parts, compilation.with_optimized_hlo(lowered)


def step_collectives(sizes: tuple[tuple[str, int], ...], options: tuple[tuple[str, Any], ...] = ()) -> list[str]:
    """The collectives of the training step, a line each."""
    parts, executable = compiled_step(sizes, options)
    rows = hlo.collectives(hlo.parse(executable.as_text()), dict(parts.mesh.shape))
    return [f"{row.kind} {row.axes} {row.count} {row.bytes}" for row in rows]


def counts() -> dict[str, Any]:
    """What `hlo` reads from programs with known collectives and FLOPs."""
    mesh = mesh_lib.make(dataclasses.replace(tiny().mesh, data=2, fsdp=2, tensor=2))

    def read(function, *arguments, out=()):
        specs = [NamedSharding(mesh, spec) for spec, _ in arguments]
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for _, shape in arguments]
        jitted = jax.jit(function, in_shardings=specs, out_shardings=NamedSharding(mesh, P(*out)))
        module = hlo.parse(jitted.lower(*shapes).compile().as_text())
        rows = [dataclasses.astuple(row) for row in hlo.collectives(module, dict(mesh.shape))]
        return rows, hlo.flops(module)

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=TRIPS)[0]

    def shift(x):
        pairs = [(0, 1), (1, 0)]
        body = functools.partial(jax.lax.ppermute, axis_name="tensor", perm=pairs)
        return jax.shard_map(body, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"))(x)

    return {
        "gather": read(lambda x: x * 2, (P("fsdp"), (16, 8))),
        "reduce": read(lambda x, w: x @ w, (P(None, ("data", "tensor")), (16, 32)), (P(("data", "tensor")), (32, 8))),
        "loop": read(loop, (P(("data", "fsdp")), (16, 32)), (P(None, None), (32, 32)), out=(("data", "fsdp"),)),
        "loop of products with sums": read(loop, (P(None, "tensor"), (16, 32)), (P("tensor", None), (32, 32))),
        "permute": read(shift, (P("tensor"), (16, 8)), out=("tensor",)),
    }


def losses_and_gradients(sizes: tuple[tuple[str, int], ...], options: tuple[tuple[str, Any], ...]) -> Any:
    """(loss, norms of the gradients) of a packed batch after one step on a mesh; () is one device."""
    config = tiny(**{f"mesh.{axis}": size for axis, size in sizes}, **dict(options))
    devices = jax.devices() if sizes else jax.devices()[:1]
    parts = setup(config, devices=devices)
    rows, length = config.train.batch_size, config.train.seq_len
    random = np.random.default_rng(0)
    ids = random.integers(0, 256, (rows, length + 1), np.int32)
    segments = np.sort(random.integers(1, 4, (rows, length)), 1).astype(np.int32)
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": segments,
        "positions": (np.arange(length) - starts).astype(np.int32),
        "mask": (random.random((rows, length)) < 0.8).astype(np.int32),
    }
    base = parts.load_base()
    _, metrics = parts.step(parts.init(base), jax.device_put(batch, parts.batch_sharding))
    return float(metrics["loss"]), np.asarray(metrics["gradient_norms"]).tolist()


def check_quantized_weights(path: pathlib.Path) -> None:
    """Splits quantized weights over a mesh, multiplies with them, and writes and restores them."""
    mesh = mesh_lib.make(dataclasses.replace(tiny().mesh, data=2, fsdp=2, tensor=2))
    w, x = jax.random.normal(jax.random.key(0), (256, 512)), jax.random.normal(jax.random.key(1), (4, 256))
    names = ("int8", "int4", "int4_affine:64", "nf4", "mxfp4", "w8a8")
    tree = {name: weights.to_qtensor(w, name, weights.IN) for name in names}
    split = jax.device_put(tree, mesh_lib.shardings(tree, ((".*", ("fsdp", "tensor")),), mesh))
    for name in names:
        q = split[name]
        assert q.codes.sharding.spec == P("fsdp", "tensor"), name
        assert q.codes.addressable_shards[0].data.size == q.codes.size // 4
        scale = q.scale.codes if name == "nf4" else q.scale
        assert scale.addressable_shards[0].data.size == scale.size // (2 if scale.shape[0] == 1 else 4), name
        dot = jax.jit(mesh_lib.with_mesh(mesh, weights.dot)).lower(x, q).compile()
        np.testing.assert_allclose(dot(x, q), jax.jit(weights.dot)(x, tree[name]), rtol=2e-4, atol=2e-4)
        text = dot.as_text()
        assert "all-gather" not in text or "s8[256,512]" not in text
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        orbax.save(path, split)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
        wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), tree)
        again = orbax.restore(path, wanted)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
