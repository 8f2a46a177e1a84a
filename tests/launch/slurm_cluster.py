"""A cluster of Slurm on this machine: munged, slurmctld and one slurmd over loopback, with files in a directory."""

import contextlib
import os
import pathlib
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={port_of_node}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
KillWait=30
JobRequeue=1
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]


@contextlib.contextmanager
def running(directory: pathlib.Path, port: int) -> Iterator[dict[str, str]]:
    """Runs a cluster for the block; yields the environment in which sbatch and its kin use it. Needs root."""
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    host = os.uname().nodename.partition(".")[0]
    text = _CONFIGURATION.format(directory=directory, host=host, port=port, port_of_node=port + 1)
    (directory / "slurm.conf").write_text(text)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _PATH}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={directory / 'munge.socket'}"]
    munge += [f"--{name}-file={directory / name}" for name in ("pid", "log", "seed")]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with (directory / f"{command[0]}.out").open("w") as out:
                daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1.0)
        _wait_until_idle(environment)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait_until_idle(environment: dict[str, str]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False)
        if done.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"the node of Slurm did not become idle: {done.stdout} {done.stderr}")
