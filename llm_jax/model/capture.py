"""Attention probabilities and hidden states of any model, on request.

    captured = capture(model, params, tokens)
    captured.attentions[17][0, 3]      # layer 17, row 0, head 3: (queries, keys)

`capture` works with every position scheme and attention kernel, with scanned and unrolled layers, with adapters
and quantized weights, with a cache, and under `jax.jit`. The probabilities are computed beside the attention
kernel, from the same queries and keys, so that the outputs of the model are those of a plain call.
"""

import dataclasses
from typing import Any

import jax

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.model.attention import KVCache, Tokens
from llm_jax.model.layers import CAPTURE
from llm_jax.model.transformer import Transformer

# Letters of shapes: B batch, T queries, S keys, D width, V vocabulary, N heads.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Captured:
    """What a forward pass computes, in the order of transformers' `output_attentions` and `output_hidden_states`.

    Attributes:
      logits: (B, T, V) in the output dtype.
      attentions: the attention probabilities of each layer, num_layers arrays (B, N, T, S), float32 or the compute
        dtype where it is wider. S is T, or with a cache its number of slots; empty slots have 0.
      hidden_states: num_layers + 1 arrays (B, T, D) in the compute dtype: the embeddings, then the output of each
        layer, the last one after the final norm.
      cache: the updated cache, or None where none was passed.
    """

    logits: jax.Array
    attentions: tuple[jax.Array, ...]
    hidden_states: tuple[jax.Array, ...]
    cache: KVCache | None


def capture(
    model: Transformer,
    params: Any,
    tokens_BT: jax.Array,
    where: Tokens | None = None,
    cache: KVCache | None = None,
    types_BT: jax.Array | None = None,
) -> Captured:
    """Runs the model and returns the logits with the attention probabilities and hidden states of every layer.

    Args:
      params: parameters in the layout of the model, with weights of any kind.
      tokens_BT: int32 (B, T).
      where: positions and segments, int32 (B, T) each; by default one segment per row from position 0.
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
        features_BTD, updated = model.features(tokens_BT, where, cache, types_BT)
        return model.logits(features_BTD), features_BTD, updated

    outputs: Any = model.apply({"params": params}, method=forward, mutable=[CAPTURE])
    (logits, features_BTD, updated), state = outputs
    flat = trees.flatten(trees.unstack(state[CAPTURE]))  # every value is a tuple of one array
    layers = [f"layers/{i}" for i in range(model.config.num_layers)]
    attentions = tuple(flat[f"{layer}/attention/probabilities"][0] for layer in layers)
    outputs_of_layers = [flat[f"{layer}/hidden"][0] for layer in layers[:-1]]
    return Captured(logits, attentions, (flat["embedded"][0], *outputs_of_layers, features_BTD), updated)
