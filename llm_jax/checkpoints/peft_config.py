"""adapter_config.json of peft: what is supported, and the values of its patterns."""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_jax import files
from llm_jax.errors import UserError

CONFIG = "adapter_config.json"
_BIASES = ("none", "all", "lora_only")
# Keys that are read here and in `peft_tensors`.
_READ = frozenset(
    "peft_type r lora_alpha bias base_model_name_or_path use_rslora use_dora lora_bias init_lora_weights rank_pattern "
    "alpha_pattern modules_to_save target_modules layers_to_transform exclude_modules trainable_token_indices "
    "ensure_weight_tying".split()
)
# Keys that do not change what the adapters compute -> what they contain. Any other key is refused if it is set: it may
# select a computation that is not implemented here.
_HARMLESS = {
    "auto_mapping": "names the class of the base",
    "corda_config": "settings of an initialization",
    "eva_config": "settings of an initialization",
    "fan_in_fan_out": "the layout of the base's matrix, which follows from its family",
    "inference_mode": "whether the adapters can be trained",
    "layers_pattern": "the modules that were adapted, which are the ones that have tensors",
    "loftq_config": "settings of an initialization",
    "lora_dropout": "the dropout rate of training",
    "lora_ga_config": "settings of an initialization",
    "megatron_core": "a package for training",
    "merge_weights": "when the peft of 2023 merged the weights",
    "peft_version": "the version of the package that wrote the file",
    "qalora_group_size": "a setting of use_qalora, which is refused",
    "revision": "the revision of the base; `Peft.base` prints a note about it",
    "runtime_config": "how peft computes",
    "task_type": "the class that peft wraps the base in",
}
# Initializations that leave the base unchanged; others (pissa, olora, loftq, corda, ...) subtract the initial factors.
_UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
_PLAIN = re.compile(r"(\w|[.^]|\\[.d])+")  # expressions that are matched in a time linear in the length of the name
_SECONDS = 10  # the time limit for matching all other expressions
# Matches every name (of {patterns, names} on stdin) as peft does; prints the first pattern that matches, or null.
_MATCHER = r"""
import json, re, sys
request = json.load(sys.stdin)
rules = [(pattern, re.compile(rf"(.*\.)?({pattern})$")) for pattern in request["patterns"]]
print(json.dumps([next((p for p, rule in rules if rule.match(name)), None) for name in request["names"]]))
"""


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises UserError (with the key) if it cannot be read or is not supported."""
    source = directory / CONFIG
    config = files.read_json(source)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        peft_type = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(f"{source}: peft_type is {peft_type!r}; expected 'LORA'")
    for key in ("r", "lora_alpha"):
        if not _is_positive(value := config.get(key)):
            raise UserError(f"{source}: {key} is {value!r}; expected a positive number")
    if config.get("bias", "none") not in _BIASES:
        raise UserError(f"{source}: bias={config['bias']!r} is unknown; expected one of {', '.join(_BIASES)}")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        name = config["base_model_name_or_path"]
        raise UserError(f"{source}: base_model_name_or_path is {name!r}; expected the base's path or name")
    for key, value in config.items():
        if value and key not in _READ and key not in _HARMLESS:
            raise UserError(f"{source}: {key}={str(value)[:80]} is unknown or not supported; the adapters may need it")
    if config.get("lora_bias") and config.get("use_dora"):
        raise UserError(f"{source}: lora_bias=True with use_dora=True is not supported")
    if config.get("init_lora_weights", True) not in _UNCHANGED_BASE:
        raise UserError(
            f"{source}: init_lora_weights={config['init_lora_weights']!r} changes the base; have peft convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(map(_is_positive, table.values())):
            raise UserError(f"{source}: {key} is {table!r}; expected regular expressions and positive numbers")
        for pattern in table:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{source}: {key}: {pattern!r} is not a regular expression ({error})") from error
    return config


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` lists a module. Like peft, compares only the end of the module's name."""
    return any(module.endswith(name) for name in config.get("modules_to_save") or ())


def listed_tensors(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names of the base's tensors that `target_modules` lists; [] if other keys also select modules."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return []
    return [name for name in names if any(f".{name}".endswith(f".{target}.weight") for target in targets)]


def token_indices(config: Mapping[str, Any], module: str) -> list[int]:
    """The rows of an embedding table in `trainable_token_indices`, which has one list, or a list for each module."""
    indices = config.get("trainable_token_indices") or []
    if isinstance(indices, dict):
        indices = next((rows for name, rows in indices.items() if module.endswith(name)), [])
    return list(indices)


def pattern_values(directory: pathlib.Path, config: Mapping[str, Any], key: str, modules: Sequence[str]) -> list[float]:
    """The value of each module: that of the first pattern that matches the end of its name, else the default.

    Args:
      key: "rank_pattern", whose default is "r", or "alpha_pattern", whose default is "lora_alpha".

    Raises:
      UserError: matching takes too long.
    """
    table = config.get(key) or {}
    default = config["r" if key == "rank_pattern" else "lora_alpha"]
    if all(map(_PLAIN.fullmatch, table)):
        rules = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in table.items()]
        return [next((value for rule, value in rules if rule.match(name)), default) for name in modules]
    # Other expressions may take very long to match. They are matched in a subprocess, which has a time limit.
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _MATCHER],
            input=json.dumps({"patterns": list(table), "names": list(modules)}),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        raise UserError(
            f"{directory / CONFIG}: {key} is {table!r}; matching these expressions with {len(modules)} names takes "
            f"more than {_SECONDS} s"
        ) from error
    return [default if pattern is None else table[pattern] for pattern in json.loads(done.stdout)]
