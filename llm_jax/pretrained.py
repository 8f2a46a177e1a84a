"""One `load` for every kind of checkpoint: our runs, Hugging Face directories, GGUF files, assets, hub names."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from llm_jax import checkpoint, tokenizers, trees
from llm_jax.checkpoint import Loaded
from llm_jax.config import ModelConfig
from llm_jax.data import assets
from llm_jax.errors import UserError
from llm_jax.model.stages import layout
from llm_jax.model.transformer import Transformer
from llm_jax.tokenizers import Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def load(
    path: str | os.PathLike[str], scan_layers: bool = False, dtype: str = "float32", as_stored: bool = False
) -> Loaded:
    """The model, its parameters on the default device, and the tokenizer.

    Args:
      path: a run or one of its checkpoints; a Hugging Face directory; a .gguf file; "asset:NAME"
        (`llm_jax.data.assets`); or "hf:ORG/NAME", where a hub and the package huggingface_hub are reachable.
      scan_layers: the layout of the parameters; False, one entry per layer, is the fast one for decoding.
      dtype: of the parameters and of the computation of other people's checkpoints; ours keep their own.
      as_stored: quantized tensors of a .gguf file stay so, where a scheme of ours corresponds.

    Raises:
      UserError: nothing there that can be read, in one line that says what was expected.
    """
    found = locate(path)
    if (found.is_dir() and not is_foreign(found)) or not found.exists():
        return checkpoint.load(found, scan_layers)
    if found.is_file():
        return _gguf(found, scan_layers, dtype, as_stored)
    return _hf(found, scan_layers, dtype)


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file or directory that a name means; assets and hub names are fetched."""
    name = str(path)
    if name.startswith("asset:"):
        return assets.path(name.removeprefix("asset:"))
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"))
    try:
        path = pathlib.Path(name).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{name[:80]}: no such file or directory ({error})") from error
    return path


def is_foreign(path: pathlib.Path) -> bool:
    """Whether a path is a GGUF file or a Hugging Face directory, not a run of ours."""
    from llm_jax.interop import hf

    return path.is_file() or (path.is_dir() and hf.is_directory_of(path))


def family(path: pathlib.Path) -> str:
    """The family of a Hugging Face directory, or the architecture of a GGUF file."""
    from llm_jax.interop import gguf, gguf_model, hf

    return gguf_model.read_config(gguf.read(path), str(path))[0] if path.is_file() else hf.read_config(path)[0]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of what `load` reads, without the model.

    Raises:
      UserError: as `load`.
    """
    found = locate(path)
    if not is_foreign(found):
        return tokenizers.load(checkpoint.find(found) / "tokenizer")
    if found.is_file():
        from llm_jax.interop import gguf

        return tokenizers.from_gguf(gguf.read(found).metadata)
    return _tokenizer_of(found)


def _gguf(path: pathlib.Path, scan_layers: bool, dtype: str, as_stored: bool) -> Loaded:
    from llm_jax.interop import gguf, gguf_model

    file = gguf.read(path)
    _, config = gguf_model.read_config(file, str(path))
    tokenizer = tokenizers.from_gguf(file.metadata)
    config, abstract, shardings = _prepared(config, dtype)
    params = gguf_model.load_params(path, file, config, abstract, shardings, as_stored)
    return _finished(config, params, tokenizer, scan_layers)


def _hf(path: pathlib.Path, scan_layers: bool, dtype: str) -> Loaded:
    from llm_jax.interop import hf

    kind, config = hf.read_config(path)
    tokenizer = _tokenizer_of(path)
    config, abstract, shardings = _prepared(config, dtype)
    params = hf.load_params(path, kind, abstract, shardings)
    return _finished(config, params, tokenizer, scan_layers)


def _tokenizer_of(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory."""
    if (path / "tokenizer" / "kind.json").is_file():  # written by `convert` from a run of ours
        return tokenizers.load(path / "tokenizer")
    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name in _TOKENIZER_FILES and p.is_file()}
    try:
        return tokenizers.from_files(files)
    except (UserError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error})") from error


def _prepared(config: ModelConfig, dtype: str) -> tuple[ModelConfig, Any, Any]:
    precision = dataclasses.replace(config.precision, params=dtype, compute=dtype)
    config = dataclasses.replace(config, precision=precision, scan_layers=False)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = checkpoint.abstract_params(Transformer(config))
    return config, abstract, lambda tree: jax.tree.map(lambda _: device, tree)


def _finished(config: ModelConfig, params: Any, tokenizer: Any, scan_layers: bool) -> Loaded:
    regular = getattr(tokenizer, "regular_size", tokenizer.vocab_size)
    if regular > config.vocab_size:  # special tokens past the model's ids (images, say) may stand in the file
        raise UserError(f"the tokenizer has {regular} ids, the model only {config.vocab_size}")
    model = Transformer(dataclasses.replace(config, scan_layers=scan_layers))
    return Loaded(model, trees.restage(params, layout(model.config)), tokenizer)


def _from_hub(name: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"hf:{name} needs the package huggingface_hub; pip install huggingface_hub") from error
    wanted = ["*.safetensors", "*.json", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its errors are many: no network, no such name, no right to it
        raise UserError(f"hf:{name} cannot be fetched ({str(error).splitlines()[0]})") from error
