"""What quantization costs: figures of a model against the same model in full precision, on the same text."""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import padded
from llm_jax import trees, weights
from llm_jax.checkpoints import gguf_blocks
from llm_jax.data.rows import Row
from llm_jax.decoding import loop, samplers
from llm_jax.kernels import blocks, number_formats
from llm_jax.model.attention import Tokens
from llm_jax.model.transformer import Transformer
from llm_jax.quant import calibrate, post_training

# Letters of shapes: B batch, T time, V vocabulary.

_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to quantize a model. Schemes of ggml ("ggml Q4_0") have no method but their own."""

    scheme: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.scheme} {self.method}".strip()


def quantize_model(
    model: Transformer, params: Any, cell: Cell, rows: Sequence[Row], head: str = "int8"
) -> tuple[Any, int]:
    """(parameters, bytes of the matrices): one entry per layer; `params` stays as it is."""
    if cell.scheme.startswith("ggml "):
        quantized = _ggml(params, cell.scheme.removeprefix("ggml "))
    else:
        planned = post_training.plan(params, post_training.rules(cell.scheme, head), "the experiment")
        options = calibrate.CalibrationOptions(cell.method, True, _BATCH)
        rows = rows if calibrate.needs_text(planned, cell.method) else []
        with tempfile.TemporaryDirectory() as finished:
            quantized, _ = calibrate.run(model, trees.flatten(params), planned, rows, options, pathlib.Path(finished))
    return quantized, weights.num_bytes(quantized)


def _ggml(params: Any, kind: str) -> Any:
    """Matrices as ggml's own rounding makes them (`kernels.blocks`), kept as QTensors; tables in Q8_0."""

    def one(path: str, w: jax.Array) -> Any:
        if w.ndim < 2:
            return w
        table = path in ("embed/table", "head/kernel")
        name, turned = "Q8_0" if table else kind, post_training.axis(path) == weights.IN
        rows = np.asarray(w, np.float32)
        encoded = blocks.encode(name, np.ascontiguousarray(rows.T if turned else rows))
        return jax.tree.map(jnp.asarray, gguf_blocks.from_rows(name, encoded, turned))

    return trees.map_weights(one, params)


def expanded(params: Any) -> Any:
    """Weights that are only stored as codes as the numbers these stand for; one compiled program serves them all."""

    def one(path: str, w: Any) -> Any:
        if weights.is_quantized(w) and number_formats.scheme(w.scheme).activations:
            return w
        return weights.dense(w)

    return trees.map_weights(one, params)


def against(model: Transformer, full: Any, params: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures on rows of text, per counted target.

    Returns:
      loss: nats a token of every row (a list, for intervals paired by row), and `full_loss` of the full model.
      perplexity, kl (full || quantized, nats), agreement (share of equal greedy tokens): means over targets.
    """
    sums = [_compare(model, full, params, part) for part in _parts(rows)]
    counts, full_nats, nats, kl, same = (np.concatenate([np.asarray(s[i]) for s in sums]) for i in range(5))
    total = counts.sum()
    return {
        "loss": (nats / counts).tolist(),
        "full_loss": (full_nats / counts).tolist(),
        "perplexity": float(np.exp(nats.sum() / total)),
        "kl": float(kl.sum() / total),
        "agreement": float(same.sum() / total),
    }


@functools.partial(jax.jit, static_argnums=0)
def _compare(model: Transformer, full: Any, params: Any, part: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
    where = Tokens(part["positions"], part["segments"])
    mask = part["mask"].astype(jnp.float32)

    def logs(params: Any) -> jax.Array:
        logits: Any = model.apply({"params": params}, part["inputs"], where)
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    p, q = logs(full), logs(params)
    picked = lambda a: -jnp.take_along_axis(a, part["targets"][..., None], -1)[..., 0]  # noqa: E731
    per_token = (
        jnp.ones_like(mask),
        picked(p),
        picked(q),
        jnp.sum(jnp.exp(p) * (p - q), -1),
        p.argmax(-1) == q.argmax(-1),
    )
    return tuple(jnp.sum(a * mask, 1) for a in per_token)


def _parts(rows: Sequence[Row]):
    for start in range(0, len(rows), _BATCH):
        yield {name: np.stack([row[name] for row in rows[start : start + _BATCH]]) for name in rows[0]}


def vectors(model: Transformer, params: Any, sentences: Sequence[Sequence[int]]) -> np.ndarray:
    """Sentence vectors as all-MiniLM-L6-v2 makes them: the mean over tokens, of length 1; (sentences, width)."""
    ids, mask = padded.pad(sentences)
    means = [_mean(model, params, ids[i : i + 16], mask[i : i + 16]) for i in range(0, len(ids), 16)]
    vectors = np.concatenate(means)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


_mean = jax.jit(padded.mean_features, static_argnums=0)


def compare_vectors(full: np.ndarray, quantized: np.ndarray) -> dict[str, float]:
    """Cosine to the full vectors (mean, least), and Spearman's correlation of the similarities of all pairs."""
    cosines = np.sum(full * quantized, 1)
    above = np.triu_indices(len(full), 1)
    order = stats.spearmanr((full @ full.T)[above], (quantized @ quantized.T)[above]).statistic
    return {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min()), "order": float(order)}


def speeds(
    model: Transformer, by_name: dict[str, Any], prompt: Sequence[int], tokens: int, repeats: int
) -> dict[str, Any]:
    """Decoding, greedy, one row: {name: {"tokens_per_second": one of each repeat, "bytes", "temporary_bytes"}}.

    Repeats go round the models, so that what else the machine does falls on all of them alike.
    """

    def generate(params: Any) -> float:
        began = time.perf_counter()
        loop.generate(model, params, [list(prompt)], samplers.Sampler(greedy=True), max_new_tokens=tokens)
        return tokens / (time.perf_counter() - began)

    figures: dict[str, Any] = {}
    for name, params in by_name.items():
        generate(params)
        figures[name] = {
            "tokens_per_second": [],
            "bytes": weights.num_bytes(params),
            "temporary_bytes": _temporary(model, params),
        }
    for _ in range(repeats):
        for name, params in by_name.items():
            figures[name]["tokens_per_second"].append(generate(params))
    for of_model in figures.values():
        of_model["median"] = statistics.median(of_model["tokens_per_second"])
    return figures


def _temporary(model: Transformer, params: Any) -> int:
    """What a forward pass of one token needs beside the weights, as compiled."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)).lower(params, one).compile()
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes)
