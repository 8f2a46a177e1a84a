"""Shared code of all commands: flags and `--config`, one-line errors, exit codes, help and signals.

A `Command` has a name, a function of the parsed flags, and the definitions of the flags. `start` runs a command as the
main program; `call` runs it within a process, for tests and notebooks.

Exit codes: 0 success; 2 invalid input (one line on stderr); 130 ended by SIGINT; 143 ended by SIGTERM (the trainer
saves a checkpoint first in both cases); 141 the reader of the output has ended.
"""

from llm_jax.cli.entry import Commands as Commands
from llm_jax.cli.entry import call as call
from llm_jax.cli.entry import parse as parse
from llm_jax.cli.entry import run_renamed as run_renamed
from llm_jax.cli.entry import run_script as run_script
from llm_jax.cli.entry import select_subcommand as select_subcommand
from llm_jax.cli.entry import start as start
from llm_jax.cli.parsing import CHECKPOINT_FORMS as CHECKPOINT_FORMS
from llm_jax.cli.parsing import MESH_NEEDS as MESH_NEEDS
from llm_jax.cli.parsing import Command as Command
from llm_jax.cli.parsing import Flags as Flags
from llm_jax.cli.parsing import Needs as Needs
