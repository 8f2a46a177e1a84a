"""Held-out figures of a checkpoint: `python -m llm_jax.evaluate --checkpoint=runs/x`."""

import dataclasses
import json

from absl import flags

from llm_jax import cli
from llm_jax.errors import UserError

flags.DEFINE_string(
    "checkpoint", None, "a run, a Hugging Face directory, a .gguf file, asset:NAME or hf:ORG/NAME", required=True
)
flags.DEFINE_string(
    "data", "", "text to evaluate on, or sentiment:NAME; by default the held-out part of the run's own corpus"
)
flags.DEFINE_integer("seq_len", 0, "tokens a window; by default as in training")
flags.DEFINE_integer("stride", 0, "targets counted in each window, the last ones (a sliding window); 0: all of it")
flags.DEFINE_integer("batch_size", 16, "windows at a time")
flags.DEFINE_boolean("as_stored", False, "keep quantized tensors of a .gguf file as they are, unexpanded")
flags.DEFINE_boolean("json", False, "print one JSON object and nothing else")


def main() -> None:
    import jax

    from llm_jax import checkpoint, pretrained
    from llm_jax.config import DataConfig
    from llm_jax.data import corpus
    from llm_jax.data.rows import Rows
    from llm_jax.model import transformer
    from llm_jax.prompting import sentiment
    from llm_jax.training import classify, evaluation, losses

    f = flags.FLAGS
    if f.batch_size < 1 or f.seq_len < 0:
        raise UserError(f"--batch_size={f.batch_size} --seq_len={f.seq_len}; expected positive numbers")
    path = pretrained.locate(f.checkpoint)
    model, params, tokenizer = pretrained.load(path, scan_layers=True, as_stored=f.as_stored)
    if pretrained.is_foreign(path):
        if not f.data:
            raise UserError(f"{f.checkpoint} names no corpus of its own; give --data=FILE")
        data, length = DataConfig(f.data, 0.0, ""), f.seq_len or 512
    else:
        config = checkpoint.read_config(checkpoint.find(path))
        data, length = config.data, f.seq_len or config.train.seq_len
    if not model.config.causal:
        raise UserError(f"{f.checkpoint} is a bidirectional model (model.causal=False); it sees what it would predict")
    transformer.check_length(model.config, length)
    if not 0 <= f.stride <= length:
        raise UserError(f"--stride={f.stride}; expected 0 to the window of {length} tokens")
    if (f.data or data.source).startswith(sentiment.PREFIX):
        asked = sentiment.Source(dataclasses.replace(data, source=f.data or data.source))
        rows = asked.rows(tokenizer, "test", length)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        found = classify.accuracy(model, params, rows, f.batch_size, device)
        said = f"{f.data or data.source}: {classify.say(found)}"
        print(json.dumps(found) if f.json else said)
        return
    source = corpus.Source(dataclasses.replace(data, source=f.data) if f.data else data, whole=bool(f.data))
    split = source.corpus(tokenizer).validation
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loss = jax.jit(lambda params, batch: losses.language_model(model, params, batch, 0))
    found = evaluation.evaluate(loss, params, Rows(split, length, f.stride), f.batch_size, device)
    if f.json:
        print(json.dumps({**found, "compressed_bits_per_byte": source.compressed_bits_per_byte()}))
        return
    packed = ", ".join(f"{name} {value:.3f}" for name, value in source.compressed_bits_per_byte().items())
    print(
        f"{f.data or data.source}: {split.num_bytes:,} bytes, "
        f"{found['tokens']:,.0f} tokens in windows of {length}{f', {f.stride} counted in each' if f.stride else ''}\n"
        f"loss {found['loss']:.4f} nats a token, perplexity {found['perplexity']:.2f}\n"
        f"{found['bits_per_byte']:.3f} bits per byte ({packed})"
    )


if __name__ == "__main__":
    cli.run(main)
