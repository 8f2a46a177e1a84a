"""Speculative decoding: a cheap guess of the next tokens, checked by the model in one pass.

What comes out has exactly the model's own distribution (Leviathan et al. 2022, arXiv:2211.17192, algorithm 1),
whatever the guess is. It comes from a smaller model with the same vocabulary, or from the text itself: what
followed the last time that its last tokens came (prompt look-up).

Rows accept different numbers of guesses, so each has its own place in the cache. What was guessed wrongly is
overwritten by the next round before anybody can see it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.decoding import loop
from llm_jax.decoding.loop import Generated, Rules, Stop
from llm_jax.decoding.samplers import History, Sampler, draw
from llm_jax.errors import UserError
from llm_jax.model.attention import KVCache, Tokens
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, P padded prompt, S slots, K guesses, N new tokens, V vocabulary.

_MATCH = 3  # tokens that prompt look-up tries to find again, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What `loop.Decoding` holds, for rows of different lengths.

    The caches hold all tokens of the history but the last. `rounds` () counts the model's passes.
    """

    cache: KVCache
    guesser: KVCache | None
    history: History
    rounds: jax.Array
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
    draft: tuple[Transformer, Any] | None,
    guesses: int,
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
    vocab_size: int | None = None,
    stop: Stop | None = None,
    watch: Callable[[list[Generated]], None] | None = None,
) -> list[Generated]:
    """Continues every prompt as `loop.generate` does (see there), with draws of its own.

    Args:
      draft: the model that guesses and its parameters, or None for prompt look-up.
      guesses: tokens guessed in each round.

    Raises:
      UserError: also where the draft has another vocabulary than the model.
    """
    if guesses < 1:
        raise UserError(f"--draft_tokens={guesses}; expected at least 1")
    model, params = loop.unrolled(model, params)
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    loop.check(model, prompts, max_new_tokens, seeds)
    if draft is not None:
        if draft[0].config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"the draft has a vocabulary of {draft[0].config.vocab_size} ids, the model {model.config.vocab_size}"
            )
        draft = loop.unrolled(*draft)
        loop.check(draft[0], prompts, max_new_tokens, seeds)
    guesser, guesser_params = draft or (None, None)
    rules = loop.make_rules(model, sampler, seeds, eos, vocab_size)
    prompts_BP, lengths = loop.padded(prompts)
    room = loop.bucket(max_new_tokens)
    state = _start(model, guesser, room, guesses, params, guesser_params, prompts_BP, lengths)

    def step(state: State, until: jax.Array) -> State:
        rounds = until if stop or watch else jnp.int32(max_new_tokens)  # a round brings a token or more
        return _advance(model, guesser, guesses, params, guesser_params, rules, state, rounds, max_new_tokens)

    return loop.run(step, state, rules, max_new_tokens, stop, watch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(
    model: Transformer,
    guesser: Transformer | None,
    room: int,
    guesses: int,
    params: Any,
    guesser_params: Any,
    prompts_BP: jax.Array,
    lengths: jax.Array,
) -> State:
    b, p = prompts_BP.shape
    slots = p + room + guesses + 1  # a last round may guess past the end

    def filled(of: Transformer, weights: Any) -> KVCache:
        _, cache = loop.prefill(of, weights, prompts_BP, lengths, slots)
        return dataclasses.replace(cache, index=lengths - 1)

    return State(
        filled(model, params),
        None if guesser is None else filled(guesser, guesser_params),
        History(jnp.pad(prompts_BP, ((0, 0), (0, slots - p))), lengths, lengths),
        jnp.int32(0),
        jnp.zeros((b, room + guesses + 1), jnp.int32),
        jnp.zeros((b, room + guesses + 1), jnp.float32),
        jnp.zeros((b, room, 0), jnp.int32),
        jnp.zeros((b, room, 0), jnp.float32),
        jnp.zeros(b, jnp.int32),
        jnp.zeros(b, bool),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def _advance(
    model: Transformer,
    guesser: Transformer | None,
    guesses: int,
    params: Any,
    guesser_params: Any,
    rules: Rules,
    state: State,
    rounds: jax.Array,
    limit: jax.Array,
) -> State:
    """Goes on until `rounds` rounds are over or all rows are done; rows end at `limit` tokens."""

    def going(s: State) -> jax.Array:
        return (s.rounds < rounds) & ~jnp.all(s.done)

    def step(s: State) -> State:
        b = len(s.done)
        keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, s.rounds)
        keys = jax.vmap(lambda key: jax.random.split(key, guesses + 2))(keys)  # (B, K + 2)
        last = jnp.take_along_axis(s.history.ids, s.history.length[:, None] - 1, 1)
        if guesser is None:
            guessed, q_logs, cache = _look_up(s.history, guesses), None, None
        else:
            guessed, q_logs, cache = _guess(
                guesser, guesser_params, rules, s.history, last, s.guesser, keys, guesses, s.history.prompt + limit
            )
        where = _places(s.history.length - 1, guesses + 1, s.done, s.history.prompt + limit)
        logits, target_cache = loop.apply(model, params, jnp.concatenate([last, guessed], 1), where, s.cache)
        logs_BKV = jax.nn.log_softmax(logits.astype(jnp.float32))
        checked, history = [], s.history
        for i in range(guesses + 1):  # filters look at the tokens before each place
            checked.append(rules.sampler.log_probabilities(rules.allow(logits[:, i]), history))
            if i < guesses:
                history = loop.append(history, guessed[:, i], jnp.ones(b, bool))
        p_logs = jnp.stack(checked, 1)
        accepted = _accept(p_logs, q_logs, guessed, keys[:, guesses])
        rest = _rest(p_logs, q_logs, guessed, accepted)
        more = draw(rest, keys[:, guesses + 1])
        places = jnp.arange(guesses + 1)
        new = jnp.where(places == accepted[:, None], more[:, None], jnp.pad(guessed, ((0, 0), (0, 1))))
        # A row takes what was accepted and one more, up to an end of text and the limit.
        ends = rules.ends(new) & (places <= accepted[:, None])
        taken = jnp.where(jnp.any(ends, 1), jnp.argmax(ends, 1), accepted) + 1
        taken = jnp.where(s.done, 0, jnp.minimum(taken, limit - s.count))
        last_end = jnp.any(ends & (places < taken[:, None]), 1)
        logs = jnp.take_along_axis(logs_BKV, new[..., None], -1)[..., 0]
        history = History(_write(s.history.ids, new, s.history.length), s.history.length + taken, s.history.prompt)
        count = s.count + taken
        return State(
            dataclasses.replace(target_cache, index=history.length - 1),
            cache and dataclasses.replace(cache, index=history.length - 1),
            history,
            s.rounds + 1,
            _write(s.ids, new, s.count),
            _write(s.log_probabilities, logs, s.count),
            s.alternative_ids,
            s.alternative_logs,
            count,
            s.done | last_end | (count >= limit),
        )

    return jax.lax.while_loop(going, step, state)


def _guess(guesser, params, rules: Rules, history: History, last, cache: Any, keys, guesses: int, bound):
    """Draws of the draft: ids (B, K), their log-probabilities (B, K, V), and its cache, the last guess included."""

    def one(carry, key):
        cache, history, ids = carry
        where = _places(history.length - 1, 1, jnp.zeros(len(ids), bool), bound)
        logits, cache = loop.apply(guesser, params, ids, where, cache)
        logs = rules.sampler.log_probabilities(rules.allow(logits[:, 0]), history)
        drawn = draw(logs, key)
        return (cache, loop.append(history, drawn, jnp.ones(len(ids), bool)), drawn[:, None]), (drawn, logs)

    # One pass more than guesses, so that the cache has the last one too.
    order = jnp.swapaxes(keys, 0, 1)[: guesses + 1]
    (cache, _, _), (drawn, logs) = jax.lax.scan(one, (cache, history, last), order)
    return jnp.swapaxes(drawn, 0, 1)[:, :guesses], jnp.swapaxes(logs, 0, 1)[:, :guesses], cache


def _look_up(history: History, guesses: int) -> jax.Array:
    """What followed the last place where the longest run of the last tokens stood before: (B, K).

    Where there is none it is anything: a wrong guess costs nothing but itself.
    """
    slots = history.ids.shape[1]
    places, length = jnp.arange(slots), history.length[:, None]
    run, same = jnp.zeros(history.ids.shape, jnp.int32), places < length - 1
    for i in range(_MATCH):
        last = jnp.take_along_axis(history.ids, jnp.maximum(length - 1 - i, 0), 1)
        same &= (jnp.roll(history.ids, i, axis=1) == last) & (places >= i)
        run += same
    best = jnp.argmax(run * slots + places, 1)[:, None]
    return jnp.take_along_axis(history.ids, jnp.minimum(best + 1 + jnp.arange(guesses), slots - 1), 1)


def _accept(p_logs: jax.Array, q_logs: jax.Array | None, guessed: jax.Array, keys: jax.Array) -> jax.Array:
    """How many guesses of each row are accepted, each with probability min(1, p / q): int32 (B,)."""
    guesses = guessed.shape[1]
    p = jnp.take_along_axis(p_logs[:, :guesses], guessed[..., None], -1)[..., 0]
    q = 0.0 if q_logs is None else jnp.take_along_axis(q_logs, guessed[..., None], -1)[..., 0]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (guesses,)))(keys)
    return jnp.sum(jnp.cumprod(uniform < jnp.exp(p - q), 1), 1).astype(jnp.int32)


