"""llm_jax: every concept of a large language model as a part that one config override swaps.

model, params, tokenizer = llm_jax.load("runs/default")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_jax.pretrained import load as load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # JAX is imported when it is needed, not with the package
        from llm_jax.pretrained import load

        return load
    raise AttributeError(f"module 'llm_jax' has no attribute '{name}'")
