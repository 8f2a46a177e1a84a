"""The interface of all forms of checkpoints: config, tokenizer, parameters and identity."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax import configuration, trees, weights
from llm_jax.checkpoints import generation_config
from llm_jax.errors import UserError
from llm_jax.model.stages import layout
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import processes
from llm_jax.schema import CHECKPOINT_DTYPES, Config, DataConfig, ModelConfig, Rules, attribute_names, value_names
from llm_jax.tokenizers import Tokenizer

Shardings = Callable[[Any], Any]  # abstract parameters -> a `jax.sharding.Sharding` for every leaf


class Loaded(NamedTuple):
    """A model with its parameters and its tokenizer."""

    model: Transformer
    params: dict[str, Any]
    tokenizer: Tokenizer

    if not TYPE_CHECKING:  # type: ignore[misc]  # for which every attribute would exist

        def __getattr__(self, name: str) -> Any:
            raise attribute_names.attribute_error("the result of llm_jax.load (model, params, tokenizer)", name)


class Checkpoint(abc.ABC):
    """A checkpoint on disk, read lazily. `llm_jax.open` returns a `Checkpoint`.

    Attributes:
      form: "run", "adapters", "huggingface", "gguf" or "peft".
      path: the directory or file; for a run, the directory of one of its checkpoints.
      name: the name in records: asset:NAME, hf:ORG/NAME, or the absolute path.
      run_config: the whole configuration of a run directory; None for other forms.
      base: the checkpoint that adapters adapt; None for other forms.
    """

    form: ClassVar[str]

    def __init__(self, path: pathlib.Path, name: str):
        self.path, self.name = path, name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def run_config(self) -> Config | None:
        return None

    @property
    def training_data(self) -> DataConfig | None:
        """The section `data` of the run that trained the model; None if the checkpoint records none."""
        return self.run_config.data if self.run_config and self.run_config.data.source else None

    @property
    def base(self) -> "Checkpoint | None":
        return None

    @property
    def generation_config_path(self) -> pathlib.Path:
        """The file that `generation_config` is read from, which need not exist."""
        path = self.path / generation_config.FILE
        return path if path.is_file() or self.base is None else self.base.generation_config_path

    @property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json, also from the base of adapters; {} if there is none.

        Raises:
          UserError: the file cannot be read.
        """
        path = self.path / generation_config.FILE
        return generation_config.read(path) if path.is_file() or self.base is None else self.base.generation_config

    @property
    @abc.abstractmethod
    def config(self) -> ModelConfig:
        """The configuration of the model. Raises UserError if it cannot be read or is not supported."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if it cannot be read or does not fit the model."""

    @property
    def identity(self) -> str:
        """A text that identifies this checkpoint: name, size and modification time of its files."""
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.iterdir() if p.is_file())
        return "; ".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)

    @property
    @abc.abstractmethod
    def family(self) -> str:
        """The Hugging Face `model_type` of the model. Raises UserError if no supported family holds it."""

    @abc.abstractmethod
    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        """The parameters for the model of `config`, every shard read from the file to its device.

        Args:
          config: the model; its `scan_layers` gives the layout, its `precision.params` the dtype of the arrays.
          shardings: abstract parameters in any layout -> a sharding for every leaf.
          as_stored: keep the weights as they are on disk: the dtypes of a run, the quantized tensors of a GGUF
            file. If layers then hold weights of different kinds, they come one entry per layer.

        Raises:
          UserError: the weights are damaged or do not fit the model.
        """

    @property
    def mesh_rules(self) -> Rules:
        """The shardings of the weights: `mesh.rules` of the run, or their default."""
        return (self.run_config or configuration.default()).mesh.rules

    def load(
        self,
        scan_layers: bool = False,
        dtype: str | None = None,
        as_stored: bool = False,
        activations: str = "float",
        mesh: str = "",
    ) -> Loaded:
        """The model, its parameters on the default device or a mesh, and the tokenizer. See `llm_jax.load`."""
        place = self._on_mesh(mesh) if mesh else on_default_device
        if as_stored and self.form != "gguf":
            raise UserError(f"--as_stored keeps the quantized tensors of a .gguf file; {self.name} is not one")
        # The attention kernel depends on the machine, not on the checkpoint.
        config = dataclasses.replace(self.config, scan_layers=scan_layers, attention_kernel="auto")
        dtype = _dtype_name(dtype) if dtype else ""
        trained_here = bool(self.run_config or (self.base and self.base.run_config))
        if not trained_here:
            config = with_dtype(config, dtype or "float32")
        tokenizer = self.tokenizer
        params = self.params(config, place, as_stored=as_stored or self.form != "gguf")
        if trained_here and dtype:
            config, flat = with_dtype(config, dtype), trees.flatten(params)
            del params  # one weight at a time exists in both dtypes
            params = trees.unflatten({path: weights.cast(flat.pop(path), dtype) for path in list(flat)})
        params = weights.with_activations(params, activations)
        if not mesh:
            flat = trees.flatten(params)
            del params  # one weight at a time exists in both layouts
            params = trees.unflatten({path: weights.lay_out(flat.pop(path)) for path in list(flat)})
        return Loaded(Transformer(dataclasses.replace(config, scan_layers=is_stacked(params))), params, tokenizer)

    def _on_mesh(self, sizes: str) -> Shardings:
        """A `Shardings` over a mesh of all devices of this process, with the axis sizes of `mesh.parse`."""
        processes.check_single(f"--mesh={sizes}")
        mesh = mesh_lib.make(mesh_lib.parse(sizes, configuration.default("mesh")))
        return functools.partial(mesh_lib.shardings, rules=self.mesh_rules, mesh=mesh)


