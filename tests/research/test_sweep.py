"""Sweeps: jobs side by side that resume, fail, are locked and are stopped; and the command."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from llm_jax import configuration, files
from llm_jax.errors import UserError
from llm_jax.research import jobs, live_table, points
from tests.conftest import ROOT, call
from tests.research.test_points import plan

SLOTS = [jobs.MachineShare((0,)), jobs.MachineShare((0,))]
# At most 20 seconds: a job that waits for nothing ends its test.
WAIT = "end = time.time() + 20\nwhile not os.path.exists({path!r}) and time.time() < end: time.sleep(0.01)\n"


def job(directory, name, code="", result=True):
    """A job that runs `code` and then writes its result."""
    path = directory / name / "result"
    code = f"import os, sys, time\n{code}\n" + (f"open({str(path)!r}, 'a').write('x')\n" if result else "")
    return jobs.Job(name, ("-c", code), directory / name, path.exists)


def states(statuses):
    return {status.job.name: status.state for status in statuses}


def test_jobs_run_once_side_by_side_and_failures_are_named_and_retried(tmp_path):
    # Each of a and b waits for the file that the other writes: they end only if they run at the same time.
    pair = [
        job(
            tmp_path, name, f"open({str(tmp_path / name)!r} + '.here', 'w')\n" + WAIT.format(path=str(tmp_path / other))
        )
        for name, other in (("a", "b.here"), ("b", "a.here"))
    ]
    broken = job(tmp_path, "c", "print('first'); sys.exit('the reason')")
    silent = job(tmp_path, "d", result=False)
    killed = job(tmp_path, "e", "os.kill(os.getpid(), 9)")
    result = jobs.run([*pair, broken, silent, killed], SLOTS)
    assert states(result) == {"a": "done", "b": "done", "c": "failed", "d": "failed", "e": "failed"}
    assert result[2].lines == ("first", "the reason") and "without a result" in result[3].lines[-1]
    assert "SIGKILL" in result[4].lines[-1]
    # Again: nothing runs, and the failures are still named.
    again = jobs.run([*pair, broken], SLOTS)
    assert states(again) == {"a": "done", "b": "done", "c": "failed"} and again[2].lines == result[2].lines
    assert (tmp_path / "a" / "result").read_text() == "x"
    mended = job(tmp_path, "c")
    assert states(jobs.run([mended], SLOTS)) == {"c": "failed"}
    assert states(jobs.run([mended], SLOTS, retry_failed=True)) == {"c": "done"}
    with pytest.raises(UserError, match=r"d is failed: ended without a result \(.*log.txt\)"):
        jobs.run_all([silent], SLOTS)


def test_a_job_that_runs_elsewhere_is_left_alone_until_it_is_free(tmp_path):
    (tmp_path / "a").mkdir()
    for name in (".job.lock", ".lock"):
        with files.lock(tmp_path / "a", name):
            assert states(jobs.run([job(tmp_path, "a"), job(tmp_path, name)], SLOTS)) == {
                "a": "running elsewhere",
                name: "done",
            }
    assert states(jobs.run([job(tmp_path, "a")], SLOTS)) == {"a": "done"}


def test_a_job_that_another_process_ends_while_the_lock_is_taken_is_not_run_again(tmp_path):
    plain = job(tmp_path, "a")
    answers = iter([False, False])  # not done when the job is looked at, done once its lock is free
    ended = jobs.Job("a", plain.command, plain.directory, lambda: next(answers, True))
    assert states(jobs.run([ended], SLOTS)) == {"a": "done"}
    assert not (tmp_path / "a" / "log.txt").exists()


def test_two_callers_divide_the_jobs_among_themselves(tmp_path):
    todo = [job(tmp_path, str(i), "time.sleep(0.05)") for i in range(6)]
    other = threading.Thread(target=jobs.run, args=(todo, SLOTS[:1]))
    other.start()
    jobs.run(todo, SLOTS[:1])
    other.join()
    assert [(tmp_path / str(i) / "result").read_text() for i in range(6)] == ["x"] * 6


def test_the_first_job_is_alone_until_it_is_set_up_and_memory_limits_the_others(tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    record = []
    monkeypatch.setattr(jobs, "_SHOW_EVERY", 0.0)

    def observe(statuses):
        running = [s.job.name for s in statuses if s.state == "running"]
        record.append(len(running))
        if ready.exists() and len(running) >= limit:
            (tmp_path / "go").write_text("")
        elif not ready.exists() and len(record) > 2:
            ready.write_text("")

    def make(i):
        plain = job(tmp_path / str(limit), str(i), WAIT.format(path=str(tmp_path / "go")))
        return jobs.Job(plain.name, plain.command, plain.directory, plain.is_done, ready.exists)

    for limit, available in ((2, 2**50), (1, 2**20)):  # much memory, and less than a process takes
        ready.unlink(missing_ok=True)
        (tmp_path / "go").unlink(missing_ok=True)
        record.clear()
        monkeypatch.setattr(jobs.runtime, "available_memory", lambda available=available: available)
        jobs.run([make(i) for i in range(2)], SLOTS, show=observe)
        assert record[0] == 1 and max(record) == limit


def test_stopping_ends_the_jobs_by_sigterm_and_the_next_call_continues(tmp_path):
    began, saved = tmp_path / "began", tmp_path / "saved"
    code = f"import signal\nsignal.signal(15, lambda *a: (open({str(saved)!r}, 'w'), sys.exit(143)))\n"
    code += f"open({str(began)!r}, 'w')\n" + WAIT.format(path=str(saved))
    todo = [job(tmp_path, "a", code), job(tmp_path, "b", "time.sleep(60)")]
    assert states(jobs.run(todo, SLOTS, stop=began.exists)) == {"a": "waiting", "b": "waiting"}
    assert saved.exists()
    assert states(jobs.run(todo[:1], SLOTS)) == {"a": "done"}


SIGNALLED = """
import pathlib, sys
from llm_jax.cli import signals
from llm_jax.research import jobs
signals.install(lambda: "interrupted")
directory = pathlib.Path(sys.argv[1])
stubborn = "import os, signal, time; signal.signal(15, signal.SIG_IGN); "
stubborn += f"open({str(directory / 'began')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
stop = signals.DeferredSignals("saving the running points", jobs.kill_all)
with stop:
    jobs.run([jobs.Job("a", ("-c", stubborn), directory / "a", lambda: False)], jobs.machine_shares(1), stop=stop)
