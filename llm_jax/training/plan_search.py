"""Tries meshes, rematerialization and batch sizes for a topology, and prints reports of `planning` as text."""

from collections.abc import Callable, Iterator
from typing import Any

from llm_jax import configuration
from llm_jax.errors import UserError
from llm_jax.model.transformer import flops_per_token
from llm_jax.parallel.topologies import Topology
from llm_jax.schema import Config
from llm_jax.training import planning
from llm_jax.training.planning import Report

GIB = 2**30


def candidates(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Changes of a configuration to try, the most promising first.

    The axis "data" spans the slices, "tensor" takes 1, 2, 4 or 8 neighbours as far as the heads divide, and "fsdp" the
    rest; larger batches per device come first, and less rematerialization.
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


def least_bytes(config: Config, changes: dict[str, Any], topology: Topology) -> float:
    """A lower bound of the memory of a step on one device: saved activations of all layers, weights and optimizer."""
    c, devices = config.model, topology.chips * topology.chip.devices
    rows = changes["train.batch_size"] / (changes["mesh.data"] * changes["mesh.fsdp"])
    per_token = {"full": c.width, "dots": 6 * c.width + 3 * c.mlp_dim, "none": 10 * c.width + 4 * c.mlp_dim}
    size = 2 if c.precision.compute in ("bfloat16", "float16") else 4
    saved = rows * config.train.seq_len * c.num_layers * per_token[changes["model.remat"]] * size
    saved /= 1 if changes["model.remat"] == "full" else changes["mesh.tensor"]
    # Weights and the two moments of AdamW in float32; a frozen base has its weights only, of half a byte or more each.
    per_weight = 12.0 if not config.lora.rank else 0.5 if config.quant.scheme else 2.0
    return saved + per_weight * flops_per_token(c, 0) / 6 / devices * topology.slices


def search(config: Config, topology: Topology, limit: int, log: Callable[[str], Any]) -> list[Report]:
    """The reports of the configurations that fit, by the longest estimated time per token.

    Those that cannot fit by `least_bytes` are not compiled. Where one does not fit, the ratio of what the compiler says
    that it needs to its `least_bytes` is expected of the others, and those that fit by that expectation come next.

    Args:
      limit: number of configurations to compile.
      log: is called with a line about every configuration that is compiled, and about those that are not.

    Raises:
      UserError: none fits; names the one that needs the least memory.
    """
    capacity = topology.chip.memory / topology.chip.devices
    pending = [(least_bytes(config, c, topology), c) for c in candidates(config, topology)]
    too_large = [pair for pair in pending if pair[0] >= capacity]
    pending = [pair for pair in pending if pair[0] < capacity]
    reports: list[Report] = []
    misses: list[tuple[float, str]] = []  # (bytes, text) of those that do not fit
    ratio = 1.0
    while pending and len(reports) + len(misses) < limit:
        likely = (pair for pair in pending if pair[0] * ratio < capacity)
        least, changes = next(likely, min(pending, key=lambda pair: pair[0]))
        if least * ratio >= capacity and reports:
            break
        pending.remove((least, changes))
        text = " ".join(f"{name}={value}" for name, value in changes.items())
        try:
            report = planning.plan(configuration.replace(config, changes), topology)
        except planning.DoesNotFit as error:
            misses.append((error.needed, text))
            ratio = max(ratio, error.needed / least)
            log(f"{text}: needs {error.needed / GIB:.2f} of {capacity / GIB:.0f} GiB")
            continue
        reports.append(report | {"changes": changes})
        log(f"{text}: {report['memory']['peak'] / GIB:.2f} GiB, {per_token(report) * 1e9:.1f} ns/token")
    if too_large:
        log(f"{len(too_large)} combinations were not compiled: their weights and activations exceed the memory")
    if pending:
        reason = f"--limit={limit}" if len(reports) + len(misses) == limit else "by those that did not fit, too large"
        log(f"{len(pending)} combinations were not compiled ({reason})")
    if not reports:
        needed, text = (
            min(misses) if misses else min((n, " ".join(f"{k}={v}" for k, v in c.items())) for n, c in too_large)
        )
        raise UserError(
            f"--search: no mesh, remat and batch of {len(misses)} that were compiled fits {topology.name}; the closest "
            f"({text}) needs {'' if misses else 'at least '}{needed / GIB:.1f} of the {capacity / GIB:.0f} GiB of a "
            "device; use a shorter train.seq_len or more devices"
        )
    return sorted(reports, key=per_token)


def per_token(report: Report) -> float:
    """The longest estimated time of a step per token of the batch, in seconds."""
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
