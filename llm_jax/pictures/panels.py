"""Pictures and their panels."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Heatmaps:
    """Matrices that share their rows, columns and colour scale, such as the heads of a layer.

    Attributes:
      title: what the matrices are.
      names: one for each matrix; a single matrix may have the name "".
      values: float (N, R, C); NaN where there is no value.
      rows, columns: labels, R and C of them.
      unit: of the values.
      low, high: the ends of the colour scale.
      diverging: whether the colours distinguish the sign, with 0 in the middle of the scale.
    """

    title: str
    names: tuple[str, ...]
    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    unit: str
    low: float
    high: float
    diverging: bool = False


@dataclasses.dataclass(frozen=True)
class Lines:
    """Curves over a common axis.

    Attributes:
      x: float (R,).
      values: float (C, R).
      labels: C labels.
    """

    title: str
    x: np.ndarray
    values: np.ndarray
    labels: tuple[str, ...]
    x_label: str
    y_label: str

    @property
    def has_legend(self) -> bool:
        """Whether the labels are shown: a single curve needs none, and many would take more space than the curves."""
        return 1 < len(self.labels) <= 16


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts and numbers; a number is a float or an int, everything else is text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A text whose tokens are coloured by a value.

    Attributes:
      tokens: the text of each token.
      values: float (T,); NaN for a token without a value.
      unit: of the values.
      high: the value of the strongest colour. Negative values have another colour, which is strongest at -high.
      legend: what the colours are; "": the value of the strongest one.
      hints: for each token, the text that a page shows while the pointer is on it; (): its value.
    """

    title: str
    tokens: tuple[str, ...]
    values: np.ndarray
    unit: str
    high: float
    legend: str = ""
    hints: tuple[str, ...] = ()


Panel = Heatmaps | Lines | Table | Passage


@dataclasses.dataclass(frozen=True)
class Picture:
    """A title, panels below each other, and a note that explains how to read them."""

    title: str
    panels: tuple[Panel, ...]
    note: str = ""


def number(value: float) -> str:
    """A number as tables show it: four significant digits; "" for NaN."""
    if isinstance(value, int):
        return f"{value:,}"
    return "" if np.isnan(value) else f"{value:.4g}"


def describe(panel: Panel) -> str:
    """A sentence that describes a panel, for screen readers."""
    if isinstance(panel, Heatmaps):
        peak = np.unravel_index(np.nanargmax(panel.values), panel.values.shape) if _has_values(panel) else None
        count = f"{len(panel.names)} matrices" if len(panel.names) > 1 else "A matrix"
        text = f"{count} of {len(panel.rows)} rows and {len(panel.columns)} columns: {panel.title}."
        if peak is None:
            return text
        name = f"{panel.names[peak[0]]}, " if panel.names[peak[0]] else ""
        location = f"{name}row {panel.rows[peak[1]]}, column {panel.columns[peak[2]]}"
        return f"{text} The largest value, {number(float(panel.values[peak]))} {panel.unit}, is at {location}."
    if isinstance(panel, Lines):
        ends = [f"{label} from {number(float(v[0]))} to {number(float(v[-1]))}" for label, v in _curves(panel)[:8]]
        span = f"{panel.x_label} from {number(float(panel.x[0]))} to {number(float(panel.x[-1]))}"
        return f"{len(panel.labels)} curves of {panel.y_label} over {span}: {'; '.join(ends)}."
    if isinstance(panel, Table):
        return f"A table of {len(panel.rows)} rows: {panel.title}."
    return f"A text of {len(panel.tokens)} tokens, coloured by {panel.unit or 'token'}: {panel.title}."


def _has_values(panel: Heatmaps) -> bool:
    return bool(np.isfinite(panel.values).any())


def _curves(panel: Lines) -> list[tuple[str, np.ndarray]]:
    return list(zip(panel.labels, panel.values, strict=True))
