"""Explains sampling: the candidates of each step, their probabilities, and the tokens that each filter removed."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decoding import loop, steps
from llm_jax.decoding.options import DecodingOptions
from llm_jax.decoding.samplers import History
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import token_text
from llm_jax.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class FilterEffect:
    """The tokens that one filter removed.

    Attributes:
      filter: name of the filter.
      tokens: number of removed tokens.
      mass: total probability of the removed tokens before the filter.
    """

    filter: str
    tokens: int
    mass: float


@dataclasses.dataclass(frozen=True)
class ExplainedStep:
    """One sampling step.

    Attributes:
      chosen: the sampled id.
      candidates: the most likely ids under the model, including the sampled one.
      model: probabilities of the candidates under the model itself.
      final: probabilities of the candidates in the filtered distribution; 0 for removed tokens.
      stages: probabilities of the candidates under the model, then after each filter: filters + 1 lists.
      removed_by: for each candidate, the filter that removed it, or "".
      effects: the effect of each filter on the whole vocabulary.
    """

    chosen: int
    candidates: list[int]
    model: list[float]
    final: list[float]
    stages: list[list[float]]
    removed_by: list[str]
    effects: list[FilterEffect]


def explain(
    model: Transformer,
    params: Any,
    prompt: Sequence[int],
    options: DecodingOptions,
    *,
    seed: int = 0,
    eos: Sequence[int] = (),
    vocab_size: int | None = None,
    candidates: int = 8,
) -> Iterator[ExplainedStep]:
    """Yields the steps of `loop.generate` for one prompt.

    Args:
      prompt: token ids.
      candidates: number of most likely tokens per step.

    Raises:
      UserError: see `loop.generate`; or a method that does not sample token by token.
    """
    if options.method != "sample":
        raise UserError(f"--explain needs sampling or greedy decoding; the method is {options.method}")
    model, params = loop.unrolled(model, params)
    loop.check(model, [prompt], options.max_new_tokens, [seed])
    sampler = options.sampler()
    settings = loop.draw_settings(model, sampler, [seed], list(eos), vocab_size)
    names = [type(item).__name__ for item in sampler.filters]

    @jax.jit
    def stages(settings: steps.DrawSettings, logits: jax.Array, history: History) -> jax.Array:
        # The last token of the history was sampled from `logits`.
        previous_history = History(history.ids, history.length - 1, history.prompt)
        return jnp.stack(settings.sampler.stages(settings.mask_padded_vocab(logits), previous_history))[:, 0]

    state = loop.start(model, params, settings, [prompt], options.max_new_tokens)
    for time in range(options.max_new_tokens):
        if time:
            state = loop.advance(model, params, settings, state, jnp.int32(time + 1))
        logits = np.asarray(stages(settings, state.logits, state.history), np.float64)  # (filters + 1, V)
        yield _step(logits, names, int(state.ids[0, time]), sampler.greedy, candidates)
        if bool(state.done[0]):
            return


def _step(logits: np.ndarray, names: list[str], chosen: int, greedy: bool, candidates: int) -> ExplainedStep:
    """Returns the step for logits (filters + 1, V): of the model, then after each filter."""
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    removed = np.isneginf(logits)
    newly = removed[1:] & ~removed[:-1]
    effects = [
        FilterEffect(name, int(mask.sum()), float(before[mask].sum()))
        for name, mask, before in zip(names, newly, probabilities[:-1], strict=True)
    ]
    best = [int(i) for i in np.argsort(-logits[0], kind="stable")[:candidates]]
    best = best if chosen in best else [*best[:-1], chosen]
    removed_by = [next((name for name, mask in zip(names, newly, strict=True) if mask[i]), "") for i in best]
    final = probabilities[-1] if not greedy else (np.arange(len(logits[0])) == chosen).astype(float)
    stages = probabilities[:, best].tolist()
    return ExplainedStep(chosen, best, stages[0], final[best].tolist(), stages, removed_by, effects)


def table(tokenizer: Tokenizer, number: int, step: ExplainedStep) -> str:
    """Formats a step: one line per candidate, then one line per filter that removed tokens."""
    lines = [f"step {number}: {_shown(tokenizer, step.chosen)}"]
    lines.append(f"    {'id':>7}  {'token':<20} {'model':>9} {'drawn from':>10}")
    for i, p, q, name in zip(step.candidates, step.model, step.final, step.removed_by, strict=True):
        mark = ">" if i == step.chosen else " "
        end = f"removed by {name}" if name else ""
        lines.append(f"  {mark} {i:>7}  {_shown(tokenizer, i):<20} {p:>9.4f} {q:>10.4f}  {end}".rstrip())
    for effect in step.effects:
        if effect.tokens:
            lines.append(f"    {effect.filter} removed {effect.tokens} tokens of probability {effect.mass:.4f}")
    return "\n".join(lines)


def _shown(tokenizer: Tokenizer, index: int) -> str:
    return repr(token_text.label(tokenizer, index))
