"""The text of `--help`, and of `--help-config`, which describes the options of `--config`."""

import ast
import functools
import inspect
import pathlib
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from absl import flags

from llm_jax import configuration
from llm_jax.cli.parsing import Command
from llm_jax.errors import UserError
from llm_jax.schema import Rules

_WIDTH = 100


def is_help(argument: str) -> bool:
    """Whether an argument asks for the flags of a command."""
    return argument in ("-h", "--help", "-help", "-?", "--helpfull", "--helpshort")


def requested(command: Command, arguments: Sequence[str]) -> str:
    """The text that `--help` or `--help-config [KEY]` among the arguments asks for, or "".

    Raises:
      UserError: no option contains the KEY of `--help-config`.
    """
    for i, argument in enumerate(arguments):
        if is_help(argument):
            return describe(command)
        match = re.fullmatch(r"--help[-_]config(?:=(.*))?", argument)
        if match and command.config is not None:
            following = [text for text in arguments[i + 1 : i + 2] if not text.startswith("--")]
            return describe_options(command.config, match[1] or "".join(following))
    return ""


def describe(command: Command) -> str:
    """The purpose, the flags and the defaults of a command."""
    module = sys.modules[command.main.__module__]
    if command.subcommands:
        lines = [f"usage: python -m llm_jax.{command.name} SUBCOMMAND [--FLAG=VALUE ...]", ""]
        for name, subcommand in command.subcommands.items():
            purpose = (subcommand.main.__doc__ or "").strip().splitlines()[:1]
            lines.append(f"  {name:<16} {''.join(purpose)}")
        return "\n".join(lines)
    entry = f"python {command.name}" if command.name.endswith(".py") else f"python -m llm_jax.{command.name}"
    about = command.main.__doc__ if " " in command.name else module.__doc__
    lines = [f"usage: {entry} [--FLAG=VALUE ...]", "", inspect.cleandoc(about or ""), ""]
    if command.config is not None:
        default = configuration.DEFAULT_RECIPES[command.config]
        lines += _entry(
            "--config=SOURCE",
            f"a recipe ({', '.join(configuration.recipes())}), a .py, .json or .toml file, or a run directory "
            f"(default: {default})",
        )
        lines += _entry("--config.KEY=VALUE", "override an option, as in --config.model.position.kind=alibi")
        lines += _entry("--help-config[=TEXT]", "describe all options, or those whose name or meaning contains TEXT")
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if command.flags is flags.FLAGS else None
    for flag in own if own is not None else [command.flags[name] for name in command.flags]:
        lines += _flag(flag)
    lines += _entry("--help", "print this text")
    return "\n".join(lines)


def describe_options(cls: Any, text: str = "") -> str:
    """Every option of a configuration whose dotted key or meaning contains `text`: type, range, default, meaning.

    Raises:
      UserError: there is none.
    """
    defaults = configuration.flat(configuration.load(configuration.DEFAULT_RECIPES[cls], cls=cls))
    options = dict(_options(cls))
    needle = text.removeprefix("--config.").lower()
    chosen = [key for key in options if needle in key.lower() or needle in options[key][1].lower()]
    if not chosen:
        raise UserError(f"--help-config={text}: no option contains this; {configuration.nearest(text, cls)}")
    lines = []
    for key in chosen:
        kind, meaning = options[key]
        lines.append(f"--config.{key}: {_type(kind)} = {defaults[key]!r}")
        lines += textwrap.wrap(meaning, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


@functools.cache
def meanings(cls: type) -> dict[str, str]:
    """{field: meaning} of a configuration dataclass, from the comments beside or above its fields."""
    path = pathlib.Path(inspect.getfile(cls))
    source = path.read_text().splitlines()
    body = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    found = {}
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        line = source[(node.end_lineno or node.lineno) - 1]
        beside = line.encode()[node.end_col_offset or 0 :].decode().strip()
        above: list[str] = []
        for number in range(node.lineno - 2, -1, -1):
            if not source[number].strip().startswith("#"):
                break
            above.insert(0, source[number].strip())
        comments = [beside] if beside.startswith("#") else above
        found[node.target.id] = " ".join(comment.lstrip("# ") for comment in comments)
    return found


def _options(cls: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, str]]]:
    """(dotted key, (annotated type, meaning)) of every option."""
    for name, kind in configuration.options(cls).items():
        if hasattr(kind, "__dataclass_fields__"):
            yield from _options(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, (kind, meanings(cls).get(name, ""))


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is Annotated:
        plain, allowed = typing.get_args(kind)
        if plain is str:
            return " | ".join(allowed)
        low, high = allowed
        bounds = f"at least {low:g}" if high >= 1e30 or high == 2**62 else f"{low:g} to {high:.10g}"
        return f"{plain.__name__} ({bounds})"
    if kind == Rules:
        return "((regular expression, value), ...)"
    return "tuple of str" if typing.get_origin(kind) is tuple else kind.__name__


def _flag(flag: flags.Flag) -> list[str]:
    kind = flag.parser.flag_type()
    value = {"bool": "", "int": "=N", "float": "=X"}.get(kind, "=TEXT")
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        value = "=" + "|".join(choice for choice in choices if choice)
    name = f"--[no]{flag.name}" if kind == "bool" else f"--{flag.name}{value}"
    text = flag.help or ""
    if flag.default is None and any("other than None" in validator.message for validator in flag.validators):
        text += " (required)"
    elif flag.default not in (None, "", [], False):
        text += f" (default: {flag.default})"
    return _entry(name, text)


def _entry(name: str, text: str) -> list[str]:
    indent = " " * 26
    lines = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent) or [indent]
    if len(name) + 4 > len(indent):
        return [f"  {name}", *lines]
    return [f"  {name:<24}{lines[0].strip()}", *lines[1:]]
