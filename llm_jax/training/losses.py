"""Losses by name: what is trained on. What is measured on held-out text is always `language_model`.

Every loss is a sum over what it counts and the number of these, so that micro-batches and devices add
up to the batch in one piece. A model trained with entmax gives its probabilities by `entmax15`, not by
softmax, and is to be sampled so.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import tokenizers
from llm_jax.data import kinds
from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Transformer
from llm_jax.schema import Config, LossConfig, ModelConfig, choice
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
      smoothing: share of the target's probability that all ids share (Szegedy et al. 2016,
        arXiv:1512.00567, section 7).
      z: weight of log(sum exp(logits))^2, which keeps logits from drifting (Chowdhery et al. 2022,
        PaLM, arXiv:2204.02311, section 5).
    """
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    loss = total - _pick(logits, targets)
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (total - jnp.mean(logits, -1))
    return loss + z * jnp.square(total) if z else loss


def unlikelihood(logits: jax.Array, targets: jax.Array, seen: jax.Array, candidates: jax.Array) -> jax.Array:
    """-sum over c of log(1 - p(c)), the c being earlier tokens other than the target.

    Welleck et al. 2020, arXiv:1908.04319, equations 4 and 5: no token of the context but the right one
    is to be likely again. 1 - p is kept above 1e-5.

    Args:
      logits: (B, C, V).
      targets: int (B, C).
      seen: int (B, T), the ids of the context.
      candidates: bool (B, C, T), which of them stand before the target, each id once.

    Returns:
      float32 (B, C).
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    ids = jnp.broadcast_to(seen[:, None], candidates.shape)
    rest = 1 - jnp.exp(jnp.take_along_axis(logs, ids, -1))
    wrong = candidates & (ids != targets[..., None])
    return -jnp.sum(jnp.where(wrong, jnp.log(jnp.maximum(rest, 1e-5)), 0), -1)


def candidates(batch: Batch) -> jax.Array:
    """bool (B, T, T): is the token s of the input the first of its id in the document, and at t or before?"""
    ids, segments = batch["inputs"], batch["segments"]
    before = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    same = (segments[:, :, None] == segments[:, None]) & before
    again = jnp.any(same & ~jnp.eye(ids.shape[1], dtype=bool) & (ids[:, :, None] == ids[:, None]), -1)
    return same & ~again[:, None]


def entmax15(logits: jax.Array) -> jax.Array:
    """1.5-entmax, [logits / 2 - threshold]_+^2: (..., V) -> float32 (..., V), sparse, of sum 1.

    Peters et al. 2019, arXiv:1905.05702, equation 10. The threshold is the root of a convex falling
    function, which Newton's method nears from below, never past it; the last step is exact. (Their
    algorithm sorts, which is slow on accelerators.)
    """
    x = logits.astype(jnp.float32) / 2
    # Nothing further than 1 below the largest is in the support.
    x = jnp.maximum(x - jnp.max(x, -1, keepdims=True), -1.0)

    def newton(_: int, t: jax.Array) -> jax.Array:
        over = jnp.maximum(x - t, 0)
        return t + (jnp.sum(jnp.square(over), -1, keepdims=True) - 1) / (2 * jnp.sum(over, -1, keepdims=True))

    # The slowest start, V equal logits, halves the distance: 16 steps serve a vocabulary of 2^24.
    threshold = jax.lax.fori_loop(0, 16, newton, jnp.full((*x.shape[:-1], 1), -1.0, jnp.float32))
    return jnp.square(jnp.maximum(x - threshold, 0))


def entmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss whose gradient is entmax15(logits) - onehot(target): (..., V), int (...) -> float32 (...).

    Peters et al. 2019, equation 12: (p - onehot) logits + 4/3 (1 - sum p^1.5). It is 0 where the target
    leads all others by 2.
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

    Hinton et al. 2015, arXiv:1503.02531, section 2; T^2 keeps its gradient of the size of the cross-entropy's.
    """
    student, teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher))
    return temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), -1)


