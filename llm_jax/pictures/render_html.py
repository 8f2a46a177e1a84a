"""Pictures as HTML without scripts, references or a network: a whole page, or a fragment for a notebook or a page.

Colours of text and lines are those of the surrounding page, so that one fragment serves light and dark pages.
"""

import base64
import dataclasses
import html
import importlib.resources
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.pictures import colours, html_document, render_png
from llm_jax.pictures.panels import Heatmaps, Lines, Passage, Picture, Table, describe, number


def page(picture: Picture) -> str:
    """The picture as a page, with the light or dark setting of the browser."""
    return html_document.render(picture.title, f"<main>\n{fragment(picture)}\n</main>")


def fragment(picture: Picture) -> str:
    """The picture as an element with its own style."""
    style = (importlib.resources.files(__package__) / "pictures.css").read_text()
    parts = [f"<h2>{html.escape(picture.title)}</h2>"]
    for panel in picture.panels:
        parts.append(f"<section><h3>{html.escape(panel.title)}</h3>\n{_RENDERERS[type(panel)](panel)}</section>")
    if picture.note:
        parts.append(f"<p>{html.escape(picture.note)}</p>")
    body = "\n".join(parts)
    return f'<div class="llm-jax">\n<style>\n{style}</style>\n{body}\n</div>'


def _heatmaps(maps: Heatmaps) -> str:
    painted = colours.cells(maps)
    label = html.escape(describe(maps))
    ramp = dataclasses.replace(maps, values=np.linspace(maps.low, maps.high, 64)[None, None])
    scale = _image(colours.cells(ramp)[0], "")
    ends = [number(float(end)) for end in (maps.low, maps.high)]
    legend = f'<p class="scale">{ends[0]} {scale} {ends[1]} {html.escape(maps.unit)}</p>'
    if len(maps.names) > 1:
        figures = (
            f"<figure>{_image(image, f'{maps.title}, {name}')}<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, image in zip(maps.names, painted, strict=True)
        )
        return f'<div class="maps" role="group" aria-label="{label}">{"".join(figures)}</div>{legend}'
    tracks = f"grid-template:auto repeat({len(maps.rows)},1.25rem)/auto repeat({len(maps.columns)},1.25rem)"
    heads = "".join(
        f'<span class="column" style="grid-column:{i}">{html.escape(name)}</span>'
        for i, name in enumerate(maps.columns, 2)
    )
    sides = "".join(
        f'<span class="row" style="grid-row:{i}">{html.escape(name)}</span>' for i, name in enumerate(maps.rows, 2)
    )
    body = f"{heads}{sides}{_image(painted[0], describe(maps))}"
    return f'<div class="scroll"><div class="map" style="{tracks}">{body}</div></div>{legend}'


def _image(image: np.ndarray, alt: str) -> str:
    """An image of one pixel a value, uint8 (R, C, 4), within the page."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(content, "PNG", optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _lines(panel: Lines) -> str:
    label = html.escape(describe(panel))
    drawing = render_png.svg(panel).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    if not panel.has_legend:
        return drawing
    entries = []
    for i, name in enumerate(panel.labels):
        color, style = colours.series(i)
        css = style if style in ("solid", "dashed", "dotted") else "double"  # CSS has no dash-dotted border
        entries.append(f'<span><i style="border-top:3px {css} {color}"></i>{html.escape(name)}</span>')
    return f'{drawing}<p class="legend">{"".join(entries)}</p>'


def _table(panel: Table) -> str:
    def cell(tag: str, value: Any) -> str:
        if isinstance(value, str):
            return f"<{tag}>{html.escape(value.replace(chr(10), '↵'))}</{tag}>"
        return f'<{tag} class="number">{number(value)}</{tag}>'

    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in panel.columns)
    rows = "".join(f"<tr>{''.join(cell('td', value) for value in row)}</tr>\n" for row in panel.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


def _passage(panel: Passage) -> str:
    spans = []
    values = [float(value) for value in panel.values]
    hints = panel.hints or ["no value" if np.isnan(value) else f"{number(value)} {panel.unit}" for value in values]
    for token, value, title in zip(panel.tokens, values, hints, strict=True):
        text = html.escape(token).replace("\n", "↵\n")
        color = f"rgb({' '.join(map(str, colours.hue(value)))} / {colours.opacity(value, panel.high):.2f})"
        # With a negative tabindex, a tap focuses the token, and the style shows its title; Tab passes it over.
        hint = f'title="{html.escape(title)}" tabindex="-1"'
        spans.append(f'<span {hint} style="background:{color}">{text}</span>')
    ends = [-panel.high, panel.high] if any(value < 0 for value in values) else [panel.high]
    swatches = (
        f'<span style="background:rgb({" ".join(map(str, colours.hue(end)))} / '
        f'{colours.opacity(end, panel.high):.2f})">&nbsp;{number(float(end))}&nbsp;</span>'
        for end in ends
    )
    legend = html.escape(panel.legend) or f"{' '.join(swatches)} {html.escape(panel.unit)} or more"
    text = f'<p class="passage">{"".join(spans)}</p>'
    return (
        f'<figure role="group" aria-label="{html.escape(describe(panel))}">{text}<p class="scale">{legend}</p></figure>'
    )


_RENDERERS: dict[type, Callable[[Any], str]] = {Heatmaps: _heatmaps, Lines: _lines, Table: _table, Passage: _passage}
