"""The directive `command-help`: the text of `--help` of every command."""

import importlib

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from llm_jax.__main__ import COMMANDS
from llm_jax.cli import Command
from llm_jax.cli.help import describe


class CommandHelp(Directive):
    """A section for each command and subcommand."""

    def run(self) -> list[nodes.Node]:
        result: list[nodes.Node] = []
        for name in COMMANDS:
            command = importlib.import_module(f"llm_jax.{name}").COMMAND
            for one in [command] if isinstance(command, Command) else command.values():
                section = nodes.section(ids=[nodes.make_id(f"command {one.name}")], names=[f"command {one.name}"])
                text = describe(one)
                section += [nodes.title(text=one.name), nodes.literal_block(text, text, language="text")]
                result.append(section)
        return result


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
