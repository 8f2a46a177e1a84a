import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llm_jax import tokenizers
from llm_jax.data import build
from llm_jax.data.corpus import Source
from llm_jax.errors import UserError
from llm_jax.schema import DataConfig
from tests.conftest import ROOT
from tests.data.configs import data_config

BUILD = """
import itertools
import sys
import time
import types
from llm_jax import tokenizers
from tests.data.configs import data_config
from llm_jax.data import build, local_engine
from llm_jax.data.corpus import Source

def stuck(*given, **options):
    yield from itertools.islice(local_engine.run_jobs(*given, **options), int(sys.argv[4]))
    time.sleep(600)

if __name__ == "__main__":
    build._SMALLEST = 20_000
    if len(sys.argv) > 4:
        # of the tokenizing, not of the scan
        assert build.local_engine is local_engine
        build.local_engine = types.SimpleNamespace(run_jobs=stuck, num_workers=local_engine.num_workers)
    source = Source(data_config(sys.argv[1], sys.argv[2], workers=int(sys.argv[3])))
    print("scanned", flush=True)
    source.corpus(tokenizers.get("byte").train([], 0))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with path.open("w") as file:
        for i in range(3000):
            file.write(json.dumps({"text": f"document {i} " + "with words é " * (i % 90)}) + "\n")
    os.utime(path, (10**9, 10**9))
    return path


def config(path, cache, workers: int) -> DataConfig:
    return data_config(path, cache, workers=workers)


def expected(lines, cache):
    return Source(config(lines, cache, 1)).corpus(tokenizers.get("byte").train([], 0))


def same(one, other) -> None:
    for a, b in ((one.train, other.train), (one.validation, other.validation)):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.offsets, b.offsets)
        assert a.num_bytes == b.num_bytes


def test_several_processes_and_smaller_parts_make_the_same_cache(lines, tmp_path, monkeypatch):
    one = expected(lines, tmp_path / "one")
    monkeypatch.setattr(build, "_SMALLEST", 20_000)
    same(Source(config(lines, tmp_path / "two", 2)).corpus(tokenizers.get("byte").train([], 0)), one)
    assert not [p.name for p in (tmp_path / "two" / "corpora").iterdir() if p.name.endswith(".parts")]


def run(lines, cache, workers: int, *parts: int) -> subprocess.Popen:
    """A build, or one that sleeps when so many `parts` are finished."""
    given = map(str, (lines, cache, workers, *parts))
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *given] if workers == 1 else [sys.executable, str(script(cache)), *given],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def script(cache):
    """Spawned processes read the main file again."""
    cache.mkdir(exist_ok=True)
    path = cache / "build_it.py"
    path.write_text(BUILD)
    return path


def parts(cache) -> dict[str, int]:
    found = {}
    with contextlib.suppress(FileNotFoundError):  # the build that is watched has just ended
        for path in cache.glob("corpora/.*.parts/*.npz"):
            found[path.name] = path.stat().st_mtime_ns
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_resumes_from_its_finished_parts(lines, tmp_path, workers):
    process = run(lines, tmp_path, workers, 6)
    while len(parts(tmp_path)) < 6:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(0.2)
    assert process.poll() is None, process.communicate()  # it waits after six parts
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # processes of the killed one end
    kept = parts(tmp_path)
    (directory,) = tmp_path.glob("corpora/.*.parts")
    again = run(lines, tmp_path, workers)
    seen = {}
    while again.poll() is None:
        seen |= parts(tmp_path)
    assert again.returncode == 0, again.communicate()
    assert all(seen.get(name, at) == at for name, at in kept.items()) and not directory.exists()
    same(expected(lines, tmp_path), expected(lines, tmp_path / "new"))


def test_two_concurrent_builds_give_one_cache(lines, tmp_path):
    both = [run(lines, tmp_path, 1) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    same(expected(lines, tmp_path), expected(lines, tmp_path / "new"))


def test_a_second_builder_waits_and_says_so(lines, tmp_path, capsys):
    import threading

    ready, leave = threading.Event(), threading.Event()
    lock = tmp_path / "lock"

    def hold():
        with build._alone(lock):
            ready.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()
    threading.Timer(0.2, leave.set).start()
    with build._alone(lock):
        assert leave.is_set()
    holder.join()
    assert "waiting for another process" in capsys.readouterr().err


def test_a_process_that_is_killed_is_one_line(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SMALLEST", 20_000)
    source = Source(config(lines, tmp_path, 2))
    others = multiprocessing.active_children()  # such as those of other tests, with simulated devices

    def kill(*_):
        deadline = time.time() + 30
        while not (children := set(multiprocessing.active_children()) - {*others}) and time.time() < deadline:
            time.sleep(0.01)
        for child in children:
            child.kill()

    import threading

    threading.Thread(target=kill).start()
    with pytest.raises(UserError, match="a process was killed or could not start"):
        source.corpus(tokenizers.get("byte").train([], 0))


def test_the_error_of_another_process_is_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_SMALLEST", 20_000)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 400 + str(i)}) + "\n" for i in range(300)))
    source = Source(config(path, tmp_path / "cache", 2))
    path.write_text(path.read_text().replace("word", "other"))
    with pytest.raises(UserError, match=r"a.jsonl.*(not JSON|changed while it was being read)"):
        source.corpus(tokenizers.get("byte").train([], 0))


def full_disk(tmp_path, size: str):
    """A file system of `size` in a directory, where one can be mounted."""
    target = tmp_path / "small"
    target.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", target], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    return target


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_what_is_finished_stays(lines, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(build, "_SMALLEST", 100_000)
    target = full_disk(tmp_path, "1500k")
    try:
        with pytest.raises(UserError, match="data.cache_dir: .*cannot be written .No space left on device"):
            Source(config(lines, target, workers)).corpus(tokenizers.get("byte").train([], 0))
        assert parts(target)
        subprocess.run(["mount", "-o", "remount,size=64m", target], check=True)
        again = Source(config(lines, target, workers)).corpus(tokenizers.get("byte").train([], 0))
        same(again, expected(lines, tmp_path / "new"))
        del again
    finally:
        subprocess.run(["umount", "-l", target], check=True)


def test_an_existing_cache_is_read_from_a_read_only_directory(lines, tmp_path):
    same(expected(lines, tmp_path), expected(lines, tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    expected(lines, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_cache_directory_that_cannot_be_made_is_named(lines, tmp_path, place):
    if place == "file":
        place = tmp_path / "file"
        place.write_text("")
    with pytest.raises(UserError, match="data.cache_dir: .*cannot be written"):
        expected(lines, place)
