"""A tokenizer from text: `python -m llm_jax.tokenizers.train --kind=bpe --vocab_size=8192 --input=FILE --output=DIR`.

Prints a line with what was made. `tokenizers.load(DIR)` reads it, `tokenizers.show --tokenizer=DIR` shows it.
"""

import pathlib
import random
from collections.abc import Iterator, Sequence

from absl import flags
from tqdm import tqdm

from llm_jax import cli, tokenizers
from llm_jax.errors import UserError
from llm_jax.files import new_directory

_BLOCK = 2**20

flags.DEFINE_enum("kind", None, tokenizers.TRAINED, "of the tokenizer", required=True)
flags.DEFINE_integer("vocab_size", 0, "ids, the special ones included (of char at most so many); not of byte")
flags.DEFINE_multi_string("input", None, "a text file, directory, glob or asset:NAME; several times", required=True)
flags.DEFINE_string("output", None, "the directory to write; it must not exist", required=True)
flags.DEFINE_integer("sample", 128, "MiB of text to learn from at most; of more, blocks are drawn")
NEEDS: cli.Needs = ((("vocab_size", "sample"), "--kind=byte is given", lambda f: f.kind != "byte"),)


def main() -> None:
    f = flags.FLAGS
    output = pathlib.Path(f.output).expanduser()
    if output.exists():
        raise UserError(f"--output={output} exists; give another, or remove it")
    if f.sample < 1 or (f.vocab_size < 1 and f.kind != "byte"):
        raise UserError(f"--vocab_size={f.vocab_size} --sample={f.sample}; expected positive numbers")
    paths = files(f.input)
    if not any(p.stat().st_size for p in paths):
        raise UserError(f"--input={f.input[0]}: there is no text in it")
    size = min(sum(p.stat().st_size for p in paths), f.sample * 2**20)
    with tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None) as bar:

        def told() -> Iterator[str]:
            for text in texts(paths, f.sample * 2**20):
                yield text
                bar.update(len(text.encode()))
            bar.set_description("training")

        tokenizer = tokenizers.get(f.kind).train(told(), f.vocab_size)
    with new_directory(output, source=f"--output={output}") as partial:
        tokenizers.save(tokenizer, partial)
    print(f"wrote {output}: {f.kind}, {tokenizer.vocab_size:,} ids, sha256 {tokenizers.digest(tokenizer)[:12]}")


def files(inputs: Sequence[str]) -> list[pathlib.Path]:
    """The files that `--input` names, sorted within each.

    Raises:
      UserError: one names nothing.
    """
    from llm_jax.data import sources

    return [path for name in inputs for path in sources.paths(name, "--input")]


def texts(paths: Sequence[pathlib.Path], limit: int) -> Iterator[str]:
    """The text of files in blocks of a MiB, cut between characters; of more than `limit` bytes, a fair draw of blocks.

    Raises:
      UserError: a file that cannot be read or is not UTF-8.
    """
    blocks = [(path, start) for path in paths for start in range(0, path.stat().st_size, _BLOCK)]
    if sum(path.stat().st_size for path in paths) > limit:
        drawn = random.Random(0).sample(range(len(blocks)), max(1, limit // _BLOCK))
        blocks = [blocks[i] for i in sorted(drawn)]
    for path, start in blocks:
        try:
            with path.open("rb") as file:
                file.seek(start)
                block = file.read(_BLOCK + 3)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        begin = _boundary(block, 0) if start else 0
        end = _boundary(block, _BLOCK) if len(block) > _BLOCK else len(block)
        try:
            yield block[begin:end].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text at byte {start + begin + error.start}") from error


def _boundary(block: bytes, place: int) -> int:
    """The first place from `place` on, at most three bytes later, at which a character may begin."""
    after = range(place, min(place + 3, len(block)))
    return next((i for i in after if block[i] & 0xC0 != 0x80), min(place + 3, len(block)))


if __name__ == "__main__":
    cli.run(main, needs=NEEDS)
