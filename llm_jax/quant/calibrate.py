"""Quantizes a model layer by layer. Each layer is calibrated on the outputs of the quantized layers before it.

In addition to the model, the memory contains the inputs of one layer, their statistics (an I x I matrix for each weight
(I, O)) and the new weights of the layer. Finished layers are written to a directory, from which an interrupted command
resumes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llm_jax import trees, weights
from llm_jax.data import masking
from llm_jax.data.kinds import open_source
from llm_jax.data.rows import ROWS, Row, Shuffled
from llm_jax.errors import UserError
from llm_jax.kernels import number_formats
from llm_jax.model.attention import TokenMetadata
from llm_jax.model.layer_stack import Layer
from llm_jax.model.stages import layer_kinds
from llm_jax.model.transformer import Transformer
from llm_jax.quant import finished_layers, methods
from llm_jax.quant.post_training import WeightSummary, axis
from llm_jax.schema import Config, ModelConfig
from llm_jax.tokenizers import Tokenizer
from llm_jax.weights import Node, quantized

# Letters of shapes: B batch, T time, D width, I in, O out.


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """Options of a calibration.

    Attributes:
      method: a name of `methods.METHODS`, for the weights of layers. The embedding table and the head, whose inputs
        are not observed, are quantized by "mse" if the method needs calibration.
      act_order: whether gptq orders inputs by activation.
      batch_size: number of calibration rows per forward pass.
    """

    method: str
    act_order: bool
    batch_size: int


def needs_text(planned: Mapping[str, str], method: str) -> bool:
    """Whether calibration text is needed, by the method or by a scheme of `planned` with static activations."""
    return methods.METHODS[method][1] or any(
        name and number_formats.scheme(name).activations == "static" for name in planned.values()
    )


def calibration_rows(
    config: Config, source_name: str, tokenizer: Tokenizer, length: int, count: int
) -> tuple[list[Row], str]:
    """Returns (up to `count` rows of `length` tokens, sha256 of the calibration text).

    Args:
      config: configuration of the run that trained the model. Rows are prepared as in training; a masked language model
        is calibrated on rows with masked tokens.
      source_name: a source like `data.source`, of which the whole text is used; "" for the training text of the run.
      tokenizer: the tokenizer of the model.
      length: tokens per row.
      count: maximum number of rows.

    Raises:
      UserError: the text has fewer tokens than one row.
    """
    data = dataclasses.replace(config.data, source=source_name) if source_name else config.data
    source = open_source(data, whole=bool(source_name))
    corpus = source.corpus(tokenizer)
    split = corpus.validation if source_name else corpus.train
    if len(split.tokens) <= length:
        raise UserError(
            f"{data.source} has {len(split.tokens)} tokens, fewer than one calibration sequence of "
            f"{length}; lower --seq_len or use a longer text"
        )
    rows = ROWS[data.kind](split, length)
    shuffled = masking.row_masker(config.loss, tokenizer)(Shuffled(rows, 0), 0)
    return [shuffled[i] for i in range(min(count, rows.num_full))], corpus.sha256


def quantize_layers(
    model: Transformer,
    flat: dict[str, Any],
    planned: Mapping[str, str],
    rows: Sequence[Row],
    options: CalibrationOptions,
    finished: pathlib.Path,
) -> tuple[dict[str, Any], list[WeightSummary]]:
    """Quantizes the weights; returns (quantized parameters, one summary per weight).

    Args:
      model: the model of the parameters.
      flat: {path: dense weight}, one entry per layer (`layers/17/...`). Weights are removed from it as they are read.
      planned: {path: scheme, or "" for none}, see `post_training.plan`.
      rows: calibration rows of one length; may be empty unless `needs_text`.
      options: options of the calibration.
      finished: directory of finished layers, which are read instead of being quantized again. The caller ensures
        that they belong to this model and these options.

    Raises:
      UserError: a weight outside of the layers has a scheme with static activations.
    """
    batches = _embedded(model, flat, rows, options.batch_size) if rows else []  # the inputs of the next layer
    by_layer: dict[str, dict[str, Any]] = {}
    for path in list(flat):
        name = "/".join(path.split("/")[:2]) if path.startswith("layers/") else ""
        by_layer.setdefault(name, {})[path] = flat.pop(path)
    summaries: list[WeightSummary] = []
    params: dict[str, Any] = {}
    outside = by_layer.pop("", {})
    for path, w in tqdm(outside.items(), "tables and head", leave=False, delay=2, disable=None):
        if planned[path] and number_formats.scheme(planned[path]).activations == "static":
            raise UserError(f"{planned[path]} for '{path}': its inputs are not observed; choose a dynamic scheme")
        params[path], summary = _quantize_weight(path, w, planned[path], None, options)
        summaries.append(summary)
    kinds = layer_kinds(model.config)
    names = [f"layers/{i}" for i in range(len(kinds))]
    for name, kind in tqdm(zip(names, kinds, strict=True), "quantizing", len(kinds), unit="layer", disable=None):
        directory = finished / name.replace("/", "-")
        if directory.exists():
            tree, records = finished_layers.read(directory)
            layer = trees.flatten(tree)
            layer_summaries = [WeightSummary(**{**record, "shape": tuple(record["shape"])}) for record in records]
        else:
            arguments = (model.config, kind, name, by_layer.pop(name), planned, batches, options)
            layer, layer_summaries = _quantize_layer(*arguments)
            records = [dataclasses.asdict(summary) for summary in layer_summaries]
            finished_layers.write(directory, trees.unflatten(layer), records)
        params |= layer
        summaries += layer_summaries
        layer_params = trees.unflatten({path.removeprefix(f"{name}/"): w for path, w in layer.items()})
        for batch in batches:
            batch["x"] = jax.device_get(
                _forward(model.config, kind, layer_params, batch["x"], batch["metadata"], batch["bias"])
            )
    return trees.unflatten(params), summaries


def _quantize_layer(
    config: ModelConfig,
    kind: str,
    name: str,
    flat: Mapping[str, Any],
    planned: Mapping[str, str],
    batches: list[dict[str, Any]],
    options: CalibrationOptions,
) -> tuple[dict[str, Any], list[WeightSummary]]:
    """Quantizes one layer: returns ({path: weight}, summaries of the weights)."""
    layer = trees.unflatten({path.removeprefix(f"{name}/"): w for path, w in flat.items()})
    observed = tuple(path.removeprefix(f"{name}/") for path in flat if planned[path])
    total: dict[str, methods.InputStatistics] = {}
    for batch in batches:
        new = _observe(config, kind, observed, layer, batch["x"], batch["metadata"], batch["bias"])
        total = {key: methods.add(total[key], statistics) for key, statistics in new.items()} if total else new
    params, summaries = {}, []
    for path, w in flat.items():
        statistics = total.get(path.removeprefix(f"{name}/"))
        params[path], summary = _quantize_weight(path, w, planned[path], statistics, options)
        summaries.append(summary)
    return params, summaries


def _quantize_weight(
    path: str, w: Any, scheme: str, inputs: methods.InputStatistics | None, options: CalibrationOptions
) -> tuple[Any, WeightSummary]:
    """Returns (the weight, quantized by `scheme` unless it is "", and its summary)."""
    if not scheme:
        return w, WeightSummary(path, "", tuple(w.shape), quantized.bits_per_weight(w), weights.num_bytes(w), 0.0)
    method = options.method if inputs is not None or not methods.METHODS[options.method][1] else "mse"
    method = "absmax" if number_formats.scheme(scheme).custom else method
    q = _quantize(w.astype(jnp.float32), inputs, method, scheme, axis(path), options.act_order)
    error, output = jax.device_get(_errors(w, q, inputs))
    output_error = None if inputs is None else float(output)
    return q, WeightSummary(
        path, scheme, q.shape, quantized.bits_per_weight(q), weights.num_bytes(q), float(error), output_error
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _quantize(w, inputs, method, scheme, axis, act_order):
    return methods.METHODS[method][0](w, scheme, axis, inputs, act_order)


@jax.jit
def _errors(w: jax.Array, q: Any, inputs: methods.InputStatistics | None) -> tuple[jax.Array, jax.Array]:
    """The relative errors of the weight w (I, O), in the Frobenius norm, and of its outputs: float32 () each."""
    w = w.astype(jnp.float32)
    error = jnp.linalg.norm(q.dense() - w) / jnp.maximum(jnp.linalg.norm(w), 1e-30)
    if inputs is None:
        return error, jnp.float32(0)
    energy = jnp.sum((inputs.gram @ w) * w)
    return error, jnp.sqrt(jnp.maximum(jnp.sum(methods.objective(w, q, inputs)), 0) / jnp.maximum(energy, 1e-30))


def _embedded(model: Transformer, flat: Mapping[str, Any], rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
    """The inputs of the first layer, one dictionary per batch, on the host: {"metadata", "x", "bias"} of `Layer`."""

    @jax.jit
    def embed(params: Any, tokens: jax.Array, metadata: TokenMetadata) -> tuple[jax.Array, jax.Array | None]:
        def inputs(m: Transformer) -> tuple[jax.Array, jax.Array | None]:
            return m.embed(tokens, metadata, None), m.embed.bias(metadata, metadata)

        outputs: Any = model.apply({"params": params}, method=inputs)
        return outputs

    params = trees.unflatten({path: w for path, w in flat.items() if path.startswith("embed/")})
    batches = []
    for batch in _batches(rows, size):
        metadata = TokenMetadata(jnp.asarray(batch["positions"]), jnp.asarray(batch["segments"]))
        x, bias = jax.device_get(embed(params, batch["inputs"], metadata))
        batches.append({"metadata": metadata, "x": x, "bias": bias})
    return batches


def _batches(rows: Sequence[Row], size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def _apply(config, kind, layer, x, metadata, bias):
    return Layer(config, kind).apply({"params": layer}, x, metadata, metadata, bias, None, None)[0]


_forward = jax.jit(_apply, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _observe(config, kind, observed, layer, x, metadata, bias) -> dict[str, methods.InputStatistics]:
    """{path: statistics of the inputs} of the weights of a layer whose paths are in `observed`."""
    inputs: dict[str, jax.Array] = {}

    def record(path: str, weight: Any) -> Any:
        return _Observed(weight, functools.partial(inputs.__setitem__, path)) if path in observed else weight

    _apply(config, kind, trees.map_weights(record, layer), x, metadata, bias)  # in the trace of this function
    mask = metadata.segments > 0
    return {path: methods.observe(array, mask) for path, array in inputs.items()}


@trees.register
@dataclasses.dataclass(frozen=True)
class _Observed(Node):
    """A weight that passes its inputs to `record` while its matrix product is traced."""

    weight: Any
    record: Callable[[jax.Array], None] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        self.record(x)
        return weights.dot(x, self.weight, transposed, out_dtype=out_dtype, accumulate=accumulate)

    def take(self, ids: jax.Array) -> jax.Array:
        return weights.take(self.weight, ids)

    def dense(self) -> jax.Array:
        return weights.dense(self.weight)

    def partition(self, spec: Any) -> "_Observed":
        return _Observed(weights.partition(self.weight, spec), self.record)
