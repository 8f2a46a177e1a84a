"""The directive `config-options`: a table of every configuration option, read from llm_jax/schema.py."""

import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from llm_jax import configuration, schema

# Sections that are not part of `schema.Config`, with the recipe that holds their defaults.
OTHERS = {"embeddings": (schema.EmbeddingsConfig, "word2vec")}


def meanings(cls: type) -> dict[str, str]:
    """{field: its comment}: beside it, within its annotation, or on lines of its own above it.

    Comment lines above a field that has a comment beside it continue the comment of the field before.
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


def kind(annotation: Any) -> str:
    """A type and its range, such as "int, at least 1"."""
    if typing.get_origin(annotation) is typing.Annotated:
        plain, *rest = typing.get_args(annotation)
        allowed = next((value for value in rest if isinstance(value, tuple)), None)
        if allowed is None:
            return kind(plain)
        if plain is str:
            return " | ".join(repr(value) for value in allowed)
        low, high = allowed
        bounds = ["above 0" if 0 < low < 1e-9 else f"at least {low:g}"] + [f"at most {high:g}"] * (high < 2**31)
        return ", ".join([plain.__name__, *bounds])
    if annotation == schema.Rules:
        return "((pattern, value), ...)"
    if typing.get_origin(annotation) is tuple:
        return "tuple of str"
    return getattr(annotation, "__name__", str(annotation))


def options(cls: type, default: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default value, meaning) of every option of a dataclass of the schema."""
    hints, texts = typing.get_type_hints(cls, include_extras=True), meanings(cls)
    rows = []
    for field in dataclasses.fields(cls):
        value, annotation = getattr(default, field.name), hints[field.name]
        if dataclasses.is_dataclass(annotation):
            rows += options(annotation, value, f"{prefix}{field.name}.")
        else:
            rows.append((prefix + field.name, kind(annotation), repr(value), texts.get(field.name, "")))
    return rows


class ConfigOptions(Directive):
    """A section and a table for each section of the configuration."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        if self.arguments:
            cls, recipe = OTHERS[self.arguments[0]]
            default = configuration.build(configuration.read(recipe), cls)
            return [table(options(cls, default))]
        rows = options(schema.Config, configuration.default())
        sections = {key.split(".")[0] for key, *_ in rows if "." in key}
        groups: dict[str, list[tuple[str, str, str, str]]] = {}
        for row in rows:
            first = row[0].split(".")[0]
            groups.setdefault(first if first in sections else "Options outside of sections", []).append(row)
        result: list[nodes.Node] = []
        for name, group in groups.items():
            section = nodes.section(ids=[f"options-{nodes.make_id(name)}"], names=[f"options {name}"])
            section += [nodes.title(text=name), table(group)]
            result.append(section)
        return result


def table(rows: list[tuple[str, str, str, str]]) -> nodes.table:
    group = nodes.tgroup(cols=4)
    group += [nodes.colspec(colwidth=width) for width in (28, 20, 16, 60)]
    head, body = nodes.thead(), nodes.tbody()
    head += row([nodes.Text(title) for title in ("option", "type", "default", "meaning")])
    body += [row([nodes.literal(text=key), nodes.Text(type_), nodes.literal(text=value), nodes.Text(text)])
             for key, type_, value, text in rows]  # fmt: skip
    group += [head, body]
    result = nodes.table(classes=["config-options"])
    result += group
    return result


def row(cells: list[nodes.Node]) -> nodes.row:
    result = nodes.row()
    for cell in cells:
        entry, paragraph = nodes.entry(), nodes.paragraph()
        paragraph += cell
        entry += paragraph
        result += entry
    return result


def reread(app: Sphinx, env: Any, names: list[str]) -> None:
    """The table is made anew in every build: Sphinx does not know that the schema has changed."""
    names[:] = sorted({*names, "options"} & set(env.found_docs))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-options", ConfigOptions)
    app.connect("env-before-read-docs", reread)
    return {"parallel_read_safe": True}
