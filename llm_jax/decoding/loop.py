"""Generation token by token: one compiled prefill and one compiled loop, for prompts of any lengths.

Prompts are padded on the right to a bucket and the cache has a bucket of slots, so that other lengths
run the same compiled code. Padding is segment 0: nobody sees it, and the slots after it take positions
that go on from each row's own prompt.

    state = start(model, params, prompts, ...)               the prefill
    state = advance(model, params, rules, state, until)      tokens, up to the given number
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees
from llm_jax.decoding.samplers import History, Sampler
from llm_jax.errors import UserError
from llm_jax.model.attention import KVCache, Tokens
from llm_jax.model.transformer import Transformer, check_length, init_cache

# Letters of shapes: B batch, P padded prompt, S slots, N new tokens, A alternatives, V vocabulary.

_SMALLEST_BUCKET = 32
CHUNK = 16  # tokens between two looks at what stops a text

Stop = Callable[[int, list[int]], int | None]


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
      ids: without the prompt and without EOS.
      log_probabilities: of each id, and of EOS where that came, under the model itself (before any
        filter), natural logarithm: they sum to the log-probability of the sequence.
      stop: "eos", "stop" where `stop` ended it, or "length" where max_new_tokens did.
      alternatives: for each of them, the most likely ids and their log-probabilities.
    """

    ids: list[int]
    log_probabilities: list[float]
    stop: str
    alternatives: list[dict[int, float]] = dataclasses.field(default_factory=list)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What the loop goes by; all of it may change without compiling again.

    Attributes:
      keys: (B,), one random key a row.
      eos: int32 (E,), the ids that end a row.
      vocab_size: int32 (), ids from here on are never drawn.
    """

    sampler: Sampler
    keys: jax.Array
    eos: jax.Array
    vocab_size: jax.Array

    def allow(self, logits: jax.Array) -> jax.Array:
        """Rules out the ids past the vocabulary: (B, V) -> (B, V)."""
        return jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)

    def ends(self, ids: jax.Array) -> jax.Array:
        return jnp.any(ids[..., None] == self.eos, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The loop's state. `count` (B,) tokens are written in `ids` (B, N); `done` rows write no more.

    `logits` (B, V) are those of the next token, `time` () the tokens drawn so far; alternatives (B, N, A).
    """

    cache: KVCache
    history: History
    logits: jax.Array
    time: jax.Array
    ids: jax.Array
    log_probabilities: jax.Array
    alternative_ids: jax.Array
    alternative_logs: jax.Array
    count: jax.Array
    done: jax.Array


def generate(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    alternatives: int = 0,
    stop: Stop | None = None,
    watch: Callable[[list[Generated]], None] | None = None,
) -> list[Generated]:
    """Continues every prompt.

    Args:
      params: in the layout of `model.config`; scanned layers are unstacked first, which copies them.
      prompts: ids, at least one each; lengths may differ.
      seeds: one per row, below 2^32, so that a row's text does not depend on the others; by default 0, 1, ...
      eos: the ids that end a row; None: only the length does.
      vocab_size: ids from here on are never drawn, for a model whose vocabulary is padded; by default the model's.
      alternatives: how many of the most likely tokens to give at each step.
      stop: (row, its ids so far) -> how many of them to keep if it is to end there, or None.
      watch: is shown the rows so far after every token.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, max_new_tokens below 1, or a length that
        goes past the model's positions.
    """
    model, params = unrolled(model, params)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    check(model, prompts, max_new_tokens, seeds)
    rules = make_rules(model, sampler, seeds, eos, vocab_size)
    state = start(model, params, prompts, max_new_tokens, alternatives)
    step = functools.partial(advance, model, params, rules)
    return run(step, state, rules, max_new_tokens, stop, watch)


