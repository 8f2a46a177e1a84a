"""What `data.kind` decides beside how rows are made: what reads the data, and whether few targets count."""

from llm_jax.data.corpus import Source
from llm_jax.data.labelled import LabelledSource
from llm_jax.data.rows import ROWS
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig, choice

AnySource = Source | LabelledSource


def open_source(config: DataConfig, whole: bool = False, in_pieces: bool = True) -> AnySource:
    """The documents, records or labelled texts of a data config, scanned once and remembered.

    Args:
      whole: hold everything out and train on nothing, for data that is only evaluated on.
      in_pieces: see `corpus.Source`.

    Raises:
      UserError: an unknown kind; no source; data that is missing, cannot be read, or has too little in it to be split.
    """
    choice("data.kind", config.kind, ROWS)
    if not config.source.strip():
        raise UserError("data.source is empty; expected a file, a directory, asset:NAME, or another source of text")
    return LabelledSource(config, whole) if config.kind == "labelled" else Source(config, whole, in_pieces)


def is_sparse(config: DataConfig) -> bool:
    """Whether few targets of a row count, because they are answers."""
    return config.kind != "text"
