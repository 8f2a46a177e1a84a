"""Filters that depend on the tokens so far: they make earlier tokens less likely, or remove them."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.decoding.samplers import History

# Letters of shapes: B batch, S slots, V vocabulary, N biased tokens.


@trees.register
@dataclasses.dataclass(frozen=True)
class Repetition:
    """Divides positive logits of tokens that occurred, prompt included, by the penalty; multiplies negative ones by it.

    Keskar et al. 2019, arXiv:1909.05858, section 4.1, in the form that works for negative logits.

    Attributes:
      penalty: above 1 makes repetition less likely, below 1 more likely.
    """

    penalty: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        occurred = _counts(logits, history, prompt=True) > 0
        return jnp.where(occurred, jnp.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)


@trees.register
@dataclasses.dataclass(frozen=True)
class PresenceFrequency:
    """Subtracts `presence` from the logits of generated tokens, and `frequency` per occurrence, the prompt left out.

    The formula of OpenAI's API reference ("frequency and presence penalties").
    """

    presence: float | jax.Array
    frequency: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        counts = _counts(logits, history, prompt=False)
        return logits - self.presence * (counts > 0) - self.frequency * counts


@trees.register
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
    """Removes tokens that would repeat an n-gram, prompt included (Paulus et al. 2017, arXiv:1705.04304, 2.5).

    If that would remove every token, none is removed.
    """

    n: int | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        rows, slots = history.ids.shape
        places = jnp.arange(slots)

        def same(i: jax.Array, match: jax.Array) -> jax.Array:
            # Does the token i before each place equal the token i before the end?
            last = jnp.take_along_axis(history.ids, jnp.maximum(history.length - i, 0)[:, None], 1)
            return match & (jnp.roll(history.ids, i, axis=1) == last)

        # A place whose n - 1 predecessors are the last n - 1 tokens repeats an n-gram.
        inside = (places >= self.n - 1) & (places < history.length[:, None])
        n = jnp.minimum(self.n, slots + 1)  # no place is inside if n is larger
        repeats = jax.lax.fori_loop(1, n, same, inside)
        banned = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], history.ids].max(repeats)
        remaining = jnp.where(banned, -jnp.inf, logits)
        return jnp.where(jnp.any(remaining > -jnp.inf, -1, keepdims=True), remaining, logits)


@trees.register
@dataclasses.dataclass(frozen=True)
class Bias:
    """Adds `biases` float32 (N,) to the logits of the tokens `ids` int32 (N,)."""

    ids: jax.Array
    biases: jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return logits.at[:, self.ids].add(self.biases)


def _counts(logits: jax.Array, history: History, prompt: bool) -> jax.Array:
    """Occurrences of each token, with or without those in the prompt: float32 (B, V)."""
    places = jnp.arange(history.ids.shape[1])
    counted = places < history.length[:, None]
    if not prompt:
        counted &= places >= history.prompt[:, None]
    rows = jnp.arange(len(logits))[:, None]
    return jnp.zeros(logits.shape, jnp.float32).at[rows, history.ids].add(counted.astype(jnp.float32))
