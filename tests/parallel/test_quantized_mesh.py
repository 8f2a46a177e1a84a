"""Quantized weights on a mesh: what is split over 8 devices gives the products and bits of one."""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from llm_jax import weights
from llm_jax.schema import MeshConfig
from llm_jax.parallel import mesh as mesh_lib

mesh = mesh_lib.make(MeshConfig(data=2, fsdp=2, tensor=2, context=1, rules=()))
w, x = jax.random.normal(jax.random.key(0), (256, 512)), jax.random.normal(jax.random.key(1), (4, 256))
names = ("int8", "int4", "int4_affine:64", "nf4", "mxfp4", "w8a8")
tree = {name: weights.to_qtensor(w, name, weights.IN) for name in names}
shardings = mesh_lib.shardings(tree, ((".*", ("fsdp", "tensor")),), mesh)
split = jax.device_put(tree, shardings)
for name in names:
    q = split[name]
    assert q.codes.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor"), name
    assert q.codes.addressable_shards[0].data.size == q.codes.size // 4
    scale = q.scale.codes if name == "nf4" else q.scale
    assert scale.addressable_shards[0].data.size == scale.size // (2 if scale.shape[0] == 1 else 4), name
    dot = jax.jit(mesh_lib.within(mesh, weights.dot))
    np.testing.assert_allclose(dot(x, q), jax.jit(weights.dot)(x, tree[name]), rtol=2e-4, atol=2e-4)
    text = dot.lower(x, q).compile().as_text()
    assert "all-gather" not in text or "s8[256,512]" not in text
with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
    orbax.save(sys.argv[1], split)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), tree)
    again = orbax.restore(sys.argv[1], wanted)
jax.tree.map(np.testing.assert_array_equal, again, tree)
print("equal")
"""


def test_codes_and_scales_are_split_restored_and_multiplied_as_on_one_device(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "arrays")], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr
