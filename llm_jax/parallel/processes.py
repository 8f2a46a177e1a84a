"""Several processes: start-up, communication and agreement.

    with processes.connected("10.0.0.1:1234", num_processes=2, process_id=0): ...

Process 0 is the main process: it prints, and writes every file except its share of the arrays of a checkpoint. With one
process, no function of this module waits or communicates.
"""

import contextlib
import itertools
import json
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from llm_jax import files
from llm_jax.errors import UserError
from llm_jax.parallel import rendezvous

_HEARTBEAT = 40  # seconds after which JAX ends all processes if one is stopped; `rendezvous` detects ended ones
_TIMEOUT = 300.0  # seconds in which all processes must have started
_STEPS_AHEAD = 3  # see `StopAgreement`
_DAY = 24 * 3600
_calls = itertools.count()  # counter for the keys of messages; equal in all processes
_connections: rendezvous.Connections | None = None


@contextlib.contextmanager
def connected(
    coordinator_address: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    coordinator_bind_address: str = "",
    timeout: float = _TIMEOUT,
) -> Iterator[None]:
    """Connects the processes of a run for the block; call before JAX is used.

    Without `coordinator_address` the cluster is detected as `jax.distributed.initialize` does: Cloud TPU, Slurm, Open
    MPI, Kubernetes (an indexed Job or a JobSet). Does nothing for a single process, or where the caller has initialized
    `jax.distributed`. While the block runs, a process that dies or fails ends all others with a line that names it; an
    exception in the block is reported to the others.

    Args:
      coordinator_address: HOST:PORT of process 0, the same in all processes.
      num_processes: the number of processes; 1 without the other arguments: a single process, even in a cluster job.
      process_id: index of this process, from 0.
      coordinator_bind_address: HOST:PORT at which process 0 listens. By default `coordinator_address`, and for a
        detected cluster that port on all interfaces.
      timeout: seconds to wait for all processes.

    Raises:
      UserError: flags that contradict each other, or processes that are missing after `timeout`.
    """
    global _connections
    explicit = (coordinator_address, num_processes, process_id) != ("", 0, -1)
    connection = _explicit(coordinator_address, num_processes, process_id) if explicit else _detected(timeout)
    if connection is None:
        yield
        return
    import jax

    address, count, index, local_devices = connection
    bind = coordinator_bind_address or (address if explicit else f":{address.rpartition(':')[2]}")
    connections = rendezvous.connect(address, bind, count, index, timeout)
    try:
        jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is handled by `cli.signals`
        jax.distributed.initialize(
            address,
            count,
            index,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=60,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=60,
            coordinator_bind_address=bind if bind.rpartition(":")[0] else f"[::]{bind}",
        )
        jax.devices()  # exchanges the topology, which all processes must do together
        _connections = connections
        yield
        connections.finish()
        jax.distributed.shutdown()
    except BaseException as error:
        _report(connections, error)
        raise
    finally:
        _connections = None


def _report(connections: rendezvous.Connections, error: BaseException) -> None:
    """Reports an error of this process to the other processes."""
    if isinstance(error, UserError):
        connections.fail(str(error), 2)
    elif isinstance(error, KeyboardInterrupt):
        connections.fail("interrupted", 130)
    elif isinstance(error, Exception):
        # A collective fails when another process is lost: if so, `connections` ends this process with a better message.
        time.sleep(3.0)
        first = next(iter(str(error).splitlines()), "")
        connections.fail(f"{type(error).__name__}: {first}", 1)


def _explicit(address: str, count: int, index: int) -> tuple[str, int, int, None] | None:
    if (address, count, index) == ("", 1, -1):
        return None
    flags = f"--coordinator_address={address} --num_processes={count} --process_id={index}"
    if not address or count < 1 or not 0 <= index < count:
        raise UserError(
            f"{flags}: expected all three: HOST:PORT of process 0, the number of processes, and the index of this "
            "process, from 0"
        )
    return (address, count, index, None) if count > 1 else None


