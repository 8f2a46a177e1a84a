"""Runs read from their directories, grouped by what differs, and compared in the terminal."""

import json

import pytest

from llm_jax import configuration, intervals
from llm_jax.errors import UserError
from llm_jax.evaluation import example_counts
from llm_jax.research import comparison, page, runs
from tests.conftest import call


def write_run(path, bits=2.0, steps=4, done=True, sample="", corpus="", **overrides):
    """A run directory with made-up figures, whose held-out loss falls to `bits` and rises a little at the end."""
    options = {"eval.rows": 0, "eval.final_rows": 0, "train.steps": steps}
    options |= {key.replace("__", "."): value for key, value in overrides.items() if key != "of"}
    path.mkdir(parents=True)
    config = configuration.load("default", options)
    (path / "config.json").write_text(json.dumps(configuration.as_dict(config)))
    lines = [{"step": i + 1, "loss": 4 - i / steps, "tokens_per_second": 100.0 + i} for i in range(steps)]
    lines[1] |= {"validation_loss": 2 * bits - 0.2, "validation_bits_per_byte": bits - 0.1}
    if done:
        lines[-1] |= {"validation_loss": 2 * bits, "validation_bits_per_byte": bits}
        summary = {"validation_loss": 2 * bits, "validation_bits_per_byte": bits, "steps": steps}
        summary |= {"parameters": 1000, "trained_parameters": 50}
        summary |= {"corpus": {"sha256": corpus}} if corpus else {}
        summary |= {"tokens_per_second": 123.0, "peak_host_bytes": 512 * 2**20, "seconds": 90.0}
        (path / "summary.json").write_text(json.dumps(summary))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if sample:
        samples = [{"step": 2, "text": "early"}, {"step": 4, "text": "first start"}, {"step": 4, "text": sample}]
        (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two position schemes from three seeds, of which alibi is better by 0.1, 0.11 and 0.12."""
    directory = tmp_path_factory.mktemp("sweep")
    for seed in range(3):
        for kind, gain in (("rope", 0.0), ("alibi", 0.1 + 0.01 * seed)):
            write_run(
                directory / f"{kind}-{seed}", 2 + 0.5 * seed - gain, sample=f"by {kind}",
                train__seed=seed, model__position__kind=kind, eval__every=1 + seed,
            )  # fmt: skip
    return directory


def test_a_run_is_read_with_its_figures(sweep):
    run = runs.read(sweep / "rope-1")
    assert run.seed == 1 and run.step == 4 and run.final("parameters") == 1000
    assert run.final(runs.BITS) == 2.5 and run.best(runs.BITS).value == 2.4 and run.final("loss") == 3.25
    all_rows = float("inf")
    assert run.curve(runs.BITS) == [(2, 2.4, all_rows), (4, 2.5, all_rows)] and run.final_point(runs.BITS) is None
    assert len(run.curve("loss")) == 4 and run.curve("loss")[0] == (1, 4.0, 0)
    assert [(s["step"], s["text"]) for s in run.samples] == [(2, "early"), (4, "by rope")]


def test_runs_that_differ_in_the_seed_alone_are_one_group(sweep, tmp_path):
    groups = runs.group(runs.load([sweep]))
    assert [(g.label, [r.seed for r in g.runs]) for g in groups] == [
        ("kind=alibi", [0, 1, 2]),
        ("kind=rope", [0, 1, 2]),
    ]
    assert groups[0].options == {"model.position.kind": "alibi"}
    assert groups[1].mean(runs.BITS) == intervals.mean([2.0, 2.5, 3.0])
    # The seeds differ by 0.5, the pairs by 0.01: only the paired interval excludes 0.
    difference, pairs = runs.difference(groups[0], groups[1], runs.BITS)
    assert difference == pytest.approx(intervals.mean([-0.1, -0.11, -0.12])) and pairs == 3 and difference.high < 0
    # The same configuration twice is no pair of seeds.
    for name in ("a", "b"):
        write_run(tmp_path / name, train__seed=1)
    assert [g.label for g in runs.group(runs.load([tmp_path]))] == ["a", "b"]
    note = "runs with equal configurations and equal seeds are separate groups: a = b"
    assert f"note: {note}" in comparison.text(runs.load([tmp_path]))
    assert page.data(runs.load([tmp_path]))["note"] == note
    assert page.data(runs.load([sweep]))["note"] == "" and "equal seeds" not in comparison.text(runs.load([sweep]))


def test_samples_cannot_control_the_terminal(tmp_path):
    write_run(tmp_path / "a", sample="\x1b[2Jtext\n\tmore")
    assert "\\x1b[2Jtext\n\tmore" in comparison.text(runs.load([tmp_path]))


def test_runs_without_a_common_seed_are_compared_without_an_interval(tmp_path):
    for name, seed, bits in (("a", 0, 2.0), ("b", 1, 2.5)):
        write_run(tmp_path / name, bits, train__seed=seed, optim__lr=1e-3 * (1 + seed))
    first, second = runs.group(runs.load([tmp_path / "a", tmp_path / "b"]))
    difference, pairs = runs.difference(second, first, runs.BITS)
    assert pairs == 0 and difference.estimate == 0.5 and difference.low != difference.low
    assert comparison.interval_text(difference, sign=True) == "+0.5000"


def test_unfinished_runs_are_in_no_interval_and_no_difference(tmp_path):
    for seed, gain in ((0, 0.1), (1, 0.11), (2, 0.12)):
        write_run(tmp_path / f"a{seed}", 2.0, train__seed=seed)
        write_run(tmp_path / f"b{seed}", 2.0 - gain, done=seed < 2, train__seed=seed, optim__lr=1e-4)
    first, second = runs.group(runs.load([tmp_path]))
    difference, pairs = runs.difference(second, first, runs.BITS)
    assert pairs == 2 and difference == pytest.approx(intervals.mean([-0.1, -0.11])) and second.unfinished == 1
    out = comparison.text(runs.load([tmp_path]))
    assert "0,1,2 (1 unfinished)" in out
    assert "not finished: b2, step 4 of 4; bits per byte 1.7800 (all rows) at step 2" in out
    # A finished run that is continued has its old summary until it ends again.
    with (tmp_path / "b0" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + "\n")
    assert not runs.read(tmp_path / "b0").is_finished and runs.read(tmp_path / "b0").step == 5


def record(path, *values, summary=None, name=runs.BITS):
    """Replaces the metrics of a run by (step, value, number of rows or None: not recorded)."""
    key = "validation_rows" if name == runs.BITS else "task_examples/x"
    lines = [{"step": s, "loss": 3.0, name: v} | ({key: n} if n else {}) for s, v, n in values]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary:
        content = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(content | summary))
    return runs.read(path)


@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "from the configuration"])
def test_the_final_evaluation_over_other_rows_belongs_to_no_curve_and_is_not_the_best(tmp_path, is_recorded):
    rows = lambda count: count if is_recorded else None  # noqa: E731
    path = write_run(tmp_path / "a", 2.0, steps=6, eval__every=2, eval__rows=16, eval__final_rows=128)
    run = record(path, (2, 3.0, rows(16)), (4, 2.5, rows(16)), (6, 2.0, rows(128)))
    assert run.curve(runs.BITS) == [(2, 3.0, 16), (4, 2.5, 16)] and run.best(runs.BITS) == (4, 2.5, 16)
    assert run.final_point(runs.BITS) == (6, 2.0, 128) and run.final(runs.BITS) == 2.0
    text = comparison.text([run])
    row = next(line for line in text.splitlines() if line.startswith("(1)"))
    assert "2.5000 (16 rows)" in row and "2.0000" in row
    group = runs.group([run])[0]
    assert page.curve(group, runs.BITS)["step"] == [2, 4]
    assert page.final_point(group, runs.BITS) == {"step": 6, "mean": 2, "low": 2, "high": 2, "examples": "128 rows"}
    # The same number of rows: one curve, whose minimum may be at the end.
    path = write_run(tmp_path / "b", 2.0, steps=6, eval__every=2, eval__rows=16, eval__final_rows=16)
    run = record(path, (2, 3.0, rows(16)), (4, 2.5, rows(16)), (6, 2.0, rows(16)))
    assert len(run.curve(runs.BITS)) == 3 and run.best(runs.BITS) == (6, 2.0, 16)
    assert run.final_point(runs.BITS) is None and "rows)" not in comparison.text([run])


def test_runs_that_were_continued_have_final_evaluations_between_the_periodic_ones(tmp_path):
    options = {"eval__every": 2, "eval__rows": 16, "eval__final_rows": 128}
    path = write_run(tmp_path / "a", 2.0, steps=6, **options)
    run = record(path, (2, 3.0, 16), (3, 1.0, 128), (4, 2.5, 16), (6, 2.0, 128))
    assert [point.step for point in run.curve(runs.BITS)] == [2, 4] and run.final_point(runs.BITS).step == 6
    run = record(path, (2, 3.0, None), (3, 1.0, None), (4, 2.5, None), (6, 2.0, None))
    assert [point.step for point in run.curve(runs.BITS)] == [2, 4]
    # Continued after step 4, which its summary still names, and not at its new end.
    run = record(
        write_run(tmp_path / "b", 2.0, steps=9, **options), (2, 3.0, None), (4, 1.0, None), summary={"steps": 4}
    )
    assert run.curve(runs.BITS) == [(2, 3.0, 16)] and run.final_point(runs.BITS) == (4, 1.0, 128)
    # More rows than there are: the recorded number is smaller than both options.
    run = record(write_run(tmp_path / "c", 2.0, steps=4, **options), (2, 3.0, 9), (4, 1.0, 9))
    assert len(run.curve(runs.BITS)) == 2
    # The number of rows was changed when the run was resumed.
    run = record(
        write_run(tmp_path / "d", 2.0, steps=9, **options), (2, 3.0, 8), (4, 1.0, 8), (6, 2.5, 16), (8, 2.4, 16)
    )
    assert run.best(runs.BITS) == (8, 2.4, 16)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_accuracies_on_part_of_a_task_are_not_joined_with_those_on_all_examples(tmp_path, is_recorded):
    path = write_run(tmp_path / "a", steps=4, eval__every=2, eval__tasks=("x",), eval__task_examples=5)
    part, every = (5, 30) if is_recorded else (None, None)
    run = record(path, (2, 0.5, part), (4, 0.25, every), name="task_x")
    assert run.curve("task_x") == [(2, 0.5, 5)] and run.final_point("task_x").examples in (30, float("inf"))
    assert example_counts.text("task_x", run.final_point("task_x").examples) in ("30 examples", "all examples")


def test_the_best_value_of_unfinished_runs_is_not_beside_that_of_finished_ones(tmp_path):
    write_run(tmp_path / "a", 2.0, train__seed=0)
    write_run(tmp_path / "b", 1.0, train__seed=1, done=False)
    write_run(tmp_path / "c", 1.0, done=False, optim__lr=1e-4)
    first, second = runs.group(runs.load([tmp_path]))
    assert first.best(runs.BITS).value == 1.9 and second.best(runs.BITS) is None
    assert "0.9" not in "".join(
        line for line in comparison.text(runs.load([tmp_path])).splitlines() if line[0:1] == "("
    )


TEXTS = [
    ({}, {"data__source": "b"}, "other text"),  # the hashes are not recorded
    ({"corpus": "x"}, {"corpus": "y"}, "other text"),  # the file was changed in between
    ({"corpus": "x"}, {"corpus": "x", "data__source": "copy"}, ""),
    ({"corpus": "x"}, {"corpus": "x", "data__validation_fraction": 0.1}, "other text"),
    ({"corpus": "x", "eval__final_rows": 2}, {"corpus": "x", "eval__final_rows": 2, "train__seq_len": 9}, "other text"),
    (
        {"corpus": "x", "eval__final_rows": 2},
        {"corpus": "x", "eval__final_rows": 2, "tokenizer__kind": "x"},
        "other text",
    ),
    ({"corpus": "x"}, {"corpus": "x", "train__seq_len": 9}, ""),
    ({"corpus": "x"}, {"corpus": "x", "tokenizer__kind": "byte"}, ""),  # bits per byte can be compared
    ({"corpus": "x"}, {"corpus": "x", "tokenizer__kind": "byte", "of": "validation_loss"}, "other tokenizer"),
]


@pytest.mark.parametrize(("first", "second", "reason"), TEXTS)
def test_figures_of_other_texts_or_tokens_have_no_difference(first, second, reason, tmp_path):
    figure = second.get("of", runs.BITS)
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", 2.0, train__seed=seed, **first)
        write_run(tmp_path / f"b{seed}", 2.5, train__seed=seed, optim__lr=1e-4, **{**second, "of": 0})
    loaded = runs.load([tmp_path])
    groups = runs.group(loaded)
    assert [len(group.runs) for group in groups] == [2, 2]
    assert runs.not_comparable(groups[1], groups[0], figure) == reason
    assert (runs.difference(groups[1], groups[0], figure) is None) == bool(reason)
    if figure == runs.BITS:
        row = next(line for line in comparison.text(loaded).splitlines() if line.startswith("(2) "))
        assert ("+0.5000 [+0.5000" in row) != (reason in row and bool(reason))
        assert ("note: metrics on different held-out texts" in comparison.text(loaded)) == bool(reason)
        assert [group["scale"] for group in page.data(loaded)["groups"]] == [0, 1 if reason else 0]


def test_runs_of_one_configuration_on_other_texts_are_in_groups_of_their_own(tmp_path):
    """An unfinished run records no hash; it is with the others of its configuration."""
    for seed, corpus in enumerate(("x", "x", "y", "")):
        write_run(tmp_path / f"run{seed}", train__seed=seed, corpus=corpus, done=bool(corpus))
    groups = runs.group(runs.load([tmp_path]))
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1, 3], [2]]


def test_labels_are_singular_for_one_run_and_long_names_are_shortened(tmp_path):
    write_run(tmp_path / "a", data__source="directory/" * 20 + "end.txt")
    assert comparison.text(runs.load([tmp_path])).startswith("1 run in 1 group; ")
    write_run(tmp_path / "b", data__source="directory/" * 20 + "other.txt")
    text = comparison.text(runs.load([tmp_path]))
    assert text.startswith("2 runs in 2 groups; ") and max(map(len, text.splitlines())) < 260
    assert "ry/directory/end.txt" in text and "...y/directory/other.txt" in text


def test_different_names_stay_different_when_they_are_cut(tmp_path):
    beginning, end = "a/long/path/of/a/directory/", "/and/the/end/of/the/path.txt"
    for i in range(2):
        write_run(tmp_path / str(i), data__source=f"{beginning}{i}{end}")
    lines = comparison.text(runs.load([tmp_path])).splitlines()
    cells = next(line.split() for line in lines if line.startswith("data.source"))
    assert cells[1] != cells[2] and lines[3] != lines[4]
    labels = [line.split()[1] for line in lines if line.startswith(("(1)  source", "(2)  source"))]
    assert len({*labels}) == 2
    assert next(line.split() for line in lines if "tokens/s" in line)[1] == "train.seed"


def test_options_that_change_the_figure_distinguish_groups(tmp_path):
    for i, options in enumerate(({}, {"eval__final_rows": 2}, {"eval__rows": 2}, {"eval__prompts": ("a",)})):
        write_run(tmp_path / f"run{i}", train__seed=i, **options)
    groups = runs.group(runs.load([tmp_path]))
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 3], [1], [2]]


def test_the_best_figure_of_a_run_with_a_nan_step_is_finite(tmp_path):
    path = write_run(tmp_path / "a")
    lines = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text('{"step": 0, "loss": NaN, "validation_bits_per_byte": NaN}\n' + lines)
    assert runs.read(path).best(runs.BITS).value == 1.9


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    for name in ("x/a", "y/a", "y/b"):
        write_run(tmp_path / name)
    paths = [tmp_path / name for name in ("x/a", "y/a", "y/b")]
    assert [run.name for run in runs.load(paths)] == ["x/a", "y/a", "b"]
    assert [run.name for run in runs.load([tmp_path / "y"])] == ["a", "b"]


def test_paths_without_runs_and_damaged_files_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        runs.load([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run in this directory"):
        runs.load([tmp_path / "empty"])
    path = write_run(tmp_path / "a", done=False) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')  # a trainer is writing this line
    assert runs.read(path.parent).step == 4
    config = (path.parent / "config.json").read_text()
    (path.parent / "config.json").write_text('{"architectures": ["Llama"]}')  # of a Hugging Face directory
    other = (
        r"a run or a sweep; python -m llm_jax.evaluate --checkpoint=A --checkpoint=B --data=FILE compares checkpoints"
    )
    with pytest.raises(UserError, match=f"a: not a run of llm_jax.train; expected {other} of any form"):
        runs.load([path.parent])
    with pytest.raises(UserError, match=f"config.json: a file; expected {other}"):
        runs.load([path.parent / "config.json"])
    with pytest.raises(UserError, match=f"asset:x: no such directory; expected {other}"):
        runs.load(["asset:x"])
    (path.parent / "config.json").write_text('{"train": 1, "zzz": 2}')
    with pytest.raises(UserError, match=r"a: not a run of llm_jax.train \("):
        runs.read(path.parent)
    (path.parent / "config.json").write_text(config)
    path.write_text('{"step"\n' + path.read_text())
    with pytest.raises(UserError, match="line 1 is damaged"):
        runs.read(path.parent)


def test_the_command_prints_options_figures_differences_and_samples(sweep, tmp_path):
    unfinished = write_run(tmp_path / "unfinished", 9.0, done=False, model__position__kind="t5")
    out = call("compare", str(sweep), f"--run={unfinished}").stdout
    rows = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["model.position.kind", "t5", "alibi", "rope"] in cells
    assert "7 runs in 3 groups" in out and "not finished: unfinished, step 4 of 4" in out
    alone = call("compare", *(str(sweep / f"{kind}-{seed}") for kind in ("rope", "alibi") for seed in range(3))).stdout
    row = next(line for line in alone.splitlines() if line.startswith("(2)  kind=alibi"))
    assert "0,1,2" in row and "2.3900" in row and "-0.1100 [-0.1348, -0.0852]" in row and "1.8000" in row
    assert row.split()[-5:] == ["123", "512", "1,000", "50", "1.5"]
    assert (
        "(2) alibi-0, step 4\nby alibi" in alone and "by alibi" not in call("compare", str(sweep), "--nosamples").stdout
    )


def test_without_runs_the_command_says_what_to_give(tmp_path):
    assert "name at least one run" in call("compare").stderr
    done = call("compare", str(tmp_path / "x"))
    assert done.returncode == 2 and "no such directory" in done.stderr and done.stderr.count("\n") == 1
    assert "usage: python -m llm_jax.compare RUN ..." in call("compare", "--help").stdout
