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
      UserError: no readable tokenizer there.
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


def named_tokenizer(name: str, own: Tokenizer | None, chat_template: str = "") -> Tokenizer:
    """The tokenizer that the config key tokenizer.path names.

    Args:
      chat_template: see `tokenizers.with_chat_template`.
      own: the tokenizer of the checkpoint that a run resumes from or None; returned if `name` no longer exists.

    Raises:
      UserError: there is none, or it differs from that of the checkpoint.
    """
    if own and not location.is_remote(name) and not pathlib.Path(name).expanduser().exists():
        return own
    try:
        tokenizer = tokenizers.with_chat_template(load_tokenizer(name), chat_template)
    except UserError as error:
        expected = "a directory of train_tokenizer, tokenizer.json or tokenizer.model or where it is, or a checkpoint"
        raise UserError(f"tokenizer.path={name}: {error}; expected {expected}") from error
    check_tokenizer(name, tokenizer, own)
    return tokenizer


def check_tokenizer(name: str, named: Tokenizer, own: Tokenizer | None) -> None:
    """Raises UserError if tokenizer.path=`name` differs from the tokenizer `own` of the weights, if they have one."""
    if own and tokenizers.digest(named) != tokenizers.digest(own):
        raise UserError(
            f"tokenizer.path={name} is another tokenizer ({tokenizers.digest(named)[:12]}) than that of the weights "
            f"({tokenizers.digest(own)[:12]}), which they keep"
        )
