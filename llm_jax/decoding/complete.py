"""Continues texts with the decoding method of the options; the function behind the command `generate`."""

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_jax import tokenizers, weights
from llm_jax.decoding import beam, contrastive, loop, speculative, stops
from llm_jax.decoding.continuations import Generated
from llm_jax.decoding.options import PROMPT, DecodingOptions
from llm_jax.decoding.prefix import PrefixCache
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.schema import other_libraries
from llm_jax.tokenizers import detokenize
from llm_jax.tokenizers.base import Tokenizer
from llm_jax.tokenizers.detokenize import Detokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
      text: the generated text, without the prompt, EOS and stop string.
      generated: its token ids and their log-probabilities.
      score: log-probability / length^penalty of a beam; None for other methods.
    """

    text: str
    generated: Generated
    score: float | None = None


@functools.partial(other_libraries.explain_unknown_keywords, within=other_libraries.within_options(DecodingOptions))
def complete(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    options: DecodingOptions = DecodingOptions(),  # noqa: B008  (frozen)
    *,
    draft: tuple[Transformer, Any] | None = None,
    show: Callable[[int, str], None] | None = None,
    cancel: Callable[[], Any] | None = None,
    prefix: PrefixCache | None = None,
) -> list[list[Completion]]:
    """Generates `options.n` continuations of every prompt; beams are sorted, best first.

    Args:
      params: in the layout of `model.config`.
      prompts: texts, or lists of token ids.
      draft: the draft model of `options.draft` and its parameters; it has the same tokenizer.
      show: called with (row, new text) when more text of a row is final; row i * n + j is continuation j of prompt i.
        The concatenated texts of a row equal the text of its completion.
      cancel: with `show`: called after every token; if it returns a true value, generation stops.
      prefix: for one continuation of one prompt: the cache of the previous request. The common prefix of both requests
        is not prefilled again, and the cache is updated. Methods that do not sample token by token ignore it.

    Raises:
      UserError: options are out of range, contradict each other, or are not supported by the model.
    """
    if isinstance(prompts, str) or any(not isinstance(prompt, str | Sequence) for prompt in prompts):
        raise UserError("prompts is a single prompt; expected a list of texts or of lists of token ids")
    vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    options.check(vocab)
    if not model.config.causal:
        raise UserError("a bidirectional model (model.causal=False) does not continue text")
    note_special(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)])
    ids = [fit_to_context(model, prompt_ids(tokenizer, prompt), options) for prompt in prompts]
    note_length(model, ids, options)
    model, params = loop.unrolled(model, params)
    common: dict[str, Any] = {"eos": eos_ids(tokenizer, options), "vocab_size": vocab}
    if options.method == "beam":
        if show:
            raise UserError("--beams has no text before the search ends; omit --stream")
        common["stop"] = stops.stop_fn(tokenizer, options.stop, options.max_new_tokens, ids)
        completions = []
        for prompt, beams in zip(ids, beam.search(model, params, ids, options, **common), strict=True):
            decode = detokenize.after(tokenizer, prompt)
            completions.append(
                [
                    Completion(stops.truncate_at_stop(decode.text(b.generated.ids), options.stop), b.generated, b.score)
                    for b in beams
                ]
            )
        return completions
    rows = [prompt for prompt in ids for _ in range(options.n)]
    common["stop"] = stops.stop_fn(tokenizer, options.stop, options.max_new_tokens, rows)
    detokenizers = [detokenize.after(tokenizer, prompt) for prompt in ids for _ in range(options.n)]
    if show:
        common["watch"] = _watcher(detokenizers, options, show, cancel)
    common["max_new_tokens"] = options.max_new_tokens
    if options.method == "contrastive":
        generated = contrastive.search(
            model, params, ids, options.sampler(), k=options.top_k, alpha=options.contrastive, **common
        )
    else:
        params = weights.repeat_rows(params, options.n)
        common["seeds"] = [(options.seed + i) % 2**32 for i in range(len(rows))]
        if options.method == "speculative":
            if options.draft != PROMPT and draft is None:
                raise UserError(f"--draft={options.draft} needs the draft model as the argument `draft`")
            draft = None if options.draft == PROMPT else draft
            generated = speculative.generate(
                model, params, rows, options.sampler(), draft, options.draft_tokens, **common
            )
        else:
            common |= {"alternatives": options.alternatives, "prefix": prefix}
            generated = loop.generate(model, params, rows, options.sampler(all_filters=True), **common)
    flat = [
        Completion(stops.truncate_at_stop(decode.text(row.ids), options.stop), row)
        for decode, row in zip(detokenizers, generated, strict=True)
    ]
    return [flat[i : i + options.n] for i in range(0, len(flat), options.n)]


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a prompt.

    Raises:
      UserError: the prompt is empty and the tokenizer does not begin texts with BOS, or it is a list of messages or of
        other values that are not ids.
    """
    if not isinstance(prompt, str) and any(isinstance(part, Mapping) for part in prompt):
        raise UserError(
            "a prompt is a list of messages; expected text or token ids, such as "
            "llm_jax.apply_chat_template(tokenizer, messages, add_generation_prompt=True)"
        )
    try:
        ids = tokenizers.prompt(tokenizer, prompt) if isinstance(prompt, str) else [operator.index(i) for i in prompt]
    except TypeError as error:
        raise UserError(f"a prompt is {str(prompt)[:60]!r}; expected text, or a list of token ids") from error
    if not ids:
        raise UserError("the prompt is empty, and this tokenizer does not begin texts with BOS; give some text")
    return ids


