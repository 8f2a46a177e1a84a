"""Every option, its type and its meaning: ConfigDict -> frozen dataclasses, strictly.

The dataclasses have no defaults: the values stand in `configs/default.py`, in one place. A key that
is unknown, missing or of another type is an error that names it and the nearest existing key.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.errors import UserError

Rules = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str  # "stdlib" (the running Python's own source text), or a text file, directory or glob
    validation_fraction: float  # share of the bytes held out, by whole groups of documents
    cache_dir: str  # tokenized corpora and trained tokenizers; "" is ~/.cache/llm_jax


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    kind: str  # "char", "byte", "bpe" (sentencepiece)
    vocab_size: int  # special ids included; ignored by "byte"


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    kind: str  # "none", "learned", "rope", "alibi"
    base: float  # rope: the wavelengths run from 2 pi to 2 pi * base
    max_length: int  # learned: rows of the table


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    params: str  # dtype the weights and the optimizer's state are kept in
    compute: str  # dtype of activations and of the operands of products
    accumulate: str  # dtype of the sums inside products
    output: str  # dtype of the logits


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int  # 0: the tokenizer's
    width: int
    num_layers: int
    layer_pattern: tuple[str, ...]  # kinds of layer, repeated over the depth: "global", "local"
    window: int  # "local" layers see this many last positions, the own one included
    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_width: int  # 0: width // num_heads
    mlp: str  # "gated" or "plain"
    mlp_width: int
    activation: str  # "silu", "gelu" (tanh form), "gelu_exact", "relu"
    norm: str  # "rms" or "layer"
    norm_eps: float
    qk_norm: bool  # RMS-normalize queries and keys per head (Henry et al. 2020, arXiv:2010.04245)
    bias: bool  # biases in attention and MLP
    tie_head: bool  # the output head is the embedding table
    position: PositionConfig
    precision: PrecisionConfig
    scan_layers: bool  # one compiled layer per stage (training); else one per layer
    remat: str  # what the backward pass recomputes: "none", "dots" (all but products), "full"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    kind: str  # "adamw" or "sgd"
    lr: float  # the peak
    warmup_steps: int
    schedule: str  # after the warm-up: "cosine", "linear" or "constant"
    final_lr_fraction: float  # of the peak, reached at the last step
    weight_decay: float
    decay_rules: Rules  # (regular expression, factor on weight_decay) over parameter names
    beta1: float  # adamw; momentum of sgd
    beta2: float
    eps: float
    clip_norm: float  # of the global gradient; 0: no clipping


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    seed: int
    batch_size: int  # sequences per step, over all devices and micro-batches
    seq_len: int
    grad_accumulation: int  # micro-batches a step
    loss_chunk: int  # positions whose logits exist at a time; 0: all of seq_len


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int  # steps; 0: at the end only
    rows: int  # held-out sequences per evaluation while training; 0: all
    prompts: tuple[str, ...]  # continued before and after training
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int  # steps; 0: at the end only
    keep_last: int
    keep_best: int  # by held-out loss, besides the last


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int  # copies of the model; -1: all remaining devices
    fsdp: int  # shards of weights, optimizer state and batch
    tensor: int  # shards of heads, MLP and vocabulary
    rules: Rules  # (regular expression, (axis of rows, axis of columns)) over parameter names


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    init_from: str  # a run whose weights training starts from; "": random


def build(mapping: Mapping[str, Any], cls: Any = Config, prefix: str = "") -> Any:
    """A (nested) mapping -> the dataclass `cls`, checked for names and types.

    Raises:
      UserError: an unknown or missing key, or a value of another type; it names the dotted key.
    """
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise UserError(f"unknown config key '{prefix}{key}'; {nearest(prefix + str(key))}")
    values = {}
    for key, kind in hints.items():
        if key not in mapping:
            raise UserError(f"config key '{prefix}{key}' is missing")
        value = mapping[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping) and not hasattr(value, "items"):
                raise UserError(f"config key '{prefix}{key}' is {value!r}; expected a section")
            values[key] = build(value, kind, f"{prefix}{key}.")
        else:
            values[key] = _convert(value, kind, prefix + key)
    return cls(**values)


def as_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested dictionaries of JSON values; `build` is the inverse."""
    return dataclasses.asdict(config)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The dataclass as {dotted key: value}."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def keys(cls: Any = Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options."""
    for key, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{prefix}{key}.")
        else:
            yield prefix + key


def nearest(key: str) -> str:
    """A phrase that names the existing key nearest to `key`."""
    options = list(keys())
    ends = [o for o in options if o.endswith(f".{key}")]  # a section left out
    found = ends or difflib.get_close_matches(key, options, 1, 0.0)
    return f"did you mean '{found[0]}'?"


def choice(key: str, value: str, options: Mapping[str, Any] | tuple[str, ...]) -> Any:
    """options[value] (or value itself of a tuple), or a UserError that names the key and the choices."""
    if value not in options:
        raise UserError(f"config key '{key}' is {value!r}; expected one of {', '.join(sorted(options))}")
    return options[value] if isinstance(options, Mapping) else value


def _convert(value: Any, kind: Any, key: str) -> Any:
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, types.UnionType):
        raise TypeError(f"{key}: an option has one type")
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(kind)[0]
        deep = inner is not str
        converted = tuple(tuple(map(_freeze, v)) if deep and isinstance(v, (list, tuple)) else v for v in value)
        well = all(
            (isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str)) if deep else isinstance(v, str)
            for v in converted
        )
        if well:
            return converted
    elif origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif origin is not float and isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
        return value
    expected = "a list of (regular expression, value)" if kind == Rules else getattr(kind, "__name__", str(kind))
    raise UserError(f"config key '{key}' is {value!r}; expected {expected}")


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value
