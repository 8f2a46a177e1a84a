"""The text of `--help`, and of `--help-config`, which describes the options of `--config`."""

import inspect
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from absl import flags

from llm_jax import configuration
from llm_jax.cli import config_help
from llm_jax.cli.parsing import COMPILATION_CACHE, Command
from llm_jax.errors import UserError
from llm_jax.schema import option_names

_WIDTH = 100


def is_help(argument: str) -> bool:
    """Whether an argument is a help flag."""
    return argument in ("-h", "--help", "-help", "-?", "--helpfull", "--helpshort")


def requested(command: Command, arguments: Sequence[str]) -> str:
    """Returns the help text if the arguments contain `--help` or `--help-config [KEY]`, else "".

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
    positional = f" {command.positional.upper()} ..." if command.positional else ""
    lines = [f"usage: {entry}{positional} [--FLAG=VALUE ...]", "", inspect.cleandoc(about or ""), ""]
    if command.config is not None:
        default = configuration.DEFAULT_RECIPES[command.config]
        lines += _entry(
            "--config=SOURCE",
            f"a recipe ({', '.join(configuration.recipes(command.config))}), a .py, .json or .toml file, or a run "
            f"directory (default: {default})",
        )
        lines += _entry("--config.KEY=VALUE", "override an option, as in --config.model.position.kind=alibi")
        lines += _entry("--help-config[=TEXT]", "describe all options, or those whose name or meaning contains TEXT")
    script_flags = flags.FLAGS.get_key_flags_for_module(sys.argv[0]) if command.flags is flags.FLAGS else None
    shown_flags = script_flags if script_flags is not None else [command.flags[name] for name in command.flags]
    groups = getattr(command.flags, "groups", {})
    for flag in shown_flags:
        lines += [] if flag.name in groups else _flag(flag)
    for group in dict.fromkeys(groups.values()):
        lines += ["", f"{group}:"]
        for flag in shown_flags:
            lines += _flag(flag) if groups.get(flag.name) == group else []
    lines += [""] if groups else []
    if command.compiles:
        lines += _entry("--[no]compilation_cache", f"{COMPILATION_CACHE} (default: True)")
    lines += _entry("--help", "print this text")
    return "\n".join(lines)


def describe_options(cls: Any, text: str = "") -> str:
    """Describes every option whose dotted key or meaning contains `text`: type, range, default and meaning.

    Raises:
      UserError: no option contains `text`.
    """
    default = configuration.load(configuration.DEFAULT_RECIPES[cls], cls=cls)
    needle = text.removeprefix("--").removeprefix("config.").lower()
    lines = []
    for key, kind, value, meaning in config_help.options(cls, default):
        if needle in key.lower() or needle in meaning.lower():
            lines.append(f"--config.{key}={value}  ({kind})")
            lines += textwrap.wrap(meaning, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    if not lines:
        raise UserError(f"--help-config={text}: no option contains this; {option_names.nearest(text, cls)}")
    return "\n".join(lines)


def _flag(flag: flags.Flag) -> list[str]:
    kind = flag.parser.flag_type()
    value = {"bool": "", "int": "=N", "float": "=X"}.get(kind, "=TEXT")
    text = (flag.help or "").removesuffix(";\n    repeat this option to specify a list of values")
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        text = text.removeprefix(f"<{'|'.join(choices)}>: ")  # of absl
        value = "=" + "|".join(choice for choice in choices if choice)
    name = f"--[no]{flag.name}" if kind == "bool" else f"--{flag.name}{value}"
    if flag.default is None and any("other than None" in validator.message for validator in flag.validators):
        text += " (required)"
    elif flag.default not in (None, "", []):  # 0 and False are shown
        text += f" (default: {flag.default})"
    return _entry(name, text)


def _entry(name: str, text: str) -> list[str]:
    indent = " " * 26
    lines = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent) or [indent]
    if len(name) + 4 > len(indent):
        return [f"  {name}", *lines]
    return [f"  {name:<24}{lines[0].strip()}", *lines[1:]]
