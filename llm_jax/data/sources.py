"""Resolves the names of sources to files: "stdlib", asset:NAME, hf:NAME, files, directories and glob patterns."""

import dataclasses
import difflib
import glob
import math
import os
import pathlib
import re
import sysconfig

from llm_jax import object_store
from llm_jax.data import assets, readers, records, streams
from llm_jax.errors import UserError

# Directories that are not part of the standard library: tests, and vendored or installed packages.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a source, or a data set of `datasets`.

    Attributes:
      name: unique in the corpus and the same on every machine; the names of documents are NAME or NAME:START.
      group: documents of a group are on one side of the split, because near-duplicates share a directory; "": each
        document is a group.
      path: path of the file, or name of the data set.
      format: a name for `readers.get`.
    """

    name: str
    group: str
    path: str
    format: str

    def document(self, start: int) -> str:
        """The name of the document that begins at `start`."""
        return self.name if readers.get(self.format).whole else f"{self.name}:{start}"

    def stamp(self) -> tuple[int | str, int]:
        """(bytes, time of the last change in nanoseconds), by which a changed file is recognized."""
        if self.format == "hf":
            dataset = records.load_data_set(self.path)
            return dataset._fingerprint, len(dataset)
        if object_store.is_object(self.path):
            return object_store.stamp(self.path)
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        return status.st_size, status.st_mtime_ns


def weights(source: str) -> dict[str, float]:
    """{name: weight} of the sources in `data.source`, NAME@WEIGHT,...; the weights are NaN if none is given.

    Raises:
      UserError: only some sources have a weight, a weight is not a positive number, or a source is named twice.
    """
    by_name: dict[str, float] = {}
    for part in source.split(","):
        name, _, weight = re.fullmatch(r"\s*(.*?)(@([0-9.]+))?\s*", part, re.DOTALL).groups()  # type: ignore[union-attr]
        if name in by_name:
            raise UserError(f"data.source={source}: {name} appears twice")
        try:
            by_name[name] = math.nan if weight is None else float(weight)
        except ValueError as error:
            raise UserError(f"data.source={source}: '{weight}' is not a weight; expected NAME@NUMBER") from error
    numbers = [weight for weight in by_name.values() if not math.isnan(weight)]
    if numbers and (len(numbers) < len(by_name) or not all(0 < weight < math.inf for weight in numbers)):
        raise UserError(f"data.source={source}: expected a weight above 0 for every source (NAME@NUMBER), or for none")
    return by_name


def files(
    source: str,
    prefix: bool = False,
    option: str = "data.source",
    split_single_file: bool = True,
    form: str = readers.AUTO,
) -> list[File]:
    """The files of one source, sorted by name. Every option and flag that names text is resolved here.

    "stdlib" is the source code of the running Python's standard library, each package a group; "asset:NAME" is one of
    `llm_jax.assets`; "hf:NAME" and "hf:NAME:SPLIT" are data sets of `datasets`. Every other source is a file, a
    directory (without hidden files) or a glob pattern, on a disk or in an object store (gs://, s3://). The suffix of a
    file determines its format: JSON lines, CSV, TSV, Parquet or text, which may be compressed (.gz, .bz2, .xz, .zst). A
    text file is one document; if it is the only file of its source, it is split into several.

    Args:
      prefix: whether names begin with the source, which makes them unique among several sources.
      option: the option or flag that names the source, for error messages.
      split_single_file: whether a text file that is the only file of its source is split into several documents.
      form: the option `data.format`, which applies to all files.

    Raises:
      UserError: there is no such asset, file, directory or format.
    """
    format_name = readers.resolve(form)
    if format_name and source.startswith("hf:"):
        raise UserError(f"{readers.OPTION}={form} applies to files; {option}={source} is a data set of datasets")
    if source == "stdlib":
        files = [dataclasses.replace(f, format=format_name or f.format) for f in _stdlib()]
    elif source.startswith("hf:"):
        files = [File(source, "", source[3:], "hf")]
    elif object_store.is_object(source):
        object_store.check(object_store.path(source))
        addresses = object_store.glob(source)
        visible = [name for name in addresses if not any(part.startswith(".") for part in name.split("/"))]
        files = [_file(addresses[name], name, addresses[name] == source, format_name) for name in visible]
        if not files:
            raise UserError(f"{option}={source}: no such object or directory, and no object matches it as a glob")
    else:
        path = assets.locate(source)
        if path.is_file():
            files = [_file(path, path.name, True, format_name or _asset_format(source))]
        elif path.is_dir():
            files = [
                _file(p, p.relative_to(path).as_posix(), False, format_name)
                for p in _visible_files(path, option, source)
            ]
        else:
            names = glob.glob(str(path), recursive=True)
            files = [_file(pathlib.Path(n), n, False, format_name) for n in names if pathlib.Path(n).is_file()]
            if not names:
                raise UserError(_missing(source, option))
    if not split_single_file:
        files = [dataclasses.replace(f, group=f.name, format="text") if f.format == "pieces" else f for f in files]
    files.sort(key=lambda f: f.name)
    if not prefix:
        return files
    return [dataclasses.replace(f, name=f"{source}/{f.name}", group=f.group and f"{source}/{f.group}") for f in files]


def paths(source: str, option: str) -> list[pathlib.Path]:
    """The local files of one source (see `files`), sorted by path.

    Raises:
      UserError: there is no file, or the source is a data set of `datasets`.
    """
    if source.startswith("hf:") or object_store.is_object(source):
        other = "a data set of datasets" if source.startswith("hf:") else "objects of a bucket"
        raise UserError(f"{option}={source}: expected files, asset:NAME or stdlib, not {other}")
    paths = sorted(pathlib.Path(file.path) for file in files(source, option=option))
    if not paths:
        raise UserError(_missing(source, option))
    return paths


def _missing(source: str, option: str) -> str:
    """The error message for a source that is not a file, with a suggestion."""
    asset = difflib.get_close_matches(source, assets.ASSETS, 1, 0.7)
    if "://" in source:
        cure = "; URLs are not supported, download the file first"
    elif asset:
        cure = f"; did you mean asset:{asset[0]}?"
    elif re.fullmatch(r"[\w-]+(/[\w-]+)?", source) and not pathlib.Path(source).parent.name:
        cure = f"; a data set of the Hugging Face hub is hf:{source}"
    else:
        cure = ""
    return f"{option}={source}: no such file or directory, and no file matches it as a glob{cure}"


def _asset_format(source: str) -> str:
    prefix, _, name = source.partition(":")
    return assets.ASSETS[name].format if prefix == "asset" else ""


def _stdlib() -> list[File]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    return [
        File(name.as_posix(), name.parts[0], str(root / name), "python")
        for name in names
        if not _NOT_STDLIB & set(name.parts[:-1])
    ]


def _visible_files(directory: pathlib.Path, option: str, source: str) -> list[pathlib.Path]:
    """All files below a directory whose path from there has no hidden part."""
    if directory.resolve() == pathlib.Path(directory.resolve().anchor):
        raise UserError(f"{option}={source}: this is the whole file system; expected a directory with text")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); {option}={source} names all files below")

    paths = []
    for parent, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = [name for name in directories if not name.startswith(".")]
        paths += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    try:
        return [path for path in paths if path.is_file()]
    except OSError as error:
        refuse(error)
        raise


def _file(path: str | pathlib.Path, name: str, alone: bool, form: str) -> File:
    name = streams.plain_name(pathlib.PurePosixPath(name)).as_posix() if alone else name
    form = form or readers.format_of(str(path), alone)
    return File(name, name if readers.get(form).whole else "", str(path), form)