def _detected(timeout: float) -> tuple[str, int, int, list[int] | None] | None:
    """(coordinator address, number of processes, index, local devices) of a cluster that JAX detects, or None."""
    import jax
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if jax.distributed.is_initialized():
        return None
    for cluster in _known_clusters():
        try:
            if not cluster.is_env_present():
                continue
            count = cluster.get_process_count()
            if count == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(timeout_secs=int(timeout), override_coordinator_port=port)
            local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()
            return address, count, cluster.get_process_id(), None if local is None else [local]
        except Exception as error:  # many kinds: environment variables, the metadata server, the API of Kubernetes
            name = cluster.__name__.removesuffix("Cluster")
            raise UserError(
                f"this process seems to run in a cluster ({name}), whose processes cannot be found "
                f"({' '.join(str(error).split())}); give --coordinator_address, --num_processes and --process_id"
            ) from error
    return None


def _known_clusters() -> Iterator[Any]:
    """The kinds of clusters that JAX detects by itself."""
    from jax._src import clusters  # jax.distributed.initialize has no way to ask whether there is a cluster

    for cluster in clusters.ClusterEnv._cluster_types:
        # In Kubernetes a pod that is no part of an indexed job, such as a notebook's, is a single process.
        if cluster.opt_in_only_method or (cluster is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ):
            continue
        yield cluster


def check_single(flag: str) -> None:
    """Raises UserError if this process is one of several of a job, connected or not, which `flag` cannot use."""
    number = count()
    for cluster in _known_clusters() if number == 1 else ():
        with contextlib.suppress(Exception):  # a cluster that cannot be read: see `_detected`
            if cluster.is_env_present():
                number = cluster.get_process_count()
                break
    if number > 1:
        raise UserError(
            f"{flag} uses the devices of one process only, and this is one of {number} processes of a job; start the "
            "command once, in Slurm with srun --ntasks=1"
        )


def count() -> int:
    """The number of processes."""
    import jax

    return jax.process_count() if jax.distributed.is_initialized() else 1  # otherwise devices would be initialized


