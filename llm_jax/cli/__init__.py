"""What all commands share: flags and `--config`, one-line errors, exit codes, help and signals.

A command is a `Command`: a name, a function of the parsed flags, and the definitions of the flags. `start` runs it as
the process; `call` runs it within a process, as tests and notebooks do.

Exit codes: 0 success; 2 invalid input (one line on stderr); 130 ended by SIGINT, 143 by SIGTERM (the trainer saves
first); 141 the reader of the output ended.
"""

from llm_jax.cli.entry import Commands as Commands
from llm_jax.cli.entry import call as call
from llm_jax.cli.entry import forward as forward
from llm_jax.cli.entry import parse as parse
from llm_jax.cli.entry import run_script as run_script
from llm_jax.cli.entry import select_subcommand as select_subcommand
from llm_jax.cli.entry import start as start
from llm_jax.cli.parsing import CHECKPOINT_FORMS as CHECKPOINT_FORMS
from llm_jax.cli.parsing import Command as Command
from llm_jax.cli.parsing import Flags as Flags
from llm_jax.cli.parsing import Needs as Needs
