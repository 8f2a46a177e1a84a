"""Functions that depend on `data.kind`: opening the data, and whether few targets are counted."""

from llm_jax.data.corpus import Source
from llm_jax.data.labelled import LabelledSource
from llm_jax.data.rows import ROWS
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig, choice

AnySource = Source | LabelledSource


def open_source(
    config: DataConfig, whole: bool = False, split_single_file: bool = True, engine: str = "local"
) -> AnySource:
    """Opens the documents, records or labelled texts of a data config; their scan is cached.

    Args:
      whole: whether all data is held out, for evaluation only.
      split_single_file, engine: see `corpus.Source`; labelled texts are tokenized in this process.

    Raises:
      UserError: an unknown kind; no source; data that is missing, cannot be read, or has too little in it to be split.
    """
    choice("data.kind", config.kind, ROWS)
    if not config.source.strip():
        raise UserError("data.source is empty; expected a file, a directory, asset:NAME, or another source of text")
    return (
        LabelledSource(config, whole) if config.kind == "labelled" else Source(config, whole, split_single_file, engine)
    )


def is_sparse(config: DataConfig) -> bool:
    """Whether few targets of a row are counted, because only answers are targets."""
    return config.kind != "text"
