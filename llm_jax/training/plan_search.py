"""Tries meshes, rematerialization and batch sizes for a topology, and prints reports of `planning` as text."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llm_jax import configuration, weights
from llm_jax.errors import UserError
from llm_jax.parallel.topologies import Topology
from llm_jax.schema import Config
from llm_jax.training import losses, planning
from llm_jax.training.planning import Report
from llm_jax.training.setup import setup

GIB = 2**30


def candidates(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Returns the changes of a configuration to try, most promising first.

    The axis "data" spans the slices, "tensor" has 1, 2, 4 or 8 neighbouring devices if it divides the heads, and "fsdp"
    has the rest. Larger batches per device and less rematerialization come first.
    """
    devices = topology.chips * topology.chip.devices
    within = devices // topology.slices
    for rows in (8, 4, 2, 1):
        for remat in ("none", "dots", "full"):
            for tensor in (1, 2, 4, 8):
                if within % tensor or config.model.num_kv_heads % tensor or config.model.num_heads % tensor:
                    continue
                mesh = {"data": topology.slices, "fsdp": within // tensor, "tensor": tensor, "context": 1}
                yield {
                    **{f"mesh.{axis}": size for axis, size in mesh.items()},
                    "model.remat": remat,
                    "train.batch_size": rows * devices // tensor,
                }


def state_bytes(config: Config) -> int:
    """Returns the bytes of one copy of all weights, the optimizer state and the moving average.

    Computed from shapes and dtypes on a mesh of one device of this machine.

    Raises:
      UserError: options that contradict each other.
    """
    mesh = dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1, context=1)
    rows = config.train.grad_accumulation * losses.rows_together(config.loss)
    train = dataclasses.replace(config.train, batch_size=rows)
    init_from = config.init_from or ("unnamed" if config.lora.rank else "")  # shapes are enough: no weights are read
    config = dataclasses.replace(config, mesh=mesh, train=train, init_from=init_from, explicit=frozenset())
    state = setup(config, devices=jax.devices()[:1]).state
    return weights.num_bytes((state.params, state.frozen, state.optimizer, state.ema))


def least_bytes(config: Config, changes: dict[str, Any], state: int) -> float:
    """A lower bound of the memory of a step on one device: its share of the `state_bytes`, if all of them are split.

    Activations, gradients and unsharded weights need additional memory.
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


def search(config: Config, topology: Topology, limit: int, log: Callable[[str], Any]) -> list[Report]:
    """Returns the reports of the configurations that fit, sorted by the upper estimate of the time per token.

    Configurations whose `least_bytes` exceed the memory are not compiled. If a configuration does not fit, the ratio of
    its compiled memory to its `typical_bytes` corrects the estimates of the others, and those that should fit are tried
    next. Invalid configurations, such as a batch that `train.grad_accumulation` does not divide, do not count toward
    `limit`; the search ends if `limit` of them occur before any configuration compiles.

    Args:
      limit: number of configurations to compile.
      log: called with a line about every compiled or invalid configuration, and about those that are not compiled.

    Raises:
      UserError: no configuration fits; the message names the closest one, or the error of the first invalid one.
    """
    capacity = topology.chip.memory / topology.chip.devices
    state = state_bytes(config)
    pending, too_large = [], []  # (bytes, changes)
    for changes in candidates(config, topology):
        least = least_bytes(config, changes, state)
        if least < capacity:
            pending.append((typical_bytes(config, changes, state), changes))
        else:
            too_large.append((least, changes))
    reports: list[Report] = []
    misses: list[tuple[float, str]] = []  # (bytes, text) of those that do not fit
    refused: list[str] = []
    ratio = 1.0
    while pending and len(reports) + len(misses) < limit and (reports or misses or len(refused) < limit):
        likely = (pair for pair in pending if pair[0] * ratio < capacity)
        typical, changes = next(likely, min(pending, key=lambda pair: pair[0]))
        if typical * ratio >= capacity and reports:
            break
        pending.remove((typical, changes))
        text = _text(changes)
        try:
            report = planning.plan(configuration.replace(config, changes), topology)
        except planning.DoesNotFit as error:
            misses.append((error.needed, text))
            ratio = max(ratio, error.needed / typical)
            log(f"{text}: needs {error.needed / GIB:.2f} of {capacity / GIB:.0f} GiB")
            continue
        except UserError as error:
            refused.append(f"{text}: {error}")
            log(refused[-1])
            continue
        reports.append(report | {"changes": changes})
        log(f"{text}: {report['memory']['peak'] / GIB:.2f} GiB, {per_token(report) * 1e9:.1f} ns/token")
    if too_large:
        log(f"{len(too_large)} combinations were not compiled: their weights and optimizer exceed the memory")
    if pending:
        compiled = len(reports) + len(misses)
        reason = "by those that did not fit, too large" if compiled and compiled < limit else f"--limit={limit}"
        log(f"{len(pending)} combinations were not compiled ({reason})")
    if reports:
        return sorted(reports, key=per_token)
    if refused and not misses:
        raise UserError(f"--search: {len(refused)} combinations are invalid and none was compiled; {refused[0]}")
    needed, text = min(misses or [(least, _text(changes)) for least, changes in too_large])
    raise UserError(
        f"--search: no mesh, remat and batch of {len(misses)} that were compiled fits {topology.name}; the closest "
        f"({text}) needs {'' if misses else 'at least '}{needed / GIB:.1f} of the {capacity / GIB:.0f} GiB of a "
        "device; use a shorter train.seq_len or more devices"
    )


def _text(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items())


def per_token(report: Report) -> float:
    """The upper estimate of the step time divided by the tokens of the batch, in seconds."""
    rows, length = report["batch"]
    return float(report["seconds"]["longest"] / (rows * length))


def ranking(reports: list[Report]) -> str:
    """The table of `search`, best first."""
    lines = [f"{'ns/token':>9} {'utilization':>15} {'peak GiB':>9}  changes"]
    for report in reports:
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
        f"{rows} prompts of {length} tokens; figures are of one device and one new token per prompt"
        if report["decode"]
        else f"a batch of {rows} x {length} tokens; figures are of one device",
        "",
        "memory, GiB",
    ]
    parts = ("arguments", "optimizer", "temporaries", "outputs", "peak", "live", "capacity")
    notes = {
        "optimizer": "(part of the arguments)",
        "peak": f"({m['peak'] / m['capacity']:.0%} of the capacity)",
        "live": "(the most that is used at one time)",
    }
    lines += [f"  {name:<12}{m[name] / GIB:10.3f} {notes.get(name, '')}".rstrip() for name in parts]
    lines += [
        "",
        "FLOPs of a step, trips of loops counted",
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