"""


def test_a_second_signal_kills_jobs_that_do_not_end(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
    began = tmp_path / "began"
    wait_for(lambda: began.exists() and began.read_text())
    process.send_signal(signal.SIGINT)
    assert b"saving the running points" in process.stderr.readline() + process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    wait_for(lambda: not is_alive(int(began.read_text())))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = pathlib.Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_shares_divide_the_cores_and_gpus(monkeypatch):
    cores = set(os.sched_getaffinity(0))
    shares = jobs.machine_shares()
    assert sorted(c for share in shares for c in share.cores) == sorted(cores) and len(shares) == len(cores)
    assert jobs.machine_shares(most=1) == [jobs.MachineShare(tuple(sorted(cores)))] and len(jobs.machine_shares(7)) == 7
    monkeypatch.setattr(jobs, "_gpus", lambda: ["0", "3"])
    assert [share.environment for share in jobs.machine_shares()] == [{"CUDA_VISIBLE_DEVICES": n} for n in ("0", "3")]
    assert jobs.machine_shares(3)[2].environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


# ---------------------------------------------------------------- what is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_shows_states_steps_losses_and_the_time_left(tmp_path, monkeypatch):
    planned = plan(tmp_path, "train.seed=0..4")
    for point in planned:
        point.workdir.mkdir()
    now = 1000.0
    statuses = [
        jobs.Status(points.job(p), s, began=now)
        for p, s in zip(planned, ("done", *["running"] * 2, *["waiting"] * 2), strict=True)
    ]
    monkeypatch.setattr(live_table.time, "time", lambda: now)
    monkeypatch.setattr(live_table.shutil, "get_terminal_size", lambda *arguments, **options: os.terminal_size((90, 8)))
    stream, plain = Terminal(), io.StringIO()
    table, lines = live_table.LiveTable(stream), live_table.LiveTable(plain)
    table(planned, statuses)
    lines(planned, statuses)
    assert "left" not in stream.getvalue()
    metrics = planned[1].workdir / "metrics.jsonl"
    metrics.write_text('{"step": 2}\n')
    now += 30
    table(planned, statuses)
    assert "left" not in stream.getvalue()
    metrics.write_text('{"step": 4, "loss": 2.5, "tokens_per_second": 1000}\n{"step"')
    now += 10
    table(planned, statuses)
    painted = stream.getvalue().rpartition("\x1b[J")[2].splitlines()
    # Four of eight lines, the headline, and place for a notice.
    assert len(painted) == 5 and stream.getvalue().count("\x1b[5A") == 2
    assert painted[1].split() == ["seed=1", "running", "4/8", "loss", "2.500,", "1,000", "tokens/s"]
    # After a set-up of 30 s, 2 steps in 10 s. seed=1: 4 steps, 20 s. seed=2: 8 steps, 40 s; its set-up is late.
    # The others: 30 s and 40 s each. In two processes: (20 + 40 + 2 * 70) / 2 s.
    assert painted[-2] == "... and 2 more" and painted[-1].endswith("1 done, 2 waiting; about 2 min left")
    now += 10
    metrics.write_text('{"step": 6, "loss": 2.5, "tokens_per_second": 1000}\n')
    table(planned[:3], statuses[:3])  # seed=1: 2 steps, 10 s; seed=2: 40 s
    assert stream.getvalue().splitlines()[-1].endswith("about 40 s left")
    statuses[1] = jobs.Status(statuses[1].job, "done")
    lines(planned, statuses)
    assert plain.getvalue().splitlines() == [
        "seed=0: done",
        "seed=1: running",
        "seed=2: running",
        "seed=1: done, loss 2.500, 1,000 tokens/s",
    ]


def test_the_notice_of_a_signal_is_a_part_of_the_table(tmp_path):
    """Lines that others print below the table would be left when it is redrawn, and lines of the table stay above."""
    planned = plan(tmp_path)
    stream = Terminal()
    table = live_table.LiveTable(stream)
    for notice, state in (("", "running"), ("SIGINT: saving", "running"), ("SIGINT: saving", "waiting")):
        table.notice = lambda notice=notice: notice
        table(planned, [jobs.Status(points.job(p), state) for p in planned])
    assert [line.split() for line in screen(stream.getvalue())] == [
        ["seed=0", "waiting", "0/8"],
        ["seed=1", "waiting", "0/8"],
        ["2", "points:", "2", "waiting"],
    ]


def screen(output):
    """What a terminal shows after this output, which may move up and erase to the end."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d*[AJ]|\n)", output):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[J":
            lines[row:] = [""]
        else:
            lines[row] += part
    return [line for line in lines if line]


def test_no_escape_sequence_of_a_failed_job_reaches_the_terminal(tmp_path):
    text = "\x1b[31merror:\x1b[0m a\tb\x07 \x1b]0;title\x07c\r\n\x1b[2K\x1b[1A\n"
    (status,) = jobs.run([job(tmp_path, "a", f"sys.stdout.write({text!r}); sys.exit(1)")], SLOTS)
    assert status.state == "failed" and status.lines == ("error: a       b\\x07 c",)
    files.write_json(
        tmp_path / "a" / "failed.json", {"code": 1, "lines": ["\x1b[1mold"]}
    )  # written by an older version
    assert jobs.run([job(tmp_path, "a")], SLOTS)[0].lines == ("old",)


def test_the_last_line_of_a_file_is_read_whatever_its_length(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert live_table.last_line(path) == {}
    for line in ({"step": 1}, {"step": 2, "norms": "x" * 100_000}, {"step": 3}):
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        assert live_table.last_line(path) == line


# ---------------------------------------------------------------- the command

TRAINER = """
import json, pathlib, sys
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
if "seed=1" in workdir.name:
    sys.exit("error: no such luck")
(workdir / "metrics.jsonl").write_text('{"step": 8, "loss": 1.5, "validation_bits_per_byte": 2.5}\\n')
(workdir / "summary.json").write_text('{"steps": 8}')
"""


def test_the_command_trains_the_points_and_names_the_failed_one(tmp_path, monkeypatch):
    real = points.job

    def job_with_stub(point):
        original = real(point)
        return jobs.Job(original.name, ("-c", TRAINER, *original.command[2:]), original.directory, original.is_done)

    monkeypatch.setattr(points, "job", job_with_stub)
    flags = ("--config=tests/tiny.py", "--grid=train.seed=0,1", f"--output={tmp_path / 'sweep'}")
    listing = call("sweep", *flags, "--dry_run")
    assert listing.stdout.splitlines() == ["seed=0: waiting", "seed=1: waiting"] and not (tmp_path / "sweep").exists()
    done = call("sweep", *flags)
    assert done.returncode == 1 and "seed=0: done, loss 1.500, 2.500 bits per byte" in done.stdout
    assert "    error: no such luck" in done.stdout and "--retry_failed" in done.stderr
    monkeypatch.setitem(globals(), "TRAINER", TRAINER.replace("seed=1", "seed=9"))
    assert call("sweep", *flags).returncode == 1
    done = call("sweep", *flags, "--retry_failed")
    assert done.returncode == 0 and "next: python -m llm_jax.report" in done.stdout
    assert call("sweep", *flags, "--config.optim.lr=1").returncode == 0  # no config.json: the stub wrote no run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--grid, --points or --search is required"),
        (["--grid=train.seed=0", "--jobs=-1"], "--jobs=-1"),
        (["--grid=model.width=0"], "point width=0"),
        (["--grid=model.width=32,33"], "point width=33: model.num_heads="),
        (["--grid=train.seed=0", "--dry_run", "--retry_failed"], "has no effect"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message):
    done = call("sweep", f"--output={tmp_path / 'x'}", *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_sweep_does_not_write_into_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = call("sweep", f"--output={tmp_path}", "--grid=train.seed=0")
    assert done.returncode == 2 and "is a run; expected a directory for the runs" in done.stderr


@pytest.mark.slow
def test_a_sweep_trains_stops_at_a_signal_and_continues(tmp_path, command, text_file, cache):
    output = tmp_path / "sweep"
    flags = ("--config=tests/tiny.py", "--grid=train.seed=0..2", f"--output={output}")
    flags += (f"--config.data.source={text_file}", f"--config.data.cache_dir={cache}", "--config.train.steps=400")
    flags += ("--config.checkpoint.every=1000", "--config.eval.every=0")
    process = command("sweep", *flags, start=True)
    wait_for(lambda: live_table.last_line(output / "seed=0" / "metrics.jsonl").get("step", 0) > 20, 200)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "the same command continues" in errors, out + errors
    assert not (output / "seed=0" / "summary.json").exists() and any((output / "seed=0" / "checkpoints").iterdir())
    done = command("sweep", *flags, process=True)
    assert "3 points: 3 done" in done.stdout
    assert len((output / "seed=0" / "attempts.jsonl").read_text().splitlines()) == 2
    assert "JAX_COMPILATION_CACHE_DIR" in os.environ or any((output / ".cache" / "compiled").iterdir())


def test_a_script_trains_a_recipe_by_a_job(tmp_path):
    job = points.training(ROOT / "tests" / "tiny.py", {"train.seed": 3}, tmp_path / "a")
    assert job.name == "a" and not job.is_done() and not job.is_set_up()
    assert configuration.load(tmp_path / "a" / "recipe.json").train.seed == 3
    (tmp_path / "a" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"train.seed=3, now 4"):
        points.training(ROOT / "tests" / "tiny.py", {"train.seed": 4}, tmp_path / "a")
    (tmp_path / "a" / "summary.json").write_text('{"steps": 8}')
    assert job.is_done()
