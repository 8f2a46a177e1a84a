"""Trains every point of a grid: `python -m llm_jax.sweep --grid="optim.lr=1e-3,3e-3; train.seed=0..2" --output=runs/x`.

Every point is a run directory below --output. The same command continues a sweep that was stopped: points that are
done are not trained again, points that another process trains are left alone, points that failed are named and run
again with --retry_failed. `;` forms the product of keys, `&` advances keys together; values are lists (a,b,c), ranges
(0..2, 8..64..8), linspace, logspace, uniform and loguniform(FROM, TO, COUNT).
"""

import pathlib
import shlex
import sys

from llm_jax import cli
from llm_jax.cli import signals
from llm_jax.errors import UserError
from llm_jax.schema import Config

FLAGS = cli.Flags()
FLAGS.string("output", None, "directory of the sweep", required=True)
FLAGS.string("grid", "", 'keys and values, such as "model.position.kind=rope,alibi; train.seed=0..2"')
FLAGS.string("points", "", "a Python file whose get_points() returns overrides, {key: value} each")
FLAGS.integer("jobs", 0, "points at a time, each on its share of the cores; 0: one a core, or one a GPU")
FLAGS.integer("draw_seed", 0, "seed of uniform and loguniform")
FLAGS.boolean("retry_failed", False, "also run points that failed before")
FLAGS.boolean("dry_run", False, "check and list the points, and stop")
NEEDS: cli.Needs = ((("jobs", "retry_failed"), "--dry_run is given", lambda f: not f.dry_run),)


def main(f: cli.Flags) -> int:
    from llm_jax.research import grid, jobs, live_table, points, provenance

    if not f.grid and not f.points:
        raise UserError("--grid or --points is required: the points to train")
    if f.jobs < 0:
        raise UserError(f"--jobs is {f.jobs}; expected a number of processes, or 0 to choose it")
    output = pathlib.Path(f.output).expanduser()
    factors = [grid.read_file(f.points)] if f.points else []
    factors += [grid.parse(f.grid, f.draw_seed)] if f.grid else []
    planned = points.plan(f.config, grid.product(factors), output)
    if f.dry_run:
        for point in planned:
            print(f"{point.name}: {jobs.status(points.job(point)).state}")
        return 0
    points.write(planned, output, provenance.here(provenance.command_line("sweep")))
    signal = signals.Deferred("saving the running points", jobs.kill_all)
    table = live_table.LiveTable(planned)
    with signal:
        statuses = jobs.run(
            [points.job(point) for point in planned],
            jobs.slots(f.jobs, len(planned)),
            stop=signal,
            show=table,
            retry_failed=f.retry_failed,
            environment=points.environment(output),
        )
    table.close()
    failed = [status for status in statuses if status.state == jobs.FAILED]
    for status in failed:
        print(f"\n{status.job.name} failed ({status.job.directory / 'log.txt'}):")
        print("\n".join(f"    {line}" for line in status.lines))
    print(live_table.headline(statuses, None))
    if signal.number:
        print("stopped; the same command continues from the last checkpoints", file=sys.stderr)
        return 128 + signal.number
    if failed:
        print("the same command with --retry_failed runs the failed points again", file=sys.stderr)
        return 1
    print(f"next: python -m llm_jax.report {shlex.quote(str(output))}")
    return 0


COMMAND = cli.Command(
    "sweep",
    main,
    FLAGS,
    needs=NEEDS,
    interrupted="interrupted; the same command continues the sweep",
    config=Config,
)

if __name__ == "__main__":
    cli.start(COMMAND)
