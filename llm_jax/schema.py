"""Every configuration option with its type, range and meaning, as frozen dataclasses.

The dataclasses have no default values. The defaults are in `configs/default.py`, and `configuration.py` builds the
dataclasses from them.
"""

import dataclasses
from collections.abc import Mapping
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
    head_dim: CountOrZero  # 0: width // num_heads
    mlp: str  # "gated" or "plain"
    mlp_dim: Count
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
    attention_kernel: str  # who computes it: "auto", "plain", "xla", "cudnn", "splash"; see model/attention_kernels.py
    kv_cache: Annotated[str, ("compute", "int8")]  # of keys and values in decoding: the compute dtype, or int8 by head
    position: PositionConfig
    precision: PrecisionConfig
    scan_layers: bool  # one compiled layer per stage (training); else one per layer
    remat: str  # what the backward pass recomputes: "none", "dots" (all but products), "full"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    kind: str  # "adamw", "lion", "adafactor", "muon" (hidden matrices; adamw for the rest) or "sgd"
    lr: PositiveOrZero  # the peak
    lr_rules: Rules  # (regular expression, factor on the rate) over parameter names
    warmup_steps: Annotated[int, (-1, 2**62)]  # steps of linear warm-up; -1: a fourteenth of train.steps
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
    mask_prob: Annotated[float, (0.001, 1.0)]  # of the tokens or words that are hidden; see data/masking.py
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
    tasks: tuple[str, ...]  # asked zero-shot whenever held-out text is: names or JSONL files, see evaluation/tasks.py
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
    init_from: str  # checkpoint that gives the initial weights, the model and the tokenizer; "": random weights
    # No option: the dotted keys that were set explicitly, by a recipe or an override, to another value than the default
    # or by an override to any. With `init_from` they alone change what the checkpoint says of its model.
    explicit: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Word2VecConfig:
    window: Count  # words on each side at most; each place draws its own from 1 to this
    negatives: Count  # words drawn against each pair
    sample: PositiveOrZero  # words with a larger share of the text are thinned out; 0: none
    lr: Positive  # falls linearly
    final_lr: Positive
    chunk: Count  # words a step over all devices, a multiple of 16 on each; their gradients are summed
    shared_negatives: Count  # drawn for 16 words, and weighted so that each of their pairs sees `negatives`


@dataclasses.dataclass(frozen=True)
class GloveConfig:
    window: Count  # words on each side; a pair at distance d counts 1/d
    x_max: Positive  # counts above this weigh 1, others (count / x_max)^alpha
    alpha: PositiveOrZero
    lr: Positive  # of AdaGrad
    batch_size: Count  # cells of the matrix of co-occurrences a step
    memory: Count  # MiB of counts that are held before they go to disk


@dataclasses.dataclass(frozen=True)
class EmbeddingsConfig:
    kind: str  # "skipgram", "cbow" or "glove"
    source: str  # text files, directories, globs, Wikipedia dumps, asset:NAME; A,B,...
    min_count: Count  # rarer words are left out
    max_words: CountOrZero  # the most frequent words that are kept; 0: all
    width: Count
    epochs: Count
    seed: Seed
    word2vec: Word2VecConfig
    glove: GloveConfig


def choice(key: str, value: str, options: Mapping[str, Any] | tuple[str, ...]) -> Any:
    """options[value] (or value itself of a tuple), or a UserError that names the key and the choices."""
    if value not in options:
        raise UserError(f"config key '{key}' is {value!r}; expected one of {', '.join(sorted(options))}")
    return options[value] if isinstance(options, Mapping) else value
