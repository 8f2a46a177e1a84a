"""PNG files about runs: curves with bands over the seeds, and results with their intervals."""

import contextlib
import dataclasses
import math
import pathlib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from llm_jax.pictures import render_png
from llm_jax.research import comparison, page
from llm_jax.research import runs as runs_lib
from llm_jax.research.runs import RunRecord

_LINE = 40  # characters of a line of a name


@contextlib.contextmanager
def figure(
    path: str | pathlib.Path,
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float],
    dpi: int = 110,
    legends: bool = True,
    **options: Any,
) -> Iterator[Any]:
    """Context with the axes of a figure of `rows` times `columns` plots (`Figure.subplots`); writes `path` at the end.

    Args:
      figsize: width and height in inches.
      legends: whether each plot with labels gets a legend.
      options: additional arguments of `Figure.subplots`, such as sharey.
    """
    width, height = figsize
    with render_png.figure(width, height, "constrained") as drawing:
        yield drawing.subplots(rows, columns, **options)
        for axis in drawing.axes:
            axis.grid(alpha=0.3)
            if legends and axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize=8)
        drawing.savefig(path, dpi=dpi)


def draw(runs: Sequence[RunRecord], directory: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Writes STEM-curves.png and STEM-results.png, if there is data for them, and returns their paths."""
    groups, main = runs_lib.group(runs), runs_lib.main_figure(runs)
    names = comparison.shortened([group.label for group in groups])
    names = [render_png.plain("\n".join(textwrap.wrap(name, _LINE))) for name in names]
    groups = [dataclasses.replace(group, label=name) for group, name in zip(groups, names, strict=True)]
    label = runs_lib.FIGURES[main]
    paths = []
    curve_rows = [(group.label, name, page.curve(group, name)) for group in groups for name in ("loss", main)]
    curves = [(group_label, name, points) for group_label, name, points in curve_rows if points]
    if curves:
        paths.append(directory / f"{stem}-curves.png")
        with figure(paths[-1], 1, 2, figsize=(11, 4), dpi=130, legends=False) as axes:
            for axis, name, title in zip(axes, ("loss", main), ("training loss, nats per token", label), strict=True):
                for group_label, points in ((g, p) for g, n, p in curves if n == name):
                    marker = "o" if len(points["step"]) < 20 else ""
                    (line,) = axis.plot(points["step"], points["mean"], marker=marker, markersize=3, label=group_label)
                    axis.fill_between(points["step"], points["low"], points["high"], color=line.get_color(), alpha=0.2)
                axis.set(xlabel="step", ylabel=title)
            if len(groups) > 1 and (lines := axes[0].get_lines()):
                axes[0].legend(lines, [line.get_label() for line in lines], fontsize=8)  # names may begin with "_"
    results = [(group.label, mean) for group in groups if (mean := group.mean(main))]
    if results:
        paths.append(directory / f"{stem}-results.png")
        height = sum(0.15 + 0.2 * (name.count("\n") + 1) for name, _ in results)
        with figure(paths[-1], figsize=(7, 1 + height), dpi=130, legends=False) as axis:
            for i, (group_label, mean) in enumerate(results):
                half = 0.0 if math.isnan(mean.low) else mean.high - mean.estimate
                axis.errorbar(mean.estimate, i, xerr=half, marker="o", capsize=3, label=group_label)
            axis.set_yticks(range(len(results)), [group_label for group_label, _ in results])
            axis.invert_yaxis()
            axis.set(xlabel=f"{label}, 95 % interval over the seeds")
    return paths
