"""Bits per byte of models with each kind of tokenizer, and of a model with another vocabulary: T1 and T2.

A decoder with 2 layers of width 128 is trained on the same number of tokens of Shakespeare for every kind, so that
kinds with short tokens see less text, and evaluated on held-out text. The model of byte pairs then gets other
vocabularies of the same size, and is measured before and after --tune more steps, beside as many steps with its own.
"""

import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import llm_jax
from experiments import decoders
from llm_jax import checkpoints, cli, configuration, tokenizers
from llm_jax.data.corpus import Corpus, Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.errors import UserError
from llm_jax.intervals import paired
from llm_jax.model.transformer import Transformer
from llm_jax.research import experiments, findings, verdicts
from llm_jax.research.findings import Figures, Finding
from llm_jax.schema import Config, TokenizerConfig
from llm_jax.training.setup import num_parameters, setup

SIZE = 2048
PIECES = ("wordpiece", "unigram", "bpe", "byte_bpe")
KINDS = ("word", *PIECES, "char", "byte")
SWAPPED, OTHERS = "bpe", ("bpe", "unigram", "wordpiece")  # the first is the vocabulary of the model
NEXT = {"bpe": "wordpiece", "wordpiece": "unigram", "unigram": "bpe"}
WHEN = ("swapped in", "tuned")
CHANGES = {
    "data": {"source": "asset:shakespeare", "validation_fraction": 0.02},
    "model": {"width": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 352},
    "train": {"batch_size": 8, "seq_len": 128},
}

flags.DEFINE_integer("seeds", 3, "models of each kind")
flags.DEFINE_integer("steps", 300, "training steps")
flags.DEFINE_integer("tune", 100, "training steps after the vocabulary is replaced")


def main() -> None:
    f = flags.FLAGS
    config = configuration.load("default", CHANGES)
    source = Source(config.data)
    root = experiments.directory(f.runs, f.steps, f.tune)
    figures, origins = experiments.measure(root, KINDS, f.seeds, functools.partial(run, config, source))
    answers = {f"{kind}-refusals": functools.partial(refusals, config, source, kind) for kind in NEXT}
    refused = dict(zip(NEXT, experiments.measure_all(root, answers, origins).values(), strict=True))
    lines = ["", *tables(figures, refused)]
    print(experiments.publish(__file__, judge(figures, refused), lines, section="models", origins=origins))


def run(config: Config, source: Source, kind: str, seed: int) -> dict[str, float]:
    """The figures of a model, and, of byte pairs, of the model with other vocabularies."""
    f = flags.FLAGS
    tokenizer, corpus = text(source, kind)
    sizes = {"model.vocab_size": tokenizer.vocab_size, "train.seed": seed}
    config = configuration.load(config, sizes)
    params = trained(config, corpus, 0, f.steps)
    tokens = f.steps * config.train.batch_size * config.train.seq_len
    figures = {
        "bits per byte": bits_per_byte(config, params, corpus),
        "unknown": 0.0 if tokenizer.unk is None else float(np.mean(corpus.validation.tokens == tokenizer.unk)),
        "megabytes seen": tokens * (corpus.train.num_bytes / len(corpus.train.tokens)) / 1e6,
        "parameters": num_parameters(params),
    }
    for other in OTHERS if kind == SWAPPED else ():
        _, corpus = text(source, other)
        tuned = trained(config, corpus, f.steps, f.steps + f.tune, params)
        for when, weights in zip(WHEN, (params, tuned), strict=True):
            figures[f"{other} {when}"] = bits_per_byte(config, weights, corpus)
    return figures


def text(source: Source, kind: str) -> tuple[tokenizers.Tokenizer, Corpus]:
    tokenizer = source.tokenizer(TokenizerConfig(kind, SIZE, "", ""))
    return tokenizer, source.corpus(tokenizer)


def trained(config: Config, corpus: Corpus, start: int, stop: int, params: Any = None) -> Any:
    """The weights after the batches `start` to `stop`, from `params`, or from random weights of the seed."""
    parts = setup(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=stop - start)))
    state = parts.init(jax.tree.map(jnp.copy, params))  # the state is donated, but the weights are used again
    rows = Shuffled(Rows(corpus.train, config.train.seq_len), config.train.seed)
    for batch in parts.batches(rows, start, stop):
        state, _ = parts.step(state, batch)
    return state.params


