"""Classification data: texts with a label, as questions that the model answers with one of a few choices.

A record (a line of JSON lines, a row of CSV, TSV, Parquet or a data set of `datasets`) has a text and a label;
`data.labelled` names their fields. The label is one of `choices`, the index of one, or a rating, which `thresholds`
divide. Records without text, and texts that occur again, are left out.

The splits depend on the texts, not on their order. The examples are sorted by the SHA-256 of the text; the first are
the test split, the next the validation split, and the rest the training split.

Where the tokenizer has a chat template, an example is a conversation: the question is the system message, the text the
user's and the answer the assistant's. Otherwise it is `template`, a space and the answer. Only the answer is a target.
"""

import bisect
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llm_jax import tokenizers
from llm_jax.data import catalog as catalog_lib
from llm_jax.data import corpus as corpus_lib
from llm_jax.data import shared_cache, sources
from llm_jax.data.catalog import Catalog
from llm_jax.data.chat_text import ChatText, Conversation, Message, templated_texts
from llm_jax.data.corpus import Corpus, Split
from llm_jax.data.encode import plain_example, templated_example
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig, LabelledConfig, TokenizerConfig
from llm_jax.tokenizers import Tokenizer

_FORMAT = 2  # of the token cache; part of its key
_MARK = "\N{SYMBOL FOR NULL}"  # placeholder of the text while the chat template is rendered


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text and its label, an index into the choices."""

    text: str
    label: int


def read(catalog: Catalog, options: LabelledConfig) -> tuple[list[LabelledText], tuple[str, ...]]:
    """(examples in the order of the hash of their text, choices) of a catalog whose documents are records.

    Raises:
      UserError: a record without the fields or with an unknown label, which is named; fewer than two choices.
    """
    if options.thresholds and len(options.thresholds) + 1 != len(options.choices):
        raise UserError(
            f"config key 'data.labelled.thresholds' has {len(options.thresholds)} values, which divide "
            f"{len(options.thresholds) + 1} choices; 'data.labelled.choices' has {len(options.choices)}"
        )
    if list(options.thresholds) != sorted(set(options.thresholds)):
        raise UserError(f"config key 'data.labelled.thresholds' is {options.thresholds}; expected ascending numbers")
    if len(set(options.choices)) < len(options.choices):
        raise UserError(f"config key 'data.labelled.choices' is {options.choices}; expected different choices")
    labels: dict[str, tuple[Any, int]] = {}
    for index, document in enumerate(catalog.texts(np.arange(len(catalog)))):
        text, label = _fields(document, options, catalog, index)
        if text and not (options.thresholds and _rating(label, catalog, index) in options.thresholds):
            labels.setdefault(text, (label, index))
    choices = options.choices or _choices(label for label, _ in labels.values())
    if len(choices) < 2:
        raise UserError(
            f"the labels of {', '.join(catalog.names)} are {', '.join(choices) or 'none'}; expected at least two "
            "different labels; see data.labelled.label_field and data.labelled.choices"
        )
    ordered = sorted(labels, key=lambda text: hashlib.sha256(text.encode()).digest())
    return [LabelledText(text, _index(*labels[text], catalog, options, choices)) for text in ordered], choices


def _fields(document: str, options: LabelledConfig, catalog: Catalog, index: int) -> tuple[str, Any]:
    try:
        record = json.loads(document)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(
            f"{catalog.name(index)}: not a record; data.kind=labelled reads JSON lines, CSV, TSV or Parquet"
        )
    for option in ("text_field", "label_field"):
        if (name := getattr(options, option)) not in record:
            raise UserError(
                f"{catalog.name(index)}: no field '{name}'; it has {', '.join(record) or 'none'}. Set "
                f"data.labelled.{option}"
            )
    text = record[options.text_field]
    if not isinstance(text, str | None):
        raise UserError(f"{catalog.name(index)}: the field '{options.text_field}' is {text!r}; expected text")
    label = record[options.label_field]
    if text and (label is None or label == ""):
        raise UserError(f"{catalog.name(index)}: the field '{options.label_field}' has no label; remove the record")
    return (text or "").strip(), label


def _rating(label: Any, catalog: Catalog, index: int) -> float:
    try:
        rating = float(label)
        if not math.isfinite(rating):
            raise ValueError("not finite")
        return rating
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{catalog.name(index)}: the label is {label!r}; expected a number, which data.labelled.thresholds divide"
        ) from error


def _choices(labels: Iterable[Any]) -> tuple[str, ...]:
    """The labels in the data: numbers in numerical order, other labels in alphabetical order."""
    names = {_name(label) for label in labels}
    if all(name.lstrip("-").isdigit() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _name(label: Any) -> str:
    """A label as text. 1.0 becomes "1": tables with missing values store integers as floats."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label.strip() if isinstance(label, str) else json.dumps(label)


