"""The peak memory of real steps of SmolLM2-135M, beside the prediction of `plan --memory` (Linux).

Every case runs in its own process. The measured memory is the increase of the resident set during the steps (the
kernel's high-water mark is reset before them), plus the arrays that exist before: weights, optimizer state and batch.
The rest of the process (interpreter, libraries, compiler) is a column of its own.
"""

import gc
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import cli, configuration, files, runtime
from llm_jax.research import findings
from llm_jax.training import memory, start
from llm_jax.training.setup import setup

HERE = pathlib.Path(__file__).parent
CASES: tuple[str, ...] = ("forward-none", "full-none", "full-full", "lora-none", "lora-full", "lora-dots")
CASES += ("fa-none", "fa-full", "qlora-none", "qlora-full")

flags.DEFINE_string("case", "", "a single case, such as lora-dots; empty: all")


def main() -> None:
    if flags.FLAGS.case:
        print(json.dumps(measure(*flags.FLAGS.case.split("-"))))
        return
    figures = {}
    for case in CASES:
        command = [sys.executable, __file__, f"--case={case}"]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures[case] = json.loads(output.splitlines()[-1])
        print(case, {k: f"{v / 2**20:,.0f} MiB" for k, v in figures[case].items()}, flush=True)
        files.write_json(HERE / "measured.json", figures)
        findings.replace_section(HERE / "README.md", "measured", ["", *table(figures), ""])


def table(figures: dict[str, dict[str, int]]) -> list[str]:
    """Markdown."""
    rows = []
    for case, taken in figures.items():
        planned, measured, rest = (f"{taken[name] / 2**20:,.0f}" for name in ("planned", "measured", "rest"))
        ratio = f"{taken['measured'] / taken['planned']:.2f}"
        rows.append([case.replace("-", ", remat "), planned, measured, ratio, rest])
    head = ["step", "planned, MiB", "measured, MiB", "measured / planned", "the rest of the process, MiB"]
    return findings.markdown_table(head, rows)


def measure(kind: str, remat: str) -> dict[str, int]:
    """The memory of two steps in bytes: {"planned", "measured", "rest"}."""
    runtime.retain_freed_memory()
    runtime.disable_async_dispatch()
    config = memory.with_remat(start.find(configuration.load("sentiment_lora")).config, remat)
    parts = setup(memory.variant(config, kind))
    state = parts.init()
    rows = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in parts.batch.items()}
    shapes = parts.state.replace(frozen={}), parts.state.frozen, parts.batch
    if kind == "forward":
        compiled = parts.loss.lower(shapes[0].params, *shapes[1:]).compile()
    else:
        compiled = parts.train_step.lower(*shapes, jnp.float32(jnp.inf)).compile()
    gc.collect()
    runtime.release_freed_memory()
    before, arrays = resident("VmRSS"), sum(array.nbytes for array in jax.live_arrays())
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        frozen = state.frozen
        if kind == "forward":
            jax.block_until_ready(compiled(state.params, frozen, rows))
        else:
            state, _ = compiled(state.replace(frozen={}), frozen, rows, jnp.float32(jnp.inf))
            state = jax.block_until_ready(state).replace(frozen=frozen)
    measured = resident("VmHWM") - before + arrays
    return {"planned": memory.of_executable(compiled).peak, "measured": measured, "rest": before - arrays}


def resident(field: str) -> int:
    """Resident memory in bytes; VmRSS: now, VmHWM: the maximum since the mark was reset."""
    kilobytes = re.findall(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(kilobytes[0]) * 1024


if __name__ == "__main__":
    cli.run_script(main)
