"""Model families of Hugging Face: what their config.json means.

To add a family: write its table of names (ours -> theirs, in `names.py`), a function from config.json to changes of
`ModelConfig`, and name both in `FAMILIES`; `tests/interop` then wants a golden of a tiny model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax import config as config_lib
from llm_jax.config import ModelConfig, PositionConfig, PrecisionConfig
from llm_jax.errors import UserError
from llm_jax.interop import names
from llm_jax.model import positions, stages

# Theirs -> ours; the first of theirs is what is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
LAYERS = {"full_attention": "global", "sliding_attention": "local"}

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


def _period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives `kinds` when repeated."""
    return next(
        tuple(kinds[:p]) for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds))
    )


def _pattern(c: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    """Which layers slide: by `layer_types` if config.json has it, else `kinds`."""
    said = c.get("layer_types")
    try:
        kinds = [LAYERS[kind] for kind in said] if said else kinds
    except KeyError as error:
        raise UserError(f"config.json: layer_types has {error}; expected {' or '.join(LAYERS)}") from error
    window = c.get("sliding_window")
    return {"layer_pattern": _period(kinds)} | ({"window": window} if "local" in kinds else {})


def rope(c: Mapping[str, Any], said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The rotary settings of config.json: rope_theta and rope_scaling, or all in rope_parameters."""
    said = dict(said or c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = said.get("rope_type", said.get("type", "default"))
    base = said.get("rope_theta", c.get("rope_theta", 10000.0))
    found = {"position.kind": "rope", "position.base": float(base)}
    fraction = said.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if fraction is not None:
        found["position.fraction"] = float(fraction)
    original = said.get("original_max_position_embeddings") or c.get("max_position_embeddings")
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"scaling": "linear"},
        "dynamic": {"scaling": "dynamic", "original_length": c.get("max_position_embeddings")},
        "yarn": {
            "scaling": "yarn",
            "original_length": original,
            "beta_fast": float(said.get("beta_fast") or 32.0),
            "beta_slow": float(said.get("beta_slow") or 1.0),
        },
        "llama3": {
            "scaling": "llama3",
            "original_length": original,
            "low_frequency": float(said.get("low_freq_factor", 1.0)),
            "high_frequency": float(said.get("high_freq_factor", 4.0)),
        },
    }
    if kind not in settings:
        raise UserError(f"config.json: rope_type is {kind!r}; expected one of {', '.join(settings)}")
    if kind != "default":
        found["position.factor"] = float(said["factor"])
    refused = [k for k in ("attention_factor", "mscale", "mscale_all_dim") if said.get(k) is not None]
    if kind == "yarn" and (refused or said.get("truncate") is False):
        raise UserError(f"config.json: yarn with {', '.join(refused) or 'truncate: false'} is not supported")
    if kind == "dynamic" and original != c.get("max_position_embeddings"):
        raise UserError("config.json: dynamic rope with an original length of its own is not supported")
    return found | {f"position.{key}": value for key, value in settings[kind].items()}


def write_rope(m: ModelConfig) -> dict[str, Any]:
    """The inverse of `rope`, in the older form, which every version of transformers reads."""
    p = m.position
    found: dict[str, Any] = {"rope_theta": p.base}
    if p.scaling == "none":
        return found
    said: dict[str, Any] = {"rope_type": p.scaling, "factor": p.factor}
    if p.scaling == "dynamic":
        found["max_position_embeddings"] = p.original_length
    if p.scaling in ("yarn", "llama3"):
        said["original_max_position_embeddings"] = p.original_length
    if p.scaling == "yarn":
        said |= {"beta_fast": p.beta_fast, "beta_slow": p.beta_slow}
    if p.scaling == "llama3":
        said |= {"low_freq_factor": p.low_frequency, "high_freq_factor": p.high_frequency}
    if p.scaling == "ntk":
        raise UserError("model.position.scaling=ntk has no name in Hugging Face's config.json; it cannot be written")
    return found | {"rope_scaling": said}


def _llama(c: Mapping[str, Any]) -> dict[str, Any]:
    if bool(c.get("attention_bias")) != bool(c.get("mlp_bias")):
        raise UserError("config.json: attention_bias without mlp_bias (or the reverse) is not supported")
    return {
        "width": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_width": c.get("head_dim") or 0,
        "mlp_width": c["intermediate_size"],
        "activation": c.get("hidden_act") or c.get("hidden_activation") or "silu",
        "norm_eps": float(c.get("rms_norm_eps", 1e-6)),
        "bias": bool(c.get("attention_bias")),
        "position.max_length": c.get("max_position_embeddings", 2048),
        **rope(c),
    }


def _mistral(c: Mapping[str, Any]) -> dict[str, Any]:
    c = {"sliding_window": 4096, **c}
    kind = "local" if c["sliding_window"] else "global"
    return _llama(c) | _pattern(c, [kind] * c["num_hidden_layers"])


def _qwen2(c: Mapping[str, Any]) -> dict[str, Any]:
    layers, full = c["num_hidden_layers"], c.get("max_window_layers", c["num_hidden_layers"])
    slides = bool(c.get("use_sliding_window")) and bool(c.get("sliding_window"))
    kinds = ["local" if slides and i >= full else "global" for i in range(layers)]
    return _llama(c) | _pattern(c, kinds) | {"qkv_bias": True}


def _qwen3(c: Mapping[str, Any]) -> dict[str, Any]:
    return _qwen2(c) | {"qkv_bias": False, "qk_norm": True, "head_width": c.get("head_dim") or 128}


def _gemma(c: Mapping[str, Any]) -> dict[str, Any]:
    if (scalar := c.get("query_pre_attn_scalar", 256)) <= 0:
        raise UserError(f"config.json: query_pre_attn_scalar is {scalar}; expected a positive number")
    if c.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention is not supported")
    return _llama(c) | {
        "activation": c.get("hidden_activation") or "gelu_pytorch_tanh",
        "head_width": c.get("head_dim") or 256,
        "scale_embeddings": True,
        "norm_place": "both",
        "attention_scale": float(scalar) ** -0.5,
        "logit_softcap": float(c.get("final_logit_softcapping") or 0.0),
        "attention_softcap": float(c.get("attn_logit_softcapping") or 0.0),
    }


def _gemma2(c: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ["local" if i % 2 == 0 else "global" for i in range(c["num_hidden_layers"])]
    c = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 4096, **c}
    return _gemma(c) | _pattern(c, kinds)


def _gemma3(c: Mapping[str, Any]) -> dict[str, Any]:
    every = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    kinds = ["global" if (i + 1) % every == 0 else "local" for i in range(c["num_hidden_layers"])]
    said = c.get("rope_parameters") or {}
    if "full_attention" in said:
        whole = rope(c, said["full_attention"])
        local = said["sliding_attention"]["rope_theta"]
        if said["sliding_attention"].get("rope_type", "default") != "default":
            raise UserError("config.json: scaled rope in sliding layers is not supported")
    else:
        whole, local = rope({"rope_theta": 1e6} | dict(c)), c.get("rope_local_base_freq", 10000.0)
    return (
        _gemma({**c, "rope_parameters": {}, "rope_scaling": {}})
        | _pattern(c, kinds)
        | whole
        | {
            "qk_norm": True,
            "position.local_base": float(local),
        }
    )


def _phi(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("qk_layernorm"):
        raise UserError("config.json: phi with qk_layernorm is not supported")
    return {
        **_llama({"hidden_act": "gelu_new", **c}),
        "mlp": "plain",
        "norm": "layer",
        "norm_eps": float(c.get("layer_norm_eps", 1e-5)),
        "parallel": True,
        "bias": True,
        "head_bias": True,
        "position.fraction": 0.5,
        **rope(c),
    }


def _gpt2(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("scale_attn_by_inverse_layer_idx") or not c.get("scale_attn_weights", True):
        raise UserError("config.json: scores that are not scaled by 1 / sqrt(head width) are not supported")
    return {
        "width": c["n_embd"],
        "num_layers": c["n_layer"],
        "num_heads": c["n_head"],
        "num_kv_heads": c["n_head"],
        "mlp": "plain",
        "mlp_width": c.get("n_inner") or 4 * c["n_embd"],
        "activation": c.get("activation_function", "gelu_new"),
        "norm": "layer",
        "norm_eps": float(c.get("layer_norm_epsilon", 1e-5)),
        "bias": True,
        "position.kind": "learned",
        "position.max_length": c["n_positions"],
    }


def _bert(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("position_embedding_type", "absolute") != "absolute":
        raise UserError("config.json: only position_embedding_type=absolute is supported")
    if c.get("is_decoder"):
        raise UserError("config.json: a bert with is_decoder is not supported")
    return {
        "width": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": c["num_attention_heads"],
        "num_kv_heads": c["num_attention_heads"],
        "mlp": "plain",
        "mlp_width": c["intermediate_size"],
        "activation": c["hidden_act"],
        "norm": "layer",
        "norm_eps": float(c["layer_norm_eps"]),
        "norm_place": "post",
        "embed_norm": True,
        "num_types": c["type_vocab_size"],
        "pooler": True,
        "bias": True,
        "causal": False,
        "tie_head": True,
        "position.kind": "learned",
        "position.max_length": c["max_position_embeddings"],
    }


def _write_common(m: ModelConfig) -> dict[str, Any]:
    kinds = [{ours: theirs for theirs, ours in LAYERS.items()}[kind] for kind in stages.layer_kinds(m)]
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "intermediate_size": m.mlp_width,
        "hidden_act": _their_activation(m),
        "rms_norm_eps": m.norm_eps,
        "layer_types": kinds,
        "sliding_window": m.window if "sliding_attention" in kinds else None,
        "max_position_embeddings": m.position.max_length,
        **({"head_dim": m.head_width} if m.head_width else {}),
        **write_rope(m),
    }


def _their_activation(m: ModelConfig) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == m.activation)


def _write_llama(m: ModelConfig) -> dict[str, Any]:
    return _write_common(m) | {"attention_bias": m.bias, "mlp_bias": m.bias}


def _write_qwen(m: ModelConfig) -> dict[str, Any]:
    slides = "local" in m.layer_pattern
    return _write_common(m) | {"use_sliding_window": slides, "attention_bias": False}


def _write_gemma(m: ModelConfig) -> dict[str, Any]:
    common = _write_common(m)
    if m.position.local_base:
        common |= {"rope_local_base_freq": m.position.local_base}
    return common | {
        "hidden_activation": common.pop("hidden_act"),
        "query_pre_attn_scalar": _whole(round((m.attention_scale or 1.0) ** -2, 6)),
        "final_logit_softcapping": m.logit_softcap or None,
        "attn_logit_softcapping": m.attention_softcap or None,
        "attention_bias": False,
    }


def _whole(value: float) -> int | float:
    """As an int where it is one: config.json is read with strict types."""
    return int(value) if value == int(value) else value


def _write_mistral(m: ModelConfig) -> dict[str, Any]:
    common = _write_common(m)
    del common["layer_types"]  # with which transformers would make another model_type of it
    return common


def _gelu_new(m: ModelConfig) -> str:
    """The name that GPT-2 and Phi have for the tanh form."""
    return "gelu_new" if m.activation == "gelu" else _their_activation(m)


def _write_phi(m: ModelConfig) -> dict[str, Any]:
    said = {"hidden_act": _gelu_new(m), "partial_rotary_factor": m.position.fraction, "layer_norm_eps": m.norm_eps}
    return _write_common(m) | said


def _write_gpt2(m: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": m.width,
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_inner": None if m.mlp_width == 4 * m.width else m.mlp_width,
        "n_positions": m.position.max_length,
        "activation_function": _gelu_new(m),
        "layer_norm_epsilon": m.norm_eps,
    }


def _write_bert(m: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": m.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "intermediate_size": m.mlp_width,
        "hidden_act": _their_activation(m),
        "layer_norm_eps": m.norm_eps,
        "type_vocab_size": m.num_types,
        "max_position_embeddings": m.position.max_length,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", names.LLAMA, _llama, _write_llama),
    "mistral": Family("MistralForCausalLM", names.LLAMA, _mistral, _write_mistral),
    "qwen2": Family("Qwen2ForCausalLM", names.LLAMA, _qwen2, _write_qwen),
    "qwen3": Family("Qwen3ForCausalLM", names.LLAMA, _qwen3, _write_qwen),
    "gemma2": Family("Gemma2ForCausalLM", names.GEMMA, _gemma2, _write_gemma),
    "gemma3_text": Family("Gemma3ForCausalLM", names.GEMMA, _gemma3, _write_gemma),
    "phi": Family("PhiForCausalLM", names.PHI, _phi, _write_phi),
    "gpt2": Family("GPT2LMHeadModel", names.GPT2, _gpt2, _write_gpt2, "transformer."),
    "bert": Family("BertModel", names.BERT, _bert, _write_bert, "bert."),
}

# What a model is where its family does not say otherwise.
NEUTRAL = ModelConfig(
    vocab_size=0,
    width=1,
    num_layers=1,
    causal=True,
    layer_pattern=("global",),
    window=1,
    num_heads=1,
    num_kv_heads=1,
    head_width=0,
    mlp="gated",
    mlp_width=1,
    activation="silu",
    norm="rms",
    norm_eps=1e-6,
    norm_place="pre",
    parallel=False,
    embed_norm=False,
    num_types=0,
    pooler=False,
    qk_norm=False,
    bias=False,
    qkv_bias=False,
    head_bias=False,
    attention_scale=0.0,
    attention_softcap=0.0,
    logit_softcap=0.0,
    scale_embeddings=False,
    tie_head=False,
    attention="auto",
    position=PositionConfig(
        kind="rope",
        base=10000.0,
        local_base=0.0,
        combine="add",
        width=0,
        max_length=2048,
        clip=16,
        shaw="both",
        buckets=32,
        max_distance=128,
        fraction=1.0,
        interleaved=False,
        scaling="none",
        factor=1.0,
        original_length=0,
        beta_fast=32.0,
        beta_slow=1.0,
        low_frequency=1.0,
        high_frequency=4.0,
    ),
    precision=PrecisionConfig(params="float32", compute="float32", accumulate="float32", output="float32"),
    scan_layers=False,
    remat="none",
)
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
        found.setdefault("tie_head", c.get("tie_word_embeddings", _TIED.get(kind, False)))
        activation = found["activation"]
        found["activation"] = ACTIVATIONS[activation]
    except KeyError as error:
        raise UserError(f"config.json of a {kind}: {error} is missing, or not known here") from error
    below = {key.split(".")[1]: value for key, value in found.items() if "." in key}
    position = dataclasses.replace(NEUTRAL.position, **below)
    plain = {key: value for key, value in found.items() if "." not in key}
    # Built anew, so that values of another type or out of range are refused with their names.
    return kind, config_lib.build(
        config_lib.as_dict(dataclasses.replace(NEUTRAL, **plain, position=position)), ModelConfig, "model."
    )


def their_config(kind: str, m: ModelConfig) -> dict[str, Any]:
    """The inverse of `model_config`: what config.json says of the model.

    Raises:
      UserError: the family cannot hold this model; the first key in which they differ is named.
    """
    family = FAMILIES[kind]
    if kind in _OWN_HEAD_WIDTH:
        m = dataclasses.replace(m, head_width=positions.head_width(m))
    written = {
        "model_type": kind,
        "architectures": [family.architecture],
        "vocab_size": m.vocab_size,
        "tie_word_embeddings": m.tie_head,
        **family.write(m),
    }
    refuse_difference(kind, m, model_config(written)[1])
    return written


def refuse_difference(what: str, m: ModelConfig, again: ModelConfig) -> None:
    """Raises UserError, naming the first key, where a model is another when it is read again."""
    before, after = config_lib.flat(m, "model."), config_lib.flat(again, "model.")
    free = {"model.scan_layers", "model.remat", "model.attention", *_unused(m)}
    free |= {"model.window"} if "local" not in m.layer_pattern else set()
    for key, value in before.items():
        if after[key] != value and key not in free and not key.startswith("model.precision."):
            raise UserError(f"{what} cannot hold {key}={value!r} (it would be {after[key]!r}); choose another family")


def _unused(m: ModelConfig) -> set[str]:
    """Keys of `model.position` that say nothing about this model."""
    p = m.position
    used = {"kind"} | {
        "rope": {"base", "local_base", "fraction", "interleaved", "scaling"},
        "learned": {"combine", "max_length"},
        "sinusoidal": {"combine", "base"},
    }.get(p.kind, set())
    if p.scaling != "none":
        used |= {"factor"}
    used |= {
        "dynamic": {"original_length"},
        "yarn": {"original_length", "beta_fast", "beta_slow"},
        "llama3": {"original_length", "low_frequency", "high_frequency"},
    }.get(p.scaling, set())
    return {f"model.position.{f.name}" for f in dataclasses.fields(p) if f.name not in used}
