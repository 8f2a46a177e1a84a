"""Starts a command on a cluster: `python -m llm_jax.launch slurm --nodes=2 -- train --config=default --workdir=runs/x`.

The arguments after `--` are a command and its flags, as on a local machine; they are validated before anything is
submitted. `slurm` writes a batch script and submits it, `k8s` writes the manifest of a JobSet, and `tpu` runs a command
on all workers of a Cloud TPU slice.
"""

import ast
import base64
import gzip
import importlib
import importlib.machinery
import io
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llm_jax import cli, configuration, extensions, files
from llm_jax.__main__ import COMMANDS as NAMES
from llm_jax.errors import UserError
from llm_jax.parallel import clusters

ROOT = pathlib.Path(__file__).resolve().parent.parent
_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"  # of a job
_MAX_ARCHIVE = 100_000  # maximum encoded bytes of embedded files; Linux limits an argument to 131,072 bytes


def _flags(processes: bool = True) -> cli.Flags:
    flags = cli.Flags()
    flags.multi_string("command", None, "the command and its flags; written after --")
    flags.string("name", "llm-jax", "name of the job: lower-case letters, digits and hyphens")
    if processes:
        meaning = "maximum number of restarts after the job was preempted or lost a process"
        flags.integer("max_restarts", 20, meaning, lower_bound=0)
    return flags


SLURM = _flags()
SLURM.integer("nodes", 1, "number of machines", lower_bound=1)
SLURM.integer("tasks_per_node", 1, "number of processes per machine; with GPUs, one per GPU", lower_bound=1)
SLURM.integer("cpus_per_task", 0, "number of CPU cores per process; 0: the default of the cluster")
SLURM.integer("gpus_per_node", 0, "number of GPUs per machine")
SLURM.string("time", "", "time limit such as 2-00:00:00; the run saves two minutes before the limit and is requeued")
SLURM.string("partition", "", "partition; default: the default partition of the cluster")
SLURM.integer("array", 0, "number of copies of the command, which divide the points of a sweep")
SLURM.multi_string("sbatch", [], "additional option of sbatch, such as --sbatch=--account=lab; may be repeated")
SLURM.string("logs", "slurm", "directory of the script and the logs, shared by all machines")
SLURM.boolean("submit", True, "submit the script; --nosubmit only writes it")

K8S = _flags()
K8S.string("image", None, "image with Python and llm_jax", required=True)
K8S.integer("processes", 1, "number of pods per slice", lower_bound=1)
K8S.integer("slices", 1, "number of TPU slices, each with its own group of pods", lower_bound=1)
K8S.multi_string("resource", [], "resource of each pod, such as --resource=google.com/tpu=4; may be repeated")
K8S.multi_string("node_selector", [], "label of the nodes, such as --node_selector=KEY=VALUE; may be repeated")
K8S.multi_string("volume", [], "volume for the run directory, such as --volume=CLAIM=/data; may be repeated")
K8S.string("output", "", "manifest file to write; default: standard output")

TPU = _flags(processes=False)
TPU.string("zone", "", "zone of the slice; default: the zone configured in gcloud")
TPU.string("project", "", "project of the slice; default: the project configured in gcloud")
TPU.boolean("submit", True, "run the gcloud commands; --nosubmit only prints them")


