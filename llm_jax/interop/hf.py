"""Hugging Face directories: config.json, safetensors (sharded or not) and the tokenizer, in and out."""

import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from llm_jax import trees, weights
from llm_jax.config import ModelConfig
from llm_jax.errors import UserError
from llm_jax.interop.families import FAMILIES, Family, Their, model_config, their_config

# Tensors of theirs that hold no weights, and heads that are not ours.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)|cls\..*")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

Shardings = Callable[[Any], Any]


def is_directory_of(path: pathlib.Path) -> bool:
    """Whether a directory is of this kind (it has a config.json that names a model_type)."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False


def read_config(directory: pathlib.Path, default: ModelConfig) -> tuple[str, ModelConfig]:
    """(family, the model's config) of a directory. Raises UserError: see `families.model_config`."""
    try:
        said = json.loads((directory / "config.json").read_text())
        if not isinstance(said, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'}: cannot be read ({error})") from error
    try:
        return model_config(said, default)
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: {error}") from error


def load_params(directory: pathlib.Path, kind: str, abstract: Any, shardings: Shardings) -> Any:
    """The parameters of a directory, each tensor read when its turn comes and straight to its shards.

    Args:
      kind: the family.
      abstract: shapes and dtypes of the parameters, one entry per layer.
      shardings: abstract parameters -> their shardings.

    Raises:
      UserError: tensors are missing, left over or of another shape (all are named), or a file is damaged.
    """
    files = _Files(directory)
    family = FAMILIES[kind]
    wanted = names(family, abstract)
    known = files.renamed(family.prefix, {their.name for their in wanted.values()})
    flat, placed = trees.flatten(abstract), trees.flatten(shardings(abstract))
    tied = {"lm_head.weight"} if "head/kernel" not in flat else set()
    left = {n for n in known if not _IGNORED.fullmatch(n)} - {their.name for their in wanted.values()} - tied
    problems = [f"- {their.name} (for {ours})" for ours, their in wanted.items() if their.name not in known]
    problems += [f"+ {name} {known[name].shape}" for name in sorted(left)]
    for ours, their in wanted.items():
        if their.name in known and known[their.name].shape != (shape := _their_shape(their, flat[ours].shape)):
            problems.append(f"! {their.name} is {known[their.name].shape}, expected {shape} for {ours}")
    if problems:
        more = f"\n... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise UserError(
            f"{directory}: the tensors are not those of a {kind} of this config.json (- missing, + left over, "
            "! another shape):\n" + "\n".join(problems[:40]) + more
        )
    found = {}
    for ours, leaf in tqdm(flat.items(), "reading weights", leave=False, delay=2, disable=None):
        found[ours] = files.array(known[wanted[ours].name], wanted[ours], leaf, placed[ours])
    return trees.unflatten(found)


def names(family: Family, abstract: Any) -> dict[str, Their]:
    """Our path -> their tensor, for every parameter (one entry per layer)."""
    found = {}
    for path in trees.flatten(abstract):
        layer = re.fullmatch(r"layers/(\d+)/(.*)", path)
        template = f"layers/{{i}}/{layer[2]}" if layer else path
        if template not in family.names:
            raise UserError(f"{family.architecture} has no tensor for '{path}'")
        their = family.names[template]
        name = their.name.replace("{i}", layer[1]) if layer else their.name
        found[path] = Their(name, their.turned, their.plus, their.part)
    return found


def save(directory: pathlib.Path, kind: str, config: ModelConfig, params: Any, files: dict[str, bytes]) -> None:
    """Writes a directory that `transformers` loads; it appears whole or not at all.

    Args:
      params: one entry per layer.
      files: the tokenizer's files by name.

    Raises:
      UserError: the directory exists, or the family cannot hold the model.
    """
    if directory.exists():
        raise UserError(f"--output={directory} exists; give another, or remove it")
    said = their_config(kind, config) | {"torch_dtype": config.precision.params}
    wanted = names(FAMILIES[kind], params)
    flat = trees.flatten(params)
    parts: dict[str, list[tuple[Their, str]]] = {}
    for ours, their in wanted.items():
        parts.setdefault(their.name, []).append((their, ours))
    sizes = {name: sum(flat[ours].size * flat[ours].dtype.itemsize for _, ours in of) for name, of in parts.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        index: dict[str, str] = {}
        with tqdm(total=sum(sizes.values()), desc="writing weights", unit="B", unit_scale=True, disable=None) as bar:
            for i, shard in enumerate(shards, 1):
                one = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
                tensors = {name: _theirs(parts[name], flat) for name in shard}
                save_file(tensors, partial / one, metadata={"format": "pt"})
                index |= dict.fromkeys(shard, one)
                bar.update(sum(sizes[name] for name in shard))
        if len(shards) > 1:
            total = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
            (partial / "model.safetensors.index.json").write_text(json.dumps(total, indent=1))
        (partial / "config.json").write_text(json.dumps(said, indent=1) + "\n")
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.chmod(0o755)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _theirs(parts: list[tuple[Their, str]], flat: dict[str, Any]) -> np.ndarray:
    arrays = []
    for their, ours in sorted(parts, key=lambda part: part[0].part):
        array = np.asarray(jax.device_get(weights.dense(flat[ours])))
        array = (array.astype(np.float32) - their.plus).astype(array.dtype) if their.plus else array
        arrays.append(array.T if their.turned else array)
    return np.ascontiguousarray(np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0])


def _their_shape(their: Their, ours: tuple[int, ...]) -> tuple[int, ...]:
    shape = ours[::-1] if their.turned else ours
    return (*shape[:-1], shape[-1] * their.part[1])


class _Tensor:
    """Where a tensor lies: the file it is in, its name there, its shape."""

    def __init__(self, file: pathlib.Path, name: str, shape: tuple[int, ...], dtype: str):
        self.file, self.name, self.shape, self.dtype = file, name, shape, dtype


class _Files:
    """The safetensors files of a directory. Raises UserError where one is missing or damaged."""

    def __init__(self, directory: pathlib.Path):
        self.handles: dict[pathlib.Path, Any] = {}
        self.tensors: dict[str, _Tensor] = {}
        for path in self._paths(directory):
            try:
                handle = safe_open(path, framework="numpy")
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(name)
                    if name in self.tensors:
                        raise UserError(f"{path}: the tensor '{name}' is in {self.tensors[name].file.name} as well")
                    self.tensors[name] = _Tensor(path, name, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})") from error
            self.handles[path] = handle
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

    def renamed(self, prefix: str, wanted: set[str]) -> dict[str, _Tensor]:
        """The tensors by the names that the table has: with or without the prefix of a head-less or a whole model."""
        found = {}
        for name, tensor in self.tensors.items():
            other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
            found[other if name not in wanted and other in wanted else name] = tensor
        return found

    def array(self, tensor: _Tensor, their: Their, leaf: Any, sharding: Any) -> jax.Array:
        """Our array: each shard is read from the file, turned, and put on its device."""
        part = self.handles[tensor.file].get_slice(tensor.name)
        i, n = their.part

        def shard(index: Any) -> np.ndarray:
            bounds = [range(*s.indices(size)) for s, size in zip(index, leaf.shape, strict=True)]
            bounds = bounds[::-1] if their.turned else bounds
            begin = i * leaf.shape[-1] if n > 1 else 0
            slices = [slice(b.start, b.stop) for b in bounds]
            slices[-1] = slice(slices[-1].start + begin, slices[-1].stop + begin)
            values = part[tuple(slices)]
            values = values.T if their.turned else values
            return np.asarray(values.astype(np.float32) + their.plus if their.plus else values).astype(leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, shard)
