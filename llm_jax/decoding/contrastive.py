"""Contrastive search (Su et al. 2022, arXiv:2202.06417): likely tokens that are unlike what was said.

Of the k likeliest tokens it takes the one with the largest (1 - alpha) p(token) - alpha max_j cos(h, h_j),
equation 5, where h is the feature vector that the token would have and h_j those of all tokens before.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import weights
from llm_jax.decoding import loop
from llm_jax.decoding.loop import Decoding, Generated, Rules, Stop
from llm_jax.decoding.samplers import Sampler, argmax
from llm_jax.model.attention import KVCache, Tokens
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, P padded prompt, S slots, K candidates, D width, V vocabulary.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """`said` float32 (B, S, D) holds the feature vectors of the tokens so far, of length 1."""

    decoding: Decoding
    said: jax.Array


def search(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    k: int,
    alpha: float,
    max_new_tokens: int,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    stop: Stop | None = None,
    watch: Callable[[list[Generated]], None] | None = None,
) -> list[Generated]:
    """Continues every prompt; the arguments and errors are those of `loop.generate`.

    Args:
      sampler: its filters (penalties) come before the choice of the k candidates.
    """
    model, params = loop.unrolled(model, params)
    loop.check(model, prompts, max_new_tokens, [0] * len(prompts))
    rules = loop.make_rules(model, sampler, [0] * len(prompts), eos, vocab_size)
    prompts_BP, lengths = loop.padded(prompts)
    state = _start(model, loop.bucket(max_new_tokens), params, prompts_BP, lengths)

    def advance(decoding: Decoding, until: jax.Array) -> Decoding:
        nonlocal state
        state = _advance(model, params, rules, k, alpha, State(decoding, state.said), until)
        return state.decoding

    return loop.run(advance, state.decoding, rules, max_new_tokens, stop, watch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model: Transformer, room: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array) -> State:
    x_BPD, decoding = loop.begin(model, room, 0, params, prompts_BP, lengths)
    return State(decoding, jnp.pad(_unit(x_BPD), ((0, 0), (0, room), (0, 0))))


@functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=5)
def _advance(
    model: Transformer, params: Any, rules: Rules, k: int, alpha: jax.Array, state: State, until: jax.Array
) -> State:
    repeated = weights.repeat_rows(params, k)

    def going(s: State) -> jax.Array:
        return (s.decoding.time < until) & ~jnp.all(s.decoding.done)

    def step(s: State) -> State:
        d = s.decoding
        b = len(d.done)
        probabilities = jax.nn.softmax(rules.sampler.stages(rules.allow(d.logits), d.history)[-1])
        likely, candidates = jax.lax.top_k(probabilities, k)  # (B, K)
        every = jnp.repeat(jnp.arange(b), k)
        slots, layers = jax.tree.map(lambda x: x[every], (d.cache.tokens, d.cache.layers))
        where = Tokens(d.history.length[every][:, None], (~d.done).astype(jnp.int32)[every][:, None])
        x_RD, cache = loop.apply(
            model, repeated, candidates.reshape(-1, 1), where, KVCache(slots, d.cache.index, layers), method="features"
        )
        new_BKD = _unit(x_RD[:, 0]).reshape(b, k, -1)
        likeness = jnp.einsum("bkd,bsd->bks", new_BKD, s.said)
        likeness = jnp.max(jnp.where(d.cache.tokens.segments[:, None] > 0, likeness, -jnp.inf), -1)
        best = argmax(jnp.where(likely > 0, (1 - alpha) * likely - alpha * likeness, -jnp.inf))
        rows = jnp.arange(b) * k + best
        ids = jnp.take_along_axis(candidates, best[:, None], 1)[:, 0]
        slots, layers = jax.tree.map(lambda x: x[rows], (cache.tokens, cache.layers))
        logits = loop.apply(model, params, x_RD[rows], method="logits")[:, 0]
        said = jax.lax.dynamic_update_slice(s.said, new_BKD[jnp.arange(b), best][:, None], (0, d.cache.index, 0))
        return State(loop.after(d, rules, ids, logits, KVCache(slots, cache.index, layers)), said)

    return jax.lax.while_loop(going, step, state)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
