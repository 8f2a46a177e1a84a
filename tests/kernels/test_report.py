"""The command `python -m llm_jax.kernels`."""

import re

import pytest

from llm_jax.kernels import cpu_product, machine_report, native

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.fixture
def without_measurements(monkeypatch):
    monkeypatch.setattr(machine_report, "_measure", lambda *arguments: None)


def test_every_scheme_has_a_choice_with_its_reason(command, without_measurements):
    lines = command("kernels").stdout.splitlines()
    assert any(line.startswith(("amx       not used: ", "amx       used for 16")) for line in lines)
    choices = dict(re.findall(r"^  (\w+) +(\w.*)$", "\n".join(lines), re.M))
    in_tiles = any(line.startswith("layout    tiles of 16 outputs") for line in lines)
    assert choices["int4"] == choices["nf4"] == f"kernel, 1 to {24 if in_tiles else 16} rows"
    assert lines[-1] == "self-test passed"
    assert choices["fp8_e4m3"] == "XLA: the format e4m3 has no kernel"
    assert choices["w8a8"].startswith(("kernel, any rows", "XLA: this CPU has"))
    assert choices["attention"] == "kernel, 1 to 16 queries over a cache"


def test_the_reason_why_the_library_of_the_wheel_is_not_used_is_printed(command, without_measurements, monkeypatch):
    library = native.loaded()[0]
    monkeypatch.setattr(native, "loaded", lambda: (library, "the library of the wheel cannot be used (x.so: no)"))
    lines = command("kernels").stdout.splitlines()
    assert lines[2] == "          compiled on this machine: the library of the wheel cannot be used (x.so: no)"


def test_a_wrong_kernel_is_named(command, without_measurements, monkeypatch):
    right = cpu_product.product
    monkeypatch.setattr(cpu_product, "product", lambda x, *weight: right(x, *weight) * (1 + 1e-3 * (x.sum() > -1e9)))
    done = command("kernels", code=1)
    assert done.stdout.splitlines()[-1].startswith("self-test failed: the relative error of int8 is ")


def test_a_wrong_kernel_of_rounded_activations_is_named(command, without_measurements, monkeypatch):
    right = cpu_product.blockwise_products
    monkeypatch.setattr(cpu_product, "blockwise_products", lambda *arguments: [right(*arguments)[0] * 1.001])
    done = command("kernels", code=1)
    assert done.stdout.splitlines()[-1].startswith("self-test failed: the relative error of int8+a8 is ")


def test_a_setting_of_xla_is_the_reason_for_all(command, monkeypatch):
    monkeypatch.setenv("LLM_JAX_KERNELS", "xla")
    assert command("kernels").stdout.splitlines()[1] == "kernels   none, XLA computes everything: the setting"
