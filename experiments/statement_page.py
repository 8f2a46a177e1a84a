"""What was measured about each statement, as HTML: pictures, verdicts, intervals, rules, published figures, commands.

The documentation includes these fragments (docs/statements.md); `python experiments/verdicts.py --html=FILE` writes
them as one page that needs no other file and no network.
"""

import html
import math
import pathlib
import re
from collections.abc import Sequence

from experiments.statements import GROUPS, STATEMENTS, Picture, Statement
from llm_jax.pictures import html_document
from llm_jax.research import findings
from llm_jax.research.findings import Estimate, Finding

Measured = tuple[Finding, str]  # with the directory of its experiment

STYLE = (pathlib.Path(__file__).parent / "statement_page.css").read_text()
TITLE = "Statements about language models, and what was measured"


def measured(directory: pathlib.Path) -> dict[str, list[Measured]]:
    """The findings of every results.json below `directory`, by statement, with the names of their experiments.

    Raises:
      UserError: a file cannot be read.
    """
    by_statement: dict[str, list[Measured]] = {}
    for path in sorted(directory.glob("*/results.json")):
        for result in findings.read(path):
            by_statement.setdefault(result.statement, []).append((result, path.parent.name))
    return by_statement


def standalone(directory: pathlib.Path) -> str:
    """All statements as one page that needs no other file and no network."""
    by_statement = measured(directory)
    parts = []
    for letter, title in GROUPS.items():
        parts.append(f"<h2>{title}</h2>")
        for name, statement in STATEMENTS.items():
            if name[0] == letter:
                heading = f"{name}: {html.escape(statement.text)}"
                parts += [f'<h3 id="{name.lower()}">{heading}</h3>', card(name, by_statement.get(name, []))]
    body = "\n".join([f"<h1>{html.escape(TITLE)}</h1>", *parts])
    return html_document.render(TITLE, body, f"body {{ max-width: 60rem; }}\n{STYLE}")


def card(name: str, results: Sequence[Measured], short: bool = False) -> str:
    """What was measured about a statement, without a heading.

    Args:
      name: the identifier of the statement.
      results: the findings about it.
      short: whether to leave out rule, all estimates and command.
    """
    statement = STATEMENTS[name]
    parts = []
    for result, _ in results:
        parts.append(_finding(result, statement))
        if not short:
            parts += [_estimates(result), _command("Measured", result.command)]
    if statement.rule and not short:
        parts.append(_details("The rule, fixed before the run", f"<pre>{html.escape(statement.rule)}</pre>"))
    if statement.tests:
        parts.append('<p><span class="verdict holds">holds</span>: exact, and held by tests.</p>')
        if not short:
            parts.append(_command("Tested", f"python -m pytest {statement.tests}"))
    elif not results:
        parts.append('<p><span class="verdict open">not measured yet</span></p>')
    if statement.published:
        parts.append(f"<p>Published: {html.escape(statement.published)}.</p>")
    return f'<div class="statement">{"".join(parts)}</div>'


def _command(verb: str, command: str) -> str:
    return f"<p>{verb} again by:</p><pre>{html.escape(command)}</pre>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def kind(verdict: str | None) -> str:
    """Whether a verdict "holds" or "fails", at least in part; "open" for all others."""
    text = verdict or ""
    return "holds" if text.startswith("holds") else "fails" if text.startswith("fails") else "open"


def _finding(result: Finding, statement: Statement) -> str:
    source = ", ".join(filter(None, [result.date, result.commit and f"commit {result.commit}", result.machine]))
    part = f"{html.escape(result.part)}: " if result.part else ""
    verdict = html.escape(result.verdict or "no verdict")
    runs = {0: "not run", 1: "one run"}.get(result.n, f"{result.n} independent runs (seeds)")
    text = (
        f'<p>{part}<span class="verdict {kind(result.verdict)}">{verdict}</span><br>'
        f"Measured: {html.escape(result.measure)}; {runs} ({html.escape(source)}).</p>"
    )
    return text + "".join(draw(result, picture) for picture in statement.pictures)


def draw(result: Finding, picture: Picture) -> str:
    """A dot with its interval for each estimate, on one axis with the thresholds; "" without such an estimate."""
    rows = [e for e in result.estimates if e.estimate is not None and re.fullmatch(picture.conditions, e.condition)]
    if not rows:
        return ""

    scale = math.log10 if picture.log else float
    values = [x for e in rows for x in (e.estimate, e.low, e.high) if x is not None]
    scaled = [scale(x) for x in (*values, *picture.thresholds)]
    low, high = min(scaled), max(scaled)
    margin = 0.04 * (high - low) or 1.0

    def place(value: float) -> str:
        return f"{100 * (scale(value) - low + margin) / (high - low + 2 * margin):.2f}%"

    limits = "".join(_line("limit", place(x), place(x), 0, 18) for x in picture.thresholds)
    lines = []
    for estimate in rows:
        assert estimate.estimate is not None
        marks = _line("axis", "0", "100%", 9, 9) + limits
        if estimate.low is not None and estimate.high is not None:
            marks += _line("interval", place(estimate.low), place(estimate.high), 9, 9)
        marks += f'<circle cx="{place(estimate.estimate)}" cy="9" r="4.5"/>'
        label, value = html.escape(estimate.condition or "all"), interval_text(estimate)
        lines.append(
            f'<div class="row"><span>{label}</span>'
            f'<svg width="100%" height="18" role="img" aria-label="{label}: {value}">{marks}</svg>'
            f'<span class="value">{value}</span></div>'
        )
    caption = picture.title or result.measure
    if picture.thresholds:
        limit = " and ".join(f"{x:.3g}" for x in picture.thresholds)
        caption += f"; dashed: {limit} (the statement holds where estimates lie {picture.holds})"
    if any(e.low is not None for e in rows):
        caption += "; bars: 95 % intervals, or the range that the rule names"
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{''.join(lines)}</figure>"


def interval_text(estimate: Estimate) -> str:
    """The estimate with its limits, such as "0.0063 (0.001 to 0.0116)"."""
    if estimate.estimate is None:
        return html.escape(estimate.text or ", ".join(map(str, estimate.values)) or "not measured")
    limits = (estimate.low, estimate.high)
    numbers = [f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}" for x in (estimate.estimate, *limits) if x is not None]
    return numbers[0] if len(numbers) < 3 else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def _line(name: str, x1: str, x2: str, y1: int, y2: int) -> str:
    return f'<line class="{name}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _estimates(result: Finding) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(e.condition or 'all')}</td><td>{interval_text(e)}</td></tr>" for e in result.estimates
    )
    table = f"<table><tr><th>condition</th><th>estimate</th></tr>{rows}</table>"
    return _details(f"All estimates ({len(result.estimates)})", table)
