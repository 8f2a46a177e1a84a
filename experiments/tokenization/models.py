"""Models of each kind of tokenizer in bits per byte, and what a model loses with another vocabulary: T1 and T2.

    PYTHONPATH=. python experiments/tokenization/models.py [--seeds=3] [--steps=300]

A decoder of 128 x 2 layers is trained on the same number of tokens of Shakespeare for every kind (so those with short
tokens see less text) and asked for held-out text. That of byte pairs is then given other vocabularies of the same size,
as they are and after --tune more steps, beside --tune more steps with its own. What is done is kept in --runs and not
done again. Writes results.json and the second tables in README.md.

The rules of the verdicts were fixed before the run. Every interval is the 95 % t-interval of a mean over the seeds.

T1  in bits per byte: holds if the characters' figure and the bytes' are above that of every kind of pieces (paired by
    seed, intervals above 0); holds when the kind is one of the pieces of which that is so; else fails. Words are told
    and not judged: a model is not asked for what they call unknown.
T2  holds if BPE, WordPiece and unigram, trained twice on the text, give the same vocabulary twice; a checkpoint of each
    refuses the next one's, in training (--config.init_from) and put into its files; and every swap costs bits per byte,
    as it is and after tuning (paired by seed, intervals above 0). Holds when the model is not trained on if only the
    figures after tuning fail; else fails.
"""

import dataclasses
import functools
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llm_jax import cli, configuration, schema, tokenizers
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.intervals import mean, paired
from llm_jax.model.transformer import Transformer
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Finding
from llm_jax.training import losses
from llm_jax.training.setup import setup

HERE = pathlib.Path(__file__).parent
SIZE = 2048
PIECES = ("wordpiece", "unigram", "bpe", "byte_bpe")
KINDS = ("word", *PIECES, "char", "byte")
SWAPPED, OTHERS = "bpe", ("bpe", "unigram", "wordpiece")  # the first is its own
NEXT = {"bpe": "wordpiece", "wordpiece": "unigram", "unigram": "bpe"}
MODEL = {"width": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 352}

flags.DEFINE_integer("seeds", 3, "runs of each kind")
flags.DEFINE_integer("steps", 300, "of training")
flags.DEFINE_integer("tune", 100, "more steps after a swap")
flags.DEFINE_string("runs", "runs/tokenization", "where finished figures are kept")


def main() -> None:
    f = flags.FLAGS
    changes = {
        "data": {"source": "asset:shakespeare", "validation_fraction": 0.02},
        "model": MODEL,
        "train": {"batch_size": 8, "seq_len": 128},
    }
    config = configuration.load("default", changes)
    source = Source(config.data)
    root = experiments.directory(f.runs, f.steps, f.tune)
    table, origins = experiments.measure(root, KINDS, f.seeds, lambda kind, seed: run(config, source, kind, seed))
    answers = {f"{kind}-refusals": functools.partial(refusals, source, kind) for kind in NEXT}
    refused = dict(zip(NEXT, experiments.measure_all(root, answers, origins).values(), strict=True))
    lines = ["", *tables(table, refused)]
    print(experiments.publish(__file__, judge(table, refused), lines, section="models", origins=origins))


# ---------------------------------------------------------------- what is measured


