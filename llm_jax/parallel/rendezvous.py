"""Connects the processes of a run over TCP, and ends all of them if one ends early.

Process 0 listens at the coordinator address; every other process connects to it and sends its index. The connections
stay open during the run. A closed connection means that its process was killed; unanswered keep-alive probes of the
kernel mean that its machine is lost. Process 0 informs the others, and every process exits with one line that names the
lost process. The messages are lines of JSON and do not use JAX. The kernel sends the probes, because a Python thread
may be blocked for minutes, for example while a tokenizer is trained.

    connections = rendezvous.connect(address, bind, count=4, index=0, seconds=300)
    connections.fail("the disk is full", 2)      # the other processes end with this message and code
    connections.finish()                         # waits for all processes, which may then end in any order
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from llm_jax.errors import UserError

LOST = 75  # exit code of the processes that remain when one is lost (EX_TEMPFAIL of sysexits.h: try again)
_SILENCE = 20  # seconds without an answer of the other machine after which a process is lost
_PROBE = 5  # seconds between the kernel's probes
_FIRST_NOTE, _NOTES = 10.0, 60.0  # seconds until the first message about waiting, and between further messages
_PATIENCE = 3.0  # seconds for the other processes to end after a failure
_LONGEST = 2**16  # maximum bytes of a line
_GREETING = "llm_jax-1"  # protocol and version


class _Connection:
    """One end of a connection that carries lines of JSON.

    Attributes:
      process: the process at the other end.
      host: its host name.
      unreachable: whether the other machine does not answer.
      done: whether the process has announced its end.
    """

    def __init__(self, sock: socket.socket, process: int = 0, host: str = ""):
        self.socket, self.process, self.host = sock, process, host
        self.unreachable = self.done = False
        self._buffer = b""
        self._sending = threading.Lock()
        sock.settimeout(5.0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", _PROBE),
            ("TCP_KEEPINTVL", _PROBE),
            ("TCP_KEEPCNT", _SILENCE // _PROBE),
            ("TCP_USER_TIMEOUT", 1000 * _SILENCE),
        ):
            if hasattr(socket, name):  # Linux has all
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Sends a message; `receive` detects a broken connection."""
        with self._sending, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages since the last call; None if the connection is closed or has invalid messages."""
        try:
            data = self.socket.recv(_LONGEST)
        except TimeoutError as error:
            self.unreachable = (
                error.errno is not None
            )  # ETIMEDOUT by the kernel; the time limit of `recv` has no number
            return None if self.unreachable else []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.socket.close()


class Connections:
    """The connections of this process to the others: of process 0 to all, of every other process to process 0.

    Args:
      end: called with (line, exit code) when another process is lost or has failed; ends this process.
    """

    def __init__(self, index: int, connections: Iterable[_Connection], end: Callable[[str, int], Any]):
        self.index = index
        self._end = end
        self._others = {connection.process: connection for connection in connections}
        self._changed = threading.Condition()
        self._ended = False
        self._selector = selectors.DefaultSelector()
        for connection in self._others.values():
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._thread = threading.Thread(target=self._watch, name="rendezvous", daemon=True)
        self._thread.start()

    def fail(self, message: str, code: int) -> None:
        """Makes the other processes end with `message` and exit code `code`, and waits a moment until they have."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
        line = f"process {self.index} on {socket.gethostname()}: {message}"
        self._send_all(stop=line, code=code)
        # A process that fails in the same way at the same time says so itself.
        self._wait(lambda: all(other.done for other in self._others.values()), _PATIENCE)

    def finish(self, seconds: float = 60.0) -> None:
        """Waits, for at most `seconds`, until all processes have called this; then lost connections are ignored."""
        connections = list(self._others.values())
        if self.index:
            self._send_all(done=True)
        self._wait(lambda: all(other.done for other in connections), seconds)
        with self._changed:
            self._ended = True
        if not self.index:
            self._send_all(done=True)

    def _send_all(self, **message: Any) -> None:
        for connection in list(self._others.values()):
            connection.send(**message)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(condition, seconds)

    def _watch(self) -> None:
        while self._others:
            for key, _ in self._selector.select(0.5):
                self._read(key.data)

    def _read(self, connection: _Connection) -> None:
        messages = connection.receive()
        for message in messages or []:
            if "stop" in message:
                self._stop(str(message["stop"]), int(message.get("code", LOST)), connection)
            if message.get("done"):
                with self._changed:
                    connection.done = True
                    self._changed.notify_all()
        if messages is None:
            self._lose(connection)

    def _lose(self, connection: _Connection) -> None:
        with self._changed:
            self._selector.unregister(connection.socket)
            del self._others[connection.process]
            self._changed.notify_all()
        connection.close()
        if not connection.done:
            silent = f"has not answered for {_SILENCE} s (machine or network down?)"
            how = silent if connection.unreachable else "has ended without a message (killed?)"
            name = f"process {connection.process} on {connection.host}"
            self._stop(
                f"{name} {how}; the same command resumes from the last checkpoint, or from step 0 without one", LOST
            )

    def _stop(self, line: str, code: int, source: _Connection | None = None) -> None:
        with self._changed:
            if self._ended:
                if source:
                    source.done = True
                    self._changed.notify_all()
                return
            self._ended = True
        if self.index == 0:
            for connection in list(self._others.values()):
                if connection is not source:
                    connection.send(stop=line, code=code)
        self._end(line, code)


