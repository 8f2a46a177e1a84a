"""Tables of tensor names: parameter paths of this package <-> tensors of Hugging Face and GGUF checkpoints."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from llm_jax.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A stored tensor, and how a parameter is computed from it.

    Attributes:
      name: in the file; "{i}" stands for the layer.
      transposed: the stored tensor is (out, in), the parameter (in, out).
      offset: added to the stored values (Gemma's norms multiply by 1 + w).
      part: (i, n): the parameter is the i-th of n parts along its last axis. Both are in units of the parameter's own
        width, so that i need not be whole where the parts have different widths.
      groups: the stored tensor has this many groups of parts, each with an equal share of every parameter.
      layout: of parts that depend on the sizes of the model, which `resolve` replaces by `part` and `groups`:
        "heads": each head has its queries, keys and values side by side; "queries first": all queries, then all keys,
        then all values.
    """

    name: str
    transposed: bool = False
    offset: float = 0.0
    part: tuple[int | Fraction, int | Fraction] = (0, 1)
    groups: int = 1
    layout: str = ""


Names = Mapping[str, TensorSpec]  # parameter path, with "{i}" for the layer -> its stored tensor


def _linear(pairs: Mapping[str, str], transposed: bool = True) -> dict[str, TensorSpec]:
    """Weights and biases of linear layers, from {path: stem of the tensor name}."""
    weights = {path: TensorSpec(f"{stem}.weight", transposed) for path, stem in pairs.items()}
    return weights | {f"{path}_bias": TensorSpec(f"{stem}.bias") for path, stem in pairs.items()}


def _norms(pairs: Mapping[str, str], offset: float = 0.0) -> dict[str, TensorSpec]:
    """Scales and biases of norms, from {path: stem of the tensor name}."""
    scales = {f"{path}/scale": TensorSpec(f"{stem}.weight", offset=offset) for path, stem in pairs.items()}
    return scales | {f"{path}/bias": TensorSpec(f"{stem}.bias") for path, stem in pairs.items()}


_QKV = ("query", "key", "value")


def _fused(stem: str, transposed: bool = True, layout: str = "") -> dict[str, TensorSpec]:
    """Weights and biases of queries, keys and values that are parts of one stored tensor."""
    return {
        f"{_LAYER}/attention/{n}{suffix}": TensorSpec(
            f"{stem}.{kind}", transposed and not suffix, part=(i, 3), layout=layout
        )
        for i, n in enumerate(_QKV)
        for suffix, kind in (("", "weight"), ("_bias", "bias"))
    }


