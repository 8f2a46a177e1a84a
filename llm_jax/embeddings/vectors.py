"""A table of word vectors, and word2vec's text and binary formats, which gensim and others read."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from llm_jax.errors import UserError
from llm_jax.files import new_file


@dataclasses.dataclass(frozen=True)
class WordVectors:
    """A vector for each word.

    Attributes:
      words: usually the most frequent first.
      matrix: float32 (words, width).
      index: the row of each word; the first one of a repeated word.
    """

    words: tuple[str, ...]
    matrix: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {word: i for i, word in reversed(list(enumerate(self.words)))})

    index: dict[str, int] = dataclasses.field(init=False, compare=False, repr=False)

    def __contains__(self, word: str) -> bool:
        return word in self.index

    def __getitem__(self, word: str) -> np.ndarray:
        """The vector of a word, float32 (width,). Raises UserError for an unknown word."""
        if word not in self.index:
            raise UserError(f"'{word}' is not among the {len(self.words):,} words of these vectors")
        return self.matrix[self.index[word]]

    def directions(self) -> np.ndarray:
        """The vectors scaled to length 1, float32 (words, width); a zero vector stays zero."""
        return self.matrix / np.maximum(np.linalg.norm(self.matrix, axis=1, keepdims=True), 1e-12)


def finite(matrix: np.ndarray, cure: str) -> np.ndarray:
    """The matrix (words, width) itself. Raises UserError, with the cure, if training diverged."""
    if not np.isfinite(matrix).all():
        raise UserError(f"the vectors diverged; {cure}")
    return matrix


def save(vectors: WordVectors, path: pathlib.Path) -> None:
    """Writes word2vec's binary format if the name ends in .bin, else its text format.

    Raises:
      UserError: the file cannot be written, or a word contains a space.
    """
    if bad := next((w for w in vectors.words if not w or any(c.isspace() for c in w)), None):
        raise UserError(f"the word {bad!r} cannot be written: a space ends a word in this format")
    with new_file(path) as file:
        file.write(f"{len(vectors.words)} {vectors.matrix.shape[1]}\n".encode())
        for word, row in zip(vectors.words, vectors.matrix.astype("<f4"), strict=True):
            numbers = row.tobytes() if path.suffix == ".bin" else " ".join(map(str, row)).encode()
            file.write(word.encode() + b" " + numbers + b"\n")


def load(path: pathlib.Path) -> WordVectors:
    """Reads a file in word2vec's binary (.bin) or text format.

    Raises:
      UserError: the file cannot be read or has another format.
    """
    try:
        content = path.read_bytes()
        head, _, body = content.partition(b"\n")
        count, width = map(int, head.split())
        read = _binary if path.suffix == ".bin" else _text
        words, matrix = read(body, count, width)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: not word vectors in word2vec's {path.suffix or 'text'} format ({error})") from error
    return WordVectors(tuple(words), matrix)


def _text(body: bytes, count: int, width: int) -> tuple[Sequence[str], np.ndarray]:
    lines = [line.rstrip(b"\r").split(b" ") for line in body.split(b"\n") if line]
    if len(lines) != count or any(len(line) != width + 1 for line in lines):
        raise ValueError(f"expected {count} lines of a word and {width} numbers")
    return [line[0].decode() for line in lines], np.array([line[1:] for line in lines], np.float32).reshape(-1, width)


def _binary(body: bytes, count: int, width: int) -> tuple[Sequence[str], np.ndarray]:
    if count * (4 * width + 2) > len(body):
        raise ValueError(f"too short for {count} words of {width} numbers")
    words, matrix, place = [], np.empty((count, width), np.float32), 0
    for i in range(count):
        end = body.index(b" ", place)
        words.append(body[place:end].lstrip(b"\n").decode())
        place = end + 1 + 4 * width
        matrix[i] = np.frombuffer(body, "<f4", width, end + 1)
    return words, matrix
