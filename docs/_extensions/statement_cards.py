"""The directives `statements`, all statements with what was measured, and `measured P4 P7`, some of them in short."""

import pathlib

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from experiments import statement_page
from experiments.statements import GROUPS, STATEMENTS

EXPERIMENTS = pathlib.Path(statement_page.__file__).parent
PAGE = "statements"  # the document with all statements


class Statements(Directive):
    """A section for each statement, below a table of all verdicts."""

    def run(self) -> list[nodes.Node]:
        measured = statement_page.measured(EXPERIMENTS)
        result: list[nodes.Node] = [style()]
        for letter, title in GROUPS.items():
            group = nodes.section(ids=[f"statements-{title.lower()}"], names=[title.lower()])
            group += nodes.title(text=title)
            for name, statement in STATEMENTS.items():
                if name[0] == letter:
                    section = nodes.section(ids=[name.lower()], names=[name.lower()])
                    section += nodes.title(text=f"{name}: {statement.text}")
                    section += raw(statement_page.card(name, measured.get(name, [])))
                    for experiment in dict.fromkeys(experiment for _, experiment in measured.get(name, [])):
                        section += link("The experiment, with all tables: ", self, f"experiments/{experiment}/README")
                    group += section
            result.append(group)
        return result


class Measured(Directive):
    """The statements whose identifiers are the argument: verdict, picture, and a link to the page of all statements."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        measured = statement_page.measured(EXPERIMENTS)
        result: list[nodes.Node] = [style()]
        for name in self.arguments[0].split():
            if name not in STATEMENTS:
                raise self.error(f"unknown statement {name}; expected one of {', '.join(STATEMENTS)}")
            paragraph = link("", self, PAGE, name.lower(), f"{name}: {STATEMENTS[name].text}")
            result += [paragraph, raw(statement_page.card(name, measured.get(name, []), short=True))]
        return result


def link(text: str, directive: Directive, page: str, anchor: str = "", title: str = "") -> nodes.paragraph:
    """A paragraph with a link to another document."""
    env = directive.state.document.settings.env
    target = env.app.builder.get_relative_uri(env.docname, page) + (anchor and f"#{anchor}")
    paragraph = nodes.paragraph()
    reference = nodes.reference("", "", refuri=target, internal=True)
    reference += nodes.strong(text=title) if title else nodes.Text(page.removesuffix("/README"))
    paragraph += [nodes.Text(text), reference]
    return paragraph


def raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


def style() -> nodes.raw:
    return raw(f"<style>{statement_page.STYLE}</style>")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("statements", Statements)
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
