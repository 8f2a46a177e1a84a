"""What commands share: flags, --config and its overrides, help, exit codes, interrupts, and calls within a process."""

import importlib
import json
import os
import signal
import subprocess
import sys

import pytest

from llm_jax import __main__ as entry
from llm_jax import cli, configuration
from llm_jax.schema import EmbeddingsConfig, option_names, unsupported_names
from tests.conftest import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

CHECKPOINT = "--checkpoint=nowhere"
QUANTIZE = ("quantize", CHECKPOINT, "--output=nothing")
GENERATE = ("generate", CHECKPOINT, "--prompt=a")
CONVERT = ("convert", "--input=nowhere", "--output=nothing")
CALIBRATION = "neither a static scheme nor --method=smoothquant, awq, gptq is given"


@pytest.mark.parametrize(
    ("flags", "vain", "where"),
    [
        (("evaluate", CHECKPOINT), "--style=cot_zero_shot", "--task is not given"),
        (("evaluate", CHECKPOINT), "--style=zero_shot", "--task is not given"),  # its default, but given
        (("evaluate", CHECKPOINT, "--harness=piqa"), "--shots=2", "--task is not given"),
        (("evaluate", CHECKPOINT, "--data=x"), "--limit=2", "neither --task nor --harness is given"),
        (("evaluate", CHECKPOINT, "--task=copying"), "--harness_path=x", "--harness is not given"),
        (("evaluate", CHECKPOINT), "--kind=text", "--data is not given"),
        (("evaluate", CHECKPOINT, "--task=copying"), "--stride=4", "--task or --harness is given"),
        (GENERATE, "--draft_tokens=4", "--draft=CHECKPOINT or --draft=prompt is not given"),
        (GENERATE, "--early_stop", "--beams=2 or more is not given"),
        ((*GENERATE, "--beams=2"), "--diversity=0.5", "--beam_groups=2 or more is not given"),
        (GENERATE, "--system=be kind", "--chat is not given"),
        (GENERATE, "--alternatives=3", "--json is not given"),
        ((*GENERATE, "--explain"), "--stop=x", "--explain is given"),
        ((*QUANTIZE, "--scheme=w8a8"), "--sequences=8", CALIBRATION),
        ((*QUANTIZE, "--scheme=int4", "--method=awq"), "--noact_order", "--method=gptq is not given"),
        (QUANTIZE, "--method=gptq", "--scheme is not given"),
        ((*CONVERT, "--to=hf"), "--format=Q8_0", "--to=gguf is not given"),
        ((*CONVERT, "--to=gguf"), "--dtype=float16", "--to=hf is not given"),
        ((*CONVERT, "--to=gguf"), "--family=llama", "neither --to=hf nor --to=peft is given"),
        (("probe_embeddings", "--vectors=nowhere"), "--words=a,b", "--map is not given"),
        (("train_tokenizer", "--kind=byte", "--input=x", "--output=y"), "--sample=3", "--kind=byte is given"),
    ],
)
def test_a_flag_without_effect_is_an_error_that_names_the_flag_it_needs(command, flags, vain, where):
    said = command(*flags, vain, code=2).stderr
    assert said == f"error: {vain} has no effect where {where}\n"


@pytest.mark.parametrize(
    "flags",
    [
        (*GENERATE, CHECKPOINT),
        (*QUANTIZE, CHECKPOINT),
        (*CONVERT, "--to=hf", "--input=elsewhere"),
        ("evaluate", CHECKPOINT, "--batch_size=2", "--batch_size=2"),
        ("train", "--workdir=a", "--workdir=b"),
        ("show", "rows", "--first=1", "--first=2"),
    ],
)
def test_a_flag_of_one_value_is_not_repeated(command, flags):
    name = flags[-1].partition("=")[0]
    assert command(*flags, code=2).stderr == f"error: {name} is given 2 times; it takes one value\n"


