"""The command that a finished run suggests."""

import pathlib
from collections.abc import Callable

from llm_jax.schema import Config
from llm_jax.tokenizers import Tokenizer

# (name of the command, its other flags, whether it applies to a configuration). The first row that applies is used.
_COMMANDS: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("evaluate", "", lambda c: c.loss.masked != "none" or not c.model.causal),
    ("evaluate", "", lambda c: c.data.kind == "labelled"),
    ("chat", "", lambda c: c.data.kind in ("instructions", "preferences")),
    ("generate", " --prompt={prompt}", lambda c: True),
)


def after_training(workdir: pathlib.Path, config: Config, tokenizer: Tokenizer) -> str:
    """Returns a command line that uses the model of a finished run: generate, chat or evaluate."""
    name, flags = next((name, flags) for name, flags, fits in _COMMANDS if fits(config))
    if name == "chat" and not getattr(tokenizer, "special", {}).get("chat_template"):
        flags = " --plain"
    prompt = config.eval.prompts[0] if config.eval.prompts else "The "
    return f"python -m llm_jax.{name} --checkpoint={workdir}" + flags.format(prompt=_quoted(prompt))


def _quoted(text: str) -> str:
    """Quotes a text for a POSIX shell."""
    if text.isprintable() and not set(text) & set('"\\$`!'):
        return f'"{text}"'
    escaped = text.encode("unicode_escape").decode().replace("'", "\\'")
    return f"$'{escaped}'"
