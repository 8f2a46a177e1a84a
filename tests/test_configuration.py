import json
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax._src import xla_bridge

import llm_jax
from llm_jax import configuration as config_lib
from llm_jax.errors import UserError
from llm_jax.schema import option_names
from tests.conftest import ROOT

FREEZE_FIRST_LAYER = (("layers/0/.*", 0.0), (".*", 1.0))


def default():
    return runpy.run_path(str(ROOT / "configs" / "default.py"))["get_config"]()


def test_default_states_every_option_and_no_other():
    config = config_lib.build(default())
    assert set(config_lib.flat(config)) == set(option_names.keys())
    assert config_lib.build(config_lib.as_dict(config)) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stepz", 3, r"unknown config key 'train.stepz'; did you mean 'train.steps'\?"),
        ("steps", 2.5, "'train.steps' is 2.5; expected int"),
        ("steps", True, "'train.steps' is True; expected int"),
        ("steps", 0, "'train.steps' is 0; expected a number of at least 1"),
        ("seed", 2**32, "'train.seed' is 4294967296; expected a number of at most 4294967295"),
        ("steps", None, "'train.steps' is None; expected int, at least 1"),
        ("steps", "8", "'train.steps' is '8'; expected int, at least 1"),
    ],
)
def test_wrong_keys_and_types_are_named(key, value, message):
    config = default().to_dict()
    config["train"][key] = value
    with pytest.raises(UserError, match=message):
        config_lib.build(config)


def test_a_missing_key_is_named():
    config = default().to_dict()
    del config["model"]["position"]["base"]
    with pytest.raises(UserError, match=r"'model.position.base' is missing"):
        config_lib.build(config)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.step=3", "unknown config key 'train.step'; did you mean 'train.steps'?"),
        ("--config.position.kind=rope", "did you mean 'model.position.kind'?"),
        ("--config.train.steps=many", "train.steps"),
        ("--config=nowhere.py", "no such file"),
        ("--wrkdir=x", "wrkdir"),
        ("stray", "unexpected argument 'stray'"),
        ("--config.model.mlp=wide", "'model.mlp' is 'wide'; expected one of gated, plain"),
        ("--config.model.num_heads=3", "does not divide model.num_heads=3"),
        ("--config.model.layer_pattern=('far',)", "expected a list of the kinds global, local, nope"),
        ("--config.optim.lr=nan", "'optim.lr' is nan; expected a finite number (float, at least 0)"),
        ("--config.model.precision.compute=floatx", "expected one of auto, bfloat16, float16, float32, float64"),
        ("--config.mesh.fsdp=3", "does not fit 1 device"),
        ("--config.train.loss_chunk=5", "must divide train.seq_len=32"),
        ("--config.optim.decay_rules=(('x',0.0),('.*',1.0))", "the rule 'x' matches no parameter"),
        ("--config.data.source=/nowhere/text", "no such file"),
        ("--config.init_from=/nowhere/run", "no such directory"),
        ("--config.train.seq_len=4000000", "rows of train.seq_len=4000000 tokens with"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_code_2(command, tmp_path, flag, message):
    done = command("train", f"--workdir={tmp_path / 'run'}", flag, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_does_not_import_jax(command):
    done = command("train", "--help")
    assert "--config" in done.stdout
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, llm_jax, llm_jax.train, llm_jax.generate; print(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not {"jax", "flax", "orbax", "sentencepiece", "grain"} & set(listed.stdout.split())


def test_a_mistyped_key_is_one_line_without_a_config_file_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax.train", f"--workdir={tmp_path / 'x'}", "--config.train.step=3"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: unknown config key 'train.step'; did you mean 'train.steps'?\n"


@pytest.mark.parametrize("what", ["file", "/proc/nowhere"])
def test_a_workdir_that_cannot_be_written_is_one_line(command, tmp_path, what):
    if what == "file":
        what = tmp_path / "file"
        what.write_text("")
    done = command("train", f"--workdir={what}", code=2)
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {what}")


def test_a_config_json_with_the_names_of_earlier_versions_loads_under_the_new_names(tmp_path):
    config = config_lib.load("default")
    values = {new: value for new, value in config_lib.flat(config).items() if new in option_names.RENAMED.values()}
    # Another value than the default for every renamed option, so that a dropped one shows.
    choices = {"model.norm_placement": "post", "model.position.relative_embeddings": "keys"}
    choices |= {"model.attention_kernel": "plain", "model.kv_cache": "int8"}
    choices |= {"loss.mask_prob": 0.5, "model.position.partial_rotary_factor": 0.25}
    changes = {
        key: choices[key] if key in choices else not value if isinstance(value, bool) else value * 2 + 1
        for key, value in values.items()
    }
    expected = config_lib.replace(config, changes)
    mapping = config_lib.as_dict(expected)
    for old, new in option_names.RENAMED.items():
        *sections, name = new.split(".")
        section = mapping
        for part in sections:
            section = section[part]
        section[old.rsplit(".", 1)[1]] = section.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    assert config_lib.load(tmp_path) == expected


@pytest.mark.parametrize(("old", "new"), option_names.RENAMED.items())
def test_an_override_by_an_earlier_name_is_answered_with_the_new_one(old, new):
    with pytest.raises(UserError, match=f"unknown config key '{old}'; it is now '{new}'"):
        config_lib.load("default", {old: 1})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("defalt", "configuration 'defalt': no such file; did you mean 'default'? expected a recipe (chat_lora, "),
        ("text.txt", "configuration 'text.txt': expected a .py, .json or .toml file, not '.txt'"),
        (
            "raises.py",
            "configuration 'raises.py' cannot be read (NameError: name 'hello' is not defined, raises.py line 1)",
        ),
        ("ends.py", "configuration 'ends.py' cannot be read (SystemExit: 3, ends.py line 1)"),
        ("empty.py", "configuration 'empty.py': this file has no function get_config()"),
        ("glove", "configuration 'glove' has the options of train_embeddings, not of training a language model"),
    ],
)
def test_an_invalid_configuration_is_named(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("raise SystemExit  # text is not run")
    (tmp_path / "raises.py").write_text("hello\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError) as error:
        llm_jax.config(source)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 33}, "model.num_heads=4 does not divide model.width=33"),
        ({"model.mlp": "wide"}, "'model.mlp' is 'wide'; expected one of gated, plain"),
        ({"model.attention_kernel": "flash"}, "'model.attention_kernel' is 'flash'; expected one of"),
        ({"train.seq_len": 2048, "model.position.kind": "learned"}, "exceed the 1024 positions"),
        ({"train.gather_once": True}, "train.gather_once=True has no effect with train.grad_accumulation=1"),
        ({"train.grad_accumulation": 3}, "train.batch_size=8 cannot be split into train.grad_accumulation=3"),
        ({"optim.kind": "adam"}, "'optim.kind' is 'adam'; expected one of"),
        ({"optim.schedule": "step"}, "'optim.schedule' is 'step'; expected one of"),
        ({"optim.decay_rules": (("x", 0.0), (".*", 1.0))}, "the rule 'x' matches no parameter"),
        ({"lora.rank": 4}, "lora.rank trains adapters over pretrained weights; name them with init_from"),
        ({"eval.prompts": "def "}, r"'eval.prompts' is 'def '; expected tuple of str, such as \('a', 'b'\)"),
        ({"optim.lr_rules": FREEZE_FIRST_LAYER, "model.scan_layers": True}, "set model.scan_layers=False"),
        ({"optim.lr_rules": "x"}, r"'optim.lr_rules' is 'x'; expected \(\(pattern, value\), ...\), such as"),
        ({"optim.lr": float("inf")}, r"'optim.lr' is inf; expected a finite number \(float, at least 0\)"),
    ],
    ids=str,
)
def test_config_raises_the_errors_of_the_command_line(changes, message):
    with pytest.raises(UserError, match=message):
        llm_jax.config("default", changes)


