"""The verdicts, the tables and the picture of the quantization experiment.

A *loss difference* is the loss of the quantized model minus that of the full one, in nats per token, paired by row of
held-out text, with the 95 % t-interval of its mean over the rows.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from llm_jax import cli, files
from llm_jax.intervals import Interval, mean, paired
from llm_jax.research import experiments, findings, plots
from llm_jax.research.findings import Finding
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent
MARGIN, COSINE = math.log(1.01), 0.99
FILES = ("ggml", "llama.cpp")
EIGHT_BITS = {  # the schemes that Q1 judges, by part
    "weights and activations": ("w8a8", "w8a8_static"),
    "weights alone": ("int8", "int8:32", "fp8_e4m3", "fp8_e5m2"),
}
EQUAL_SIZE = {"int4": "Q4_0", "int4_affine": "Q4_1"}


def publish(figures: dict[str, Any]) -> str:
    """Writes results.json, the picture and the tables of README.md from figures.json; returns the verdicts as text."""
    draw(figures["reference model"], figures["full precision"], experiments.output(__file__) / "quality.png")
    results = judge(figures["reference model"], figures["MiniLM"], figures["speed"])
    origin = Provenance(**figures.get("provenance", {}))  # figures.json of earlier versions has none
    origins = [dataclasses.replace(origin, command="")]
    script = str(HERE / "sweep.py")
    return experiments.publish(script, results, tables(figures), origins=origins, measured_by=origin.command)


def loss_difference(cell: dict[str, Any]) -> Interval:
    return paired(cell["loss"], cell["full_loss"])


def judge(language: dict[str, Any], sentences: dict[str, Any], speed: dict[str, Any]) -> list[Finding]:
    """The verdicts by the rules of statements.toml."""
    costs = {name: loss_difference(cell) for name, cell in language.items()}
    results = []
    for part, schemes in EIGHT_BITS.items():
        judged = {name: cost for name, cost in costs.items() if name.split()[0] in schemes}
        cosines = {name: sentences[name]["cosine"] if name in sentences else 0 for name in judged}
        little = [name for name, cost in judged.items() if cost.high < MARGIN and cosines[name] >= COSINE]
        verdict = f"holds when {', '.join(little)}" if little else "fails"
        if {"w8a8 absmax", "w8a8_static absmax"} <= set(little):
            verdict = "holds"
        results.append(findings.finding("Q1", "loss difference, nats per token", judged, verdict, part=part))

    pairs = {}
    for scheme, kind in EQUAL_SIZE.items():
        best = min((name for name in costs if name.split()[0] == scheme), key=lambda name: costs[name].estimate)
        for reference in (f"{maker} {kind}" for maker in FILES if f"{maker} {kind}" in language):
            pairs[f"{best} - {reference}"] = paired(language[best]["loss"], language[reference]["loss"])
    q1b = "holds" if all(pair.low <= 0 for pair in pairs.values()) else "fails"

    plain, ratios, gains = speed["float32"], {}, {}
    for name, cell in speed.items():
        if name == "float32":
            continue
        faster = mean(np.log(np.divide(cell["tokens_per_second"], plain["tokens_per_second"])))
        size = cell["bytes"] / plain["bytes"]
        memory = (cell["bytes"] + cell["temporary_bytes"]) / (plain["bytes"] + plain["temporary_bytes"])
        ratios[f"{name}: log ratio of tokens per second"] = faster
        ratios[f"{name}: bytes over those of float32"] = size
        ratios[f"{name}: memory over that of float32"] = memory
        passes = {"smaller": size < 1, "less memory": memory < 1, "faster": faster.low > 0}
        gains[name] = [gain for gain, passed in passes.items() if passed]
    q3 = "holds when " + "; ".join(f"{name}: {', '.join(gain) or 'nothing'}" for name, gain in gains.items())
    if all(len(gains[name]) == 3 for name in ("int8", "w8a8", "int4") if name in gains):
        q3 = "holds"
    elif not any(gains.values()):
        q3 = "fails"
    return [
        *results,
        findings.finding("Q1b", "difference to ggml's formats of equal size, nats per token", pairs, q1b),
        findings.finding("Q3", "ratios to float32", ratios, q3),
    ]


def tables(figures: dict[str, Any]) -> list[str]:
    """Markdown."""
    full, sentences, plain = figures["full precision"], figures["MiniLM"], figures["speed"]["float32"]

    def quality(cell: dict[str, Any]) -> list[str]:
        difference = "{:+.4f} ({:+.4f}, {:+.4f})".format(*loss_difference(cell))
        return [difference, f"{cell['kl']:.5f}", f"{cell['agreement']:.4f}"]

    rows = []
    for name, cell in sorted(figures["reference model"].items(), key=lambda item: (-item[1]["bits"], item[0])):
        sizes = [f"{cell['bits']:.3f}", f"{cell['bytes']:,}", f"{cell['perplexity']:.3f}"]
        vectors = [f"{sentences[name][key]:.5f}" if name in sentences else "-" for key in ("cosine", "order")]
        rows.append([name, *sizes, *quality(cell), *vectors])
    head = ["scheme and method", "bits per weight", "bytes", "perplexity", "loss difference (95 %)", "KL"]
    lines = ["", f"Reference model, full precision: perplexity {full['perplexity']:.3f}, {full['bytes']:,} bytes.", ""]
    lines += findings.markdown_table([*head, "same greedy token", "MiniLM cosine", "order"], rows)
    rows = []
    for name, cell in figures["speed"].items():
        rates = [f"{cell['median']:.1f}", f"{cell['median'] / plain['median']:.2f}"]
        rows.append([name, f"{cell['bytes']:,}", f"{cell['temporary_bytes']:,}", *rates])
    head = ["weights", "bytes", "temporaries", "tokens/s (median)", "over float32"]
    lines += ["", *findings.markdown_table(head, rows)]
    if labelled := figures["SmolLM2 (already Q4_1)"]:
        rows = [[name, *quality(cell)] for name, cell in labelled.items()]
        lines += ["", "SmolLM2-135M, *already Q4_1* (so 8 bits only):", ""]
        lines += findings.markdown_table(["scheme", "loss difference", "KL", "same"], rows)
    return lines


def draw(language: dict[str, Any], full: dict[str, Any], path: pathlib.Path) -> None:
    """Perplexity over that of the full model against bits per weight, a point per scheme and method."""
    points: dict[str, list[tuple[float, float]]] = {}  # by method
    best: dict[str, tuple[float, float]] = {}  # by scheme
    for name, cell in language.items():
        point = (cell["bits"], max(cell["perplexity"] / full["perplexity"] - 1, 1e-5))
        maker_or_scheme, method = name.split()
        scheme, method = (name, maker_or_scheme) if maker_or_scheme in FILES else (maker_or_scheme, method)
        points.setdefault(method, []).append(point)
        best[scheme] = min(best.get(scheme, point), point, key=lambda p: p[1])
    with plots.figure(path, figsize=(9, 5)) as axis:
        for (method, of_method), marker in zip(points.items(), "osv^D*PX", strict=False):
            axis.scatter(*zip(*of_method, strict=True), marker=marker, label=method, alpha=0.7)
        for scheme, point in best.items():
            axis.annotate(scheme, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        label = "bits per weight, scales and 8-bit tables included"
        axis.set(xlabel=label, ylabel="rise of perplexity, relative", yscale="log")


def main() -> None:
    print(publish(files.read_json(HERE / "figures.json")))


if __name__ == "__main__":
    cli.run_script(main)
