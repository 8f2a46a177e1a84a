"""Text as numbers of words: counted once, then written as one array that is mapped and not read."""

import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from llm_jax.data import sources, wiki
from llm_jax.errors import UserError

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_BLANK = re.compile(r"\n\s*\n")
_LONGEST = 2**18  # characters of a paragraph; a longer one (a file may be one line) is cut between words
BREAK = -1  # between paragraphs; no window reaches across


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as words.

    Attributes:
      words: the vocabulary, the most frequent first.
      counts: int64 (words,), how often each stands in the text.
      ids: int32, the numbers of the words in their order, `BREAK` after each paragraph; words that are
        not in the vocabulary are left out.
      sha256: of the words of the text.
    """

    words: tuple[str, ...]
    counts: np.ndarray
    ids: np.ndarray
    sha256: str

    @property
    def num_words(self) -> int:
        return int(self.counts.sum())


def paragraphs(source: str) -> Iterator[list[str]]:
    """The words (lower case, no numbers) of each paragraph of the sources, separated by commas.

    A source is a text file, directory or glob, whose paragraphs end at blank lines; a Wikipedia dump
    (`*.xml`, `*.xml.bz2`, `*.xml-*.bz2`); or asset:NAME.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    for name in source.split(","):
        for file in sources.paths(name, "source"):
            for paragraph in _texts(file):
                yield [word.replace("’", "'") for word in _WORD.findall(paragraph.lower())]


def _texts(path: pathlib.Path) -> Iterator[str]:
    if ".xml" in path.name:
        for article in wiki.articles(path):
            yield from article.splitlines()
        return
    try:
        with path.open(encoding="utf-8") as file:
            held = ""
            while block := file.read(_LONGEST):
                *ended, held = _BLANK.split(held + block)
                yield from filter(str.strip, ended)
                if len(held) > _LONGEST:
                    place = max(held.rfind(" "), held.rfind("\n"))
                    place = place if place > 0 else len(held)
                    yield held[:place]
                    held = held[place:]
            yield held
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; convert it or leave it out") from error


def build(source: str, min_count: int, max_words: int, scratch: pathlib.Path) -> Corpus:
    """The corpus of `paragraphs(source)`, with the words that stand in it at least `min_count` times.

    Of more than `max_words` (0: any number) the most frequent are kept.

    The text is read twice; what is kept in memory is the vocabulary. The array lies in `scratch`.

    Raises:
      UserError: as `paragraphs`; or no word is that frequent.
    """
    counts: collections.Counter[str] = collections.Counter()
    digest = hashlib.sha256()
    for words in _told(paragraphs(source), "counting words"):
        counts.update(words)
        digest.update((" ".join(words) + "\n").encode())
    chosen = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
    chosen = chosen[: max_words or None]
    if len(chosen) < 2:
        raise UserError(f"source={source}: fewer than two words stand in it at least min_count={min_count} times")
    numbers = {word: i for i, word in enumerate(chosen)}
    path = scratch / "ids.bin"
    with path.open("wb") as file:
        for words in _told(paragraphs(source), "writing their numbers"):
            kept = [numbers[w] for w in words if w in numbers]
            if kept:
                file.write(np.array([*kept, BREAK], np.int32).tobytes())
    ids = np.memmap(path, np.int32, mode="r")
    return Corpus(tuple(chosen), np.array([counts[w] for w in chosen]), ids, digest.hexdigest())


def _told(found: Iterable[list[str]], what: str) -> Iterable[list[str]]:
    return tqdm(found, what, unit=" paragraphs", leave=False, disable=None)
