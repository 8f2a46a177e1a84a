"""adapter_model.safetensors of peft: low-rank factors, and tensors that replace tensors of the base."""

import dataclasses
import pathlib
import re
import sys
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from llm_jax import files, trees, weights
from llm_jax.checkpoints import assemble, peft_config
from llm_jax.checkpoints.families import FAMILIES
from llm_jax.checkpoints.huggingface import ALIASES, WRAPPERS
from llm_jax.checkpoints.names import TensorSpec
from llm_jax.checkpoints.peft_config import CONFIG
from llm_jax.errors import UserError
from llm_jax.schema import ModelConfig

TENSORS = "adapter_model.safetensors"
ROOT = "base_model.model."
# End of a tensor's name -> (name in the adapter tree, whether the tensor is its transpose).
_PARTS = {
    "lora_A.weight": ("a", True),
    "lora_B.weight": ("b", True),
    "lora_B.bias": ("bias", False),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
    "lora_magnitude_vector": ("magnitude", False),
    "lora_magnitude_vector.weight": ("magnitude", False),
}
# The adapters' name as a part of a tensor's name. peft omits it; other software does not.
_ADAPTER_NAME = re.compile(
    r"(?<=\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)\w+(?=\.weight$|\.bias$|$)"
)
_ROWS = ".token_adapter.trainable_tokens_delta"
_UNUSED = (".token_adapter.trainable_tokens_original", ".original_module.")
TABLE, _HEAD = "embed/table", "head/kernel"
_BY_TOKEN = (TABLE, _HEAD, f"{_HEAD}_bias")  # parameters with an entry for each token

Table = dict[str, list[tuple[TensorSpec, str]]]  # stored tensor -> (spec, path) of the parameters that are parts of it


@dataclasses.dataclass(frozen=True)
class AdapterTensors:
    """The content of a peft directory. Names are peft's without their prefix `ROOT`.

    Attributes:
      directory: the directory that was read.
      config: the content of adapter_config.json.
      factors: {module: {"a", "b", ("magnitude" and "bias"): float32 array}} of adapted matrices; "a" is (in, rank) and
        "b" (rank, out).
      copies: tensors of the base itself, which peft saves beside some adapters: of embeddings that were adapted or
        resized, and biases that were trained.
      saved: tensors of `modules_to_save`, which replace those of the base.
      rows: {module: (tokens, width)}, rows that replace rows of an embedding table.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    factors: dict[str, dict[str, np.ndarray]]
    copies: dict[str, np.ndarray]
    saved: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]


def read(directory: pathlib.Path) -> AdapterTensors:
    """Reads a peft directory.

    Raises:
      UserError: a file is missing or damaged, or a setting is not supported.
    """
    tensors = AdapterTensors(directory, peft_config.read_config(directory), {}, {}, {}, {})
    for full_name, tensor in _read_file(directory).items():
        name = _ADAPTER_NAME.sub(r"\1", WRAPPERS.sub("", full_name)).removeprefix(ROOT)
        name = name.replace(".token_adapter.base_layer.", ".base_layer.")
        part = next((end for end in _PARTS if name.endswith(f".{end}")), None)
        module = name.removesuffix(f".{part}") if part else name.rpartition(".")[0]
        plain = name.replace(".base_layer.", ".")
        if part:
            entry, transposed = _PARTS[part]
            factor = (tensor.T if transposed else tensor).astype(np.float32)
            if entry in tensors.factors.setdefault(module, {}):
                raise UserError(
                    f"{directory / TENSORS}: '{full_name}' is a second factor of '{module}'; expected one adapter"
                )
            tensors.factors[module][entry] = factor
        elif name.endswith(_ROWS):
            tensors.rows[name.removesuffix(_ROWS)] = tensor
        elif plain == name and peft_config.is_saved(tensors.config, module):
            tensors.saved[name] = tensor
        elif not any(end in f"{name}." for end in _UNUSED):
            tensors.copies[plain] = tensor
    return tensors


def unties(tensors: AdapterTensors, family: str) -> bool:
    """Whether the adapters change only one of a tied embedding table and head, so that they are no longer the same."""
    names = FAMILIES[family].names
    if _HEAD not in names:
        return False
    table, head = (names[path].name.removesuffix(".weight") for path in (TABLE, _HEAD))
    rows_of_table, rows_of_head = (peft_config.token_indices(tensors.config, module) for module in (table, head))
    if head in tensors.rows and rows_of_table != rows_of_head:
        return True
    modules = {_plain_name(family, name.removesuffix(".weight")) for name in (*tensors.factors, *tensors.saved)}
    return not tensors.config.get("ensure_weight_tying") and bool({table, head} & modules)


def vocab_size(tensors: AdapterTensors, family: str) -> int | None:
    """The number of rows of the embedding table that replaces the base's; None if there is none."""
    table = FAMILIES[family].names[TABLE].name
    shapes = (t.shape for n, t in (tensors.copies | tensors.saved).items() if _plain_name(family, n) == table)
    return next((shape[0] for shape in shapes), None)


