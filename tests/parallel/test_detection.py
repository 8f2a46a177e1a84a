"""Which processes a command belongs to, from its flags and from the environment of a cluster."""

import socket
from unittest import mock

import jax
import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import launcher, processes, rendezvous

VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
SLURM = dict(zip(VARIABLES, ("4100", "node[003-004,7]", "4", "2", "0"), strict=True))
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
CASES = {
    "nothing": ({}, None),
    "slurm": (SLURM, ("node003:61444", 4, 2, [0])),
    "one task of slurm": (SLURM | {"SLURM_NTASKS": "1"}, None),
    "a batch script without srun": ({"SLURM_JOB_ID": "4100", "SLURM_NTASKS": "4"}, None),
    "open mpi": (OPEN_MPI, ("10.96.0.1:62624", 2, 1, [1])),
    "another port": (SLURM | {"JAX_COORDINATOR_PORT": "77"}, ("node003:77", 4, 2, [0])),
    "a notebook in kubernetes": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
}


@pytest.fixture
def environment(monkeypatch):
    for name in (*VARIABLES, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_a_cluster_is_detected(environment, case):
    variables, expected = CASES[case]
    for name, value in variables.items():
        environment.setenv(name, value)
    assert processes._detected(1.0) == expected


def test_a_cluster_that_cannot_be_read_is_one_line(environment):
    for name, value in (SLURM | {"SLURM_NTASKS": "four"}).items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=r"in a cluster \(Slurm\).*'four'.*; give --coordinator_address"):
        processes._detected(1.0)


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_of_one_process_is_refused_in_a_job_of_several(environment, command, trained, case):
    variables, expected = CASES[case]
    for name, value in variables.items():
        environment.setenv(name, value)
    if expected is None:
        return processes.check_single("--mesh=data=-1")
    flags = (f"--checkpoint={trained}", "--prompt=a", "--mesh=data=-1")
    (line,) = command("generate", *flags, code=2).stderr.splitlines()
    assert f"--mesh=data=-1 uses the devices of one process only, and this is one of {expected[1]} processes" in line
    return None


def test_the_launcher_refuses_commands_of_one_process(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launcher", "2", "llm_jax.generate", "--prompt=a"])
    with pytest.raises(SystemExit, match="2"):
        launcher.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: llm_jax.generate runs in one process; expected llm_jax.train (")


def test_flags():
    assert processes._explicit("host:1", 2, 1) == ("host:1", 2, 1, None)
    assert processes._explicit("host:1", 1, 0) is None and processes._explicit("", 1, -1) is None
    for flags in (("", 2, 0), ("host:1", 2, 2), ("host:1", 0, 0), ("host:1", 2, -1), ("host:1", -1, -1)):
        with pytest.raises(UserError, match="expected all three: HOST:PORT of process 0"):
            processes._explicit(*flags)
    for address in ("host", "host:", "host:0", "host:70000", "host:x"):
        with pytest.raises(UserError, match="expected HOST:PORT"), processes.connected(address, 2, 1, timeout=0.1):
            pass


def test_one_process_needs_no_others(environment):
    with processes.connected():
        assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
        assert processes.broadcast({"a": 1}) == {"a": 1}
        processes.barrier("here")
        agree = processes.StopAgreement()
        assert [agree(0), agree(15)] == [0, 15]


@pytest.mark.parametrize(
    ("variables", "flags", "bind", "expected"),
    [
        ({}, ("10.0.0.1:77", 2, 0), "", "10.0.0.1:77"),
        ({}, ("host:77", 2, 0), "127.0.0.1:78", "127.0.0.1:78"),
        (SLURM, (), "127.0.0.1:78", "127.0.0.1:78"),
        (SLURM, (), "", "[::]:61444"),  # the name of a detected machine may be one of several addresses
    ],
)
def test_the_coordinator_listens_where_it_is_told(environment, variables, flags, bind, expected):
    for name, value in variables.items():
        environment.setenv(name, value)
    listened = []

    class Stopped(Exception):
        pass

    def initialize(*arguments, coordinator_bind_address, **options):
        listened.append(coordinator_bind_address)
        raise Stopped

    environment.setattr(rendezvous, "connect", lambda address, bind, *rest: listened.append(bind) or mock.Mock())
    environment.setattr(processes.time, "sleep", lambda seconds: None)
    environment.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(Stopped), processes.connected(*flags, coordinator_bind_address=bind):
        pass
    assert listened == [expected.removeprefix("[::]"), expected]


def test_the_meeting_is_at_the_named_interface():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with rendezvous._listen(f"127.0.0.1:{port}") as server:
        assert server.getsockname() == ("127.0.0.1", port)
