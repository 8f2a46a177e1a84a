"""Starts a conversation with a checkpoint in the terminal: `python -m llm_jax.chat --checkpoint=runs/chat`.

Type a message and press Enter. Ctrl-C stops an answer, Ctrl-D exits, and /help lists commands. Without a terminal,
every line of standard input is a message, and the answers are printed in the same order.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from llm_jax import cli, runtime
from llm_jax.cli import decoding_flags, status
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.define_checkpoint()
FLAGS.string("system", "", "system message at the beginning of the conversation")
FLAGS.string("chat_template", "", "name of a chat template of the tokenizer; default: the template named default")
FLAGS.boolean(
    "plain",
    False,
    "format the turns as 'user: ...' and 'assistant: ...'; for models without a chat template",
)
FLAGS.define_dtype()
FLAGS.define_as_stored()
FLAGS.define_activations()
FLAGS.define_mesh()
# Options that a conversation does not support: several continuations, searches and speculative decoding.
_LEFT_OUT = (
    *("n", "alternatives", "truncate", "beams", "length_penalty", "early_stop", "beam_groups", "diversity"),
    *("contrastive", "draft", "draft_tokens"),
)
decoding_flags.define(FLAGS, leave_out=_LEFT_OUT, max_new_tokens=512)
_TURN_OF_USER = "\n\nuser:"  # a model without chat training generates this and then continues as the user


@dataclasses.dataclass
class ChatSession:
    """The state of a conversation.

    Attributes:
      encode: function of messages that returns the token ids of the conversation and of the beginning of an answer.
      limit: maximum number of tokens of the context.
      system: the system message, or "".
      messages: the messages of user and assistant, alternating.
      prefix: `decoding.prefix.PrefixCache`, the cache of the last answer; the next answer reuses the common prefix.
      seed: seed of the first answer; answer i uses seed + i.
      ends: additional stop strings.
    """

    encode: Callable[[list[dict[str, str]]], list[int]]
    limit: int
    system: str
    seed: int
    ends: tuple[str, ...] = ()
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    prefix: Any = None

    def ids(self, *new: dict[str, str]) -> list[int]:
        """The token ids of the conversation with `new` messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.encode([*system, *self.messages, *new])


def set_system(conversation: ChatSession, text: str) -> str:
    conversation.system = text
    return "the system message is set" if text else "the system message is removed"


def reset(conversation: ChatSession, text: str) -> str:
    conversation.messages.clear()
    return "a new conversation begins"


def set_seed(conversation: ChatSession, text: str) -> str:
    if not (text.isdecimal() and int(text) < 2**32):
        return f"/seed {text}: expected a number from 0 to 2^32 - 1"
    conversation.seed = int(text)
    return f"the seed is {text}"


def describe_commands(conversation: ChatSession, text: str) -> str:
    return "\n".join(f"{name:<14} {about}" for name, (_, about) in COMMANDS.items())


# name: (function of the conversation and the text after the name that returns what is printed, meaning)
COMMANDS: dict[str, tuple[Callable[[ChatSession, str], str], str]] = {
    "/system": (set_system, "TEXT: set the system message of the conversation; without TEXT, remove it"),
    "/reset": (reset, "remove all messages except the system message"),
    "/seed": (set_seed, "NUMBER: set the random seed of the answers"),
    "/help": (describe_commands, "list the commands; Ctrl-C stops an answer, Ctrl-D exits"),
}


def run_command(conversation: ChatSession, line: str) -> str:
    """Runs the command in a line that begins with "/" and returns the text to print."""
    name, _, text = line.partition(" ")
    if name not in COMMANDS:
        return f"unknown command {name}; expected one of {', '.join(COMMANDS)}"
    return COMMANDS[name][0](conversation, text.strip())


def encoder(tokenizer: Any, plain: bool, checkpoint: str) -> Callable[[list[dict[str, str]]], list[int]]:
    """Returns the function that converts messages to the token ids of the whole conversation.

    Raises:
      UserError: the tokenizer has no chat template, and `plain` is False.
    """
    from llm_jax.tokenizers import chat_template

    if plain:
        return lambda messages: chat_template.plain_ids(tokenizer, messages)
    if not getattr(tokenizer, "special", {}).get("chat_template"):
        raise UserError(
            f"{checkpoint} has no chat template; give --plain to write turns as 'user: ...' and 'assistant: ...', or "
            "use python -m llm_jax.generate to continue a text"
        )
    return lambda messages: chat_template.apply_chat_template(tokenizer, messages, add_generation_prompt=True)


