"""Training from Python: `llm_jax.train`, a custom loop, and what `init_from` decides."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

import llm_jax
from llm_jax import configuration, files, trees
from llm_jax.errors import UserError
from llm_jax.training import inputs, start
from llm_jax.training.setup import setup
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def config(text_file, cache):
    changes = {"data.source": str(text_file), "data.cache_dir": str(cache), "checkpoint.every": 0}
    return llm_jax.config(ROOT / "tests" / "tiny.py", changes)


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_train_returns_its_summary_and_a_callback_sees_every_step(config, tmp_path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []
    summary = llm_jax.train(config, tmp_path, callback=seen.append, verbose=False)
    assert [line["step"] for line in seen] == [1, 2, 3, 4, 5, 6, 7, 8] and "validation_loss" in seen[-1]
    assert [line["loss"] for line in seen] == losses(tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["validation_loss"] == pytest.approx(seen[-1]["validation_loss"])
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    model, params, tokenizer = llm_jax.load(tmp_path)
    assert jax.jit(model.apply)({"params": params}, np.array([tokenizer.encode("the")])).shape[-1] == 259


def test_a_run_stopped_by_its_callback_resumes_bit_for_bit(config, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    llm_jax.train(config, whole, verbose=False)
    stopped = llm_jax.train(config, halves, callback=lambda line: line["step"] == 2, verbose=False)
    assert stopped == {"stopped": True, "steps": 3}  # step 3 was under way when the metrics of step 2 came
    asked = []
    stopped = llm_jax.train(config, halves, stop=lambda: asked.append(None) or len(asked) == 2, verbose=False)
    assert stopped == {"stopped": True, "steps": 5}
    llm_jax.train(config, halves, verbose=False)
    assert losses(halves) == losses(whole)
    ours, theirs = (trees.fingerprint(llm_jax.load(path).params) for path in (halves, whole))
    assert ours == theirs


def test_an_error_leaves_the_workdir_free_for_the_next_trainer(config, tmp_path):
    def fail(line):
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        llm_jax.train(config, tmp_path, callback=fail, verbose=False)
    assert llm_jax.train(config, tmp_path, verbose=False)["steps"] == 8


def test_a_loop_of_ones_own_does_what_the_trainer_does(config, tmp_path):
    llm_jax.train(config, tmp_path, verbose=False)
    data = inputs.load(config)
    parts = setup(config, data.vocab_size)
    state, seen = parts.init(), []
    for batch in parts.batches(data.train, 0, config.train.steps):
        state, metrics = parts.step(state, batch)
        seen.append(float(metrics["loss"]))
    np.testing.assert_array_equal(np.float32(seen), np.float32(losses(tmp_path)))
    # And many steps at once.
    batches = [jax.device_get(batch) for batch in parts.batches(data.train, 0, 3)]
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    state, metrics = parts.scan(parts.init(), stacked)
    np.testing.assert_allclose(metrics["loss"], seen[:3], rtol=1e-5)
    assert int(state.step) == 3


def test_seconds_of_a_step_leave_out_evaluations(config, tmp_path, monkeypatch):
    import time

    from llm_jax.training import trainer

    evaluate = trainer.Evaluator.evaluate

    def slow(self, state, final):
        time.sleep(0.5)
        return evaluate(self, state, final)

    monkeypatch.setattr(trainer.Evaluator, "evaluate", slow)
    every = configuration.replace(config, {"eval.every": 2})
    llm_jax.train(every, tmp_path, verbose=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][2:]
    assert all(line["seconds"] < 0.4 for line in lines)
    evaluated, after = ([line["seconds"] for line in lines if line["step"] % 2 == rest] for rest in (0, 1))
    # A step that is followed by an evaluation takes as long as the others: not a thousandth of it.
    assert 0.02 < np.median(evaluated) / np.median(after) < 50


def test_setup_refuses_contradictions_without_data(config):
    for changes, message in (
        ({"model.position.kind": "ropy"}, "'model.position.kind' is 'ropy'"),
        ({"report.to": ("wanbd",)}, "'report.to' is 'wanbd'"),
        ({"train.batch_size": 3, "train.grad_accumulation": 2}, "cannot be split"),
        ({"lora.rank": 2}, "name them with init_from"),
        ({"optim.schedule": "cosinus"}, "'optim.schedule' is 'cosinus'"),
        ({"model.vocab_size": 8}, "'model.vocab_size' is 8; the tokenizer has 259 ids"),
    ):
        with pytest.raises(UserError, match=message):
            setup(configuration.replace(config, changes), 259)
    with pytest.raises(UserError, match="'model.vocab_size' is 0, but there is no tokenizer"):
        setup(config)


def test_what_needs_no_data_is_refused_before_the_data_is_read(config, tmp_path):
    nowhere = configuration.replace(config, {"data.source": str(tmp_path / "nothing"), "model.position.kind": "ropy"})
    with pytest.raises(UserError, match="'model.position.kind' is 'ropy'"):
        llm_jax.train(nowhere, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_package_that_a_tracker_needs_is_missed_before_the_data_is_read(config, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    changes = {"data.source": str(tmp_path / "nothing"), "report.to": ("wandb",)}
    with pytest.raises(UserError, match="report.to=wandb needs the package wandb; pip install wandb"):
        llm_jax.train(configuration.replace(config, changes), tmp_path / "run")


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    """A run whose model differs from the defaults in every respect that a checkpoint decides."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    changes = {
        "train.steps": 3,
        "model.width": 48,
        "model.num_layers": 3,
        "model.mlp_dim": 40,
        "model.position.kind": "learned",
        "model.position.max_length": 64,
        "model.qk_norm": False,
        "model.tie_embeddings": False,
    }
    llm_jax.train(configuration.replace(config, changes), workdir, verbose=False)
    return workdir


