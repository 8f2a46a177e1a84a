"""The table of the nucleus paper on a real model and a held-out human text: D2, D4, D5.

    PYTHONPATH=. python experiments/decoding_quality/run.py [--prompts=16] [--new_tokens=48] [--batch_size=16]

Every method of `METHODS` continues the same prompts. What is done is kept under --runs and not done again.
Writes results.json, the table of README.md and sizes.png.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.decoding_quality import report
from llm_jax import checkpoints, cli, files
from llm_jax.data import assets
from llm_jax.decoding import loop, score
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError

HERE = pathlib.Path(__file__).parent

flags.DEFINE_string("checkpoint", "asset:smollm2-135m-instruct", "the model")
flags.DEFINE_string("text", "", "human text, a file; by default sentences of editorials (asset:nyt)")
flags.DEFINE_integer("prompts", 16, "texts continued")
flags.DEFINE_integer("prompt_tokens", 32, "of each")
flags.DEFINE_integer("new_tokens", 48, "of each")
flags.DEFINE_integer("batch_size", 16, "texts at a time")
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
    if min(f.prompts, f.prompt_tokens, f.new_tokens, f.batch_size) < 2:
        raise UserError("--prompts, --prompt_tokens, --new_tokens and --batch_size must be 2 or more")
    asked = hashlib.sha256(f"{f.checkpoint} {f.text}".encode()).hexdigest()[:8]
    root = pathlib.Path(f.runs).expanduser() / f"{asked}-{f.prompts}-{f.prompt_tokens}-{f.new_tokens}"
    files.make_directory(root)
    model, params, tokenizer = checkpoints.load(f.checkpoint)
    prompts, human = texts(tokenizer, f.prompts, f.prompt_tokens, f.new_tokens)
    made = {"human": done(root / "human.json", lambda: of_human(model, params, prompts, human))}
    for name, options in tqdm(METHODS.items(), "methods"):
        made[name] = done(
            root / f"{name.replace(' ', '_')}.json",
            lambda options=options: continued(model, params, tokenizer, prompts, options),
        )
    steps = done(root / "steps.json", lambda: of_steps(model, params, prompts, human))
    print(report.write(HERE, made, steps, f"--prompts={f.prompts} --new_tokens={f.new_tokens}"))


def done(path: pathlib.Path, make) -> Any:
    """What `path` holds, made first if it is not there."""
    if not path.exists():
        files.write_json(path, make())
    return json.loads(path.read_text())


def texts(tokenizer, count: int, head: int, tail: int) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of a human text, each cut into a prompt and what came next."""
    file = pathlib.Path(flags.FLAGS.text) if flags.FLAGS.text else assets.path("nyt")
    said = file.read_text("utf-8")
    if not flags.FLAGS.text:  # lines of id, rating, sentence, in the order of the articles
        said = " ".join(line.split("\t")[2] for line in said.splitlines())
    size = head + tail
    ids = tokenizer.encode(said[: 40 * size * count * 2])
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
    f, found = flags.FLAGS, []
    for first in range(0, len(prompts), f.batch_size):
        asked = DecodingOptions(max_new_tokens=f.new_tokens, ignore_eos=True, **options)
        if asked.method == "sample":
            asked = DecodingOptions(max_new_tokens=f.new_tokens, ignore_eos=True, seed=first, **options)
        for (one,) in complete(model, params, tokenizer, prompts[first : first + f.batch_size], asked):
            found.append({"ids": one.generated.ids, "logs": one.generated.log_probabilities, "text": one.text})
    return found


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


if __name__ == "__main__":
    cli.run_script(main)
