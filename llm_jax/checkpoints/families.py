"""The model families of Hugging Face, one row each.

To add a family: write its table of tensor names (`names.py`), functions that read and write its config.json
(`config_llama.py` or `config_gpt.py`), and a row of `FAMILIES`; `tests/checkpoints` requires golden values of a tiny
model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax import configuration
from llm_jax.checkpoints import config_gpt, config_json, config_llama, names
from llm_jax.checkpoints.names import Names
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
      prefix: the prefix of tensor names in files that were saved with an output head. Files saved without a head have
        no prefix; both are read.
      tied: the default of tie_word_embeddings: whether the output head is the embedding table.
      head_dim: whether the class has its own default of head_dim, rather than width / num_heads.
    """

    architecture: str
    names: Names
    read: Read
    write: Write
    prefix: str = "model."
    tied: bool = False
    head_dim: bool = False

    def tensor_names(self, config: ModelConfig) -> Names:
        """`names` for a model of the sizes in `config`."""
        return names.resolve(self.names, config)


_llama, _gpt = config_llama, config_gpt
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", names.LLAMA, _llama.read_llama, _llama.write_llama),
    "mistral": Family("MistralForCausalLM", names.LLAMA, _llama.read_mistral, _llama.write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", names.LLAMA, _llama.read_qwen2, _llama.write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", names.LLAMA, _llama.read_qwen3, _llama.write_qwen, head_dim=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", names.GEMMA, _llama.read_gemma2, _llama.write_gemma, tied=True, head_dim=True
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", names.GEMMA, _llama.read_gemma3, _llama.write_gemma, tied=True, head_dim=True
    ),
    "phi": Family("PhiForCausalLM", names.PHI, _gpt.read_phi, _gpt.write_phi),
    "phi3": Family("Phi3ForCausalLM", names.PHI3, _llama.read_phi3, _llama.write_phi3),
    "smollm3": Family("SmolLM3ForCausalLM", names.LLAMA, _llama.read_smollm3, _llama.write_smollm3, tied=True),
    "olmo2": Family("Olmo2ForCausalLM", names.OLMO2, _llama.read_olmo2, _llama.write_olmo2),
    "granite": Family("GraniteForCausalLM", names.LLAMA, _llama.read_granite, _llama.write_granite),
    "starcoder2": Family(
        "Starcoder2ForCausalLM", names.STARCODER2, _gpt.read_starcoder2, _gpt.write_starcoder2, tied=True
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", names.GPT_NEOX, _gpt.read_gpt_neox, _gpt.write_gpt_neox, "gpt_neox."),
    "gpt2": Family("GPT2LMHeadModel", names.GPT2, _gpt.read_gpt2, _gpt.write_gpt2, "transformer.", tied=True),
    "bert": Family("BertModel", names.BERT, _gpt.read_bert, _gpt.write_bert, "bert.", tied=True),
}
# Families of mixtures of experts without "moe" in their names, and the keys for the number of experts.
_MIXTURES = frozenset(
    "dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 flex_olmo gpt_oss jamba kimi_k25 kimi_linear llama4 "
    "llama4_text longcat_flash minimax minimax_m2 mixtral nemotron_h qwen3_next".split()
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@functools.cache
def neutral() -> ModelConfig:
    """The configuration that `read` functions change: the defaults, without features that no family has by default."""
    sizes = {"width": 1, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_dim": 1}
    features = {
        "norm_eps": 1e-6,
        "qk_norm": False,
        "tie_embeddings": False,
        "scan_layers": False,
        "position.max_length": 2048,
    }
    return configuration.replace(configuration.default("model"), sizes | features)


def model_config(c: Mapping[str, Any]) -> tuple[str, ModelConfig]:
    """(family, configuration of the model) of the content of a config.json.

    Raises:
      UserError: an unknown family, a missing key, or a setting that the model does not support.
    """
    family = c.get("model_type")
    if _is_mixture(c):
        raise UserError(
            f"config.json: model_type is {family!r}, a mixture of experts, which is not supported; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"config.json: model_type is {family!r}; expected one of {', '.join(FAMILIES)}")
    try:
        changes = {"vocab_size": c["vocab_size"]} | FAMILIES[family].read(c)
        changes.setdefault("tie_embeddings", c.get("tie_word_embeddings", FAMILIES[family].tied))
        if changes["activation"] not in config_json.ACTIVATION_NAMES:
            names = ", ".join(config_json.ACTIVATION_NAMES)
            raise UserError(f"config.json: the activation is {changes['activation']!r}; expected one of {names}")
        changes["activation"] = config_json.ACTIVATION_NAMES[changes["activation"]]
    except KeyError as error:
        raise UserError(f"config.json of a {family}: {error} is missing or not supported") from error
    # Checked like a configuration, so that errors name a value of another type or out of range.
    return family, configuration.replace(neutral(), changes, "model.")


def _is_mixture(c: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts: by the number of experts if it has one, else by name."""
    sections = [c, *(value for value in c.values() if isinstance(value, dict))]  # text_config, ffn_config
    counts = [section[key] for section in sections for key in _EXPERTS if isinstance(section.get(key), int)]
    name = str(c.get("model_type"))
    return any(count > 1 for count in counts) if counts else name in _MIXTURES or "moe" in name


def hf_config(family: str, m: ModelConfig) -> dict[str, Any]:
    """The content of config.json for a model: the inverse of `model_config`.

    Raises:
      UserError: the family cannot express the model; names the first key that would differ.
    """
    if FAMILIES[family].head_dim:
        m = dataclasses.replace(m, head_dim=positions.head_dim(m))
    written = {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tie_embeddings,
        **FAMILIES[family].write(m),
    }
    check_round_trip(family, m, model_config(written)[1])
    return written


def check_round_trip(label: str, m: ModelConfig, again: ModelConfig) -> None:
    """Raises UserError, naming the first key, if a model changes when it is written and read again.

    Args:
      label: the name of the written format in the error.
      m, again: the model before and after; options that do not affect its outputs may differ.
    """
    before, after = (configuration.flat(_canonical(config), "model.") for config in (m, again))
    ignored = {"model.scan_layers", "model.remat", "model.attention_kernel", "model.kv_cache", *_unused(m)}
    ignored |= {"model.pooler"}  # it is not in config.json; the reader looks for its tensors
    ignored |= {"model.window"} if "local" not in m.layer_pattern else set()
    for key, value in before.items():
        if after[key] != value and key not in ignored and not key.startswith("model.precision."):
            raise UserError(f"{label} cannot hold {key}={value!r} (it would be {after[key]!r}); choose another family")


def _canonical(m: ModelConfig) -> ModelConfig:
    """The same model with options normalized that can be set in several equivalent ways, or that have no effect."""
    attention, mlp = config_json.has_attention_bias(m), config_json.has_mlp_bias(m)
    changes: dict[str, Any] = config_json.biases(attention, mlp) | {"qkv_bias": m.qkv_bias and not attention}
    if not m.qk_norm:
        changes |= {"qk_norm_kind": "rms", "qk_norm_axis": "head"}
    if not m.parallel_residual:
        changes |= {"parallel_norms": False}
    if m.attention_scale == positions.head_dim(m) ** -0.5:
        changes |= {"attention_scale": 0.0}
    return dataclasses.replace(m, **changes)


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
        "yarn": {"original_length", "attention_factor", "beta_fast", "beta_slow", "truncate"},
        "longrope": {"original_length", "attention_factor", "short_factors", "long_factors"},
        "llama3": {"original_length", "low_freq_factor", "high_freq_factor"},
    }.get(p.scaling, set())
    return {f"model.position.{f.name}" for f in dataclasses.fields(p) if f.name not in used}


def first_family(config: ModelConfig) -> str:
    """The first family that can express a model. Raises UserError, with every family's reason, if none can."""
    reasons = []
    for family in FAMILIES:
        try:
            hf_config(family, config)
            return family
        except UserError as error:
            reasons.append(str(error).split(";")[0])
    raise UserError("no family of Hugging Face can hold this model: " + "; ".join(reasons))