def eos_ids(tokenizer: Tokenizer, options: DecodingOptions) -> list[int]:
    """The token ids that end a text."""
    return [] if options.ignore_eos else list(dict.fromkeys([*options.eos, *tokenizers.eos_ids(tokenizer)]))


def fit_to_context(model: Transformer, ids: list[int], options: DecodingOptions) -> list[int]:
    """Returns the prompt, truncated on the side `options.truncate` so that the continuation fits into the context.

    Raises:
      UserError: an id outside the model's vocabulary, or a too long prompt without `options.truncate`.
    """
    vocab = model.config.vocab_size
    if any(not 0 <= i < vocab for i in ids):
        raise UserError(f"the prompt has a token outside the model's vocabulary (its ids end at {vocab - 1})")
    bounds = [b for b in (options.context, positions.make(model.config).max_length()) if b]
    available = min(bounds, default=len(ids) + options.max_new_tokens) - options.max_new_tokens
    if len(ids) <= available:
        return ids
    if available < 1:
        raise UserError(
            f"--max_new_tokens={options.max_new_tokens} fills the context of {min(bounds)} tokens and leaves no room "
            "for the prompt; lower it"
        )
    if not options.truncate:
        raise UserError(
            f"the prompt has {len(ids)} tokens; the context of {min(bounds)} tokens leaves {available} for it with "
            f"--max_new_tokens={options.max_new_tokens}; shorten it, or give --truncate=left or --truncate=right"
        )
    return ids[-available:] if options.truncate == "left" else ids[:available]


def note_length(model: Transformer, prompts: Sequence[Sequence[int]], options: DecodingOptions) -> None:
    """Prints a note on stderr, once, if prompt and continuation may exceed the maximum length of the model.

    The maximum length is `model.position.max_length`, in other software max_position_embeddings or context_length. The
    note concerns rotary positions, which can be computed beyond it. For learned positions, `fit_to_context` raises an
    error, and the other schemes do not use `max_length`.
    """
    position = model.config.position
    longest = max(map(len, prompts), default=0)
    if position.kind != "rope" or longest + options.max_new_tokens <= position.max_length:
        return
    _print_once(
        f"note: prompt and max_new_tokens={options.max_new_tokens} may exceed the {position.max_length:,} positions "
        "of the model (max_position_embeddings, here model.position.max_length); text beyond them is often worse"
    )


def note_unknown(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Prints a line on stderr, once, that names the parts of texts for which the vocabulary has no token."""
    if tokenizer.unk is None or tokenizer.unk in (tokenizer.bos, tokenizer.eos):
        return
    unknown: dict[str, None] = {}
    for text in texts:
        encoded = text.encode()
        pairs = zip(tokenizer.encode(text), tokenizer.spans(text), strict=True)
        unknown |= {encoded[a:b].decode(errors="replace"): None for token, (a, b) in pairs if token == tokenizer.unk}
    if unknown:
        shown = ", ".join(map(repr, list(unknown)[:8])) + (" and others" if len(unknown) > 8 else "")
        _print_once(f"note: the tokenizer has no token for {shown} of the prompt; the model sees its unknown token")


def note_special(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Prints a line on stderr, once, if texts contain the name of a special token, which `encode` reads as text."""
    if not isinstance(tokenizer, tokenizers.PretrainedTokenizer):
        return
    for text in texts:
        pairs = zip(tokenizer.encode_chat(text), tokenizer.encode(text), strict=False)
        name = next((tokenizer.piece(special) for special, plain in pairs if special != plain), "")
        if name and name in text:
            _print_once(
                f"note: {name!r} in the prompt is read as text, not as a special token; generate --chat and "
                "llm_jax.apply_chat_template write special tokens, and tokenizer.encode_chat(TEXT) reads them"
            )
            return


@functools.cache
def _print_once(note: str) -> None:
    print(note, file=sys.stderr)


def _watcher(
    detokenizers: Sequence[Detokenizer],
    options: DecodingOptions,
    show: Callable[[int, str], None],
    cancel: Callable[[], Any] | None,
) -> Callable[[list[Generated]], Any]:
    """Returns a `watch` function for the loop that passes the new text of each row to `show` as soon as it is final."""
    shown = [0] * len(detokenizers)  # characters of each row

    def watch(rows: list[Generated]) -> Any:
        cancelled = cancel is not None and cancel()
        for row, generated in enumerate(rows):
            decode = detokenizers[row]
            if cancelled or generated.stop != "length" or len(generated.ids) == options.max_new_tokens:
                text = stops.truncate_at_stop(decode.text(generated.ids), options.stop)
            else:
                text = stops.showable(decode.stable_prefix(generated.ids), options.stop)
            if new := text[shown[row] :]:
                shown[row] = len(text)
                show(row, new)
        return cancelled

    return watch
