"""Pretrained SentencePiece vocabularies: tokenizer.model, and the vocabularies "llama" and "t5" of GGUF."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import sentencepiece
import sentencepiece.sentencepiece_model_pb2

from llm_jax.errors import UserError
from llm_jax.schema import other_libraries
from llm_jax.tokenizers import special as special_tokens
from llm_jax.tokenizers.base import BuiltInTokenizer, byte_spans, eos_ids
from llm_jax.tokenizers.byte import utf8

proto: Any = sentencepiece.sentencepiece_model_pb2  # made at import, so unknown to type checkers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # the same in GGUF and in sentencepiece
_SPACE = "\u2581"  # represents a space in a piece
_GGML = "tokenizer.ggml."
_CHARSMAP = f"{_GGML}precompiled_charsmap"  # the normalization of a unigram vocabulary, uint8


class SentencePieceTokenizer(BuiltInTokenizer):
    """A SentencePiece model with its special tokens and its chat template. See `base.PretrainedTokenizer`."""

    kind: ClassVar[str] = "sentencepiece"
    exact: ClassVar[bool] = False  # most normalize text, and drop a leading space

    def __init__(self, model: bytes, special: Mapping[str, Any]):
        try:
            self._proto = proto.ModelProto.FromString(model)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf and sentencepiece raise errors of several types
            reason = str(error).strip().splitlines()[-1:] or ["unknown format"]
            raise UserError(f"the sentencepiece model cannot be read ({reason[0]})") from error
        if not self._proto.pieces:
            raise UserError("the sentencepiece model cannot be read (it has no pieces)")
        self._model = model
        # Special tokens, which a rendered chat may contain and text never becomes; added ones follow the model's ids.
        self._special = {p.piece: i for i, p in enumerate(self._proto.pieces) if p.type == _CONTROL}
        self._special |= special.get("added_tokens") or {}
        self._names = {i: token for token, i in self._special.items()}
        names = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        self._split = re.compile(f"({names})" if names else r"(?!)()")
        self._set_special(special)

    def _set_special(self, special: Mapping[str, Any]) -> None:
        self.special: dict[str, Any] = dict(special)
        ends = special_tokens.without_eos(special, self.eos)
        self.special = {name: value for name, value in special.items() if name != "eos_ids"} | ends

    def _id(self, name: str) -> int | None:
        token = self.special.get(f"{name}_token")
        if token is not None:
            index = self._special.get(token, self._pieces.piece_to_id(token))
            return None if index == self._pieces.unk_id() and name != "unk" else index
        index = getattr(self._pieces, f"{name}_id")()
        return index if index >= 0 else None

    def _index(self, token: str) -> int | None:
        """The id of a token, or None."""
        index = self._special.get(token, self._pieces.piece_to_id(token))
        return None if index == self._pieces.unk_id() and token != self._pieces.id_to_piece(index) else index

    @property
    def vocab_size(self) -> int:
        return max([self.regular_size - 1, *self._special.values()]) + 1

    @property
    def regular_size(self) -> int:
        return self._pieces.vocab_size()

    @property
    def bos(self) -> int | None:
        return self._id("bos") if self.special.get("add_bos_token") else None

    @property
    def eos(self) -> int | None:
        return self._id("eos")

    @property
    def unk(self) -> int | None:
        """None where characters without a piece are encoded as bytes."""
        return None if self._proto.trainer_spec.byte_fallback else self._pieces.unk_id()

    @property
    def special_ids(self) -> dict[str, int]:
        ids = {f"{name}_token_id": self._id(name) for name, _ in special_tokens.GGUF_NAMES if name != "unk"}
        return {name: index for name, index in ids.items() if index is not None}

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of special and user-defined tokens whose names say that they end a text or a turn."""
        pieces = enumerate(self._proto.pieces)
        tokens = {piece.piece: index for index, piece in pieces if piece.type == _USER_DEFINED} | self._special
        return special_tokens.ids_of_end_tokens(tokens.get)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        raise UserError("tokenizer.kind=sentencepiece is read from a checkpoint, not trained; choose bpe or unigram")

    @other_libraries.explain_unknown_keywords
    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self._pieces.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat, in which names of special tokens become their ids."""
        utf8(text)
        parts = [part for part in self._split.split(text) if part]
        return [i for p in parts for i in ([self._special[p]] if p in self._special else self._pieces.encode(p))]

    def chat_offsets(self, text: str) -> list[tuple[int, int]]:
        """For each id of `encode_chat(text)`, the range of characters of `text` that it covers: (begin, end)."""
        utf8(text)
        offsets, begin = [], 0
        for part in self._split.split(text):
            if part in self._special:
                offsets.append((begin, begin + len(part)))
            elif part:
                spans = self._pieces.encode(part, return_type="offset_mapping")["offsets"]
                offsets += [(begin + first, begin + last) for first, last in spans]
            begin += len(part)
        return offsets

    @other_libraries.explain_unknown_keywords
    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids if 0 <= i < self.regular_size and i not in self._names])

    def spans(self, text: str) -> list[tuple[int, int]]:
        utf8(text)
        return byte_spans(text, self._pieces.encode(text, return_type="offset_mapping")["offsets"])

    def piece(self, index: int) -> str:
        if index in self._names:
            return self._names[index]
        return self._pieces.id_to_piece(int(index)).replace("\u2581", " ") if index < self.regular_size else ""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model, "tokenizer_config.json": json.dumps(self.special).encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        """The inverse of `files`."""
        return cls(files["tokenizer.model"], json.loads(files["tokenizer_config.json"]))

    @classmethod
    def from_pretrained(cls, files: dict[str, bytes]) -> Self:
        """The tokenizer of a checkpoint: tokenizer.model, and `special.FILES` beside it.

        Raises:
          UserError: files that cannot be read.
        """
        config = special_tokens.parse(files, "tokenizer_config.json")
        try:
            added = config.get("added_tokens") or {
                token["content"]: int(index) for index, token in config.get("added_tokens_decoder", {}).items()
            }
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"tokenizer_config.json: 'added_tokens_decoder' is damaged ({error!r})") from error
        added = special_tokens.parse(files, "added_tokens.json") | added
        tokenizer = cls(files["tokenizer.model"], {"added_tokens": added})
        own_names = [f"{name}_token" for name, _ in special_tokens.GGUF_NAMES if tokenizer._id(name) is not None]
        special = special_tokens.read(files, tokenizer._index, lambda i: tokenizer.piece(i) or None, own_names)
        # Llama's files leave add_bos_token out and mean true.
        tokenizer._set_special(
            special | {"add_bos_token": special["add_bos_token"] is not False, "added_tokens": added}
        )
        return tokenizer

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The ids of `text` between BOS and, where the metadata of a GGUF file add it, EOS."""
        ids = [*([] if self.bos is None else [self.bos]), *self.encode(text)]
        return [*ids, self.eos] if self.special.get("add_eos_token") and self.eos is not None else ids

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        trainer, normalizer = self._proto.trainer_spec, self._proto.normalizer_spec
        unigram = trainer.model_type == proto.TrainerSpec.UNIGRAM and not trainer.byte_fallback
        bpe = trainer.model_type == proto.TrainerSpec.BPE and not normalizer.precompiled_charsmap
        if not (unigram or bpe):
            raise UserError(
                "tokenizer.model cannot become GGUF: expected BPE without normalization, or unigram without bytes"
            )
        pieces = [(p.piece, p.score, p.type) for p in self._proto.pieces]
        pieces += [
            (self._names[i], 0.0, _CONTROL) if i in self._names else (f"[PAD{i}]", 0.0, _UNUSED)
            for i in range(len(pieces), vocab_size)
        ]
        # llama.cpp finds user-defined tokens in the text as it is; sentencepiece finds none that has a space.
        pieces = [
            (piece.replace(_SPACE, " "), score, _UNUSED if " " in piece else kind)
            if kind == _USER_DEFINED
            else (piece, score, kind)
            for piece, score, kind in pieces
        ]
        metadata: dict[str, Any] = {
            _GGML + "model": "t5" if unigram else "llama",
            _GGML + "tokens": [piece for piece, _, _ in pieces],
            _GGML + "scores": [score for _, score, _ in pieces],
            _GGML + "token_type": [kind for _, _, kind in pieces],
            _GGML + "add_bos_token": bool(self.special.get("add_bos_token")),
            _GGML + "add_space_prefix": normalizer.add_dummy_prefix,
            _GGML + "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        }
        if unigram:
            metadata[_GGML + "add_eos_token"] = bool(self.special.get("add_eos_token"))
        if normalizer.precompiled_charsmap:
            metadata[_CHARSMAP] = list(np.frombuffer(normalizer.precompiled_charsmap, np.uint8))
        for name, gguf_name in special_tokens.GGUF_NAMES:
            if (index := self._id(name)) is not None:
                metadata[f"{_GGML}{gguf_name}_token_id"] = index
        metadata |= special_tokens.write_gguf_ends(eos_ids(self))
        return metadata | special_tokens.write_gguf_templates(self.special.get("chat_template"))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The vocabulary "llama" of a GGUF file, BPE merged by score, with byte fallback; or "t5", unigram.

        Raises:
          UserError: a vocabulary of another kind, or an incomplete one.
        """
        if (form := metadata.get(_GGML + "model")) not in ("llama", "t5"):
            raise UserError(f"{_GGML}model is {form!r}; expected 'llama' or 't5'")
        tokens, scores, types = (metadata.get(_GGML + name) for name in ("tokens", "scores", "token_type"))
        if not (isinstance(tokens, list) and isinstance(scores, list) and isinstance(types, list)):
            raise UserError(f"{_GGML}tokens, scores and token_type are needed for a vocabulary of the kind {form!r}")
        if not len(tokens) == len(scores) == len(types):
            raise UserError(f"{_GGML}tokens, scores and token_type are {len(tokens)}, {len(scores)}, {len(types)} long")
        special: dict[str, Any] = {
            "chat_template": special_tokens.read_gguf_templates(metadata),
            "add_bos_token": bool(metadata.get(_GGML + "add_bos_token", form == "llama")),
        }
        if form == "t5":
            special["add_eos_token"] = bool(metadata.get(_GGML + "add_eos_token", True))
        try:
            model = proto.ModelProto()
            types = special_tokens.mark_end_tokens(tokens, types, _NORMAL, _CONTROL)
            unknown = _unknown_id(metadata, types)
            for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
                # llama.cpp finds user-defined tokens in the text as it is, sentencepiece after it has escaped spaces.
                piece = token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
                kind = _UNKNOWN if index == unknown else _UNUSED if kind == _UNKNOWN else kind
                model.pieces.add(piece=piece, score=score, type=kind)
            for name, gguf_name in special_tokens.GGUF_NAMES:
                token_id = metadata.get(f"{_GGML}{gguf_name}_token_id")
                if isinstance(token_id, int) and 0 <= token_id < len(tokens):
                    special[f"{name}_token"] = tokens[token_id]
                    setattr(model.trainer_spec, f"{name}_piece", tokens[token_id])
            if unknown is not None:
                model.trainer_spec.unk_piece = model.pieces[unknown].piece
            model.trainer_spec.model_type = getattr(proto.TrainerSpec, "BPE" if form == "llama" else "UNIGRAM")
            model.trainer_spec.byte_fallback = _BYTE in types
            model.normalizer_spec.name = "identity"
            model.normalizer_spec.precompiled_charsmap = bytes(int(byte) % 256 for byte in metadata.get(_CHARSMAP, ()))
            model.normalizer_spec.add_dummy_prefix = bool(metadata.get(_GGML + "add_space_prefix", form == "llama"))
            model.normalizer_spec.remove_extra_whitespaces = bool(
                metadata.get(_GGML + "remove_extra_whitespaces", False)
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"the vocabulary in the metadata is malformed ({error})") from error
        return cls(model.SerializeToString(), special | special_tokens.read_gguf_ends(metadata))


def _unknown_id(metadata: Mapping[str, Any], types: Sequence[int]) -> int | None:
    """The id of the unknown token; several tokens may have its type, as padding has in some files."""
    index = metadata.get(f"{_GGML}unknown_token_id")
    if isinstance(index, int) and 0 <= index < len(types):
        return index
    return next((i for i, kind in enumerate(types) if kind == _UNKNOWN), None)