@pytest.mark.parametrize("scan_layers", [False, "auto"])
def test_config_accepts_rules_that_distinguish_layers_unless_layers_are_scanned(scan_layers):
    """On a CPU, `auto` unrolls layers; where it scans them, `train` refuses these rules."""
    changes = {"optim.lr_rules": FREEZE_FIRST_LAYER, "model.scan_layers": scan_layers}
    assert llm_jax.config("default", changes).optim.lr_rules == FREEZE_FIRST_LAYER


def test_config_does_not_initialize_devices(monkeypatch):
    """So that a script can choose devices, or join other processes, after it has a configuration."""

    def initialize(*args):
        raise AssertionError("the devices are initialized")

    monkeypatch.setattr(xla_bridge, "get_backend", initialize)
    llm_jax.config("default", {"model.position.kind": "t5", "model.width": 44, "train.batch_size": 2})
    with pytest.raises(AssertionError):
        jax.default_backend()


def test_mappings_with_dotted_keys_and_scalars_of_arrays():
    nested = {"model": {"width": 32, "position": {"kind": "alibi"}}, "train": {"seed": 2}, "optim": {"lr": 0.5}}
    dotted = {
        "model.position.kind": np.str_("alibi"),
        "model": {"width": np.int64(32)},
        "train.seed": jax.numpy.int32(2),
        "optim.lr": np.float32(0.5),
    }
    assert llm_jax.config(dotted) == llm_jax.config("default", dotted) == llm_jax.config(nested)
    with pytest.raises(UserError, match="unknown config key 'model.n_layer'; did you mean 'model.num_layers'?"):
        llm_jax.config({"model.width": 32, "model.n_layer": 2})
    with pytest.raises(UserError, match="config key 'train.seed' is 1.5; expected int"):
        llm_jax.config("default", {"train.seed": np.float64(1.5)})
    with pytest.raises(UserError, match="config key 'model.width' is array"):
        llm_jax.config("default", {"model.width": np.array([32])})
