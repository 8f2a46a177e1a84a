"""Writes formulas as MathML, which browsers show without a script, a font or a network."""

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx


def inline(self: Any, node: nodes.math) -> None:
    self.body.append(convert(node.astext(), as_block=False))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math" style="overflow-x: auto">{convert(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def convert(tex: str, as_block: bool) -> str:
    """MathML of a formula in TeX. Raises docutils' MathError for what it does not know."""
    return latex2mathml.tex2mathml(tex, as_block=as_block)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