def index() -> int:
    """The index of this process, from 0."""
    import jax

    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is process 0."""
    return index() == 0


def unique_name(name: str) -> str:
    """A name that no other call returns; all processes make the same calls, and get the same names."""
    return f"{name}/{next(_calls)}"


def barrier(name: str) -> None:
    """Waits until all processes have reached this call."""
    if count() > 1:
        _client().wait_at_barrier(f"llm_jax/{unique_name(name)}", _DAY * 1000)


def connect(mesh: Any) -> None:
    """Connects the processes for collectives over every combination of the axes of a mesh; all call this together.

    On CPU, the first collective of a group of devices connects their processes, which Gloo waits for only 30 seconds.
    Processes on a busy machine compile a training step with larger differences. Collectives of connected groups wait
    for as long as necessary; `rendezvous` detects lost processes.

    Args:
      mesh: a `jax.sharding.Mesh` over the devices of all processes.
    """
    if count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    import jax
    import numpy as np

    # `jax.device_put` of arrays of this process communicates over the second mesh.
    of_processes = jax.sharding.Mesh(np.reshape(jax.devices(), (count(), -1)), ("process", "device"))
    for grid in (mesh, of_processes):
        axes = tuple(axis for axis in grid.axis_names if grid.shape[axis] > 1)
        groups = [group for length in range(len(axes)) for group in itertools.combinations(axes, length + 1)]
        spec = jax.sharding.PartitionSpec(axes)
        ones = jax.make_array_from_callback(
            (grid.size,),
            jax.sharding.NamedSharding(grid, spec),
            lambda _: np.ones(1, np.int32),
        )

        def sums(x: Any, groups: Any = groups) -> list[Any]:
            return [jax.lax.psum(x, group) for group in groups]

        sharded = jax.shard_map(sums, mesh=grid, in_specs=spec, out_specs=spec)
        compiled = jax.jit(sharded).lower(ones).compile()
        barrier("connect")
        jax.block_until_ready(compiled(ones))


def broadcast(value: Any, key: str = "", waiting_for: str = "") -> Any:
    """Returns the `value` of process 0, a JSON value, in all processes.

    Args:
      key: a name that is used once; by default the calls are numbered, so all processes must make the same ones.
      waiting_for: description of the work of process 0, printed by processes that wait for a long time.
    """
    if count() == 1:
        return value
    key = f"llm_jax/{key or unique_name('broadcast')}"
    if is_main():
        _client().key_value_set(key, json.dumps(value))
        return value
    began = time.monotonic()
    while True:
        text = _get(key, 10.0)
        if text is not None:
            return json.loads(text)
        if waiting_for:
            seconds = time.monotonic() - began
            print(f"process {index()}: waiting for process 0 {waiting_for} ({seconds:.0f} s)", file=sys.stderr)


@contextlib.contextmanager
def main_first(doing: str) -> Iterator[None]:
    """Context that process 0 enters first; the others enter it when process 0 has left it.

    If a cache is shared, the others find what process 0 has written; otherwise each process fills its own cache.

    Args:
      doing: what the block does, such as "to read the data".
    """
    if not is_main():
        broadcast(None, waiting_for=doing)
    yield
    if is_main():
        broadcast(None)


def local_copy(tree: Any) -> Any:
    """Returns all arrays of `tree` on the first device of this process; all processes must call this together.

    With one process, returns the tree itself.

    Args:
      tree: arrays with `NamedSharding`s on one mesh.
    """
    if count() == 1:
        return tree
    import jax

    def gather(leaf: Any) -> jax.Array:
        everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(leaf, everywhere).addressable_data(0)

    return jax.tree.map(gather, tree)


def check_equal(values: dict[str, Any], what: str) -> None:
    """Raises UserError unless `values`, a dict of JSON values, are the same in this process and in process 0."""
    values = json.loads(json.dumps(values))
    for key, value in broadcast(values).items():
        if values.get(key) != value:
            local_value = values.get(key)
            raise UserError(
                f"{what} differs between processes: {key} is {local_value!r} here and {value!r} in process 0"
            )
    barrier("equal")  # process 0 waits until all processes have compared


def check_shared(directory: pathlib.Path, flag: str) -> None:
    """Raises UserError unless this process finds in `directory` what process 0 writes there.

    Args:
      flag: of the directory, for the message.
    """
    if count() == 1:
        return
    probe, token = directory / ".shared", secrets.token_hex(8)
    if is_main():
        files.write(probe, token)
    token = broadcast(token)
    until = time.monotonic() + 10.0  # network file systems show a new file a little later
    while not (seen := probe.exists() and probe.read_text() == token) and time.monotonic() < until:
        time.sleep(0.2)
    if not seen:
        raise UserError(
            f"{flag}={directory} on {socket.gethostname()} is another directory than that of process 0; expected a "
            "directory on a file system that all processes share"
        )
    barrier("shared")
    if is_main():
        probe.unlink(missing_ok=True)


class StopAgreement:
    """Stops all processes after the same step if any of them requests it.

    Every process calls the object once after dispatching each step. A process that wants to stop proposes a step a
    little ahead. All processes see the proposal in time, because no process can be more than two steps ahead of
    another: a process dispatches step n + 1 only after it has read the metrics of step n - 1, to which all processes
    have contributed.
    """

    def __init__(self) -> None:
        self._key = f"llm_jax/{unique_name('stop')}"
        self._call = 0

    def __call__(self, wanted: Any) -> Any:
        """Returns the agreed value if this is the last step, otherwise 0.

        Args:
          wanted: a JSON value; a true one asks all processes to stop.
        """
        if count() == 1:
            return wanted
        self._call += 1
        text = _try_get(self._key)
        if text is None and wanted:
            with contextlib.suppress(RuntimeError):  # another process was faster
                _client().key_value_set(self._key, json.dumps([self._call + _STEPS_AHEAD, wanted]))
            text = _try_get(self._key)
        call, value = json.loads(text) if text else (0, 0)
        return value if text and self._call >= call else 0


def _client() -> Any:
    from jax._src import distributed  # JAX has no public interface to what the processes can store

    return distributed.global_state.client


def _get(key: str, seconds: float) -> str | None:
    """The text under a key, waited for; None after `seconds`."""
    try:
        return _client().blocking_key_value_get(key, int(seconds * 1000))
    except RuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _try_get(key: str) -> str | None:
    try:
        return _client().key_value_try_get(key)
    except RuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
