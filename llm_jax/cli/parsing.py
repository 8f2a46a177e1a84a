"""Parses the flags of a command and `--config` with its overrides; flags without effect are errors."""

import dataclasses
import difflib
import pathlib
import re
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from llm_jax import configuration
from llm_jax.errors import UserError
from llm_jax.schema import CHECKPOINT_DTYPES, BoolOrAuto, option_names, unsupported_names
from llm_jax.schema.value_names import expected

# Rows (flags, condition under which they have no effect, function of the flags that is true if they have one).
Needs = Sequence[tuple[tuple[str, ...], str, Callable[[Any], Any]]]

COMPILATION_CACHE = (
    "cache compiled functions, so that the command starts faster the next time, in $LLM_JAX_CACHE/compiled or "
    "~/.cache/llm_jax/compiled, up to 1 GiB; JAX_COMPILATION_CACHE_DIR takes precedence"
)


CHECKPOINT_FORMS = (
    "a run, a Hugging Face directory, a .gguf file, a peft directory, a zip file of one, asset:NAME, hf:ORG/NAME, "
    "gs://BUCKET/PATH or s3://BUCKET/PATH"
)
MESH_NEEDS: Needs = ((("devices",), "--mesh is not given", lambda f: f.mesh),)  # of `Flags.define_mesh`
_POSITIONAL = ("prompt", "checkpoint", "input", "workdir", "text")  # flags suggested for a positional argument
_REQUIRED = ("checkpoint", "input", "prompt", "output", "to")  # the order of positional arguments in a suggestion
_BOOLEANS = {"yes": "true", "y": "true", "on": "true", "no": "false", "n": "false", "off": "false"}
# Descriptions of the values of each type of flag, for messages.
_EXPECTED = {"int": "an integer", "float": "a number", "bool": "true or false (also yes, no, on, off, 1, 0)"}


