"""Builds the parts of a training run from a configuration, before any data or weights are read.

    parts = setup(start.find(config).config, vocab_size)
    state = parts.init()                        # random weights, or those of init_from
    for batch in parts.batches(rows, 0, 100):
        state, metrics = parts.step(state, batch)

`setup` works with shapes only. It builds the mesh, the model, the optimizer, the shardings and the jitted functions,
and raises `UserError` for every contradiction in the configuration that can be detected without data. The trainer,
`plan`, the benchmarks and the experiments all call it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from llm_jax import checkpoints, runtime, tokenizers, trees, weights
from llm_jax.checkpoints import Checkpoint, abstract_params
from llm_jax.checkpoints.checkpoint import with_dtype
from llm_jax.data import rows as rows_lib
from llm_jax.data.rows import Batch
from llm_jax.errors import UserError
from llm_jax.model import attention_kernels, transformer
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.schema import Config
from llm_jax.tokenizers import Tokenizer
from llm_jax.training import bad_steps, checks, gather_once, losses, machine_choice, optim, trainable
from llm_jax.training import step as step_lib
from llm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a training run. All trees of shapes have `jax.ShapeDtypeStruct` leaves with shardings.

    Attributes:
      config: the configuration, with `model.vocab_size` set.
      method: `FullTraining`, or `AdapterTraining` over frozen weights.
      model: the trained model.
      reference: the frozen model in the loss (the teacher of distillation, or the reference of DPO), or None.
      mesh: the devices, with axes "data", "fsdp", "context" and "tensor".
      optimizer: the optax transformation.
      schedule: function step -> learning rate.
      base: shapes of the initial weights.
      state: shapes of the training state, including `state.frozen` if the base is dense.
      batch: shapes of a batch, int32 (batch_size, seq_len) each.
      update: the pure function that `train_step` jits.
      train_step: jitted (state without frozen, frozen, batch, limit) -> (state, metrics); the state is donated.
      loss: jitted (trainable, frozen, batch) -> (sum of the cross-entropy in nats, number of targets), float32 () each.
      choices: one line for every option that was `auto`, with its value and reason, or a note that `auto` is faster.
    """

    config: Config
    method: trainable.TrainingMethod
    model: Transformer
    reference: Transformer | None
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    base: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    train_step: Any
    loss: Any
    choices: tuple[str, ...] = ()

    @property
    def batch_sharding(self) -> NamedSharding:
        return mesh_lib.batch_sharding(self.mesh, self.config.train.batch_size, self.config.train.seq_len)

    @property
    def replicated(self) -> NamedSharding:
        return mesh_lib.replicated(self.mesh)

    @property
    def weight_names(self) -> list[str]:
        """Per-layer names of the trainable weights, in the order of the norms in the metrics."""
        return bad_steps.names(self.state.params)

    @property
    def attention_kernel(self) -> str:
        """The attention kernel for this machine and model, and the reason if it is not the fastest."""
        c = self.config.train
        micro_batch = c.batch_size // c.grad_accumulation
        shape = dict(self.mesh.shape)
        return attention_kernels.describe(
            self.config.model, self.mesh.devices.flat[0].platform, micro_batch, c.seq_len, shape
        )

    def shardings(self, tree: Any) -> Any:
        """Returns a NamedSharding for every leaf of a parameter tree, by `mesh.rules`."""
        return mesh_lib.shardings(tree, self.config.mesh.rules, self.mesh)

    def random_params(self) -> Any:
        """Returns random initial weights for `train.seed`, on the mesh."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        init = jax.jit(lambda key: self.model.init(key, tokens)["params"], out_shardings=_shardings_of(self.base))
        return init(jax.random.key(self.config.train.seed))

    def load_base(self, origin: Checkpoint | None = None) -> Any:
        """Returns the initial weights: the weights of `init_from`, or random weights.

        Args:
          origin: the checkpoint of `init_from`, if it is already open.
        """
        if origin is None and not self.config.init_from:
            return self.random_params()
        origin = origin or checkpoints.open_base(self.config.init_from)
        return origin.params(self.config.model, self.shardings)

    def load_reference(self, tokenizer: Tokenizer | None = None) -> Any:
        """Returns the weights of the frozen model in the loss, on the mesh; {} if the loss has no frozen model.

        Args:
          tokenizer: the tokenizer of the trained model; None: only the vocabulary sizes are compared.

        Raises:
          UserError: the vocabulary of the frozen model differs from that of the trained model.
        """
        if self.reference is None:
            return {}
        c = self.config.model
        name = self.config.loss.teacher or self.config.init_from
        checkpoint = checkpoints.open(name)
        other = checkpoint.tokenizer
        if name == self.config.init_from:
            other = tokenizers.with_chat_template(other, self.config.tokenizer.chat_template)
        losses.check_reference(name, checkpoint.config, c, other, tokenizer)
        dtype = c.precision.params if checkpoint.run_config is None else None  # as `_reference`
        loaded = checkpoint.load(scan_layers=c.scan_layers, dtype=dtype)
        params = weights.in_rows(loaded.params)
        return jax.device_put(params, self.shardings(params))

    def init(self, base: Any = None, reference: Any = None) -> TrainState:
        """Returns the training state before the first step.

        Args:
          base: the initial weights, which may be donated; None: `load_base()`.
          reference: the weights of the frozen model in the loss; None: `load_reference()`.
        """
        base = self.load_base() if base is None else base
        params, constants = self.init_trainable(base)
        frozen = self.freeze(base, constants, self.load_reference() if reference is None else reference)
        return self.initial_state(params).replace(frozen=frozen)

    def init_trainable(self, base: Any) -> tuple[Any, Any]:
        """Returns (trainable parameters, constant parts of adapters), initialized with `train.seed`."""
        # The key is an argument, so that other seeds do not recompile.
        donated = (0,) if self.method.donates_base() else ()
        shardings = (_shardings_of(self.state.params), self.replicated)
        init = jax.jit(self.method.init, out_shardings=shardings, donate_argnums=donated)
        return init(base, jax.random.key(self.config.train.seed))

    def freeze(self, base: Any, constants: Any, reference: Any) -> dict[str, Any]:
        """Returns the frozen parameters, on the mesh: base and constant parts of adapters, and the reference model."""
        shapes = jax.eval_shape(self.method.freeze, base, constants)
        # One weight at a time: one jitted function for all weights would need twice the memory.
        shardings = _frozen_shardings(shapes, self.shardings, self.mesh)
        frozen = jax.device_put(self.method.freeze(base, constants), shardings)
        return frozen | ({"reference": reference} if self.reference is not None else {})

    def initial_state(self, params: Any) -> TrainState:
        """Returns the state at step 0 for trainable parameters, which are donated; `frozen` is empty."""
        shapes = self.state.replace(frozen={})
        begin = jax.jit(self._begin, out_shardings=_shardings_of(shapes), donate_argnums=0)
        return begin(params)

    def _begin(self, params: Any) -> TrainState:
        return step_lib.init(self.optimizer, params, ema=bool(self.config.optim.ema_decay))

    def step(self, state: TrainState, batch: Batch, limit: float = math.inf) -> tuple[TrainState, dict[str, jax.Array]]:
        """Performs one update; returns (new state, metrics). All arrays of `state` except `state.frozen` are donated.

        Args:
          limit: a loss above the limit makes the step a bad step; see `training.step.make`.
        """
        frozen = state.frozen
        new, metrics = self.train_step(state.replace(frozen={}), frozen, batch, jnp.float32(limit))
        return new.replace(frozen=frozen), metrics

    @functools.cached_property
    def _scan(self) -> Any:
        def scan(state: TrainState, frozen: Any, batches: Batch) -> Any:
            return jax.lax.scan(lambda state, batch: self.update(state, frozen, batch), state, batches)

        return jax.jit(mesh_lib.with_mesh(self.mesh, scan), donate_argnums=0)

    def scan(self, state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Performs several updates in one compiled loop; returns (new state, metrics with a leading axis of steps).

        Args:
          batches: arrays int32 (steps, batch_size, seq_len).
        """
        frozen = state.frozen
        new, metrics = self._scan(state.replace(frozen={}), frozen, batches)
        return new.replace(frozen=frozen), metrics

    def model_params(self, state: TrainState) -> Any:
        """The parameters for evaluation: the moving average with `optim.ema_decay`, else the current parameters."""
        return self.method.model_params(state.eval_params, state.frozen)

    def batches(self, rows: rows_lib.AnyRows | Any, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps `start` to `stop - 1`, which are prefetched in the background."""
        return rows_lib.batches(rows, start, stop, self.config.train.batch_size, self.batch_sharding)


def setup(
    config: Config,
    vocab_size: int = 0,
    *,
    objective: step_lib.Loss | None = None,
    devices: Sequence[Any] | None = None,
) -> Setup:
    """Builds the parts of a training run from shapes, without reading weights or data.

    Args:
      config: the configuration; if `model.vocab_size` is 0, `vocab_size` is used.
      vocab_size: number of ids of the tokenizer.
      objective: a function of the model's parameters that replaces `config.loss`; see `training.step.Loss`.
      devices: devices of the mesh, which may be compile-only devices; None: all devices of JAX.

    Raises:
      UserError: options contradict each other or do not fit the devices; the message names them.
    """
    c = config.train
    if not config.model.vocab_size and not vocab_size:
        raise UserError(
            "config key 'model.vocab_size' is 0, but there is no tokenizer; set --config.model.vocab_size=N"
        )
    if config.model.vocab_size and config.model.vocab_size < vocab_size:
        size = config.model.vocab_size
        raise UserError(f"config key 'model.vocab_size' is {size}; the tokenizer has {vocab_size} ids")
    model_config = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    config = dataclasses.replace(config, model=model_config)

    # ---------------------------------------------------------------- mesh and model
    checks.check_training(config)
    mesh = mesh_lib.make(config.mesh, devices)
    platform = mesh.devices.flat[0].platform
    model_config, choices = machine_choice.resolve(config.model, platform, runtime.cpu_instructions())
    config = dataclasses.replace(config, model=model_config)
    batch_sharding = mesh_lib.batch_sharding(mesh, c.batch_size, c.seq_len)
    rows_together = losses.rows_together(config.loss)
    step_lib.check_accumulation(
        c.batch_size, c.grad_accumulation, mesh.shape["data"] * mesh.shape["fsdp"], rows_together
    )
    model = Transformer(config.model)
    transformer.check_length(config.model, c.seq_len)
    reference_model = _reference(config, model)

    # ---------------------------------------------------------------- trainable and frozen parameters
    method = trainable.training_method(config)
    base = abstract_params(model)
    params, constants = jax.eval_shape(method.init, base, jax.random.key(0))
    frozen = jax.eval_shape(method.freeze, base, constants)
    weight_shardings = functools.partial(mesh_lib.shardings, rules=config.mesh.rules, mesh=mesh)
    frozen = _with_shardings(frozen, _frozen_shardings(frozen, weight_shardings, mesh))
    if reference_model is not None:
        shapes = abstract_params(reference_model)
        frozen |= {"reference": _with_shardings(shapes, weight_shardings(shapes))}
    optimizer = method.optimizer(base, params)
    schedule = optim.schedule(config.optim, c.steps)
    state = jax.eval_shape(functools.partial(step_lib.init, optimizer, ema=bool(config.optim.ema_decay)), params)
    params_shardings, replicated = method.shardings(params, mesh), mesh_lib.replicated(mesh)
    state_shardings = TrainState(
        replicated,
        params_shardings,
        optim.shardings(state.opt_state, params, params_shardings, replicated),
        params_shardings if config.optim.ema_decay else None,
    )

    # ---------------------------------------------------------------- jitted functions
    sparse = losses.is_sparse(config)
    if objective is None:
        objective = losses.make(config.loss, model, c.loss_chunk, reference_model, sparse=sparse)

    def loss(params: Any, frozen: Any, batch: Batch, step: Any, key: jax.Array) -> Any:
        params = gather_once.attach(method.model_params(params, frozen, key, step), frozen)
        return objective(params, frozen, batch, step, key)

    def gather(params: Any, frozen: Any) -> Any:
        m = config.model
        return gather_once.before_micro_batches(params, frozen, m.precision.compute, m.tie_embeddings)

    def held_out_loss(params: Any, frozen: Any, batch: Batch) -> Any:
        return losses.language_model(model, method.model_params(params, frozen), batch, c.loss_chunk, sparse)

    update = step_lib.make(
        loss,
        optimizer,
        schedule,
        c.seed,
        c.grad_accumulation,
        skip_bad=c.on_bad_step == "skip",
        update_norms=config.report.norms_every > 0,
        ema_decay=config.optim.ema_decay,
        rows_together=rows_together,
        gather=gather if c.gather_once else None,
        shardings=params_shardings,
    )
    shape = jax.ShapeDtypeStruct((c.batch_size, c.seq_len), jnp.int32, sharding=batch_sharding)
    advice = machine_choice.advice(config, platform, runtime.cpu_instructions())
    return Setup(
        config=config,
        method=method,
        model=model,
        reference=reference_model,
        mesh=mesh,
        optimizer=optimizer,
        schedule=schedule,
        base=_with_shardings(base, weight_shardings(base)),
        state=_with_shardings(state, state_shardings).replace(frozen=frozen),
        batch=dict.fromkeys(rows_lib.NAMES, shape),
        update=update,
        train_step=jax.jit(
            mesh_lib.with_mesh(mesh, update, config.mesh.rules),
            donate_argnums=0,
            in_shardings=(state_shardings, None, batch_sharding, None),
            out_shardings=(state_shardings, replicated),
        ),
        loss=jax.jit(
            mesh_lib.with_mesh(mesh, held_out_loss, config.mesh.rules),
            in_shardings=(params_shardings, None, batch_sharding),
            out_shardings=replicated,
        ),
        choices=(*choices, *([advice] if advice else [])),
    )


def _reference(config: Config, model: Transformer) -> Transformer | None:
    if config.loss.kind == "dpo":
        return model
    if not config.loss.teacher:
        return None
    checkpoint = checkpoints.open(config.loss.teacher)
    teacher = checkpoint.config
    if checkpoint.run_config is None:
        teacher = with_dtype(teacher, config.model.precision.params)
    teacher = dataclasses.replace(teacher, scan_layers=config.model.scan_layers, attention_kernel="auto")
    transformer.check_length(teacher, config.train.seq_len)
    return Transformer(teacher)


def _frozen_shardings(frozen: Any, weight_shardings: Callable[[Any], Any], mesh: Mesh) -> Any:
    """The base is sharded by `mesh.rules`; the constant parts of adapters, which are small, are replicated."""
    replicated = mesh_lib.replicated(mesh)
    return {
        name: weight_shardings(tree) if name == "base" else jax.tree.map(lambda _: replicated, tree)
        for name, tree in frozen.items()
    }


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def _shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def num_parameters(tree: Any) -> int:
    """The number of entries of all arrays (or shapes) of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def describe(setup: Setup) -> str:
    """Returns a table of the trainable parameters with shapes, dtypes and shardings, and a line about the mesh."""
    lines, size = [], 0
    params = setup.state.params
    for path, weight in trees.flatten(params).items():
        for keys, leaf in jax.tree_util.tree_flatten_with_path(weight)[0]:
            size += leaf.size * leaf.dtype.itemsize
            split = " x ".join(str(axis) for axis in tuple(leaf.sharding.spec) if axis) or "replicated"
            name = path + jax.tree_util.keystr(keys)
            lines.append(f"{name:<44} {leaf.shape!s:<20} {leaf.dtype!s:<10} {split:<16} {leaf.size:>12,}")
    head = f"{'parameter':<44} {'shape':<20} {'dtype':<10} {'sharded over':<16} {'entries':>12}"
    total = f"{num_parameters(params):,} trainable parameters, {size / 2**20:,.1f} MiB"
    if (all_params := num_parameters(setup.base)) != num_parameters(params):
        total += f", over {all_params:,} frozen ones"
    mesh = f"mesh {dict(setup.mesh.shape)} of {setup.mesh.size} {setup.mesh.devices.flat[0].device_kind} device(s)"
    return "\n".join(
        [
            head,
            *lines,
            total,
            *setup.choices,
            f"{mesh}, attention kernel {setup.attention_kernel}, jax {jax.__version__}",
        ]
    )
