"""Converts a checkpoint to another format: `python -m llm_jax.convert --input=PATH --output=PATH --to=hf|gguf|peft`."""

import dataclasses
import json
import math
import pathlib
from typing import TYPE_CHECKING

from llm_jax import cli, extensions
from llm_jax.errors import UserError
from llm_jax.files import local_path
from llm_jax.schema import CHECKPOINT_DTYPES

if TYPE_CHECKING:
    from llm_jax.checkpoints import Checkpoint

FLAGS = cli.Flags()
FLAGS.string("input", None, f"checkpoint: {cli.CHECKPOINT_FORMS}", required=True)
FLAGS.define_base()
FLAGS.string("output", None, "directory (hf, peft) or file (gguf) to write; must not exist", required=True)
FLAGS.enum(
    "to",
    None,
    ["hf", "gguf", "peft"],
    "format to write: hf (safetensors and tokenizer), gguf, or peft (adapters)",
    required=True,
)
FLAGS.string(
    "family",
    "",
    "with --to=hf or peft: Hugging Face model_type, e.g. llama; default: the type of the input, or the first that fits",
)
FLAGS.enum(
    "format",
    "F16",
    ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"],
    "with --to=gguf: tensor type of matrices that are not already quantized",
)
FLAGS.enum("dtype", "float32", CHECKPOINT_DTYPES, "with --to=hf: dtype of the tensors")
NEEDS: cli.Needs = (
    (("format",), "--to=gguf is not given", lambda f: f.to == "gguf"),
    (("dtype",), "--to=hf is not given", lambda f: f.to == "hf"),
    (("family",), "neither --to=hf nor --to=peft is given", lambda f: f.to in ("hf", "peft")),
)


def main(f: cli.Flags) -> None:
    import jax

    from llm_jax import checkpoints, tokenizers, trees
    from llm_jax.checkpoints import generation_config, gguf_model, huggingface
    from llm_jax.checkpoints.families import FAMILIES
    from llm_jax.kernels import blocks
    from llm_jax.tokenizers import export

    output = local_path(f.output, "--output")
    if output.exists():
        raise UserError(f"--output={output} already exists; choose another path, or remove it")
    checkpoint = checkpoints.open(f.input, f.base)
    if f.to == "peft":
        _peft(checkpoint, output, f.family)
        return
    if f.to == "hf":  # report unsupported models before the weights are read
        family = _family(f.family or checkpoint.family)
        files = export.transformers_files(checkpoint.tokenizer, family)
    model, params, tokenizer = checkpoint.load()
    precision = dataclasses.replace(model.config.precision, params=f.dtype)
    config = dataclasses.replace(model.config, precision=precision) if f.to == "hf" else model.config
    count = sum(math.prod(weight.shape) for weight in trees.flatten(params).values())
    size = f"{config.num_layers} layers, width {config.width}, {count:,} parameters"
    print(f"read {f.input}: {size}, tokenizer {tokenizer.kind} of {tokenizer.vocab_size} ids", flush=True)
    if f.to == "gguf":
        if f.format in blocks.FORMATS:
            block = blocks.FORMATS[f.format]
            _announce(output, f.format, count * block.size // block.numbers)
        sampling, lost = generation_config.to_gguf(checkpoint.generation_config)
        formats = gguf_model.save(output, config, params, tokenizers.exportable(tokenizer), f.format, sampling)
        used = {kind: sum(1 for k in formats.values() if k == kind) for kind in sorted(set(formats.values()))}
        summary = ", ".join(f"{n} tensors {kind}" for kind, n in used.items())
        print(f"wrote {output}: {summary}; {output.stat().st_size / 2**20:.1f} MiB")
        if lost:
            print(f"note: GGUF has no key for {', '.join(lost)} of {checkpoint.generation_config_path}")
        return
    _announce(output, f"{family} in {f.dtype}", count * jax.numpy.dtype(f.dtype).itemsize)
    ids = export.special_ids(tokenizer)
    generation = checkpoint.generation_config
    if len(ends := tokenizers.eos_ids(tokenizer)) > 1 or generation:
        generation = generation | ids | ({"eos_token_id": ends} if len(ends) > 1 else {})
        files[generation_config.FILE] = json.dumps(generation).encode()
    huggingface.save(output, family, config, params, files, ids)
    for note in export.notes(tokenizer):
        print(f"note: {note}")
    num_bytes = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    print(f"wrote {output}: {family} ({FAMILIES[family].architecture}) in {f.dtype}; {num_bytes / 2**20:.1f} MiB")


def _announce(output: pathlib.Path, description: str, size: int) -> None:
    print(f"writing {output}: {description}, about {size / 2**20:,.0f} MiB", flush=True)


def _family(name: str) -> str:
    from llm_jax.checkpoints.families import FAMILIES

    if name not in FAMILIES:
        raise UserError(f"--family={name} is unknown; expected one of {', '.join(FAMILIES)}")
    return name


def _peft(checkpoint: "Checkpoint", output: pathlib.Path, name: str) -> None:
    """Writes the adapters of a run as a peft directory."""
    from llm_jax import lora
    from llm_jax.checkpoints import Adapters, abstract_params, peft_export
    from llm_jax.model.transformer import Transformer
    from llm_jax.tokenizers import export

    if not isinstance(checkpoint, Adapters):
        raise UserError(f"--to=peft writes adapters; {checkpoint.path} is not a run with lora.rank above 0")
    config, base = checkpoint.run_config, checkpoint.base
    family = _family(name or checkpoint.family)
    adapters = lora.quantize_factors(checkpoint.adapters(), config.lora.factors)
    if config.quant.scheme:
        print(_base_note(config.quant.scheme))
    abstract = abstract_params(Transformer(dataclasses.replace(config.model, scan_layers=False)))
    readable = base.form == "huggingface"
    tokenizer = checkpoint.tokenizer
    try:
        files = export.transformers_files(tokenizer, family)
    except UserError as error:
        files = {}
        print(f"note: the tokenizer is not written ({error})")
    peft_export.save(
        output,
        family,
        config.model,
        adapters,
        abstract,
        rank_stabilized=config.lora.rank_stabilized,
        dropout=config.lora.dropout,
        base_name=str(base.path) if readable else base.name,
        other_files=files,
    )
    if not readable:
        print(f"note: transformers cannot read the base {base.name}; convert it with --to=hf for peft")
    num_bytes = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    print(f"wrote {output}: adapters of a {family}{' and the tokenizer' * bool(files)}; {num_bytes / 2**20:.1f} MiB")


def _base_note(scheme: str) -> str:
    """The note on adapters that were trained over a base quantized by `scheme`."""
    if extensions.is_specification(scheme):
        cure = "; peft does not know this format. quantize merges them into the base"
    else:
        cure = (
            ". Quantize the base in peft as well, nf4 with BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)"
        )
    bare = scheme.partition("#")[0]
    return f"note: the adapters were trained over a base in {bare}; over the unquantized base results differ{cure}"


COMMAND = cli.Command(
    "convert", main, FLAGS, needs=NEEDS, interrupt_message="interrupted; --output is not written", compiles=True
)

if __name__ == "__main__":
    cli.start(COMMAND)
