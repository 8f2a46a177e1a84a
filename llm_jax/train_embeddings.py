"""Vectors of words from text: `python -m llm_jax.train_embeddings --config=configs/word2vec.py --output=vectors.txt`.

Writes word2vec's text form, or its binary form where the name ends in .bin; gensim and `probe_embeddings` read both.
"""

import pathlib
import tempfile
import time

from tqdm import tqdm

from llm_jax import cli, runtime
from llm_jax.errors import UserError
from llm_jax.files import PARTIAL, local_path
from llm_jax.schema import EmbeddingsConfig

FLAGS = cli.Flags()
FLAGS.string("output", None, "the file to write; it must not exist", required=True)
FLAGS.integer("devices", None, "simulate this many CPU devices; default: the devices of this machine")


def main(f: cli.Flags) -> None:
    runtime.simulate_devices(f.devices)
    from llm_jax.embeddings import glove, texts, vectors, word2vec
    from llm_jax.schema import choice

    config: EmbeddingsConfig = f.config
    choice("kind", config.kind, ("skipgram", "cbow", "glove"))
    output = local_path(f.output, "--output")
    if output.exists():
        raise UserError(f"--output={output} exists; give another, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=output.parent)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror})") from error
    with scratch:
        text = texts.build(config.source, config.min_count, config.max_words, pathlib.Path(scratch.name))
        print(f"{text.num_words:,} words of {len(text.words):,} kinds (sha256 {text.sha256[:12]})", flush=True)
        start = time.perf_counter()
        if config.kind == "glove":
            path = glove.cooccurrences(
                text, config.glove.window, config.glove.memory * 2**20, pathlib.Path(scratch.name)
            )
            with tqdm(total=config.epochs * (path.stat().st_size // 12), unit=" cells", disable=None) as bar:
                found = glove.train(text, config, path, bar.update)
        else:
            with tqdm(total=config.epochs * len(text.ids), unit=" words", unit_scale=True, disable=None) as bar:
                found = word2vec.train(text, config, bar.update)
        seconds = time.perf_counter() - start
        vectors.save(found, output)
    rate = config.epochs * text.num_words / seconds
    print(f"wrote {output}: {len(found.words):,} vectors of {config.width} in {seconds:.1f} s, {rate:,.0f} words/s")
    print(f"next: python -m llm_jax.probe_embeddings --vectors={output} --neighbours={found.words[0]}")


COMMAND = cli.Command("train_embeddings", main, FLAGS, config=EmbeddingsConfig, compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
