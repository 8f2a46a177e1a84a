"""Compiles a decoding step for target devices, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.checkpoints import abstract_params
from llm_jax.checkpoints.checkpoint import with_dtype
from llm_jax.decoding import loop, steps
from llm_jax.decoding.samplers import Sampler
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.quant import post_training
from llm_jax.schema import Config


def compiled(config: Config, devices: list[Any]) -> tuple[Any, Mesh]:
    """Returns the compiled decoding loop and its mesh.

    `train.batch_size` prompts of `train.seq_len` tokens are continued by `eval.max_new_tokens` tokens, with weights in
    `model.precision.compute` or in the formats of `quant.scheme`.

    Raises:
      UserError: see `mesh.make` and `mesh.shardings`.
    """
    mesh = mesh_lib.make(config.mesh, devices)
    model, _ = loop.unrolled(Transformer(with_dtype(config.model, config.model.precision.compute)), {})
    shapes = jax.eval_shape(lambda p: post_training.quantize_base(p, config.quant), abstract_params(model))
    params = _with_shardings(shapes, mesh_lib.shardings(shapes, config.mesh.rules, mesh))
    rows, length = config.train.batch_size, config.train.seq_len
    split = NamedSharding(mesh, mesh_lib.divisible_spec(P(mesh_lib.BATCH), (rows,), mesh))
    prompts = jax.ShapeDtypeStruct((rows, steps.bucket(length)), jnp.int32, sharding=split)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
    capacity = steps.bucket(config.eval.max_new_tokens)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the platform determines the kernels
        settings = jax.eval_shape(lambda: loop.draw_settings(model, Sampler(), range(rows)))
        prefill = loop.prefill_and_draw.of_model(model).lower(capacity, 0, params, settings, prompts, lengths)
        state = _with_shardings(prefill.out_info, prefill.compile().output_shardings)
        until = jax.ShapeDtypeStruct((), jnp.int32)
        return loop.advance.of_model(model).lower(params, settings, state, until).compile(), mesh


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)
