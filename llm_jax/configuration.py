"""Builds checked configurations from recipes, files, runs and overrides.

    config = load("default", {"model.width": 128})      # a recipe of configs/ by name
    config = load("my_config.py", {"train.seed": 1})    # a Python file with get_config(), or a .json or .toml file
    config = load("runs/default")                       # the configuration of a run
    config = load({"model": {"width": 128}})            # a partial mapping over the defaults

An unknown key, a value of the wrong type and a value out of range raise `UserError`. The message names the dotted key,
and for an unknown key also the nearest existing key. The default values are in `configs/default.py`.
"""

import copy
import dataclasses
import difflib
import functools
import json
import math
import os
import pathlib
import runpy
import tomllib
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from llm_jax import extensions
from llm_jax.errors import UserError
from llm_jax.schema import BoolOrAuto, Config, EmbeddingsConfig, Rules, choice, derived, type_text
from llm_jax.schema.option_names import RENAMED, nearest, options

# The recipe that has the default values of a configuration dataclass.
DEFAULT_RECIPES: dict[Any, str] = {Config: "default", EmbeddingsConfig: "word2vec"}
_COMMANDS = {Config: "training a language model", EmbeddingsConfig: "train_embeddings"}

_SUFFIXES = (".py", ".json", ".toml")  # of files with a configuration

# The options that replace "sentiment:NAME", a data source of earlier versions. Do not change these values: old runs are
# resumed and evaluated on the same examples.
_SENTIMENT = {
    "kind": "labelled",
    "labelled": {
        "text_field": "text",
        "label_field": "rating",
        "choices": ("negative", "positive"),
        "thresholds": (0.0,),
        "question": "Is the sentiment of the sentence positive or negative? Answer with one word.",
        "template": "{question}\n\n{text}\n\nLabel:",
        "test_size": 1000.0,
        "validation_size": 500.0,
        "train_size": 2000,
    },
}
# Values of options that old checkpoints lack, where the current default would change how the checkpoint behaves.
_VALUE_BEFORE = {"eval.task_examples": 0}


def load(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config = "default",
    overrides: Mapping[str, Any] | None = None,
    cls: Any = Config,
) -> Any:
    """Returns the checked configuration of a recipe, a file, a run or a mapping, with overrides.

    Args:
      source: the name of a recipe in configs/ ("default"); the path of a Python file with `get_config()`, of a .json
        or .toml file, or of a run or checkpoint directory; a mapping, nested or with dotted keys; or a `Config`.
        Omitted options have the values of configs/default.py.
      overrides: {dotted key: value}, such as {"model.position.kind": "alibi"}.
      cls: the dataclass to build: `Config`, or `EmbeddingsConfig` for word vectors.

    Raises:
      UserError: no such recipe or file, an unknown key, or a value of the wrong type or out of range.
    """
    nested = _nested(source)
    _refuse_other_command(source, nested, cls)
    mapping = _complete(nested, cls)
    if isinstance(source, str | os.PathLike) and find(source).is_dir():
        derived.reset_derived(mapping, _leaves(overrides or {}))
    for key, value in (overrides or {}).items():
        _set(mapping, key, value, cls)
    config = build(mapping, cls)
    if cls is not Config:
        return config
    before = flat(default())
    explicit = {key for key, value in flat(config).items() if value != before[key]}
    if not config.lora.rank:  # a recipe may set options of adapters that take effect only if lora.rank is set
        explicit = {key for key in explicit if not key.startswith("lora.")}
    partial = isinstance(source, Mapping) or (isinstance(source, str | os.PathLike) and find(source).suffix != ".py")
    source_keys = source.explicit if isinstance(source, Config) else _leaves(nested) if partial else frozenset()
    for keys in (source_keys, _leaves(overrides or {})):
        explicit = _overridden(config, explicit, keys)
    return dataclasses.replace(config, explicit=frozenset(explicit))


def _overridden(config: Config, explicit: Iterable[str], keys: Iterable[str]) -> set[str]:
    """Returns `explicit` with `keys` added. A new tokenizer.path removes an earlier tokenizer.kind and vocab_size."""
    is_path = "tokenizer.path" in keys and config.tokenizer.path
    return {*explicit}.difference(("tokenizer.kind", "tokenizer.vocab_size") if is_path else ()) | {*keys}


