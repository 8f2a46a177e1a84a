"""The vocabulary of a tokenizer.json <-> the metadata of a GGUF file.

`read` and `write` convert byte-level BPE ("gpt2"), BPE on UTF-8 with byte fallback ("gemma4") and WordPiece ("bert").
SentencePiece-like BPE is written as "llama", which `sentencepiece_model` reads: as in SentencePiece, a space is then
added also before a text that begins with one, where the pre-tokenizer Metaspace adds none.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers import pre_tokenizers, special

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types; the same numbers in sentencepiece
KEY = "tokenizer.ggml."
SPACE = "\u2581"  # represents a space in a piece
Written = dict[str, Any] | None  # keys below `KEY`; None for a vocabulary of another form
_CONTINUES = "##"  # begins a WordPiece that does not begin a word
# Pre-tokenizers of model "gpt2" whose vocabularies have the form of Gemma 4's -> whether texts begin with BOS even if
# the file denies it.
_UTF8 = {"gemma4": True, "granite-embed-multi-311m": True, "sarvam-moe": False}
_NFC = {"type": "NFC"}
_SPACE_TO_SYMBOL = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_SPLIT_AT_SPACE = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# Keys of the special tokens of WordPiece -> their usual names. (GGUF's own spelling of separator; llama.cpp reads the
# id of [CLS] from bos_token_id.)
_BERT_SPECIAL = {
    "bos_token_id": "[CLS]",
    "cls_token_id": "[CLS]",
    "seperator_token_id": "[SEP]",
    "unknown_token_id": "[UNK]",
    "padding_token_id": "[PAD]",
    "mask_token_id": "[MASK]",
}


def read(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(tokenizer.json, special tokens as in `hub.HubTokenizer.special`) of the metadata of a file.

    Raises:
      UserError: a vocabulary of another kind, or an incomplete one.
    """
    kind = metadata.get(KEY + "model")
    if kind == "gpt2" and str(metadata.get(KEY + "pre")) in _UTF8:
        kind = "gemma4"
    if not isinstance(kind, str) or kind not in _READERS:
        expected = (
            "'gpt2' (byte-level BPE), 'llama', 'gemma4' (BPE with byte fallback), 't5' (unigram), 'bert' (WordPiece)"
        )
        raise UserError(f"{KEY}model is {kind!r}; expected {expected}")
    try:
        tokens, types = _tokens(metadata)
        tokenizer, add_bos = _READERS[kind](metadata, tokens, types)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the vocabulary in the metadata is malformed ({error})") from error
    pairs = list(zip(tokens, types, strict=True))
    control = [token for token, kind in pairs if kind == CONTROL]
    tokenizer.add_special_tokens([library.AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.add_tokens([library.AddedToken(t, normalized=False) for t, kind in pairs if kind == USER_DEFINED])
    tokens_by_name = {
        f"{name}_token": tokens[index]
        for name, gguf_name in special.GGUF_NAMES
        if (kind != "bert" or name in ("unk", "pad"))  # text has the marks of `encode_with_special_tokens` only
        and (index := token_id(metadata, f"{gguf_name}_token_id", len(tokens))) is not None
    }
    names = {"chat_template": special.read_gguf_templates(metadata), "add_bos_token": add_bos, **tokens_by_name}
    return tokenizer.to_str(), names | special.read_gguf_ends(metadata)


def token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    """The id at the key `name` below tokenizer.ggml, or None if it is not one of `count` ids."""
    index = metadata.get(KEY + name)
    return index if isinstance(index, int) and 0 <= index < count else None


def _tokens(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types. Tokens whose names say that they end a text are control tokens (llama.cpp's rule)."""
    tokens = metadata.get(KEY + "tokens")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise UserError(f"{KEY}tokens is missing, or a token occurs twice")
    tokens = [token if token != "" else f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = list(metadata.get(KEY + "token_type") or [NORMAL] * len(tokens))
    if len(types) < len(tokens):
        raise UserError(f"{KEY}token_type has {len(types)} entries for {len(tokens)} tokens")
    return tokens, special.mark_end_tokens(tokens, types[: len(tokens)], NORMAL, CONTROL)


def _merges(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[tuple[str, str]]:
    merges = metadata.get(KEY + "merges")
    if not isinstance(merges, list):
        raise UserError(f"{KEY}merges is missing")
    cuts = [merge.find(" ", 1) for merge in merges]
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]
    known = set(tokens)
    if min(cuts, default=0) < 0 or any(not known >= {a, b, a + b} for a, b in pairs):
        raise UserError(f"{KEY}merges has a merge of tokens that the vocabulary lacks")
    return pairs


def _read_byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[library.Tokenizer, bool]:
    name = metadata.get(KEY + "pre", "default")
    name = pre_tokenizers.canonical(name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in pre_tokenizers.PRE_TOKENIZERS:
        expected = ", ".join([*pre_tokenizers.PRE_TOKENIZERS, *pre_tokenizers.ALIASES])
        raise UserError(f"{KEY}pre is {name!r}; expected one of {expected}")
    pre = pre_tokenizers.PRE_TOKENIZERS[name]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = library.Tokenizer(
        library.models.BPE(vocabulary, _merges(metadata, tokens), ignore_merges=pre.ignore_merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.build(pre_tokenizers.sequence(name))
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer, bool(metadata.get(KEY + "add_bos_token", pre.add_bos))


def _read_gemma4(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[library.Tokenizer, bool]:
    unknown = token_id(metadata, "unknown_token_id", len(tokens))
    if unknown is None or not {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens):
        raise UserError(f"{KEY}unknown_token_id or a byte token is missing; both are needed for {KEY}model='gemma4'")
    model = library.models.BPE(
        {token: index for index, token in enumerate(tokens)},
        _merges(metadata, tokens),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = library.normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.build(_SPLIT_AT_SPACE)
    decoders = library.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    forced = _UTF8.get(str(metadata.get(KEY + "pre")), True)  # as in llama.cpp
    return tokenizer, forced or bool(metadata.get(KEY + "add_bos_token"))


def _read_bert(metadata: Mapping[str, Any], tokens: list[str], types: Sequence[int]) -> tuple[library.Tokenizer, bool]:
    """WordPiece; replaces the pieces in `tokens` by those of a tokenizer.json."""
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        bracketed = token.startswith("[") and token.endswith("]") and len(token) > 2
        if kind != CONTROL and not bracketed:
            tokens[index] = token[1:] if token.startswith(SPACE) and len(token) > 1 else _CONTINUES + token
    named = {name: tokens.index(token) if token in tokens else None for name, token in _BERT_SPECIAL.items()}
    needed = []
    for name in ("cls_token_id", "seperator_token_id", "unknown_token_id"):
        keys = ("bos_token_id", name) if name == "cls_token_id" else (name,)
        special_ids = (token_id(metadata, key, len(tokens)) for key in keys)
        needed_id = next((index for index in (*special_ids, named[name]) if index is not None), None)
        if needed_id is None:
            raise UserError(f"{KEY}{name} is missing")
        needed.append(tokens[needed_id])
    begin, end, unknown = needed
    lowercase = bool(metadata.get(KEY + "normalizer.lowercase", True))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UserError(f"{KEY}tokens has a piece twice")
    tokenizer = library.Tokenizer(
        library.models.WordPiece(vocabulary, unk_token=unknown, continuing_subword_prefix=_CONTINUES)
    )
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=metadata.get(KEY + "normalizer.strip_accents")
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])],
    )
    tokenizer.decoder = library.decoders.WordPiece(prefix=_CONTINUES)
    return tokenizer, False


_READERS: dict[str, Callable[..., tuple[library.Tokenizer, bool]]] = {
    "gpt2": _read_byte_level,
    "gemma4": _read_gemma4,
    "bert": _read_bert,
}


def write(tokenizer: library.Tokenizer, vocab_size: int, add_bos: bool) -> dict[str, Any]:
    """Kind, tokens, types and merges or scores; the inverse of `read`, without the ids of special tokens.

    Args:
      vocab_size: ids from the tokenizer's size to this one are marked as unused.
      add_bos: whether texts begin with BOS.

    Raises:
      UserError: GGUF cannot represent the vocabulary.
    """
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    tokens = [tokenizer.id_to_token(i) for i in range(vocab_size)]
    types = [UNUSED if token is None else NORMAL for token in tokens]
    for added in state.get("added_tokens", []):
        if added["id"] < vocab_size:
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    names = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    for form in (_write_byte_level, _write_llama, _write_gemma4, _write_bert):
        if (metadata := form(state, model, names, types)) is not None:
            if metadata["model"] == "gemma4" and not add_bos:
                metadata |= {"model": "gpt2", "pre": "sarvam-moe"}
            metadata["add_bos_token"] = add_bos
            return {KEY + name: value for name, value in metadata.items()}
    raise UserError(
        "tokenizer.json cannot become GGUF: expected byte-level BPE with a pre-tokenizer that GGUF names, BPE with "
        "byte fallback whose merges are those of SentencePiece, or BERT's WordPiece"
    )


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]


def _write_byte_level(
    state: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], types: list[int]
) -> Written:
    name = pre_tokenizers.name_of(state.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if model["type"] != "BPE" or name is None or state.get("normalizer") not in (None, _NFC):
        return None
    if state.get("normalizer"):
        print("note: GGUF names no normalization; llama.cpp does not apply the NFC of this tokenizer.json")
    merges = [" ".join(pair) for pair in _pairs(model)]
    return {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types, "merges": merges}


def _write_llama(state: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], types: list[int]) -> Written:
    """BPE whose merges follow from an order of the tokens, as SentencePiece's do."""
    prefix = _space_prefix(state, model)
    scores = _scores(model, dict(zip(tokens, types, strict=True))) if prefix is not None else None
    if scores is None:
        return None
    types = _fallback_types(model, tokens, types)
    shown = [t.replace(SPACE, " ") if kind == USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    return {
        "model": "llama",
        "tokens": shown,
        "scores": [float(scores.get(token, -len(scores))) for token in tokens],
        "token_type": types,
        "add_space_prefix": prefix,
    }


def _write_gemma4(state: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], types: list[int]) -> Written:
    if _space_prefix(state, model) is not False or model.get("ignore_merges"):
        return None
    if any(("\n" in a + b) and (a + b).strip("\n") for a, b in _pairs(model)):
        return None  # llama.cpp merges no line break with other text
    merges = [" ".join(pair) for pair in _pairs(model)]
    types = _fallback_types(model, tokens, types)
    return {"model": "gemma4", "tokens": tokens, "token_type": types, "merges": merges, "add_space_prefix": False}


def _space_prefix(state: Mapping[str, Any], model: Mapping[str, Any]) -> bool | None:
    """Whether a space is added before text, in BPE with byte fallback that writes spaces as `SPACE`; else None."""
    if model["type"] != "BPE" or not model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        return None
    normalizer, pre = state.get("normalizer"), state.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    prepended = {"type": "Prepend", "prepend": SPACE}
    if pre is None and steps == [prepended, _SPACE_TO_SYMBOL]:
        return True
    if pre in (None, _SPLIT_AT_SPACE) and steps == [_SPACE_TO_SYMBOL]:
        return False
    if steps == [None] and pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not pre["split"]:
        return pre["prepend_scheme"] != "never"
    return None


def _fallback_types(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    return [
        UNKNOWN if token == model.get("unk_token") else BYTE if token in byte_tokens else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def _scores(model: Mapping[str, Any], types: Mapping[str, int]) -> dict[str, int] | None:
    """Scores by which SentencePiece merges what the merges of a tokenizer.json merge, or None if there are none.

    SentencePiece merges any two pieces that form a token, in the order of the token's scores. That is the same where
    the merges into one token stand together and none is left out. Special and user-defined tokens are cut out of a text
    before, so that their merges never count.
    """
    pairs = _pairs(model)
    scores: dict[str, int] = {}
    last = ""
    for a, b in pairs:
        token = a + b
        if types.get(token) != NORMAL:
            continue
        if token != last and token in scores:
            return None
        scores.setdefault(token, -len(scores))
        last = token
    vocabulary, merged = model["vocab"], set(pairs)
    for token in vocabulary:
        cuts = range(1, len(token)) if types.get(token) == NORMAL else ()
        for cut in cuts:
            pair = token[:cut], token[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in merged:
                return None
    return scores


def _write_bert(state: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], types: list[int]) -> Written:
    normalizer, pre = state.get("normalizer") or {}, state.get("pre_tokenizer") or {}
    if (model["type"], normalizer.get("type"), pre.get("type")) != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        return None
    if not (normalizer["clean_text"] and normalizer["handle_chinese_chars"]):
        return None
    if model["continuing_subword_prefix"] != _CONTINUES:
        return None
    pieces = [
        token
        if kind != NORMAL
        else token[2:]
        if token.startswith(_CONTINUES) and token != _CONTINUES
        else SPACE + token
        for token, kind in zip(tokens, types, strict=True)
    ]
    metadata = {"model": "bert", "tokens": pieces, "token_type": types, "normalizer.lowercase": normalizer["lowercase"]}
    if normalizer["strip_accents"] is not None:
        metadata["normalizer.strip_accents"] = normalizer["strip_accents"]
    ids = {name: tokens.index(token) for name, token in _BERT_SPECIAL.items() if token in tokens}
    return metadata | ids
