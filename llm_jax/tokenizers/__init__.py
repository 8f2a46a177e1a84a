"""Tokenizers by kind: the kinds in `KINDS`, and custom classes with the members of `Tokenizer`."""

import functools
import importlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from llm_jax import extensions
from llm_jax.errors import UserError
from llm_jax.files import check_not_lfs_pointer
from llm_jax.tokenizers import special
from llm_jax.tokenizers.base import (
    PretrainedTokenizer,
    Tokenizer,
    VocabularyTooLarge,
    all_files,
    digest,
    document,
    eos_ids,
    prompt,
    save,
)

__all__ = [
    "KINDS",
    "PRETRAINED_FILES",
    "SIZED",
    "TRAINED",
    "PretrainedTokenizer",
    "Tokenizer",
    "VocabularyTooLarge",
    "all_files",
    "digest",
    "document",
    "eos_ids",
    "exportable",
    "from_files",
    "from_gguf",
    "get",
    "load",
    "prompt",
    "read_files",
    "save",
    "with_chat_template",
]

# kind -> "module.class", imported on first use (sentencepiece is slow to import).
KINDS = {
    "bpe": "pieces.BpeTokenizer",
    "byte": "byte.ByteTokenizer",
    "byte_bpe": "words.ByteBpeTokenizer",
    "char": "char.CharTokenizer",
    "char_bpe": "words.CharBpeTokenizer",
    "hub": "hub.HubTokenizer",
    "sentencepiece": "sentencepiece_model.SentencePieceTokenizer",
    "unigram": "pieces.UnigramTokenizer",
    "word": "words.WordTokenizer",
    "wordpiece": "words.WordPieceTokenizer",
}
PRETRAINED_FILES = ("tokenizer.json", "tokenizer.model")  # files of pretrained vocabularies
T = TypeVar("T", bound=Tokenizer)
TRAINED = tuple(kind for kind in KINDS if kind not in ("hub", "sentencepiece"))  # the kinds that can be trained

SIZED = tuple(kind for kind in TRAINED if kind not in ("byte", "char"))  # trained kinds with exactly vocab_size ids


def get(kind: str) -> type[Tokenizer]:
    """The class of a kind.

    Args:
      kind: a key of `KINDS`, or the specification of a custom class, which becomes its `kind`. The options are keyword
        arguments of the method `train`.

    Raises:
      UserError: an unknown kind; a class that lacks a method of `Tokenizer`.
    """
    selected = extensions.select("tokenizer.kind", kind, KINDS)
    if not isinstance(selected, extensions.Extension):
        module, name = selected.split(".")
        return getattr(importlib.import_module(f"llm_jax.tokenizers.{module}"), name)
    cls: Any = selected.target
    missing = [name for name in (*vars(Tokenizer), "exact") if not name.startswith("_") and not hasattr(cls, name)]
    is_class = isinstance(cls, type)
    if missing or not is_class:
        raise selected.error(f"expected a class with the members of Tokenizer; it lacks {', '.join(missing)}")
    selected.bind(cls.train)  # checks the names of the options

    class Custom(cls):
        kind = selected.specification

        @classmethod
        def train(cls, texts: Iterable[str], vocab_size: int) -> Any:
            train = functools.partial(super().train, **selected.options)
            return selected.call(train, texts, vocab_size)

    return Custom


def from_files(files: dict[str, bytes]) -> PretrainedTokenizer:
    """A pretrained tokenizer from its files: tokenizer.json, else tokenizer.model, and `special.FILES` beside it.

    Raises:
      UserError: neither file is present, or it cannot be read.
    """
    kind: Any = get("sentencepiece" if "tokenizer.json" not in files and "tokenizer.model" in files else "hub")
    return kind.from_pretrained(files)


def from_directory(directory: pathlib.Path, name: str = "") -> Tokenizer:
    """Loads the tokenizer of a checkpoint directory: a pretrained one, or the files in tokenizer/ from `convert`.

    Args:
      name: one of `PRETRAINED_FILES`, to read this file only.

    Raises:
      UserError: the directory has no tokenizer, or it cannot be read.
    """
    if not name and (directory / "tokenizer" / "kind.json").is_file():
        return load(directory / "tokenizer")
    try:
        return from_files(read_files(directory, [name] if name else PRETRAINED_FILES))
    except (UserError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"{directory}: the tokenizer cannot be read ({error})") from error


def read_files(directory: pathlib.Path, names: Iterable[str] = PRETRAINED_FILES) -> dict[str, bytes]:
    """Reads the files of a pretrained tokenizer in a directory, for `from_files`.

    Args:
      names: files of the vocabulary; those of `special.FILES` and further chat templates are read in any case.
    """
    older = special.OLDER_VOCABULARIES if names is PRETRAINED_FILES else ()
    paths = [directory / name for name in (*names, *older, *special.FILES)]
    paths += sorted(directory.glob(f"{special.TEMPLATES}/*.jinja"))
    paths = [path for path in paths if path.is_file()]
    for path in paths:
        check_not_lfs_pointer(path)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def with_chat_template(tokenizer: T, name: str) -> T:
    """Returns the tokenizer with only one of its chat templates; with "", the unchanged tokenizer.

    Raises:
      UserError: the tokenizer has no chat template with this name.
    """
    if not name:
        return tokenizer
    templates = getattr(tokenizer, "special", {}).get("chat_template") or {}
    templates = {"default": templates} if isinstance(templates, str) else templates
    if name not in templates:
        names = f"those named {', '.join(sorted(templates))}" if templates else "none"
        raise UserError(f"no chat template is named {name!r}; this tokenizer has {names}")
    files = tokenizer.files()
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": templates[name]}
    return type(tokenizer).from_files(files | {"tokenizer_config.json": json.dumps(config).encode()})


def from_gguf(metadata: Mapping[str, Any]) -> PretrainedTokenizer:
    """The tokenizer in the metadata of a GGUF file: SentencePiece ("llama", "t5"), or what `gguf_vocabulary` reads.

    Raises:
      UserError: a vocabulary of another kind, or an incomplete one.
    """
    kind: Any = get("sentencepiece" if metadata.get("tokenizer.ggml.model") in ("llama", "t5") else "hub")
    return kind.from_gguf(metadata)


def exportable(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary in a form that other software reads, if it has one.

    bpe and unigram become a tokenizer.model, byte_bpe a tokenizer.json.
    """
    if tokenizer.kind == "byte_bpe":
        from llm_jax.tokenizers import export

        files = export.transformers_files(tokenizer, "gpt2")
        return from_files({name: content for name, content in files.items() if "/" not in name})
    if tokenizer.kind not in ("bpe", "unigram"):
        return tokenizer
    (model,) = tokenizer.files().values()
    return from_files({"tokenizer.model": model})


def load(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
      UserError: the directory has no tokenizer, or its files differ from those that were saved.
    """
    record = directory / "kind.json"
    try:
        saved = json.loads(record.read_text())
        files = {p.name: p.read_bytes() for p in directory.iterdir() if p.name != record.name}
        tokenizer, sha256 = (
            get(extensions.require_hash("tokenizer.kind", saved["kind"])).from_files(files),
            saved["sha256"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory}: no readable tokenizer here ({error})") from error
    if digest(tokenizer) != sha256:
        raise UserError(f"{directory}: the tokenizer's files have changed since they were saved; restore them")
    return tokenizer
