"""The model families of Hugging Face: one row each.

To add a family: write its table of names (`names.py`), read and write its config.json (`config_json.py`),
and name both in `FAMILIES`; `tests/checkpoints` then wants a golden of a tiny model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax import configuration
from llm_jax.checkpoints import config_json, names
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.schema import ModelConfig

Read = Callable[[Mapping[str, Any]], dict[str, Any]]
Write = Callable[[ModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """How a model_type of Hugging Face is read and written.

    Attributes:
      architecture: the class that `transformers` builds.
      names: our paths -> their tensors.
      read: config.json -> changes of the neutral `ModelConfig` ("position.x" for what is below it).
      write: the inverse.
      prefix: what stands before the names of theirs in files of a head-less or a whole model; either is read.
    """

    architecture: str
    names: names.Names
    read: Read
    write: Write
    prefix: str = ""


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", names.LLAMA, config_json.read_llama, config_json.write_llama),
    "mistral": Family("MistralForCausalLM", names.LLAMA, config_json.read_mistral, config_json.write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", names.LLAMA, config_json.read_qwen2, config_json.write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", names.LLAMA, config_json.read_qwen3, config_json.write_qwen),
    "gemma2": Family("Gemma2ForCausalLM", names.GEMMA, config_json.read_gemma2, config_json.write_gemma),
    "gemma3_text": Family("Gemma3ForCausalLM", names.GEMMA, config_json.read_gemma3, config_json.write_gemma),
    "phi": Family("PhiForCausalLM", names.PHI, config_json.read_phi, config_json.write_phi),
    "gpt2": Family("GPT2LMHeadModel", names.GPT2, config_json.read_gpt2, config_json.write_gpt2, "transformer."),
    "bert": Family("BertModel", names.BERT, config_json.read_bert, config_json.write_bert, "bert."),
}


@functools.cache
def neutral() -> ModelConfig:
    """The model where config.json of a family says nothing: the defaults without what other people's models lack."""
    plain = {"width": 1, "num_layers": 1, "window": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 1}
    lacking = {
        "norm_eps": 1e-6,
        "qk_norm": False,
        "tie_embeddings": False,
        "scan_layers": False,
        "position.max_length": 2048,
    }
    return configuration.replace(configuration.default("model"), plain | lacking)


_OWN_HEAD_WIDTH = ("qwen3", "gemma2", "gemma3_text")  # no head_dim means a number of theirs, not width // heads
_TIED = {"gpt2": True, "gemma2": True, "gemma3_text": True, "bert": True}  # where config.json does not say


def model_config(c: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """config.json -> (family, the model's config).

    Raises:
      UserError: an unknown family, a key that is missing, or something that the model does not do.
    """
    kind = c.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config.json: model_type is {kind!r}; expected one of {', '.join(FAMILIES)}")
    try:
        found = {"vocab_size": c["vocab_size"]} | FAMILIES[kind].read(c)
        found.setdefault("tie_embeddings", c.get("tie_word_embeddings", _TIED.get(kind, False)))
        activation = found["activation"]
        found["activation"] = config_json.ACTIVATIONS[activation]
    except KeyError as error:
        raise UserError(f"config.json of a {kind}: {error} is missing, or not known here") from error
    # Checked like a configuration, so that values of another type or out of range are refused by name.
    return kind, configuration.replace(neutral(), found, "model.")


def hf_config(kind: str, m: ModelConfig) -> dict[str, Any]:
    """The inverse of `model_config`: what config.json says of the model.

    Raises:
      UserError: the family cannot hold this model; the first key in which they differ is named.
    """
    family = FAMILIES[kind]
    if kind in _OWN_HEAD_WIDTH:
        m = dataclasses.replace(m, head_dim=positions.head_dim(m))
    written = {
        "model_type": kind,
        "architectures": [family.architecture],
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tie_embeddings,
        **family.write(m),
    }
    refuse_difference(kind, m, model_config(written)[1])
    return written


def refuse_difference(what: str, m: ModelConfig, again: ModelConfig) -> None:
    """Raises UserError, naming the first key, where a model is another when it is read again."""
    before, after = configuration.flat(m, "model."), configuration.flat(again, "model.")
    free = {"model.scan_layers", "model.remat", "model.attention_kernel", "model.kv_cache", *_unused(m)}
    free |= {"model.window"} if "local" not in m.layer_pattern else set()
    for key, value in before.items():
        if after[key] != value and key not in free and not key.startswith("model.precision."):
            raise UserError(f"{what} cannot hold {key}={value!r} (it would be {after[key]!r}); choose another family")


def _unused(m: ModelConfig) -> set[str]:
    """Keys of `model.position` that say nothing about this model."""
    p = m.position
    used = {"kind"} | {
        "rope": {"base", "local_base", "partial_rotary_factor", "interleaved", "scaling"},
        "learned": {"combine", "max_length"},
        "sinusoidal": {"combine", "base"},
    }.get(p.kind, set())
    if p.scaling != "none":
        used |= {"scaling_factor"}
    used |= {
        "dynamic": {"original_length"},
        "yarn": {"original_length", "beta_fast", "beta_slow"},
        "llama3": {"original_length", "low_freq_factor", "high_freq_factor"},
    }.get(p.scaling, set())
    return {f"model.position.{f.name}" for f in dataclasses.fields(p) if f.name not in used}


def first_family(config: ModelConfig) -> str:
    """The first family that holds a model. Raises UserError, with the reason of every family, if none does."""
    reasons = []
    for kind in FAMILIES:
        try:
            hf_config(kind, config)
            return kind
        except UserError as error:
            reasons.append(str(error).split(";")[0])
    raise UserError("no family of Hugging Face can hold this model: " + "; ".join(reasons))
