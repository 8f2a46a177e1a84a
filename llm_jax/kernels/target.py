"""The platform that a function is compiled for, by which kernels are selected."""

from typing import Any

import jax


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in use while a function is traced, otherwise JAX's default backend.

    They differ where a step is compiled for devices that this machine does not have.
    """
    name = getattr(_abstract_device(), "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else str(name)


def device_kind() -> str:
    """The kind of the device of `platform`, such as "TPU v5 lite" or "cpu"."""
    return str(getattr(_abstract_device(), "device_kind", None) or jax.devices()[0].device_kind)


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def varying_like(shape: tuple[int, ...], dtype: Any, *arrays: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of a result that varies over the axes of a `shard_map` over which any of `arrays` varies."""
    axes = frozenset[Any]().union(*(jax.typeof(array).mat.varying for array in arrays))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
