"""Training losses by name (`loss.kind`), or custom functions of logits and targets (`extensions`).

The held-out loss is always `language_model`.

Every loss returns a sum and the number of its terms, so that micro-batches and devices add up to the loss of the whole
batch. A model trained with entmax defines its probabilities by `entmax15` rather than softmax; sample it accordingly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import extensions, tokenizers
from llm_jax.data import kinds
from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer
from llm_jax.schema import Config, LossConfig, ModelConfig
from llm_jax.tokenizers import Tokenizer
from llm_jax.training.chunked_sum import Chunk, sum_of_rows
from llm_jax.training.step import Loss

# Letters of shapes: B batch, T time, C chunk of time, D width, V vocabulary, P pairs.

KINDS = ("cross_entropy", "unlikelihood", "entmax", "distillation", "dpo")


# ---------------------------------------------------------------- per token


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats: (..., V), int (...) -> float32 (...)."""
    return smoothed(logits, targets, 0.0, 0.0)


def smoothed(logits: jax.Array, targets: jax.Array, smoothing: float, z: float) -> jax.Array:
    """Cross-entropy in nats: (..., V), int (...) -> float32 (...).

    Args:
      smoothing: label smoothing, the probability that is spread evenly over all ids (Szegedy et al. 2016,
        arXiv:1512.00567, section 7).
      z: weight of log(sum exp(logits))^2, which keeps logits from drifting (Chowdhery et al. 2022,
        PaLM, arXiv:2204.02311, section 5).
    """
    if logits.dtype.itemsize < 4:
        total, target = _total_and_target(logits, targets)
    else:
        logits = logits.astype(jnp.float32)
        total, target = jax.nn.logsumexp(logits, axis=-1), _pick(logits, targets)
    loss = total - target
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (total - jnp.mean(logits, -1, dtype=jnp.float32))
    return loss + z * jnp.square(total) if z else loss


# A custom gradient, because with automatic differentiation XLA also stores 16-bit logits in float32.
@jax.custom_vjp
def _total_and_target(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log sum exp of the logits, the logit of the target): (..., V), int (...) -> float32 (...) each."""
    top = jnp.max(logits, -1, keepdims=True)
    terms = jnp.exp(logits.astype(jnp.float32) - top.astype(jnp.float32))
    total = jnp.log(jnp.sum(terms, -1)) + top[..., 0].astype(jnp.float32)
    return total, _pick(logits, targets).astype(jnp.float32)


def _total_and_target_forward(logits, targets):
    total, target = _total_and_target(logits, targets)
    return (total, target), (logits, targets, total)


def _total_and_target_backward(saved, g):
    logits, targets, total = saved
    probabilities = jnp.exp(logits.astype(jnp.float32) - total[..., None])
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (g[0][..., None] * probabilities + g[1][..., None] * is_target).astype(logits.dtype), None


_total_and_target.defvjp(_total_and_target_forward, _total_and_target_backward)


def unlikelihood(logits: jax.Array, targets: jax.Array, context_ids: jax.Array, candidates: jax.Array) -> jax.Array:
    """-sum over c of log(1 - p(c)), over the earlier tokens c of the context other than the target.

    Welleck et al. 2020, arXiv:1908.04319, equations 4 and 5. 1 - p is at least 1e-5.

    Args:
      logits: (B, C, V).
      targets: int (B, C).
      context_ids: int (B, T), the ids of the context.
      candidates: bool (B, C, T), which of them precede the target; each id is counted once.

    Returns:
      float32 (B, C).
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    ids = jnp.broadcast_to(context_ids[:, None], candidates.shape)
    complement = 1 - jnp.exp(jnp.take_along_axis(logs, ids, -1))
    wrong = candidates & (ids != targets[..., None])
    return -jnp.sum(jnp.where(wrong, jnp.log(jnp.maximum(complement, 1e-5)), 0), -1)


def candidates(batch: Batch) -> jax.Array:
    """bool (B, T, T): whether input token s is at or before t and the first occurrence of its id in the document."""
    ids, segments = batch["inputs"], batch["segments"]
    causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    same = (segments[:, :, None] == segments[:, None]) & causal
    repeated = jnp.any(same & ~jnp.eye(ids.shape[1], dtype=bool) & (ids[:, :, None] == ids[:, None]), -1)
    return same & ~repeated[:, None]


