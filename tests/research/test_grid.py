"""The text of a grid, and the names of its points."""

import json

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.research import grid


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("train.seed=3", [{"train.seed": 3}]),
        (
            "model.position.kind=rope,alibi; train.seed=0..1",
            [{"model.position.kind": k, "train.seed": s} for k in ("rope", "alibi") for s in (0, 1)],
        ),
        (
            "model.width=64,128 & model.mlp_dim=128,256",
            [{"model.width": 64, "model.mlp_dim": 128}, {"model.width": 128, "model.mlp_dim": 256}],
        ),
        ("model.width=8..24..8", [{"model.width": w} for w in (8, 16, 24)]),
        ("optim.lr=0.1..0.3..0.1", [{"optim.lr": x} for x in (0.1, 0.2, 0.3)]),
        ("optim.lr=linspace(1, 2, 3)", [{"optim.lr": x} for x in (1.0, 1.5, 2.0)]),
        ("model.width=logspace(8, 128, 3)", [{"model.width": w} for w in (8, 32, 128)]),
        ("model.tie_embeddings=true,false", [{"model.tie_embeddings": v} for v in (True, False)]),
        ("report.to=('tensorboard',),()", [{"report.to": ("tensorboard",)}, {"report.to": ()}]),
        ("data.source='a;b&c,d',e", [{"data.source": s} for s in ("a;b&c,d", "e")]),
    ],
)
def test_a_grid_gives_its_points_in_order(text, points):
    assert grid.parse(text) == points


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.seeds=1", "did you mean 'train.seed'"),
        ("train.seed", "expected KEY=VALUE"),
        ("train.seed=a", "expected a value of type int"),
        ("train.seed=0,1;train.seed=2", "given twice"),
        ("train.seed=0.5..2", "expected an integer"),
        ("train.seed=2..0", "FROM at most TO"),
        ("model.width=1,2 & model.mlp_dim=1,2,3", "equal numbers of values"),
        ("optim.lr=loguniform(0, 1, 3)", "positive numbers"),
        ("optim.lr=uniform(0, 1)", "FROM, TO, COUNT"),
        ("report.to=('a'", "unclosed bracket"),
        ("optim.lr=1e-3,,3e-3", "'1e-3,,3e-3' has an empty value"),
        ("train.seed=0,", "'0,' has an empty value"),
        ("train.seed=0..1000; model.width=1..1000", "at most 100,000"),
    ],
)
def test_a_grid_that_cannot_be_read_is_one_line_with_the_cure(text, message):
    with pytest.raises(UserError, match=message) as error:
        grid.parse(text)
    assert "\n" not in str(error.value)


def test_draws_are_reproducible_differ_by_key_and_have_their_distribution():
    draws = [p["optim.lr"] for p in grid.parse("optim.lr=loguniform(1e-4, 1e-2, 4000)")]
    assert draws == [p["optim.lr"] for p in grid.parse("optim.lr=loguniform(1e-4, 1e-2, 4000)")]
    assert draws != [p["optim.lr"] for p in grid.parse("optim.lr=loguniform(1e-4, 1e-2, 4000)", seed=1)]
    decay = [p["optim.weight_decay"] for p in grid.parse("optim.weight_decay=loguniform(1e-4, 1e-2, 4000)")]
    assert abs(np.corrcoef(np.log(draws), np.log(decay))[0, 1]) < 0.1
    # A quarter of the logarithms lies in each quarter of the interval.
    counts, _ = np.histogram(np.log10(draws), 4, (-4, -2))
    assert sum(counts) == 4000 and np.all(np.abs(counts / 4000 - 0.25) < 0.03)


def test_names_are_short_distinct_and_independent_of_the_place_in_the_sweep():
    points = grid.parse("model.position.kind=rope,alibi; tokenizer.kind=byte; train.seed=0,1")
    names = grid.names(points)
    assert names[0] == "position.kind=rope_tokenizer.kind=byte_seed=0"
    assert grid.names(points[::-1]) == names[::-1]
    similar = grid.names([{"data.source": "a/b"}, {"data.source": "a,b"}])  # equal but for characters no name can have
    assert len(set(similar)) == 2 and grid.names([{"data.source": "a,b"}, {"data.source": "a/b"}]) == similar[::-1]
    assert all(len(name) <= 100 for name in grid.names([{"data.source": "x" * 300}]))
    with pytest.raises(UserError, match="more than once"):
        grid.names([{"train.seed": 1}, {"train.seed": 1}])


def test_a_python_file_gives_points(tmp_path):
    path = tmp_path / "points.py"
    points = "({'model.width': w, 'optim.lr': 1 / w} for w in np.array([8, 16]))"
    path.write_text(f"import numpy as np\n\ndef get_points():\n    return {points}\n")
    read = [{"model.width": 8, "optim.lr": 1 / 8}, {"model.width": 16, "optim.lr": 1 / 16}]
    assert grid.read_file(str(path)) == read == json.loads(json.dumps(grid.read_file(str(path))))
    for text, message in [
        ("x = 1", "no function get_points"),
        ("1/0", "ZeroDivisionError: division by zero, points.py line 1"),
        ("def get_points():\n    raise SystemExit(3)", "fails .SystemExit: 3, points.py line 2"),
        ("def get_points():\n    yield 1 / 0", "ZeroDivisionError"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            grid.read_file(str(path))
    path.write_text("def get_points():\n    return [{'model.widht': 1}]\n")
    with pytest.raises(UserError, match=r"did you mean 'model\.width'"):
        grid.read_file(str(path))
