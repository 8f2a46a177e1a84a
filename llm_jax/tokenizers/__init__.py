"""Tokenizers by kind. To add one: implement `base.Tokenizer` and name it in `KINDS`."""

import importlib
import json
import pathlib

from llm_jax.config import choice
from llm_jax.errors import UserError
from llm_jax.tokenizers.base import Tokenizer, all_files, digest, document, prompt, save

__all__ = ["KINDS", "Tokenizer", "all_files", "digest", "document", "get", "load", "prompt", "save"]

# kind -> where its class stands, imported when it is used (sentencepiece is slow to import).
KINDS = {
    "bpe": "bpe.BpeTokenizer",
    "byte": "byte.ByteTokenizer",
    "char": "char.CharTokenizer",
    "hub": "hub.HubTokenizer",
}


def get(kind: str) -> type[Tokenizer]:
    """The class of a kind. Raises UserError that names the choices."""
    module, name = choice("tokenizer.kind", kind, KINDS).split(".")
    return getattr(importlib.import_module(f"llm_jax.tokenizers.{module}"), name)


def load(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
      UserError: no tokenizer there, or its files are not those that were saved.
    """
    record = directory / "kind.json"
    try:
        said = json.loads(record.read_text())
        files = {p.name: p.read_bytes() for p in directory.iterdir() if p.name != record.name}
        tokenizer = get(said["kind"]).from_files(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory}: no readable tokenizer here ({error})") from error
    if digest(tokenizer) != said["sha256"]:
        raise UserError(f"{directory}: the tokenizer's files have changed since they were saved; restore them")
    return tokenizer
