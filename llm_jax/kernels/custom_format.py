"""Custom number formats: a class with `encode` and `decode` (`extensions`).

    @dataclasses.dataclass(frozen=True)
    class Ternary:
        option: float = 1.0

        def encode(self, w):      # float32 (inputs, outputs) -> {name: array with two axes}
        def decode(self, parts):  # its result -> floats (inputs, outputs)

Both are functions of `jax.numpy`, traced by `jax.jit` and `jax.vmap`, and computed by XLA. Embedding tables, whose rows
are read and which are multiplied transposed, are passed transposed, so that the first axis is always the one that a
product contracts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import extensions
from llm_jax.errors import UserError
from llm_jax.extensions import Extension

KEY = "scheme"  # of the errors; the specification follows it

# Letters of shapes: I in, O out.


@dataclasses.dataclass(frozen=True)
class CustomFormat:
    """A custom number format.

    Attributes:
      extension: the class and its options.
      instance: an instance of the class.
    """

    extension: Extension
    instance: Any = dataclasses.field(compare=False)  # the specification determines it

    @property
    def specification(self) -> str:
        """FILE:NAME(OPTIONS)#SHA256."""
        return self.extension.specification

    def encode(self, w: jax.Array, axis: int) -> dict[str, jax.Array]:
        """The parts that represent a weight.

        Args:
          w: float (I, O).
          axis: the axis that its product contracts, -2 or -1.

        Returns:
          {name: array with two axes}; for axis -1, of the transposed weight.

        Raises:
          UserError: the class returns anything else, or raises an exception.
        """
        parts = self.extension.call(self.instance.encode, _turned(w.astype(jnp.float32), axis))
        if not isinstance(parts, dict) or not parts:
            raise self._error("encode", f"{type(parts).__name__}; expected a dict of arrays, with at least one")
        for name, part in parts.items():
            if not isinstance(name, str) or not hasattr(part, "shape") or not hasattr(part, "dtype"):
                raise self._error("encode", f"{type(part).__name__} as {name!r}; expected names with arrays")
            if len(part.shape) != 2:
                raise self._error("encode", f"'{name}' of shape {part.shape}; expected two axes, which may have size 1")
        return parts

    def decode(self, parts: Mapping[str, jax.Array], axis: int) -> jax.Array:
        """The weight that the parts represent, float32 (I, O); see `encode`."""
        w = self.extension.call(self.instance.decode, dict(parts))
        if not hasattr(w, "astype"):
            raise self._error("decode", f"{type(w).__name__}; expected an array")
        return _turned(w.astype(jnp.float32), axis)

    def check(self, shape: tuple[int, ...], axis: int) -> None:
        """Traces `encode` and `decode` for a weight of this shape (I, O).

        Raises:
          UserError: one of them raises an exception, or returns other types or shapes than documented.
        """
        parts = jax.eval_shape(lambda w: self.encode(w, axis), jax.ShapeDtypeStruct(shape, jnp.float32))
        sizes = dict(zip(("inputs", "outputs"), shape if axis == -2 else shape[::-1], strict=True))
        self.extension.check_output("decode", self.instance.decode, (parts,), sizes)
        self.shape(parts, axis)

    def shape(self, parts: Mapping[str, Any], axis: int) -> tuple[int, ...]:
        """The shape (I, O) of the weight that parts of one layer, arrays or `jax.ShapeDtypeStruct`s, represent."""
        return _shape(self, axis, tuple((name, tuple(part.shape), part.dtype) for name, part in parts.items()))

    def _error(self, name: str, returned: str) -> UserError:
        return self.extension.error(f"{name} returns {returned}")


def load(specification: str) -> CustomFormat:
    """The format of `FILE:NAME(OPTIONS)`, perhaps with `#SHA256`.

    Raises:
      UserError: see `extensions.load`; or the class lacks `encode` or `decode`, or cannot be constructed.
    """
    return _pinned(specification) if "#" in specification else _pinned(extensions.pinned(KEY, specification))


@functools.lru_cache(64)
def _pinned(specification: str) -> CustomFormat:
    extension = extensions.load(KEY, specification)
    if missing := [name for name in ("encode", "decode") if not callable(getattr(extension.target, name, None))]:
        raise extension.error(f"expected a class with the methods encode(w) and decode(parts); it lacks {missing[0]}")
    return CustomFormat(extension, extension.call(extension.bind(extension.target)))


@functools.lru_cache(1024)
def _shape(fmt: CustomFormat, axis: int, parts: tuple[tuple[str, tuple[int, ...], Any], ...]) -> tuple[int, ...]:
    abstract = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in parts}
    return jax.eval_shape(lambda parts: fmt.decode(parts, axis), abstract).shape


def _turned(w: jax.Array, axis: int) -> jax.Array:
    return w if axis == -2 else w.T
