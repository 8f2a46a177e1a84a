"""Trains every point of a grid: `python -m llm_jax.sweep --grid="optim.lr=1e-3,3e-3; train.seed=0..2" --output=runs/x`.

Every point is a run directory in --output. The same command continues an interrupted sweep: it skips points that are
done or that another process trains, and reports points that failed, which --retry_failed runs again. `;` forms the
Cartesian product of keys, `&` varies keys together; values are lists (a,b,c), ranges (0..2, 8..64..8), linspace,
logspace, uniform and loguniform(FROM, TO, COUNT). With --search, Optuna selects the points.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from llm_jax import cli, files
from llm_jax.cli import signals
from llm_jax.errors import UserError
from llm_jax.schema import Config

FLAGS = cli.Flags()
FLAGS.string("output", None, "directory of the sweep", required=True)
FLAGS.string("grid", "", 'keys and values, such as "model.position.kind=rope,alibi; train.seed=0..2"')
FLAGS.string("points", "", "Python file whose get_points() returns the overrides of every point, {key: value}")
FLAGS.string("search", "", 'ranges for Optuna, such as "optim.lr=loguniform(1e-4, 1e-2); model.width=64,128"')
FLAGS.integer("trials", 20, "with --search: number of points")
FLAGS.boolean("prune", True, "with --search: stop points early that are worse than the median at the same step")
FLAGS.integer("jobs", 0, "number of points that run concurrently, on equal shares of the cores; 0: one per core or GPU")
FLAGS.integer("draw_seed", 0, "seed of uniform and loguniform, and of --search")
FLAGS.boolean("retry_failed", False, "also run points that failed before")
FLAGS.boolean("dry_run", False, "validate and list the points without running them")
NEEDS: cli.Needs = (
    (("jobs", "retry_failed"), "--dry_run is given", lambda f: not f.dry_run),
    (("trials", "prune"), "--search is not given", lambda f: f.search),
    (("retry_failed", "dry_run"), "--search is given", lambda f: not f.search),
)


def main(f: cli.Flags) -> int:
    from llm_jax.research import grid, jobs, live_table, points, provenance, search
    from llm_jax.training import trainer

    if not (f.grid or f.points or f.search):
        raise UserError("--grid, --points or --search is required to define the points")
    if f.search and (f.grid or f.points):
        raise UserError("--search cannot be combined with --grid or --points; set fixed options with --config.KEY")
    if f.jobs < 0 or f.trials < 1:
        raise UserError(
            f"--jobs={f.jobs} --trials={f.trials}; expected --jobs of at least 0 and --trials of at least 1"
        )
    output = files.local_path(f.output, "--output")
    if (output / "config.json").exists():
        raise UserError(f"--output={output} is a run; expected a directory for the runs of the sweep")
    origin = provenance.here(provenance.command_line("sweep"))
    table = live_table.LiveTable()
    signal = signals.DeferredSignals("saving the running points", jobs.kill_all, prints=not table.is_redrawn)
    table.notice = lambda: signal.message
    if f.search:
        shares = jobs.machine_shares(f.jobs, f.trials)
        options = {"seed": f.draw_seed, "prune": f.prune, "stop": signal, "show": table}
        with signal:
            study, statuses = search.run(f.config, f.search, output, f.trials, shares, origin, **options)
        table.close()
        print(search.describe(study, output))
        if not statuses:
            print(f"the study has {len(study.trials)} trials; a larger --trials continues it")
        return finish(statuses, signal.number, output)
    factors = [grid.read_file(f.points)] if f.points else []
    factors += [grid.parse(f.grid, f.draw_seed)] if f.grid else []
    planned = points.plan(f.config, grid.product(factors), output)
    for point in planned:
        try:
            trainer.check(point.config)
        except UserError as error:
            raise UserError(f"point {point.name}: {error}") from error
    if f.dry_run:
        for point in planned:
            print(f"{point.name}: {jobs.status(points.job(point)).state}")
        return 0
    for note in points.notes(planned):
        print(note, file=sys.stderr)
    points.write(planned, output, origin)
    with signal:
        statuses = jobs.run(
            [points.job(point) for point in planned],
            jobs.machine_shares(f.jobs, len(planned)),
            stop=signal,
            show=lambda statuses: table(planned, statuses),
            retry_failed=f.retry_failed,
            environment=points.environment(output),
        )
    table.close()
    return finish(statuses, signal.number, output)


def finish(statuses: Sequence[Any], signal_number: int, output: pathlib.Path) -> int:
    """Prints the failed points and how to continue; returns the exit code."""
    from llm_jax.research import jobs, live_table

    failed = [status for status in statuses if status.state == jobs.FAILED]
    for status in failed:
        print(f"\n{status.job.name} failed ({status.job.directory / 'log.txt'}):")
        print("\n".join(f"    {line}" for line in status.lines))
    print(live_table.headline(statuses, None))
    if signal_number:
        print("stopped; the same command continues from the last checkpoints", file=sys.stderr)
        return 128 + signal_number
    if failed:
        print("the same command with --retry_failed runs the failed points of a grid again", file=sys.stderr)
        return 1
    print(f"next: python -m llm_jax.report {shlex.quote(str(output))}")
    return 0


COMMAND = cli.Command(
    "sweep",
    main,
    FLAGS,
    needs=NEEDS,
    interrupt_message="interrupted; the same command continues the sweep",
    config=Config,
)

if __name__ == "__main__":
    cli.start(COMMAND)
