"""Selects a Pallas kernel for a matrix product with a quantized weight.

`tpu_product` is for TPUs. `gpu_product` is for GPUs and is used only with LLM_JAX_KERNELS=pallas: it has been tested in
interpret mode, and not measured on a GPU. With this setting, a CPU interprets the TPU kernel, which is slow and meant
for tests.
"""

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels import native, target
from llm_jax.kernels.number_formats import Scheme

SETTING = "pallas"  # the value of LLM_JAX_KERNELS
PLATFORMS = {"tpu": ("tpu",), "gpu": ("cuda", "rocm"), "cpu": ("cpu",)}  # as XLA names those of `target.platform`


def kernels(platform: str) -> ModuleType:
    """`gpu_product`, or `tpu_product` for other platforms; imported when asked for, because Pallas takes a second."""
    return importlib.import_module(f"llm_jax.kernels.{'gpu' if platform == 'gpu' else 'tpu'}_product")


def unusable_reason() -> str:
    """The reason why the function being traced cannot use a Pallas kernel, independent of its arguments; or ""."""
    setting, platform = native.setting(), target.platform()
    if setting == "xla" or platform not in PLATFORMS:
        return f"{native.SETTING}={setting} on {platform}"
    if platform != "tpu" and setting != SETTING:
        return f"{native.SETTING}={SETTING} is not set"
    mesh = jax.sharding.get_abstract_mesh()
    if any(size > 1 for axis, size in mesh.shape.items() if axis not in mesh.manual_axes):
        return "a mesh of devices is in use, outside of shard_map"
    if mesh.empty and jax.device_count() > 1:  # whether an array is sharded shows only when the program is compiled
        return f"JAX uses {jax.device_count()} devices, outside of shard_map"
    return ""


def unsupported_reason(
    x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int, accumulate: Any
) -> str:
    """The reason why the kernel of the device does not compute a product, or ""; see `matmul.expanded_products`."""
    reason = unusable_reason()
    return reason or kernels(target.platform()).unsupported_reason(x, codes, s, axis, contracted, accumulate)


def unsupported_integer_reason(x: jax.Array, codes: jax.Array, axis: int) -> str:
    """The reason why no kernel computes a product of integers, or ""; see `matmul.integer_product`."""
    return unusable_reason() or integer_reason(target.platform(), x, codes, axis)


def integer_reason(platform: str, x: jax.Array, codes: jax.Array, axis: int) -> str:
    """As `unsupported_integer_reason`, for any platform."""
    if platform == "gpu":
        return "products of integers have no kernel"
    return str(kernels(platform).unsupported_integer_reason(x, codes, axis))


def product(
    x: jax.Array, codes: tuple[Any, ...], s: Scheme, axis: int, contracted: int, out_dtype: Any = jnp.float32
) -> jax.Array:
    """The product by the kernel of the device; see `matmul.expanded_products`."""
    platform = target.platform()
    interpret = platform == "cpu"
    result: jax.Array = kernels(platform).product(x, codes, s, axis, contracted, out_dtype, interpret)
    return result


def integer_product(
    x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, axis: int, out_dtype: Any = jnp.float32
) -> jax.Array:
    """The product of integers by the kernel of the device; see `matmul.integer_product`."""
    platform = target.platform()
    interpret = platform == "cpu"
    result: jax.Array = kernels(platform).integer_product(x, x_scale, codes, scale, axis, out_dtype, interpret)
    return result
