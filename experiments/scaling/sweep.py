"""Step time, memory and compile time against depth, width, sequence length and number of devices: S1, S2.

Large: the training step of Llama-2-7B is compiled for H100 GPUs, or with --chip=v5e for slices of a TPU, by
`llm_jax.plan --topology`, with full rematerialization, all devices in mesh.fsdp and one row of tokens per device;
memory is that of the compiled step, and the step time is the range that `plan` estimates. Small: the training step of a
small model is compiled and run on the CPU of this machine; the step time is the median of --repeats steps, and the
compile time is the processor time of tracing and compiling. Each series varies one quantity; the other quantities have
the values of `BASE`.
"""

import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, configuration
from llm_jax.parallel import topologies
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding
from llm_jax.schema import Config
from llm_jax.training import estimate, memory, planning
from llm_jax.training.setup import setup

BASE = {
    "large": {"layers": 32, "width": 4096, "tokens": 2048, "devices": 64},
    "small": {"layers": 4, "width": 256, "tokens": 256},
}
SERIES: dict[str, dict[str, tuple[int, ...]]] = {
    "large": {
        "layers": (8, 32, 128),
        "width": (2048, 4096, 8192),
        "tokens": (1024, 2048, 4096),
        "devices": (16, 64, 256),
    },
    "small": {"layers": (2, 4, 8, 16, 32), "width": (128, 256, 512, 1024), "tokens": (128, 256, 512, 1024)},
}
# Recipe, width of a head, width of the MLP over that of the model, and other overrides.
MODELS: dict[str, tuple[str, int, float, dict[str, object]]] = {
    "large": ("llama2_7b", 128, 43 / 16, {}),
    "small": ("default", 64, 4, {"model.vocab_size": 1024, "model.scan_layers": True, "train.batch_size": 4}),
}
# Lines of a picture: label, unit, format, and figures by column of the table.
LINES: dict[str, list[tuple[str, float, str, dict[str, tuple[str, ...]]]]] = {
    "large": [
        ("GiB of a device", 2.0**30, ".2f", {f"{n}, GiB": (n,) for n in ("arguments", "temporaries", "live")}),
        ("estimated step, s", 1.0, ".2f", {"estimated step, s": ("shortest", "longest")}),
    ],
    "small": [
        ("MiB", 2.0**20, ",.0f", {f"{n}, MiB": (n,) for n in ("arguments", "temporaries")}),
        ("step, ms", 1e-3, ",.0f", {"step, ms": ("step",)}),
        ("compilation, s", 1.0, ".1f", {"compilation, s": ("compilation",)}),
    ],
}
TOPOLOGIES = {
    "h100": {16: "h100:2x8", 64: "h100:8x8", 256: "h100:32x8"},
    "v5e": {16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"},
}
PARTS = {"all": ("large", "small"), "compiled": ("large",), "measured": ("small",)}

flags.DEFINE_enum("chip", "h100", list(TOPOLOGIES), "accelerator that the large model is compiled for")
flags.DEFINE_enum("part", "all", list(PARTS), "compiled: only measure the large model")
flags.DEFINE_integer("points", 9, "number of values of each series, from the smallest")
flags.DEFINE_integer("repeats", 7, "timed steps of each small model")

Row = tuple[str, int, dict[str, float]]  # the quantity that varies, its value, and figures


def main() -> None:
    f = flags.FLAGS
    points = {
        kind: [(axis, value) for axis, values in SERIES[kind].items() for value in values[: f.points]]
        for kind in PARTS[f.part]
    }
    shapes = {name(kind, *point): (kind, *point) for kind, series in points.items() for point in series}

    def compute(condition: str, seed: int) -> dict[str, float]:
        kind, axis, value = shapes[condition]
        shape = BASE[kind] | {axis: value}
        return planned(shape, f.chip) if kind == "large" else measured(shape, f.repeats)

    root = experiments.directory(f.runs, f.points, f.repeats, f.chip)
    figures, origins = experiments.measure(root, shapes, 1, compute)
    if f.part == "compiled":
        return
    rows = {kind: [(*point, figures[name(kind, *point)][0]) for point in series] for kind, series in points.items()}
    for kind in rows:
        draw(kind, rows[kind], experiments.output(__file__))
    print(experiments.publish(__file__, judge(rows), tables(rows), origins=origins))


def name(kind: str, axis: str, value: int) -> str:
    return " ".join((kind, *(f"{value} {axis}" for axis, value in (BASE[kind] | {axis: value}).items())))


def model(kind: str, shape: dict[str, int]) -> Config:
    recipe, head_width, mlp, others = MODELS[kind]
    heads = shape["width"] // head_width
    changes: dict[str, object] = {"model.num_layers": shape["layers"], "model.width": shape["width"]}
    changes |= {"model.mlp_dim": int(mlp * shape["width"]), "model.num_heads": heads, "model.num_kv_heads": heads}
    return configuration.load(recipe, changes | {"train.seq_len": shape["tokens"]} | others)


def planned(shape: dict[str, int], chip: str) -> dict[str, float]:
    """Figures of the step of Llama-2-7B, with other quantities, on one device; bytes and seconds."""
    config = configuration.load(model("large", shape), {"train.batch_size": shape["devices"]})
    try:
        report = planning.plan(config, topologies.parse(TOPOLOGIES[chip][shape["devices"]]))
    except planning.DoesNotFit as error:
        return {"needed": error.needed}
    sizes = {name: report["memory"][name] for name in ("arguments", "temporaries", "live")}
    return sizes | {name: report["seconds"][name] for name in ("shortest", "longest")}


def measured(shape: dict[str, int], repeats: int) -> dict[str, float]:
    """Figures of the step of a small model on one device of this machine; bytes and seconds."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = configuration.load(model("small", shape), {"model.position.max_length": shape["tokens"]})
    parts = setup(config, devices=jax.devices()[:1])
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
    times = {"step": statistics.median(seconds[1:]), "compilation": compiled}
    return {"arguments": sizes.arguments, "temporaries": sizes.temporaries} | times


def judge(rows: Mapping[str, Sequence[Row]]) -> list[Finding]:
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


def tables(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Markdown."""
    titles = {
        "large": f"Llama-2-7B, compiled for {flags.FLAGS.chip}",
        "small": "A small model, run on this machine's CPU",
    }
    lines: list[str] = []
    for kind, of_kind in rows.items():
        base = ", ".join(f"{value:,} {axis}" for axis, value in BASE[kind].items())
        heading = f"{titles[kind]}; the quantities that a series does not vary are {base}; per device:"
        head = ["series", "value", *(column for *_, columns in LINES[kind] for column in columns)]
        cells = [[axis, f"{value:,}", *_cells(kind, row)] for axis, value, row in of_kind]
        lines += ["", heading, "", *findings.markdown_table(head, cells)]
        lines += ["", f"![{titles[kind]}: memory and step time against each quantity]({kind}.svg)"]
    return lines


def _cells(kind: str, row: dict[str, float]) -> list[str]:
    if "needed" in row:
        return ["", "", f"needs {row['needed'] / 2**30:.1f}", ""]
    return [
        " to ".join(format(row[name] / unit, form) for name in names)
        for _, unit, form, columns in LINES[kind]
        for names in columns.values()
    ]


def draw(kind: str, rows: Sequence[Row], directory: pathlib.Path) -> None:
    """Writes KIND.png and KIND.svg: memory, time (and compile time) against every quantity, on logarithmic axes."""
    rows = [row for row in rows if "needed" not in row[2]]
    axes_names = list(dict.fromkeys(axis for axis, _, _ in rows))
    lines = LINES[kind]
    for suffix in ("png", "svg"):
        path, size = directory / f"{kind}.{suffix}", (2.6 * len(axes_names), 2.3 * len(lines))
        with plots.figure(path, len(lines), len(axes_names), figsize=size, sharey="row", squeeze=False) as grid:
            for i, (title, unit, _, columns) in enumerate(lines):
                names = [name for of_column in columns.values() for name in of_column]
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
