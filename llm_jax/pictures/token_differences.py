"""The tokens of a text whose losses differ most between two models."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import bars
from llm_jax.data.rows import AnyRows, Batch, batches
from llm_jax.errors import UserError
from llm_jax.pictures import forward
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Panel, Passage, Picture, Table
from llm_jax.tokenizers import Tokenizer

# Letters of shapes: R rows, B batch, T time.

_BEFORE, _AFTER = 12, 4  # tokens of context beside a token
_EXCERPTS = 3  # coloured rows
_EXCERPT = 400  # tokens of a coloured row


@dataclasses.dataclass(frozen=True)
class TokenDifferences(Drawable):
    """Losses of two models on the same tokens.

    Attributes:
      names: of the two models.
      tokens, before, after: labels of the tokens that differ most, and the text on both sides of them: those that the
        second model predicts worse than the first, then those that it predicts better, the largest difference first.
      bits: float64 (tokens, 2), their losses under both models.
      means: float64 (2,), bits per token of both models over all tokens that were compared.
      count: how many tokens were compared.
      excerpts: labels of the tokens of the rows with the largest sums of absolute differences, the largest first.
      excerpt_bits: float64 (T, 2) of each excerpt, losses under both models; NaN where no loss counts.
    """

    names: tuple[str, str]
    tokens: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    bits: np.ndarray
    means: np.ndarray
    count: int
    excerpts: tuple[tuple[str, ...], ...]
    excerpt_bits: tuple[np.ndarray, ...]

    def picture(self) -> Picture:
        first, second = self.names
        columns = ("before", "token", "after", f"bits, {first}", f"bits, {second}", "difference")
        rows = [
            (before, repr(token), after, float(a), float(b), float(b - a))
            for before, token, after, (a, b) in zip(self.before, self.tokens, self.after, self.bits, strict=True)
        ]
        panels: list[Panel] = [
            Table(f"tokens that {second} predicts worse than {first}", columns, tuple(r for r in rows if r[-1] > 0)),
            Table(f"tokens that {second} predicts better than {first}", columns, tuple(r for r in rows if r[-1] <= 0)),
        ]
        differences = [bits[:, 1] - bits[:, 0] for bits in self.excerpt_bits]
        high = max((float(np.nanmax(np.abs(d), initial=0.0)) for d in differences), default=0.0) or 1.0
        for i, (tokens, bits, values) in enumerate(zip(self.excerpts, self.excerpt_bits, differences, strict=True), 1):
            title = f"text {i} of {len(self.excerpts)}: {second} is worse where orange, better where blue"
            hints = tuple("no loss" if np.isnan(b - a) else self._hint(a, b) for a, b in bits)
            panels.append(Passage(title, tokens, values, "bits of difference", high, hints=hints))
        note = (
            f"{self.count:,} held-out tokens were compared: {self.means[0]:.3f} bits per token for {first}, "
            f"{self.means[1]:.3f} for {second}."
        )
        return Picture("Tokens where the models differ most", tuple(panels), note)

    def _hint(self, first: float, second: float) -> str:
        return f"{second - first:+.2f} bits: {self.names[0]} {first:.2f}, {self.names[1]} {second:.2f}"


def token_differences(
    names: tuple[str, str],
    models: Sequence[tuple[Callable[[Any, Batch], jax.Array], Any]],
    tokenizer: Tokenizer,
    rows: AnyRows,
    batch_size: int = 16,
    limit: int = 64,
    count: int = 12,
) -> TokenDifferences:
    """Compares two models of one tokenizer on the first rows of a text.

    Args:
      models: for each (loss, parameters), where `loss` is jitted, (parameters, batch) -> nats of every counted target,
        0 for others, float32 (B, T).
      rows: the held-out rows.
      limit: the largest number of rows.
      count: how many tokens to list in each direction.

    Raises:
      UserError: no token counts.
    """
    size = min(limit, len(rows))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = [rows[i] for i in range(size)]
    parts: list[list[np.ndarray]] = [[], []]
    steps = -(-size // batch_size)
    stream = batches(rows, 0, steps, batch_size, device)
    for batch in bars.bar(stream, "comparing tokens", steps, leave=False, delay=2):
        for losses, (loss, params) in zip(parts, models, strict=True):
            losses.append(np.asarray(loss(params, batch), np.float64))
    mask_RT = np.array([row["mask"] for row in arrays], bool)
    if not mask_RT.any():
        raise UserError("no held-out token counts; hold out more text (data.validation_fraction)")
    bits_2RT = np.stack([np.concatenate(losses)[:size] for losses in parts]) / math.log(2)
    difference_RT = np.where(mask_RT, bits_2RT[1] - bits_2RT[0], 0.0)
    order = np.argsort(-difference_RT, axis=None, kind="stable")
    places = [np.unravel_index(int(i), difference_RT.shape) for i in (*order[:count], *order[::-1][:count])]
    worse = [(r, t) for r, t in places[:count] if difference_RT[r, t] > 0]
    better = [(r, t) for r, t in places[count:] if difference_RT[r, t] < 0]
    listed = [(int(r), int(t)) for r, t in (*worse, *better)]
    contexts = [_context(tokenizer, arrays[r], t) for r, t in listed]
    largest = np.argsort(-np.abs(difference_RT).sum(1), kind="stable")[:_EXCERPTS]
    counted_2RT = np.where(mask_RT, bits_2RT, np.nan)
    return TokenDifferences(
        names,
        tuple(label for _, label, _ in contexts),
        tuple(before for before, _, _ in contexts),
        tuple(after for _, _, after in contexts),
        np.array([bits_2RT[:, r, t] for r, t in listed]).reshape(-1, 2),
        bits_2RT[:, mask_RT].mean(1),
        int(mask_RT.sum()),
        tuple(forward.labels(tokenizer, arrays[r]["targets"][:_EXCERPT].tolist()) for r in largest),
        tuple(counted_2RT[:, r, :_EXCERPT].T for r in largest),
    )


def _context(tokenizer: Tokenizer, row: dict[str, np.ndarray], t: int) -> tuple[str, str, str]:
    """(text before target t of a row, its label, text after it), within its document."""
    inputs = row["inputs"][: t + 1][row["segments"][: t + 1] == row["segments"][t]]
    after = row["targets"][t + 1 :][(row["segments"] == row["segments"][t])[t + 1 :]]
    labels = forward.labels(tokenizer, [int(row["targets"][t])])
    return tokenizer.decode(inputs[-_BEFORE:].tolist()), labels[0], tokenizer.decode(after[:_AFTER].tolist())
