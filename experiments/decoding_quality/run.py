"""The table of the nucleus paper on a real model and a held-out human text: D2, D4, D5.

Every method of `METHODS` continues the same prompts. Intervals are 95 %, by bootstrap over the texts (over the texts'
means where a figure has a value per token).
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.scipy.special import entr

from experiments.decoding_quality import metrics
from llm_jax import checkpoints, cli
from llm_jax.checkpoints import Loaded
from llm_jax.data import assets
from llm_jax.decoding import score
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.decoding.steps import apply
from llm_jax.errors import UserError
from llm_jax.intervals import Interval, bootstrap
from llm_jax.research import experiments, findings, plots, verdicts
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

flags.DEFINE_string("checkpoint", "asset:smollm2-135m-instruct", "the model")
flags.DEFINE_string("text", "", "file with human text; by default sentences of editorials (asset:nyt)")
flags.DEFINE_integer("prompts", 16, "number of prompts", lower_bound=2)
flags.DEFINE_integer("prompt_tokens", 32, "tokens of each prompt", lower_bound=2)
flags.DEFINE_integer("new_tokens", 48, "tokens of each continuation", lower_bound=2)
flags.DEFINE_integer("batch_size", 16, "prompts that are decoded together", lower_bound=2)

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
# Methods whose filters are compared with the distribution of the model, by name in the figures.
KEPT = {"nucleus": "nucleus 0.95", "40": "top-k 40", "40, temperature 0.7": "top-k 40, temperature 0.7"}
MEASURES = {
    "D2": "texts that end in a loop, %; log-probability of beam minus greedy, nats",
    "D4": "tokens with more than 5 % of the mass outside the 40 likeliest; share of the entropy kept",
    "D5": "size of the nucleus of .95, quantiles; distance to the human log-perplexity",
}
Texts = list[dict[str, Any]]  # token ids and their log-probabilities


def main() -> None:
    f = flags.FLAGS
    digest = experiments.digest(f.checkpoint, f.text)
    root = experiments.directory(f.runs, digest, f.prompts, f.prompt_tokens, f.new_tokens, f.batch_size)
    loaded = checkpoints.load(f.checkpoint)
    prompts, human = windows(loaded)
    computations: dict[str, Callable[[], Any]] = {
        "human": functools.partial(of_human, loaded, prompts, human),
        **{name: functools.partial(continued, loaded, prompts, name) for name in METHODS},
        "steps": functools.partial(of_steps, loaded, prompts, human),
    }
    origins: list[Provenance] = []
    texts = experiments.measure_all(root, computations, origins)
    steps = {name: np.asarray(values) for name, values in texts.pop("steps").items()}
    figures = {name: of_method(of_name) for name, of_name in texts.items()}
    draw(steps["nucleus"], experiments.output(__file__) / "sizes.png")
    rows = [[method, *map(cell, row.values())] for method, row in figures.items()]
    lines = ["", *findings.markdown_table(["method", *figures["human"]], rows)]
    command = experiments.command(__file__, {"checkpoint": "RUN", "text": "FILE"})
    results = judge(texts, figures, steps)
    print(experiments.publish(__file__, results, lines, origins=origins, measured_by=command))


def windows(loaded: Loaded) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of a human text, each split into a prompt and its continuation."""
    f = flags.FLAGS
    text = pathlib.Path(f.text or assets.path("nyt")).read_text("utf-8")
    if not f.text:  # lines of id, rating, sentence, in the order of the articles
        text = " ".join(line.split("\t")[2] for line in text.splitlines())
    size = f.prompt_tokens + f.new_tokens
    ids = loaded.tokenizer.encode(text[: 40 * size * f.prompts * 2])
    step = len(ids) // f.prompts
    if step < size:
        raise UserError(f"the human text has {len(ids)} tokens; {f.prompts} windows of {size} need more")
    starts = range(0, f.prompts * step, step)
    return [ids[i : i + f.prompt_tokens] for i in starts], [ids[i + f.prompt_tokens : i + size] for i in starts]


def of_human(loaded: Loaded, prompts: list[list[int]], human: list[list[int]]) -> Texts:
    scored = score.score(loaded.model, loaded.params, list(zip(prompts, human, strict=True)), 4)
    return [{"ids": ids, "logs": one.log_probabilities} for ids, one in zip(human, scored, strict=True)]


def continued(loaded: Loaded, prompts: list[list[int]], method: str) -> Texts:
    """Continuations of exactly `new_tokens` tokens: EOS does not end them."""
    f = flags.FLAGS
    options = DecodingOptions(max_new_tokens=f.new_tokens, ignore_eos=True, **METHODS[method])
    texts: Texts = []
    for first in range(0, len(prompts), f.batch_size):
        seeded = dataclasses.replace(options, seed=first) if options.method == "sample" else options
        for (text,) in complete(*loaded, prompts[first : first + f.batch_size], seeded):
            generated = text.generated
            texts.append({"ids": generated.ids, "logs": generated.log_probabilities, "text": text.text})
    return texts


