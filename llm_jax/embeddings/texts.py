"""Text as word ids: words are counted, then their ids written to one memory-mapped array."""

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
_LONGEST = 2**18  # characters of a paragraph; longer ones (a file may be one line) are cut between words
BREAK = -1  # between paragraphs; no window reaches across


@dataclasses.dataclass(frozen=True)
class WordCorpus:
    """A text as word ids.

    Attributes:
      words: the vocabulary, the most frequent first.
      counts: int64 (words,), occurrences of each in the text.
      ids: int32 (N,), the ids of the words in order, `BREAK` after each paragraph; words outside the vocabulary
        are left out.
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
    """Yields the words (lower case, no numbers) of each paragraph of sources, which are separated by commas.

    A source is a text file, directory or glob, whose paragraphs end at blank lines; a Wikipedia dump
    (`*.xml`, `*.xml.bz2`, `*.xml-*.bz2`); or asset:NAME.

    Raises:
      UserError: a source does not exist or cannot be read.
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
            rest = ""
            while block := file.read(_LONGEST):
                *ended, rest = _BLANK.split(rest + block)
                yield from filter(str.strip, ended)
                if len(rest) > _LONGEST:
                    before, *last = rest.rsplit(None, 1)  # at the last white space
                    end = len(before) if last else len(rest)
                    yield rest[:end]
                    rest = rest[end:]
            yield rest
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; convert it or leave it out") from error


def build(source: str, min_count: int, max_words: int, scratch: pathlib.Path) -> WordCorpus:
    """The corpus of `paragraphs(source)`. The text is read twice, and only the vocabulary is in memory.

    Args:
      min_count: rarer words are left out.
      max_words: size of the vocabulary, whose most frequent words are kept; 0: no bound.
      scratch: directory for the array of ids.

    Raises:
      UserError: as `paragraphs`, or fewer than two words are that frequent.
    """
    counts: collections.Counter[str] = collections.Counter()
    digest = hashlib.sha256()
    for words in _with_progress(paragraphs(source), "counting words"):
        counts.update(words)
        digest.update((" ".join(words) + "\n").encode())
    chosen = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
    chosen = chosen[: max_words or None]
    if len(chosen) < 2:
        raise UserError(f"source={source}: fewer than two words occur at least min_count={min_count} times")
    numbers = {word: i for i, word in enumerate(chosen)}
    path = scratch / "ids.bin"
    with path.open("wb") as file:
        for words in _with_progress(paragraphs(source), "writing word ids"):
            word_ids = [numbers[w] for w in words if w in numbers]
            if word_ids:
                file.write(np.array([*word_ids, BREAK], np.int32).tobytes())
    ids = np.memmap(path, np.int32, mode="r")
    return WordCorpus(tuple(chosen), np.array([counts[w] for w in chosen]), ids, digest.hexdigest())


def _with_progress(items: Iterable[list[str]], title: str) -> Iterable[list[str]]:
    return tqdm(items, title, unit=" paragraphs", leave=False, disable=None)
