"""Schemes x methods x groups after training, on full-precision weights: Q1 and Q3.

    PYTHONPATH=. python experiments/quantization_quality/sweep.py --checkpoint=runs/reference_lm [--rows=64]

Quantizes, measures, draws and judges. Cells that are done are kept under --runs and not done again: the same
command goes on where it was stopped. Writes results.json, quality.png and the tables in README.md.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import padded
from experiments.quantization_quality import measure, report
from experiments.quantization_quality.measure import Cell
from llm_jax import checkpoints, cli, files, tokenizers, trees, weights
from llm_jax.checkpoints import gguf, gguf_model, location
from llm_jax.data.corpus import Source
from llm_jax.data.rows import Rows, Shuffled
from llm_jax.errors import UserError
from llm_jax.quant import post_training
from llm_jax.research import experiments, provenance
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent

flags.DEFINE_string("checkpoint", None, "a run of configs/reference_lm.py", required=True)
flags.DEFINE_string("runs", "runs/quantization_quality", "where finished cells are kept")
flags.DEFINE_integer("rows", 64, "held-out sequences, spread over the text", lower_bound=3)
flags.DEFINE_integer("calibration", 32, "training sequences that methods calibrate on", lower_bound=1)
flags.DEFINE_integer("sentences", 200, "for MiniLM", lower_bound=3)
flags.DEFINE_string("llama_python", "", "an interpreter with llama_cpp, whose quantizer is measured too")
flags.DEFINE_boolean("smollm2", True, "also SmolLM2 in 8 bits (slow: 135 M parameters)")

CELLS = [
    *(Cell("int8", m) for m in ("absmax", "percentile", "mse")),
    *(Cell(s, m) for s in ("w8a8", "w8a8_static") for m in ("absmax", "percentile", "mse", "smoothquant")),
    *(Cell(s, "absmax") for s in ("int8:32", "int8_affine", "fp8_e4m3", "fp8_e5m2")),
    *(Cell(s, m) for s in ("int4", "int4_affine") for m in ("absmax", "mse", "awq", "gptq")),
    *(Cell(s, m) for s in ("int4:64", "int4:128", "nf4") for m in ("absmax", "awq", "gptq")),
    *(Cell("mxfp4", m) for m in ("absmax", "mse", "gptq")),
    *(Cell(s, m) for s in ("int4:channel", "int2", "int2_affine") for m in ("mse", "gptq")),
    *(Cell(f"ggml {s}", "") for s in ("Q8_0", "Q4_1", "Q4_0")),
]
SENTENCE_CELLS = [
    *(Cell(s, "absmax") for s in ("int8", "int8:32", "fp8_e4m3", "fp8_e5m2", "mxfp4")),
    *(Cell(s, m) for s in ("w8a8", "w8a8_static") for m in ("absmax", "percentile", "smoothquant")),
    *(Cell(s, m) for s in ("int4", "int4_affine", "nf4") for m in ("absmax", "awq", "gptq")),
]
SPEEDS = ("int8", "w8a8", "int4", "nf4")
LLAMA = ("Q8_0", "Q4_0", "Q4_1", "Q4_K_M")
LABELLED = (Cell("int8", "absmax"), Cell("w8a8", "absmax"))


def main() -> None:
    f = flags.FLAGS
    path = location.resolve(f.checkpoint)
    model, params, tokenizer = checkpoints.load(path)
    config = checkpoints.read_config(checkpoints.find(path))
    corpus = Source(config.data).corpus(tokenizer)
    seen, held = Shuffled(Rows(corpus.train, config.train.seq_len), 0), Rows(corpus.validation, config.train.seq_len)
    rows = [held[int(i)] for i in np.linspace(0, held.full - 1, f.rows).astype(int)]
    rows = [row for row in rows if row["mask"].sum()]
    calibration = [seen[i] for i in range(f.calibration)]
    measured = b"".join(row["inputs"].tobytes() for row in [*rows, *calibration])
    digest = hashlib.sha256((checkpoints.find(path) / "manifest.json").read_bytes() + measured).hexdigest()[:12]
    root = experiments.directory(f.runs, digest, f.rows, f.calibration, f.sentences)
    origins: list[Provenance] = []
    cells: dict[str, Callable[[], Any]] = {
        cell.name: functools.partial(measure_cell, model, params, cell, calibration, rows) for cell in CELLS
    }
    for kind in LLAMA if f.llama_python else ():
        cells[f"llama.cpp {kind}"] = functools.partial(of_llama, model, params, tokenizer, kind, rows)
    whole_model: dict[str, Callable[[], Any]] = {
        "full": lambda: measure.against(model, params, params, rows) | {"bytes": weights.num_bytes(params)},
        "speed": lambda: of_speed(model, params, calibration),
    }
    language = experiments.measure_all(root / "language", cells, origins)
    whole = experiments.measure_all(root, whole_model, origins)
    figures = {
        "full precision": {name: whole["full"][name] for name in ("perplexity", "bytes")},
        "reference model": language,
        "MiniLM": of_sentences(root / "sentences", f.sentences, origins),
        "speed": whole["speed"],
        "SmolLM2 (already Q4_1)": of_smollm2(root / "smollm2", config, origins) if f.smollm2 else {},
    }
    command = experiments.command(__file__, {"checkpoint": "RUN", "llama_python": "PYTHON"})
    figures["provenance"] = dataclasses.asdict(provenance.combine(origins, command))
    files.write_json(experiments.output(__file__) / "figures.json", figures)
    print(report.publish(figures))


def measure_cell(model, params, cell: Cell, calibration, rows) -> dict:
    quantized, size = measure.quantize_model(model, params, cell, calibration)
    matrices = [w for w in trees.flatten(quantized).values() if weights.is_quantized(w)]
    bits = 8 * sum(map(weights.num_bytes, matrices)) / sum(int(np.prod(w.shape)) for w in matrices)
    return measure.against(model, params, measure.expanded(quantized), rows) | {"bytes": size, "bits": bits}


def of_llama(model, params, tokenizer, kind: str, rows) -> dict:
    """llama.cpp quantizes the exported model; we read its file."""
    with tempfile.TemporaryDirectory() as directory:
        exported, quantized = (pathlib.Path(directory) / f"{name}.gguf" for name in ("whole", "made"))
        gguf_model.save(exported, model.config, params, tokenizers.exportable(tokenizer), "F32")
        command = [flags.FLAGS.llama_python, str(HERE / "llama.py"), str(exported), str(quantized), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{command[0]} did not quantize to {kind}: {done.stderr.strip().splitlines()[-1:]}")
        tensors = gguf.read(quantized).tensors.values()
        matrices = [t for t in tensors if len(t.shape) == 2]
        bits = 8 * sum(t.rows().nbytes for t in matrices) / sum(math.prod(t.shape) for t in matrices)
        figures = measure.against(model, params, checkpoints.load(quantized).params, rows)
        return figures | {"bytes": sum(t.rows().nbytes for t in tensors), "bits": bits}


def of_sentences(directory: pathlib.Path, count: int, origins: list[Provenance]) -> dict[str, Any]:
    """MiniLM's vectors of movie reviews; calibrated on sentences that are not measured."""
    model, params, tokenizer = checkpoints.load("asset:minilm-l6-v2")
    params = {name: part for name, part in params.items() if name != "pooler"}  # the vectors are means over tokens
    lines = location.resolve("asset:movie-reviews").read_text(errors="replace").splitlines()
    texts = [line.split("\t")[-1] for line in lines]
    picked = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: count + 32]]
    ids = [tokenizers.prompt(tokenizer, text)[:64] for text in picked]
    if tokenizer.eos is not None:
        ids = [[*i, tokenizer.eos] if i[-1] != tokenizer.eos else i for i in ids]
    calibration = [row(i, 64) for i in ids[count:]]
    full = measure.vectors(model, params, ids[:count])

    def figures(cell: Cell) -> dict:
        quantized, size = measure.quantize_model(model, params, cell, calibration)
        vectors = measure.vectors(model, measure.expanded(quantized), ids[:count])
        return measure.compare_vectors(full, vectors) | {"bytes": size}

    cells = {cell.name: functools.partial(figures, cell) for cell in SENTENCE_CELLS}
    return experiments.measure_all(directory, cells, origins)


