"""Devices of several slices of a TPU: the axis "data" spans the slices, all others stay within one."""

import dataclasses

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Device:
    """What the arrangement of devices reads of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


TWO_SLICES = [Device(4 * s + 2 * y + x, s, (x, y, 0)) for s in range(2) for y in range(2) for x in range(2)]


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (4, 2, 1, 1), (2, 2, 1, 2)])
def test_the_first_axis_spans_the_slices(shape):
    devices = mesh_lib.device_array(shape, TWO_SLICES)
    slices = np.vectorize(lambda device: device.slice_index)(devices).reshape(2, -1)
    assert devices.shape == shape and sorted(d.id for d in devices.flat) == list(range(8))
    assert slices.tolist() == [[0] * 4, [1] * 4]


def test_other_axes_cannot_span_slices():
    with pytest.raises(UserError, match=r"mesh.data=1 cannot span 2 slices; expected a multiple of 2"):
        mesh_lib.device_array((1, 8, 1, 1), TWO_SLICES)
