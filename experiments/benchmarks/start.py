"""Time from the start of `generate` to its first token, with an empty compilation cache and with a filled one.

    PYTHONPATH=. python experiments/benchmarks/start.py [--checkpoint=asset:smollm2-135m-instruct] [--rounds=5]

Every start is a new process that generates one token. "First" starts have an empty cache of compiled functions of
their own, "cached" starts share one that a first start has filled; they take turns. The clock stops when the text
arrives, so that it leaves out the end of the process, which the processor seconds (of all threads) include. The
table is written to start.json.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from absl import flags

from llm_jax import cli

HERE = pathlib.Path(__file__).parent
flags.DEFINE_string("checkpoint", "asset:smollm2-135m-instruct", "checkpoint to start with")
flags.DEFINE_integer("rounds", 5, "turns that are counted")


def start(checkpoint: str, cache: str) -> dict[str, float]:
    """{"clock": seconds until the first token, "processor": user and system seconds of the process}."""
    command = [sys.executable, "-m", "llm_jax.generate", f"--checkpoint={checkpoint}", "--max_new_tokens=1"]
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--prompt=The capital of France is"], stdout=subprocess.PIPE, env=os.environ | settings
    )
    assert process.stdout is not None
    text = process.stdout.read(1)
    seconds = time.perf_counter() - begin
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert text and not process.returncode
    return {"clock": seconds, "processor": usage.ru_utime + usage.ru_stime}


def main() -> None:
    f = flags.FLAGS
    starts: dict[str, list[dict[str, float]]] = {"first": [], "cached": []}
    with tempfile.TemporaryDirectory() as directory:
        start(f.checkpoint, f"{directory}/shared")  # reads the files of the checkpoint into memory, too
        for i in range(f.rounds):
            starts["first"].append(start(f.checkpoint, f"{directory}/{i}"))
            starts["cached"].append(start(f.checkpoint, f"{directory}/shared"))
            print(f"turn {i + 1}: " + ", ".join(f"{name} {turns[-1]}" for name, turns in starts.items()), flush=True)
    medians = {
        name: {unit: round(statistics.median(turn[unit] for turn in turns), 2) for unit in turns[0]}
        for name, turns in starts.items()
    }
    result = {"checkpoint": f.checkpoint, "rounds": f.rounds, "jax": jax.__version__, "seconds": medians}
    (HERE / "start.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run_script(main)
