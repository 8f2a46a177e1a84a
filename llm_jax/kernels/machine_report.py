"""Reports which kernels multiply quantized weights on this machine and why, tests them, and measures their speed."""

import functools
import itertools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels import cpu_attention, cpu_product, matmul, native, number_formats, pallas, target, tiles
from llm_jax.kernels.number_formats import Scheme

_TOLERANCE = 1e-5  # of a self-test, relative to the sum of the magnitudes of the terms of an output
_PALLAS_TOLERANCE = 1e-2  # of the kernels in Pallas: of the largest output; scales differ in the last bit
_AXIS = -2  # of the groups


def run(rows: int, inputs: int, outputs: int) -> int:
    """Prints the report.

    Args:
      rows: rows of activations of the second measurement; the first has one.
      inputs, outputs: size of the measured weight.

    Returns:
      The exit code: 1 if a kernel is wrong.
    """
    library = native.library()
    print(f"setting   {native.SETTING}={native.setting()}")
    if target.platform() != "cpu":
        _show_pallas(rows, inputs, outputs)
        return _check_pallas(rows, inputs, outputs)
    if library is None:
        reason = "the setting" if native.setting() in ("pallas", "xla") else native.loaded()[1]
        print(f"kernels   none, XLA computes everything: {reason}")
        _show_pallas(rows, inputs, outputs)
        return 0
    path = native.PATHS[library.llm_jax_fastest_path()]
    print(f"kernels   {library._name}")
    if reason := native.loaded()[1]:
        print(f"          compiled on this machine: {reason}")
    why = "the fastest on this CPU" if native.path_setting() == "auto" else f"set by {native.PATH_SETTING}"
    print(f"path      {path}: {why}; the paths are {', '.join(native.PATHS[1:])}")
    reason = native.amx_reason(library)
    print(f"amx       {f'not used: {reason}' if reason else 'used for 16 and more rows of 8-bit activations'}")
    reason = tiles.unusable_reason()
    print(f"layout    {f'rows of codes: {reason}' if reason else f'tiles of {tiles.OUTPUTS} outputs, from loading on'}")
    print(f"threads   of XLA, for {len(os.sched_getaffinity(0))} cores; JAX runs on {jax.default_backend()}")
    print("choices   by number of rows of activations; XLA computes more rows than a kernel supports")
    for name in number_formats.WEIGHT_SCHEMES:
        scheme = number_formats.scheme(name)
        codes, *rest = _request(name, 256, tiles.OUTPUTS)
        if scheme.activations:
            reason, limit = cpu_product.unsupported_integer_reason(jnp.ones((1, 256), jnp.int8), codes[0]), "any rows"
        else:
            reason = cpu_product.unsupported_reason(jnp.ones((1, 256)), codes, *rest)
            limit = f"1 to {cpu_product.max_rows(_laid_out(codes, scheme), scheme)} rows"
        print(f"  {name:<12} {f'XLA: {reason}' if reason else f'kernel, {limit}'}")
    print(f"  {'NAME+a8':<12} as NAME, with any rows of activations that are rounded to 8 bits (--activations=int8)")
    reason = cpu_attention.unsupported_reason(*_heads(256)[:2])
    most = cpu_attention.MAX_QUERIES
    print(f"  {'attention':<12} {f'XLA: {reason}' if reason else f'kernel, 1 to {most} queries over a cache'}")
    _show_pallas(rows, inputs, outputs)
    supported = [
        name
        for name in number_formats.WEIGHT_SCHEMES
        if not number_formats.scheme(name).activations
        and not cpu_product.unsupported_reason(jnp.ones((1, 256)), *_request(name, 256, 8))
    ]
    failed = self_test(supported)
    print(f"self-test {f'failed: {failed}' if failed else 'passed'}")
    _measure([name for name in ("int8", "int4", "int2", "nf4", "mxfp4") if name in supported], rows, inputs, outputs)
    return int(bool(failed))