def run(
    step: Callable[[Any, jax.Array], Any],
    state: Any,
    rules: Rules,
    max_new_tokens: int,
    stop: Stop | None,
    watch: Callable[[list[Generated]], None] | None,
) -> list[Generated]:
    """Takes steps to the end, and pauses where somebody wants to see the rows in between (see `generate`).

    Args:
      step: (state, until) -> the state with `until` tokens, or with all rows done. A state has the last six
        fields of `Decoding`.
    """
    pause = 1 if watch else CHUNK if stop else max_new_tokens
    cut: dict[int, int] = {}
    for until in (*range(pause, max_new_tokens, pause), max_new_tokens):
        state = step(state, jnp.int32(until))
        done = np.array(state.done)
        if stop:
            for row, (ids, count) in enumerate(zip(*jax.device_get((state.ids, state.count)), strict=True)):
                if row not in cut and (kept := stop(row, ids[:count].tolist())) is not None:
                    cut[row] = kept
            done[list(cut)] = True
            state = dataclasses.replace(state, done=jnp.asarray(done))
        if watch:
            watch(results(state, rules, cut))
        if done.all():
            break
    return results(state, rules, cut)


def unrolled(model: Transformer, params: Any) -> tuple[Transformer, Any]:
    """The model with one entry per layer: a scan would copy each layer's weights out of the stack at every token."""
    if not model.config.scan_layers:
        return model, params
    return model.clone(config=dataclasses.replace(model.config, scan_layers=False)), trees.unstack(params)


