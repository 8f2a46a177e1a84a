"""Runs that are killed, damaged checkpoints, and full or read-only disks, with real processes: R1 to R5.

Every part compares with one undisturbed run of recipe.json with the same number of processes. `--parts` measures only
some parts and keeps the results of the others. The disks are tmpfs, which only root can mount.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from llm_jax import checkpoints, cli
from llm_jax.errors import UserError
from llm_jax.research import experiments, findings, provenance, runs
from llm_jax.research.provenance import Provenance

HERE = pathlib.Path(__file__).parent
STATEMENTS = {
    "kills": ("R1", "runs that were killed"),
    "flips": ("R2", "bits flipped and files cut"),
    "full_disk": ("R3", "disks that filled up"),
    "processes": ("R4", "runs of two processes of which one was killed"),
    "read_only": ("R5", "disks that became read-only"),
}
RECIPE = HERE / "recipe.json"
STEPS = 60  # of the recipe
HANG = 300  # seconds after a kill in which all processes must have ended
EXPLAINED = ("has ended without a message", "Terminating process because")  # why the other processes ended
# Metrics that must be the same in a disturbed run; times differ.
KEPT = ("step", "loss", "grad_norm", "lr", "validation_loss")
LAUNCHER = "llm_jax.parallel.launcher"

flags.DEFINE_integer("kills", 50, "processes to kill in runs of one process, and in runs of two")
flags.DEFINE_integer("flips", 400, "bits to flip")
flags.DEFINE_integer("seed", 0, "seed of the moments of the kills and of the flipped bits")
flags.DEFINE_list("parts", list(STATEMENTS), "parts to measure")
flags.DEFINE_string("runs", "runs/reliability", "directory of the runs; deleted first without --resume")
flags.DEFINE_bool("resume", False, "continue with the runs in --runs")


def main() -> None:
    f = flags.FLAGS
    output = pathlib.Path(f.runs).expanduser()
    if not f.resume:
        shutil.rmtree(output, ignore_errors=True)
    command, published = experiments.command(__file__), experiments.output(__file__)
    results = {result.statement: result for result in findings.read(HERE / "results.json")}
    for part in f.parts:
        count = 1 + (part == "processes")
        undisturbed = output / f"undisturbed-{count}"
        duration = output / f"{undisturbed.name}.json"
        if not duration.exists():
            shutil.rmtree(undisturbed, ignore_errors=True)  # of an interrupted call
        seconds = experiments.cached(duration, functools.partial(finish, undisturbed, count), [])
        origins: list[Provenance] = []
        if part in ("kills", "processes"):
            value = kills(output, undisturbed, count, seconds, origins)
        else:
            measure = functools.partial(flips if part == "flips" else disks, part, output / part, undisturbed)
            value = experiments.cached(output / f"{part}.json", measure, origins)
        statement, name = STATEMENTS[part]
        source = provenance.combine(origins, f"{command} --parts={part}")
        result = findings.finding(statement, name, value, verdict(value))
        results[statement] = dataclasses.replace(result, **dataclasses.asdict(source))
        findings.save(published, [results[key] for key in sorted(results)])
        print(f"{name}: {verdict(value)}; {json.dumps(value)}", flush=True)


def verdict(value: dict[str, Any] | None) -> str:
    if value is None:
        return "untested here (a tmpfs cannot be mounted)"
    return "fails" if value["lost"] else "holds"


# ---------------------------------------------------------------- runs


def train(workdir: pathlib.Path, processes: int = 1) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu"}
    module = ("llm_jax.train",) if processes == 1 else (LAUNCHER, str(processes), "llm_jax.train")
    full = [sys.executable, "-m", *module, f"--config={RECIPE}", f"--workdir={workdir}"]
    return subprocess.Popen(full, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(workdir: pathlib.Path, processes: int = 1) -> float:
    """Trains to the end and returns the elapsed seconds; raises UserError if the training fails."""
    began = time.perf_counter()
    process = train(workdir, processes)
    _, errors = process.communicate()
    if process.returncode:
        raise UserError(f"{workdir}: the trainer ended with {process.returncode}: {errors.strip()[-300:]}")
    return time.perf_counter() - began


def last_step(workdir: pathlib.Path) -> int:
    return next((line["step"] for line in reversed(runs.read_lines(workdir / "metrics.jsonl"))), 0)


def is_readable(directory: pathlib.Path) -> bool:
    """Whether the files of a checkpoint are those of its manifest."""
    with contextlib.suppress(UserError):
        checkpoints.verify(directory)
        return True
    return False


def same(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether two finished runs have the same metrics and the same bytes of parameters and optimizer state."""

    def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
        lines = runs.read_lines(workdir / "metrics.jsonl")
        return [{key: line[key] for key in KEPT if key in line} for line in lines]

    return metrics(a) == metrics(b) and state(a) == state(b)