def _index(label: Any, index: int, catalog: Catalog, options: LabelledConfig, choices: tuple[str, ...]) -> int:
    if options.thresholds:
        return bisect.bisect(options.thresholds, _rating(label, catalog, index))
    name = _name(int(label) if isinstance(label, bool) and _name(label) not in choices else label)
    if name in choices:
        return choices.index(name)
    if name.isdecimal() and int(name) < len(choices):
        return int(name)
    raise UserError(
        f"{catalog.name(index)}: the label is {label!r}; expected one of {', '.join(choices)}, or its index from 0 on"
    )


class Prompts:
    """Labelled texts as token ids of a question and an answer. The whole text of an example is tokenized at once.

    Args:
      shots: examples with their answers that come before the question (few-shot prompting).

    Attributes:
      answers: token ids of each choice, with the tokens that end an answer.

    Raises:
      UserError: a template without {text}, or two choices with the same token ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: LabelledConfig,
        choices: tuple[str, ...],
        shots: Sequence[LabelledText] = (),
    ):
        self._tokenizer: Any = tokenizer
        question, (before, after) = _prompt_parts(options, choices)
        special = getattr(tokenizer, "special", {})
        self._chat = bool(special.get("chat_template"))
        if self._chat:  # the template is rendered once, as rendering starts a process
            solved = [(shot.text, choices[shot.label]) for shot in shots]
            self._texts = _rendered(special, question, solved, choices)
        else:
            begin = "".join(f"{before}{shot.text}{after} {choices[shot.label]}\n\n" for shot in shots)
            head = f"{begin}{before}{_MARK}{after}"
            self._texts = [ChatText(f"{head} {c}", [(len(head), len(head) + 1 + len(c))]) for c in choices]
        questions, answers = zip(*(self._split("text", text) for text in self._texts), strict=True)
        self.answers = tuple(map(tuple, answers))
        if len(set(self.answers)) < len(choices):
            raise UserError(f"the tokenizer has the same ids for two of the choices {', '.join(choices)}")
        if any(ids != questions[0] for ids in questions):
            raise UserError(
                "config key 'data.labelled.template': the tokenizer joins the end of the question with the answer; "
                "end it with a line break"
            )

    def question(self, example: LabelledText) -> list[int]:
        """The token ids before the answer."""
        return self.encode(example)[0]

    def answer(self, example: LabelledText) -> list[int]:
        """The token ids of the correct answer, with the tokens that end it."""
        return self.encode(example)[1]

    def encode(self, example: LabelledText) -> tuple[list[int], list[int]]:
        """Returns the token ids before the answer, and the token ids of the correct answer.

        Raises:
          UserError: the text changes the ids of the answer, so that they are not in `answers`.
        """
        question, answer = self._split(example.text, self._texts[example.label])
        if tuple(answer) != self.answers[example.label]:
            raise UserError(
                f"config key 'data.labelled.template': after the text {example.text[:40]!r} the tokenizer joins the "
                "question with the answer; end the template with a line break"
            )
        return question, answer

    def _split(self, text: str, template: ChatText) -> tuple[list[int], list[int]]:
        """`encode` with `_MARK` in the template replaced by `text`."""
        full_text = template.text.replace(_MARK, text)
        begin, end = (len(full_text) - (len(template.text) - place) for place in template.answers[-1])
        if not self._chat:
            ids, mask, _, _ = plain_example(self._tokenizer, [ChatText(full_text, [(begin, end)])])
        elif self._is_plain(text):
            ids, mask, _, _ = templated_example(self._tokenizer, ChatText(full_text, [(begin, end)]))
        else:  # names of special tokens in a text stay text, so the text is encoded by itself
            head, *middle, tail = template.text.split(_MARK)
            place = begin - (len(full_text) - len(tail))
            last = templated_example(self._tokenizer, ChatText(tail, [(place, place + end - begin)]))
            within = self._tokenizer.encode(text)
            before = [i for part in (head, *middle) for i in (*self._tokenizer.encode_chat(part), *within)]
            ids, mask = [*before, *last.ids], bytes(len(before)) + last.mask
        return _ended(list(ids), mask.index(1), self._tokenizer.eos)

    def _is_plain(self, text: str) -> bool:
        """Whether a text contains no name of a special token."""
        return self._tokenizer.encode_chat(text) == self._tokenizer.encode(text)


def _ended(ids: list[int], split: int, eos: int | None) -> tuple[list[int], list[int]]:
    """(question, answer): `ids` divided at `split`; the answer ends with EOS, which is added if it has none."""
    question, answer = ids[:split], ids[split:]
    if eos is None:
        return question, answer
    return question, [*answer[: answer.index(eos) if eos in answer else len(answer)], eos]


def _prompt_parts(options: LabelledConfig, choices: tuple[str, ...]) -> tuple[str, tuple[str, str]]:
    """(the question, the prompt before and after the text). Raises UserError for a template without {text}."""
    question = options.question.replace("{choices}", ", ".join(choices))
    if options.template.count("{text}") != 1:
        raise UserError(f"config key 'data.labelled.template' is {options.template!r}; expected {{text}} in it, once")
    before, after = (part.replace("{question}", question) for part in options.template.split("{text}"))
    return question, (before, after)


def _rendered(
    special: dict[str, Any], question: str, shots: Sequence[tuple[str, str]], choices: Sequence[str]
) -> list[ChatText]:
    """Returns, for each choice, the conversation with this answer and `_MARK` as the text."""
    turns: list[Message] = []
    for text, answer in shots:
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": _MARK})

    def texts(messages: list[Message]) -> list[ChatText]:
        conversations = [
            Conversation(
                [*messages, {"role": "assistant", "content": choice}], len(messages), False, None, None, choice
            )
            for choice in choices
        ]
        return [text for (text,) in templated_texts(special, conversations)]

    try:
        return texts([{"role": "system", "content": question}, *turns])
    except UserError:  # some templates refuse system messages
        first = {"role": "user", "content": f"{question}\n\n{turns[0]['content']}"}
        return texts([first, *turns[1:]])


def encode(examples: Sequence[LabelledText], prompts: Prompts, choices: tuple[str, ...]) -> Split:
    """The examples as a split in memory: tokens int32 (tokens,), of which the answers count."""
    tokens, mask, lengths = [], [], []
    for example in examples:
        question, answer = prompts.encode(example)
        tokens += [*question, *answer]
        mask += [0] * len(question) + [1] * len(answer)
        lengths.append(len(question) + len(answer))
    num_bytes = sum(len(choices[example.label].encode()) for example in examples)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return Split(np.asarray(tokens, np.int32), offsets, num_bytes, np.asarray(mask, np.uint8), None, prompts.answers)


class LabelledSource:
    """The examples of a data config of the kind "labelled"; it is used like `corpus.Source`.

    Args:
      whole: whether all examples are in the test and validation splits, for evaluation only.

    Attributes:
      choices: the possible answers.
      parts: examples of the splits "train", "validation" and, if there is one, "test".
      sha256: of all examples.
      num_bytes: of all texts, in UTF-8.
    """

    def __init__(self, config: DataConfig, whole: bool = False):
        if not all(map(math.isnan, sources.weights(config.source).values())):
            raise UserError(
                f"data.source={config.source}: weights have no effect with data.kind=labelled; leave them out"
            )
        self.config = config
        self.cache = shared_cache.directory(config.cache_dir)
        catalog, scans = catalog_lib.read(config.source, "", config.cache_dir, config.workers, form=config.format)
        self._examples, self.choices = read(catalog, config.labelled)
        self.parts = {"train": [], "validation": self._examples, "test": self._examples} if whole else self._divided()
        for scan in scans:
            scan.write()
        self.sha256 = _digest([(e.text, e.label) for e in self._examples])
        self.num_bytes = sum(len(e.text.encode()) for e in self._examples)
        options = _digest([dataclasses.asdict(config.labelled), config.validation_fraction, self.choices, whole])
        self._key = f"labelled-{self.sha256[:24]}-{options[:12]}"

    def _divided(self) -> dict[str, list[LabelledText]]:
        options, examples = self.config.labelled, self._examples
        test = _size(options.test_size, len(examples))
        size = options.validation_size or self.config.validation_fraction
        validation = _size(size, len(examples) - test)
        if test + validation >= len(examples):
            raise UserError(
                f"data.source={self.config.source} has {len(examples):,} examples; {test:,} in the test split and "
                f"{validation:,} in the validation split leave none; lower data.labelled.test_size or validation_size"
            )
        held = test + validation
        train = examples[held : held + options.train_size] if options.train_size else examples[held:]
        splits = {"train": train, "validation": examples[test:held]}
        return splits | ({"test": examples[:test]} if test else {})

    def tokenizer(self, config: TokenizerConfig, at_most: bool = False) -> Tokenizer:
        """The tokenizer of a config, trained on the prompts and answers of the training split (once).

        Args:
          at_most: see `corpus.trained_tokenizer`.
        """
        _, (before, after) = _prompt_parts(self.config.labelled, self.choices)
        texts = (f"{before}{e.text}{after} {self.choices[e.label]}" for e in self.parts["train"])
        return corpus_lib.trained_tokenizer(self.config.cache_dir, self._key, config, texts, at_most)

    def corpus(self, tokenizer: Tokenizer) -> Corpus:
        """The splits as tokens, from the cache if they are in it.

        Raises:
          UserError: see `Prompts`; a cache that cannot be written or is damaged.
        """
        name = f"{self._key}-{tokenizers.digest(tokenizer)[:24]}-{corpus_lib.FORMAT}.{_FORMAT}"
        directory = self.cache / "corpora" / name
        if not directory.exists():
            prompts = Prompts(tokenizer, self.config.labelled, self.choices)
            with corpus_lib.new_cache(directory) as partial:
                for part, examples in self.parts.items():
                    corpus_lib.write_split(partial / part, encode(examples, prompts, self.choices))
                (partial / "choices.json").write_text(json.dumps(prompts.answers))
        splits = {part: self._open(directory, part) for part in self.parts}
        return Corpus(splits["train"], splits["validation"], self.sha256, test=splits.get("test"))

    def _open(self, directory: pathlib.Path, part: str) -> Split:
        try:
            choices = tuple(tuple(ids) for ids in json.loads((directory / "choices.json").read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{directory}: the token cache is damaged ({error}); delete this directory") from error
        return dataclasses.replace(corpus_lib.open_split(directory / part)[0], choices=choices)

    def compressed_bits_per_byte(self) -> dict[str, float]:
        """Returns {}, because bits per byte of answers are not comparable with compressed text."""
        return {}


def _size(size: float, total: int) -> int:
    """Converts a number of examples, or a share below 1, to a number of examples; a share gives at least one."""
    return int(size) if size >= 1 or not size else max(1, round(size * total))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
