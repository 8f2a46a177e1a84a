"""Text files in blocks of a MiB, from which tokenizers are trained."""

import pathlib
import random
from collections.abc import Iterator, Sequence

from llm_jax.errors import UserError

_BLOCK = 2**20


def texts(paths: Sequence[pathlib.Path], limit: int) -> Iterator[str]:
    """Yields the text of files in blocks of a MiB; beyond `limit` bytes, a uniform random sample of blocks.

    Raises:
      UserError: a file that cannot be read or is not UTF-8.
    """
    blocks = [(path, start) for path in paths for start in range(0, path.stat().st_size, _BLOCK)]
    if sum(path.stat().st_size for path in paths) > limit:
        drawn = random.Random(0).sample(range(len(blocks)), max(1, limit // _BLOCK))
        blocks = [blocks[i] for i in sorted(drawn)]
    for path, start in blocks:
        try:
            with path.open("rb") as file:
                file.seek(start)
                block = file.read(_BLOCK + 3)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        begin = _boundary(block, 0) if start else 0
        end = _boundary(block, _BLOCK) if len(block) > _BLOCK else len(block)
        try:
            yield block[begin:end].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text at byte {start + begin + error.start}") from error


def _boundary(block: bytes, place: int) -> int:
    """The first position from `place` on, at most three bytes later, at which a character may begin."""
    candidates = range(place, min(place + 3, len(block)))
    return next((i for i in candidates if block[i] & 0xC0 != 0x80), min(place + 3, len(block)))
