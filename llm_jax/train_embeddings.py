"""Trains word vectors: `python -m llm_jax.train_embeddings --config=configs/word2vec.py --output=vectors.txt`.

Writes word2vec's text format, or its binary format if the name ends in .bin; gensim and `probe_embeddings` read both.
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
FLAGS.string("output", None, "file to write; must not exist", required=True)
FLAGS.integer("devices", None, "simulate this many CPU devices; default: the devices of this machine")


def main(f: cli.Flags) -> None:
    runtime.simulate_devices(f.devices)
    from llm_jax.embeddings import glove, texts, vectors, word2vec
    from llm_jax.schema import choice

    config: EmbeddingsConfig = f.config
    choice("kind", config.kind, ("skipgram", "cbow", "glove"))
    output = local_path(f.output, "--output")
    if output.exists():
        raise UserError(f"--output={output} already exists; choose another path, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=output.parent)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror})") from error
    with scratch:
        text = texts.build(config.source, config.min_count, config.max_words, pathlib.Path(scratch.name))
        print(f"{text.num_words:,} words, vocabulary of {len(text.words):,} (sha256 {text.sha256[:12]})", flush=True)
        start = time.perf_counter()
        if config.kind == "glove":
            path = glove.cooccurrences(
                text, config.glove.window, config.glove.memory * 2**20, pathlib.Path(scratch.name)
            )
            with tqdm(total=config.epochs * (path.stat().st_size // 12), unit=" cells", disable=None) as bar:
                word_vectors = glove.train(text, config, path, bar.update)
        else:
            with tqdm(total=config.epochs * len(text.ids), unit=" words", unit_scale=True, disable=None) as bar:
                word_vectors = word2vec.train(text, config, bar.update)
        seconds = time.perf_counter() - start
        vectors.save(word_vectors, output)
    rate = config.epochs * text.num_words / seconds
    count, first_word = len(word_vectors.words), word_vectors.words[0]
    print(f"wrote {output}: {count:,} vectors of {config.width} in {seconds:.1f} s, {rate:,.0f} words/s")
    print(f"next: python -m llm_jax.probe_embeddings --vectors={output} --neighbours={first_word}")


COMMAND = cli.Command("train_embeddings", main, FLAGS, config=EmbeddingsConfig, compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
