"""Resolves `model.scan_layers=auto` and `model.precision.compute=auto` to the fastest values on a machine.

The rules follow measurements of the training step of a model of 135 M parameters with 30 layers (`layouts` of
experiments/benchmarks):

- CPUs multiply bfloat16 faster than float32 only with AMX (six times) and AVX512-BF16 (twice).
- On CPUs, unrolled layers are faster than scanned ones: by a tenth in float32, by a fifth to nine tenths in bfloat16,
  where XLA copies whole stacks of scanned weights. They take less memory, but compile in a time that grows with the
  depth, so deep models are scanned.
- TPUs and GPUs have matrix units for bfloat16, and compile a scanned layer once.
"""

import dataclasses
from collections.abc import Collection

from llm_jax.schema import Config, ModelConfig

_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}  # {flag of /proc/cpuinfo: name}
_MAX_UNROLLED = 64  # maximum number of unrolled layers; each adds about half a second of compile time


def machine_independent(model: ModelConfig) -> ModelConfig:
    """Replaces `auto` by values that do not depend on the machine. These options do not change shapes."""
    return _replace_auto(model, True, "float32")


def resolve(model: ModelConfig, platform: str, instructions: Collection[str]) -> tuple[ModelConfig, list[str]]:
    """Replaces `auto`; returns the model and one line with the reason of every choice.

    Args:
      platform: "cpu", "gpu" or "tpu", where the model is trained.
      instructions: flags of the CPU (`runtime.cpu_instructions`).
    """
    lines = []
    fast = next((name for flag, name in _BFLOAT16.items() if flag in instructions), "")
    if platform == "cpu":
        compute = "bfloat16" if fast else "float32"
        reason = f"this CPU has {fast} for bfloat16" if fast else "this CPU has no fast bfloat16 products"
    else:
        compute, reason = "bfloat16", f"the matrix units of a {platform.upper()} are built for bfloat16"
    if model.precision.compute == "auto":
        lines.append(f"model.precision.compute=auto: {compute}, because {reason}")
    scan = platform != "cpu" or model.num_layers > _MAX_UNROLLED
    if platform != "cpu":
        reason = f"on a {platform.upper()} scanned layers are as fast, and compile faster"
    elif scan:
        reason = f"{model.num_layers} unrolled layers would compile for too long; at most {_MAX_UNROLLED} are unrolled"
    else:
        reason = "unrolled layers are faster on a CPU and take less memory"
    if model.scan_layers == "auto":
        lines.append(f"model.scan_layers=auto: {scan}, because {reason}")
    return _replace_auto(model, scan, compute), lines


def advice(config: Config, platform: str, instructions: Collection[str]) -> str:
    """A note that `auto` would be faster, if it would select bfloat16 and neither option is set; else ""."""
    keys = ("model.precision.compute", "model.scan_layers")
    precision = dataclasses.replace(config.model.precision, compute="auto")
    fastest, _ = resolve(dataclasses.replace(config.model, precision=precision), platform, instructions)
    if config.explicit.intersection(keys) or fastest.precision.compute == config.model.precision.compute:
        return ""
    flags = " ".join(f"--config.{key}=auto" for key in keys)
    return f"note: {flags} train faster on this machine, in {fastest.precision.compute}"


def _replace_auto(model: ModelConfig, scan: bool, compute: str) -> ModelConfig:
    """Replaces "auto" in the model by these values."""
    if model.precision.compute == "auto":
        model = dataclasses.replace(model, precision=dataclasses.replace(model.precision, compute=compute))
    return dataclasses.replace(model, scan_layers=scan) if model.scan_layers == "auto" else model
