"""The decoding options as flags of a command."""

import dataclasses
import sys
from collections.abc import Collection
from typing import Any

from absl import flags

from llm_jax.cli.parsing import Flags
from llm_jax.decoding.options import GROUPS, DecodingOptions, parse_bias

# Groups of options that replace the sampling options of a checkpoint (except the seed).
_CHOICES = ("sampling", "penalties", "search")


def define(values: Flags, leave_out: Collection[str] = (), **defaults: Any) -> None:
    """Defines a flag for every field of `DecodingOptions`, in the field's group.

    Args:
      values: the flags of the command.
      leave_out: names of fields without a flag.
      defaults: default values that replace the defaults of the fields.
    """
    kinds: dict[type, Any] = {bool: values.boolean, int: values.integer, float: values.number, str: values.string}
    for field in sorted(dataclasses.fields(DecodingOptions), key=lambda field: GROUPS.index(field.metadata["group"])):
        if field.name in leave_out:
            continue
        about, default = field.metadata["about"], defaults.get(field.name, field.default)
        values.group(field.metadata["group"])
        if field.name == "early_stop":
            flag = flags.Flag(_EarlyStop(), flags.ArgumentSerializer(), field.name, False, about, boolean=True)
            flags.DEFINE_flag(flag, values)
        elif isinstance(field.default, tuple):
            define = values.multi_integer if field.name == "eos" else values.multi_string
            define(field.name, [], about)
        else:
            kinds[type(field.default)](field.name, default, about)
    values.group("")


def read(values: Flags, checkpoint: Any) -> DecodingOptions:
    """Returns the decoding options from the flags of a command.

    If no flag for sampling, penalties or search is given, the options of the checkpoint's generation_config.json (or of
    the metadata of its GGUF file) are used, and a note is printed on stderr. Runs that trained adapters do not inherit
    the options of their base.

    Args:
      checkpoint: a `checkpoints.Checkpoint`.

    Raises:
      UserError: an invalid --logit_bias, or an invalid value in generation_config.json.
    """
    from llm_jax.checkpoints import generation_config

    fields = (field.name for field in dataclasses.fields(DecodingOptions) if field.name in values)
    options: dict[str, Any] = {name: values[name].value for name in fields}
    choices = [f.name for f in dataclasses.fields(DecodingOptions) if f.metadata["group"] in _CHOICES]
    is_chosen = any(values[name].present for name in choices if name in values and name != "seed")
    if checkpoint.form != "adapters" and not is_chosen and (content := checkpoint.generation_config):
        path, vocab_size = checkpoint.generation_config_path, checkpoint.config.vocab_size
        if generation_config.OPTIONS.keys() & content.keys():
            vocab_size = min(vocab_size, checkpoint.tokenizer.vocab_size)
        recommended = generation_config.sampling(content, vocab_size, path)
        if recommended:
            text = " ".join(f"--{name}={value:g}" for name, value in recommended.items())
            note = f"note: using {text} from {path.name}; any flag for sampling, penalties or search replaces these"
            print(note, file=sys.stderr)
        options |= recommended
    options["logit_bias"] = [parse_bias(text) for text in options["logit_bias"]]
    frozen: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in options.items()}
    return DecodingOptions(**frozen)


class _EarlyStop(flags.ArgumentParser):
    """ "true", "false" or "never"; --early_stop alone is true."""

    def parse(self, argument: str | bool) -> bool | str:
        values: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
        if str(argument).lower() not in values:
            raise ValueError("expected true, false or never")
        return values[str(argument).lower()]
