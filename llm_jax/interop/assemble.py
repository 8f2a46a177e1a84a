"""Parameters out of a table of names and a source of tensors, each tensor read when its turn comes."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.interop.names import Names, Their
from llm_jax.weights import Node

Shardings = Callable[[Any], Any]


class Source(Protocol):
    """Tensors by name.

    Attributes:
      what: how the source is named in errors.
      shapes: of all tensors, by name.
    """

    what: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, as it is stored or in float32."""


def names(table: Names, abstract: Any) -> dict[str, Their]:
    """Our path -> their tensor, for every parameter (one entry per layer).

    Raises:
      UserError: the table has no name for a parameter.
    """
    found = {}
    for path in trees.flatten(abstract):
        layer = re.fullmatch(r"layers/(\d+)/(.*)", path)
        template = f"layers/{{i}}/{layer[2]}" if layer else path
        if template not in table:
            raise UserError(f"this family has no tensor for '{path}'")
        their = table[template]
        found[path] = dataclasses.replace(their, name=their.name.replace("{i}", layer[1])) if layer else their
    return found


def load(
    source: Source,
    wanted: Mapping[str, Their],
    abstract: Any,
    shardings: Shardings,
    ignored: Callable[[str], bool],
    node: Callable[[Their], Node | None] | None = None,
) -> Any:
    """The parameters, each shard read and put on its device.

    Args:
      wanted: see `names`.
      abstract: shapes and dtypes of the parameters, one entry per layer.
      shardings: abstract parameters -> their shardings.
      ignored: whether a tensor of this name may be left over.
      node: a tensor as a weight that is no array, or None where it is to be one.

    Raises:
      UserError: tensors are missing, left over or of another shape; all are named.
    """
    flat, placed = trees.flatten(abstract), trees.flatten(shardings(abstract))
    left = {n for n in source.shapes if not ignored(n)} - {their.name for their in wanted.values()}
    problems = [f"- {their.name} (for {ours})" for ours, their in wanted.items() if their.name not in source.shapes]
    problems += [f"+ {name} {source.shapes[name]}" for name in sorted(left)]
    for ours, their in wanted.items():
        found = source.shapes.get(their.name)
        if found and found != (shape := _their_shape(their, flat[ours].shape)):
            problems.append(f"! {their.name} is {found}, expected {shape} for {ours}")
    if problems:
        more = f"\n... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise UserError(
            f"{source.what}: the tensors are not those that its configuration wants (- missing, + left over, "
            "! another shape):\n" + "\n".join(problems[:40]) + more
        )
    made = {}
    for ours, leaf in tqdm(flat.items(), "reading weights", leave=False, delay=2, disable=None):
        kept = node(wanted[ours]) if node else None
        made[ours] = jax.tree.map(jnp.asarray, kept) if kept else _array(source, wanted[ours], leaf, placed[ours])
    return trees.unflatten(made)


def _array(source: Source, their: Their, leaf: Any, sharding: Any) -> jax.Array:
    i, n = their.part

    def shard(index: Any) -> np.ndarray:
        bounds = [range(*s.indices(size)) for s, size in zip(index, leaf.shape, strict=True)]
        bounds = bounds[::-1] if their.turned else bounds
        begin = i * leaf.shape[-1] if n > 1 else 0
        slices = [slice(b.start, b.stop) for b in bounds]
        slices[-1] = slice(slices[-1].start + begin, slices[-1].stop + begin)
        values = source.read(their.name, tuple(slices))
        values = values.T if their.turned else values
        return np.asarray(values.astype(np.float32) + their.plus if their.plus else values).astype(leaf.dtype)

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _their_shape(their: Their, ours: tuple[int, ...]) -> tuple[int, ...]:
    shape = ours[::-1] if their.turned else ours
    return (*shape[:-1], shape[-1] * their.part[1])


def theirs(parts: list[tuple[Their, Any]]) -> np.ndarray:
    """A tensor of theirs out of the dense arrays of ours that it is made of: the inverse of `load`."""
    arrays = []
    for their, ours in sorted(parts, key=lambda part: part[0].part):
        array = np.asarray(jax.device_get(ours))
        array = (array.astype(np.float32) - their.plus).astype(array.dtype) if their.plus else array
        arrays.append(array.T if their.turned else array)
    return np.ascontiguousarray(np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0])


def by_tensor(wanted: Mapping[str, Their]) -> dict[str, list[tuple[Their, str]]]:
    """Their name -> the parameters of ours that it is made of."""
    found: dict[str, list[tuple[Their, str]]] = {}
    for ours, their in wanted.items():
        found.setdefault(their.name, []).append((their, ours))
    return found
