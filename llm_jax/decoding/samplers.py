"""Samplers: (logits, keys) -> ids, as chains of filters.

A filter is a frozen dataclass, (logits, history) -> logits, that shifts logits, or removes tokens by setting their
logits to -inf. Numeric settings are pytree leaves, so that changing them does not recompile; `OptionalFilter` adds a
setting that enables or disables a filter. The filters of a chain are applied in this order: penalties
(`penalties.py`), temperature, top-k, top-p, min-p, typical, epsilon, eta. Then a token is drawn.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from llm_jax import extensions, trees

# Letters of shapes: B batch, S slots, V vocabulary.

_BLOCK = 256  # number of tokens in a block; `draw` chooses a block, then a token of the block


@trees.register
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens so far.

    Attributes:
      ids: int32 (B, S); the first `length` of a row are its prompt and its generated tokens, without gaps.
      length: int32 (B,).
      prompt: int32 (B,), number of tokens of the prompt.
    """

    ids: jax.Array
    length: jax.Array
    prompt: jax.Array


class Filter(Protocol):
    """A step of a sampler's chain."""

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        """Logits float32 (B, V) -> logits float32 (B, V), -inf for removed tokens."""


@trees.register
@dataclasses.dataclass(frozen=True)
class OptionalFilter:
    """A filter that is applied if `enabled`. `enabled` is a pytree leaf, so changing it does not recompile.

    Attributes:
      enabled: bool ().
      filter: the filter; if it is disabled, it is not computed.
    """

    enabled: bool | jax.Array
    filter: Filter

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        # `cond` hashes its branches, and a filter that holds traced arrays has no hash.
        return jax.lax.cond(self.enabled, lambda x, h: self.filter(x, h), lambda x, h: x, logits, history)


@trees.register
@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divides the logits by the temperature: below 1 sharpens the distribution, above 1 flattens it."""

    temperature: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return logits / self.temperature


@trees.register
@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k largest logits and ties with the last (Fan et al. 2018, arXiv:1805.04833)."""

    k: int | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return jnp.where(_best(logits, jnp.ones_like(logits), self.k), logits, -jnp.inf)


@trees.register
@dataclasses.dataclass(frozen=True)
class TopP:
    """Nucleus sampling: keeps the smallest set of most likely tokens with total probability at least p, and ties.

    Holtzman et al. 2020, arXiv:1904.09751.
    """

    p: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return jnp.where(_best(logits, jax.nn.softmax(logits, -1), self.p), logits, -jnp.inf)


@trees.register
@dataclasses.dataclass(frozen=True)
class MinP:
    """Keeps tokens at least p times as likely as the most likely one (Nguyen et al. 2024, arXiv:2407.01082)."""

    p: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return _only(logits - jnp.max(logits, -1, keepdims=True) >= jnp.log(self.p), logits)


@trees.register
@dataclasses.dataclass(frozen=True)
class Typical:
    """Locally typical sampling: keeps the tokens whose surprisal is closest to the entropy, up to probability mass p.

    Meister et al. 2023, arXiv:2202.00666, equation 11.
    """

    p: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        logs = jax.nn.log_softmax(logits, -1)
        probabilities = jnp.exp(logs)
        distance = jnp.abs(_entropy(logs, probabilities) + jnp.where(probabilities > 0, logs, -jnp.inf))
        return jnp.where(_best(-distance, probabilities, self.p), logits, -jnp.inf)


@trees.register
@dataclasses.dataclass(frozen=True)
class Epsilon:
    """Keeps tokens of probability at least epsilon, and the most likely one.

    Hewitt et al. 2022, arXiv:2210.15191, section 4.1.
    """

    epsilon: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return _only(jax.nn.softmax(logits, -1) >= self.epsilon, logits)


@trees.register
@dataclasses.dataclass(frozen=True)
class Eta:
    """Keeps tokens of probability at least min(epsilon, sqrt(epsilon) exp(-entropy)), and the most likely one.

    Hewitt et al. 2022, arXiv:2210.15191, equation 5.
    """

    epsilon: float | jax.Array

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        logs = jax.nn.log_softmax(logits, -1)
        probabilities = jnp.exp(logs)
        threshold = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-_entropy(logs, probabilities)))
        return _only(probabilities >= threshold, logits)


@trees.register
@dataclasses.dataclass(frozen=True)
class Argmax:
    """Keeps only the most likely token (the first of equal ones), so that sampling is greedy."""

    def __call__(self, logits: jax.Array, history: History) -> jax.Array:
        return jnp.where(jnp.arange(logits.shape[-1]) == argmax(logits)[:, None], logits, -jnp.inf)


