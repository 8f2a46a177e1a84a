"""The table of the nucleus paper on a real model and a held-out human text: D2, D4, D5.

    PYTHONPATH=. python experiments/decoding_quality/run.py [--prompts=16] [--new_tokens=48] [--batch_size=16]

Every method of `METHODS` continues the same prompts. What is done is kept under --runs and not done again.
Writes results.json, the table of README.md and sizes.png. The rules below were fixed before the run.

Intervals are 95 %, by bootstrap over the texts (over the texts' means where a figure has a value a token).

D2  "greedy is repetitive": holds if greedy's share of texts that end in a loop lies above both that of the human
    text and that of sampling, intervals apart. "Locally optimal": holds if the beam of 4 finds texts of the same
    length that are likelier, by the interval of the paired difference of their log-probabilities, and in more than
    half of the prompts. The claim holds if both do.
D4  holds if at least a tenth of the tokens' distributions have more than 5 % of their mass outside the 40 likeliest
    (what the nucleus of .95 would still draw from), and top-k 40 with temperature 0.7 keeps less than half of the
    model's entropy, its interval below; "holds when" names which of the two.
D5  holds if the nucleus has mass .95 or more at every token, its size's 10 % and 90 % quantiles differ by a factor
    of 10 or more, and its texts' perplexity is nearer to the human text's (in logarithms) than those of greedy and
    of the beam.
"""

import functools
import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.decoding_quality import metrics
from llm_jax import checkpoints, cli
from llm_jax.data import assets
from llm_jax.decoding import loop, score
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.intervals import Interval, bootstrap
from llm_jax.research import experiments, findings, pictures, verdicts
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent

flags.DEFINE_string("checkpoint", "asset:smollm2-135m-instruct", "the model")
flags.DEFINE_string("text", "", "human text, a file; by default sentences of editorials (asset:nyt)")
flags.DEFINE_integer("prompts", 16, "texts continued", lower_bound=2)
flags.DEFINE_integer("prompt_tokens", 32, "of each", lower_bound=2)
flags.DEFINE_integer("new_tokens", 48, "of each", lower_bound=2)
flags.DEFINE_integer("batch_size", 16, "texts at a time", lower_bound=2)
flags.DEFINE_string("runs", "runs/decoding_quality", "where what is done is kept")

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "beam 4": {"beams": 4},
    "sampling": {},
    "temperature 0.7": {"temperature": 0.7},
    "top-k 40": {"top_k": 40},
    "top-k 40, temperature 0.7": {"top_k": 40, "temperature": 0.7},
    "top-k 640": {"top_k": 640},
    "nucleus 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "typical 0.95": {"typical_p": 0.95},
    "eta 0.0006": {"eta": 0.0006},
}


def main() -> None:
    f = flags.FLAGS
    digest = hashlib.sha256(f"{f.checkpoint} {f.text}".encode()).hexdigest()[:8]
    root = experiments.directory(f.runs, digest, f.prompts, f.prompt_tokens, f.new_tokens, f.batch_size)
    model, params, tokenizer = checkpoints.load(f.checkpoint)
    prompts, human = texts(tokenizer, f.prompts, f.prompt_tokens, f.new_tokens)
    computations: dict[str, Callable[[], Any]] = {"human": lambda: of_human(model, params, prompts, human)}
    for name, options in METHODS.items():
        computations[name] = functools.partial(continued, model, params, tokenizer, prompts, options)
    computations["steps"] = lambda: of_steps(model, params, prompts, human)
    origins: list[Provenance] = []
    continuations = experiments.measure_all(root, computations, origins)
    steps = {name: np.asarray(values) for name, values in continuations.pop("steps").items()}
    figures = {name: of_method(texts) for name, texts in continuations.items()}
    draw(steps, experiments.output(__file__) / "sizes.png")
    results = judge(continuations, figures, steps)
    command = experiments.command(__file__, {"checkpoint": "RUN", "text": "FILE"})
    print(experiments.publish(__file__, results, tables(figures), origins=origins, measured_by=command))


