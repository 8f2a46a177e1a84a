"""A LoRA step of a real model (SmolLM2-135M) beside peft and transformers, in one run on the same cores.

    PYTHONPATH=. python experiments/benchmarks/finetune.py --peer_python=.venv-peers/bin/python [--rounds=5] [--cores=1]

Every side is a process of its own (finetune_child.py): the same weights, batch, rank and targets (all linear layers),
float32, AdamW. They take turns, round by round, so that a machine whose speed drifts slows all of them alike. The
losses of the first step must agree, or the two do not compute the same thing. Memory is the resident peak of the
whole process (imports and loading too, which are given beside it). Where other work shares the cores, times on the
clock say little: figures "by CPU time" count the processor's own seconds, and --cores=1 keeps them free of threads
that wait for each other. Writes finetune.json, under the number of cores.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
MODEL = "asset:smollm2-135m-instruct"
# name -> (who, what its child is told besides: model.remat and train.loss_chunk)
SIDES = {
    "llm_jax": ("llm_jax", "none", "0"),
    "llm_jax, remat=dots, loss_chunk=64": ("llm_jax", "dots", "64"),
    "peft": ("peft",),
}
WARM_UP = 2  # steps: they compile, and touch what memory they take
SAME_LOSS = 1e-4  # relative

flags.DEFINE_string("peer_python", None, "an interpreter with torch, transformers and peft", required=True)
flags.DEFINE_string("model", "", "the model as a Hugging Face directory; empty: converted for this run only")
flags.DEFINE_integer("cores", 0, "cores that all run on; 0: as many as there are")
flags.DEFINE_integer("rounds", 5, "turns that are counted")
flags.DEFINE_integer("steps", 2, "steps of a turn")
flags.DEFINE_integer("rows", 4, "of the batch")
flags.DEFINE_integer("length", 256, "tokens of a row")
flags.DEFINE_integer("rank", 8, "of the adapters")


@dataclasses.dataclass
class Side:
    """A running child, and what it has said: bytes after imports and after loading, and by turn."""

    process: Any
    name: str
    imports: int
    loaded: int
    turns: list[tuple[float, float, float, float]] = dataclasses.field(default_factory=list)

    def turn(self, steps: int) -> None:
        print(steps, file=self.process.stdin, flush=True)
        seconds, worked, peak, loss = map(float, self.process.stdout.readline().split())
        self.turns.append((seconds, worked, peak, loss))


def main() -> None:
    f = flags.FLAGS
    if f.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: f.cores])  # children inherit it
    with tempfile.TemporaryDirectory() as directory:
        model = pathlib.Path(f.model or directory)
        if not f.model:
            command = [
                sys.executable,
                "-m",
                "llm_jax.convert",
                f"--input={MODEL}",
                f"--output={model / 'hf'}",
                "--to=hf",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            model = model / "hf"
        sides = {name: begin(model, *told) for name, told in SIDES.items()}
        for side in sides.values():
            for _ in range(WARM_UP):
                side.turn(1)
        first = {name: side.turns[0][3] for name, side in sides.items()}
        if max(first.values()) - min(first.values()) > SAME_LOSS * first["peft"]:
            raise UserError(f"the losses of the first step differ: {first}; they do not compute the same")
        for turn in range(f.rounds):
            for side in sides.values():
                side.turn(f.steps)
            print(f"turn {turn + 1} of {f.rounds}", flush=True)
            report(sides, first)


def begin(model: pathlib.Path, who: str, *own: str) -> Side:
    f = flags.FLAGS
    python = f.peer_python if who == "peft" else sys.executable
    numbers = [str(n) for n in (f.rows, f.length, f.rank)]
    process = subprocess.Popen(
        [python, str(HERE / "finetune_child.py"), who, str(model), *numbers, *own],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    said = process.stdout.readline().strip().split(" ", 3)
    if said[0] != "ready":
        raise UserError(f"{python} cannot run {who}; expected an interpreter that has it")
    return Side(process, said[3], int(said[1]), int(said[2]))


def report(sides: dict[str, Side], first: dict[str, float]) -> None:
    """Prints and writes what there is so far."""
    f = flags.FLAGS
    tokens = f.rows * f.length * f.steps
    rates = {n: [[tokens / t[i] for t in s.turns[WARM_UP:]] for i in range(2)] for n, s in sides.items()}
    table: dict[str, Any] = {}
    for name, side in sides.items():
        row: dict[str, Any] = {"who": side.name, "first loss": first[name]}
        for i, kind in enumerate(("tokens/s", "tokens/s of CPU time")):
            ratios = [a / b for a, b in zip(rates[name][i], rates["peft"][i], strict=True)]
            row[kind] = {"median": statistics.median(rates[name][i]), "values": rates[name][i]}
            row[kind] |= {"x peft": statistics.median(ratios), "x peft by turn": ratios}
        peaks = {n: s.turns[-1][2] for n, s in sides.items()}
        row["bytes"] = {"imports": side.imports, "loaded": side.loaded, "peak": peaks[name]}
        row["peak x peft"] = peaks[name] / peaks["peft"]
        table[name] = row
        print(
            f"{name:<36} {row['tokens/s']['median']:8.1f} tokens/s ({row['tokens/s']['x peft']:.2f} of peft), "
            f"{row['tokens/s of CPU time']['median']:8.1f} of CPU time ({row['tokens/s of CPU time']['x peft']:.2f}), "
            f"peak {peaks[name] / 2**20:,.0f} MiB ({row['peak x peft']:.2f}; imports {side.imports / 2**20:,.0f}, "
            f"loaded {side.loaded / 2**20:,.0f})",
            flush=True,
        )
    path, cores = HERE / "finetune.json", str(len(os.sched_getaffinity(0)))
    kept = json.loads(path.read_text()) if path.exists() else {}
    sizes = {"rows": f.rows, "length": f.length, "rank": f.rank}
    path.write_text(json.dumps(kept | {cores: sizes | {"table": table}}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run_script(main)
