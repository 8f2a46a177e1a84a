"""Number formats and kernels: arrays in, arrays out."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "COMMAND":  # for `llm-jax kernels`; imported when asked for, because commands import this package
        from llm_jax.kernels.__main__ import COMMAND

        return COMMAND
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
