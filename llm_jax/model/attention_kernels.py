"""The attention product, softmax(q k / sqrt(H) + bias) v, and who computes it: `model.attention_kernel`.

plain    batched matrices whose scores are computed again in the backward pass: any mask, bias, dtype
xla      jax.nn.dot_product_attention as XLA compiles it: any mask, bias, dtype
cudnn    the same by cuDNN's fused kernel: GPUs, half precision, no bias (it would be rounded)
splash   JAX's fused kernel for TPUs: no bias, no cache, lengths in multiples of 128
auto     the fused kernel of the device where it serves, else plain
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T queries, S keys, N heads, K key/value heads, H head width.

PREFERRED = {"tpu": ("splash",), "gpu": ("cudnn",)}
IMPLEMENTATIONS = ("auto", "plain", "xla", "cudnn", "splash")
_BLOCKS = (512, 256, 128)  # rows and columns of a tile of splash: the largest that divides the length


def choose(
    config: ModelConfig, platform: str, q: Any, k: Any, cached: bool, devices: dict[str, int]
) -> tuple[str, str]:
    """(name of the implementation, why not the fused one, or "").

    Args:
      platform: "cpu", "gpu" or "tpu".
      q, k: (B, T, N, H) and (B, S, K, H), or their shapes and dtypes.
      devices: sizes of the mesh's axes by name; {} for one device.

    Raises:
      UserError: an implementation is asked for that does not serve.
    """
    asked = choice("model.attention_kernel", config.attention_kernel, IMPLEMENTATIONS)
    if asked == "auto":
        reasons = {
            name: _against(name, config, platform, q, k, cached, devices) for name in PREFERRED.get(platform, ())
        }
        name = next((name for name, reason in reasons.items() if not reason), "plain")
        return name, "" if name in reasons else "; ".join(f"not {n}: {r}" for n, r in reasons.items())
    reason = _against(asked, config, platform, q, k, cached, devices)
    # A model whose training runs on a fused kernel decodes by another: its cache is read one token at a time.
    if reason and cached:
        return "plain", f"not {asked}: {reason}"
    if reason:
        raise UserError(f"model.attention_kernel={asked} does not serve: {reason}; choose auto, plain or xla")
    return asked, ""


def _against(name: str, config: ModelConfig, platform: str, q, k, cached: bool, devices) -> str:
    """Why an implementation does not serve, or ""."""
    batch, length, _, width = q.shape
    if name == "plain":
        return ""
    if config.attention_softcap and name != "splash":
        return "it has no model.attention_softcap"
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
    if length % 128:
        return f"the length {length} is not a multiple of 128"
    ways = [devices.get(axis, 1) for axis in mesh_lib.BATCH]
    if batch % (ways[0] * ways[1]) or k.shape[2] % devices.get(mesh_lib.HEADS, 1):
        return f"{batch} rows or {k.shape[2]} key/value heads do not split over the mesh {devices}"
    return ""


def describe(config: ModelConfig, platform: str, batch: int, length: int, devices: dict[str, int]) -> str:
    """What attends to batches of `batch` rows of `length` tokens on this device, in words.

    Raises:
      UserError: an implementation is asked for that does not serve.
    """
    h = positions.head_dim(config)
    q, k = (
        jax.ShapeDtypeStruct((batch, length, heads, h), jnp.dtype(config.precision.compute))
        for heads in (config.num_heads, config.num_kv_heads)
    )
    name, why = choose(config, platform, q, k, False, devices)
    if name == "splash" and platform != "tpu":  # `choose` admits it: one may compile for a TPU elsewhere
        raise UserError(f"model.attention_kernel=splash does not serve: it needs a TPU, and this is {platform}")
    return f"{name} ({why})" if why else name


def fused(
    name: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, bias_BNTS: jax.Array | None
) -> jax.Array:
    """`attend` by jax.nn.dot_product_attention; `name` is "xla" or "cudnn"."""
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
    """`attend` by JAX's splash kernel, one per device of the mesh in use.

    It masks by places in the row, which order the tokens of a segment as their positions do.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads = q_BTNH.shape[1:3]
    devices = mesh_lib.in_use()
    shards = devices.get(mesh_lib.HEADS, 1)
    mask: kernels.Mask
    if window is not None:
        mask = kernels.LocalMask((length, length), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = kernels.CausalMask((length, length)) if causal else kernels.FullMask((length, length))
    block = next(b for b in _BLOCKS if length % b == 0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * (heads // shards)),
        block_sizes=kernels.BlockSizes(block, block, block, block, block, block, block, block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )

    def local(q, k, v, segments):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(q, k, v, segments)
        return jnp.swapaxes(out, 1, 2).astype(q_BTNH.dtype)

    if not devices:
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    heads_spec, row_spec = (
        P(mesh_lib.BATCH, None, mesh_lib.HEADS, None),
        P(mesh_lib.BATCH, None),
    )
    return jax.shard_map(
        local, in_specs=(heads_spec, heads_spec, heads_spec, row_spec), out_specs=heads_spec, check_vma=False
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    bias_BNTS: jax.Array | None,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(q k / sqrt(H) + bias) v under the mask -> (B, T, N, H); scores and softmax in float32.

    The backward pass computes the scores again from the row sums (Dao et al. 2022, FlashAttention,
    arXiv:2205.14135, appendix B), so that nothing of size T x S is kept between the passes. The
    leading axis of the bias is B or 1. With a `softcap` q k / sqrt(H) becomes cap tanh(that / cap). A
    query that sees nothing (padding) gets the mean of all values, which nobody reads.
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
    # Products, too, for a remat policy: what keeps them need not attend again.
    out, log_total = (checkpoint_name(kept, "dot") for kept in (out, top + jnp.log(total)))
    return _by_token(out, length), (q, k, v, mask_BTS, bias_BNTS, out, log_total)


def _attend_backward(softcap, saved, g_BTNH):
    q, k, v, mask_BTS, bias_BNTS, out, log_total = saved
    g = _by_group(g_BTNH, k.shape[1])
    scores, slope = _scores(q, k, mask_BTS, bias_BNTS, softcap)
    shares = jnp.exp(scores - log_total)
    wide = shares.dtype
    d_shares = _batched(g, v, 3, 3)
    d_scores = shares * (d_shares - jnp.sum(g.astype(wide) * out.astype(wide), -1, keepdims=True))
    d_bias = None
    if bias_BNTS is not None:
        if d_scores.dtype == g.dtype:  # the array that the products below read; else XLA computes it twice
            d_scores = jax.lax.optimization_barrier(d_scores)
        per_row = d_scores.reshape(mask_BTS.shape[0], -1, *mask_BTS.shape[1:])
        d_bias = (per_row if bias_BNTS.shape[0] > 1 else jnp.sum(per_row, 0, keepdims=True)).astype(bias_BNTS.dtype)
    if slope is not None:
        d_scores *= slope
    d_scores, scale = d_scores.astype(g.dtype), q.shape[-1] ** -0.5
    dq, dk = _batched(d_scores, k, 3, 2) * scale, _batched(d_scores, q, 2, 2) * scale
    dv = _batched(shares.astype(g.dtype), g, 2, 2)
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
      (B, T, N, H) in the dtype of q. The probabilities are kept for the backward pass.
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
      float32 (or the dtype of q where it is wider) (B, N, T, S); rows sum to 1, and masked keys have 0 unless all
      keys of a query are masked.
    """
    b, t, n, _ = q_BTNH.shape
    q, k = (_by_group(x, k_BSKH.shape[2]) for x in (q_BTNH, k_BSKH))
    return jax.nn.softmax(_scores(q, k, mask_BTS, bias_BNTS, softcap)[0], -1).reshape(b, n, t, -1)


def _scores(q, k, mask_BTS, bias_BNTS, softcap=0.0):
    """(B, K, G T, S) in float32 (or wider), and their slope by q k / sqrt(H), or None for 1.

    What a query may not see is far below what it may.
    """
    b, t, s = mask_BTS.shape
    products, slope = _batched(q, k, 3, 3) * q.shape[-1] ** -0.5, None
    if softcap:
        share = jnp.tanh(products / softcap)
        products, slope = softcap * share, 1 - jnp.square(share)
    scores = products.reshape(b, -1, t, s)
    if bias_BNTS is not None:
        scores += bias_BNTS
    return (scores + jnp.where(mask_BTS, 0.0, -1e30)[:, None]).reshape(b, k.shape[1], -1, s), slope


def _batched(a, b, a_axis, b_axis):
    """A product over one axis each, batched over the first two, with float32 (or wider) sums."""
    wide = jnp.promote_types(jnp.float32, a.dtype)
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=wide)


def _by_group(x_BTNH, groups):
    """(B, T, N, H) -> (B, K, G T, H): plain batched matrices, three times as fast on CPU as an einsum."""
    b, t, n, h = x_BTNH.shape
    return x_BTNH.reshape(b, t, groups, n // groups, h).transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, h)


def _by_token(x, length):
    """The inverse of `_by_group`."""
    b, groups, rows, h = x.shape
    per_group = rows // length
    return x.reshape(b, groups, per_group, length, h).transpose(0, 3, 1, 2, 4).reshape(b, length, -1, h)
