"""The model families of Hugging Face, one row each.

To add a family: write its table of tensor names (`names.py`), functions that read and write its config.json
(`config_json.py`), and a row of `FAMILIES`; `tests/checkpoints` requires golden values of a tiny model.
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
    """How a Hugging Face model_type is read and written.

    Attributes:
      architecture: the class of `transformers`.
      names: parameter paths -> stored tensors.
      read: config.json -> changes to `neutral()`, with keys such as "width" and "position.base".
      write: the inverse.
      prefix: of tensor names, present or absent depending on whether the file was saved with an output head; both are
        read.
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
    """The configuration that `read` functions change: the defaults, without features that no family has by default."""
    sizes = {"width": 1, "num_layers": 1, "window": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 1}
    features = {
        "norm_eps": 1e-6,
        "qk_norm": False,
        "tie_embeddings": False,
        "scan_layers": False,
        "position.max_length": 2048,
    }
    return configuration.replace(configuration.default("model"), sizes | features)


_HEAD_DIM_DEFAULT = ("qwen3", "gemma2", "gemma3_text")  # without head_dim a constant applies, not width // heads
_TIED_DEFAULT = {"gpt2": True, "gemma2": True, "gemma3_text": True, "bert": True}  # without tie_word_embeddings


def model_config(c: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """(family, configuration of the model) of the content of a config.json.

    Raises:
      UserError: an unknown family, a missing key, or a setting that the model does not support.
    """
    family = c.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"config.json: model_type is {family!r}; expected one of {', '.join(FAMILIES)}")
    try:
        changes = {"vocab_size": c["vocab_size"]} | FAMILIES[family].read(c)
        changes.setdefault("tie_embeddings", c.get("tie_word_embeddings", _TIED_DEFAULT.get(family, False)))
        changes["activation"] = config_json.ACTIVATION_NAMES[changes["activation"]]
    except KeyError as error:
        raise UserError(f"config.json of a {family}: {error} is missing or not supported") from error
    # Checked like a configuration, so that errors name a value of another type or out of range.
    return family, configuration.replace(neutral(), changes, "model.")


def hf_config(family: str, m: ModelConfig) -> dict[str, Any]:
    """The content of config.json for a model: the inverse of `model_config`.

    Raises:
      UserError: the family cannot express the model; names the first key that would differ.
    """
    if family in _HEAD_DIM_DEFAULT:
        m = dataclasses.replace(m, head_dim=positions.head_dim(m))
    written = {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tie_embeddings,
        **FAMILIES[family].write(m),
    }
    refuse_difference(family, m, model_config(written)[1])
    return written


def refuse_difference(label: str, m: ModelConfig, again: ModelConfig) -> None:
    """Raises UserError, naming the first key, if a model changes when it is written and read again.

    Args:
      label: how the error names the form that was written.
      m, again: the model before and after; options that do not affect its outputs may differ.
    """
    before, after = configuration.flat(m, "model."), configuration.flat(again, "model.")
    ignored = {"model.scan_layers", "model.remat", "model.attention_kernel", "model.kv_cache", *_unused(m)}
    ignored |= {"model.window"} if "local" not in m.layer_pattern else set()
    for key, value in before.items():
        if after[key] != value and key not in ignored and not key.startswith("model.precision."):
            raise UserError(f"{label} cannot hold {key}={value!r} (it would be {after[key]!r}); choose another family")


def _unused(m: ModelConfig) -> set[str]:
    """Keys of `model.position` that have no effect in this model."""
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
    for family in FAMILIES:
        try:
            hf_config(family, config)
            return family
        except UserError as error:
            reasons.append(str(error).split(";")[0])
    raise UserError("no family of Hugging Face can hold this model: " + "; ".join(reasons))
