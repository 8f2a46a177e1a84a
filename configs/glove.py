"""GloVe vectors from the Wikipedia sample and Shakespeare: 1.5 M words, 15 epochs over the co-occurrences.

    python -m llm_jax.train_embeddings --config=configs/glove.py --output=vectors.txt

With `--config.glove.window=5 --config.epochs=10`, the rank correlation with WordSim-353 is about 0.138, the mean of
three seeds (`experiments/word_vectors`; its twelve trainings take 8 minutes on two shared cores).
"""

from ml_collections import ConfigDict

from llm_jax import configuration


def get_config() -> ConfigDict:
    config = configuration.recipe("word2vec")
    config.update({"kind": "glove", "epochs": 15})
    return config
