"""generation_config.json of Hugging Face directories: the sampling options that the authors of a model recommend."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

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
_PENALTIES = ("repetition_penalty", "no_repeat_ngram")  # they also change greedy decoding
_INTEGERS = ("top_k", "no_repeat_ngram")


def read(directory: pathlib.Path) -> dict[str, Any]:
    """The content of the file in a directory, {} without it. Raises UserError if it is no JSON object."""
    path = directory / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return content


def sampling(content: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The fields of `DecodingOptions` that a generation_config.json states, where they differ from the defaults.

    `do_sample: false` is temperature 0, which leaves the penalties alone. A `top_k` above the vocabulary is its size.

    Raises:
      UserError: a value that is no number or out of its range.
    """
    stated = {OPTIONS[key]: value for key, value in content.items() if key in OPTIONS and value is not None}
    for name, value in stated.items():
        expected: Any = int if name in _INTEGERS else (int, float)
        if isinstance(value, bool) or not isinstance(value, expected):
            kind = "an integer" if name in _INTEGERS else "a number"
            raise UserError(f"{FILE}: the value of --{name} is {value!r}; expected {kind}")
    if content.get("do_sample") is False:
        stated = {name: value for name, value in stated.items() if name in _PENALTIES} | {"temperature": 0.0}
    if "top_k" in stated:
        stated["top_k"] = min(stated["top_k"], vocab_size)
    try:
        options = DecodingOptions(**stated)
        options.check(vocab_size)
    except UserError as error:
        raise UserError(f"{FILE}: {error}") from error
    return {name: stated[name] for name in stated if name in options.changed()}
