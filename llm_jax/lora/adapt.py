"""Initializes adapters (`init`), splits them into trainable and fixed entries, and attaches them to a base.

Variants, and their entries at an adapted path besides `a`, `b` and `scale`:

    lora    a is Gaussian, b is zero: step 0 equals the base bit for bit (Hu et al. 2021, arXiv:2106.09685); within 1e-6
            under `jit` with `model.qk_norm`, because XLA then sums the norms of keys in another order
    fa      like lora, with a frozen a, so that the backward pass saves only x a (LoRA-FA: Zhang et al. 2023,
            arXiv:2308.03303)
    dora    DoRA: magnitude (O,), trained, and squares (O,); see `weights.Decomposed`
    pissa   a b is initialized with the leading singular vectors of the weight; `subtract_start` subtracts this product
            from the base. start_a and start_b: the initial a and b (Meng et al. 2024, arXiv:2404.02948)
    loftq   a b is initialized with the leading singular vectors of the quantization error of the weight (Li et al.
            2023, arXiv:2310.08659, algorithm 1 with one iteration, which does not change the quantized base)

Ranks may differ by layer. In a scan, all factors have the largest rank; the columns of `a` and rows of `b` beyond the
rank of a layer are zero, and so are their gradients.
"""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax import trees, weights
from llm_jax.errors import UserError
from llm_jax.kernels import number_formats
from llm_jax.schema import LoraConfig
from llm_jax.weights import IN, Adapted, Decomposed, FakeQuant, InputDropout

# Letters of shapes: L layers (where stacked), I in, O out, R rank.

_ATTENTION = r"layers/\d+/attention/(query|key|value|out)"
_EMBEDDINGS = r"embed/table"
PRESETS = {
    "attention": _ATTENTION,
    "linear": rf"{_ATTENTION}|layers/\d+/mlp/(gate|up|down)",
    "embeddings": _EMBEDDINGS,
}
# {module name in peft's target_modules: weights in llm_jax}.
_OTHER_NAMES = {
    "all-linear": "linear",
    "q_proj": "layers/.*/query",
    "k_proj": "layers/.*/key",
    "v_proj": "layers/.*/value",
    "o_proj": "layers/.*/attention/out",
    "gate_proj": "layers/.*/gate",
    "up_proj": "layers/.*/up",
    "down_proj": "layers/.*/down",
    "embed_tokens": "embeddings",
    "lm_head": "head/kernel",
    "q": "layers/.*/query",
    "k": "layers/.*/key",
    "v": "layers/.*/value",
    "mlp": "layers/.*/mlp/(gate|up|down)",
    "all": "linear",
}
TRAINED = {
    "lora": ("a", "b"),
    "fa": ("b",),
    "dora": ("a", "b", "magnitude"),
    "pissa": ("a", "b"),
    "loftq": ("a", "b"),
}


def ranks(base: trees.Tree, config: LoraConfig) -> dict[str, dict[str, int]]:
    """The adapted weights as {path: {per-layer name: rank}}; rank 0 for layers of a stacked weight without an adapter.

    Raises:
      UserError: a target or rank rule matches nothing, targets overlap, a target is not a matrix, or a rank is 0 or
        larger than the matrix.
    """
    if not config.targets:
        raise UserError("lora.targets is empty; expected presets (attention, linear, embeddings) or patterns")
    rules = [(target, _compile(PRESETS.get(target, target), "lora.targets")) for target in config.targets]
    by_rank = [(pattern, _compile(pattern, "lora.ranks"), rank) for pattern, rank in config.ranks]
    used: set[str] = set()
    ranks_by_path: dict[str, dict[str, int]] = {}
    for path, weight in trees.flatten(base).items():
        layer_ranks = {}
        for name in trees.expand(path):
            hits = [target for target, rule in rules if rule.fullmatch(name)]
            if len(hits) > 1:
                raise UserError(f"lora.targets: '{hits[0]}' and '{hits[1]}' overlap; both match '{name}'")
            used.update(hits)
            shape = weight.shape[trees.layers_of(path) is not None :]
            layer_ranks[name] = _rank(name, shape, hits[0], by_rank, config.rank, used) if hits else 0
        ranks_by_path[path] = layer_ranks
    for source, patterns in (("lora.targets", config.targets), ("lora.ranks", [p for p, _ in config.ranks])):
        if unused := [pattern for pattern in patterns if pattern not in used]:
            other = _other_pattern(unused[0], source, ranks_by_path)
            cure = f"; did you mean '{other}'?" if other else f"; {_weight_names(base)}"
            if "," in unused[0]:
                parts = [part.strip() for part in unused[0].split(",")]
                suggestion = tuple(_other_pattern(p, source, ranks_by_path) or p for p in parts)
                cure = f"; several patterns are written as {suggestion}"
            raise UserError(f"{source}: '{unused[0]}' matches no {'weight' if 'targets' in source else 'target'}{cure}")
    # A weight is adapted in all layers or in none, so that every layout can be converted to every other.
    adapted = {_template(name) for layer_ranks in ranks_by_path.values() for name, rank in layer_ranks.items() if rank}
    return {
        path: layer_ranks
        for path, layer_ranks in ranks_by_path.items()
        if any(_template(name) in adapted for name in layer_ranks)
    }


