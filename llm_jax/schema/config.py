"""Every configuration option with its type, range and meaning, as frozen dataclasses.

The dataclasses have no default values. The defaults are in `configs/default.py`, and `configuration.py` builds the
dataclasses from them.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from llm_jax.errors import UserError
from llm_jax.schema.value_names import expected

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
CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")  # in which `llm_jax.load` and --dtype load a checkpoint
DtypeOrAuto = Annotated[str, ("auto", "float32", "bfloat16", "float16", "float64")]
# A bool, or the text "auto", which `training.setup` replaces before the option is used.
BoolOrAuto = Annotated[bool, ("auto",)]


@dataclasses.dataclass(frozen=True)
class LabelledConfig:
    text_field: str  # field or column of the text to classify
    label_field: str  # field or column of the label: a choice, the index of a choice, or a rating (see thresholds)
    choices: tuple[str, ...]  # the possible answers, in the order of their indices; (): all labels in the data, sorted
    thresholds: tuple[float, ...]  # ascending thresholds that divide numeric ratings into choices; examples with a
    # rating equal to a threshold are dropped; (): labels are choices or their indices
    question: str  # instruction; "{choices}" is replaced by the list of choices
    template: str  # prompt with {question} and {text}, for tokenizers without a chat template; " ANSWER" follows it
    test_size: PositiveOrZero  # size of the test split: a number of examples, or a share below 1; 0: no test split
    # size of the validation split: a number of examples, or a share below 1; 0: data.validation_fraction of the rest
    validation_size: PositiveOrZero
    train_size: CountOrZero  # maximum number of training examples; 0: no limit


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # "stdlib", asset:NAME, hf:NAME, a file, a directory or a glob; several as A,B,... or A@WEIGHT,B@WEIGHT,...
    source: str
    kind: str  # "text", "instructions" (loss on the answers), "preferences" (pairs), "labelled" (texts with a label)
    # how files are divided into documents: "auto" (by their suffixes), "text" (a document), "pieces" (at line breaks),
    # "python", "jsonl", "json", "csv", "tsv", "parquet" or FILE:NAME (see CONTRIBUTING.md)
    format: str
    field: str  # name of the text field of a record (JSON lines, Parquet, hf:NAME) with kind="text"
    validation_fraction: Share  # share of the bytes held out for validation, in groups of documents; 0: none
    cache_dir: str  # directory of tokenized corpora and trained tokenizers; "": ~/.cache/llm_jax
    workers: CountOrZero  # number of processes that read and tokenize; 0: chosen from the size of the text
    labelled: LabelledConfig  # options of the kind "labelled"; see data/labelled.py


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    # "word", "char", "byte", "bpe", "char_bpe", "byte_bpe", "wordpiece", "unigram" or FILE:NAME; tokenizers from
    # `path` or init_from may also be "hub" (tokenizer.json) or "sentencepiece" (tokenizer.model)
    kind: str
    vocab_size: CountOrZero  # number of ids, special ids included; an upper bound for "char"; ignored by "byte"
    path: str  # path to an existing tokenizer, which determines kind and vocab_size; "": train one
    # name of the chat template, if the tokenizer has several, such as "tool_use"; "": chosen for each record
    chat_template: str


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    kind: str  # "none", "sinusoidal", "learned", "shaw", "t5", "alibi", "rope" or FILE:NAME (see CONTRIBUTING.md)
    base: Positive  # rope, sinusoidal: base (theta) of the wavelengths, which run from 2 pi to 2 pi * base
    combine: str  # sinusoidal, learned: "add" vectors to the token embeddings, or "concatenate" them
    width: CountOrZero  # sinusoidal, learned: dimension of the vectors with combine="concatenate"
    local_base: PositiveOrZero  # rope: base of "local" layers, without scaling; 0: base and scaling of global layers
    max_length: Count  # learned: number of positions in the table
    max_relative_position: Count  # shaw: distance k at which relative positions are clipped
    relative_embeddings: str  # shaw: trained vectors for "keys", "values" or "both"
    num_buckets: Count  # t5: number of relative position buckets
    max_distance: Count  # t5: distance from which all positions share the last bucket
    partial_rotary_factor: Share  # rope: share of head_dim that is rotated
    interleaved: bool  # rope: rotate neighbouring dimensions as pairs (GPT-J) instead of the two halves (GPT-NeoX)
    scaling: str  # rope: "none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"
    scaling_factor: Positive  # rope: context extension factor of the scaling
    original_length: CountOrZero  # rope: context length of pretraining (dynamic, yarn, llama3, longrope)
    attention_factor: PositiveOrZero  # yarn, longrope: factor of rotated queries and keys; 0: formula of the paper
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
    # dtype of activations and of operands of matrix products; "auto": the fastest on this machine, see docs/speed.md
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
    # size of the sliding window of "local" layers, including the query position; causal=False: size on each side
    window: Count
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
    parallel_residual: bool  # attention and MLP read the same input (GPT-J) instead of one after the other
    parallel_norms: bool  # parallel_residual: separate norms for attention and MLP (GPT-NeoX)
    embed_norm: bool  # normalize the embeddings before the first layer
    type_vocab_size: CountOrZero  # number of token types (BERT's segments) with an embedding; 0: none
    pooler: bool  # add BERT's pooler, tanh(W x + b) of the first token
    qk_norm: bool  # normalize queries and keys (Henry et al. 2020, arXiv:2010.04245)
    qk_norm_kind: Annotated[str, ("rms", "layer")]  # qk_norm: RMSNorm or LayerNorm
    qk_norm_axis: Annotated[str, ("head", "width")]  # qk_norm: over each head, or over all heads at once (OLMo 2)
    bias: bool  # biases in all linear layers of attention and MLP
    attention_bias: bool  # biases in all linear layers of attention, but not of the MLP
    mlp_bias: bool  # biases in all linear layers of the MLP, but not of attention
    qkv_bias: bool  # biases in the query, key and value projections only
    head_bias: bool  # bias of the output head
    attention_scale: PositiveOrZero  # factor on q·k; 0: 1 / sqrt(head_dim)
    scale_attention_by_depth: bool  # divide the scores of layer i, from 0, by i + 1 (GPT-2)
    attention_softcap: PositiveOrZero  # scores become cap * tanh(scores / cap) (arXiv:2408.00118); 0: no cap
    logit_softcap: PositiveOrZero  # logits become cap * tanh(logits / cap); 0: no cap
    scale_embeddings: bool  # multiply token embeddings by sqrt(width) (Vaswani et al. 2017, section 3.4)
    embedding_multiplier: Positive  # factor of the token embeddings
    residual_multiplier: Positive  # factor of the outputs of attention and MLP before the residual sums
    logits_scaling: Positive  # divisor of the logits
    tie_embeddings: bool  # use the embedding table as the output head
    attention_kernel: str  # "auto" (the fastest that supports the model), "plain", "xla", "cudnn" or "splash"
    kv_cache: Annotated[
        str, ("compute", "int8")
    ]  # storage of cached keys and values: "compute" (dtype precision.compute) or "int8" (one scale per head)
    position: PositionConfig
    precision: PrecisionConfig
    # scan over stacked layers (compile time independent of depth) instead of unrolling them; "auto": see docs/speed.md
    scan_layers: BoolOrAuto
    # what the backward pass recomputes: "none", "dots" (everything except matrix products) or "full" (everything)
    remat: str


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    kind: str  # "adamw", "lion", "adafactor", "muon" (hidden matrices; adamw for all others), "sgd" or FILE:NAME
    lr: PositiveOrZero  # peak learning rate
    lr_rules: Rules  # (regular expression, factor on the learning rate) over parameter names; the first match applies
    warmup_steps: Annotated[int, (-1, 2**62)]  # steps of linear warm-up; -1: train.steps / 14
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
    kind: str  # "cross_entropy", "unlikelihood", "entmax", "distillation", "dpo" or FILE:NAME
    masked: Annotated[
        str, ("none", "tokens", "words")
    ]  # masked language modeling of "tokens" or whole "words"; "none": next-token prediction
    mask_prob: Annotated[float, (0.001, 1.0)]  # masked: probability that a token or word is masked
    z_loss: PositiveOrZero  # weight of log(sum exp(logits))^2
    label_smoothing: Share  # probability mass moved from the target to a uniform distribution over all ids
    unlikelihood: PositiveOrZero  # unlikelihood: weight of the unlikelihood term; the cross-entropy has weight 1
    teacher: str  # distillation: checkpoint of the teacher, with the same vocabulary
    temperature: Positive  # distillation: softmax temperature of student and teacher
    teacher_weight: Share  # distillation: weight of the divergence; the cross-entropy has weight 1 - teacher_weight
    beta: Positive  # dpo: strength of the regularization toward the reference model


@dataclasses.dataclass(frozen=True)
class QATConfig:
    scheme: str  # number format for fake quantization of weights (and activations) during training; "": none
    start_step: CountOrZero  # step at which quantization-aware training starts
    learned_step: bool  # train the quantization scales (LSQ, arXiv:1902.08153)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    scheme: str  # number format of the frozen base weights of adapters, such as "nf4" (QLoRA); "": not quantized
    head: str  # number format of embeddings and output head, for `scheme` and for `qat`; "": not quantized
    rules: Rules  # (regular expression, scheme or "") over parameter names, matched before the default rules
    qat: QATConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: Count  # number of optimizer steps
    seed: Seed  # seed of initialization, data order and dropout
    batch_size: Count  # sequences per optimizer step, over all devices and micro-batches
    seq_len: Count  # tokens per sequence
    grad_accumulation: Count  # number of micro-batches per optimizer step
    gather_once: bool  # gather sharded weights once per step instead of per micro-batch; needs memory for all weights
    loss_chunk: CountOrZero  # number of positions whose logits are computed at a time; 0: all of seq_len
    # on a non-finite loss or a spike: "stop", "skip" (the update) or "rollback" (to the last checkpoint)
    on_bad_step: str
    spike_factor: PositiveOrZero  # a loss above this factor times the median of the last 50 is a spike; 0: no check


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: CountOrZero  # rank of adapters trained over the frozen weights of init_from; 0: train all weights
    ranks: Rules  # (regular expression, rank) over names of adapted weights; (): `rank` for all
    alpha: Positive  # scale of the update: alpha / rank * a b
    rank_stabilized: bool  # scale by alpha / sqrt(rank) instead (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732)
    variant: LoraVariant  # "lora", "fa" (LoRA-FA, a is frozen), "dora", "pissa", "loftq"
    targets: tuple[
        str, ...
    ]  # adapted weights: "attention", "linear", "embeddings", or regular expressions over parameter names
    factors: str  # number format for fake quantization of a and b, such as "int8"; "": none
    dropout: Annotated[float, (0.0, 0.99)]  # dropout probability of the inputs of adapters
    # learning rate of b divided by the learning rate of a (LoRA+: Hayou et al. 2024, arXiv:2402.12354)
    b_lr_ratio: Positive


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: CountOrZero  # steps between evaluations; 0: only at the end
    rows: CountOrZero  # held-out sequences per evaluation during training; 0: all
    # held-out sequences of the final evaluation; 0: all; -1: eval.rows if it is set, else all
    final_rows: Annotated[int, (-1, 2**62)]
    # prompts that are continued before and after training; if they are not set, but data.source is, the first words of
    # held-out documents are used
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]  # tasks evaluated zero-shot at every evaluation: names or JSONL files
    task_examples: CountOrZero  # examples per task during training; 0: all; the final evaluation uses all
    max_new_tokens: Count  # length of the continuations of `prompts`, in tokens


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    to: tuple[str, ...]  # loggers besides metrics.jsonl: "tensorboard", "wandb", "mlflow"
    # steps between logs of gradient, update and weight norms, activation norms and attention entropies; 0: never
    norms_every: CountOrZero
    samples_every: CountOrZero  # steps between continuations of eval.prompts; 0: only before and after training
    # pictures of the model at every evaluation: "attention", "probabilities", "surprisal" (for the first of
    # eval.prompts), "positions", "quantization"; written to WORKDIR/pictures and sent to the loggers
    pictures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero  # steps between checkpoints; 0: only at the end
    keep_last: Count  # number of latest checkpoints to keep
    keep_best: CountOrZero  # number of checkpoints with the lowest held-out loss to keep in addition
    # if the last checkpoint is damaged: "stop", or "previous" (delete it and resume from the previous checkpoint)
    on_damage: str


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: MeshSize  # data parallelism: number of copies of the model; -1: all remaining devices
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
    init_from: str  # checkpoint that provides the initial weights, the model options and the tokenizer; "": random
    # Not an option: the dotted keys set by an override, or set by a recipe to a value that differs from the default.
    # With `init_from`, only these keys replace the model options of the checkpoint.
    explicit: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Word2VecConfig:
    window: Count  # maximum context words on each side; each center word uses a random window from 1 to this maximum
    negatives: Count  # negative samples per pair
    sample: PositiveOrZero  # words with a larger relative frequency are subsampled; 0: no subsampling
    lr: Positive  # initial learning rate, which decays linearly
    final_lr: Positive  # learning rate at the last step
    chunk: Count  # center words per step over all devices, a multiple of 16 per device; their gradients are summed
    shared_negatives: Count  # negative samples shared by 16 words; their loss is scaled to `negatives` per pair


@dataclasses.dataclass(frozen=True)
class GloveConfig:
    window: Count  # context words on each side; a pair at distance d adds 1/d to its count
    x_max: Positive  # counts above x_max have weight 1, others (count / x_max)^alpha
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
    """Returns `options[value]`, or `value` if `options` is a tuple.

    Raises:
      UserError: `value` is not in `options`; the message names the key and the choices.
    """
    if value not in options:
        raise UserError(f"config key '{key}' is {value!r}; {expected(value, sorted(options))}")
    return options[value] if isinstance(options, Mapping) else value