def run(config: schema.Config, source: Source, kind: str, seed: int) -> dict:
    """Figures of one model, and of its swaps."""
    f, text = flags.FLAGS, functools.partial(Text, source, config.train.seq_len)
    own = text(kind)
    model = Transformer(dataclasses.replace(config.model, vocab_size=own.tokenizer.vocab_size))
    learn, nats = functions(config, model)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    params = learn(params, own.batches(seed, 0, f.steps, config.train.batch_size))
    held = own.corpus.validation
    figures = {
        "bits per byte": nats(params, own.held()) / math.log(2) / held.num_bytes,
        "unknown": float(np.mean(held.tokens == own.tokenizer.unk)) if own.tokenizer.unk is not None else 0.0,
        "megabytes seen": f.steps * config.train.batch_size * config.train.seq_len * own.bytes_per_token / 1e6,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    if kind == SWAPPED:
        for other in map(text, OTHERS):
            tuned = learn(params, other.batches(seed, f.steps, f.tune, config.train.batch_size))
            size = math.log(2) * other.corpus.validation.num_bytes
            figures |= {f"{other.kind} swapped in": nats(params, other.held()) / size}
            figures |= {f"{other.kind} tuned": nats(tuned, other.held()) / size}
    return figures


class Text:
    """The text as one kind of tokenizer has it."""

    def __init__(self, source: Source, seq_len: int, kind: str):
        self.kind = kind
        self.tokenizer = source.tokenizer(schema.TokenizerConfig(kind, SIZE, "", ""))
        self.corpus = source.corpus(self.tokenizer)
        self.train, self.validation = (Rows(s, seq_len) for s in (self.corpus.train, self.corpus.validation))
        self.bytes_per_token = self.corpus.train.num_bytes / len(self.corpus.train.tokens)

    def batches(self, seed: int, start: int, steps: int, size: int) -> dict[str, np.ndarray]:
        rows = Shuffled(self.train, seed)
        return _stacked([rows[i] for i in range(start * size, (start + steps) * size)], size)

    def held(self) -> dict[str, np.ndarray]:
        count = -(-len(self.validation) // 16) * 16  # beyond the end they are padding
        return _stacked([self.validation[i] for i in range(count)], 16)


def _stacked(rows: list, size: int) -> dict[str, np.ndarray]:
    """(steps, size, T) of each part."""
    return {name: np.stack([row[name] for row in rows]).reshape(-1, size, len(rows[0][name])) for name in rows[0]}


@functools.cache
def functions(config: schema.Config, model: Transformer):
    """(params, batches) -> trained params, and (params, batches) -> nats."""

    def learn(params, batches):
        train = dataclasses.replace(config.train, steps=batches["inputs"].shape[0])
        parts = setup(dataclasses.replace(config, train=train, model=model.config))
        # The state is donated, but the weights are used again: they are copied.
        return parts.scan(parts.init(jax.tree.map(jnp.copy, params)), batches)[0].params

    @jax.jit
    def nats(params, batches):
        return jax.lax.map(lambda b: losses.language_model(model, params, b, 0)[0], batches).sum()

    return learn, lambda params, batches: float(nats(params, batches))


def refusals(source: Source, kind: str) -> dict[str, bool]:
    """Is the vocabulary the same when trained again, and another one refused by a checkpoint of this one?"""
    other = NEXT[kind]
    learned = [tokenizers.get(kind).train(source.texts(False, 2**20), SIZE) for _ in range(2)]
    with tempfile.TemporaryDirectory() as scratch:
        mine, theirs = pathlib.Path(scratch) / "mine", pathlib.Path(scratch) / "theirs"
        assert _train(mine, kind).returncode == 0
        begun = _train(pathlib.Path(scratch) / "new", other, f"--config.init_from={mine}")
        assert _train(theirs, other).returncode == 0
        (at,), (there,) = mine.glob("checkpoints/*/tokenizer"), theirs.glob("checkpoints/*/tokenizer")
        shutil.rmtree(at)
        shutil.copytree(there, at)
        swapped = _command("evaluate", f"--checkpoint={mine}")
    return {
        "same when trained again": tokenizers.digest(learned[0]) == tokenizers.digest(learned[1]),
        "refused by init_from": begun.returncode == 2 and "tokenizer.kind" in begun.stderr,
        "refused in its files": swapped.returncode == 2 and "tokenizer" in swapped.stderr,
    }


def _train(workdir: pathlib.Path, kind: str, *more: str) -> subprocess.CompletedProcess:
    sizes = [f"--config.model.{name}={value}" for name, value in MODEL.items()]
    sizes += ["--config.train.steps=1", "--config.train.seq_len=128", "--config.optim.warmup_steps=0"]
    sizes += ["--config.data.source=asset:shakespeare", "--config.data.validation_fraction=0.02"]
    sizes += [f"--config.tokenizer.kind={kind}", f"--config.tokenizer.vocab_size={SIZE}", "--config.eval.prompts=()"]
    return _command("train", "--config=configs/default.py", f"--workdir={workdir}", *sizes, *more)


def _command(name: str, *more: str) -> subprocess.CompletedProcess:
    full = [sys.executable, "-m", f"llm_jax.{name}", *more]
    return subprocess.run(full, cwd=HERE.parents[1], env=os.environ, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- the rules


def judge(table: dict, refused: dict) -> list[Finding]:
    """The verdicts by the rules above; `table` has the figures of every kind by seed, `refused` the refusals."""
    bits = {kind: [r["bits per byte"] for r in runs] for kind, runs in table.items()}
    more = {kind: {single: paired(bits[single], bits[kind]) for single in ("char", "byte")} for kind in PIECES}
    fewer = [kind for kind in PIECES if verdicts.all_above(list(more[kind].values())) == "holds"]
    t1 = verdicts.holds_when(fewer, PIECES, "the kind is")
    runs, cost = table[SWAPPED], {}
    for when in ("swapped in", "tuned"):
        for kind in OTHERS[1:]:
            cost[f"{kind} {when}"] = paired(*([r[f"{k} {when}"] for r in runs] for k in (kind, SWAPPED)))
    costly = {when: all(i.low > 0 for k, i in cost.items() if k.endswith(when)) for when in ("swapped in", "tuned")}
    t2 = "fails"
    if all(all(refusal.values()) for refusal in refused.values()) and costly["swapped in"]:
        t2 = "holds" if costly["tuned"] else "holds when the model is not trained on"
    bits_by_kind = {kind: mean(b) for kind, b in bits.items()} | {f"more than {k}": i for k, i in more.items()}
    t1_measure = "bits per byte of a model, equal training tokens: characters and bytes minus pieces"
    t2_measure = "bits per byte that a swap of the vocabulary costs; refusals"
    return [
        findings.finding("T1", t1_measure, bits_by_kind, t1, n=len(runs)),
        findings.finding("T2", t2_measure, cost | refused, t2, n=len(runs)),
    ]


def tables(table: dict, refused: dict) -> list[str]:
    """Markdown."""
    rows = []
    for kind, runs in table.items():
        bits = findings.interval_text(mean([r["bits per byte"] for r in runs]))
        seen, parameters = f"{runs[0]['megabytes seen']:.2f}", f"{runs[0]['parameters']:,}"
        rows.append([kind, bits, f"{runs[0]['unknown']:.2%}", seen, parameters])
    lines = findings.markdown_table(["kind", "bits per byte", "unknown tokens", "MB of text seen", "parameters"], rows)
    rows = []
    for kind in OTHERS:
        means = [np.mean([r[f"{kind} {when}"] for r in table[SWAPPED]]) for when in ("swapped in", "tuned")]
        rows.append([f"its own ({kind})" if kind == SWAPPED else kind, *(f"{x:.3f}" for x in means)])
    head = [f"the model of {SWAPPED} with", "as it is", f"after {flags.FLAGS.tune} more steps"]
    lines += ["", *findings.markdown_table(head, rows)]
    answers = ([kind, *("yes" if v else "no" for v in refusal.values())] for kind, refusal in refused.items())
    return [*lines, "", *findings.markdown_table(["kind", *next(iter(refused.values()))], answers)]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "steps": 2, "tune": 1}))
