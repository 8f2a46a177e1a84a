"""Every option, its type and its meaning: ConfigDict -> frozen dataclasses, strictly.

The dataclasses have no defaults: the values stand in `configs/default.py`, in one place. A key that
is unknown, missing or of another type is an error that names it and the nearest existing key.
"""

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from llm_jax.errors import UserError

Rules = tuple[tuple[str, Any], ...]

# Numbers and their ranges: (from, to, both inclusive). Infinite and undefined numbers are in none.
Count = Annotated[int, (1, 2**62)]
CountOrZero = Annotated[int, (0, 2**62)]
Positive = Annotated[float, (1e-30, 1e30)]
PositiveOrZero = Annotated[float, (0.0, 1e30)]
Share = Annotated[float, (0.0, 1.0)]
Seed = Annotated[int, (0, 2**32 - 1)]
MeshSize = Annotated[int, (-1, 2**31)]
LoraVariant = Annotated[str, ("lora", "fa", "dora", "pissa", "loftq")]
Dtype = Annotated[str, ("float32", "bfloat16", "float16", "float64")]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: (
        str  # "stdlib", asset:NAME, hf:NAME, a file, directory or glob; A,B,... or A@WEIGHT,B@WEIGHT,...; sources.py
    )
    kind: str  # what is learned from: "text", "instructions" (the answers), "preferences" (pairs); see data/encode.py
    field: str  # the text of a record (JSON lines, Parquet, hf:NAME) where the kind is "text"
    validation_fraction: Share  # share of the bytes held out, by whole groups of documents
    cache_dir: str  # tokenized corpora and trained tokenizers; "" is ~/.cache/llm_jax
    workers: CountOrZero  # processes that read and tokenize; 0: by the size of the text


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    kind: str  # "word", "char", "byte", "bpe", "char_bpe", "byte_bpe", "wordpiece", "unigram"
    vocab_size: CountOrZero  # special ids included; the most that "char" takes; ignored by "byte"
    path: (
        str  # one that is there, whose kind and size then count: what `pretrained.load_tokenizer` takes; "": train one
    )


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    kind: str  # "none", "sinusoidal", "learned", "shaw", "t5", "alibi", "rope"
    base: Positive  # rope, sinusoidal: the wavelengths run from 2 pi to 2 pi * base
    combine: str  # sinusoidal, learned: "add" to the token embeddings, or "concatenate"
    width: CountOrZero  # of the vectors that are concatenated
    local_base: PositiveOrZero  # rope: base of "local" layers, which are then not scaled; 0: as the others
    max_length: Count  # learned: rows of the table
    clip: Count  # shaw: the largest distance that has a vector of its own
    shaw: str  # shaw: vectors for "keys", "values" or "both"
    buckets: Count  # t5
    max_distance: Count  # t5: where the last bucket begins
    fraction: Share  # rope: share of the head width that is turned
    interleaved: bool  # rope: pairs of neighbours instead of halves
    scaling: str  # rope: "none", "linear", "ntk", "dynamic", "yarn", "llama3"
    factor: Positive  # of the scaling
    original_length: CountOrZero  # the trained length (dynamic, yarn, llama3)
    beta_fast: Positive  # yarn: pairs with more turns over the trained length stay
    beta_slow: Positive  # yarn: pairs with fewer turns are divided by the factor
    low_frequency: Positive  # llama3: as beta_slow
    high_frequency: Positive  # llama3: as beta_fast


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    params: Dtype  # dtype the weights and the optimizer's state are kept in
    compute: Dtype  # dtype of activations and of the operands of products
    accumulate: Dtype  # dtype of the sums inside products
    output: Dtype  # dtype of the logits


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: CountOrZero  # 0: the tokenizer's
    width: Count
    base_width: CountOrZero  # rates and logits keep the sizes they have at this width (μP); 0: no transfer
    num_layers: Count
    causal: bool  # a token sees what is before it (decoder), or all of its document (encoder)
    layer_pattern: tuple[str, ...]  # kinds of layer, repeated over the depth: "global", "local"
    window: Count  # "local" layers see this many last positions, the own one included (encoder: on each side)
    num_heads: Count
    num_kv_heads: Count  # divides num_heads
    head_width: CountOrZero  # 0: width // num_heads
    mlp: str  # "gated" or "plain"
    mlp_width: Count
    activation: str  # "silu", "gelu" (tanh form), "gelu_exact", "relu"
    norm: str  # "rms" or "layer"
    norm_eps: PositiveOrZero
    norm_place: str  # "pre": before attention and MLP; "post": after their sums; "both": before, and after each
    parallel: bool  # attention and MLP side by side on one norm, instead of one after the other
    embed_norm: bool  # a norm after the embeddings
    num_types: CountOrZero  # embeddings of token types (BERT's two sentences); 0: none
    pooler: bool  # tanh(W x + b) of the first token (BERT), see `Transformer.pooled`
    qk_norm: bool  # RMS-normalize queries and keys per head (Henry et al. 2020, arXiv:2010.04245)
    bias: bool  # biases in attention and MLP
    qkv_bias: bool  # biases of queries, keys and values only
    head_bias: bool  # a bias of the output head, which is then not tied
    attention_scale: PositiveOrZero  # of the scores; 0: 1 / sqrt(head width)
    attention_softcap: PositiveOrZero  # scores become cap tanh(scores / cap) (arXiv:2408.00118); 0: none
    logit_softcap: PositiveOrZero  # the same of logits
    scale_embeddings: bool  # multiply token embeddings by sqrt(width) (Vaswani et al. 2017, section 3.4)
    tie_head: bool  # the output head is the embedding table
    attention: str  # who computes it: "auto", "plain", "xla", "cudnn", "splash"; see model/product.py
    cache: Annotated[str, ("compute", "int8")]  # of keys and values in decoding: the compute dtype, or int8 by head
    position: PositionConfig
    precision: PrecisionConfig
    scan_layers: bool  # one compiled layer per stage (training); else one per layer
    remat: str  # what the backward pass recomputes: "none", "dots" (all but products), "full"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    kind: str  # "adamw", "lion", "adafactor", "muon" (hidden matrices; adamw for the rest) or "sgd"
    lr: PositiveOrZero  # the peak
    lr_rules: Rules  # (regular expression, factor on the rate) over parameter names
    warmup_steps: CountOrZero
    schedule: str  # after the warm-up: "cosine", "linear", "constant", "wsd" or "inverse_sqrt"
    final_lr_fraction: Share  # of the peak, reached at the last step (cosine, linear, wsd)
    decay_fraction: Share  # wsd: the share of all steps in which the rate falls, the last ones
    weight_decay: PositiveOrZero
    decay_rules: Rules  # (regular expression, factor on weight_decay) over parameter names
    beta1: Share  # adamw, lion; momentum of sgd
    beta2: Share  # adamw, lion
    eps: PositiveOrZero  # adamw
    momentum: Share  # muon
    clip_norm: PositiveOrZero  # of the global gradient; 0: no clipping
    ema_decay: Share  # of a moving average of the weights, which is then what is evaluated and loaded; 0: none