def preference(scores_2P: jax.Array, reference_2P: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta (difference of the pair's log-ratios)): (2P,) log-probabilities twice -> (P,).

    Rows 2i are chosen, rows 2i + 1 rejected (Rafailov et al. 2023, DPO, arXiv:2305.18290, equation 7).
    """
    ratios = (scores_2P - reference_2P).reshape(-1, 2)
    return -jax.nn.log_sigmoid(beta * (ratios[:, 0] - ratios[:, 1]))


def _pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


# ---------------------------------------------------------------- over batches


def features(model: Transformer, params: Any, batch: Batch) -> jax.Array:
    """What the head turns into logits, (B, T, D)."""
    where = Tokens(batch["positions"], batch["segments"])
    return model.apply({"params": params}, batch["inputs"], where, method="features")[0]


def head(model: Transformer, params: Any, x_BCD: jax.Array) -> jax.Array:
    """Features -> logits, (B, C, V)."""
    logits: Any = model.apply({"params": params}, x_BCD, method="logits")
    return logits


def language_model(
    model: Transformer, params: Any, batch: Batch, chunk: int, sparse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropy over the counted targets, number of these), both float32 ().

    Args:
      chunk: positions whose logits exist at a time, forward and backward (they are computed again
        there); it divides T. 0: all at once.
      sparse: few targets count; see `chunks.sum_of_rows`.
    """
    return jnp.sum(row_losses(model, params, batch, chunk, sparse)), _count(batch)


def row_losses(model: Transformer, params: Any, batch: Batch, chunk: int, sparse: bool = False) -> jax.Array:
    """The cross-entropy of every row over its counted targets, float32 (B,)."""

    def part(some: Chunk) -> jax.Array:
        return jnp.sum(cross_entropy(head(model, params, some["x"]), some["targets"]) * some["mask"], -1)

    tokens = {"x": features(model, params, batch), "targets": batch["targets"], "mask": batch["mask"]}
    return sum_of_rows(part, chunk, tokens, sparse)


def is_sparse(config: Config) -> bool:
    """Whether few targets of a row count: answers, or what is hidden."""
    return kinds.is_sparse(config.data) or config.loss.masked != "none"


def make(
    config: LossConfig,
    model: Transformer,
    chunk: int,
    other: Transformer | None = None,
    whole: Callable[[Any, Any, jax.Array], Any] = lambda trained, frozen, key: trained,
    sparse: bool = False,
) -> Loss:
    """The loss that `loss.kind` names, for `training.step.make`.

    Args:
      chunk, sparse: see `language_model`.
      other: the frozen model, whose parameters are `frozen["reference"]`: the teacher, or the reference of
        DPO (the model as it was at the start).
      whole: (trained, frozen, key) -> the parameters that the model sees.
    """
    c = config

    def supervised(trained: Any, frozen: Any, batch: Batch, step: jax.Array, key: jax.Array):
        params = whole(trained, frozen, key)
        tokens: dict[str, jax.Array] = {"x": features(model, params, batch)}
        tokens |= {name: batch[name] for name in ("targets", "mask")}
        if c.kind == "unlikelihood":
            tokens["candidates"] = candidates(batch)
        if other is not None:
            tokens["teacher"] = features(other, frozen["reference"], batch)

        def part(some: Chunk) -> jax.Array:
            logits, targets = head(model, params, some["x"]), some["targets"]
            if c.kind == "entmax":
                loss = entmax_loss(logits, targets)
            else:
                loss = smoothed(logits, targets, c.label_smoothing, c.z_loss)
            if c.kind == "unlikelihood":
                loss += c.unlikelihood * unlikelihood(logits, targets, batch["inputs"], some["candidates"])
            if other is not None:
                teacher = head(other, frozen["reference"], some["teacher"])
                loss = (1 - c.teacher_weight) * loss + c.teacher_weight * divergence(logits, teacher, c.temperature)
            return jnp.sum(loss * some["mask"], -1)

        return jnp.sum(sum_of_rows(part, chunk, tokens, sparse)), _count(batch)

    def dpo(trained: Any, frozen: Any, batch: Batch, step: jax.Array, key: jax.Array):
        assert other is not None
        scores = -row_losses(model, whole(trained, frozen, key), batch, chunk, sparse)
        reference = -row_losses(other, frozen["reference"], batch, chunk, sparse)
        counted = jnp.any(batch["mask"].reshape(scores.shape[0] // 2, -1), -1)  # pairs of padding do not count
        return jnp.sum(preference(scores, reference, c.beta) * counted), jnp.sum(counted).astype(jnp.float32)

    return dpo if c.kind == "dpo" else supervised


def _count(batch: Batch) -> jax.Array:
    return jnp.sum(batch["mask"]).astype(jnp.float32)


# ---------------------------------------------------------------- what does not go together


def check(config: Config) -> None:
    """Raises UserError where the options of the loss contradict each other or the rest of the configuration."""
    c = config.loss
    kind = choice("loss.kind", c.kind, KINDS)
    check_chunk(config.train.loss_chunk, config.train.seq_len)
    for name in ("z_loss", "label_smoothing"):
        if getattr(c, name) and kind in ("entmax", "dpo"):
            raise UserError(f"loss.{name}={getattr(c, name)} has no meaning with loss.kind={kind}; set it to 0")
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
            raise UserError(f"loss.masked={c.masked}: what is hidden is found from both sides; set model.causal=False")
        if config.eval.prompts or config.eval.tasks:
            raise UserError(f"loss.masked={c.masked}: encoders continue no text; set eval.prompts and eval.tasks to ()")
        if kind in ("unlikelihood", "dpo"):
            raise UserError(f"loss.kind={kind} is of what comes next; with loss.masked={c.masked} it has no meaning")
        if config.data.kind != "text":
            raise UserError(f"loss.masked={c.masked} hides tokens of data.kind=text; data.kind is {config.data.kind}")
    elif not config.model.causal:
        raise UserError("model.causal=False sees the next token; set loss.masked to tokens or words to hide some")
    if (kind == "dpo") != (config.data.kind == "preferences"):
        raise UserError(
            f"loss.kind={kind} with data.kind={config.data.kind}: dpo learns from preferences, and nothing else does"
        )


def check_other(name: str, its: ModelConfig, ours: ModelConfig, digest: str, tokenizer: Tokenizer) -> None:
    """Raises UserError unless the frozen model `name` predicts the ids that the trained one does.

    Args:
      digest: of its tokenizer.
    """
    if digest != tokenizers.digest(tokenizer) or its.vocab_size != ours.vocab_size:
        raise UserError(
            f"{name}: its vocabulary ({its.vocab_size} ids, {digest[:12]}) is not the run's "
            f"({ours.vocab_size} ids, {tokenizers.digest(tokenizer)[:12]})"
        )
    if its.causal != ours.causal:
        raise UserError(f"{name}: model.causal={its.causal} there, {ours.causal} in this run")


def rows_together(config: LossConfig) -> int:
    """How many neighbouring rows of a batch belong together."""
    return 2 if config.kind == "dpo" else 1


def check_chunk(chunk: int, length: int) -> None:
    """Raises UserError unless `train.loss_chunk` divides `train.seq_len`."""
    if chunk < 0 or (chunk and length % chunk):
        raise UserError(f"config key 'train.loss_chunk' is {chunk}; it must divide train.seq_len={length}")
