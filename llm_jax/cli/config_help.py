"""The options of a configuration with type, range, default and meaning, for `--help-config` and the documentation."""

import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from typing import Any

from llm_jax.schema import option_names, type_text


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """Returns {field: comment}; the comment is on the line of the field, within its annotation, or above the field.

    Comment lines above a field that also has a comment on its own line continue the comment of the previous field.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    fields = {field.name for field in dataclasses.fields(cls)}
    entries: list[tuple[str, list[str], list[str]]] = []  # (field, comment lines above it, comments beside it)
    above: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.start[1] == 4 and token.string in fields:
            entries.append((token.string, above, []))
            above = []
        elif token.type == tokenize.COMMENT and token.start[1] == 4:
            above.append(token.string.lstrip("# "))
        elif token.type == tokenize.COMMENT and entries:
            entries[-1][2].append(token.string.lstrip("# "))
    comments: dict[str, list[str]] = {}
    previous = ""
    for name, above_it, beside_it in entries:
        comments[name] = list(beside_it)
        comments[previous if previous and beside_it else name] += above_it
        previous = name
    comments[previous] += above
    return {name: " ".join(lines) for name, lines in comments.items()}


def options(cls: type, default: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Returns (dotted key, type, default value, meaning) for every option of a dataclass of the schema."""
    rows = []
    for name, annotation in option_names.options(cls).items():
        value = getattr(default, name)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            rows += options(annotation, value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, type_text(annotation), repr(value), meanings(cls).get(name, "")))
    return rows
