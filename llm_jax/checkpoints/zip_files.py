"""Unpacks zip files of checkpoints into the cache, by the hash of their content.

Nothing in a zip file can be written outside its own directory of the cache: names with "..", absolute names and links
are refused, and so is an archive that would fill the disk.
"""

import hashlib
import pathlib
import shutil
import stat
import zipfile

from llm_jax import files
from llm_jax.errors import UserError

# The largest ratio of the unpacked bytes to those of the archive. Zip shrinks weights by a tenth, text to a third.
_RATIO = 200
# Bytes that may be unpacked at any ratio: a new optimizer state is all zeros, which zip shrinks to almost nothing.
_ALWAYS_ALLOWED = 2**26
_MAX_FILES = 100_000
_OF_FILE_MANAGERS = ("__MACOSX", ".DS_Store")
_MARKS = ("checkpoints", "config.json", "record.json", "adapter_config.json")  # a checkpoint has one of these


def unpack(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint in a zip file: the directory or .gguf file that `opening.open` takes.

    The checkpoint may be at the top of the archive or in directories of its own, such as runs/x. An archive that has
    been unpacked before is found in the cache by its sha256.

    Raises:
      UserError: the file is not a zip file, is damaged, encrypted or unsafe, does not fit on the disk, or does not
        contain exactly one checkpoint.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        directory = files.cache_directory() / "zip" / digest[:32]
        if not directory.is_dir():
            with zipfile.ZipFile(path) as archive, files.new_directory(directory, exist_ok=True) as partial:
                _extract(path, archive, partial)
    except UserError:  # a ValueError too
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable zip file ({error})") from error
    return _checkpoint(directory, path)


def _extract(path: pathlib.Path, archive: zipfile.ZipFile, directory: pathlib.Path) -> None:
    members = [m for m in archive.infolist() if not _belongs_to_a_file_manager(m.filename)]
    size = sum(member.file_size for member in members)
    allowed = max(_RATIO * path.stat().st_size, _ALWAYS_ALLOWED)
    if size > allowed or len(members) > _MAX_FILES:
        raise UserError(
            f"{path}: {len(members):,} files of {size:,} bytes are packed in {path.stat().st_size:,}; expected at most "
            f"{_MAX_FILES:,} files and {_RATIO} times the bytes; unpack it yourself if you trust it"
        )
    if size > (free := shutil.disk_usage(directory).free):
        raise UserError(
            f"{path}: {size:,} bytes unpacked, {free:,} are free in {files.cache_directory()}; set LLM_JAX_CACHE"
        )
    written = set()
    for member in members:
        target = directory / _safe_name(path, member)
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        if target in written:
            raise UserError(f"{path}: contains '{member.filename}' twice; expected a zip file of one checkpoint")
        written.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, target.open("xb") as file:  # reads at most `file_size` bytes
            shutil.copyfileobj(source, file, 2**20)


def _safe_name(path: pathlib.Path, member: zipfile.ZipInfo) -> pathlib.PurePosixPath:
    """The relative name of a member. Raises UserError for links, and for names outside the directory."""
    name = pathlib.PurePosixPath(member.filename)
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{path}: '{member.filename}' is a link or a device; expected files and directories only")
    unsafe = name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename.split("/")[0]
    if unsafe or not name.parts:
        raise UserError(f"{path}: '{member.filename}' is outside the archive's directory; expected relative names only")
    return name


def _belongs_to_a_file_manager(name: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    return bool(parts) and (parts[0] in _OF_FILE_MANAGERS or parts[-1] in _OF_FILE_MANAGERS)


def _checkpoint(directory: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """The innermost directory that is a checkpoint, or the only .gguf file."""
    while not any((directory / mark).exists() for mark in _MARKS):
        entries = sorted(directory.iterdir())
        if len(entries) != 1 or not (entries[0].is_dir() or entries[0].suffix == ".gguf"):
            names = ", ".join(entry.name for entry in entries[:8]) or "nothing"
            raise UserError(f"{path}: contains {names}; expected one run, checkpoint or .gguf file")
        if entries[0].is_file():
            return entries[0]
        directory = entries[0]
    return directory
