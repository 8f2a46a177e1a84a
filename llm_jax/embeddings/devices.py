"""Data-parallel steps of word vectors: each device computes the gradients of its part of a step and applies all.

Devices exchange the rows that a step changes, not the table, of which each has a copy.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import MeshConfig

Gather = Callable[[jax.Array], jax.Array]  # (n, ...) of this device -> (devices * n, ...) of all


def compiled(steps: Callable[..., jax.Array], split: tuple[bool, ...]) -> Callable[..., Any]:
    """Jits a function for all devices: (table, *arrays) -> table; the table is donated.

    Args:
      steps: function (gather, table, *arrays) -> table after several steps, on one device.
      split: for each of the arrays, whether its second axis is divided among the devices.
    """
    if jax.device_count() == 1:
        return jax.jit(functools.partial(steps, lambda array: array), donate_argnums=0)
    gather = functools.partial(jax.lax.all_gather, axis_name="data", tiled=True)
    specs = (P(), *(P(None, "data") if parts else P() for parts in split))
    mesh = mesh_lib.make(MeshConfig(data=-1, fsdp=1, tensor=1, context=1, rules=()))
    run = jax.shard_map(functools.partial(steps, gather), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(run, donate_argnums=0)


def check(key: str, size: int, unit: int = 1) -> None:
    """Raises UserError unless the option `key` is a multiple of `unit` on every device."""
    if size % (count := unit * jax.device_count()):
        raise UserError(f"config key '{key}' is {size}; expected a multiple of {count}")
