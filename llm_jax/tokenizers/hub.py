"""Tokenizers of other people, by the `tokenizers` library: tokenizer.json, and the vocabulary of a GGUF file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers.base import ends, in_bytes, laid_out
from llm_jax.tokenizers.byte import utf8

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What ggml calls the splitting of text before byte-pair merges: (single digits first, regular expressions that cut
# one after the other; without any, GPT-2's).
SPLITS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "gpt-2": (False, ()),
    "smollm": (True, ()),
    "llama-bpe": (False, (_LLAMA3,)),
    "qwen2": (False, (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    "default": (False, (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
}
# Other names that llama.cpp has for the same.
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
_WHOLE_FIRST = ("llama-bpe",)  # a word that is a token is that token, whatever the merges say
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPECIAL_IDS = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))


class HubTokenizer:
    """A tokenizer.json with the names of its special tokens and its chat template.

    Attributes:
      special: names of special tokens ("bos_token", ...), the chat template, and whether text begins with BOS.
      chat_template: Jinja source, or "" where there is none.
    """

    kind: ClassVar[str] = "hub"
    exact: ClassVar[bool] = False  # some normalize

    def __init__(self, text: str, special: Mapping[str, Any]):
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"tokenizer.json cannot be read ({error})") from error
        # All names, in one order: what is saved is loaded as the same tokenizer (`base.digest`).
        self.special: dict[str, Any] = {name: special.get(name) for name in (*_SPECIAL_TOKENS, "chat_template")}
        self.special["add_bos_token"] = bool(special.get("add_bos_token"))
        self.special |= other_ends(special, self.eos)
        self._text = text
        self.chat_template: str = special.get("chat_template") or ""
        self._by_bytes = '"ByteLevel"' in json.dumps(json.loads(text).get("pre_tokenizer"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def _id(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def regular_size(self) -> int:
        """Ids without those of added tokens."""
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
        """The id that stands for a hidden token, by its names in BERT's and RoBERTa's vocabularies."""
        found = (self._tokenizer.token_to_id(token) for token in ("[MASK]", "<mask>"))
        return next((index for index in found if index is not None), None)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        raise UserError(
            "tokenizer.kind=hub is read from other people's files, not trained; choose bpe, unigram, byte, ..."
        )

    def encode(self, text: str) -> list[int]:
        utf8(text)
        self._tokenizer.encode_special_tokens = True  # text that looks like a special token is text
        # Without offsets into the text, which take a quarter of the time.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a rendered chat template, whose special tokens are meant."""
        utf8(text)
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """The ids of `text` between the special tokens that the tokenizer itself puts around it ([CLS] text [SEP])."""
        utf8(text)
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def spans(self, text: str) -> list[tuple[int, int]]:
        size = len(utf8(text))
        self._tokenizer.encode_special_tokens = True
        found = self._tokenizer.encode(text, add_special_tokens=False)
        if (
            self._by_bytes
        ):  # a piece has a character for every byte; the offsets of its part of a character are the whole
            added = self._tokenizer.get_added_tokens_decoder()
            pieces = zip(found.ids, found.tokens, strict=True)
            laid = laid_out(len(utf8(added[i].content)) if i in added else len(piece) for i, piece in pieces)
            if (laid[-1][1] if laid else 0) == size:  # no space was put before the text
                return laid
        return in_bytes(text, found.offsets)

    def piece(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""

    @property
    def special_ids(self) -> dict[str, int]:
        """ "bos_token_id", "eos_token_id", ... as config.json has them."""
        found = {f"{name}_token_id": self._id(f"{name}_token") for name, _ in _SPECIAL_IDS}
        return {name: index for name, index in found.items() if index is not None and name != "unk_token_id"}

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._text.encode(), "tokenizer_config.json": json.dumps(self.special).encode()}

    @classmethod
    def from_files(cls, files: dict[str, bytes]) -> Self:
        """From tokenizer.json, and what `read_special` finds beside it."""
        if "tokenizer.json" not in files:
            raise UserError("no tokenizer.json here")
        special = read_special(files)
        adds = special["add_bos_token"]
        made = cls(files["tokenizer.json"].decode(), special | {"add_bos_token": True})
        if adds is None:  # then the post-processor says
            adds = made.bos is not None and made.encode_marked("")[:1] == [made.bos]
        made.special["add_bos_token"] = bool(adds)
        return made

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The inverse of `from_gguf`; ids that the vocabulary lacks up to `vocab_size` are marked unused.

        Raises:
          UserError: not a byte-level byte-pair tokenizer whose splitting has a name.
        """
        said = json.loads(self._text)
        model = said["model"]
        pre = _name_of_split(said.get("pre_tokenizer"))
        whole_first = bool(model.get("ignore_merges"))
        if model.get("type") != "BPE" or pre is None or said.get("normalizer") or whole_first != (pre in _WHOLE_FIRST):
            raise UserError("GGUF holds byte-level byte-pair vocabularies here; this tokenizer.json is of another kind")
        tokens = [self._tokenizer.id_to_token(i) or f"[PAD{i}]" for i in range(vocab_size)]
        added = {t["id"]: _CONTROL if t["special"] else _USER_DEFINED for t in said.get("added_tokens", [])}
        types = [added.get(i, 1 if self._tokenizer.id_to_token(i) is not None else 5) for i in range(vocab_size)]
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
        key = "tokenizer.ggml."
        found: dict[str, Any] = {
            key + "model": "gpt2",
            key + "pre": pre,
            key + "tokens": tokens,
            key + "token_type": types,
            key + "merges": merges,
            key + "add_bos_token": bool(self.special.get("add_bos_token")),
        }
        for name, theirs in _SPECIAL_IDS:
            if (index := self._id(f"{name}_token")) is not None:
                found[f"{key}{theirs}_token_id"] = index
        found |= write_ends(ends(self))
        return found | ({"tokenizer.chat_template": self.chat_template} if self.chat_template else {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """The byte-level byte-pair vocabulary of a GGUF file.

        Raises:
          UserError: a vocabulary of another kind, or one that is not whole.
        """
        try:
            return cls._from_gguf(metadata)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the vocabulary in the metadata makes no sense ({error})") from error

    @classmethod
    def _from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        key = "tokenizer.ggml."
        if (kind := metadata.get(key + "model")) != "gpt2":
            raise UserError(f"{key}model is {kind!r}; only 'gpt2', byte-level byte pairs, is read")
        pre = metadata.get(key + "pre", "default")
        pre = _SAME.get(pre, pre) if isinstance(pre, str) else pre
        if not isinstance(pre, str) or pre not in SPLITS:
            raise UserError(f"{key}pre is {pre!r}; expected one of {', '.join([*SPLITS, *_SAME])}")
        tokens, merges = metadata.get(key + "tokens"), metadata.get(key + "merges")
        if not isinstance(tokens, list) or not isinstance(merges, list) or len(set(tokens)) != len(tokens):
            raise UserError(f"{key}tokens and {key}merges are missing, or a token stands twice")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        known = set(tokens)
        if any(len(pair) != 2 or not known >= {pair[0], pair[1], "".join(pair)} for pair in pairs):
            raise UserError(f"{key}merges has a merge of what is not in the vocabulary")
        made = library.Tokenizer(
            library.models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=pre in _WHOLE_FIRST)
        )
        made.pre_tokenizer = _split(pre)
        made.decoder = library.decoders.ByteLevel()
        types = metadata.get(key + "token_type") or [1] * len(tokens)
        control = [t for t, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
        made.add_special_tokens([library.AddedToken(t, special=True, normalized=False) for t in control])
        own = [t for t, kind in zip(tokens, types, strict=False) if kind == _USER_DEFINED]
        made.add_tokens([library.AddedToken(t, normalized=False) for t in own])
        special: dict[str, Any] = {
            "chat_template": metadata.get("tokenizer.chat_template"),
            "add_bos_token": bool(metadata.get(key + "add_bos_token", pre == "llama-bpe")),
        }
        for name, theirs in _SPECIAL_IDS:
            index = metadata.get(f"{key}{theirs}_token_id")
            if isinstance(index, int) and 0 <= index < len(tokens):
                special[f"{name}_token"] = tokens[index]
        return cls(made.to_str(), special | read_ends(metadata))


def other_ends(special: Mapping[str, Any], eos: int | None) -> dict[str, list[int]]:
    """ "eos_ids" of `special` without EOS itself, where there are any."""
    found = [i for i in special.get("eos_ids") or () if i != eos]
    return {"eos_ids": found} if found else {}


def read_special(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `base.Foreign.special` says, by the files that are there; add_bos_token is None where none says it.

    tokenizer_config.json, chat_template.jinja; generation_config.json, or else config.json, may name several ids
    that end a text.

    Raises:
      UserError: such an id is no number.
    """
    said = json.loads(files.get("tokenizer_config.json", b"{}"))
    special: dict[str, Any] = {name: _text_of(said.get(name)) for name in _SPECIAL_TOKENS}
    template = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else said.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    special |= {"chat_template": template, "add_bos_token": said.get("add_bos_token")}
    for name in ("generation_config.json", "config.json"):
        if found := said.get("eos_ids") or _ids(name, json.loads(files.get(name, b"{}")).get("eos_token_id")):
            return special | {"eos_ids": found}
    return special