def changed_base(
    tensors: AdapterTensors, family: str, config: ModelConfig, base: trees.Tree, untied: bool
) -> dict[str, Any]:
    """The parameters of the base, with tensors that the directory of the adapters replaces.

    Args:
      family, config: the family (a key of `FAMILIES`) and the configuration of the base.
      base: its parameters, one entry per layer.
      untied: give a base whose head is its embedding table a separate head; from `unties`.

    Raises:
      UserError: a tensor does not fit the base.
    """
    flat = trees.flatten(base)
    _replace(flat, _names(family, config, flat), family, tensors.directory, tensors.copies)
    if untied:
        flat[_HEAD] = weights.dense(flat[TABLE]).T
    names = _names(family, config, flat)
    _replace(flat, names, family, tensors.directory, tensors.saved)
    for module, rows in tensors.rows.items():
        source = f"{tensors.directory / TENSORS}: '{module}'"
        for spec, path in _entries(names, family, f"{module}.weight", source):
            table = weights.dense(flat[path])
            table = table.T if spec.transposed else table  # (tokens, width)
            indices = np.asarray(peft_config.token_indices(tensors.config, module), np.int64)
            if rows.shape != (len(indices), table.shape[1]) or np.any((indices < 0) | (indices >= len(table))):
                raise UserError(
                    f"{source} has rows {rows.shape} for trainable_token_indices={indices.tolist()[:8]} of a table "
                    f"{table.shape}; they do not fit"
                )
            table = table.at[indices].set(jnp.asarray(rows, table.dtype))
            flat[path] = table.T if spec.transposed else table
    biased = {module: parts["bias"] for module, parts in tensors.factors.items() if "bias" in parts}
    if biased:
        scales = _scales(tensors)
        for module, addition in biased.items():
            for spec, path in _entries(names, family, f"{module}.weight", f"{tensors.directory / TENSORS}: '{module}'"):
                if (bias := flat.get(f"{path}_bias")) is None:
                    raise UserError(
                        f"{tensors.directory / CONFIG}: lora_bias=True adds a bias to '{module}', which has none in "
                        f"this {family}"
                    )
                flat[f"{path}_bias"] = bias + jnp.asarray(scales[module] * _part(spec, addition), bias.dtype)
    if _HEAD in flat and flat[_HEAD].shape[1] != flat[TABLE].shape[0]:
        raise UserError(
            f"{tensors.directory}: the embedding table has {flat[TABLE].shape[0]} rows, but the head "
            f"{flat[_HEAD].shape[1]}; a changed vocabulary needs new tensors for both"
        )
    return trees.unflatten(flat)


def adapters(tensors: AdapterTensors, family: str, config: ModelConfig, base: trees.Tree) -> dict[str, Any]:
    """The adapter tree, one entry per layer, in float32.

    Args:
      family, config: of the base.
      base: from `changed_base`.

    Raises:
      UserError: factors do not fit the base or each other.
    """
    directory = tensors.directory
    flat = trees.flatten(base)
    names, head = _names(family, config, flat), FAMILIES[family].names.get(_HEAD)
    modules = {
        module: _entries(names, family, f"{module}.weight", f"{directory / TENSORS}: '{module}'")
        for module in tensors.factors
        if _HEAD in flat or not head or f"{module}.weight" != head.name  # else the tied table has the same factors
    }
    _note_missing(tensors, names, family)
    scales = _scales(tensors)
    tree: dict[str, Any] = {}
    expected = {"a", "b"} | ({"magnitude"} if tensors.config.get("use_dora") else set())
    for module, entries in modules.items():
        source, parts = f"{directory}: '{module}'", tensors.factors[module]
        if (present := parts.keys() - {"bias"}) != expected:
            raise UserError(f"{source} has {', '.join(sorted(present))}; expected {', '.join(sorted(expected))}")
        rank = parts["a"].shape[-1]
        for spec, path in entries:
            if path == TABLE and "magnitude" in parts:
                raise UserError(f"{source}: DoRA of an embedding table normalizes its rows in peft; not supported")
            if len(flat[path].shape) != 2:
                raise UserError(f"{source} is not a matrix of this {family}")
            rows, columns = flat[path].shape
            if parts["a"].shape != (rows, rank) or parts["b"].shape != (rank, spec.part[1] * columns):
                shapes = f"a {parts['a'].shape} and b {parts['b'].shape}"
                raise UserError(f"{source}: {shapes} do not fit '{path}' of shape {(rows, columns)}; another geometry")
            values: dict[str, Any] = {
                "a": parts["a"],
                "b": _part(spec, parts["b"]),
                "scale": np.float32(scales[module]),
            }
            if "magnitude" in parts:
                if parts["magnitude"].size != spec.part[1] * columns:
                    raise UserError(
                        f"{source} has {parts['magnitude'].size} magnitudes for {spec.part[1] * columns} columns"
                    )
                squares = jnp.sum(jnp.square(weights.dense(flat[path]).astype(jnp.float32)), 0)
                values |= {"magnitude": _part(spec, parts["magnitude"].reshape(-1)), "squares": squares}
            tree |= {f"{path}/{name}": jnp.asarray(value) for name, value in values.items()}
    return trees.unflatten(tree)


