"""Tables of names: our parameters and the tensors of other people's checkpoints, one to one."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Their:
    """A tensor of theirs, and how ours is made of it.

    Attributes:
      name: "{i}" is the layer.
      turned: theirs is (out, in).
      plus: ours is theirs plus this (Gemma's norms multiply by 1 + w).
      part: (i, n): ours is the i-th of n equal parts along our last axis.
    """

    name: str
    turned: bool = False
    plus: float = 0.0
    part: tuple[int, int] = (0, 1)


Names = Mapping[str, Their]


def _linear(pairs: Mapping[str, str], turned: bool = True) -> dict[str, Their]:
    """Weights and biases: ours -> the stem of theirs."""
    weights = {ours: Their(f"{theirs}.weight", turned) for ours, theirs in pairs.items()}
    return weights | {f"{ours}_bias": Their(f"{theirs}.bias") for ours, theirs in pairs.items()}


def _norms(pairs: Mapping[str, str], plus: float = 0.0) -> dict[str, Their]:
    scales = {f"{ours}/scale": Their(f"{theirs}.weight", plus=plus) for ours, theirs in pairs.items()}
    return scales | {f"{ours}/bias": Their(f"{theirs}.bias") for ours, theirs in pairs.items()}


_LAYER, _THEIRS = "layers/{i}", "model.layers.{i}"
_PROJECTIONS = {f"{_LAYER}/attention/{n}": f"{_THEIRS}.self_attn.{n[0]}_proj" for n in ("query", "key", "value")}
_GATED = {f"{_LAYER}/mlp/{n}": f"{_THEIRS}.mlp.{n}_proj" for n in ("gate", "up", "down")}
LLAMA: Names = {
    "embed/table": Their("model.embed_tokens.weight"),
    **_linear(_PROJECTIONS | {f"{_LAYER}/attention/out": f"{_THEIRS}.self_attn.o_proj"} | _GATED),
    **_norms(
        {
            f"{_LAYER}/attention_norm": f"{_THEIRS}.input_layernorm",
            f"{_LAYER}/mlp_norm": f"{_THEIRS}.post_attention_layernorm",
            f"{_LAYER}/attention/query_norm": f"{_THEIRS}.self_attn.q_norm",
            f"{_LAYER}/attention/key_norm": f"{_THEIRS}.self_attn.k_norm",
            "final_norm": "model.norm",
        }
    ),
    "head/kernel": Their("lm_head.weight", turned=True),
}
GEMMA: Names = dict(LLAMA) | _norms(
    {
        f"{_LAYER}/attention_norm": f"{_THEIRS}.input_layernorm",
        f"{_LAYER}/attention_post_norm": f"{_THEIRS}.post_attention_layernorm",
        f"{_LAYER}/mlp_norm": f"{_THEIRS}.pre_feedforward_layernorm",
        f"{_LAYER}/mlp_post_norm": f"{_THEIRS}.post_feedforward_layernorm",
        f"{_LAYER}/attention/query_norm": f"{_THEIRS}.self_attn.q_norm",
        f"{_LAYER}/attention/key_norm": f"{_THEIRS}.self_attn.k_norm",
        "final_norm": "model.norm",
    },
    plus=1.0,
)
PHI: Names = {
    "embed/table": Their("model.embed_tokens.weight"),
    **_linear(
        _PROJECTIONS
        | {
            f"{_LAYER}/attention/out": f"{_THEIRS}.self_attn.dense",
            f"{_LAYER}/mlp/up": f"{_THEIRS}.mlp.fc1",
            f"{_LAYER}/mlp/down": f"{_THEIRS}.mlp.fc2",
            "head/kernel": "lm_head",
        }
    ),
    **_norms({f"{_LAYER}/attention_norm": f"{_THEIRS}.input_layernorm", "final_norm": "model.final_layernorm"}),
}
_QKV = ("query", "key", "value")
GPT2: Names = {
    "embed/table": Their("transformer.wte.weight"),
    "embed/position_table": Their("transformer.wpe.weight"),
    **{
        f"{_LAYER}/attention/{n}{ours}": Their(f"transformer.h.{{i}}.attn.c_attn.{theirs}", part=(i, 3))
        for i, n in enumerate(_QKV)
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    },
    **_linear(
        {
            f"{_LAYER}/attention/out": "transformer.h.{i}.attn.c_proj",
            f"{_LAYER}/mlp/up": "transformer.h.{i}.mlp.c_fc",
            f"{_LAYER}/mlp/down": "transformer.h.{i}.mlp.c_proj",
        },
        turned=False,
    ),
    **_norms(
        {
            f"{_LAYER}/attention_norm": "transformer.h.{i}.ln_1",
            f"{_LAYER}/mlp_norm": "transformer.h.{i}.ln_2",
            "final_norm": "transformer.ln_f",
        }
    ),
    "head/kernel": Their("lm_head.weight", turned=True),
}
BERT: Names = {
    "embed/table": Their("embeddings.word_embeddings.weight"),
    "embed/position_table": Their("embeddings.position_embeddings.weight"),
    "embed/types": Their("embeddings.token_type_embeddings.weight"),
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

# GGUF files of all of ggml's architectures that are read here.
_BLOCK = "blk.{i}"
_GGUF: Names = {
    "embed/table": Their("token_embd.weight"),
    "embed/position_table": Their("position_embd.weight"),
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


def gguf(fused: bool) -> Names:
    """The names in a GGUF file, where queries, keys and values are one tensor (`fused`) or three."""
    together = {
        f"{_LAYER}/attention/{n}{ours}": Their(f"{_BLOCK}.attn_qkv.{theirs}", turned=not ours, part=(i, 3))
        for i, n in enumerate(_QKV)
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    }
    return dict(_GGUF) | (together if fused else {})