class Flags(flags.FlagValues):
    """The flags of one command; after parsing, their values are attributes.

    The methods define flags by name, default and meaning, like `absl.flags.DEFINE_string`. A flag with
    `required=True` and the default None must be given.
    """

    def __init__(self) -> None:
        super().__init__()
        # Written to __dict__, because absl treats attributes as flags.
        self.__dict__["groups"] = {}  # name of a flag: its group, if it has one
        self.__dict__["_group"] = ""

    def group(self, name: str) -> None:
        """Sets the group of `--help` for all flags that are defined afterwards; "": no group."""
        self.__dict__["_group"] = name

    def __setitem__(self, name: str, flag: Any) -> None:
        super().__setitem__(name, flag)
        if self.__dict__["_group"]:
            self.__dict__["groups"][name] = self.__dict__["_group"]

    def string(self, name: str, default: str | None, meaning: str, **options: Any) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=self, **options)

    def define_checkpoint(self, required: bool = True) -> None:
        """Defines --checkpoint and --base."""
        default = None if required else ""
        self.string("checkpoint", default, f"checkpoint: {CHECKPOINT_FORMS}", required=required)
        self.define_base()

    def define_base(self) -> None:
        """Defines --base."""
        self.string("base", "", "with adapters: checkpoint of their base; default: the recorded path")

    def define_dtype(self) -> None:
        """Defines --dtype of `checkpoints.load`."""
        meaning = (
            "dtype of weights and computation; quantized weights keep their format; default: that of the run, or "
            "float32 for other checkpoints"
        )
        self.enum("dtype", "", ["", *CHECKPOINT_DTYPES], meaning)

    def define_as_stored(self) -> None:
        """Defines --as_stored."""
        meaning = "keep the quantized tensors of a .gguf file quantized instead of expanding them to floats"
        self.boolean("as_stored", False, meaning)

    def define_activations(self) -> None:
        """Defines --activations."""
        meaning = (
            "activations that are multiplied with quantized weights: float, or int8, which is faster and less exact"
        )
        self.enum("activations", "float", ["float", "int8"], meaning)

    def define_mesh(self) -> None:
        """Defines --mesh and --devices."""
        self.string(
            "mesh",
            "",
            "shard the model over all devices: sizes of the axes data, fsdp and tensor, such as tensor=4,data=2; "
            "default of data: all remaining devices; default without the flag: one device",
        )
        self.integer("devices", None, "with --mesh: simulate this many CPU devices; default: those of this machine")

    def integer(self, name: str, default: int | None, meaning: str, **options: Any) -> None:
        flags.DEFINE_integer(name, default, meaning, flag_values=self, **options)

    def number(self, name: str, default: float | None, meaning: str, **options: Any) -> None:
        flags.DEFINE_float(name, default, meaning, flag_values=self, **options)

    def boolean(self, name: str, default: bool | None, meaning: str, **options: Any) -> None:
        flags.DEFINE_boolean(name, default, meaning, flag_values=self, **options)

    def enum(self, name: str, default: str | None, choices: Sequence[str], meaning: str, **options: Any) -> None:
        flags.DEFINE_enum(name, default, list(choices), meaning, flag_values=self, **options)

    def multi_string(self, name: str, default: Any, meaning: str, **options: Any) -> None:
        flags.DEFINE_multi_string(name, default, meaning, flag_values=self, **options)

    def multi_integer(self, name: str, default: Any, meaning: str, **options: Any) -> None:
        flags.DEFINE_multi_integer(name, default, meaning, flag_values=self, **options)

    def comma_separated(self, name: str, default: Any, meaning: str, **options: Any) -> None:
        flags.DEFINE_list(name, default, meaning, flag_values=self, **options)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
      name: the name after `python -m llm_jax.`, with the subcommand if there is one: "train", "show rows".
      main: runs the command with the parsed flags as attributes; returns the exit code, None for 0.
      flags: the definitions of the flags.
      needs: flags that need other flags; using one that has no effect is an error.
      interrupt_message: message printed on SIGINT, or a function that returns it from the flags, which may
        not be parsed yet.
      config: the dataclass that `--config` fills, `schema.Config` or `schema.EmbeddingsConfig`; None: no `--config`.
      subcommands: the commands that `--help` lists.
      positional: name of the repeatable flag that receives positional arguments; "": positional arguments are errors.
      compiles: whether the command compiles functions and thus has the flag --compilation_cache.
      memory_hint: advice printed when the device runs out of memory.
    """

    name: str
    main: Callable[[Any], int | None]
    flags: Any
    needs: Needs = ()
    interrupt_message: str | Callable[[Any], str] = "interrupted"
    config: Any = None
    subcommands: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    positional: str = ""
    compiles: bool = False
    memory_hint: str = "use a smaller batch, or a device with more memory"

    def message_on_interrupt(self, values: flags.FlagValues) -> str:
        """The message printed on SIGINT."""
        return self.interrupt_message if isinstance(self.interrupt_message, str) else self.interrupt_message(values)


def parse(command: Command, values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Parses `arguments` into `values`; `values.config` becomes the checked configuration.

    Raises:
      UserError: an unknown or invalid flag, override or configuration, a positional argument, a flag that is repeated
        though it takes one value, or a flag without effect.
    """
    arguments = list(arguments)
    if command.config is not None:
        _note_repeated(arguments, command.config)
    if command.compiles:
        flags.DEFINE_boolean("compilation_cache", True, COMPILATION_CACHE, flag_values=values)
    arguments = [_with_underscores(argument, values) for argument in arguments]
    source: Any = None
    if command.config is not None:
        source, arguments = _split_source(arguments)
        problems = [
            option_names.unknown_option(key, command.config, value) for key, value in _overrides(arguments).items()
        ]
        if problems := list(filter(None, problems)):
            raise UserError("; ".join(problems))
        source = source or configuration.DEFAULT_RECIPES[command.config]
        complete = _with_texts(configuration.as_dict(configuration.load(source, cls=command.config)), command.config)
        config_flags.DEFINE_config_dict("config", ConfigDict(complete), flag_values=values, sys_argv=["", *arguments])
    try:
        positional = values(["", *_as_absl_reads(arguments, values, command.config)])[1:]
    except flags.UnrecognizedFlagError as error:
        names = dict.fromkeys([error.flagname, *_unknown_names(arguments, values)])
        raise UserError("; ".join(_unknown_flag(name, command, values) for name in names)) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(error, command, values) + _stray(arguments, error, command)) from error
    except flags.Error as error:
        raise UserError(_message(error)) from error
    except (ValueError, TypeError, LookupError) as error:  # ml_collections, for a value that does not fit the option
        raise UserError(f"--config: {_message(error)}") from error
    for name in values:
        flag: Any = values[name]  # `present` counts how often it was given
        if flag.present > 1 and not isinstance(flag, flags.MultiFlag) and not name.startswith("config"):
            raise UserError(f"--{name} is given {flag.present} times; it takes one value")
    if positional and command.positional:
        values[command.positional].value = [*(values[command.positional].value or []), *positional]
    elif positional:
        absent = next((name for name in _POSITIONAL if name in values and not values[name].present), "")
        cure = _as_flag(positional[0], absent, command) or "options are written --name=value"
        raise UserError(f"unexpected argument '{positional[0]}'; {cure}")
    if command.config is not None:
        changes = vars(values["config"])["_override_values"]
        values["config"].value = configuration.load(source, changes, cls=command.config)
    check_flags_have_effect(command.needs, values)


