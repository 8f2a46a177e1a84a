"""Compares runs in the terminal: `python -m llm_jax.compare RUN RUN ...`; a sweep stands for all its runs.

Runs that differ in the seed alone form a group. Prints the options that differ between groups, the held-out bits per
byte with 95 % intervals over the seeds, the differences to the first group paired by seed, speed, memory and samples.
"""

from llm_jax import cli
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.multi_string("run", [], "a run, a sweep, or a directory with runs; may be repeated, and given without --run=")
FLAGS.boolean("samples", True, "also print the last samples of each group")


def main(f: cli.Flags) -> None:
    from llm_jax.research import comparison, runs

    if not f.run:
        raise UserError("name at least one run or sweep: python -m llm_jax.compare RUN RUN ...")
    print(comparison.text(runs.load(f.run), f.samples))


COMMAND = cli.Command("compare", main, FLAGS, positional="run")

if __name__ == "__main__":
    cli.start(COMMAND)
