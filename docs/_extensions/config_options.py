"""The directive `config-options`: a table of every configuration option, read from llm_jax/schema/config.py."""

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from llm_jax import configuration, schema
from llm_jax.cli.config_help import options

# Sections that are not part of `schema.Config`, with the recipe that holds their defaults.
OTHERS = {"embeddings": (schema.EmbeddingsConfig, "word2vec")}

GENERATED = re.compile(r"^```{(config-options|command-help|statements|measured)}", re.MULTILINE)


class ConfigOptions(Directive):
    """A section and a table for each section of the configuration, or one table.

    The argument, if there is one, is a name in OTHERS, or a regular expression of options and sections.
    """

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0] if self.arguments else ""
        if name in OTHERS:
            cls, recipe = OTHERS[name]
            default = configuration.build(configuration.read(recipe), cls)
            return [table(options(cls, default))]
        rows = options(schema.Config, configuration.default())
        if name:
            chosen = [row for row in rows if re.match(rf"({name})(\.|$)", row[0])]
            if not chosen:
                raise self.error(f"no option matches {name}")
            return [table(chosen)]
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
    """Makes generated pages anew in every build: Sphinx does not know that the package has changed."""
    generated = {name for name in env.found_docs if GENERATED.search(env.doc2path(name).read_text())}
    names[:] = sorted({*names, *generated} & set(env.found_docs))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("config-options", ConfigOptions)
    app.connect("env-before-read-docs", reread)
    return {"parallel_read_safe": True}
