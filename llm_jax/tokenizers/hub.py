"""Pretrained tokenizers of the `tokenizers` library: tokenizer.json, and the byte-level BPE vocabulary of GGUF."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers import special as special_tokens
from llm_jax.tokenizers.base import eos_ids, in_bytes, laid_out
from llm_jax.tokenizers.byte import utf8

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GGUF's names of pre-tokenizers: (whether digits are split first, regular expressions that split one after the
# other; without any, GPT-2's).
SPLITS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "gpt-2": (False, ()),
    "smollm": (True, ()),
    "llama-bpe": (False, (_LLAMA3,)),
    "qwen2": (False, (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    "default": (False, (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
}
# Other names that llama.cpp has for the same pre-tokenizers.
_SAME = {
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
    "mpt": "gpt-2",
    "starcoder": "smollm",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2",
}
_WHOLE_FIRST = ("llama-bpe",)  # a word that is a token stays whole, whatever the merges
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


class HubTokenizer:
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
        self._by_bytes = '"ByteLevel"' in json.dumps(json.loads(text).get("pre_tokenizer"))
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
    def named_ends(self) -> list[int]:
        """Ids of added tokens whose names say that they end a text or a turn."""
        added = {token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items()}
        return special_tokens.named_ends(added.get)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        raise UserError("tokenizer.kind=hub is read from a checkpoint, not trained; choose bpe, unigram, byte, ...")

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

    def encode_marked(self, text: str) -> list[int]:
        """The ids of `text` with the special tokens that the tokenizer's post-processor adds ([CLS] text [SEP])."""
        utf8(text)
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def spans(self, text: str) -> list[tuple[int, int]]:
        size = len(utf8(text))
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self._by_bytes:
            # A piece has one character per byte; the library's offsets cannot split a character.
            added = self._tokenizer.get_added_tokens_decoder()
            pieces = zip(encoding.ids, encoding.tokens, strict=True)
            spans = laid_out(len(utf8(added[i].content)) if i in added else len(piece) for i, piece in pieces)
            if (spans[-1][1] if spans else 0) == size:  # no space was added before the text
                return spans
        return in_bytes(text, encoding.offsets)

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
        """The tokenizer of a checkpoint: tokenizer.json, and `special.FILES` beside it.

        Raises:
          UserError: no tokenizer.json, or files that cannot be read.
        """
        if "tokenizer.json" not in files:
            raise UserError("no tokenizer.json here")
        tokenizer = cls(files["tokenizer.json"].decode(), {})
        special = special_tokens.read(files, tokenizer._tokenizer.token_to_id, tokenizer._tokenizer.id_to_token)
        add_bos = special["add_bos_token"]
        tokenizer._set_special(special | {"add_bos_token": True})
        if add_bos is None:  # the post-processor decides
            add_bos = tokenizer.bos is not None and tokenizer.encode_marked("")[:1] == [tokenizer.bos]
        tokenizer.special["add_bos_token"] = bool(add_bos)
        return tokenizer

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The inverse of `from_gguf`; ids up to `vocab_size` that the vocabulary lacks are marked as unused.

        Raises:
          UserError: not byte-level BPE, or a pre-tokenizer that GGUF has no name for.
        """
        state = json.loads(self._text)
        model = state["model"]
        pre = _name_of_split(state.get("pre_tokenizer"))
        whole_first = bool(model.get("ignore_merges"))
        if model.get("type") != "BPE" or pre is None or state.get("normalizer") or whole_first != (pre in _WHOLE_FIRST):
            raise UserError(
                "tokenizer.json cannot become GGUF: expected byte-level BPE with a pre-tokenizer that GGUF names"
            )
        tokens = [self._tokenizer.id_to_token(i) or f"[PAD{i}]" for i in range(vocab_size)]
        added = {t["id"]: _CONTROL if t["special"] else _USER_DEFINED for t in state.get("added_tokens", [])}
        types = [added.get(i, 1 if self._tokenizer.id_to_token(i) is not None else 5) for i in range(vocab_size)]
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
        key = "tokenizer.ggml."
        metadata: dict[str, Any] = {
            key + "model": "gpt2",
            key + "pre": pre,
            key + "tokens": tokens,
            key + "token_type": types,
            key + "merges": merges,
            key + "add_bos_token": bool(self.special.get("add_bos_token")),
        }
        for name, gguf_name in special_tokens.GGUF_NAMES:
            if (index := self._id(f"{name}_token")) is not None:
                metadata[f"{key}{gguf_name}_token_id"] = index
        metadata |= special_tokens.write_gguf_ends(eos_ids(self))
        template = self.special["chat_template"]
        return metadata | ({"tokenizer.chat_template": template} if template else {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The byte-level BPE vocabulary of a GGUF file.

        Raises:
          UserError: a vocabulary of another kind, or an incomplete one.
        """
        try:
            return cls._from_gguf(metadata)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the vocabulary in the metadata is malformed ({error})") from error

    @classmethod
    def _from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        key = "tokenizer.ggml."
        if (kind := metadata.get(key + "model")) != "gpt2":
            raise UserError(f"{key}model is {kind!r}; expected 'gpt2', byte-level BPE, or 'llama'")
        pre = metadata.get(key + "pre", "default")
        pre = _SAME.get(pre, pre) if isinstance(pre, str) else pre
        if not isinstance(pre, str) or pre not in SPLITS:
            raise UserError(f"{key}pre is {pre!r}; expected one of {', '.join([*SPLITS, *_SAME])}")
        tokens, merges = metadata.get(key + "tokens"), metadata.get(key + "merges")
        if not isinstance(tokens, list) or not isinstance(merges, list) or len(set(tokens)) != len(tokens):
            raise UserError(f"{key}tokens or {key}merges is missing, or a token occurs twice")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        known = set(tokens)
        if any(len(pair) != 2 or not known >= {pair[0], pair[1], "".join(pair)} for pair in pairs):
            raise UserError(f"{key}merges has a merge of tokens that the vocabulary lacks")
        tokenizer = library.Tokenizer(
            library.models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=pre in _WHOLE_FIRST)
        )
        tokenizer.pre_tokenizer = _split(pre)
        tokenizer.decoder = library.decoders.ByteLevel()
        types = metadata.get(key + "token_type") or [1] * len(tokens)
        control = [t for t, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
        tokenizer.add_special_tokens([library.AddedToken(t, special=True, normalized=False) for t in control])
        added = [t for t, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
        tokenizer.add_tokens([library.AddedToken(t, normalized=False) for t in added])
        special: dict[str, Any] = {
            "chat_template": metadata.get("tokenizer.chat_template"),
            "add_bos_token": bool(metadata.get(key + "add_bos_token", pre == "llama-bpe")),
        }
        for name, gguf_name in special_tokens.GGUF_NAMES:
            index = metadata.get(f"{key}{gguf_name}_token_id")
            if isinstance(index, int) and 0 <= index < len(tokens):
                special[f"{name}_token"] = tokens[index]
        return cls(tokenizer.to_str(), special | special_tokens.read_gguf_ends(metadata))


def _split(name: str) -> Any:
    """The pre-tokenizer of a name in `SPLITS`."""
    digits, expressions = SPLITS[name]
    steps: list[Any] = [library.pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [library.pre_tokenizers.Split(library.Regex(expression), "isolated") for expression in expressions]
    steps.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions))
    return library.pre_tokenizers.Sequence(steps)


def _name_of_split(pre_tokenizer: Any) -> str | None:
    """The name in `SPLITS` of the pre-tokenizer of a tokenizer.json, or None."""

    def steps(part: Any) -> list[Any]:
        parts = part["pretokenizers"] if part and part.get("type") == "Sequence" else [part]
        return [{k: v for k, v in p.items() if k != "trim_offsets"} for p in parts if p]

    for name in SPLITS:
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = _split(name)
        if steps(json.loads(tokenizer.to_str())["pre_tokenizer"]) == steps(pre_tokenizer):
            return name
    return None
