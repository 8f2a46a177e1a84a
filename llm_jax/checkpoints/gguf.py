"""Reads and writes the GGUF container: metadata and tensors (format: ggml's docs/gguf.md, versions 2 and 3).

The reader does not trust the sizes in a file: it compares every count with the number of remaining bytes before it
allocates memory.
"""

import dataclasses
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from llm_jax import files
from llm_jax.errors import UserError
from llm_jax.kernels import blocks

_MAGIC = b"GGUF"
# Scalar value types: type number -> struct format character.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_DIMENSIONS = 2, 4
# Type numbers of tensors that cannot be read -> their names.
_UNREAD = dict(
    zip(
        (9, 15, 16, 17, 18, 19, 21, 22, 24, 25, 26, 27, 28, 29, 34, 35, 40),
        "Q8_1 Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ3_S IQ2_S I8 I16 I32 I64 F64 IQ1_M TQ1_0 TQ2_0 NVFP4".split(),
        strict=True,
    )
)
_BY_CODE = {f.code: name for name, f in blocks.FORMATS.items()}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file.

    Attributes:
      shape: rows first (the file has the reverse order).
      format: the block format, a key of `blocks.FORMATS`.
      path: the file.
      offset: the position of its first byte in the file.
    """

    shape: tuple[int, ...]
    format: str
    path: pathlib.Path
    offset: int

    def rows(self, indexes: np.ndarray | slice = slice(None)) -> np.ndarray:
        """A copy of the encoded rows `indexes`, uint8 (rows, bytes per row); a row runs along the last axis.

        Raises:
          UserError: the file was changed since its header was read.
        """
        f = blocks.FORMATS[self.format]
        shape = math.prod(self.shape[:-1]), self.shape[-1] // f.numbers * f.size
        try:
            # Mapped for this call only: the pages of a lasting mapping would count as memory of the process.
            return np.array(np.memmap(self.path, np.uint8, "r", self.offset, shape)[indexes])
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: changed while it was being read ({error})") from error

    def read(self, indexes: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The rows `indexes` as float32 (rows, numbers per row). Raises UserError like `rows`."""
        return blocks.decode(self.format, self.rows(indexes))


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The content of a file: `metadata` by key, `tensors` by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    """Reads values one after the other. Raises UserError if a value would go past the end of the file."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            empty = path.stat().st_size == 0
            # A memoryview: a slice of it costs a tenth of one of an array, and a vocabulary has 100,000 strings.
            content: Any = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
            self.data = memoryview(content)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        self.position = 0

    def bad(self, what: str) -> UserError:
        return UserError(f"{self.path}: not a valid GGUF file: {what} (at byte {self.position:,})")

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self.data) - self.position:
            raise self.bad(f"{what} of {count:,} bytes goes past the end of the file of {len(self.data):,} bytes")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, letter: str, what: str = "a number") -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), what).tobytes())[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q"), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string("a string")
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise self.bad(f"a value of type {kind}" + (" nested too deep" if kind == _ARRAY else ", which is unknown"))
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            size = struct.calcsize(_SCALARS[inner])
            return np.frombuffer(self.take(count * size, "an array").tobytes(), f"<{_SCALARS[inner]}").tolist()
        min_bytes = 8 if inner == _STRING else 12
        if count * min_bytes > len(self.data) - self.position:
            raise self.bad(f"an array of {count:,} values goes past the end of the file")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read(path: str | os.PathLike[str]) -> GgufFile:
    """The metadata of a file, and the positions of its tensors, which are not read.

    Args:
      path: a file, or the first part of a model that is split into several files.

    Raises:
      UserError: the file is not GGUF, is truncated or inconsistent, or is not the first part; or parts are missing.
    """
    first = pathlib.Path(path)
    file = _read_part(first)
    count = file.metadata.get("split.count", 0)
    return _joined(first, file, count) if isinstance(count, int) and count > 1 else file


def _joined(path: pathlib.Path, first: GgufFile, count: int) -> GgufFile:
    """The model of which `path` is the first of `count` files, named NAME-00001-of-00003.gguf and so on."""
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not name or int(name[3]) != count:
        raise UserError(f"{path}: one of {count} parts; expected a name that ends in -00001-of-{count:05d}.gguf")
    paths = [path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    if (number := first.metadata.get("split.no", 0)) != 0 or paths[0] != path:
        raise UserError(f"{path}: part {number + 1} of {count}; open the first one, {paths[0].name}")
    if missing := [part.name for part in paths if not part.is_file()]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:5])}{more}")
    tensors: dict[str, GgufTensor] = {}
    for index, part in enumerate(paths):
        file = first if index == 0 else _read_part(part)
        if (file.metadata.get("split.no", 0), file.metadata.get("split.count")) != (index, count):
            raise UserError(
                f"{part}: not part {index + 1} of {count} of {path.name}, by its keys split.no, split.count"
            )
        if doubled := tensors.keys() & file.tensors.keys():
            raise UserError(f"{part}: the tensor {min(doubled)[:80]!r} is also in another part")
        tensors |= file.tensors
    if (total := first.metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise UserError(f"{path}: its parts have {len(tensors)} tensors; split.tensors.count is {total}")
    return GgufFile({k: v for k, v in first.metadata.items() if not k.startswith("split.")}, tensors)


def _read_part(path: pathlib.Path) -> GgufFile:
    files.check_not_lfs_pointer(path)
    r = _Reader(path)
    if len(r.data) < 4 or r.take(4, "the magic number").tobytes() != _MAGIC:
        raise UserError(
            f"{path}: not a GGUF file (it does not begin with 'GGUF'); expected a run, a Hugging Face directory or a "
            ".gguf file"
        )
    if (version := r.number("I")) not in (2, 3):
        raise UserError(f"{path}: GGUF version {version}; expected 2 or 3 (little-endian)")
    tensors, pairs = r.number("Q"), r.number("Q")
    remaining = len(r.data) - r.position
    if tensors * 24 > remaining or pairs * 12 > remaining:
        raise r.bad(f"{tensors:,} tensors and {pairs:,} metadata keys cannot be in {remaining:,} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = r.string("a key")
        if key in metadata:
            raise r.bad(f"the key {key[:80]!r} appears twice")
        metadata[key] = r.value(r.number("I"))
    described: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for _ in range(tensors):
        name = r.string("the name of a tensor")
        if name in described:
            raise r.bad(f"the tensor {name[:80]!r} appears twice")
        if not 1 <= (rank := r.number("I")) <= _MAX_DIMENSIONS:
            raise r.bad(f"the tensor {name[:80]!r} has {rank} dimensions")
        shape = tuple(r.number("Q") for _ in range(rank))[::-1]
        code, offset = r.number("I"), r.number("Q")
        if code not in _BY_CODE:
            kind = f"{code} ({_UNREAD[code]})" if code in _UNREAD else code
            raise r.bad(f"the tensor {name[:80]!r} is of type {kind}; expected one of {', '.join(blocks.FORMATS)}")
        described[name] = (shape, _BY_CODE[code], offset)
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or not 1 <= align <= 2**20 or align & (align - 1):
        raise r.bad(f"general.alignment is {align!r}; expected a power of two")
    begin = -(-r.position // align) * align
    result = {}
    for name, (shape, kind, offset) in described.items():
        f = blocks.FORMATS[kind]
        size = math.prod(shape)
        if not size or shape[-1] % f.numbers or offset % align:
            raise r.bad(f"the tensor {name[:80]!r} of {kind} has shape {shape} at {offset:,}, which do not fit blocks")
        num_bytes, start = size // f.numbers * f.size, begin + offset
        if start + num_bytes > len(r.data):
            raise r.bad(f"the tensor {name[:80]!r} {shape} of {num_bytes:,} bytes goes past the end of the file")
        result[name] = GgufTensor(shape, kind, r.path, start)
    return GgufFile(metadata, result)


def write(
    path: pathlib.Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    values: Iterable[np.ndarray],
) -> None:
    """Writes a file atomically.

    Args:
      metadata: strings, booleans, integers, floats and lists of one of these; numpy scalars keep their type.
      tensors: name -> (shape with rows first, format).
      values: arrays in the order of `tensors`, consumed one at a time: float32 of the tensor's shape, or uint8 rows
        of encoded blocks.

    Raises:
      UserError: the file cannot be written, or a row does not divide into blocks of its format.
    """
    head = [_MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), *_value(value)]
    offset = 0
    for name, (shape, kind) in tensors.items():
        f = blocks.FORMATS[kind]
        if shape[-1] % f.numbers:
            raise UserError(f"'{name}' has rows of {shape[-1]} numbers; {kind} needs a multiple of {f.numbers}")
        head += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])]
        head += [struct.pack("<IQ", f.code, offset)]
        offset += -(-math.prod(shape) // f.numbers * f.size // 32) * 32
    with files.new_file(path) as file:
        file.write(b"".join(head))
        progress = tqdm(tensors.values(), "writing tensors", leave=False, disable=None)
        for (_, kind), array in zip(progress, values, strict=True):
            file.write(b"\0" * (-file.tell() % 32))
            encoded = array if array.dtype == np.uint8 else blocks.encode(kind, np.asarray(array, np.float32))
            file.write(encoded.tobytes())
        file.write(b"\0" * (-file.tell() % 32))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return _STRING
    if isinstance(value, (bool, np.bool_)):
        return 7
    if isinstance(value, np.generic):
        return next(k for k, letter in _SCALARS.items() if np.dtype(letter) == value.dtype)
    if isinstance(value, float):
        return 6
    return (5 if value >= -(2**31) else 11) if value < 0 else 4 if value < 2**32 else 10


def _value(value: Any) -> Iterator[bytes]:
    """The encoded type and value of a metadata entry."""
    items = value if isinstance(value, (list, tuple)) else [value]
    kind = _kind(items[0]) if items else 4
    if items is value and kind == 4 and max(items, default=0) < 2**31:
        kind = 5  # llama.cpp requires int32 for tokenizer.ggml.token_type
    if items is value:
        yield struct.pack("<IIQ", _ARRAY, kind, len(items))
    else:
        yield struct.pack("<I", kind)
    if kind == _STRING:
        yield from map(_string, items)
    else:
        yield struct.pack(f"<{len(items)}{_SCALARS[kind]}", *items)