def of_steps(loaded: Loaded, prompts: list[list[int]], human: list[list[int]]) -> dict[str, list[list[float]]]:
    """At every token of the human text: size and mass of the nucleus, mass of the 40 likeliest, and entropies."""
    samplers = {name: DecodingOptions(**METHODS[method]).sampler() for name, method in KEPT.items()}

    @jax.jit
    def look(ids):
        x = apply(loaded.model, loaded.params, ids[None], method="features")[0][:, len(prompts[0]) - 1 : -1]
        logits = apply(loaded.model, loaded.params, x, method="logits")[0].astype(jnp.float32)
        history: Any = None  # which these filters do not read
        logs = {name: sampler.log_probabilities(logits, history) for name, sampler in samplers.items()}
        kept = {name: jnp.isfinite(of_filter) for name, of_filter in logs.items()}
        mass = {name: jnp.sum(jax.nn.softmax(logits), -1, where=of_filter) for name, of_filter in kept.items()}
        return {
            "nucleus": jnp.sum(kept["nucleus"], -1),
            "nucleus mass": mass["nucleus"],
            "mass of 40": mass["40"],
            "entropy": jnp.sum(entr(jax.nn.softmax(logits)), -1),
            **{f"entropy of {name}": jnp.sum(entr(jnp.exp(of_filter)), -1) for name, of_filter in logs.items()},
        }

    rows = [jax.device_get(look(jnp.asarray([*a, *b]))) for a, b in zip(prompts, human, strict=True)]
    return {name: np.stack([row[name] for row in rows]).astype(float).tolist() for name in rows[0]}


def of_method(texts: Texts) -> dict[str, Any]:
    """The figures of one method's texts."""
    ids = [t["ids"] for t in texts]
    repeated = [1 - metrics.distinct([text], 4) for text in ids]
    return {
        "perplexity": Interval(*map(math.exp, bootstrap([-float(np.mean(t["logs"])) for t in texts]))),
        "self-BLEU": bootstrap(metrics.self_bleu(ids)),
        "loops %": percent(bootstrap([metrics.loops(text) for text in ids])),
        "4-grams repeated %": percent(bootstrap(repeated)),
        "distinct-2": metrics.distinct(ids, 2),
        "distinct-4": metrics.distinct(ids, 4),
    }


def percent(share: Interval) -> Interval:
    return Interval(*(100 * x for x in share))


def cell(value: Interval | float) -> str:
    if isinstance(value, Interval):
        return f"{value.estimate:.3g} ({value.low:.3g}–{value.high:.3g})"
    return f"{value:.2f}"


def judge(texts: Mapping[str, Texts], figures: Mapping[str, Any], steps: Mapping[str, np.ndarray]) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    loops = {name: figures[name]["loops %"] for name in ("greedy", "human", "sampling", "beam 4", "nucleus 0.95")}
    repetitive = all(loops["greedy"].low > loops[other].high for other in ("human", "sampling"))
    greedy, beam = ([sum(t["logs"]) for t in texts[name]] for name in ("greedy", "beam 4"))
    gains = np.subtract(beam, greedy)
    gain, wins = bootstrap(gains), float(np.mean(gains > 0))
    d2 = verdicts.holds_for(["repetition", "local optimality"], [repetitive, gain.low > 0 and wins > 0.5])
    outside = bootstrap((steps["mass of 40"] < 0.95).mean(1))
    kept = {name: bootstrap(steps[f"entropy of {name}"].mean(1) / steps["entropy"].mean(1)) for name in KEPT}
    leaves, low = outside.low >= 0.1, kept["40, temperature 0.7"].high < 0.5
    d4 = "holds" if leaves and low else "fails"
    if leaves != low:
        d4 = "holds when the mass left out counts, not the entropy" if leaves else "holds when entropy counts"
    sizes = np.quantile(steps["nucleus"], [0.1, 0.5, 0.9])
    covers, changes = bool((steps["nucleus mass"] >= 0.95 - 1e-4).all()), bool(sizes[2] >= 10 * sizes[0])
    nats = {name: math.log(row["perplexity"].estimate) for name, row in figures.items()}
    away = {name: abs(x - nats["human"]) for name, x in nats.items() if name != "human"}
    nearer = away["nucleus 0.95"] < min(away["greedy"], away["beam 4"])
    shares = {f"entropy kept by {name}": share for name, share in kept.items()}
    distances = {f"distance {name}": distance for name, distance in away.items()}
    quantiles = dict(zip(("10 %", "median", "90 %"), sizes, strict=True))
    judgements: dict[str, tuple[Any, str]] = {
        "D2": ({**loops, "beam - greedy": gain, "prompts where the beam is likelier": wins}, d2),
        "D4": ({"outside": outside, **shares, "mass of 40": bootstrap(steps["mass of 40"].mean(1))}, d4),
        "D5": (quantiles | distances, "holds" if covers and changes and nearer else "fails"),
    }
    return [findings.finding(name, MEASURES[name], *judgements[name]) for name in MEASURES]


def draw(nucleus: np.ndarray, path: pathlib.Path) -> None:
    """The distribution of the size of the nucleus over tokens, beside fixed k."""
    with plots.figure(path, figsize=(6, 3.2)) as axes:
        sizes = np.sort(nucleus.ravel())
        axes.plot(sizes, np.linspace(0, 1, len(sizes)))
        for k in (40, 640):
            axes.axvline(k, color="grey", linestyle=":")
            axes.text(k, 0.02, f" k = {k}", color="grey")
        axes.set(xscale="log", xlabel="tokens in the nucleus of .95", ylabel="share of the tokens of a human text")


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"prompts": 2, "prompt_tokens": 8, "new_tokens": 12, "batch_size": 2}))
