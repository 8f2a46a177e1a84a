"""Quantizes parameters by rules that select a scheme for each weight by its name. Pure functions."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax import extensions, trees, weights
from llm_jax.errors import UserError
from llm_jax.kernels import number_formats
from llm_jax.schema import QuantConfig, Rules
from llm_jax.weights import IN, OUT, Encoded, FakeQuant, QTensor, quantized

# Never quantized by default: vectors, and small tables that are only added to activations.
_DENSE = r".*norm/.*|.*_bias|(.*/)?position_.*|embed/types"
_TABLES = r"embed/table|head/kernel"


def rules(scheme: str, head: str, first: Rules = ()) -> Rules:
    """Returns the rules of a quantization as (pattern, scheme) pairs; the first match applies.

    Args:
      scheme: for all weights that no other rule matches; "": not quantized.
      head: for embeddings and output head; "": not quantized.
      first: rules that precede the default rules, which leave norms and biases dense.
    """
    return (*first, (_DENSE, ""), (_TABLES, head), (r".*", scheme))


def plan(params: Any, chosen: Rules, source: str) -> dict[str, str]:
    """The scheme of every weight, "" for weights that stay dense: {path: scheme}; with hashes, see `custom_format`.

    Args:
      params: in any layout; may be abstract.
      source: config key or flags of the rules, for error messages.

    Raises:
      UserError: a rule matches nothing or names an unknown scheme, a group does not divide the inputs of a weight, a
        custom format returns wrong shapes, or a weight is not a matrix or is quantized already.
    """
    matched = trees.match(chosen, params, source)
    for text in {text for name in matched.values() for text in extensions.specifications(name)}:
        extensions.load("scheme", text)  # the file may have changed since its use
    for path, weight in trees.flatten(params).items():
        name = matched[path]
        if not isinstance(name, str):
            raise UserError(f"{source}: {name!r} for '{path}'; expected the name of a scheme, or '' for none")
        if not name:
            continue
        s = number_formats.scheme(name)
        if isinstance(weight, (QTensor, Encoded, FakeQuant)):
            raise UserError(f"{source}: '{path}' is quantized already ({weight.scheme}); start from the full weights")
        if isinstance(weight, weights.Node):
            raise UserError(f"{source}: '{path}' has adapters ({type(weight).__name__}); merge them first")
        if len(weight.shape) - (trees.layers_of(path) is not None) != 2:
            raise UserError(
                f"{source}: '{path}' of shape {tuple(weight.shape)} is not a matrix; exclude it with the "
                f"rule ('{path}', '')"
            )
        if reason := number_formats.unsupported_reason(s, weight.shape[axis(path)]):
            raise UserError(f"{source}: {name} for '{path}': {reason}")
        if s.custom:
            s.custom.check(tuple(weight.shape[-2:]), axis(path))
            matched[path] = s.custom.specification
    return matched


def axis(path: str) -> int:
    """The axis of the groups of a weight: OUT for embedding tables, which are read by rows, IN for all others."""
    return OUT if path.startswith("embed/") else IN


def quantize_params(params: Any, chosen: Rules, source: str) -> dict[str, Any]:
    """Quantizes every weight by its scheme with absmax scales. Works under `jit`.

    Outside of `jit` the temporary arrays of one weight at a time are allocated.

    Raises:
      UserError: see `plan`; or a scheme with static activations, whose scale needs calibration.
    """
    planned = plan(params, chosen, source)
    for path, name in planned.items():
        if name and number_formats.scheme(name).activations == "static":
            raise UserError(f"{source}: {name} for '{path}' needs calibration; see python -m llm_jax.quantize")

    def quantize_weight(path: str, weight: Any) -> Any:
        stacked = trees.layers_of(path) is not None
        return _rounded(weight, planned[path], axis(path), stacked) if planned[path] else weight

    return trees.map_weights(quantize_weight, params)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(weight: jax.Array, scheme: str, axis: int, stacked: bool) -> Any:
    """Quantizes stacked layers one after the other, because NF4 needs temporary arrays of twice their size."""
    quantize_layer = functools.partial(quantized.quantize, scheme=scheme, axis=axis)
    return jax.lax.map(quantize_layer, weight) if stacked else quantize_layer(weight)


def quantize_base(params: Any, config: QuantConfig) -> Any:
    """The frozen base of adapters, quantized by `quant.scheme`; unchanged if it is ""."""
    if not config.scheme:
        return params
    return quantize_params(params, rules(config.scheme, config.head, config.rules), "quant")


def replace_fake_quant(params: Any) -> dict[str, Any]:
    """The parameters with every `FakeQuant`, nested ones included, replaced by its quantized weight."""

    def finish_node(node: Any) -> Any:
        return node.quantized() if isinstance(node, FakeQuant) else node

    return jax.tree.map(finish_node, params, is_leaf=lambda node: isinstance(node, FakeQuant))


def is_quantization_aware(params: Any) -> bool:
    """Whether the parameters were trained under `quant.qat`: whether any weight is a `FakeQuant`."""
    return any(isinstance(weight, FakeQuant) for weight in trees.flatten(params).values())


def check_finite(params: Any, source: str) -> None:
    """Checks that all numbers and scales are finite.

    Raises:
      UserError: a weight has infinite or NaN values; the message names the first.
    """
    for path, weight in trees.flatten(params).items():
        for leaf in jax.tree.leaves(weight):
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))):
                raise UserError(f"{source}: '{path}' has infinite or NaN values")


def unsupported_reason(name: str) -> str:
    """The reason why the default backend cannot run a scheme, or "". Compiles and runs a small product."""
    s = number_formats.scheme(name)
    if s.custom:  # operations of XLA, for the shapes that it has been checked with
        return ""
    size = max(s.group, 32)
    input_scale = jnp.float32(1) if s.activations == "static" else None

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return weights.dot(x, quantized.to_qtensor(w, name, IN, input_scale=input_scale))

    try:
        jax.block_until_ready(jax.jit(product)(jnp.ones((size, 32)), jnp.ones((2, size))))
    except Exception as error:  # a backend's compiler may raise any exception
        return f"{jax.default_backend()} cannot run {name} ({str(error).splitlines()[0][:120]})"
    return ""


def replace_unsupported(params: Any, planned: dict[str, str], fallback: str) -> dict[str, str]:
    """Replaces schemes that the backend does not support by `fallback`.

    Raises:
      UserError: the backend does not support a scheme and there is no fallback, or the fallback does not fit.
    """
    reasons = {name: unsupported_reason(name) for name in sorted(set(planned.values())) if name}
    bad = {name: reason for name, reason in reasons.items() if reason}
    for reason in bad.values():
        if not fallback:
            raise UserError(f"{reason}; choose another scheme, or --fallback=SCHEME")
        print(f"note: {reason}; using {fallback}")
    replaced = tuple((re.escape(path), fallback if name in bad else name) for path, name in planned.items())
    return plan(params, replaced, "--fallback") if bad else planned


@dataclasses.dataclass(frozen=True)
class WeightSummary:
    """Scheme, size and error of one weight, a row of the table that `llm_jax.quantize` prints.

    Attributes:
      bits: bits per entry of the weight, including scales.
      bytes: size in bytes, including scales.
      error: norm of the quantization error over the norm of the weight.
      output_error: the same for the outputs of the weight on the calibration text, or None.
    """

    path: str
    scheme: str
    shape: tuple[int, ...]
    bits: float
    bytes: int
    error: float
    output_error: float | None = None


def summaries(params: Any) -> list[WeightSummary]:
    """A summary of every weight of finished parameters, with an error of 0."""
    weights_by_path = trees.flatten(params).items()
    return [
        WeightSummary(
            path, getattr(w, "scheme", ""), tuple(w.shape), quantized.bits_per_weight(w), weights.num_bytes(w), 0.0
        )
        for path, w in weights_by_path
    ]


def table(rows: list[WeightSummary]) -> str:
    """Formats the summaries as a table with one line per weight and the totals."""
    width = max([32, *(len(row.path) for row in rows)])
    head = f"{'weight':<{width}} {'scheme':<16} {'shape':<16} {'bits':>7} {'error':>8} {'output':>8} {'bytes':>12}"
    lines = [
        f"{r.path:<{width}} {r.scheme or '-':<16} {r.shape!s:<16} {r.bits:>7.3f} {r.error:>8.4f} "
        f"{'' if r.output_error is None else f'{r.output_error:.4f}':>8} {r.bytes:>12,}"
        for r in rows
    ]
    size, count = sum(r.bytes for r in rows), sum(math.prod(r.shape) for r in rows)
    return "\n".join([head, *lines, f"{count:,} weights in {size:,} bytes: {8 * size / count:.3f} bits per weight"])
