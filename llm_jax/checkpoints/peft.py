"""Adapter directories of the `peft` package: adapter_config.json and adapter_model.safetensors; reading and writing.

Supported are plain LoRA, rank-stabilized LoRA and DoRA, with ranks and alphas that may differ by module.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from llm_jax import checkpoints, files, lora, trees, weights
from llm_jax.checkpoints import assemble, location
from llm_jax.checkpoints.checkpoint import Checkpoint, Loaded, Shardings, arranged, on_default_device
from llm_jax.checkpoints.families import FAMILIES
from llm_jax.checkpoints.huggingface import write_safetensors
from llm_jax.checkpoints.names import TensorSpec
from llm_jax.errors import UserError
from llm_jax.lora.adapt import by_path
from llm_jax.model.transformer import Transformer
from llm_jax.schema import ModelConfig
from llm_jax.tokenizers import Tokenizer

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
# End of a tensor's name -> (name in the adapter tree, whether the tensor is its transpose).
_PARTS = {
    "lora_A.weight": ("a", True),
    "lora_B.weight": ("b", True),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
    "lora_magnitude_vector": ("magnitude", False),
}
# Keys that, if set, select computations that are not implemented here.
_REFUSED = (
    "modules_to_save",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
    "velora_config",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
)
# Initializations that leave the base unchanged; others (pissa, olora, loftq, corda, ...) subtract the initial factors.
_UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


class Peft(Checkpoint):
    """A directory of peft. Its parameters are the base, which it names, with the adapters attached."""

    form = "peft"

    @staticmethod
    def matches(path: pathlib.Path) -> bool:
        """Whether a directory holds adapters of peft."""
        return (path / CONFIG).is_file()

    @functools.cached_property
    def base(self) -> Checkpoint:
        """The checkpoint that adapter_config.json names, by a path or else on the hub.

        Raises:
          UserError: none is named, or it cannot be opened.
        """
        name = base_name(self.path)
        try:
            return checkpoints.open(name if location.is_remote(name) or pathlib.Path(name).exists() else f"hf:{name}")
        except UserError as error:
            raise self._unreadable(error) from error

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer

    @property
    def family(self) -> str:
        return self.base.family

    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        base = self._base_params(config, shardings)
        return arranged(lora.attach(base, self._adapters(base)), config, shardings, as_stored)

    def separate(self) -> tuple[Loaded, dict[str, Any]]:
        """The base without the adapters, and the adapters, both with one entry per layer and in float32.

        Raises:
          UserError: as `params`.
        """
        base = self._base_params(self.config, on_default_device)
        config = dataclasses.replace(self.config, scan_layers=False, attention_kernel="auto")
        return Loaded(Transformer(config), base, self.tokenizer), self._adapters(base)

    def _base_params(self, config: ModelConfig, shardings: Shardings) -> dict[str, Any]:
        config = dataclasses.replace(self.config, scan_layers=False, precision=config.precision)
        try:
            return self.base.params(config, shardings)
        except UserError as error:
            raise self._unreadable(error) from error

    def _adapters(self, base: dict[str, Any]) -> dict[str, Any]:
        return load(self.path, self.family, base, self.config.tie_embeddings)

    def _unreadable(self, error: UserError) -> UserError:
        return UserError(f"{self.path}: the base of its adapters cannot be read: {error}")


def base_name(directory: pathlib.Path) -> str:
    """The path or hub name of the base that the adapters name. Raises UserError if they name none."""
    name = _read_config(directory).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{directory / CONFIG}: base_model_name_or_path is {name!r}; expected the base's path or name")
    return name


def load(directory: pathlib.Path, family: str, base: trees.Tree, tied: bool) -> dict[str, Any]:
    """The adapter tree of a directory, one entry per layer, in float32.

    Args:
      family: of the base, a key of `FAMILIES`.
      base: its parameters, one entry per layer.
      tied: whether the base's head is its embedding table.

    Raises:
      UserError: a file is missing or damaged, a setting is unknown, lora_alpha is missing, or tensors do not fit the
        base or each other.
    """
    config = _read_config(directory)
    modules = _modules(family, base)
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _read_tensors(directory).items():
        module, part = _split(name)
        if part not in _PARTS or module not in modules:
            raise UserError(f"{directory / TENSORS}: '{name}' belongs to no matrix of this {family}")
        entry, transposed = _PARTS[part]
        factors.setdefault(module, {})[entry] = (tensor.T if transposed else tensor).astype(np.float32)
    adapters: dict[str, Any] = {}
    flat = trees.flatten(base)
    for module, parts in factors.items():
        source = f"{directory}: '{module}'"
        expected = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
        if set(parts) != expected:
            raise UserError(f"{source} has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")
        if any(parts[name].ndim != 2 for name in ("a", "b")):
            raise UserError(f"{source} has a {parts['a'].shape} and b {parts['b'].shape}; expected matrices")
        rank = parts["a"].shape[-1]
        if rank != (expected_rank := _pattern(config, "rank_pattern", module, "r")):
            raise UserError(f"{source} has rank {rank}, but {CONFIG} says {expected_rank}")
        alpha = _pattern(config, "alpha_pattern", module, "lora_alpha")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        for path, spec in modules[module]:
            _refuse_table(source, path, tied, "magnitude" in parts)
            i, count = spec.part
            rows, columns = flat[path].shape
            if parts["a"].shape != (rows, rank) or parts["b"].shape != (rank, count * columns):
                shapes = f"a {parts['a'].shape} and b {parts['b'].shape}"
                raise UserError(f"{source}: {shapes} do not fit '{path}' of shape {(rows, columns)}; another geometry")
            columns_of_part = slice(i * columns, (i + 1) * columns)
            entries: dict[str, Any] = {"a": parts["a"], "b": parts["b"][:, columns_of_part], "scale": np.float32(scale)}
            if "magnitude" in parts:
                if parts["magnitude"].size != count * columns:
                    raise UserError(f"{source} has {parts['magnitude'].size} magnitudes for {count * columns} columns")
                squares = jnp.sum(jnp.square(weights.dense(flat[path]).astype(jnp.float32)), 0)
                entries |= {"magnitude": parts["magnitude"].reshape(-1)[columns_of_part], "squares": squares}
            adapters |= {f"{path}/{part}": jnp.asarray(leaf) for part, leaf in entries.items()}
    return trees.unflatten(adapters)


def save(
    directory: pathlib.Path,
    family: str,
    adapters: trees.Tree,
    base: trees.Tree,
    tied: bool,
    *,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    base_name: str | None = None,
) -> None:
    """Writes a directory that `peft` loads; it appears complete or not at all.

    Args:
      family: of the base, a key of `FAMILIES`.
      adapters: one entry per layer; PiSSA is written as LoRA of twice the rank over the unchanged base.
      base: the parameters of the base, which may be abstract, one entry per layer.
      tied: whether the base's head is its embedding table.
      rank_stabilized: scale = alpha / sqrt(rank) instead of alpha / rank.
      dropout: recorded as lora_dropout, for further training.
      base_name: recorded as base_model_name_or_path.

    Raises:
      UserError: the directory exists, or peft cannot hold the adapters.
    """
    if directory.exists():
        raise UserError(f"--output={directory} exists; give another, or remove it")
    module_of = {path: (m, spec) for m, specs in _modules(family, base).items() for path, spec in specs}
    if any(path.endswith("/start_a") for path in trees.flatten(adapters)):
        adapters = lora.plain(adapters)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dora = False
    for path, parts in by_path(adapters).items():
        module, spec = module_of[path]
        if spec.part[1] > 1:
            raise UserError(f"'{path}' is a part of {module} in a {family}; peft has one adapter for all its parts")
        _refuse_table(f"'{path}'", path, tied, "magnitude" in parts)
        a, b, scale = (np.asarray(parts[name], np.float32) for name in ("a", "b", "scale"))
        used = a.any(0) | b.any(1)  # the other ranks are padding
        if not used.any():
            continue
        rank = int(used.sum())
        ranks[module], alphas[module] = rank, float(scale) * (rank**0.5 if rank_stabilized else rank)
        ends = ("lora_embedding_A", "lora_embedding_B") if path == "embed/table" else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (a[:, used], b[used]), strict=True):
            tensors[f"{_ROOT}{module}.{end}"] = np.ascontiguousarray(factor.T)
        if "magnitude" in parts:
            dora = True
            tensors[f"{_ROOT}{module}.lora_magnitude_vector"] = np.asarray(parts["magnitude"], np.float32)
    if not ranks:
        raise UserError("the adapters are all zero; there is nothing to write")
    rank = max(set(ranks.values()), key=list(ranks.values()).count)  # the most frequent
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": None if family == "bert" else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "use_rslora": rank_stabilized,
        "use_dora": dora,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: _number(x) for m, x in alphas.items() if x != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with files.new_directory(directory, source=f"--output={directory}") as partial:
        write_safetensors(tensors, partial / TENSORS)
        (partial / CONFIG).write_text(files.dump_json(config))


def _refuse_table(source: str, path: str, tied: bool, dora: bool) -> None:
    if path == "embed/table" and (tied or dora):
        reason = "DoRA normalizes its rows" if dora else "the tied head does not use the adapter"
        raise UserError(f"{source}: in peft an adapted embedding table means something else ({reason}); not supported")


def _modules(family: str, base: trees.Tree) -> dict[str, list[tuple[str, TensorSpec]]]:
    """{module of peft: [(path, spec) of every matrix that it contains]}."""
    modules: dict[str, list[tuple[str, TensorSpec]]] = {}
    flat = trees.flatten(base)
    for path, spec in assemble.specs(FAMILIES[family].names, base).items():
        if len(flat[path].shape) == 2:
            modules.setdefault(spec.name.removesuffix(".weight"), []).append((path, spec))
    return modules


def _split(name: str) -> tuple[str, str]:
    """A tensor's name -> (module, part)."""
    name = name.removeprefix(_ROOT)
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""


