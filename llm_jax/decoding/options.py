"""Every option of decoding, once: what `complete` takes and what the command `generate` has as flags."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm_jax.errors import UserError

if TYPE_CHECKING:  # the flags of `generate` come from here, and --help costs no JAX
    from llm_jax.decoding.samplers import Filter, Sampler

PROMPT = "prompt"  # the draft of speculative decoding that looks back in the text itself
_LEAST, _MOST = 1e-30, 1e30
METHODS = ("sample", "beam", "contrastive", "speculative")
# Rows (options, where they have no effect, whether they have one) of `Options`, or of flags of the same names.
NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("length_penalty", "early_stop", "beam_groups", "diversity"),
        "--beams=2 or more is not given",
        lambda o: o.beams > 1,
    ),
    (("diversity",), "--beam_groups=2 or more is not given", lambda o: o.beam_groups > 1),
    (("draft_tokens",), "--draft=CHECKPOINT or --draft=prompt is not given", lambda o: bool(o.draft)),
)


def _option(default: Any, about: str, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> Any:
    """A field that must lie in [low, high], or in (low, high] with `open_low`."""
    return dataclasses.field(default=default, metadata={"about": about, "low": low, "high": high, "open_low": open_low})


@dataclasses.dataclass(frozen=True)
class Options:
    """How text is continued. Each value shown here leaves its option off. Rule by rule: `check`."""

    max_new_tokens: int = _option(128, "tokens at most", 1)
    temperature: float = _option(1.0, "divides the logits; 0 is greedy", 0)
    top_k: int = _option(0, "draw from the k most likely tokens; contrastive search: candidates a step", 0)
    top_p: float = _option(1.0, "draw from the most likely tokens of this total probability", 0, 1, True)
    min_p: float = _option(0.0, "draw from tokens at least this many times as likely as the likeliest", 0, 1)
    typical_p: float = _option(1.0, "draw from the least surprisingly surprising tokens of this mass", 0, 1, True)
    epsilon: float = _option(0.0, "draw from tokens of at least this probability", 0, 1)
    eta: float = _option(0.0, "the same, with a threshold that falls where the entropy is high", 0, 1)
    repetition_penalty: float = _option(1.0, "divides positive logits of tokens that were there", 0, open_low=True)
    presence_penalty: float = _option(0.0, "taken from the logits of tokens that were drawn")
    frequency_penalty: float = _option(0.0, "taken from them for each time they were drawn")
    no_repeat_ngram: int = _option(0, "no sequence of this many tokens comes twice", 0)
    logit_bias: tuple[tuple[int, float], ...] = _option((), "ID:BIAS, added to the logit of a token; may be repeated")
    n: int = _option(1, "continuations of each prompt: draws, or the best beams", 1)
    seed: int = _option(0, "of the draws; row i uses seed + i", 0, 2**32 - 1)
    eos: tuple[int, ...] = _option((), "ids that end a text, besides the tokenizer's own; may be repeated")
    ignore_eos: bool = _option(False, "nothing but the length and stop strings ends a text")
    stop: tuple[str, ...] = _option((), "text that ends a text and is left out of it; may be repeated")
    alternatives: int = _option(0, "most likely tokens whose log-probabilities are given at each step", 0)
    context: int = _option(0, "tokens of prompt and answer at most; 0: as many as the model has positions", 0)
    truncate: str = _option("", "a prompt too long for the context loses its left or right end; empty: it is refused")
    beams: int = _option(1, "width of the beam search", 1)
    length_penalty: float = _option(1.0, "beams are ranked by log-probability / length to this power")
    early_stop: bool = _option(False, "the beam search ends when it has n ended texts, not when no better can come")
    beam_groups: int = _option(1, "groups of beams that avoid each other's tokens", 1)
    diversity: float = _option(0.0, "taken from a token's log-probability for each earlier group that chose it", 0)
    contrastive: float = _option(0.0, "contrastive search: weight of the penalty on likeness to what was said", 0, 1)
    draft: str = _option("", f"speculative decoding: a checkpoint that guesses ahead, or '{PROMPT}': the text so far")
    draft_tokens: int = _option(4, "tokens guessed ahead", 1)

    @property
    def method(self) -> str:
        """The one of `METHODS` that the options ask for."""
        if self.beams > 1:
            return "beam"
        if self.contrastive:
            return "contrastive"
        return "speculative" if self.draft else "sample"

    def changed(self) -> set[str]:
        """Names of the options that are not as they stand above."""
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def check(self, vocab_size: int) -> None:
        """Raises UserError: an option out of its range, or one that another leaves nothing to do."""
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if isinstance(value, int | float) and not isinstance(value, bool):
                above = low < value if field.metadata["open_low"] else low <= value
                if not (above and value <= high and math.isfinite(value)):
                    left = "(" if field.metadata["open_low"] or low == -math.inf else "["
                    right = ")" if high == math.inf else "]"
                    raise UserError(f"--{field.name}={value}; expected a number in {left}{low:g}, {high:g}{right}")
                if not _held(value):
                    raise UserError(f"--{field.name}={value}; expected 0, or a size from {_LEAST:g} to {_MOST:g}")
        if self.top_k > vocab_size:
            raise UserError(f"--top_k={self.top_k} is more than the {vocab_size} tokens of the vocabulary")
        if self.alternatives > vocab_size:
            raise UserError(
                f"--alternatives={self.alternatives} is more than the {vocab_size} tokens of the vocabulary"
            )
        for name, ids in (("eos", self.eos), ("logit_bias", [i for i, _ in self.logit_bias])):
            bad = [i for i in ids if not 0 <= i < vocab_size]
            if bad:
                raise UserError(f"--{name} names the id {bad[0]}; the vocabulary's run from 0 to {vocab_size - 1}")
        if any(not _held(bias) for _, bias in self.logit_bias):
            raise UserError(f"--logit_bias has a bias that is not 0, or of a size from {_LEAST:g} to {_MOST:g}")
        if self.truncate not in ("", "left", "right"):
            raise UserError(f"--truncate={self.truncate}; expected left or right, or nothing")
        if "" in self.stop:
            raise UserError("--stop='' would end every text at once; leave it out")
        self._check_together()

    def _check_together(self) -> None:
        changed = self.changed()
        drawing = changed & {"top_p", "min_p", "typical_p", "epsilon", "eta"}
        if self.temperature == 0 and (useless := drawing | (changed & {"top_k"} if not self.contrastive else set())):
            raise UserError(f"--temperature=0 is greedy and leaves nothing for {_flags(useless)} to choose from")
        if self.temperature == 0 and self.method == "sample" and self.n > 1:
            raise UserError(
                f"--temperature=0 is greedy and gives the same text --n={self.n} times; draw, or use --beams"
            )
        asked = changed & {"beams", "contrastive", "draft"}
        if len(asked) > 1:
            raise UserError(f"{_flags(asked)} are different ways to decode; choose one")
        for names, where, have_effect in NEEDS:
            if (vain := changed & set(names)) and not have_effect(self):
                raise UserError(f"--{min(vain)} has no effect where {where}")
        if self.beams > 1:
            if useless := drawing | changed & {"temperature", "top_k", "seed"}:
                raise UserError(f"a beam search draws nothing; --beams leaves nothing for {_flags(useless)} to do")
            if self.n > self.beams:
                raise UserError(f"--n={self.n} is more than --beams={self.beams}")
            if self.beams % self.beam_groups:
                raise UserError(f"--beams={self.beams} does not split into --beam_groups={self.beam_groups}")
        if self.contrastive:
            if self.top_k < 2:
                raise UserError(
                    f"--contrastive chooses among --top_k candidates; --top_k={self.top_k}, expected 2 or more"
                )
            if useless := drawing | changed & {"temperature", "seed", "n"}:
                raise UserError(f"contrastive search draws nothing; it leaves nothing for {_flags(useless)} to do")
        if self.alternatives and self.method != "sample":
            raise UserError(f"--alternatives is for drawing and greedy decoding, not for {self.method}")

    def sampler(self) -> "Sampler":
        """The chain of filters; temperature 0 is greedy."""
        import jax.numpy as jnp

        from llm_jax.decoding import penalties, samplers

        chain: list[Filter] = []
        if self.logit_bias:
            ids, biases = zip(*self.logit_bias, strict=True)
            chain.append(penalties.Bias(jnp.asarray(ids, jnp.int32), jnp.asarray(biases, jnp.float32)))
        if self.repetition_penalty != 1:
            chain.append(penalties.Repetition(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            chain.append(penalties.PresenceFrequency(self.presence_penalty, self.frequency_penalty))
        if self.no_repeat_ngram:
            chain.append(penalties.NoRepeatNgram(self.no_repeat_ngram))
        if self.temperature == 0:
            return samplers.Sampler(tuple(chain), greedy=True)
        if self.temperature != 1:
            chain.append(samplers.Temperature(self.temperature))
        if self.top_k and not self.contrastive:
            chain.append(samplers.TopK(self.top_k))
        if self.top_p < 1:
            chain.append(samplers.TopP(self.top_p))
        if self.min_p:
            chain.append(samplers.MinP(self.min_p))
        if self.typical_p < 1:
            chain.append(samplers.Typical(self.typical_p))
        if self.epsilon:
            chain.append(samplers.Epsilon(self.epsilon))
        if self.eta:
            chain.append(samplers.Eta(self.eta))
        return samplers.Sampler(tuple(chain), greedy=False)


def _held(value: float) -> bool:
    """Whether what is made of a number and of logits fits float32; what does not would draw just any token."""
    return not value or _LEAST <= abs(value) <= _MOST


def parse_bias(text: str) -> tuple[int, float]:
    """ "ID:BIAS" -> (id, bias). Raises UserError for anything else."""
    index, _, bias = text.partition(":")
    try:
        return int(index), float(bias)
    except ValueError as error:
        raise UserError(f"--logit_bias={text}; expected ID:BIAS, such as 42:-5") from error


def _flags(names: set[str]) -> str:
    return " and ".join(f"--{name}" for name in sorted(names))
