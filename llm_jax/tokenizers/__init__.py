"""Tokenizers by kind. To add one: implement `base.Tokenizer` and name it in `KINDS`."""

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from llm_jax.errors import UserError
from llm_jax.schema import choice
from llm_jax.tokenizers.base import Foreign, Tokenizer, all_files, digest, document, ends, prompt, save

__all__ = [
    "KINDS",
    "TRAINED",
    "Foreign",
    "Tokenizer",
    "all_files",
    "digest",
    "document",
    "ends",
    "foreign",
    "from_files",
    "from_gguf",
    "get",
    "load",
    "prompt",
    "save",
]

# kind -> where its class stands, imported when it is used (sentencepiece is slow to import).
KINDS = {
    "bpe": "pieces.BpeTokenizer",
    "byte": "byte.ByteTokenizer",
    "byte_bpe": "words.ByteBpeTokenizer",
    "char": "char.CharTokenizer",
    "char_bpe": "words.CharBpeTokenizer",
    "hub": "hub.HubTokenizer",
    "sentencepiece": "sentencepiece_model.ModelTokenizer",
    "unigram": "pieces.UnigramTokenizer",
    "word": "words.WordTokenizer",
    "wordpiece": "words.WordPieceTokenizer",
}
# Files of other people's tokenizers, and those beside them that tell of special tokens and of ids that end a text.
FOREIGN = ("tokenizer.json", "tokenizer.model")
_BESIDE = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")
TRAINED = tuple(kind for kind in KINDS if kind not in ("hub", "sentencepiece"))  # those are read from others' files


def get(kind: str) -> type[Tokenizer]:
    """The class of a kind. Raises UserError that names the choices."""
    module, name = choice("tokenizer.kind", kind, KINDS).split(".")
    return getattr(importlib.import_module(f"llm_jax.tokenizers.{module}"), name)


def from_files(files: dict[str, bytes]) -> Foreign:
    """Other people's tokenizer: tokenizer.json, or else sentencepiece's tokenizer.model, and what stands beside it.

    Raises:
      UserError: neither is there, or it cannot be read.
    """
    found: Any = get("sentencepiece" if "tokenizer.json" not in files and "tokenizer.model" in files else "hub")
    return found.from_files(files)


def from_directory(directory: pathlib.Path, name: str = "") -> Tokenizer:
    """Other people's tokenizer (or ours that `convert` put there) with the files that say more of it.

    Args:
      name: of `FOREIGN`, where only this one is meant.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if not name and (directory / "tokenizer" / "kind.json").is_file():
        return load(directory / "tokenizer")
    chosen = ({name} if name else {*FOREIGN}) | {*_BESIDE}
    try:
        return from_files({p.name: p.read_bytes() for p in directory.iterdir() if p.name in chosen and p.is_file()})
    except (UserError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: the tokenizer cannot be read ({error})") from error


def from_gguf(metadata: Mapping[str, Any]) -> Foreign:
    """The vocabulary of a GGUF file: sentencepiece's ("llama") or of byte-level byte pairs ("gpt2").

    Raises:
      UserError: a vocabulary of another kind, or one that is not whole.
    """
    found: Any = get("sentencepiece" if metadata.get("tokenizer.ggml.model") == "llama" else "hub")
    return found.from_gguf(metadata)


def foreign(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary as other people write it, where they do: pieces as sentencepiece's tokenizer.model."""
    if tokenizer.kind not in ("bpe", "unigram"):
        return tokenizer
    (model,) = tokenizer.files().values()
    return from_files({"tokenizer.model": model})


def load(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
      UserError: no tokenizer there, or its files are not those that were saved.
    """
    record = directory / "kind.json"
    try:
        said = json.loads(record.read_text())
        files = {p.name: p.read_bytes() for p in directory.iterdir() if p.name != record.name}
        tokenizer, saved = get(said["kind"]).from_files(files), said["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory}: no readable tokenizer here ({error})") from error
    if digest(tokenizer) != saved:
        raise UserError(f"{directory}: the tokenizer's files have changed since they were saved; restore them")
    return tokenizer
