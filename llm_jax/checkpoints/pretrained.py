"""One `load` for every kind of checkpoint: our runs, Hugging Face directories, GGUF files, assets, hub names."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from llm_jax import lora, tokenizers, trees
from llm_jax.checkpoints import checkpoint
from llm_jax.checkpoints.checkpoint import Loaded
from llm_jax.data import assets
from llm_jax.errors import UserError
from llm_jax.model.stages import layout
from llm_jax.model.transformer import Transformer
from llm_jax.quant import post_training
from llm_jax.schema import ModelConfig
from llm_jax.tokenizers import Tokenizer
from llm_jax.weights import Node

Shardings = Callable[[Any], Any]  # of an abstract tree


def load(
    path: str | os.PathLike[str], scan_layers: bool = False, dtype: str = "float32", as_stored: bool = False
) -> Loaded:
    """The model, its parameters on the default device, and the tokenizer.

    Args:
      path: a run or one of its checkpoints (of adapters: over their base, whose hash is checked); a Hugging
        Face directory; a .gguf file; "asset:NAME" (`llm_jax.data.assets`); or "hf:ORG/NAME", where a hub and
        the package huggingface_hub are reachable; or adapters of peft, which name such a base.
      scan_layers: the layout of the parameters; False, one entry per layer, is the fast one for decoding, and
        taken in any case where layers hold weights of different kinds.
      dtype: of the parameters and of the computation of other people's checkpoints; ours keep their own.
      as_stored: quantized tensors of a .gguf file stay so, where a scheme of ours corresponds.

    Raises:
      UserError: nothing there that can be read, in one line that says what was expected.
    """
    from llm_jax.checkpoints import peft

    found = locate(path)
    if as_stored and found.exists() and not found.is_file():
        raise UserError(f"--as_stored keeps the tensors of a .gguf file as they are; {path} is none")
    if (found.is_dir() and not is_foreign(found)) or not found.exists():
        directory = checkpoint.find(found)
        adapts = bool(checkpoint.read_config(directory).lora.rank)
        return _adapters(directory, scan_layers) if adapts else checkpoint.load(directory, scan_layers)
    if peft.is_directory_of(found):
        return _peft(found, scan_layers, dtype)
    config, tokenizer, read = _opened(found, dtype, as_stored)
    model = Transformer(dataclasses.replace(config, scan_layers=scan_layers))
    # Weights that stay as they are stored come layer by layer.
    abstract = checkpoint.abstract_params(Transformer(config) if as_stored else model)
    params = read(abstract, _on_default_device)
    return checkpoint.laid_out(model, params, tokenizer) if as_stored else Loaded(model, params, tokenizer)


class Origin:
    """The weights of `init_from`: what fine-tuning starts from, or what adapters adapt.

    Args:
      name: as `load` takes it.
      dtype: of the parameters, whatever they are kept in; numbers that are quantized stay so.

    Attributes:
      name: how a record names it: absolute, for a file or directory.
      tokenizer: its tokenizer.
      config: of its model.
    """

    def __init__(self, name: str, dtype: str):
        from llm_jax.checkpoints import peft

        path = locate(name)
        self._dtype = dtype
        self._run: pathlib.Path | None = None
        self._read: Callable[[Any, Shardings], Any] | None = None
        if not is_foreign(path):
            self._run = path = checkpoint.find(path)
            whole = checkpoint.read_config(path)
            if whole.lora.rank:
                raise UserError(f"init_from={name} holds adapters; merge them first (convert --to=hf)")
            self.tokenizer, self.config = tokenizers.load(path / "tokenizer"), whole.model
        elif peft.is_directory_of(path):
            loaded = load(name, dtype=dtype)
            self.tokenizer, self.config = loaded.tokenizer, loaded.model.config
        else:
            self.config, self.tokenizer, self._read = _opened(path, dtype)
        self.name = name if name.startswith(("asset:", "hf:")) else str(path.absolute())

    def params(self, config: ModelConfig, shardings: Shardings) -> Any:
        """Its weights in the layout of `config`, on the devices of `shardings`.

        Raises:
          UserError: they do not fit the model of `config`, or are damaged.
        """
        abstract = checkpoint.abstract_params(Transformer(config))
        if self._run:
            found = checkpoint.restore(self._run, checkpoint.verify(self._run), config, shardings)
            restaged = lambda p: trees.restage(_cast(p, self._dtype), layout(config))  # noqa: E731
            return jax.jit(restaged, out_shardings=shardings(jax.eval_shape(restaged, found)))(found)
        wanted = trees.describe(jax.eval_shape(trees.unstack, abstract))
        if self._read:
            trees.check(trees.describe(checkpoint.abstract_params(Transformer(self.config))), wanted, self.name)
            return self._read(abstract, shardings)
        found = load(self.name, dtype=self._dtype).params
        trees.check(trees.describe(found), wanted, self.name)
        return jax.device_put(trees.restage(found, layout(config)), shardings(abstract))


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file or directory that a name means; assets and hub names are fetched."""
    name = str(path)
    if name.startswith("asset:"):
        return assets.path(name.removeprefix("asset:"))
    if name.startswith("hf:"):
        return _from_hub(name.removeprefix("hf:"))
    try:
        path = pathlib.Path(name).expanduser()
        if not path.exists() and path.suffix == ".gguf":
            raise OSError("expected a GGUF file")
    except (RuntimeError, OSError, ValueError) as error:
        shown = name if len(name) <= 300 else f"{name[:80]}..."
        raise UserError(f"{shown}: no such file or directory ({error})") from error
    return path


