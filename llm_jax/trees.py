"""Names of weights, rules over names, and the layout of layers.

A parameter tree is nested dictionaries; whatever is not a dictionary (an array, or a node of
`weights.py`) is one weight. The path of a weight is its keys joined by "/".

Layers that are scanned are stacked along a leading axis, and the path says so itself:

    layers/17/attention/query              layer 17, on its own
    layers/0:24/5::6/attention/query       a stage of layers 0 to 23 in blocks of 6 kinds: the layers
                                           range(0, 24)[5::6] = 5, 11, 17, 23, stacked in that order

So no record of the layout is kept beside the tree. Rules never see the second form: they match the
per-layer names that `expand` gives.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.errors import UserError
from llm_jax.schema import Rules

Tree = Mapping[str, Any]
Stages = Sequence[tuple[int, int]]  # (kinds in a block, repeats of the block), in layer order

_STACKED = re.compile(r"(?P<head>(?:.*/)?)(?P<start>\d+):(?P<stop>\d+)/(?P<kind>\d+)::(?P<kinds>\d+)(?P<tail>/.*)?")
_SINGLE = re.compile(r"(?P<head>(?:.*/)?layers/)(?P<layer>\d+)(?P<tail>/.*)")


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> {path: weight}, in sorted order of keys."""
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
    """`function(path, weight, *others)` on every weight of trees that have the same paths."""
    flats = [flatten(t) for t in rest]
    return unflatten({p: function(p, w, *(f[p] for f in flats)) for p, w in flatten(tree).items()})


def layers_of(path: str) -> list[int] | None:
    """The layers stacked in the weight at `path`, or None where it has no leading layer axis."""
    found = _STACKED.fullmatch(path)
    if not found:
        return None
    return list(range(int(found["start"]), int(found["stop"])))[int(found["kind"]) :: int(found["kinds"])]


def expand(path: str) -> list[str]:
    """The per-layer names of a weight: itself, unless it is stacked."""
    found, layers = _STACKED.fullmatch(path), layers_of(path)
    if not found or layers is None:
        return [path]
    return [f"{found['head']}{layer}{found['tail'] or ''}" for layer in layers]


def match(rules: Rules, tree: Tree, source: str) -> dict[str, Any]:
    """The value of the first rule whose pattern matches the whole name, for every weight: {path: value}.

    Args:
      rules: (regular expression, value) pairs; the expression must match the whole per-layer name.
      tree: the parameter tree; only its names matter.
      source: where the rules stand (a config key), for the error.

    Raises:
      UserError: a rule matches no name, a name is matched by no rule, or the layers stacked in one
        weight would get different values.
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
                    "set model.scan_layers=False or a layer pattern that tells them apart"
                )
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            near = difflib.get_close_matches(pattern.replace(".*", ""), names, 1, 0.0) or ["(none)"]
            raise UserError(f"{source}: the rule '{pattern}' matches no parameter; a near name is '{near[0]}'")
    return matched


def _compile(pattern: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{source}: the rule '{pattern}' is no regular expression ({error})") from error


def unstack(tree: Tree) -> dict[str, Any]:
    """Any layout -> one entry per layer (`layers/17/...`)."""
    flat: dict[str, Any] = {}
    for path, weight in flatten(tree).items():
        if layers_of(path) is None:
            flat[path] = weight
        else:
            for i, name in enumerate(expand(path)):
                flat[name] = jax.tree.map(lambda leaf, i=i: leaf[i], weight)
    return unflatten(flat)


def stack_path(stages: Stages, layer: int) -> tuple[str, int]:
    """Where layer `layer` lives under `stages`: the two keys ("0:24/5::6") and its index there."""
    start = 0
    for kinds, repeats in stages:
        stop = start + kinds * repeats
        if layer < stop:
            repeat, kind = divmod(layer - start, kinds)
            return f"{start}:{stop}/{kind}::{kinds}", repeat
        start = stop
    raise ValueError(f"layer {layer} lies past the last stage of {stages}")


def restage(tree: Tree, stages: Stages = ()) -> dict[str, Any]:
    """The same weights in another layout. Pure; works under `jax.jit` and `jax.eval_shape`.

    Args:
      tree: parameters in any layout (the paths tell which).
      stages: the layout wanted; `()` gives one entry per layer.

    Raises:
      UserError: layers to be stacked hold weights of different kinds.
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
            raise ValueError(f"cannot stack '{path}': {len(parts)} of its {expected} layers are here")
        if any(_record(part) != _record(parts[0]) for part in parts.values()):
            raise UserError(f"'{path}' is of different kinds in its layers; set model.scan_layers=False")
        out[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parts[i] for i in range(expected)))
    return unflatten(out)


