"""Adapter directories of the `peft` package: adapter_config.json and adapter_model.safetensors, in and out.

Plain, rank-stabilized and DoRA adapters. Ranks and strengths that differ by module are read and written.
"""

import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_jax import trees, weights
from llm_jax.checkpoints import assemble
from llm_jax.checkpoints.families import FAMILIES
from llm_jax.checkpoints.names import Their
from llm_jax.errors import UserError
from llm_jax.lora.adapt import by_path
from llm_jax.lora.mixing import plain

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
# Their part of a module -> ours; of matrices ours are turned, but for embeddings.
_PARTS = {
    "lora_A.weight": ("a", True),
    "lora_B.weight": ("b", True),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
    "lora_magnitude_vector": ("magnitude", False),
}
# Keys that change the numbers in ways that are not done here, where they are set.
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
# Starts that leave the base as it is; others (pissa, olora, loftq, corda, ...) put back what they took out of it.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def is_directory_of(path: pathlib.Path) -> bool:
    """Whether a directory holds adapters of peft."""
    return (path / CONFIG).is_file()


def base_of(directory: pathlib.Path) -> str:
    """The base that the adapters name: a path or a name on the hub. Raises UserError where there is none."""
    said = _config(directory).get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        raise UserError(f"{directory / CONFIG}: base_model_name_or_path is {said!r}; expected the base's path or name")
    return said


def load(directory: pathlib.Path, kind: str, base: trees.Tree, tied: bool) -> dict[str, Any]:
    """The adapter tree of a directory, one entry per layer, in float32.

    Args:
      kind: the family of the base.
      base: its parameters, one entry per layer.
      tied: whether the base's head is its embedding table.

    Raises:
      UserError: a file that is missing or damaged, a setting that is not known here, a missing lora_alpha, or
        tensors that do not fit the base or each other; one line that names it.
    """
    said = _config(directory)
    modules = _modules(kind, base)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in _tensors(directory).items():
        module, part = _split(name)
        if part not in _PARTS or module not in modules:
            raise UserError(f"{directory / TENSORS}: '{name}' is of no matrix of this {kind}")
        ours, turned = _PARTS[part]
        found.setdefault(module, {})[ours] = (tensor.T if turned else tensor).astype(np.float32)
    adapters: dict[str, Any] = {}
    flat = trees.flatten(base)
    for module, parts in found.items():
        source = f"{directory}: '{module}'"
        expected = {"a", "b", "magnitude"} if said.get("use_dora") else {"a", "b"}
        if set(parts) != expected:
            raise UserError(f"{source} has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")
        if any(parts[name].ndim != 2 for name in ("a", "b")):
            raise UserError(f"{source} has a {parts['a'].shape} and b {parts['b'].shape}; expected matrices")
        rank = parts["a"].shape[-1]
        if rank != (stated := _pattern(said, "rank_pattern", module, "r")):
            raise UserError(f"{source} has rank {rank}, but {CONFIG} says {stated}")
        alpha = _pattern(said, "alpha_pattern", module, "lora_alpha")
        scale = alpha / (rank**0.5 if said.get("use_rslora") else rank)
        for path, their in modules[module]:
            _refuse_table(source, path, tied, "magnitude" in parts)
            i, n = their.part
            rows, columns = flat[path].shape
            if parts["a"].shape != (rows, rank) or parts["b"].shape != (rank, n * columns):
                shapes = f"a {parts['a'].shape} and b {parts['b'].shape}"
                raise UserError(f"{source}: {shapes} do not fit '{path}' of shape {(rows, columns)}; another geometry")
            mine = slice(i * columns, (i + 1) * columns)
            own: dict[str, Any] = {"a": parts["a"], "b": parts["b"][:, mine], "scale": np.float32(scale)}
            if "magnitude" in parts:
                if parts["magnitude"].size != n * columns:
                    raise UserError(f"{source} has {parts['magnitude'].size} lengths for {n * columns} columns")
                squares = jnp.sum(jnp.square(weights.dense(flat[path]).astype(jnp.float32)), 0)
                own |= {"magnitude": parts["magnitude"].reshape(-1)[mine], "squares": squares}
            adapters |= {f"{path}/{part}": jnp.asarray(leaf) for part, leaf in own.items()}
    return trees.unflatten(adapters)


