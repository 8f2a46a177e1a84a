"""Does the best learning rate of a narrow model stay the best when it grows wider, with and without μP? W1.

Trains every width at every rate from every seed, twice: with model.base_width (μP) and without. Seeds pair by
initialization and batches. The rate of a seed is measured against the one that is best by the mean of the *other*
seeds: the least of several noisy means would count its own luck as a loss.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import decoders
from llm_jax import cli, configuration
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.intervals import Interval, paired
from llm_jax.research import experiments, findings
from llm_jax.research.findings import Finding
from llm_jax.training.setup import Setup, setup

SETTING: dict[str, Any] = {  # overrides of the recipe "default": two layers on bytes of the standard library
    "tokenizer.kind": "byte",
    "data.validation_fraction": 0.02,
    "model.num_layers": 2,
    "model.head_dim": 8,  # of every width: wider models have more heads
    "optim.warmup_steps": 20,
    "train.steps": 300,
    "train.batch_size": 16,
    "train.seq_len": 64,
}
MARGIN = 0.05  # nats per token
KINDS = ("μP", "as it is")

flags.DEFINE_list("widths", ["32", "128", "256"], "widths of the models; the first is the base width")
flags.DEFINE_list("powers", ["-9", "-8", "-7", "-6", "-5", "-4", "-3", "-2"], "learning rates, as powers of two")
flags.DEFINE_integer("seeds", 5, "models of each kind")
flags.DEFINE_integer("held_rows", 256, "rows of held-out text")

Lost = Mapping[str, Mapping[int, Interval]]  # the loss given up, by parametrization and width


def main() -> None:
    f = flags.FLAGS
    widths, powers = list(map(int, f.widths)), list(map(int, f.powers))
    base = configuration.load("default", SETTING)
    source, c = Source(base.data), base.train
    tokenizer = source.tokenizer(base.tokenizer)
    corpus = source.corpus(tokenizer)
    held_rows = Rows(corpus.validation, c.seq_len)
    held = decoders.stack(held_rows[i] for i in range(f.held_rows))

    def name(kind: str, width: int, power: int) -> str:
        # At the base width nothing is scaled, and both kinds are one run.
        return f"{KINDS[0] if width == widths[0] else kind} {width} {power}"

    conditions = {
        name(kind, width, power): sizes(width, widths[0] if kind == KINDS[0] else 0) | {"optim.lr": 2.0**power}
        for kind, width, power in itertools.product(reversed(KINDS), widths, powers)
    }

    @functools.cache
    def parts(condition: str) -> Setup:
        return setup(configuration.replace(base, conditions[condition]), tokenizer.vocab_size)

    @functools.cache
    def batches(seed: int) -> dict[str, np.ndarray]:
        rows = Shuffled(Rows(corpus.train, c.seq_len), seed)
        arrays = decoders.stack(rows[i] for i in range(c.steps * c.batch_size))
        return {name: array.reshape(c.steps, c.batch_size, -1) for name, array in arrays.items()}

    def measure(condition: str, seed: int) -> float | None:
        loss = held_out_loss(parts(condition), seed, batches(seed), held)
        return loss if math.isfinite(loss) else None  # diverged

    def losses(kind: str, width: int) -> np.ndarray:
        """Losses (powers, seeds); a diverged run has the loss of the uniform distribution."""
        rows = [figures[name(kind, width, power)] for power in powers]
        return np.array([[math.log(256) if loss is None else loss for loss in row] for row in rows])

    root = experiments.directory(f.runs, widths[0], f.held_rows)
    figures, origins = experiments.measure(root, conditions, f.seeds, measure)
    table = {kind: {width: losses(kind, width) for width in widths} for kind in KINDS}
    lost = {kind: losses_given_up(of_kind, widths[0]) for kind, of_kind in table.items()}
    result = judge(lost, f.seeds)
    lines = tables(table, lost, powers, result.verdict)
    print(experiments.publish(__file__, [result], lines, origins=origins, verdicts=False))


def sizes(width: int, base_width: int) -> dict[str, Any]:
    """Overrides of a model of this width; `base_width`: that of μP, or 0 without μP."""
    heads = width // SETTING["model.head_dim"]
    changes = {"width": width, "mlp_dim": 2 * width, "num_heads": heads, "num_kv_heads": heads}
    return {f"model.{name}": value for name, value in (changes | {"base_width": base_width}).items()}


def held_out_loss(parts: Setup, seed: int, batches: Any, held: Any) -> float:
    """The held-out loss after training from the initial weights of `seed`, nats per token.

    Args:
      batches: int32 (steps, B, T) each. held: int32 (rows, T) each.
    """
    params = jax.jit(parts.model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    state, _ = parts.scan(parts.init(params), batches)
    total, count = parts.loss(state.params, {}, held)
    return float(total / count)


def tables(table: Mapping[str, Mapping[int, np.ndarray]], lost: Lost, powers: list[int], verdict: Any) -> list[str]:
    """Markdown."""
    title = "Held-out loss in nats per byte, mean ± standard deviation over the seeds; the best rate of a row is bold:"
    lines = ["", title]
    for kind, by_width in table.items():
        rows = []
        for width, losses in by_width.items():
            cells = [findings.deviation_text(row) for row in losses]
            best = int(np.argmin(losses.mean(1)))
            cells[best] = f"**{cells[best]}**"
            rows.append([width, *cells, "{:.3f} [{:.3f}, {:.3f}]".format(*lost[kind][width])])
        lines += ["", *findings.markdown_table([f"{kind}: width", *(f"2^{p}" for p in powers), "given up"], rows)]
    with_transfer, without = (transfers(lost[kind]) for kind in KINDS)
    return [*lines, "", f"Transfers with μP: {with_transfer}; without: {without}. Verdict: **{verdict}**.", ""]


def losses_given_up(losses: Mapping[int, np.ndarray], base_width: int) -> dict[int, Interval]:
    """By width, the loss of the rate that is best at the base width minus that of the rate that other seeds find best.

    Args:
      losses: (rates, seeds) by width.
    """
    chosen = int(np.argmin(losses[base_width].mean(1)))
    given_up = {}
    for width, of_width in losses.items():
        best = [int(np.argmin(np.delete(of_width, seed, 1).mean(1))) for seed in range(of_width.shape[1])]
        given_up[width] = paired(of_width[chosen], of_width[best, range(len(best))])
    return given_up


def transfers(lost: Mapping[int, Interval]) -> str:
    """Whether the rate transfers under a parametrization: "yes", "no" or "undecided"."""
    if all(interval.high < MARGIN for interval in lost.values()):
        return "yes"
    return "no" if lost[max(lost)].low > MARGIN else "undecided"


def judge(lost: Lost, seeds: int) -> Finding:
    """The verdict by the rule of statements.toml."""
    with_transfer, without = (transfers(lost[kind]) for kind in KINDS)
    fails = with_transfer == "no" or without == "yes"
    verdict = "holds" if (with_transfer, without) == ("yes", "no") else "fails" if fails else "undecided"
    value = {f"{kind}, width {width}": interval for kind, of in lost.items() for width, interval in of.items()}
    return findings.finding("W1", "loss given up, nats per byte", value, verdict, n=seeds)


if __name__ == "__main__":
    quick = {"seeds": 2, "widths": ["32", "64"], "powers": ["-8", "-6"], "held_rows": 8}
    cli.run_script(experiments.script(main, quick))
