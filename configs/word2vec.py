"""Skip-gram vectors of the Wikipedia sample and Shakespeare: 1.5 M words, 5 epochs.

    python -m llm_jax.train_embeddings --config=configs/word2vec.py --output=vectors.txt [--config.kind=cbow]

Half a minute on one CPU core. `probe_embeddings --vectors=vectors.txt --all` then measures the rank correlation with
WordSim-353, which is low for so little text: about 0.205 (gensim: 0.182), and for CBOW 0.107 (gensim: 0.114), as means
of three seeds (`experiments/benchmarks`). `llm_jax/schema/config.py` describes the options.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "kind": "skipgram",
            "source": "asset:wiki-sample,asset:shakespeare",
            "min_count": 5,
            "max_words": 0,
            "width": 100,
            "epochs": 5,
            "seed": 0,
            "word2vec": {
                "window": 5,
                "negatives": 5,
                "sample": 1e-3,
                "lr": 0.025,
                "final_lr": 1e-4,
                "chunk": 256,
                "shared_negatives": 16,
            },
            "glove": {
                "window": 10,
                "x_max": 10.0,
                "alpha": 0.75,
                "lr": 0.05,
                "batch_size": 1024,
                "memory": 1024,
            },
        }
    )
