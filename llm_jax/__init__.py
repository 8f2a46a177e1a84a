"""llm_jax: research on language models in JAX; one configuration override swaps each part of a model or its training.

config = llm_jax.config("default", {"model.position.kind": "alibi"})
summary = llm_jax.train(config, "runs/alibi")
model, params, tokenizer = llm_jax.load("runs/alibi")
llm_jax.show.attention(model, params, tokenizer, "a text")  # a picture
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_jax import show as show
    from llm_jax.checkpoints import load as load
    from llm_jax.checkpoints import open as open
    from llm_jax.checkpoints import save as save
    from llm_jax.tokenizers.chat_template import apply_chat_template as apply_chat_template
    from llm_jax.training.checks import config as config
    from llm_jax.training.trainer import train as train

__version__ = "0.1.0"
__all__ = ["apply_chat_template", "config", "load", "open", "save", "show", "train"]

# name: (module, attribute), or (module, "") for the module itself. Imported on first use, so that `import llm_jax` does
# not import JAX.
_PUBLIC = {
    "apply_chat_template": ("llm_jax.tokenizers.chat_template", "apply_chat_template"),
    "config": ("llm_jax.training.checks", "config"),
    "load": ("llm_jax.checkpoints", "load"),
    "open": ("llm_jax.checkpoints", "open"),
    "save": ("llm_jax.checkpoints", "save"),
    "show": ("llm_jax.show", ""),
    "train": ("llm_jax.training.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _PUBLIC:
        module, attribute = _PUBLIC[name]
        imported = importlib.import_module(module)
        return getattr(imported, attribute) if attribute else imported
    names = importlib.import_module("llm_jax.schema.attribute_names")
    raise names.attribute_error("module 'llm_jax'", name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _module_of_command_line() -> str:
    """NAME of `python -m NAME`."""
    return sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""


def _reject_unknown_command(module: str) -> None:
    """Ends `python -m llm_jax.NAME` as `llm-jax NAME` ends, if the package has no module NAME."""
    import importlib.util

    command = module.partition(".")[2]
    if command and "." not in command and importlib.util.find_spec(module) is None:
        importlib.import_module("llm_jax.__main__").exit_unknown(command)


def _exit_on_interrupt() -> None:
    """Makes SIGINT end a command with one line and code 130 while it imports; `cli.start` installs another handler."""
    import os
    import signal
    from typing import NoReturn

    def exit_now(number: int, frame: Any) -> NoReturn:
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, exit_now)


# Python imports the package before it runs the module of `python -m llm_jax.NAME`, or the script `llm-jax`.
if sys.argv[:1] == ["-m"] and (module := _module_of_command_line()).partition(".")[0] == __name__:
    _exit_on_interrupt()
    _reject_unknown_command(module)
elif sys.argv[:1] and sys.argv[0].rpartition("/")[2] == "llm-jax":
    _exit_on_interrupt()
