"""The memory that loading takes in addition to the parameters, measured in a separate process."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm_jax import checkpoints, trees
from llm_jax.checkpoints import gguf_model, huggingface
from llm_jax.checkpoints.families import neutral
from llm_jax.model.transformer import Transformer

pytestmark = pytest.mark.optimized

MEASURE = """
import dataclasses, json, sys
import jax
from llm_jax import runtime, trees
from llm_jax import checkpoints
from llm_jax import checkpoints
from llm_jax.checkpoints import gguf_model, huggingface, peft

path, scan, devices = sys.argv[1], bool(int(sys.argv[2])), int(sys.argv[3])
runtime.simulate_devices(devices)
mesh = jax.make_mesh((devices,), ("fsdp",))
placed = lambda axis: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis))
shardings = lambda tree: jax.tree.map(lambda w: placed(() if w.shape[0] % devices else ("fsdp",)), tree)
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))

def kib(name):
    return int(dict(line.split(":") for line in open("/proc/self/status"))[name].split()[0])

before = kib("VmRSS")
origin = checkpoints.open_base(path)
params = jax.block_until_ready(origin.params(dataclasses.replace(origin.config, scan_layers=scan), shardings))
peak = kib("VmHWM")  # not ru_maxrss, which begins at that of the parent
size = sum(w.nbytes for w in jax.tree.leaves(params))
print(json.dumps({"ratio": 1024 * (peak - before) / size, "size": size, "sha256": trees.fingerprint(params)}))
"""


@pytest.fixture(scope="module")
def written(vocabulary, tmp_path_factory):
    """{form: (its path, fingerprint of the parameters)} of 170 MB of parameters."""
    shape = {"width": 768, "num_layers": 6, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 2048}
    config = dataclasses.replace(neutral(), vocab_size=vocabulary.vocab_size, **shape)
    abstract = checkpoints.abstract_params(Transformer(config))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda w: draw.standard_normal(w.shape, np.float32), abstract)
    directory = tmp_path_factory.mktemp("large")
    huggingface.save(directory / "hf", "llama", config, params, vocabulary.files())
    gguf_model.save(directory / "m.gguf", config, params, vocabulary, "Q8_0")
    found = {name: directory / name for name in ("hf", "m.gguf")}
    return {name: (path, trees.fingerprint(checkpoints.load(path).params)) for name, path in found.items()}


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("form", "scan", "devices"), [("hf", 0, 1), ("m.gguf", 1, 1), ("hf", 1, 4)])
def test_loading_takes_little_more_than_the_parameters(written, form, scan, devices):
    path, expected = written[form]
    root = pathlib.Path(__file__).parents[2]
    full = [sys.executable, "-c", MEASURE, str(path), str(scan), str(devices)]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["size"] > 1.6e8 and said["sha256"] == expected
    assert 0.9 < said["ratio"] < 1.3, said
