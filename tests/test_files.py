"""Files and directories appear complete or not at all."""

import os
import stat

import pytest

from llm_jax import files
from llm_jax.errors import UserError


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_everything_has_the_permissions_of_the_umask(umask, tmp_path):
    files.write_json(tmp_path / "a" / "b.json", {"x": 1})
    with files.new_directory(tmp_path / "d", durable=True) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("content")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o750, "b.json": 0o640, "d": 0o750, "inner": 0o750, "file": 0o640}
    assert files.read_json(tmp_path / "a" / "b.json") == {"x": 1}


def test_an_error_leaves_the_previous_file_unchanged(tmp_path):
    files.write(tmp_path / "file", "before")
    with pytest.raises(KeyError), files.new_file(tmp_path / "file") as file:
        file.write(b"after")
        raise KeyError
    with pytest.raises(KeyError), files.new_directory(tmp_path / "directory") as partial:
        (partial / "file").write_text("after")
        raise KeyError
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unwritable_paths_are_one_line_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="x.json: cannot be written"):
        files.write_json(tmp_path / "file" / "x.json", 1)
    directory = files.new_directory(tmp_path / "file" / "x", source="--output=x")
    with pytest.raises(UserError, match="--output=x cannot be written"), directory:
        pass
    with pytest.raises(UserError, match="cannot be written to"):
        files.make_directory(tmp_path / "file" / "x")


def test_the_first_of_two_writers_of_a_directory_wins_where_that_is_allowed(tmp_path):
    def write(content, **options):
        with files.new_directory(tmp_path / "d", **options) as partial:
            (partial / "file").write_text(content)

    write("first")
    write("second", exist_ok=True)
    with pytest.raises(UserError, match="cannot be written"):
        write("third")
    assert (tmp_path / "d" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
