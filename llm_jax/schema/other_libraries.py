"""Errors for keyword arguments of other libraries, with their names here."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llm_jax.errors import UserError
from llm_jax.schema import option_names, unsupported_names

F = TypeVar("F", bound=Callable[..., Any])


# What a flag of `option_names.OTHER_FLAGS` is called as a keyword argument.
_KEYWORDS = {"checkpoint": "name"}


def explain_unknown_keywords(target: F, within: Callable[[str], str] = lambda name: "") -> F:
    """Decorates a function or a dataclass: the error for an unknown keyword argument suggests its name here.

    It raises UserError, with a hint of `option_names.OTHER_FLAGS` or `unsupported_names`, or the nearest name.

    Args:
      within: (name of an unknown keyword argument) -> the argument that it is a part of, as it is written, such as
        "options=DecodingOptions(top_k=...)"; "": of none.
    """
    function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name not in names:
                raise UserError(f"{target.__name__}() has no argument '{name}'; {_keyword_hint(name, names, within)}")
        return function(*arguments, **keywords)

    if not isinstance(target, type):
        return checked  # type: ignore[return-value]
    target.__init__ = checked  # type: ignore[misc]
    return target


def _keyword_hint(name: str, names: Sequence[str], within: Callable[[str], str]) -> str:
    others = [_KEYWORDS.get(flag, flag) for flag in option_names.OTHER_FLAGS.get(name, ())]
    if other := next((other for other in others if other.split("=")[0] in names), None):
        return f"did you mean {other}?"
    if argument := within(name):
        return f"did you mean {argument}?"
    if explanation := unsupported_names.explanation(name):
        return explanation
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"expected {', '.join(names)}"


def within_options(cls: Any) -> Callable[[str], str]:
    """`within` of `explain_unknown_keywords` for functions with an argument `options` of the dataclass `cls`."""
    names = [field.name for field in dataclasses.fields(cls)]

    def within(name: str) -> str:
        others = [flag.split(" ")[0] for flag in option_names.OTHER_FLAGS.get(name, ()) if flag.split("=")[0] in names]
        option = name if name in names else next(iter(others), "")
        return f"options={cls.__name__}({option if '=' in option else f'{option}=...'})" if option else ""

    return within


def within_overrides(argument: str) -> Callable[[str], str]:
    """The `within` of `explain_unknown_keywords` for a function that takes options of a configuration.

    Args:
      argument: how they are given, with {} for the mapping of overrides.
    """

    def within(name: str) -> str:
        explained = name not in option_names.OTHER_NAMES and unsupported_names.explanation(name)
        option, _, value = ("" if explained else option_names.resolve(name)).partition("=")
        written = f'"{value}"' if value else "..."
        return argument.format(f'{{"{option}": {written}}}') if option else ""

    return within
