"""Attention layers, each with its positions, equal those of transformers (make_layer_golden.py)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.model import positions
from llm_jax.model.attention import Attention
from llm_jax.model.transformer import Transformer, consecutive
from tests.model import layer_cases as cases

pytestmark = pytest.mark.optimized

GOLDEN = np.load(pathlib.Path(__file__).with_name("layer_golden.npz"))


def configured(tiny, changes, position):
    common = {"width": cases.WIDTH, "num_heads": cases.HEADS, "num_kv_heads": cases.HEADS, "qk_norm": False}
    position = dataclasses.replace(tiny.model.position, **position)
    return dataclasses.replace(tiny.model, **(common | changes), position=position)


@pytest.mark.parametrize("name", cases.CASES)
def test_attention_layers_equal_those_of_transformers(tiny, name):
    config = configured(tiny, *cases.CASES[name])
    weights, table, x = cases.layer(name)
    where = consecutive(jnp.zeros(x.shape[:2], int))

    @jax.jit
    def ours(weights, x):
        bias = positions.make(config).bias(where.positions, where.positions, {"bias": table})
        return Attention(config).apply({"params": weights}, x, where, where, bias, None, None)[0]

    np.testing.assert_allclose(ours(weights, x), GOLDEN[name], atol=1e-5, rtol=1e-5)


def test_a_learned_table_equals_gpt2(tiny):
    changes, position = cases.GPT2
    weights, ids = cases.gpt2()
    shape = {"vocab_size": cases.GPT2_VOCAB, "num_layers": 1, "scan_layers": False}
    config = configured(tiny, changes | shape, position | {"max_length": cases.LENGTH})
    layer = {name: weights[name] for name in ("attention", "mlp", "attention_norm", "mlp_norm")}
    params = {"embed": weights["embed"], "final_norm": weights["final_norm"], "layers": {"0": layer}}
    got = jax.jit(lambda p: Transformer(config).apply({"params": p}, jnp.asarray(ids)))(params)
    np.testing.assert_allclose(got, GOLDEN["gpt2"], atol=1e-5, rtol=1e-5)
