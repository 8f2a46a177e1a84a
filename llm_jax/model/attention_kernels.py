"""Implementations of attention, softmax(q k / sqrt(H) + bias) v. `model.attention_kernel` selects one.

plain    batched matrix products; recomputes the scores in the backward pass; any mask, bias and dtype
xla      jax.nn.dot_product_attention, compiled by XLA; any mask, bias and dtype
cudnn    jax.nn.dot_product_attention with the fused kernel of cuDNN; GPUs, half precision, no bias (cuDNN rounds it)
splash   the fused kernel of JAX for TPUs; no bias, no cache, lengths that are multiples of 128
auto     the fused kernel of the device if it can be used, otherwise plain
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.kernels import cpu_attention, native
from llm_jax.kernels.cpu_attention import Cached
from llm_jax.model import positions
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T queries, S keys, N heads, K key/value heads, H head width.

PREFERRED = {"tpu": ("splash",), "gpu": ("cudnn",)}
IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn", "splash")
_BLOCKS = (512, 256, 128)  # tile sizes of splash; the largest that divides the length is used


def choose(
    config: ModelConfig, platform: str, q: Any, k: Any, cached: bool, devices: dict[str, int]
) -> tuple[str, str]:
    """Returns (name of the implementation, reason why the fused kernel is not used, or "").

    Args:
      platform: "cpu", "gpu" or "tpu".
      q, k: (B, T, N, H) and (B, S, K, H), arrays or their shapes and dtypes.
      cached: whether keys and values are read from a cache.
      devices: {axis: size} of the mesh; {} for one device.

    Raises:
      UserError: the implementation that `model.attention_kernel` names cannot be used.
    """
    requested = choice("model.attention_kernel", config.attention_kernel, IMPLEMENTATIONS)
    if requested == "auto":
        reasons = {
            name: _unsupported(name, config, platform, q, k, cached, devices) for name in PREFERRED.get(platform, ())
        }
        name = next((name for name, reason in reasons.items() if not reason), "plain")
        return name, "" if name in reasons else "; ".join(f"not {n}: {r}" for n, r in reasons.items())
    reason = _unsupported(requested, config, platform, q, k, cached, devices)
    # Decoding uses the plain kernel, because fused kernels cannot read a cache.
    if reason and cached:
        return "plain", f"not {requested}: {reason}"
    if reason:
        raise UserError(f"model.attention_kernel={requested} cannot be used: {reason}; choose auto, plain or xla")
    return requested, ""


def _unsupported(name: str, config: ModelConfig, platform: str, q, k, cached: bool, devices) -> str:
    """The reason why an implementation cannot be used, or ""."""
    batch, length, _, width = q.shape
    if name == "plain":
        return ""
    if config.attention_softcap and name != "splash":
        return "it does not support model.attention_softcap"
    if name == "xla":
        return ""
    if positions.make(config).adds_to_scores:
        return f"model.position.kind={config.position.kind} adds to the scores"
    if cached:
        return "keys are read from a cache"
    if name == "cudnn":
        if platform != "gpu":
            return f"it needs a GPU, and this is {platform}"
        if q.dtype.itemsize != 2:
            return f"it needs half precision, and model.precision.compute is {q.dtype}"
        return f"the head width {width} is not a multiple of 8 up to 128" if width % 8 or width > 128 else ""
    if length % (128 * devices.get(mesh_lib.CONTEXT, 1)):
        pieces = devices.get(mesh_lib.CONTEXT, 1)
        return f"the length {length} is not a multiple of 128" + (f" x mesh.context={pieces}" if pieces > 1 else "")
    shards = [devices.get(axis, 1) for axis in mesh_lib.BATCH]
    if batch % (shards[0] * shards[1]) or k.shape[2] % devices.get(mesh_lib.HEADS, 1):
        return f"{batch} rows or {k.shape[2]} key/value heads do not split over the mesh {devices}"
    return ""


def describe(config: ModelConfig, platform: str, batch: int, length: int, devices: dict[str, int]) -> str:
    """The implementation for `batch` rows of `length` tokens, with the reason why the fused kernel is not used.

    Args:
      platform: "cpu", "gpu" or "tpu".
      devices: {axis: size} of the mesh; {} for one device.

    Raises:
      UserError: the implementation that `model.attention_kernel` names cannot be used.
    """
    h = positions.head_dim(config)
    q, k = (
        jax.ShapeDtypeStruct((batch, length, heads, h), jnp.dtype(config.precision.compute))
        for heads in (config.num_heads, config.num_kv_heads)
    )
    name, reason = choose(config, platform, q, k, False, devices)
    if name == "splash" and platform != "tpu":  # `choose` accepts splash, to compile for a TPU on another machine
        raise UserError(f"model.attention_kernel=splash cannot be used: it needs a TPU, and this is {platform}")
    return f"{name} ({reason})" if reason else name


def fused(
    name: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, bias_BNTS: jax.Array | None
) -> jax.Array:
    """`attend` by jax.nn.dot_product_attention; `name` is "xla" or "cudnn". Returns (B, T, N, H) in the dtype of q."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, bias=bias_BNTS, mask=mask_BTS[:, None], implementation=name
    )


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    window: int | None,
    causal: bool,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by the splash kernel of JAX, run on each device of the mesh in use.

    Under the mesh axis "context" a device has a part of the queries, and all keys and values of its rows.

    The kernel masks by indices in the row instead of positions; both order the tokens of a segment in the same way.

    Args:
      segments_BT: int32, segments of the tokens.
      window, causal, softcap: as in `attention.attention_mask` and `attend`.
      interpret: whether to interpret the kernel, which works on any device.

    Returns:
      (B, T, N, H) in the dtype of q.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads = q_BTNH.shape[1:3]
    devices = mesh_lib.current_axis_sizes()
    shards = devices.get(mesh_lib.HEADS, 1)
    mask: kernels.Mask
    if window is not None:
        mask = kernels.LocalMask((length, length), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = kernels.CausalMask((length, length)) if causal else kernels.FullMask((length, length))
    pieces = devices.get(mesh_lib.CONTEXT, 1)
    block = next(b for b in _BLOCKS if length % (b * pieces) == 0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * (heads // shards)),
        block_sizes=kernels.BlockSizes(block, block, block, block, block, block, block, block),
        head_shards=1,
        q_seq_shards=pieces,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )

    def local(kernel, q, k, v, q_segments, k_segments):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        ids = kernels.SegmentIds(q_segments, k_segments)
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, s))(q, k, v, ids)
        return jnp.swapaxes(out, 1, 2).astype(q_BTNH.dtype)

    arguments = (kernel, q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT)
    if not devices:
        return local(*arguments)
    rows, parts = mesh_lib.BATCH, mesh_lib.CONTEXT
    queries, keys = (P(rows, axis, mesh_lib.HEADS, None) for axis in (parts, None))
    mask_spec = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P(None, parts)))
    specs = (mask_spec, queries, keys, keys, P(rows, parts), P(rows, None))
    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)(*arguments)


