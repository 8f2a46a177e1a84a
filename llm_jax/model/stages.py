"""Layers grouped into stages, ((kinds, repeats), ...), each of which is one scan over blocks of layers.

A uniform model has one stage. If the length of `model.layer_pattern` does not divide the number of layers, the
remaining layers are a second stage: 26 layers with a pattern of five local layers and a global one are
(((local x 5, global), 4), ((local, local), 1)).
"""

from llm_jax.errors import UserError
from llm_jax.schema import ModelConfig

LAYER_KINDS = ("global", "local", "nope")


def stages(config: ModelConfig) -> tuple[tuple[tuple[str, ...], int], ...]:
    """((kinds of the layers of a block, number of blocks), ...) in layer order.

    Raises:
      UserError: num_layers is below 1, the pattern is empty, or it contains an unknown kind.
    """
    pattern, layers = config.layer_pattern, config.num_layers
    if layers < 1:
        raise UserError(f"config key 'model.num_layers' is {layers}; expected at least 1")
    if not pattern or not set(pattern) <= set(LAYER_KINDS):
        raise UserError(
            f"config key 'model.layer_pattern' is {pattern}; expected a list of the kinds {', '.join(LAYER_KINDS)}"
        )
    if len(set(pattern)) == 1:
        pattern = pattern[:1]
    repeats, remainder = divmod(layers, len(pattern))
    full = ((pattern, repeats),) if repeats else ()
    return (*full, (pattern[:remainder], 1)) if remainder else full


def layout(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The argument `stages` of `trees.restage` for this model; () if layers are not scanned."""
    return tuple((len(kinds), repeats) for kinds, repeats in stages(config)) if config.scan_layers else ()


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of every layer, in order."""
    return tuple(kind for kinds, repeats in stages(config) for kind in kinds * repeats)
