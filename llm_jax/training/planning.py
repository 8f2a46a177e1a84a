"""Compiles the training step of a configuration for target devices and reports its memory, FLOPs and time.

    report = planning.plan(config, topologies.parse("v5e:16x16"))

`plan` runs `python -m llm_jax.training.planning` in a separate process; see `parallel.topologies`.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from llm_jax import configuration, runtime
from llm_jax.errors import UserError
from llm_jax.parallel import topologies
from llm_jax.parallel.topologies import Topology
from llm_jax.schema import Config

Report = dict[str, Any]  # JSON values, see `report`

ASSUMPTIONS = {
    "tpu": (
        "compute: the largest of FLOPs at the chip's peak, the compiler's cycles (kernels in Pallas: half the peak), "
        "and reading all arguments once",
        "collectives: a ring over one axis of the torus, in both directions; between slices the data-centre network",
        "the shorter step hides all collectives behind compute, the longer one hides none",
    ),
    "gpu": (
        "compute: the larger of FLOPs at the GPU's peak (attention kernels: half the peak) and reading all arguments "
        "once",
        "collectives: NVLink within a host; between hosts one network card for each GPU of a group",
        "the shorter step hides all collectives behind compute, the longer one hides none",
    ),
}
# Messages of libtpu about a step that is too large, with the bytes of all arrays, or of the temporaries only.
_TOO_LARGE = (
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds",
)
# Number of matrix products per tile in the kernels of splash attention and of cuDNN, by the name of the instruction or
# of the target of the call.
_KERNEL_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
    "__cudnn$fmhaSoftmax": 2,
    "__cudnn$fmhaSoftmaxBackward": 5,
}
_KERNEL_SHARE = 0.5  # share of the chip's peak FLOPs
_DOES_NOT_FIT = 3  # exit code of the process that compiles


class DoesNotFit(UserError):
    """A step that exceeds the memory of a device.

    Attributes:
      needed: bytes reported by the compiler.
    """

    def __init__(self, message: str, needed: float):
        super().__init__(message)
        self.needed = needed


def plan(config: Config, topology: Topology, decode: bool = False, seconds: float = math.inf) -> Report:
    """Returns the report about the training step of a configuration with `model.vocab_size`; see `report`.

    The process that compiles is killed when this function raises, including KeyboardInterrupt.

    Args:
      decode: report on a decoding step instead; see `plan_decoding`.
      seconds: time limit.

    Raises:
      DoesNotFit: the step does not fit into the memory of a device.
      TimeoutError: the compilation exceeds the time limit.
      UserError: options contradict each other or the topology, or libtpu does not support the topology.
    """
    request = {"config": configuration.as_dict(config), "topology": dataclasses.asdict(topology), "decode": decode}
    request["parent"] = os.getpid()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.run(
                [sys.executable, "-m", "llm_jax.training.planning"],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=topologies.environment(),
                timeout=seconds if math.isfinite(seconds) else None,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"--topology={topology.name}: not compiled within {seconds:.0f} s") from error
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode == 2:
        raise UserError(lines[-1])
    if process.returncode == _DOES_NOT_FIT:
        raise DoesNotFit(**json.loads(process.stdout.splitlines()[-1]))
    last = lines[-1][:200] if lines else "no message"
    raise UserError(f"--topology={topology.name}: the compiler ended with code {process.returncode}: {last}")


def report(config: Config, topology: Topology, decode: bool = False) -> Report:
    """Compiles the training step, or a decoding step, in this process and reports on one device of the mesh.

    Returns:
      "topology", "devices", "mesh", "attention_kernel", "batch" (rows, tokens of a row), "decode";
      "memory": bytes of "arguments" (with "optimizer"), "temporaries", "outputs", "peak" (the three together), "live"
      (XLA's peak of the memory in use at one time), "capacity";
      "flops": "compiled", "model" (6 N D and attention; 2 N of decoding), "cycles";
      "collectives": rows of "kind", "axes", "count", "bytes";
      "seconds": "compute", "collectives", "shortest", "longest"; "utilization": [of the longest, of the shortest];
      "largest": rows of "bytes", "shape", "operation"; "assumptions".

    Raises:
      UserError: as `plan`.
    """
    import jax

    from llm_jax.model import transformer
    from llm_jax.parallel import hlo
    from llm_jax.training import memory, plan_decoding
    from llm_jax.training.setup import setup

    devices = topologies.devices(topology)
    if config.lora.rank and not config.init_from:  # shapes are enough: no weights are read
        config = dataclasses.replace(config, init_from="unnamed")
    rows, length = config.train.batch_size, config.train.seq_len
    chip, per_device = topology.chip, topology.chip.devices
    capacity = chip.memory // per_device
    optimizer = 0
    try:
        if decode:
            compiled, mesh = plan_decoding.compiled(config, devices)
            kernel = "plain (keys are read from a cache)"
            model_flops = transformer.flops_per_token(config.model, length) / 3 * rows / len(devices)
        else:
            parts = setup(config, devices=devices)
            mesh, kernel = parts.mesh, parts.attention_kernel
            state, limit = parts.state.replace(frozen={}), jax.ShapeDtypeStruct((), "float32")
            compiled = parts.train_step.lower(state, parts.state.frozen, parts.batch, limit).compile()
            optimizer = memory.shard_bytes((state.opt_state, state.ema))
            model_flops = transformer.flops_per_token(config.model, length) * rows * length / len(devices)
    except jax.errors.JaxRuntimeError as error:
        raise _compiler_error(str(error), topology, capacity) from error
    except RuntimeError as error:
        if "cuDNN not found" not in str(error):
            raise
        raise UserError(
            f"--topology={topology.name}: model.attention_kernel=cudnn, which auto selects, needs cuDNN, which is not "
            "installed: pip install 'llm_jax[plan-gpu]', or set --config.model.attention_kernel=plain"
        ) from error
    sizes = dict(mesh.shape)
    used = memory.of_executable(compiled, optimizer)
    if topology.platform == "gpu" and used.peak > capacity:  # its compiler does not refuse the step
        raise _does_not_fit(topology, used.peak, capacity)
    live = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0)
    module = hlo.parse(compiled.as_text())
    collectives = hlo.collectives(module, sizes)
    kernel_flops = _kernel_flops(module, config, sizes) + hlo.product_kernel_flops(module)
    dense_flops, cycles = hlo.flops(module), hlo.cycles(module)
    peak = chip.flops / per_device
    compute = max(
        (dense_flops + kernel_flops) / peak,
        (cycles / chip.clock if chip.clock else 0.0) + kernel_flops / (_KERNEL_SHARE * peak),
        used.arguments / (chip.bandwidth / per_device),
    )
    network = sum(collective_seconds(row, sizes, topology) for row in collectives)
    shortest, longest = max(compute, network), compute + network
    return {
        "topology": topology.name,
        "devices": len(devices),
        "mesh": sizes,
        "attention_kernel": kernel,
        "batch": [rows, length],
        "decode": decode,
        "memory": dataclasses.asdict(used) | {"peak": used.peak, "live": live, "capacity": capacity},
        "flops": {"compiled": dense_flops + kernel_flops, "model": model_flops, "cycles": cycles},
        "collectives": [dataclasses.asdict(row) for row in collectives],
        "seconds": {"compute": compute, "collectives": network, "shortest": shortest, "longest": longest},
        "utilization": [model_flops / (peak * seconds) for seconds in (longest, shortest)],
        "largest": [dict(zip(("bytes", "shape", "operation"), row, strict=True)) for row in hlo.largest(module, 8)],
        "assumptions": list(ASSUMPTIONS[topology.platform]),
    }


def _kernel_flops(module: Any, config: Config, mesh: dict[str, int]) -> float:
    """The FLOPs of attention kernels, which XLA does not count. Causal attention has half of the pairs of tokens."""
    from llm_jax.model import positions

    c, length = config.model, config.train.seq_len
    rows = config.train.batch_size // config.train.grad_accumulation // (mesh["data"] * mesh["fsdp"])
    pairs = length * length / mesh["context"] * (0.5 if c.causal else 1.0)
    product = 2.0 * rows * (c.num_heads // mesh["tensor"]) * pairs * positions.head_dim(c)
    return sum(
        times * product * count
        for _, instruction, times in module.executed()
        for name, count in _KERNEL_PRODUCTS.items()
        if instruction.opcode == "custom-call"
        and (instruction.name.startswith(name) or instruction.attribute("custom_call_target") == f'"{name}"')
    )


def collective_seconds(row: Any, mesh: dict[str, int], topology: Topology) -> float:
    """The time of collectives (`hlo.Collectives`) on otherwise idle links of a chip, in seconds."""
    chip, axes = topology.chip, row.axes.split("+")
    slow = row.axes == "slices"
    group_size = topology.slices if slow else math.prod(mesh.get(axis, 1) for axis in axes)
    passes = 2 if row.kind == "all-reduce" else 1
    share = (group_size - 1) / group_size if group_size > 1 else 1.0
    if chip.gpu is not None:
        speed = _gpu_speed([axis in axes for axis in mesh], tuple(mesh.values()), topology)
    else:
        speed = chip.network if slow else 2 * chip.link
    return float(passes * share * row.bytes / (speed / chip.devices))


def _gpu_speed(varying: list[bool], sizes: tuple[int, ...], topology: Topology) -> float:
    """Bytes per second that each GPU of a group receives, if the devices of a group differ in the `varying` axes."""
    chip, hosts = topology.chip, np.arange(math.prod(sizes)).reshape(sizes) // topology.shape[1]
    group = hosts[tuple(slice(None) if flag or not any(varying) else 0 for flag in varying)]
    members = int(np.sum(group == 0))
    return chip.link if members == group.size else min(chip.link, members * chip.network)


def _compiler_error(message: str, topology: Topology, capacity: int) -> UserError:
    """Converts a compiler message to a one-line error; `DoesNotFit` if the message reports memory sizes."""
    text = " ".join(message.split())
    used = next(filter(None, (re.search(pattern, text) for pattern in _TOO_LARGE)), None)
    if used is None:
        return UserError(f"--topology={topology.name}: {text[:200]}")
    return _does_not_fit(topology, float(used[1]) * 1024 ** " KMGT".index(used[2] or " "), capacity)


def _does_not_fit(topology: Topology, needed: float, capacity: int) -> DoesNotFit:
    return DoesNotFit(
        f"--topology={topology.name}: the step needs {needed / 2**30:.2f} of the {capacity / 2**30:.0f} GiB of a "
        "device; use a smaller batch, model.remat=full, train.loss_chunk, or more of mesh.fsdp or mesh.tensor",
        needed,
    )


def _main() -> None:
    # Without this, the compiler would run for minutes after the command has been killed.
    runtime.end_with_parent(signal.SIGKILL)
    request = json.load(sys.stdin)
    if os.getppid() != request["parent"]:
        sys.exit(1)
    try:
        options = request["topology"] | {"shape": tuple(request["topology"]["shape"])}
        config = configuration.build(request["config"])
        print(json.dumps(report(config, Topology(**options), request["decode"])))
    except DoesNotFit as error:
        print(json.dumps({"message": str(error), "needed": error.needed}))
        sys.exit(_DOES_NOT_FIT)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
