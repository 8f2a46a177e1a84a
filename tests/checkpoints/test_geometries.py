"""Configs of other people's sizes have the published number of parameters, and the families that hold them."""

import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from llm_jax import configuration as config_lib
from llm_jax.checkpoints.families import hf_config
from llm_jax.model.transformer import Transformer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "family", "count"),
    [("gpt3", "gpt2", 174_604_259_328), ("llama_7b", "llama", 6_738_415_616)],  # the papers: 175 and 6.7 billion
)
def test_a_geometry_has_the_published_size(name, family, count):
    model = config_lib.build(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()).model
    params = jax.eval_shape(Transformer(model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
    assert hf_config(family, model)
