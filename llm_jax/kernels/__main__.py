"""Reports which kernels multiply quantized weights on this machine: `python -m llm_jax.kernels`.

Prints every choice with its reason, compares the kernels with the plain XLA products, and measures both: gigabytes of
weights per second and GFLOP per second of one product of a large weight, for one row of activations and for several.
"""

from llm_jax import cli

FLAGS = cli.Flags()
FLAGS.integer("rows", 4, "rows of activations of the second measurement", lower_bound=1)
FLAGS.integer("inputs", 2048, "inputs of the measured weight", lower_bound=64)
FLAGS.integer("outputs", 8192, "outputs of the measured weight", lower_bound=64)


def main(f: cli.Flags) -> int:
    from llm_jax.kernels import machine_report

    return machine_report.run(f.rows, f.inputs, f.outputs)


COMMAND = cli.Command("kernels", main, FLAGS)

if __name__ == "__main__":
    cli.start(COMMAND)