_LAYER, _HF_LAYER = "layers/{i}", "model.layers.{i}"
_PROJECTIONS = {f"{_LAYER}/attention/{n}": f"{_HF_LAYER}.self_attn.{n[0]}_proj" for n in _QKV}
_GATED = {f"{_LAYER}/mlp/{n}": f"{_HF_LAYER}.mlp.{n}_proj" for n in ("gate", "up", "down")}
LLAMA: Names = {
    "embed/table": TensorSpec("model.embed_tokens.weight"),
    **_linear(_PROJECTIONS | {f"{_LAYER}/attention/out": f"{_HF_LAYER}.self_attn.o_proj"} | _GATED),
    **_norms(
        {
            f"{_LAYER}/attention_norm": f"{_HF_LAYER}.input_layernorm",
            f"{_LAYER}/mlp_norm": f"{_HF_LAYER}.post_attention_layernorm",
            f"{_LAYER}/attention/query_norm": f"{_HF_LAYER}.self_attn.q_norm",
            f"{_LAYER}/attention/key_norm": f"{_HF_LAYER}.self_attn.k_norm",
            "final_norm": "model.norm",
        }
    ),
    "head/kernel": TensorSpec("lm_head.weight", transposed=True),
}
GEMMA: Names = dict(LLAMA) | _norms(
    {
        f"{_LAYER}/attention_norm": f"{_HF_LAYER}.input_layernorm",
        f"{_LAYER}/attention_post_norm": f"{_HF_LAYER}.post_attention_layernorm",
        f"{_LAYER}/mlp_norm": f"{_HF_LAYER}.pre_feedforward_layernorm",
        f"{_LAYER}/mlp_post_norm": f"{_HF_LAYER}.post_feedforward_layernorm",
        f"{_LAYER}/attention/query_norm": f"{_HF_LAYER}.self_attn.q_norm",
        f"{_LAYER}/attention/key_norm": f"{_HF_LAYER}.self_attn.k_norm",
        "final_norm": "model.norm",
    },
    offset=1.0,
)
PHI: Names = {
    "embed/table": TensorSpec("model.embed_tokens.weight"),
    **_linear(
        _PROJECTIONS
        | {
            f"{_LAYER}/attention/out": f"{_HF_LAYER}.self_attn.dense",
            f"{_LAYER}/mlp/up": f"{_HF_LAYER}.mlp.fc1",
            f"{_LAYER}/mlp/down": f"{_HF_LAYER}.mlp.fc2",
            "head/kernel": "lm_head",
        }
    ),
    **_norms(
        {
            f"{_LAYER}/attention_norm": f"{_HF_LAYER}.input_layernorm",
            f"{_LAYER}/attention/query_norm": f"{_HF_LAYER}.self_attn.q_layernorm",
            f"{_LAYER}/attention/key_norm": f"{_HF_LAYER}.self_attn.k_layernorm",
            "final_norm": "model.final_layernorm",
        }
    ),
}
PHI3: Names = {
    **LLAMA,
    **_fused(f"{_HF_LAYER}.self_attn.qkv_proj", layout="queries first"),
    f"{_LAYER}/mlp/gate": TensorSpec(f"{_HF_LAYER}.mlp.gate_up_proj.weight", transposed=True, part=(0, 2)),
    f"{_LAYER}/mlp/up": TensorSpec(f"{_HF_LAYER}.mlp.gate_up_proj.weight", transposed=True, part=(1, 2)),
}
OLMO2: Names = {
    **LLAMA,
    **_norms(
        {
            f"{_LAYER}/attention_post_norm": f"{_HF_LAYER}.post_attention_layernorm",
            f"{_LAYER}/mlp_post_norm": f"{_HF_LAYER}.post_feedforward_layernorm",
        }
    ),
}
STARCODER2: Names = {
    **LLAMA,
    **_linear({f"{_LAYER}/mlp/up": f"{_HF_LAYER}.mlp.c_fc", f"{_LAYER}/mlp/down": f"{_HF_LAYER}.mlp.c_proj"}),
}
_NEOX = "gpt_neox.layers.{i}"
GPT_NEOX: Names = {
    "embed/table": TensorSpec("gpt_neox.embed_in.weight"),
    **_fused(f"{_NEOX}.attention.query_key_value", layout="heads"),
    **_linear(
        {
            f"{_LAYER}/attention/out": f"{_NEOX}.attention.dense",
            f"{_LAYER}/mlp/up": f"{_NEOX}.mlp.dense_h_to_4h",
            f"{_LAYER}/mlp/down": f"{_NEOX}.mlp.dense_4h_to_h",
        }
    ),
    **_norms(
        {
            f"{_LAYER}/attention_norm": f"{_NEOX}.input_layernorm",
            f"{_LAYER}/mlp_norm": f"{_NEOX}.post_attention_layernorm",
            "final_norm": "gpt_neox.final_layer_norm",
        }
    ),
    "head/kernel": TensorSpec("embed_out.weight", transposed=True),
}
GPT2: Names = {
    "embed/table": TensorSpec("transformer.wte.weight"),
    "embed/position_table": TensorSpec("transformer.wpe.weight"),
    **_fused("transformer.h.{i}.attn.c_attn", transposed=False),
    **_linear(
        {
            f"{_LAYER}/attention/out": "transformer.h.{i}.attn.c_proj",
            f"{_LAYER}/mlp/up": "transformer.h.{i}.mlp.c_fc",
            f"{_LAYER}/mlp/down": "transformer.h.{i}.mlp.c_proj",
        },
        transposed=False,
    ),
    **_norms(
        {
            f"{_LAYER}/attention_norm": "transformer.h.{i}.ln_1",
            f"{_LAYER}/mlp_norm": "transformer.h.{i}.ln_2",
            "final_norm": "transformer.ln_f",
        }
    ),
    "head/kernel": TensorSpec("lm_head.weight", transposed=True),
}
BERT: Names = {
    "embed/table": TensorSpec("embeddings.word_embeddings.weight"),
    "embed/position_table": TensorSpec("embeddings.position_embeddings.weight"),
    "embed/types": TensorSpec("embeddings.token_type_embeddings.weight"),
    **_linear(
        {f"{_LAYER}/attention/{n}": f"encoder.layer.{{i}}.attention.self.{n}" for n in _QKV}
        | {
            f"{_LAYER}/attention/out": "encoder.layer.{i}.attention.output.dense",
            f"{_LAYER}/mlp/up": "encoder.layer.{i}.intermediate.dense",
            f"{_LAYER}/mlp/down": "encoder.layer.{i}.output.dense",
            "pooler/kernel": "pooler.dense",
        }
    ),
    **_norms(
        {
            "embed/norm": "embeddings.LayerNorm",
            f"{_LAYER}/attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
            f"{_LAYER}/mlp_norm": "encoder.layer.{i}.output.LayerNorm",
        }
    ),
}

