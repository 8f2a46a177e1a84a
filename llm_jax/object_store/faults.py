"""Errors of the clients of object stores in calls of libraries, such as those of the methods of `etils.epath`.

`store.py` reports the errors of its own requests.
"""

import contextlib
import os
import traceback
from collections.abc import Iterator

from llm_jax.errors import UserError
from llm_jax.object_store import store

_CLIENTS = ("aiobotocore", "botocore", "gcsfs", "s3fs")


@contextlib.contextmanager
def as_user_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the errors of a store's client into UserErrors that name `path`; does nothing for a path on a disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not store.is_object(path) or not _is_of_a_client(error):
            raise
        with store.user_errors(path, "cannot be read or written"):
            raise


def explain(error: BaseException) -> str:
    """One line about an error of a store's client; "" for other errors."""
    if not _is_of_a_client(error):
        return ""
    return f"an object store cannot be read or written ({store.reason(error)}); check the network and the permissions"


def _is_of_a_client(error: BaseException) -> bool:
    """Whether code of a client has raised an error, which may be a plain OSError."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_timeout = type(error).__module__.startswith("fsspec.")  # without frames of the client
    return is_timeout or any(name.split(".")[0] in _CLIENTS for name in [type(error).__module__, *modules])
