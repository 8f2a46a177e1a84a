import json
import pathlib

from tests.data import small_tree


def test_the_tokens_of_text_are_those_of_the_first_version(tmp_path, monkeypatch):
    golden = json.loads(pathlib.Path(__file__).with_name("stream_golden.json").read_text())
    monkeypatch.chdir(tmp_path)
    small_tree.write(pathlib.Path())
    found = small_tree.figures(pathlib.Path("cache"))
    for name, figures in golden.items():
        assert found[name] == figures, f"{name}: models trained on it would see other text"
