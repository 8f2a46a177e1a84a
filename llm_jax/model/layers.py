"""The parts of a layer that know nothing of other tokens: weights, norms, MLPs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax import weights
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T time, D width, F MLP width.

CAPTURE = "capture"  # collection of attention probabilities and hidden states; see `capture`

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


class Module(nn.Module):
    """A linen module whose weights may be any kind of `weights.Weight`."""

    config: ModelConfig

    def weight(self, name: str, init: Callable[..., Any], shape: tuple[int, ...]) -> weights.Weight:
        """The weight `name`: whatever node stands in the tree, or at init a new array.

        Not `self.param` throughout: that compares leaf shapes, which a node's need not match
        (`trees.check` does, once, when weights are loaded).
        """
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape, jnp.dtype(self.config.precision.params))

    def linear(
        self, x: jax.Array, name: str, features: int, depth_scale: bool = False, bias: bool = False
    ) -> jax.Array:
        """x (..., in) -> (..., features) by the weight `name`, and `name_bias` where the model has biases.

        Args:
          bias: a bias even where the model has none elsewhere.
          depth_scale: start smaller by sqrt(2 layers), for what is added to the residual stream
            (Radford et al. 2019, GPT-2, section 2.3).
        """
        scale = 1.0 / (2 * self.config.num_layers) if depth_scale else 1.0
        init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
        kernel = self.weight(name, init, (x.shape[-1], features))
        y = weights.dot(x, kernel, accumulate=self.config.precision.accumulate)
        if self.config.bias or bias:
            y += weights.dense(self.weight(f"{name}_bias", nn.initializers.zeros, (features,))).astype(y.dtype)
        return y


class Norm(Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm over the last axis, in float32."""

    kind: str = ""  # "" takes model.norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = choice("model.norm", self.kind or self.config.norm, ("rms", "layer"))
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        if kind == "layer":
            y -= jnp.mean(y, -1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.config.norm_eps)
        y *= weights.dense(self.weight("scale", nn.initializers.ones, (x.shape[-1],)))
        if kind == "layer":
            y += weights.dense(self.weight("bias", nn.initializers.zeros, (x.shape[-1],)))
        return y.astype(x.dtype)


class MLP(Module):
    """Plain, or gated: down(act(gate x) * up x) (Shazeer 2020, arXiv:2002.05202)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activation = choice("model.activation", c.activation, ACTIVATIONS)
        up_BTF = self.linear(x_BTD, "up", c.mlp_dim)
        if choice("model.mlp", c.mlp, ("gated", "plain")) == "gated":
            hidden_BTF = activation(self.linear(x_BTD, "gate", c.mlp_dim)) * up_BTF
        else:
            hidden_BTF = activation(up_BTF)
        return self.linear(hidden_BTF, "down", c.width, depth_scale=True)
