"""The transformer, a decoder or an encoder: tokens -> features -> logits.

    model = Transformer(config.model)
    params = model.init(key, tokens)["params"]
    logits = model.apply({"params": params}, tokens)

`params` has the layout that `config.scan_layers` selects (`trees.restage` converts layouts), and its weights may be of
any kind of `weights.Weight`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees, weights
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.attention import KVCache, TokenMetadata, lengths_so_far, write_tokens
from llm_jax.model.layer_stack import Layers
from llm_jax.model.layers import CAPTURE, Module, Norm
from llm_jax.model.stages import layout
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import ModelConfig, attribute_names

# Letters of shapes: B batch, T time, S cache slots, D width, V vocabulary, N heads, K kv heads, H head width.


class Embed(Module):
    """Token embeddings with positions and, if the model has them, token types and a norm."""

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.scheme = positions.make(c)
        self.table = self.weight("table", normal, (c.vocab_size, self.scheme.token_width()))
        self.position_weights = {
            name: self.weight(f"position_{name}", normal, shape) for name, shape in self.scheme.declare().items()
        }
        if c.type_vocab_size:
            self.types = self.weight("types", normal, (c.type_vocab_size, c.width))
        if c.embed_norm:
            self.norm = Norm(c)

    def __call__(self, tokens_BT: jax.Array, metadata: TokenMetadata, types_BT: jax.Array | None) -> jax.Array:
        """int32 (B, T) -> embeddings (B, T, D) in the compute dtype; `types_BT`: see `Transformer.features`."""
        x_BTD = weights.take(self.table, tokens_BT).astype(self.config.precision.compute)
        if self.config.scale_embeddings:
            x_BTD *= self.config.width**0.5
        if self.config.embedding_multiplier != 1:
            x_BTD *= self.config.embedding_multiplier
        x_BTD = self.scheme.embed(x_BTD, metadata.positions, self.position_weights)
        if self.config.type_vocab_size:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD += weights.take(self.types, types_BT).astype(x_BTD.dtype)
        return self.norm(x_BTD) if self.config.embed_norm else x_BTD

    def bias(self, queries: TokenMetadata, keys: TokenMetadata) -> jax.Array | None:
        """Bias of the attention scores of all layers, float32 (B or 1, N, T, S), or None."""
        return self.scheme.bias(queries.positions, keys.positions, self.position_weights)


class Head(Module):
    """The output head: its matrix if the embeddings are not tied, and its bias if it has one."""

    def setup(self) -> None:
        c = self.config
        if not c.tie_embeddings:
            self.kernel = self.weight("kernel", nn.initializers.normal(0.02), (c.width, c.vocab_size))
        if c.head_bias:
            self.bias = self.weight("kernel_bias", nn.initializers.zeros, (c.vocab_size,))


class Pooler(Module):
    """tanh(W x + b) of the first token, (B, T, D) -> (B, D) (Devlin et al. 2019, arXiv:1810.04805)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x_BTD[:, 0], "kernel", self.config.width, bias=True))


