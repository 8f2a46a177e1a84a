"""Attention of few queries over a cache of keys and values, by a C++ kernel (`cpu/cached_attention.cc`).

XLA copies the whole cache for every token, because its batched products need the heads before the keys.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import native

# Letters of shapes: B batch, T queries, S keys, N heads, K key/value heads, H head width.

MAX_QUERIES = 16  # with more queries, XLA's matmuls are faster
_LEAST_KEYS = 2**14  # entries of the cache of keys; copying a smaller cache takes less time than compiling the kernel

# Float32 or bfloat16 (B, S, K, H), or int8 codes with float16 scales (B, S, K, 1).
Cached = jax.Array | tuple[jax.Array, jax.Array]
_FLOATS = (jnp.float32, jnp.bfloat16)


def unsupported_reason(q: jax.Array, k: Cached) -> str:
    """The reason why the kernel does not compute an attention, or ""; see `attention` for the arguments."""
    codes = k[0] if isinstance(k, tuple) else k
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        return f"{q.shape[1]} queries; the kernel takes 1 to {MAX_QUERIES}"
    if q.dtype not in _FLOATS or codes.dtype not in (*_FLOATS, jnp.int8):
        return f"{q.dtype} queries and {codes.dtype} keys"
    if not q.size or not codes.size:
        return f"queries of the shape {q.shape} and keys of the shape {codes.shape}"
    if codes.size < _LEAST_KEYS:
        return f"a cache of {codes.size:,} numbers, which XLA copies fast"
    return native.unusable_reason()


def attention(
    q: jax.Array,
    k: Cached,
    v: Cached,
    mask: jax.Array,
    bias: jax.Array | None,
    softcap: float = 0.0,
    path: str = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(H) + bias) v in float32; keys that no query attends to are not read.

    The result of a row depends neither on other rows nor on the number of threads.

    Args:
      q: float32 or bfloat16 (B, T, N, H).
      k, v: float32 or bfloat16 (B, S, K, H), or (int8 (B, S, K, H), float16 scales (B, S, K, 1)).
      mask: bool (B, T, S), True where a query attends to a key. A query that attends to no key (padding) gets the
        mean of all values.
      bias: float32 (B, N, T, S), whose leading axis may be 1, or None.
      softcap: cap of the scores, q k / sqrt(H) -> cap tanh(q k / (sqrt(H) cap)); 0 for none.
      path: a name of `native.PATHS`, for tests.

    Returns:
      (B, T, N, H) in the dtype of q.
    """
    no_scale = jnp.zeros((0, 0, 0, 0), jnp.float16)
    (k, k_scale), (v, v_scale) = (x if isinstance(x, tuple) else (x, no_scale) for x in (k, v))
    call = jax.ffi.ffi_call(
        "llm_jax_cached_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential"
    )
    if bias is None:
        bias = jnp.zeros((0, 0, 0, 0), jnp.float32)
    y = call(
        q.astype(jnp.float32),
        k,
        v,
        k_scale,
        v_scale,
        mask,
        bias,
        softcap=np.float32(softcap),
        path=np.int64(native.PATHS.index(path)),
    )
    return y.astype(q.dtype)
