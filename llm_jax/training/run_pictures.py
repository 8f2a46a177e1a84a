"""Pictures of a model during training: `report.pictures`."""

from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.errors import UserError
from llm_jax.model.transformer import Transformer
from llm_jax.pictures import attention_maps, position_curves, quantization_errors, sampling_steps, surprisals
from llm_jax.pictures.drawable import Drawable
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
_NEED_TEXT = ("attention", "probabilities", "surprisal")


def check(names: tuple[str, ...], prompts: tuple[str, ...]) -> None:
    """Raises UserError for an unknown picture, or for a picture that needs a text if `eval.prompts` is empty."""
    for name in names:
        choice("report.pictures", name, PICTURES)
        if name in _NEED_TEXT and not prompts:
            raise UserError(f"report.pictures={name} needs a text; set eval.prompts to at least one prompt")


def draw(
    names: tuple[str, ...], model: Transformer, params: Any, tokenizer: Tokenizer, text: str
) -> Iterator[tuple[str, bytes | str]]:
    """Yields (name, PNG bytes) of each picture, or (name, reason) if the model does not support the picture.

    Args:
      names: names in `PICTURES`.
      params: one entry per layer.
      text: input of the pictures of attention, surprisal and probabilities.
    """
    for name in names:
        try:
            yield name, PICTURES[name](model, params, tokenizer, text).png()
        except UserError as error:
            yield name, str(error)
