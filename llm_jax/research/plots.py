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
_MAX_INSIDE, _LEGEND_COLUMNS = 6, 4  # groups of a legend inside the plot; columns of a larger legend below the plots


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


def _rows_caption(curves: Sequence[Any], ends: Sequence[Any]) -> str:
    """The numbers of rows of the lines and of the final evaluations that are drawn as diamonds."""
    lines, diamonds = (" or ".join(sorted({part["examples"] for part in parts if part})) for parts in (curves, ends))
    texts = [lines and f"lines: {lines}", diamonds and f"diamonds: final evaluation, {diamonds}"]
    return "; ".join(filter(None, texts))


def draw(runs: Sequence[RunRecord], directory: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Writes STEM-curves.png and STEM-results.png, if there is data for them, and returns their paths.

    Final evaluations over other rows than the periodic ones are diamonds beside the curves.
    """
    groups, main = runs_lib.group(runs), runs_lib.main_metric(runs)
    names = comparison.shortened([group.label for group in groups])
    names = [render_png.plain("\n".join(textwrap.wrap(name, _LINE))) for name in names]
    groups = [dataclasses.replace(group, label=name) for group, name in zip(groups, names, strict=True)]
    label = runs_lib.METRICS[main]
    paths = []
    curves = {name: [page.curve(group, name) for group in groups] for name in ("loss", main)}
    ends = {name: [page.final_point(group, name) for group in groups] for name in ("loss", main)}
    if any(filter(None, [*curves["loss"], *curves[main], *ends[main]])):
        paths.append(directory / f"{stem}-curves.png")
        lines_of_text = sum(name.count("\n") + 1 for name in names)
        height = 4.0 + 0.14 * lines_of_text / _LEGEND_COLUMNS * (len(groups) > _MAX_INSIDE)
        with figure(paths[-1], 1, 2, figsize=(11, height), dpi=130, legends=False) as axes:
            for axis, name, title in zip(axes, ("loss", main), ("training loss, nats per token", label), strict=True):
                for i, (group, points, end) in enumerate(zip(groups, curves[name], ends[name], strict=True)):
                    color = f"C{i % 10}"
                    if points:
                        marker = "o" if len(points["step"]) < 20 else ""
                        style = {"color": color, "marker": marker, "markersize": 3, "label": group.label}
                        axis.plot(points["step"], points["mean"], **style)
                        axis.fill_between(points["step"], points["low"], points["high"], color=color, alpha=0.2)
                    if end:
                        around = [[end["mean"] - end["low"]], [end["high"] - end["mean"]]]
                        axis.errorbar(end["step"], end["mean"], yerr=around, color=color, marker="D", markersize=5)
                axis.set(xlabel="step", ylabel=title)
                axis.set_title(_rows_caption(curves[name], ends[name]), fontsize=8)
            lines = axes[0].get_lines()
            labels = [line.get_label() for line in lines]  # explicit, because names may begin with "_"
            if 1 < len(groups) <= _MAX_INSIDE:
                axes[0].legend(lines, labels, fontsize=8)
            elif len(groups) > 1:
                axes[0].figure.legend(lines, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=7)
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