def _note_missing(tensors: AdapterTensors, names: Table, family: str) -> None:
    """Prints a note about modules in target_modules that have no factors in the file; they stay as they are."""
    present = {_plain_name(family, f"{module}.weight", names) for module in tensors.factors}
    expected_names = peft_config.listed_tensors(tensors.config, names)
    if missing := [name.removesuffix(".weight") for name in expected_names if name not in present]:
        print(
            f"note: {tensors.directory}: {CONFIG} lists {', '.join(tensors.config['target_modules'])} in "
            f"target_modules, and {TENSORS} has no factors for {len(missing)} of these {len(expected_names)} modules "
            f"({missing[0]}, ...); they stay as in the base",
            file=sys.stderr,
        )


def _scales(tensors: AdapterTensors) -> dict[str, float]:
    """alpha / rank of each adapted module. Raises UserError for factors that are not of the rank of the config."""
    modules = list(tensors.factors)
    ranks, alphas = (
        peft_config.pattern_values(tensors.directory, tensors.config, key, modules)
        for key in ("rank_pattern", "alpha_pattern")
    )
    scales = {}
    for module, expected_rank, alpha in zip(modules, ranks, alphas, strict=True):
        source, parts = f"{tensors.directory}: '{module}'", tensors.factors[module]
        if not {"a", "b"} <= parts.keys():
            raise UserError(f"{source} has {', '.join(sorted(parts))}; expected a, b")
        if any(parts[name].ndim != 2 for name in ("a", "b")):
            raise UserError(f"{source} has a {parts['a'].shape} and b {parts['b'].shape}; expected matrices")
        rank = parts["a"].shape[-1]
        if rank != expected_rank:
            raise UserError(f"{source} has rank {rank}, but {CONFIG} says {expected_rank}")
        scales[module] = alpha / (rank**0.5 if tensors.config.get("use_rslora") else rank)
    return scales


def _names(family: str, config: ModelConfig, flat: dict[str, Any]) -> Table:
    """The stored tensors of a base; where its head is its embedding table, the tensor of the head is the table."""
    names = FAMILIES[family].names
    table = assemble.by_tensor(assemble.specs(FAMILIES[family].tensor_names(config), trees.unflatten(flat)))
    if _HEAD not in flat and _HEAD in names:
        table.setdefault(names[_HEAD].name, [(names[TABLE], TABLE)])
    return table


def _plain_name(family: str, name: str, known: Any = None) -> str:
    """The name of a tensor in the family's table, from a name with or without the prefix, or an alias."""
    prefix = FAMILIES[family].prefix
    known = {spec.name for spec in FAMILIES[family].names.values()} if known is None else known
    aliases = [name, *(re.sub(pattern, new, name) for pattern, new in ALIASES)]
    candidates = (n for alias in aliases for n in (alias, alias.removeprefix(prefix), prefix + alias))
    return next((n for n in candidates if n in known), name)


def _entries(names: Table, family: str, name: str, source: str) -> list[tuple[TensorSpec, str]]:
    entries = names.get(_plain_name(family, name, names))
    if entries is None:
        raise UserError(f"{source} belongs to no weight of this {family}")
    return entries


def _replace(flat: dict[str, Any], names: Table, family: str, directory: pathlib.Path, tensors: Any) -> None:
    """Replaces the parameters in `flat` by stored tensors."""
    for name, tensor in tensors.items():
        source = f"{directory / TENSORS}: '{name}'"
        for spec, path in _entries(names, family, name, source):
            value = _part(spec, tensor.T if spec.transposed else tensor)
            free = 1 if path == _HEAD else 0  # the axis whose size the vocabulary decides
            shapes = [
                tuple(size for axis, size in enumerate(array.shape) if path not in _BY_TOKEN or axis != free)
                for array in (value, flat[path])
            ]
            if value.ndim != len(flat[path].shape) or shapes[0] != shapes[1]:
                raise UserError(f"{source} {tensor.shape} does not fit '{path}' of shape {flat[path].shape}")
            dtype = jax.eval_shape(weights.dense, flat[path]).dtype
            flat[path] = jnp.asarray(value.astype(np.float32) + spec.offset if spec.offset else value, dtype)


def _part(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """The part of a stored array (..., n * width) that belongs to the parameter; see `TensorSpec`."""
    index, count = map(Fraction, spec.part)
    width = array.shape[-1] / count
    begin, size = int(index * width) // spec.groups, int(width) // spec.groups
    grouped = array.reshape(*array.shape[:-1], spec.groups, -1)[..., begin : begin + size]
    return grouped.reshape(*array.shape[:-1], -1)


def _read_file(directory: pathlib.Path) -> dict[str, np.ndarray]:
    path = directory / TENSORS
    if not path.is_file():
        pickled = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        reason = f" ({pickled[0]} is pickled: it could run code, and is not read)" if pickled else ""
        raise UserError(f"{directory}: no {TENSORS} here{reason}")
    files.check_not_lfs_pointer(path)
    try:
        with safe_open(path, framework="numpy") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    if not tensors:
        raise UserError(f"{path}: holds no tensor")
    return tensors