@dataclasses.dataclass(frozen=True)
class LossConfig:
    kind: str  # "cross_entropy", "unlikelihood", "entmax", "distillation" or "dpo"; see training/losses.py
    masked: Annotated[str, ("none", "tokens", "words")]  # what is hidden, to be found again; "none": the next token is
    masked_share: Annotated[float, (0.001, 1.0)]  # of the tokens or words that are hidden; see data/masking.py
    z_loss: PositiveOrZero  # weight of log(sum exp(logits))^2
    label_smoothing: Share  # of the target's probability, shared by all ids
    unlikelihood: PositiveOrZero  # its weight beside the cross-entropy
    teacher: str  # distillation: a checkpoint (as --checkpoint takes it) with the run's vocabulary
    temperature: Positive  # distillation: of both models
    teacher_weight: Share  # distillation: of the divergence from the teacher; the cross-entropy has the rest
    beta: Positive  # dpo: how dear it is to leave the reference


@dataclasses.dataclass(frozen=True)
class QATConfig:
    scheme: str  # what weights (and activations) are rounded to in training; "": none
    start_step: CountOrZero  # from which step on
    learned_step: bool  # train the scales too (LSQ, arXiv:1902.08153)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    scheme: str  # of the frozen base of adapters; "": as it comes
    head: str  # the scheme of embeddings and head, in both; "": not quantized
    rules: Rules  # (regular expression, scheme or "") over parameter names, before the usual ones
    qat: QATConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: Count
    seed: Seed
    batch_size: Count  # sequences per step, over all devices and micro-batches
    seq_len: Count
    grad_accumulation: Count  # micro-batches a step
    loss_chunk: CountOrZero  # positions whose logits exist at a time; 0: all of seq_len
    on_bad_step: str  # a loss that is not finite, or a spike: "stop", "skip" its update, or "rollback" and jump over it
    spike_factor: PositiveOrZero  # a loss above this many times the median of the last 50 is a spike; 0: none is


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: CountOrZero  # of the adapters trained over the frozen weights of init_from; 0: all weights are trained
    ranks: Rules  # (regular expression, rank) over names of adapted weights, where ranks differ; (): `rank` everywhere
    alpha: Positive  # the update is a b times alpha / rank
    rank_stabilized: bool  # alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)
    variant: LoraVariant  # see lora/adapt.py
    targets: tuple[str, ...]  # "attention", "linear", "embeddings", or regular expressions over names
    factors: str  # the scheme that a and b are rounded to in every use, straight-through, such as int8; "": none
    dropout: Annotated[float, (0.0, 0.99)]  # of the inputs of adapters
    b_lr_ratio: Positive  # learning rate of b over that of a (LoRA+: Hayou et al. 2024, arXiv:2402.12354)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: CountOrZero  # steps; 0: at the end only
    rows: CountOrZero  # held-out sequences per evaluation while training; 0: all
    prompts: tuple[str, ...]  # continued before and after training
    tasks: tuple[str, ...]  # asked zero-shot whenever held-out text is: names or JSONL files, see prompting/tasks.py
    task_examples: CountOrZero  # of each while training; 0, and at the end: all
    max_new_tokens: Count


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    to: tuple[str, ...]  # beside metrics.jsonl: "tensorboard", "wandb", "mlflow"
    norms_every: CountOrZero  # steps between norms of gradients, updates and activations per layer; 0: never
    samples_every: CountOrZero  # steps between continuations of eval.prompts; 0: before and after only


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero  # steps; 0: at the end only
    keep_last: Count
    keep_best: CountOrZero  # by held-out loss, besides the last


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: MeshSize  # copies of the model; -1: all remaining devices
    fsdp: MeshSize  # shards of weights, optimizer state and batch
    tensor: MeshSize  # shards of heads, MLP and vocabulary
    rules: Rules  # (regular expression, (axis of rows, axis of columns)) over parameter names


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    optim: OptimConfig
    quant: QuantConfig
    loss: LossConfig
    train: TrainConfig
    lora: LoraConfig
    eval: EvalConfig
    report: ReportConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig
    init_from: str  # whose weights training starts from: a run, or what else --checkpoint takes; "": random