def state(workdir: pathlib.Path) -> list[bytes]:
    """The bytes of the parameters and of the optimizer state of the last checkpoint."""
    import jax
    import numpy as np

    from llm_jax.training import setup, trainer

    directory = checkpoints.find(workdir)
    parts = setup.setup(checkpoints.read_config(directory))
    restored, _ = trainer.restore(parts, directory, checkpoints.verify(directory))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)]


# ---------------------------------------------------------------- kills


def kills(
    output: pathlib.Path, undisturbed: pathlib.Path, processes: int, seconds: float, origins: list[Provenance]
) -> dict[str, Any]:
    """Kills runs at random moments, by SIGKILL (80 %) or SIGTERM, until there are --kills kills; returns the figures.

    Of several processes one is killed, and the others have to end by themselves. A finished run is not repeated.
    """
    f = flags.FLAGS
    ended: list[dict[str, Any]] = []
    hits: list[dict[str, Any]] = []
    while len(hits) < f.kills:
        workdir = output / f"killed-{processes}-{f.seed}-{len(ended)}"
        draw = random.Random(f"{f.seed} {processes} {len(ended)}")
        compute = functools.partial(killed, workdir, undisturbed, seconds, draw, processes)
        ended.append(experiments.cached(workdir.with_suffix(".json"), compute, origins))
        before = (0, 0)
        for hit in ended[-1]["kills"]:  # a kill while a run starts leaves the steps and checkpoints of the kill before
            after = (hit["reached"], hit["kept"])
            hits.append(hit | {"in_training": after != before})
            before = after
        print(f"{len(hits)} of {f.kills} kills: {ended[-1]}", flush=True)
    differing, unreadable = sum(run["differs"] for run in ended), sum(hit["unreadable"] for hit in hits)
    signals = ("SIGKILL", "SIGTERM")
    again = dict.fromkeys(signals, 0)
    for hit in hits:
        if hit["in_training"]:
            again[hit["signal"]] = max(again[hit["signal"]], hit["reached"] - hit["kept"])
    figures = {
        "lost": differing + unreadable,
        "killed": {name: sum(hit["signal"] == name for hit in hits) for name in signals},
        "while_saving": sum(hit["saving"] for hit in hits),
        "in_training": sum(hit["in_training"] for hit in hits),
        "unreadable_checkpoints": unreadable,
        "runs": len(ended),
        "runs_that_differ_from_the_undisturbed_one": differing,
        "steps_done_again_at_most": again,
    }
    if processes > 1:
        figures["seconds_until_all_had_ended_at_most"] = max(hit["seconds"] for hit in hits)
        figures["without_a_message"] = sum(not hit["explained"] for hit in hits)
    return figures


def killed(
    workdir: pathlib.Path, undisturbed: pathlib.Path, seconds: float, draw: random.Random, processes: int
) -> dict[str, Any]:
    """Trains to the end with kills at random moments (half of them after a random step); a record of every kill.

    Args:
      seconds: duration of the undisturbed run.
    """
    shutil.rmtree(workdir, ignore_errors=True)
    hits: list[dict[str, Any]] = []
    while True:
        number = signal.SIGKILL if draw.random() < 0.8 else signal.SIGTERM
        process = train(workdir, processes)
        sent, saving = math.inf, False
        moment = draw.uniform(0.2, 1.0) * seconds
        if draw.random() < 0.5:  # while it trains and saves, which is short beside the start
            step = draw.randint(min(last_step(workdir), STEPS - 1), STEPS - 1)
            while process.poll() is None and last_step(workdir) <= step:
                time.sleep(0.02)
            moment = draw.uniform(0.0, 0.3)
        try:
            _, errors = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            saving = bool(list((workdir / "checkpoints").glob(".partial-*")))
            send(process, number, draw)
            sent = time.perf_counter()
            _, errors = process.communicate(timeout=HANG)
        if process.returncode == 0:
            differs = not same(workdir, undisturbed)
            shutil.rmtree(workdir)
            return {"kills": hits, "differs": differs}
        if sent == math.inf:
            raise UserError(f"{workdir}: the trainer ended by itself with {process.returncode}: {errors[-300:]}")
        kept = checkpoints.steps(workdir)
        hits.append(
            {
                "signal": number.name,
                "code": process.returncode,
                "reached": last_step(workdir),
                "kept": kept[-1] if kept else 0,
                "saving": saving,
                "unreadable": sum(not is_readable(workdir / "checkpoints" / str(step)) for step in kept),
                "seconds": round(time.perf_counter() - sent, 1),
                # SIGTERM before the loop begins ends a trainer as SIGKILL does.
                "explained": any(text in errors for text in EXPLAINED) or process.returncode == 143,
            }
        )


