"""Pretrained tokenizers of the `tokenizers` library: tokenizer.json, and vocabularies of GGUF files."""

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.schema import other_libraries
from llm_jax.tokenizers import gguf_vocabulary, hub_files, hub_vocabulary
from llm_jax.tokenizers import special as special_tokens
from llm_jax.tokenizers.base import BuiltInTokenizer, byte_spans, consecutive_spans, eos_ids
from llm_jax.tokenizers.byte import utf8


class HubTokenizer(BuiltInTokenizer):
    """A tokenizer.json with the names of its special tokens and its chat template. See `base.PretrainedTokenizer`."""

    kind: ClassVar[str] = "hub"
    exact: ClassVar[bool] = False  # many normalize text

    def __init__(self, text: str, special: Mapping[str, Any]):
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"tokenizer.json cannot be read ({error})") from error
        self._text = text
        self._set_special(special)
        pre_tokenizer = self._tokenizer.pre_tokenizer  # its state is JSON, and shorter than `text`
        self._by_bytes = pre_tokenizer is not None and b'"ByteLevel"' in pre_tokenizer.__getstate__()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _set_special(self, special: Mapping[str, Any]) -> None:
        # All names, in one order, so that a saved tokenizer is loaded with the same digest.
        names = (*special_tokens.NAMES, "chat_template")
        self.special: dict[str, Any] = {name: special.get(name) for name in names}
        self.special["add_bos_token"] = bool(special.get("add_bos_token"))
        self.special |= special_tokens.without_eos(special, self.eos)

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def regular_size(self) -> int:
        """Number of ids without those of added tokens."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    @property
    def bos(self) -> int | None:
        return self._id("bos_token") if self.special.get("add_bos_token") else None

    @property
    def eos(self) -> int | None:
        return self._id("eos_token")

    @property
    def unk(self) -> int | None:
        return self._id("unk_token")

    @property
    def mask(self) -> int | None:
        """The id of the mask token, by its names in the vocabularies of BERT and RoBERTa."""
        ids = (self._tokenizer.token_to_id(token) for token in ("[MASK]", "<mask>"))
        return next((index for index in ids if index is not None), None)

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of added tokens whose names say that they end a text or a turn."""
        added = {token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items()}
        return special_tokens.ids_of_end_tokens(added.get)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        raise UserError("tokenizer.kind=hub is read from a checkpoint, not trained; choose bpe, unigram, byte, ...")

    @other_libraries.explain_unknown_keywords
    def encode(self, text: str) -> list[int]:
        utf8(text)
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        # Without offsets, which take a quarter of the time.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat, in which names of special tokens become their ids."""
        return self._encode_chat(text).ids

    def chat_offsets(self, text: str) -> list[tuple[int, int]]:
        """For each id of `encode_chat(text)`, the range of characters of `text` that it covers: (begin, end)."""
        return self._encode_chat(text).offsets

    def _encode_chat(self, text: str) -> library.Encoding:
        utf8(text)
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The ids of `text` with the special tokens that the tokenizer's post-processor adds ([CLS] text [SEP])."""
        utf8(text)
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text).ids

    @functools.cached_property
    def _misread(self) -> dict[int, str]:
        """Added tokens that the decoder takes for bytes, such as "café": {id: text}."""
        added = self._tokenizer.get_added_tokens_decoder() if self._by_bytes else {}
        texts = {index: token.content for index, token in added.items() if not token.special}
        return {index: text for index, text in texts.items() if self._tokenizer.decode([index]) != text}

    @other_libraries.explain_unknown_keywords
    def decode(self, ids: Sequence[int]) -> str:
        try:
            return self._decode(ids)
        except (TypeError, OverflowError) as error:
            raise UserError(
                "expected the ids of one text, a list of integers from 0; decode several texts one by one"
            ) from error

    def _decode(self, ids: Sequence[int]) -> str:
        cuts = [i for i, index in enumerate(ids) if index in self._misread] if self._misread else []
        text = ""
        for begin, end in itertools.pairwise([-1, *cuts, len(ids)]):
            text += self._tokenizer.decode(list(ids[begin + 1 : end]), skip_special_tokens=True)
            text += self._misread[ids[end]] if end < len(ids) else ""
        return text

    def spans(self, text: str) -> list[tuple[int, int]]:
        size = len(utf8(text))
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self._by_bytes:
            # A piece has one character per byte; the library's offsets cannot split a character.
            added = self._tokenizer.get_added_tokens_decoder()
            pieces = zip(encoding.ids, encoding.tokens, strict=True)
            spans = consecutive_spans(len(utf8(added[i].content)) if i in added else len(piece) for i, piece in pieces)
            if (spans[-1][1] if spans else 0) == size:  # no space was added before the text
                return spans
        return byte_spans(text, encoding.offsets)

    def piece(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""

    @property
    def special_ids(self) -> dict[str, int]:
        """ "bos_token_id", "eos_token_id", ... as in config.json."""
        ids = {f"{name}_token_id": self._id(f"{name}_token") for name, _ in special_tokens.GGUF_NAMES}
        return {name: index for name, index in ids.items() if index is not None and name != "unk_token_id"}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._text.encode(), "tokenizer_config.json": json.dumps(self.special).encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        """The inverse of `files`."""
        return cls(files["tokenizer.json"].decode(), json.loads(files["tokenizer_config.json"]))

    @classmethod
    def from_pretrained(cls, files: dict[str, bytes]) -> Self:
        """The tokenizer of a checkpoint: tokenizer.json, or else the vocabulary in other files, and `special.FILES`.

        Raises:
          UserError: no vocabulary, or files that cannot be read.
        """
        if "tokenizer.json" not in files:
            files = files | {"tokenizer.json": hub_vocabulary.tokenizer_json(files)}
        tokenizer = cls(hub_files.completed(files), {})
        special = special_tokens.read(files, tokenizer._tokenizer.token_to_id, tokenizer._tokenizer.id_to_token)
        add_bos = special["add_bos_token"]
        tokenizer._set_special(special | {"add_bos_token": True})
        if add_bos is None:  # the post-processor decides
            add_bos = tokenizer.bos is not None and tokenizer.encode_with_special_tokens("")[:1] == [tokenizer.bos]
        tokenizer.special["add_bos_token"] = bool(add_bos)
        return tokenizer

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The inverse of `from_gguf`; ids up to `vocab_size` that the vocabulary lacks are marked as unused.

        Raises:
          UserError: GGUF cannot represent the vocabulary.
        """
        metadata = gguf_vocabulary.write(self._tokenizer, vocab_size, bool(self.special.get("add_bos_token")))
        key = gguf_vocabulary.KEY
        for name, gguf_name in special_tokens.GGUF_NAMES:
            if (index := self._id(f"{name}_token")) is not None:
                metadata[f"{key}{gguf_name}_token_id"] = index
        metadata |= special_tokens.write_gguf_ends(eos_ids(self))
        return metadata | special_tokens.write_gguf_templates(self.special["chat_template"])

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The vocabulary of a GGUF file: byte-level BPE, BPE of Gemma 4, or WordPiece.

        Raises:
          UserError: a vocabulary of another kind, or an incomplete one.
        """
        return cls(*gguf_vocabulary.read(metadata))
