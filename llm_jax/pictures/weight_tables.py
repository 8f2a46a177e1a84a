"""The weights of a model as a table: names, kinds, shapes, dtypes, sizes and shardings."""

import dataclasses
import re
from typing import Any

import jax

from llm_jax import trees, weights
from llm_jax.pictures.drawable import Drawable
from llm_jax.pictures.panels import Picture, Table


@dataclasses.dataclass(frozen=True)
class WeightTable(Drawable):
    """A row for each weight, those of equal layers in one row.

    Attributes:
      rows: (name, how many layers, kind and shape, bytes of all of them, how the first array is sharded).
      num_parameters: numbers of the dense weights that they represent.
      num_bytes: bytes that they occupy.
    """

    rows: tuple[tuple[str, int, str, int, str], ...]
    num_parameters: int
    num_bytes: int

    def picture(self) -> Picture:
        columns = ("weight", "layers", "kind", "bytes", "sharding")
        title = f"{self.num_parameters:,} parameters in {self.num_bytes:,} bytes"
        return Picture("Weights", (Table(title, columns, self.rows),))


def parameters(params: Any) -> WeightTable:
    """The weights of a parameter tree, in any layout and of any kind, on any devices."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    numbers = 0
    for path, weight in trees.flatten(params).items():
        numbers += _size(weight)
        names = trees.expand(path)
        name = re.sub(r"(^|/)layers/\d+/", r"\1layers/*/", names[0])
        key = (name, weights.summary(weight), _sharding(weight))
        entry = groups.setdefault(key, [0, 0])
        entry[0] += len(names)
        entry[1] += weights.num_bytes(weight)
    rows = tuple((name, count, kind, size, sharding) for (name, kind, sharding), (count, size) in groups.items())
    return WeightTable(rows, numbers, sum(row[3] for row in rows))


def _size(weight: Any) -> int:
    size = 1
    for axis in weight.shape:
        size *= axis
    return size


def _sharding(weight: Any) -> str:
    """How the first array of a weight is divided among devices."""
    sharding = getattr(next(iter(jax.tree.leaves(weight)), None), "sharding", None)
    if sharding is None:
        return ""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return f"{sharding.spec} of {len(sharding.device_set)} devices"
    return f"{len(sharding.device_set)} device{'s' * (len(sharding.device_set) > 1)}"
