"""Pictures of models and data: `python -m llm_jax.show NAME [--FLAG=VALUE ...]`.

In a terminal, the output is text with blocks and colours; --html=FILE and --png=FILE write files. In a notebook, the
functions with the same names return results that are displayed as pictures:

    model, params, tokenizer = llm_jax.load("asset:smollm2-135m-instruct")
    llm_jax.show.attention(model, params, tokenizer, "The cat sat on the mat.")
"""

import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from llm_jax import cli, tokenizers
from llm_jax.cli import decoding_flags, status
from llm_jax.errors import UserError
from llm_jax.schema import Config

if TYPE_CHECKING:
    from llm_jax.pictures.attention_maps import attention as attention
    from llm_jax.pictures.drawable import Drawable
    from llm_jax.pictures.neighbourhoods import embeddings as embeddings
    from llm_jax.pictures.position_curves import positions as positions
    from llm_jax.pictures.quantization_errors import quantization as quantization
    from llm_jax.pictures.sampling_steps import probabilities as probabilities
    from llm_jax.pictures.surprisals import surprisal as surprisal
    from llm_jax.pictures.token_splits import tokens as tokens
    from llm_jax.pictures.training_rows import rows as rows
    from llm_jax.pictures.weight_tables import parameters as parameters
    from llm_jax.pictures.weight_updates import adapters as adapters
    from llm_jax.pictures.weight_updates import difference as difference

# {function for notebooks: its module in `llm_jax.pictures`}; imported on first use.
_FUNCTIONS = {
    "adapters": "weight_updates",
    "attention": "attention_maps",
    "difference": "weight_updates",
    "embeddings": "neighbourhoods",
    "parameters": "weight_tables",
    "positions": "position_curves",
    "probabilities": "sampling_steps",
    "quantization": "quantization_errors",
    "rows": "training_rows",
    "surprisal": "surprisals",
    "tokens": "token_splits",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"llm_jax.pictures.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'llm_jax.show' has no attribute '{name}'")


# ---------------------------------------------------------------- flags


def _picture_flags(checkpoint: str = "required") -> cli.Flags:
    """Returns the flags of a picture: the output files, and the checkpoint.

    Args:
      checkpoint: "required", "optional", or "" for no flag --checkpoint.
    """
    flags = cli.Flags()
    if checkpoint:
        flags.define_checkpoint(required=checkpoint == "required")
        flags.define_dtype()
        flags.define_as_stored()
    flags.string("html", "", ".html file to write")
    flags.string("png", "", ".png file to write")
    flags.boolean("color", None, "print colours; default: on a terminal, unless NO_COLOR is set")
    return flags


ROWS = _picture_flags("")
ROWS.integer("rows", 2, "number of rows to show")
ROWS.integer("first", 0, "index of the first row; the batch of step i begins with row i * train.batch_size")
ROWS.boolean("held_out", False, "show held-out rows in order, instead of training rows")

TOKENS = _picture_flags("")
TOKENS.multi_string(
    "tokenizer",
    None,
    "byte, an output directory of train_tokenizer, a checkpoint or asset:NAME; may be repeated to compare tokenizers",
    required=True,
)
TOKENS.string("text", "", "text to split; default: standard input")
TOKENS.boolean("ids", False, "also print a table of ids, byte spans and pieces")

ATTENTION = _picture_flags()
ATTENTION.string("text", "", "text; default: standard input")
ATTENTION.multi_integer("layer", [], "layer, from 0; may be repeated; default: all")
ATTENTION.multi_integer("head", [], "head, from 0; may be repeated; default: all")

POSITIONS = _picture_flags("optional")
POSITIONS.integer("distance", 256, "largest distance")

EMBEDDINGS = _picture_flags()
EMBEDDINGS.string("word", None, "word whose nearest neighbours are shown", required=True)
EMBEDDINGS.multi_string(
    "text", [], "text whose words are compared at every layer; may be repeated; default: compare the embedding table"
)
EMBEDDINGS.integer("count", 8, "number of neighbours")

QUANTIZATION = _picture_flags()
QUANTIZATION.comma_separated("schemes", ["int8", "int4", "nf4"], "number formats to compare, e.g. int8,int4:64,nf4")
QUANTIZATION.boolean("head", False, "also quantize the embeddings and the output head")

LORA = _picture_flags()
LORA.string("before", "", "checkpoint before training; default: the base of the adapters, or init_from of the run")
LORA.integer("count", 32, "when two checkpoints are compared: number of singular values per weight")

SURPRISAL = _picture_flags()
SURPRISAL.string("text", "", "text; default: standard input")
SURPRISAL.boolean("eos", False, "count the end of the text as a token")

