"""Real steps of SmolLM2-135M beside what `plan --memory` says of them: the resident peak of this machine (Linux).

    PYTHONPATH=. python experiments/lora_memory/measured.py

Every step runs in a process of its own. Measured is what the steps add to what the process held when they began (the
kernel's high-water mark is reset there), and the arrays that it held then: weights, optimizer and batch. The rest of
the process (interpreter, libraries, compiler and what it leaves) stands beside it. Writes measured.json and the table
in README.md beside this file.
"""

import gc
import json
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import flags

from llm_jax import checkpoints, cli, files
from llm_jax import configuration as config_lib
from llm_jax.training import memory

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BEGIN, END = "<!-- measured: written by measured.py -->\n", "<!-- end of measured -->"
CASES = (
    ("forward", "none"),
    ("full", "none"),
    ("full", "full"),
    ("lora", "none"),
    ("lora", "full"),
    ("lora", "dots"),
    ("fa", "none"),
    ("fa", "full"),
    ("qlora", "none"),
    ("qlora", "full"),
)
STEPS = 2

flags.DEFINE_string("case", "", "one of them, such as lora-dots; empty: all")


def main() -> None:
    if flags.FLAGS.case:
        print(json.dumps(one(*flags.FLAGS.case.split("-"))))
        return
    found = {}
    for case in map("-".join, CASES):
        command = [sys.executable, __file__, f"--case={case}"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[case] = json.loads(said.splitlines()[-1])
        print(case, {k: f"{v / 2**20:,.0f} MiB" for k, v in found[case].items()}, flush=True)
        write(found)


def write(found: dict[str, dict[str, int]]) -> None:
    """What there is so far."""
    files.write_json(HERE / "measured.json", found)
    heads = ("step", "planned, MiB", "measured, MiB", "measured / planned", "the rest of the process, MiB")
    lines = ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, taken in found.items():
        planned, measured, rest = (taken[k] / 2**20 for k in ("planned", "measured", "rest"))
        name = ", remat ".join(case.split("-"))
        lines.append(f"| {name} | {planned:,.0f} | {measured:,.0f} | {measured / planned:.2f} | {rest:,.0f} |")
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + "\n".join([*lines, ""]) + "\n" + END + rest.split(END)[1])


def one(name: str, remat: str) -> dict[str, int]:
    """Bytes, {"planned", "measured", "rest"}."""
    cli.keep_memory()
    cli.one_step_at_a_time()
    recipe = runpy.run_path(str(ROOT / "configs" / "sentiment_lora.py"))["get_config"]()
    kind = memory.STEPS[name]
    config = memory.variant(config_lib.build(recipe), name, remat)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    origin = checkpoints.open_base(config.init_from)
    base = origin.params(config.model, lambda tree: jax.tree.map(lambda _: device, tree))
    if kind == "forward":
        step, held = memory.forward(config), (base,)
    else:
        step, begin = memory.training_step(config, kind)
        held = jax.jit(begin, donate_argnums=() if config.quant.scheme else 0)(base)
    del base, origin
    rows = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in memory.batch(config).items()}
    compiled = step.lower(*held, rows).compile()
    gc.collect()
    cli.trim_memory()
    before, arrays = resident("VmRSS"), sum(array.nbytes for array in jax.live_arrays())
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        out = jax.block_until_ready(compiled(*held, rows))
        held = held if kind == "forward" else (out[0], held[1])
    measured = resident("VmHWM") - before + arrays
    return {"planned": memory.of(compiled, 0).peak, "measured": measured, "rest": before - arrays}


def resident(field: str) -> int:
    """Bytes; VmRSS: now, VmHWM: at most since the mark was reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


if __name__ == "__main__":
    cli.run(main)
