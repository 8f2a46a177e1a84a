"""Grids of overrides, from one line of text or a Python file.

    points = parse("model.position.kind=rope,alibi; train.seed=0..2")
    points = parse("model.width=64,128 & model.mlp_dim=128,256; optim.lr=loguniform(1e-4, 1e-2, 5)")

`;` forms the Cartesian product of keys, `&` varies keys together. The values of a key are

    a,b,c                     a list
    0..2, 8..64..8            numbers from the first to the last, in steps of 1 or of the third number
    linspace(a, b, n)         n numbers from a to b with equal differences
    logspace(a, b, n)         n numbers from a to b with equal ratios
    uniform(a, b, n)          n random numbers, uniform between a and b
    loguniform(a, b, n)       n random numbers between a and b, log-uniform
"""

import ast
import collections
import itertools
import json
import math
import pathlib
import re
import runpy
import typing
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any

import numpy as np

from llm_jax import configuration, extensions
from llm_jax.errors import UserError
from llm_jax.schema import Config, option_names

Overrides = dict[str, Any]

_MAX_POINTS = 100_000
_NAME_LENGTH = 100
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?:\.\.({_NUMBER}))?")
_CALL = re.compile(r"(\w+)\s*\((.*)\)")
_FUNCTIONS: dict[str, Callable[[float, float, int, np.random.Generator], Any]] = {
    "linspace": lambda a, b, n, rng: np.linspace(a, b, n),
    "logspace": lambda a, b, n, rng: np.geomspace(a, b, n),
    "uniform": lambda a, b, n, rng: rng.uniform(a, b, n),
    "loguniform": lambda a, b, n, rng: np.exp(rng.uniform(math.log(a), math.log(b), n)),
}


def parse_assignment(text: str, flag: str, expected: str) -> tuple[str, str]:
    """Splits "KEY=VALUES" into (dotted key, text of its values).

    Args:
      flag, expected: the flag with the text and the form that it expects, for error messages.

    Raises:
      UserError: the text has no key or no values, or the key is unknown.
    """
    key, _, values = (part.strip() for part in text.partition("="))
    if not values:
        raise UserError(f"{flag}: '{text}' is not an assignment; expected {expected}")
    if problem := option_names.unknown_option(key, Config, values):
        raise UserError(f"{flag}: {problem}")
    return key, values


def parse(text: str, seed: int = 0) -> list[Overrides]:
    """Returns the points of a grid as overrides by dotted key, in the order of the text; the last key varies fastest.

    Args:
      seed: random seed of `uniform` and `loguniform`; every key has its own random numbers.

    Raises:
      UserError: a clause cannot be read, a key is unknown or repeated, or a value does not fit the type of the option.
    """
    factors: list[list[Overrides]] = []
    keys: list[str] = []
    for clause in split(text, ";"):
        columns = {}
        for assignment in split(clause, "&"):
            key, values = parse_assignment(assignment, "--grid", "KEY=VALUE,VALUE,...")
            if key in keys:
                raise UserError(f"--grid: '{key}' is given twice; give its values in one list")
            keys.append(key)
            columns[key] = _values(key, values, seed)
        lengths = {key: len(values) for key, values in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
            raise UserError(f"--grid: keys that are joined by & need equal numbers of values; {counts}")
        factors.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    return product(factors)


def product(factors: Sequence[Sequence[Overrides]]) -> list[Overrides]:
    """Returns all combinations of one point of each factor.

    Raises:
      UserError: more than 100,000 points.
    """
    if math.prod(map(len, factors)) > _MAX_POINTS:
        raise UserError(f"--grid: {math.prod(map(len, factors)):,} points; expected at most {_MAX_POINTS:,}")
    return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*factors)]


def read_file(path: str) -> list[Overrides]:
    """Returns the points from `get_points()` of a Python file: an iterable of mappings {dotted key: value}.

    Raises:
      UserError: the file does not exist, has no `get_points`, or raises an exception.
    """
    if not pathlib.Path(path).expanduser().is_file():
        raise UserError(f"--points={path}: no such file; expected a Python file with get_points()")
    try:
        module = runpy.run_path(str(pathlib.Path(path).expanduser()))
        if not callable(module.get("get_points")):
            raise UserError(f"--points={path}: no function get_points() in this file")
        points = list(module["get_points"]())
    except UserError:
        raise
    except extensions.FAILURES as error:
        raise UserError(f"--points={path} fails ({extensions.describe_exception(error)})") from error
    for i, point in enumerate(points):
        if not isinstance(point, Mapping):
            raise UserError(f"--points={path}: point {i} is {point!r}; expected a mapping of overrides")
        for key, value in point.items():
            if problem := option_names.unknown_option(str(key), Config, str(value)):
                raise UserError(f"--points={path}: {problem}")
    return [{key: configuration.python_value(value) for key, value in point.items()} for point in points]


