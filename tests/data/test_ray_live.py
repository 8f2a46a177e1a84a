"""A corpus built on a cluster of Ray, one machine of which is killed on the way (requirements-ray.txt)."""

import gzip
import json
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from llm_jax.data import build, shared_cache
from llm_jax.data.corpus import Source
from tests.conftest import ROOT
from tests.data.configs import data_config
from tests.data.test_stores import byte_tokenizer, contents

pytestmark = pytest.mark.live
FILES, DOCUMENTS = 6, 4000


def document(file: int, i: int) -> str:
    return json.dumps({"text": f"document {file} {i} " + "with words é " * (i % 60)}) + "\n"


@pytest.fixture(scope="module")
def store():
    """A server of s3:// with texts below s3://bucket/texts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moto = pathlib.Path(sys.executable).with_name("moto_server")
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PYTHONPATH": str(ROOT),
    }
    with (
        subprocess.Popen([moto, "-H", "127.0.0.1", "-p", str(port)], **quiet) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < until
            time.sleep(0.1)
        import fsspec

        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("bucket")
        for file in range(FILES):
            content = "".join(document(file, i) for i in range(DOCUMENTS)).encode()
            packed = file % 2 == 0
            name = f"bucket/texts/{file}.jsonl" + ".gz" * packed
            system.pipe_file(name, gzip.compress(content, 1) if packed else content)
        yield "s3://bucket/texts"
        process.kill()


def test_the_bytes_are_those_of_a_local_build_though_a_machine_is_killed(store, tmp_path, monkeypatch):
    """Texts and cache are in a bucket; three machines of the cluster, each a process of Ray, have a core each."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(build, "_SMALLEST", 50_000)
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "local"))
    local = Source(data_config(store, "s3://bucket/local"))
    local.corpus(byte_tokenizer())

    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "ray"))
    memory = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    nodes = [cluster.add_node(num_cpus=1, **memory) for _ in range(3)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    finished: list[int] = []

    def kill():
        directory = shared_cache.directory("s3://bucket/ray")
        while len(parts := list(directory.glob("corpora/.*.parts/*.npz"))) < 4:
            time.sleep(0.01)
        finished.append(len(parts))
        cluster.remove_node(nodes[0], allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        other = Source(data_config(store, "s3://bucket/ray"), engine="ray")
        other.corpus(byte_tokenizer())
        killer.join(60)
        alive = sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert alive == 3 and finished  # the head and two of three machines
    two = contents(shared_cache.directory("s3://bucket/ray") / "corpora")
    with monkeypatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(tmp_path / "local"))
        one = contents(shared_cache.directory("s3://bucket/local") / "corpora")
    assert one == two and sum(map(len, one.values())) > 2**20
    # Another machine copies the corpus from the bucket.
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "third"))
    monkeypatch.setattr("llm_jax.data.corpus.build", None)
    Source(data_config(store, "s3://bucket/ray")).corpus(byte_tokenizer())
    copied = contents(shared_cache.directory("s3://bucket/ray") / "corpora")
    assert {name: content for name, content in two.items() if "/" in name}.items() <= copied.items()
