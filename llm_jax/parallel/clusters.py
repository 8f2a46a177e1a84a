"""Job descriptions: batch scripts for Slurm, JobSets for Kubernetes, commands for a Cloud TPU slice.

Everything here is text from options. A job whose processes end with an exit code of `RESUMABLE` is started again, and
the command resumes from its last checkpoint.
"""

import base64
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.errors import UserError
from llm_jax.parallel import rendezvous

PORT = 8476
# SIGTERM (a time limit, a preemption), SIGKILL (a lost machine, no memory), another process that was lost.
RESUMABLE = (143, 137, rendezvous.LOST)
USAGE = 2  # the exit code of invalid input, which a restart does not change


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A job of Slurm.

    Attributes:
      name: the name of the job and of its files.
      nodes, tasks_per_node: processes of the command; JAX gives each task one GPU of its node.
      cpus_per_task, gpus_per_node: reserved cores and GPUs; 0: the default of the cluster.
      time: the time limit, such as "2-00:00:00"; "": the limit of the partition.
      partition: name of the partition; "": the default partition.
      array: 0, or the number of independent copies of the command, which divide the points of a sweep.
      options: additional options of sbatch, such as "--account=lab".
      directory: directory of the script and the logs.
      max_restarts: maximum number of times that the job is requeued after an exit code in `RESUMABLE`.
    """

    name: str
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int = 0
    gpus_per_node: int = 0
    time: str = ""
    partition: str = ""
    array: int = 0
    options: tuple[str, ...] = ()
    directory: str = "slurm"
    max_restarts: int = 20


def slurm_script(job: Slurm, command: Sequence[str]) -> str:
    """The batch script of a job that runs `command` in every task and requeues itself.

    Slurm sends SIGTERM to the tasks two minutes before the time limit; the trainer then saves a checkpoint.
    """
    logs = f"{job.directory}/{job.name}-{'%A_%a' if job.array else '%j'}.log"
    values: dict[str, Any] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "partition": job.partition,
        "array": f"0-{job.array - 1}" if job.array else "",
        "output": logs,
        "open-mode": "append",
        "signal": "TERM@120",
    }
    options = [f"--{name}={value}" for name, value in values.items() if value] + ["--requeue", *job.options]
    for option in options:
        if not option.isprintable() or '"' in option:
            raise UserError(f"{option!r} is not allowed in a batch script")
    options = [f'"{option}"' if " " in option else option for option in options]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    codes = "|".join(map(str, RESUMABLE))
    return (
        "\n".join(lines)
        + f"""

code=0
srun --kill-on-bad-exit=0 {shlex.join(command)} || code=$?
# What was stopped from outside or lost a process resumes from its checkpoint. A job that was cancelled is not RUNNING.
case $code in
  {codes})
    job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
    job=${{job:-$SLURM_JOB_ID}}
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then
      scontrol show job "$job" | grep -q JobState=RUNNING && scontrol requeue "$job"
    fi
    ;;
esac
exit $code
"""
    )


@dataclasses.dataclass(frozen=True)
class JobSet:
    """Connected processes in Kubernetes, as a JobSet.

    Attributes:
      name: the name of the JobSet, a DNS label.
      image: an image with Python and llm_jax.
      processes: pods of each of `slices`.
      slices: groups of pods, each on one TPU slice or one group of machines.
      resources: of a pod, such as {"google.com/tpu": "4"}.
      node_selector: labels of the nodes, such as {"cloud.google.com/gke-tpu-topology": "4x4"}.
      volumes: {name of a PersistentVolumeClaim: the path at which pods see it}; the run directory is in one of them.
      max_restarts: maximum number of times that all pods are restarted after a failure.
      grace_seconds: seconds between SIGTERM and SIGKILL, for the last checkpoint.
    """

    name: str
    image: str
    processes: int = 1
    slices: int = 1
    resources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    node_selector: Mapping[str, str] = dataclasses.field(default_factory=dict)
    volumes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_restarts: int = 20
    grace_seconds: int = 300


def jobset(job: JobSet, command: Sequence[str], connected: bool, archive: str = "") -> dict[str, Any]:
    """The manifest of a JobSet (jobset.x-k8s.io/v1alpha2) that runs `command` in every pod.

    Args:
      job: the options.
      command: such as ("python", "-m", "llm_jax.train", ...).
      connected: whether the command accepts `--coordinator_address` and related flags; otherwise the pods are
        independent.
      archive: base64 of a .tar.gz that is unpacked in the working directory of the image first; "": none.
    """
    line = f"exec {shlex.join(command)}"
    if archive:
        line = f"echo {archive} | base64 -d | tar -xz && {line}"
    if connected and job.processes * job.slices > 1:
        line += (
            f" --coordinator_address={job.name}-workers-0-0.{job.name}:{PORT} --coordinator_bind_address=0.0.0.0:{PORT}"
            f" --num_processes={job.processes * job.slices}"
            f" --process_id=$((JOB_INDEX * {job.processes} + JOB_COMPLETION_INDEX)) --start_timeout=1800"
        )
    index = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}
    container = {
        "name": "worker",
        "image": job.image,
        "command": ["bash", "-c", line],
        "ports": [{"containerPort": PORT}],
        "env": [{"name": "JOB_INDEX", "valueFrom": index}],
        "resources": {"limits": dict(job.resources), "requests": dict(job.resources)} if job.resources else {},
        "volumeMounts": [{"name": f"volume-{i}", "mountPath": path} for i, path in enumerate(job.volumes.values())],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": dict(job.node_selector),
        "containers": [container],
        "volumes": [
            {"name": f"volume-{i}", "persistentVolumeClaim": {"claimName": claim}}
            for i, claim in enumerate(job.volumes)
        ],
    }
    invalid = {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [USAGE]}}
    workers = {
        "parallelism": job.processes,
        "completions": job.processes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [invalid]},
        "template": {"spec": pod},
    }
    # Invalid input ends the JobSet; after every other failure all pods start again and the run resumes.
    rules = [{"name": "invalid-input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name},
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": rules},
            "replicatedJobs": [{"name": "workers", "replicas": job.slices, "template": {"spec": workers}}],
        },
    }


@dataclasses.dataclass(frozen=True)
class TPU:
    """An existing Cloud TPU slice; if `zone` or `project` is "", gcloud's setting is used."""

    name: str
    zone: str = ""
    project: str = ""


def tpu_commands(job: TPU, archive: str, command: Sequence[str]) -> list[list[str]]:
    """The gcloud commands that copy the repository to all workers of a slice, install it, and run `command` there.

    Args:
      job: the slice.
      archive: a .tar.gz of the repository on this machine.
      command: such as ("-m", "llm_jax.train", ...), for the interpreter of the environment on the workers.
    """
    where = [f"--{name}={value}" for name, value in (("zone", job.zone), ("project", job.project)) if value]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    script = f"""set -e
mkdir -p llm_jax && tar -xzf llm_jax.tar.gz -C llm_jax && cd llm_jax
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet -r requirements.txt 'jax[tpu]'
exec .venv/bin/python {shlex.join(command)}
"""
    # encoded, because several shells parse the text
    text = base64.b64encode(script.encode()).decode()
    return [
        [*vm, "scp", archive, f"{job.name}:llm_jax.tar.gz", "--worker=all", *where],
        [*vm, "ssh", job.name, "--worker=all", *where, f"--command=echo {text} | base64 -d | bash"],
    ]
