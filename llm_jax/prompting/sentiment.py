"""Rated sentences as a two-class task in a chat: data.source=sentiment:NAME.

NAME is an asset of rated sentences ("movie-reviews", "amazon-reviews"): id, mean human rating from -4 to
4 and text, separated by tabs. The class is the rating's sign. The model is asked through the chat template
of its own tokenizer, and answers "positive" or "negative"; only the answer counts in the loss.

The split is fixed: sentences in the order of their hash, the first TEST are the test, the next VALIDATION
are held out in training, and the following TRAIN are trained on.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from llm_jax.config import DataConfig, TokenizerConfig
from llm_jax.data import assets
from llm_jax.data.corpus import Split
from llm_jax.data.rows import Row
from llm_jax.errors import UserError
from llm_jax.prompting import chat
from llm_jax.tokenizers import Tokenizer
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


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a row: first fit, the longest first (Johnson 1973). Those longer than `room` get none."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted((i for i, n in enumerate(lengths) if n <= room), key=lambda i: -lengths[i]):
        place = next((r for r, free in enumerate(left) if free >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(i)
        left[place] -= lengths[i]
    return rows


@dataclasses.dataclass(frozen=True)
class Examples:
    """Questions with their answers, several in a row of `seq_len` tokens; the answers count. See `data.rows`.

    Attributes:
      examples: (ids of the question, of the answer) each.
      options: the first token of each possible answer.
    """

    examples: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    seq_len: int
    options: tuple[int, ...]

    @functools.cached_property
    def _packed(self) -> list[list[int]]:
        rows = pack([len(q) + len(a) - 1 for q, a in self.examples], self.seq_len)
        if not rows:
            raise UserError(f"train.seq_len={self.seq_len} is shorter than every example; raise it")
        return rows

    def __len__(self) -> int:
        return len(self._packed)

    @property
    def full(self) -> int:
        return len(self)

    @property
    def most(self) -> int:
        """Examples in the fullest row."""
        return max(map(len, self._packed))

    @property
    def split(self) -> Split:
        """The answers as a stream, for figures per byte and per token."""
        sizes = [len(a) + 1 for _, a in self.examples]
        num_bytes = sum(len(ANSWERS[0].encode()) for _ in self.examples)
        return Split(np.zeros(sum(sizes), np.uint16), np.cumsum([0, *sizes]), num_bytes)

    def __getitem__(self, index: int) -> Row:
        parts: dict[str, list[int]] = {name: [] for name in ("inputs", "targets", "positions", "segments", "mask")}
        for segment, i in enumerate(self._packed[index] if index < len(self) else [], 1):
            question, answer = self.examples[i]
            ids = [*question, *answer]
            count = len(ids) - 1
            parts["inputs"] += ids[:-1]
            parts["targets"] += ids[1:]
            parts["positions"] += range(count)
            parts["segments"] += [segment] * count
            parts["mask"] += [0] * (len(question) - 1) + [1] * len(answer)
        room = self.seq_len
        return {name: np.pad(np.asarray(v, np.int32), (0, room - len(v))) for name, v in parts.items()}


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
        made = tuple((tuple(prompts.question(s)), tuple(prompts.answer(s))) for s in self.parts[part])
        return Examples(made, seq_len, prompts.first)

    def compressed_bits_per_byte(self) -> dict[str, float]:
        return {}
