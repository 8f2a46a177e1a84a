"""Benchmarks: llm_jax beside the other software that is installed, in one run on the same cores.

    python -m experiments.benchmarks --suite=quick                    about two minutes
    python -m experiments.benchmarks --suite=cpu                      about ten minutes
    python -m experiments.benchmarks --suite=parts [--only=NAME,...]  optimizers, position schemes, word2vec, data

Sides take turns, so that a machine whose speed drifts slows all of them alike, and ratios are those of one round. A
machine is called quiet only if other work took at most 5 % of the cores in every round. Results go to SUITE.json, in
which measures that are not run again stay. README.md, cpu.png and docs/speed.md are rendered from the results.
"""

import dataclasses
import os
import pathlib
import sys
import time

from absl import flags

from experiments.benchmarks import models, rendering, runner, suites
from llm_jax import cli, files
from llm_jax.errors import UserError

HERE = pathlib.Path(__file__).parent
SPEED = runner.ROOT / "docs" / "speed.md"
SHOWN = ("cpu", "avx2", "gpu", "parts", "earlier")  # results with a section in README.md

flags.DEFINE_enum("suite", "quick", ["quick", "cpu", "parts"], "which measures")
flags.DEFINE_list("only", [], "names of the suite's measures to run; default: all")
flags.DEFINE_integer("rounds", 0, "rounds of every measure; default: by the measure", lower_bound=0)
flags.DEFINE_integer("cores", 0, "number of cores that everything runs on; default: all", lower_bound=0)
flags.DEFINE_string("peer_python", sys.executable, "interpreter that has torch, transformers, peft, llama_cpp, gensim")
flags.DEFINE_string("output", "", "JSON file of the results; default: SUITE.json beside this module")
flags.DEFINE_bool("render", False, "write tables and chart from the results there are, and measure nothing")
flags.DEFINE_bool("require_quiet", False, "stop after the first measure in which the machine was busy")


def main() -> None:
    f = flags.FLAGS
    output = pathlib.Path(f.output or HERE / f"{f.suite}.json")
    if not f.render:
        if f.cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: f.cores])  # processes of sides inherit it
        measure(select(suites.suite(f.suite), f.only), output)
    if not f.output:
        render(HERE / "README.md", SPEED, HERE / "cpu.png")


def select(measures: list[runner.Measure], names: list[str]) -> list[runner.Measure]:
    """The measures of these names, or all. Raises: UserError."""
    known = [measure.name for measure in measures]
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--only={unknown[0]}; expected some of {', '.join(known)}")
    return [measure for measure in measures if not names or measure.name in names]


def measure(measures: list[runner.Measure], output: pathlib.Path) -> None:
    """Runs measures, and writes the results after each."""
    f = flags.FLAGS
    begin = time.monotonic()
    for item in measures:
        print(f"{item.name}: {item.title}", flush=True)
        if f.rounds:
            item = dataclasses.replace(item, rounds=f.rounds)
        record = runner.run(with_paths(item), f.peer_python, lambda line: print(line, flush=True))
        files.write_json(output, (files.read_json(output) if output.exists() else {}) | {item.name: record})
        spent = time.monotonic() - begin
        print(f"\n{rendering.markdown(record)}\n\n{spent:.0f} s so far; wrote {output}\n", flush=True)
        if f.require_quiet and not record["quiet"]:
            raise UserError(f"{item.name}: other work took more than {runner.QUIET:.0%} of the cores (--require_quiet)")


def with_paths(item: runner.Measure) -> runner.Measure:
    """The measure with the paths of the converted models in the options of its sides."""

    def resolve(value: object) -> object:
        if isinstance(value, str) and value.startswith(suites.MODEL_PATH):
            return models.path(value.removeprefix(suites.MODEL_PATH))
        return value

    sides = [dataclasses.replace(side, options={k: resolve(v) for k, v in side.options.items()}) for side in item.sides]
    return dataclasses.replace(item, sides=tuple(sides))


def render(readme: pathlib.Path, speed: pathlib.Path, chart: pathlib.Path) -> None:
    """Writes the tables of all results into two pages, and the bar chart of the suite "cpu"."""
    results = {name: files.read_json(path) for name in SHOWN if (path := HERE / f"{name}.json").exists()}
    for name, records in results.items():
        rendering.replace_section(readme, name, "\n\n".join(map(rendering.markdown, records.values())))
    rendering.replace_section(speed, "benchmarks", rendering.highlights(results.get("cpu") or results["earlier"]))
    if "cpu" in results:
        rendering.chart(results["cpu"], chart)


if __name__ == "__main__":
    cli.run_script(main)
