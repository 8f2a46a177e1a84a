"""Determines where a run starts from, and the resulting configuration.

    1. the last checkpoint of the workdir;  2. the weights of `init_from`;  3. random weights

Adapters are initialized or restored in the same order, over the weights of `init_from`. With `init_from`, the options
of `model` and `tokenizer` come from the checkpoint, except options that every run sets itself (`_RUN_OPTIONS`) and
options that were set explicitly and do not change the shape of a weight.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from llm_jax import checkpoints, configuration, extensions, object_store, tokenizers, trees
from llm_jax.checkpoints import Checkpoint, abstract_params
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import processes
from llm_jax.quant import post_training
from llm_jax.schema import Config, ModelConfig, choice, resuming
from llm_jax.tokenizers import Tokenizer
from llm_jax.training import machine_choice, optim, without_effect

# Options of a model that change neither its weights nor, up to rounding, its outputs. The run determines them, not the
# checkpoint of `init_from`.
_RUN_OPTIONS = ("scan_layers", "remat", "attention_kernel", "kv_cache", "precision")


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
      config: the configuration, including the options from `init_from`.
      origin: the checkpoint of `init_from` if its weights are needed, or None.
      checkpoint: the directory of the checkpoint of this run from which training resumes, or None.
      record: the record of that checkpoint.
      previous: the configuration that the workdir was last trained with, or None.
      damaged: messages about later, damaged checkpoints, which will be deleted (`checkpoint.on_damage`).
    """

    config: Config
    origin: Checkpoint | None = None
    checkpoint: pathlib.Path | None = None
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    previous: Config | None = None
    damaged: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The number of completed updates."""
        return self.record.get("step", 0)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the initial weights, or None if it has yet to be trained or loaded."""
        if self.checkpoint:
            return tokenizers.load(self.checkpoint / "tokenizer")
        if not self.origin:
            return None
        return tokenizers.with_chat_template(self.origin.tokenizer, self.config.tokenizer.chat_template)


# Values of `init_from` in nanoGPT that name no checkpoint.
_NO_CHECKPOINT = {
    "resume": "the same command with the same --workdir resumes; leave init_from out",
    "scratch": "without init_from, the weights are random; leave it out",
}


def find(config: Config, workdir: pathlib.Path | None = None) -> Start:
    """Determines the start of a run in `workdir`; without `workdir`, nothing is resumed.

    Raises:
      UserError: the workdir contains another run, a checkpoint is damaged, or an override contradicts `init_from`.
    """
    if changes := _with_hashes(config):
        config = configuration.replace(config, changes)
    saved, record, damaged = _agreed_checkpoint(config, workdir) if workdir else (None, {}, ())
    recorded = next((checkpoints.read_config(d) for d in (workdir, saved) if d and (d / "config.json").exists()), None)
    if recorded:
        config = dataclasses.replace(config, model=_as_recorded(config.model, recorded.model))
    origin = None
    if config.init_from in _NO_CHECKPOINT and not pathlib.Path(config.init_from).exists():
        raise UserError(f"init_from={config.init_from}: no such checkpoint; {_NO_CHECKPOINT[config.init_from]}")
    if config.init_from and (config.lora.rank or not saved):
        origin = checkpoints.open_base(config.init_from)
    if origin and config.lora.rank:  # before the weights and the text are read
        shapes = abstract_params(Transformer(dataclasses.replace(origin.config, scan_layers=False)))
        jax.eval_shape(lambda base: post_training.quantize_base(base, config.quant), shapes)
    if config.init_from and saved and recorded:  # a resumed run uses the model of its own checkpoint
        config = _from_checkpoint(config, recorded.model, tokenizers.load(saved / "tokenizer"), str(workdir))
    elif origin:
        config = _from_checkpoint(config, origin.config, origin.tokenizer, origin.name)
    if config.optim.warmup_steps < 0:
        steps = recorded.optim.warmup_steps if recorded else optim.warmup_steps(config.optim, config.train.steps)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=steps))
    if config.eval.final_rows < 0:
        rows = config.eval.rows if "eval.rows" in config.explicit else 0
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, final_rows=rows))
    if recorded and workdir:
        _refuse_another_run(workdir, recorded, config)
        if (warmup := config.optim.warmup_steps) >= config.train.steps:
            raise UserError(
                f"{workdir} contains a run whose warm-up takes {warmup} steps, and train.steps is now "
                f"{config.train.steps}; raise it or give another --workdir"
            )
    start = Start(config, origin, saved, record, recorded, damaged)
    if start.step > config.train.steps:
        raise UserError(
            f"{workdir} is at step {start.step}, past train.steps={config.train.steps}; raise train.steps or choose "
            "another --workdir"
        )
    return start