@pytest.mark.parametrize(
    "flags",
    [
        ("evaluate", CHECKPOINT),
        ("evaluate", CHECKPOINT, "--data=x", "--kind=text", "--stride=4"),
        (*GENERATE, "--draft=prompt", "--draft_tokens=4"),
        (*GENERATE, "--beams=4", "--beam_groups=2", "--diversity=0.5", "--length_penalty=1"),
        (*QUANTIZE, "--scheme=int4", "--method=gptq", "--act_order", "--sequences=8", "--data=x"),
        (*QUANTIZE, "--scheme=int4", "--rule=layers/0/.*=w8a8_static", "--sequences=8"),
        (*CONVERT, "--to=hf", "--family=llama", "--dtype=float16"),
    ],
)
def test_flags_that_have_what_they_need_are_taken(command, flags):
    assert "nowhere: no such directory" in command(*flags, code=2).stderr


def test_the_message_of_an_interrupted_generation_does_not_mention_checkpoints(command, trained):
    flags = (f"--checkpoint={trained}", "--prompt=a", "--stream", "--ignore_eos", "--max_new_tokens=20000")
    child = command("generate", *flags, start=True)
    assert child.stdout.read(1)  # it is at work
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    note, *others = errors.splitlines()
    assert (child.returncode, others) == (130, ["", "interrupted"])
    assert note.startswith("note: prompt and max_new_tokens=20000 may exceed the 1,024 positions")


def commands():
    """(arguments after `python -m llm_jax.`, command) of every command and subcommand."""
    pairs = []
    for name in entry.COMMANDS:
        command = importlib.import_module(f"llm_jax.{name}").COMMAND
        subcommands = command if isinstance(command, dict) else {"": command}
        pairs += [(f"{name} {subcommand}".strip(), c) for subcommand, c in subcommands.items()]
    return pairs


@pytest.mark.parametrize(("name", "definition"), commands())
def test_every_command_describes_its_flags(name, definition, command):
    assert definition.name == name
    text = command(*name.split(), "--help").stdout
    positional = f" {definition.positional.upper()} ..." if definition.positional else ""
    assert text.startswith(f"usage: python -m llm_jax.{name}{positional} [--FLAG=VALUE ...]\n\n")
    for flag in definition.flags:
        assert f"--{flag}" in text or f"--[no]{flag}" in text
    assert ("--config=SOURCE" in text) == (definition.config is not None)
    assert command(*name.split(), "-h").stdout == text


@pytest.mark.parametrize(("name", "definition"), commands())
def test_every_command_runs_as_a_process(name, definition):
    """One process per command: the module is the command, its imports suffice, and a bad flag is one line."""
    run = [sys.executable, "-m", *f"llm_jax.{name}".split(), "--no_such_flag"]
    done = subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown flag --no_such_flag; ") and done.stderr.count("\n") == 1


def test_calls_within_a_process_share_no_flags(command):
    assert "nowhere: no such directory" in command("evaluate", CHECKPOINT, "--stride=4", code=2).stderr
    assert command("evaluate", code=2).stderr == "error: --checkpoint is required\n"
    error = command("generate", CHECKPOINT, "--prompt=a", "--stride=4", code=2).stderr
    assert error == "error: unknown flag --stride; did you mean --stream?\n"
    error = command("generate", CHECKPOINT, "--prompt=a", "--zzz=4", code=2).stderr
    assert error == "error: unknown flag --zzz; python -m llm_jax.generate --help lists the flags\n"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert command("train", "--dry_run", "--workdir=unused").stdout
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def parsed(*arguments, config=configuration.Config):
    """The configuration that a command with these arguments gets."""
    configs = []
    command = cli.Command("test", lambda f: configs.append(f.config), cli.Flags(), config=config)
    assert cli.call(command, arguments) == 0
    return configs[0]


