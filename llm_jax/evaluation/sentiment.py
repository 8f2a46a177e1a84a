"""Rated sentences as a two-class task in a chat: data.source=sentiment:NAME.

NAME is an asset of rated sentences ("movie-reviews", "amazon-reviews"): id, mean human rating from -4 to
4 and text, separated by tabs. The class is the rating's sign. The model is asked through the chat template
of its own tokenizer, and answers "positive" or "negative"; only the answer counts in the loss.

The split is fixed: sentences in the order of their hash, the first TEST are the test, the next VALIDATION
are held out in training, and the following TRAIN are trained on.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from llm_jax.data import assets
from llm_jax.data.corpus import Split
from llm_jax.data.rows import Packed
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig, TokenizerConfig
from llm_jax.tokenizers import Tokenizer, chat
from llm_jax.tokenizers.hub import HubTokenizer

PREFIX = "sentiment:"
TEST, VALIDATION, TRAIN = 1000, 500, 2000
ANSWERS = ("negative", "positive")
QUESTION = "Is the sentiment of the sentence positive or negative? Answer with one word."
_MARK = "\N{SYMBOL FOR NULL}"  # where a sentence goes; not in any template


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence and its class: 0 negative, 1 positive."""

    text: str
    label: int


def read(path: pathlib.Path) -> list[Sentence]:
    """The sentences of a file in the order of their hash; those rated 0 and repeated ones are left out.

    Raises:
      UserError: a line that is not id, rating and text; it is named.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        parts = line.split("\t")
        try:
            rating, text = float(parts[1]), parts[2].strip()
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}: line {number} is not an id, a rating and a text") from error
        if rating and text:
            found.setdefault(text, int(rating > 0))
    ordered = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    return [Sentence(text, found[text]) for text in ordered]


class Prompts:
    """Sentences as the ids of a chat of two turns.

    Args:
      shots: answered examples that stand before the question (few-shot prompting).

    Raises:
      UserError: a tokenizer without a chat template, or answers that begin with the same token.
    """

    def __init__(self, tokenizer: Tokenizer, shots: Sequence[Sentence] = ()):
        if not isinstance(tokenizer, HubTokenizer):
            raise UserError(f"data.source={PREFIX}... needs a tokenizer with a chat template, not {tokenizer.kind}")
        self._tokenizer = tokenizer
        messages = [{"role": "system", "content": QUESTION}]
        for shot in shots:
            messages += [{"role": "user", "content": shot.text}, {"role": "assistant", "content": ANSWERS[shot.label]}]
        # Rendered once: every rendering is a process. What a sentence says is text, whatever it looks like.
        text = chat.render(tokenizer.special, [*messages, {"role": "user", "content": _MARK}])
        head, tail = (tokenizer.encode_chat(part) for part in text.split(_MARK))
        self._head, self._tail = head, tail
        self.answers = [tokenizer.encode(answer) for answer in ANSWERS]
        self.first = tuple(ids[0] for ids in self.answers)
        if len(set(self.first)) < len(ANSWERS):
            raise UserError(f"the tokenizer gives {ANSWERS} the same first token; they cannot be told apart by it")
        self._end = [] if tokenizer.eos is None else [tokenizer.eos]

    def question(self, sentence: Sentence) -> list[int]:
        """Up to where the answer begins."""
        return [*self._head, *self._tokenizer.encode(sentence.text), *self._tail]

    def answer(self, sentence: Sentence) -> list[int]:
        """The right answer, with what ends it."""
        return [*self.answers[sentence.label], *self._end]


@dataclasses.dataclass(frozen=True)
class Examples(Packed):
    """Questions with their answers, packed into rows; the answers count.

    Attributes:
      options: the first token of each possible answer.
    """

    options: tuple[int, ...] = ()

    @property
    def most(self) -> int:
        """Examples in the fullest row."""
        return int(np.diff(self._packing.starts).max())


def examples(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], seq_len: int, options: tuple[int, ...]) -> Examples:
    """Rows of pairs of (ids of a question, ids of its answer). Raises UserError where none fits `seq_len`."""
    tokens = [i for question, answer in pairs for i in (*question, *answer)]
    mask = [counts for question, answer in pairs for counts in (*[0] * len(question), *[1] * len(answer))]
    offsets = np.cumsum([0, *(len(question) + len(answer) for question, answer in pairs)])
    num_bytes = len(pairs) * len(ANSWERS[0].encode())  # both are of one length
    return Examples(Split(np.asarray(tokens, np.int32), offsets, num_bytes, np.asarray(mask)), seq_len, options)


class Source:
    """The sentences of data.source=sentiment:NAME, in the place of `corpus.Source`."""

    def __init__(self, config: DataConfig):
        name = config.source.removeprefix(PREFIX)
        self._sentences = read(assets.path(name))
        test, held = self._sentences[:TEST], self._sentences[TEST : TEST + VALIDATION]
        self.parts = {
            "test": test,
            "validation": held,
            "train": self._sentences[TEST + VALIDATION : TEST + VALIDATION + TRAIN],
        }
        listed = json.dumps([(s.text, s.label) for s in self._sentences]).encode()
        self.sha256 = hashlib.sha256(listed).hexdigest()
        self.num_bytes = sum(len(s.text.encode()) for s in self._sentences)

    def tokenizer(self, config: TokenizerConfig) -> Tokenizer:
        raise UserError(f"data.source={PREFIX}... fine-tunes a model that can chat; name one by init_from")

    def rows(self, tokenizer: Tokenizer, part: str, seq_len: int) -> Examples:
        """The examples of "train", "validation" or "test"."""
        prompts = Prompts(tokenizer)
        pairs = [(prompts.question(s), prompts.answer(s)) for s in self.parts[part]]
        return examples(pairs, seq_len, prompts.first)

    def compressed_bits_per_byte(self) -> dict[str, float]:
        return {}