def names(points: Sequence[Overrides]) -> list[str]:
    """Returns a directory name for every point, such as "kind=rope_seed=0", with shortened keys (`short_keys`).

    A name depends on the keys of the sweep and on the values of the point, not on the order of the points.

    Raises:
      UserError: two points are equal.
    """
    short = short_keys({key for point in points for key in point})
    result = ["_".join(f"{short[k]}={_value_text(v)}" for k, v in point.items()) or "point" for point in points]
    result = [re.sub(r"[^\w.=+-]+", "-", name) for name in result]
    counts = collections.Counter(result)
    for i, point in enumerate(points):
        if counts[result[i]] > 1 or len(result[i]) > _NAME_LENGTH:
            digest = zlib.crc32(json.dumps(point, sort_keys=True).encode())
            result[i] = f"{result[i][: _NAME_LENGTH - 9]}_{digest:08x}"
    if repeated := {name for name in result if result.count(name) > 1}:
        raise UserError(f"--grid: the point {points[result.index(min(repeated))]} occurs more than once")
    return result


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Returns {dotted key: its shortest suffix that is not a suffix of another key}, for headings and names."""
    keys = sorted(keys)
    result = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        result[key] = next(
            end for end in ends if not any(k != key and f".{k}".endswith(f".{end}") for k in keys) or end == key
        )
    return result


def split(text: str, separator: str, flag: str = "--grid") -> list[str]:
    """Splits a text at separators outside of brackets and quotes; empty parts, as after a last ";", are omitted.

    Args:
      flag: the flag with the text, for error messages.

    Raises:
      UserError: a bracket or quote is not closed, or a value before or after a comma is missing.
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise UserError(f"{flag}: '{text.strip()}' has an unclosed {'quote' if quote else 'bracket'}")
    if separator == "," and not all(part.strip() for part in parts):
        raise UserError(f"{flag}: '{text.strip()}' has an empty value before or after a comma")
    return [part.strip() for part in parts if part.strip()]


def _values(key: str, text: str, seed: int) -> list[Any]:
    kind = option_type(key)
    call = _CALL.fullmatch(text)
    if call and call[1] in _FUNCTIONS and kind in (int, float):
        try:
            low, high, count = (float(argument) for argument in split(call[2], ","))
            if call[1].startswith("log") and min(low, high) <= 0:
                raise ValueError
            rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
            numbers = [float(f"{x:.4g}") for x in _FUNCTIONS[call[1]](low, high, int(count), rng)]
        except ValueError as error:
            sign = "positive " if call[1].startswith("log") else ""
            raise UserError(f"--grid: {key}={text}; expected {call[1]}(FROM, TO, COUNT) of {sign}numbers") from error
        numbers = [round(x) for x in numbers] if kind is int else numbers
        return list(dict.fromkeys(numbers)) if kind is int else numbers
    if kind in (int, float) and (limits := RANGE.fullmatch(text)):
        first, last, step = Decimal(limits[1]), Decimal(limits[2]), Decimal(limits[3] or 1)
        if step <= 0 or last < first:
            raise UserError(f"--grid: {key}={text}; expected FROM..TO or FROM..TO..STEP with FROM at most TO")
        if (last - first) / step > _MAX_POINTS:
            raise UserError(f"--grid: {key}={text} has more than {_MAX_POINTS:,} values")
        return [_number(key, first + i * step, kind) for i in range(int((last - first) / step) + 1)]
    return [convert(key, value, kind) for value in split(text, ",")]


def option_type(key: str) -> Any:
    """The type of an option without its range: int, float, str, bool, or a type for tuples and rules."""
    cls: Any = Config
    for part in key.split("."):
        cls = option_names.options(cls)[part]
    return typing.get_args(cls)[0] if typing.get_origin(cls) is Annotated else cls


def _number(key: str, value: Decimal, kind: Any) -> int | float:
    if kind is int and value != int(value):
        raise UserError(f"--grid: {key}={value}; expected an integer")
    return int(value) if kind is int else float(value)


def convert(key: str, text: str, kind: Any, flag: str = "--grid") -> Any:
    """Converts the text of one value to the type of its option.

    Raises:
      UserError: the text is not a valid value; the message names `flag`.
    """
    try:
        if kind is str:
            return ast.literal_eval(text) if text[0] in "'\"" else text
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text) if kind in (int, float) else ast.literal_eval(text)
    except (ValueError, SyntaxError, KeyError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"{flag}: {key}={text}; expected a value of type {name}") from error


def _value_text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
