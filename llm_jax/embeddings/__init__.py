"""Word vectors learned from co-occurrence (word2vec, GloVe), and contextual vectors of any checkpoint."""
