"""The device mesh, and the shardings of weights and batches on it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax import trees, weights
from llm_jax.errors import UserError
from llm_jax.schema import MeshConfig, Rules

AXES = ("data", "fsdp", "tensor")
BATCH, HEADS = ("data", "fsdp"), "tensor"  # the axes that shard the rows of a batch, and the attention heads


def make(config: MeshConfig) -> Mesh:
    """The mesh over all devices; the size of an axis of -1 follows from the other axes.

    Raises:
      UserError: the product of the axis sizes is not the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    devices = jax.device_count()
    settings = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    inferred = [axis for axis, size in sizes.items() if size == -1]
    if len(inferred) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{settings}: expected positive numbers, and -1 (all remaining devices) for at most one axis")
    if inferred:
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes[inferred[0]] = devices // known if devices % known == 0 else 0
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"{settings} does not fit {devices} device{'s' * (devices > 1)}; their product must be that number"
        )
    # Under explicit axes, the default of JAX, matrix products of sharded arrays raise an error.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced with `mesh` as the abstract mesh in use, for kernels that run under `shard_map`."""

    def with_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return with_mesh


def in_use() -> dict[str, int]:
    """{axis: size} of the mesh of the function that is traced, see `within`; {} without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def shardings(tree: Any, rules: Rules, mesh: Mesh, source: str = "mesh.rules") -> Any:
    """A NamedSharding for every leaf of a parameter tree, by rules over the names of weights.

    An axis of an array whose size is not a multiple of the size of its mesh axis is not sharded, nor is a leading layer
    axis.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      rules: (regular expression, a tuple of the mesh axis or None of each axis of the weight); () replicates it.
      source: the config key of the rules, for error messages.

    Raises:
      UserError: see `trees.match`; or a rule names an unknown mesh axis, one axis twice, or a wrong number of axes.
    """
    matched = trees.match(rules, tree, source)

    def leaf_shardings(path: str, weight: Any) -> Any:
        axes, stacked = matched[path], trees.layers_of(path) is not None
        rank = len(weight.shape) - stacked
        named = [a for a in axes if a is not None] if isinstance(axes, tuple) else [axes]
        if not isinstance(axes, tuple) or len(axes) not in (0, rank) or len(set(named)) < len(named):
            raise UserError(f"{source}: {axes!r} for '{path}'; expected () or {rank} different axes (or None)")
        if unknown := set(named) - set(AXES):
            raise UserError(f"{source}: {unknown.pop()!r} is no mesh axis; expected one of {', '.join(AXES)} or None")
        axes = (None,) * stacked + (axes or (None,) * rank)
        specs = weights.partition(weight, P(*axes))
        return jax.tree.map(
            lambda spec, leaf: NamedSharding(mesh, fitting(spec, leaf.shape, mesh)),
            specs,
            weight,
            is_leaf=lambda s: isinstance(s, P),
        )

    return trees.map_weights(leaf_shardings, tree)


def fitting(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` with None for each mesh axis whose size does not divide the axis of an array of this shape."""
    axes = [a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)]
    return P(*axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """The sharding of batches (B, T): rows over the mesh axes "data" and "fsdp".

    Args:
      size: the number of rows, B.

    Raises:
      UserError: `size` is not a multiple of the number of devices of these axes.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % shards:
        raise UserError(f"a batch of {size} sequences cannot be split over mesh data x fsdp = {shards} devices")
    return NamedSharding(mesh, P(BATCH))
