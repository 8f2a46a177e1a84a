"""Filters that depend on the preceding tokens: they make these tokens less likely, or remove them."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.decoding.samplers import History

# Letters of shapes: B batch, S slots, V vocabulary, N biased tokens.


@trees.register
@dataclasses.dataclass(frozen=True)
class Repetition:
    """Divides positive logits of tokens in the prompt or continuation by the penalty, and multiplies negative ones.

    Keskar et al. 2019, arXiv:1909.05858, section 4.1, extended to negative logits.

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
    """Subtracts `presence` from the logits of generated tokens, and `frequency` for each of their occurrences.

    The prompt does not count. The formula is that of OpenAI's API reference ("frequency and presence penalties").
    """

    presence: float | jax.Array
    frequency: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        counts = _counts(logits, history, prompt=False)
        return logits - self.presence * (counts > 0) - self.frequency * counts


@trees.register
@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
    """Removes tokens that would repeat an n-gram of prompt and continuation.

    If all tokens would be removed, none is removed. Paulus et al. 2017, arXiv:1705.04304, section 2.5.
    """

    n: int | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        rows, slots = history.ids.shape
        indices = jnp.arange(slots)

        def same(i: jax.Array, match: jax.Array) -> jax.Array:
            # Whether the token i positions before each index equals the token i positions before the end.
            last = jnp.take_along_axis(history.ids, jnp.maximum(history.length - i, 0)[:, None], 1)
            return match & (jnp.roll(history.ids, i, axis=1) == last)

        # If the n - 1 tokens before an index equal the last n - 1 tokens, its token would repeat an n-gram.
        inside = (indices >= self.n - 1) & (indices < history.length[:, None])
        n = jnp.minimum(self.n, slots + 1)  # no index is inside if n is larger
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
    indices = jnp.arange(history.ids.shape[1])
    counted = indices < history.length[:, None]
    if not prompt:
        counted &= indices >= history.prompt[:, None]
    rows = jnp.arange(len(logits))[:, None]
    return jnp.zeros(logits.shape, jnp.float32).at[rows, history.ids].add(counted.astype(jnp.float32))