def stackable(tree: Tree, stages: Stages) -> bool:
    """Whether `restage` can bring the weights into this layout: those of stacked layers are of one kind."""
    kinds: dict[str, Any] = {}
    for path, weight in flatten(jax.eval_shape(unstack, tree)).items():
        if stages and (single := _SINGLE.fullmatch(path)):
            place = single["head"] + stack_path(stages, int(single["layer"]))[0] + single["tail"]
            if kinds.setdefault(place, _record(weight)) != _record(weight):
                return False
    return True


def describe(tree: Tree) -> dict[str, Any]:
    """A JSON-able record of every weight: {path: record}.

    An array's record is {"shape", "dtype"}; that of a node is {"node": its class, "static": {name:
    value}, "fields": {name: record}}, from which `weights.abstract` makes it again.
    """
    return {path: _record(weight) for path, weight in flatten(tree).items()}


def _record(weight: Any) -> dict[str, Any] | None:
    if weight is None:  # a field that a node does without
        return None
    if not dataclasses.is_dataclass(weight):
        return {"shape": list(weight.shape), "dtype": str(weight.dtype)}
    fields = {f.name: (getattr(weight, f.name), f.metadata.get("static", False)) for f in dataclasses.fields(weight)}
    return {
        "node": type(weight).__name__,
        "static": {name: value for name, (value, static) in fields.items() if static},
        "fields": {name: _record(value) for name, (value, static) in fields.items() if not static},
    }


def fingerprint(tree: Tree) -> str:
    """The sha256 of all weights: per-layer names, shapes, dtypes and bits, whatever the layout."""
    digest = hashlib.sha256()
    flat = flatten(tree)
    named = sorted((name, path, i) for path in flat for i, name in enumerate(expand(path)))
    for name, path, i in named:
        stacked = layers_of(path) is not None
        for leaf in jax.tree.leaves(flat[path]):
            array = np.ascontiguousarray(jax.device_get(leaf[i] if stacked else leaf))
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check(have: Mapping[str, Any], want: Mapping[str, Any], source: str) -> None:
    """Raises unless two records of `describe` agree in names, kinds, static fields, shapes and dtypes.

    Args:
      source: the file or directory that `have` came from, for the error.

    Raises:
      UserError: one line with what lacks (-), what is left over (+) and what differs (!).
    """
    have, want = (json.loads(json.dumps(record)) for record in (have, want))
    faults = [f"-{p}" for p in want if p not in have] + [f"+{p}" for p in have if p not in want]
    faults += [f"!{p} is {_say(have[p])}, expected {_say(want[p])}" for p in want if p in have and have[p] != want[p]]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(f"{source}: parameters do not fit the model: {'; '.join(faults[:8])}{more}")


def _say(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "nothing"
    if "node" not in record:
        return f"{record.get('dtype', '')}{record['shape']}"
    parts = [f"{name}={value}" for name, value in record["static"].items()]
    parts += [f"{name}={_say(field)}" for name, field in record["fields"].items()]
    return f"{record['node']}({', '.join(parts)})"
