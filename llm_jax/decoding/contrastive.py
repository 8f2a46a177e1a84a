"""Contrastive search (Su et al. 2022, arXiv:2202.06417): likely tokens whose features differ from the context's.

Each step selects, among the k most likely tokens, the token with the largest (1 - alpha) p(token) -
alpha max_j cos(h, h_j) (equation 5), where h is the feature vector of the candidate and h_j of a preceding token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import trees, weights
from llm_jax.decoding import compiled, continuations, loop, steps
from llm_jax.decoding.continuations import Generated, StopFn
from llm_jax.decoding.samplers import Sampler, argmax
from llm_jax.decoding.steps import DecodingState, DrawSettings
from llm_jax.model.attention import KVCache, TokenMetadata
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, P padded prompt, S slots, K candidates, D width, V vocabulary.


@trees.register
@dataclasses.dataclass(frozen=True)
class ContrastiveState:
    """The carry of the loop.

    Attributes:
      decoding: the state of plain decoding; its logits predict the next token, and its cache contains all tokens.
      features: float32 (B, S, D), feature vectors of the tokens so far, normalized to length 1.
    """

    decoding: DecodingState
    features: jax.Array


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
    stop: StopFn | None = None,
    watch: Callable[[list[Generated]], None] | None = None,
) -> list[Generated]:
    """Continues every prompt. For other arguments and errors, see `loop.generate`.

    Args:
      sampler: its filters (penalties) apply before the k candidates are chosen.
      k: candidates per step, at least 2.
      alpha: weight of the similarity penalty, from 0 (greedy) to 1.
    """
    model, params = loop.unrolled(model, params)
    loop.check(model, prompts, max_new_tokens, [0] * len(prompts))
    settings = loop.draw_settings(model, sampler, [0] * len(prompts), eos, vocab_size)
    prompts_BP, lengths = steps.padded(prompts, params)
    state = _start(model, steps.bucket(max_new_tokens), params, prompts_BP, lengths)

    def advance(decoding: DecodingState, until: int) -> DecodingState:
        nonlocal state
        carry = ContrastiveState(decoding, state.features)
        state = _advance(model, params, settings, k, alpha, carry, jnp.int32(until))
        return state.decoding

    return continuations.run(advance, state.decoding, settings.eos, max_new_tokens, stop, watch)


@compiled.jit(static=(0,))
def _start(
    model: Transformer, capacity: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array
) -> ContrastiveState:
    x_BPD, decoding = loop.begin(model, capacity, 0, params, prompts_BP, lengths)
    return ContrastiveState(decoding, jnp.pad(_unit(x_BPD), ((0, 0), (0, capacity), (0, 0))))


@compiled.jit(static=(2,), donate=(4,))
def _advance(
    model: Transformer,
    params: Any,
    settings: DrawSettings,
    k: int,
    alpha: jax.Array,
    state: ContrastiveState,
    until: jax.Array,
) -> ContrastiveState:
    repeated = weights.repeat_rows(params, k)

    def unfinished(s: ContrastiveState) -> jax.Array:
        return (s.decoding.time < until) & ~jnp.all(s.decoding.done)

    def step(s: ContrastiveState) -> ContrastiveState:
        d = s.decoding
        b = len(d.done)
        probabilities = jax.nn.softmax(settings.sampler.stages(settings.mask_padded_vocab(d.logits), d.history)[-1])
        likelihood, candidates = jax.lax.top_k(probabilities, k)  # (B, K)
        source_rows = jnp.repeat(jnp.arange(b), k)  # the row that each candidate continues
        slots, layers = jax.tree.map(lambda x: x[source_rows], (d.cache.tokens, d.cache.layers))
        position = TokenMetadata(
            d.history.length[source_rows][:, None], (~d.done).astype(jnp.int32)[source_rows][:, None]
        )
        x_RD, cache = steps.apply(
            model,
            repeated,
            candidates.reshape(-1, 1),
            position,
            KVCache(slots, d.cache.index, layers),
            method="features",
        )
        new_BKD = _unit(x_RD[:, 0]).reshape(b, k, -1)
        similarity = jnp.einsum("bkd,bsd->bks", new_BKD, s.features)
        similarity = jnp.max(jnp.where(d.cache.tokens.segments[:, None] > 0, similarity, -jnp.inf), -1)
        score = (1 - alpha) * likelihood - alpha * similarity
        best = argmax(jnp.where(likelihood > 0, score, -jnp.inf))
        rows = jnp.arange(b) * k + best
        ids = jnp.take_along_axis(candidates, best[:, None], 1)[:, 0]
        slots, layers = jax.tree.map(lambda x: x[rows], (cache.tokens, cache.layers))
        logits = steps.apply(model, params, x_RD[rows], method="logits")[:, 0]
        chosen_B1D = new_BKD[jnp.arange(b), best][:, None]
        features = jax.lax.dynamic_update_slice(s.features, chosen_B1D, (0, d.cache.index, 0))
        next_cache = KVCache(slots, cache.index, layers)
        recorded = dataclasses.replace(steps.record(d, settings, ids), logits=logits, cache=next_cache)
        return ContrastiveState(recorded, features)

    return jax.lax.while_loop(unfinished, step, state)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors (..., D) normalized to length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