def test_config_takes_recipes_files_and_runs_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = configuration.load("default")
    assert parsed() == parsed("--config=default") == parsed("--config=configs/default.py") == default
    assert parsed("--config", "gpt3") == configuration.load("gpt3") != default
    wide = configuration.load("default", {"model.width": 64})
    (tmp_path / "wide.toml").write_text("[model]\nwidth = 64\n")
    (tmp_path / "wide.json").write_text('{"model": {"width": 64}}')
    (tmp_path / "wide.py").write_text("def get_config():\n    return {'model': {'width': 64}}\n")
    assert [parsed(f"--config=wide.{form}") for form in ("toml", "json", "py")] == [wide] * 3
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(configuration.as_dict(wide)))
    assert parsed("--config=run") == wide
    assert parsed("--config.train.seed=3", "--config=run") == configuration.load(wide, {"train.seed": 3})


def test_overrides_have_the_types_of_their_options_and_count_as_explicit():
    config = parsed(
        "--config.optim.lr=1",
        "--config.eval.prompts=('a', 'b')",
        "--noconfig.model.qk_norm",
        "--config.model.position.kind=rope",
        "--config.train.steps",
        "5",
    )
    assert (config.optim.lr, config.eval.prompts, config.model.qk_norm) == (1.0, ("a", "b"), False)
    assert config.train.steps == 5 and "model.position.kind" in config.explicit  # although it is the default
    words = parsed("--config.glove.window=3", "--config=glove", config=EmbeddingsConfig)
    assert (words.kind, words.glove.window) == ("glove", 3)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.model.position=alibi",
            "config key 'model.position' is a section; did you mean --config.model.position.kind=alibi?",
        ),
        (
            "--config.train=5",
            "config key 'train' is a section; set one of its options, as in --config.train.steps=VALUE",
        ),
        ("--config.model.tie_head=True", "unknown config key 'model.tie_head'; it is now 'model.tie_embeddings'"),
        ("--config.n_layer=3", "unknown config key 'n_layer'; did you mean 'model.num_layers'?"),
        ("--config.model.hidden_size=3", "unknown config key 'model.hidden_size'; did you mean 'model.width'?"),
        ("--config.bf16=True", "unknown config key 'bf16'; did you mean 'model.precision.compute=bfloat16'?"),
        ("--learning_rate=1", "unknown flag --learning_rate; did you mean --config.optim.lr?"),
        ("--steps=1", "unknown flag --steps; did you mean --config.train.steps?"),
        ("--wrkdir=x", "unknown flag --wrkdir; did you mean --workdir?"),
        ("--config", "--config needs a value: a recipe, a file or a run directory"),
        ("--config.train.lr=3", "unknown config key 'train.lr'; did you mean 'optim.lr'?"),
        ("--config.optim.width=3", "unknown config key 'optim.width'; did you mean 'model.width'?"),
        ("--config.peft.target_modules=a", "unknown config key 'peft.target_modules'; did you mean 'lora.targets'?"),
        (
            "--per_device_train_batch_size=4",
            "unknown flag --per_device_train_batch_size; did you mean --config.train.batch_size?",
        ),
        (
            "--num_train_epochs=1",
            "unknown flag --num_train_epochs; train.steps is the length of a run; an epoch has about (training tokens) "
            "/ (train.batch_size * train.seq_len) steps",
        ),
        ("--output_dir=x", "unknown flag --output_dir; did you mean --workdir?"),
        ("--config.train.steps=abc", "config key 'train.steps' is 'abc'; expected int, at least 1"),
        ("--config.optim.lr=fast", "config key 'optim.lr' is 'fast'; expected float, at least 0"),
        ("--config.model.tie_embeddings=maybe", "config key 'model.tie_embeddings' is 'maybe'; expected bool"),
        (
            "--config.eval.prompts=('a',",
            """config key 'eval.prompts' is "('a',"; expected tuple of str, such as ('a', 'b')""",
        ),
        ("--devices=some", "--devices=some; expected an integer"),
        (
            "--devices=0",
            "--devices=0; expected at least 1 simulated CPU device; omit the flag to use this machine's devices",
        ),
        ("--dry_run=maybe", "--dry_run=maybe; expected true or false (also yes, no, on, off, 1, 0)"),
        ("--help-config=zzz", "--help-config=zzz: no option contains this; --help-config describes the options"),
    ],
)
def test_names_of_other_codebases_and_sections_are_answered_with_the_option(flag, message, capsys):
    train = importlib.import_module("llm_jax.train").COMMAND
    assert cli.call(train, ["--workdir=unused", flag]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_beams=4", "unknown flag --num_beams; did you mean --beams?"),
        ("--do_sample", "unknown flag --do_sample; did you mean --temperature=0 (greedy) or 1?"),
        ("--model_name_or_path=x", "unknown flag --model_name_or_path; did you mean --checkpoint?"),
        ("--temperature=hot", "--temperature=hot; expected a number"),
        ("--early_stop=maybe", "--early_stop=maybe: expected true, false or never"),
    ],
)
def test_names_of_other_codebases_and_wrong_values_of_flags(flag, message, command):
    assert command(*GENERATE, flag, code=2).stderr == f"error: {message}\n"


