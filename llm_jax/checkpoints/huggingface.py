"""Hugging Face directories: config.json, safetensors (sharded or not) and the tokenizer; reading and writing."""

import dataclasses
import functools
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from llm_jax import files, tokenizers, trees, weights
from llm_jax.checkpoints import assemble, config_json
from llm_jax.checkpoints.checkpoint import Checkpoint, Shardings, abstract_params, check_geometry, check_vocabulary
from llm_jax.checkpoints.families import FAMILIES, hf_config, model_config
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.transformer import Transformer
from llm_jax.schema import ModelConfig
from llm_jax.tokenizers import Tokenizer

# Tensors that hold no weights, and output layers of pretraining tasks that the model does not have.
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)|cls\..*")
# Other names of tensors: norms in files of early versions, and the head of GPT-NeoX in transformers since 5.
ALIASES = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"), (r"^lm_head\.", "embed_out."))
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|module)\.")  # of torch.compile, FSDP and DDP
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class HuggingFace(Checkpoint):
    """A directory that `transformers` writes, of a family in `families.FAMILIES`."""

    form = "huggingface"

    @staticmethod
    def matches(path: pathlib.Path) -> bool:
        """Whether a path is a directory with a config.json of transformers, or a damaged one and safetensors files."""
        try:
            config = json.loads((path / "config.json").read_text())
        except OSError:
            return False
        except (ValueError, RecursionError):
            return any(path.glob("*.safetensors*"))
        return not isinstance(config, dict) or "model_type" in config or not config.keys() & {"tokenizer", "train"}

    @functools.cached_property
    def _config(self) -> tuple[str, ModelConfig]:
        return read_config(self.path)

    @property
    def config(self) -> ModelConfig:
        return self._config[1]

    @property
    def family(self) -> str:
        return self._config[0]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizers.from_directory(self.path)
        check_vocabulary(tokenizer, self.config, self.path)
        return tokenizer

    def params(self, config: ModelConfig, shardings: Shardings, as_stored: bool = False) -> dict[str, Any]:
        check_geometry(self.config, config, self.name)
        try:
            return load_params(self.path, self.family, config, shardings)
        except UserError as error:
            raise _with_quantization(self.path, error) from error


def read_config(directory: pathlib.Path) -> tuple[str, ModelConfig]:
    """(family, configuration of the model) of a directory.

    If config.json contradicts the tensors in the files, the tensors take precedence and a note is printed on stderr.

    Raises:
      UserError: see `families.model_config`.
    """
    try:
        content = json.loads((directory / "config.json").read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory / 'config.json'}: cannot be read ({error})") from error
    try:
        family, config = model_config(content)
        positions.head_dim(config)  # raises UserError if the heads do not fit
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{directory}: {error}") from error
    try:
        source = _Files(directory)
    except UserError:  # reported when the parameters are read
        return family, config
    return family, _with_stored_features(source, family, config)


# Optional part of a model -> (a parameter of it, what config.json calls it, or "" where it has no name there).
_FEATURES = {
    "tie_embeddings": ("head/kernel", "tie_word_embeddings"),
    "head_bias": ("head/kernel_bias", "bias of the output head"),
    "qkv": ("layers/0/attention/query_bias", "attention_bias"),
    "out": ("layers/0/attention/out_bias", "attention_bias"),
    "mlp": ("layers/0/mlp/up_bias", "mlp_bias"),
    "qk_norm": ("layers/0/attention/query_norm/scale", "norms of queries and keys"),
    "pooler": ("pooler/kernel", ""),
}


def _with_stored_features(source: "_Files", family: str, config: ModelConfig) -> ModelConfig:
    """Corrects the configuration: it gets the optional parts (biases, norms, head, pooler) that have stored tensors."""
    table = FAMILIES[family].tensor_names(config)
    source.rename(FAMILIES[family].prefix, {spec.name.replace("{i}", "0") for spec in table.values()})
    attention = config.bias or config.attention_bias
    configured = {
        "tie_embeddings": config.tie_embeddings,
        "head_bias": config.head_bias,
        "qkv": attention or config.qkv_bias,
        "out": attention,
        "mlp": config.bias or config.mlp_bias,
        "qk_norm": config.qk_norm,
        "pooler": config.pooler,
    }
    stored: dict[str, bool] = {}
    contradictions: dict[str, list[str]] = {}
    for feature, (path, key) in _FEATURES.items():
        spec = table.get(path.replace("layers/0", "layers/{i}"))
        name = spec.name.replace("{i}", "0") if spec else ""
        present = name in source.shapes
        if feature == "tie_embeddings":
            present = not present or (configured[feature] and source.equal(name, table["embed/table"].name))
        stored[feature] = present if spec else configured[feature]
        if stored[feature] != configured[feature] and key:
            state = "present" if name in source.shapes else "missing"
            if feature == "tie_embeddings":
                state += ", so that the output head is " + ("the embedding table" if stored[feature] else "that tensor")
            contradictions.setdefault(key, []).append(f"{name} is {state}")
    for key, tensors in contradictions.items():
        print(
            f"note: {source.label}: config.json contradicts the tensors about {key}; using the tensors: "
            f"{', '.join(tensors)}",
            file=sys.stderr,
            flush=True,
        )
    if stored == configured:
        return config
    changes: dict[str, Any] = {name: stored[name] for name in ("tie_embeddings", "head_bias", "qk_norm", "pooler")}
    changes |= config_json.biases(stored["qkv"] and stored["out"], stored["mlp"])
    if stored["qk_norm"] and not configured["qk_norm"]:
        changes |= {"qk_norm_kind": config.norm}
    return dataclasses.replace(config, **changes | {"qkv_bias": stored["qkv"] and not stored["out"]})


