"""Writes the table of statements and verdicts in experiments/README.md.

    PYTHONPATH=. python experiments/verdicts.py [--html=statements.html]

The verdicts are those of all results.json files; a statement has a row for each of its findings.
"""

import pathlib

from absl import flags

from experiments import statement_page
from experiments.statements import STATEMENTS
from llm_jax import cli, files
from llm_jax.errors import UserError
from llm_jax.research import findings

HERE = pathlib.Path(__file__).parent

flags.DEFINE_string("html", "", "also write all statements, with pictures, as one HTML file of this name")


def table(directory: pathlib.Path) -> list[str]:
    """The lines of a table of all statements, with what the results.json of every experiment says."""
    by_statement = statement_page.measured(directory)
    if unknown := sorted(set(by_statement) - set(STATEMENTS)):
        raise UserError(f"{directory}: results.json of {unknown[0]}, which is not in statements.toml")
    lines = ["| | statement | measured | verdict | in |", "|---|---|---|---|---|"]
    for name, statement in STATEMENTS.items():
        for result, experiment in by_statement.get(name, []):
            measure = f"{result.part} ({result.measure})" if result.part else result.measure
            link = f"[{experiment}]({experiment}/README.md)"
            lines.append(f"| {name} | {statement.text} | {measure} | **{result.verdict}** | {link} |")
        if name not in by_statement and not statement.tests:
            lines.append(f"| {name} | {statement.text} |  | **not measured yet** |  |")
    return lines


def main() -> None:
    findings.replace_section(HERE / "README.md", "verdicts", table(HERE))
    if flags.FLAGS.html:
        files.write(pathlib.Path(flags.FLAGS.html), statement_page.standalone(HERE))
    print(f"the table of {len(STATEMENTS)} statements is in {HERE / 'README.md'}")


if __name__ == "__main__":
    cli.run_script(main)