def texts(tokenizer, count: int, head: int, tail: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of a human text, each cut into a prompt and what came next."""
    file = pathlib.Path(flags.FLAGS.text) if flags.FLAGS.text else assets.path("nyt")
    text = file.read_text("utf-8")
    if not flags.FLAGS.text:  # lines of id, rating, sentence, in the order of the articles
        text = " ".join(line.split("\t")[2] for line in text.splitlines())
    size = head + tail
    ids = tokenizer.encode(text[: 40 * size * count * 2])
    step = len(ids) // count
    if step < size:
        raise UserError(f"the human text has {len(ids)} tokens; {count} windows of {size} need more")
    windows = [ids[i * step : i * step + size] for i in range(count)]
    return [w[:head] for w in windows], [w[head:] for w in windows]


def of_human(model, params, prompts, human) -> list[dict[str, Any]]:
    scored = score.score(model, params, list(zip(prompts, human, strict=True)), 4)
    return [{"ids": ids, "logs": one.log_probabilities} for ids, one in zip(human, scored, strict=True)]


def continued(model, params, tokenizer, prompts, options) -> list[dict[str, Any]]:
    """Continuations of exactly the asked length (EOS ends none), by batches."""
    f, texts = flags.FLAGS, []
    for first in range(0, len(prompts), f.batch_size):
        decoding = DecodingOptions(max_new_tokens=f.new_tokens, ignore_eos=True, **options)
        if decoding.method == "sample":
            decoding = DecodingOptions(max_new_tokens=f.new_tokens, ignore_eos=True, seed=first, **options)
        for (one,) in complete(model, params, tokenizer, prompts[first : first + f.batch_size], decoding):
            texts.append({"ids": one.generated.ids, "logs": one.generated.log_probabilities, "text": one.text})
    return texts


def of_steps(model, params, prompts, human) -> dict[str, list[float]]:
    """At every token of the human text: size of the nucleus, what fixed k keep, entropies before and after."""

    @jax.jit
    def look(ids):
        x = loop.apply(model, params, ids[None], method="features")[0][:, len(prompts[0]) - 1 : -1]
        logits = loop.apply(model, params, x, method="logits")[0]
        p = -jnp.sort(-jax.nn.softmax(logits), -1)
        mass = jnp.cumsum(p, -1)

        def entropy(p):
            return -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0), -1)

        def of_first(count):  # the first `count` (T,) alone
            kept = jnp.where(jnp.arange(p.shape[-1]) < count[:, None], p, 0)
            return entropy(kept / jnp.sum(kept, -1, keepdims=True))

        size = jnp.sum(mass - p < 0.95, -1)
        forty = jnp.full_like(size, 40)
        cold = jax.nn.log_softmax(jnp.log(p) / 0.7)[:, :40]
        cold = jnp.exp(cold - jax.nn.logsumexp(cold, -1, keepdims=True))
        return {
            "nucleus": size,
            "nucleus mass": jnp.take_along_axis(mass, size[:, None] - 1, -1)[:, 0],
            "mass of 40": mass[:, 39],
            "mass of 640": mass[:, 639],
            "entropy": entropy(p),
            "entropy of nucleus": of_first(size),
            "entropy of 40": of_first(forty),
            "entropy of 40, temperature 0.7": entropy(cold),
        }

    rows = [jax.device_get(look(jnp.asarray([*a, *b]))) for a, b in zip(prompts, human, strict=True)]
    return {k: np.stack([r[k] for r in rows]).astype(float).tolist() for k in rows[0]}


def of_method(texts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, ...] | float]:
    """The figures of one method's texts."""
    ids = [t["ids"] for t in texts]
    nats = bootstrap([-np.mean(t["logs"]) for t in texts])
    return {
        "perplexity": Interval(*(math.exp(x) for x in nats)),
        "self-BLEU": bootstrap(metrics.self_bleu(ids)),
        "loops %": Interval(*(100 * x for x in bootstrap([metrics.loops(i) for i in ids]))),
        "4-grams repeated %": Interval(*(100 * x for x in bootstrap([metrics.repeated(i) for i in ids]))),
        "distinct-2": metrics.distinct(ids, 2),
        "distinct-4": metrics.distinct(ids, 4),
    }


def judge(
    continuations: Mapping[str, Any], figures: Mapping[str, Any], steps: Mapping[str, np.ndarray]
) -> list[Finding]:
    """The verdicts by the rules above."""
    loops = {name: figures[name]["loops %"] for name in ("greedy", "human", "sampling", "beam 4", "nucleus 0.95")}
    repetitive = all(loops["greedy"][1] > loops[other][2] for other in ("human", "sampling"))
    sums = {name: [sum(t["logs"]) for t in continuations[name]] for name in ("greedy", "beam 4")}
    gains = [b - g for b, g in zip(sums["beam 4"], sums["greedy"], strict=True)]
    gain, wins = bootstrap(gains), float(np.mean([g > 0 for g in gains]))
    local = gain[1] > 0 and wins > 0.5
    d2 = verdicts.holds_for(["repetition", "local optimality"], [repetitive, local])
    outside = bootstrap((steps["mass of 40"] < 0.95).mean(1))
    kept = {
        name: bootstrap((steps[f"entropy of {name}"].mean(1) / steps["entropy"].mean(1)).tolist())
        for name in ("nucleus", "40", "40, temperature 0.7")
    }
    leaves = outside[1] >= 0.1
    low = kept["40, temperature 0.7"][2] < 0.5
    d4 = "holds" if leaves and low else "fails"
    if leaves != low:
        d4 = "holds when the mass left out counts, not the entropy" if leaves else "holds when entropy counts"

    sizes = np.quantile(steps["nucleus"], [0.1, 0.5, 0.9])
    covers, changes = bool((steps["nucleus mass"] >= 0.95 - 1e-4).all()), bool(sizes[2] >= 10 * sizes[0])
    human = math.log(figures["human"]["perplexity"][0])
    away = {n: abs(math.log(figures[n]["perplexity"][0]) - human) for n in figures if n != "human"}
    nearer = away["nucleus 0.95"] < min(away["greedy"], away["beam 4"])
    d5 = "holds" if covers and changes and nearer else "fails"
    d2_values = {**loops, "beam - greedy": gain, "prompts where the beam is likelier": wins}
    shares = {f"entropy kept by {name}": share for name, share in kept.items()}
    d4_values = {"outside": outside, **shares, "mass of 40": bootstrap(steps["mass of 40"].mean(1))}
    d5_values = {"10 %": sizes[0], "median": sizes[1], "90 %": sizes[2]}
    d5_values |= {f"distance {name}": distance for name, distance in away.items()}
    d4_measure = "tokens with more than 5 % of the mass outside the 40 likeliest; share of the entropy kept"
    rows = [
        ("D2", "texts that end in a loop, %; log-probability of beam minus greedy, nats", d2_values, d2),
        ("D4", d4_measure, d4_values, d4),
        ("D5", "size of the nucleus of .95, quantiles; distance to the human log-perplexity", d5_values, d5),
    ]
    return [findings.finding(*row) for row in rows]


def tables(figures: Mapping[str, Any]) -> list[str]:
    """Markdown."""
    rows = []
    for method, row in figures.items():
        cells = [f"{v[0]:.3g} ({v[1]:.3g}–{v[2]:.3g})" if isinstance(v, tuple) else f"{v:.2f}" for v in row.values()]
        rows.append([method, *cells])
    return ["", *findings.markdown_table(["method", *next(iter(figures.values()))], rows)]


def draw(steps: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """How large the nucleus is, token by token, beside fixed k."""
    with pictures.figure(path, figsize=(6, 3.2)) as axes:
        sizes = np.sort(steps["nucleus"].ravel())
        axes.plot(sizes, np.linspace(0, 1, len(sizes)))
        for k in (40, 640):
            axes.axvline(k, color="grey", linestyle=":")
            axes.text(k, 0.02, f" k = {k}", color="grey")
        axes.set(xscale="log", xlabel="tokens in the nucleus of .95", ylabel="share of the tokens of a human text")


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"prompts": 2, "prompt_tokens": 8, "new_tokens": 12, "batch_size": 2}))