@trees.register
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Applies filters, then selects the most likely token (`greedy`) or samples one with the key of each row."""

    filters: tuple[Filter, ...] = ()
    greedy: bool = dataclasses.field(default=False, metadata={"static": True})

    def stages(self, logits: jax.Array, history: History) -> list[jax.Array]:
        """Logits (B, V) in float32, before the first filter and after each."""
        stages = [logits.astype(jnp.float32)]
        for apply_filter in self.filters:
            stages.append(apply_filter(stages[-1], history))
        return stages

    def log_probabilities(self, logits: jax.Array, history: History) -> jax.Array:
        """Log-probabilities of the filtered distribution: float32 (B, V), -inf for removed tokens."""
        last = self.stages(logits, history)[-1]
        if self.greedy:
            return jnp.where(jnp.arange(last.shape[-1]) == argmax(last)[:, None], 0.0, -jnp.inf)
        return jax.nn.log_softmax(last, -1)

    def __call__(self, logits: jax.Array, keys: jax.Array, history: History) -> jax.Array:
        """Logits (B, V), keys (B,) -> ids int32 (B,)."""
        last = self.stages(logits, history)[-1]
        return argmax(last) if self.greedy else draw(last, keys)


def argmax(logits: jax.Array) -> jax.Array:
    """The first largest entry of each row: (B, V) -> int32 (B,). Twice as fast on CPU as jnp.argmax of floats."""
    return jnp.argmax(logits == jnp.max(logits, -1, keepdims=True), -1).astype(jnp.int32)


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws from softmax(logits): logits (B, V), keys (B,) -> int32 (B,).

    Inverts the cumulative distribution twice, over blocks of tokens and then within a block, with two uniform
    numbers: one Gumbel number per token (jax.random.categorical) costs a millisecond per row on CPU.
    """
    padding = -logits.shape[-1] % _BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    weights = jnp.exp(padded - jnp.max(padded, -1, keepdims=True)).reshape(len(logits), -1, _BLOCK)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(jnp.sum(weights, -1), uniforms[:, 0])
    within = _invert(jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0], uniforms[:, 1])
    return (block * _BLOCK + within).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The index at which the cumulative weights (B, N) exceed the share `uniform` (B,) of their sum: int32 (B,)."""
    total = jnp.cumsum(weights, -1)
    passed = (total > uniform[:, None] * total[:, -1:]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, -1)  # used if no entry passes because of rounding
    return jnp.where(jnp.any(passed, -1), jnp.argmax(passed, -1), last)


def custom_filter(specification: str) -> Filter:
    """Loads the custom filter `FILE:NAME(OPTIONS)`.

    Raises:
      UserError: see `extensions.load`; the filter is not a dataclass, or not registered as a pytree.
    """
    extension = extensions.load("--filter", specification)
    if not (isinstance(extension.target, type) and dataclasses.is_dataclass(extension.target)):
        raise extension.error("expected a dataclass, (logits, history) -> logits")
    if not any("__call__" in vars(base) for base in extension.target.__mro__):
        raise extension.error("it is not a filter; expected a method __call__(self, logits, history) -> logits")
    new_filter = extension.call(extension.bind(extension.target))
    if jax.tree_util.all_leaves([new_filter]):
        raise extension.error("the dataclass is not a pytree; decorate it with @llm_jax.trees.register")
    lengths = jnp.ones(2, jnp.int32)
    arguments = jnp.zeros((2, 7)), History(jnp.zeros((2, 5), jnp.int32), lengths, lengths)
    extension.check_output("__call__", new_filter, arguments, {"batch": 2, "vocab_size": 7})
    return new_filter


def _only(keep: jax.Array, logits: jax.Array) -> jax.Array:
    """Removes the tokens for which `keep`, bool (B, V), is False, except the most likely token."""
    return jnp.where(keep | (logits == jnp.max(logits, -1, keepdims=True)), logits, -jnp.inf)


def _entropy(logs: jax.Array, probabilities: jax.Array) -> jax.Array:
    """Entropy in nats: (B, V) -> (B, 1)."""
    return -jnp.sum(jnp.where(probabilities > 0, probabilities * logs, 0.0), -1, keepdims=True)


def _best(values: jax.Array, weights: jax.Array, need: float | int | jax.Array) -> jax.Array:
    """Selects the largest values whose weights sum to at least `need`: bool (B, V), the smallest such set, with ties.

    The smallest selected value is found bit by bit in the integer order of floats, with 32 sums over each row. On CPUs
    this is thirty times as fast as sorting.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.int32)  # -0.0 is 0.0
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the same order as the floats

    def one_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        raised = least ^ (jnp.uint32(1 << 31) >> i.astype(jnp.uint32)).astype(jnp.int32)
        enough = jnp.sum(jnp.where(order >= raised[:, None], weights, 0.0), -1) >= need
        return jnp.where(enough, raised, least)

    least = jax.lax.fori_loop(0, 32, one_bit, jnp.full(len(values), -(2**31), jnp.int32))
    return order >= least[:, None]