def slurm(f: cli.Flags) -> int:
    """Writes a batch script for Slurm and submits it: `python -m llm_jax.launch slurm --nodes=2 -- train ...`."""
    command, _ = _checked(f)
    if f.array and f.nodes * f.tasks_per_node > 1:
        raise UserError("--array starts copies of one process each; leave out --nodes and --tasks_per_node")
    if f.array and f.command[0] != "sweep":
        raise UserError(f"--array divides the points of a sweep; every copy of {f.command[0]} would do the same work")
    if f.gpus_per_node not in (0, f.tasks_per_node):
        raise UserError(
            f"--gpus_per_node={f.gpus_per_node} --tasks_per_node={f.tasks_per_node}: each process uses one GPU; give "
            "both the same number"
        )
    _refuse_copies(f.command, f.nodes * f.tasks_per_node)
    job = clusters.Slurm(
        name=_name(f),
        nodes=f.nodes,
        tasks_per_node=f.tasks_per_node,
        cpus_per_task=f.cpus_per_task,
        gpus_per_node=f.gpus_per_node,
        time=f.time,
        partition=f.partition,
        array=f.array,
        options=tuple(f.sbatch),
        directory=str(pathlib.Path(f.logs).expanduser().absolute()),
        max_restarts=f.max_restarts,
    )
    path = pathlib.Path(job.directory) / f"{job.name}.sh"
    files.make_directory(path.parent)
    files.write(path, clusters.slurm_script(job, [sys.executable, *command]))
    print(f"wrote {path}")
    return _run(["sbatch", str(path)], "--nosubmit writes the script only") if f.submit else 0


def k8s(f: cli.Flags) -> None:
    """Writes a JobSet for Kubernetes: `python -m llm_jax.launch k8s --image=IMAGE --output=job.yaml -- train ...`."""
    command, values = _checked(f)
    _refuse_copies(f.command, f.processes * f.slices)
    volumes = _pairs("volume", f.volume)
    archive = _archive(_own_files("k8s", f.command, values, tuple(volumes.values())))
    if len(archive) > _MAX_ARCHIVE:
        raise UserError(
            f"your files take {len(archive):,} bytes in the manifest; expected at most {_MAX_ARCHIVE:,}; copy them to "
            "a volume and pass their paths in the volume"
        )
    job = clusters.JobSet(
        name=_name(f),
        image=f.image,
        processes=f.processes,
        slices=f.slices,
        resources=_pairs("resource", f.resource),
        node_selector=_pairs("node_selector", f.node_selector),
        volumes=volumes,
        max_restarts=f.max_restarts,
    )
    import yaml

    manifest = clusters.jobset(job, ["python", *command], _is_connected(f.command), archive)
    text = yaml.safe_dump(manifest, sort_keys=False, width=1000)
    if not f.output:
        print(text, end="")
        return
    files.write(pathlib.Path(f.output).expanduser(), text)
    print(f"wrote {f.output}; submit it with: kubectl apply -f {f.output}")


def tpu(f: cli.Flags) -> int:
    """Runs a command on a Cloud TPU slice: `python -m llm_jax.launch tpu --name=NAME --zone=ZONE -- train ...`."""
    command, values = _checked(f)
    user_files = _own_files("tpu", f.command, values)
    if not (ROOT / "requirements.txt").exists():
        raise UserError("launch tpu copies the repository to the workers; run it from a clone of the repository")
    archive = files.cache_directory() / "launch" / "llm_jax.tar.gz"
    commands = clusters.tpu_commands(clusters.TPU(_name(f), f.zone, f.project), str(archive), command)
    if not f.submit:
        for line in commands:
            print(shlex.join(line))
        return 0
    files.make_directory(archive.parent)
    with tarfile.open(archive, "w:gz") as tar:
        for path in ("llm_jax", "configs", "experiments", "requirements.txt"):
            tar.add(ROOT / path, path, filter=lambda member: None if "__pycache__" in member.name else member)
        for name, file in user_files.items():
            tar.add(file, name)
    for line in commands:
        if code := _run(line, "--nosubmit prints the commands"):
            return code
    return 0


def _command(name: str) -> cli.Commands:
    return importlib.import_module(f"llm_jax.{name}").COMMAND


def _is_connected(arguments: Sequence[str]) -> bool:
    """Whether a command can run as several connected processes."""
    command, _ = cli.select_subcommand(_command(arguments[0]), arguments[1:])
    return "coordinator_address" in command.flags