def _with_texts(section: dict[str, Any], cls: Any) -> dict[str, Any]:
    """Converts the defaults of `BoolOrAuto` options to strings, because ml_collections keeps the type of a default."""
    result = {}
    for name, kind in option_names.options(cls).items():
        value = section[name]
        if dataclasses.is_dataclass(kind):
            value = _with_texts(value, kind)
        result[name] = str(value) if kind == BoolOrAuto else value
    return result


def check_flags_have_effect(needs: Needs, values: flags.FlagValues) -> None:
    """Raises UserError for a flag that was given, even with its default value, but has no effect with the others."""
    for names, condition, has_effect in needs:
        present_flags = [values[name] for name in names if values[name].present]
        if present_flags and not has_effect(values):
            raise UserError(f"{' '.join(present_flags[0].serialize().split())} has no effect where {condition}")


def _note_repeated(arguments: Sequence[str], cls: Any) -> None:
    """Prints a note for every option of the configuration that is given several times with different values.

    As usual with absl, the last value applies, so that a script can append overrides to its arguments. The values of
    tuples are concatenated.
    """
    given: dict[str, list[str]] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if match := re.fullmatch(r"--?(no)?(config(?:\.[^=\[]+)?)(?:=(.*))?", argument, re.DOTALL):
            annotation, text = _annotation(match[2], cls), match[3]
            if text is None:
                text = str(not match[1]) if annotation is bool else following
            if typing.get_origin(annotation) is not tuple:
                given.setdefault(match[2], []).append(text)
    for name, texts in given.items():
        if len(set(texts)) > 1:
            print(f"note: --{name} is given {len(texts)} times; using --{name}={texts[-1]}", file=sys.stderr)


def _as_absl_reads(arguments: Sequence[str], values: flags.FlagValues, cls: Any) -> list[str]:
    """Rewrites two spellings that absl and ml_collections do not accept.

    These are yes, on, no and off for booleans, and a single string without a comma for a tuple of strings.
    """
    result = []
    for argument in arguments:
        if match := re.fullmatch(r"(--?([^=]+)=)(.*)", argument, re.DOTALL):
            annotation, text = _annotation(match[2], cls), match[3]
            if annotation in (bool, BoolOrAuto) or (match[2] in values and getattr(values[match[2]], "boolean", False)):
                text = _BOOLEANS.get(text.strip().lower(), text)
            elif annotation == tuple[str, ...] and "," not in text and not text.lstrip().startswith(tuple("([\"'")):
                text = repr((text,)) if text else text
            argument = match[1] + text
        result.append(argument)
    return result


def _annotation(flag: str, cls: Any) -> Any:
    """The annotated type of the option that a flag such as "config.train.steps" sets, or None."""
    key = flag.partition("[")[0].removeprefix("config.")
    if cls is None or not flag.startswith("config.") or key not in option_names.keys(cls):
        return None
    return option_names.annotation(key, cls)


def _with_underscores(argument: str, values: flags.FlagValues) -> str:
    """Rewrites --top-p=0.9 as --top_p=0.9, and --no-stream as --nostream, where the latter is a flag."""
    dashed, equals, text = argument.partition("=")
    name = dashed.lstrip("-").replace("-", "_")
    if not dashed.startswith("--") or dashed[2:] in values or "-" not in dashed[2:]:
        return argument
    for prefix in ("", "no_"):
        known = name.removeprefix(prefix)
        if name.startswith(prefix) and known in values and (not prefix or getattr(values[known], "boolean", False)):
            return f"--{prefix.rstrip('_')}{known}{equals}{text}"
    return argument


