"""Runs commands as the main program (`start`) or within a process (`call`), and scripts (`run_script`)."""

import copy
import os
import runpy
import select
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags, logging

from llm_jax import extensions, files, object_store, runtime
from llm_jax.cli import help as help_lib
from llm_jax.cli import parsing, signals, status
from llm_jax.cli.parsing import Command
from llm_jax.errors import UserError

Commands = Command | Mapping[str, Command]


def start(command: Commands, arguments: Sequence[str] | None = None) -> None:
    """Runs a command as the main program: installs signal handlers and exits with the command's exit code.

    Args:
      command: a command, or {name: command} for a command with subcommands; the first argument is then the name.
      arguments: the flags; default: `sys.argv[1:]`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command, arguments = select_subcommand(command, arguments)
        _start(command, arguments)
    except UserError as error:
        signals.exit_process(2, f"error: {error}")


def call(command: Commands, arguments: Sequence[str] = ()) -> int:
    """Runs a command within this process and returns its exit code; does not change signal handlers.

    The command prints to sys.stdout and sys.stderr. The flags of the command keep no state between calls.

    Args:
      command: a command, or {name: command}; see `start`.
      arguments: the flags, such as ["--checkpoint=runs/x", "--json"].
    """
    try:
        command, arguments = select_subcommand(command, arguments)
        return _execute(command, copy.deepcopy(command.flags), arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(command: Commands, arguments: Sequence[str]) -> flags.FlagValues:
    """Returns the parsed flags of a command without running it, for example before it is submitted to a cluster.

    Raises:
      UserError: invalid arguments.
    """
    command, arguments = select_subcommand(command, arguments)
    values = copy.deepcopy(command.flags)
    parsing.parse(command, values, arguments)
    return values


def run_script(main: Callable[[], None], interrupt_message: str = "interrupted") -> None:
    """Runs `main` of a script that defines its flags in `absl.flags.FLAGS`, with the errors and exit codes of commands.

    Args:
      main: function without arguments.
      interrupt_message: message printed on SIGINT.
    """

    def run(values: flags.FlagValues) -> None:
        main()

    run.__module__ = main.__module__
    _start(Command(os.path.basename(sys.argv[0]), run, flags.FLAGS, interrupt_message=interrupt_message), sys.argv[1:])


def run_renamed(earlier: str, name: str, *arguments: str) -> None:
    """Runs the command under its new name and prints a note on stderr that `python -m llm_jax.EARLIER` was renamed."""
    command = " ".join((f"python -m llm_jax.{name}", *arguments))
    print(f"note: python -m llm_jax.{earlier} is now {command}", file=sys.stderr)
    sys.argv[1:1] = arguments
    runpy.run_module(f"llm_jax.{name}", run_name="__main__", alter_sys=True)


def select_subcommand(command: Commands, arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Returns the command that the arguments select, and the remaining arguments.

    Raises:
      UserError: unknown or missing subcommand.
    """
    arguments = list(arguments)
    if isinstance(command, Command):
        return command, arguments
    if arguments and arguments[0] in command:
        return command[arguments[0]], arguments[1:]
    parent = next(iter(command.values())).name.split(" ")[0]
    if arguments and help_lib.is_help(arguments[0]):
        return Command(parent, lambda values: None, flags.FlagValues(), subcommands=command), arguments
    problem = f"unknown subcommand '{arguments[0]}'" if arguments else "a subcommand is required"
    raise UserError(f"{parent}: {problem}; expected one of {', '.join(command)}")


def _start(command: Command, arguments: Sequence[str]) -> None:
    signals.install(lambda: command.message_on_interrupt(command.flags))
    code = 0
    try:
        code = _execute(command, command.flags, arguments, process=True)
        sys.stdout.flush()
    except UserError as error:
        status.show("")
        signals.exit_process(2, f"error: {error}")
    except KeyboardInterrupt:
        signals.exit_process(130, f"\n{command.message_on_interrupt(command.flags)}")
    except BrokenPipeError:
        if not _reader_ended():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout once more
        signals.exit_process(141)
    if code:
        signals.exit_process(code)
    sys.exit(0)


def _reader_ended() -> bool:
    """Whether the process that read stdout through a pipe, such as `head`, has ended."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _execute(command: Command, values: flags.FlagValues, arguments: Sequence[str], process: bool = False) -> int:
    """Runs a command and returns its exit code.

    Args:
      process: whether the command is the main program and may change settings of the process.

    Raises:
      UserError: invalid arguments, or a device error that the user can fix, such as too little memory.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file it writes
    if text := help_lib.requested(command, arguments):
        print(text)
        return 0
    parsing.parse(command, values, arguments)
    if process and command.compiles and values["compilation_cache"].value:
        runtime.enable_compilation_cache(files.cache_directory() / "compiled")
    try:
        return command.main(values) or 0
    except (RuntimeError, AssertionError) as error:
        if message := runtime.explain_device_error(error, command.memory_hint):
            raise UserError(message) from error
        raise
    except SystemExit as error:  # of code of the user: commands return their exit code
        raise UserError(f"{command.name}: {extensions.describe_exception(error)}") from error
    except Exception as error:
        if message := object_store.explain(error):
            raise UserError(message) from error
        raise
