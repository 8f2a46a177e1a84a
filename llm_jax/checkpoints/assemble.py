"""Parameters out of a table of names and a source of tensors, each tensor read when its turn comes."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llm_jax import trees
from llm_jax.checkpoints.names import Names, Their
from llm_jax.errors import UserError
from llm_jax.weights import Node

Shardings = Callable[[Any], Any]
_AT_ONCE = 2**22  # bytes of a tensor that are read before they are put in place
_ALIGNED = 64  # bytes, to which memory must be aligned for JAX to take it over on CPU


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
    """Our path -> their tensor, for every parameter: one entry per layer, whatever the layout of `abstract`.

    Raises:
      UserError: the table has no name for a parameter.
    """
    found = {}
    for path in (name for stacked in trees.flatten(abstract) for name in trees.expand(stacked)):
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

    On the host there is one shard of one parameter at a time (on CPU that is the parameter itself), and
    some 4 MiB of the file.

    Args:
      wanted: see `names`.
      abstract: shapes and dtypes of the parameters, in any layout.
      shardings: abstract parameters -> their shardings.
      ignored: whether a tensor of this name may be left over.
      node: a tensor as a weight that is no array, or None where it is to be one; wants one entry per layer.

    Raises:
      UserError: tensors are missing, left over or of another shape; all are named.
    """
    flat, placed = trees.flatten(abstract), trees.flatten(shardings(abstract))
    shapes = {name: leaf.shape[_stacked(path) :] for path, leaf in flat.items() for name in trees.expand(path)}
    left = {n for n in source.shapes if not ignored(n)} - {their.name for their in wanted.values()}
    problems = [f"- {their.name} (for {ours})" for ours, their in wanted.items() if their.name not in source.shapes]
    problems += [f"+ {name} {source.shapes[name]}" for name in sorted(left)]
    for ours, their in wanted.items():
        found = source.shapes.get(their.name)
        if found and found != (shape := their_shape(their, shapes[ours])):
            problems.append(f"! {their.name} is {found}, expected {shape} for {ours}")
    if problems:
        more = f"\n... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise UserError(
            f"{source.what}: the tensors are not those that its configuration wants (- missing, + left over, "
            "! another shape):\n" + "\n".join(problems[:40]) + more
        )
    made = {}
    for path, leaf in tqdm(flat.items(), "reading weights", leave=False, delay=2, disable=None):
        of = [wanted[name] for name in trees.expand(path)]
        kept = node(of[0]) if node else None
        made[path] = jax.tree.map(jnp.asarray, kept) if kept else _array(source, of, leaf, placed[path])
    return trees.unflatten(made)


def _stacked(path: str) -> bool:
    return trees.layers_of(path) is not None


def _array(source: Source, of: list[Their], leaf: Any, sharding: Any) -> jax.Array:
    """A parameter out of the tensor of it, or of each of the layers that are stacked in it."""
    stacked = len(leaf.shape) > len(source.shapes[of[0].name])

    def shard(index: Any) -> np.ndarray:
        spans = [range(*s.indices(size)) for s, size in zip(index, leaf.shape, strict=True)]
        out = _empty(tuple(map(len, spans)), leaf.dtype)
        layers = [of[i] for i in spans[0]] if stacked else of
        for their, place in zip(layers, out if stacked else [out], strict=True):
            _fill(place, source, their, spans[stacked:], leaf.shape[-1])
        return out

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that JAX takes over as it is on CPU, where it would copy what is not aligned."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    begin = -memory.ctypes.data % _ALIGNED
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _fill(out: np.ndarray, source: Source, their: Their, spans: list[range], width: int) -> None:
    """Reads the part `spans` of a parameter of ours, whose last axis is `width` long, into `out`."""
    begin = their.part[0] * width
    spans = [*spans[:-1], range(spans[-1].start + begin, spans[-1].stop + begin)]
    out, spans = (out.T, spans[::-1]) if their.turned else (out, spans)
    rows, *columns = (slice(s.start, s.stop) for s in spans)
    step = max(1, _AT_ONCE // (4 * math.prod(out.shape[1:])))
    for begin in range(0, len(out), step):
        end = min(begin + step, len(out))
        values = source.read(their.name, (slice(rows.start + begin, rows.start + end), *columns))
        out[begin:end] = values.astype(np.float32) + their.plus if their.plus else values


def their_shape(their: Their, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Of the whole tensor that a parameter of ours is, or is a part of."""
    shape = (*ours[:-1], ours[-1] * their.part[1])
    return shape[::-1] if their.turned else shape


def theirs(parts: list[tuple[Their, Any]]) -> np.ndarray:
    """A tensor of theirs out of the dense arrays of ours that it is made of: the inverse of `load`."""
    arrays = []
    for their, ours in sorted(parts, key=lambda part: part[0].part):
        array = np.asarray(jax.device_get(ours))
        arrays.append((array.astype(np.float32) - their.plus).astype(array.dtype) if their.plus else array)
    whole = np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0]
    return np.ascontiguousarray(whole.T if parts[0][0].turned else whole)


def by_tensor(wanted: Mapping[str, Their]) -> dict[str, list[tuple[Their, str]]]:
    """Their name -> the parameters of ours that it is made of."""
    found: dict[str, list[tuple[Their, str]]] = {}
    for ours, their in wanted.items():
        found.setdefault(their.name, []).append((their, ours))
    return found