def _other_pattern(pattern: str, source: str, paths: Iterable[str]) -> str | None:
    """The pattern to suggest for the last part of a weight's name or for a name of peft; None if unknown.

    Args:
      source: "lora.targets" or "lora.ranks".
      paths: the paths of all weights.
    """
    last = re.split(r"[.*\\/$]+", pattern.rstrip("$"))[-1]
    if any(name.endswith(f"/{last}") for path in paths for name in trees.expand(path)):
        return f"layers/.*/{last}"  # a pattern matches the whole name of a weight
    return _OTHER_NAMES.get(last) if source == "lora.targets" else None


def _weight_names(base: trees.Tree) -> str:
    """The sentence of an error that lists the matrices of a model, with N for the number of a layer."""
    matrices = {
        _template(name).replace("layers/*/", "layers/N/")
        for path, weight in trees.flatten(base).items()
        for name in trees.expand(path)
        if len(weight.shape) - (trees.layers_of(path) is not None) >= 2
    }
    return f"the matrices of the model are {', '.join(sorted(matrices))}, and a pattern matches the whole name"


def _rank(name: str, shape: tuple[int, ...], target: str, rules: Any, default: int, used: set[str]) -> int:
    if len(shape) < 2:
        raise UserError(f"lora.targets: '{target}' matches '{name}' of shape {shape}; only matrices are adapted")
    hits = [(pattern, rank) for pattern, rule, rank in rules if rule.fullmatch(name)]
    used.update(pattern for pattern, _ in hits[:1])
    key, rank = (f"lora.ranks: '{hits[0][0]}'", hits[0][1]) if hits else ("lora.rank", default)
    rows, columns = _matrix(shape)
    if type(rank) is not int or not 1 <= rank <= min(rows, columns):
        raise UserError(f"{key} is {rank!r} for '{name}' of shape {shape}; expected 1 to {min(rows, columns)}")
    return rank


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """(I, O) of a kernel of any rank: the last axis is the output, all others are inputs."""
    return int(np.prod(shape[:-1])), shape[-1]


