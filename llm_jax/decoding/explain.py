"""Why each token was chosen: the candidates, their probabilities, and what each filter removed."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.decoding import loop
from llm_jax.decoding.options import Options
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Removed:
    """What one filter did: tokens it ruled out, and the probability that they had before it."""

    filter: str
    tokens: int
    mass: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One token.

    Attributes:
      chosen: its id.
      candidates: the most likely ids under the model, the chosen one included.
      model: their probabilities under the model itself.
      final: their probabilities when the draw was made; 0 for what was ruled out.
      fate: for each, the filter that ruled it out, or "".
      removed: what each filter did to all tokens.
    """

    chosen: int
    candidates: list[int]
    model: list[float]
    final: list[float]
    fate: list[str]
    removed: list[Removed]


def explain(
    model: Transformer,
    params: Any,
    prompt: Sequence[int],
    options: Options,
    *,
    seed: int = 0,
    eos: Sequence[int] = (),
    vocab_size: int | None = None,
    candidates: int = 8,
) -> Iterator[Step]:
    """The steps of `loop.generate` for one prompt, one by one.

    Raises:
      UserError: a method that does not draw token by token.
    """
    if options.method != "sample":
        raise UserError(f"--explain shows draws and greedy decoding, not {options.method}")
    model, params = loop.unrolled(model, params)
    loop.check(model, [prompt], options.max_new_tokens, [seed])
    sampler = options.sampler()
    rules = loop.make_rules(model, sampler, [seed], list(eos), vocab_size)
    names = [type(one).__name__ for one in sampler.filters]
    stages = jax.jit(lambda rules, logits, history: jnp.stack(rules.sampler.stages(rules.allow(logits), history))[:, 0])
    state = loop.start(model, params, [prompt], options.max_new_tokens)
    for time in range(options.max_new_tokens):
        through = np.asarray(stages(rules, state.logits, state.history), np.float64)  # (filters + 1, V)
        state = loop.advance(model, params, rules, state, jnp.int32(time + 1))
        yield _step(through, names, int(state.ids[0, time]), sampler.greedy, candidates)
        if bool(state.done[0]):
            return


def _step(through: np.ndarray, names: list[str], chosen: int, greedy: bool, candidates: int) -> Step:
    probabilities = np.exp(through - through.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    out = np.isneginf(through)
    newly = out[1:] & ~out[:-1]
    removed = [
        Removed(name, int(which.sum()), float(before[which].sum()))
        for name, which, before in zip(names, newly, probabilities[:-1], strict=True)
    ]
    best = [int(i) for i in np.argsort(-through[0], kind="stable")[:candidates]]
    best = best if chosen in best else [*best[:-1], chosen]
    fate = [next((n for n, which in zip(names, newly, strict=True) if which[i]), "") for i in best]
    final = probabilities[-1] if not greedy else (np.arange(len(through[0])) == chosen).astype(float)
    return Step(chosen, best, probabilities[0][best].tolist(), final[best].tolist(), fate, removed)


def table(tokenizer: Tokenizer, number: int, step: Step) -> str:
    """A step for a reader: a line a candidate, then a line a filter that removed something."""
    lines = [f"step {number}: {_shown(tokenizer, step.chosen)}"]
    lines.append(f"    {'id':>7}  {'token':<20} {'model':>9} {'drawn from':>10}")
    for i, p, q, fate in zip(step.candidates, step.model, step.final, step.fate, strict=True):
        mark = ">" if i == step.chosen else " "
        end = f"removed by {fate}" if fate else ""
        lines.append(f"  {mark} {i:>7}  {_shown(tokenizer, i):<20} {p:>9.4f} {q:>10.4f}  {end}".rstrip())
    for one in step.removed:
        if one.tokens:
            lines.append(f"    {one.filter} removed {one.tokens} tokens of probability {one.mass:.4f}")
    return "\n".join(lines)


def _shown(tokenizer: Tokenizer, index: int) -> str:
    text = tokenizer.decode([index])
    return repr(text if text and "�" not in text else tokenizer.piece(index))