def unreadable_base(path: pathlib.Path, error: UserError) -> UserError:
    """Converts an `error` of reading the base to an error of the adapters at `path`."""
    return UserError(f"{path}: the base of its adapters cannot be read: {error}")


def abstract_params(model: Transformer) -> dict[str, Any]:
    """Shapes and dtypes of the dense parameters of a model, without computing them."""
    config = dataclasses.replace(model.config, scan_layers=True)  # traces only one layer
    # Users may edit the file of a custom part (FILE:NAME) between two calls.
    trace = _trace_params.__wrapped__ if ":" in config.position.kind else _trace_params
    params = jax.tree.map(lambda leaf: leaf, trace(config))
    return params if model.config.scan_layers else jax.eval_shape(trees.unstack, params)


@functools.lru_cache(maxsize=64)
def _trace_params(config: ModelConfig) -> dict[str, Any]:
    model, token = Transformer(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), token)["params"]


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype in which a checkpoint can be loaded. Raises UserError for any other value."""
    try:
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    allowed = (*CHECKPOINT_DTYPES, *(("float64",) if jax.config.read("jax_enable_x64") else ()))
    if name not in allowed:
        raise UserError(f"dtype={name!r}; {value_names.expected(name, allowed)}")
    return name


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """`config` with parameters and computation in `dtype`."""
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, params=dtype, compute=dtype))


def is_stacked(params: trees.Tree) -> bool:
    """Whether layers are stacked for a scan, rather than one entry per layer."""
    return any(trees.layers_of(path) is not None for path in trees.flatten(params))


def on_default_device(tree: Any) -> Any:
    """A `Shardings` that places every leaf on the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, tree)


def place_like(tree: Any, params: Any) -> Any:
    """Puts the arrays of `tree` on the devices of `params`: if these are sharded over a mesh, on every device of it."""
    mesh = mesh_lib.mesh_of(params)
    return tree if mesh is None else jax.device_put(tree, mesh_lib.replicated(mesh))


def convert_layout(
    params: trees.Tree, config: ModelConfig, shardings: Shardings, as_stored: bool, dtype: str = ""
) -> dict[str, Any]:
    """Converts parameters to the layout of `config`, and moves them to `shardings`.

    Args:
      as_stored: if layers hold weights of different kinds, return one entry per layer instead of raising.
      dtype: the dtype to cast arrays to; "" does not cast them. Quantized weights are never cast.

    Raises:
      UserError: layers that `config` stacks hold weights of different kinds.
    """
    stages = layout(config)
    if as_stored and not trees.stackable(params, stages):
        stages = ()

    def change(tree: Any) -> Any:
        return trees.restage(cast(tree, dtype) if dtype else tree, stages)

    abstract = jax.eval_shape(change, params)
    target = shardings(abstract)
    if trees.describe(abstract) == trees.describe(params):
        return jax.device_put(params, target)
    if all(len(sharding.device_set) == 1 for sharding in jax.tree.leaves(target)):
        return jax.device_put(change(params), target)  # without compiling a function for it
    return jax.jit(change, out_shardings=target)(params)


def cast(params: Any, dtype: str) -> dict[str, Any]:
    """The parameters in `dtype`; see `weights.cast`."""
    return trees.map_weights(lambda _, w: weights.cast(w, dtype), params)


def check_geometry(stored: ModelConfig, config: ModelConfig, name: str) -> None:
    """Raises UserError if weights of a `stored` model differ in names or shapes from those of a model of `config`."""
    same_layout = dataclasses.replace(stored, scan_layers=config.scan_layers, precision=config.precision)
    if same_layout != config:
        actual, expected = (trees.describe(abstract_params(Transformer(c))) for c in (same_layout, config))
        trees.check(actual, expected, name)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, name: str | pathlib.Path) -> None:
    """Raises UserError if the tokenizer has more ids than the model; special tokens past the model's ids may exist."""
    regular = getattr(tokenizer, "regular_size", tokenizer.vocab_size)
    if regular > config.vocab_size:
        raise UserError(f"{name}: the tokenizer has {regular} ids, the model only {config.vocab_size}")