PROBABILITIES = _picture_flags()
PROBABILITIES.string("prompt", None, "text to continue", required=True)
PROBABILITIES.integer("candidates", 8, "number of most likely tokens per step")
_SEARCH = ("n", "alternatives", "beams", "length_penalty", "early_stop", "beam_groups", "diversity", "contrastive")
decoding_flags.define(PROBABILITIES, leave_out=(*_SEARCH, "draft", "draft_tokens", "stop"), max_new_tokens=8)

PARAMETERS = _picture_flags()


def show_rows(f: cli.Flags) -> None:
    """Rows as the model sees them: `python -m llm_jax.show rows --config=default --rows=2`.

    Segments are shown separately. The loss counts the tokens on lines with +, and ignores lines with - (grey on a
    terminal). Special tokens are shown by name, and a newline as ↵. In a conversation, the loss counts everything that
    the chat template writes for an answer, such as the end-of-turn token and the newline after it, unless the template
    marks the generated part.
    """
    if f.rows < 1 or f.first < 0:
        raise UserError(f"--rows={f.rows} --first={f.first}; expected at least 1 row, from 0")
    from llm_jax.pictures.training_rows import rows

    _print(f, rows(f.config, f.first, f.rows, f.held_out))


def show_tokens(f: cli.Flags) -> None:
    """Text split into tokens: `python -m llm_jax.show tokens --tokenizer=A [--tokenizer=B] --text="some text"`.

    On a terminal, tokens have alternating background colours and unknown tokens are red; otherwise bars separate the
    tokens and brackets mark unknown tokens. --ids adds a table with the id, the byte span and the text of each token.
    """
    from llm_jax import checkpoints
    from llm_jax.pictures.token_splits import tokens

    text, byte = _text(f.text), tokenizers.get("byte").train([], 0)
    loaded = {name: byte if name == "byte" else checkpoints.load_tokenizer(name) for name in f.tokenizer}
    _print(f, tokens(loaded, text, f.ids))


def show_attention(f: cli.Flags) -> None:
    """Which tokens each token attends to: `python -m llm_jax.show attention --checkpoint=X --text="some text"`.

    Without --layer and --head, a table summarizes all heads: the mean attention to the first token, the previous token
    and the token itself, and the entropy. The maps of all heads follow.
    """
    text, (model, params, tokenizer) = _text(f.text), _loaded(f)
    from llm_jax.pictures.attention_maps import attention

    _print(f, attention(model, params, tokenizer, text, f.layer, f.head))


def show_positions(f: cli.Flags) -> None:
    """Position schemes by distance: `python -m llm_jax.show positions --config.model.position.kind=alibi`.

    Shows the scheme of --checkpoint, or of the configuration: the bias of the scores (alibi, t5), the decay of rotary
    embeddings and its upper bound (rope), the similarity of position vectors (sinusoidal, learned), or the norms of the
    vectors of relative positions (shaw).
    """
    if f.checkpoint and f.config.explicit:
        raise UserError(f"--config.{min(f.config.explicit)} has no effect where --checkpoint is given")
    from llm_jax.pictures.position_curves import positions
    from llm_jax.training import machine_choice

    if f.checkpoint:
        model, params, _ = _loaded(f)
        _print(f, positions(model.config, params, f.distance))
    else:
        _print(f, positions(machine_choice.machine_independent(f.config.model), None, f.distance))


def show_embeddings(f: cli.Flags) -> None:
    """The neighbours of a word: `python -m llm_jax.show embeddings --checkpoint=X --word=bank [--text="..." ...]`.

    Without --text, shows the tokens whose rows of the embedding table have the largest cosine similarity. With --text,
    compares the first occurrence of the word with all other words of the texts, at every layer.
    """
    model, params, tokenizer = _loaded(f)
    from llm_jax.pictures.neighbourhoods import embeddings

    _print(f, embeddings(model, params, tokenizer, f.word, f.text, f.count))


def show_quantization(f: cli.Flags) -> None:
    """The errors of number formats: `python -m llm_jax.show quantization --checkpoint=X --schemes=int4,nf4`.

    The weights are rounded with absmax scales; `python -m llm_jax.quantize` has more accurate methods.
    """
    _, params, _ = _loaded(f)
    from llm_jax.pictures.quantization_errors import quantization

    _print(f, quantization(params, f.schemes, f.head))


