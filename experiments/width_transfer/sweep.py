"""Does the best learning rate of a narrow model stay the best when it grows wider, with and without μP?

    PYTHONPATH=. python experiments/width_transfer/sweep.py [--widths=32,128,256] [--seeds=5]

Trains every width at every rate from every seed, twice: with model.base_width (μP) and without. What is
done is kept in --runs and not done again: the same command goes on where it was stopped. Writes
results.json and the tables in README.md. The rules below were fixed before the run.

The *loss given up* at a width is the held-out loss of the rate that is best at the base width (by the
mean over the seeds) minus that of the width's own best rate, in nats a token; a run that diverges counts
as the loss of knowing nothing, log 256. Seeds pair by initialization and batches. Of each seed it is
measured against the rate that is best by the mean of the *other* seeds: the least of several noisy means
would count its own luck as a loss. It is judged by the 95 % t-interval of its mean over the seeds.

The rate *transfers* under a parametrization if the interval lies below MARGIN at every width, and
*does not* if the interval at the widest lies above MARGIN. W1 (width transfer by table 8 of
arXiv:2203.03466 makes the best rate hold across widths, which it does not by itself) holds if the rate
transfers with it and does not without; fails if it does not transfer with it, or transfers without;
else it is undecided.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llm_jax import cli, configuration
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.intervals import Interval, mean
from llm_jax.research import experiments, findings
from llm_jax.research.findings import Finding
from llm_jax.training.setup import Setup, setup

HERE = pathlib.Path(__file__).parent
MARGIN = 0.05  # nats a token
KINDS = ("μP", "as it is")

flags.DEFINE_list("widths", ["32", "128", "256"], "the first is the base width")
flags.DEFINE_list("powers", ["-9", "-8", "-7", "-6", "-5", "-4", "-3", "-2"], "the rates, as powers of two")
flags.DEFINE_integer("seeds", 5, "runs of each kind")
flags.DEFINE_integer("held_rows", 256, "rows of held-out text that a run is judged by")
flags.DEFINE_string("runs", "runs/width_transfer", "where finished runs are kept")


def main() -> None:
    f = flags.FLAGS
    widths, powers = [int(w) for w in f.widths], [int(p) for p in f.powers]
    base = configuration.load(HERE / "config.py")
    source = Source(base.data)
    tokenizer = source.tokenizer(base.tokenizer)
    corpus = source.corpus(tokenizer)
    c = base.train
    held = stacked(Rows(corpus.validation, c.seq_len), f.held_rows)

    @functools.cache
    def batches(seed: int) -> dict[str, np.ndarray]:
        rows = stacked(Shuffled(Rows(corpus.train, c.seq_len), seed), c.steps * c.batch_size)
        return jax.tree.map(lambda a: a.reshape(c.steps, c.batch_size, -1), rows)

    @functools.cache
    def parts(kind: str, width: int, power: int) -> Setup:
        heads = width // base.model.head_dim
        model = dataclasses.replace(
            base.model, vocab_size=tokenizer.vocab_size, width=width, mlp_dim=2 * width, num_heads=heads,
            num_kv_heads=heads, base_width=widths[0] if kind == KINDS[0] else 0,
        )  # fmt: skip
        return setup(dataclasses.replace(base, model=model, optim=dataclasses.replace(base.optim, lr=2.0**power)))

    def measure(name: str, seed: int) -> float | None:
        loss = held_out_loss(parts(*runs[name]), seed, batches(seed), held)
        return loss if math.isfinite(loss) else None  # diverged

    def name(kind: str, width: int, power: int) -> str:
        # At the base width nothing is scaled, and both kinds are one run.
        return f"{KINDS[0] if width == widths[0] else kind} {width} {power}"

    def losses(kind: str, width: int) -> np.ndarray:
        """(powers, seeds); a run that has diverged has the loss of knowing nothing."""
        rows = [figures[name(kind, width, power)] for power in powers]
        return np.array([[math.log(256) if loss is None else loss for loss in row] for row in rows])

    runs: dict[str, tuple[str, int, int]] = {}
    for run in itertools.product(KINDS, widths, powers):
        runs.setdefault(name(*run), run)
    root = experiments.directory(f.runs, widths[0], f.held_rows)
    figures, origins = experiments.measure(root, runs, f.seeds, measure)
    table = {kind: {width: losses(kind, width) for width in widths} for kind in KINDS}
    lost = {kind: losses_given_up(of_kind, widths[0]) for kind, of_kind in table.items()}
    result = judge(lost, f.seeds)
    lines = tables(table, lost, powers, result)
    print(experiments.publish(__file__, [result], lines, origins=origins, verdicts=False))


def stacked(rows, count: int):
    """The first rows, as arrays (count, T)."""
    made = [rows[i] for i in range(count)]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def held_out_loss(parts: Setup, seed: int, batches, held) -> float:
    """The held-out loss after training from the initial weights of `seed`, nats a token.

    Args:
      batches: int32 (steps, B, T) each. held: int32 (rows, T) each.
    """
    init = jax.jit(parts.model.init)
    params = init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    state, _ = parts.scan(parts.init(params), batches)
    total, count = parts.loss(state.params, {}, held)
    return float(total / count)


def tables(
    table: Mapping[str, Mapping[int, np.ndarray]],
    lost: Mapping[str, Mapping[int, Interval]],
    powers: list[int],
    result: Finding,
) -> list[str]:
    """Markdown."""
    lines = [
        "",
        "Held-out loss in nats a byte, mean ± standard deviation over the seeds; the best rate of a row is bold:",
    ]
    for kind, by_width in table.items():
        rows = []
        for width, losses in by_width.items():
            cells = [findings.deviation_text(row) for row in losses]
            best = int(np.argmin(losses.mean(1)))
            cells[best] = f"**{cells[best]}**"
            rows.append([width, *cells, "{:.3f} [{:.3f}, {:.3f}]".format(*lost[kind][width])])
        lines += ["", *findings.markdown_table([f"{kind}: width", *(f"2^{p}" for p in powers), "given up"], rows)]
    with_transfer, without = (transfers(lost[kind]) for kind in KINDS)
    verdict = f"Transfers with μP: {with_transfer}; without: {without}. Verdict: **{result.verdict}**."
    return [*lines, "", verdict, ""]


def given_up(losses: np.ndarray, chosen: int) -> np.ndarray:
    """(rates, seeds) -> (seeds,): the loss of a rate minus that of the one that the other seeds find best."""
    seeds = range(losses.shape[1])
    best = [int(np.argmin(np.delete(losses, seed, 1).mean(1))) for seed in seeds]
    return np.array([losses[chosen, seed] - losses[best[seed], seed] for seed in seeds])


def losses_given_up(losses: Mapping[int, np.ndarray], base_width: int) -> dict[int, Interval]:
    """By width, the loss given up by the rate that is best at the base width; losses are (rates, seeds) by width."""
    chosen = int(np.argmin(losses[base_width].mean(1)))
    return {width: mean(given_up(of_width, chosen)) for width, of_width in losses.items()}


def transfers(lost: Mapping[int, Interval]) -> str:
    """Whether the rate transfers under a parametrization: "yes", "no" or "undecided"."""
    if all(interval.high < MARGIN for interval in lost.values()):
        return "yes"
    return "no" if lost[max(lost)].low > MARGIN else "undecided"


def judge(lost: Mapping[str, Mapping[int, Interval]], seeds: int) -> Finding:
    """The verdict by the rule above; `lost` has the losses given up by parametrization and width."""
    with_transfer, without = (transfers(lost[kind]) for kind in KINDS)
    fails = with_transfer == "no" or without == "yes"
    verdict = "holds" if (with_transfer, without) == ("yes", "no") else "fails" if fails else "undecided"
    value = {f"{kind}, width {width}": interval for kind, of in lost.items() for width, interval in of.items()}
    return findings.finding("W1", "loss given up, nats a byte", value, verdict, n=seeds)


if __name__ == "__main__":
    cli.run_script(
        experiments.script(main, {"seeds": 2, "widths": ["32", "64"], "powers": ["-8", "-6"], "held_rows": 8})
    )
