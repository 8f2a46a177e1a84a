"""Text that ends a text, and text that is ready to be shown while more is coming."""

from collections.abc import Sequence

from llm_jax.decoding.loop import Stop
from llm_jax.errors import UserError
from llm_jax.tokenizers.base import Tokenizer

_BROKEN = "�"  # what decoders make of a character whose bytes are not all there


def finder(tokenizer: Tokenizer, stops: Sequence[str], max_new_tokens: int) -> Stop | None:
    """What tells the loop where a row ends: after the token that completes a stop string, wherever tokens cut it.

    Raises:
      UserError: a stop string that the vocabulary cannot write, or that is longer than any answer.
    """
    if not stops:
        return None
    for text in stops:
        ids = tokenizer.encode(text)
        if text not in tokenizer.decode(ids):
            raise UserError(f"--stop={text!r} can never come: the tokenizer cannot write it")
        if len(ids) > max_new_tokens and len(text) > max_new_tokens * _longest(tokenizer):
            raise UserError(f"--stop={text!r} can never come: it does not fit in --max_new_tokens={max_new_tokens}")

    def find(row: int, ids: list[int]) -> int | None:
        def there(count: int) -> bool:
            text = tokenizer.decode(ids[:count])
            return any(s in text for s in stops)

        if not there(len(ids)):
            return None
        low, high = 0, len(ids)  # not there in the first `low`, there in the first `high`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if there(middle) else (middle, high)
        return high

    return find


def possible(tokenizer: Tokenizer, stops: Sequence[str], max_new_tokens: int) -> tuple[str, ...]:
    """Those of a task's stop strings that so short an answer has room for."""
    return tuple(s for s in stops if s and len(tokenizer.encode(s)) <= max_new_tokens)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is whole first, however the text came; of several, the longest."""
    places = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return text[: min(places)[1]] if places else text


def ready(text: str, stops: Sequence[str]) -> str:
    """As much of a growing text as no later token changes.

    Held back: a last character whose bytes are not all there, and what may be the beginning of a stop string.
    """
    shown = cut(text, stops)
    if len(shown) < len(text):
        return shown
    shown = shown[: len(shown.rstrip(_BROKEN))] if len(shown) - len(shown.rstrip(_BROKEN)) < 4 else shown[:-3]
    begun = (n for s in stops for n in range(min(len(s) - 1, len(shown)), 0, -1) if shown.endswith(s[:n]))
    return shown[: len(shown) - max(begun, default=0)]


def _longest(tokenizer: Tokenizer) -> int:
    """Characters of the longest token; a part of one counts as one."""
    return max(len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
