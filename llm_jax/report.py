"""Writes a report about runs: `python -m llm_jax.report PATH ...`. A PATH is a run or a sweep.

report.html opens offline. It has a table of groups of runs that can be sorted and filtered, curves with bands over the
seeds, parallel coordinates, options that differ, samples, time and memory. Two PNG files are written to the same
directory. With --tokens, two runs are also compared token by token on their held-out text.
"""

import pathlib
import sys
import tempfile

from llm_jax import cli
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.multi_string("path", [], "a run, a sweep, or a directory with runs; may be repeated; --path= may be omitted")
FLAGS.string("output", "", ".html file to write; its directory is created; default: report.html in the last PATH")
FLAGS.string("title", "", "heading of the page; default: the name of the last PATH")
FLAGS.boolean("png", True, "also write PNG files of the curves and the results to the same directory")
FLAGS.boolean("tokens", False, "also list the held-out tokens whose losses differ most between exactly two runs")
FLAGS.integer("token_rows", 64, "number of held-out rows of train.seq_len tokens that --tokens compares")
NEEDS: cli.Needs = ((("token_rows",), "--tokens is not given", lambda f: f.tokens),)


def main(f: cli.Flags) -> None:
    from llm_jax import files, object_store
    from llm_jax.research import page, plots, runs

    if not f.path:
        raise UserError("name at least one run or sweep: python -m llm_jax.report PATH ...")
    last = files.path(f.path[-1])
    output = files.path(f.output) if f.output else last / "report.html"
    if output.suffix != ".html":
        raise UserError(f"--output={f.output}; expected a name that ends in .html")
    loaded = runs.load(f.path)
    sections = ""
    if f.tokens:
        from llm_jax.pictures import render_html
        from llm_jax.research import held_out_tokens
        from llm_jax.training import losses

        differences = held_out_tokens.differences(loaded, f.token_rows, losses.token_losses)
        sections = f"<section>{render_html.fragment(differences.picture())}</section>\n"
    if not object_store.is_object(output) and not output.parent.is_dir():
        print(f"note: creating the directory {output.parent}", file=sys.stderr)
    files.write(output, page.render(loaded, f.title or files.absolute(last).name, sections))
    print(output)
    if f.png:
        with tempfile.TemporaryDirectory() as temporary:
            for picture in plots.draw(loaded, pathlib.Path(temporary), output.stem):
                path = output.with_name(picture.name)
                files.write(path, picture.read_bytes())
                print(path)


COMMAND = cli.Command("report", main, FLAGS, needs=NEEDS, positional="path", compiles=True)

if __name__ == "__main__":
    cli.start(COMMAND)
