"""What a run would take, before it runs: `python -m llm_jax.plan --memory --config=configs/sentiment_lora.py`.

Compiles the step as given and its relatives (forward, full, LoRA, LoRA-FA, QLoRA over NF4, each with and without
rematerialization) for one device of this machine, whatever the mesh, with the loss of language modelling, whatever
`loss.kind`; from shapes alone: nothing is loaded or computed. What the process itself takes (Python and the libraries,
300 to 630 MiB) comes on top, and 20 to 80 MiB that a step takes beside its arrays.
"""

from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError

cli.define_config()
flags.DEFINE_boolean("memory", False, "the bytes of the compiled step")


def main() -> None:
    from llm_jax.training import memory

    config = cli.load_config()
    if not flags.FLAGS.memory:
        raise UserError("give --memory: what a step takes")
    if not config.model.vocab_size:
        raise UserError("config key 'model.vocab_size' is 0, the tokenizer's; give --config.model.vocab_size=N")
    batch = (config.train.batch_size // config.train.grad_accumulation, config.train.seq_len)
    given = "adapters" if config.lora.rank else "full"
    rows = [("as given", config.model.remat, config, given)]
    for name, kind in memory.STEPS.items():
        for remat in ("none",) if kind == "forward" else ("none", "full"):
            rows.append((name, remat, memory.variant(config, name, remat), kind))
    for i, (name, remat, one, kind) in enumerate(rows):
        found = memory.compiled(one, kind)
        if not i:  # after what may be wrong with the configuration
            print(f"{batch[0]} x {batch[1]} tokens, {config.model.precision.params} weights, on one device; MiB")
            print(
                f"{'step':<12}{'remat':<8}{'arguments':>12}{'optimizer':>12}{'temporaries':>14}{'outputs':>10}{'peak':>10}"
            )
        parts = (found.arguments, found.optimizer, found.temporaries, found.outputs, found.peak)
        sizes = "".join(f"{p / 2**20:>{w},.1f}" for p, w in zip(parts, (12, 12, 14, 10, 10), strict=True))
        print(f"{name:<12}{remat:<8}{sizes}", flush=True)


if __name__ == "__main__":
    cli.run(main)
