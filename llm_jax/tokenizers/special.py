"""Special tokens of pretrained tokenizers: their names in the files of a checkpoint and in the metadata of GGUF."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llm_jax.errors import UserError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
GGUF_NAMES = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))  # Hugging Face's, GGUF's
# Files beside tokenizer.json or tokenizer.model that name special tokens.
FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
# Files of the vocabulary of tokenizers that were saved without tokenizer.json.
OLDER_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt")
TEMPLATES = "additional_chat_templates"  # directory of chat templates besides chat_template.jinja, as NAME.jinja
_GGUF_TEMPLATE = "tokenizer.chat_template"  # with .NAME for those besides the default one

# Special tokens that a tokenizer class of transformers has where the files name none.
_END = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CLASSES: dict[str, dict[str, str]] = {
    "GPT2": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoX": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "CodeGen": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "Qwen2": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "Llama": _LLAMA,
    "CodeLlama": _LLAMA,
    "Gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "Bert": {"unk_token": "[UNK]", "pad_token": "[PAD]"},
    "Roberta": _LLAMA | {"pad_token": "<pad>"},
    "XLMRoberta": _LLAMA | {"pad_token": "<pad>"},
    "T5": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "Cohere": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
    },
}
# The class that transformers chooses by config.json's model_type where tokenizer_config.json names none.
_CLASS_OF_MODEL = {
    "gpt2": "GPT2",
    "opt": "GPT2",
    "phi": "GPT2",
    "gpt_neox": "GPTNeoX",
    "codegen": "CodeGen",
    "llama": "Llama",
    "mistral": "Llama",
    "gemma": "Gemma",
    "gemma2": "Gemma",
    "gemma3": "Gemma",
    "gemma3_text": "Gemma",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "t5": "T5",
    "cohere": "Cohere",
}
# Names of tokens that end a text or a turn, independent of the keys of the files (the rule of llama.cpp).
_END_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
    "<eos>",
    "[e~[",
)
_HARMONY = ("<|return|>", "<|call|>")  # a vocabulary with both ends a message, not a text, with <|end|>
# GGUF's names of what ends a text besides EOS: the end of a turn, and of a message.
_GGUF_ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom"))


def read(
    files: Mapping[str, bytes],
    index_of: Callable[[str], int | None],
    token_of: Callable[[int], str | None],
    own: Collection[str] = (),
) -> dict[str, Any]:
    """The special tokens that the files of a checkpoint name.

    tokenizer_config.json counts first, then special_tokens_map.json, then the tokenizer class that the former or, by
    its model_type, config.json names. The ids that end a text are those of generation_config.json and config.json;
    the first of them is EOS where no name is.

    Args:
      index_of: the id of a token, None for a token that the vocabulary lacks.
      token_of: the token of an id, None for an id that it lacks.
      own: names whose tokens the vocabulary itself defines; they need none from the class.

    Returns:
      The names in `NAMES`, "chat_template" (a text, or {name: text} where there are several), "add_bos_token" (None
      where no file states it), and "eos_ids" where the files name ids that end a text.

    Raises:
      UserError: an id that ends a text is not a number.
    """
    parsed = {name: parse(files, name) for name in FILES if name.endswith(".json")}
    config, model = parsed["tokenizer_config.json"], parsed["config.json"]
    defaults = class_tokens(class_name(config, model))
    defaults = {name: token for name, token in defaults.items() if index_of(token) is not None and name not in own}
    sources = (config, parsed["special_tokens_map.json"])
    special: dict[str, Any] = {}
    for name in NAMES:
        if name in config and config[name] is None:
            special[name] = None  # null says that there is none
        else:
            special[name] = next((text for s in sources if (text := _content(s.get(name)))), defaults.get(name))
    template = _templates(files) or config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}
    special |= {"chat_template": _single(template), "add_bos_token": config.get("add_bos_token")}
    ends = config.get("eos_ids") or []
    for name in ("generation_config.json", "config.json"):
        ends = [*ends, *_ids(name, parsed[name].get("eos_token_id"))]
    if special["eos_token"] is None and "eos_token" not in {*config, *own} and ends:
        special["eos_token"] = token_of(ends[0])
    return special | ({"eos_ids": list(dict.fromkeys(ends))} if ends else {})


def parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in one of the files of a tokenizer; {} without this file.

    Raises:
      UserError: the file holds something else.
    """
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} holds a {type(content).__name__}; expected a JSON object")
    return content


