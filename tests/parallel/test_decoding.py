"""Decoding on a mesh: weights by `mesh.rules`, cache by rows and heads, and the text of one device."""

import dataclasses
import io
import json
import unittest.mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import llm_jax
from llm_jax import trees
from llm_jax.checkpoints import checkpoint as checkpoint_lib
from llm_jax.decoding import loop, steps
from llm_jax.decoding.samplers import Sampler
from llm_jax.model.transformer import Transformer
from llm_jax.parallel import mesh as mesh_lib
from tests.conftest import call
from tests.parallel import on_mesh

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]


def texts():
    """(ids on one device, ids on a mesh, the axes of the rows and heads of the cache of layer 0)."""
    config = on_mesh.tiny()
    model = Transformer(dataclasses.replace(config.model, scan_layers=False, num_layers=1))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mesh = mesh_lib.make(dataclasses.replace(config.mesh, data=2, fsdp=1, context=1, tensor=2), jax.devices()[:4])
    sharded = jax.device_put(params, mesh_lib.shardings(params, config.mesh.rules, mesh))
    ids = [
        [row.ids for row in loop.generate(model, weights, PROMPTS, Sampler(), max_new_tokens=12)]
        for weights in (params, sharded)
    ]
    settings = loop.draw_settings(model, Sampler(), range(len(PROMPTS)))
    spec = loop.start(model, sharded, settings, PROMPTS, 12).cache.layers["0"]["key"].sharding.spec
    return *ids, tuple(spec)


def test_a_mesh_writes_the_text_of_one_device_with_a_sharded_cache(simulated):
    one, sharded, spec = simulated(8)(texts)
    assert one == sharded and all(len(ids) == 12 for ids in one)
    rows, _, heads, *_ = (*P(*spec), None, None, None)
    assert "data" in rows and heads in ("tensor", ("tensor",))


def rows_of_devices():
    """The number of each row of padded prompts and of their lengths on every device: four prompts, then three."""
    sizes = dataclasses.replace(on_mesh.tiny().mesh, data=2, fsdp=2, tensor=2)
    params = jax.device_put(jnp.zeros(8), mesh_lib.replicated(mesh_lib.make(sizes)))
    placed = []
    for prompts in (PROMPTS, PROMPTS[:3]):
        arrays = steps.padded(prompts, params)
        shards = [sorted(array.addressable_shards, key=lambda shard: shard.device.id) for array in arrays]
        rows = [list(range(len(prompts)))[prompt.index[0]] for prompt in shards[0]]
        for prompt, length, numbers in zip(*shards, rows, strict=True):
            assert [len(prompts[i]) for i in numbers] == length.data.tolist()
            assert [prompts[i] for i in numbers] == [
                row[:n] for row, n in zip(prompt.data.tolist(), length.data.tolist(), strict=True)
            ]
        placed.append(rows)
    one = jnp.zeros((4, 2))
    assert mesh_lib.split_rows(one, {"a": one}) is one
    return placed


def test_prompts_are_divided_over_the_devices_of_the_rows(simulated):
    four, three = simulated(8)(rows_of_devices)
    assert four == [[0], [0], [1], [1], [2], [2], [3], [3]]  # the axis "tensor" has copies
    assert three == [[0, 1, 2]] * 8  # not divided by 2 x 2


TEXTS = ("the model", "a token and then", "one", "text of")
PROMPT_FLAGS = [*(f"--prompt={text}" for text in TEXTS), "--temperature=0"]
MESH = ("--mesh=tensor=2,fsdp=2", "--devices=8")


def test_commands_on_a_mesh_print_what_they_print_on_one_device(command, trained):
    flags = [f"--checkpoint={trained}", "--max_new_tokens=8", *PROMPT_FLAGS]
    one, many = command("generate", *flags), command("generate", *flags, *MESH)
    assert many.stdout == one.stdout and one.stdout.count("-" * 40) == 3
    one, many = (
        json.loads(command("evaluate", f"--checkpoint={trained}", "--json", *mesh).stdout) for mesh in ((), MESH)
    )
    assert one.pop("compressed_bits_per_byte") == many.pop("compressed_bits_per_byte")
    assert many == pytest.approx(one, rel=1e-5) and many["tokens"] > 0