def test_every_answer_to_another_flag_is_a_flag():
    names = {name for _, definition in commands() for name in definition.flags}
    each = [set(definition.flags) for _, definition in commands()]
    for other, answers in option_names.OTHER_FLAGS.items():
        targets = {answer.partition("=")[0] for answer in answers}
        assert targets <= names and any(targets & flags and other not in flags for flags in each), other
    assert not {*unsupported_names.EXPLAINED} & names


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("On", True), ("1", True), ("no", False), ("off", False), ("0", False)]
)
def test_booleans_have_the_usual_spellings(text, value):
    assert parsed(f"--config.model.qk_norm={text}").model.qk_norm is value
    values = []
    flags = cli.Flags()
    flags.boolean("quick", None, "a flag")
    assert cli.call(cli.Command("test", lambda f: values.append(f.quick), flags), [f"--quick={text}"]) == 0
    assert values == [value]


def test_a_single_text_is_a_tuple_of_one():
    assert parsed("--config.eval.prompts=hello world").eval.prompts == ("hello world",)
    assert parsed("--config.eval.tasks=arithmetic").eval.tasks == ("arithmetic",)
    assert parsed("--config.eval.prompts=('a', 'b')").eval.prompts == ("a", "b")
    assert parsed("--config.eval.prompts=()").eval.prompts == ()


def test_of_options_given_twice_the_last_counts_and_a_note_says_so(capsys):
    config = parsed(
        "--config.train.seed=1", "--config.train.steps=3", "--config.train.seed=2", "--config.train.steps=3"
    )
    assert (config.train.seed, config.train.steps) == (2, 3)
    assert capsys.readouterr().err == "note: --config.train.seed is given 2 times; using --config.train.seed=2\n"
    assert parsed("--config.train.seed", "1", "--config.train.seed", "2").train.seed == 2
    assert not parsed("--config.model.qk_norm=yes", "--noconfig.model.qk_norm").model.qk_norm
    first, second = capsys.readouterr().err.splitlines()
    assert "using --config.train.seed=2" in first and "using --config.model.qk_norm=False" in second
    assert parsed("--config.eval.prompts=a", "--config.eval.prompts=b").eval.prompts == ("a", "b")
    assert not capsys.readouterr().err  # the values of a tuple are joined
    assert parsed("--config=default", "--config=gpt3") == configuration.load("gpt3")
    assert capsys.readouterr().err == "note: --config is given 2 times; using --config=gpt3\n"


def test_a_command_without_arguments_has_its_default_configuration():
    assert parsed() == configuration.load("default")


def test_every_answer_to_another_name_is_an_option_with_a_valid_value():
    options = set(option_names.keys())
    for name, answer in option_names.OTHER_NAMES.items():
        key, _, value = answer.partition("=")
        assert key in options and name not in {option.rsplit(".", 1)[1] for option in options if "." in option}
        if value:
            assert configuration.flat(configuration.load("default", {key: value}))[key] == value


