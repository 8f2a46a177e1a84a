"""Low-rank adapters over frozen weights: pure functions on trees.

    adapters = lora.init(key, base, config.lora)       a separate tree, keyed by the paths of the adapted weights
    trainable, fixed = lora.split(adapters, variant)   trained entries, and the rest
    params = lora.attach(base, adapters)               parameters of the model; no copies or products
    params = lora.materialize(base, adapters)          dense arrays, for any Flax model and for merging
    base = lora.unmerge(params, adapters)
    combined = lora.combine(first, second); adapters = lora.mix(combined, mixture)

At every adapted path the adapter tree has `a` (I, R), `b` (R, O) and `scale` (), each with the leading
layer axis of the weight: the update is scale * a b. Variants add entries; see `adapt`.
"""

from llm_jax.lora.adapt import attach, init, join, ranks, split, subtract_start
from llm_jax.lora.merge import materialize, merge, merge_attached, quantize_factors, requantize, unmerge
from llm_jax.lora.mixing import combine, mix, to_lora

__all__ = [
    "attach",
    "combine",
    "init",
    "join",
    "materialize",
    "merge",
    "merge_attached",
    "mix",
    "quantize_factors",
    "ranks",
    "requantize",
    "split",
    "subtract_start",
    "to_lora",
    "unmerge",
]
