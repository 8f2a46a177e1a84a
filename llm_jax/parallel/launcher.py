"""Runs a command as several connected processes on this machine, over the loopback interface.

    python -m llm_jax.parallel.launcher N MODULE [FLAGS]

Every output line begins with the number of its process. If a process fails, the launcher ends the others and exits with
the exit code of the first process that failed. SIGINT and SIGTERM are forwarded to all processes.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

from llm_jax import runtime
from llm_jax.parallel import rendezvous

_PATIENCE = 30.0  # seconds that the other processes have to end by themselves after one has failed
_CONNECTED = ("llm_jax.train",)  # commands that can run as several processes
# Exit codes of processes that end because another one has: that of `rendezvous`, and SIGABRT by JAX.
_FOLLOWING = (rendezvous.LOST, -signal.SIGABRT)


def run(count: int, module: str, flags: Sequence[str]) -> int:
    """Runs `python -m MODULE FLAGS` as `count` connected processes and returns the exit code."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that is free
        port = server.getsockname()[1]
    # CPU devices, unless the user names others: several processes cannot share an accelerator.
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    for i in range(count):
        process_flags = (f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}")
        command = [sys.executable, "-m", module, *flags, *process_flags]
        # A group of its own, so that Ctrl-C in a terminal reaches each process once, through `pass_on`.
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=runtime.end_with_parent,
            )
        )
    lock = threading.Lock()
    readers = [
        threading.Thread(target=_copy, args=(stream, output, f"{i}: ".encode(), lock), daemon=True)
        for i, process in enumerate(processes)
        for stream, output in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
    ]
    for reader in readers:
        reader.start()
    code = _wait(processes)
    for reader in readers:
        reader.join(5.0)
    return code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all processes; returns the exit code of the first that failed, as a shell has it."""
    first, until = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = [(code in _FOLLOWING, i, code) for i, code in enumerate(codes) if code]
        if failed and not first:
            _, i, code = min(failed)
            first, until = code if code > 0 else 128 - code, time.monotonic() + _PATIENCE
            if code < 0:
                print(f"process {i} was killed by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        if None not in codes:
            return first
        if time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(0.05)


def _copy(stream: BinaryIO, output: BinaryIO, prefix: bytes, lock: threading.Lock) -> None:
    for line in stream:
        with lock:
            output.write(prefix + line.rstrip(b"\n") + b"\n")
            output.flush()


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) < 2 or not arguments[0].isdigit() or not int(arguments[0]):
        print("error: expected the number of processes, a module and its flags", file=sys.stderr)
        sys.exit(2)
    if arguments[1].startswith("llm_jax.") and arguments[1] not in _CONNECTED:
        print(
            f"error: {arguments[1]} runs in one process; expected {' or '.join(_CONNECTED)} (several devices of one "
            "process: --mesh of generate, chat and evaluate)",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.exit(run(int(arguments[0]), arguments[1], arguments[2:]))


if __name__ == "__main__":
    main()