def _ids(name: str, said: Any) -> list[int]:
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise UserError(f"{name}: eos_token_id is {said!r}; expected an id or a list of ids")
    return [i for i in ids if i >= 0]


# GGUF's names of what ends a text besides EOS: the end of a turn, and of a message.
_ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom"))


def read_ends(metadata: Mapping[str, Any]) -> dict[str, list[int]]:
    """ "eos_ids" of a GGUF file's metadata, where it names others than EOS."""
    found = [metadata[key] for key in _ENDS if isinstance(metadata.get(key), int)]
    return {"eos_ids": found} if found else {}


def write_ends(ids: Sequence[int]) -> dict[str, int]:
    """The inverse of `read_ends`, of EOS and at most two others. Raises UserError for more."""
    if len(ids) > 1 + len(_ENDS):
        raise UserError(f"GGUF has names for {1 + len(_ENDS)} ids that end a text; this tokenizer has {len(ids)}")
    return dict(zip(_ENDS, ids[1:], strict=False))


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _split(name: str) -> Any:
    """The pre-tokenizer of a name of `SPLITS`."""
    digits, expressions = SPLITS[name]
    steps: list[Any] = [library.pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [library.pre_tokenizers.Split(library.Regex(expression), "isolated") for expression in expressions]
    steps.append(library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions))
    return library.pre_tokenizers.Sequence(steps)


def _name_of_split(said: Any) -> str | None:
    """The name of `SPLITS` that the pre_tokenizer of a tokenizer.json has, or None."""

    def steps(part: Any) -> list[Any]:
        parts = part["pretokenizers"] if part and part.get("type") == "Sequence" else [part]
        return [{k: v for k, v in p.items() if k != "trim_offsets"} for p in parts if p]

    for name in SPLITS:
        blank = library.Tokenizer(library.models.BPE())
        blank.pre_tokenizer = _split(name)
        if steps(json.loads(blank.to_str())["pre_tokenizer"]) == steps(said):
            return name
    return None