def _show_pallas(rows: int, inputs: int, outputs: int) -> None:
    """Prints which matmuls, and transposed matmuls of the backward pass, the Pallas kernels compute."""
    print(f"pallas    here: {pallas.unusable_reason() or 'used'}; choices for {rows} rows of bfloat16 and a weight of")
    print(f"          {inputs} x {outputs}: first the matmul, then the transposed matmul of the backward pass")
    for platform in ("tpu", "gpu"):
        module = pallas.kernels(platform)
        for name in number_formats.WEIGHT_SCHEMES:
            s = number_formats.scheme(name)
            codes: Any = jax.eval_shape(lambda name=name: _request(name, inputs, outputs)[0])
            choices = []
            for contracted in (0, 1):
                x: Any = jax.ShapeDtypeStruct((rows, (inputs, outputs)[contracted]), jnp.bfloat16)
                if s.activations and contracted == 0:
                    reason = pallas.integer_reason(platform, x, codes[0], _AXIS)
                else:
                    reason = module.unsupported_reason(x, codes, s, _AXIS, contracted, jnp.float32)
                choices.append(f"XLA: {reason}" if reason else "kernel")
            print(f"  {platform}: {name:<12} {', '.join(choices)}")


def _check_pallas(rows: int, inputs: int, outputs: int) -> int:
    """Compares and measures the kernels in Pallas on a TPU or a GPU; returns the exit code."""
    if reason := pallas.unusable_reason():
        print(f"self-test none, XLA computes everything: {reason}")
        return 0
    names = [name for name in number_formats.WEIGHT_SCHEMES if not number_formats.scheme(name).activations]
    supported, failed = [], ""
    for name in names:
        codes, s, axis, *rest = _request(name, inputs, outputs)
        x = jax.random.normal(jax.random.key(1), (rows, inputs), jnp.bfloat16)
        if pallas.unsupported_reason(x, codes, s, axis, *rest):
            continue
        supported.append(name)
        result = pallas.product(x, codes, s, axis, 0)
        expected = matmul.xla_product(x, codes, s, axis, *rest)
        error = float(jnp.max(jnp.abs(result - expected)) / jnp.max(jnp.abs(expected)))
        if not error < _PALLAS_TOLERANCE:
            failed = failed or f"the relative error of {name} is {error:.1e}; expected less than {_PALLAS_TOLERANCE}"
    print(f"self-test {f'failed: {failed}' if failed else 'passed'}")
    _measure(supported, rows, inputs, outputs, jnp.bfloat16)
    return int(bool(failed))


def self_test(names: list[str]) -> str:
    """Compares the kernels, for every scheme, with XLA; returns what differs, or ""."""
    for name, outputs in itertools.product(names, (77, 80)):  # in rows, and where kernels read them in tiles
        codes, s, axis, contracted, _ = _request(name, 192, outputs)
        laid_out = _laid_out(codes, s)
        x = jax.random.normal(jax.random.key(1), (3, 192))
        result = cpu_product.product(x, laid_out, s, axis)
        expected = _reference(x, codes, s)
        error = jnp.max(jnp.abs(result - expected) / _reference(jnp.abs(x), codes, s, magnitudes=True))
        if not error < _TOLERANCE:
            return f"the relative error of {name} is {float(error):.1e}; expected less than {_TOLERANCE}"
        (rounded,) = cpu_product.blockwise_products(x, [laid_out], s, axis)
        (expected,) = matmul.xla_blockwise_products(x, [codes], s, axis, contracted)
        error = jnp.max(jnp.abs(rounded - expected) / _reference(jnp.abs(x), codes, s, magnitudes=True))
        if not error < _TOLERANCE:
            return f"the relative error of {name}+a8 is {float(error):.1e}; expected less than {_TOLERANCE}"
    q, k, v = _heads(256)
    weights = jax.nn.softmax(jnp.einsum("bth,bsh->bts", q[:, :, 0], k[:, :, 0]) / 8)
    expected = jnp.einsum("bts,bsh->bth", weights, v[:, :, 0])
    result = cpu_attention.attention(q, k, v, jnp.ones((1, 3, 256), bool), None)[:, :, 0]
    if not jnp.allclose(result, expected, atol=1e-5):
        return "attention over a cache differs from that of XLA"
    x8, codes8, scale = jnp.ones((2, 192), jnp.int8) * 3, jnp.ones((192, 77), jnp.int8) * -5, jnp.full((1, 77), 0.5)
    if not cpu_product.unsupported_integer_reason(x8, codes8):
        result = cpu_product.integer_product(x8, jnp.float32(2), codes8, scale, _AXIS)
        if not (result == -15 * 192).all():
            return "the product of integers is wrong"
    return ""


def _laid_out(codes: matmul.Codes, s: Scheme) -> matmul.Codes:
    """The codes of a weight as `weights.lay_out` passes them to the kernels of this process."""
    if tiles.unsupported_reason(codes[0].shape, s, _AXIS) or tiles.unusable_reason():
        return codes
    return tiles.to_tiles(codes, _AXIS)


