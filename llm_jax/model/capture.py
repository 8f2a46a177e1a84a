"""Attention probabilities and hidden states of any model.

    captured = capture(model, params, tokens)
    captured.attentions[17][0, 3]      # layer 17, row 0, head 3: (queries, keys)

`capture` supports every position scheme and attention kernel, scanned and unrolled layers, adapters and quantized
weights, a cache, and `jax.jit`. Fused attention kernels do not return probabilities, so `capture` computes them again
from the same queries and keys. The logits equal those of `model.apply`.
"""

import dataclasses
from typing import Any

import jax

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.model.attention import KVCache, TokenMetadata
from llm_jax.model.layers import CAPTURE
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, T queries, S keys, D width, V vocabulary, N heads.


@trees.register
@dataclasses.dataclass(frozen=True)
class Captured:
    """The results of a forward pass with its intermediate values.

    The order of layers is that of `output_attentions` and `output_hidden_states` in the library transformers.

    Attributes:
      logits: (B, T, V) in the output dtype.
      attentions: the attention probabilities of each layer, num_layers arrays (B, N, T, S), float32, or the compute
        dtype if it is wider. S is T without a cache and the number of slots with one; empty slots have probability 0.
      hidden_states: num_layers + 1 arrays (B, T, D) in the compute dtype: the embeddings, then the output of each
        layer, the last one after the final norm.
      cache: the updated cache, or None without a cache.
    """

    logits: jax.Array
    attentions: tuple[jax.Array, ...]
    hidden_states: tuple[jax.Array, ...]
    cache: KVCache | None


def capture(
    model: Transformer,
    params: Any,
    tokens_BT: jax.Array,
    metadata: TokenMetadata | None = None,
    cache: KVCache | None = None,
    types_BT: jax.Array | None = None,
) -> Captured:
    """Runs the model and returns the logits with the attention probabilities and hidden states of every layer.

    Args:
      model: the model, in any layout of its layers.
      params: parameters in the layout of the model, with weights of any kind.
      tokens_BT: int32 (B, T).
      metadata: positions and segments, int32 (B, T) each; by default one segment per row from position 0.
      cache: from `init_cache` or an earlier call, for a prefill or a decoding step.
      types_BT: int32 (B, T), token types of a model with `type_vocab_size`; by default 0.

    Raises:
      UserError: see `Transformer`; or a cache with a position scheme whose cached keys may change.
    """
    if cache is not None and cache.tokens.ids is not None:
        raise UserError(
            f"model.position.scaling={model.config.position.scaling} changes cached keys as a document grows; capture "
            "whole texts without a cache"
        )

    def forward(model: Transformer) -> tuple[jax.Array, jax.Array, KVCache | None]:
        features_BTD, updated = model.features(tokens_BT, metadata, cache, types_BT)
        return model.logits(features_BTD), features_BTD, updated

    outputs: Any = model.apply({"params": params}, method=forward, mutable=[CAPTURE])
    (logits, features_BTD, updated), state = outputs
    flat = trees.flatten(trees.unstack(state[CAPTURE]))  # every value is a tuple of one array
    layers = [f"layers/{i}" for i in range(model.config.num_layers)]
    attentions = tuple(flat[f"{layer}/attention/probabilities"][0] for layer in layers)
    outputs_of_layers = [flat[f"{layer}/hidden"][0] for layer in layers[:-1]]
    return Captured(logits, attentions, (flat["embedded"][0], *outputs_of_layers, features_BTD), updated)
