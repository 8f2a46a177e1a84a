"""Opens checkpoints of every form, and finds the bases of adapters."""

import functools
import os
import pathlib
import re
import sys
from typing import NoReturn

from llm_jax.checkpoints import location
from llm_jax.checkpoints.adapters import Adapters
from llm_jax.checkpoints.checkpoint import Checkpoint
from llm_jax.checkpoints.gguf_model import Gguf
from llm_jax.checkpoints.huggingface import HuggingFace
from llm_jax.checkpoints.manifest import find
from llm_jax.checkpoints.peft import Peft
from llm_jax.checkpoints.run import Run, read_config
from llm_jax.errors import UserError

_FLAG = "with --base=PATH (in Python, base=PATH)"
_LEVELS = 4  # directories, from that of the adapters up, in which a base is searched for


def open(name: str | os.PathLike[str], base: str = "") -> Checkpoint:
    """The checkpoint that `name` stands for, without its weights having been read.

    Args:
      name: a run, or one of its checkpoints; a Hugging Face directory; a .gguf file; a directory of peft adapters;
        a zip file of one of these; "asset:NAME" (`llm_jax.assets`); "hf:ORG/NAME" (needs the package huggingface_hub
        and a network); or "gs://BUCKET/PATH" or "s3://BUCKET/PATH" of one of these (needs the package gcsfs or s3fs).
      base: of adapters, the checkpoint of their base; "": the one that they name, or, if it is not there any more, a
        checkpoint of the same name beside them.

    Raises:
      UserError: no checkpoint there, or `base` is given for one without adapters.
    """
    path = location.resolve(name)
    own_name = location.lasting(name, path)
    if Peft.matches(path):
        return Peft(path, own_name, functools.partial(_open_base_of_peft, path, base))
    adapters = path.is_dir() and sorted(p.parent.name for p in path.glob("*/adapter_config.json"))
    if path.suffix in (".safetensors", ".bin", ".json") and path.is_file():
        raise UserError(f"{name}: a file of a Hugging Face directory; give the directory, {path.parent}")
    if path.is_file():
        checkpoint: Checkpoint = Gguf(path, own_name)
    elif HuggingFace.matches(path):
        checkpoint = HuggingFace(path, own_name)
    elif adapters and not (path / "config.json").exists():
        raise UserError(f"{name}: holds adapters in subdirectories; give one of them: {', '.join(adapters)}")
    else:
        _refuse_parts(str(name), path)
        path = find(path)
        own_name = location.lasting(name, path)
        if read_config(path).lora.rank:
            return Adapters(path, own_name, functools.partial(_open_base_of_run, path, base))
        checkpoint = Run(path, own_name)
    if base:
        raise UserError(f"--base={base} names the base of adapters; {name} holds none")
    return checkpoint


def _refuse_parts(name: str, path: pathlib.Path) -> None:
    """Raises UserError for a directory that would be a checkpoint with another file, or is a part of one."""
    if path.is_dir() and not (path / "record.json").exists() and not (path / "checkpoints").exists():
        for weights in sorted(path.glob("*.safetensors")):
            missing = "adapter_config.json" if weights.name.startswith("adapter") else "config.json"
            raise UserError(f"{name}: no {missing} beside {weights.name}; a Hugging Face directory has both")
    if path.name == "checkpoints" and any(path.glob("*/record.json")):
        raise UserError(f"{name}: holds the checkpoints of a run; give the run, {path.parent}, or one of them")


def open_base(name: str | os.PathLike[str]) -> Checkpoint:
    """As `open`, for weights to start training from (init_from).

    Raises:
      UserError: as `open`, or the checkpoint holds adapters.
    """
    checkpoint = open(name)
    if checkpoint.form in ("adapters", "peft"):
        raise UserError(f"init_from={name} holds adapters; merge them first (convert --to=hf)")
    return checkpoint


def _open_base_of_run(path: pathlib.Path, base: str, recorded: str) -> Checkpoint:
    """The base of the run of which `path` is a checkpoint. Its hash is compared when its weights are read."""
    path = path.absolute()
    workdir = path.parents[1] if path.parent.name == "checkpoints" else path
    return open_base(base or located(recorded, workdir) or _missing(recorded))


def _open_base_of_peft(path: pathlib.Path, base: str, recorded: str) -> Checkpoint:
    if not (base or recorded):
        raise UserError(f"adapter_config.json names none (base_model_name_or_path); give its path {_FLAG}")
    if name := base or located(recorded, path):
        return open(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recorded):
        _missing(recorded)
    try:
        return open(f"hf:{recorded}")
    except UserError as error:
        raise UserError(f"{error}; give its path {_FLAG}") from error


def _missing(recorded: str) -> NoReturn:
    raise UserError(f"{recorded} does not exist, nor a checkpoint of this name beside the adapters; give it {_FLAG}")


def located(recorded: str, directory: pathlib.Path) -> str:
    """Where the base of adapters is, or "" if it is nowhere.

    Args:
      recorded: the name that the adapters have for it: a path, asset:NAME, hf:ORG/NAME or ORG/NAME.
      directory: that of the adapters. If there is no `recorded`, its last parts are searched for in this directory and
        those above it; a line on stderr says what was found.
    """
    if location.is_remote(recorded) or pathlib.Path(recorded).expanduser().exists():
        return recorded
    relative = directory / recorded
    if not pathlib.Path(recorded).is_absolute() and relative.exists():
        return str(relative)
    adapters_directory = directory.absolute()
    parts = [part for part in pathlib.PureWindowsPath(recorded).parts if part not in ("..", ".", "/")]  # of any system
    for above in (adapters_directory, *adapters_directory.parents)[:_LEVELS]:
        for start in range(len(parts)):
            candidate = above.joinpath(*parts[start:])
            if not parts[start].isdigit() and candidate != adapters_directory and _is_checkpoint(candidate):
                print(f"note: {recorded} does not exist; the base is {candidate}", file=sys.stderr)
                return str(candidate)
    return ""


def _is_checkpoint(path: pathlib.Path) -> bool:
    files = ("config.json", "record.json", "checkpoints")
    return any((path / name).exists() for name in files) or (path.is_file() and path.suffix in (".gguf", ".zip"))
