"""A table of word vectors, and the text and binary formats of word2vec, fastText and GloVe."""

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


def check_finite(matrix: np.ndarray, hint: str) -> np.ndarray:
    """The matrix (words, width) itself. Raises UserError, with the hint, if training diverged."""
    if not np.isfinite(matrix).all():
        raise UserError(f"the vectors diverged; {hint}")
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


def load(path: pathlib.Path, encoding_errors: str = "strict") -> WordVectors:
    """Reads word2vec's binary format (.bin), or its text format, which fastText (.vec) and GloVe (no header) share.

    Args:
      encoding_errors: what becomes of bytes of a word that are not UTF-8: "strict" (an error), "replace" (by U+FFFD) or
        "ignore" (they are left out).

    Raises:
      UserError: the file cannot be read or has another format.
    """
    read = _binary if path.suffix == ".bin" else _text
    try:
        words, matrix = read(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: not word vectors in word2vec's {path.suffix or 'text'} format ({error})") from error
    try:
        return WordVectors(tuple(word.decode(errors=encoding_errors) for word in words), matrix)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the word {error.object!r} is not UTF-8; expected UTF-8, or --encoding_errors=replace or ignore"
        ) from error


def _header(line: bytes) -> tuple[int, int] | None:
    """Number of words and width, or None if a line is not two numbers."""
    fields = line.split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 and all(map(bytes.isdigit, fields)) else None


def _text(content: bytes) -> tuple[Sequence[bytes], np.ndarray]:
    # word2vec and fastText write a space after the last number.
    lines = [stripped for line in content.split(b"\n") if (stripped := line.rstrip(b" \t\r"))]
    if not lines:
        raise ValueError("it is empty")
    header = _header(lines[0])
    count, width = header or (len(lines), lines[0].count(b" "))
    # From the right: some words of GloVe's files contain spaces.
    rows = [line.rsplit(b" ", width) for line in (lines[1:] if header else lines)]
    if not width or len(rows) != count or any(len(row) != width + 1 for row in rows):
        raise ValueError(f"expected {count} lines of a word and {width} numbers")
    return [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32).reshape(-1, width)


def _binary(content: bytes) -> tuple[Sequence[bytes], np.ndarray]:
    line, _, body = content.partition(b"\n")
    if (header := _header(line)) is None:
        raise ValueError("expected the number of words and of dimensions in the first line")
    count, width = header
    if count * (4 * width + 2) > len(body):
        raise ValueError(f"too short for {count} words of {width} numbers")
    words, matrix, place = [], np.empty((count, width), np.float32), 0
    for i in range(count):
        end = body.index(b" ", place)
        words.append(body[place:end].lstrip(b"\n"))
        place = end + 1 + 4 * width
        matrix[i] = np.frombuffer(body, "<f4", width, end + 1)
    return words, matrix