class Transformer(Module):
    """A transformer (Vaswani et al. 2017, arXiv:1706.03762): a decoder if `model.causal`, else an encoder."""

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c)
        self.layers = Layers(c)
        if c.norm_placement != "post":
            self.final_norm = Norm(c)
        if not c.tie_embeddings or c.head_bias:
            self.head = Head(c)
        if c.pooler:
            self.pooler = Pooler(c)

    if not TYPE_CHECKING:  # for which every attribute would exist

        @nn.nowrap
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name in (table := attribute_names.MODEL_ATTRIBUTES):
                    raise attribute_names.attribute_error("Transformer", name, table) from None
                raise

        @nn.nowrap
        def apply(self, variables: Any, *arguments: Any, **keywords: Any) -> Any:
            for name in attribute_names.FORWARD_KEYWORDS.keys() & keywords.keys():
                cure = attribute_names.FORWARD_KEYWORDS[name]
                raise UserError(f"the model has no argument '{name}'; {cure}")
            if not isinstance(variables, Mapping):
                raise UserError(
                    f'the first argument of model.apply is {type(variables).__name__}; expected {{"params": params}}, '
                    "followed by the tokens"
                )
            return super().apply(variables, *arguments, **keywords)

    def __call__(
        self, tokens_BT: jax.Array, metadata: TokenMetadata | None = None, cache: KVCache | None = None
    ) -> Any:
        """int32 (B, T) -> logits (B, T, V) in the output dtype, or with a cache (logits, cache); see `features`."""
        x_BTD, updated = self.features(tokens_BT, metadata, cache)
        logits = self.logits(x_BTD)
        if self.is_initializing() and self.config.pooler:
            self.pooler(x_BTD)
        return logits if cache is None else (logits, updated)

    def features(
        self,
        tokens_BT: jax.Array,
        metadata: TokenMetadata | None = None,
        cache: KVCache | None = None,
        types_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The features of the last layer, after the final norm.

        Args:
          tokens_BT: int32 token ids.
          metadata: positions and segments of the tokens; by default each row is one segment that starts at position 0.
          cache: from `init_cache` or an earlier call; the tokens are written to its next slots. The caller ensures
            that there are enough slots and positions (`check_length`). If a document reaches a length at which the
            frequencies of its positions change, the keys and values of all slots are recomputed.
          types_BT: int32 token types (sentence A or B) of a model with `type_vocab_size`; by default all 0.

        Returns:
          (features (B, T, D) in the compute dtype, the updated cache or None).

        Raises:
          UserError: the model is called without parameters; the inputs have the wrong rank, shape or dtype, or ids are
            out of range (see `check_tokens`); without `metadata`, there are more tokens than positions
            (`check_length`).
        """
        check_tokens(self.config, tokens_BT, metadata, types_BT)
        if self.scope is None or not (self.is_initializing() or self.has_variable("params", "embed")):
            raise UserError(
                'the model is called without parameters; call model.apply({"params": params}, tokens) with the '
                "parameters from llm_jax.load or model.init"
            )
        if metadata is None:
            check_length(self.config, tokens_BT.shape[1])
            metadata = consecutive(tokens_BT)
        layers: Any
        if cache is None:
            x_BTD, layers = self._run(tokens_BT, metadata, metadata, None, None, types_BT)
        elif cache.tokens.ids is None:
            keys = write_tokens(cache, metadata)
            x_BTD, layers = self._run(tokens_BT, metadata, keys, cache.layers, cache.index, types_BT)
        else:
            metadata = dataclasses.replace(metadata, ids=tokens_BT)
            keys = write_tokens(cache, metadata)
            before, after = (lengths_so_far(keys, tokens) for tokens in (cache.tokens, keys))
            stale = (cache.tokens.segments > 0) & positions.make(self.config).changes_keys(before, after)
            old, ids_BS = cache, keys.ids

            def advance(model: "Transformer") -> tuple[jax.Array, Any]:
                return model._run(tokens_BT, metadata, keys, old.layers, old.index, types_BT)

            def recompute(model: "Transformer") -> tuple[jax.Array, Any]:
                x_BSD, layers = model._run(ids_BS, keys, keys, old.layers, jnp.int32(0), None)
                starts = jnp.broadcast_to(old.index, len(x_BSD))
                rows = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, tokens_BT.shape[1]))
                return rows(x_BSD, starts), layers

            x_BTD, layers = nn.cond(jnp.any(stale), recompute, advance, self)
        if self.config.norm_placement != "post":
            x_BTD = self.final_norm(x_BTD)
        x_BTD = mesh_lib.constrain(x_BTD, mesh_lib.BATCH, mesh_lib.CONTEXT, None)
        return x_BTD, cache and KVCache(keys, cache.index + tokens_BT.shape[1], layers)

    def _run(self, tokens_BT, metadata, keys, caches, index, types_BT) -> tuple[jax.Array, Any]:
        """The output of the last layer, and the updated caches of all layers or None; see `features`."""
        x_BTD, bias = self.embed(tokens_BT, metadata, types_BT), self.embed.bias(metadata, keys)
        if self.is_mutable_collection(CAPTURE) and not self.is_initializing():
            self.sow(CAPTURE, "embedded", x_BTD)
        return self.layers(x_BTD, metadata, keys, bias, caches, index)

    def pooled(self, x_BTD: jax.Array) -> jax.Array:
        """Features (B, T, D) -> the output of the pooler for the first token, (B, D)."""
        return self.pooler(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Features (B, T, D) -> logits (B, T, V) in the output dtype."""
        c = self.config
        tied = c.tie_embeddings
        table = self.embed.table if tied else self.head.kernel
        if (ratio := width_ratio(c)) != 1:
            x_BTD *= ratio
        gathered = mesh_lib.gathered_spec("embed/table" if tied else "head/kernel")
        if gathered is not None and isinstance(table, jax.Array):
            x_BTD, table = weights.reduce_first(x_BTD, table)
        logits = weights.dot(
            x_BTD,
            table,
            transposed=tied,
            out_dtype=c.precision.output,
            accumulate=c.precision.accumulate,
            gathered=gathered,
        )
        if c.head_bias:
            logits += weights.dense(self.head.bias).astype(logits.dtype)
        if c.logits_scaling != 1:
            logits /= c.logits_scaling
        return c.logit_softcap * jnp.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


def check_tokens(config: ModelConfig, tokens: Any, metadata: TokenMetadata | None = None, types: Any = None) -> None:
    """Raises UserError unless the inputs of a model are integers of shape (B, T), and the tokens are valid ids.

    The values of the ids are checked only outside of `jax.jit`, where they are known.
    """
    arrays = {"tokens": tokens, "types": types}
    arrays |= (
        {} if metadata is None else {"metadata.positions": metadata.positions, "metadata.segments": metadata.segments}
    )
    shape: Any = getattr(tokens, "shape", ())
    for name, array in arrays.items():
        if array is None:
            continue
        if not hasattr(array, "dtype"):
            raise UserError(f"{name}: {type(array).__name__}; expected an array, such as jnp.asarray({name})")
        dtype = jnp.result_type(array)
        if not jnp.issubdtype(dtype, jnp.integer) or len(shape) != 2 or jnp.shape(array) != shape:
            expected = "(batch, length)" if name == "tokens" else f"{shape}, like the tokens"
            raise UserError(f"{name}: {dtype} of shape {jnp.shape(array)}; expected integers of shape {expected}")
    if not shape[1]:
        raise UserError(f"tokens: shape {shape}; expected at least one token per row")
    if not config.vocab_size:
        raise UserError(
            "model.vocab_size is 0, which only training replaces by the size of its tokenizer; set it, for example to "
            "tokenizer.vocab_size"
        )
    is_known = not isinstance(tokens, jax.core.Tracer) and getattr(tokens, "is_fully_addressable", True)
    if is_known and (values := np.asarray(tokens)).size:
        wrong = values[(values < 0) | (values >= config.vocab_size)]
        if wrong.size:
            raise UserError(
                f"tokens: the id {wrong[0]} is not in the vocabulary of the model; expected 0 to "
                f"{config.vocab_size - 1} (model.vocab_size={config.vocab_size})"
            )


def consecutive(tokens_BT: jax.Array) -> TokenMetadata:
    """Positions and segments of rows that are one segment each, from position 0: both int32 (B, T)."""
    indices = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return TokenMetadata(indices, jnp.ones_like(indices))


def init_cache(config: ModelConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of up to `slots` tokens, in the number format of `model.kv_cache`."""
    shape = (batch, slots, config.num_kv_heads)
    parts = {"": (positions.head_dim(config), config.precision.compute)}
    if config.kv_cache == "int8":
        parts = {"": (positions.head_dim(config), "int8"), "_scale": (1, "float16")}

    def layer(*leading: int) -> dict[str, jax.Array]:
        return {
            name + part: jnp.zeros((*leading, *shape, width), dtype)
            for name in ("key", "value")
            for part, (width, dtype) in parts.items()
        }

    layers: dict[str, Any] = {}
    for i in range(config.num_layers):
        if config.scan_layers:
            keys, _ = trees.stack_path(layout(config), i)
            stage, kind = keys.split("/")
            layers.setdefault(stage, {})[kind] = layer(len(trees.layers_of(keys) or ()))
        else:
            layers[str(i)] = layer()
    zeros = jnp.zeros((batch, slots), jnp.int32)
    ids = zeros if positions.make(config).depends_on_length else None
    return KVCache(TokenMetadata(zeros, zeros, ids), jnp.int32(0), layers)


def check_length(config: ModelConfig, length: int) -> None:
    """Checks that the position scheme can encode sequences of `length` tokens.

    Raises:
      UserError: `length` is larger than `positions.Position.max_length`.
    """
    bound = positions.make(config).max_length()
    if bound is not None and length > bound:
        raise UserError(
            f"sequences of {length} tokens exceed the {bound} positions of model.position.kind="
            f"{config.position.kind}; shorten them, or train with a larger model.position.max_length"
        )


def width_ratio(config: ModelConfig) -> float:
    """The factor base_width / width of muP (hyperparameter transfer across widths); 1 if `model.base_width` is 0.

    Yang et al. 2022 (arXiv:2203.03466), table 8: logits, and the Adam learning rates of hidden matrices
    (`optim.make`), are multiplied by this factor. The initialization and the learning rates of embeddings, head and
    vectors do not depend on the width. The head may be tied to the embedding table. Wider models should have more heads
    of the same head_dim; the scale 1 / sqrt(head_dim) of the attention scores is then the same at every width.

    Raises:
      UserError: `model.scale_embeddings` is True as well.
    """
    if not config.base_width:
        return 1.0
    if config.scale_embeddings:
        raise UserError("model.base_width requires model.scale_embeddings=False: it keeps the scale of embeddings")
    return config.base_width / config.width


def matmul_parameters(config: ModelConfig) -> int:
    """Number of parameters of the matrices that multiply every token, including the head."""
    c, h = config, positions.head_dim(config)
    attention = c.width * h * (2 * c.num_heads + 2 * c.num_kv_heads)
    mlp = c.width * c.mlp_dim * (3 if c.mlp == "gated" else 2)
    return c.num_layers * (attention + mlp) + c.width * c.vocab_size


def flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of the model per token of a training step: 6 P + 12 L N H T (Chowdhery et al. 2022, PaLM, appendix B).

    P is `matmul_parameters`, L the number of layers, N the number of heads, H head_dim, and T the sequence length.
    """
    attention = 12 * config.num_layers * config.num_heads * positions.head_dim(config) * length
    return 6.0 * matmul_parameters(config) + attention