def show_lora(f: cli.Flags) -> None:
    """The singular values of updates: `python -m llm_jax.show lora --checkpoint=ADAPTERS`.

    Decomposes the updates of adapters (a run with lora.rank, or a peft directory), or the difference from
    --before=CHECKPOINT; for a run that trained all weights, the default of --before is its init_from.
    """
    from llm_jax import checkpoints
    from llm_jax.pictures import weight_updates

    checkpoint = checkpoints.open(f.checkpoint, f.base)
    status.show(f"loading {f.checkpoint}")
    if isinstance(checkpoint, checkpoints.Adapters | checkpoints.Peft) and not f.before:
        base, adapters = checkpoint.separate()
        status.show("")
        _print(f, weight_updates.adapters(base.params, adapters))
        return
    before = f.before or (checkpoint.run_config.init_from if checkpoint.run_config else "")
    if not before:
        raise UserError(f"{f.checkpoint} has no adapters; set --before=CHECKPOINT for a comparison")
    old, new = (c.load(dtype=f.dtype, as_stored=f.as_stored).params for c in (checkpoints.open(before), checkpoint))
    status.show("")
    _print(f, weight_updates.difference(old, new, f.count))


def show_surprisal(f: cli.Flags) -> None:
    """The surprisal of each token: `python -m llm_jax.show surprisal --checkpoint=X --text="some text"`.

    The surprisal is -log2 p(token | preceding tokens) in bits.
    """
    text, (model, params, tokenizer) = _text(f.text), _loaded(f)
    from llm_jax.pictures.surprisals import surprisal

    _print(f, surprisal(model, params, tokenizer, text, f.eos))


def show_probabilities(f: cli.Flags) -> None:
    """Sampling step by step: `python -m llm_jax.show probabilities --checkpoint=X --prompt="some text" --top_k=40`.

    For every generated token, shows the candidates, their probabilities before the filters and after each filter
    (temperature, top-k, top-p, ...), and the sampled token.
    """
    from llm_jax import checkpoints

    if f.candidates < 1:
        raise UserError(f"--candidates={f.candidates}; expected at least 1")
    options = decoding_flags.read(f, checkpoints.open(f.checkpoint, f.base))
    model, params, tokenizer = _loaded(f)
    from llm_jax.pictures.sampling_steps import probabilities

    _print(f, probabilities(model, params, tokenizer, f.prompt, options, f.candidates))


def show_parameters(f: cli.Flags) -> None:
    """The weights of a model: `python -m llm_jax.show parameters --checkpoint=X`: kinds, shapes, dtypes, bytes."""
    from llm_jax.pictures.weight_tables import parameters

    _print(f, parameters(_loaded(f).params))


def _text(text: str) -> str:
    """Returns the value of --text, or standard input."""
    if not text and sys.stdin.isatty():
        print("note: --text is not given; reading standard input (Ctrl-D ends it)", file=sys.stderr)
    text = text or sys.stdin.read()
    if not text:
        raise UserError("--text is not given and standard input is empty; set --text")
    return text


def _loaded(f: cli.Flags) -> Any:
    """Loads the model, its parameters (stacked for a scan if possible), and the tokenizer."""
    from llm_jax import checkpoints

    status.show(f"loading {f.checkpoint}")
    loaded = checkpoints.open(f.checkpoint, f.base).load(scan_layers=True, dtype=f.dtype, as_stored=f.as_stored)
    status.show("")
    return loaded


def _colored(f: cli.Flags) -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ if f.color is None else f.color


def _print(f: cli.Flags, result: "Drawable") -> None:
    """Writes the files of --html and --png, or prints the result."""
    for name in ("html", "png"):
        path = f[name].value
        if path and pathlib.Path(path).suffix != f".{name}":
            raise UserError(f"--{name}={path}; expected a name that ends in .{name}")
    written = [path for path in (f.html, f.png) if path]
    for path in written:
        result.save(path)
    print("\n".join(f"wrote {path}" for path in written) or result.text(_colored(f)))


_NEEDS: cli.Needs = ((("base", "dtype", "as_stored"), "--checkpoint is not given", lambda f: f.checkpoint),)
SUBCOMMANDS = {
    "rows": cli.Command("show rows", show_rows, ROWS, config=Config),
    "tokens": cli.Command("show tokens", show_tokens, TOKENS),
    "attention": cli.Command("show attention", show_attention, ATTENTION, compiles=True),
    "positions": cli.Command("show positions", show_positions, POSITIONS, needs=_NEEDS, config=Config, compiles=True),
    "embeddings": cli.Command("show embeddings", show_embeddings, EMBEDDINGS, compiles=True),
    "quantization": cli.Command("show quantization", show_quantization, QUANTIZATION, compiles=True),
    "lora": cli.Command("show lora", show_lora, LORA, compiles=True),
    "surprisal": cli.Command("show surprisal", show_surprisal, SURPRISAL, compiles=True),
    "probabilities": cli.Command("show probabilities", show_probabilities, PROBABILITIES, compiles=True),
    "parameters": cli.Command("show parameters", show_parameters, PARAMETERS, compiles=True),
}
COMMAND = SUBCOMMANDS

if __name__ == "__main__":
    cli.start(COMMAND)
