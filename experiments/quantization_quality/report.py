"""The verdicts, the tables and the picture of the quantization experiment.

    PYTHONPATH=. python experiments/quantization_quality/report.py    # again, from figures.json

The rules below were fixed before the run, but for the words of Q1: that schemes which leave activations as they are
say nothing of activations, and stand apart, was put in after it. No threshold was touched.

A *loss difference* is the loss of the quantized model minus that of the full one, in nats a token, paired by
row of held-out text, and judged by the 95 % t-interval of its mean over the rows.

Q1  A way to quantize weights and activations to 8 bits has little loss if its interval lies below MARGIN (a
    perplexity 1 % higher) on the reference model, and its sentence vectors keep a mean cosine of at least COSINE
    on MiniLM. Holds if that is so of w8a8 (dynamic) and w8a8_static by absmax; "holds when" names the
    schemes that quantize activations and their methods for which it is so, if some are; else fails. Schemes of 8 bits
    for the weights alone are judged by the same bounds in an entry of their own, which names them.
Q1b (an aim of this project) at 4 bits: int4 by its best method against ggml's Q4_0, and int4_affine against
    Q4_1, of equal size (and against llama.cpp's files of those formats, where they were made): holds if no
    interval of the difference of losses lies above 0.
Q3  smaller: fewer bytes than float32. less memory: weights and temporaries of one token's pass together.
    faster: the interval of the log ratio of tokens a second, paired by repeat, lies above 0. Holds if all
    three are so of int8, w8a8 and int4; "holds when" says of which; else fails.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from llm_jax import cli, files
from llm_jax.intervals import Interval, mean, paired
from llm_jax.kernels import number_formats
from llm_jax.research import experiments, findings, pictures
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent
MARGIN = float(np.log(1.01))
COSINE = 0.99
OTHERS = ("ggml", "llama.cpp")
EIGHT = ("int8", "int8:32", "w8a8", "w8a8_static", "fp8_e4m3", "fp8_e5m2")


def loss_difference(cell: dict[str, Any]) -> Interval:
    return paired(cell["loss"], cell["full_loss"])


def publish(figures: dict[str, Any]) -> str:
    """Writes results.json, the picture and the tables in README.md; returns the verdicts as text.

    Args:
      figures: what figures.json holds.
    """
    draw(figures["reference model"], figures["full precision"], experiments.output(__file__) / "quality.png")
    results = judge(figures["reference model"], figures["MiniLM"], figures["speed"])
    origin = Provenance(**figures.get("provenance", {}))  # figures.json of earlier versions has none
    lines = tables(figures)
    return experiments.publish(
        str(HERE / "sweep.py"),
        results,
        lines,
        origins=[dataclasses.replace(origin, command="")],
        measured_by=origin.command,
    )


def judge(language: dict, sentences: dict, speed: dict) -> list[Finding]:
    """The verdicts by the rules above."""

    costs = {name: loss_difference(cell) for name, cell in language.items()}
    eight: dict[bool, dict[str, Interval]] = {True: {}, False: {}}  # with activations, without
    for name, cost in costs.items():
        if (scheme := name.split()[0]) in EIGHT:
            eight[bool(number_formats.scheme(scheme).activations)][name] = cost
    little = {
        which: [n for n in some if some[n][2] < MARGIN and sentences.get(n, {"cosine": 0})["cosine"] >= COSINE]
        for which, some in eight.items()
    }
    q1, q1_weights = (f"holds when {', '.join(names)}" if names else "fails" for names in little.values())
    if all(name in little[True] for name in ("w8a8 absmax", "w8a8_static absmax")):
        q1 = "holds"

    def best(scheme: str) -> str:
        return min((n for n in costs if n.split()[0] == scheme), key=lambda n: costs[n][0])

    pairs = {}
    for scheme, format_ in (("int4", "Q4_0"), ("int4_affine", "Q4_1")):
        name = best(scheme)
        for reference in (f"{maker} {format_}" for maker in OTHERS if f"{maker} {format_}" in language):
            pairs[f"{name} - {reference}"] = paired(language[name]["loss"], language[reference]["loss"])
    q1b = "holds" if all(low <= 0 for _, low, _ in pairs.values()) else "fails"

    plain = speed["float32"]
    ratios: dict[str, Any] = {}
    good = []
    for name, cell in speed.items():
        if name == "float32":
            continue
        faster = mean(np.log(np.divide(cell["tokens_per_second"], plain["tokens_per_second"])))
        memory = [cell["bytes"] + cell["temporary_bytes"], plain["bytes"] + plain["temporary_bytes"]]
        ratios[f"{name}: log ratio of tokens a second"] = faster
        ratios[f"{name}: bytes over those of float32"] = cell["bytes"] / plain["bytes"]
        ratios[f"{name}: memory over that of float32"] = memory[0] / memory[1]
        parts = {
            "smaller": cell["bytes"] < plain["bytes"],
            "less memory": memory[0] < memory[1],
            "faster": faster[1] > 0,
        }
        good.append((name, [part for part, yes in parts.items() if yes]))
    judged = [(name, parts) for name, parts in good if name in ("int8", "w8a8", "int4")]
    if all(len(parts) == 3 for _, parts in judged):
        q3 = "holds"
    elif any(parts for _, parts in good):
        q3 = "holds when " + "; ".join(f"{name}: {', '.join(parts) or 'nothing'}" for name, parts in good)
    else:
        q3 = "fails"
    difference = "loss difference, nats a token"
    return [
        findings.finding("Q1", difference, eight[True], q1, part="weights and activations"),
        findings.finding("Q1", difference, eight[False], q1_weights, part="weights alone"),
        findings.finding("Q1b", "difference to ggml's formats of equal size, nats a token", pairs, q1b),
        findings.finding("Q3", "ratios to float32", ratios, q3),
    ]


def tables(figures: dict[str, Any]) -> list[str]:
    """Markdown."""
    full, language, sentences, speed, labelled = (
        figures[name] for name in ("full precision", "reference model", "MiniLM", "speed", "SmolLM2 (already Q4_1)")
    )

    def difference(of_cell: dict[str, Any]) -> str:
        return "{:+.4f} ({:+.4f}, {:+.4f})".format(*loss_difference(of_cell))

    rows = []
    for name, cell in sorted(language.items(), key=lambda item: (-item[1]["bits"], item[0])):
        vector = sentences.get(name)
        ends = [f"{vector['cosine']:.5f}", f"{vector['order']:.5f}"] if vector else ["-", "-"]
        sizes = [f"{cell['bits']:.3f}", f"{cell['bytes']:,}", f"{cell['perplexity']:.3f}"]
        rows.append([name, *sizes, difference(cell), f"{cell['kl']:.5f}", f"{cell['agreement']:.4f}", *ends])
    head = ["scheme and method", "bits a weight", "bytes", "perplexity", "loss difference (95 %)", "KL"]
    head += ["same greedy token", "MiniLM cosine", "order"]
    lines = ["", f"Reference model, full precision: perplexity {full['perplexity']:.3f}, {full['bytes']:,} bytes.", ""]
    lines += findings.markdown_table(head, rows)
    rows = []
    for name, cell in speed.items():
        ratio = cell["median"] / speed["float32"]["median"]
        sizes = [f"{cell['bytes']:,}", f"{cell['temporary_bytes']:,}"]
        rows.append([name, *sizes, f"{cell['median']:.1f}", f"{ratio:.2f}"])
    head = ["weights", "bytes", "temporaries", "tokens/s (median)", "over float32"]
    lines += ["", *findings.markdown_table(head, rows)]
    if labelled:
        rows = [[n, difference(c), f"{c['kl']:.5f}", f"{c['agreement']:.4f}"] for n, c in labelled.items()]
        lines += ["", "SmolLM2-135M, *already Q4_1* (so 8 bits only):", ""]
        lines += findings.markdown_table(["scheme", "loss difference", "KL", "same"], rows)
    return lines


def draw(language: dict, full: dict, path: pathlib.Path) -> None:
    """Perplexity over that of the full model against bits a weight, a point per scheme and method."""
    with pictures.figure(path, figsize=(9, 5)) as axis:
        methods = {name: name.split()[0 if name.startswith(OTHERS) else -1] for name in language}
        for method, marker in zip(dict.fromkeys(methods.values()), "osv^D*PX", strict=False):
            points = {n: f for n, f in language.items() if methods[n] == method}
            x = [f["bits"] for f in points.values()]
            y = [f["perplexity"] / full["perplexity"] - 1 for f in points.values()]
            axis.scatter(x, np.maximum(y, 1e-5), marker=marker, label=method, alpha=0.7)
        best: dict[str, tuple[float, float]] = {}
        for name, cell in language.items():
            rise = max(cell["perplexity"] / full["perplexity"] - 1, 1e-5)
            scheme = name if name.startswith(OTHERS) else name.split()[0]
            best[scheme] = min(best.get(scheme, (cell["bits"], rise)), (cell["bits"], rise), key=lambda p: p[1])
        for scheme, point in best.items():
            axis.annotate(scheme, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(
            xlabel="bits a weight, scales and 8-bit tables included",
            ylabel="rise of perplexity, relative",
            yscale="log",
        )
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def main() -> None:
    print(publish(files.read_json(HERE / "figures.json")))


if __name__ == "__main__":
    cli.run_script(main)
