"""Writes adapters as a directory of the `peft` package; `peft.py` reads them."""

import pathlib
from collections.abc import Mapping

import numpy as np

from llm_jax import files, lora, trees
from llm_jax.checkpoints import assemble, huggingface
from llm_jax.checkpoints.families import FAMILIES
from llm_jax.checkpoints.peft_config import CONFIG
from llm_jax.checkpoints.peft_tensors import ROOT, TABLE, TENSORS
from llm_jax.errors import UserError
from llm_jax.lora.adapt import by_path
from llm_jax.schema import ModelConfig


def save(
    directory: pathlib.Path,
    family: str,
    config: ModelConfig,
    adapters: trees.Tree,
    base: trees.Tree,
    *,
    rank_stabilized: bool = False,
    dropout: float = 0.0,
    base_name: str | None = None,
    other_files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes, atomically, a directory that `peft` can load.

    Args:
      family, config: of the base; the former is a key of `FAMILIES`.
      adapters: one entry per layer; PiSSA is written as LoRA of twice the rank over the unchanged base.
      base: the parameters of the base, which may be abstract, one entry per layer.
      rank_stabilized: scale = alpha / sqrt(rank) instead of alpha / rank.
      dropout: recorded as lora_dropout, for further training.
      base_name: recorded as base_model_name_or_path.
      other_files: content by name, such as the tokenizer's files.

    Raises:
      UserError: the directory exists, or peft cannot hold the adapters.
    """
    if directory.exists():
        raise UserError(f"--output={directory} already exists; choose another path, or remove it")
    specs = assemble.specs(FAMILIES[family].tensor_names(config), base)
    if any(path.endswith("/start_a") for path in trees.flatten(adapters)):
        adapters = lora.to_lora(adapters)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dora = False
    for path, parts in by_path(adapters).items():
        module = specs[path].name.removesuffix(".weight")
        if specs[path].part[1] > 1:
            raise UserError(f"'{path}' is a part of {module} in a {family}; peft has one adapter for all its parts")
        if path == TABLE and "magnitude" in parts:
            raise UserError(f"'{path}': DoRA of an embedding table normalizes its rows in peft; not supported")
        a, b, scale = (np.asarray(parts[name], np.float32) for name in ("a", "b", "scale"))
        used = a.any(0) | b.any(1)  # the other ranks are padding
        if not used.any():
            continue
        rank = int(used.sum())
        ranks[module], alphas[module] = rank, float(scale) * (rank**0.5 if rank_stabilized else rank)
        ends = ("lora_embedding_A", "lora_embedding_B") if path == TABLE else ("lora_A.weight", "lora_B.weight")
        for end, factor in zip(ends, (a[:, used], b[used]), strict=True):
            tensors[f"{ROOT}{module}.{end}"] = np.ascontiguousarray(factor.T)
        if "magnitude" in parts:
            dora = True
            tensors[f"{ROOT}{module}.lora_magnitude_vector"] = np.asarray(parts["magnitude"], np.float32)
    if not ranks:
        raise UserError("the adapters are all zero; there is nothing to write")
    rank = max(set(ranks.values()), key=list(ranks.values()).count)  # the most frequent
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    settings = {
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
    if config.tie_embeddings and specs[TABLE].name.removesuffix(".weight") in ranks:
        settings["ensure_weight_tying"] = True  # the head uses the adapted table, as it does here
    with files.new_directory(directory, source=f"--output={directory}") as partial:
        huggingface.write_safetensors(tensors, partial / TENSORS)
        (partial / CONFIG).write_text(files.dump_json(settings))
        huggingface.write_files(partial, other_files or {})


def _number(value: float) -> int | float:
    """Converts a number that is whole up to rounding to int, because peft checks the type of lora_alpha."""
    rounded = round(value, 6)
    return int(rounded) if rounded == int(rounded) else value
