"""Object stores, gs://BUCKET/PATH and s3://BUCKET/PATH: what a directory on a disk can do and a bucket cannot.

Paths are those of `etils.epath`, through fsspec (gcsfs, s3fs), the libraries that Orbax uses. An object is replaced as
a whole, atomically; it cannot be renamed, appended to, flushed, mapped or locked. `llm_jax.files` calls this module for
such paths.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from llm_jax.errors import UserError
from llm_jax.object_store import clients

T = TypeVar("T")


class StoreError(UserError):
    """A request to an object store that failed: no network, no permission, or an error of the store."""


class Unanswered(StoreError):
    """A store that does not answer. For a while, further requests of this process fail at once."""


_EXTRAS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # {scheme: (extra of this package, package)}
PREFIXES = tuple(f"{scheme}://" for scheme in _EXTRAS)
LAST = "manifest.json"  # the object of a directory that is written last and deleted first: without it, it is unfinished
# {scheme: function (file system, bucket, prefix) that lists an object}: unlike fsspec's own, it tells a missing bucket
# from a missing object.
_LIST_ONE: dict[str, Callable[[Any, str, str], Any]] = {
    "gs": lambda system, bucket, prefix: system.call("GET", "b/{}/o", bucket, prefix=prefix, maxResults=1),
    "s3": lambda system, bucket, prefix: system.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1),
}
_ANSWER = 30.0  # seconds in which a store must answer a first request
_PROBE = 15.0  # seconds between requests to a store while another request, or a library, waits for it
_SILENT = 60.0  # seconds without an answer to these requests after which the store is given up
_PAUSE = 60.0  # seconds in which requests to a store that was given up fail at once; the next one looks for it again
_unanswering: dict[str, float] = {}  # {scheme of a store that was given up: when, by `time.monotonic`}
_BLOCK = 2**23  # bytes that are read of a stream at a time
_TRANSFERS = 8  # objects that are transferred at a time
_CURES = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_PROFILE)",
}
_NO_CREDENTIALS = ("credential", "anonymous", "401", "unauthorized", "invalidaccesskeyid", "signaturedoesnotmatch")
_NO_PERMISSION = ("403", "forbidden", "accessdenied", "access denied", "permission", "does not have")


def is_object(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address of an object store."""
    return os.fspath(path).startswith(PREFIXES)


def path(address: str) -> Any:
    """The `epath.Path` of an address, which has the methods of `pathlib.Path`.

    Raises:
      UserError: the address names no bucket, or the package of its store is not installed.
    """
    _require(address)
    from etils import epath

    return epath.Path(address)


def has_orbax_driver(path: str | os.PathLike[str]) -> bool:
    """Whether Orbax reads and writes arrays at a path. It has a driver for gs://, none for s3://."""
    return not os.fspath(path).startswith("s3://")


def check(path: Any) -> None:
    """Raises UserError, within seconds, unless the bucket of a path exists and may be listed."""
    bucket, _, prefix = _key(path).partition("/")

    def look() -> None:
        try:
            _LIST_ONE[_scheme(path)](clients.client(_scheme(path)), bucket, prefix)
        except FileNotFoundError as error:
            raise UserError(f"{path}: there is no bucket '{bucket}'; create it first, or correct the name") from error

    _within(look, path)
    _unanswering.pop(_scheme(path), None)


def bounded(path: str | os.PathLike[str], call: Callable[[], T]) -> T:
    """Returns `call()`, which may take as long as it needs while the store of `path` answers other requests.

    An error of the store is an answer too: whether it concerns `call` is left to `call`.

    Raises:
      Unanswered: the store has not answered for more than a minute; `call` is left behind in its thread.
    """
    if not is_object(path):
        return call()
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    answered = time.monotonic()
    while True:
        with contextlib.suppress(queue.Empty):
            value, error = outcome.get(timeout=_PROBE)
            if error is not None:
                raise error
            return value
        try:
            check(path)
        except UserError as error:
            if clients.is_network_error(error):
                if (seconds := time.monotonic() - answered) > _SILENT:
                    _unanswering[_scheme(path)] = time.monotonic()
                    text = f"{path}: its store has not answered for {seconds:.0f} s; check the network"
                    raise Unanswered(text) from None
                continue
        answered = time.monotonic()


def write(path: Any, content: bytes) -> None:
    """Replaces an object; readers see the old or the new one. Raises UserError."""
    with user_errors(path, "cannot be written"):
        _request(path, "pipe_file", _key(path), content)