def class_name(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The tokenizer class of transformers, without "Tokenizer" and "Fast"; "" where the files name none.

    Args:
      tokenizer_config, config: the content of tokenizer_config.json and of config.json.
    """
    kind = tokenizer_config.get("tokenizer_class") or _CLASS_OF_MODEL.get(str(config.get("model_type")), "")
    return str(kind).removesuffix("Fast").removesuffix("Tokenizer")


def class_tokens(kind: str) -> dict[str, str]:
    """The special tokens of a tokenizer class where the files name none: {"eos_token": token, ...}."""
    return _CLASSES.get(kind, {})


def without_eos(special: Mapping[str, Any], eos: int | None) -> dict[str, list[int]]:
    """ "eos_ids" of `special` without EOS itself, where any are left."""
    ids = [i for i in special.get("eos_ids") or () if i != eos]
    return {"eos_ids": ids} if ids else {}


def ids_of_end_tokens(index_of: Callable[[str], int | None]) -> list[int]:
    """The ids of special tokens whose names say that they end a text or a turn.

    Args:
      index_of: the id of a special token, or None where the vocabulary has no such special token.
    """
    names = [name for name in _END_NAMES if name != "<|end|>" or any(index_of(name) is None for name in _HARMONY)]
    return [index for index in map(index_of, names) if index is not None]


def mark_end_tokens(tokens: Sequence[str], types: Sequence[int], normal: int, control: int) -> list[int]:
    """The types of a GGUF file's tokens, with `control` for those whose names say that they end a text or a turn.

    Files give them another type by mistake (llama.cpp's rule). An ordinary </s> is left as it is: vocabularies made
    from web pages have it.

    Args:
      types: the type of each token.
      normal, control: the numbers of these types.
    """
    return [
        control if token in _END_NAMES and (token, kind) != ("</s>", normal) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]


def read_gguf_ends(metadata: Mapping[str, Any]) -> dict[str, list[int]]:
    """ "eos_ids" of a GGUF file's metadata, where it names others than EOS."""
    ids = [metadata[key] for key in _GGUF_ENDS if isinstance(metadata.get(key), int)]
    return {"eos_ids": ids} if ids else {}


def write_gguf_ends(ids: Sequence[int]) -> dict[str, int]:
    """The inverse of `read_gguf_ends`, of EOS and at most two others. Raises UserError for more."""
    if len(ids) > 1 + len(_GGUF_ENDS):
        raise UserError(f"GGUF has names for {1 + len(_GGUF_ENDS)} ids that end a text; this tokenizer has {len(ids)}")
    return dict(zip(_GGUF_ENDS, ids[1:], strict=False))


def read_gguf_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template of a GGUF file, or {name: template} where it has several."""
    prefix = f"{_GGUF_TEMPLATE}."
    templates = {key.removeprefix(prefix): text for key, text in metadata.items() if key.startswith(prefix)}
    if _GGUF_TEMPLATE in metadata:
        templates["default"] = metadata[_GGUF_TEMPLATE]
    return _single(templates)


def write_gguf_templates(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """The inverse of `read_gguf_templates`. Raises UserError for a name that GGUF has no key for."""
    templates = {"default": template} if isinstance(template, str) else dict(template or {})
    default = templates.pop("default", "")
    if wrong := next((name for name in templates if not re.fullmatch("[a-z0-9_]+", name)), None):
        raise UserError(f"GGUF has no key for the chat template {wrong!r}; expected a name of a-z, 0-9 and _")
    keys: dict[str, Any] = {_GGUF_TEMPLATE: default} if default else {}
    keys |= {f"{_GGUF_TEMPLATE}.{name}": text for name, text in templates.items()}
    return keys | ({"tokenizer.chat_templates": list(templates)} if templates else {})


def _templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """The chat templates in files of their own, by name; transformers then ignores those of tokenizer_config.json."""
    paths = {"default": "chat_template.jinja"} | {
        name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja"): name
        for name in sorted(files)
        if name.startswith(f"{TEMPLATES}/")
    }
    return {name: files[path].decode() for name, path in paths.items() if path in files}


def _single(templates: Any) -> Any:
    """Chat templates as `special["chat_template"]`: a text where the default one is the only one."""
    by_name = templates if isinstance(templates, dict) else {} if templates is None else {"default": templates}
    if wrong := next((item for item in by_name.items() if not all(isinstance(text, str) for text in item)), None):
        raise UserError(f"chat_template: {str(wrong)[:80]} is no Jinja template with a name")
    if not isinstance(templates, dict):
        return templates
    return templates["default"] if templates.keys() == {"default"} else templates or None


def _ids(name: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise UserError(f"{name}: eos_token_id is {value!r}; expected an id or a list of ids")
    return [i for i in ids if i >= 0]


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
