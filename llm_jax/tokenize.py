"""Tokenizes the text of a configuration into the token cache, from which training and evaluation read it.

python -m llm_jax.tokenize --config=configs/default.py
python -m llm_jax.tokenize --config=configs/default.py --engine=ray \
    --config.data.source="s3://BUCKET/texts/*.jsonl.zst" --config.data.cache_dir=s3://BUCKET/cache
"""

from llm_jax import cli
from llm_jax.errors import UserError
from llm_jax.schema import Config

FLAGS = cli.Flags()
FLAGS.enum(
    "engine",
    "local",
    ["local", "ray"],
    "where the text is read and tokenized: local (data.workers processes of this machine) or ray (the Ray cluster of "
    "RAY_ADDRESS, or one on this machine); both write the same bytes",
)


def main(f: cli.Flags) -> None:
    from llm_jax.training import inputs

    if f.engine != "local" and f.config.data.kind == "labelled":
        raise UserError(f"--engine={f.engine} has no effect where data.kind is labelled; omit the flag")
    loaded = inputs.load(f.config, engine=f.engine)
    train, held_out = loaded.num_tokens
    print(
        f"{f.config.data.source}: {loaded.source.num_bytes:,} bytes, {train:,} tokens for training, {held_out:,} held "
        f"out; tokenizer {loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} ids"
    )


COMMAND = cli.Command(
    "tokenize",
    main,
    FLAGS,
    config=Config,
    interrupt_message="interrupted; the same command resumes from the finished parts",
)

if __name__ == "__main__":
    cli.start(COMMAND)