def row(ids: list[int], length: int) -> dict[str, np.ndarray]:
    """A row of one segment."""
    (inputs,), (mask,) = padded.pad([ids], length)
    positions = np.arange(length, dtype=np.int32)
    return {"inputs": inputs, "targets": inputs, "positions": positions, "segments": mask, "mask": mask}


def of_speed(model, params, calibration) -> dict:
    by_name = {"float32": params}
    for scheme in SPEEDS:
        chosen = post_training.rules(scheme, "int8")
        by_name[scheme] = jax.jit(lambda p, chosen=chosen: post_training.quantize_params(p, chosen, "the experiment"))(
            params
        )
    return measure.speeds(model, by_name, calibration[0]["inputs"][:32].tolist(), 64, 5)


def of_smollm2(directory: pathlib.Path, config, origins: list[Provenance]) -> dict[str, Any]:
    """Its file is Q4_1: 8 bits only, and labelled so."""
    model, params, tokenizer = checkpoints.load("asset:smollm2-135m-instruct")
    source = Source(dataclasses.replace(config.data, source="asset:shakespeare"), whole=True)
    held = Rows(source.corpus(tokenizer).validation, 256)
    rows = [held[int(i)] for i in np.linspace(0, held.full - 1, 16).astype(int)]
    cells = {cell.name: functools.partial(measure_cell, model, params, cell, [], rows) for cell in LABELLED}
    return experiments.measure_all(directory, cells, origins)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, {"rows": 3, "calibration": 2, "sentences": 3, "smollm2": False}))