def create(path: Any, content: bytes) -> None:
    """Writes an object on condition that there is none (If-None-Match; ifGenerationMatch=0).

    Raises:
      FileExistsError: there is one.
      UserError: it cannot be written.
    """
    with user_errors(path, "cannot be written"):
        _request(path, "pipe_file", _key(path), content, mode="create")


def read(path: Any) -> bytes:
    """The content of an object.

    Raises:
      FileNotFoundError: there is none.
      UserError: it cannot be read.
    """
    with user_errors(path, "cannot be read"):
        return _request(path, "cat_file", _key(path))


def modification_time(path: Any) -> float:
    """When an object was written, in seconds since 1970 by the clock of the store."""
    return _request(path, "modified", _key(path)).timestamp()


def stamp(path: str) -> tuple[int, int]:
    """(bytes, time of the last write in nanoseconds by the clock of the store) of an object. Raises UserError."""
    with user_errors(path, "cannot be read"):
        size = _request(path, "info", _key(path))["size"]
        return size, int(_request(path, "modified", _key(path)).timestamp() * 1e9)


def stream(path: str) -> Any:
    """An object as a binary stream, which is read in blocks. Raises UserError."""
    with user_errors(path, "cannot be read"):
        return _request(path, "open", _key(path), "rb", block_size=_BLOCK)


def glob(address: str) -> dict[str, str]:
    """{name: address} of an object, of the objects below a directory, or of those that match a glob pattern.

    The name is relative to a directory, and otherwise the last part of the address or, of a pattern, the address.
    """
    if content := find(address):
        last = address.rstrip("/").rsplit("/", 1)[-1]
        return {last: address} if "." in content else {n: f"{address.rstrip('/')}/{n}" for n in content}
    with user_errors(address, "cannot be read"):
        listing = _request(address, "glob", _key(address), detail=True)
    keys = [key.lstrip("/") for key, info in listing.items() if info["type"] == "file"]
    return {f"{_scheme(address)}://{key}": f"{_scheme(address)}://{key}" for key in keys}


def find(path: Any) -> dict[str, dict[str, Any]]:
    """{name relative to `path`: information of fsspec} of the objects below a path; "." for the object itself."""
    root = _key(path)
    with user_errors(path, "cannot be read"):
        try:
            listing = _request(path, "find", root, detail=True)
        except FileNotFoundError:
            return {}
    infos = {name.lstrip("/").removeprefix(root).lstrip("/") or ".": info for name, info in listing.items()}
    return {name: info for name, info in infos.items() if info["type"] == "file"}


def finished(directory: Any) -> list[str]:
    """The names of the directories below `directory` that hold the object `LAST`."""
    # `glob` would read a name such as run[1] as a pattern.
    return [name.split("/")[0] for name in find(directory) if name.endswith(f"/{LAST}") and name.count("/") == 1]


def list_directory(directory: Any) -> list[str]:
    """The names of the objects and directories in a directory. Raises UserError."""
    with user_errors(directory, "cannot be read"):
        try:
            listing = _request(directory, "ls", _key(directory), detail=False)
        except FileNotFoundError:
            return []
    return [name.rstrip("/").rsplit("/", 1)[-1] for name in listing]


def upload(directory: pathlib.Path, path: Any) -> None:
    """Copies the files of a directory below `path`, those named `LAST` after all others. Raises UserError."""
    paths = [file for file in sorted(directory.rglob("*")) if file.is_file()]

    def put(file: pathlib.Path) -> None:
        _request(path, "put_file", str(file), f"{_key(path)}/{file.relative_to(directory).as_posix()}")

    with user_errors(path, "cannot be written"):
        _each(put, [file for file in paths if file.name != LAST])
        for file in paths:
            if file.name == LAST:
                put(file)


def put(file: pathlib.Path, path: Any) -> None:
    """Copies a file to an object. Raises UserError."""
    with user_errors(path, "cannot be written"):
        _request(path, "put_file", str(file), _key(path))


def copy_to(path: Any, file: BinaryIO) -> None:
    """Copies an object to an open file. Raises UserError."""
    with user_errors(path, "cannot be read"), stream(path) as source:
        shutil.copyfileobj(source, file, _BLOCK)


def download(path: Any, directory: pathlib.Path) -> None:
    """Copies the objects below `path` into a directory. Raises UserError."""
    _each(lambda name: fetch(path / name, directory / name, directory), list(find(path)))


