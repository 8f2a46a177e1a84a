"""The rendezvous of processes, each simulated by a thread."""

import concurrent.futures
import errno
import os
import queue
import signal
import socket
import subprocess
import sys
import time

import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import rendezvous
from tests.conftest import ROOT


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def meet(address):
    """meet({index: number of processes}) -> {index: the meeting, or the error that was raised}."""
    ends: queue.Queue[tuple[int, str, int]] = queue.Queue()
    notes: list[str] = []

    def attend(index, count, seconds):
        try:
            return rendezvous.connect(
                address, address, count, index, seconds, lambda line, code: ends.put((index, line, code)), notes.append
            )
        except UserError as error:
            return str(error)

    def run(counts, seconds=30.0):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            futures = {index: pool.submit(attend, index, count, seconds) for index, count in counts.items()}
            return {index: future.result() for index, future in futures.items()}

    run.ends, run.notes = ends, notes
    return run


def test_missing_processes_are_named_in_every_process(meet, monkeypatch):
    monkeypatch.setattr(rendezvous, "_FIRST_NOTE", 0.6)
    results = meet({0: 4, 2: 4}, seconds=1.0)
    assert "processes 1, 3 of 4 did not connect to process 0 at 127.0.0.1" in results[0] and results[2] == results[0]
    assert any("waiting for processes 1, 3 of 4" in note for note in meet.notes)


def test_without_process_0_there_is_a_time_limit(meet, address):
    assert f"process 0 of 2 did not answer process 1 at {address} within 1 s" in meet({1: 2}, seconds=1.0)[1]


def test_another_number_of_processes_is_refused(meet):
    results = meet({0: 2, 1: 3}, seconds=5.0)
    assert "has --num_processes=3; process 0 has 2" in results[0] and results[1] == results[0]


def test_a_process_that_is_started_twice_is_refused(meet, address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pairs = [pool.submit(rendezvous.connect, address, "", 3, 1, 5.0) for _ in range(2)]
        assert "process 1 was started twice" in meet({0: 3}, seconds=5.0)[0]
        for future in pairs:
            with pytest.raises(UserError, match="process 1 was started twice"):
                future.result()


def test_connections_of_other_programs_are_ignored(meet, address):
    host, port = address.split(":")

    def disturb():
        for data in (b"GET / HTTP/1.0\r\n\r\n", b"{}\n", b"[1]\n", b"\xff" * 100_000, b""):
            while True:
                try:
                    with socket.create_connection((host, int(port))) as stranger:
                        stranger.sendall(data)
                    break
                except OSError:
                    time.sleep(0.01)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(meet, {0: 2})
        disturb()
        one = meet({1: 2})[1]
        assert zero.result()[0].index == 0 and one.index == 1


def test_a_failure_ends_the_others_with_its_message_and_code(meet, monkeypatch):
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.5)
    meetings = meet({0: 3, 1: 3, 2: 3})
    meetings[2].fail("the disk is full", 2)
    ended = [meet.ends.get(timeout=10) for _ in range(2)]
    assert {index for index, _, _ in ended} == {0, 1}
    assert all(
        f"process 2 on {socket.gethostname()}: the disk is full" == line and code == 2 for _, line, code in ended
    )
    assert meet.ends.empty()


def test_a_lost_process_ends_the_others(meet):
    meetings = meet({0: 3, 1: 3, 2: 3})
    meetings[1]._others[0].socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    ended = {index: (line, code) for index, line, code in (meet.ends.get(timeout=10) for _ in range(3))}
    for index in (0, 2):
        assert "process 1 on" in ended[index][0] and "has ended without a message" in ended[index][0]
        assert ended[index][1] == 75


def test_a_machine_that_does_not_answer_is_lost(meet):
    """The kernel's probes fail with ETIMEDOUT."""
    meetings = meet({0: 2, 1: 2})
    connection = meetings[0]._others[1]
    sock = connection.socket
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    assert [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in options] == [5, 5, 4, 20_000]

    class Dead:
        def recv(self, size):
            raise OSError(errno.ETIMEDOUT, "Connection timed out")

        def __getattr__(self, name):
            return getattr(sock, name)

    connection.socket = Dead()
    meetings[1]._others[0].send(hello=True)  # wakes the one that reads
    ended = {index: (line, code) for index, line, code in (meet.ends.get(timeout=10) for _ in range(2))}
    assert "process 1 on" in ended[0][0] and "has not answered for 20 s" in ended[0][0] and ended[0][1] == 75


def test_processes_that_have_finished_are_not_missed(meet):
    meetings = meet({0: 3, 1: 3, 2: 3})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        began = time.monotonic()
        list(pool.map(lambda meeting: meeting.finish(), meetings.values()))
    assert time.monotonic() - began < 10
    for connection in list(meetings[1]._others.values()):
        connection.close()
    time.sleep(1.0)
    assert meet.ends.empty()


MODULE = """
import os, signal, sys, time
index = int(sys.argv[-1].partition("=")[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("hello from", index, sys.argv[1], flush=True)
if index == 1 and sys.argv[1] == "fail": sys.exit(3)
if index == 1 and sys.argv[1] == "die": os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] != "end": time.sleep(60)
"""


def launch(tmp_path, *arguments):
    (tmp_path / "small.py").write_text(MODULE)
    start = f"launcher._PATIENCE = 0.3; sys.exit(launcher.run(2, 'small', {list(arguments)}))"
    code = f"import sys; from llm_jax.parallel import launcher; {start}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("what", "code"), [("end", 0), ("fail", 3), ("die", 137)])
def test_the_launcher_prefixes_lines_and_ends_all_when_one_fails(tmp_path, what, code):
    process = launch(tmp_path, what)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert sorted(out.splitlines()) == [f"0: hello from 0 {what}", f"1: hello from 1 {what}"]
    assert ("process 1 was killed by SIGKILL" in errors) == (what == "die")


def test_the_launcher_passes_signals_on(tmp_path):
    process = launch(tmp_path, "wait")
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