def entmax15(logits: jax.Array) -> jax.Array:
    """1.5-entmax, [logits / 2 - threshold]_+^2: (..., V) -> float32 (..., V), sparse, of sum 1.

    Peters et al. 2019, arXiv:1905.05702, equation 10. The threshold is the root of a convex decreasing
    function; Newton's method approaches it from below, and the last step is exact. (Their
    algorithm sorts, which is slow on accelerators.)
    """
    x = logits.astype(jnp.float32) / 2
    # Entries more than 1 below the largest are not in the support.
    x = jnp.maximum(x - jnp.max(x, -1, keepdims=True), -1.0)

    def newton(_: int, t: jax.Array) -> jax.Array:
        over = jnp.maximum(x - t, 0)
        return t + (jnp.sum(jnp.square(over), -1, keepdims=True) - 1) / (2 * jnp.sum(over, -1, keepdims=True))

    # In the slowest case, V equal logits, each step halves the distance: 16 steps suffice for a vocabulary of 2^24.
    threshold = jax.lax.fori_loop(0, 16, newton, jnp.full((*x.shape[:-1], 1), -1.0, jnp.float32))
    return jnp.square(jnp.maximum(x - threshold, 0))


def entmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss whose gradient is entmax15(logits) - onehot(target): (..., V), int (...) -> float32 (...).

    Peters et al. 2019, equation 12: (p - onehot) logits + 4/3 (1 - sum p^1.5). It is 0 if the logit of
    the target exceeds all others by at least 2.
    """
    return _entmax_loss(logits.astype(jnp.float32), targets)


@jax.custom_vjp
def _entmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return _entmax_forward(logits, targets)[0]


def _entmax_forward(logits, targets):
    p, x = entmax15(logits), logits - jnp.max(logits, -1, keepdims=True)
    entropy = 4 / 3 * (1 - jnp.sum(p * jnp.sqrt(p), -1))
    return jnp.sum(p * x, -1) - _pick(x, targets) + entropy, (p, targets)


def _entmax_backward(saved, g):
    p, targets = saved
    return g[..., None] * (p - jax.nn.one_hot(targets, p.shape[-1])), None


_entmax_loss.defvjp(_entmax_forward, _entmax_backward)


def divergence(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """T^2 KL(teacher || student), both at temperature T: (..., V) twice -> float32 (...).

    Hinton et al. 2015, arXiv:1503.02531, section 2; T^2 gives its gradient the same scale as the cross-entropy's.
    """
    student, teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher))
    return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), -1)


def preference(scores_2P: jax.Array, reference_2P: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(margin): (2P,) log-probabilities twice -> (P,); see `preference_margin`."""
    return -jax.nn.log_sigmoid(preference_margin(scores_2P, reference_2P, beta))


def preference_margin(scores_2P: jax.Array, reference_2P: jax.Array, beta: float) -> jax.Array:
    """beta (difference of the pair's log-ratios): (2P,) log-probabilities in nats twice -> (P,).

    Rows 2i are chosen, rows 2i + 1 rejected (Rafailov et al. 2023, DPO, arXiv:2305.18290, equation 7).
    """
    ratios = (scores_2P - reference_2P).reshape(-1, 2)
    return beta * (ratios[:, 0] - ratios[:, 1])


def _pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


# ---------------------------------------------------------------- over batches