def _split_source(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Returns the value of the last `--config=SOURCE` (or `--config SOURCE`), and the other arguments."""
    source, remaining = None, []
    iterator = iter(arguments)
    for argument in iterator:
        match = re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            remaining.append(argument)
            continue
        source = match[1] if match[1] is not None else next(iterator, "")
        if not source or source.startswith("--"):
            raise UserError("--config needs a value: a recipe, a file or a run directory")
    return source, remaining


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Returns {key: text} of the arguments --config.KEY=VALUE; the index in KEY[0]=VALUE is dropped."""
    matches = (re.match(r"--?(?:no)?config\.([^=\[]+)[^=]*=?(.*)", argument, re.DOTALL) for argument in arguments)
    return {match[1]: match[2] for match in matches if match}


def _stray(arguments: Sequence[str], error: flags.Error, command: Command) -> str:
    """Returns "; did you mean --NAME=TEXT?" if a required flag is missing and an argument has no flag, else "".

    For several of both, the suggestion is the whole command.
    """
    missing = re.findall(r"Flag --(\S+) must have a value other than None", str(error))
    pairs = zip(["", *arguments], arguments, strict=False)
    stray = [
        text for before, text in pairs if not text.startswith("-") and (not before.startswith("-") or "=" in before)
    ]
    if len(missing) > 1 and len(stray) > 1 and command.config is None:
        names = sorted(missing, key=lambda name: _REQUIRED.index(name) if name in _REQUIRED else len(_REQUIRED))
        values = " ".join(f"--{name}={shlex.quote(text)}" for name, text in zip(names, stray, strict=False))
        return f"; did you mean python -m llm_jax.{command.name} {values}?"
    return f"; {_as_flag(stray[0], missing[0], command)}" if missing and stray else ""


def _as_flag(text: str, name: str, command: Command) -> str:
    """Returns "did you mean --NAME=TEXT?", with --config for a recipe or a file, or a run without a NAME; else ""."""
    is_recipe = text.endswith((".py", ".json", ".toml")) or text in configuration.recipes()
    is_run = not name and pathlib.Path(text, "config.json").is_file()
    if command.config is not None and (is_recipe or is_run):
        name = "config"
    return f"did you mean --{name}={shlex.quote(text)}?" if name else ""


def _unknown_names(arguments: Sequence[str], values: flags.FlagValues) -> list[str]:
    """The names of the arguments --NAME=VALUE that are neither flags of the command nor options of `--config`."""
    names = [match[1] for text in arguments if (match := re.fullmatch(r"--?([A-Za-z_][\w-]*)=.*", text, re.DOTALL))]
    return [name for name in names if name not in values]


def _unknown_flag(name: str, command: Command, values: flags.FlagValues) -> str:
    if flag := next((flag for flag in option_names.OTHER_FLAGS.get(name, ()) if flag.split("=")[0] in values), None):
        return f"unknown flag --{name}; did you mean --{flag}?"
    is_option = command.config is not None and name in option_names.OTHER_NAMES
    if not is_option and (explanation := unsupported_names.explanation(name, command.name)):
        return f"unknown flag --{name}; {explanation}"
    if command.config is not None and (option := option_names.resolve(name, command.config)):
        return f"unknown flag --{name}; did you mean --config.{option}?"
    near = difflib.get_close_matches(name.replace("-", "_"), list(values), 1, 0.6)
    hint = f"did you mean --{near[0]}?" if near else f"python -m llm_jax.{command.name} --help lists the flags"
    return f"unknown flag --{name}; {hint}"


def _illegal_value(error: Any, command: Command, values: flags.FlagValues) -> str:
    """Returns the message for an invalid value of a flag or an option: the flag, the value and what is expected."""
    match = re.fullmatch(r"flag --?([^=]+)=(.*?): (.*)", str(error), re.DOTALL)
    if match is None:
        return _message(error)
    name, value, reason = match.groups()
    if annotation := _annotation(name, command.config):
        return configuration.wrong_type(name.removeprefix("config."), value, annotation)
    parser: Any = values[name].parser if name in values else None
    if choices := getattr(parser, "enum_values", None):
        if value == "None" and values[name].value is None:
            return f"--{name} is required; expected one of {', '.join(filter(None, choices))}"
        return f"--{name}={value}; {expected(value, choices)}"
    if parser and parser.flag_type() in _EXPECTED and not reason.startswith("expected"):
        limits = [(word, getattr(parser, f"{end}_bound", None)) for word, end in (("from", "lower"), ("to", "upper"))]
        bounds = "".join(f" {word} {limit}" for word, limit in limits if limit is not None)
        return f"--{name}={value}; expected {_EXPECTED[parser.flag_type()]}{bounds}"
    return _message(error)


def _message(error: Any) -> str:
    """Returns the last line of an absl error in the wording of the commands."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if match := re.search(r"Flag --(\S+) must have a value other than None", text):
        return f"--{match[1]} is required"
    return re.sub(r"^flag (--)", r"\1", text)
