"""Reports what a training step takes before it runs: `python -m llm_jax.plan --config=llama_7b [--memory]`.

Prints the number of parameters, the FLOPs of a step, and the memory of weights, optimizer state and gradients, from
shapes alone. --memory compiles the configured step, and for comparison the forward pass, full training, LoRA, LoRA-FA
and QLoRA over NF4, each with and without rematerialization, for the devices of this machine. No weights are loaded and
nothing is computed. The process itself (Python and libraries, 300 to 630 MiB) and 20 to 80 MiB of other buffers come on
top of the figures.
"""

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.schema import Config

FLAGS = cli.Flags()
FLAGS.boolean("memory", False, "compile the step, which takes seconds to minutes, and print its memory")


def main(f: cli.Flags) -> None:
    from llm_jax import configuration
    from llm_jax.training import memory, start

    config = start.find(f.config).config
    if not config.model.vocab_size:  # that of the tokenizer, which is not trained here
        size = config.tokenizer.vocab_size if config.tokenizer.kind != "byte" else 259
        config = configuration.replace(config, {"model.vocab_size": size or 512})
        print(f"model.vocab_size={config.model.vocab_size}: the number of ids of the tokenizer, which may be smaller")
    if not f.memory:
        print(memory.describe(memory.step_sizes(config), config))
        return
    rows = [("as given", config.model.remat, config)]
    for kind in memory.KINDS:
        for remat in ("none",) if kind == "forward" else ("none", "full"):
            rows.append((kind, remat, memory.with_remat(config, remat)))
    for i, (kind, remat, variant) in enumerate(rows):
        try:
            figures = memory.compiled(variant, kind)
        except UserError as error:
            if not i:
                raise
            print(f"{kind:<12}{remat:<8}  {error}")  # such as groups of NF4 that do not divide this geometry
            continue
        if not i:  # after what may be wrong with the configuration
            batch = f"{config.train.batch_size} x {config.train.seq_len} tokens"
            print(f"{batch}, {config.model.precision.params} weights, on one device; MiB")
            print(
                f"{'step':<12}{'remat':<8}{'arguments':>12}{'optimizer':>12}{'temporaries':>14}{'outputs':>10}{'peak':>10}"
            )
        parts = (figures.arguments, figures.optimizer, figures.temporaries, figures.outputs, figures.peak)
        sizes = "".join(f"{p / 2**20:>{w},.1f}" for p, w in zip(parts, (12, 12, 14, 10, 10), strict=True))
        print(f"{kind:<12}{remat:<8}{sizes}", flush=True)


COMMAND = cli.Command("plan", main, FLAGS, config=Config, compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
