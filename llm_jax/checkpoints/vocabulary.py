"""Tokenizers by name: that of a checkpoint, or one in a directory or file by itself."""

import os
import pathlib

from llm_jax import tokenizers
from llm_jax.checkpoints import location, opening, peft
from llm_jax.errors import UserError
from llm_jax.tokenizers import Tokenizer, special


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint, without its model, or a tokenizer by itself.

    Args:
      name: what `llm_jax.load` takes; a directory that `llm_jax.train_tokenizer` wrote; a tokenizer.json or
        tokenizer.model; or a directory that contains one.

    Raises:
      UserError: `name` has no readable tokenizer.
    """
    path = location.resolve(name)
    if (path / "kind.json").is_file():
        return tokenizers.load(path)
    if path.is_file() and path.name in tokenizers.PRETRAINED_FILES:
        return tokenizers.from_directory(path.parent, path.name)
    names = (*tokenizers.PRETRAINED_FILES, *special.OLDER_VOCABULARIES)
    if any((path / file).is_file() for file in names) and not peft.Peft.matches(path):
        return tokenizers.from_directory(path)
    return opening.open(name).tokenizer


def named_tokenizer(name: str, stored: Tokenizer | None, chat_template: str = "") -> Tokenizer:
    """The tokenizer that the config key tokenizer.path names.

    Args:
      stored: the tokenizer of the checkpoint that a run resumes from, or None. It is returned if `name` no longer
        exists.
      chat_template: see `tokenizers.with_chat_template`.

    Raises:
      UserError: there is no such tokenizer, or it differs from that of the checkpoint.
    """
    if stored and not location.is_remote(name) and not pathlib.Path(name).expanduser().exists():
        return stored
    try:
        tokenizer = tokenizers.with_chat_template(load_tokenizer(name), chat_template)
    except UserError as error:
        reason = str(error).split("; expected")[0].removeprefix(f"{name}: ")  # it names only forms of checkpoints
        expected = "a directory of train_tokenizer, a tokenizer.json or tokenizer.model, its directory, or a checkpoint"
        raise UserError(f"tokenizer.path={name}: {reason}; expected {expected}") from error
    check_tokenizer(name, tokenizer, stored)
    return tokenizer


def check_tokenizer(name: str, named: Tokenizer, stored: Tokenizer | None) -> None:
    """Raises UserError if tokenizer.path=`name` differs from the tokenizer `stored` with the weights, if there is one.

    Args:
      named: the tokenizer that `name` names.
    """
    if stored and tokenizers.digest(named) != tokenizers.digest(stored):
        raise UserError(
            f"tokenizer.path={name} ({tokenizers.digest(named)[:12]}) differs from the tokenizer of the weights "
            f"({tokenizers.digest(stored)[:12]}), which must not change"
        )
