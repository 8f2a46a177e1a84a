"""What every command does around its `main`: flags, one-line errors, exit codes.

Exit codes: 0 done; 2 bad input (one line on stderr); 130 ended by SIGINT, 143 by SIGTERM (the trainer
saves before).
"""

import contextlib
import ctypes
import functools
import os
import pathlib
import re
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from llm_jax import configuration as config_lib
from llm_jax import schema
from llm_jax.errors import UserError

_PATIENCE = 5.0  # seconds from an interrupt to the end
_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_schema: Any = schema.Config  # of `--config`, and the file that is its default: see `define_config`
_default = _CONFIGS / "default.py"


# Rows (flags, where they have no effect, whether the flags' values leave them one) of a command.
Needs = Sequence[tuple[tuple[str, ...], str, Callable[[Any], Any]]]


def run(main: Callable[[], None], interrupted: str = "interrupted", needs: Needs = ()) -> None:
    """Parses the flags, calls `main`, and turns `UserError` into one line and exit code 2.

    Args:
      interrupted: what is said at SIGINT.
      needs: flags that have no effect on their own; one that is given in vain is an error.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # libraries tell of every file they write
        if len(argv) > 1:
            raise UserError(f"unexpected argument '{argv[1]}'; options are written --name=value")
        _refuse_vain(needs)
        main()

    signal.signal(signal.SIGINT, functools.partial(_interrupt, interrupted))
    try:
        app.run(guarded, flags_parser=_parse)
    except UserError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        leave(signal.SIGINT, interrupted)


def _refuse_vain(needs: Needs) -> None:
    """Raises UserError for a flag that was given, be it with its default, and has no effect beside the others."""
    for names, where, has_effect in needs:
        given = [flags.FLAGS[name] for name in names if flags.FLAGS[name].present]
        if given and not has_effect(flags.FLAGS):
            said = " ".join(given[0].serialize().split())
            raise UserError(f"{said} has no effect where {where}")


@contextlib.contextmanager
def signals_noted() -> Iterator[Callable[[], int]]:
    """Within, SIGINT and SIGTERM are noted, for the caller to end at a good place; a second one ends at once.

    Gives a function that returns the number of the signal that has come, or 0.
    """
    seen = 0

    def note(number: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            leave(number, "ended at once; the same command goes on from the last checkpoint")
        seen = number
        # os.write, because the signal may have come in the middle of a print.
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step; once more to end at once\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(text: str, number: int, frame: Any) -> None:
    """Raises KeyboardInterrupt; should that be lost, leaves a little later."""
    if frame is not None and frame.f_code.co_name == "_xla_gc_callback":  # whatever is raised there is lost
        signal.signal(signal.SIGALRM, functools.partial(_interrupt, text))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        return
    last = threading.Timer(_PATIENCE, leave, (signal.SIGINT, text))
    last.daemon = True
    last.start()
    raise KeyboardInterrupt


def leave(number: int, text: str) -> None:
    """Ends the process because of signal `number`, with the exit code 128 + number that shells give it."""
    _end(128 + number, f"\n{text}")


def _end(code: int, text: str) -> None:
    threading.excepthook = lambda failed: None  # what other threads make of the end helps nobody
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"{text}\n".encode())
    os._exit(code)  # threads of the data pipeline and of Orbax would be cut off with tracebacks


def define_config(cls: Any = schema.Config, default: str = "default.py") -> None:
    """Defines `--config`: a Python file with get_config(), and overrides as --config.KEY=VALUE.

    Args:
      cls: the dataclass that it fills.
      default: the file in configs that is taken where none is given.
    """
    global _schema, _default
    _schema, _default = cls, _CONFIGS / default
    # No default here: it would have the overrides parsed, and fail, at import (see `_parse`).
    config_flags.DEFINE_config_file("config", None, "a file with get_config(); override with --config.KEY=VALUE")


def load_config() -> Any:
    """The checked configuration of the `--config` flag."""
    return config_lib.build(flags.FLAGS.config, _schema)


def default_config() -> Any:
    """What configs/default.py says. Raises UserError where it is not there (the package without the repository)."""
    path = _CONFIGS / "default.py"
    if not path.is_file():
        raise UserError(f"{path} is not there; this command needs the repository's configs/default.py")
    return runpy.run_path(str(path))["get_config"]()


def use_devices(count: int) -> None:
    """Simulates `count` CPU devices (0: whatever the machine has). Call before JAX is used."""
    if count < 0:
        raise UserError(f"--devices is {count}; expected a positive number of simulated CPU devices")
    if count:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def keep_memory() -> None:
    """Asks glibc's malloc to keep what it has freed, for this process. Does nothing elsewhere.

    XLA on CPU allocates its buffers anew for every step. Given back and mapped again each time, the
    page faults take about a quarter of a training step.
    """
    # From glibc's malloc.h: trim threshold (-1: never), padding at the top, number of mapped blocks, arenas.
    options = {-1: -1, -2: 2**28, -4: 0, -8: 1}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


def one_step_at_a_time() -> None:
    """Has a CPU finish a computation before it takes the next. Call before JAX is used.

    XLA allocates what a step needs when it is handed over: with the next one waiting, a CPU would hold two
    steps' temporaries. Several devices have to run side by side, and this changes nothing for accelerators.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def trim_memory() -> None:
    """Gives back what has been freed so far and `keep_memory` keeps: loading leaves holes that no step fits into."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _parse(argv: Sequence[str]) -> list[str]:
    argv = list(argv)
    if "config" in flags.FLAGS and not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        if not _default.is_file():
            raise UserError(
                "--config=FILE is needed: a file with get_config(), such as the repository's configs/default.py"
            )
        argv.insert(1, f"--config={_default}")
    for argument in argv[1:]:
        override = re.match(r"--config\.([^=\[]+)", argument)
        if override and override[1] not in set(config_lib.keys(_schema)):
            raise UserError(f"unknown config key '{override[1]}'; {config_lib.nearest(override[1], _schema)}")
        file = re.match(r"--config=(.*)", argument)
        if file and not os.path.isfile(file[1].split(":")[0]):
            raise UserError(f"--config={file[1]}: no such file; expected a Python file with get_config()")
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # --help prints and exits with 1; asking for help is no failure
        sys.exit(0)
    except flags.Error as error:
        raise UserError(_one_line(error)) from error
    except Exception as error:  # a config file runs as Python and may raise anything
        raise UserError(f"the configuration cannot be read: {_one_line(error)}") from error


def _one_line(error: Any) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
