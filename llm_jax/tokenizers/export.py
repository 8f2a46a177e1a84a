"""Tokenizers in the form that transformers' AutoTokenizer reads: tokenizer.json and tokenizer_config.json.

The ids of a text are the same there, but that names of special tokens in it become their ids, as in
`PretrainedTokenizer.encode_chat`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers as library

from llm_jax.errors import UserError
from llm_jax.tokenizers import special, words
from llm_jax.tokenizers.base import SPECIAL, PretrainedTokenizer, Tokenizer, all_files
from llm_jax.tokenizers.sentencepiece_json import from_model, has_exact_scores

# Names of special tokens beside `special.NAMES`, and the tokens that usually have them.
_OTHER_NAMES = {"cls_token": ("[CLS]",), "sep_token": ("[SEP]",), "mask_token": ("[MASK]", "<mask>")}
# For these families AutoTokenizer ignores the class that the files name, and replaces the pre-tokenizer of
# tokenizer.json by that of the family's class. The key "auto_map" prevents this. The code that it names does not exist
# and is not loaded (unless trust_remote_code=True), because transformers has classes for these families.
_REPLACED = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
}
_AUTO_MAP = {"AutoTokenizer": [None, "tokenization.PreTrainedTokenizerFast"]}


def transformers_files(tokenizer: Tokenizer, family: str) -> dict[str, bytes]:
    """The files of a tokenizer in a directory that transformers reads.

    Args:
      family: the model_type of the directory's config.json.

    Returns:
      Contents by name: tokenizer.json, tokenizer_config.json, and tokenizer.model for the kind "sentencepiece". For all
      kinds but "hub", whose form these are, also the files of `tokenizers.save` in tokenizer/, which
      `tokenizers.from_directory` prefers; and no others for a kind that `KINDS` lacks.

    Raises:
      UserError: tokenizer.json cannot express the tokenizer.
    """
    saved = {f"tokenizer/{name}": content for name, content in all_files(tokenizer).items()}
    if tokenizer.kind not in _EXPRESSED:
        return saved
    text = _EXPRESSED[tokenizer.kind](tokenizer)
    config = _config(tokenizer, json.loads(text), family)
    text = _with_bos(text, config.get("bos_token"), tokenizer.bos is not None)
    contents = {"tokenizer.json": text.encode(), "tokenizer_config.json": json.dumps(config).encode()}
    if tokenizer.kind == "sentencepiece":
        contents["tokenizer.model"] = tokenizer.files()["tokenizer.model"]
    return contents if tokenizer.kind == "hub" else contents | saved


def notes(tokenizer: Tokenizer) -> list[str]:
    """What a user may not expect of `transformers_files`."""
    if tokenizer.kind not in _EXPRESSED:
        return [f"transformers reads no {tokenizer.kind} tokenizer; llm_jax finds it in tokenizer/ of the directory"]
    models = (content for name, content in tokenizer.files().items() if name.endswith(".model"))
    if all(map(has_exact_scores, models)):
        return []
    return ["transformers may choose another one of equally likely segmentations, such as of a long run of spaces"]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """ "bos_token_id", "eos_token_id", ... for config.json."""
    if isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.special_ids
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": SPECIAL.index("<pad>")}
    return {name: index for name, index in ids.items() if index is not None}


def _config(tokenizer: Tokenizer, state: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    known = {token["content"] for token in state["added_tokens"]} | _vocabulary(state["model"]).keys()
    if isinstance(tokenizer, PretrainedTokenizer):
        names = {name: tokenizer.special.get(name) for name in special.NAMES}
        template = tokenizer.special.get("chat_template")
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        other_settings = {"chat_template": template, "eos_ids": tokenizer.special.get("eos_ids")}
    else:
        names, other_settings = {f"{token.strip('<>')}_token": token for token in SPECIAL}, {}
    names["unk_token"] = names["unk_token"] or state["model"].get("unk_token")
    added = {token["content"] for token in state["added_tokens"] if token["special"]}
    names |= {name: next((t for t in tokens if t in added), None) for name, tokens in _OTHER_NAMES.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *(["token_type_ids"] if family == "bert" else []), "attention_mask"],
        "add_bos_token": tokenizer.bos is not None,
        # Any other token would be added to the vocabulary.
        **{name: token for name, token in names.items() if token in known},
        **{key: value for key, value in other_settings.items() if value},
    }
    if family in _REPLACED and not _is_split_by(state, _REPLACED[family]):
        config["auto_map"] = _AUTO_MAP
    return config


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}


def _is_split_by(state: Mapping[str, Any], expression: str) -> bool:
    """Whether a tokenizer.json splits text by the expression, after NFC."""
    steps = (state.get("pre_tokenizer") or {}).get("pretokenizers", [])
    splits = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    return state.get("normalizer") == {"type": "NFC"} and splits == [expression]


def _with_bos(text: str, bos: str | None, add_bos: bool) -> str:
    """The tokenizer.json, with a post-processor that begins texts with `bos` if and only if `add_bos` is set."""
    tokenizer = library.Tokenizer.from_str(text)
    if bos is None or (tokenizer.encode("").tokens[:1] == [bos]) == add_bos:
        return text
    tokenizer.post_processor = None
    if add_bos:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer.to_str()


def _hub(tokenizer: Tokenizer) -> str:
    return tokenizer.files()["tokenizer.json"].decode()


def _sentencepiece(tokenizer: Any) -> str:
    converted = from_model(tokenizer.files()["tokenizer.model"])
    added = sorted((tokenizer.special.get("added_tokens") or {}).items(), key=lambda item: item[1])
    converted.add_special_tokens([library.AddedToken(token, special=True, normalized=False) for token, _ in added])
    if wrong := next((token for token, index in added if converted.token_to_id(token) != index), None):
        raise UserError(
            f"tokenizer.json cannot express the added tokens: the id of '{wrong}' does not follow the others"
        )
    return converted.to_str()


def _pieces(tokenizer: Tokenizer) -> str:
    (model,) = tokenizer.files().values()
    return from_model(model, literal_spaces=True).to_str()


def _byte(tokenizer: Tokenizer) -> str:
    special_tokens = SPECIAL[: tokenizer.vocab_size - 256]
    vocabulary = dict(zip(special_tokens, range(len(special_tokens)), strict=True))
    vocabulary |= {name: len(special_tokens) + byte for name, byte in words.BYTES.items()}
    converted = library.Tokenizer(library.models.BPE(vocabulary, []))
    converted.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(converted, library.decoders.ByteLevel(), special_tokens)


def _char(tokenizer: Tokenizer) -> str:
    vocabulary = {c: i for i, c in enumerate([*SPECIAL, *json.loads(tokenizer.files()["characters.json"])])}
    converted = library.Tokenizer(library.models.BPE(vocabulary, [], unk_token=SPECIAL[3]))
    return _finished(converted, library.decoders.Fuse())


def _words(decoder: Any) -> Callable[[Tokenizer], str]:
    def convert(tokenizer: Tokenizer) -> str:
        (text,) = tokenizer.files().values()
        return _finished(library.Tokenizer.from_str(text.decode()), decoder)

    return convert


def _finished(tokenizer: library.Tokenizer, decoder: Any, special_tokens: Sequence[str] = SPECIAL) -> str:
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(
        [library.AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    return tokenizer.to_str()


_WORD_PIECES = library.decoders.Sequence(
    [library.decoders.Replace(library.Regex(f"^{words.CONTINUES}"), ""), library.decoders.Fuse()]
)
# kind -> its tokenizers as the text of a tokenizer.json, without BOS
_EXPRESSED: dict[str, Callable[[Any], str]] = {
    "bpe": _pieces,
    "byte": _byte,
    "byte_bpe": _words(library.decoders.ByteLevel()),
    "char": _char,
    "char_bpe": _words(library.decoders.Fuse()),
    "hub": _hub,
    "sentencepiece": _sentencepiece,
    "unigram": _pieces,
    "word": _words(library.decoders.Fuse()),
    "wordpiece": _words(_WORD_PIECES),
}