def attend_cached(
    q_BTNH: jax.Array,
    k_BSKH: Cached,
    v_BSKH: Cached,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None,
    softcap: float,
    read: Callable[[Cached], jax.Array],
) -> jax.Array:
    """`attend` over a cache, with the C++ kernel if it supports the case (`kernels.cpu_attention`).

    Args:
      k_BSKH, v_BSKH: arrays, or int8 codes with their scales.
      read: function that expands `Cached` keys or values to an array.
    """

    def plain(q, k, v, mask, bias):
        return attend(q, read(k), read(v), mask, bias, softcap)

    arguments = (q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS)
    if cpu_attention.unsupported_reason(q_BTNH, k_BSKH) or native.library(silent=True) is None:
        return plain(*arguments)

    @jax.custom_vjp
    def kernel(q, k, v, mask, bias):
        return jax.lax.platform_dependent(
            q, k, v, mask, bias, cpu=functools.partial(cpu_attention.attention, softcap=softcap), default=plain
        )

    kernel.defvjp(lambda *arguments: jax.vjp(plain, *arguments), lambda gradients, g: gradients(g))
    return kernel(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(q k / sqrt(H) + bias) v, with scores and softmax in float32 (or wider).

    The backward pass recomputes the probabilities from the logarithm of the row sums (Dao et al. 2022, FlashAttention,
    arXiv:2205.14135, appendix B), so that no array of size T x S is kept between the passes.

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, keys and values, float.
      mask_BTS: bool, True where a query attends to a key. A query that attends to no key (padding) gets the mean of
        all values.
      bias_BNTS: float32, whose leading axis may be 1, or None.
      softcap: cap of the scores, q k / sqrt(H) -> cap tanh(q k / (sqrt(H) cap)); 0 for none.

    Returns:
      (B, T, N, H) in the dtype of q.
    """
    return _attend_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS, softcap)[0]


def _attend_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS, softcap):
    length, groups = q_BTNH.shape[1], k_BSKH.shape[2]
    q, k, v = (_by_group(x, groups) for x in (q_BTNH, k_BSKH, v_BSKH))
    scores, _ = _scores(q, k, mask_BTS, bias_BNTS, softcap)
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, -1, keepdims=True)
    out = (_batched(weights.astype(v.dtype), v, 3, 2) / total).astype(q_BTNH.dtype)
    # The same name as matrix products have, so that a remat policy that saves products does not recompute attention.
    out, log_total = (checkpoint_name(array, "dot") for array in (out, top + jnp.log(total)))
    return _by_token(out, length), (q, k, v, mask_BTS, bias_BNTS, out, log_total)


def _attend_backward(softcap, residuals, g_BTNH):
    q, k, v, mask_BTS, bias_BNTS, out, log_total = residuals
    g = _by_group(g_BTNH, k.shape[1])
    scores, slope = _scores(q, k, mask_BTS, bias_BNTS, softcap)
    probs = jnp.exp(scores - log_total)
    wide = probs.dtype
    d_probs = _batched(g, v, 3, 3)
    d_scores = probs * (d_probs - jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True))
    d_bias = None
    if bias_BNTS is not None:
        if d_scores.dtype == g.dtype:  # used here and in the products below; without the barrier XLA computes it twice
            d_scores = jax.lax.optimization_barrier(d_scores)
        per_row = d_scores.reshape(mask_BTS.shape[0], -1, *mask_BTS.shape[1:])
        d_bias = (per_row if bias_BNTS.shape[0] > 1 else jnp.sum(per_row, 0, keepdims=True)).astype(bias_BNTS.dtype)
    if slope is not None:
        d_scores *= slope
    d_scores, scale = d_scores.astype(g.dtype), q.shape[-1] ** -0.5
    dq, dk = _batched(d_scores, k, 3, 2) * scale, _batched(d_scores, q, 2, 2) * scale
    dv = _batched(probs.astype(g.dtype), g, 2, 2)
    queries, keys = mask_BTS.shape[1:]
    return (
        _by_token(dq, queries).astype(q.dtype),
        _by_token(dk, keys).astype(k.dtype),
        _by_token(dv, keys).astype(v.dtype),
        None,
        d_bias,
    )


attend.defvjp(_attend_forward, _attend_backward)


def attend_adding(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None,
    add: Callable[[jax.Array], jax.Array],
    softcap: float = 0.0,
) -> jax.Array:
    """`attend` plus `add(probabilities)`, for position schemes that add vectors to the values.

    Args:
      q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS, softcap: as in `attend`.
      add: attention probabilities (B, N, T, S) in the dtype of v -> (B, T, N, H).

    Returns:
      (B, T, N, H) in the dtype of q. The backward pass keeps the probabilities.
    """
    heads_BNTS = probabilities(q_BTNH, k_BSKH, mask_BTS, bias_BNTS, softcap).astype(v_BSKH.dtype)
    b, _, t, s = heads_BNTS.shape
    v = _by_group(v_BSKH, v_BSKH.shape[2])
    groups_BKTS = heads_BNTS.reshape(b, v.shape[1], -1, s)
    out = _by_token(_batched(groups_BKTS, v, 3, 2).astype(q_BTNH.dtype), t)
    return out + add(heads_BNTS).astype(out.dtype)


def probabilities(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array, bias_BNTS: jax.Array | None, softcap: float = 0.0
) -> jax.Array:
    """The attention probabilities softmax(q k / sqrt(H) + bias) of every head.

    Args:
      q_BTNH, k_BSKH, mask_BTS, bias_BNTS, softcap: as in `attend`.

    Returns:
      (B, N, T, S) in float32, or in the dtype of q if it is wider; rows sum to 1, and masked keys have probability 0
      unless all keys of a query are masked.
    """
    b, t, n, _ = q_BTNH.shape
    q, k = (_by_group(x, k_BSKH.shape[2]) for x in (q_BTNH, k_BSKH))
    return jax.nn.softmax(_scores(q, k, mask_BTS, bias_BNTS, softcap)[0], -1).reshape(b, n, t, -1)


def entropy(
    q_BTNH: jax.Array, k_BSKH: jax.Array, mask_BTS: jax.Array, bias_BNTS: jax.Array | None, softcap: float = 0.0
) -> jax.Array:
    """The mean entropy of the attention probabilities in nats, over rows, heads and queries: float32 ().

    Queries of padding are excluded. At most 64 evenly spaced queries are used, to bound the memory of the
    probabilities.

    Args:
      q_BTNH, k_BSKH, mask_BTS, bias_BNTS, softcap: as in `attend`.
    """
    queries = slice(0, None, -(-q_BTNH.shape[1] // 64))
    bias = None if bias_BNTS is None else bias_BNTS[:, :, queries]
    mask_BTS = mask_BTS[:, queries]
    p_BNTS = probabilities(q_BTNH[:, queries], k_BSKH, mask_BTS, bias, softcap).astype(jnp.float32)
    entropy_BNT = jnp.sum(jax.scipy.special.entr(p_BNTS), -1)
    return jnp.mean(entropy_BNT, where=jnp.broadcast_to(mask_BTS.any(-1)[:, None], entropy_BNT.shape))


def _scores(q, k, mask_BTS, bias_BNTS, softcap=0.0):
    """Returns (scores (B, K, G T, S) in float32 or wider, their derivative by q k / sqrt(H), or None if it is 1).

    Masked entries are lowered by 1e30.
    """
    b, t, s = mask_BTS.shape
    products, slope = _batched(q, k, 3, 3) * q.shape[-1] ** -0.5, None
    if softcap:
        ratio = jnp.tanh(products / softcap)
        products, slope = softcap * ratio, 1 - jnp.square(ratio)
    scores = products.reshape(b, -1, t, s)
    if bias_BNTS is not None:
        scores += bias_BNTS
    return (scores + jnp.where(mask_BTS, 0.0, -1e30)[:, None]).reshape(b, k.shape[1], -1, s), slope


def _batched(a, b, a_axis, b_axis):
    """The product of a and b over one axis of each, batched over the first two, accumulated in float32 or wider."""
    wide = jnp.promote_types(jnp.float32, a.dtype)
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=wide)


def _by_group(x_BTNH, groups):
    """(B, T, N, H) -> (B, K, G T, H), for batched matrix products, three times as fast on CPU as an einsum."""
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, h)


def _by_token(x, length):
    """The inverse of `_by_group`."""
    b, groups, rows, h = x.shape
    per_group = rows // length
    return x.reshape(b, groups, per_group, length, h).transpose(0, 3, 1, 2, 4).reshape(b, length, -1, h)
