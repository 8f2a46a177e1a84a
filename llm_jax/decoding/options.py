"""The options of decoding: the arguments of `complete.complete` and the flags of the command `generate`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llm_jax.errors import UserError
from llm_jax.schema import other_libraries

if TYPE_CHECKING:  # `generate --help` reads this module without importing JAX
    from llm_jax.decoding.samplers import Filter, Sampler

PROMPT = "prompt"  # the value of `draft` that selects prompt look-up instead of a draft model
_SMALLEST, _LARGEST = 1e-30, 1e30
_BIASES = 8  # biased tokens are padded to a multiple of this
GROUPS = ("sampling", "penalties", "search", "stops", "output")  # of options, in the order of --help
METHODS = ("sample", "beam", "contrastive", "speculative")
EARLY_STOP = (False, True, "never")
# (names of options, condition under which they have no effect, function of `DecodingOptions` or flags that returns
# whether they have an effect).
NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (
        ("length_penalty", "early_stop", "beam_groups", "diversity"),
        "--beams=2 or more is not given",
        lambda o: o.beams > 1,
    ),
    (("diversity",), "--beam_groups=2 or more is not given", lambda o: o.beam_groups > 1),
    (("draft_tokens",), "--draft=CHECKPOINT or --draft=prompt is not given", lambda o: bool(o.draft)),
)


def _option(
    group: str, default: Any, about: str, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> Any:
    """Declares a field with its help text and its range, [low, high], or (low, high] with `open_low`."""
    metadata = {"group": group, "about": about, "low": low, "high": high, "open_low": open_low}
    return dataclasses.field(default=default, metadata=metadata)


@other_libraries.explain_unknown_keywords
@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """Options for text generation. By default every option is off; `check` validates combinations.

    Options with several values (`stop`, `eos`, `filter`) also accept a single value, and `logit_bias` a dictionary.

    The metadata of a field contains its `group`, `about` (the help text of its flag) and its range.
    """

    max_new_tokens: int = _option("stops", 128, "maximum number of tokens to generate", 1)
    temperature: float = _option(
        "sampling", 1.0, "sampling temperature: divides the logits; 0 is greedy decoding, e.g. 0.7", 0
    )
    top_k: int = _option(
        "sampling",
        0,
        "top-k sampling: keep the k most likely tokens, e.g. 40; 0, or more than the vocabulary has, keeps all. With "
        "--contrastive: candidates per step",
        0,
    )
    top_p: float = _option(
        "sampling",
        1.0,
        "nucleus sampling (Holtzman et al. 2020): keep the most likely tokens up to probability mass p, e.g. 0.95; "
        "1 is off",
        0,
        1,
        True,
    )
    min_p: float = _option(
        "sampling",
        0.0,
        "min-p sampling (Nguyen et al. 2024): keep tokens at least p times as likely as the most likely one, e.g. "
        "0.05; 0 is off",
        0,
        1,
    )
    typical_p: float = _option(
        "sampling",
        1.0,
        "locally typical sampling (Meister et al. 2023): keep the tokens whose surprisal is closest to the entropy, up "
        "to probability mass p, e.g. 0.95; 1 is off",
        0,
        1,
        True,
    )
    epsilon: float = _option(
        "sampling",
        0.0,
        "epsilon sampling (Hewitt et al. 2022): keep tokens with at least this probability, e.g. 0.0003; 0 is off",
        0,
        1,
    )
    eta: float = _option(
        "sampling",
        0.0,
        "eta sampling (Hewitt et al. 2022): like epsilon, with a threshold that decreases with the entropy, e.g. "
        "0.0003; 0 is off",
        0,
        1,
    )
    filter: tuple[str, ...] = _option(
        "sampling", (), "custom filter, FILE:NAME or FILE:NAME(OPTION=VALUE), applied last; may be repeated"
    )
    n: int = _option("output", 1, "number of continuations per prompt: samples, or with --beams the best beams", 1)
    seed: int = _option("sampling", 0, "random seed; continuation i uses seed + i", 0, 2**32 - 1)
    repetition_penalty: float = _option(
        "penalties",
        1.0,
        "repetition penalty (Keskar et al. 2019): divide the logits of tokens in the prompt or continuation, e.g. 1.2; "
        "1 is off",
        0,
        open_low=True,
    )
    presence_penalty: float = _option(
        "penalties", 0.0, "subtract this value from the logit of every token generated before, e.g. 0.5"
    )
    frequency_penalty: float = _option(
        "penalties", 0.0, "subtract this value from the logit of a token for each of its occurrences so far, e.g. 0.5"
    )
    no_repeat_ngram: int = _option(
        "penalties",
        0,
        "never repeat an n-gram of this length from the prompt or continuation, e.g. 3; 0 is off",
        0,
        2**31 - 1,
    )
    logit_bias: tuple[tuple[int, float], ...] = _option(
        "penalties", (), "ID:BIAS adds a bias to the logit of a token id, e.g. 42:-5; may be repeated"
    )
    eos: tuple[int, ...] = _option("stops", (), "additional token id that ends a text; may be repeated")
    ignore_eos: bool = _option("stops", False, "do not end a text at end-of-text tokens")
    stop: tuple[str, ...] = _option(
        "stops",
        (),
        "string, or name of a special token, that ends a text and is removed from it; may be repeated",
    )
    alternatives: int = _option(
        "output", 0, "with --json: print the log-probabilities of this many most likely tokens per step, e.g. 5", 0
    )
    context: int = _option(
        "stops", 0, "maximum number of tokens of prompt and continuation; 0: the maximum length of the model", 0
    )
    truncate: str = _option(
        "stops", "", "side on which a too long prompt is truncated, left or right; empty: a too long prompt is an error"
    )
    beams: int = _option("search", 1, "beam search: number of beams, e.g. 4; 1 is off", 1)
    length_penalty: float = _option(
        "search", 1.0, "beam search: rank by log-probability / length^penalty; above 0 favours longer texts"
    )
    early_stop: bool | str = _option(
        "search",
        False,
        "beam search: true stops when --beams texts have ended; false also requires that the best running beam, at its "
        "current length, scores below them; never stops only when no running beam can reach a better score",
    )
    beam_groups: int = _option("search", 1, "diverse beam search (Vijayakumar et al. 2016): number of groups", 1)
    diversity: float = _option(
        "search",
        0.0,
        "diverse beam search: subtract this value from the score of a token for each beam of earlier groups that "
        "selected it, e.g. 0.5",
        0,
    )
    contrastive: float = _option(
        "search",
        0.0,
        "contrastive search (Su et al. 2022): weight of the similarity penalty, e.g. 0.6 with --top_k=4; 0 is off",
        0,
        1,
    )
    draft: str = _option(
        "search",
        "",
        f"speculative decoding (Leviathan et al. 2022): checkpoint of a draft model, or '{PROMPT}' for prompt look-up",
    )
    draft_tokens: int = _option("search", 4, "speculative decoding: number of draft tokens per round", 1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple) and not isinstance(value, tuple):
                if isinstance(value, Mapping):  # of biases
                    value = tuple(value.items())
                value = (value,) if isinstance(value, str | int) else tuple(value)
                object.__setattr__(self, field.name, value)

    @property
    def method(self) -> str:
        """The decoding method: "beam", "contrastive", "speculative" or "sample"."""
        if self.beams > 1:
            return "beam"
        if self.contrastive:
            return "contrastive"
        return "speculative" if self.draft else "sample"

    def changed(self) -> set[str]:
        """Names of the options that differ from their defaults."""
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}

    def check(self, vocab_size: int) -> None:
        """Validates the options.

        Raises:
          UserError: an option is out of range, contradicts another option, or has no effect.
        """
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if isinstance(value, int | float) and not isinstance(value, bool):
                above = low < value if field.metadata["open_low"] else low <= value
                is_finite = isinstance(value, int) or math.isfinite(value)  # math converts to float, which may overflow
                if not (above and value <= high and is_finite):
                    left = "(" if field.metadata["open_low"] or low == -math.inf else "["
                    right = ")" if high == math.inf else "]"
                    raise UserError(
                        f"--{field.name}={_short(value)}; expected a number in {left}{low:.10g}, {high:.10g}{right}"
                    )
                if not _representable(value):
                    raise UserError(
                        f"--{field.name}={_short(value)}; expected 0, or a magnitude from {_SMALLEST:g} to {_LARGEST:g}"
                    )
        if self.contrastive and self.top_k > vocab_size:
            raise UserError(f"--top_k={self.top_k} is more than the {vocab_size} tokens of the vocabulary")
        if self.alternatives > vocab_size:
            raise UserError(
                f"--alternatives={self.alternatives} is more than the {vocab_size} tokens of the vocabulary"
            )
        for name, ids in (("eos", self.eos), ("logit_bias", [i for i, _ in self.logit_bias])):
            bad = [i for i in ids if not 0 <= i < vocab_size]
            if bad:
                raise UserError(f"--{name} has the token id {bad[0]}; expected an id from 0 to {vocab_size - 1}")
        if any(not _representable(bias) for _, bias in self.logit_bias):
            raise UserError(f"--logit_bias: expected biases of 0, or of a magnitude from {_SMALLEST:g} to {_LARGEST:g}")
        if self.truncate not in ("", "left", "right"):
            raise UserError(f"--truncate={self.truncate}; expected left, right or nothing")
        if self.early_stop not in EARLY_STOP:
            raise UserError(f"--early_stop={self.early_stop}; expected true, false or never")
        if "" in self.stop:
            raise UserError("--stop='' would end every text immediately; expected a non-empty string")
        self._check_together()

    def _check_together(self) -> None:
        changed = self.changed()
        filters = changed & {"top_p", "min_p", "typical_p", "epsilon", "eta"}
        if self.temperature == 0 and (unused := filters | (changed & {"top_k"} if not self.contrastive else set())):
            raise UserError(f"--temperature=0 is greedy; {_flags(unused)} would have no effect")
        if self.temperature == 0 and self.method == "sample" and self.n > 1:
            raise UserError(
                f"--temperature=0 is greedy and would repeat the same text --n={self.n} times; raise --temperature, or "
                "use --beams"
            )
        methods = changed & {"beams", "contrastive", "draft"}
        if len(methods) > 1:
            raise UserError(f"{_flags(methods)} are different decoding methods; use only one")
        for names, condition, has_effect in NEEDS:
            if (unused := changed & set(names)) and not has_effect(self):
                raise UserError(f"--{min(unused)} has no effect where {condition}")
        if self.beams > 1:
            if unused := filters | changed & {"temperature", "top_k", "seed", "filter"}:
                raise UserError(f"--beams is deterministic; {_flags(unused)} would have no effect")
            if self.n > self.beams:
                raise UserError(f"--n={self.n} is more than --beams={self.beams}")
            if self.beams % self.beam_groups:
                raise UserError(f"--beams={self.beams} does not split into --beam_groups={self.beam_groups}")
        if self.contrastive:
            if self.top_k < 2:
                raise UserError(
                    f"--contrastive chooses among --top_k candidates; --top_k={self.top_k}, expected 2 or more"
                )
            if unused := filters | changed & {"temperature", "seed", "n", "filter"}:
                raise UserError(f"--contrastive is deterministic; {_flags(unused)} would have no effect")
        if self.alternatives and self.method != "sample":
            raise UserError(f"--alternatives needs sampling or greedy decoding; the method is {self.method}")

    def sampler(self, all_filters: bool = False) -> "Sampler":
        """Returns the sampler with the filters that the options select; temperature 0 is greedy.

        Args:
          all_filters: also include the filters that are off, disabled. Samplers then differ only in numbers, so one
            compiled decoder serves all options (compiling it takes about a second longer).
        """
        import jax.numpy as jnp

        from llm_jax.decoding import penalties, samplers

        biases = list(self.logit_bias)
        if all_filters:  # padded with a bias of 0 for token 0: few shapes, few compilations
            biases += [(0, 0.0)] * (-len(biases) % _BIASES or _BIASES * (not biases))
        ids, values = zip(*biases, strict=True) if biases else ((), ())
        presence, frequency = float(self.presence_penalty), float(self.frequency_penalty)
        greedy = self.temperature == 0
        top_k = 0 if self.contrastive else self.top_k
        rows: list[tuple[Any, Filter]] = [
            (self.logit_bias, penalties.Bias(jnp.asarray(ids, jnp.int32), jnp.asarray(values, jnp.float32))),
            (self.repetition_penalty != 1, penalties.Repetition(float(self.repetition_penalty))),
            (presence or frequency, penalties.PresenceFrequency(presence, frequency)),
            (self.no_repeat_ngram, penalties.NoRepeatNgram(self.no_repeat_ngram)),
            (self.temperature not in (0, 1), samplers.Temperature(float(self.temperature or 1))),
            (top_k and not greedy, samplers.TopK(top_k)),
            (self.top_p < 1 and not greedy, samplers.TopP(float(self.top_p))),
            (self.min_p and not greedy, samplers.MinP(float(self.min_p))),
            (self.typical_p < 1 and not greedy, samplers.Typical(float(self.typical_p))),
            (self.epsilon and not greedy, samplers.Epsilon(float(self.epsilon))),
            (self.eta and not greedy, samplers.Eta(float(self.eta))),
        ]
        custom = [samplers.custom_filter(specification) for specification in self.filter]
        if all_filters:
            chain = [samplers.OptionalFilter(bool(enabled), row) for enabled, row in rows]
            return samplers.Sampler((*chain, *custom, samplers.OptionalFilter(greedy, samplers.Argmax())))
        return samplers.Sampler((*(row for enabled, row in rows if enabled), *custom), greedy)


def _representable(value: float) -> bool:
    """Whether a number can be combined with float32 logits without overflow, which would produce arbitrary tokens."""
    return not value or _SMALLEST <= abs(value) <= _LARGEST


def _short(value: float) -> str:
    return text if len(text := str(value)) <= 40 else f"{text[:37]}..."


def parse_bias(text: str) -> tuple[int, float]:
    """ "ID:BIAS" -> (id, bias). Raises UserError for anything else."""
    index, _, bias = text.partition(":")
    try:
        return int(index), float(bias)
    except ValueError as error:
        raise UserError(f"--logit_bias={text}; expected ID:BIAS, such as 42:-5") from error


def _flags(names: set[str]) -> str:
    return " and ".join(f"--{name}" for name in sorted(names))
