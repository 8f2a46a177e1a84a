"""The library call: texts in, continuations out, by whatever method the options ask for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax import tokenizers, weights
from llm_jax.decoding import beam, contrastive, loop, speculative, stops
from llm_jax.decoding.loop import Generated
from llm_jax.decoding.options import PROMPT, Options
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """A continuation as text, without EOS and stop string, and what it is made of; `score` ranks beams."""

    text: str
    made: Generated
    score: float | None = None


def complete(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    options: Options,
    *,
    draft: tuple[Transformer, Any] | None = None,
    show: Callable[[int, str], None] | None = None,
) -> list[list[Completion]]:
    """`options.n` continuations of every prompt, the best first where they are ranked.

    Args:
      prompts: texts, or ids as they are.
      draft: the model that `options.draft` names, with the same tokenizer.
      show: is called with (row, text) as soon as more text of a row is certain; row i * n + j is
        continuation j of prompt i.

    Raises:
      UserError: options that are out of range, contradict each other, or cannot be met.
    """
    vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    options.check(vocab)
    if not model.config.causal:
        raise UserError("a bidirectional model (model.causal=False) does not continue text")
    ids = [fit(model, encoded(tokenizer, p), options) for p in prompts]
    model, params = loop.unrolled(model, params)
    stop = stops.finder(tokenizer, options.stop, options.max_new_tokens)
    common: dict[str, Any] = {"eos": ends(tokenizer, options), "vocab_size": vocab, "stop": stop}
    if options.method == "beam":
        if show:
            raise UserError("a beam search has no text before its end; leave --stream out")
        ranked = beam.search(model, params, ids, options, **common)
        return [[Completion(_text(tokenizer, b.made, options), b.made, b.score) for b in beams] for beams in ranked]
    if show:
        common["watch"] = _watcher(tokenizer, options, show)
    common["max_new_tokens"] = options.max_new_tokens
    if options.method == "contrastive":
        made = contrastive.search(
            model, params, ids, options.sampler(), k=options.top_k, alpha=options.contrastive, **common
        )
    else:
        rows = [prompt for prompt in ids for _ in range(options.n)]
        params = weights.repeat_rows(params, options.n)
        common["seeds"] = [(options.seed + i) % 2**32 for i in range(len(rows))]
        if options.method == "speculative":
            if options.draft != PROMPT and draft is None:
                raise UserError(f"--draft={options.draft}: the model itself is needed (`draft=`)")
            guess = None if options.draft == PROMPT else draft
            made = speculative.generate(model, params, rows, options.sampler(), guess, options.draft_tokens, **common)
        else:
            made = loop.generate(model, params, rows, options.sampler(), alternatives=options.alternatives, **common)
    done = [Completion(_text(tokenizer, one, options), one) for one in made]
    return [done[i : i + options.n] for i in range(0, len(done), options.n)]


def encoded(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a prompt. Raises UserError where it is empty and the vocabulary has no BOS to begin with."""
    ids = tokenizers.prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise UserError("the prompt is empty, and this vocabulary has no BOS to begin with; give some text")
    return ids


def ends(tokenizer: Tokenizer, options: Options) -> list[int]:
    """The ids that end a text."""
    return [] if options.ignore_eos else [*options.eos, *tokenizers.ends(tokenizer)]


def fit(model: Transformer, ids: list[int], options: Options) -> list[int]:
    """The prompt, cut where `options.truncate` says so that the answer fits into the context.

    Raises:
      UserError: it does not fit, and nothing says where to cut.
    """
    vocab = model.config.vocab_size
    if any(not 0 <= i < vocab for i in ids):
        raise UserError(f"the prompt has a token that the model lacks (its ids end at {vocab - 1})")
    bounds = [b for b in (options.context, positions.make(model.config).max_length()) if b]
    room = min(bounds, default=len(ids) + options.max_new_tokens) - options.max_new_tokens
    if len(ids) <= room:
        return ids
    if room < 1:
        raise UserError(f"--max_new_tokens={options.max_new_tokens} fills the context of {min(bounds)} tokens")
    if not options.truncate:
        raise UserError(
            f"the prompt has {len(ids)} tokens; the context of {min(bounds)} leaves {room} beside "
            f"--max_new_tokens={options.max_new_tokens}; shorten it, or give --truncate=left or --truncate=right"
        )
    return ids[-room:] if options.truncate == "left" else ids[:room]


def _text(tokenizer: Tokenizer, made: Generated, options: Options) -> str:
    return stops.cut(tokenizer.decode(made.ids), options.stop)


def _watcher(
    tokenizer: Tokenizer, options: Options, show: Callable[[int, str], None]
) -> Callable[[list[Generated]], None]:
    """Shows what each row has more than it had."""
    shown: dict[int, int] = {}

    def watch(rows: list[Generated]) -> None:
        for row, one in enumerate(rows):
            text = tokenizer.decode(one.ids)
            ended = one.stop != "length" or len(one.ids) == options.max_new_tokens
            certain = stops.cut(text, options.stop) if ended else stops.ready(text, options.stop)
            if new := certain[shown.get(row, 0) :]:
                shown[row] = len(certain)
                show(row, new)

    return watch
