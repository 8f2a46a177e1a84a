"""Compares runs in the terminal: `python -m llm_jax.compare RUN RUN ...`. A sweep includes all of its runs.

Runs that differ only in the seed form a group. Prints the options that differ between groups, the held-out bits per
byte with 95 % intervals over the seeds, the differences from the first group paired by seed, speed, memory and samples.
With --tokens, two runs are also compared token by token on their held-out text.
"""

import os
import sys

from llm_jax import cli
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.multi_string("run", [], "a run, a sweep, or a directory with runs; may be repeated; --run= may be omitted")
FLAGS.boolean("samples", True, "also print the last samples of each group")
FLAGS.boolean("tokens", False, "also print the held-out tokens whose losses differ most between exactly two runs")
FLAGS.integer("token_rows", 64, "number of held-out rows of train.seq_len tokens that --tokens compares")
NEEDS: cli.Needs = ((("token_rows",), "--tokens is not given", lambda f: f.tokens),)


def main(f: cli.Flags) -> None:
    from llm_jax.research import comparison, runs

    if not f.run:
        raise UserError("name at least one run or sweep: python -m llm_jax.compare RUN RUN ...")
    loaded = runs.load(f.run)
    print(comparison.text(loaded, f.samples))
    if f.tokens:
        from llm_jax.research import held_out_tokens
        from llm_jax.training import losses

        differences = held_out_tokens.differences(loaded, f.token_rows, losses.token_losses)
        print(f"\n{differences.text(sys.stdout.isatty() and 'NO_COLOR' not in os.environ)}")


COMMAND = cli.Command("compare", main, FLAGS, needs=NEEDS, positional="run", compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
