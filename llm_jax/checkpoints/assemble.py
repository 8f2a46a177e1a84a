"""Builds parameters from the tensors of a file, given a table of tensor names; reads each tensor when it is needed."""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llm_jax import bars, trees
from llm_jax.checkpoints.checkpoint import Shardings
from llm_jax.checkpoints.names import Names, TensorSpec
from llm_jax.errors import UserError
from llm_jax.weights import Node

_CHUNK_BYTES = 2**19  # bytes of a tensor that are read and copied at a time; they fit in a CPU cache
_ALIGNMENT = 64  # bytes; JAX on CPU takes over memory with this alignment without a copy


# dtype -> the bits of infinity as an integer; those of NaN are larger.
_INFINITY = {
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
}


class TensorSource(Protocol):
    """Tensors by name.

    Attributes:
      label: the name of the source in error messages.
      shapes: the shape of every tensor, by name.
    """

    label: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in its stored dtype or in float32."""


def specs(table: Names, params: Any) -> dict[str, TensorSpec]:
    """{path: the stored tensor} of every parameter, with one path per layer.

    Args:
      params: parameters, which may be abstract, in any layout; only their paths matter.

    Raises:
      UserError: the table has no tensor for a parameter, or the layout of its parts is not resolved (`names.resolve`).
    """
    result = {}
    for path in (name for stacked in trees.flatten(params) for name in trees.expand(stacked)):
        layer = re.fullmatch(r"layers/(\d+)/(.*)", path)
        template = f"layers/{{i}}/{layer[2]}" if layer else path
        if template not in table:
            raise UserError(f"this family has no tensor for '{path}'")
        spec = table[template]
        if spec.layout:
            raise UserError(f"this family joins '{path}' with others in one tensor, {spec.name}; not supported here")
        result[path] = dataclasses.replace(spec, name=spec.name.replace("{i}", layer[1])) if layer else spec
    return result


def load(
    source: TensorSource,
    specs: Mapping[str, TensorSpec],
    abstract: Any,
    shardings: Shardings,
    ignored: Callable[[str], bool],
    node: Callable[[TensorSpec], Node | None] | None = None,
) -> dict[str, Any]:
    """Reads the parameters, one shard at a time: each is put on its device before the next is read.

    The host memory holds one shard of one parameter at a time (on CPU that is the parameter itself), and a small part
    of the file.

    Args:
      specs: from the function `specs`.
      abstract: shapes and dtypes of the parameters, in any layout.
      shardings: abstract parameters -> their shardings.
      ignored: whether a tensor of this name may be unused.
      node: a tensor -> a quantized weight, or None to read an array; needs one entry per layer.

    Raises:
      UserError: tensors are missing, unexpected or of another shape; all are named.
    """
    flat, targets = trees.flatten(abstract), trees.flatten(shardings(abstract))
    shapes = {
        name: leaf.shape[trees.layers_of(path) is not None :]
        for path, leaf in flat.items()
        for name in trees.expand(path)
    }
    unused = {name for name in source.shapes if not ignored(name)} - {spec.name for spec in specs.values()}
    problems = [f"- {spec.name} (for {path})" for path, spec in specs.items() if spec.name not in source.shapes]
    problems += [f"+ {name} {source.shapes[name]}" for name in sorted(unused)]
    for path, spec in specs.items():
        shape, expected = source.shapes.get(spec.name), stored_shape(spec, shapes[path])
        if shape and shape != expected:
            empty = " (empty: the parts of several processes were not gathered when it was saved)" * (0 in shape)
            problems.append(f"! {spec.name} is {shape}, expected {expected} for {path}{empty}")
    if problems:
        more = f"\n... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise UserError(
            f"{source.label}: the tensors do not fit the configuration (- missing, + unexpected, ! another shape):\n"
            + "\n".join(problems[:40])
            + more
        )
    params, infinite = {}, set[str]()
    for path, leaf in bars.bar(flat.items(), "reading weights", leave=False, delay=2):
        layers = [specs[name] for name in trees.expand(path)]
        quantized = node(layers[0]) if node else None
        if quantized is not None:
            params[path] = jax.tree.map(jnp.asarray, quantized)
        else:
            params[path] = _array(source, layers, leaf, targets[path], infinite)
    if infinite:
        print(
            f"note: {source.label}: {len(infinite)} tensors have values that are NaN or infinite, so that outputs may "
            f"be NaN: {', '.join(sorted(infinite)[:3])}",
            file=sys.stderr,
            flush=True,
        )
    return trees.unflatten(params)


def _array(source: TensorSource, layers: list[TensorSpec], leaf: Any, sharding: Any, infinite: set[str]) -> jax.Array:
    """One parameter from its tensor, or from the tensor of every layer that is stacked in it.

    Args:
      infinite: a set to which the names of tensors with NaN or infinite values are added.
    """
    stacked = len(leaf.shape) > len(source.shapes[layers[0].name])

    def shard(index: Any) -> np.ndarray:
        spans = [range(*s.indices(size)) for s, size in zip(index, leaf.shape, strict=True)]
        out = _empty(tuple(map(len, spans)), leaf.dtype)
        selected = [layers[i] for i in spans[0]] if stacked else layers
        for spec, target in zip(selected, out if stacked else [out], strict=True):
            if not _fill(target, source, spec, spans[stacked:], leaf.shape[-1]):
                infinite.add(spec.name)
        return out

    return jax.make_array_from_callback(leaf.shape, sharding, shard)


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialized memory that JAX takes over without a copy on CPU."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _fill(out: np.ndarray, source: TensorSource, spec: TensorSpec, spans: list[range], width: int) -> bool:
    """Reads the slice `spans` of a parameter, whose last axis has `width` entries, into `out`.

    Returns:
      Whether all values are finite.
    """
    finite = True
    begin, total = (int(units * width) // spec.groups for units in spec.part)
    columns, size = spans[-1], width // spec.groups  # the columns of the parameter, and their number in a group
    for group in range(columns.start // size, -(-columns.stop // size)):
        part = range(max(columns.start, group * size), min(columns.stop, (group + 1) * size))
        offset = group * (total - size) + begin
        stored = range(part.start + offset, part.stop + offset)
        target = out[..., part.start - columns.start : part.stop - columns.start]
        finite = _copy(target, source, spec, [*spans[:-1], stored]) and finite
    return finite


def _copy(out: np.ndarray, source: TensorSource, spec: TensorSpec, spans: list[range]) -> bool:
    """Reads a slice of a stored tensor into `out`; `spans` are along the parameter's axes.

    Returns:
      Whether all values are finite.
    """
    finite = True
    out, spans = (out.T, spans[::-1]) if spec.transposed else (out, spans)
    rows, *columns = (slice(s.start, s.stop) for s in spans)
    step = max(1, _CHUNK_BYTES // (4 * math.prod(out.shape[1:])))
    for begin in range(0, len(out), step):
        end = min(begin + step, len(out))
        values = source.read(spec.name, (slice(rows.start + begin, rows.start + end), *columns))
        out[begin:end] = values.astype(np.float32) + spec.offset if spec.offset else values
        finite = finite and _all_finite(values)
    return finite


def _all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; by the bits, as numpy's functions are slow for bfloat16."""
    if values.dtype not in _INFINITY or not values.size:
        return bool(np.isfinite(values).all())
    infinity, size = _INFINITY[values.dtype], values.dtype.itemsize
    bits, negative = np.ascontiguousarray(values).view(f"u{size}"), 1 << (8 * size - 1)
    # The largest bits of negative values, if there are any, and of the others: two passes without a temporary array.
    return int(bits.max()) < negative + infinity and int(bits.view(f"i{size}").max()) < infinity