_LastCheckpoint = tuple[pathlib.Path | None, dict[str, Any], tuple[str, ...]]


def _agreed_checkpoint(config: Config, workdir: pathlib.Path) -> _LastCheckpoint:
    """Returns the result of `_last_checkpoint` in process 0; other processes do not verify checkpoints."""
    saved, record, damaged = _last_checkpoint(config, workdir) if processes.is_main() else (None, {}, ())
    last = [saved.name if saved else "", record, damaged]
    step, record, damaged = processes.broadcast(last, waiting_for="to verify the last checkpoint")
    return workdir / "checkpoints" / step if step else None, record, tuple(damaged)


def _last_checkpoint(config: Config, workdir: pathlib.Path) -> _LastCheckpoint:
    """Returns (checkpoint to resume from or None, its record, messages about later, damaged checkpoints).

    Raises:
      UserError: the last checkpoint is damaged, and with `checkpoint.on_damage=previous` all of them are.
    """
    choice("checkpoint.on_damage", config.checkpoint.on_damage, ("stop", "previous"))
    damaged: list[str] = []
    for step in reversed(checkpoints.steps(workdir)):
        directory = workdir / "checkpoints" / str(step)
        try:
            return directory, checkpoints.verify(directory), tuple(damaged)
        except UserError as error:
            if isinstance(error, object_store.StoreError):  # not damaged; a later attempt may be able to read it
                raise
            damaged.append(str(error).split("; ")[0])
            if config.checkpoint.on_damage == "stop" or step == checkpoints.steps(workdir)[0]:
                raise
    return None, {}, ()


def _with_hashes(config: Config) -> dict[str, Any]:
    """Returns {key: specification with the hash of its source} for the custom parts of a configuration."""
    values = configuration.flat(config)
    recorded = {key: extensions.pinned(key, values[key]) for key in extensions.KEYS}
    return {key: value for key, value in recorded.items() if value != values[key]}


def notes(start: Start) -> Iterator[str]:
    """Notes on a changed schedule, untrained positions, and options that have no effect or differ from `init_from`."""
    for text in start.damaged:
        yield f"note: {text}; it is deleted (checkpoint.on_damage=previous)"
    if start.step and start.previous and start.previous.train.steps != start.config.train.steps:
        rate, new_rate = (
            float(optim.schedule(c.optim, c.train.steps)(start.step)) for c in (start.previous, start.config)
        )
        if abs(new_rate - rate) > 0.01 * max(new_rate, rate):
            steps = f"train.steps was {start.previous.train.steps}, now {start.config.train.steps}"
            rates = f"the learning rate of step {start.step + 1} changes from {rate:.3g} to {new_rate:.3g}"
            yield (
                f"note: {steps}: with optim.schedule={start.config.optim.schedule} {rates}; constant, inverse_sqrt and "
                "wsd before its decay continue without a jump"
            )
    if not start.step:
        yield from without_effect.notes(start.config)
    if not (start.step or start.origin) and (note := _untrained_positions(start.config)):
        yield note
    if start.origin:
        before, now = configuration.flat(start.origin.config), configuration.flat(start.config.model)
        yield f"weights from {start.origin.name}"
        for key in now:
            if now[key] != before[key] and not _is_of_the_run(key) and key != "vocab_size":
                yield f"note: model.{key}={now[key]!r} replaces {before[key]!r} of {start.origin.name}"


def _untrained_positions(config: Config) -> str:
    """Returns a note if the table of positions is longer than the rows, so that its end stays untrained, or ""."""
    length, table = config.train.seq_len, positions.make(config.model).max_length()
    if not table or table <= length:
        return ""
    return (
        f"note: train.seq_len={length} trains positions 0 to {length - 1:,} of {table:,}. Texts longer than {length:,} "
        f"tokens use untrained positions; --config.model.position.max_length={length} omits them"
    )


_CURE = "omit it, or use --config=default if a recipe sets it"


