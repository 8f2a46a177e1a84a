"""Trains a tokenizer: `python -m llm_jax.train_tokenizer --kind=bpe --vocab_size=8192 --input=FILE --output=DIR`.

`llm_jax.tokenizers.load(DIR)` loads it, `--config.tokenizer.path=DIR` trains a model with it, and
`python -m llm_jax.show tokens --tokenizer=DIR` shows how it splits text.
"""

from collections.abc import Iterator

from tqdm import tqdm

from llm_jax import cli, tokenizers
from llm_jax.data import sources, text_blocks
from llm_jax.errors import UserError
from llm_jax.files import local_path, new_directory

FLAGS = cli.Flags()
FLAGS.enum("kind", None, tokenizers.TRAINED, "kind of tokenizer", required=True)
FLAGS.integer("vocab_size", 0, "vocabulary size including special tokens, e.g. 8192 (char: the maximum); not for byte")
FLAGS.multi_string("input", None, "text file, directory, glob or asset:NAME; may be repeated", required=True)
FLAGS.string("output", None, "directory to write; must not exist", required=True)
FLAGS.integer("sample", 128, "maximum training text in MiB; larger inputs are sampled in random blocks")
NEEDS: cli.Needs = ((("vocab_size", "sample"), "--kind=byte is given", lambda f: f.kind != "byte"),)


def main(f: cli.Flags) -> None:
    output = local_path(f.output, "--output")
    if output.exists():
        raise UserError(f"--output={output} already exists; choose another path, or remove it")
    if f.sample < 1 or (f.vocab_size < 1 and f.kind != "byte"):
        raise UserError(f"--vocab_size={f.vocab_size} --sample={f.sample}; expected positive numbers")
    paths = [path for name in f.input for path in sources.paths(name, "--input")]
    if not any(p.stat().st_size for p in paths):
        raise UserError(f"--input={f.input[0]} contains no text")
    size = min(sum(p.stat().st_size for p in paths), f.sample * 2**20)
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None) as bar:

        def blocks() -> Iterator[str]:
            for text in text_blocks.texts(paths, f.sample * 2**20):
                yield text
                bar.update(len(text.encode()))
            bar.set_description("training")

        tokenizer = tokenizers.get(f.kind).train(blocks(), f.vocab_size)
    with new_directory(output, source=f"--output={output}") as partial:
        tokenizers.save(tokenizer, partial)
    print(f"wrote {output}: {f.kind}, {tokenizer.vocab_size:,} ids, sha256 {tokenizers.digest(tokenizer)[:12]}")


COMMAND = cli.Command("train_tokenizer", main, FLAGS, needs=NEEDS)

if __name__ == "__main__":
    cli.start(COMMAND)