def features(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    """The input of the output head, (B, T, D) in the compute dtype."""
    metadata = TokenMetadata(batch["positions"], batch["segments"])
    return model.apply({"params": params}, batch["inputs"], metadata, method="features")[0]


def head(model: Transformer, params: Any, x_BCD: jax.Array) -> jax.Array:
    """Features -> logits, (B, C, V)."""
    logits: Any = model.apply({"params": params}, x_BCD, method="logits")
    return logits


def language_model(
    model: Transformer, params: Any, batch: Batch, chunk: int, sparse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns (sum of the cross-entropy over the counted targets in nats, number of counted targets), float32 () each.

    Args:
      batch: int32 (B, T) arrays, see `data.rows`.
      chunk: number of positions whose logits are in memory at a time, a divisor of T; the backward pass recomputes
        them. 0: all positions at once.
      sparse: whether few targets are counted; see `chunked_sum.sum_of_rows`.
    """
    return jnp.sum(row_losses(model, params, batch, chunk, sparse)), _count(batch)


def row_losses(model: Transformer, params: Any, batch: Batch, chunk: int, sparse: bool = False) -> jax.Array:
    """The cross-entropy of every row, summed over its counted targets, in nats: float32 (B,)."""

    def part(chunk: Chunk) -> jax.Array:
        return jnp.sum(cross_entropy(head(model, params, chunk["x"]), chunk["targets"]) * chunk["mask"], -1)

    tokens = {"x": features(model, params, batch), "targets": batch["targets"], "mask": batch["mask"]}
    return sum_of_rows(part, chunk, tokens, sparse)


def preferences(
    model: Transformer,
    params: Any,
    reference: Transformer,
    reference_params: Any,
    batch: Batch,
    beta: float,
    chunk: int,
) -> tuple[jax.Array, ...]:
    """Returns (pairs with a positive margin, sum of the margins, number of pairs), float32 () each.

    A pair counts if both of its rows have targets; see `preference_margin` for the margin.
    """
    scores = -row_losses(model, params, batch, chunk, sparse=True)
    reference_scores = -row_losses(reference, reference_params, batch, chunk, sparse=True)
    counted = jnp.all(jnp.any(batch["mask"], -1).reshape(-1, 2), -1)
    margins = preference_margin(scores, reference_scores, beta)
    return tuple(jnp.sum(term * counted).astype(jnp.float32) for term in (margins > 0, margins, 1))


def token_losses(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    """The cross-entropy of every counted target in nats, 0 for others: float32 (B, T)."""
    logits = head(model, params, features(model, params, batch))
    return cross_entropy(logits, batch["targets"]) * batch["mask"]


def is_sparse(config: Config) -> bool:
    """Whether few targets of a row are counted: only the answers, or only the masked tokens."""
    return kinds.is_sparse(config.data) or config.loss.masked != "none"


def make(
    config: LossConfig,
    model: Transformer,
    chunk: int,
    reference: Transformer | None = None,
    sparse: bool = False,
) -> Loss:
    """Returns the loss function of `loss.kind` for `training.step.make`.

    Args:
      chunk, sparse: see `language_model`.
      reference: the frozen model of the loss, with the parameters `frozen["reference"]`: the teacher of distillation,
        or the reference of DPO (the model before training).

    Returns:
      A function (params, frozen, batch, step, key) -> (sum, number of terms), float32 () each.
    """
    c = config
    kind = extensions.select("loss.kind", c.kind, KINDS)
    custom_loss = _custom(kind) if isinstance(kind, extensions.Extension) else None

    def supervised(params: Any, frozen: Any, batch: Batch, step: jax.Array, key: jax.Array):
        tokens: dict[str, jax.Array] = {"x": features(model, params, batch)}
        tokens |= {name: batch[name] for name in ("targets", "mask")}
        if c.kind == "unlikelihood":
            tokens["candidates"] = candidates(batch)
        if reference is not None:
            tokens["teacher"] = features(reference, frozen["reference"], batch)

        def part(chunk: Chunk) -> jax.Array:
            logits, targets = head(model, params, chunk["x"]), chunk["targets"]
            if custom_loss is not None:
                loss = custom_loss(logits, targets)
            elif c.kind == "entmax":
                loss = entmax_loss(logits, targets)
            else:
                loss = smoothed(logits, targets, c.label_smoothing, c.z_loss)
            if c.kind == "unlikelihood":
                loss += c.unlikelihood * unlikelihood(logits, targets, batch["inputs"], chunk["candidates"])
            if reference is not None:
                teacher = head(reference, frozen["reference"], chunk["teacher"])
                loss = (1 - c.teacher_weight) * loss + c.teacher_weight * divergence(logits, teacher, c.temperature)
            return jnp.sum(loss * chunk["mask"], -1)

        return jnp.sum(sum_of_rows(part, chunk, tokens, sparse)), _count(batch)

    def dpo(params: Any, frozen: Any, batch: Batch, step: jax.Array, key: jax.Array):
        assert reference is not None
        scores = -row_losses(model, params, batch, chunk, sparse)
        reference_scores = -row_losses(reference, frozen["reference"], batch, chunk, sparse)
        counted = jnp.any(batch["mask"].reshape(scores.shape[0] // 2, -1), -1)  # exclude pairs of padding rows
        total = jnp.sum(preference(scores, reference_scores, c.beta) * counted)
        return total, jnp.sum(counted).astype(jnp.float32)

    return dpo if c.kind == "dpo" else supervised


def _custom(extension: extensions.Extension) -> Callable[..., jax.Array]:
    """The custom loss; its output shape is checked, because a scalar would be broadcast to every token."""
    loss = extension.bind(extension.target)
    arguments = jax.ShapeDtypeStruct((2, 3, 7), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.int32)
    extension.check_output("the loss", loss, arguments, {"batch": 2, "tokens": 3})
    return loss


def _count(batch: Batch) -> jax.Array:
    return jnp.sum(batch["mask"]).astype(jnp.float32)


# ---------------------------------------------------------------- checks


def check(config: Config) -> None:
    """Raises UserError if options of the loss contradict each other or the rest of the configuration."""
    c = config.loss
    kind = c.kind
    selected = extensions.select("loss.kind", kind, KINDS)
    is_custom = isinstance(selected, extensions.Extension)
    if is_custom:
        _custom(selected)
    check_chunk(config.train.loss_chunk, config.train.seq_len)
    for name in ("z_loss", "label_smoothing"):
        if getattr(c, name) and (is_custom or kind in ("entmax", "dpo")):
            raise UserError(f"loss.{name}={getattr(c, name)} has no effect with loss.kind={kind}; set it to 0")
    if c.teacher and kind != "distillation":
        raise UserError(f"loss.teacher={c.teacher} is used by loss.kind=distillation only, not by {kind}")
    if kind == "distillation" and not c.teacher:
        raise UserError("loss.kind=distillation needs a checkpoint: set loss.teacher")
    if kind == "dpo" and not config.init_from:
        raise UserError("loss.kind=dpo starts from a trained model, its reference: set init_from")
    if kind == "dpo" and config.train.batch_size % 2:
        raise UserError(f"loss.kind=dpo takes rows in pairs; train.batch_size={config.train.batch_size} is odd")
    if c.masked != "none":
        if config.model.causal:
            raise UserError(f"loss.masked={c.masked} predicts masked tokens from both sides; set model.causal=False")
        if config.eval.prompts or config.eval.tasks:
            raise UserError(
                f"loss.masked={c.masked} trains an encoder, which does not generate text; set eval.prompts=() and "
                "eval.tasks=()"
            )
        if kind in ("unlikelihood", "dpo"):
            raise UserError(f"loss.kind={kind} is defined for next-token prediction only; set loss.masked=none")
        if config.data.kind != "text":
            raise UserError(f"loss.masked={c.masked} hides tokens of data.kind=text; data.kind is {config.data.kind}")
    elif not config.model.causal:
        raise UserError(
            "model.causal=False attends to the next token; set loss.masked to tokens or words to predict masked ones"
        )
    if (kind == "dpo") != (config.data.kind == "preferences"):
        raise UserError(
            f"loss.kind={kind} with data.kind={config.data.kind}; use loss.kind=dpo with data.kind=preferences only"
        )


def check_reference(
    name: str, reference: ModelConfig, config: ModelConfig, other: Tokenizer, tokenizer: Tokenizer | None
) -> None:
    """Raises UserError unless the reference model `name` has the vocabulary of the trained model.

    Args:
      other: the tokenizer of the reference model.
      tokenizer: the tokenizer of the trained model; None: only the vocabulary sizes are compared.
    """
    digests = [tokenizers.digest(t)[:12] for t in (other, tokenizer or other)]
    if digests[0] != digests[1] or reference.vocab_size != config.vocab_size:
        raise UserError(
            f"{name}: its vocabulary ({reference.vocab_size} ids, {digests[0]}) differs from the vocabulary of the "
            f"run ({config.vocab_size} ids, {digests[1]})"
        )
    if reference.causal != config.causal:
        raise UserError(f"{name} has model.causal={reference.causal}; expected {config.causal}, as in this run")


def rows_together(config: LossConfig) -> int:
    """The number of consecutive rows of a batch that must stay in the same micro-batch."""
    return 2 if config.kind == "dpo" else 1


def check_chunk(chunk: int, length: int) -> None:
    """Raises UserError unless `train.loss_chunk` divides `train.seq_len`."""
    if chunk < 0 or (chunk and length % chunk):
        raise UserError(f"config key 'train.loss_chunk' is {chunk}; it must divide train.seq_len={length}")