def bits_per_byte(config: Config, params: Any, corpus: Corpus) -> float:
    """The bits per byte of the held-out text."""
    rows = Rows(corpus.validation, config.train.seq_len)
    return decoders.evaluate(Transformer(config.model), params, rows, 16)["bits_per_byte"]


def refusals(config: Config, source: Source, kind: str) -> dict[str, bool]:
    """Whether training gives the same vocabulary twice, and whether a checkpoint refuses another vocabulary."""
    other = NEXT[kind]
    learned = [tokenizers.get(kind).train(source.texts(False, 2**20), SIZE) for _ in range(2)]

    def train(workdir: pathlib.Path, kind: str, **more: str) -> None:
        changes = {"tokenizer.kind": kind, "tokenizer.vocab_size": SIZE, "eval.prompts": ()}
        changes |= {"train.steps": 1, "optim.warmup_steps": 0, **more}
        llm_jax.train(configuration.load(config, changes), workdir, verbose=False)

    def is_refused(attempt: Callable[[], Any], reason: str) -> bool:
        try:
            attempt()
        except UserError as error:
            return reason in str(error)
        return False

    with tempfile.TemporaryDirectory() as scratch:
        mine, theirs, new = (pathlib.Path(scratch) / name for name in ("mine", "theirs", "new"))
        train(mine, kind)
        train(theirs, other)
        by_flag = is_refused(lambda: train(new, other, init_from=str(mine)), "tokenizer.kind")
        directory = checkpoints.find(mine) / "tokenizer"
        shutil.rmtree(directory)
        shutil.copytree(checkpoints.find(theirs) / "tokenizer", directory)
        in_files = is_refused(lambda: checkpoints.load(mine), "tokenizer")
    same = tokenizers.digest(learned[0]) == tokenizers.digest(learned[1])
    return {"same when trained again": same, "refused by init_from": by_flag, "refused in its files": in_files}


def judge(figures: Figures, refused: dict[str, dict[str, bool]]) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    more = {
        kind: findings.differences({k: figures[k] for k in ("char", "byte", kind)}, "bits per byte", kind)
        for kind in PIECES
    }
    fewer = [kind for kind in PIECES if verdicts.all_above(list(more[kind].values())) == "holds"]
    runs = figures[SWAPPED]
    cost = {
        f"{kind} {when}": paired(*([r[f"{k} {when}"] for r in runs] for k in (kind, SWAPPED)))
        for when in WHEN
        for kind in OTHERS[1:]
    }
    at_once, tuned = (all(i.low > 0 for name, i in cost.items() if name.endswith(when)) for when in WHEN)
    t2 = "fails"
    if at_once and all(all(answers.values()) for answers in refused.values()):
        t2 = "holds" if tuned else "holds when the model is not trained on"
    bits = findings.means(figures, "bits per byte")
    bits |= {f"{other} minus {kind}": i for kind, by_other in more.items() for other, i in by_other.items()}
    t1_measure = "bits per byte of a model, equal training tokens: characters and bytes minus pieces"
    t2_measure = "bits per byte that a swap of the vocabulary costs; refusals"
    return [
        findings.finding("T1", t1_measure, bits, verdicts.holds_when(fewer, PIECES, "the kind is"), n=len(runs)),
        findings.finding("T2", t2_measure, cost | refused, t2, n=len(runs)),
    ]


def tables(figures: Figures, refused: dict[str, dict[str, bool]]) -> list[str]:
    columns = {
        "bits per byte": findings.interval("bits per byte"),
        "unknown tokens": findings.first("unknown", ".2%"),
        "MB of text seen": findings.first("megabytes seen", ".2f"),
        "parameters": findings.first("parameters", ","),
    }
    swaps = []
    for kind in OTHERS:
        means = [np.mean([r[f"{kind} {when}"] for r in figures[SWAPPED]]) for when in WHEN]
        swaps.append([f"its own ({kind})" if kind == SWAPPED else kind, *(f"{x:.3f}" for x in means)])
    swap_head = [f"the model of {SWAPPED} with", "as it is", f"after {flags.FLAGS.tune} more steps"]
    answers = ([kind, *("yes" if v else "no" for v in refusal.values())] for kind, refusal in refused.items())
    return [
        *findings.condition_table("kind", figures, columns),
        *["", *findings.markdown_table(swap_head, swaps)],
        *["", *findings.markdown_table(["kind", *next(iter(refused.values()))], answers)],
    ]


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"seeds": 2, "steps": 2, "tune": 1}))
