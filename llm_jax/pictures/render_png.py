"""Pictures as PNG, and curves as SVG, drawn by matplotlib."""

import contextlib
import io
import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_jax.pictures import colours
from llm_jax.pictures.panels import Heatmaps, Lines, Passage, Picture, Table, number

# Lengths are in inches.
_WIDTH, _MARGIN, _TITLE, _LINE, _GAP = 9.0, 0.25, 0.3, 0.17, 0.3
_DPI = 120
_CELL = 0.17  # side of a cell of a single heatmap, height of a row of text
_LETTER = 0.068  # width of a letter of a label
_ACROSS = 9  # heatmaps beside each other
_MOST_ROWS = 60  # of a table; an image is no place for more
_INHERITED = "#010203"  # stands for the colour of the surrounding text in an SVG
_CHARACTERS = 113  # of a line of a passage: 8.5 inches of DejaVu Sans Mono at 9 points, 0.602 em wide


@contextlib.contextmanager
def figure(width: float, height: float, layout: Any = None) -> Iterator[Any]:
    """A figure of matplotlib that is closed at the end of the block; no window opens.

    Its warnings about fonts (characters that a font lacks, the cache of fonts) are not printed.

    Args:
      width, height: in inches.
      layout: of `matplotlib.pyplot.figure`, such as "constrained".
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing = pyplot.figure(figsize=(width, height), layout=layout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        try:
            yield drawing
        finally:
            pyplot.close(drawing)


def render(picture: Picture) -> bytes:
    """The content of a PNG file with the panels below each other."""
    from matplotlib.transforms import Bbox

    heights = [_HEIGHTS[type(panel)](panel) for panel in picture.panels]
    head, note = textwrap.fill(picture.title, 75), textwrap.fill(picture.note, 110)
    titles = [textwrap.fill(panel.title, 100) for panel in picture.panels]
    first = 0.5 + 0.22 * head.count("\n")  # the top of the first panel
    title_heights = [_TITLE + _LINE * title.count("\n") for title in titles]
    height = first + sum(heights) + sum(title_heights) + _GAP * len(heights) + _LINE * (note.count("\n") + 2)
    with figure(_WIDTH, height) as drawing:

        def write(text: str, top: float, size: float) -> None:
            drawing.text(_MARGIN / _WIDTH, 1 - top / height, plain(text), fontsize=size, va="top")

        write(head, 0.12, 13)
        top = first
        for panel, body, title, title_height in zip(picture.panels, heights, titles, title_heights, strict=True):
            write(title, top, 10)
            top += title_height
            left, width, inner = _frame(panel, body)
            axis = drawing.add_axes((left / _WIDTH, 1 - (top + inner) / height, width / _WIDTH, inner / height))
            _RENDERERS[type(panel)](panel, axis)
            top += body + _GAP
        write(note, top, 8)
        right = drawing.get_tightbbox().x1 + _MARGIN  # a wide table widens the image
        content = io.BytesIO()
        drawing.savefig(content, format="png", dpi=_DPI, bbox_inches=Bbox([[0, 0], [max(_WIDTH, right), height]]))
    return content.getvalue()


def _frame(panel: Any, body: float) -> tuple[float, float, float]:
    """(left, width, height) of the axes of a panel; the rest of its body is for labels."""
    if isinstance(panel, Lines):
        return 3 * _MARGIN, _WIDTH - 4 * _MARGIN, body - 0.45
    if not isinstance(panel, Heatmaps):
        return _MARGIN, _WIDTH - 2 * _MARGIN, body
    if len(panel.names) > 1:
        return _MARGIN, _WIDTH - 2 * _MARGIN, body - 0.25
    left = _MARGIN + _LETTER * max(map(len, panel.rows), default=0)
    return left, min(_CELL * len(panel.columns), _WIDTH - left - _MARGIN), _CELL * len(panel.rows)


def svg(panel: Lines) -> str:
    """Curves as an SVG element without a legend, whose text and axes have the colour of the surrounding text."""
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "legend.labelcolor")
    settings: Any = dict.fromkeys(names, _INHERITED) | {"svg.fonttype": "none", "font.size": 11}
    with matplotlib.rc_context(settings | {"svg.hashsalt": panel.title}), figure(4.4, 3.2) as drawing:
        _curves(panel, drawing.add_axes((0.18, 0.17, 0.8, 0.8)))
        content = io.StringIO()
        drawing.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg ") :], flags=re.DOTALL)
    text = re.sub(r' xmlns:xlink="[^"]*"', "", text, count=1).replace("xlink:href", "href")
    return text.replace(_INHERITED, "currentColor")


def _heatmaps(maps: Heatmaps, axis: Any) -> None:
    rows, columns = len(maps.rows), len(maps.columns)
    colors = ("blue", "red") if maps.diverging else ("dark", "yellow")
    ends = [f"{number(float(end))} ({color})" for end, color in zip((maps.low, maps.high), colors, strict=True)]
    axis.set_xlabel(f"{ends[0]} to {ends[1]} {maps.unit}", fontsize=8, loc="left")
    axis.set_frame_on(False)
    if len(maps.names) == 1:
        axis.imshow(colours.cells(maps)[0], interpolation="nearest", aspect="auto")
        axis.set_xticks(range(columns), [plain(label) for label in maps.columns], rotation=90, fontsize=7)
        axis.set_yticks(range(rows), [plain(label) for label in maps.rows], fontsize=7)
        axis.tick_params(length=0)
        return
    axis.set(xticks=[], yticks=[])
    gap = max(1, round(0.25 * columns))
    image = np.zeros((_down(maps) * (rows + gap), _ACROSS * (columns + gap) - gap, 4), np.uint8)
    for n, cells in enumerate(colours.cells(maps)):
        top, left = gap + n // _ACROSS * (rows + gap), n % _ACROSS * (columns + gap)
        image[top : top + rows, left : left + columns] = cells
        axis.text(left - 0.5, top - 0.7, plain(maps.names[n]), fontsize=7, va="bottom")
    axis.imshow(image, interpolation="nearest", aspect="equal")
    axis.set_anchor("NW")


def _down(maps: Heatmaps) -> int:
    return -(-len(maps.names) // _ACROSS)


def _height_of_heatmaps(maps: Heatmaps) -> float:
    if len(maps.names) == 1:
        return _CELL * len(maps.rows) + _LETTER * max(map(len, maps.columns), default=0) + 0.35
    side = (_WIDTH - 2 * _MARGIN) / (_ACROSS * 1.25)
    return 0.25 + _down(maps) * side * (len(maps.rows) / max(len(maps.columns), 1) + 0.25)


def _curves(panel: Lines, axis: Any) -> None:
    for i, (label, values) in enumerate(zip(panel.labels, panel.values, strict=True)):
        color, style = colours.series(i)
        axis.plot(panel.x, values, linestyle=style, color=color, label=plain(label))
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axis.grid(alpha=0.25, color="#808080")


def _lines(panel: Lines, axis: Any) -> None:
    _curves(panel, axis)
    if panel.has_legend:
        axis.legend(fontsize=8, frameon=False, ncols=1 + (len(panel.labels) > 8))


def _table(panel: Table, axis: Any) -> None:
    axis.axis("off")
    rows = [[_cell(value) for value in row] for row in panel.rows[:_MOST_ROWS]]
    more = len(panel.rows) - len(rows)
    rows = rows or [[""] * len(panel.columns)]
    lines = len(rows) + 1 + (more > 0)
    table = axis.table(
        rows, colLabels=panel.columns, loc="upper left", edges="horizontal", cellLoc="left", colLoc="left"
    )
    table.AXESPAD = 0  # a share of the height of the axes, by which a long table would extend below them
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(range(len(panel.columns)))
    for cell in table.get_celld().values():
        cell.set_height(1 / lines)
    if more:
        axis.text(0, 0.5 / lines, f"and {more:,} more rows", fontsize=8, va="center", transform=axis.transAxes)


def _cell(value: str | float) -> str:
    """A value of a table on one line."""
    return plain(value.replace("\n", "↵")) if isinstance(value, str) else number(value)


def _passage(panel: Passage, axis: Any) -> None:
    from matplotlib.patches import Rectangle

    places = _wrapped(panel)
    axis.set(xlim=(0, _CHARACTERS), ylim=(2 + max((line for _, line, _, _ in places), default=0), 0))
    axis.axis("off")
    for column, line, text, value in places:
        color = (*(c / 255 for c in colours.hue(value)), colours.opacity(value, panel.high))
        axis.add_patch(Rectangle((column, line + 0.08), len(text), 0.84, color=color, lw=0))
        axis.text(column, line + 0.5, plain(text), family="monospace", fontsize=9, va="center")
    legend = panel.legend or f"strongest colour: {number(float(panel.high))} {panel.unit} or more"
    axis.text(0, places[-1][1] + 1.8 if places else 1, legend, fontsize=8, va="center")


def _wrapped(panel: Passage) -> list[tuple[int, int, str, float]]:
    """(column, line, text, value) of every token, in lines of `_CHARACTERS`."""
    column = line = 0
    places = []
    for token, value in zip(panel.tokens, map(float, panel.values), strict=True):
        text = token.replace("\n", "↵")
        if column + len(text) > _CHARACTERS and column:
            column, line = 0, line + 1
        places.append((column, line, text, value))
        column += len(text)
        if "\n" in token:
            column, line = 0, line + 1
    return places


def plain(text: str) -> str:
    """Escapes text so that matplotlib does not parse it as a formula, and removes control characters."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text).replace("$", r"\$")


_RENDERERS: dict[type, Callable[[Any, Any], None]] = {
    Heatmaps: _heatmaps,
    Lines: _lines,
    Table: _table,
    Passage: _passage,
}
_HEIGHTS: dict[type, Callable[[Any], float]] = {
    Heatmaps: _height_of_heatmaps,
    Lines: lambda panel: 3.0,
    Table: lambda panel: 1.15 * _CELL * min(len(panel.rows) + 1, _MOST_ROWS + 2),
    Passage: lambda panel: 1.1 * _CELL * (2 + max((line for _, line, _, _ in _wrapped(panel)), default=0)),
}
