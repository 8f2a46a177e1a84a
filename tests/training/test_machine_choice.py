"""The values that `model.scan_layers=auto` and `model.precision.compute=auto` resolve to; resumed runs keep them."""

import dataclasses
import importlib
import json

import pytest

from llm_jax import cli, configuration, runtime
from llm_jax.errors import UserError
from llm_jax.training import machine_choice, setup, start

AUTO = {"model.scan_layers": "auto", "model.precision.compute": "auto"}


def chosen(platform, instructions, **changes):
    model = configuration.load("tiny", AUTO | {f"model.{key}": value for key, value in changes.items()}).model
    model, lines = machine_choice.resolve(model, platform, instructions)
    return model.scan_layers, model.precision.compute, " ".join(lines)


def test_choice_by_machine():
    assert chosen("cpu", {"avx2", "amx_bf16"})[:2] == (False, "bfloat16")
    assert chosen("cpu", {"avx2", "avx512_bf16"})[:2] == (False, "bfloat16")
    assert chosen("cpu", {"avx2", "avx512f", "avx512_vnni"})[:2] == (False, "float32")
    assert chosen("cpu", {"amx_bf16"}, num_layers=65)[:2] == (True, "bfloat16")
    assert chosen("gpu", {"avx2"})[:2] == chosen("tpu", ())[:2] == (True, "bfloat16")
    assert "bfloat16, because this CPU has AMX for bfloat16" in chosen("cpu", {"amx_bf16"})[2]
    assert "65 unrolled layers would compile for too long" in chosen("cpu", (), num_layers=65)[2]


def test_options_that_are_set_are_kept():
    model = configuration.load("tiny", {"model.scan_layers": True, "model.precision.compute": "float16"}).model
    assert machine_choice.resolve(model, "cpu", {"amx_bf16"}) == (model, [])
    auto = configuration.load("tiny", {"model.precision.compute": "auto"}).model
    assert machine_choice.resolve(auto, "cpu", {"amx_bf16"})[0].scan_layers is auto.scan_layers


def test_setup_replaces_auto_and_names_the_reasons(monkeypatch):
    monkeypatch.setattr(runtime, "cpu_instructions", lambda: frozenset({"avx512_bf16"}))
    parts = setup.setup(configuration.load("tiny", AUTO | {"model.vocab_size": 64}))
    assert (parts.config.model.scan_layers, parts.config.model.precision.compute) == (False, "bfloat16")
    assert parts.model.config == parts.config.model
    text = setup.describe(parts)
    assert "model.precision.compute=auto: bfloat16, because this CPU has AVX512-BF16 for bfloat16" in text
    assert "model.scan_layers=auto: False, because unrolled layers are faster on a CPU" in text


def test_a_run_that_could_be_faster_is_told_so():
    config = configuration.load("tiny")
    assert machine_choice.advice(config, "cpu", {"amx_bf16"}).endswith("train faster on this machine, in bfloat16")
    assert machine_choice.advice(config, "cpu", {"avx2"}) == ""
    for key, value in (("model.scan_layers", True), ("model.precision.compute", "float32")):
        assert machine_choice.advice(configuration.load("tiny", {key: value}), "cpu", {"amx_bf16"}) == ""
    assert machine_choice.advice(configuration.load("tiny", AUTO), "cpu", {"amx_bf16"}) == ""


def test_a_resumed_run_keeps_what_auto_stood_for(tmp_path):
    config = configuration.load("tiny", AUTO)
    run = configuration.replace(config, {"model.scan_layers": False, "model.precision.compute": "bfloat16"})
    (tmp_path / "config.json").write_text(json.dumps(configuration.as_dict(run)))
    model = start.find(config, tmp_path).config.model
    assert (model.scan_layers, model.precision.compute) == (False, "bfloat16")


def test_values_of_the_option():
    assert configuration.load("tiny", {"model.scan_layers": "False"}).model.scan_layers is False
    with pytest.raises(UserError, match="'model.scan_layers' is 'perhaps'; expected bool | 'auto'"):
        configuration.load("tiny", {"model.scan_layers": "perhaps"})
    with pytest.raises(UserError, match="'model.scan_layers' is 1"):
        configuration.load("tiny", {"model.scan_layers": 1})


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("no", False), ("True", True)])
def test_override_on_the_command_line(text, value):
    command = importlib.import_module("llm_jax.train").COMMAND
    values = cli.parse(command, ["--workdir=x", "--config=tiny", f"--config.model.scan_layers={text}"])
    assert values.config.model == dataclasses.replace(configuration.load("tiny").model, scan_layers=value)
