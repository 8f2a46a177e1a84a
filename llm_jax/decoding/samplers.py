"""Samplers: (logits, keys) -> ids, as chains of filters.

A filter is a frozen dataclass, (logits, history) -> logits, that rules tokens out by setting their
logit to -inf. Numeric settings are leaves, so that changing them does not recompile. A chain runs in
the order: penalties, temperature, top-k, top-p, draw.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from llm_jax.errors import UserError

# Letters of shapes: B batch, S slots, V vocabulary.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens so far.

    Attributes:
      ids: int32 (B, S); the first `length` of a row are its prompt and what was drawn, without gaps.
      length: int32 (B,).
      prompt: int32 (B,), how many of them are the prompt.
    """

    ids: jax.Array
    length: jax.Array
    prompt: jax.Array


class Filter(Protocol):
    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        """float32 (B, V) -> float32 (B, V)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divides the logits; below 1 sharpens, above 1 flattens."""

    temperature: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return logits / self.temperature


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k largest logits (Fan et al. 2018, arXiv:1805.04833), and what ties with the last."""

    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        least = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits < least, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP:
    """Keeps the smallest set of likely tokens with mass at least p (Holtzman et al. 2020, arXiv:1904.09751)."""

    p: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        order = jnp.argsort(-logits, axis=-1, stable=True)
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits, -1), order, -1)
        before = jnp.cumsum(probabilities, -1) - probabilities
        keep = (before < self.p).at[:, 0].set(True)
        rows = jnp.arange(logits.shape[0])[:, None]
        return jnp.where(jnp.zeros_like(keep).at[rows, order].set(keep), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Filters, then the most likely token (`greedy`) or a draw with each row's own key."""

    filters: tuple[Filter, ...] = ()
    greedy: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(self, logits: jax.Array, keys: jax.Array, history: History) -> jax.Array:
        """Logits (B, V), keys (B,) -> ids int32 (B,)."""
        logits = logits.astype(jnp.float32)
        for one in self.filters:
            logits = one(logits, history)
        if self.greedy:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def make(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampler:
    """The chain for the options of `generate`; temperature 0 is greedy, top_k 0 and top_p 1 are off.

    Raises:
      UserError: an option out of its range, or a filter beside greedy decoding, where it does nothing.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature={temperature}; expected 0 (greedy) or a positive number")
    if top_k < 0:
        raise UserError(f"--top_k={top_k}; expected 0 (off) or a positive number")
    if not 0 < top_p <= 1:
        raise UserError(f"--top_p={top_p}; expected a number in (0, 1]")
    if temperature == 0:
        if top_k or top_p < 1:
            raise UserError("--temperature=0 is greedy and leaves nothing for --top_k or --top_p to choose from")
        return Sampler(greedy=True)
    filters: list[Filter] = [Temperature(temperature)] if temperature != 1 else []
    filters += [TopK(top_k)] if top_k else []
    filters += [TopP(top_p)] if top_p < 1 else []
    return Sampler(tuple(filters))
