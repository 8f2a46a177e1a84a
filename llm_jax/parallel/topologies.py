"""Compile-only TPUs and GPUs by name: `v5e:16x16`, `v5p:4x4x4`, `v5e:16x16*2`, `h100:4x8`.

`libtpu` compiles for every TPU on any machine, the CUDA plugin of JAX for every GPU in `GPUS`. Both write to the
terminal and read the environment of the process, and libtpu ends the process for some names, so they are used in a
separate process with `environment()`.
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
      network: bandwidth to other slices, or of a GPU to other hosts, in bytes per second.
      clock: clock of the matrix units in Hz; 0: not published.
      rank: number of axes of its topologies; those of GPUs are hosts and GPUs per host.
      devices: JAX devices per chip.
      wrapped: minimum number of chips along an axis at which the axis of a slice is a ring (wraps around).
      gpu: what the compiler must know about a GPU; None for a TPU.
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
    gpu: "Gpu | None" = None


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of a GPU that its compiler reads, in the units of XLA's `GpuDeviceInfoProto`.

    Attributes:
      name: as the driver reports it.
      capability: compute capability, (major, minor).
      cores: number of streaming multiprocessors.
      clock: boost clock in GHz.
      shared: shared memory of a multiprocessor in KiB.
      cache: L2 cache in MiB.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock: float
    shared: int
    cache: int


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


def _gpu(flops: float, memory: int, bandwidth: float, link: float, network: float, gpu: Gpu) -> Chip:
    return Chip(flops, memory, bandwidth, link, network, rank=2, gpu=gpu)


# FLOP/s (dense), memory, bandwidth, NVLink in one direction, and one network card per GPU, of the SXM modules: the data
# sheets of the A100, H100, H200 and DGX B200. Multiprocessors, clocks, shared memory and caches: the architecture white
# papers of Ampere, Hopper and Blackwell, and the table of compute capabilities in NVIDIA's CUDA C++ Programming Guide.
GPUS = {
    "a100": Chip(
        312e12, 80 * 2**30, 2.039e12, 3e11, 2.5e10, rank=2, gpu=Gpu("A100-SXM4-80GB", (8, 0), 108, 1.41, 164, 40)
    ),
    "h100": Chip(
        989e12, 80 * 2**30, 3.35e12, 4.5e11, 5e10, rank=2, gpu=Gpu("H100 80GB HBM3", (9, 0), 132, 1.98, 228, 50)
    ),
    "h200": Chip(989e12, 141 * 10**9, 4.8e12, 4.5e11, 5e10, rank=2, gpu=Gpu("H200", (9, 0), 132, 1.98, 228, 50)),
    "b200": Chip(2250e12, 180 * 10**9, 7.7e12, 9e11, 5e10, rank=2, gpu=Gpu("B200", (10, 0), 148, 1.965, 228, 126)),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod slice, or several that are connected by a slower network; or hosts with GPUs.

    Attributes:
      kind: a key of `CHIPS` or `GPUS`.
      shape: chips along each axis of a slice.
      slices: number of slices.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return (CHIPS | GPUS)[self.kind]

    @property
    def platform(self) -> str:
        return "tpu" if self.chip.gpu is None else "gpu"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}" + (f"*{self.slices}" if self.slices > 1 else "")


_CURES = {
    False: "compiles for a TPU with libtpu, which is not installed: pip install 'llm_jax[plan]', or 'jax[tpu]'",
    True: "compiles for a GPU with the CUDA plugin of JAX, which is not installed: pip install 'llm_jax[plan-gpu]'; no "
    "GPU and no CUDA is needed",
}


def _is_installed(kind: str) -> bool:
    """Whether the compiler for a chip is installed."""
    names = ["libtpu"] if kind in CHIPS else ["jax_cuda12_plugin", "jax_cuda13_plugin"]
    return any(importlib.util.find_spec(name) is not None for name in names)


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
    chips = CHIPS | GPUS
    if kind not in chips:
        raise UserError(f"--topology={text}: unknown chip '{kind}'; expected one of {', '.join(chips)}")
    if len(shape) != chips[kind].rank or 0 in shape:
        example = "x".join("4" * chips[kind].rank)
        axes = "HOSTSxGPUS, as in" if kind in GPUS else f"{chips[kind].rank} axes, as in"
        raise UserError(f"--topology={text}: a slice of {kind} has {axes} {kind}:{example}")
    if kind in GPUS and (match[3] or slices > 1):
        raise UserError(f"--topology={text}: slices are parts of TPUs; give the number of hosts, as in {kind}:4x8")
    if not _is_installed(kind):
        raise UserError(f"--topology={text} {_CURES[kind in GPUS]}")
    if match[3] and slices not in (1, int(match[3])):
        raise UserError(f"--topology={text} has {match[3]} slices, --slices={slices}; give one of them")
    return Topology(kind, shape, int(match[3] or slices))


def environment() -> dict[str, str]:
    """The environment of the process that compiles: without start-up messages, for any chip, several at once."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "LIBTPU_", "XLA_"))}
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",
    }


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, to compile for. In a process with `environment()`, because some names end the process.

    Raises:
      UserError: the compiler does not know the topology.
    """
    from jax.experimental import topologies

    chip, shape = topology.chip, topology.shape
    if chip.gpu is not None:
        sizes = f"1x{shape[0]}x{shape[1]}"
        try:
            described = topologies.get_topology_desc("", "cuda", topology=sizes, target_config=_target(chip))
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"--topology={topology.name}: the CUDA plugin cannot compile for it: {reason}") from error
        return list(described.devices)
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


def _target(chip: Chip) -> str:
    """A GPU as text of XLA's `GpuTargetConfigProto`."""
    gpu = chip.gpu
    assert gpu is not None
    major, minor = gpu.capability
    shared = gpu.shared * 1024
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {gpu.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          name: "NVIDIA {gpu.name}" device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores} clock_rate_ghz: {gpu.clock}
          memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {chip.memory} l2_cache_size: {gpu.cache * 2**20}
          shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024} shared_memory_per_block: 49152
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 fpus_per_core: 128
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        }}"""