def read(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options of a recipe, file or run directory as a nested mapping; omitted options are not added."""
    path = find(source)
    try:
        if path.is_dir():
            return upgrade(json.loads((path / "config.json").read_text()))
        if path.suffix == ".json":
            mapping = json.loads(path.read_text())
            return upgrade(mapping) if path.name == "config.json" else mapping
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text())
        module = runpy.run_path(str(path))
        if "get_config" not in module:
            raise UserError(f"configuration '{source}': this file has no function get_config()")
        return _plain(module["get_config"]())
    except UserError:
        raise
    except extensions.FAILURES as error:  # a configuration file may be Python code
        raise UserError(f"configuration '{source}' cannot be read ({extensions.describe_exception(error)})") from error


def find(source: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the file or run directory that `source` names; see `load`.

    Raises:
      UserError: it does not exist; the message lists the recipes.
    """
    path = pathlib.Path(source).expanduser()
    if str(source) in recipes():
        return recipes_directory() / f"{source}.py"
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"configuration '{source}': this directory has no config.json; expected a run or one of its checkpoints"
        )
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise UserError(
            f"configuration '{source}': expected a .py, .json or .toml file, not '{path.suffix or path.name}'"
        )
    if path.exists():
        return path
    packaged = recipes_directory() / path.name
    if path.parts[:-1] in ((), ("configs",)) and (recipe_path := packaged.with_suffix(".py")).is_file():
        return recipe_path
    name, colon, _ = str(source).partition(":")
    if colon and (name in recipes() or pathlib.Path(name).is_file()):
        cure = f"give --config={name} and override its options with --config.KEY=VALUE"
        raise UserError(f"configuration '{source}': a recipe has no arguments after a colon; {cure}")
    near = difflib.get_close_matches(path.stem, recipes(), 1)
    raise UserError(
        f"configuration '{source}': no such file; {f'did you mean {near[0]!r}? ' if near else ''}expected a recipe "
        f"({', '.join(recipes())}), a .py, .json or .toml file, or a run directory"
    )


def recipes(cls: Any = None) -> list[str]:
    """The names of the recipes in configs/; with `cls`, of those that give a configuration of this dataclass."""
    names = sorted(path.stem for path in recipes_directory().glob("*.py") if not path.stem.startswith("_"))
    return names if cls is None else [name for name in names if read(name).keys() <= options(cls).keys()]


def recipes_directory() -> pathlib.Path:
    """Returns the directory configs/, which is inside an installed package, and at the top of a checkout."""
    inside = pathlib.Path(__file__).parent / "configs"
    return inside if inside.is_dir() else pathlib.Path(__file__).parents[1] / "configs"


def recipe(name: str) -> Any:
    """Returns a new ConfigDict from `get_config()` of a recipe in configs/, to derive another recipe from it."""
    return runpy.run_path(str(recipes_directory() / f"{name}.py"))["get_config"]()


@functools.cache
def _defaults(cls: Any = Config) -> dict[str, Any]:
    return _plain(recipe(DEFAULT_RECIPES[cls]))


def default(section: str = "") -> Any:
    """The defaults as a `Config`, or as the dataclass of one dotted section, such as "model.position"."""
    config = build(_defaults())
    return functools.reduce(getattr, section.split("."), config) if section else config


def build(mapping: Mapping[str, Any], cls: Any = Config, prefix: str = "", root: Any = None) -> Any:
    """Converts a complete nested mapping to the dataclass `cls`, and checks names, types and ranges.

    Args:
      prefix: dotted path of the dataclass within `root`, such as "model."; for error messages.
      root: the dataclass of the whole configuration; by default `cls`, or `Config` with a prefix.

    Raises:
      UserError: an unknown or missing key, or a value of the wrong type; the message names the dotted key.
    """
    root = root or (Config if prefix else cls)
    hints = options(cls)
    if prefix == "data.":
        mapping = {**mapping, **former_source(str(mapping.get("source", "")))}
    for key in mapping:
        if key not in hints:
            raise UserError(f"unknown config key '{prefix}{key}'; {nearest(prefix + str(key), root)}")
    values = {}
    for key, kind in hints.items():
        if key not in mapping:
            raise UserError(f"config key '{prefix}{key}' is missing")
        value = mapping[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping) and not hasattr(value, "items"):
                raise UserError(_expected_section(f"{prefix}{key}", value))
            values[key] = build(value, kind, f"{prefix}{key}.", root)
        else:
            values[key] = _convert(value, kind, prefix + key)
    return cls(**values)


def former_source(source: str) -> dict[str, Any]:
    """The options of `data` that replace "sentiment:NAME", a source of earlier versions; {} for every other source."""
    prefix, _, name = source.partition(":")
    return {"source": f"asset:{name}", **_SENTIMENT} if prefix == "sentiment" else {}


