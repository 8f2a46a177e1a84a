"""Names of weights, rules over names, and the layout of layers.

A parameter tree consists of nested dictionaries. Every value that is not a dictionary (an array, or a node of
`weights`) is a weight, and its path is its keys joined by "/".

The weights of scanned layers are stacked along a leading axis, which the path records:

    layers/17/attention/query              layer 17
    layers/0:24/5::6/attention/query       a stage of layers 0 to 23 in blocks of 6 kinds: the layers
                                           range(0, 24)[5::6] = 5, 11, 17, 23, stacked in that order

The paths alone determine the layout of a tree. Rules match per-layer names (`expand`), never names of stacked weights.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.errors import UserError
from llm_jax.schema import Rules

Tree = Mapping[str, Any]
T = TypeVar("T")
Stages = Sequence[tuple[int, int]]  # (kinds in a block, repeats of the block), in layer order

_STACKED = re.compile(r"(?P<head>(?:.*/)?)(?P<start>\d+):(?P<stop>\d+)/(?P<kind>\d+)::(?P<kinds>\d+)(?P<tail>/.*)?")
_SINGLE = re.compile(r"(?P<head>(?:.*/)?layers/)(?P<layer>\d+)(?P<tail>/.*)")


def register(cls: type[T]) -> type[T]:
    """Class decorator: registers a dataclass as a pytree; fields with the metadata {"static": True} are static.

    `jax.tree_util.register_dataclass` must not be used: up to jax 0.10 the structures of two of its classes with equal
    fields compare equal, and `jax.jit` then, whenever their hashes collide (about one pair in 128), runs the code
    compiled for one class on the other.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    data = tuple(field.name for field in fields if field.name not in static)
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in data)

    def flatten(x: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple([getattr(x, name) for name in data]), tuple([getattr(x, name) for name in static])

    def flatten_with_keys(x: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, values = flatten(x)
        return tuple(zip(keys, children, strict=True)), values

    def unflatten(values: tuple[Any, ...], children: Iterable[Any]) -> T:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(static, values, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {path: weight}, sorted by key at every level."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def map_weights(function: Callable[..., Any], tree: Tree, *rest: Tree) -> dict[str, Any]:
    """Maps `function(path, weight, *weights of the other trees)` over trees with the same paths."""
    flats = [flatten(t) for t in rest]
    return unflatten({p: function(p, w, *(f[p] for f in flats)) for p, w in flatten(tree).items()})


def layers_of(path: str) -> list[int] | None:
    """The indices of the layers stacked in the weight at `path`, or None if it has no leading layer axis."""
    stacked = _STACKED.fullmatch(path)
    if not stacked:
        return None
    return list(range(int(stacked["start"]), int(stacked["stop"])))[int(stacked["kind"]) :: int(stacked["kinds"])]


def expand(path: str) -> list[str]:
    """The per-layer names of a stacked weight, or [path] if it is not stacked."""
    stacked, layers = _STACKED.fullmatch(path), layers_of(path)
    if not stacked or layers is None:
        return [path]
    return [f"{stacked['head']}{layer}{stacked['tail'] or ''}" for layer in layers]


def match(rules: Rules, tree: Tree, source: str) -> dict[str, Any]:
    """{path: value of the first rule that matches the weight} for every weight.

    Args:
      rules: (regular expression, value) pairs; the expression must match the whole per-layer name.
      tree: the parameter tree; only its names matter.
      source: the config key or flag of the rules, for error messages.

    Raises:
      UserError: a rule matches no weight, a weight is matched by no rule, a regular expression is invalid, or layers
        stacked in one weight get different values.
    """
    patterns = [_compile(pattern, source) for pattern, _ in rules]
    used: set[int] = set()
    names: list[str] = []

    def value(name: str) -> Any:
        names.append(name)
        hits = [i for i, pattern in enumerate(patterns) if pattern.fullmatch(name)]
        used.update(hits)
        if not hits:
            raise UserError(f"{source}: no rule matches the parameter '{name}'; end the list with ('.*', VALUE)")
        return rules[hits[0]][1]

    matched: dict[str, Any] = {}
    for path in flatten(tree):
        first, *others = expand(path)
        matched[path] = value(first)
        for name in others:
            if value(name) != matched[path]:
                raise UserError(
                    f"{source}: '{first}' and '{name}' get different values but are stacked in one scan; "
                    "set model.scan_layers=False, or a model.layer_pattern that distinguishes them"
                )
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            closest = difflib.get_close_matches(pattern.replace(".*", ""), names, 1, 0.0) or ["(none)"]
            raise UserError(f"{source}: the rule '{pattern}' matches no parameter; the nearest name is '{closest[0]}'")
    return matched


def _compile(pattern: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{source}: the rule '{pattern}' is not a regular expression ({error})") from error


def unstack(tree: Tree) -> dict[str, Any]:
    """Parameters in any layout -> one entry per layer (`layers/17/...`)."""
    flat: dict[str, Any] = {}
    for path, weight in flatten(tree).items():
        if layers_of(path) is None:
            flat[path] = weight
        else:
            for i, name in enumerate(expand(path)):
                flat[name] = jax.tree.map(lambda leaf, i=i: leaf[i], weight)
    return unflatten(flat)


def stack_path(stages: Stages, layer: int) -> tuple[str, int]:
    """The keys of the stacked weights that hold a layer, such as "0:24/5::6", and its index on their leading axis.

    Raises:
      ValueError: `layer` is not below the number of layers of `stages`.
    """
    start = 0
    for kinds, repeats in stages:
        stop = start + kinds * repeats
        if layer < stop:
            repeat, kind = divmod(layer - start, kinds)
            return f"{start}:{stop}/{kind}::{kinds}", repeat
        start = stop
    raise ValueError(f"layer {layer} is not in the stages {stages}")


def restage(tree: Tree, stages: Stages = ()) -> dict[str, Any]:
    """Converts parameters to another layout. Works under `jax.jit` and `jax.eval_shape`.

    Args:
      tree: parameters in any layout.
      stages: the layout of the result; `()` gives one entry per layer.

    Raises:
      UserError: weights that would be stacked differ in kind, static fields, shape or dtype.
      ValueError: a layer of `stages` is missing.
    """
    flat = flatten(unstack(tree))
    if not stages:
        return unflatten(flat)
    stacks: dict[str, dict[int, Any]] = {}
    out: dict[str, Any] = {}
    for path, weight in flat.items():
        single = _SINGLE.fullmatch(path)
        if single:
            keys, index = stack_path(stages, int(single["layer"]))
            stacks.setdefault(f"{single['head']}{keys}{single['tail']}", {})[index] = weight
        else:
            out[path] = weight
    for path, parts in stacks.items():
        expected = len(layers_of(path) or ())
        if sorted(parts) != list(range(expected)):
            raise ValueError(f"cannot stack '{path}': {len(parts)} of its {expected} layers exist")
        if any(_record(part) != _record(parts[0]) for part in parts.values()):
            raise UserError(f"'{path}' has different kinds of weights in its layers; set model.scan_layers=False")
        out[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parts[i] for i in range(expected)))
    return unflatten(out)


def stackable(tree: Tree, stages: Stages) -> bool:
    """Whether `restage` accepts this layout: all weights to be stacked are of the same kind."""
    kinds: dict[str, Any] = {}
    for path, weight in flatten(jax.eval_shape(unstack, tree)).items():
        if stages and (single := _SINGLE.fullmatch(path)):
            stacked = single["head"] + stack_path(stages, int(single["layer"]))[0] + single["tail"]
            if kinds.setdefault(stacked, _record(weight)) != _record(weight):
                return False
    return True


def describe(tree: Tree) -> dict[str, Any]:
    """{path: record} for every weight, serializable as JSON.

    The record of an array is {"shape", "dtype"}. That of a node is {"node": name of the class, "static": {name:
    value}, "fields": {name: record}}, and that of named arrays in it {"parts": {name: record}}; `weights.abstract`
    converts it back to a node.
    """
    return {path: _record(weight) for path, weight in flatten(tree).items()}


def _record(weight: Any) -> dict[str, Any] | None:
    if weight is None:  # an unused field of a node
        return None
    if isinstance(weight, Mapping):  # a field of a node with named arrays
        return {"parts": {name: _record(part) for name, part in weight.items()}}
    if not dataclasses.is_dataclass(weight):
        return {"shape": list(weight.shape), "dtype": str(weight.dtype)}
    fields = {f.name: (getattr(weight, f.name), f.metadata.get("static", False)) for f in dataclasses.fields(weight)}
    return {
        "node": type(weight).__name__,
        "static": {name: value for name, (value, static) in fields.items() if static},
        "fields": {name: _record(value) for name, (value, static) in fields.items() if not static},
    }


def fingerprint(tree: Tree) -> str:
    """The sha256, in hexadecimal, of the per-layer names, dtypes, shapes and bits of all weights.

    It does not depend on whether layers are stacked. Pass quantized weights of a loaded model through `weights.in_rows`
    first: those that `weights.lay_out` has laid out in tiles have another shape.
    """
    digest = hashlib.sha256()
    flat = flatten(tree)
    named = sorted((name, path, i) for path in flat for i, name in enumerate(expand(path)))
    for name, path, i in named:
        stacked = layers_of(path) is not None
        for leaf in jax.tree.leaves(flat[path]):
            array = np.ascontiguousarray(_on_host(leaf[i] if stacked else leaf))
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
    """Returns the whole array, which may be sharded over processes; all processes must call this together."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return jax.device_get(leaf)


def check(actual: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Compares two results of `describe`: names, kinds, static fields, shapes and dtypes.

    Args:
      source: the file or directory of the weights that `actual` describes, for error messages.

    Raises:
      UserError: the two differ; lists missing (-), unexpected (+) and different (!) weights.
    """
    actual, expected = (json.loads(json.dumps(record)) for record in (actual, expected))
    faults = [f"-{p}" for p in expected if p not in actual] + [f"+{p}" for p in actual if p not in expected]
    faults += [
        f"!{p} is {_summary(actual[p])}, expected {_summary(expected[p])}"
        for p in expected
        if p in actual and actual[p] != expected[p]
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{source}: parameters do not fit the model: {'; '.join(faults[:8])}{more}")


def _summary(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "nothing"
    if "parts" in record:
        return f"({', '.join(f'{name}={_summary(part)}' for name, part in record['parts'].items())})"
    if "node" not in record:
        return f"{record.get('dtype', '')}{record['shape']}"
    parts = [f"{name}={value}" for name, value in record["static"].items()]
    parts += [f"{name}={_summary(field)}" for name, field in record["fields"].items()]
    return f"{record['node']}({', '.join(parts)})"