def _heads(keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of one head: float32 (1, 3, 1, 64), and (1, keys, 1, 64) twice."""
    shapes = ((1, 3, 1, 64), (1, keys, 1, 64), (1, keys, 1, 64))
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    return q, k, v


def _reference(x: jax.Array, codes: matmul.Codes, s: Scheme, magnitudes: bool = False) -> jax.Array:
    w = number_formats.decode(codes[0], matmul.dense_scale(codes, s, _AXIS), codes[2], s, _AXIS)
    return jnp.dot(x, jnp.abs(w) if magnitudes else w, precision="highest")


def _request(name: str, inputs: int, outputs: int) -> tuple[matmul.Codes, Scheme, int, int, Any]:
    """Arguments of a product with a weight of random codes: (codes, scheme, axis, contracted, accumulate)."""
    s = number_formats.scheme(name)
    f = number_formats.FORMATS[s.format]
    key = jax.random.key(0)

    def bits(rows: int, columns: int) -> jax.Array:
        return jax.random.bits(key, (rows, columns), jnp.uint8)

    groups = inputs // s.group if s.group > 0 else 1
    codes = bits(inputs * f.bits // 8, outputs)
    codes = codes.view(jnp.int8) if f.dtype == "int8" else codes.astype(f.dtype)
    scale: Any = number_formats.store_scales(jax.random.uniform(key, (groups, outputs), minval=0.01, maxval=0.1), s)
    if s.scale in number_formats.SCHEMES:
        inner = number_formats.scheme(number_formats.nested(s, outputs))
        parts = outputs // inner.group if inner.group > 0 else 1
        scale = bits(groups, outputs), jnp.full((groups, parts), 0.1), jnp.zeros((1, 1))
    offset = jnp.zeros((groups, outputs), scale.dtype) if s.offset else None
    return (codes, scale, offset), s, _AXIS, 0, jnp.dtype("float32")


def _measure(names: list[str], rows: int, inputs: int, outputs: int, dtype: Any = jnp.float32) -> None:
    """Prints the speed of each matmul with activations in `dtype`: float32 for the kernels in C++, else for Pallas."""
    compiled, base_name = dtype == jnp.float32, str(jnp.dtype(dtype))
    print(f"measured  a weight of {inputs} x {outputs}; bytes include its scales; x: speedup over {base_name}")
    print(f"  {'':<10}{'rows':>5}{'GB/s':>8}{'GFLOP/s':>9}{'x':>6}{'XLA: GB/s':>12}{'GFLOP/s':>9}{'x':>6}")
    dense = jax.random.normal(jax.random.key(0), (inputs, outputs), dtype)
    for count in dict.fromkeys((1, rows)):
        x = jax.random.normal(jax.random.key(1), (count, inputs), dtype)
        flops = 2e-9 * count * inputs * outputs
        base = _seconds(jax.jit(jnp.dot), x, dense)
        print(f"  {base_name:<10}{count:>5}{'':>23}{dense.nbytes / base / 1e9:>12.1f}{flops / base:>9.1f}{1:>6.1f}")
        for name in names:
            codes, *rest = _request(name, inputs, outputs)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(codes)) / 1e9
            line = f"  {name:<10}{count:>5}"
            scheme, axis, contracted, accumulate = rest
            kernel = jax.jit(
                functools.partial(cpu_product.product, s=scheme, axis=axis)
                if compiled
                else functools.partial(pallas.product, s=scheme, axis=axis, contracted=contracted)
            )
            xla = jax.jit(
                functools.partial(matmul.xla_product, s=scheme, axis=axis, contracted=contracted, accumulate=accumulate)
            )
            laid_out = _laid_out(codes, scheme)
            for function, operand, widths in ((kernel, laid_out, (8, 9, 6)), (xla, codes, (12, 9, 6))):
                if compiled and function is kernel and count > cpu_product.max_rows(operand, scheme):
                    line += " " * sum(widths)
                    continue
                seconds = _seconds(function, x, operand)
                rates = size / seconds, flops / seconds, base / seconds
                line += "".join(f"{rate:>{width}.1f}" for rate, width in zip(rates, widths, strict=True))
            print(line, flush=True)


def _seconds(function: Any, *arguments: Any) -> float:
    """The shortest of several times of a call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)
