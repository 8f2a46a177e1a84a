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
_LEVELS = 4  # a base is searched for in the directory of the adapters and in the 3 directories above it


def open(name: str | os.PathLike[str], base: str = "") -> Checkpoint:
    """Opens the checkpoint `name`, without reading its weights.

    Args:
      name: a run, or one of its checkpoints; a Hugging Face directory; a .gguf file; a directory of peft adapters;
        a zip file of one of these; "asset:NAME" (`llm_jax.assets`); "hf:ORG/NAME" (needs the package huggingface_hub
        and a network); or "gs://BUCKET/PATH" or "s3://BUCKET/PATH" of one of these (needs the package gcsfs or s3fs).
      base: for adapters, the checkpoint of their base. "": the one that the adapters record or, if it no longer
        exists, a checkpoint of the same name near the adapters.

    Raises:
      UserError: `name` is not a checkpoint, or `base` is given for a checkpoint without adapters.
    """
    path = location.resolve(name)
    own_name = location.recorded_name(name, path)
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
        own_name = location.recorded_name(name, path)
        if read_config(path).lora.rank:
            return Adapters(path, own_name, functools.partial(_open_base_of_run, path, base))
        checkpoint = Run(path, own_name)
    if base:
        raise UserError(f"--base={base} names the base of adapters; {name} has no adapters")
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
    """Like `open`, for weights to start training from (init_from).

    Raises:
      UserError: as for `open`, or the checkpoint has adapters.
    """
    checkpoint = open(name)
    if checkpoint.form in ("adapters", "peft"):
        raise UserError(f"init_from={name} holds adapters; merge them first (convert --to=hf)")
    return checkpoint


def _open_base_of_run(path: pathlib.Path, base: str, recorded: str) -> Checkpoint:
    """Opens the base of the run with the checkpoint `path`. Its hash is compared when its weights are read."""
    path = path.absolute()
    workdir = path.parents[1] if path.parent.name == "checkpoints" else path
    return open_base(base or find_base(recorded, workdir) or _missing(recorded))


def _open_base_of_peft(path: pathlib.Path, base: str, recorded: str) -> Checkpoint:
    if not (base or recorded):
        raise UserError(f"adapter_config.json has no base_model_name_or_path; give its path {_FLAG}")
    if name := base or find_base(recorded, path):
        return open(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recorded):
        _missing(recorded)
    try:
        return open(f"hf:{recorded}")
    except UserError as error:
        raise UserError(f"{error}; give its path {_FLAG}") from error


def _missing(recorded: str) -> NoReturn:
    raise UserError(
        f"{recorded} does not exist, and there is no checkpoint of this name near the adapters; give its path {_FLAG}"
    )


def find_base(recorded: str, directory: pathlib.Path) -> str:
    """The path or name of the base of adapters; "" if it is not found.

    Args:
      recorded: the name of the base that the adapters record: a path, asset:NAME, hf:ORG/NAME or ORG/NAME.
      directory: the directory of the adapters. If the path `recorded` does not exist, its last parts are searched for
        in this directory and in those above it; a line on stderr names the path that was found.
    """
    if location.is_remote(recorded) or pathlib.Path(recorded).expanduser().exists():
        return recorded
    relative = directory / recorded
    if not pathlib.Path(recorded).is_absolute() and relative.exists():
        return str(relative)
    adapters_directory = directory.absolute()
    parts = [part for part in pathlib.PureWindowsPath(recorded).parts if part not in ("..", ".", "/")]  # of any system
    for parent in (adapters_directory, *adapters_directory.parents)[:_LEVELS]:
        for start in range(len(parts)):
            candidate = parent.joinpath(*parts[start:])
            if not parts[start].isdigit() and candidate != adapters_directory and _is_checkpoint(candidate):
                print(f"note: {recorded} does not exist; the base is {candidate}", file=sys.stderr)
                return str(candidate)
    return ""


def _is_checkpoint(path: pathlib.Path) -> bool:
    files = ("config.json", "record.json", "checkpoints")
    return any((path / name).exists() for name in files) or (path.is_file() and path.suffix in (".gguf", ".zip"))
