"""The one protocol of all tokenizers, and its form on disk."""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

# The special ids of the kinds that are trained here, by id.
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


class Tokenizer(Protocol):
    """Text <-> ids. Immutable: it is what its files say, and `base.digest` is their hash.

    Attributes:
      kind: the name it is registered under (`tokenizers.KINDS`).
      exact: whether decode(encode(text)) == text for every text that encodes to UTF-8.
      vocab_size: ids run from 0 to vocab_size - 1, the special ones included.
      bos, eos: what a document begins and ends with; None where the vocabulary has no such id.
        Text never encodes to them, and they decode to nothing.
      unk: what stands for text that the vocabulary cannot hold; None where it can hold all.
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
        """A tokenizer for text like `texts`, with at most `vocab_size` ids.

        `texts` may be held in memory: bound them.

        Raises:
          UserError: `vocab_size` is too small, or larger than the text allows.
        """

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS or EOS, in a new list. Raises UserError for unpaired surrogates."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids give nothing, broken UTF-8 gives U+FFFD."""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each of the ids of `text`, the bytes of its UTF-8 that it stands for: (begin, end)."""

    def piece(self, index: int) -> str:
        """How the id is shown to a reader."""

    def files(self) -> dict[str, bytes]:
        """All it is made of, by file name; `from_files` is the inverse."""

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self: ...


@runtime_checkable
class Foreign(Tokenizer, Protocol):
    """A tokenizer of other people, read from their files.

    Attributes:
      special: names of special tokens ("bos_token", ...), the chat template, whether text begins with BOS, and
        "eos_ids", where more ids than EOS end a text.
      regular_size: ids without those of added tokens.
      special_ids: "bos_token_id", "eos_token_id", ... as config.json has them.
    """

    special: dict[str, Any]

    @property
    def regular_size(self) -> int: ...

    @property
    def special_ids(self) -> dict[str, int]: ...

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat template, whose special tokens are meant."""

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The metadata of a GGUF file; ids that the vocabulary lacks up to `vocab_size` are marked unused.

        Raises:
          UserError: GGUF cannot hold such a tokenizer.
        """


def laid_out(lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Spans (begin, end) of these lengths, one after the other from 0."""
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def in_bytes(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters of `text` as spans of its UTF-8."""
    places = [0, *itertools.accumulate(len(c.encode()) for c in text)]
    return [(places[begin], places[end]) for begin, end in spans]


def digest(tokenizer: Tokenizer) -> str:
    """sha256 over kind and files: equal if and only if two tokenizers are the same."""
    h = hashlib.sha256(tokenizer.kind.encode())
    for name, content in sorted(tokenizer.files().items()):
        h.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return h.hexdigest()


def document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a whole document: BOS, the text, EOS, as far as the vocabulary has them."""
    ids = prompt(tokenizer, text)
    if tokenizer.eos is not None:
        ids.append(tokenizer.eos)
    return ids


def prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of text to be continued: BOS where the vocabulary has it, then the text."""
    ids = tokenizer.encode(text)
    return ids if tokenizer.bos is None else [tokenizer.bos, *ids]


def ends(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: EOS, and what else other people's files name (the end of a turn, say)."""
    more = tokenizer.special.get("eos_ids", ()) if isinstance(tokenizer, Foreign) else ()
    return list(dict.fromkeys([*([] if tokenizer.eos is None else [tokenizer.eos]), *more]))


def save(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Writes its files and `kind.json` into `directory` (made if need be)."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in all_files(tokenizer).items():
        (directory / name).write_bytes(content)


def all_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Its files and `kind.json`, by which `tokenizers.load` knows and checks them."""
    said = json.dumps({"kind": tokenizer.kind, "sha256": digest(tokenizer)}) + "\n"
    return tokenizer.files() | {"kind.json": said.encode()}
