"""Turns a checkpoint into another form: `python -m llm_jax.convert --input=PATH --output=PATH --to=hf|gguf|peft`."""

import dataclasses
import json
import math
import pathlib

from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError

flags.DEFINE_string(
    "input", None, "a run, a Hugging Face directory, a .gguf file, asset:NAME or hf:ORG/NAME", required=True
)
flags.DEFINE_string(
    "output", None, "what is written: a directory (hf, peft) or a file (gguf); it must not exist", required=True
)
flags.DEFINE_enum("to", None, ["hf", "gguf", "peft"], "the form to write", required=True)
flags.DEFINE_string(
    "family", "", "hf, peft: the model_type to write; by default that of the input, or the first that fits"
)
flags.DEFINE_string(
    "format", "F16", "gguf: of matrices that have no block format yet: F32, F16, BF16, Q8_0, Q4_0, Q4_1"
)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "hf: of the tensors")
NEEDS: cli.Needs = (
    (("format",), "--to=gguf is not given", lambda f: f.to == "gguf"),
    (("dtype",), "--to=hf is not given", lambda f: f.to == "hf"),
    (("family",), "neither --to=hf nor --to=peft is given", lambda f: f.to in ("hf", "peft")),
)


def main() -> None:
    import jax

    from llm_jax import tokenizers, trees
    from llm_jax.checkpoints import gguf_model, hf, pretrained
    from llm_jax.checkpoints.families import FAMILIES
    from llm_jax.kernels import blocks

    f = flags.FLAGS
    output, source = pathlib.Path(f.output).expanduser(), pretrained.locate(f.input)
    if output.exists():
        raise UserError(f"--output={output} exists; give another, or remove it")
    if f.to == "peft":
        _peft(source, output, f.family)
        return
    model, params, tokenizer = pretrained.load(source)
    precision = dataclasses.replace(model.config.precision, params=f.dtype)
    config = dataclasses.replace(model.config, precision=precision) if f.to == "hf" else model.config
    count = sum(math.prod(weight.shape) for weight in trees.flatten(params).values())
    said = f"read {f.input}: {config.num_layers} layers, width {config.width}, {count:,} parameters"
    print(f"{said}, tokenizer {tokenizer.kind} of {tokenizer.vocab_size} ids", flush=True)
    if f.to == "gguf":
        if f.format in blocks.FORMATS:
            block = blocks.FORMATS[f.format]
            _announce(output, f.format, count * block.size // block.numbers)
        formats = gguf_model.save(output, config, params, tokenizers.foreign(tokenizer), f.format)
        used = {kind: sum(1 for k in formats.values() if k == kind) for kind in sorted(set(formats.values()))}
        size = output.stat().st_size
        print(f"wrote {output}: {', '.join(f'{n} tensors {kind}' for kind, n in used.items())}; {size / 2**20:.1f} MiB")
        return
    kind = f.family or (pretrained.family(source) if pretrained.is_foreign(source) else _first_that_fits(config))
    if kind not in FAMILIES:
        raise UserError(f"--family={kind} is unknown; expected one of {', '.join(FAMILIES)}")
    _announce(output, f"{kind} in {f.dtype}", count * jax.numpy.dtype(f.dtype).itemsize)
    if isinstance(tokenizer, tokenizers.Foreign):
        files = tokenizer.files()
        if len(ends := tokenizers.ends(tokenizer)) > 1:
            files["generation_config.json"] = json.dumps(tokenizer.special_ids | {"eos_token_id": ends}).encode()
        hf.save(output, kind, config, params, files, tokenizer.special_ids)
    else:
        files = {f"tokenizer/{name}": content for name, content in tokenizers.all_files(tokenizer).items()}
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        hf.save(output, kind, config, params, files, {name: i for name, i in ids.items() if i is not None})
        print(f"note: transformers reads no {tokenizer.kind} tokenizer; llm_jax finds it in {output}/tokenizer")
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    print(f"wrote {output}: {kind} ({FAMILIES[kind].architecture}) in {f.dtype}; {size / 2**20:.1f} MiB")


def _announce(output: pathlib.Path, what: str, size: int) -> None:
    print(f"writing {output}: {what}, about {size / 2**20:,.0f} MiB", flush=True)


def _peft(source: pathlib.Path, output: pathlib.Path, kind: str) -> None:
    """Writes the adapters of a run as a directory of peft."""
    from llm_jax import lora, trees
    from llm_jax.checkpoints import checkpoint, hf, peft, pretrained
    from llm_jax.checkpoints.families import FAMILIES
    from llm_jax.model.transformer import Transformer

    config = None if pretrained.is_foreign(source) else checkpoint.read_config(directory := checkpoint.find(source))
    if config is None or not config.lora.rank:
        raise UserError(f"--to=peft writes adapters; {source} is no run with lora.rank above 0")
    record = checkpoint.verify(directory)
    named = pretrained.locate(record["base"]["path"])
    kind = kind or (pretrained.family(named) if pretrained.is_foreign(named) else _first_that_fits(config.model))
    if kind not in FAMILIES:
        raise UserError(f"--family={kind} is unknown; expected one of {', '.join(FAMILIES)}")
    adapters = lora.rounded(trees.unstack(checkpoint.restore_adapters(directory, record)), config.lora.factors)
    if config.quant.scheme:
        print(
            f"note: they were trained over a base in {config.quant.scheme}; peft will put them on the one it is given"
        )
    abstract = checkpoint.abstract_params(Transformer(dataclasses.replace(config.model, scan_layers=False)))
    readable = named.is_dir() and hf.is_directory_of(named)
    peft.save(
        output,
        kind,
        adapters,
        abstract,
        config.model.tie_embeddings,
        rank_stabilized=config.lora.rank_stabilized,
        dropout=config.lora.dropout,
        base_name=str(named) if readable else None,
    )
    if not readable:
        print(f"note: transformers cannot read the base {record['base']['path']}; convert that with --to=hf for peft")
    print(f"wrote {output}: adapters of a {kind}; {sum(p.stat().st_size for p in output.iterdir()) / 2**20:.1f} MiB")


def _first_that_fits(config) -> str:
    """The family that can hold a model of ours. Raises UserError with every family's reason."""
    from llm_jax.checkpoints.families import FAMILIES, their_config

    reasons = []
    for kind in FAMILIES:
        try:
            their_config(kind, config)
            return kind
        except UserError as error:
            reasons.append(str(error).split(";")[0])
    raise UserError("no family of Hugging Face can hold this model: " + "; ".join(reasons))


if __name__ == "__main__":
    cli.run(main, "interrupted; --output is not written", NEEDS)
