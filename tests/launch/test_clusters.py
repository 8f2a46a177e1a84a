"""Batch scripts, manifests and commands for clusters; tests/launch/test_slurm.py has a real Slurm."""

import base64
import gzip
import io
import os
import pathlib
import shlex
import subprocess
import tarfile

import pytest
import yaml

from llm_jax import cli, launch
from llm_jax.errors import UserError
from llm_jax.parallel import clusters

TRAIN = ("--", "train", "--config=tests/tiny.py", "--workdir=runs/x")


def program(directory: pathlib.Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def outcome(tmp_path, code: int, state: str = "RUNNING", restarts: str = "") -> tuple[int, str]:
    """(exit code, jobs requeued) of the batch script in a Slurm whose srun ends with `code`."""
    program(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/arguments; exit {code}')
    program(tmp_path, "scontrol", f'[ "$1" = show ] && echo "JobState={state}" || echo "$@" >> {tmp_path}/requeued')
    path = tmp_path / "job.sh"
    path.write_text(clusters.slurm_script(clusters.Slurm("x", max_restarts=3), ["python", "-m", "a b", "--c=$d"]))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    done = subprocess.run(["bash", str(path)], env=environment, check=False)
    requeued = tmp_path / "requeued"
    return done.returncode, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize("code", [143, 137, 75])
def test_a_job_that_was_stopped_from_outside_is_queued_again(tmp_path, code):
    assert outcome(tmp_path, code) == (code, "requeue 7\n")
    assert (tmp_path / "arguments").read_text().splitlines()[1:] == ["python", "-m", "a b", "--c=$d"]


@pytest.mark.parametrize(
    ("code", "state", "restarts"),
    [(0, "RUNNING", ""), (2, "RUNNING", ""), (1, "RUNNING", ""), (143, "CANCELLED", ""), (143, "RUNNING", "3")],
)
def test_other_jobs_are_not_queued_again(tmp_path, code, state, restarts):
    assert outcome(tmp_path, code, state, restarts) == (code, "")


def test_a_script_reserves_what_was_asked_for(tmp_path, capsys):
    flags = ["--nodes=2", "--gpus_per_node=4", "--tasks_per_node=4", "--time=1:00", "--sbatch=--account=lab"]
    assert cli.call(launch.COMMAND, ["slurm", "--nosubmit", f"--logs={tmp_path}", *flags, *TRAIN]) == 0
    lines = (tmp_path / "llm-jax.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    expected = ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00", "--requeue", "--account=lab")
    assert set(expected) < set(options) and not any(option.endswith("=0") for option in options)
    assert any(line.endswith("-m llm_jax.train --config=tests/tiny.py --workdir=runs/x || code=$?") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slurm"], "the command after -- is nothing; expected a command and flags"),
        (["slurm", "--", "trian"], "the command after -- is 'trian'"),
        (["slurm", "--", "train", "--workdir=x", "--config.model.widht=3"], "did you mean 'model.width'"),
        (["slurm", "--", "train", "--workdir=x", "--config.model.width=33"], "width"),
        (["slurm", "--array=2", "--nodes=2", *TRAIN], "--array starts copies of one process each"),
        (["k8s", "--image=i", "--name=X_Y", *TRAIN], "--name=X_Y: expected at most 40 lower-case letters"),
        (["k8s", "--image=i", "--volume=data", *TRAIN], "--volume=data; expected NAME=VALUE"),
        (["k8s", *TRAIN], "image"),
    ],
)
def test_what_is_invalid_is_refused_before_it_is_submitted(capsys, arguments, message):
    assert cli.call(launch.COMMAND, arguments) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_slurm_is_told_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.call(launch.COMMAND, ["slurm", f"--logs={tmp_path}", *TRAIN]) == 2
    assert "sbatch is not installed on this machine; --nosubmit writes the script only" in capsys.readouterr().err


def test_a_jobset_numbers_its_processes_over_slices(tmp_path, capsys):
    flags = ["--image=i", "--processes=2", "--slices=3", "--volume=claim=/data", "--resource=google.com/tpu=4"]
    assert cli.call(launch.COMMAND, ["k8s", "--name=run", *flags, *TRAIN]) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    (workers,) = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (workers["replicas"], job["parallelism"], job["completions"]) == (3, 2, 2)
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    shell, option, line = container["command"]
    environment = os.environ | {"JOB_INDEX": "2", "JOB_COMPLETION_INDEX": "1"}
    line = line.replace("exec ", "echo ", 1)
    printed = subprocess.run([shell, option, line], env=environment, capture_output=True, cwd=tmp_path)
    arguments = printed.stdout.decode().split()
    assert {"--num_processes=6", "--process_id=5", "--coordinator_address=run-workers-0-0.run:8476"} < set(arguments)
    assert (tmp_path / "tests" / "tiny.py").read_bytes() == pathlib.Path("tests/tiny.py").read_bytes()


def test_commands_without_a_coordinator_get_no_flags_for_one(capsys):
    sweep = ["--", "sweep", "--config=tests/tiny.py", "--grid=train.seed=0..1", "--output=/data/x"]
    assert cli.call(launch.COMMAND, ["k8s", "--image=i", "--processes=2", *sweep]) == 0
    assert "coordinator" not in capsys.readouterr().out


def test_a_tpu_slice_gets_the_repository_and_the_command(tmp_path, capsys, monkeypatch):
    """gcloud is replaced by a program that copies, and runs the command where a worker would."""
    worker = tmp_path / "worker"
    (worker / "llm_jax" / ".venv" / "bin").mkdir(parents=True)
    program(worker / "llm_jax" / ".venv" / "bin", "python", f'echo "$PWD $@" >> {tmp_path}/ran')
    program(
        tmp_path,
        "gcloud",
        f'echo "$@" >> {tmp_path}/calls; cd {worker}\n'
        'case " $* " in *" scp "*) cp "$5" llm_jax.tar.gz ;; *) last="${@: -1}"; eval "${last#--command=}" ;; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    assert cli.call(launch.COMMAND, ["tpu", "--name=slice", "--zone=z", *TRAIN]) == 0
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--worker=all") == 2 and calls.count("--zone=z") == 2
    with tarfile.open(worker / "llm_jax.tar.gz") as archive:
        expected = {"llm_jax/train.py", "configs/default.py", "requirements.txt", "tests/tiny.py"}
        assert expected < set(archive.getnames())
    install, run = (tmp_path / "ran").read_text().splitlines()
    assert "pip install" in install and "jax[tpu]" in install
    assert shlex.split(run) == [str(worker / "llm_jax"), "-m", "llm_jax.train", *TRAIN[2:]]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A user's directory with a configuration, in which a part of the user's own is named, and the current one."""
    (tmp_path / "here" / "parts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    part = pathlib.Path("parts/mine.py")
    part.write_text("import optax\n\n\ndef plain(config):\n    return optax.scale(1.0)\n")
    text = "[optim]\nkind = 'parts/mine.py:plain'\n[model]\nvocab_size = 264\n"
    pathlib.Path("small.toml").write_text(text)
    (tmp_path / "away.toml").write_text(text)
    return tmp_path


def own_files(*arguments):
    """{name in the archive: contents} of the files that a command takes along."""
    name, *flags = arguments
    files = launch._own_files("k8s", arguments, cli.parse(launch._command(name), flags))
    archive = io.BytesIO(gzip.decompress(base64.b64decode(launch._archive(files))))
    with tarfile.open(fileobj=archive) as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar}


def test_files_of_ones_own_travel_with_the_command(directory, capsys):
    assert own_files("train", "--config=small.toml", "--workdir=/data/x").keys() == {"small.toml", "parts/mine.py"}
    assert capsys.readouterr().err == "note: launch k8s sends parts/mine.py, small.toml with the command\n"
    assert not launch._own_files("tpu", ["train", "--config=default"], None)
    assert own_files(
        "sweep", "--output=/data/x", "--grid=optim.kind=adamw,parts.mine:plain; train.seed=0,1"
    ).keys() == {"parts/mine.py"}


def test_files_travel_under_the_names_of_the_command(directory):
    pathlib.Path("link.toml").symlink_to(directory / "away.toml")
    files = own_files("train", "--config=./link.toml", "--workdir=/data/x")
    assert files.keys() == {"link.toml", "parts/mine.py"} and files["link.toml"].startswith("[optim]")
    pathlib.Path("second.toml").symlink_to("small.toml")
    assert "second.toml" in own_files("train", "--config=second.toml", "--workdir=/data/x")


def test_modules_that_a_configuration_imports_travel_with_it(directory):
    pathlib.Path("tools").mkdir()
    texts = {
        "tools/__init__.py": "",
        "tools/sizes.py": "from .numbers import WIDTH\n",
        "tools/numbers.py": "import json\nWIDTH = 64\n",
        "helper.py": "from tools import sizes\n",
        "unused.py": "",
        "mine.py": "import helper\n\n\ndef get_config():\n    return {'model': {'width': helper.sizes.WIDTH}}\n",
    }
    for name, text in texts.items():
        pathlib.Path(name).write_text(text)
    assert set(launch._own_files("tpu", ["train", "--config=mine.py"], None)) == texts.keys() - {"unused.py"}


def test_a_text_that_looks_like_a_part_is_not_sent(directory, capsys):
    pathlib.Path("helper.py").write_text("password = 'x'\n")
    arguments = ["generate", "--checkpoint=/data/x", "--prompt=helper:Hello"]
    command = launch._command("generate")
    assert not launch._own_files("k8s", arguments, cli.parse(command, arguments[1:]))
    assert not capsys.readouterr().err
    arguments.append("--filter=helper:Hello(a=1)")
    assert list(launch._own_files("k8s", arguments, cli.parse(command, arguments[1:]))) == ["helper.py"]


@pytest.mark.parametrize("kind", ["elsewhere:plain", "elsewhere.py:plain"])
def test_what_is_found_through_pythonpath_or_dots_is_refused(directory, monkeypatch, kind):
    away = directory / "away"
    away.mkdir()
    (away / "elsewhere.py").write_text(pathlib.Path("parts/mine.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(away))
    monkeypatch.syspath_prepend(away)
    with pytest.raises(UserError, match=r"elsewhere.*: launch k8s copies .* found through PYTHONPATH as .*: copy the"):
        own_files("train", f"--config.optim.kind={kind}", "--workdir=/data/x")
    pathlib.Path("mine.py").write_text("import elsewhere\n")
    with pytest.raises(UserError, match=r"mine.py imports elsewhere: launch tpu copies .* through PYTHONPATH"):
        launch._own_files("tpu", ["train", "--config=mine.py"], None)
    with pytest.raises(UserError, match=r"parts/../small.toml: launch tpu copies .*; name it without '..'"):
        launch._own_files("tpu", ["train", "--config=parts/../small.toml"], None)


@pytest.mark.parametrize("flags", [["tpu", "--nosubmit"], ["k8s", "--image=i"]])
def test_files_elsewhere_are_refused_unless_the_job_sees_them(directory, capsys, flags):
    away = directory / "away.toml"
    command = ["--", "train", f"--config={away}", "--workdir=/data/x"]
    assert cli.call(launch.COMMAND, [*flags, *command]) == 2
    assert f"{away}: launch {flags[0]} copies files below the current directory only" in capsys.readouterr().err
    if flags[0] == "k8s":
        assert cli.call(launch.COMMAND, [*flags, f"--volume=claim={directory}", *command]) == 0


@pytest.fixture
def jobset():
    job = clusters.JobSet("x", "image", 2, 2, {"google.com/tpu": "4"}, {"a": "b"}, {"claim": "/data"})
    return clusters.jobset(job, ["python", "-m", "llm_jax.train"], True)


@pytest.mark.live
def test_a_jobset_has_the_fields_and_types_of_kubeflows_models(jobset):
    import pydantic
    from kubeflow_trainer_api.models import jobset_v1alpha2_job_set

    model = jobset_v1alpha2_job_set.JobsetV1alpha2JobSet
    assert _contains(model.from_dict(jobset).to_dict(), jobset)
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["completionsMode"] = "Indexed"
    assert not _contains(model.from_dict(jobset).to_dict(), jobset)
    spec["completions"] = "2"
    with pytest.raises(pydantic.ValidationError, match="completions"):
        model.from_dict(jobset)


def _contains(parsed, manifest):
    """Whether no part of the manifest was dropped; a model adds default values, and drops unknown fields."""
    if isinstance(manifest, dict):
        return all(key in parsed and _contains(parsed[key], value) for key, value in manifest.items())
    if isinstance(manifest, list):
        return len(parsed) == len(manifest) and all(map(_contains, parsed, manifest))
    return parsed == manifest


@pytest.mark.live
def test_a_jobset_fits_the_schema_of_jobsets(jobset):
    """JOBSET_CRD is the file jobset.x-k8s.io_jobsets.yaml of the JobSet project."""
    import jsonschema

    path = os.environ.get("JOBSET_CRD")
    if not path:
        pytest.skip("JOBSET_CRD does not name the schema of JobSets")
    versions = yaml.safe_load(pathlib.Path(path).read_text())["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1alpha2")
    jsonschema.validate(jobset, _closed(schema))
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, _closed(schema))


def _closed(schema):
    """The schema without room for unknown properties, which a server would drop."""
    if isinstance(schema, dict):
        closed = {key: _closed(value) for key, value in schema.items()}
        if (
            "properties" in schema
            and "additionalProperties" not in schema
            and "x-kubernetes-preserve-unknown-fields" not in schema
        ):
            closed["additionalProperties"] = False
        return closed
    return [_closed(value) for value in schema] if isinstance(schema, list) else schema
