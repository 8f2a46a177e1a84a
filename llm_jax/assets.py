"""Lists, downloads and verifies models and texts: `python -m llm_jax.assets [--fetch=NAME] [--verify]`.

Other commands download `asset:NAME` on first use.
"""

from llm_jax import cli
from llm_jax.data import assets
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.multi_string("fetch", [], "asset to download; its path is printed; may be repeated")
FLAGS.boolean("verify", False, "compare the cached files with the hashes recorded at download")


def main(f: cli.Flags) -> None:
    for name in f.fetch:
        print(assets.path(name))
    if f.fetch:
        return
    problems = []
    for name, asset in assets.ASSETS.items():
        fetched = assets.directory(asset).is_dir()
        damaged = assets.damaged_files(name) if fetched and f.verify else []
        problems += [f"{assets.directory(asset)}: {', '.join(damaged)}"] if damaged else []
        state = "damaged" if damaged else "here" if fetched else ""
        print(f"{name:<24}{state:<9}{asset.requirement:<32}{asset.about}")
    if problems:
        raise UserError(f"damaged files: {'; '.join(dict.fromkeys(problems))}; delete the directory and fetch again")


COMMAND = cli.Command("assets", main, FLAGS)

if __name__ == "__main__":
    cli.start(COMMAND)
