"""Decoding with a full cache, by position scheme. Training steps of a scheme are those of `training.llm_jax`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks import training
from experiments.benchmarks.worker import Job, timed

_STEPS = 64  # decoded tokens of a turn


def steps(changes: Mapping[str, Any], length: int) -> Job:
    """A training step on one row of `length` tokens, and decoding the last tokens of a full cache."""
    train, decode = training.llm_jax("default", changes, 1, length), decoding(changes, length)

    def turn(number: int) -> dict[str, float]:
        return {"training step, ms": 1e3 * train.turn(number)["seconds"], **decode.turn(number)}

    return Job(turn, train.software)


def decoding(changes: Mapping[str, Any], length: int) -> Job:
    """The last `_STEPS` tokens of a cache of `length` tokens, of a random model."""
    import jax
    import jax.numpy as jnp

    from llm_jax import configuration
    from llm_jax.model.attention import TokenMetadata
    from llm_jax.model.transformer import Transformer, init_cache

    config = configuration.load("default", changes).model
    model = Transformer(dataclasses.replace(config, scan_layers=False))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    empty = init_cache(model.config, 1, length)
    slots = jnp.arange(length)[None]
    full = dataclasses.replace(
        empty,
        tokens=TokenMetadata(slots, (slots < length - _STEPS).astype(jnp.int32)),
        index=jnp.int32(length - _STEPS),
    )

    @jax.jit
    def decode(params: Any, cache: Any) -> jax.Array:
        def body(i: int, carry: Any) -> Any:
            cache, ids = carry
            tokens = TokenMetadata(cache.index[None, None], jnp.ones((1, 1), jnp.int32))
            logits, cache = model.apply({"params": params}, ids, tokens, cache)
            return cache, jnp.argmax(logits, -1).astype(jnp.int32)

        return jax.lax.fori_loop(0, _STEPS, body, (cache, jnp.zeros((1, 1), jnp.int32)))[1]

    def turn(number: int) -> dict[str, float]:
        # The addresses of weights are worth a factor of up to two: other ones in every turn.
        copies = jax.block_until_ready(jax.tree.map(jnp.copy, params))
        return {"decoded token, ms": 1e3 * timed(lambda: decode(copies, full))[0] / _STEPS}

    return Job(turn, f"jax {jax.__version__}")
