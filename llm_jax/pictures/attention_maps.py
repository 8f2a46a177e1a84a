"""Attention probabilities by layer and head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.pictures import forward
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Heatmaps, Panel, Picture
from llm_jax.tokenizers import Tokenizer

# Letters of shapes: L layers, N heads, T queries, S keys.


@dataclasses.dataclass(frozen=True)
class AttentionMaps(Drawable):
    """Which tokens each token attends to.

    Attributes:
      tokens: T labels.
      layers, heads: the indices of the layers and heads that are included.
      probabilities: float32 (L, N, T, S); the sum over S is 1.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    probabilities: np.ndarray

    def measures(self) -> dict[str, np.ndarray]:
        """Averages over the queries after the first one: {measure: float64 (L, N)}.

        Probabilities of the first token, of the token before the query and of the query itself, and the entropy of
        the distribution in bits.
        """
        p_LNTS = self.probabilities[:, :, 1:].astype(np.float64)
        count = len(self.tokens) - 1
        if not count:
            raise UserError("the text is a single token, which can attend to itself only; give a longer text")
        queries = np.arange(count)
        logs = np.log2(np.where(p_LNTS > 0, p_LNTS, 1))
        return {
            "probability of the first token": p_LNTS[..., 0].mean(-1),
            "probability of the previous token": p_LNTS[:, :, queries, queries].mean(-1),
            "probability of the token itself": p_LNTS[:, :, queries, queries + 1].mean(-1),
            "entropy": -(p_LNTS * logs).sum(-1).mean(-1),
        }

    def picture(self) -> Picture:
        rows = tuple(f"layer {i}" for i in self.layers)
        columns = tuple(f"head {i}" for i in self.heads)
        panels: list[Panel] = []
        if len(self.layers) * len(self.heads) > 1:
            for name, values in self.measures().items():
                is_entropy = name == "entropy"
                high = float(np.log2(len(self.tokens))) if is_entropy else 1.0
                title = f"{name}, mean over the tokens after the first"
                unit = "bits" if is_entropy else "probability"
                panels.append(Heatmaps(title, ("",), values[None], rows, columns, unit, 0.0, high))
        for layer, p_NTS in zip(self.layers, self.probabilities, strict=True):
            single_head = len(self.heads) == 1
            title = f"layer {layer}, head {self.heads[0]}" if single_head else f"layer {layer}"
            names = ("",) if single_head else columns
            panels.append(Heatmaps(title, names, p_NTS, self.tokens, self.tokens, "probability", 0.0, 1.0))
        note = "Rows are query tokens, columns are key tokens; each row sums to 1."
        return Picture("Attention", tuple(panels), note)


def attention(
    model: Transformer,
    params: Any,
    tokenizer: Tokenizer,
    text: str,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
) -> AttentionMaps:
    """Attention maps of a text.

    Args:
      params: in the layout of `model.config`.
      layers, heads: which to include; (): all.

    Raises:
      UserError: a layer or a head that the model does not have, an empty text, or one that is too long.
    """
    config = model.config
    layers = _checked("layer", layers, config.num_layers)
    heads = _checked("head", heads, config.num_heads)
    ids = forward.text_ids(model, params, tokenizer, text)
    attentions = forward.capture(model, params, [ids]).attentions
    count = len(ids)
    probabilities = np.stack([attentions[i][0, list(heads), :count, :count] for i in layers])
    return AttentionMaps(forward.labels(tokenizer, ids), layers, heads, probabilities.astype(np.float32))


def _checked(name: str, indices: Sequence[int], count: int) -> tuple[int, ...]:
    """The indices, or all of them if there are none. Raises UserError for one that the model does not have."""
    if wrong := [i for i in indices if not 0 <= i < count]:
        raise UserError(f"{name}={wrong[0]}; the model has the {name}s 0 to {count - 1}")
    return tuple(indices) or tuple(range(count))
