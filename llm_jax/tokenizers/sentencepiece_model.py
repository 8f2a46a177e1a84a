"""Other people's sentencepiece vocabularies: tokenizer.model, and the "llama" vocabulary of a GGUF file."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import sentencepiece
import sentencepiece.sentencepiece_model_pb2

from llm_jax.errors import UserError
from llm_jax.tokenizers.base import ends, in_bytes
from llm_jax.tokenizers.byte import utf8
from llm_jax.tokenizers.hub import other_ends, read_ends, read_special, write_ends

proto: Any = sentencepiece.sentencepiece_model_pb2  # made at import, so unknown to type checkers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # the same in GGUF and in sentencepiece
_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))  # ours, GGUF's
_GGML = "tokenizer.ggml."


class ModelTokenizer:
    """A sentencepiece model with the names of its special tokens and its chat template. See `base.Foreign`."""

    kind: ClassVar[str] = "sentencepiece"
    exact: ClassVar[bool] = False  # most normalize, and drop a leading space

    def __init__(self, model: bytes, special: Mapping[str, Any]):
        try:
            self._proto = proto.ModelProto.FromString(model)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf and sentencepiece have errors of their own
            reason = str(error).strip().splitlines()[-1:] or ["not of its format"]
            raise UserError(f"the sentencepiece model cannot be read ({reason[0]})") from error
        if not self._proto.pieces:
            raise UserError("the sentencepiece model cannot be read (it has no pieces)")
        self._model, self.special = model, dict(special)
        # Marks that a rendered chat may hold, and text never becomes; those past the model stand in the config.
        self._marks = {p.piece: i for i, p in enumerate(self._proto.pieces) if p.type == _CONTROL}
        self._marks |= special.get("added_tokens") or {}
        self._shown = {i: token for token, i in self._marks.items()}
        marks = "|".join(map(re.escape, sorted(self._marks, key=len, reverse=True)))
        self._cut = re.compile(f"({marks})" if marks else r"(?!)()")
        self.special = {k: v for k, v in special.items() if k != "eos_ids"} | other_ends(special, self.eos)

    def _id(self, name: str) -> int | None:
        token = self.special.get(f"{name}_token")
        if token is not None:
            found = self._marks.get(token, self._pieces.piece_to_id(token))
            return None if found == self._pieces.unk_id() and name != "unk" else found
        own = getattr(self._pieces, f"{name}_id")()
        return own if own >= 0 else None

    @property
    def vocab_size(self) -> int:
        return max([self.regular_size - 1, *self._marks.values()]) + 1

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
        """None where what has no piece is spelled out in bytes."""
        return None if self._proto.trainer_spec.byte_fallback else self._pieces.unk_id()

    @property
    def special_ids(self) -> dict[str, int]:
        found = {f"{name}_token_id": self._id(name) for name, _ in _SPECIAL if name != "unk"}
        return {name: index for name, index in found.items() if index is not None}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        raise UserError("tokenizer.kind=sentencepiece is read from other people's files; to train one, bpe or unigram")

    def encode(self, text: str) -> list[int]:
        utf8(text)
        return self._pieces.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        utf8(text)
        parts = [part for part in self._cut.split(text) if part]
        return [i for p in parts for i in ([self._marks[p]] if p in self._marks else self._pieces.encode(p))]

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids if 0 <= i < self.regular_size and i not in self._shown])

    def spans(self, text: str) -> list[tuple[int, int]]:
        utf8(text)
        found = self._pieces.encode(text, return_type="offset_mapping")
        return in_bytes(text, found["offsets"])

    def piece(self, index: int) -> str:
        if index in self._shown:
            return self._shown[index]
        return self._pieces.id_to_piece(int(index)).replace("\u2581", " ") if index < self.regular_size else ""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model, "tokenizer_config.json": json.dumps(self.special).encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        """From tokenizer.model, and what `read_special` finds beside it."""
        said = json.loads(files.get("tokenizer_config.json", b"{}"))
        special = read_special(files)
        adds = special["add_bos_token"]
        added = said.get("added_tokens") or {
            token["content"]: int(index) for index, token in said.get("added_tokens_decoder", {}).items()
        }
        # Llama's own files leave it out and mean it so.
        return cls(files["tokenizer.model"], special | {"add_bos_token": adds is not False, "added_tokens": added})

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        if (
            self._proto.trainer_spec.model_type != proto.TrainerSpec.BPE
            or self._proto.normalizer_spec.precompiled_charsmap
        ):
            raise UserError(
                "GGUF's 'llama' vocabularies are byte pairs of text as it is; this model is of another kind"
            )
        pieces = [(p.piece, p.score, p.type) for p in self._proto.pieces]
        pieces += [
            (self._shown[i], 0.0, _CONTROL) if i in self._shown else (f"[PAD{i}]", 0.0, _UNUSED)
            for i in range(len(pieces), vocab_size)
        ]
        found: dict[str, Any] = {
            _GGML + "model": "llama",
            _GGML + "tokens": [piece for piece, _, _ in pieces],
            _GGML + "scores": [score for _, score, _ in pieces],
            _GGML + "token_type": [kind for _, _, kind in pieces],
            _GGML + "add_bos_token": bool(self.special.get("add_bos_token")),
            _GGML + "add_space_prefix": self._proto.normalizer_spec.add_dummy_prefix,
            _GGML + "remove_extra_whitespaces": self._proto.normalizer_spec.remove_extra_whitespaces,
        }
        for name, theirs in _SPECIAL:
            if (index := self._id(name)) is not None:
                found[f"{_GGML}{theirs}_token_id"] = index
        found |= write_ends(ends(self))
        template = self.special.get("chat_template")
        return found | ({"tokenizer.chat_template": template} if template else {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The "llama" vocabulary of a GGUF file: byte pairs merged by score, and bytes for what has no piece.

        Raises:
          UserError: a vocabulary of another kind, or one that is not whole.
        """
        if (kind := metadata.get(_GGML + "model")) != "llama":
            raise UserError(f"{_GGML}model is {kind!r}; expected 'llama'")
        tokens, scores, types = (metadata.get(_GGML + name) for name in ("tokens", "scores", "token_type"))
        if not (isinstance(tokens, list) and isinstance(scores, list) and isinstance(types, list)):
            raise UserError(f"{_GGML}tokens, scores and token_type are needed for a vocabulary of the kind 'llama'")
        if not len(tokens) == len(scores) == len(types):
            raise UserError(f"{_GGML}tokens, scores and token_type are {len(tokens)}, {len(scores)}, {len(types)} long")
        special: dict[str, Any] = {
            "chat_template": metadata.get("tokenizer.chat_template"),
            "add_bos_token": bool(metadata.get(_GGML + "add_bos_token", True)),
        }
        try:
            made = proto.ModelProto()
            for token, score, kind in zip(tokens, scores, types, strict=True):
                made.pieces.add(piece=token, score=score, type=kind)
            for name, theirs in _SPECIAL:
                index = metadata.get(f"{_GGML}{theirs}_token_id")
                if isinstance(index, int) and 0 <= index < len(tokens):
                    special[f"{name}_token"] = tokens[index]
                    setattr(made.trainer_spec, f"{name}_piece", tokens[index])
            unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
            if unknown:
                made.trainer_spec.unk_piece = unknown[0]
            made.trainer_spec.model_type = proto.TrainerSpec.BPE
            made.trainer_spec.byte_fallback = _BYTE in types
            made.normalizer_spec.name = "identity"
            made.normalizer_spec.add_dummy_prefix = bool(metadata.get(_GGML + "add_space_prefix", True))
            made.normalizer_spec.remove_extra_whitespaces = bool(
                metadata.get(_GGML + "remove_extra_whitespaces", False)
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"the vocabulary in the metadata makes no sense ({error})") from error
        return cls(made.SerializeToString(), special | read_ends(metadata))
