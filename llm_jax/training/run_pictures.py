"""Pictures of a model while it trains: `report.pictures`."""

from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.pictures import attention_maps, position_curves, quantization_errors, sampling_steps, surprisals
from llm_jax.pictures.panels import Drawable
from llm_jax.schema import choice
from llm_jax.tokenizers import Tokenizer

# {name: function (model, params, tokenizer, text) -> picture}.
PICTURES: dict[str, Callable[[Transformer, Any, Tokenizer, str], Drawable]] = {
    "attention": attention_maps.attention,
    "positions": lambda model, params, tokenizer, text: position_curves.positions(model.config, params),
    "probabilities": sampling_steps.probabilities,
    "quantization": lambda model, params, tokenizer, text: quantization_errors.quantization(params),
    "surprisal": surprisals.surprisal,
}
_OF_TEXTS = ("attention", "probabilities", "surprisal")


def check(names: tuple[str, ...], prompts: tuple[str, ...]) -> None:
    """Raises UserError for an unknown picture, or one of a text where `eval.prompts` has none."""
    for name in names:
        choice("report.pictures", name, PICTURES)
        if name in _OF_TEXTS and not prompts:
            raise UserError(f"report.pictures={name} is a picture of the first of eval.prompts, which is empty")


def draw(
    names: tuple[str, ...], model: Transformer, params: Any, tokenizer: Tokenizer, text: str
) -> Iterator[tuple[str, bytes | str]]:
    """Yields (name, PNG) of each picture, or (name, the reason) of one that this model does not have.

    Args:
      names: of `PICTURES`.
      params: one entry per layer.
      text: what attention, surprisal and probabilities are of.
    """
    for name in names:
        try:
            yield name, PICTURES[name](model, params, tokenizer, text).png()
        except UserError as error:
            yield name, str(error)
