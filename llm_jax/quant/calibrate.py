"""Quantization of a model layer by layer, each calibrated on what the quantized layers before it give.

One layer's inputs, its statistics (a matrix of the square of the width of each input) and its new
weights are all that exists beside the model. Finished layers are kept in a directory, so that an
interrupted command goes on with the next one.
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
from llm_jax.model.attention import Tokens
from llm_jax.model.stages import layer_kinds
from llm_jax.model.transformer import Layer, Transformer
from llm_jax.quant import methods, partial
from llm_jax.quant.post_training import WeightSummary, axis
from llm_jax.schema import Config, ModelConfig
from llm_jax.tokenizers import Tokenizer
from llm_jax.weights import Node, quantized

# Letters of shapes: B batch, T time, D width, I in, O out.


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """Of a run.

    Attributes:
      method: a name of `methods.METHODS`, for the weights of layers; tables and the head, whose inputs are not
        observed, take "mse" where it needs calibration.
      act_order: of gptq.
      batch_size: rows at a time.
    """

    method: str
    act_order: bool
    batch_size: int


def needs_text(planned: Mapping[str, str], method: str) -> bool:
    """Whether a method, or a scheme with static activations, takes calibration."""
    return methods.METHODS[method][1] or any(
        n and number_formats.scheme(n).activations == "static" for n in planned.values()
    )


def text(config: Config, given: str, tokenizer: Tokenizer, length: int, count: int) -> tuple[list[Row], str]:
    """(up to `count` rows of `length` tokens, sha256 of the text they are from).

    Args:
      config: of a run, whose training text is taken unless another is `given`. The rows are as its training and
        evaluation see them: an encoder that finds hidden tokens is calibrated on text with hidden tokens.

    Raises:
      UserError: the text has fewer tokens than one row.
    """
    data = dataclasses.replace(config.data, source=given) if given else config.data
    source = open_source(data, whole=bool(given))
    corpus = source.corpus(tokenizer)
    split = corpus.validation if given else corpus.train
    if len(split.tokens) <= length:
        raise UserError(
            f"{data.source} has {len(split.tokens)} tokens, fewer than one calibration sequence of "
            f"{length}; lower --seq_len or bring more text"
        )
    rows = ROWS[data.kind](split, length)
    shuffled = masking.hider(config.loss, tokenizer)(Shuffled(rows, 0), 0)
    return [shuffled[i] for i in range(min(count, rows.full))], corpus.sha256


def run(
    model: Transformer,
    flat: dict[str, Any],
    planned: Mapping[str, str],
    rows: Sequence[Row],
    options: CalibrationOptions,
    finished: pathlib.Path,
) -> tuple[dict[str, Any], list[WeightSummary]]:
    """(quantized parameters, a line of the table per weight).

    Args:
      flat: the dense parameters by path, one entry per layer (`layers/17/...`); emptied on the way.
      planned: the scheme of every path, "" for none (`quantize.plan`).
      rows: the calibration text, of one length; may be empty where `needs_text` is not so.
      finished: where finished layers are kept and found again; the caller sees to it that they belong here.

    Raises:
      UserError: a scheme with static activations for a weight that no layer holds.
    """
    streams = _embedded(model, flat, rows, options.batch_size) if rows else []
    by_layer: dict[str, dict[str, Any]] = {}
    for path in list(flat):
        name = "/".join(path.split("/")[:2]) if path.startswith("layers/") else ""
        by_layer.setdefault(name, {})[path] = flat.pop(path)
    lines: list[WeightSummary] = []
    made: dict[str, Any] = {}
    outside = by_layer.pop("", {})
    for path, w in tqdm(outside.items(), "tables and head", leave=False, delay=2, disable=None):
        if planned[path] and number_formats.scheme(planned[path]).activations == "static":
            raise UserError(f"{planned[path]} for '{path}': its inputs are not observed; choose a dynamic scheme")
        made[path], line = _one(path, w, planned[path], None, options)
        lines.append(line)
    kinds = layer_kinds(model.config)
    names = [f"layers/{i}" for i in range(len(kinds))]
    for name, kind in tqdm(zip(names, kinds, strict=True), "quantizing", len(kinds), unit="layer", disable=None):
        place = finished / name.replace("/", "-")
        if place.exists():
            tree, said = partial.read(place)
            layer = trees.flatten(tree)
            found = [WeightSummary(**{**line, "shape": tuple(line["shape"])}) for line in said]
        else:
            layer, found = _layer(model.config, kind, name, by_layer.pop(name), planned, streams, options)
            partial.write(place, trees.unflatten(layer), [dataclasses.asdict(line) for line in found])
        made |= layer
        lines += found
        local = trees.unflatten({path.removeprefix(f"{name}/"): w for path, w in layer.items()})
        for stream in streams:
            stream["x"] = jax.device_get(
                _forward(model.config, kind, local, stream["x"], stream["where"], stream["bias"])
            )
    return trees.unflatten(made), lines


def _layer(
    config: ModelConfig,
    kind: str,
    name: str,
    flat: Mapping[str, Any],
    planned: Mapping[str, str],
    streams: list[dict[str, Any]],
    options: CalibrationOptions,
) -> tuple[dict[str, Any], list[WeightSummary]]:
    """The quantized weights of one layer: {path: weight}, and their lines."""
    local = trees.unflatten({path.removeprefix(f"{name}/"): w for path, w in flat.items()})
    watched = tuple(path.removeprefix(f"{name}/") for path in flat if planned[path])
    seen: dict[str, methods.InputStatistics] = {}
    for stream in streams:
        found = _watch(config, kind, watched, local, stream["x"], stream["where"], stream["bias"])
        seen = {key: methods.add(seen[key], one) for key, one in found.items()} if seen else found
    made, lines = {}, []
    for path, w in flat.items():
        made[path], line = _one(path, w, planned[path], seen.get(path.removeprefix(f"{name}/")), options)
        lines.append(line)
    return made, lines


def _one(
    path: str, w: Any, scheme: str, inputs: methods.InputStatistics | None, options: CalibrationOptions
) -> tuple[Any, WeightSummary]:
    """A weight by its scheme ("": as it is), and its line."""
    if not scheme:
        return w, WeightSummary(path, "", tuple(w.shape), quantized.bits_per_weight(w), quantized.num_bytes(w), 0.0)
    method = options.method if inputs is not None or not methods.METHODS[options.method][1] else "mse"
    q = _quantize(w.astype(jnp.float32), inputs, method, scheme, axis(path), options.act_order)
    error, output = jax.device_get(_errors(w, q, inputs))
    shown = None if inputs is None else float(output)
    return q, WeightSummary(
        path, scheme, q.shape, quantized.bits_per_weight(q), quantized.num_bytes(q), float(error), shown
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _quantize(w, inputs, method, scheme, axis, act_order):
    return methods.METHODS[method][0](w, scheme, axis, inputs, act_order)


@jax.jit
def _errors(w: jax.Array, q: Any, inputs: methods.InputStatistics | None) -> tuple[jax.Array, jax.Array]:
    """Relative change of the weight, and of its outputs."""
    w = w.astype(jnp.float32)
    error = jnp.linalg.norm(q.dense() - w) / jnp.maximum(jnp.linalg.norm(w), 1e-30)
    if inputs is None:
        return error, jnp.float32(0)
    whole = jnp.sum((inputs.gram @ w) * w)
    return error, jnp.sqrt(jnp.maximum(jnp.sum(methods.objective(w, q, inputs)), 0) / jnp.maximum(whole, 1e-30))


def _embedded(model: Transformer, flat: Mapping[str, Any], rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
    """The inputs of the first layer in batches, kept on the host: what stands where, features, biases of scores."""

    @jax.jit
    def embed(params: Any, tokens: jax.Array, where: Tokens) -> tuple[jax.Array, jax.Array | None]:
        def both(m: Transformer) -> tuple[jax.Array, jax.Array | None]:
            return m.embed(tokens, where, None), m.embed.bias(where, where)

        found: Any = model.apply({"params": params}, method=both)
        return found

    params = trees.unflatten({path: w for path, w in flat.items() if path.startswith("embed/")})
    streams = []
    for part in _parts(rows, size):
        where = Tokens(jnp.asarray(part["positions"]), jnp.asarray(part["segments"]))
        x, bias = jax.device_get(embed(params, part["inputs"], where))
        streams.append({"where": where, "x": x, "bias": bias})
    return streams


def _parts(rows: Sequence[Row], size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield {name: np.stack([row[name] for row in part]) for name in part[0]}


def _apply(config, kind, layer, x, where, bias):
    return Layer(config, kind).apply({"params": layer}, x, where, where, bias, None, None)[0]


_forward = jax.jit(_apply, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _watch(config, kind, watched, layer, x, where, bias) -> dict[str, methods.InputStatistics]:
    """Runs a layer, and gives what the weights at the paths `watched` were multiplied by."""
    tape: dict[str, jax.Array] = {}

    def watch(path: str, weight: Any) -> Any:
        return _Watched(weight, functools.partial(tape.__setitem__, path)) if path in watched else weight

    _apply(config, kind, trees.map_weights(watch, layer), x, where, bias)  # within this very trace
    counted = where.segments > 0
    return {path: methods.observe(seen, counted) for path, seen in tape.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Watched(Node):
    """A weight that notes what it is multiplied by, while its product is traced."""

    weight: Any
    note: Callable[[jax.Array], None] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def dot(self, x: jax.Array, transposed: bool, out_dtype: Any, accumulate: Any) -> jax.Array:
        self.note(x)
        return weights.dot(x, self.weight, transposed, out_dtype=out_dtype, accumulate=accumulate)

    def take(self, ids: jax.Array) -> jax.Array:
        return weights.take(self.weight, ids)

    def dense(self) -> jax.Array:
        return weights.dense(self.weight)

    def partition(self, spec: Any) -> "_Watched":
        return _Watched(weights.partition(self.weight, spec), self.note)
