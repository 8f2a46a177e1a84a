"""Tries meshes, rematerialization and batch sizes for a topology, and prints reports of `planning` as text."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llm_jax import bars, configuration, weights
from llm_jax.errors import UserError
from llm_jax.model import transformer
from llm_jax.parallel import hlo
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel.topologies import Topology
from llm_jax.schema import Config
from llm_jax.training import losses, planning
from llm_jax.training.planning import Report
from llm_jax.training.setup import num_parameters, setup

GIB = 2**30


def candidates(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Returns the changes of a configuration to try, most promising first.

    The axis "data" spans the slices, "tensor" has 1, 2, 4 or 8 neighbouring devices if it divides the heads, and "fsdp"
    has the rest. Larger batches per device and less rematerialization come first.
    """
    devices = topology.chips * topology.chip.devices
    slice_devices = devices // topology.slices
    for rows in (8, 4, 2, 1):
        for remat in ("none", "dots", "full"):
            for tensor in (1, 2, 4, 8):
                if slice_devices % tensor or config.model.num_kv_heads % tensor or config.model.num_heads % tensor:
                    continue
                mesh = {"data": topology.slices, "fsdp": slice_devices // tensor, "tensor": tensor, "context": 1}
                yield {
                    **{f"mesh.{axis}": size for axis, size in mesh.items()},
                    "model.remat": remat,
                    "train.batch_size": rows * devices // tensor,
                }


def state_sizes(config: Config) -> tuple[int, int]:
    """Returns (bytes of one copy of all weights, the optimizer state and the moving average; number of weights).

    Computed from shapes and dtypes on a mesh of one device of this machine.

    Raises:
      UserError: options that contradict each other.
    """
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, context=1)
    rows = config.train.grad_accumulation * losses.rows_together(config.loss)
    train = dataclasses.replace(config.train, batch_size=rows)
    init_from = config.init_from or ("unnamed" if config.lora.rank else "")  # shapes are enough: no weights are read
    config = dataclasses.replace(config, mesh=mesh, train=train, init_from=init_from, explicit=frozenset())
    parts = setup(config, devices=jax.devices()[:1])
    state = parts.state
    return weights.num_bytes((state.params, state.frozen, state.opt_state, state.ema)), num_parameters(parts.base)


def least_bytes(config: Config, changes: dict[str, Any], state: int) -> float:
    """A lower bound of the memory of a step on one device: its share of `state`, if all of it is split.

    Activations, gradients and unsharded weights need additional memory.

    Args:
      state: bytes of the whole state; see `state_sizes`.
    """
    axes = [axis for _, spec in config.mesh.rules for axis in (spec if isinstance(spec, tuple) else (spec,))]
    names = {name for axis in axes if axis for name in (axis if isinstance(axis, tuple) else (axis,))}
    return state / math.prod(changes[f"mesh.{name}"] for name in names)


def typical_bytes(config: Config, changes: dict[str, Any], state: int) -> float:
    """An estimate of the memory of a step on one device: `least_bytes` and the saved activations of a micro-batch."""
    c = config.model
    rows = changes["train.batch_size"] / (changes["mesh.data"] * changes["mesh.fsdp"] * config.train.grad_accumulation)
    per_token = {"full": c.width, "dots": 6 * c.width + 3 * c.mlp_dim, "none": 10 * c.width + 4 * c.mlp_dim}
    size = 2 if c.precision.compute in ("bfloat16", "float16") else 4
    saved = rows * config.train.seq_len * c.num_layers * per_token[changes["model.remat"]] * size
    saved /= 1 if changes["model.remat"] == "full" else changes["mesh.tensor"]
    return least_bytes(config, changes, state) + saved