def stored_shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the stored tensor that contains a parameter of this shape (as the whole tensor or a part)."""
    stored = (*shape[:-1], int(shape[-1] * spec.part[1]))
    return stored[::-1] if spec.transposed else stored


def stored_tensor(parts: list[tuple[TensorSpec, Any]]) -> np.ndarray:
    """Joins dense arrays to the stored tensor that they are parts of: the inverse of `load`."""
    arrays = []
    for spec, weight in sorted(parts, key=lambda part: part[0].part):
        array = np.asarray(jax.device_get(weight))
        arrays.append((array.astype(np.float32) - spec.offset).astype(array.dtype) if spec.offset else array)
    groups = parts[0][0].groups
    grouped = [array.reshape(*array.shape[:-1], groups, -1) for array in arrays]
    joined = np.concatenate(grouped, -1).reshape(*arrays[0].shape[:-1], -1) if len(arrays) > 1 else arrays[0]
    return np.ascontiguousarray(joined.T if parts[0][0].transposed else joined)


def by_tensor(specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[TensorSpec, str]]]:
    """{name of a stored tensor: [(spec, path) of every parameter that is a part of it]}."""
    parts: dict[str, list[tuple[TensorSpec, str]]] = {}
    for path, spec in specs.items():
        parts.setdefault(spec.name, []).append((spec, path))
    return parts
