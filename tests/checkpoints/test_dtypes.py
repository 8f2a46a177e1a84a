"""The dtypes in which checkpoints of every form are loaded."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

import llm_jax
from llm_jax import checkpoints, trees, weights
from llm_jax.checkpoints import peft_config
from llm_jax.checkpoints.checkpoint import on_default_device
from llm_jax.errors import UserError
from tests.checkpoints.conftest import FORMS


def test_adapters_of_peft_over_a_run_keep_its_dtypes(paths, tmp_path):
    model, params, tokenizer = llm_jax.load(paths["huggingface"], dtype="bfloat16")
    llm_jax.save(model, params, tokenizer, tmp_path / "run")
    shutil.copytree(paths["peft"], tmp_path / "peft")
    path = tmp_path / "peft" / peft_config.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../run"}))
    model, params, _ = llm_jax.load(tmp_path / "peft")
    assert model.config.precision.params == model.config.precision.compute == "bfloat16"
    assert trees.flatten(params)["embed/table"].dtype == jnp.bfloat16
    assert llm_jax.load(paths["peft"]).model.config.precision.params == "float32"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_loaded_in_the_dtype_that_is_asked_for(paths, form):
    model, params, _ = llm_jax.load(paths[form], dtype="bfloat16")
    assert model.config.precision.params == model.config.precision.compute == "bfloat16"
    full = [w.base if isinstance(w, weights.Adapted) else w for w in trees.flatten(params).values()]
    assert {str(w.dtype) for w in full} == {"bfloat16"}
    expected = "expected one of float32, bfloat16, float16"
    with pytest.raises(UserError, match=rf"dtype='bf16'; {expected}; did you mean 'bfloat16'\?$"):
        llm_jax.load(paths[form], dtype="bf16")
    with pytest.raises(UserError, match=rf"dtype='float8'; {expected}"):
        llm_jax.open(paths[form]).load(dtype="float8")


def test_another_dtype_changes_full_weights_and_not_codes(paths, tmp_path):
    model, params, tokenizer = llm_jax.load(paths["run"])
    flat = trees.flatten(params)
    up, down = "layers/0/mlp/up", "layers/0/mlp/down"
    flat |= {up: weights.to_qtensor(flat[up], "int8", -2)}
    flat |= {down: weights.FakeQuant(flat[down], None, None, None, "int8", -2)}
    llm_jax.save(model, trees.unflatten(flat), tokenizer, tmp_path / "run")
    assert llm_jax.load(tmp_path / "run").model.config.precision.compute == "float32"
    loaded = llm_jax.load(tmp_path / "run", dtype=jnp.bfloat16)
    assert loaded.model.config.precision.compute == "bfloat16"
    cast = trees.flatten(loaded.params)
    assert str(cast[down].weight.dtype) == str(cast["embed/table"].dtype) == "bfloat16"
    assert trees.describe(weights.in_rows({"w": cast[up]})) == trees.describe({"w": flat[up]})


@pytest.mark.parametrize("form", ["run", "huggingface", "gguf"])
def test_parameters_come_in_the_dtype_of_the_configuration_and_in_its_geometry_only(paths, form):
    checkpoint = checkpoints.open_base(paths[form])
    precision = dataclasses.replace(checkpoint.config.precision, params="bfloat16")
    params = checkpoint.params(dataclasses.replace(checkpoint.config, precision=precision), on_default_device)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    wider = dataclasses.replace(checkpoint.config, mlp_dim=checkpoint.config.mlp_dim + 32)
    with pytest.raises(UserError, match=r"!layers/0/mlp/down is .*\[96, 64\], expected .*\[128, 64\]"):
        checkpoint.params(wider, on_default_device)
