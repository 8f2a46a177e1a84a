"""Modules that act on each token separately: linear layers, norms, MLPs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax import weights
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T time, D width, F MLP width.

ACTIVATION_STATS = "activations"  # Flax collection of statistics of every layer, filled if it is mutable
CAPTURE = "capture"  # Flax collection of attention probabilities and hidden states; see `capture`

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


class Module(nn.Module):
    """Base class of linen modules whose weights may be of any kind of `weights.Weight`."""

    config: ModelConfig

    def weight(self, name: str, init: Callable[..., Any], shape: tuple[int, ...]) -> weights.Weight:
        """The weight `name` of the parameter tree, or a new array of `precision.params` at initialization.

        `self.param` is used at initialization only. It compares the shapes of leaves, and the leaves of a quantized or
        adapted weight have other shapes than `shape`. `trees.check` compares weights with the model at loading.
        """
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape, jnp.dtype(self.config.precision.params))

    def linear(
        self, x: jax.Array, name: str, features: int, depth_scale: bool = False, bias: bool = False
    ) -> jax.Array:
        """Multiplies x by the weight `name`, and adds the bias `NAME_bias` if `bias`.

        Args:
          x: float (..., in).
          name: name of the weight, (in, features).
          features: number of outputs.
          depth_scale: divides the initial standard deviation by sqrt(2 num_layers), for outputs that are added to the
            residual stream (Radford et al. 2019, GPT-2, section 2.3).
          bias: whether to add a bias.

        Returns:
          (..., features) in the dtype of x.
        """
        return self.linears(x, {name: features}, depth_scale, bias)[0]

    def linears(
        self, x: jax.Array, features: dict[str, int], depth_scale: bool = False, bias: bool = False
    ) -> list[jax.Array]:
        """Like `linear`, for several weights that multiply the same x: {name: features} -> [(..., features)]."""
        scale = 1.0 / (2 * self.config.num_layers) if depth_scale else 1.0
        init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
        kernels, biases = [], []
        for name, size in features.items():
            kernels.append(self.weight(name, init, (x.shape[-1], size)))
            biases.append(self.weight(f"{name}_bias", nn.initializers.zeros, (size,)) if bias else None)
        gathered = [mesh_lib.gathered_spec("/".join((*self.path, name))) for name in features]
        ys = weights.dots(x, kernels, accumulate=self.config.precision.accumulate, gathered=gathered)
        added = zip(ys, biases, strict=True)
        return [y if b is None else y + weights.dense(b).astype(y.dtype) for y, b in added]


class Norm(Module):
    """RMSNorm or LayerNorm over the last axis, in float32 or wider; the result has the dtype of x.

    RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. LayerNorm: Ba et al. 2016, arXiv:1607.06450.

    Attributes:
      kind: "rms" or "layer"; "" selects `model.norm`.
    """

    kind: str = ""

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
    """down(act(up x)), or gated: down(act(gate x) * up x) (Shazeer 2020, arXiv:2002.05202); (B, T, D) -> (B, T, D)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activation = choice("model.activation", c.activation, ACTIVATIONS)
        bias = c.bias or c.mlp_bias
        if choice("model.mlp", c.mlp, ("gated", "plain")) == "gated":
            up_BTF, gate_BTF = self.linears(x_BTD, {"up": c.mlp_dim, "gate": c.mlp_dim}, bias=bias)
            hidden_BTF = activation(gate_BTF) * up_BTF
        else:
            hidden_BTF = activation(self.linear(x_BTD, "up", c.mlp_dim, bias=bias))
        return self.linear(hidden_BTF, "down", c.width, depth_scale=True, bias=bias)
