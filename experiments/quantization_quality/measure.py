"""Figures of a quantized model compared with the same model in full precision, on the same text."""

import functools
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import padded
from llm_jax import checkpoints, tokenizers, trees, weights
from llm_jax.checkpoints import Loaded, gguf, gguf_model
from llm_jax.data.rows import Row
from llm_jax.decoding import loop, samplers
from llm_jax.errors import UserError
from llm_jax.kernels import number_formats
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.transformer import Transformer
from llm_jax.quant import calibrate, post_training
from llm_jax.research import experiments
from llm_jax.training import memory

_BATCH = 4


def quantize(model: Transformer, params: Any, name: str, rows: Sequence[Row], batch_size: int = _BATCH) -> Any:
    """Quantized parameters, one entry per layer; `name` is a scheme and a method, such as "int4 gptq"."""
    scheme, method = name.split()
    planned = post_training.plan(params, post_training.rules(scheme, "int8"), "the experiment")
    options = calibrate.CalibrationOptions(method, True, batch_size)
    rows = rows if calibrate.needs_text(planned, method) else []
    with tempfile.TemporaryDirectory() as finished:
        return calibrate.quantize_layers(model, trees.flatten(params), planned, rows, options, pathlib.Path(finished))[
            0
        ]


def expanded(params: Any) -> Any:
    """Dequantizes weight-only formats, so that one compiled program serves all schemes; others are unchanged."""

    def expand(path: str, w: Any) -> Any:
        activations = weights.is_quantized(w) and number_formats.scheme(w.scheme).activations
        return w if activations else weights.dense(w)

    return trees.map_weights(expand, params)


