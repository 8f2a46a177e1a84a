"""The colours of values, which all renderers share."""

import numpy as np

from llm_jax.pictures.panels import Heatmaps

SURPRISE, RELIEF = (217, 72, 15), (25, 113, 194)  # of positive and of negative values of a passage
SERIES = ("#4c84c4", "#d9772b", "#3f9b58", "#c95454", "#8f75c9", "#9a7358", "#cf6fb2", "#808080", "#a6a43a", "#3ba3b3")
LINE_STYLES = ("solid", "dashed", "dotted", "dashdot")  # of the first curves, and of those that repeat a colour
_STRONGEST = 0.6  # opacity of a passage's strongest colour, on which text remains readable


def cells(maps: Heatmaps) -> np.ndarray:
    """The colours of the values: uint8 (N, R, C, 4); transparent where there is no value."""
    from matplotlib import colormaps

    low, high = maps.low, maps.high
    if maps.diverging:
        high = max(abs(low), abs(high))
        low = -high
    scaled = np.clip((maps.values - low) / max(high - low, 1e-30), 0, 1)
    colours = colormaps["RdBu_r" if maps.diverging else "viridis"](np.nan_to_num(scaled), bytes=True)
    colours[..., 3] = np.where(np.isnan(maps.values), 0, 255)
    return colours


def opacity(value: float, high: float) -> float:
    """How strongly a token of a passage is coloured, from 0 to 1."""
    return 0.0 if np.isnan(value) else _STRONGEST * min(abs(value) / max(high, 1e-30), 1)


def hue(value: float) -> tuple[int, int, int]:
    """The colour of a token of a passage, red, green and blue from 0 to 255."""
    return RELIEF if value < 0 else SURPRISE


def series(index: int) -> tuple[str, str]:
    """The colour of a curve, #rrggbb, and the name of its line style in matplotlib."""
    return SERIES[index % len(SERIES)], LINE_STYLES[index // len(SERIES) % len(LINE_STYLES)]