def _with_quantization(directory: pathlib.Path, error: UserError) -> UserError:
    """Explains an error of reading tensors by their quantization, if config.json says that they are quantized."""
    content = json.loads((directory / "config.json").read_text())
    quantization = content.get("quantization_config") or content.get("quantization")  # the latter is MLX's
    if not isinstance(quantization, dict):
        return error
    method = quantization.get("quant_method")
    described = f"quant_method={method!r}" if method else f"{quantization}"[:80]
    reason = " ".join(str(error).removeprefix(f"{directory}: ").splitlines()[:2])
    return UserError(
        f"{directory}: config.json has a quantization_config of {described}, and weights that it quantized cannot be "
        f"read ({reason}); expected the unquantized model, or a GGUF file (as the base of adapters: by --base=PATH, in "
        "Python base=PATH)"
    )


def load_params(directory: pathlib.Path, family: str, config: ModelConfig, shardings: Shardings) -> dict[str, Any]:
    """The parameters of a directory; every shard is read from its file straight to its device.

    Args:
      family: a key of `FAMILIES`.
      config: the model.
      shardings: abstract parameters -> their shardings.

    Raises:
      UserError: tensors are missing, unexpected or of another shape (all are named), or a file is damaged.
    """
    source = _Files(directory)
    row, abstract = FAMILIES[family], abstract_params(Transformer(config))
    specs = assemble.specs(row.tensor_names(config), abstract)
    source.rename(row.prefix, {spec.name for spec in specs.values()})
    head = row.names["head/kernel"].name if config.tie_embeddings and "head/kernel" in row.names else ""

    def ignored(name: str) -> bool:
        return bool(_IGNORED.fullmatch(name)) or name == head

    return assemble.load(source, specs, abstract, shardings, ignored)