def make_rules(
    model: Transformer,
    sampler: Sampler,
    seeds: Sequence[int],
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> Rules:
    """The arguments of `generate` as the loop takes them."""
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ends += [-1] * (4 - len(ends))  # so that few of them and none compile to the same
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return Rules(sampler, keys, jnp.asarray(ends, jnp.int32), jnp.int32(vocab_size or model.config.vocab_size))


def start(
    model: Transformer, params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, alternatives: int = 0
) -> Decoding:
    """The state after the prompts, with room for `max_new_tokens`."""
    prompts_BP, lengths = padded(prompts)
    room = bucket(max_new_tokens)
    return _start(model, room, alternatives, params, prompts_BP, lengths)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts -> ids int32 (B, P), filled up to a bucket, and lengths int32 (B,)."""
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    prompts_BP = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(prompts_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    return prompts_BP, lengths


def prefill(
    model: Transformer, params: Any, prompts_BP: jax.Array, lengths: jax.Array, slots: int
) -> tuple[jax.Array, KVCache]:
    """Padded prompts -> (features (B, P, D), a cache of `slots`). For use under `jax.jit`."""
    b, p = prompts_BP.shape
    count = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32), (b, p))
    real = count < lengths[:, None]
    where = Tokens(jnp.minimum(count, lengths[:, None] - 1), real.astype(jnp.int32))
    return apply(model, params, prompts_BP, where, init_cache(model.config, b, slots), method="features")


def last_logits(model: Transformer, params: Any, x_BPD: jax.Array, lengths: jax.Array) -> jax.Array:
    """Features of padded prompts -> logits (B, V) of what comes after each."""
    last_B1D = jnp.take_along_axis(x_BPD, lengths[:, None, None] - 1, axis=1)
    return apply(model, params, last_B1D, method="logits")[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    model: Transformer, room: int, alternatives: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array
) -> Decoding:
    return begin(model, room, alternatives, params, prompts_BP, lengths)[1]


def begin(
    model: Transformer, room: int, alternatives: int, params: Any, prompts_BP: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Decoding]:
    """The features (B, P, D) of padded prompts, and the state after them. For use under `jax.jit`."""
    b, p = prompts_BP.shape
    x_BPD, cache = prefill(model, params, prompts_BP, lengths, p + room)
    return x_BPD, Decoding(
        cache,
        History(jnp.pad(prompts_BP, ((0, 0), (0, room))), lengths, lengths),
        last_logits(model, params, x_BPD, lengths),
        jnp.int32(0),
        jnp.zeros((b, room), jnp.int32),
        jnp.zeros((b, room), jnp.float32),
        jnp.zeros((b, room, alternatives), jnp.int32),
        jnp.zeros((b, room, alternatives), jnp.float32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros(b, bool),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def advance(model: Transformer, params: Any, rules: Rules, state: Decoding, until: jax.Array) -> Decoding:
    """Draws tokens until `until` of them are there or all rows are done; `state` is used up."""

    def going(s: Decoding) -> jax.Array:
        return (s.time < until) & ~jnp.all(s.done)

    def step(s: Decoding) -> Decoding:
        keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, s.time)
        ids = rules.sampler(rules.allow(s.logits), keys, s.history)
        where = Tokens((s.history.prompt + s.time)[:, None], (~s.done).astype(jnp.int32)[:, None])
        logits, cache = apply(model, params, ids[:, None], where, s.cache)
        return after(s, rules, ids, logits[:, 0], cache)

    return jax.lax.while_loop(going, step, state)


def after(s: Decoding, rules: Rules, ids: jax.Array, logits: jax.Array, cache: KVCache) -> Decoding:
    """The state once ids (B,) were chosen: `logits` and `cache` are those after them."""
    logs_BV = jax.nn.log_softmax(s.logits.astype(jnp.float32))
    best, best_ids = jax.lax.top_k(logs_BV, s.alternative_ids.shape[-1])
    return Decoding(
        cache,
        append(s.history, ids, ~s.done),
        logits,
        s.time + 1,
        s.ids.at[:, s.time].set(ids),
        s.log_probabilities.at[:, s.time].set(jnp.take_along_axis(logs_BV, ids[:, None], -1)[:, 0]),
        s.alternative_ids.at[:, s.time].set(best_ids),
        s.alternative_logs.at[:, s.time].set(best),
        s.count + ~s.done,
        s.done | rules.ends(ids),
    )


def append(history: History, ids: jax.Array, where: jax.Array) -> History:
    """The history with ids (B,) after the rows that `where` (B,) names."""
    places = jnp.where(where, history.length, history.ids.shape[1])  # past the end: not written
    written = history.ids.at[jnp.arange(len(ids)), places].set(ids, mode="drop")
    return History(written, history.length + where, history.prompt)


def results(state: Any, rules: Rules, cut: dict[int, int]) -> list[Generated]:
    """The rows so far; `cut` says how many tokens to keep of those that were stopped."""
    ends = set(np.asarray(rules.eos).tolist())
    found = []
    s = jax.device_get((state.ids, state.log_probabilities, state.count, state.alternative_ids, state.alternative_logs))
    for row, (ids, logs, n, others, other_logs) in enumerate(zip(*s, strict=True)):
        n = cut.get(row, int(n))
        ended = row not in cut and n > 0 and int(ids[n - 1]) in ends
        best = [dict(zip(i.tolist(), x.tolist(), strict=True)) for i, x in zip(others[:n], other_logs[:n], strict=True)]
        stop = "stop" if row in cut else "eos" if ended else "length"
        found.append(Generated(ids[: n - ended].tolist(), logs[:n].tolist(), stop, best if others.shape[-1] else []))
    return found


def apply(model: Transformer, params: Any, *inputs: Any, method: str = "__call__") -> Any:
    return model.apply({"params": params}, *inputs, method=method)


def bucket(length: int) -> int:
    """The next power of two."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]) -> None:
    """Raises UserError for a request that the model cannot serve."""
    if not len(prompts) or not all(len(p) for p in prompts):
        raise UserError("the prompt is empty; expected at least one token (BOS will do)")
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={max_new_tokens}; expected at least 1")
    if len(seeds) != len(prompts) or any(not 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"the seeds {list(seeds)[:4]} are not one from 0 to 2^32 - 1 for each of {len(prompts)} rows")
    vocab = model.config.vocab_size
    if any(not 0 <= i < vocab for prompt in prompts for i in prompt):
        raise UserError(f"a prompt has an id outside the model's vocabulary of {vocab}")
    check_length(model.config, max(map(len, prompts)) + max_new_tokens)
