"""Vectors of words: learned from co-occurrence (word2vec, GloVe), and in context by any checkpoint."""