def identity(path: pathlib.Path) -> str:
    """What tells one checkpoint from another: its manifest, or the name, size and time of its files."""
    if not is_foreign(path):
        return (checkpoint.find(path) / "manifest.json").read_text()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return "; ".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)


def is_foreign(path: pathlib.Path) -> bool:
    """Whether a path is a GGUF file, or a directory of Hugging Face or peft, not a run of ours."""
    from llm_jax.checkpoints import hf, peft

    return path.is_file() or (path.is_dir() and (hf.is_directory_of(path) or peft.is_directory_of(path)))


def family(path: pathlib.Path) -> str:
    """The family of a Hugging Face directory, of a GGUF file, or of the base of adapters."""
    from llm_jax.checkpoints import gguf, gguf_model, hf, peft

    if peft.is_directory_of(path):
        return family(_named_base(path))
    return gguf_model.read_config(gguf.read(path), str(path))[0] if path.is_file() else hf.read_config(path)[0]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of what `load` reads, without the model; or one by itself.

    Args:
      path: beside what `load` takes, a directory of `tokenizers.train`, a tokenizer.json or tokenizer.model, or a
        directory that holds one.

    Raises:
      UserError: as `load`.
    """
    from llm_jax.checkpoints import gguf, peft

    found = locate(path)
    if (found / "kind.json").is_file():
        return tokenizers.load(found)
    if found.is_file() and found.name in tokenizers.FOREIGN:
        return tokenizers.from_directory(found.parent, found.name)
    if any((found / name).is_file() for name in tokenizers.FOREIGN) and not peft.is_directory_of(found):
        return tokenizers.from_directory(found)
    if peft.is_directory_of(found):
        return load_tokenizer(_named_base(found))
    if not is_foreign(found):
        return tokenizers.load(checkpoint.find(found) / "tokenizer")
    if found.is_file():
        return tokenizers.from_gguf(gguf.read(found).metadata)
    return tokenizers.from_directory(found)


def named_tokenizer(name: str, own: Tokenizer | None) -> Tokenizer:
    """The tokenizer that tokenizer.path names.

    Args:
      own: that of the checkpoint that a run goes on from, which it keeps: if the named one has gone, this is it.

    Raises:
      UserError: there is none, or not the one of the checkpoint.
    """
    if own and not name.startswith(("asset:", "hf:")) and not pathlib.Path(name).expanduser().exists():
        return own
    try:
        found = load_tokenizer(name)
    except UserError as error:
        expected = "a directory of tokenizers.train, tokenizer.json or tokenizer.model or where it is, or a checkpoint"
        raise UserError(f"tokenizer.path={name}: {error}; expected {expected}") from error
    check_tokenizer(name, found, own)
    return found


def check_tokenizer(name: str, named: Tokenizer, own: Tokenizer | None) -> None:
    """Raises UserError where weights come with a tokenizer, `own`, and tokenizer.path names another."""
    if own and tokenizers.digest(named) != tokenizers.digest(own):
        raise UserError(
            f"tokenizer.path={name} is another tokenizer ({tokenizers.digest(named)[:12]}) than that of the weights "
            f"({tokenizers.digest(own)[:12]}), which they keep"
        )


def adapters(*paths: str | os.PathLike[str]) -> tuple[Loaded, list[dict[str, Any]]]:
    """The base of runs of adapters (or of adapters of peft) without them, and the adapters of each by themselves.

    `lora.attach` takes one of these, `lora.combine` several. They are as they are used (`lora.factors` rounds them),
    over the unchanged base (`lora.plain`), with one entry per layer.

    Raises:
      UserError: as `load`; a run without adapters; runs over different bases; or adapters of which the base was
        quantized less what they started from.
    """
    base, first = _base_and_adapters(paths[0])
    found, own = [first], trees.fingerprint(base.params)
    for path in paths[1:]:
        another, more = _base_and_adapters(path)
        if trees.fingerprint(another.params) != own:
            raise UserError(f"{path}: its adapters are over another base than those of {paths[0]}")
        found.append(more)
    return base, found


def _base_and_adapters(path: str | os.PathLike[str]) -> tuple[Loaded, dict[str, Any]]:
    from llm_jax.checkpoints import peft

    found = locate(path)
    if peft.is_directory_of(found):
        return _peft_apart(found, "float32")
    directory = checkpoint.find(found)
    whole = checkpoint.read_config(directory)
    if not whole.lora.rank:
        raise UserError(f"{path}: a run without adapters; lora.rank is 0")
    base, apart = _apart(directory)
    apart = lora.rounded(apart, whole.lora.factors)
    if any(name.endswith("/start_a") for name in trees.flatten(apart)):
        if whole.quant.scheme:
            said = "its base was quantized less what its adapters started from (lora.variant=pissa)"
            raise UserError(f"{path}: {said}; they cannot be taken apart")
        apart = lora.plain(apart)
    model = Transformer(dataclasses.replace(whole.model, scan_layers=False, attention_kernel="auto"))
    return Loaded(model, post_training.base(base, whole.quant), tokenizers.load(directory / "tokenizer")), apart


def _apart(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(full weights of the base of a run of adapters, the adapters), the base from wherever it is."""
    record = checkpoint.verify(directory)
    dtype = checkpoint.read_config(directory).model.precision.params
    try:
        base = _cast(load(record["base"]["path"], dtype=dtype).params, dtype)
    except UserError as error:
        raise UserError(f"{directory}: the base of its adapters cannot be read: {error}") from error
    checkpoint.check_base(directory, record, trees.fingerprint(base))
    return base, trees.unstack(checkpoint.restore_adapters(directory, record))