def save(
    directory: pathlib.Path,
    kind: str,
    adapters: trees.Tree,
    base: trees.Tree,
    tied: bool,
    *,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    base_name: str | None = None,
) -> None:
    """Writes a directory that `peft` loads; it appears whole or not at all.

    Args:
      adapters: one entry per layer; PiSSA is written as an adapter of the unchanged base, of twice the rank.
      base: the parameters (or their abstract form), one entry per layer.
      tied: whether the base's head is its embedding table.
      rank_stabilized: how `scale` is made of alpha and the rank.
      dropout: what is written for those who go on training.
      base_name: where peft finds the base.

    Raises:
      UserError: the directory exists, or peft cannot hold the adapters.
    """
    if directory.exists():
        raise UserError(f"--output={directory} exists; give another, or remove it")
    module_of = {path: (m, their) for m, ours in _modules(kind, base).items() for path, their in ours}
    if any(path.endswith("/start_a") for path in trees.flatten(adapters)):
        adapters = plain(adapters)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dora = False
    for path, parts in by_path(adapters).items():
        module, their = module_of[path]
        if their.part[1] > 1:
            raise UserError(f"'{path}' is a part of {module} in a {kind}; peft has one adapter for all its parts")
        _refuse_table(f"'{path}'", path, tied, "magnitude" in parts)
        a, b, scale = (np.asarray(parts[name], np.float32) for name in ("a", "b", "scale"))
        kept = a.any(0) | b.any(1)  # the rest is padding
        if not kept.any():
            continue
        own = int(kept.sum())
        ranks[module], alphas[module] = own, float(scale) * (own**0.5 if rank_stabilized else own)
        ends = ("lora_embedding_A", "lora_embedding_B") if path == "embed/table" else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (a[:, kept], b[kept]), strict=True):
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
        "task_type": None if kind == "bert" else "CAUSAL_LM",
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
        "fan_in_fan_out": kind == "gpt2",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    partial = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        partial.chmod(0o755)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output={directory} cannot be written ({error})") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_table(source: str, path: str, tied: bool, dora: bool) -> None:
    if path == "embed/table" and (tied or dora):
        why = "its lengths are of rows" if dora else "the tied head is left as it was"
        raise UserError(f"{source}: in peft an adapted embedding table means something else ({why}); not supported")


def _modules(kind: str, base: trees.Tree) -> dict[str, list[tuple[str, Their]]]:
    """Their module -> the matrices of ours that it holds."""
    found: dict[str, list[tuple[str, Their]]] = {}
    flat = trees.flatten(base)
    for ours, their in assemble.names(FAMILIES[kind].names, base).items():
        if len(flat[ours].shape) == 2:
            found.setdefault(their.name.removesuffix(".weight"), []).append((ours, their))
    return found


def _split(name: str) -> tuple[str, str]:
    """A tensor's name -> (module, part)."""
    name = name.removeprefix(_ROOT)
    for part in _PARTS:
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""


def _pattern(said: Mapping[str, Any], patterns: str, module: str, default: str) -> float:
    """The number of the first pattern whose end of a name the module has, else the default."""
    for pattern, value in (said.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return said[default]


def _config(directory: pathlib.Path) -> dict[str, Any]:
    source = directory / CONFIG
    try:
        said = json.loads(source.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from error
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else said
        raise UserError(f"{source}: peft_type is {kind!r}; expected 'LORA'")
    for key in ("r", "lora_alpha"):
        value = said.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{source}: {key} is {value!r}; expected a positive number")
    if said.get("bias", "none") != "none":
        raise UserError(f"{source}: bias={said['bias']!r} is not supported; expected 'none'")
    for key in _REFUSED:
        if said.get(key):
            raise UserError(f"{source}: {key}={said[key]!r} is not supported")
    if said.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise UserError(
            f"{source}: init_lora_weights={said['init_lora_weights']!r} changes the base; have peft convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        table = said.get(key) or {}
        # Ends of names, "^" and "\\d" are what peft's users write; other expressions could run for ever.
        if not isinstance(table, dict) or not all(
            re.fullmatch(r"(\w|[.^]|\\[.d])+", k) and isinstance(v, (int, float)) and v > 0 for k, v in table.items()
        ):
            raise UserError(f"{source}: {key} is {table!r}; expected ends of modules' names and positive numbers")
    return said


def _tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    path = directory / TENSORS
    if not path.is_file():
        pickled = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        said = f" ({pickled[0]} is pickled: it could run code, and is not read)" if pickled else ""
        raise UserError(f"{directory}: no {TENSORS} here{said}")
    try:
        with safe_open(path, framework="numpy") as handle:
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    if not found:
        raise UserError(f"{path}: no tensor in it")
    return found


def _number(value: float) -> int | float:
    """As an int where it is one up to rounding: peft reads lora_alpha with strict types."""
    rounded = round(value, 6)
    return int(rounded) if rounded == int(rounded) else value