def _compile(pattern: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{source}: '{pattern}' is not a regular expression ({error})") from error


def init(key: jax.Array, base: trees.Tree, config: LoraConfig, original: trees.Tree | None = None) -> dict[str, Any]:
    """Initializes adapters. Works under `jax.jit`.

    The values of a layer depend on the key and the name of its weight, not on how layers are stacked.

    Args:
      base: the frozen weights (I, O), in any layout and of any kind.
      original: for "loftq", the weights that `base` was quantized from.

    Returns:
      A tree with, at the path of every adapted weight, `a` (I, R), `b` (R, O), `scale` () and the entries of the
      variant, each with the layer axis of the weight, in float32 or the dtype of the base where it is wider.

    Raises:
      UserError: see `ranks`; or "loftq" without `original`.
    """
    if config.variant == "loftq" and original is None:
        raise UserError("lora.variant=loftq starts from the quantization error; set quant.scheme")
    flat, originals = trees.flatten(base), trees.flatten(base if original is None else original)
    ranks_by_path = ranks(base, config)
    without_rank = [name for layer_ranks in ranks_by_path.values() for name, rank in layer_ranks.items() if not rank]
    if config.variant == "dora" and without_rank:  # the magnitude would be trained even so
        raise UserError(
            f"lora.targets: '{without_rank[0]}' is not matched; lora.variant=dora adapts a weight in all layers or none"
        )
    if config.factors:
        _check_factors(config.factors, flat, ranks_by_path)
    max_ranks: dict[str, int] = {}
    for layer_ranks in ranks_by_path.values():
        for name, rank in layer_ranks.items():
            max_ranks[_template(name)] = max(rank, max_ranks.get(_template(name), 0))
    adapters: dict[str, Any] = {}
    for path, layer_ranks in ranks_by_path.items():
        starts = []
        for i, (name, rank) in enumerate(layer_ranks.items()):
            pair = flat[path], originals[path]
            weight, unquantized = pair if trees.layers_of(path) is None else (_layer(w, i) for w in pair)
            max_rank = max_ranks[_template(name)]
            starts.append(_start(_key(key, name), name, weight, unquantized, rank, max_rank, config))
        parts = starts[0] if trees.layers_of(path) is None else jax.tree.map(lambda *x: jnp.stack(x), *starts)
        adapters |= {f"{path}/{part}": leaf for part, leaf in parts.items()}
    return trees.unflatten(adapters)


def _check_factors(name: str, flat: Mapping[str, Any], ranks_by_path: Mapping[str, Mapping[str, int]]) -> None:
    s = number_formats.scheme(name)
    if s.activations:
        raise UserError(f"lora.factors={name}: it also quantizes activations; expected a scheme for weights only")
    for path, layer_ranks in ranks_by_path.items():
        rows, _ = _matrix(flat[path].shape[trees.layers_of(path) is not None :])
        for size in (rows, max(layer_ranks.values())):
            if reason := number_formats.unsupported_reason(s, size):
                raise UserError(f"lora.factors={name} for the adapter of '{path}': {reason}")
        if s.custom:
            rank, (rows, columns) = max(layer_ranks.values()), _matrix(flat[path].shape[-2:])
            for shape in ((rows, rank), (rank, columns)):
                s.custom.check(shape, IN)


def _layer(weight: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], weight)


def _template(name: str) -> str:
    return re.sub(r"(^|/)layers/\d+/", r"\1layers/*/", name)


def _key(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, _hash(name))


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def _start(key: Any, name: str, base: Any, original: Any, rank: int, width: int, config: LoraConfig) -> dict[str, Any]:
    """The initial entries of the adapter of one layer's weight; `width` is the rank of the arrays, padding included."""
    rows, columns = _matrix(base.shape)
    dtype = jnp.promote_types(jnp.float32, _dtype(base))
    within_rank = jnp.arange(width) < rank
    scale = config.alpha / max(rank, 1) ** (0.5 if config.rank_stabilized else 1.0)
    parts = {"scale": jnp.asarray(scale, dtype)}
    if config.variant in ("pissa", "loftq"):
        original_weight = weights.dense(original).reshape(rows, columns).astype(dtype)
        if config.variant == "loftq":
            original_weight -= weights.dense(base).reshape(rows, columns).astype(dtype)
        a, b = _leading(original_weight / scale, width)
        parts |= {"a": a * within_rank, "b": b * within_rank[:, None]}
        if config.variant == "pissa":
            parts |= {"start_a": parts["a"], "start_b": parts["b"]}
        return parts
    # With this variance, x a is about as large as x. The input of a table is one-hot and has one nonzero entry.
    entries = 1 if re.fullmatch(_EMBEDDINGS, name) else rows
    a = jax.random.normal(key, (rows, width), dtype) * (within_rank / entries**0.5).astype(dtype)
    parts |= {"a": a, "b": jnp.zeros((width, columns), dtype)}
    if config.variant == "dora":
        squares = jnp.sum(weights.dense(base).reshape(rows, columns).astype(dtype) ** 2, 0)
        parts |= {"squares": squares, "magnitude": jnp.sqrt(squares)}
    return parts