def _adapters(directory: pathlib.Path, scan_layers: bool) -> Loaded:
    """A run of adapters: its base with the adapters attached."""
    whole = checkpoint.read_config(directory)
    base, apart = _apart(directory)
    frozen = post_training.base(lora.rebase(base, apart), whole.quant)
    params = lora.attach(frozen, apart, factors=whole.lora.factors)
    model = Transformer(dataclasses.replace(whole.model, scan_layers=scan_layers, attention_kernel="auto"))
    return checkpoint.laid_out(model, params, tokenizers.load(directory / "tokenizer"))


def _cast(params: Any, dtype: str) -> dict[str, Any]:
    """The parameters with their arrays in another dtype, nodes as they are."""
    return trees.map_weights(lambda _, w: w if isinstance(w, Node) else w.astype(dtype), params)


def _opened(
    path: pathlib.Path, dtype: str, as_stored: bool = False
) -> tuple[ModelConfig, Tokenizer, Callable[[Any, Shardings], Any]]:
    """Of a Hugging Face directory or a GGUF file: the model's config with one entry per layer, the tokenizer, and
    a function that reads the parameters: (abstract ones in any layout, shardings) -> their arrays."""
    from llm_jax.checkpoints import gguf, gguf_model, hf

    tokenizer: Tokenizer
    if path.is_file():
        file = gguf.read(path)
        _, config = gguf_model.read_config(file, str(path))
        tokenizer = tokenizers.from_gguf(file.metadata)
        read: Any = functools.partial(gguf_model.load_params, path, file, config, as_stored=as_stored)
    else:
        kind, config = hf.read_config(path)
        tokenizer = tokenizers.from_directory(path)
        read = functools.partial(hf.load_params, path, kind)
    regular = getattr(tokenizer, "regular_size", tokenizer.vocab_size)
    if regular > config.vocab_size:  # special tokens past the model's ids (images, say) may stand in the file
        raise UserError(f"{path}: the tokenizer has {regular} ids, the model only {config.vocab_size}")
    precision = dataclasses.replace(config.precision, params=dtype, compute=dtype)
    return dataclasses.replace(config, precision=precision), tokenizer, read


def _peft_apart(path: pathlib.Path, dtype: str) -> tuple[Loaded, dict[str, Any]]:
    from llm_jax.checkpoints import peft

    try:
        base = load(_named_base(path), dtype=dtype)
    except UserError as error:
        raise UserError(f"{path}: the base of its adapters cannot be read: {error}") from error
    return base, peft.load(path, family(_named_base(path)), base.params, base.model.config.tie_embeddings)


def _peft(path: pathlib.Path, scan_layers: bool, dtype: str) -> Loaded:
    base, apart = _peft_apart(path, dtype)
    model = Transformer(dataclasses.replace(base.model.config, scan_layers=scan_layers))
    return checkpoint.laid_out(model, lora.attach(base.params, apart), base.tokenizer)


def _named_base(path: pathlib.Path) -> pathlib.Path:
    """The base that adapters of peft name: a path, or else a name on the hub."""
    from llm_jax.checkpoints import peft

    name = peft.base_of(path)
    return locate(name if name.startswith(("asset:", "hf:")) or pathlib.Path(name).exists() else f"hf:{name}")


def _on_default_device(tree: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: device, tree)


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
