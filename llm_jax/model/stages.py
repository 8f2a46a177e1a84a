"""The depth of a model as stages: ((kinds, repeats), ...), one scan per stage.

A uniform model has one stage; a pattern that does not divide the depth leaves a shorter last stage:
26 layers of five local and one global are (((local x 5, global), 4), ((local, local), 1)).
"""

from llm_jax.errors import UserError
from llm_jax.schema import ModelConfig

LAYER_KINDS = ("global", "local")


def stages(config: ModelConfig) -> tuple[tuple[tuple[str, ...], int], ...]:
    """((kinds of one block, repeats), ...) in layer order.

    Raises:
      UserError: no layer, an empty pattern, or an unknown kind.
    """
    pattern, layers = config.layer_pattern, config.num_layers
    if layers < 1:
        raise UserError(f"config key 'model.num_layers' is {layers}; expected at least 1")
    if not pattern or not set(pattern) <= set(LAYER_KINDS):
        raise UserError(
            f"config key 'model.layer_pattern' is {pattern}; expected kinds out of {', '.join(LAYER_KINDS)}"
        )
    if len(set(pattern)) == 1:
        pattern = pattern[:1]
    repeats, rest = divmod(layers, len(pattern))
    whole = ((pattern, repeats),) if repeats else ()
    return (*whole, (pattern[:rest], 1)) if rest else whole


def layout(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The stages as `trees.restage` takes them; () where the layers are not scanned."""
    return tuple((len(kinds), repeats) for kinds, repeats in stages(config)) if config.scan_layers else ()


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of every layer."""
    return tuple(kind for kinds, repeats in stages(config) for kind in kinds * repeats)
