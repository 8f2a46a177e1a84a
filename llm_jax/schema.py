"""Every configuration option with its type, range and meaning, as frozen dataclasses.

The dataclasses have no default values. The defaults are in `configs/default.py`, and `configuration.py` builds the
dataclasses from them.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from llm_jax.errors import UserError
from llm_jax.value_names import suggestion

Rules = tuple[tuple[str, Any], ...]  # (regular expression over names, value) pairs; the first match applies

# Numbers and their ranges: (from, to, both inclusive). No range contains an infinite number or NaN.
Count = Annotated[int, (1, 2**62)]
CountOrZero = Annotated[int, (0, 2**62)]
Positive = Annotated[float, (1e-30, 1e30)]
PositiveOrZero = Annotated[float, (0.0, 1e30)]
Share = Annotated[float, (0.0, 1.0)]
Seed = Annotated[int, (0, 2**32 - 1)]
MeshSize = Annotated[int, (-1, 2**31)]
LoraVariant = Annotated[str, ("lora", "fa", "dora", "pissa", "loftq")]
Dtype = Annotated[str, ("float32", "bfloat16", "float16", "float64")]
DtypeOrAuto = Annotated[str, ("auto", "float32", "bfloat16", "float16", "float64")]
# A bool, or the text "auto", which `training.setup` replaces before the option is used.
BoolOrAuto = Annotated[bool, ("auto",)]


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
    text_field: str  # field or column of the text to classify
    label_field: str  # field or column of its label: a choice, the index of a choice, or a rating (see thresholds)
    choices: tuple[str, ...]  # the possible answers, in the order of their indices; (): the labels that occur, sorted
    thresholds: tuple[float, ...]  # ascending; they divide numeric ratings into choices, and ratings equal to one are
    # left out; (): labels are choices or their indices
    question: str  # instruction; "{choices}" stands for the list of choices
    template: str  # prompt over {question} and {text}, for tokenizers without a chat template; " ANSWER" follows it
    test_size: PositiveOrZero  # size of the test split: a number of examples, or a share below 1; 0: no test split
    validation_size: PositiveOrZero  # size of the validation split, likewise; 0: data.validation_fraction of the rest
    train_size: CountOrZero  # examples trained on at most; 0: all the others


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # "stdlib", asset:NAME, hf:NAME, a file, directory or glob; A,B,... or A@WEIGHT,B@WEIGHT,...; see data/sources.py
    source: str
    kind: str  # "text", "instructions" (loss on the answers), "preferences" (pairs), "labelled" (texts with a label)
    field: str  # name of the text field of a record (JSON lines, Parquet, hf:NAME) with kind="text"
    validation_fraction: Share  # share of the bytes held out for validation, in groups of documents; 0: none
    cache_dir: str  # directory of tokenized corpora and trained tokenizers; "": ~/.cache/llm_jax
    workers: CountOrZero  # number of processes that read and tokenize; 0: chosen from the size of the text
    labelled: LabelledConfig  # options of the kind "labelled"; see data/labelled.py


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    # "word", "char", "byte", "bpe", "char_bpe", "byte_bpe", "wordpiece", "unigram" or FILE:NAME; those of checkpoints
    # and of `path` are "hub" (tokenizer.json) and "sentencepiece" (tokenizer.model), which are not trained here
    kind: str
    vocab_size: CountOrZero  # number of ids, special ids included; an upper bound for "char"; ignored by "byte"
    path: str  # path to an existing tokenizer; overrides kind and vocab_size; "": train one
    chat_template: str  # name of one of an existing tokenizer's chat templates, such as "tool_use"; "": by the record


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    kind: str  # "none", "sinusoidal", "learned", "shaw", "t5", "alibi", "rope" or FILE:NAME (see CONTRIBUTING.md)
    base: Positive  # rope, sinusoidal: base (theta) of the wavelengths, which run from 2 pi to 2 pi * base
    combine: str  # sinusoidal, learned: "add" vectors to the token embeddings, or "concatenate" them
    width: CountOrZero  # sinusoidal, learned: dimension of the vectors with combine="concatenate"
    local_base: PositiveOrZero  # rope: base of "local" layers, which then use no scaling; 0: same as the global layers
    max_length: Count  # learned: number of positions in the table
    max_relative_position: Count  # shaw: distance k at which relative positions are clipped
    relative_embeddings: str  # shaw: trained vectors for "keys", "values" or "both"
    num_buckets: Count  # t5: number of relative position buckets
    max_distance: Count  # t5: distance from which on all positions share the last bucket
    partial_rotary_factor: Share  # rope: share of head_dim that is rotated
    interleaved: bool  # rope: rotate neighbouring dimensions as pairs (GPT-J) instead of the two halves (GPT-NeoX)
    scaling: str  # rope: "none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"
    scaling_factor: Positive  # rope: context extension factor of the scaling
    original_length: CountOrZero  # rope: context length of pretraining (dynamic, yarn, llama3, longrope)
    attention_factor: PositiveOrZero  # yarn, longrope: factor of rotated queries and keys; 0: by the scaling's paper
    beta_fast: Positive  # yarn: dimensions with more rotations than this over original_length are not scaled
    beta_slow: Positive  # yarn: dimensions with fewer rotations than this are divided by scaling_factor
    truncate: bool  # yarn: round the bounds of beta_fast and beta_slow to whole pairs of dimensions
    short_factors: tuple[float, ...]  # longrope: divisor of each frequency in documents of up to original_length tokens
    long_factors: tuple[float, ...]  # longrope: divisor of each frequency in longer documents
    low_freq_factor: Positive  # llama3: the same bound as beta_slow
    high_freq_factor: Positive  # llama3: the same bound as beta_fast


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    params: Dtype  # dtype of weights and optimizer state
    # dtype of activations and of the operands of matrix products; "auto": the fastest on the machine, see docs/speed.md
    compute: DtypeOrAuto
    accumulate: Dtype  # dtype in which matrix products are accumulated
    output: Dtype  # dtype of the logits


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: CountOrZero  # number of rows of the embedding table; 0: vocabulary size of the tokenizer
    width: Count  # dimension of the residual stream (d_model)
    base_width: CountOrZero  # μP: width at which learning rates and logit scale were tuned (arXiv:2203.03466); 0: no μP
    num_layers: Count  # number of transformer layers
    causal: bool  # True: causal attention (decoder); False: bidirectional attention (encoder)
    # kinds repeated over the layers: "global", "local" (attention with a sliding window), "nope" (without positions)
    layer_pattern: tuple[str, ...]
    window: Count  # size of the sliding window of "local" layers, own position included; on each side without causal
    num_heads: Count  # number of query heads
    num_kv_heads: Count  # number of key/value heads; divides num_heads (grouped-query attention)
    head_dim: CountOrZero  # dimension of a head; 0: width // num_heads
    mlp: str  # "gated" (down(act(gate x) * up x)) or "plain" (down(act(up x)))
    mlp_dim: Count  # hidden dimension of the MLP
    activation: str  # "silu", "gelu" (tanh approximation), "gelu_exact", "relu"
    norm: str  # "rms" (RMSNorm) or "layer" (LayerNorm)
    norm_eps: PositiveOrZero  # epsilon of the norms
    # norms "pre": before attention and MLP; "post": after the residual sums; "output": after attention and MLP, before
    # the sums; "both": "pre" and "output"
    norm_placement: str
    parallel_residual: bool  # attention and MLP read the same normed input (GPT-J), not one the other
    parallel_norms: bool  # parallel_residual: a norm each for attention and MLP (GPT-NeoX)
    embed_norm: bool  # normalize the embeddings before the first layer
    type_vocab_size: CountOrZero  # number of token types (BERT's segments) with an embedding; 0: none
    pooler: bool  # add BERT's pooler, tanh(W x + b) of the first token; see `Transformer.pooled`
    qk_norm: bool  # normalize queries and keys (Henry et al. 2020, arXiv:2010.04245)
    qk_norm_kind: Annotated[str, ("rms", "layer")]  # qk_norm: RMSNorm or LayerNorm
    qk_norm_axis: Annotated[str, ("head", "width")]  # qk_norm: over each head, or over all heads at once (OLMo 2)
    bias: bool  # biases in all linear layers of attention and MLP
    attention_bias: bool  # biases in all linear layers of attention, without those of the MLP
    mlp_bias: bool  # biases in all linear layers of the MLP, without those of attention
    qkv_bias: bool  # biases of the query, key and value projections only
    head_bias: bool  # bias of the output head
    attention_scale: PositiveOrZero  # factor on q·k; 0: 1 / sqrt(head_dim)
    scale_attention_by_depth: bool  # divide the scores of layer i, from 0, by i + 1 (GPT-2)
    attention_softcap: PositiveOrZero  # scores become cap * tanh(scores / cap) (arXiv:2408.00118); 0: no cap
    logit_softcap: PositiveOrZero  # logits become cap * tanh(logits / cap); 0: no cap
    scale_embeddings: bool  # multiply token embeddings by sqrt(width) (Vaswani et al. 2017, section 3.4)
    embedding_multiplier: Positive  # factor of the token embeddings
    residual_multiplier: Positive  # factor of the outputs of attention and MLP before they are added
    logits_scaling: Positive  # divisor of the logits
    tie_embeddings: bool  # use the embedding table as the output head
    attention_kernel: str  # attention kernel: "auto", "plain", "xla", "cudnn", "splash"; see model/attention_kernels.py
    kv_cache: Annotated[
        str, ("compute", "int8")
    ]  # storage of cached keys and values: "compute" (dtype precision.compute) or "int8" (one scale per head)
    position: PositionConfig
    precision: PrecisionConfig
    # scan over stacked layers (compile time independent of depth) instead of unrolling them; "auto": see docs/speed.md
    scan_layers: BoolOrAuto
    remat: str  # rematerialization in the backward pass: "none", "dots" (all but matrix products), "full"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    kind: str  # "adamw", "lion", "adafactor", "muon" (hidden matrices; adamw for all others), "sgd" or FILE:NAME
    lr: PositiveOrZero  # peak learning rate
    lr_rules: Rules  # (regular expression, factor on the learning rate) over parameter names; the first match applies
    warmup_steps: Annotated[int, (-1, 2**62)]  # steps of linear warm-up; -1: a fourteenth of train.steps
    schedule: str  # after the warm-up: "cosine", "linear", "constant", "wsd" (warmup-stable-decay) or "inverse_sqrt"
    final_lr_fraction: Share  # learning rate at the last step as a fraction of lr (cosine, linear, wsd)
    decay_fraction: Share  # wsd: share of all steps, at the end, in which the learning rate decays
    weight_decay: PositiveOrZero  # decoupled weight decay
    decay_rules: Rules  # (regular expression, factor on weight_decay) over parameter names; the first match applies
    beta1: Share  # adamw, lion: decay of the first moment; sgd: momentum
    beta2: Share  # adamw, lion: decay of the second moment (lion: of the momentum)
    eps: PositiveOrZero  # adamw: epsilon in the denominator
    momentum: Share  # muon: momentum
    clip_norm: PositiveOrZero  # maximum global gradient norm; 0: no clipping
    ema_decay: Share  # decay of an exponential moving average of the weights, used for evaluation and loading; 0: none


@dataclasses.dataclass(frozen=True)
class LossConfig:
    kind: str  # "cross_entropy", "unlikelihood", "entmax", "distillation", "dpo" or FILE:NAME; see training/losses.py
    masked: Annotated[
        str, ("none", "tokens", "words")
    ]  # masked language modeling of "tokens" or whole "words"; "none": next-token prediction
    mask_prob: Annotated[float, (0.001, 1.0)]  # probability that a token or word is masked; see data/masking.py
    z_loss: PositiveOrZero  # weight of log(sum exp(logits))^2
    label_smoothing: Share  # probability mass moved from the target to a uniform distribution over all ids
    unlikelihood: PositiveOrZero  # weight of the unlikelihood term beside the cross-entropy
    teacher: str  # distillation: checkpoint of the teacher, with the same vocabulary
    temperature: Positive  # distillation: softmax temperature of student and teacher
    teacher_weight: Share  # distillation: weight of the divergence; the cross-entropy has the rest
    beta: Positive  # dpo: strength of the regularization toward the reference model


@dataclasses.dataclass(frozen=True)
class QATConfig:
    scheme: str  # scheme that weights (and activations) are fake-quantized to during training; "": none
    start_step: CountOrZero  # step at which quantization-aware training starts
    learned_step: bool  # train the quantization scales (LSQ, arXiv:1902.08153)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    scheme: str  # scheme of the frozen base weights under adapters (QLoRA); "": not quantized
    head: str  # scheme of embeddings and output head, for both `scheme` and `qat`; "": not quantized
    rules: Rules  # (regular expression, scheme or "") over parameter names, matched before the default rules
    qat: QATConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: Count  # number of optimizer steps
    seed: Seed  # seed of initialization, data order and dropout
    batch_size: Count  # sequences per optimizer step, over all devices and micro-batches
    seq_len: Count  # tokens per sequence
    grad_accumulation: Count  # number of micro-batches per optimizer step
    gather_once: bool  # gather sharded weights once per step, not per micro-batch; all then lie on every device
    loss_chunk: CountOrZero  # number of positions whose logits are computed at a time; 0: all of seq_len
    on_bad_step: str  # on a non-finite loss or a spike: "stop", "skip" (the update) or "rollback" (and skip batches)
    spike_factor: PositiveOrZero  # a spike is a loss above this many times the median of the last 50; 0: none


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: CountOrZero  # rank of adapters trained over the frozen weights of init_from; 0: train all weights
    ranks: Rules  # (regular expression, rank) over names of adapted weights, where ranks differ; (): `rank` for all
    alpha: Positive  # the update a b is scaled by alpha / rank
    rank_stabilized: bool  # scale by alpha / sqrt(rank) instead (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732)
    variant: LoraVariant  # "lora", "fa" (LoRA-FA, a is frozen), "dora", "pissa", "loftq"; see lora/adapt.py
    targets: tuple[
        str, ...
    ]  # adapted weights: "attention", "linear", "embeddings", or regular expressions over parameter names
    factors: str  # scheme that a and b are fake-quantized to, such as int8; "": none
    dropout: Annotated[float, (0.0, 0.99)]  # dropout probability of the inputs of adapters
    b_lr_ratio: Positive  # learning rate of b over that of a (LoRA+: Hayou et al. 2024, arXiv:2402.12354)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: CountOrZero  # steps between evaluations; 0: at the end only
    rows: CountOrZero  # held-out sequences per evaluation during training; 0: all
    # held-out sequences of the last evaluation; 0: all; -1: eval.rows if that is set, else all
    final_rows: Annotated[int, (-1, 2**62)]
    # prompts that are continued before and after training; where they are not set and data.source is not the default,
    # the first words of held-out documents
    prompts: tuple[str, ...]
    tasks: tuple[
        str, ...
    ]  # tasks evaluated zero-shot with every evaluation: names or JSONL files, see evaluation/tasks.py
    task_examples: CountOrZero  # examples per task during training; 0: all. The final evaluation uses all
    max_new_tokens: Count  # length of the continuations of `prompts`, in tokens


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    to: tuple[str, ...]  # loggers besides metrics.jsonl: "tensorboard", "wandb", "mlflow"
    norms_every: CountOrZero  # steps between norms of gradients, updates and activations per layer; 0: never
    samples_every: CountOrZero  # steps between continuations of eval.prompts; 0: before and after training only
    # pictures of the model with every evaluation: "attention", "probabilities", "surprisal" (of the first of
    # eval.prompts), "positions", "quantization"; written to pictures/ of the run and given to the loggers
    pictures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero  # steps between checkpoints; 0: at the end only
    keep_last: Count  # number of latest checkpoints that are kept
    keep_best: CountOrZero  # number of checkpoints with the lowest held-out loss that are kept besides
    on_damage: (
        str  # where the last checkpoint is damaged: "stop", or "previous" (delete it, resume from the one before)
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: MeshSize  # data parallelism: copies of the model; -1: all remaining devices
    fsdp: MeshSize  # fully sharded data parallelism: shards of weights, optimizer state and batch
    tensor: MeshSize  # tensor parallelism: shards of heads, MLP and vocabulary
    context: MeshSize  # context parallelism: shards of the sequence; attention gathers the keys and values
    rules: Rules  # (regular expression, (mesh axis of rows, mesh axis of columns)) over parameter names; an entry may
    # be None or several axes, such as ("fsdp", "context")


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
    window: Count  # maximum context words on each side; every center word draws its own window from 1 to this
    negatives: Count  # negative samples per pair
    sample: PositiveOrZero  # words with a larger share of the text are subsampled; 0: no subsampling
    lr: Positive  # initial learning rate, which decays linearly
    final_lr: Positive  # learning rate at the last step
    chunk: Count  # center words per step over all devices, a multiple of 16 per device; their gradients are summed
    shared_negatives: Count  # negative samples shared by 16 words; each pair counts `negatives` of them


@dataclasses.dataclass(frozen=True)
class GloveConfig:
    window: Count  # context words on each side; a pair at distance d counts 1/d
    x_max: Positive  # counts above this have weight 1, others (count / x_max)^alpha
    alpha: PositiveOrZero  # exponent of the weighting function
    lr: Positive  # learning rate of AdaGrad
    batch_size: Count  # cells of the co-occurrence matrix per step
    memory: Count  # MiB of co-occurrence counts kept in memory before they are written to disk


@dataclasses.dataclass(frozen=True)
class EmbeddingsConfig:
    kind: str  # "skipgram", "cbow" or "glove"
    source: str  # text files, directories, globs, Wikipedia dumps, asset:NAME; A,B,...
    min_count: Count  # words with fewer occurrences are dropped
    max_words: CountOrZero  # maximum vocabulary size, most frequent words first; 0: no limit
    width: Count  # dimension of the vectors
    epochs: Count  # passes over the text
    seed: Seed  # seed of initialization and sampling
    word2vec: Word2VecConfig
    glove: GloveConfig


def type_text(annotation: Any) -> str:
    """The type and the range of an option as text, such as "int, at least 1"."""
    if annotation == BoolOrAuto:
        return "bool | 'auto'"
    if typing.get_origin(annotation) is Annotated:
        plain, *rest = typing.get_args(annotation)
        allowed = next((value for value in rest if isinstance(value, tuple)), None)
        if allowed is None:
            return type_text(plain)
        if plain is str:
            return " | ".join(repr(value) for value in allowed)
        low, high = allowed
        bounds = ["above 0" if 0 < low < 1e-9 else f"at least {low:g}"] + [f"at most {high:g}"] * (high < 2**31)
        return ", ".join([plain.__name__, *bounds])
    if annotation == Rules:
        return "((pattern, value), ...)"
    if typing.get_origin(annotation) is tuple:
        return f"tuple of {typing.get_args(annotation)[0].__name__}"
    return getattr(annotation, "__name__", str(annotation))


def choice(key: str, value: str, options: Mapping[str, Any] | tuple[str, ...]) -> Any:
    """options[value] (or value itself of a tuple), or a UserError that names the key and the choices."""
    if value not in options:
        expected = f"expected one of {', '.join(sorted(options))}{suggestion(value, options)}"
        raise UserError(f"config key '{key}' is {value!r}; {expected}")
    return options[value] if isinstance(options, Mapping) else value
