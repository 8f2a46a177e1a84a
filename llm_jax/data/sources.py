"""Where text comes from: a list of documents, and which of them are held out."""

import dataclasses
import functools
import glob
import hashlib
import pathlib
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence

from llm_jax.data import assets
from llm_jax.errors import UserError

# Not the library's own text: tests and vendored or installed packages.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
_PIECE = 64 * 1024  # bytes; a single file is cut into documents of about this size


@dataclasses.dataclass(frozen=True)
class Document:
    """One text that is never split between training and held-out data.

    Attributes:
      name: unique in its source, and the same on every machine.
      group: documents of one group fall on the same side (near-duplicates share a directory).
      size: of the text in UTF-8, bytes.
      read: gives the text.
    """

    name: str
    group: str
    size: int
    read: Callable[[], str]


def documents(source: str) -> list[Document]:
    """The documents of `data.source`, source by source, those of each sorted by name.

    Several sources are separated by commas. "stdlib" is the source text of the running Python's
    standard library, each file a document, each package a group; "asset:NAME" is one of
    `llm_jax.data.assets`. A directory or glob gives a document per file; a single file is cut at line
    breaks into documents of about 64 KiB.

    Raises:
      UserError: nothing there, unreadable, not UTF-8, or empty.
    """
    names = source.split(",")
    return [document for name in names for document in _of_one(name.strip(), prefix=len(names) > 1)]


def _of_one(source: str, prefix: bool) -> list[Document]:
    if source == "stdlib":
        found = list(_stdlib())
    else:
        path = assets.path(source[6:]) if source.startswith("asset:") else pathlib.Path(source).expanduser()
        if path.is_file():
            found = list(_pieces(path))
        elif path.is_dir():
            found = [_file(p, p.relative_to(path).as_posix()) for p in sorted(path.rglob("*")) if _visible(p, path)]
        else:
            names = sorted(glob.glob(str(path), recursive=True))
            found = [_file(pathlib.Path(n), n) for n in names if pathlib.Path(n).is_file()]
            if not names:
                raise UserError(f"data.source={source}: no such file or directory, and no file matches it as a glob")
    found = sorted((d for d in found if d.size), key=lambda d: d.name)
    if not found:
        raise UserError(f"data.source={source}: there is no text in it")
    if not prefix:
        return found
    return [dataclasses.replace(d, name=f"{source}/{d.name}", group=f"{source}/{d.group}") for d in found]


def split(found: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: whole groups, in the order of their hash, up to `fraction` of the bytes.

    Groups that alone would exceed the rest of the share are passed over; at least one group is held
    out and one is trained on.

    Raises:
      UserError: the fraction is not inside (0, 1), or there is one group only.
    """
    if not 0 < fraction < 1:
        raise UserError(f"config key 'data.validation_fraction' is {fraction}; expected a number between 0 and 1")
    sizes: dict[str, int] = {}
    for document in found:
        sizes[document.group] = sizes.get(document.group, 0) + document.size
    if len(sizes) < 2:
        raise UserError(f"the corpus is one document ({found[0].name}); at least two are needed to hold one out")
    room = fraction * sum(sizes.values())
    held: set[str] = set()
    for group in sorted(sizes, key=lambda g: hashlib.sha256(g.encode()).digest()):
        if sizes[group] <= room:
            held.add(group)
            room -= sizes[group]
    if not held:
        held.add(min(sizes, key=lambda g: (sizes[g], g)))
    return [d for d in found if d.group not in held], [d for d in found if d.group in held]


def fingerprint(found: Iterable[Document]) -> str:
    """sha256 over the names and texts of documents."""
    h = hashlib.sha256()
    for document in found:
        text = document.read().encode()
        h.update(f"{document.name}\0{len(text)}\0".encode() + text)
    return h.hexdigest()


def _stdlib() -> Iterator[Document]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if _NOT_STDLIB & set(name.parts[:-1]):
            continue
        try:
            text = _read_source(path)
        except (SyntaxError, UnicodeDecodeError):  # an encoding that its first line does not declare
            continue
        yield Document(name.as_posix(), name.parts[0], len(text.encode()), functools.partial(_read_source, path))


def _read_source(path: pathlib.Path) -> str:
    with tokenize.open(path) as file:  # obeys the encoding that the file declares
        return file.read()


def _visible(path: pathlib.Path, root: pathlib.Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)


def _file(path: pathlib.Path, name: str) -> Document:
    return Document(name, name, _size(path), functools.partial(_read_piece, path, 0, -1))


def _pieces(path: pathlib.Path) -> Iterator[Document]:
    size = _size(path)
    target = min(_PIECE, max(1024, size // 50))
    start = 0
    while start < size:
        block = _slice(path, start, target)
        end = size if start + len(block) >= size else start + (block.rfind(b"\n") + 1 or _whole_characters(block))
        name = f"{path.name}:{start}"
        yield Document(name, name, end - start, functools.partial(_read_piece, path, start, end - start))
        start = end


def _whole_characters(block: bytes) -> int:
    end = len(block)
    while end > 1 and block[end - 1] & 0xC0 == 0x80:
        end -= 1
    return max(end - 1, 1)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _slice(path: pathlib.Path, start: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _read_piece(path: pathlib.Path, offset: int, length: int) -> str:
    try:
        return _slice(path, offset, length).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {offset + error.start}; convert it or leave it out") from error
