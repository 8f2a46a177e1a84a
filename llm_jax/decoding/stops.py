"""Stop strings: finds where they end a text, and how much of an unfinished text can already be shown."""

from collections.abc import Sequence

from llm_jax.decoding.continuations import StopFn
from llm_jax.errors import UserError
from llm_jax.tokenizers import detokenize
from llm_jax.tokenizers.base import PretrainedTokenizer, Tokenizer


def stop_fn(
    tokenizer: Tokenizer, stops: Sequence[str], max_new_tokens: int, prompts: Sequence[Sequence[int]]
) -> StopFn | None:
    """Returns a function that ends a row after the token that completes a stop string, at any token boundaries.

    A stop string that is the name of a special token also stops at that token.

    Args:
      prompts: the ids of each row's prompt.

    Raises:
      UserError: a stop string cannot be written with the vocabulary, or is longer than any continuation.
    """
    if not stops:
        return None
    special = {index for index in (special_id(tokenizer, text) for text in stops) if index is not None}
    for text in stops:
        if special_id(tokenizer, text) is not None:
            continue
        ids = tokenizer.encode(text)
        # Some vocabularies strip a leading space, but not after other text.
        if text not in tokenizer.decode(ids) and text not in tokenizer.decode(tokenizer.encode("a" + text)):
            raise UserError(f"--stop={text!r} can never occur: the tokenizer cannot write it")
        if len(ids) > max_new_tokens and len(text) > max_new_tokens * _longest(tokenizer):
            raise UserError(f"--stop={text!r} can never occur: it does not fit in --max_new_tokens={max_new_tokens}")
    detokenizers = [detokenize.after(tokenizer, prompt) for prompt in prompts]

    def find(row: int, ids: list[int], checked: int) -> int | None:
        # All lengths are checked, because a stop string in the text of some ids may disappear with one more id.
        for count in range(checked + 1, len(ids) + 1):
            if ids[count - 1] in special:
                return count
            text = detokenizers[row].text(ids[:count])
            if any(stop in text for stop in stops):
                return count
        return None

    return find


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the special token with this name (special tokens decode to ""); None if it does not exist."""
    if isinstance(tokenizer, PretrainedTokenizer):
        ids = tokenizer.encode_chat(text)
    else:
        ids = [i for i in (tokenizer.bos, tokenizer.eos) if i is not None and tokenizer.piece(i) == text]
    return ids[0] if len(ids) == 1 and not tokenizer.decode(ids) and tokenizer.piece(ids[0]) == text else None


def fitting_stops(tokenizer: Tokenizer, stops: Sequence[str], max_new_tokens: int) -> tuple[str, ...]:
    """The stop strings that fit in `max_new_tokens` tokens."""
    return tuple(s for s in stops if s and len(tokenizer.encode(s)) <= max_new_tokens)


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Cuts a text before the stop string that ends first; if several end at the same character, before the longest."""
    matches = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]  # (end, start)
    return text[: min(matches)[1]] if matches else text


def showable(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished text that can be shown: all except an end that may be the beginning of a stop string.

    Args:
      text: text that no later token changes (`detokenize.Detokenizer.stable_prefix`).
    """
    settled = truncate_at_stop(text, stops)
    if len(settled) < len(text):
        return settled
    overlaps = (n for s in stops for n in range(min(len(s) - 1, len(text)), 0, -1) if text.endswith(s[:n]))
    return text[: len(text) - max(overlaps, default=0)]


def _longest(tokenizer: Tokenizer) -> int:
    """Characters of the longest token; a part of a character counts as one."""
    return max(len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