def _from_checkpoint(config: Config, model: ModelConfig, tokenizer: Tokenizer | None, name: str) -> Config:
    """Replaces the model and the tokenizer of `config` by those of a checkpoint.

    Raises:
      UserError: an option that was set explicitly changes the shape of a weight; the message names both.
    """
    own, saved = configuration.flat(config.model), configuration.flat(model)
    default = configuration.flat(configuration.default("model"))
    explicit = {key.removeprefix("model.") for key in config.explicit} | {k for k in own if own[k] != default[k]}
    changes = {k: own[k] for k in own if own[k] != saved[k] and (k in explicit or _is_of_the_run(k))}
    if not own["vocab_size"]:
        changes.pop("vocab_size", None)
    expected, reason = _shapes(model), ""
    try:
        shapes = _shapes(configuration.replace(model, changes, "model."))
    except UserError as error:
        shapes, reason = {}, str(error)
    if shapes != expected:
        key = next((k for k in changes if _changes_shapes(model, {k: changes[k]}, expected)), None)
        if reason and key is None:
            raise UserError(f"{name}: the overrides of its model are invalid ({reason})")
        key = key or next(iter(changes))
        shapes = shapes or _shapes(configuration.replace(model, {key: changes[key]}, "model."))
        path = next(p for p in [*shapes, *expected] if shapes.get(p) != expected.get(p))
        raise UserError(
            f"model.{key}={changes[key]!r} does not fit the weights of {name}, where it is {saved[key]!r} (it "
            f"changes '{path}'); {_CURE}"
        )
    config = dataclasses.replace(config, model=configuration.replace(model, changes, "model."))
    if tokenizer is None:
        return config
    if "tokenizer.kind" in config.explicit and config.tokenizer.kind != tokenizer.kind:
        raise UserError(
            f"{name}: trained on '{tokenizer.kind}' tokens; config key 'tokenizer.kind' is '{config.tokenizer.kind}'; "
            f"{_CURE}"
        )
    size = config.tokenizer.vocab_size
    if "tokenizer.vocab_size" in config.explicit and size != tokenizer.vocab_size:
        raise UserError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} ids; 'tokenizer.vocab_size' is {size}; {_CURE}"
        )
    tokenizer_config = dataclasses.replace(config.tokenizer, kind=tokenizer.kind, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, tokenizer=tokenizer_config)


def _refuse_another_run(workdir: pathlib.Path, before: Config, now: Config) -> None:
    """Raises UserError if the workdir contains a run that differs in options that must not change."""
    old, new = configuration.flat(before), configuration.flat(now)
    changed = [k for k in new if new[k] != old[k] and not resuming.may_change(k)]
    if now.lora.rank:  # the base may have moved; its hash is compared instead
        changed = [k for k in changed if k != "init_from"]
    # 0 selects the vocabulary size of the tokenizer, which the recorded configuration contains.
    if not new["model.vocab_size"]:
        changed = [k for k in changed if k != "model.vocab_size"]
    # An existing tokenizer determines its kind and size; its hash is compared instead.
    if now.tokenizer.path or now.init_from:
        changed = [k for k in changed if k not in ("tokenizer.kind", "tokenizer.vocab_size")]
    if changed:
        differences = "; ".join(f"{k} was {old[k]!r}, now {new[k]!r}" for k in changed[:4])
        differences += f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(f"{workdir} contains another run ({differences}); choose another --workdir")


def _as_recorded(model: ModelConfig, recorded: ModelConfig) -> ModelConfig:
    """Replaces `auto` by the recorded values, so that the run continues with the same values on any machine."""
    if model.scan_layers == "auto":
        model = dataclasses.replace(model, scan_layers=recorded.scan_layers)
    if model.precision.compute == "auto":
        precision = dataclasses.replace(model.precision, compute=recorded.precision.compute)
        model = dataclasses.replace(model, precision=precision)
    return model


def _is_of_the_run(key: str) -> bool:
    return key.split(".")[0] in _RUN_OPTIONS


def _changes_shapes(model: ModelConfig, change: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> bool:
    try:
        return _shapes(configuration.replace(model, change, "model.")) != expected
    except UserError:  # valid only together with another change
        return False


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by its name in the per-layer layout."""
    abstract = abstract_params(
        Transformer(dataclasses.replace(machine_choice.machine_independent(model), scan_layers=False))
    )
    return {path: leaf.shape for path, leaf in trees.flatten(abstract).items()}