def save(
    directory: pathlib.Path,
    family: str,
    config: ModelConfig,
    params: Any,
    other_files: dict[str, bytes],
    special_ids: dict[str, int] | None = None,
) -> None:
    """Writes, atomically, a directory that `transformers` can load.

    Args:
      family: a key of `FAMILIES`.
      config: `precision.params` is the dtype of the tensors.
      params: one entry per layer.
      other_files: content by name, such as the tokenizer's files.
      special_ids: "bos_token_id", "eos_token_id", ... for config.json, which transformers' generation uses.

    Raises:
      UserError: the directory exists, or the family cannot hold the model.
    """
    if directory.exists():
        raise UserError(f"--output={directory} already exists; choose another path, or remove it")
    dtype = np.dtype(ml_dtypes.bfloat16 if config.precision.params == "bfloat16" else config.precision.params)
    json_config = hf_config(family, config) | {"torch_dtype": config.precision.params} | (special_ids or {})
    parts = assemble.by_tensor(assemble.specs(FAMILIES[family].tensor_names(config), params))
    flat = {path: weights.dense(weight) for path, weight in trees.flatten(params).items()}
    sizes = {name: sum(flat[path].nbytes for _, path in part) for name, part in parts.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    with files.new_directory(directory, source=f"--output={directory}") as partial:
        index: dict[str, str] = {}
        with tqdm(total=sum(sizes.values()), desc="writing weights", unit="B", unit_scale=True, disable=None) as bar:
            for i, shard in enumerate(shards, 1):
                file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
                tensors = {}
                for name in shard:
                    array = assemble.stored_tensor([(spec, flat[path]) for spec, path in parts[name]])
                    tensors[name] = array.astype(dtype, copy=False)
                    bar.update(sizes[name])
                write_safetensors(tensors, partial / file)
                index |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
            (partial / "model.safetensors.index.json").write_text(json.dumps(total, indent=1))
        (partial / "config.json").write_text(files.dump_json(json_config))
        write_files(partial, other_files)


def write_files(directory: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files by name, which may be in a subdirectory."""
    for name, content in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def write_safetensors(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes one safetensors file. Raises OSError if that fails."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library creates files that only their owner may read


class _Tensor(NamedTuple):
    """Where a tensor is stored: its file, the offset of its first byte, its shape, and its safetensors dtype."""

    file: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class _Files:
    """The safetensors files of a directory. Raises UserError if one is missing or damaged."""

    def __init__(self, directory: pathlib.Path):
        self.label = str(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[str, _Tensor] = {}
        for path in self._paths(directory):
            for name, tensor in _read_header(path).items():
                if name in self.tensors:
                    raise UserError(f"{path}: the tensor '{name}' is in {self.tensors[name].file.name} as well")
                self.tensors[name] = tensor
        for name, tensor in self.tensors.items():
            if tensor.dtype not in _DTYPES and not _IGNORED.fullmatch(name):
                raise UserError(
                    f"{tensor.file}: '{name}' is of type {tensor.dtype}; expected one of {', '.join(_DTYPES)}"
                )

    def _paths(self, directory: pathlib.Path) -> Iterator[pathlib.Path]:
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if single.is_file():  # as in transformers, it takes precedence over an index
            yield single
            return
        if not index.is_file() and (shards := _shards(directory)):
            yield from shards
            return
        if not index.is_file():
            pickled = [p.name for p in directory.iterdir() if p.suffix in _PICKLED]
            reason = f" ({pickled[0]} is pickled: it could run code, and is not read)" if pickled else ""
            raise UserError(f"{directory}: no model.safetensors here{reason}")
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors ({error!r})") from error
        for name in names:
            path = directory / str(name)
            if not isinstance(name, str) or pathlib.PurePath(name).name != name or path.suffix != ".safetensors":
                raise UserError(f"{index}: names the file {name!r}; expected safetensors files of this directory")
            if not path.is_file():
                raise UserError(f"{path}: named in {index.name}, but does not exist")
            yield path

    def rename(self, prefix: str, expected: set[str]) -> None:
        """Renames tensors that are stored under another name than the expected one.

        The family's prefix is added or removed, and the names of `ALIASES` and `WRAPPERS` are replaced.
        """
        tensors = {}
        for stored_name, tensor in self.tensors.items():
            name = WRAPPERS.sub("", stored_name)
            names = [name, *(re.sub(pattern, new, name) for pattern, new in ALIASES)]
            names += [n.removeprefix(prefix) if n.startswith(prefix) else prefix + n for n in names]
            new_name = next((n for n in names if n in expected), stored_name)
            if new_name in tensors:
                raise UserError(
                    f"{tensor.file}: the tensor '{new_name}' is stored under two names, one of them '{stored_name}'"
                )
            tensors[new_name] = tensor
        self.tensors, self.shapes = tensors, {name: tensor.shape for name, tensor in tensors.items()}

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; at most 4 MiB of each are in memory at a time."""
        shape = self.shapes.get(name)
        if shape is None or shape != self.shapes.get(other) or len(shape) != 2:
            return False
        rows = max(1, 2**20 // max(1, shape[1]))
        slices = [(slice(i, i + rows), slice(None)) for i in range(0, shape[0], rows)]
        return all(np.array_equal(self.read(name, part), self.read(other, part)) for part in slices)

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            # Mapped for this call only: the pages of a lasting mapping would count as memory of the process.
            return np.array(np.memmap(tensor.file, _DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)[slices])
        except (OSError, ValueError) as error:
            raise UserError(f"{tensor.file}: changed while it was being read ({error})") from error


def _shards(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files model-00001-of-00003.safetensors and so on of a directory without an index, [] if there are none.

    Raises:
      UserError: some are missing, or they belong to several models.
    """
    matches = [m for p in directory.iterdir() if (m := re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", p.name))]
    counts = {int(match[2]) for match in matches}
    if len(counts) > 1:
        names = ", ".join(f"model-...-of-{count:05d}.safetensors" for count in sorted(counts))
        raise UserError(f"{directory}: shards of several models, {names}, without an index; expected those of one")
    count = max(counts, default=0)
    missing = {*range(1, count + 1)} - {int(match[1]) for match in matches}
    if missing:
        first = directory / f"model-{min(missing):05d}-of-{count:05d}.safetensors"
        raise UserError(f"{first}: missing, one of {len(missing)} of {count} shards; copy it, or download again")
    return [directory / name for name in sorted(match[0] for match in matches)]


def _read_header(path: pathlib.Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file by name. Raises UserError if it is damaged."""
    files.check_not_lfs_pointer(path)
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: _Tensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
        }
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