def upgrade(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the configuration of an old checkpoint: replaces former names and adds missing options."""
    upgraded = copy.deepcopy(_defaults())
    for key, before in _VALUE_BEFORE.items():
        _set(upgraded, key, before)
    _overlay(upgraded, mapping, renamed=True)
    for key in extensions.KEYS:
        value: Any = upgraded
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        extensions.require_hash(key, value)
    return upgraded


def as_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested dictionaries of JSON values; `build` is the inverse."""
    return {
        key: as_dict(value) if dataclasses.is_dataclass(value := getattr(config, key)) else value
        for key in options(type(config))
    }


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The dataclass as {dotted key: value}."""
    values: dict[str, Any] = {}
    for key in options(type(config)):
        value = getattr(config, key)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def replace(config: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns a copy of a configuration dataclass with changed values, {dotted key: value}, and checks it again.

    Args:
      prefix: dotted path of the dataclass within `Config`, such as "model."; for error messages.
    """
    mapping = as_dict(config)
    for key, value in changes.items():
        _set(mapping, key, value, type(config), prefix)
    changed = build(mapping, type(config), prefix)
    return (
        dataclasses.replace(changed, explicit=frozenset(_overridden(changed, config.explicit, _leaves(changes))))
        if isinstance(config, Config)
        else changed
    )


def _nested(source: Any) -> Mapping[str, Any]:
    if isinstance(source, Config):
        return as_dict(source)
    if isinstance(source, str | os.PathLike):
        return read(source)
    if not isinstance(source, Mapping) and not hasattr(source, "items"):
        raise UserError(f"a configuration is {source!r}; expected a recipe, a path, a mapping or a Config")
    return _plain(source)


def _refuse_other_command(source: Any, mapping: Mapping[str, Any], cls: Any) -> None:
    """Raises UserError if a file contains the options of another command, for example of `train_embeddings`."""
    others = [other for other in DEFAULT_RECIPES if other is not cls and set(mapping) <= options(other).keys()]
    if mapping and others and not set(mapping) & options(cls).keys():
        raise UserError(f"configuration '{source}' has the options of {_COMMANDS[others[0]]}, not of {_COMMANDS[cls]}")


def _complete(mapping: Mapping[str, Any], cls: Any = Config) -> dict[str, Any]:
    complete = copy.deepcopy(_defaults(cls))
    _overlay(complete, mapping)
    return complete


def _overlay(base: dict[str, Any], mapping: Mapping[str, Any], prefix: str = "", renamed: bool = False) -> None:
    """Writes the values of `mapping` into `base`, section by section; also unknown keys, which `build` then rejects."""
    for name, value in mapping.items():
        if isinstance(name, str) and "." in name:  # a dotted key: nest it
            name, _, option = name.partition(".")
            value = {option: value}
        key = f"{prefix}{name}"
        if renamed and key in RENAMED:
            name = RENAMED[key].rsplit(".", 1)[1]
        if isinstance(base.get(name), dict):
            if not isinstance(value, Mapping):
                raise UserError(_expected_section(key, value))
            _overlay(base[name], value, f"{key}.", renamed)
        else:
            base[name] = copy.deepcopy(value)


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted keys of all options in a mapping, which may be nested or have dotted keys."""
    keys: set[str] = set()
    for name, value in mapping.items():
        keys |= _leaves(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}"}
    return keys


def _set(mapping: dict[str, Any], key: str, value: Any, cls: Any = Config, prefix: str = "") -> None:
    """Sets a dotted key; its value may be a (partial) section. Raises UserError for an unknown key."""
    *sections, name = key.split(".")
    section: Any = mapping
    for part in sections:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict) or name not in section:
        raise UserError(f"unknown config key '{prefix}{key}'; {nearest(key, cls)}")
    if isinstance(section[name], dict):
        if not isinstance(value, Mapping):
            raise UserError(_expected_section(key, value))
        _overlay(section[name], _plain(value), f"{key}.")
    else:
        section[name] = value


def _expected_section(key: str, value: Any) -> str:
    return f"config key '{key}' is {value!r}; it is a section, set one of its options: '{key}.NAME'"


def _plain(mapping: Any) -> dict[str, Any]:
    """Nested mappings and ConfigDicts as new dictionaries."""
    return {k: _plain(v) if hasattr(v, "items") else v for k, v in mapping.items()}


def python_value(value: Any) -> Any:
    """A scalar of NumPy or JAX, for example from np.logspace, as a number or text of Python; other values unchanged."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _convert(value: Any, kind: Any, key: str, declared: Any = None) -> Any:
    """`value` as the type `kind`; `declared` is the whole annotation of the option, for the error message."""
    value = python_value(value)
    if kind == BoolOrAuto:
        if isinstance(value, str):  # from the command line
            value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower(), value)
        if type(value) is bool or value == "auto":
            return value
        raise UserError(wrong_type(key, value, kind))
    if typing.get_origin(kind) is Annotated:
        plain, allowed = typing.get_args(kind)
        value = _convert(value, plain, key, kind)
        if plain is str:
            return choice(key, value, allowed)
        if not allowed[0] <= value <= allowed[1]:
            bound = f"at least {allowed[0]}" if value < allowed[0] else f"at most {allowed[1]}"
            expected = f"number of {bound}" if math.isfinite(value) else f"finite number ({type_text(kind)})"
            raise UserError(f"config key '{key}' is {value}; expected a {expected}")
        return value
    if kind == Rules:
        rules = _freeze(value)
        if isinstance(rules, tuple) and all(
            isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in rules
        ):
            return rules
    elif typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float) if item is float else item) for v in value
        ):
            return tuple(map(item, value))
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise UserError(wrong_type(key, value, declared or kind))


def wrong_type(key: str, value: Any, annotation: Any) -> str:
    """Returns the error message for a value that does not have the type of its option."""
    expected = type_text(annotation)
    if typing.get_origin(annotation) is tuple:
        value_type = str if annotation == Rules else typing.get_args(annotation)[0]
        examples = {str: "('a', 'b')", float: "(0.5, 2.0)"}
        example = "(('.*', 1.0),)" if annotation == Rules else examples[value_type]
        expected += f", such as {example}"
    return f"config key '{key}' is {value!r}; expected {expected}"


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, (list, tuple)) else value
