"""transformers, peft and the gguf package load exported checkpoints (requirements-peers.txt). Run by .ci/full."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_jax import checkpoints
from llm_jax.checkpoints import gguf_model
from llm_jax.checkpoints.checkpoint import on_default_device
from llm_jax.model.transformer import Transformer
from tests.checkpoints import family_cases as cases
from tests.checkpoints.gguf_cases import small
from tests.checkpoints.test_hf import GOLDEN, read
from tests.checkpoints.test_hf import directory as directory

pytestmark = pytest.mark.live


def test_transformers_loads_what_we_write_and_gives_our_logits(directory, tmp_path):
    import torch
    import transformers

    from llm_jax.checkpoints import huggingface

    kind, model, params = read(directory)
    draw = lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape)  # noqa: E731
    params = jax.tree.map(draw, params)  # not what came from transformers
    huggingface.save(tmp_path / "out", kind, model.config, params, {})
    load = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    theirs, report = load.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = cases.ids(directory.name)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(ids))[0].numpy()
    method = "features" if kind == "bert" else "__call__"
    got = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(ids), method=method))(params)
    np.testing.assert_allclose(got[0] if kind == "bert" else got, expected, atol=2e-5, rtol=1e-5)


def test_configs_say_the_same_to_transformers(directory, tmp_path):
    import transformers

    from llm_jax.checkpoints import huggingface

    kind, model, params = read(directory)
    huggingface.save(tmp_path / "out", kind, model.config, params, {})
    written = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    given = transformers.AutoConfig.for_model(**GOLDEN[directory.name]["config"]).to_dict()
    free = ("architectures", "dtype", "transformers_version", "use_cache", "_name_or_path", "_attn_implementation")
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "max_window_layers")
    # One YaRN is spelled by its factor instead of mscale, and one GELU by its other name.
    special += {"llama-mlp-bias": ("rope_parameters",), "gpt_neox": ("hidden_act",)}.get(directory.name, ())
    differ = {k: (given.get(k), written.get(k)) for k in given if given.get(k) != written.get(k)}
    assert not {k: v for k, v in differ.items() if k not in (*free, *special)}, json.dumps(differ, default=str)


# It reads no head width, which qwen3 needs, no scale of scores, which Gemma needs, no width of GPT-2's MLP, and no
# phi2: test_llama_cpp.py has them all.
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_transformers_reads_our_gguf_files_as_we_do(vocabulary, tmp_path, arch, kind):
    import torch
    import transformers

    config, params = small(
        arch, vocabulary.vocab_size, **{"llama": {"head_dim": 16}, "gpt2": {"mlp_dim": 256}}.get(arch, {})
    )
    gguf_model.save(tmp_path / "m.gguf", config, jax.tree.map(lambda w: 0.2 * w, params), vocabulary, kind)
    model, again, _ = checkpoints.load(tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = np.arange(3, 23)[None]
    with torch.no_grad():
        expected = theirs.eval()(input_ids=torch.tensor(ids)).logits.numpy()
    got = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(ids)))(again)
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
        ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"], "bias": "all"}),
        ("gpt_neox", {"target_modules": ["query_key_value"], "use_dora": True, "modules_to_save": ["lm_head"]}),
    ],
)
def test_adapters_that_peft_writes_of_fused_projections_give_its_logits(tmp_path, name, settings):
    import peft
    import torch
    import transformers

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    save_file(cases.tensors(name, GOLDEN[name]["shapes"]), tmp_path / "base" / "model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapters")
    ids = cases.ids(name)
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(ids)).logits.numpy()
    checkpoint = checkpoints.open(tmp_path / "adapters", base=str(tmp_path / "base"))
    config = dataclasses.replace(checkpoint.config, scan_layers=False)
    params = checkpoint.params(config, on_default_device)
    got = jax.jit(lambda p: Transformer(config).apply({"params": p}, jnp.asarray(ids)))(params)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "tied"])
def test_peft_loads_our_adapters_and_gives_our_logits(tiny, tmp_path, variant):
    import peft as theirs
    import torch
    import transformers

    from llm_jax import lora
    from llm_jax.checkpoints import huggingface, peft_export
    from tests.lora.cases import config, made

    model, params = small("llama", 64, tie_embeddings=variant == "tied")
    params = jax.tree.map(lambda w: 0.3 * w, params)
    if variant == "tied":
        settings = config(tiny, targets=("attention", "embeddings"))
    else:
        settings = config(tiny, variant=variant, rank_stabilized=variant == "lora", ranks=((".*/up", 5),))
    adapters = made(params, settings)
    huggingface.save(tmp_path / "base", "llama", model, params, {})
    peft_export.save(tmp_path / "out", "llama", model, adapters, params, rank_stabilized=settings.rank_stabilized)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    wrapped = theirs.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = np.arange(3, 23)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(ids)).logits.numpy()
    attached = lora.attach(lora.subtract_start(params, adapters), adapters)
    got = jax.jit(lambda p: Transformer(model).apply({"params": p}, jnp.asarray(ids)))(attached)
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