def _refuse_copies(arguments: Sequence[str], processes: int) -> None:
    """Raises UserError if several processes would repeat the same work; processes of a sweep divide its points."""
    if processes > 1 and arguments[0] != "sweep" and not _is_connected(arguments):
        raise UserError(f"{arguments[0]} runs in one process; {processes} would do the same work")


def _checked(f: cli.Flags) -> tuple[list[str], Any]:
    """Returns the interpreter's arguments for the command after `--`, and its validated flags and options."""
    arguments = f.command or []
    if not arguments or arguments[0] not in NAMES or arguments[0] == "launch":
        given = f"'{arguments[0]}'" if arguments else "nothing"
        raise UserError(
            f"the command after -- is {given}; expected a command and flags, such as -- train --workdir=runs/x"
        )
    name, *rest = arguments
    values = cli.parse(_command(name), rest)
    if name == "train":
        from llm_jax.training import checks

        files.check_local(values.workdir)
        checks.check(values.config)  # devices and checkpoints of the cluster are not available on this machine
    return ["-m", f"llm_jax.{name}", *rest], values


def _own_files(
    cluster: str, arguments: Sequence[str], values: Any, mounted: tuple[str, ...] = ()
) -> dict[str, pathlib.Path]:
    """Returns {relative path: file} of the user's files that a command needs to start.

    These are the file of `--config` or `--points`, custom parts (`extensions`), and the modules below the current
    directory that these files import. Prints their names on stderr.

    Args:
      cluster: name for messages.
      arguments: arguments of the command, whose flags are `values`.
      mounted: directories that are mounted on the machines of the job; their files are not copied.

    Raises:
      UserError: a file is not below the current directory, is named by an absolute path, or is found through
        PYTHONPATH.
    """
    rule = f"launch {cluster} copies files below the current directory only, which the command names by relative paths"
    user_files: dict[str, pathlib.Path] = {}
    pending = [*_named_files(arguments, values), *_part_files(_parts(values), rule)]
    done: set[str] = set()
    while pending:
        name = str(pathlib.PurePath(pending.pop()))
        path = pathlib.Path(name).expanduser()
        if name in done or path.resolve().is_relative_to(ROOT / "llm_jax"):
            continue
        done.add(name)
        if ".." in path.parts:
            raise UserError(f"{name}: {rule}; name it without '..'")
        if not any(pathlib.PurePath(name).is_relative_to(directory) for directory in mounted):
            if path.is_absolute():
                raise UserError(f"{name}: {rule}; copy the file there")
            user_files[name] = path.resolve()
        if path.suffix == ".py":
            for module in _imported(name, path):
                pending += _module_files(module, f"{name} imports", rule)
    if user_files:
        print(f"note: launch {cluster} sends {', '.join(sorted(user_files))} with the command", file=sys.stderr)
    return user_files


def _named_files(arguments: Sequence[str], values: Any) -> Iterator[str]:
    """The files of --config (for a run, its config.json) and --points, as they are named on the command line."""
    for flag, following in itertools.pairwise([*arguments, ""]):
        if match := re.fullmatch(r"--?(?:config|points)(?:=(.*))?", flag, re.DOTALL):
            name = following if match[1] is None else match[1]
            for candidate in (name, f"{name}/config.json"):  # a file, or a run
                if pathlib.PurePath(candidate).suffix and pathlib.Path(candidate).expanduser().is_file():
                    yield candidate


def _parts(values: Any) -> Iterator[str]:
    """FILE of the custom parts in the configuration, in a sweep and in the flags."""
    flags = {} if values is None else values.flag_values_dict()
    config = flags.get("config")
    texts = [] if config is None else list(configuration.flat(config).items())
    for grid in (flags.get("grid"), flags.get("search")):
        if isinstance(grid, str):
            clauses = (clause.partition("=") for clause in re.split("[;&]", grid))
            texts += [(key.strip(), part) for key, _, text in clauses for part in re.findall(r"[^\s:,()]+:\w+", text)]
    if points := flags.get("points"):
        from llm_jax.research import grid as grid_lib

        texts += [item for overrides in grid_lib.read_file(points) for item in overrides.items()]
    values = [value for key, value in texts if key in extensions.KEYS]
    values += [flags.get(flag) for flag in extensions.FLAGS]
    values += [extensions.split_rule(text) or "" for text in flags.get("rule") or ()]
    yield from filter(None, map(extensions.module_name, extensions.specifications(values)))


