"""Tables and bar charts of the records of `runner.run`."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.runner import FIRST

Record = Mapping[str, Any]


def spread(summary: Mapping[str, Any]) -> str:
    """ "median (low to high)", or the value where there is only one."""
    text = f"{summary['median']:.2f}"
    return text if len(summary["values"]) == 1 else f"{text} ({summary['low']:.2f} to {summary['high']:.2f})"


def number(value: float) -> str:
    """With three significant digits, or as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def circumstances(record: Record) -> str:
    """One line: machine, date, and whether other work ran."""
    m = record["machine"]
    others = [share for share in record["other work"] if share is not None]
    parts = [f"other work took {min(others):.0%} to {max(others):.0%} of the cores"] if others else []
    if record["load"]:
        parts.append(f"load {min(record['load']):.1f} to {max(record['load']):.1f}")
    state = {True: "a quiet machine", False: "**a busy machine**", None: "load not recorded"}[record["quiet"]]
    cores = f"{m['cores']} core{'s' if m['cores'] > 1 else ''} of {m['cpu']}"
    cores = f"{m['gpu']}, {cores}" if "gpu" in m else cores
    where = cores + (f" ({', '.join(m['instructions'])})" if m["instructions"] else "")
    return f"{record['date']}, {where}; {record['rounds']} rounds; {', '.join([state, *parts])}."


def markdown(record: Record) -> str:
    """The section of one measure: figures by side, ratios with their spread, shares of the bounds, missing sides."""
    lines = [f"### {record['title']}", "", record["note"], "", circumstances(record), ""]
    sides, details = record["sides"], record["details"]
    names = [n for n in dict.fromkeys(n for figures in sides.values() for n in figures) if not _hidden(record, n)]
    extra = [
        n for n in (*FIRST.values(), "weights MiB", "optimizer state MiB") if any(n in d for d in details.values())
    ]

    def cell(name: str, side: str) -> str:
        if name in extra:
            return number(details[side][name]) if name in details[side] else ""
        return number(sides[side][name]["median"]) if name in sides[side] else ""

    columns = [*names, *extra]
    if len(sides) == 1:
        (side,) = sides
        lines += table(["figure", side], [[name, cell(name, side)] for name in columns])
    else:
        lines += table(["", *columns], [[side, *(cell(name, side) for name in columns)] for side in sides])
    ratios = [r for r in record["ratios"] if r["figure"] in names]
    if ratios:
        lines += ["", "Ratios, medians over the rounds (smallest to largest):", ""]
        lines += table(
            ["", "baseline", "figure", "ratio"], [[r["side"], r["rival"], r["figure"], spread(r)] for r in ratios]
        )
    if record["of bounds"]:
        bounds = ", ".join(f"{name} {number(b['median'])}" for name, b in record["bounds"].items() if "/s" in name)
        lines += ["", f"Shares of what the machine reached between the turns ({bounds}):", ""]
        lines += table(
            ["", "figure", "bound", "share"],
            [[b["side"], b["figure"], b["bound"], spread(b)] for b in record["of bounds"]],
        )
    lines += [""] + [f"Not measured: {side} ({reason})." for side, reason in record["missing"].items()]
    software = dict.fromkeys(record["software"].values())
    return "\n".join([*lines, *([""] if record["missing"] else []), f"Software: {'; '.join(software)}."])


def highlights(records: Mapping[str, Record]) -> str:
    """The table of the main ratios of several measures."""
    rows = []
    for record in records.values():
        for r in record["ratios"]:
            if re.fullmatch(r".*/s|(GPU )?peak MiB|seconds", r["figure"]) and not _hidden(record, r["figure"]):
                state = " (busy)" if record["quiet"] is False else ""
                rows.append([record["title"], r["side"], r["figure"], r["rival"], spread(r) + state])
    return "\n".join(table(["measure", "", "figure", "baseline", "ratio"], rows))


def _hidden(record: Record, figure: str) -> bool:
    """Seconds beside a rate, and CPU time where the clock says enough."""
    if figure in ("seconds", "CPU seconds"):
        return any("/s" in name for figures in record["sides"].values() for name in figures)
    return bool(record["quiet"]) and figure.endswith("of CPU time")


def replace_section(path: pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in a file."""
    old = path.read_text()
    pattern = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
    new, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{path}: {count} sections '<!-- begin {name} -->' to '<!-- end {name} -->'; expected one")
    path.write_text(new)


def chart(records: Mapping[str, Record], path: pathlib.Path) -> None:
    """A bar for every ratio of a rate, with its spread; the line is equality."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{name}: {r['side']} / {r['rival']}, {r['figure'].removesuffix(', tokens/s')}", r)
        for name, record in records.items()
        for r in record["ratios"]
        if r["figure"].endswith("/s")
    ]
    if not bars:
        return
    labels = [label for label, _ in bars]
    assert len(set(labels)) == len(labels), "bars of one label would be drawn over each other"
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.24 * len(bars)), layout="constrained")
    middles = [r["median"] for _, r in bars]
    errors = [[r["median"] - r["low"] for _, r in bars], [r["high"] - r["median"] for _, r in bars]]
    axes.barh(labels, middles, xerr=errors, color="#4477aa", ecolor="#222222", capsize=2)
    axes.axvline(1.0, color="#cc3311", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("ratio of rates in the same round; the line is equality")
    busy = any(record["quiet"] is False for record in records.values())
    axes.set_title("llm_jax beside other software" + (" (busy machine)" if busy else ""))
    axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
