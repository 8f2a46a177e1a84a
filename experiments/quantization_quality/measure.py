"""Figures of a quantized model compared with the same model in full precision, on the same text."""

import functools
import math
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from experiments import decoders
from llm_jax import checkpoints, tokenizers, trees, weights
from llm_jax.checkpoints import Loaded, gguf, gguf_model
from llm_jax.data.rows import Row
from llm_jax.decoding import loop, samplers
from llm_jax.embeddings import contextual
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
        flat, directory = trees.flatten(params), pathlib.Path(finished)
        return calibrate.quantize_layers(model, flat, planned, rows, options, directory)[0]


def expanded(params: Any) -> Any:
    """Dequantizes weight-only formats, so that one compiled program serves all schemes; others are unchanged."""

    def expand(path: str, w: Any) -> Any:
        activations = weights.is_quantized(w) and number_formats.scheme(w.scheme).activations
        return w if activations else weights.dense(w)

    return trees.map_weights(expand, params)


def of_scheme(loaded: Loaded, name: str, calibration: Sequence[Row], rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of `against` for a scheme and a method, with bytes and bits per weight."""
    quantized = quantize(loaded.model, loaded.params, name, calibration)
    matrices = [w for w in trees.flatten(quantized).values() if weights.is_quantized(w)]
    sizes = {"bytes": weights.num_bytes(quantized), "bits": bits((weights.num_bytes(w), w.shape) for w in matrices)}
    return against(loaded, expanded(quantized), rows) | sizes


def of_full_precision(loaded: Loaded, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of the model itself, without bits."""
    return against(loaded, loaded.params, rows) | {"bytes": weights.num_bytes(loaded.params)}


def bits(matrices: Iterable[tuple[int, tuple[int, ...]]]) -> float:
    """The bits per entry of matrices, which are given by their bytes and shapes."""
    num_bytes, shapes = zip(*matrices, strict=True)
    return 8 * sum(num_bytes) / sum(map(math.prod, shapes))


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
        tensors = list(gguf.read(path).tensors.values())
        sizes = [(tensor.rows().nbytes, tensor.shape) for tensor in tensors]
        figures = against(loaded, checkpoints.load(path).params, rows)
    total = sum(num_bytes for num_bytes, _ in sizes)
    return figures | {"bytes": total, "bits": bits(size for size in sizes if len(size[1]) == 2)}


def against(loaded: Loaded, params: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures of other weights of a model on rows of text, per counted target.

    Returns:
      loss: nats per token of every row (a list, for intervals paired by row), and `full_loss` of the full model.
      perplexity, kl (full || quantized, nats), agreement (share of equal greedy tokens): means over targets.
    """
    sums = []
    for start in range(0, len(rows), _BATCH):
        sums.append(_compare(loaded.model, loaded.params, params, decoders.stack(rows[start : start + _BATCH])))
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
    vectors = contextual.sentence_vectors(loaded._replace(params=expanded(quantized)), sentences)
    cosines = np.sum(full * vectors, 1)
    pairs = np.triu_indices(len(full), 1)
    order = stats.spearmanr((full @ full.T)[pairs], (vectors @ vectors.T)[pairs]).statistic
    means = {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min()), "order": float(order)}
    return means | {"bytes": weights.num_bytes(quantized)}


def speeds(
    loaded: Loaded, schemes: Sequence[str], prompt: Sequence[int], tokens: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """Greedy decoding of one row: {"float32" or scheme: {"tokens_per_second" of each repeat, bytes, ...}}."""
    models = {"float32": loaded.params}
    for scheme in schemes:
        rules = post_training.rules(scheme, "int8")
        models[scheme] = post_training.quantize_params(loaded.params, rules, "the experiment")

    def generate(params: Any) -> float:
        began = time.perf_counter()
        loop.generate(loaded.model, params, [prompt], samplers.Sampler(greedy=True), max_new_tokens=tokens)
        return tokens / (time.perf_counter() - began)

    rates = experiments.in_turns({name: functools.partial(generate, p) for name, p in models.items()}, repeats)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    forward = jax.jit(lambda params, tokens: loaded.model.apply({"params": params}, tokens))
    return {
        name: {
            "tokens_per_second": rates[name],
            "bytes": weights.num_bytes(params),
            "temporary_bytes": memory.of_executable(forward.lower(params, token).compile()).temporaries,
            "median": float(np.median(rates[name])),
        }
        for name, params in models.items()
    }