def build(mapping: Mapping[str, Any], cls: Any = Config, prefix: str = "") -> Any:
    """A (nested) mapping -> the dataclass `cls`, checked for names and types.

    Raises:
      UserError: an unknown or missing key, or a value of another type; it names the dotted key.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
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


# Keys that came after checkpoint format 1, with the value that means what there was before.
ADDED: dict[str, Any] = {
    "data.kind": "text",
    "data.field": "text",
    "data.workers": 0,
    "model.scale_embeddings": False,
    "model.attention": "auto",
    "model.position.local_base": 0.0,
    "model.norm_place": "pre",
    "model.parallel": False,
    "model.embed_norm": False,
    "tokenizer.path": "",
    "model.num_types": 0,
    "model.pooler": False,
    "model.qkv_bias": False,
    "model.head_bias": False,
    "model.attention_scale": 0.0,
    "model.attention_softcap": 0.0,
    "model.logit_softcap": 0.0,
    "lora.rank": 0,
    "lora.ranks": (),
    "lora.alpha": 16.0,
    "lora.rank_stabilized": False,
    "lora.variant": "lora",
    "lora.targets": ("linear",),
    "lora.factors": "",
    "lora.dropout": 0.0,
    "lora.b_lr_ratio": 1.0,
    "optim.lr_rules": ((r".*", 1.0),),
    "optim.decay_fraction": 0.2,
    "optim.momentum": 0.95,
    "optim.ema_decay": 0.0,
    "loss.kind": "cross_entropy",
    "loss.masked": "none",
    "loss.masked_share": 0.15,
    "loss.z_loss": 0.0,
    "loss.label_smoothing": 0.0,
    "loss.unlikelihood": 1.0,
    "loss.teacher": "",
    "loss.temperature": 2.0,
    "loss.teacher_weight": 0.5,
    "loss.beta": 0.1,
    "model.base_width": 0,
    "train.on_bad_step": "stop",
    "train.spike_factor": 0.0,
    "eval.tasks": (),
    "eval.task_examples": 0,
    "report.to": (),
    "report.norms_every": 0,
    "report.samples_every": 0,
    "model.cache": "compute",
    "quant.scheme": "",
    "quant.head": "int8",
    "quant.rules": (),
    "quant.qat.scheme": "",
    "quant.qat.start_step": 0,
    "quant.qat.learned_step": False,
}


def upgrade(mapping: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an earlier checkpoint with the keys that have been added since."""
    upgraded = copy.deepcopy(mapping)
    for dotted, value in ADDED.items():
        *sections, key = dotted.split(".")
        section = upgraded
        for name in sections:
            section = section.setdefault(name, {})
        section.setdefault(key, value)
    return upgraded


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


