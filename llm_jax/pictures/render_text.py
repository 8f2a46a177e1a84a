"""Pictures as text: blocks and colours on a terminal, plain numbers elsewhere."""

import math
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.pictures import colours
from llm_jax.pictures.panels import Heatmaps, Lines, Passage, Picture, Table, number

_BARS = "▁▂▃▄▅▆▇█"
_LABEL = 14  # characters of a row's label
_END = "\x1b[0m"


def render(picture: Picture, color: bool) -> str:
    """The picture as lines of text.

    Args:
      color: blocks and escape sequences for colours; otherwise numbers and no escape sequence.
    """
    parts = [f"\x1b[1m{picture.title}{_END}" if color else picture.title]
    for panel in picture.panels:
        parts.append("\n".join([panel.title, *_RENDERERS[type(panel)](panel, color)]))
    if picture.note:
        parts.append(textwrap.fill(picture.note, min(100, _columns())))
    return "\n\n".join(parts)


def _heatmaps(maps: Heatmaps, color: bool) -> list[str]:
    lines = [f"  {number(float(maps.low))} to {number(float(maps.high))} {maps.unit}".rstrip()]
    painted = colours.cells(maps) if color else None
    # Two significant digits of the largest value.
    decimals = max(0, 2 - math.floor(math.log10(max(abs(maps.low), abs(maps.high), 1e-30))))
    head = " ".join(f"{label[:6]:>6}" for label in maps.columns)
    cell = "  " if 2 + _LABEL + 1 + 2 * len(maps.columns) <= _columns() else " "
    for n, name in enumerate(maps.names):
        lines += ["", f"  {name}"] if name else []
        if not color:
            lines.append(f"  {'':<{_LABEL}} {head}".rstrip())
        for r, label in enumerate(maps.rows):
            row = maps.values[n, r]
            if painted is None:
                body = " ".join(f"{'' if np.isnan(value) else f'{value:.{decimals}f}':>6}" for value in row)
            else:
                body = "".join(_painted(pixel, cell) for pixel in painted[n, r]) + _END
            lines.append(f"  {_clipped(label):<{_LABEL}} {body}".rstrip())
    if color and maps.columns != maps.rows:
        text = f"columns: {', '.join(map(_visible, maps.columns))}"
        lines += textwrap.wrap(text, _columns() - 1, initial_indent="  ", subsequent_indent="    ")
    return lines


def _painted(pixel: np.ndarray, cell: str) -> str:
    red, green, blue, alpha = (int(x) for x in pixel)
    return f"\x1b[48;2;{red};{green};{blue}m{cell}" if alpha else f"{_END}{cell}"


def _lines(panel: Lines, color: bool) -> list[str]:
    if not color:
        rows = [(float(x), *map(float, values)) for x, values in zip(panel.x, panel.values.T, strict=True)]
        return _aligned((panel.x_label, *panel.labels), rows)
    low, high = float(np.nanmin(panel.values)), float(np.nanmax(panel.values))
    width = max(10, min(72, _columns() - max(map(len, panel.labels)) - 26))
    bins = np.array_split(np.arange(len(panel.x)), min(width, len(panel.x)))
    lines = [f"  {panel.y_label}, {number(low)} to {number(high)}, over {panel.x_label} {_span(panel.x)}"]
    for label, values in zip(panel.labels, panel.values, strict=True):
        heights = [(float(values[b].mean()) - low) / max(high - low, 1e-30) for b in bins]
        curve = "".join(_BARS[min(int(height * len(_BARS)), len(_BARS) - 1)] for height in heights)
        lines.append(f"  {label:<{max(map(len, panel.labels))}} {curve} {_span(values)}")
    return lines


def _span(values: np.ndarray) -> str:
    return f"{number(float(values[0]))} to {number(float(values[-1]))}"


def _table(panel: Table, color: bool) -> list[str]:
    return _aligned(panel.columns, panel.rows, _columns() if color else None)


def _passage(panel: Passage, color: bool) -> list[str]:
    pairs = list(zip(panel.tokens, panel.values, strict=True))
    if not color:
        return _aligned((panel.unit, "token"), [(float(value), repr(token)) for token, value in pairs])
    text = "".join(f"{_background(float(value), panel.high)}{_visible(token)}{_END}" for token, value in pairs)
    strongest = f"{_background(panel.high, panel.high)} {number(float(panel.high))} {_END} {panel.unit} or more"
    return [text.replace("↵", "↵\n"), panel.legend or strongest]


def _background(value: float, high: float) -> str:
    """The escape sequences of white text on the colour of a value, over dark grey."""
    share = colours.opacity(value, high)
    red, green, blue = (round(30 * (1 - share) + c * share) for c in colours.hue(value))
    return f"\x1b[97;48;2;{red};{green};{blue}m"


def _visible(token: str) -> str:
    """The token on one line, without control characters."""
    return "".join(c if c.isprintable() else "↵" if c == "\n" else repr(c)[1:-1] for c in token)


def _clipped(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def _aligned(columns: Any, rows: Any, width: int | None = None) -> list[str]:
    """Columns of equal width: numbers to the right, text to the left.

    Args:
      width: characters of a line, or None. Columns that do not fit follow below, after the first column.
    """
    cells = [[_visible(cell) if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    widths = [max([len(head), *(len(row[i]) for row in cells)]) for i, head in enumerate(columns)]
    is_text = [all(isinstance(row[i], str) for row in rows) for i in range(len(columns))]

    def line(row: Any, block: list[int]) -> str:
        parts = (f"{row[i]:<{widths[i]}}" if is_text[i] else f"{row[i]:>{widths[i]}}" for i in block)
        return ("  " + "  ".join(parts)).rstrip()

    lines: list[str] = []
    for block in _blocks(widths, width):
        lines += [""] * bool(lines) + [line(row, block) for row in (columns, *cells)]
    return lines


def _blocks(widths: list[int], width: int | None) -> list[list[int]]:
    """The columns of tables below each other that are at most `width` wide if possible; each begins with column 0."""
    blocks = [[0]]
    for i in range(1, len(widths)):
        if width is not None and len(blocks[-1]) > 1 and sum(2 + widths[k] for k in (*blocks[-1], i)) > width:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def _columns() -> int:
    return shutil.get_terminal_size().columns


_RENDERERS: dict[type, Callable[[Any, bool], list[str]]] = {
    Heatmaps: _heatmaps,
    Lines: _lines,
    Table: _table,
    Passage: _passage,
}
