"""Steps on a simulated mesh beside steps on one device, for a process with 4 devices (`simulated`)."""

import dataclasses
import runpy

import jax
import jax.numpy as jnp

from llm_jax import configuration as config_lib
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import losses, optim, step

STEPS = 3


def compare(optimizer: str, loss: str) -> tuple[list[float], list[float], float]:
    """Returns the losses on one device, those on a mesh, and the share of the optimizer's state that is split."""
    config = config_lib.build(runpy.run_path("tests/tiny.py")["get_config"]())
    model = Transformer(dataclasses.replace(config.model, vocab_size=256, num_layers=1))
    start, other = (jax.jit(model.init)(jax.random.key(i), jnp.zeros((1, 1), jnp.int32))["params"] for i in (0, 1))
    rule = dataclasses.replace(config.optim, kind=optimizer)
    return _compare(config, rule, dataclasses.replace(config.loss, kind=loss), model, start, other)


def _compare(config, rule, loss, model, params, other):
    """One device: whole rows in one batch, no average. The mesh: chunks, micro-batches and an average."""
    mesh = mesh_lib.make(dataclasses.replace(config.mesh, data=1, fsdp=2, tensor=2))
    copies, placed = mesh_lib.replicated(mesh), mesh_lib.shardings(params, config.mesh.rules, mesh)
    optimizer = optim.make(rule, 8, params)
    reference = model if loss.kind in ("distillation", "dpo") else None
    rate, together = optim.schedule(rule, 8), losses.rows_together(loss)
    one = step.make(losses.make(loss, model, 0, reference), optimizer, rate, 0, 1)
    parts = losses.make(loss, model, 8, reference)
    in_parts = step.make(parts, optimizer, rate, 0, 2, ema_decay=0.9, rows_together=together)
    state = step.init(optimizer, params, ema=True)
    state_shardings = step.TrainState(copies, placed, optim.shardings(state.opt_state, params, placed, copies), placed)
    on_mesh = jax.jit(
        mesh_lib.with_mesh(mesh, in_parts),
        in_shardings=(state_shardings, {"reference": placed}, mesh_lib.batch_sharding(mesh, 8)),
        out_shardings=(state_shardings, copies),
    )
    tokens = jax.random.randint(jax.random.key(5), (8, 17), 0, 256)
    ones = jnp.ones((8, 16), jnp.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segments": ones, "mask": ones}
    batch["positions"] = jnp.cumsum(ones, 1) - 1
    runs = []
    # The mesh's state is put on it first: a second step of a state that was elsewhere would compile again.
    alone = step.init(optimizer, params)
    for function, now in ((jax.jit(one), alone), (on_mesh, jax.device_put(state, state_shardings))):
        seen = []
        for _ in range(STEPS):
            now, metrics = function(now, {"reference": other}, batch)
            seen.append(float(metrics["loss"]))
        runs.append(seen)
    leaves = jax.tree.leaves(now.opt_state)
    split = sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    return *runs, split / sum(leaf.size for leaf in leaves)
