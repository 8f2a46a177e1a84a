"""Compile-only TPU devices by name: `v5e:16x16`, `v5p:4x4x4`, `v5e:16x16*2`.

`libtpu` compiles for every TPU on any machine. It writes to the terminal, reads the environment of the process and ends
the process for some names, so it is used in a separate process with `environment()`.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peak figures of a chip.

    Attributes:
      flops: FLOP/s of dense bfloat16 products.
      memory: size of the main memory in bytes.
      bandwidth: memory bandwidth in bytes per second.
      link: bandwidth of one link to a neighbour in one direction, in bytes per second.
      network: bandwidth to other slices in bytes per second.
      clock: clock of the matrix units in Hz; 0: not published.
      rank: number of axes of its topologies.
      devices: JAX devices per chip.
      wrapped: number of chips from which on an axis of the topology is a ring.
    """

    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float = 6.25e9
    clock: float = 0.0
    rank: int = 3
    devices: int = 1
    wrapped: int = 4


# FLOP/s, memory and its bandwidth: the specifications in https://docs.cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e,
# tpu7x). Links and network: the tables of https://jax-ml.github.io/scaling-book/tpus, "TPU specs". Clocks: v4 from
# Jouppi et al. 2023, arXiv:2304.01433; v5e from the scaling book; v5p follows from its FLOP/s, at two per cycle for
# each of 8 x 128 x 128 multipliers. With these the compiler's cycles of a product of large matrices are at 88 to 93 %
# of the peak.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.2e12, 4.5e10, clock=1.05e9),
    "v5e": Chip(197e12, 16 * 2**30, 8.19e11, 4.5e10, network=3.125e9, clock=1.5e9, rank=2, wrapped=16),
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 9e10, clock=1.75e9),
    "v6e": Chip(918e12, 32 * 2**30, 1.638e12, 9e10, network=1.25e10, rank=2, wrapped=16),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7.4e12, 9e10, network=1.25e10, devices=2),
}
GPUS = ("a100", "h100", "h200", "b200")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod slice, or several that are connected by a slower network.

    Attributes:
      kind: a key of `CHIPS`.
      shape: chips along each axis of a slice.
      slices: number of slices.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}" + (f"*{self.slices}" if self.slices > 1 else "")


def parse(text: str, slices: int = 1) -> Topology:
    """The topology that `text` names.

    Args:
      slices: number of slices, where the name gives none.

    Raises:
      UserError: another form, an unknown chip, or a chip whose compiler is not installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", text)
    if match is None:
        raise UserError(f"--topology={text}: expected CHIP:AxB or CHIP:AxBxC, such as v5e:16x16, and *N for N slices")
    kind, shape = match[1], tuple(int(n) for n in match[2].split("x"))
    if kind in GPUS:
        raise UserError(f"--topology={text}: GPUs need the CUDA plugin and are not supported yet; expected a TPU")
    if kind not in CHIPS:
        raise UserError(f"--topology={text}: unknown chip '{kind}'; expected one of {', '.join(CHIPS)}")
    if len(shape) != CHIPS[kind].rank or 0 in shape:
        example = "x".join("4" * CHIPS[kind].rank)
        raise UserError(f"--topology={text}: a slice of {kind} has {CHIPS[kind].rank} axes, as in {kind}:{example}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology compiles for a TPU with libtpu, which is not installed: pip install 'llm_jax[plan]', or "
            "'jax[tpu]'"
        )
    if match[3] and slices not in (1, int(match[3])):
        raise UserError(f"--topology={text} has {match[3]} slices, --slices={slices}; give one of them")
    return Topology(kind, shape, int(match[3] or slices))


def environment() -> dict[str, str]:
    """The environment of the process that compiles: without start-up messages, for any chip, several at once."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "LIBTPU_", "XLA_"))}
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
    }


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to compile for. For a process with `environment()`; some names end the process.

    Raises:
      UserError: the compiler does not know the topology.
    """
    from jax.experimental import topologies

    chip, shape = topology.chip, topology.shape
    options: dict[str, Any] = {
        # Of the two cores of a v4, one device; without the rings of a pod, gathers take a slower way.
        "chip_config_name": "megacore" if topology.kind == "v4" else "default",
        "chips_per_host_bounds": tuple(min(2, n) for n in (*shape, 1)[:2]) + (1,),
        "wrap": tuple(n % chip.wrapped == 0 for n in (*shape, 1)[:3]),
    }
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.kind}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--topology={topology.name}: libtpu cannot compile for it: {reason}") from error
