"""tokenizer.json with the settings and tokens that only the files beside it have, which transformers applies to it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.errors import UserError
from llm_jax.tokenizers import special

_CONFIG = "tokenizer_config.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Tokenizer classes whose add_prefix_space decides about the space before the first word.
_BYTE_LEVEL = ("GPT2", "Roberta", "CodeGen", "GPTNeoX")
# Classes whose normalizer is BERT's, and its settings: key of tokenizer_config.json -> key of the normalizer.
_BERT = ("Bert", "DistilBert", "Electra", "MobileBert")
_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def completed(files: Mapping[str, bytes]) -> str:
    """The content of tokenizer.json as transformers uses it with the files beside it.

    - Tokens that tokenizer_config.json, special_tokens_map.json or added_tokens.json name and tokenizer.json lacks are
      added, in the order of transformers; those past the vocab_size of config.json, which the model has no row for, are
      left out.
    - add_prefix_space of tokenizer_config.json counts for byte-level BPE and Llama, do_lower_case, strip_accents and
      tokenize_chinese_chars for BERT.
    - BPE dropout (Provilkov et al. 2020, arXiv:1910.13267), which makes ids random, is turned off.

    Args:
      files: content by name; tokenizer.json and those of `special.FILES`.

    Raises:
      UserError: a file gives a token an id that it cannot have.
    """
    try:
        text = files["tokenizer.json"].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer.json is damaged: {error}") from error
    try:
        content = json.loads(text)
        before = json.dumps(content)
    except (ValueError, RecursionError):
        return text  # reported when the tokenizer is made
    parts = ("model", "normalizer", "pre_tokenizer", "decoder")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict | None) for p in parts):
        return text
    parsed = {
        name: special.parse(files, name)
        for name in (_CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")
    }
    config = parsed[_CONFIG]
    kind = special.class_name(config, parsed["config.json"])
    if "dropout" in (model := content.get("model") or {}):
        model["dropout"] = None
    if isinstance(space := config.get("add_prefix_space"), bool):
        _set_prefix_space(content, kind, space)
    normalizer = content.get("normalizer") or {}
    if kind in _BERT and normalizer.get("type") == "BertNormalizer":
        normalizer |= {key: config[name] for name, key in _NORMALIZER.items() if name in config}
    try:
        _add_tokens(content, parsed)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        names = ", ".join(name for name in ("tokenizer.json", *parsed) if name in files)
        raise UserError(f"a token in {names} is not a valid token ({error!r})") from error
    return text if json.dumps(content) == before else json.dumps(content, ensure_ascii=False)


def _set_prefix_space(content: dict[str, Any], kind: str, space: bool) -> None:
    pre_tokenizer = content.get("pre_tokenizer") or {}
    if kind in _BYTE_LEVEL and pre_tokenizer.get("type") == "ByteLevel":
        pre_tokenizer["add_prefix_space"] = space
    if kind == "Llama" and not space:
        if pre_tokenizer.get("type") == "Metaspace":
            pre_tokenizer |= {"prepend_scheme": "never"}
            pre_tokenizer.pop("add_prefix_space", None)  # of earlier versions of the library
        content["normalizer"] = _without(content.get("normalizer"), "normalizers", "Prepend")
        if pre_tokenizer.get("type") != "ByteLevel":
            content["decoder"] = _without(content.get("decoder"), "decoders", "Strip")


def _without(step: Any, name: str, kind: str) -> Any:
    """A normalizer or decoder without the steps of one kind."""
    if not step or step.get("type") == kind:
        return None
    if step.get("type") == "Sequence":
        return step | {name: [s for s in step[name] if s.get("type") != kind]}
    return step


def _add_tokens(content: dict[str, Any], parsed: Mapping[str, Any]) -> None:
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    entries = content.setdefault("added_tokens", []) or []
    pieces = [piece for piece, _ in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    ids = dict(zip(pieces, range(len(pieces)), strict=True)) if isinstance(vocabulary, list) else dict(vocabulary)
    ids |= {entry["content"]: entry["id"] for entry in entries}
    present = {entry["content"] for entry in entries}
    model_vocab_size = parsed["config.json"].get("vocab_size")
    for source, index, token in _named_tokens(parsed):
        if (name := token["content"]) in present:
            continue
        following = max(ids.values(), default=-1) + 1
        expected_id = ids.get(name, following)
        if isinstance(model_vocab_size, int) and expected_id >= model_vocab_size:
            continue
        if index not in (None, expected_id):
            if isinstance(model_vocab_size, int) and index >= model_vocab_size:
                continue
            raise UserError(
                f"{source}: the token {name!r} has the id {index}; expected {expected_id}, the next one of "
                "tokenizer.json, which lacks it; save the tokenizer again with tokenizer.json"
            )
        entries.append({"id": expected_id, **token})
        present.add(name)
        ids[name] = expected_id
    content["added_tokens"] = entries


def _named_tokens(parsed: Mapping[str, Any]) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """(file, id or None, token with its flags) of each token that the files beside tokenizer.json name."""
    config, others = parsed[_CONFIG], parsed["special_tokens_map.json"]
    decoder = config.get("added_tokens_decoder") or {}
    for index, token in sorted((int(index), token) for index, token in decoder.items()):
        yield _CONFIG, index, _token(token)
    if not decoder:
        for name, index in sorted(parsed["added_tokens.json"].items(), key=lambda item: item[1]):
            yield "added_tokens.json", index, _token(name)
    for name in _NAMES:
        token = config[name] if name in config else others.get(name)
        if isinstance(token, str | dict) and token:
            yield _CONFIG, None, _token(token)
    for name in _LISTS:
        tokens = config.get(name) or others.get(name) or []
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield _CONFIG, None, _token(token)


def _token(token: Any) -> dict[str, Any]:
    """An added token as tokenizer.json has it, from its name or from an entry with flags."""
    entry = {"content": token, "special": True} if isinstance(token, str) else token
    flags = {"normalized": not entry.get("special", False)} | entry
    return {"content": entry["content"]} | {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