def fetch(path: Any, file: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies an object into a file in or below a directory. Raises UserError."""
    if not file.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{path}: its name leads out of the directory")
    file.parent.mkdir(parents=True, exist_ok=True)
    with user_errors(path, "cannot be read"):
        _request(path, "get_file", _key(path), str(file))


def remove(path: Any) -> None:
    """Deletes the objects below a path, those named `LAST` first, so that a part of it is never taken for the whole."""
    for name in sorted(find(path), key=lambda name: name.rsplit("/", 1)[-1] != LAST):
        delete(path if name == "." else path / name)


def delete(path: Any) -> None:
    """Deletes an object if it is there. Raises UserError."""
    with user_errors(path, "cannot be deleted"), contextlib.suppress(FileNotFoundError):
        _request(path, "rm_file", _key(path))


def _each(function: Callable[[Any], None], values: list[Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
        for _ in pool.map(function, values):
            pass


def _scheme(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).split("://", 1)[0]


def _key(path: str | os.PathLike[str]) -> str:
    """BUCKET/PATH."""
    return os.fspath(path).split("://", 1)[1].rstrip("/")


def _require(address: str) -> None:
    scheme = _scheme(address)
    extra, package = _EXTRAS[scheme]
    if not _key(address).split("/")[0]:
        raise UserError(f"{address}: names no bucket; expected {scheme}://BUCKET/PATH")
    try:
        clients.client(scheme)
    except ImportError as error:
        raise UserError(f"{address} needs the package {package}; pip install 'llm_jax[{extra}]'") from error
    except Exception as error:
        raise _error(address, "cannot be read", error) from error


def _request(path: Any, name: str, *arguments: Any, **options: Any) -> Any:
    """Calls a method of the fsspec file system of `path`. Raises Unanswered, and the errors of the client."""
    _refuse_if_given_up(path)
    return bounded(path, lambda: getattr(clients.client(_scheme(path)), name)(*arguments, **options))


def _refuse_if_given_up(path: Any) -> None:
    """Raises Unanswered if the store of `path` was given up and, if that was a while ago, still does not answer."""
    scheme = _scheme(path)
    if (given_up := _unanswering.get(scheme)) is None:
        return
    try:
        if time.monotonic() - given_up < _PAUSE:
            raise TimeoutError
        _unanswering[scheme] = time.monotonic()  # other threads need not look too
        check(path)
    except (TimeoutError, UserError) as error:
        if clients.is_network_error(error):
            raise Unanswered(f"{os.fspath(path)}: the store does not answer; check the network") from error
        _unanswering.pop(scheme, None)


def _within(function: Callable[[], None], path: Any) -> None:
    """Calls a function that asks a store for the first time. Raises UserError if it fails or there is no answer."""
    raised: list[Exception] = []

    def call() -> None:
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)  # the clients try again for a minute and more
    thread.start()
    thread.join(_ANSWER)
    if thread.is_alive():
        text = f"{path}: its store does not answer within {_ANSWER:.0f} s; check the network"
        raise UserError(text) from TimeoutError()
    for error in raised:
        with user_errors(path, "cannot be read"):
            raise error


@contextlib.contextmanager
def user_errors(path: Any, problem: str) -> Iterator[None]:
    """Turns the errors of a store's client, of many types, into UserErrors; FileNotFoundError, FileExistsError stay."""
    try:
        yield
    except (UserError, FileExistsError):
        raise
    except FileNotFoundError as error:
        if "bucket" in str(error).lower() and "exist" in str(error).lower():
            raise _error(path, problem, error) from error
        raise
    except Exception as error:
        raise _error(path, problem, error) from error


def reason(error: BaseException) -> str:
    """The first line of the text of an error."""
    unnamed = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
    return (str(error).strip().splitlines() or [unnamed])[0][:200]


def _error(path: Any, problem: str, error: Exception) -> StoreError:
    text = f"{type(error).__name__} {getattr(error, 'code', '')} {error}".lower()
    cure = ""
    if any(word in text for word in _NO_CREDENTIALS):
        cure = f"; {_CURES[_scheme(path)]}"
    elif isinstance(error, PermissionError) or any(word in text for word in _NO_PERMISSION):
        cure = "; give the account of your credentials the permission to list, read, write and delete objects there"
    return StoreError(f"{path}: {problem} ({reason(error)}){cure}")