def test_help_config_describes_every_option_and_can_be_searched(command):
    text = command("train", "--help-config").stdout
    keys = [line[9:].split("=")[0] for line in text.splitlines() if line.startswith("--config.")]
    assert keys == list(option_names.keys())
    lines = text.splitlines()
    assert all(lines[i + 1].startswith("    ") for i, line in enumerate(lines) if line.startswith("--config."))
    by_key = command("train", "--help-config=optim.lr").stdout.splitlines()
    assert by_key[0] == "--config.optim.lr=0.003  (float, at least 0)" and "learning rate" in by_key[1]
    assert "--config.model.num_kv_heads=" in command("train", "--help-config", "grouped-query").stdout
    assert "--config.glove.x_max=" in command("train_embeddings", "--help-config").stdout


def test_a_command_with_subcommands_lists_them(command):
    message = "error: show: a subcommand is required; expected one of rows, tokens, attention, positions, "
    assert command("show", code=2).stderr.startswith(message)
    error = command("show", "row", code=2).stderr
    assert error.startswith("error: show: unknown subcommand 'row'; expected one of rows, tokens, ")
    listing = command("show", "--help").stdout
    assert "  rows " in listing and "  tokens " in listing and "  attention " in listing


@pytest.mark.parametrize(
    ("earlier", "new", "flags"),
    [
        ("data.show", "show rows", ["--rows=0"]),
        ("tokenizers.show", "show tokens", ["--tokenizer=byte", "--text=ab"]),
        ("tokenizers.train", "train_tokenizer", ["--kind=byte"]),
        ("embeddings.train", "train_embeddings", ["--config.glove.windows=1"]),
        ("embeddings.probe", "probe_embeddings", ["--vectors=nowhere"]),
        ("data.assets", "assets", []),
    ],
)
def test_earlier_names_run_the_command_and_name_the_new_one(command, earlier, new, flags):
    done = command(earlier, *flags, process=True, code=None)
    note, *rest = done.stderr.splitlines()
    assert note == f"note: python -m llm_jax.{earlier} is now python -m llm_jax.{new}"
    direct = command(*new.split(), *flags, code=None)
    assert (done.returncode, done.stdout, rest) == (direct.returncode, direct.stdout, direct.stderr.splitlines())


@pytest.mark.parametrize(
    "arguments", [("llm_jax.train", "--help-config"), ("llm_jax", "show", "tokens", "--tokenizer=byte")]
)
def test_a_reader_that_ends_early_ends_the_command_quietly(arguments, tmp_path):
    """As in `python -m llm_jax.train --help-config | head -1`."""
    (tmp_path / "words.txt").write_text("word " * 100_000)
    with (tmp_path / "words.txt").open() as words:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT, env=ENVIRONMENT, stdin=words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    assert child.stdout and child.stderr
    child.stdout.close()
    assert (child.wait(60), child.stderr.read()) == (141, b"")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("llm_jax.sample", "error: unknown command 'sample'; did you mean generate?\n"),
        ("llm_jax.trian", "error: unknown command 'trian'; did you mean train?\n"),
    ],
)
def test_python_m_of_an_unknown_command(module, message):
    run = [sys.executable, "-m", module, "--checkpoint=x"]
    done = subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 0, "usage: llm-jax COMMAND"),
        (("--help",), 0, "usage: llm-jax COMMAND"),
        (("trian",), 2, "error: unknown command 'trian'; did you mean train?"),
        (("evaluate", "--checkpoint=nowhere"), 2, "error: nowhere: no such directory"),
        (("show", "tokens", "--tokenizer=byte", "--text=ab"), 0, "byte: byte, 259 ids; 2 tokens"),
    ],
)
def test_llm_jax_runs_and_lists_commands(arguments, code, text):
    run = [sys.executable, "-m", "llm_jax", *arguments]
    done = subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == code and text in (done.stderr if code else done.stdout)
    assert done.stderr.count("\n") == bool(code)


def test_every_command_is_listed():
    names = {path.stem for path in (ROOT / "llm_jax").glob("*.py") if "cli.Command(" in path.read_text()}
    rooms = {path.parent.name for path in (ROOT / "llm_jax").glob("*/__main__.py")}
    assert names | rooms == set(entry.COMMANDS)
