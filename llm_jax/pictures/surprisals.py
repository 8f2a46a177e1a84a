"""The surprisal of each token of a text."""

import dataclasses
import math
from typing import Any

import numpy as np

from llm_jax import tokenizers
from llm_jax.decoding import score
from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.pictures import forward
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Passage, Picture, Table
from llm_jax.tokenizers import Tokenizer

_HIGH = 16.0  # bits of the strongest colour
_MOST = 10  # tokens of the table


@dataclasses.dataclass(frozen=True)
class Surprisals(Drawable):
    """The surprisal, -log2 p(token | tokens before it), of every token of a text.

    Attributes:
      tokens: T labels.
      bits: float64 (T,); NaN for a first token that nothing precedes.
      num_bytes: bytes of the text.
    """

    tokens: tuple[str, ...]
    bits: np.ndarray
    num_bytes: int

    def picture(self) -> Picture:
        total = float(np.nansum(self.bits))
        count = int(np.isfinite(self.bits).sum())
        title = f"{total:.1f} bits: {total / count:.2f} per token, {total / self.num_bytes:.2f} per byte"
        order = [int(i) for i in np.argsort(-np.nan_to_num(self.bits, nan=-1.0), kind="stable")[:_MOST]]
        rows = tuple(
            (float(self.bits[i]), repr(self.tokens[i]), "".join(self.tokens[max(0, i - 8) : i]))
            for i in order
            if np.isfinite(self.bits[i])
        )
        panels = (
            Passage(title, self.tokens, self.bits, "bits", _HIGH),
            Table("tokens with the largest surprisal", ("bits", "token", "after"), rows),
        )
        return Picture("Surprisal of each token", panels, "The surprisal is -log2 p(token | preceding tokens).")


def surprisal(model: Transformer, params: Any, tokenizer: Tokenizer, text: str, eos: bool = False) -> Surprisals:
    """Scores every token of a text by one forward pass.

    Args:
      params: in the layout of `model.config`.
      eos: whether EOS after the text is a token of it.

    Raises:
      UserError: fewer than two tokens, more than the model has positions, or a bidirectional model.
    """
    ids = (tokenizers.document if eos else tokenizers.prompt)(tokenizer, text)
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} tokens; expected at least 2, of which the first predicts the next")
    (scored,) = score.score(model, params, [(ids[:1], ids[1:])], batch_size=1)
    bits = np.array([math.nan, *scored.log_probabilities]) / -math.log(2)
    return Surprisals(forward.labels(tokenizer, ids), bits, len(text.encode()))
