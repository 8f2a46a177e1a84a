"""Quantized weights on a mesh: what is split over 8 devices gives the products and bits of one."""

from tests.parallel import on_mesh


def test_codes_and_scales_are_split_restored_and_multiplied_as_on_one_device(simulated, tmp_path):
    simulated(8)(on_mesh.check_quantized_weights, tmp_path / "arrays")
