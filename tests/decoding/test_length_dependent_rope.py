"""Scalings of RoPE that depend on the length: cached decoding equals the uncached text past the trained length."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from llm_jax.decoding import loop, speculative
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.model.attention import TokenMetadata

TRAINED, NEW = 10, 16
SCALINGS = {
    "dynamic": {"scaling_factor": 4.0},
    "longrope": {
        "scaling_factor": 4.0,
        "short_factors": (1.0, 1.0, 1.0, 1.0),
        "long_factors": (1.0, 2.0, 4.0, 8.0),
    },
}
PROMPTS = [[5, 200, 31], [7, 8, 9, 10, 11, 12, 13], list(range(20, 34))]  # short, at the trained length soon, past it


@pytest.fixture(params=SCALINGS)
def model_and_params(request, make, tiny):
    position = dataclasses.replace(
        tiny.model.position, scaling=request.param, original_length=TRAINED, **SCALINGS[request.param]
    )
    model, params = make(position=position, scan_layers=False)
    # Sharper attention, so that the greedy text depends on the positions.
    scale = lambda path, w: w * 4 if "query" in str(path) else w  # noqa: E731
    return model, jax.tree_util.tree_map_with_path(scale, params)


def test_cached_greedy_text_is_the_uncached_one(model_and_params):
    model, params = model_and_params
    made = loop.generate(model, params, PROMPTS, DecodingOptions(temperature=0).sampler(), max_new_tokens=NEW)
    counts = jnp.arange(32)[None]

    @jax.jit
    def logits_after(ids, length):  # of one row, padded
        return model.apply({"params": params}, ids, TokenMetadata(counts, (counts < length).astype(int)))[0, length - 1]

    for prompt, row in zip(PROMPTS, made, strict=True):
        ids = list(prompt)
        for step, token in enumerate(row.ids):
            logits = logits_after(jnp.asarray([ids + [0] * (32 - len(ids))]), len(ids))
            log_probability = jax.nn.log_softmax(logits)[token]
            assert int(jnp.argmax(logits)) == token
            assert abs(float(log_probability) - row.log_probabilities[step]) < 1e-4
            ids.append(token)


@pytest.mark.parametrize("model_and_params", ["dynamic"], indirect=True)
def test_drafts_are_refused_where_they_would_change_the_text(model_and_params):
    model, params = model_and_params
    sampler = DecodingOptions(temperature=0).sampler()
    short = speculative.generate(model, params, [[5, 6]], sampler, None, 2, max_new_tokens=6)
    assert short[0].ids == loop.generate(model, params, [[5, 6]], sampler, max_new_tokens=6)[0].ids
    with pytest.raises(UserError, match="--draft cannot be used beyond model.position.original_length=10"):
        speculative.generate(model, params, [[5, 6]], sampler, None, 2, max_new_tokens=7)
