"""Quantization-aware training: `FakeQuant` nodes round the trained weights in every use.

`post_training.replace_fake_quant` (python -m llm_jax.quantize) converts the trained weights to QTensors.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.kernels import number_formats
from llm_jax.quant import methods
from llm_jax.quant.post_training import axis, plan, rules
from llm_jax.schema import QuantConfig
from llm_jax.weights import FakeQuant


def prepare(params: Any, config: QuantConfig) -> Any:
    """Replaces the weights that `quant.qat` selects by FakeQuant nodes. Works under `jit`.

    Learned steps are initialized with the least squared error; see `methods.clip`.

    Raises:
      UserError: see `post_training.plan`; or a scheme that cannot be trained.
    """
    if not config.qat.scheme:
        return params
    source = "quant.qat"
    planned = plan(params, rules(config.qat.scheme, config.head, config.rules), source)

    def prepare_weight(path: str, w: Any) -> Any:
        name = planned[path]
        if not name:
            return w
        s = number_formats.scheme(name)
        if s.activations == "static":
            raise UserError(f"{source}: {name} for '{path}': its activations need calibration; choose w8a8")
        step = None
        if config.qat.learned_step:
            if s.custom or s.offset or not number_formats.FORMATS[s.format].integers:
                raise UserError(f"{source}: {name} for '{path}' has no step to learn; choose int8, int4, int2 or w8a8")
            step, _ = methods.clip(w, s, axis(path), signed=False)
        return FakeQuant(w, step, None, None, name, axis(path))

    return trees.map_weights(prepare_weight, params)


def active_from(params: Any, step: jax.Array, start: int) -> Any:
    """Makes the rounding of `params` active from step `start` on; `step` is the current step, int32 ()."""
    if not start:
        return params

    def delay_node(node: Any) -> Any:
        if not isinstance(node, FakeQuant):
            return node
        return dataclasses.replace(node, active=jnp.broadcast_to(step >= start, node.shape[:-2]))

    return jax.tree.map(delay_node, params, is_leaf=lambda node: isinstance(node, FakeQuant))
