"""Reports the memory, FLOPs and time of a training step without running it, for TPUs or for the local devices.

    python -m llm_jax.plan --config=llama2_7b --topology=v5e:16x16 --batch_per_device=4
    python -m llm_jax.plan --config=sentiment_lora --memory

--topology compiles the step for a slice of a TPU (`pip install 'llm_jax[plan]'`, one to five minutes) and prints, for
one device, memory, FLOPs, collectives, an estimated time and the largest arrays. --search ranks meshes,
rematerialization and batch sizes. --memory compiles the configured step for the devices of this machine and, for
comparison, the forward pass, full training, LoRA, LoRA-FA and QLoRA over NF4; the process itself needs 300 to 630 MiB
for Python and libraries and 20 to 80 MiB for other buffers in addition.

Without these flags, the command prints the number of parameters, the FLOPs of a step, and the memory of weights,
optimizer state and gradients, without compiling.

All results are computed from shapes: no weights are loaded and no step is executed.
"""

import dataclasses
import json
import math
import sys
from typing import Any

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.schema import Config

FLAGS = cli.Flags()
FLAGS.boolean("memory", False, "compile the step for the devices of this machine and print its memory")
FLAGS.string("topology", "", "compile for this TPU slice, such as v5e:16x16 or v5p:4x4x4; v5e:16x16*2: two slices")
FLAGS.integer("slices", 1, "number of slices of --topology, connected by the data-centre network", lower_bound=1)
FLAGS.integer("batch_per_device", 0, "batch rows per device of --topology, instead of train.batch_size", lower_bound=0)
FLAGS.boolean(
    "decode",
    False,
    "compile a decoding step: train.batch_size prompts of train.seq_len tokens, eval.max_new_tokens new tokens",
)
FLAGS.boolean("search", False, "try meshes, model.remat and batch sizes, and rank those that fit by time per token")
FLAGS.integer("limit", 12, "number of configurations that --search compiles", lower_bound=1)
FLAGS.number("minutes", 30.0, "time limit of --search; 0: none", lower_bound=0.0)
FLAGS.boolean("json", False, "print the report as one JSON object (with --search, a list of them)")
NEEDS = (
    (
        ("slices", "batch_per_device", "decode", "search", "limit", "minutes", "json"),
        "--topology is not given",
        lambda f: f.topology,
    ),
    (("decode",), "--search is given", lambda f: not f.search),
    (("limit", "minutes"), "--search is not given", lambda f: f.search),
)


def main(f: cli.Flags) -> None:
    from llm_jax import configuration
    from llm_jax.training import memory, start

    if f.memory and f.topology:
        raise UserError("--memory is for the devices of this machine, --topology for a TPU; use only one of them")
    config = start.find(f.config).config
    if not config.model.vocab_size:  # use the size of the tokenizer, which this command does not train
        size = config.tokenizer.vocab_size if config.tokenizer.kind != "byte" else 259
        config = configuration.replace(config, {"model.vocab_size": size or 512})
        if not f.json:
            print(
                f"model.vocab_size={config.model.vocab_size}: the vocabulary size in the tokenizer's configuration; "
                "the trained tokenizer may have fewer ids"
            )
    if f.topology:
        _for_topology(f, config)
    elif f.memory:
        _memory(config)
    else:
        print(memory.describe(memory.step_sizes(config), config))


def _for_topology(f: cli.Flags, config: Config) -> None:
    import jax

    from llm_jax import configuration
    from llm_jax.parallel import topologies
    from llm_jax.training import machine_choice, plan_search, planning

    topology = topologies.parse(f.topology, f.slices)
    jax.config.update("jax_platforms", "cpu")  # libtpu without a TPU would search for one
    config = dataclasses.replace(config, model=machine_choice.resolve(config.model, topology.platform, ())[0])
    if f.batch_per_device:
        rows = f.batch_per_device * topology.chips * topology.chip.devices
        config = configuration.replace(config, {"train.batch_size": rows})
    if not f.search:
        report = planning.plan(config, topology, f.decode)
        print(json.dumps(report) if f.json else plan_search.describe(report))
        return
    reports: list[planning.Report] = []
    try:
        seconds = f.minutes * 60 or math.inf
        for report in plan_search.search(config, topology, f.limit, lambda line: _log(f, line), seconds):
            reports.append(report)
    finally:  # an interrupted search prints the reports that it has
        if reports:
            reports.sort(key=plan_search.per_token)
            print(json.dumps(reports) if f.json else plan_search.ranking(reports), flush=True)


def _log(f: cli.Flags, line: str) -> None:
    print(line, flush=True, file=sys.stderr if f.json else sys.stdout)


def _memory(config: Config) -> None:
    from llm_jax.training import memory

    rows = [("as given", config.model.remat, config)]
    for kind in memory.KINDS:
        for remat in ("none",) if kind == "forward" else ("none", "full"):
            rows.append((kind, remat, memory.with_remat(config, remat)))
    for i, (kind, remat, variant) in enumerate(rows):
        try:
            used: Any = memory.of_variant(variant, kind)
        except UserError as error:
            if not i:
                raise
            print(f"{kind:<12}{remat:<8}  {error}")  # for example, a group of NF4 does not divide a dimension
            continue
        if not i:  # print the heading only if the configuration is valid
            batch = f"{config.train.batch_size} x {config.train.seq_len} tokens"
            print(f"{batch}, {config.model.precision.params} weights, on one device; MiB")
            print(
                f"{'step':<12}{'remat':<8}{'arguments':>12}{'optimizer':>12}{'temporaries':>14}{'outputs':>10}{'peak':>10}"
            )
        parts = (used.arguments, used.optimizer, used.temporaries, used.outputs, used.peak)
        sizes = "".join(f"{p / 2**20:>{w},.1f}" for p, w in zip(parts, (12, 12, 14, 10, 10), strict=True))
        print(f"{kind:<12}{remat:<8}{sizes}", flush=True)


COMMAND = cli.Command("plan", main, FLAGS, needs=NEEDS, config=Config, compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
