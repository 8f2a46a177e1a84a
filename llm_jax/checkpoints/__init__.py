"""Checkpoints of every form: runs, adapters, Hugging Face directories, GGUF files and peft directories.

    checkpoint = checkpoints.open("runs/x")            # reads nothing yet
    checkpoint.config, checkpoint.tokenizer, checkpoint.identity
    params = checkpoint.params(config, shardings)      # every shard from the file to its device
    model, params, tokenizer = checkpoints.load("runs/x")
    checkpoints.save(model, params, tokenizer, "runs/y")

`Checkpoint` in `checkpoint.py` is the interface; every form is a subclass in a separate file. To add a form, write a
subclass and add it to `opening.open`.
"""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax import configuration, files, trees, weights
from llm_jax.checkpoints.adapters import Adapters
from llm_jax.checkpoints.checkpoint import Checkpoint, Loaded, abstract_params
from llm_jax.checkpoints.gguf_model import Gguf
from llm_jax.checkpoints.huggingface import HuggingFace
from llm_jax.checkpoints.manifest import find, steps, verify
from llm_jax.checkpoints.opening import open, open_base
from llm_jax.checkpoints.peft import Peft
from llm_jax.checkpoints.run import Run, read_config
from llm_jax.checkpoints.vocabulary import load_tokenizer
from llm_jax.checkpoints.writer import Writer
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.schema import Config, ModelConfig, other_libraries
from llm_jax.tokenizers import Tokenizer

WINDOW = 512  # tokens per window of text for models that record no train.seq_len

__all__ = [
    "WINDOW",
    "Adapters",
    "Checkpoint",
    "Gguf",
    "HuggingFace",
    "Loaded",
    "Peft",
    "Run",
    "Writer",
    "abstract_params",
    "config_without_training",
    "find",
    "load",
    "load_separately",
    "load_tokenizer",
    "open",
    "open_base",
    "read_config",
    "save",
    "steps",
    "verify",
    "write_run",
]


@other_libraries.explain_unknown_keywords
def load(
    name: str | os.PathLike[str],
    scan_layers: bool = False,
    dtype: str | None = None,
    as_stored: bool = False,
    base: str = "",
    activations: str = "float",
    mesh: str = "",
) -> Loaded:
    """The model, its parameters, and the tokenizer.

    Args:
      name: any name that `open` takes. Adapters are attached to their base. A run of adapters records the hash of its
        base, which is checked.
      scan_layers: stack the layers for `jax.lax.scan`. False, one entry per layer, is faster for decoding, and is
        used in any case if layers hold weights of different kinds.
      dtype: "float32", "bfloat16" or "float16", for parameters and computation. Quantized weights and the factors of
        adapters keep their dtypes. None: the dtypes of the run, or float32 for other checkpoints.
      as_stored: keep the quantized tensors of a .gguf file if a scheme of `llm_jax.kernels.number_formats` equals
        their format.
      base: for adapters, the checkpoint of their base; see `open`.
      activations: "float", or "int8", which rounds the activations of products with quantized weights to 8 bits; see
        `weights.with_activations`.
      mesh: sizes of the axes of a mesh of all devices over which the weights are sharded by `mesh.rules`, such as
        "tensor=4" or "tensor=4,data=2"; the default of "data" is all remaining devices. Decoding then divides rows and
        cache too. "": only the default device is used.

    Raises:
      UserError: there is no checkpoint of this name, it is damaged or not supported, or the dtype is unknown.
    """
    return open(name, base).load(scan_layers, dtype, as_stored, activations, mesh)


def load_separately(*names: str | os.PathLike[str]) -> tuple[Loaded, list[dict[str, Any]]]:
    """Loads several adapters of one base: the base without adapters, and a list with the adapters of each name.

    `lora.attach` attaches one item of the list to the base; `lora.combine` combines several. All have one entry per
    layer.

    Args:
      names: runs with adapters, or peft directories.

    Raises:
      UserError: as for `load`; or a checkpoint has no adapters, the bases differ, or adapters cannot be separated from
        their base.
    """
    separated = []
    for name in names:
        checkpoint = open(name)
        if not isinstance(checkpoint, Adapters | Peft):
            raise UserError(f"{name}: a run without adapters; lora.rank is 0")
        separated.append(checkpoint.separate())
    base = separated[0][0]
    fingerprint = trees.fingerprint(base.params)
    for name, (other, _) in zip(names[1:], separated[1:], strict=True):
        if trees.fingerprint(other.params) != fingerprint:
            raise UserError(f"{name}: the base of its adapters differs from the base of {names[0]}")
    return base._replace(params=weights.lay_out(base.params)), [adapters for _, adapters in separated]


@typing.overload
def save(model: Transformer, params: Any, tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None: ...
@typing.overload
def save(model: Loaded, path: str | os.PathLike[str], /) -> None: ...
def save(model: Any, params: Any = None, tokenizer: Any = None, path: Any = None) -> None:
    """Writes a run directory with one checkpoint, which `load` and every command can read.

    Args:
      model: the model, whose configuration is recorded; or the result of `load`, followed only by the path.
      params: weights of any kind (arrays, quantized, with adapters), stacked for a scan or one entry per layer.
      path: the directory to create; it is written atomically.

    Raises:
      UserError: the directory exists or cannot be written, or names or shapes do not fit the model.
    """
    if isinstance(model, Loaded) and tokenizer is None:
        (model, params, tokenizer), path = model, params if path is None else path
    if not isinstance(model, Transformer) or tokenizer is None or path is None:
        raise UserError(
            "llm_jax.save: expected model, params, tokenizer and path, or the result of llm_jax.load and path"
        )
    path = files.path(path)
    if path.exists():
        raise UserError(f"{path} already exists; choose another path, or remove it")
    per_layer = Transformer(dataclasses.replace(model.config, scan_layers=False))
    shapes, expected = (
        {name: {"shape": weight.shape} for name, weight in trees.flatten(tree).items()}
        for tree in (jax.eval_shape(trees.unstack, params), abstract_params(per_layer))
    )
    trees.check(shapes, expected, str(path))
    with files.new_directory(path, durable=True) as partial:
        write_run(partial, config_without_training(model.config, tokenizer), params, tokenizer)


def config_without_training(model: ModelConfig, tokenizer: Tokenizer) -> Config:
    """The configuration of a run directory for a model that `llm_jax.train` did not train; it has no `data.source`."""
    default = configuration.default()
    length = min(WINDOW, positions.make(model).max_length() or WINDOW)
    return dataclasses.replace(
        default,
        model=model,
        tokenizer=dataclasses.replace(default.tokenizer, kind=tokenizer.kind, vocab_size=tokenizer.vocab_size),
        data=dataclasses.replace(default.data, source=""),
        train=dataclasses.replace(default.train, seq_len=length),
    )


def write_run(
    directory: pathlib.Path,
    config: Any,
    params: Any,
    tokenizer: Tokenizer,
    corpus: str = "",
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes a run with one checkpoint, of step 0, into an existing directory.

    Args:
      corpus: the sha256 of the text that the parameters were computed with, which record.json keeps.
      generation: the content of generation_config.json, if there is one.
    """
    writer = Writer(directory, config, tokenizer, corpus, generation=generation)
    writer.save(0, weights.in_rows(params), {}, None)
    writer.close()
    files.write_json(directory / "config.json", configuration.as_dict(config))