def from_base(base, text_file, cache, **changes):
    sections = {name.replace("__", "."): value for name, value in changes.items()}
    source = {"init_from": str(base), "data.source": str(text_file), "data.cache_dir": str(cache)}
    return llm_jax.config("default", source | {"eval.prompts": (), "train.steps": 2, "train.seq_len": 32} | sections)


def test_init_from_says_what_the_model_is(base, text_file, cache, tmp_path):
    """The defaults have another width, position scheme and tokenizer; nothing of it is typed again."""
    config = from_base(base, text_file, cache, train__batch_size=4, model__remat="full")
    resolved = start.find(config).config
    own = llm_jax.open(base).config
    assert resolved.model == dataclasses.replace(own, remat="full", scan_layers=True)
    assert (resolved.tokenizer.kind, resolved.tokenizer.vocab_size) == ("byte", 259)
    llm_jax.train(config, tmp_path / "full", verbose=False)
    assert llm_jax.open(tmp_path / "full").config.width == 48
    adapters = start.find(from_base(base, text_file, cache, train__batch_size=4, lora__rank=2)).config
    assert adapters.model == dataclasses.replace(own, scan_layers=True)
    parts = setup(adapters, 259)
    assert all(path.endswith(("/a", "/b", "/scale")) for path in trees.flatten(parts.state.params))
    loaded = trees.flatten(trees.unstack(parts.load_base()))
    jax.tree.map(np.testing.assert_array_equal, loaded, trees.flatten(llm_jax.load(base).params))
    # A resumed run has its own weights: the base may be gone.
    longer = configuration.load(config, {"train.steps": 3, "init_from": str(base)})
    base.rename(base.with_name("moved"))
    try:
        assert llm_jax.train(longer, tmp_path / "full", verbose=False)["steps"] == 3
    finally:
        base.with_name("moved").rename(base)


@pytest.mark.parametrize(
    ("key", "value", "weight"),
    [
        ("model.width", 64, "embed/"),
        ("model.num_layers", 4, "layers/3/"),  # the default, set explicitly
        ("model.position.kind", "rope", "embed/"),
        ("model.qk_norm", True, "norm"),
    ],
)
def test_an_override_that_changes_the_shape_of_a_weight_is_refused_by_name(base, text_file, cache, key, value, weight):
    config = configuration.load(from_base(base, text_file, cache), {key: value, "init_from": str(base)})
    with pytest.raises(UserError, match=f"{key}={value!r} does not fit the weights of .*{weight}.*omit it"):
        start.find(config)


def test_options_that_only_together_are_invalid_name_the_one_that_does_not_fit(base, text_file, cache):
    """Such as those of a recipe for a small model over a checkpoint with another number of heads."""
    changes = {"model.num_kv_heads": 3, "model.num_layers": 4, "init_from": str(base)}
    with pytest.raises(UserError, match="model.num_layers=4 does not fit the weights of .*layers/3/.*--config=default"):
        start.find(configuration.load(from_base(base, text_file, cache), changes))
    del changes["model.num_layers"]
    with pytest.raises(UserError, match="overrides of its model are invalid .*num_kv_heads=3"):
        start.find(configuration.load(from_base(base, text_file, cache), changes))


def test_an_override_that_changes_no_weight_is_taken_and_noted(base, text_file, cache):
    changes = {"model.norm_eps": 1e-6, "model.precision.compute": "bfloat16", "model.scan_layers": False}
    config = configuration.load(from_base(base, text_file, cache), changes)
    found = start.find(config)
    model = found.config.model
    assert (model.norm_eps, model.precision.compute, model.scan_layers) == (1e-6, "bfloat16", False)
    assert list(start.notes(found))[1:] == [f"note: model.norm_eps=1e-06 replaces 1e-05 of {found.origin.name}"]


def test_another_tokenizer_than_that_of_init_from_is_refused(base, text_file, cache):
    config = from_base(base, text_file, cache, tokenizer__kind="char")
    with pytest.raises(UserError, match="'tokenizer.kind' is 'char'; omit it, or use --config=default"):
        start.find(config)


