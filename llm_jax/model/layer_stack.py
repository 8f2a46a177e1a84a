"""The layers of a transformer, one after the other or scanned.

`Layer` is attention and an MLP with residual connections, and `Layers` runs all of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax import trees
from llm_jax.errors import UserError
from llm_jax.model.attention import Attention
from llm_jax.model.layers import ACTIVATION_STATS, CAPTURE, MLP, Module, Norm
from llm_jax.model.stages import stages
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import ModelConfig, choice

# Letters of shapes: B batch, T time, D width.

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names("dot"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Layer(Module):
    """Attention and MLP with residual connections and norms, placed by `model.norm_placement`.

    If the collection `ACTIVATION_STATS` is mutable, the layer sows "rms", the root mean square of its output.

    Attributes:
      kind: kind of the layer, see `model.layer_pattern`.
    """

    kind: str = "global"

    @nn.compact
    def __call__(self, x_BTD, queries, keys, bias, cache, index, depth=None):
        # Without this constraint, the partitioner may shard the width of the activations, like the weights, instead of
        # their rows, and multiply all rows on every device.
        x_BTD = mesh_lib.constrain(x_BTD, mesh_lib.BATCH, mesh_lib.CONTEXT, None)
        x_BTD, cache = self._residual_blocks(x_BTD, queries, keys, bias, cache, index, depth)
        if self.is_mutable_collection(ACTIVATION_STATS) and not self.is_initializing():
            self.sow(ACTIVATION_STATS, "rms", jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(jnp.float32)))))
        if self.is_mutable_collection(CAPTURE) and not self.is_initializing():
            self.sow(CAPTURE, "hidden", x_BTD)
        return x_BTD, cache

    def _residual_blocks(self, x_BTD, queries, keys, bias, cache, index, depth):
        c = self.config
        attention, mlp = Attention(c, self.kind, name="attention"), MLP(c, name="mlp")
        placement = choice("model.norm_placement", c.norm_placement, ("pre", "post", "output", "both"))
        if c.parallel_residual:
            if placement != "pre":
                raise UserError(f"model.parallel_residual=True needs model.norm_placement=pre, not {placement}")
            normed = Norm(c, name="attention_norm")(x_BTD)
            update, cache = attention(normed, queries, keys, bias, cache, index, depth)
            mlp_input = Norm(c, name="mlp_norm")(x_BTD) if c.parallel_norms else normed
            return _add(c, x_BTD, update + mlp(mlp_input)), cache
        before, after = placement in ("pre", "both"), placement in ("output", "both")
        normed = Norm(c, name="attention_norm")(x_BTD) if before else x_BTD
        update, cache = attention(normed, queries, keys, bias, cache, index, depth)
        x_BTD = _add(c, x_BTD, Norm(c, name="attention_post_norm")(update) if after else update)
        if placement == "post":
            x_BTD = Norm(c, name="attention_norm")(x_BTD)
        update = mlp(Norm(c, name="mlp_norm")(x_BTD) if before else x_BTD)
        x_BTD = _add(c, x_BTD, Norm(c, name="mlp_post_norm")(update) if after else update)
        return Norm(c, name="mlp_norm")(x_BTD) if placement == "post" else x_BTD, cache


def _add(config: ModelConfig, x_BTD: jax.Array, update_BTD: jax.Array) -> jax.Array:
    """The residual sum, with the factor `model.residual_multiplier` of the update."""
    return x_BTD + (update_BTD if config.residual_multiplier == 1 else update_BTD * config.residual_multiplier)


class Block(Module):
    """The layers of one block of a stage, the body of its scan. `trees` documents the names of the layers."""

    kinds: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x_BTD, cache, depth, queries, keys, bias, index):
        layer, caches = rematerialized(self.config), {}
        for i, kind in enumerate(self.kinds):
            name = f"{i}::{len(self.kinds)}"
            x_BTD, caches[name] = layer(self.config, kind, name=name)(
                x_BTD, queries, keys, bias, cache and cache[name], index, None if depth is None else depth + i
            )
        return x_BTD, (caches if cache is not None else None)


class Layers(Module):
    """All layers, scanned stage by stage or unrolled, by `model.scan_layers`."""

    @nn.compact
    def __call__(self, x_BTD, queries, keys, bias, cache, index):
        c, caches, start = self.config, {}, 0
        layer, run_layer = rematerialized(c), self._traced_once()
        self._check_layout()
        for kinds, repeats in stages(c):
            stop = start + len(kinds) * repeats
            if c.scan_layers:
                name = f"{start}:{stop}"
                scan = nn.scan(
                    Block,
                    variable_axes={"params": 0, ACTIVATION_STATS: 0, CAPTURE: 0},
                    split_rngs={"params": True},
                    in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                    length=repeats,
                )
                depths = jnp.arange(start, stop, len(kinds)) if c.scale_attention_by_depth else None
                x_BTD, caches[name] = scan(c, kinds, name=name)(
                    x_BTD, cache and cache[name], depths, queries, keys, bias, index
                )
            else:
                for i, kind in enumerate(kinds * repeats, start):
                    inputs = (x_BTD, queries, keys, bias, cache and cache[str(i)], index)
                    if run_layer is None:
                        x_BTD, caches[str(i)] = layer(c, kind, name=str(i))(*inputs, i)
                    else:
                        depth = jnp.int32(i) if c.scale_attention_by_depth else None
                        params = self.variables["params"][str(i)]
                        x_BTD, caches[str(i)] = run_layer(kind, i, params, *inputs, depth)
            start = stop
        return x_BTD, (caches if cache is not None else None)

    def _check_layout(self) -> None:
        """Raises UserError if the layout of the parameters does not match `model.scan_layers`."""
        names = self.variables.get("params", {})
        if names and any(":" in name for name in names) != bool(self.config.scan_layers):
            stacked, model = ("single layers", "True") if self.config.scan_layers else ("stacked layers", "False")
            raise UserError(
                f"the parameters have {stacked}, but the model has model.scan_layers={model}; use a model and "
                "parameters that belong together, such as setup.model and setup.model_params(state)"
            )

    def _traced_once(self) -> Callable[..., Any] | None:
        """Returns a function (kind, index, parameters, *inputs of the layer) -> outputs that traces equal layers once.

        Layers of the same kind, whose weights have the same kinds and the same shardings in products, are traced and
        lowered once under `jax.jit` instead of once per layer. XLA inlines the calls, so the compiled code is the same.
        A new function is created at every call, because traced code depends on the mesh in use. Returns None outside of
        a trace and at initialization; then each layer is applied as a module.
        """
        assert self.scope is not None
        if self.scope.mutable or not isinstance(jax.tree.leaves(self.variables)[0], jax.core.Tracer):
            return None
        c, layer, path = self.config, rematerialized(self.config), "/".join(self.path)
        first_layers: dict[Any, int] = {}  # {shardings of the weights in products: index of the first such layer}

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def traced(kind: str, index: int, params: Any, *inputs: Any) -> Any:
            with mesh_lib.relative_paths(f"{path}/{index}"):
                return layer(c, kind).apply({"params": params}, *inputs)

        def run_layer(kind: str, index: int, params: Any, *inputs: Any) -> Any:
            gathered = tuple(mesh_lib.gathered_spec(f"{path}/{index}/{name}") for name in trees.flatten(params))
            return traced(kind, first_layers.setdefault(gathered, index), params, *inputs)

        return run_layer


def rematerialized(config: ModelConfig) -> Any:
    """The class `Layer`, rematerialized in the backward pass by the policy of `model.remat`."""
    policy = choice("model.remat", config.remat, REMAT)
    return nn.remat(Layer, prevent_cse=not config.scan_layers, policy=policy) if policy else Layer