def predicted_seconds(config: Config, changes: dict[str, Any], topology: Topology, parameters: int) -> float:
    """An estimate of the step time on one device from shapes: matrix products at the peak, then all collectives.

    Weights are gathered for the forward and the backward pass of each micro-batch, gradients are reduced once, and
    `mesh.tensor` sums the activations of two products per layer in each pass. Full rematerialization repeats the
    forward pass.

    Args:
      parameters: number of weights.
    """
    c, length, chip = config.model, config.train.seq_len, topology.chip
    mesh = {axis: changes[f"mesh.{axis}"] for axis in mesh_lib.AXES}
    tensor, rows, parts = mesh["tensor"], changes["train.batch_size"], config.train.grad_accumulation
    recomputed = {"none": 1.0, "dots": 1.0, "full": 4 / 3}[changes["model.remat"]]
    flops = transformer.flops_per_token(c, length) * rows * length / math.prod(mesh.values()) * recomputed
    size = 2 if c.precision.compute in ("bfloat16", "float16") else 4
    weights_bytes = size * parameters // tensor
    tokens = rows * length // (mesh["data"] * mesh["fsdp"])
    passes = 3 if changes["model.remat"] == "full" else 2
    moved = [
        hlo.Collectives("all-gather", "fsdp", 0, 2 * parts * weights_bytes),
        hlo.Collectives("all-reduce", "fsdp", 0, weights_bytes),
        hlo.Collectives("all-reduce", "tensor", 0, 2 * passes * c.num_layers * tokens * c.width * size),
        hlo.Collectives("all-reduce", hlo.SLICES, 0, weights_bytes // mesh["fsdp"] if topology.slices > 1 else 0),
    ]
    network = sum(planning.collective_seconds(row, mesh, topology) for row in moved if mesh.get(row.axes, 2) > 1)
    return flops / (chip.flops / chip.devices) + network


def search(
    config: Config, topology: Topology, limit: int, log: Callable[[str], Any], seconds: float = math.inf
) -> Iterator[Report]:
    """Yields the reports of the configurations that fit, in the order of compilation.

    Configurations whose `least_bytes` exceed the memory are not compiled. The others are compiled in the order of their
    predicted time per token (`predicted_seconds`). If a configuration does not fit, the ratio of its compiled memory to
    its `typical_bytes` corrects the estimates of the others, and those that should fit are tried next. Invalid
    configurations, such as a batch that `train.grad_accumulation` does not divide, do not count toward `limit`; the
    search ends if `limit` of them occur before any configuration compiles.

    Args:
      limit: number of configurations to compile.
      log: called with a line before and after every compilation, and about those that are not compiled.
      seconds: time limit; a compilation that exceeds it is ended.

    Raises:
      UserError: no configuration fits; the message names the closest one, or the error of the first invalid one.
    """
    began = time.monotonic()
    capacity = topology.chip.memory / topology.chip.devices
    state, parameters = state_sizes(config)
    pending, too_large = [], []  # (predicted seconds per token, bytes, changes) and (bytes, changes)
    for changes in candidates(config, topology):
        least = least_bytes(config, changes, state)
        if least < capacity:
            step = predicted_seconds(config, changes, topology, parameters)
            pending.append((step / changes["train.batch_size"], typical_bytes(config, changes, state), changes))
        else:
            too_large.append((least, changes))
    pending.sort(key=lambda candidate: candidate[0])
    log(f"{len(pending)} combinations, best estimate first; at most {limit} are compiled, in one to five minutes each")
    if too_large:
        log(f"{len(too_large)} combinations are not compiled: their weights and optimizer exceed the memory")
    compiled = 0
    misses: list[tuple[float, str]] = []  # (bytes, text) of compiled combinations that do not fit
    invalid: list[str] = []
    ratio = 1.0
    reason = f"--limit={limit}"
    while pending and compiled + len(misses) < limit and (compiled or misses or len(invalid) < limit):
        likely = (candidate for candidate in pending if candidate[1] * ratio < capacity)
        candidate = next(likely, min(pending, key=lambda candidate: candidate[1]))
        _, typical, changes = candidate
        if typical * ratio >= capacity and compiled:
            reason = "estimated to be too large, like those that did not fit"
            break
        pending.remove(candidate)
        text, number = _text(changes), compiled + len(misses) + 1
        last = min(limit, number + len(pending))
        log(f"{number} of {last}{_remaining(began, number, last, seconds)}: {text}")
        try:
            rest = seconds - (time.monotonic() - began)
            report = planning.plan(configuration.replace(config, changes), topology, seconds=max(rest, 0.0))
        except TimeoutError:
            pending.append(candidate)
            reason = f"the time limit of {bars.duration(seconds)}"
            break
        except planning.DoesNotFit as error:
            misses.append((error.needed, text))
            ratio = max(ratio, error.needed / typical)
            log(f"  needs {error.needed / GIB:.2f} of {capacity / GIB:.0f} GiB")
            continue
        except UserError as error:
            invalid.append(f"{text}: {error}")
            log(f"  {error}")
            continue
        compiled += 1
        log(f"  {report['memory']['peak'] / GIB:.2f} GiB, {per_token(report) * 1e9:.1f} ns/token")
        yield report | {"changes": changes}
    if pending:
        log(f"{len(pending)} combinations were not compiled ({reason})")
    if compiled:
        return
    if invalid and not misses:
        raise UserError(f"--search: {len(invalid)} combinations are invalid and none was compiled; {invalid[0]}")
    if not misses and pending:
        raise UserError(f"--search: none of {len(pending)} combinations was compiled within {bars.duration(seconds)}")
    needed, text = min(misses or [(least, _text(changes)) for least, changes in too_large])
    raise UserError(
        f"--search: none of the {len(misses)} compiled combinations fits {topology.name}; the closest ({text}) needs "
        f"{'' if misses else 'at least '}{needed / GIB:.1f} of the {capacity / GIB:.0f} GiB of a device; use a shorter "
        "train.seq_len or more devices"
    )


def _remaining(began: float, number: int, last: int, seconds: float) -> str:
    """Returns the elapsed and the estimated remaining time until compilation `last` ends; "" before the first one."""
    elapsed = time.monotonic() - began
    if number == 1:
        return ""
    left = min((last - number + 1) * elapsed / (number - 1), seconds - elapsed)
    return f" ({bars.duration(elapsed)} so far, about {bars.duration(max(left, 0))} left)"


def _text(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items())


def per_token(report: Report) -> float:
    """The upper estimate of the step time divided by the tokens of the batch, in seconds."""
    rows, length = report["batch"]
    return float(report["seconds"]["longest"] / (rows * length))


def ranking(reports: list[Report]) -> str:
    """A table of the reports of `search`, the shortest upper estimate of the time per token first."""
    lines = [f"{'ns/token':>9} {'utilization':>15} {'peak GiB':>9}  changes"]
    for report in sorted(reports, key=per_token):
        low, high = report["utilization"]
        changes = " ".join(f"--config.{name}={value}" for name, value in report["changes"].items())
        peak = report["memory"]["peak"] / GIB
        lines.append(f"{per_token(report) * 1e9:9.2f} {low:6.0%} to {high:5.0%} {peak:9.2f}  {changes}")
    return "\n".join(lines)


def describe(report: Report) -> str:
    """A report as text."""
    m, flops, seconds = report["memory"], report["flops"], report["seconds"]
    rows, length = report["batch"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['topology']}, {report['devices']} devices, mesh {mesh}",
        f"attention kernel {report['attention_kernel']}",
        f"{rows} prompts of {length} tokens; figures are for one device and one new token per prompt"
        if report["decode"]
        else f"a batch of {rows} x {length} tokens; figures are for one device",
        "",
        "memory, GiB",
    ]
    parts = ("arguments", "optimizer", "temporaries", "outputs", "peak", "live", "capacity")
    notes = {
        "optimizer": "(part of the arguments)",
        "peak": f"({m['peak'] / m['capacity']:.0%} of the capacity)",
        "live": "(maximum memory in use at one time)",
    }
    lines += [f"  {name:<12}{m[name] / GIB:10.3f} {notes.get(name, '')}".rstrip() for name in parts]
    lines += [
        "",
        "FLOPs of a step, including all loop iterations",
        f"  {'compiled':<12}{flops['compiled']:10.3e} (attention kernels included)",
        f"  {'model':<12}{flops['model']:10.3e} ({'2 N' if report['decode'] else '6 N D'} + attention)",
        "",
        f"{'collectives':<20}{'mesh axes':<16}{'count':>8}{'GiB':>10}",
    ]
    lines += [
        f"  {row['kind']:<18}{row['axes']:<16}{row['count']:>8,}{row['bytes'] / GIB:>10.3f}"
        for row in report["collectives"]
    ] or ["  none"]
    low, high = report["utilization"]
    lines += [
        "",
        f"estimated step: {seconds['shortest']:.3g} to {seconds['longest']:.3g} s "
        f"(compute {seconds['compute']:.3g}, collectives {seconds['collectives']:.3g}), "
        f"utilization {low:.0%} to {high:.0%}",
        *(f"  {text}" for text in report["assumptions"]),
        "",
        "largest arrays, MiB",
    ]
    lines += [
        f"  {row['bytes'] / 2**20:10.1f}  {row['shape']:<24} {row['operation'][-80:]}" for row in report["largest"]
    ]
    return "\n".join(lines)
