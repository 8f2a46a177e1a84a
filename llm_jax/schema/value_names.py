"""The names of other codebases for the values of options and flags, and the value nearest to a mistyped one."""

import difflib
from collections.abc import Iterable

# {value of other codebases, in lower case: values here}; the first value that the option allows is suggested.
OTHER_VALUES: dict[str, tuple[str, ...]] = {
    "4bit": ("nf4", "int4"),
    "8bit": ("int8",),
    "adam": ("adamw",),
    "adamw_8bit": ("adamw",),
    "adamw_bnb_8bit": ("adamw",),
    "adamw_anyprecision": ("adamw",),
    "adamw_apex_fused": ("adamw",),
    "adamw_hf": ("adamw",),
    "adamw_torch": ("adamw",),
    "adamw_torch_8bit": ("adamw",),
    "adamw_torch_fused": ("adamw",),
    "bf16": ("bfloat16", "BF16"),
    "bitsandbytes": ("nf4", "int8"),
    "bnb": ("nf4", "int8"),
    "character": ("char",),
    "chat": ("instructions",),
    "chatml": ("instructions",),
    "classification": ("labelled",),
    "clm": ("text",),
    "constant_with_warmup": ("constant",),
    "conversations": ("instructions",),
    "cosine_with_min_lr": ("cosine",),
    "cosine_with_restarts": ("cosine",),
    "cosine_with_warmup": ("cosine",),
    "dpo": ("preferences",),
    "f16": ("float16", "F16"),
    "f32": ("float32", "F32"),
    "float": ("float32",),
    "fp16": ("float16", "F16"),
    "fp32": ("float32", "F32"),
    "fp4": ("nf4", "mxfp4"),
    "fp8": ("fp8_e4m3",),
    "geglu": ("gated",),
    "gelu_fast": ("gelu",),
    "gelu_new": ("gelu",),
    "gelu_pytorch_tanh": ("gelu",),
    "gguf_q4_0": ("Q4_0",),
    "gpt2": ("byte_bpe",),
    "half": ("float16",),
    "huggingface": ("hf",),
    "llama.cpp": ("gguf",),
    "adapter": ("peft",),
    "adapters": ("peft",),
    "instruct": ("instructions",),
    "int3": ("int4",),
    "int5": ("int8",),
    "int6": ("int8",),
    "instruction": ("instructions",),
    "layernorm": ("layer",),
    "messages": ("instructions",),
    "lion_32bit": ("lion",),
    "lion_8bit": ("lion",),
    "paged_adamw": ("adamw",),
    "rsqrt": ("inverse_sqrt",),
    "scale_by_adam": ("adamw",),
    "scale_by_lion": ("lion",),
    "paged_adamw_32bit": ("adamw",),
    "paged_adamw_8bit": ("adamw",),
    "paged_lion_32bit": ("lion",),
    "paged_lion_8bit": ("lion",),
    "pretrain": ("text",),
    "q3_k_m": ("Q4_0", "int4"),
    "q4_k_m": ("Q4_0", "int4"),
    "q4_k_s": ("Q4_0", "int4"),
    "q5_k_m": ("Q8_0", "int8"),
    "q6_k": ("Q8_0", "int8"),
    "q8": ("Q8_0", "int8"),
    "rmsnorm": ("rms",),
    "rotary": ("rope",),
    "safetensors": ("hf",),
    "transformers": ("hf",),
    "pytorch": ("hf",),
    "sft": ("instructions",),
    "swiglu": ("gated", "silu"),
    "swish": ("silu",),
    "tensorboardx": ("tensorboard",),
    "tiktoken": ("byte_bpe",),
    "torch.bfloat16": ("bfloat16",),
    "torch.float16": ("float16",),
    "torch.float32": ("float32",),
    "warmup_stable_decay": ("wsd",),
}

# {value of other codebases, in lower case: the options that have its effect here}.
SET_BY_OTHER_OPTIONS = {
    "lora_plus": "lora.variant=lora with lora.b_lr_ratio",
    "loraplus": "lora.variant=lora with lora.b_lr_ratio",
    "qdora": "lora.variant=dora with quant.scheme=nf4",
    "qlora": "lora.variant=lora with quant.scheme=nf4",
    "rslora": "lora.variant=lora with lora.rank_stabilized=True",
}


def expected(value: str, allowed: Iterable[str]) -> str:
    """Returns "expected one of A, B; did you mean 'A'?" for a value that is not allowed; see `suggestion`."""
    values = [text for text in allowed if text]
    return f"expected one of {', '.join(values)}{suggestion(value, values)}"


def suggestion(value: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'X'?" for the allowed value that has this name elsewhere or the nearest name, or ""."""
    values = [text for text in allowed if text]
    if (options := SET_BY_OTHER_OPTIONS.get(value.lower())) and "lora" in values:
        return f"; did you mean {options}?"
    meant = next((text for text in OTHER_VALUES.get(value.lower(), ()) if text in values), None)
    lower = {text.lower(): text for text in values}
    longer = [text for text in lower if value and text.startswith(value.lower())]
    if meant or value.lower() in lower:
        return f"; did you mean '{meant or lower[value.lower()]}'?"
    near = [
        lower[text]
        for text in (longer if len(longer) == 1 else difflib.get_close_matches(value.lower(), lower, 1, 0.7))
    ]
    return f"; did you mean '{near[0]}'?" if near else ""
