"""The recommended sampling options of a model, from generation_config.json or the metadata of a GGUF file."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError

FILE = "generation_config.json"
# Keys of the file: fields of `DecodingOptions`.
OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "epsilon_cutoff": "epsilon",
    "eta_cutoff": "eta",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
_PENALTIES = ("repetition_penalty", "no_repeat_ngram")  # options that also change greedy decoding
_INTEGERS = ("top_k", "no_repeat_ngram")
# Values that transformers 5.24 treats as "off", besides the defaults.
_OFF: Mapping[str, Callable[[Any], bool]] = {
    "top_p": lambda p: p > 1,
    "typical_p": lambda p: p > 1,
    "epsilon": lambda p: p < 0 or p >= 1,
    "eta": lambda p: p < 0 or p >= 1,
    "no_repeat_ngram": lambda n: n < 0,
}
# Key of generation_config.json: (key of GGUF's metadata, which sets a default of llama.cpp; its type).
_GGUF = {
    "temperature": ("general.sampling.temp", np.float32),
    "top_k": ("general.sampling.top_k", np.int32),
    "top_p": ("general.sampling.top_p", np.float32),
    "min_p": ("general.sampling.min_p", np.float32),
    "repetition_penalty": ("general.sampling.penalty_repeat", np.float32),
}
_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, float(np.finfo(np.float32).max)


def read(path: pathlib.Path) -> dict[str, Any]:
    """The content of a generation_config.json; {} if the file does not exist.

    Raises:
      UserError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return content


def sampling(content: Mapping[str, Any], vocab_size: int, path: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of `DecodingOptions` that a generation_config.json sets to non-default values.

    `do_sample: false` is read as temperature 0; the penalties still apply. A `top_k` above the vocabulary size is
    lowered to it. `top_p: 0` keeps only the most likely token, as in transformers. Values that transformers ignores
    are ignored.

    Args:
      path: the file, for error messages.

    Raises:
      UserError: a value is not a number or is out of range.
    """
    try:
        return _checked(content, vocab_size)
    except UserError as error:
        fix = "correct it, or set a sampling flag, such as --temperature=1, which replaces all options of the file"
        raise UserError(f"{path}: {error}; {fix}") from error


def _checked(content: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    sampling_options = {OPTIONS[key]: value for key, value in content.items() if key in OPTIONS and value is not None}
    for name, value in sampling_options.items():
        expected: Any = int if name in _INTEGERS else (int, float)
        if isinstance(value, bool) or not isinstance(value, expected):
            kind = "an integer" if name in _INTEGERS else "a number"
            raise UserError(f"the value of --{name} is {value!r}; expected {kind}")
    if content.get("do_sample") is False:
        sampling_options = {name: value for name, value in sampling_options.items() if name in _PENALTIES} | {
            "temperature": 0.0
        }
    sampling_options = {
        name: value for name, value in sampling_options.items() if not (name in _OFF and _OFF[name](value))
    }
    if sampling_options.get("top_p") == 0 and sampling_options.get("top_k", 0) >= 0:
        sampling_options = {name: value for name, value in sampling_options.items() if name != "top_p"} | {"top_k": 1}
    if "top_k" in sampling_options:
        sampling_options["top_k"] = min(sampling_options["top_k"], vocab_size)
    options = DecodingOptions(**sampling_options)
    options.check(vocab_size)
    return {name: sampling_options[name] for name in sampling_options if name in options.changed()}


def to_gguf(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Converts the options to the metadata of a GGUF file. `do_sample: false` becomes temperature 0.

    Returns:
      (metadata, the keys of the options that a GGUF file cannot express).
    """
    options = {key: value for key, value in content.items() if key in OPTIONS and value is not None}
    if content.get("do_sample") is False:
        options = {key: value for key, value in options.items() if OPTIONS[key] in _PENALTIES} | {"temperature": 0.0}
    metadata, lost = {}, []
    for key, value in options.items():
        name, dtype = _GGUF.get(key, ("", np.float32))
        is_number = isinstance(value, int if dtype is np.int32 else (int, float)) and not isinstance(value, bool)
        if name and is_number and abs(value) <= (_LARGEST_INT if dtype is np.int32 else _LARGEST_FLOAT):
            metadata[name] = dtype(value)
        else:
            lost.append(key)
    if "general.sampling.penalty_repeat" in metadata:
        metadata["general.sampling.penalty_last_n"] = np.int32(-1)  # all tokens, where llama.cpp takes the last 64
    return metadata, lost


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_gguf`; {} if the metadata has no sampling options."""
    content: dict[str, Any] = {}
    for key, (name, dtype) in _GGUF.items():
        if (value := metadata.get(name)) is not None:
            # The shortest decimal number of a float32: 0.7, not 0.699999988079071.
            content[key] = float(str(np.float32(value))) if dtype is np.float32 and isinstance(value, float) else value
    if "top_k" in content and isinstance(content["top_k"], int):
        content["top_k"] = max(content["top_k"], 0)  # llama.cpp takes a negative one for "off"
    if content.get("temperature") == 0:
        del content["temperature"]
        content["do_sample"] = False
    elif content.keys() - {"repetition_penalty"}:
        content["do_sample"] = True  # without it, transformers takes the most likely token
    return content