@pytest.fixture(scope="module")
def short_run(config, tmp_path_factory):
    """A run of three steps with the schedule "cosine"."""
    workdir = tmp_path_factory.mktemp("short") / "run"
    llm_jax.train(configuration.replace(config, {"optim.schedule": "cosine", "train.steps": 3}), workdir, verbose=False)
    return workdir


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_resuming_with_more_steps_says_how_the_learning_rate_changes(config, short_run, tmp_path, schedule):
    short = configuration.replace(config, {"optim.schedule": schedule, "train.steps": 3})
    shutil.copytree(short_run, tmp_path, dirs_exist_ok=True)
    files.write_json(tmp_path / "config.json", configuration.as_dict(short))  # as a run with this schedule writes it
    longer = start.find(configuration.replace(short, {"train.steps": 30}), tmp_path)
    lines = list(start.notes(longer))
    if schedule in ("constant", "inverse_sqrt"):
        assert lines == []
    else:
        assert (
            "train.steps was 3, now 30" in lines[0]
            and "learning rate of step 4 changes from 0.0005 to 0.00" in lines[0]
        )


@pytest.mark.parametrize(("kind", "max_length"), [("learned", 64), ("learned", 32), ("rope", 64)])
def test_positions_that_no_row_trains_are_noted(config, kind, max_length):
    changes = {"model.position.kind": kind, "model.position.max_length": max_length, "train.seq_len": 32}
    lines = list(start.notes(start.find(configuration.replace(config, changes))))
    assert len(lines) == (kind == "learned" and max_length == 64)
    assert all("trains positions 0 to 31 of 64" in line and "max_length=32 omits" in line for line in lines)


def test_warm_up_is_a_share_of_the_run_by_default():
    from llm_jax.training import optim

    default = llm_jax.config("default")
    assert optim.warmup_steps(default.optim, 700) == 50 and optim.warmup_steps(default.optim, 10) == 0
    assert float(optim.schedule(default.optim, 10)(0)) == pytest.approx(default.optim.lr)
    assert start.find(default).config.optim.warmup_steps == 50


def test_a_runs_default_warm_up_follows_other_steps_and_its_own_resumption_keeps_it(tmp_path):
    run = start.find(llm_jax.config("default", {"train.steps": 420})).config
    files.write_json(tmp_path / "config.json", configuration.as_dict(run))
    changes = ({}, {"train.steps": 42}, {"train.steps": 42, "optim.warmup_steps": 5}, {"optim.lr": 1.0})
    loaded = [configuration.load(tmp_path, change) for change in changes]
    assert [start.find(config).config.optim.warmup_steps for config in loaded] == [30, 3, 5, 30]
    longer = configuration.load(tmp_path, {"train.steps": 840})
    assert start.find(longer, tmp_path).config.optim.warmup_steps == 30  # the run resumes with its schedule
    with pytest.raises(UserError, match="warm-up takes 30 steps, and train.steps is now 30; raise it"):
        start.find(configuration.load(tmp_path, {"train.steps": 30}), tmp_path)
    with pytest.raises(UserError, match=r"another run \(model.width was 256, now 64;.* and 2 more\)"):
        other = {"width": 64, "mlp_dim": 64, "num_heads": 2, "num_kv_heads": 2, "num_layers": 1}
        start.find(llm_jax.config({"train.steps": 3, "model": other, "optim.lr": 1.0}), tmp_path)


def test_a_bad_step_after_the_callback_stops_is_still_handled(config, tmp_path):
    """The step under way when the callback stops the run is collected with the others."""
    bad = configuration.replace(config, {"optim.lr": 1e30, "optim.clip_norm": 0.0})
    with pytest.raises(UserError, match="step 2: the loss is"):
        llm_jax.train(bad, tmp_path, callback=lambda line: line["step"] == 1, verbose=False)
    llm_jax.train(config, tmp_path / "again", verbose=False)


def test_rope_scaling_is_taken_with_all_its_options(text_file, cache, tmp_path):
    rope = llm_jax.config(ROOT / "tests" / "tiny.py", {"data.source": str(text_file), "data.cache_dir": str(cache)})
    llm_jax.train(configuration.replace(rope, {"train.steps": 3}), tmp_path / "base", verbose=False)
    scaling = {"kind": "rope", "scaling": "yarn", "scaling_factor": 2.0, "original_length": 32}
    changes = {"init_from": str(tmp_path / "base"), "model.position": scaling}
    position = start.find(configuration.load(rope, changes)).config.model.position
    assert (position.scaling, position.scaling_factor, position.original_length) == ("yarn", 2.0, 32)


def test_values_set_in_any_way_count_as_explicit(base, text_file, cache):
    """By an override, a partial mapping (even with the default) or dataclasses.replace: none of them is lost."""
    by_mapping = llm_jax.config({"init_from": str(base), "model": {"num_layers": 4}})
    config = from_base(base, text_file, cache)
    by_replace = dataclasses.replace(config, model=dataclasses.replace(config.model, width=64))
    for changed in (by_mapping, by_replace):
        with pytest.raises(UserError, match="does not fit the weights of"):
            start.find(changed)


def test_a_missing_tokenizer_path_is_refused_with_init_from(base, text_file, cache, tmp_path):
    config = from_base(base, text_file, cache, tokenizer__path=str(tmp_path / "typo"))
    with pytest.raises(UserError, match="tokenizer.path="):
        inputs.load(config)
