"""The candidates of each sampling step after each filter, and the sampled token."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.decoding import complete
from llm_jax.decoding import explain as explain_lib
from llm_jax.decoding.explain import ExplainedStep
from llm_jax.decoding.options import DecodingOptions
from llm_jax.model.transformer import Transformer
from llm_jax.pictures import forward
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Panel, Passage, Picture, Table
from llm_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class SamplingSteps(Drawable):
    """The steps of a continuation.

    Attributes:
      prompt: labels of the tokens of the prompt.
      steps: see `ExplainedStep`: the candidates and their probabilities after each filter.
      labels: for each step, the labels of its candidates.
    """

    prompt: tuple[str, ...]
    steps: tuple[ExplainedStep, ...]
    labels: tuple[tuple[str, ...], ...]

    @property
    def sampled(self) -> tuple[str, ...]:
        """The labels of the sampled tokens."""
        pairs = zip(self.steps, self.labels, strict=True)
        return tuple(labels[step.candidates.index(step.chosen)] for step, labels in pairs)

    def picture(self) -> Picture:
        bits = np.array([-np.log2(step.model[step.candidates.index(step.chosen)]) for step in self.steps])
        values = np.concatenate([np.full(len(self.prompt), np.nan), bits])
        panels: list[Panel] = [Passage("the continuation", (*self.prompt, *self.sampled), values, "bits", 16.0)]
        for number, (step, labels, sampled) in enumerate(zip(self.steps, self.labels, self.sampled, strict=True), 1):
            removed = ", ".join(
                f"{e.filter} removed {e.tokens:,} of probability {e.mass:.3f}" for e in step.effects if e.tokens
            )
            rows: tuple[tuple[str | float, ...], ...] = tuple(
                (
                    repr(label) + (" (sampled)" if index == step.chosen else ""),
                    *(float(probabilities[k]) for probabilities in step.stages),
                    f"removed by {step.removed_by[k]}" if step.removed_by[k] else "",
                )
                for k, (index, label) in enumerate(zip(step.candidates, labels, strict=True))
            )
            columns = ("token", "model", *(f"after {effect.filter}" for effect in step.effects), "")
            panels.append(Table(f"step {number}: {sampled!r}{removed and '; '}{removed}", columns, rows))
        note = "The columns are probabilities: of the model, then after each filter, in the order of the sampler."
        return Picture("Sampling step by step", tuple(panels), note)


def probabilities(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    prompt: str,
    options: DecodingOptions | None = None,
    candidates: int = 8,
) -> SamplingSteps:
    """Continues a prompt and records every step.

    Args:
      options: as for `generate`; by default 16 tokens without a filter.
      candidates: how many of the most likely tokens each step lists.

    Raises:
      UserError: as `explain.explain`.
    """
    options = options or DecodingOptions(max_new_tokens=16)
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    options.check(vocab_size)
    ids: Sequence[int] = complete.fit_to_context(model, complete.prompt_ids(tokenizer, prompt), options)
    eos = complete.eos_ids(tokenizer, options)
    steps = tuple(
        explain_lib.explain(
            model, params, ids, options, seed=options.seed, eos=eos, vocab_size=vocab_size, candidates=candidates
        )
    )
    labels = tuple(forward.labels(tokenizer, step.candidates) for step in steps)
    return SamplingSteps(forward.labels(tokenizer, ids), steps, labels)
