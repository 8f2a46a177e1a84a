"""PNGs of runs: the curves with bands over the seeds, and the results with their intervals."""

import math
import pathlib
from collections.abc import Sequence

from llm_jax.pictures import render_png
from llm_jax.research import page
from llm_jax.research import runs as runs_lib
from llm_jax.research.runs import Run


def draw(runs: Sequence[Run], directory: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Writes STEM-curves.png and STEM-results.png and returns their paths; a picture without figures is left out."""
    groups, figure = runs_lib.group(runs), runs_lib.main_figure(runs)
    label = runs_lib.FIGURES[figure]
    paths = []
    found = [(group.label, name, page.curve(group, name)) for group in groups for name in ("loss", figure)]
    curves = [(group_label, name, points) for group_label, name, points in found if points]
    if curves:
        with render_png.figure(11, 4, layout="constrained") as drawing:
            axes = drawing.subplots(1, 2)
            for axis, name, title in zip(axes, ("loss", figure), ("training loss, nats a token", label), strict=True):
                for group_label, points in ((g, p) for g, n, p in curves if n == name):
                    marker = "o" if len(points["step"]) < 20 else ""
                    (line,) = axis.plot(points["step"], points["mean"], marker=marker, markersize=3, label=group_label)
                    axis.fill_between(points["step"], points["low"], points["high"], color=line.get_color(), alpha=0.2)
                axis.set(xlabel="step", ylabel=title)
                axis.grid(alpha=0.3)
            if len(groups) > 1:
                axes[0].legend(fontsize=8)
            paths.append(directory / f"{stem}-curves.png")
            drawing.savefig(paths[-1], dpi=130)
    results = [(group.label, mean) for group in groups if (mean := group.mean(figure))]
    if results:
        with render_png.figure(7, 1 + 0.35 * len(results), layout="constrained") as drawing:
            axis = drawing.subplots()
            for i, (group_label, mean) in enumerate(results):
                half = 0.0 if math.isnan(mean.low) else mean.high - mean.estimate
                axis.errorbar(mean.estimate, i, xerr=half, marker="o", capsize=3, label=group_label)
            axis.set_yticks(range(len(results)), [group_label for group_label, _ in results])
            axis.invert_yaxis()
            axis.set(xlabel=f"{label}, 95 % interval over the seeds")
            axis.grid(alpha=0.3, axis="x")
            paths.append(directory / f"{stem}-results.png")
            drawing.savefig(paths[-1], dpi=130)
    return paths