def _leading(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """a (I, R), b (R, O): U sqrt(S), sqrt(S) V of the largest singular values."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _dtype(weight: Any) -> Any:
    return jax.eval_shape(weights.dense, weight).dtype


def split(adapters: trees.Tree, variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits an adapter tree into (trainable entries, fixed entries); `join` is the inverse."""
    trained: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for path, leaf in trees.flatten(adapters).items():
        (trained if path.rsplit("/", 1)[1] in TRAINED[variant] else fixed)[path] = leaf
    return trees.unflatten(trained), trees.unflatten(fixed)


def join(trained: trees.Tree, fixed: trees.Tree) -> dict[str, Any]:
    """The adapter tree from its trainable and fixed entries."""
    return trees.unflatten(trees.flatten(trained) | trees.flatten(fixed))


def by_path(adapters: trees.Tree) -> dict[str, dict[str, Any]]:
    """The entries of every adapted weight: {path of the weight: {name: array}}."""
    entries: dict[str, dict[str, Any]] = {}
    for path, leaf in trees.flatten(adapters).items():
        weight, name = path.rsplit("/", 1)
        entries.setdefault(weight, {})[name] = leaf
    return entries


def check(base: trees.Tree, adapters: trees.Tree, source: str) -> None:
    """Checks that the adapters fit the base.

    Args:
      source: name of the adapters for the error message.

    Raises:
      UserError: the base lacks an adapted path, an entry is missing, or the shapes of a and b do not fit.
    """
    flat = trees.flatten(base)
    for path, parts in by_path(adapters).items():
        if path not in flat:
            raise UserError(f"{source}: adapts '{path}', which the base lacks; the adapters are for another model")
        if not {"a", "b", "scale"} <= parts.keys():
            raise UserError(f"{source}: '{path}' needs a, b and scale; it has {', '.join(sorted(parts))}")
        stacked = trees.layers_of(path) is not None
        lead, (rows, columns) = flat[path].shape[:stacked], _matrix(flat[path].shape[stacked:])
        a, b = parts["a"].shape, parts["b"].shape
        if a != (*lead, rows, a[-1]) or b != (*lead, a[-1], columns):
            raise UserError(
                f"{source}: a {a} and b {b} do not fit '{path}' of shape {flat[path].shape}; the adapters are for "
                "another model"
            )


def subtract_start(base: trees.Tree, adapters: trees.Tree) -> dict[str, Any]:
    """The base minus the initial a b of its adapters (PiSSA), before quantization; other bases are unchanged.

    Raises:
      UserError: an adapted weight is quantized, so that the initial product cannot be subtracted from it.
    """
    flat = trees.flatten(base)
    for path, parts in by_path(adapters).items():
        if "start_a" in parts:
            if not weights.is_dense(flat[path]):
                raise UserError(
                    f"'{path}' is a {weights.kind(flat[path])}; lora.variant=pissa subtracts its initial value from "
                    "dense weights"
                )
            start = jnp.matmul(parts["start_a"] * _per_layer(parts["scale"], 2), parts["start_b"])
            flat[path] = (flat[path] - start.reshape(flat[path].shape)).astype(flat[path].dtype)
    return trees.unflatten(flat)


def _per_layer(scale: jax.Array, rank: int) -> jax.Array:
    """Reshapes a scale () or (L,) to broadcast with arrays that have `rank` more axes."""
    return scale.reshape(*scale.shape, *(1,) * rank)


def attach(
    base: trees.Tree,
    adapters: trees.Tree,
    *,
    factors: str = "",
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """The parameters of the adapted model: `base` with an `Adapted` or `Decomposed` node at every adapted path.

    Args:
      base: weights (I, O) of any kind, as `subtract_start` returns them.
      adapters: see `init`.
      factors: scheme that a and b are fake-quantized to; "": none.
      dropout: dropout probability of the inputs of the low-rank path. The mask depends on `key` and the per-layer name
        of the weight (`layers/17/attention/query`), not on how layers are stacked.
      key: random key of the dropout; None: no dropout.

    Raises:
      UserError: the adapters are for another model, or an adapted weight is not a matrix.
    """
    check(base, adapters, "adapters")
    flat = trees.flatten(base)
    for path, parts in by_path(adapters).items():
        stacked = trees.layers_of(path)
        if len(flat[path].shape) - (stacked is not None) != 2:
            raise UserError(f"'{path}' of shape {flat[path].shape} is not a matrix; use lora.materialize")
        keys = None
        if dropout and key is not None:
            name_hashes = np.array([_hash(name) for name in trees.expand(path)], np.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, name_hashes)
            keys = keys[0] if stacked is None else keys
        flat[path] = node(flat[path], parts, factors, dropout, keys)
    return trees.unflatten(flat)


def node(base: Any, parts: Mapping[str, Any], factors: str, dropout: float = 0.0, key: Any = None) -> Any:
    """The adapted weight (I, O) of a base weight and the entries of its adapter."""
    a, b = parts["a"], parts["b"]
    if factors:
        a, b = (FakeQuant(factor, None, None, None, factors, IN) for factor in (a, b))
    if key is not None:
        a = InputDropout(a, key, dropout)
    adapted = Adapted(base, a, b, parts["scale"])
    return Decomposed(adapted, parts["magnitude"], parts["squares"]) if "magnitude" in parts else adapted
