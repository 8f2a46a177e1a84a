"""Tables of tensor names: parameter paths of this package <-> tensors of Hugging Face and GGUF checkpoints."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A stored tensor, and how a parameter is computed from it.

    Attributes:
      name: in the file; "{i}" stands for the layer.
      transposed: the stored tensor is (out, in), the parameter (in, out).
      offset: added to the stored values (Gemma's norms multiply by 1 + w).
      part: (i, n): the parameter is the i-th of n equal parts along its last axis.
    """

    name: str
    transposed: bool = False
    offset: float = 0.0
    part: tuple[int, int] = (0, 1)


Names = Mapping[str, TensorSpec]  # parameter path, with "{i}" for the layer -> its stored tensor


def _linear(pairs: Mapping[str, str], transposed: bool = True) -> dict[str, TensorSpec]:
    """Weights and biases of linear layers, from {path: stem of the tensor name}."""
    weights = {path: TensorSpec(f"{stem}.weight", transposed) for path, stem in pairs.items()}
    return weights | {f"{path}_bias": TensorSpec(f"{stem}.bias") for path, stem in pairs.items()}


def _norms(pairs: Mapping[str, str], offset: float = 0.0) -> dict[str, TensorSpec]:
    """Scales and biases of norms, from {path: stem of the tensor name}."""
    scales = {f"{path}/scale": TensorSpec(f"{stem}.weight", offset=offset) for path, stem in pairs.items()}
    return scales | {f"{path}/bias": TensorSpec(f"{stem}.bias") for path, stem in pairs.items()}


_LAYER, _HF_LAYER = "layers/{i}", "model.layers.{i}"
_PROJECTIONS = {f"{_LAYER}/attention/{n}": f"{_HF_LAYER}.self_attn.{n[0]}_proj" for n in ("query", "key", "value")}
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
    **_norms({f"{_LAYER}/attention_norm": f"{_HF_LAYER}.input_layernorm", "final_norm": "model.final_layernorm"}),
}
_QKV = ("query", "key", "value")
GPT2: Names = {
    "embed/table": TensorSpec("transformer.wte.weight"),
    "embed/position_table": TensorSpec("transformer.wpe.weight"),
    **{
        f"{_LAYER}/attention/{n}{suffix}": TensorSpec(f"transformer.h.{{i}}.attn.c_attn.{kind}", part=(i, 3))
        for i, n in enumerate(_QKV)
        for suffix, kind in (("", "weight"), ("_bias", "bias"))
    },
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
    fused_names = {
        f"{_LAYER}/attention/{n}{suffix}": TensorSpec(f"{_BLOCK}.attn_qkv.{kind}", transposed=not suffix, part=(i, 3))
        for i, n in enumerate(_QKV)
        for suffix, kind in (("", "weight"), ("_bias", "bias"))
    }
    return {**_GGUF, **(_GGUF_BERT if encoder else {}), **(fused_names if fused else {})}
