"""The mesh of devices and the shardings of weights and batches on it."""

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
BATCH, HEADS = ("data", "fsdp"), "tensor"  # what splits the rows of a batch, and the heads of attention


def make(config: MeshConfig) -> Mesh:
    """The mesh over all devices; an axis of -1 takes what the others leave.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    devices = jax.device_count()
    said = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{said}: every axis is a positive number, and at most one of them -1 (the rest)")
    if open_axes:
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes[open_axes[0]] = devices // known if devices % known == 0 else 0
    if math.prod(sizes.values()) != devices:
        raise UserError(f"{said} does not fit {devices} device{'s' * (devices > 1)}; the axes must multiply to it")
    # Explicit axes, the default, would make plain products of sharded arrays an error.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced so that kernels which run one per device (`shard_map`) know the mesh."""

    def known(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return known


def in_use() -> dict[str, int]:
    """Sizes of the axes, by name, of the mesh that the function being traced is `within`; {} outside."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def shardings(tree: Any, rules: Rules, mesh: Mesh, source: str = "mesh.rules") -> Any:
    """A NamedSharding for every leaf of a parameter tree (abstract or not), by rules over names.

    A rule's value names the mesh axis (or None) of each axis of a weight; a leading layer axis is
    never split, and () is a copy everywhere. An axis that the mesh axis does not divide is left whole.

    Raises:
      UserError: see `trees.match`; or an unknown mesh axis.
    """
    matched = trees.match(rules, tree, source)

    def place(path: str, weight: Any) -> Any:
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

    return trees.map_weights(place, tree)


def fitting(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` without the mesh axes that do not divide the axis of an array of this shape."""
    kept = [a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)]
    return P(*kept)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
    """Batches (B, T): rows over "data" and "fsdp".

    Raises:
      UserError: the devices do not divide the batch.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % ways:
        raise UserError(f"a batch of {size} sequences cannot be split over mesh data x fsdp = {ways} devices")
    return NamedSharding(mesh, P(BATCH))
