"""The tokenizer and the training and held-out rows of a configuration."""

import dataclasses
import itertools
import json
from typing import Any

from llm_jax import configuration, tokenizers
from llm_jax.checkpoints import vocabulary
from llm_jax.data import corpus as corpus_lib
from llm_jax.data import kinds, masking
from llm_jax.data import rows as rows_lib
from llm_jax.data.corpus import Corpus
from llm_jax.data.encode import ENCODERS
from llm_jax.errors import UserError
from llm_jax.evaluation import held_out as held_out_lib
from llm_jax.schema import Config
from llm_jax.tokenizers import Tokenizer
from llm_jax.training import start as start_lib
from llm_jax.training.start import Start

# Limits of prompts taken from a text: their number, the tokens of a document that are read, words and characters.
_PROMPTS, _PROMPT_TOKENS, _PROMPT_WORDS, _PROMPT_CHARACTERS = 2, 64, 4, 40


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of training.

    Attributes:
      config: the configuration, with the kind and size of the tokenizer.
      tokenizer: the tokenizer of the rows.
      source: the documents, with their `sha256` and `num_bytes`.
      train: an endless stream of rows, reshuffled every epoch; row i is a function of (train.seed, i).
      held_out: the held-out rows in order, or None without held-out data.
      held_out_by_source: {source: held-out rows}, if there are several sources.
      test: the rows of the test split, on which accuracy is measured at the end, or None.
      vocab_size: number of ids that the model needs.
      num_tokens: training tokens of one epoch, and held-out tokens.
      epoch_rows: number of training rows of one epoch, or 0 if sources are sampled by weight.
      empty_answers: number of training examples whose answer has no text.
      unknown_note: `held_out.unknown_note` of the held-out tokens.
    """

    config: Config
    tokenizer: Tokenizer
    source: Any
    train: Any
    held_out: Any
    held_out_by_source: dict[str, Any]
    test: rows_lib.Packed | None
    vocab_size: int
    num_tokens: tuple[int, int]
    epoch_rows: int = 0
    empty_answers: int = 0
    unknown_note: str = ""


def load(config: Config, start: Start | None = None, engine: str = "local") -> Inputs:
    """Reads and tokenizes `data.source`, or reads its tokens from the cache.

    Args:
      start: the start of the run, which may include a tokenizer; None: determined from `config`.
      engine: where text that is not in the cache is tokenized, see `data.corpus.Source`.

    Raises:
      UserError: no such source, too little text, or another tokenizer or text than the checkpoint was trained on.
    """
    start = start or start_lib.find(config)
    config, c = start.config, start.config.train
    # A resumed run uses the tokenizer of its checkpoint, even if the path no longer exists.
    resumed_tokenizer = start.tokenizer if start.checkpoint else None
    t = config.tokenizer
    if t.chat_template and not t.path and not start.tokenizer:
        raise UserError(
            f"tokenizer.chat_template={t.chat_template}: a newly trained tokenizer has no chat templates; set "
            "tokenizer.path or init_from"
        )
    existing = vocabulary.named_tokenizer(t.path, resumed_tokenizer, t.chat_template) if t.path else None
    if existing:
        _check_overrides(config, existing)
        size = dataclasses.replace(config.tokenizer, kind=existing.kind, vocab_size=existing.vocab_size)
        config = dataclasses.replace(config, tokenizer=size)
    source = kinds.open_source(config.data, engine=engine)
    tokenizer = start.tokenizer or existing or source.tokenizer(config.tokenizer, at_most=_is_default_size(config))
    if existing:
        vocabulary.check_tokenizer(config.tokenizer.path, existing, tokenizer)
    if tokenizer.kind != config.tokenizer.kind:
        raise UserError(
            f"{start.checkpoint or config.init_from}: trained on '{tokenizer.kind}' tokens; config key "
            f"'tokenizer.kind' is '{config.tokenizer.kind}'"
        )
    if start.record and start.record["corpus"] != source.sha256:
        raise UserError(
            f"data.source={config.data.source}: its text has changed since the run was started "
            f"(sha256 {start.record['corpus'][:12]}, now {source.sha256[:12]}); restore the data or choose "
            "another --workdir"
        )
    corpus = source.corpus(tokenizer)
    train = rows_lib.training(config, corpus)
    held_out, parts = rows_lib.held_out(config.data, corpus, c.seq_len)
    if held_out is None and config.checkpoint.keep_best and "checkpoint.keep_best" in config.explicit:
        raise UserError(
            f"checkpoint.keep_best={config.checkpoint.keep_best} compares held-out losses, but no text is held out "
            "(data.validation_fraction=0); set it to 0"
        )
    masked = masking.row_masker(config.loss, tokenizer)  # function (rows, seed) -> rows with masked tokens
    return Inputs(
        _with_prompts(config, corpus, tokenizer),
        tokenizer,
        source,
        masked(train, c.seed),
        None if held_out is None else masked(held_out, 0),
        {name: masked(part, 0) for name, part in parts.items()},
        rows_lib.test(config.data, corpus, c.seq_len),
        masking.vocab_size(config.loss, tokenizer),
        (len(corpus.train.tokens), len(corpus.validation.tokens)),
        train.rows.num_full if isinstance(train, rows_lib.Shuffled) else 0,
        _empty_answers(config, corpus, tokenizer),
        held_out_lib.unknown_note(tokenizer, corpus.validation.tokens),
    )


def _check_overrides(config: Config, existing: Tokenizer) -> None:
    """Raises UserError if an explicit option of the tokenizer contradicts the tokenizer at `tokenizer.path`."""
    for name in ("kind", "vocab_size"):
        value, expected = getattr(config.tokenizer, name), getattr(existing, name)
        if f"tokenizer.{name}" in config.explicit and value != expected and not config.init_from:
            raise UserError(
                f"tokenizer.{name}={value} contradicts tokenizer.path={config.tokenizer.path}, whose tokenizer has "
                f"tokenizer.{name}={expected}; omit tokenizer.{name}, or omit tokenizer.path to train a new tokenizer"
            )


def _empty_answers(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> int:
    """The number of training examples with an empty answer, recognized by the number of bytes that the loss counts.

    These bytes are not 0 if the chat template writes markers for every answer.
    """
    if config.data.kind not in ("instructions", "preferences") or corpus.train.directory is None:
        return 0
    try:
        record = json.dumps({"prompt": "a", "answer": ""})
        (example,) = ENCODERS["instructions"].encode(tokenizer, [record])
    except UserError:  # the chat template rejects an empty answer
        return 0
    return int((corpus_lib.open_split(corpus.train.directory)[1] == example.size).sum())


def _with_prompts(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> Config:
    """Sets `eval.prompts` to prompts from the text, unless they are set explicitly or the text is the default corpus.

    The prompts are the first words of held-out documents, or of training documents if nothing is held out. For data of
    another kind than text, there are no prompts.
    """
    default = configuration.default()
    is_set = "eval.prompts" in config.explicit or config.eval.prompts != default.eval.prompts
    if is_set or config.data.source == default.data.source:
        return config
    split = corpus.validation if len(corpus.validation.tokens) else corpus.train
    prompts: list[str] = []
    for begin, end in itertools.pairwise(split.offsets[: _PROMPTS + 1] - split.offsets[0]):
        text = tokenizer.decode(split.tokens[begin : min(end, begin + _PROMPT_TOKENS)].tolist())
        prompts.append(" ".join(text.split()[:_PROMPT_WORDS])[:_PROMPT_CHARACTERS])
    chosen = tuple(filter(None, prompts)) if config.data.kind == "text" else ()
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, prompts=chosen))


def describe(config: Config, inputs: Inputs) -> str:
    """Returns lines that describe the text and the tokenizer, with notes."""
    t, source, size = inputs.tokenizer, inputs.source, config.tokenizer.vocab_size
    default_size = configuration.default("tokenizer").vocab_size
    held_out = (
        f"{inputs.num_tokens[1]:,} held out" if inputs.held_out else "nothing held out (data.validation_fraction=0)"
    )
    line = (
        f"{config.data.source}: {source.num_bytes:,} bytes (sha256 {source.sha256[:12]}), {inputs.num_tokens[0]:,} "
        f"training tokens, {held_out}; tokenizer {t.kind}, {t.vocab_size} ids "
        f"({tokenizers.digest(t)[:12]})"
    )
    if inputs.epoch_rows:
        epochs = config.train.steps * config.train.batch_size / inputs.epoch_rows
        line += (
            f"\nan epoch has {inputs.epoch_rows:,} rows of {config.train.seq_len} tokens; train.steps="
            f"{config.train.steps} with train.batch_size={config.train.batch_size} is {epochs:,.2f} epochs"
        )
    if _is_default_size(config) and t.kind in tokenizers.SIZED and t.vocab_size < size:
        line += f"\nnote: the vocabulary has {t.vocab_size} ids, the maximum for this text; the default is {size}"
    if not _is_default_size(config) and t.kind == "byte" and size not in (t.vocab_size, default_size):
        ids = f"which has {t.vocab_size} ids"
        line += f"\nnote: tokenizer.vocab_size={size} has no effect with tokenizer.kind='byte', {ids}"
    held_out_share = inputs.num_tokens[1] / max(sum(inputs.num_tokens), 1)
    if config.data.kind == "text" and held_out_share > 2 * config.data.validation_fraction > 0:
        line += (
            f"\nnote: {held_out_share:.0%} of the text is held out, not data.validation_fraction="
            f"{config.data.validation_fraction}: documents are held out as a whole, and there are too few of them"
        )
    if count := inputs.empty_answers:
        line += (
            f"\nnote: {count:,} training example{'s have' if count != 1 else ' has'} an empty answer; remove them from "
            "the data if this is not intended"
        )
    return f"{line}\n{inputs.unknown_note}" if inputs.unknown_note else line


def _is_default_size(config: Config) -> bool:
    """Whether the user has not set the size of the vocabulary. Then a text with fewer ids is not an error."""
    return "tokenizer.vocab_size" not in config.explicit