def _pattern(config: Mapping[str, Any], patterns: str, module: str, default: str) -> float:
    """The value of the first pattern that matches the end of the module's name, else of the key `default`."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    source = directory / CONFIG
    try:
        config = json.loads(source.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        peft_type = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(f"{source}: peft_type is {peft_type!r}; expected 'LORA'")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{source}: {key} is {value!r}; expected a positive number")
    if config.get("bias", "none") != "none":
        raise UserError(f"{source}: bias={config['bias']!r} is not supported; expected 'none'")
    for key in _REFUSED:
        if config.get(key):
            raise UserError(f"{source}: {key}={config[key]!r} is not supported")
    if config.get("init_lora_weights", True) not in _UNCHANGED_BASE:
        raise UserError(
            f"{source}: init_lora_weights={config['init_lora_weights']!r} changes the base; have peft convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        # Ends of names, "^" and "\\d" are in use; matching other expressions could take unbounded time.
        if not isinstance(table, dict) or not all(
            re.fullmatch(r"(\w|[.^]|\\[.d])+", k) and isinstance(v, (int, float)) and v > 0 for k, v in table.items()
        ):
            raise UserError(f"{source}: {key} is {table!r}; expected ends of modules' names and positive numbers")
    return config


def _read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    path = directory / TENSORS
    if not path.is_file():
        pickled = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        reason = f" ({pickled[0]} is pickled: it could run code, and is not read)" if pickled else ""
        raise UserError(f"{directory}: no {TENSORS} here{reason}")
    try:
        with safe_open(path, framework="numpy") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    if not tensors:
        raise UserError(f"{path}: holds no tensor")
    return tensors


def _number(value: float) -> int | float:
    """As an int if it is one up to rounding, because peft checks the type of lora_alpha."""
    rounded = round(value, 6)
    return int(rounded) if rounded == int(rounded) else value
