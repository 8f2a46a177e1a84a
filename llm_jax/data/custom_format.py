"""Custom data formats: a function from the path of a file to its documents (`extensions`).

    def documents(path, option=default):
        yield "a text"                  # or a record, {"text": "a text", ...}

The documents must be the same, in the same order, every time the function is called for the same file. The hash of a
file covers the specification of the function (file, name, options and source hash) in addition to the texts, so that
nothing computed from the documents of another version of the function is reused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.data import records
from llm_jax.data.records import Scan
from llm_jax.data.streams import iterate, utf8_size
from llm_jax.errors import UserError
from llm_jax.extensions import FAILURES, Extension, describe_exception


def scan(extension: Extension, path: str, field: str) -> Scan:
    """See `readers.FileFormat`; the start of a document is its index in the file."""
    digest = hashlib.sha256(extension.specification.encode())
    for index, text in enumerate(_texts(extension, path, field)):
        size = utf8_size(f"{path}, document {index}", text)
        digest.update(b"%d\0" % size + text.encode())
        yield index, size
    return digest.hexdigest()


def read(extension: Extension, path: str, field: str, starts: np.ndarray, sizes: np.ndarray) -> Iterator[str]:
    """See `readers.FileFormat`. Reads the file from its beginning to the last of the documents."""
    texts = enumerate(_texts(extension, path, field))
    for start, size in zip(iterate(starts), iterate(sizes), strict=True):
        text = next((text for index, text in texts if index == start), None)
        if text is None or len(text.encode()) != size:
            raise extension.error(
                f"{path}, document {start}: the function does not yield the same documents as before; it must not "
                "depend on anything but the content of the file"
            )
        yield text


def _texts(extension: Extension, path: str, field: str) -> Iterator[str]:
    """The texts of all documents; with the field "", those of whole records, as JSON.

    Raises:
      UserError: the function raises an exception, or yields anything else than texts and records.
    """
    function = extension.bind(extension.target)
    index = -1
    try:
        documents = function(path)
        if isinstance(documents, str | bytes | Mapping) or not hasattr(documents, "__iter__"):
            raise extension.error(
                f"{path}: the function returns {type(documents).__name__}; expected an iterator of texts or records"
            )
        for index, document in enumerate(documents):
            yield _text(extension, f"{path}, document {index}", field, document)
    except UserError:
        raise
    except FAILURES as error:
        raise extension.error(f"{path}: fails after {index + 1} documents ({describe_exception(error)})") from error


def _text(extension: Extension, where: str, field: str, document: Any) -> str:
    if isinstance(document, str) and field:
        return document
    if not isinstance(document, dict):
        expected = "text (str) or a record (dict)" if field else "a record (dict), which this data.kind consists of"
        raise extension.error(f"{where} is {type(document).__name__}; expected {expected}")
    if field:
        return records.field_text(where, field, document)
    try:
        return json.dumps(document, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise extension.error(f"{where} is a record with values that JSON cannot hold ({error})") from error