def shards_of_weights(checkpoint):
    """The sizes of the shards of each array of a model on the mesh, over the sizes of the arrays."""
    loaded = llm_jax.load(checkpoint, mesh="tensor=2,fsdp=2")
    adapters = checkpoint_lib.place_like(jnp.zeros(2), loaded.params)  # computed with them, so on all of their devices
    assert len(adapters.devices()) == 8 and adapters.is_fully_replicated
    return {
        path: leaf.addressable_shards[0].data.size / leaf.size
        for path, weight in trees.flatten(loaded.params).items()
        for leaf in jax.tree.leaves(weight)
    }


def test_a_loaded_model_is_divided_over_the_mesh(simulated, trained):
    shares = simulated(8)(shards_of_weights, str(trained))
    assert shares["layers/0/attention/query"] == shares["layers/1/mlp/down"] == 0.25
    assert shares["embed/table"] == 0.5 and shares["final_norm/scale"] == 1  # a vocabulary of 259 is not divided by 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=tensor"], "--mesh=tensor; expected sizes of different axes (data, fsdp, tensor), such as tensor=4"),
        (["--mesh=context=2"], "expected sizes of different axes"),
        (["--mesh=tensor=2,tensor=4"], "expected sizes of different axes"),
        (["--mesh=tensor=x"], "config key 'mesh.tensor' is 'x'; expected"),
        (["--mesh=tensor=--2"], "config key 'mesh.tensor' is '--2'; expected"),
        (["--mesh=tensor=3"], "does not fit 8 devices"),
        (["--mesh=tensor=0"], "expected positive numbers"),
        ([], "--devices=8 has no effect where --mesh is not given"),
    ],
)
def test_a_mesh_of_another_form_is_refused(command, trained, flags, message):
    done = command("generate", f"--checkpoint={trained}", "--prompt=a", "--devices=8", *flags, code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_every_method_and_kind_of_weight_runs_on_a_mesh(command, trained, tmp_path):
    """Beams, speculative and contrastive decoding, quantized weights, adapters of both forms, and a conversation."""
    lora = [f"--config.init_from={trained}", "--config.lora.rank=4", "--config.optim.lr=1e-3"]
    command("train", f"--workdir={tmp_path / 'lora'}", *lora)
    command("train", f"--workdir={tmp_path / 'qlora'}", *lora, "--config.quant.scheme=nf4:16")
    command("quantize", f"--checkpoint={trained}", f"--output={tmp_path / 'int8'}", "--scheme=int8")
    command("convert", f"--input={trained}", f"--output={tmp_path / 'hf'}", "--to=hf")
    command("convert", f"--input={tmp_path / 'lora'}", f"--output={tmp_path / 'peft'}", "--to=peft")
    cases = [("generate", tmp_path / name, PROMPT_FLAGS) for name in ("lora", "qlora", "int8", "hf", "peft")]
    methods = (["--beams=2"], ["--contrastive=0.5", "--top_k=4"], ["--draft=prompt"], [f"--draft={trained}"])
    cases += [("generate", trained, [*PROMPT_FLAGS[:-1], *flags]) for flags in (*methods, ["--n=2", "--seed=3"])]
    cases += [("generate", trained, [PROMPT_FLAGS[0], flag, "--temperature=0"]) for flag in ("--explain", "--stream")]
    cases += [("generate", tmp_path / "int8", [*PROMPT_FLAGS, "--activations=int8"])]
    for name, checkpoint, flags in cases:
        one, many = (command(name, f"--checkpoint={checkpoint}", "--max_new_tokens=8", *flags, *m) for m in ((), MESH))
        assert many.stdout == one.stdout, (checkpoint, flags)
    for flags in ([f"--checkpoint={tmp_path / 'lora'}"], ["--task=copying", "--limit=8"], ["--stride=8"]):
        one, many = (command("evaluate", f"--checkpoint={trained}", *flags, *mesh) for mesh in ((), MESH))
        assert many.stdout == one.stdout, flags


def conversation(checkpoint, mesh):
    """The answers of `chat` to two messages, the second of which reuses the cache of the first."""
    flags = [f"--checkpoint={checkpoint}", "--plain", "--max_new_tokens=8", "--temperature=0", *mesh]
    with unittest.mock.patch("sys.stdin", io.StringIO("the model\na token\n")):
        return call("chat", *flags).stdout


@pytest.mark.slow
def test_a_conversation_on_a_mesh_is_that_of_one_device(simulated, trained):
    one, many = (simulated(8)(conversation, str(trained), mesh) for mesh in ((), MESH))
    assert one == many and one.count("\n") == 2