# GGUF files of all supported architectures have the same names; BERT has others for norms, which follow its layers.
_BLOCK = "blk.{i}"
_GGUF: Names = {
    "embed/table": TensorSpec("token_embd.weight"),
    "embed/position_table": TensorSpec("position_embd.weight"),
    **_linear(
        {
            f"{_LAYER}/attention/query": f"{_BLOCK}.attn_q",
            f"{_LAYER}/attention/key": f"{_BLOCK}.attn_k",
            f"{_LAYER}/attention/value": f"{_BLOCK}.attn_v",
            f"{_LAYER}/attention/out": f"{_BLOCK}.attn_output",
            f"{_LAYER}/mlp/gate": f"{_BLOCK}.ffn_gate",
            f"{_LAYER}/mlp/up": f"{_BLOCK}.ffn_up",
            f"{_LAYER}/mlp/down": f"{_BLOCK}.ffn_down",
            "head/kernel": "output",
        }
    ),
    **_norms(
        {
            f"{_LAYER}/attention_norm": f"{_BLOCK}.attn_norm",
            f"{_LAYER}/attention_post_norm": f"{_BLOCK}.post_attention_norm",
            f"{_LAYER}/mlp_norm": f"{_BLOCK}.ffn_norm",
            f"{_LAYER}/mlp_post_norm": f"{_BLOCK}.post_ffw_norm",
            f"{_LAYER}/attention/query_norm": f"{_BLOCK}.attn_q_norm",
            f"{_LAYER}/attention/key_norm": f"{_BLOCK}.attn_k_norm",
            "final_norm": "output_norm",
        }
    ),
}


_GGUF_BERT: Names = {
    "embed/types": TensorSpec("token_types.weight"),
    **_norms(
        {
            "embed/norm": "token_embd_norm",
            f"{_LAYER}/attention_norm": f"{_BLOCK}.attn_output_norm",
            f"{_LAYER}/mlp_norm": f"{_BLOCK}.layer_output_norm",
        }
    ),
}


def gguf(fused: bool, encoder: bool = False) -> Names:
    """The names in a GGUF file.

    Args:
      fused: queries, keys and values are one tensor, not three.
      encoder: the names of BERT.
    """
    fused_names = _fused(f"{_BLOCK}.attn_qkv") if fused else {}
    return {**_GGUF, **(_GGUF_BERT if encoder else {}), **fused_names}


def resolve(table: Names, config: ModelConfig) -> Names:
    """The table with `layout` replaced by `part` and `groups`, for a model of these sizes."""
    ratio = Fraction(config.num_heads, config.num_kv_heads)
    parts = {"query": (Fraction(0), 1 + 2 / ratio), "key": (ratio, ratio + 2), "value": (ratio + 1, ratio + 2)}

    def resolved(path: str, spec: TensorSpec) -> TensorSpec:
        if spec.layout == "heads":
            return dataclasses.replace(spec, groups=config.num_heads, layout="")
        if spec.layout == "queries first":
            return dataclasses.replace(spec, part=parts[path.rsplit("/", 1)[-1].removesuffix("_bias")], layout="")
        return spec

    return {path: resolved(path, spec) for path, spec in table.items()}
