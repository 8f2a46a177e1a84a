"""Word vectors trained on four simulated devices beside one: `python -m tests.embeddings.on_devices`.

Prints a JSON object: for every kind, the largest difference of two entries, the largest entry, and what the devices
exchange. A process of its own, because the number of devices cannot be changed.
"""

import dataclasses
import functools
import json
import pathlib
import re
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.embeddings import devices, glove, word2vec
from tests.embeddings.test_word2vec import load, topics


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    config, corpus, found = load(), topics(sentences=400), {}
    with tempfile.TemporaryDirectory() as scratch:
        counted = glove.cooccurrences(corpus, 5, 2**20, pathlib.Path(scratch))
        for kind in ("skipgram", "cbow", "glove"):
            settings = dataclasses.replace(
                config, kind=kind, width=8, epochs=2,
                word2vec=dataclasses.replace(config.word2vec, sample=0.0, chunk=64),
                glove=dataclasses.replace(config.glove, batch_size=64),
            )  # fmt: skip
            train = functools.partial(glove.train, counted=counted) if kind == "glove" else word2vec.train
            several = train(corpus, settings).matrix
            with mock.patch("jax.device_count", return_value=1):
                one = train(corpus, settings).matrix
            found[kind] = {"apart": float(np.abs(several - one).max()), "largest": float(np.abs(one).max())}
    train_steps = devices.compiled(
        functools.partial(word2vec._train_steps, "skipgram", 5, 5), (True, True, True, False)
    )
    shapes = ((5000, 16), (2, 4 * 26), (2, 4, 16), (2, 64))
    arrays = [jnp.zeros(s, jnp.float32 if i == 0 else jnp.int32) for i, s in enumerate(shapes)]
    text = train_steps.lower(*arrays, jnp.ones(2)).compile().as_text()
    exchanged = re.findall(r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)
    print(json.dumps(found | {"exchanged": exchanged}))


if __name__ == "__main__":
    main()
