"""The options of `llm_jax.embeddings.train`; their values stand in configs/word2vec.py and configs/glove.py."""

import dataclasses

from llm_jax.config import Count, CountOrZero, Positive, PositiveOrZero, Seed


@dataclasses.dataclass(frozen=True)
class Word2VecConfig:
    window: Count  # words on each side at most; each place draws its own from 1 to this
    negatives: Count  # words drawn against each pair
    sample: PositiveOrZero  # words with a larger share of the text are thinned out; 0: none
    lr: Positive  # falls linearly
    final_lr: Positive
    chunk: Count  # words a step over all devices, a multiple of 16 on each; their gradients are summed
    shared_negatives: Count  # drawn for 16 words, and weighted so that each of their pairs sees `negatives`


@dataclasses.dataclass(frozen=True)
class GloveConfig:
    window: Count  # words on each side; a pair at distance d counts 1/d
    x_max: Positive  # counts above this weigh 1, others (count / x_max)^alpha
    alpha: PositiveOrZero
    lr: Positive  # of AdaGrad
    batch_size: Count  # cells of the matrix of co-occurrences a step
    memory: Count  # MiB of counts that are held before they go to disk


@dataclasses.dataclass(frozen=True)
class EmbeddingsConfig:
    kind: str  # "skipgram", "cbow" or "glove"
    source: str  # text files, directories, globs, Wikipedia dumps, asset:NAME; A,B,...
    min_count: Count  # rarer words are left out
    max_words: CountOrZero  # the most frequent words that are kept; 0: all
    width: Count
    epochs: Count
    seed: Seed
    word2vec: Word2VecConfig
    glove: GloveConfig