def send(process: subprocess.Popen, number: signal.Signals, draw: random.Random) -> None:
    """Sends a signal to a trainer, or to one of the trainers that a launcher has started."""
    trainers = [process.pid]
    if LAUNCHER in str(process.args):
        words = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        trainers = [int(word) for word in words]
    if trainers:
        os.kill(draw.choice(trainers), number)


# ---------------------------------------------------------------- damage


def flips(part: str, scratch: pathlib.Path, undisturbed: pathlib.Path) -> dict[str, Any]:
    """Flips single bits of a checkpoint and truncates each file; counts the damages that are not detected."""
    f, draw = flags.FLAGS, random.Random(flags.FLAGS.seed)
    shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted call
    shutil.copytree(checkpoints.find(undisturbed), scratch)
    paths = sorted(path for path in scratch.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in paths]

    def is_missed(path: pathlib.Path, damage: Callable[[bytes], bytes]) -> bool:
        content = path.read_bytes()
        path.write_bytes(damage(content))
        missed = is_readable(scratch)
        path.write_bytes(content)
        return missed

    def flip(content: bytes) -> bytes:
        where = draw.randrange(len(content))
        return content[:where] + bytes([content[where] ^ 1 << draw.randrange(8)]) + content[where + 1 :]

    missed = 0
    for i in range(f.flips):  # half of them by size, half of them file by file
        missed += is_missed(draw.choices(paths, sizes)[0] if i % 2 else draw.choice(paths), flip)
    missed += sum(is_missed(path, lambda content: content[: draw.randrange(len(content))]) for path in paths)
    checkpoints.verify(scratch)  # every damage was undone
    counts = {"bits_flipped": f.flips, "files_cut_short": len(paths), "missed": missed}
    return {"lost": missed} | counts | {"bytes": sum(sizes)}


def disks(part: str, disk: pathlib.Path, undisturbed: pathlib.Path) -> dict[str, Any] | None:
    """Trains on small disks (tmpfs) that fail, and continues after a repair; None if tmpfs cannot be mounted."""
    # Size in bytes, and the commands before the training, while it trains, and after it has ended.
    cases: list[tuple[int, list[list[str]], list[list[str]], list[list[str]]]]
    if part == "full_disk":
        size = sum(path.stat().st_size for path in checkpoints.find(undisturbed).rglob("*") if path.is_file())
        limits = [int(share * size) // 4096 * 4096 for share in (0.5, 1.2, 1.7, 2.3, 2.8)]
        cases = [(limit, [], [], [remount(disk, f"size={20 * size}")]) for limit in limits]
    else:
        # The kernel refuses to remount while a file is open for writing: a read-only bind mount lies over the disk.
        bind = [["mount", "--bind", str(disk), str(disk)], remount(disk, "bind,ro")]
        cases = [
            (64 * 2**20, [remount(disk, "ro")], [], [remount(disk, "rw")]),
            (64 * 2**20, [], bind, [["umount", str(disk)]]),
        ]
    codes, messages, readable, lost = [], [], 0, 0
    for size, before, during, after in cases:
        disk.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return None
        try:
            run_all(before)
            process = train(disk / "run")
            while during and last_step(disk / "run") < 8 and process.poll() is None:
                time.sleep(0.05)
            run_all(during)
            _, errors = process.communicate()
            codes.append(process.returncode)
            messages.append(errors.strip().splitlines()[-1].replace(str(disk), "DISK")[:160])
            run_all(after)
            for step in checkpoints.steps(disk / "run"):
                checkpoints.verify(disk / "run" / "checkpoints" / str(step))
                readable += 1
            finish(disk / "run")
            lost += not same(disk / "run", undisturbed)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(f"disk of {size:,} bytes: exit code {codes[-1]}, {messages[-1]}", flush=True)
    return {"lost": lost, "disks": len(codes), "exit_codes": codes, "checkpoints_left": readable, "messages": messages}


def remount(disk: pathlib.Path, options: str) -> list[str]:
    return ["mount", "-o", f"remount,{options}", str(disk)]


def run_all(commands: list[list[str]]) -> None:
    for command in commands:
        subprocess.run(command, check=True)


if __name__ == "__main__":
    cli.run_script(experiments.script(main, quick={"kills": 2, "flips": 4, "parts": ["kills", "flips"]}))
