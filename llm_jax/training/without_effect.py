"""Options that have no effect because another option does not use them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from llm_jax import configuration
from llm_jax.schema import Config, LabelledConfig

_ADAM = ("beta1", "beta2", "eps")
_ROPE = ("base", "local_base", "partial_rotary_factor", "interleaved", "scaling")
_LENGTH = ("scaling_factor", "original_length")
_YARN = (*_LENGTH, "attention_factor", "beta_fast", "beta_slow", "truncate")
_LLAMA3 = (*_LENGTH, "low_freq_factor", "high_freq_factor")
_LONGROPE = (*_LENGTH, "attention_factor", "short_factors", "long_factors")

# {option: {value of the option: the options of the same section that this value uses}}. Values that are not listed,
# such as FILE:NAME, may use all of them. "*" lists the options that all unlisted values use and no listed value does.
_USED: dict[str, dict[Any, tuple[str, ...]]] = {
    "optim.kind": {
        "adamw": _ADAM,
        "lion": ("beta1", "beta2"),
        "adafactor": (),
        "muon": (*_ADAM, "momentum"),
        "sgd": ("beta1",),
    },
    "optim.schedule": {
        "cosine": ("final_lr_fraction",),
        "linear": ("final_lr_fraction",),
        "constant": (),
        "wsd": ("final_lr_fraction", "decay_fraction"),
        "inverse_sqrt": (),
    },
    "model.position.kind": {
        "none": (),
        "sinusoidal": ("base", "combine", "width"),
        "learned": ("combine", "width"),  # max_length is the context length of `chat` with other positions
        "shaw": ("max_relative_position", "relative_embeddings"),
        "t5": ("num_buckets", "max_distance"),
        "alibi": (),
        "rope": _ROPE,
    },
    "model.position.combine": {"add": (), "concatenate": ("width",)},
    "model.position.scaling": {
        "none": (),
        "linear": ("scaling_factor",),
        "ntk": ("scaling_factor",),
        "dynamic": _LENGTH,
        "yarn": _YARN,
        "llama3": _LLAMA3,
        "longrope": _LONGROPE,
    },
    "model.qk_norm": {False: (), True: ("qk_norm_kind", "qk_norm_axis")},
    "model.parallel_residual": {False: (), True: ("parallel_norms",)},
    "loss.kind": {
        "cross_entropy": (),
        "unlikelihood": ("unlikelihood",),
        "entmax": (),
        "distillation": ("temperature", "teacher_weight"),
        "dpo": ("beta",),
    },
    "loss.masked": {"none": (), "*": ("mask_prob",)},
    "quant.qat.scheme": {"": (), "*": ("start_step", "learned_step")},
    "data.kind": {
        "text": ("field",),
        "instructions": (),
        "preferences": (),
        "labelled": tuple(f"labelled.{field.name}" for field in dataclasses.fields(LabelledConfig)),
    },
}


def notes(config: Config) -> Iterator[str]:
    """A note for each explicit option whose value differs from the default and has no effect in this configuration."""
    values, default = configuration.flat(config), configuration.flat(configuration.default())
    changed = {key for key in config.explicit if values[key] != default[key]}
    for selector, used in _USED.items():
        section, value = selector.rpartition(".")[0], values[selector]
        if value not in used:
            continue
        for name in dict.fromkeys(name for names in used.values() for name in names if name not in used[value]):
            if (key := f"{section}.{name}") in changed:
                users = ", ".join(str(other) for other, names in used.items() if name in names and other != "*")
                cure = f"; it is used with {users}" if users else ""
                yield f"note: {key}={values[key]!r} has no effect with {selector}={value!r}{cure}"
    if "model.window" in changed and "local" not in config.model.layer_pattern:
        pattern = f"model.layer_pattern={config.model.layer_pattern}"
        yield f"note: model.window={config.model.window} has no effect with {pattern}; it is used by local layers"