def _rest(p_logs: jax.Array, q_logs: jax.Array | None, guessed: jax.Array, accepted: jax.Array) -> jax.Array:
    """Log of what the token after the accepted ones is drawn from: max(0, p - q), or p after all guesses. (B, V)."""
    row = jnp.arange(len(accepted))
    p = jnp.exp(p_logs[row, accepted])
    place = jnp.minimum(accepted, guessed.shape[1] - 1)
    if q_logs is None:
        q = jax.nn.one_hot(guessed[row, place], p.shape[-1])
    else:
        q = jnp.exp(q_logs[row, place])
    rest = jnp.where((accepted < guessed.shape[1])[:, None], jnp.maximum(p - q, 0.0), p)
    # Equal distributions never reject but for rounding, which may leave nothing.
    return jnp.log(jnp.where(jnp.sum(rest, -1, keepdims=True) > 0, rest, p))


def _places(first: jax.Array, count: int, done: jax.Array, bound: jax.Array) -> Tokens:
    """`count` tokens from positions `first` (B,) on; what would lie past the row's bound is never used."""
    places = first[:, None] + jnp.arange(count)
    segments = jnp.broadcast_to((~done).astype(jnp.int32)[:, None], places.shape)
    return Tokens(jnp.minimum(places, bound[:, None] - 1), segments)


def _write(rows: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Puts new (B, K) into rows (B, N) from start (B,) on."""
    return jax.vmap(lambda r, n, s: jax.lax.dynamic_update_slice(r, n, (s,)))(rows, new, start)
