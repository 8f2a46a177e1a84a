"""Maps of word vectors."""

import pathlib

import numpy as np

from llm_jax.embeddings.vectors import WordVectors
from llm_jax.errors import UserError
from llm_jax.pictures import render_png


def project_to_plane(vectors: WordVectors, words: list[str]) -> np.ndarray:
    """The unit vectors of words projected onto their first two principal components, (words, 2)."""
    rows = np.stack([vectors[word] for word in words])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centred = rows - rows.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def draw(vectors: WordVectors, words: list[str], path: pathlib.Path) -> None:
    """Writes a scatter plot of words in their `project_to_plane`.

    Raises:
      UserError: fewer than three words, a word without a vector, or a file that cannot be written.
    """
    if len(words) < 3:
        raise UserError(f"--words has {len(words)} words; expected at least three")
    places = project_to_plane(vectors, words)
    with render_png.figure(11, 8, layout="constrained") as drawing:
        axis = drawing.subplots()
        axis.scatter(places[:, 0], places[:, 1], s=6)
        for word, place in zip(words, places, strict=True):
            axis.annotate(word, place, fontsize=7, xytext=(2, 2), textcoords="offset points")
        axis.set(xticks=[], yticks=[])
        try:
            drawing.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise UserError(f"--map={path} cannot be written ({error})") from error
