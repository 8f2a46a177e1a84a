"""The protocol of tokenizers, and their files."""

import hashlib
import html
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from llm_jax.errors import UserError
from llm_jax.schema import attribute_names

# The special tokens of trained kinds, by id.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


class VocabularyTooLarge(UserError):
    """The text allows fewer ids than requested.

    Attributes:
      largest: returns the tokenizer with as many ids as the text allows.
    """

    def __init__(self, message: str, largest: "Callable[[], Tokenizer]"):
        super().__init__(message)
        self.largest = largest


class Tokenizer(Protocol):
    """Converts text to token ids and back. Immutable: its files determine it, and `base.digest` is their hash.

    Attributes:
      kind: the name it is registered under (`tokenizers.KINDS`).
      exact: whether decode(encode(text)) == text for every text that encodes to UTF-8.
      vocab_size: ids run from 0 to vocab_size - 1, special tokens included.
      bos, eos: ids at the beginning and the end of a document; None if the vocabulary has no such id.
        Text never encodes to them, and they decode to nothing.
      unk: id of text that the vocabulary cannot represent; None if it represents all text.
    """

    kind: ClassVar[str]
    exact: ClassVar[bool]

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def eos(self) -> int | None: ...

    @property
    def unk(self) -> int | None: ...

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Trains a tokenizer with at most `vocab_size` ids.

        Args:
          texts: training text; may be kept in memory, so the caller must limit its size.

        Raises:
          UserError: `vocab_size` is too small; `VocabularyTooLarge` if the text does not allow that many ids.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS, in a new list. Raises UserError for unpaired surrogates."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens decode to nothing, invalid UTF-8 to U+FFFD."""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each id of `encode(text)`, the range of bytes of the UTF-8 of `text` that it covers: (begin, end)."""

    def piece(self, index: int) -> str:
        """The printable form of an id."""

    def files(self) -> dict[str, bytes]:
        """The files that determine the tokenizer, by name; `from_files` is the inverse."""

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        """The tokenizer that `files` determine. Raises UserError for files that cannot be read."""


class BuiltInTokenizer:
    """Base class of the built-in tokenizers: their `repr`, and errors that translate names of other libraries."""

    if not TYPE_CHECKING:  # for which every attribute would exist

        def __repr__(self) -> str:
            return (
                f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in _described(self).items())})"
            )

        def _repr_html_(self) -> str:
            rows = (f"<tr><th>{name}</th><td>{html.escape(str(v))}</td></tr>" for name, v in _described(self).items())
            return f"<table><caption>{type(self).__name__}</caption>{''.join(rows)}</table>"

        def __len__(self) -> int:
            return self.vocab_size

        def __getattr__(self, name: str) -> Any:
            raise attribute_names.attribute_error(type(self).__name__, name)

        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            raise TypeError(
                f"{type(self).__name__} is not callable; tokenizer.encode(TEXT) returns the ids of one text, without "
                "special tokens, and llm_jax.tokenizers.prompt(tokenizer, TEXT) with the BOS of the tokenizer"
            )


def _described(tokenizer: Any) -> dict[str, Any]:
    """The properties of a tokenizer that its display shows."""
    special = {name: getattr(tokenizer, name) for name in ("bos", "eos", "unk")}
    hashed = {"sha256": f"{digest(tokenizer)[:12]}..."}
    return {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, **special, **hashed}


@runtime_checkable
class PretrainedTokenizer(Tokenizer, Protocol):
    """A tokenizer that is loaded from the files of a checkpoint and cannot be trained.

    Attributes:
      special: names of special tokens ("bos_token", ...), "chat_template" (a text, or {name: text} where there are
        several), "add_bos_token" (whether text begins with BOS), and "eos_ids", where more ids than EOS end a text.
      regular_size: number of ids without those of added tokens.
      special_ids: "bos_token_id", "eos_token_id", ... as in config.json.
      end_token_ids: ids of special tokens whose names say that they end a text or a turn (`special.ids_of_end_tokens`).
    """

    special: dict[str, Any]

    @property
    def regular_size(self) -> int: ...

    @property
    def special_ids(self) -> dict[str, int]: ...

    @property
    def end_token_ids(self) -> list[int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat, in which names of special tokens become their ids."""

    def chat_offsets(self, text: str) -> list[tuple[int, int]]:
        """For each id of `encode_chat(text)`, the range of characters of `text` that it covers: (begin, end)."""

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The metadata of a GGUF file; ids up to `vocab_size` that the vocabulary lacks are marked as unused.

        Raises:
          UserError: GGUF cannot represent such a tokenizer.
        """


def consecutive_spans(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive spans (begin, end) of the given lengths, from 0."""
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def byte_spans(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Converts spans of characters of `text` to spans of bytes of its UTF-8."""
    places = [0, *itertools.accumulate(len(c.encode()) for c in text)]
    return [(places[begin], places[end]) for begin, end in spans]


def digest(tokenizer: Tokenizer) -> str:
    """sha256 of kind and files, in hex: two tokenizers are the same if and only if it is equal."""
    h = hashlib.sha256(tokenizer.kind.encode())
    for name, content in sorted(tokenizer.files().items()):
        h.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return h.hexdigest()


def document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a complete document: BOS, the text, EOS, as far as the vocabulary has them."""
    ids = prompt(tokenizer, text)
    if tokenizer.eos is not None:
        ids.append(tokenizer.eos)
    return ids


def prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a prompt: BOS, if the vocabulary has it, then the text."""
    ids = tokenizer.encode(text)
    return ids if tokenizer.bos is None else [tokenizer.bos, *ids]


def eos_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end generation, EOS first.

    Besides EOS, these are the ids listed in the files of a pretrained tokenizer; if the files list none, the special
    tokens whose names indicate the end of a text or a turn, such as <|im_end|>.
    """
    other_ids: Sequence[int] = ()
    if isinstance(tokenizer, PretrainedTokenizer):
        other_ids = tokenizer.special.get("eos_ids") or tokenizer.end_token_ids
    return list(dict.fromkeys([*([] if tokenizer.eos is None else [tokenizer.eos]), *other_ids]))


def save(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Writes the tokenizer's files and `kind.json` into `directory`, which is created if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in all_files(tokenizer).items():
        (directory / name).write_bytes(content)


def all_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files, and `kind.json` with the hash that `tokenizers.load` verifies."""
    record = json.dumps({"kind": tokenizer.kind, "sha256": digest(tokenizer)}) + "\n"
    return tokenizer.files() | {"kind.json": record.encode()}