def of_scheme(loaded: Loaded, name: str, calibration: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of `against` for a scheme and a method, with bytes and bits a weight."""
    quantized = quantize(loaded.model, loaded.params, name, calibration)
    matrices = [w for w in trees.flatten(quantized).values() if weights.is_quantized(w)]
    bits = 8 * sum(map(weights.num_bytes, matrices)) / sum(int(np.prod(w.shape)) for w in matrices)
    figures = against(loaded.model, loaded.params, expanded(quantized), rows)
    return figures | {"bytes": weights.num_bytes(quantized), "bits": bits}


def of_full_precision(loaded: Loaded, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of the model itself, without bits."""
    return against(loaded.model, loaded.params, loaded.params, rows) | {"bytes": weights.num_bytes(loaded.params)}


def of_gguf(loaded: Loaded, name: str, rows: Sequence[Row], llama_python: str) -> dict[str, Any]:
    """The figures of a GGUF file: llm_jax writes "ggml Q4_0", the quantizer of llama.cpp "llama.cpp Q4_0"."""
    maker, kind = name.split()
    with tempfile.TemporaryDirectory() as directory:
        path, quantized = pathlib.Path(directory, "exported.gguf"), pathlib.Path(directory, "quantized.gguf")
        kind_here = kind if maker == "ggml" else "F32"
        gguf_model.save(path, loaded.model.config, loaded.params, tokenizers.exportable(loaded.tokenizer), kind_here)
        if maker != "ggml":
            script = str(pathlib.Path(__file__).with_name("llama.py"))
            command = [llama_python, script, str(path), str(quantized), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"{llama_python} did not quantize to {kind}: {done.stderr.strip().splitlines()[-1:]}")
            path = quantized
        tensors = gguf.read(path).tensors.values()
        matrices = [t for t in tensors if len(t.shape) == 2]
        bits = 8 * sum(t.rows().nbytes for t in matrices) / sum(int(np.prod(t.shape)) for t in matrices)
        figures = against(loaded.model, loaded.params, checkpoints.load(path).params, rows)
        return figures | {"bytes": sum(t.rows().nbytes for t in tensors), "bits": bits}


def against(model: Transformer, full: Any, params: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures on rows of text, per counted target.

    Returns:
      loss: nats a token of every row (a list, for intervals paired by row), and `full_loss` of the full model.
      perplexity, kl (full || quantized, nats), agreement (share of equal greedy tokens): means over targets.
    """
    sums = []
    for start in range(0, len(rows), _BATCH):
        batch = {name: np.stack([row[name] for row in rows[start : start + _BATCH]]) for name in rows[0]}
        sums.append(_compare(model, full, params, batch))
    counts, full_nats, nats, kl, same = (np.concatenate(part) for part in zip(*sums, strict=True))
    total = counts.sum()
    return {
        "loss": (nats / counts).tolist(),
        "full_loss": (full_nats / counts).tolist(),
        "perplexity": float(np.exp(nats.sum() / total)),
        "kl": float(kl.sum() / total),
        "agreement": float(same.sum() / total),
    }


@functools.partial(jax.jit, static_argnums=0)
def _compare(model: Transformer, full: Any, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """Sums over the targets of each row, float32 (B,): 1, nats (full, quantized), KL, and equal greedy tokens."""
    mask = batch["mask"].astype(jnp.float32)
    outputs: list[Any] = [
        model.apply({"params": of_model}, batch["inputs"], TokenMetadata(batch["positions"], batch["segments"]))
        for of_model in (full, params)
    ]
    p, q = (jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in outputs)
    nats = [-jnp.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0] for logs in (p, q)]
    divergence = jnp.sum(jnp.exp(p) * (p - q), -1)
    same = p.argmax(-1) == q.argmax(-1)
    return tuple(jnp.sum(of_target * mask, 1) for of_target in (jnp.ones_like(mask), *nats, divergence, same))


def sentence_vectors(model: Transformer, params: Any, sentences: Sequence[Sequence[int]]) -> np.ndarray:
    """The mean over the tokens of each sentence, of length 1: (sentences, D)."""
    ids, mask = padded.pad(sentences)
    means = [_mean(model, params, ids[i : i + 16], mask[i : i + 16]) for i in range(0, len(ids), 16)]
    vectors = np.concatenate(means)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


_mean = jax.jit(padded.mean_features, static_argnums=0)


def of_sentence_vectors(
    loaded: Loaded, name: str, calibration: Sequence[Row], sentences: Sequence[Sequence[int]], full: np.ndarray
) -> dict[str, float]:
    """The figures of sentence vectors with a scheme and a method.

    Args:
      full: the vectors of the full model, (sentences, D).

    Returns:
      cosine, least_cosine: the mean and the least cosine to `full`.
      order: Spearman's correlation of the similarities of all pairs.
      bytes: of the weights.
    """
    quantized = quantize(loaded.model, loaded.params, name, calibration)
    vectors = sentence_vectors(loaded.model, expanded(quantized), sentences)
    cosines = np.sum(full * vectors, 1)
    pairs = np.triu_indices(len(full), 1)
    order = stats.spearmanr((full @ full.T)[pairs], (vectors @ vectors.T)[pairs]).statistic
    means = {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min()), "order": float(order)}
    return means | {"bytes": weights.num_bytes(quantized)}


def speeds(
    model: Transformer, by_name: Mapping[str, Any], prompt: Sequence[int], tokens: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """Greedy decoding of one row: {name: {"tokens_per_second": of each repeat, "bytes", "temporary_bytes", ...}}."""

    def generate(params: Any) -> float:
        began = time.perf_counter()
        loop.generate(model, params, [list(prompt)], samplers.Sampler(greedy=True), max_new_tokens=tokens)
        return tokens / (time.perf_counter() - began)

    computations = {name: functools.partial(generate, params) for name, params in by_name.items()}
    rates = experiments.in_turns(computations, repeats)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    forward = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    return {
        name: {
            "tokens_per_second": rates[name],
            "bytes": weights.num_bytes(params),
            "temporary_bytes": memory.of_executable(forward.lower(params, token).compile()).temporaries,
            "median": float(np.median(rates[name])),
        }
        for name, params in by_name.items()
    }
