"""Configs of other people's sizes have the published number of parameters, and the families that hold them."""

import dataclasses
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from llm_jax import configuration as config_lib
from llm_jax.checkpoints.families import check_round_trip, hf_config, model_config
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer

# The fields of the published config.json files that determine the geometry.
LLAMA = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
PUBLISHED = {
    "llama2_7b": LLAMA
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "llama3_8b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "llama2_70b": LLAMA
    | {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096},
    "qwen3_32b": {"model_type": "qwen3", "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    | {"vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "head_dim": 128}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rope_theta": 1000000}
    | {"attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 64},
}
SIZES = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama2_70b": 68_976_648_192,
    "qwen3_32b": 32_762_123_264,
}

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "family", "count"),
    [("gpt3", "gpt2", 174_604_259_328), ("llama_7b", "llama", 6_738_415_616)]  # the papers: 175 and 6.7 billion
    + [(name, PUBLISHED[name]["model_type"], size) for name, size in SIZES.items()],
)
def test_a_geometry_has_the_published_size(name, family, count):
    model = config_lib.build(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()).model
    params = jax.eval_shape(Transformer(model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count
    assert hf_config(family, model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_geometry_of_the_published_config(name):
    recipe, (family, published) = config_lib.load(name).model, model_config(PUBLISHED[name])
    models = [dataclasses.replace(m, head_dim=m.head_dim or m.width // m.num_heads) for m in (recipe, published)]
    check_round_trip(family, *models)
    assert recipe.position.max_length == published.position.max_length
    wrong = dataclasses.replace(models[0], norm_eps=1e-3)
    with pytest.raises(UserError, match=r"norm_eps"):
        check_round_trip(family, wrong, models[1])
