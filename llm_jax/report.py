"""Writes a page about runs: `python -m llm_jax.report PATH ...`, a run, several, or a sweep.

report.html needs no other file and no network: a table of groups of runs that can be sorted and filtered, curves with
bands over the seeds, parallel coordinates, options that differ, samples, time and memory. Two PNGs are written beside.
With --tokens, two runs are also compared token by token on their held-out text.
"""

import pathlib
import sys
from typing import Any

from llm_jax import cli
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.multi_string("path", [], "a run, a sweep, or a directory with runs; may be repeated, and given without --path=")
FLAGS.string(
    "output",
    "",
    "the page, a name that ends in .html; a missing directory is made; default: report.html in the last PATH",
)
FLAGS.string("title", "", "heading of the page; default: the name of the last PATH")
FLAGS.boolean("png", True, "also write PNGs of the curves and the results beside the page")
FLAGS.boolean("tokens", False, "also list the held-out tokens on which two runs differ most in loss (two runs only)")
FLAGS.integer("token_rows", 64, "number of held-out rows of train.seq_len tokens that --tokens compares")
NEEDS: cli.Needs = ((("token_rows",), "--tokens is not given", lambda f: f.tokens),)


def main(f: cli.Flags) -> None:
    from llm_jax import files
    from llm_jax.research import page, pictures, runs

    if not f.path:
        raise UserError("name at least one run or sweep: python -m llm_jax.report PATH ...")
    last = pathlib.Path(f.path[-1]).expanduser()
    output = pathlib.Path(f.output).expanduser() if f.output else last / "report.html"
    if output.suffix != ".html":
        raise UserError(f"--output={f.output}; expected a name that ends in .html")
    loaded = runs.load(f.path)
    sections = ""
    if f.tokens:
        from llm_jax.pictures import render_html

        if len(loaded) != 2 or f.token_rows < 1:
            raise UserError(
                f"--tokens compares 2 runs on at least 1 row; {len(loaded)} runs, --token_rows={f.token_rows}"
            )
        differences = token_differences((loaded[0].name, loaded[1].name), [run.path for run in loaded], f.token_rows)
        sections = f"<section>{render_html.fragment(differences.picture())}</section>\n"
    if not output.parent.is_dir():
        print(f"note: the directory {output.parent} is made", file=sys.stderr)
    files.write(output, page.render(loaded, f.title or last.absolute().name, sections))
    written = [output, *(pictures.draw(loaded, output.parent, output.stem) if f.png else [])]
    print("\n".join(str(path) for path in written))


def token_differences(names: tuple[str, str], paths: list[pathlib.Path], limit: int) -> Any:
    """The `TokenDifferences` of two runs on the first `limit` rows of their held-out text.

    Raises:
      UserError: the runs hold out different texts or split them into different tokens, or a run has no loss of next
        tokens.
    """
    import jax

    from llm_jax import checkpoints
    from llm_jax.data.kinds import open_source
    from llm_jax.data.rows import ROWS
    from llm_jax.pictures import token_differences as pictures
    from llm_jax.tokenizers import digest
    from llm_jax.training import losses

    opened = [checkpoints.open(path) for path in paths]
    configs: list[Any] = [checkpoint.run_config for checkpoint in opened]
    for name, config in zip(names, configs, strict=True):
        if not config.model.causal or config.loss.masked != "none":
            raise UserError(f"--tokens compares losses of next tokens; {name} does not predict them")
    for key in ("source", "kind", "field", "validation_fraction"):
        values = [getattr(config.data, key) for config in configs]
        if values[0] != values[1]:
            raise UserError(
                f"--tokens: the runs hold out different texts (data.{key} is {values[0]!r} and {values[1]!r})"
            )
    loaded = [checkpoint.load(scan_layers=True) for checkpoint in opened]
    if digest(loaded[0].tokenizer) != digest(loaded[1].tokenizer):
        raise UserError("--tokens: the runs have different tokenizers, so that their tokens cannot be compared")
    data, length = configs[0].data, min(config.train.seq_len for config in configs)
    split = open_source(data).corpus(loaded[0].tokenizer).validation
    if not len(split.tokens):
        raise UserError("--tokens: the runs hold out nothing (data.validation_fraction=0)")

    def loss(model: Any) -> Any:
        return jax.jit(lambda params, batch: losses.token_losses(model, params, batch))

    models = [(loss(model), params) for model, params, _ in loaded]
    rows = ROWS[data.kind](split, length)
    return pictures.token_differences(names, models, loaded[0].tokenizer, rows, limit=limit)


COMMAND = cli.Command("report", main, FLAGS, needs=NEEDS, positional="path", compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
