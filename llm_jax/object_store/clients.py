"""The clients of object stores: file systems of fsspec (gcsfs, s3fs), and their errors."""

import functools
import logging
import os
from typing import Any

_SILENCE = 15.0  # seconds without a byte of an answer after which a request is repeated or given up
# Base classes of the errors of a network, by name: those of Python, aiohttp, botocore, requests and google.auth.
_NETWORK = {
    *("TimeoutError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "HTTPClientError"),
    *("TransportError",),
}


@functools.cache
def client(scheme: str) -> Any:
    """The fsspec file system of a scheme, the one that `epath` uses."""
    import fsspec
    from etils.epath import backend

    # Listings are not cached, because other processes write too.
    defaults: dict[str, dict[str, Any]] = {
        "gs": {"use_listings_cache": False},
        "s3": {
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 5,
                "read_timeout": _SILENCE,
                "retries": {"mode": "standard", "max_attempts": 2},
            },
        },
    }
    if scheme == "gs":
        import aiohttp  # a dependency of gcsfs

        # gcsfs makes six attempts.
        defaults["gs"]["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=_SILENCE)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors with tracebacks, and raises them too
        # gcsfs looks for a feature of buckets that needs further permissions, and logs where it has none.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # that of TensorStore has a name of its own
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    fsspec.config.conf[scheme] = defaults[scheme] | fsspec.config.conf.get(scheme, {})
    system = backend.fsspec_backend.fs(f"{scheme}://")
    if scheme == "s3":
        system.retries = 2  # each of them makes two attempts
    return system


def is_network_error(error: BaseException | None) -> bool:
    """Whether a store has not answered: a request, or the cause of `error`, has failed without an answer of the store.

    A store that refuses a request or asks for fewer of them has answered.
    """
    while error is not None:
        if not _NETWORK.isdisjoint(base.__name__ for base in type(error).__mro__):
            return True
        error = error.__cause__
    return False
