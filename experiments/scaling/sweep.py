"""Step time, memory and compile time against depth, width, sequence length and number of devices: S1, S2.

Large: the training step of Llama-2-7B is compiled for H100 GPUs, or with --chip=v5e for slices of a TPU, by
`llm_jax.plan --topology`, with full rematerialization, all devices in mesh.fsdp and one row of tokens per device;
memory is that of the compiled step, and the step time is the range that `plan` estimates. Small: the training step of a
small model is compiled and run on the CPU of this machine; the step time is the median of --repeats steps, and the
compile time is the processor time of tracing and compiling. Each series varies one quantity; the other quantities have
the values of `LARGE` and `SMALL`.
"""

import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, configuration
from llm_jax.parallel import topologies
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding
from llm_jax.training import estimate, memory, planning
from llm_jax.training.setup import setup

LARGE = {"layers": 32, "width": 4096, "tokens": 2048, "devices": 64}
SMALL = {"layers": 4, "width": 256, "tokens": 256}
SERIES: dict[str, dict[str, tuple[int, ...]]] = {
    "large": {
        "layers": (8, 32, 128),
        "width": (2048, 4096, 8192),
        "tokens": (1024, 2048, 4096),
        "devices": (16, 64, 256),
    },
    "small": {"layers": (2, 4, 8, 16, 32), "width": (128, 256, 512, 1024), "tokens": (128, 256, 512, 1024)},
}
# Rows of a picture: (label, unit, figures).
LINES: dict[str, list[tuple[str, float, tuple[str, ...]]]] = {
    "large": [
        ("GiB of a device", 2.0**30, ("arguments", "temporaries", "live")),
        ("estimated step, s", 1.0, ("shortest", "longest")),
    ],
    "small": [
        ("MiB", 2.0**20, ("arguments", "temporaries")),
        ("step, ms", 1e-3, ("step",)),
        ("compilation, s", 1.0, ("compilation",)),
    ],
}
TOPOLOGIES = {
    "h100": {16: "h100:2x8", 64: "h100:8x8", 256: "h100:32x8"},
    "v5e": {16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"},
}

flags.DEFINE_enum("chip", "h100", list(TOPOLOGIES), "accelerator that the large model is compiled for")
flags.DEFINE_enum("part", "all", ["all", "compiled", "measured"], "compiled: only measure the large model")
flags.DEFINE_integer("points", 9, "number of values of each series, from the smallest")
flags.DEFINE_integer("repeats", 7, "timed steps of each small model")


def main() -> None:
    f = flags.FLAGS
    parts = {"all": ("large", "small"), "compiled": ("large",), "measured": ("small",)}[f.part]
    points = {kind: {axis: values[: f.points] for axis, values in SERIES[kind].items()} for kind in parts}
    shapes = {_name(kind, shape): (kind, shape) for kind in parts for _, _, shape in _shapes(kind, points[kind])}

    def compute(condition: str, seed: int) -> dict[str, float]:
        kind, shape = shapes[condition]
        return planned(shape, f.chip) if kind == "large" else measured(shape, f.repeats)

    root = experiments.directory(f.runs, f.points, f.repeats, f.chip)
    figures, origins = experiments.measure(root, shapes, 1, compute)
    if f.part == "compiled":
        return
    rows = {
        kind: [(axis, value, figures[_name(kind, shape)][0]) for axis, value, shape in _shapes(kind, points[kind])]
        for kind in parts
    }
    for kind in parts:
        draw(kind, rows[kind], experiments.output(__file__))
    print(experiments.publish(__file__, judge(rows), tables(rows), origins=origins))


def _shapes(kind: str, series: dict[str, tuple[int, ...]]) -> list[tuple[str, int, dict[str, int]]]:
    """(quantity, its value, all quantities) of every point of the series."""
    base = LARGE if kind == "large" else SMALL
    return [(axis, value, base | {axis: value}) for axis, values in series.items() for value in values]


def _name(kind: str, shape: dict[str, int]) -> str:
    return " ".join((kind, *(f"{value} {axis}" for axis, value in shape.items())))


def planned(shape: dict[str, int], chip: str) -> dict[str, float]:
    """Figures of the step of Llama-2-7B, with other quantities, on one device; bytes and seconds."""
    width = shape["width"]
    changes = {"model.num_layers": shape["layers"], "train.seq_len": shape["tokens"]}
    changes |= {"model.width": width, "model.mlp_dim": width * 43 // 16, "train.batch_size": shape["devices"]}
    changes |= {"model.num_heads": width // 128, "model.num_kv_heads": width // 128}
    config = configuration.load("llama2_7b", changes)
    try:
        report = planning.plan(config, topologies.parse(TOPOLOGIES[chip][shape["devices"]]))
    except planning.DoesNotFit as error:
        return {"needed": error.needed}
    sizes = {name: report["memory"][name] for name in ("arguments", "temporaries", "live")}
    return sizes | {name: report["seconds"][name] for name in ("shortest", "longest")}


def measured(shape: dict[str, int], repeats: int) -> dict[str, float]:
    """Figures of the step of a small model on one device of this machine; bytes and seconds."""
    jax.config.update("jax_enable_compilation_cache", False)
    width = shape["width"]
    changes = {"model.vocab_size": 1024, "model.scan_layers": True, "train.batch_size": 4}
    changes |= {"model.num_layers": shape["layers"], "model.width": width, "model.mlp_dim": 4 * width}
    changes |= {"model.num_heads": width // 64, "model.num_kv_heads": width // 64, "train.seq_len": shape["tokens"]}
    changes |= {"model.position.max_length": shape["tokens"]}
    parts = setup(configuration.load("default", changes), devices=jax.devices()[:1])
    began = time.process_time()
    limit = jax.ShapeDtypeStruct((), "float32")
    step = parts.train_step.lower(parts.state.replace(frozen={}), {}, parts.batch, limit).compile()
    compiled = time.process_time() - began
    state, batch = parts.init().replace(frozen={}), estimate.dummy_batch(parts)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, {}, batch, jnp.float32(jnp.inf)))
        seconds.append(time.perf_counter() - began)
    sizes = memory.of_executable(step)
    return {
        "arguments": sizes.arguments,
        "temporaries": sizes.temporaries,
        "step": statistics.median(seconds[1:]),
        "compilation": compiled,
    }


def judge(rows: dict[str, list[tuple[str, int, dict[str, float]]]]) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    by_depth = {value: row["compilation"] for axis, value, row in rows["small"] if axis == "layers"}
    growth = by_depth[max(by_depth)] / by_depth[min(by_depth)]
    verdict = verdicts.at_most(growth, holds=1.25, fails=2.0)
    values = {f"{value} layers": seconds / by_depth[min(by_depth)] for value, seconds in by_depth.items()}
    results = [findings.finding("S1", "compile time over that of the shallowest model", values, verdict)]
    if "large" in rows:
        sizes = {value: row for axis, value, row in rows["large"] if axis == "devices"}
        least, most = min(sizes), max(sizes)
        held = sizes[most]["arguments"] * most / (sizes[least]["arguments"] * least)
        falls = sizes[most]["live"] < sizes[least]["live"]
        verdict = "holds" if held <= 1.05 and falls else "undecided" if falls else "fails"
        values = {f"{value} devices": row["live"] / sizes[least]["live"] for value, row in sizes.items()}
        values["arguments of all devices"] = held
        results.append(findings.finding("S2", f"live memory over that of {least} devices", values, verdict))
    return results


def tables(rows: dict[str, list[tuple[str, int, dict[str, float]]]]) -> list[str]:
    """Markdown."""
    lines: list[str] = []
    for kind, of_kind in rows.items():
        base = LARGE if kind == "large" else SMALL
        text = ", ".join(f"{value:,} {axis}" for axis, value in base.items())
        large = f"Llama-2-7B, compiled for {flags.FLAGS.chip}"
        name = large if kind == "large" else "A small model, run on this machine's CPU"
        heading = f"{name}; the quantities that a series does not vary are {text}; per device:"
        cells = [[axis, f"{value:,}", *_cells(row)] for axis, value, row in of_kind]
        columns = ["arguments, GiB", "temporaries, GiB", "live, GiB", "estimated step, s"]
        if kind == "small":
            columns = ["arguments, MiB", "temporaries, MiB", "step, ms", "compilation, s"]
        lines += ["", heading, "", *findings.markdown_table(["series", "value", *columns], cells)]
        lines += ["", f"![{name}: memory and step time against each quantity]({kind}.svg)"]
    return lines


def _cells(row: dict[str, float]) -> list[str]:
    if "needed" in row:
        return ["", "", f"needs {row['needed'] / 2**30:.1f}", ""]
    if "live" in row:
        sizes = [f"{row[name] / 2**30:.2f}" for name in ("arguments", "temporaries", "live")]
        return [*sizes, f"{row['shortest']:.2f} to {row['longest']:.2f}"]
    sizes = [f"{row[name] / 2**20:,.0f}" for name in ("arguments", "temporaries")]
    return [*sizes, f"{row['step'] * 1e3:,.0f}", f"{row['compilation']:.1f}"]


def draw(kind: str, rows: list[tuple[str, int, dict[str, float]]], directory: pathlib.Path) -> None:
    """Writes KIND.png and KIND.svg: memory, time (and compile time) against every quantity, on logarithmic axes."""
    rows = [row for row in rows if "needed" not in row[2]]
    axes_names = list(dict.fromkeys(axis for axis, _, _ in rows))
    lines = LINES[kind]
    for suffix in ("png", "svg"):
        path, size = directory / f"{kind}.{suffix}", (2.6 * len(axes_names), 2.3 * len(lines))
        with plots.figure(path, len(lines), len(axes_names), figsize=size, sharey="row", squeeze=False) as grid:
            for i, (title, unit, names) in enumerate(lines):
                for j, axis_name in enumerate(axes_names):
                    axis, points = grid[i][j], [row for row in rows if row[0] == axis_name]
                    for name in names:
                        values = [row[name] / unit for _, _, row in points]
                        axis.loglog([value for _, value, _ in points], values, marker="o", markersize=3, label=name)
                    axis.set(xlabel=axis_name if i == len(lines) - 1 else "", ylabel=title if j == 0 else "")
                    axis.grid(alpha=0.3, which="both")
                if len(names) > 1:
                    grid[i][0].legend(fontsize=7)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"points": 2, "repeats": 2, "part": "measured"}))