def nearest(key: str, cls: Any = Config) -> str:
    """A phrase that names the existing key nearest to `key`."""
    options = list(keys(cls))
    ends = [o for o in options if o.endswith(f".{key}")]  # a section left out
    found = ends or difflib.get_close_matches(key, options, 1, 0.0)
    return f"did you mean '{found[0]}'?"


def choice(key: str, value: str, options: Mapping[str, Any] | tuple[str, ...]) -> Any:
    """options[value] (or value itself of a tuple), or a UserError that names the key and the choices."""
    if value not in options:
        raise UserError(f"config key '{key}' is {value!r}; expected one of {', '.join(sorted(options))}")
    return options[value] if isinstance(options, Mapping) else value


def _convert(value: Any, kind: Any, key: str) -> Any:
    if typing.get_origin(kind) is Annotated:
        plain, allowed = typing.get_args(kind)
        value = _convert(value, plain, key)
        if plain is str:
            return choice(key, value, allowed)
        if not allowed[0] <= value <= allowed[1]:
            bound = f"at least {allowed[0]}" if value < allowed[0] else f"at most {allowed[1]}"
            raise UserError(f"config key '{key}' is {value}; expected a number of {bound}")
        return value
    if kind == Rules:
        rules = _freeze(value)
        if isinstance(rules, tuple) and all(
            isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) for r in rules
        ):
            return rules
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    expected = {Rules: "a list of (regular expression, value)"}.get(kind, getattr(kind, "__name__", str(kind)))
    raise UserError(f"config key '{key}' is {value!r}; expected {expected}")


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, (list, tuple)) else value