def _part_files(names: Iterable[str], rule: str) -> Iterator[str]:
    """The files of custom parts, relative to the current directory or absolute, without installed packages."""
    for name in names:
        relative, path = extensions.relative_path(name), extensions.find_file(name)
        if path is None:  # an installed package, or a part defined in a notebook
            yield from _module_files(name, "the module", rule)
        elif pathlib.Path(relative).expanduser().is_file():
            yield relative
        elif not any(path.is_relative_to(sysconfig.get_path(n)) for n in ("stdlib", "purelib", "platlib")):
            raise UserError(f"{name}: {rule}; it was found through PYTHONPATH as {path}: copy the file there")


def _imported(name: str, path: pathlib.Path) -> Iterator[str]:
    """The dotted names that a Python file imports; the last part may be a module or an attribute of a module."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{name}: not a Python file ({error})") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not (node.level and path.is_absolute()):  # a file in a volume
            package = pathlib.PurePath(name).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (".".join(filter(None, (module, alias.name))) for alias in node.names)


def _module_files(module: str, context: str, rule: str) -> Iterator[str]:
    """The files below the current directory that are executed when a module is imported, without installed modules.

    Raises:
      UserError: the module is found through PYTHONPATH.
    """
    parts = module.split(".")
    bases = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    if pathlib.Path(f"{parts[0]}.py").is_file() or pathlib.Path(parts[0]).is_dir():
        candidates = (candidate for base in bases for candidate in (f"{base}/__init__.py", f"{base}.py"))
        yield from (candidate for candidate in candidates if pathlib.Path(candidate).is_file())
        return
    directories = [directory for directory in os.environ.get("PYTHONPATH", "").split(os.pathsep) if directory]
    spec = importlib.machinery.PathFinder.find_spec(parts[0], directories)
    locations = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    path = pathlib.Path(locations[0]).resolve() if locations else ROOT / "llm_jax"
    if not (path.is_relative_to(ROOT / "llm_jax") or {"site-packages", "dist-packages"} & set(path.parts)):
        raise UserError(f"{context} {module}: {rule}; it was found through PYTHONPATH as {path}: copy it there")


def _archive(user_files: Mapping[str, pathlib.Path]) -> str:
    """Files as a compressed tar archive in base64, equal for equal contents; "" without files."""
    if not user_files:
        return ""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, path in sorted(user_files.items()):
            member = tarfile.TarInfo(name)
            member.size = path.stat().st_size
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    return base64.b64encode(gzip.compress(buffer.getvalue(), mtime=0)).decode()


def _name(f: cli.Flags) -> str:
    if not re.fullmatch(_NAME, f.name):
        raise UserError(f"--name={f.name}: expected at most 40 lower-case letters, digits and hyphens, a letter first")
    return f.name


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if not all(text.rpartition("=")[::2]):
            raise UserError(f"--{flag}={text}; expected NAME=VALUE")
    return {name: value for name, _, value in (text.rpartition("=") for text in texts)}


def _run(command: list[str], alternative: str) -> int:
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} is not installed on this machine; {alternative}")
    return subprocess.run(command, check=False).returncode


COMMAND = {
    "slurm": cli.Command("launch slurm", slurm, SLURM, positional="command"),
    "k8s": cli.Command("launch k8s", k8s, K8S, positional="command"),
    "tpu": cli.Command("launch tpu", tpu, TPU, positional="command"),
}

if __name__ == "__main__":
    cli.start(COMMAND)
