"""What a run would take, before it runs: `python -m llm_jax.plan --memory --config=configs/sentiment_lora.py`.

Compiles the step of the configuration and its relatives (forward, full, LoRA, LoRA-FA, QLoRA, each with and without
rematerialization) for one device of this machine, from shapes alone: nothing is loaded or computed.
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
    print(f"{batch[0]} x {batch[1]} tokens, {config.model.precision.params} weights; MiB")
    print(f"{'step':<12}{'remat':<8}{'arguments':>12}{'optimizer':>12}{'temporaries':>14}{'outputs':>10}{'peak':>10}")
    for name, kind in memory.STEPS.items():
        for remat in ("none",) if kind == "forward" else ("none", "full"):
            found = memory.compiled(memory.variant(config, name, remat), kind)
            parts = (found.arguments, found.optimizer, found.temporaries, found.outputs, found.peak)
            widths = (12, 12, 14, 10, 10)
            print(
                f"{name:<12}{remat:<8}" + "".join(f"{p / 2**20:>{w},.1f}" for p, w in zip(parts, widths, strict=True)),
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
