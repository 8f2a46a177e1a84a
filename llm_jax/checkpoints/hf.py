"""Hugging Face directories: config.json, safetensors (sharded or not) and the tokenizer, in and out."""

import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from llm_jax import trees, weights
from llm_jax.checkpoints import assemble
from llm_jax.checkpoints.families import FAMILIES, model_config, their_config
from llm_jax.errors import UserError
from llm_jax.schema import ModelConfig

# Tensors of theirs that hold no weights, and heads that are not ours.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)|cls\..*")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NAMES = {"bfloat16": ml_dtypes.bfloat16}  # which numpy does not know by name
_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def is_directory_of(path: pathlib.Path) -> bool:
    """Whether a directory has a config.json that is not one of ours; a broken one counts beside safetensors."""
    try:
        said = json.loads((path / "config.json").read_text())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return any(path.glob("*.safetensors*"))
    return not isinstance(said, dict) or "model_type" in said or not said.keys() & {"tokenizer", "train"}


def read_config(directory: pathlib.Path) -> tuple[str, ModelConfig]:
    """(family, the model's config) of a directory. Raises UserError: see `families.model_config`."""
    try:
        said = json.loads((directory / "config.json").read_text())
        if not isinstance(said, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory / 'config.json'}: cannot be read ({error})") from error
    try:
        return model_config(said)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{directory}: {error}") from error


def load_params(directory: pathlib.Path, kind: str, abstract: Any, shardings: assemble.Shardings) -> Any:
    """The parameters of a directory, each tensor read when its turn comes and straight to its shards.

    Args:
      kind: the family.
      abstract: shapes and dtypes of the parameters, one entry per layer.
      shardings: abstract parameters -> their shardings.

    Raises:
      UserError: tensors are missing, left over or of another shape (all are named), or a file is damaged.
    """
    source = _Files(directory)
    family = FAMILIES[kind]
    wanted = assemble.names(family.names, abstract)
    source.rename(family.prefix, {their.name for their in wanted.values()})
    tied = "head/kernel" not in trees.flatten(abstract)

    def ignored(name: str) -> bool:
        return bool(_IGNORED.fullmatch(name)) or (tied and name == "lm_head.weight")

    return assemble.load(source, wanted, abstract, shardings, ignored)


def save(
    directory: pathlib.Path,
    kind: str,
    config: ModelConfig,
    params: Any,
    files: dict[str, bytes],
    special_ids: dict[str, int] | None = None,
) -> None:
    """Writes a directory that `transformers` loads; it appears whole or not at all.

    Args:
      params: one entry per layer.
      files: the tokenizer's files by name.
      special_ids: "bos_token_id", "eos_token_id", ... for config.json, by which transformers ends a text.

    Raises:
      UserError: the directory exists, or the family cannot hold the model.
    """
    if directory.exists():
        raise UserError(f"--output={directory} exists; give another, or remove it")
    dtype = np.dtype(_NAMES.get(config.precision.params, config.precision.params))
    said = their_config(kind, config) | {"torch_dtype": config.precision.params} | (special_ids or {})
    parts = assemble.by_tensor(assemble.names(FAMILIES[kind].names, params))
    flat = {path: weights.dense(weight) for path, weight in trees.flatten(params).items()}
    sizes = {name: sum(flat[ours].size * flat[ours].dtype.itemsize for _, ours in of) for name, of in parts.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    except OSError as error:
        raise UserError(f"--output={directory} cannot be written ({error.strerror})") from error
    try:
        index: dict[str, str] = {}
        with tqdm(total=sum(sizes.values()), desc="writing weights", unit="B", unit_scale=True, disable=None) as bar:
            for i, shard in enumerate(shards, 1):
                one = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
                tensors = {}
                for name in shard:
                    array = assemble.theirs([(t, flat[ours]) for t, ours in parts[name]])
                    tensors[name] = array.astype(dtype, copy=False)
                    bar.update(sizes[name])
                save_file(tensors, partial / one, metadata={"format": "pt"})
                index |= dict.fromkeys(shard, one)
        if len(shards) > 1:
            total = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
            (partial / "model.safetensors.index.json").write_text(json.dumps(total, indent=1))
        (partial / "config.json").write_text(json.dumps(said, indent=1) + "\n")
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output={directory} cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Tensor(NamedTuple):
    """Where a tensor lies: the file it is in, and at what byte; of what shape and type it is."""

    file: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class _Files:
    """The safetensors files of a directory. Raises UserError where one is missing or damaged."""

    def __init__(self, directory: pathlib.Path):
        self.what = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[str, _Tensor] = {}
        for path in self._paths(directory):
            for name, tensor in _described(path).items():
                if name in self.tensors:
                    raise UserError(f"{path}: the tensor '{name}' is in {self.tensors[name].file.name} as well")
                self.tensors[name] = tensor
        for name, tensor in self.tensors.items():
            if tensor.dtype not in _DTYPES and not _IGNORED.fullmatch(name):
                raise UserError(
                    f"{tensor.file}: '{name}' is of type {tensor.dtype}; expected one of {', '.join(_DTYPES)}"
                )

    def _paths(self, directory: pathlib.Path) -> Iterator[pathlib.Path]:
        index = directory / "model.safetensors.index.json"
        if not index.is_file():
            single = directory / "model.safetensors"
            if not single.is_file():
                pickled = [p.name for p in directory.iterdir() if p.suffix in _PICKLED]
                said = f" ({pickled[0]} is pickled: it could run code, and is not read)" if pickled else ""
                raise UserError(f"{directory}: no model.safetensors here{said}")
            yield single
            return
        try:
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors ({error!r})") from error
        for name in listed:
            path = directory / str(name)
            if not isinstance(name, str) or pathlib.PurePath(name).name != name or path.suffix != ".safetensors":
                raise UserError(f"{index}: names the file {name!r}; expected safetensors files of this directory")
            if not path.is_file():
                raise UserError(f"{path}: named in {index.name}, and not there")
            yield path

    def rename(self, prefix: str, wanted: set[str]) -> None:
        """Names as the table has them: files have or lack the prefix of a head-less or a whole model."""
        found = {}
        for name, tensor in self.tensors.items():
            other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
            found[other if name not in wanted and other in wanted else name] = tensor
        self.tensors, self.shapes = found, {name: tensor.shape for name, tensor in found.items()}

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            # Mapped for this call only: pages of a mapping that stays would count as memory of the process.
            return np.array(np.memmap(tensor.file, _DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)[slices])
        except (OSError, ValueError) as error:
            raise UserError(f"{tensor.file}: changed while it was being read ({error})") from error


def _described(path: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file by name. Raises UserError where it is damaged."""
    try:
        with safe_open(path, framework="numpy"):  # which checks the header against the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: _Tensor(path, 8 + length + said["data_offsets"][0], tuple(said["shape"]), said["dtype"])
            for name, said in header.items()
        }
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
