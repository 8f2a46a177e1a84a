"""Decoding on a mesh: weights by `mesh.rules`, cache by rows and heads, and the text of one device."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.decoding import loop
from llm_jax.decoding.samplers import Sampler
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from tests.parallel import on_mesh

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]


def texts():
    """(ids on one device, ids on a mesh, the axes of the rows and heads of the cache of layer 0)."""
    config = on_mesh.tiny()
    model = Transformer(dataclasses.replace(config.model, scan_layers=False))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mesh = mesh_lib.make(dataclasses.replace(config.mesh, data=2, fsdp=1, context=1, tensor=2), jax.devices()[:4])
    sharded = jax.device_put(params, mesh_lib.shardings(params, config.mesh.rules, mesh))
    ids = [
        [row.ids for row in loop.generate(model, weights, PROMPTS, Sampler(), max_new_tokens=12)]
        for weights in (params, sharded)
    ]
    settings = loop.draw_settings(model, Sampler(), range(len(PROMPTS)))
    spec = loop.start(model, sharded, settings, PROMPTS, 12).cache.layers["0"]["key"].sharding.spec
    return *ids, tuple(spec)


def test_a_mesh_writes_the_text_of_one_device_with_a_sharded_cache(simulated):
    one, sharded, spec = simulated(8)(texts)
    assert one == sharded and all(len(ids) == 12 for ids in one)
    rows, _, heads, *_ = (*P(*spec), None, None, None)
    assert "data" in rows and heads in ("tensor", ("tensor",))
