"""Adapters over a base of every form: what `open` offers of the base, and the merged model that `convert` writes."""

import json
import shutil

import numpy as np
import pytest

import llm_jax
from llm_jax import checkpoints, trees
from llm_jax.checkpoints import generation_config, gguf_model, huggingface, peft_config, peft_export
from tests.checkpoints.gguf_cases import small
from tests.lora.cases import config as lora_config
from tests.lora.cases import made as make_adapters

GENERATION = {"temperature": 0.5, "top_k": 7, "do_sample": True}


@pytest.fixture(scope="module")
def directory(vocabulary, tiny, tmp_path_factory):
    """One model in every form that adapters can have as their base, and adapters of it."""
    root = tmp_path_factory.mktemp("bases")
    config, params = small("llama", vocabulary.vocab_size)
    generation = {"generation_config.json": json.dumps(GENERATION).encode()}
    huggingface.save(root / "huggingface", "llama", config, params, vocabulary.files() | generation)
    gguf_model.save(root / "gguf", config, params, vocabulary, "F32", generation_config.to_gguf(GENERATION)[0])
    loaded = llm_jax.load(root / "huggingface")
    llm_jax.save(loaded, root / "plain")
    run_config = checkpoints.read_config(root / "plain")
    writer = checkpoints.Writer(root / "run", run_config, loaded.tokenizer, "", generation=GENERATION)
    writer.save(1, loaded.params, {}, None)
    writer.close()
    adapters = make_adapters(loaded.params, lora_config(tiny, rank=2, targets=("attention",)))
    peft_export.save(root / "peft", "llama", config, adapters, loaded.params, base_name="../huggingface")
    return root


@pytest.mark.parametrize("form", ["huggingface", "gguf", "run"])
def test_adapters_have_the_sampling_options_of_their_base_and_are_merged(directory, tmp_path, command, form):
    adapters = tmp_path / "peft"
    shutil.copytree(directory / "peft", adapters)
    settings = json.loads((adapters / peft_config.CONFIG).read_text())
    settings["base_model_name_or_path"] = str(directory / form)
    (adapters / peft_config.CONFIG).write_text(json.dumps(settings))
    checkpoint = llm_jax.open(adapters)
    assert checkpoint.generation_config == GENERATION
    assert checkpoint.generation_config_path == llm_jax.open(directory / form).generation_config_path
    command("convert", f"--input={adapters}", f"--output={tmp_path / 'merged'}", "--to=hf")
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()).items() >= GENERATION.items()
    merged, base = (trees.flatten(llm_jax.load(path).params) for path in (tmp_path / "merged", directory / form))
    changed = [name for name in base if not np.allclose(merged[name], base[name], atol=1e-4)]
    assert changed and all("attention" in name for name in changed)
