"""Adapters of peft: their logits, out as they came in, and what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax import lora, trees
from llm_jax.checkpoints import peft
from llm_jax.errors import UserError
from tests.checkpoints import family_cases as cases
from tests.checkpoints.test_hf import GOLDEN as BASES
from tests.checkpoints.test_hf import read
from tests.lora.cases import config, made

pytestmark = pytest.mark.optimized

GOLDEN = json.loads(pathlib.Path(__file__).with_name("peft_golden.json").read_text())


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: (its directory, kind, model, parameters)}"""
    found = {}
    for family in {golden["family"] for golden in GOLDEN.values()}:
        path = tmp_path_factory.mktemp("bases") / family
        path.mkdir()
        (path / "config.json").write_text(json.dumps(BASES[family]["config"]))
        save_file(cases.tensors(family, BASES[family]["shapes"]), path / "model.safetensors")
        found[family] = (path, *read(path))
    return found


def written(directory: pathlib.Path, name: str, drop: str = "", **changes) -> pathlib.Path:
    directory.mkdir()
    said = {k: v for k, v in (GOLDEN[name]["config"] | changes).items() if k != drop}
    (directory / peft.CONFIG).write_text(json.dumps(said))
    save_file(cases.adapters(name, GOLDEN[name]["shapes"]), directory / peft.TENSORS)
    return directory


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_those_of_peft(bases, tmp_path, name):
    family = GOLDEN[name]["family"]
    _, kind, model, params = bases[family]
    adapters = peft.load(written(tmp_path / "a", name), kind, params, model.config.tie_embeddings)
    logits = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(cases.ids(family))))
    got = logits(lora.attach(params, adapters))
    np.testing.assert_allclose(got, GOLDEN[name]["logits"], atol=1e-5, rtol=1e-5)
    assert np.abs(got - logits(params)).max() > 1e-2


@pytest.mark.parametrize("name", [name for name in GOLDEN if GOLDEN[name]["family"] != "gpt2"])
def test_what_came_in_goes_out_again(bases, tmp_path, name):
    _, kind, model, params = bases[GOLDEN[name]["family"]]
    source = written(tmp_path / "in", name)
    adapters = peft.load(source, kind, params, model.config.tie_embeddings)
    stabilized = bool(GOLDEN[name]["config"]["use_rslora"])
    peft.save(tmp_path / "out", kind, adapters, params, model.config.tie_embeddings, rank_stabilized=stabilized)
    before, after = (load_file(path / peft.TENSORS) for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    again = peft.load(tmp_path / "out", kind, params, model.config.tie_embeddings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, adapters)


def test_padding_is_not_written_and_a_start_becomes_rank(bases, tiny, tmp_path):
    _, kind, model, params = bases["llama"]
    settings = config(tiny, rank=2, ranks=((r"layers/1/.*up", 5),))
    adapters = jax.jit(lambda p: lora.init(jax.random.key(0), p, settings))(params)
    peft.save(tmp_path / "out", kind, adapters, params, model.config.tie_embeddings)
    said = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert said["r"] == 2 and said["rank_pattern"] == {"model.layers.1.mlp.up_proj": 5}
    shapes = {k: v.shape for k, v in load_file(tmp_path / "out" / peft.TENSORS).items()}
    assert shapes["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"] == (5, 32)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] == (2, 32)
    pissa = made(params, config(tiny, rank=2, variant="pissa", targets=("attention",)))
    peft.save(tmp_path / "pissa", kind, pissa, params, model.config.tie_embeddings)
    again = peft.load(tmp_path / "pissa", kind, params, model.config.tie_embeddings)
    for path, w in trees.flatten(lora.merge(lora.rebase(params, pissa), pissa)).items():
        np.testing.assert_allclose(trees.flatten(lora.merge(params, again))[path], w, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "lora_alpha"}, "adapter_config.json: lora_alpha is None; expected a positive number"),
        ({"r": 3}, "has rank 4, but adapter_config.json says 3"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"rank_pattern": {"(a+)+": 2}}, "expected ends of modules' names and positive numbers"),
        ({"use_dora": True}, "has a, b; expected a, b, magnitude"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused_in_one_line(bases, tmp_path, changes, message):
    _, kind, model, params = bases["llama"]
    directory = written(tmp_path / "a", "plain", **changes)
    with pytest.raises(UserError, match=message) as error:
        peft.load(directory, kind, params, model.config.tie_embeddings)
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_directories_are_refused(bases, tmp_path):
    _, kind, _, params = bases["llama"]

    def said(directory, parameters=params, tied=False):
        with pytest.raises(UserError) as error:
            peft.load(directory, kind, parameters, tied)
        return str(error.value)

    directory = written(tmp_path / "cut", "plain")
    tensors = directory / peft.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-50])
    assert "not a whole safetensors file" in said(directory)
    tensors.unlink()
    (directory / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is pickled: it could run code" in said(directory)
    wide = trees.map_weights(lambda p, w: jnp.concatenate([w, w]) if p.endswith("mlp/down") else w, params)
    assert "another geometry" in said(written(tmp_path / "b", "plain"), wide)
    assert "the tied head does not use the adapter" in said(written(tmp_path / "c", "embeddings"), tied=True)
    shapes = GOLDEN["plain"]["shapes"] | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": [4, 32]}
    directory = written(tmp_path / "d", "plain")
    save_file(cases.adapters("plain", shapes), directory / peft.TENSORS)
    assert "layers.9.mlp.up_proj.lora_A.weight' belongs to no matrix of this llama" in said(directory)


@pytest.mark.parametrize(
    ("name", "end", "shape", "message"),
    [
        ("plain", "lora_A.weight", (4,), r"has a \(4,\) and b .*; expected matrices"),
        ("dora", "lora_magnitude_vector", (1,), "has 1 magnitudes for"),
    ],
)
def test_tensors_of_another_rank_or_too_few_lengths_are_refused(bases, tmp_path, name, end, shape, message):
    _, kind, model, params = bases[GOLDEN[name]["family"]]
    directory = written(tmp_path / "a", name)
    tensors = load_file(directory / peft.TENSORS)
    key = next(k for k in tensors if k.endswith(end))
    save_file(tensors | {key: np.ones(shape, np.float32)}, directory / peft.TENSORS)
    with pytest.raises(UserError, match=message):
        peft.load(directory, kind, params, model.config.tie_embeddings)