def main(f: cli.Flags) -> None:
    runtime.retain_freed_memory()
    runtime.simulate_devices(f.devices)
    status.show(f"loading {f.checkpoint}")
    from llm_jax import checkpoints, tokenizers
    from llm_jax.decoding.prefix import PrefixCache
    from llm_jax.model import positions

    checkpoint = checkpoints.open(f.checkpoint, f.base)
    options = decoding_flags.read(f, checkpoint)
    encode = encoder(tokenizers.with_chat_template(checkpoint.tokenizer, f.chat_template), f.plain, f.checkpoint)
    if not checkpoint.config.causal:
        raise UserError(
            f"{f.checkpoint} is a bidirectional model (model.causal=False), which cannot generate text; expected a "
            "causal model"
        )
    loaded = checkpoint.load(dtype=f.dtype, as_stored=f.as_stored, activations=f.activations, mesh=f.mesh)
    status.show("")
    config = loaded.model.config
    options.check(min(loaded.tokenizer.vocab_size, config.vocab_size))
    bounds = [n for n in (options.context, positions.make(config).max_length()) if n]
    limit = min(bounds, default=config.position.max_length)
    ends = (_TURN_OF_USER,) if f.plain else ()
    conversation = ChatSession(encode, limit, f.system, options.seed, ends, prefix=PrefixCache())
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(f"{f.checkpoint}: type a message; /help lists commands, Ctrl-C stops an answer, Ctrl-D exits")
    with _own_interrupts():
        for line in _lines(conversation, interactive):
            if line.startswith("/") and not line.startswith("//"):
                print(run_command(conversation, line), flush=True)
            elif line.strip():
                answer(conversation, loaded, line.removeprefix("/"), options)


def answer(conversation: ChatSession, loaded: Any, text: str, options: Any) -> None:
    """Generates and prints the answer to a message, and adds the message and the answer to the conversation."""
    from llm_jax.decoding import complete, stops

    message = {"role": "user", "content": text}
    ids = conversation.ids(message)
    available = conversation.limit - len(ids)
    if available < 1:
        print(
            f"the message does not fit: the conversation would have {len(ids)} tokens, but the context has "
            f"{conversation.limit}; shorten the message, or remove all messages with /reset",
            flush=True,
        )
        return
    turn = len(conversation.messages) // 2
    count = min(options.max_new_tokens, available)
    options = dataclasses.replace(
        options,
        max_new_tokens=count,
        stop=stops.fitting_stops(loaded.tokenizer, (*options.stop, *conversation.ends), count),
        seed=(conversation.seed + turn) % 2**32,
        context=0,
    )
    if not turn:
        status.show("compiling (the first answer of a checkpoint takes longer)")

    def show(row: int, new: str) -> None:
        status.show("")
        print(new, end="", flush=True)

    with _recorded_interrupt() as interrupted:
        ((completion,),) = complete.complete(
            loaded.model,
            loaded.params,
            loaded.tokenizer,
            [ids],
            options,
            show=show,
            cancel=lambda: bool(interrupted),
            prefix=conversation.prefix,
        )
    status.show("")
    print(flush=True)
    if not interrupted and completion.generated.stop == "length":
        full = options.max_new_tokens == available
        reason = "the context is full; /reset removes all messages"
        reason = reason if full else f"cut at --max_new_tokens={options.max_new_tokens}"
        print(f"({reason})", file=sys.stderr)
    conversation.messages += [message, {"role": "assistant", "content": completion.text.strip()}]


def _lines(conversation: ChatSession, interactive: bool) -> Iterator[str]:
    """Yields the lines that the user types, or the lines of standard input."""
    if not interactive:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits lines and recalls earlier ones)
    while True:
        left = conversation.limit - len(conversation.ids())
        try:
            yield input(f"[{max(left, 0):,} tokens left] > ")
        except KeyboardInterrupt:
            print("\nCtrl-D exits")
        except EOFError:
            print()
            return


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Context in which Ctrl-C raises KeyboardInterrupt, without the timer that ends other commands."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _recorded_interrupt() -> Iterator[list[int]]:
    """Context in which Ctrl-C only appends an entry to the returned list."""
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, previous)


COMMAND = cli.Command(
    "chat",
    main,
    FLAGS,
    needs=cli.MESH_NEEDS,
    compiles=True,
    memory_hint="give a smaller --context, --dtype=bfloat16, or --as_stored for a .gguf file",
)

if __name__ == "__main__":
    cli.start(COMMAND)
