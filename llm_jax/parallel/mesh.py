"""The device mesh, and the shardings of weights and batches on it.

data      copies of the model, each with its own rows of the batch; spans slices of a TPU, over the slow network
fsdp      shards of weights, optimizer state and rows (ZeRO-3: Rajbhandari et al. 2020, arXiv:1910.02054)
context   shards of the sequence; attention gathers the keys and values of a row, see `model.attention_kernels`
tensor    shards of heads, MLP and vocabulary (Shoeybi et al. 2019, arXiv:1909.08053)
"""

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import configuration, trees, weights
from llm_jax.errors import UserError
from llm_jax.schema import MeshConfig, Rules

AXES = ("data", "fsdp", "context", "tensor")
BATCH, CONTEXT, HEADS = ("data", "fsdp"), "context", "tensor"  # the axes of rows, positions and attention heads


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over devices; the size of an axis of -1 follows from the other axes.

    Args:
      devices: devices of the mesh; None: all devices of JAX.

    Raises:
      UserError: the product of the axis sizes is not the number of devices, or the devices are of several slices of a
        TPU and the axis "data" is not a multiple of their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    settings = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    inferred = [axis for axis, size in sizes.items() if size == -1]
    if len(inferred) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{settings}: expected positive numbers, and -1 (all remaining devices) for at most one axis")
    if inferred:
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes[inferred[0]] = len(devices) // known if len(devices) % known == 0 else 0
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"{settings} does not fit {len(devices)} device{'s' * (len(devices) > 1)}; their product must be that "
            "number"
        )
    # Under explicit axes, the default of JAX, matrix products of sharded arrays raise an error.
    return Mesh(device_array(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse(text: str, config: MeshConfig) -> MeshConfig:
    """`config` with the axis sizes of a flag such as "tensor=4,data=2"; decoding has no use for the axis "context".

    Raises:
      UserError: an unknown or repeated axis, or a size that is not an integer.
    """
    sizes: dict[str, Any] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not equals or axis not in (*BATCH, HEADS) or axis in sizes:
            names = ", ".join((*BATCH, HEADS))
            raise UserError(f"--mesh={text}; expected sizes of different axes ({names}), such as tensor=4,data=2")
        sizes[axis] = int(size) if re.fullmatch(r"-?\d+", size) else size
    return configuration.replace(config, sizes, "mesh.")


def device_array(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of this shape; devices that differ in the last axes have the fastest connections.

    The first axis spans the slices of a TPU, so that no other collective crosses the slow network between them.

    Raises:
      UserError: the first axis is not a multiple of the number of slices.
    """
    if devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(shape, devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise UserError(
            f"mesh.{AXES[0]}={shape[0]} cannot span {slices} slices; expected a multiple of {slices} "
            f"(--config.mesh.{AXES[0]}={slices}, with the other axes within a slice)"
        )
    within = (shape[0] // slices, *shape[1:])
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between = (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


# The rules of the weights of the function that is traced, see `with_mesh`.
_RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=())
_PREFIX: contextvars.ContextVar[str] = contextvars.ContextVar("prefix", default="")  # see `relative_paths`


def with_mesh(mesh: Mesh, function: Callable[..., Any], rules: Rules = ()) -> Callable[..., Any]:
    """Wraps `function` so that `current_axis_sizes` and `constrain` use `mesh` while it is traced.

    Args:
      rules: the shardings of the weights, see `shardings`: each is gathered over all axes but "tensor" where a matrix
        product uses it. (): the compiler decides.
    """

    def with_mesh(*arguments: Any) -> Any:
        token = _RULES.set(rules if mesh.size > 1 else ())
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments)
        finally:
            _RULES.reset(token)

    return with_mesh


def gathered_spec(path: str) -> P | None:
    """The PartitionSpec (in, out) of a weight while a matrix product uses it, by the rules of `with_mesh`, or None.

    Without it XLA may gather a weight in one layout for the forward pass and in another for the backward pass, or
    gather activations instead of weights.
    """
    name = trees.expand(_PREFIX.get() + path)[0]
    for pattern, axes in _RULES.get():
        if re.fullmatch(pattern, name):
            return P(*(HEADS if HEADS in _names(axis) else None for axis in axes or (None, None)))
    return None


@contextlib.contextmanager
def relative_paths(path: str) -> Iterator[None]:
    """Context in which paths of `gathered_spec` are relative to `path`, for a module of a part of the parameters."""
    token = _PREFIX.set(f"{path}/")
    try:
        yield
    finally:
        _PREFIX.reset(token)


def current_axis_sizes() -> dict[str, int]:
    """{axis: size} of the mesh of the function that is traced, see `with_mesh`; {} without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def constrain(array: jax.Array, *axes: Any) -> jax.Array:
    """`array` sharded over these axes of the mesh in use, one entry (or None) per axis; unchanged without a mesh.

    Axes of size 1 and those that do not divide the array are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or mesh.manual_axes:
        return array
    return jax.lax.with_sharding_constraint(array, divisible_spec(P(*axes), array.shape, mesh))


def shardings(tree: Any, rules: Rules, mesh: Mesh, source: str = "mesh.rules") -> Any:
    """A NamedSharding for every leaf of a parameter tree, by rules over the names of weights.

    An axis of an array whose size is not a multiple of the size of its mesh axis is not sharded, nor is a leading layer
    axis.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      rules: (regular expression, a tuple with the mesh axis, several mesh axes or None of each axis of the weight);
        () replicates it.
      source: the config key of the rules, for error messages.

    Raises:
      UserError: see `trees.match`; or a rule names an unknown mesh axis, one axis twice, or a wrong number of axes.
    """
    matched = trees.match(rules, tree, source)

    def leaf_shardings(path: str, weight: Any) -> Any:
        axes, stacked = matched[path], trees.layers_of(path) is not None
        rank = len(weight.shape) - stacked
        named = [a for axis in axes for a in _names(axis)] if isinstance(axes, tuple) else [axes]
        if not isinstance(axes, tuple) or len(axes) not in (0, rank) or len(set(named)) < len(named):
            raise UserError(f"{source}: {axes!r} for '{path}'; expected () or {rank} different axes (or None)")
        if unknown := set(named) - set(AXES):
            raise UserError(
                f"{source}: {unknown.pop()!r} is not a mesh axis; expected one of {', '.join(AXES)} or None"
            )
        axes = (None,) * stacked + (axes or (None,) * rank)
        specs = weights.partition(weight, P(*axes))
        return jax.tree.map(
            lambda spec, leaf: NamedSharding(mesh, divisible_spec(spec, leaf.shape, mesh)),
            specs,
            weight,
            is_leaf=lambda s: isinstance(s, P),
        )

    return trees.map_weights(leaf_shardings, tree)


def _names(axis: Any) -> tuple[Any, ...]:
    """The mesh axes of one entry of a rule or PartitionSpec."""
    return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


def divisible_spec(spec: P, shape: tuple[int, ...], mesh: Any) -> P:
    """`spec` with None for mesh axes whose size does not divide the axis of an array of this shape."""
    sizes = [math.prod(mesh.shape[name] for name in _names(axis)) for axis in spec]
    return P(*(axis if shape[i] % sizes[i] == 0 else None for i, axis in enumerate(spec)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a copy on every device."""
    return NamedSharding(mesh, P())


def split_rows(array: Any, params: Any) -> jax.Array:
    """`array` (B, ...) on the mesh of the arrays of `params`, rows over "data" and "fsdp" where these divide them.

    It is returned as it is where `params` lie on one device.
    """
    mesh = mesh_of(params)
    return (
        array
        if mesh is None
        else jax.device_put(array, NamedSharding(mesh, divisible_spec(P(BATCH), array.shape, mesh)))
    )


def mesh_of(arrays: Any) -> Mesh | None:
    """The mesh of several devices over which the arrays of a tree are sharded; None for arrays on one device."""
    leaves = (leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array))
    first = next(leaves, None)
    if first is None or isinstance(first, jax.core.Tracer) or not isinstance(first.sharding, NamedSharding):
        return None
    mesh = first.sharding.mesh
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def using_mesh_of(arrays: Any) -> contextlib.AbstractContextManager[Any]:
    """Context in which functions are traced with the mesh of `arrays` as the mesh in use, see `mesh_of`."""
    mesh = mesh_of(arrays)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def row_shards(mesh: Mesh) -> int:
    """The number of parts into which the mesh divides the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh, size: int, length: int = 0) -> NamedSharding:
    """The sharding of batches (B, T): rows over the mesh axes "data" and "fsdp", positions over "context".

    Args:
      size: the number of rows, B.
      length: the number of positions, T; 0: they are not sharded.

    Raises:
      UserError: `size` is not a multiple of the number of devices of the axes of the rows, or `length` of "context".
    """
    shards = row_shards(mesh)
    if size % shards:
        raise UserError(f"a batch of {size} sequences cannot be split over mesh data x fsdp = {shards} devices")
    pieces = mesh.shape[CONTEXT] if length else 1
    if pieces == 1:
        return NamedSharding(mesh, P(BATCH))
    if length % pieces:
        raise UserError(f"train.seq_len={length} cannot be split over mesh.context={pieces} devices")
    return NamedSharding(mesh, P(BATCH, CONTEXT))