def connect(
    address: str,
    bind: str,
    count: int,
    index: int,
    seconds: float,
    end: Callable[[str, int], Any] | None = None,
    note: Callable[[str], Any] | None = None,
) -> Connections:
    """Waits until all processes are connected to process 0.

    Args:
      address: HOST:PORT of process 0, as the other processes reach it.
      bind: HOST:PORT at which process 0 listens; HOST "" listens on all interfaces.
      count: the number of processes.
      index: index of this process.
      seconds: time limit.
      end: see `Connections`; by default `end_process`.
      note: prints a line while waiting; by default to stderr.

    Raises:
      UserError: processes are missing after `seconds`; names them. Or process 0 cannot listen at `bind`, or two
        processes have the same index.
    """
    note = note or (lambda line: print(line, file=sys.stderr, flush=True))
    wait = _Wait(seconds, note)
    connections = _gather(bind, count, wait) if index == 0 else [_join(address, count, index, wait)]
    return Connections(index, connections, end or end_process)


def end_process(line: str, code: int) -> None:
    """Exits this process immediately, from any thread, with a line on stderr."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(0.5)
    newline = "\n" if os.isatty(2) else ""  # ends the line of a progress bar
    os.write(2, f"{newline}error: {line}\n".encode())
    os._exit(code)


class _Wait:
    """A time limit with messages about the wait."""

    def __init__(self, seconds: float, note: Callable[[str], Any]):
        self.seconds, self._note = seconds, note
        self.limit = time.monotonic() + seconds
        self._next = time.monotonic() + _FIRST_NOTE

    def over(self, line: str) -> bool:
        """Whether the time limit is exceeded; prints `line` from time to time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _NOTES
            self._note(line)
        return now >= self.limit


def _gather(bind: str, count: int, wait: _Wait) -> list[_Connection]:
    """In process 0: accepts the connections of all other processes."""
    connections: dict[int, _Connection] = {}
    greeted: list[_Connection] = []

    def refuse(line: str) -> UserError:
        for connection in (*connections.values(), *greeted):
            connection.send(refused=line)
            connection.close()
        return UserError(line)

    with _listen(bind) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(connections) < count - 1:
            missing = _listed(i for i in range(1, count) if i not in connections)
            if wait.over(f"process 0: waiting for {missing} of {count} at {bind}"):
                raise refuse(
                    f"{missing} of {count} did not connect to process 0 at {bind} within {wait.seconds:.0f} s; start "
                    "every process with the same --coordinator_address and --num_processes, and open the port"
                )
            for key, _ in selector.select(0.2):
                if key.fileobj is server:
                    connection = _Connection(server.accept()[0])
                    greeted.append(connection)
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
                    continue
                connection = key.data
                messages = connection.receive()
                if messages == []:
                    continue
                selector.unregister(connection.socket)
                if connection in greeted:
                    greeted.remove(connection)
                else:  # it had joined, and ended while others were waited for
                    del connections[connection.process]
                greeting = messages[0] if messages else {}
                if greeting.get("greeting") != _GREETING:
                    connection.close()
                    continue
                process, of, host = greeting.get("process"), greeting.get("of"), str(greeting.get("host"))
                if of != count or not isinstance(process, int) or not 0 < process < count:
                    greeted.append(connection)
                    raise refuse(f"process {process} on {host} has --num_processes={of}; process 0 has {count}")
                if process in connections:
                    greeted.append(connection)
                    raise refuse(f"process {process} was started twice, on {connections[process].host} and on {host}")
                connection.process, connection.host = process, host
                connections[process] = connection
                selector.register(connection.socket, selectors.EVENT_READ, connection)
    for connection in connections.values():
        connection.send(go=True, host=socket.gethostname())
    return list(connections.values())


def _join(address: str, count: int, index: int, wait: _Wait) -> _Connection:
    """In every other process: connects to process 0 and waits until all processes are connected."""
    while True:
        line = f"process {index}: waiting for process 0 at {address}"
        with contextlib.suppress(OSError):
            connection = _Connection(socket.create_connection(_parts(address), timeout=2.0))
            connection.send(greeting=_GREETING, process=index, of=count, host=socket.gethostname())
            while (messages := connection.receive()) is not None:
                for message in messages:
                    if "refused" in message:
                        raise UserError(str(message["refused"]))
                    if message.get("go"):
                        connection.host = str(message.get("host"))
                        return connection
                # Process 0 has the same time limit, and says who is missing; it gets a little longer.
                if wait.over(f"{line}, which waits for other processes") and time.monotonic() > wait.limit + 10:
                    break
            connection.close()
        if wait.over(line):
            raise UserError(
                f"process 0 of {count} did not answer process {index} at {address} within {wait.seconds:.0f} s; start "
                "it there, or correct --coordinator_address"
            )
        time.sleep(0.2)


def _listen(bind: str) -> socket.socket:
    host, port = _parts(bind)
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0][0] if host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at {bind} ({error.strerror}); name a free port and an address of this machine in "
            "--coordinator_address or --coordinator_bind_address"
        ) from error


def _parts(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [IPV6]:PORT."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator_address={address}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _listed(processes: Iterable[int]) -> str:
    numbers = [str(i) for i in processes]
    shown = ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"
