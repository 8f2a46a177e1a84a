"""Custom parts: the examples of CONTRIBUTING.md, and specifications that are rejected."""

import contextlib
import dataclasses
import importlib
import io
import json
import linecache
import math
import pathlib
import re
import shlex
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import checkpoints, cli, configuration, extensions, tokenizers, trees
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.model import positions
from llm_jax.model.layers import ACTIVATION_STATS
from llm_jax.model.transformer import Transformer
from llm_jax.training import losses as losses_lib
from llm_jax.training import optim

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = re.findall(
    r"```(python|bash)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text().partition("## Custom parts")[2], re.S
)
COMMANDS = [shlex.split(text.strip()) for language, text in RECIPES if language == "bash"]
TRAININGS = [words for words in COMMANDS if "llm_jax.train" in words]
(GENERATION,) = (words for words in COMMANDS if "llm_jax.generate" in words)


@pytest.fixture
def directory(tmp_path, text_file, own_cache) -> pathlib.Path:
    """A directory with the files of the recipes."""
    for language, text in RECIPES:
        if language == "python":
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    lines = text_file.read_text().splitlines()
    (tmp_path / "quotes.txt").write_text("\n%\n".join("\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8)))
    return tmp_path


@pytest.fixture
def run(directory, text_file, cache):
    """run(words of a command line, *more flags): runs the command in `directory` and returns what it prints."""

    def call(words, *flags, code=0):
        name = words[2].removeprefix("llm_jax.")
        flags = [*words[3:], *flags]
        if name == "train":
            flags = [f"--config={ROOT}/tests/tiny.py", f"--config.data.source={text_file}",
                     f"--config.data.cache_dir={cache}", "--config.train.steps=4", "--config.checkpoint.every=2",
                     "--config.eval.every=0",
                     "--config.optim.warmup_steps=0", "--config.model.qk_norm=False",
                     "--config.optim.schedule=constant", *flags]  # fmt: skip
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.chdir(directory), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            result = cli.call(importlib.import_module(f"llm_jax.{name}").COMMAND, flags)
        assert result == code, out.getvalue() + errors.getvalue()
        return out.getvalue() if not code else errors.getvalue()

    return call


def convert(name: str) -> list[str]:
    return ["python", "-m", "llm_jax.convert", f"--input={name}", "--output=converted", "--to=hf"]


def losses(run_directory: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def test_recipes_together(run, directory):
    """One run with the scheme, the tokenizer, the optimizer, the loss and the format: trained, resumed and sampled."""
    parts = [flag for words in TRAININGS for flag in words[3:] if flag.startswith("--config.")]
    assert len(TRAININGS) == 5 and len(parts) == 7
    train = ["python", "-m", "llm_jax.train", *parts]
    run(train, "--workdir=uninterrupted")
    run(train, "--workdir=runs/decay", "--config.train.steps=2")
    run(train, "--workdir=runs/decay")
    assert losses(directory / "runs/decay") == losses(directory / "uninterrupted")

    config = configuration.load(directory / "runs/decay")
    assert re.fullmatch(r"my_decay.py:Decay\(strength=0.5\)#[0-9a-f]{12}", config.model.position.kind)
    assert config.tokenizer.kind.startswith("my_bytes.py:Folded(lower=True)#")
    assert config.optim.kind.startswith("my_sign.py:sign(momentum=0.8)#")
    assert config.loss.kind.startswith("my_focal.py:focal(gamma=1.0)#")
    assert config.data.format.startswith("my_fortunes.py:fortunes(separator='%')#")
    evaluation = ["python", "-m", "llm_jax.evaluate", "--checkpoint=runs/decay"]
    assert " documents, " in run(evaluation) and " documents, " in run(evaluation, "--data=quotes.txt")
    rows = [*TRAININGS[-1][5:], f"--config.data.cache_dir={directory}", "--config.train.seq_len=32"]
    assert "%" not in run(["python", "-m", "llm_jax.show", "rows", f"--config={ROOT}/tests/tiny.py", *rows, "--rows=2"])

    text = run(GENERATION, "--max_new_tokens=8", "--json")
    assert "position.kind" in run(convert("runs/decay"), code=2)
    with contextlib.chdir(directory):
        model, _, tokenizer = checkpoints.load("runs/decay")
        assert positions.make(model.config).strength == 0.5
    assert tokenizer.decode(tokenizer.encode("ABC")) == "abc" and json.loads(text)["text"]

    path = directory / "my_decay.py"
    original = path.read_text()
    path.write_text(original.replace("log1p", "sqrt"))
    assert "my_decay.py has changed since the checkpoint was written" in run(GENERATION, code=2)
    assert "contains another run (model.position.kind was" in run(train, "--workdir=runs/decay", code=2)
    path.unlink()
    message = run(GENERATION, code=2)
    assert "no file or module 'my_decay.py'; run in the directory of the file" in message and message.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: words[3])
def test_recipe(words, run, directory):
    """Each example by itself trains, resumes, is converted and generates; other formats have no custom positions."""
    (workdir,) = (flag.removeprefix("--workdir=") for flag in words if flag.startswith("--workdir="))
    run(words, "--config.train.steps=2")
    run(words)
    assert len(losses(directory / workdir)) == 4
    generation = [flag for flag in GENERATION if not flag.startswith("--checkpoint=")]
    text = run(generation, f"--checkpoint={workdir}", "--max_new_tokens=4")
    if workdir != "runs/decay":
        run(convert(workdir))
        assert run(generation, "--checkpoint=converted", "--max_new_tokens=4") == text


def test_filter_applies(directory, make):
    """The custom filter with its option applies to sampling and greedy decoding; without it the chain is unchanged."""
    with contextlib.chdir(directory):
        *_, own = DecodingOptions(filter=("my_margin:Margin(margin=2.0)",)).sampler().filters
        greedy = DecodingOptions(temperature=0, filter=("my_margin.py:Margin",)).sampler()
        message = refused(lambda: DecodingOptions(beams=2, filter=("my_margin:Margin",)).check(100))
    assert own.margin == 2.0 and greedy.filters[-1].margin == 3.0 and greedy.greedy
    kept = own(jnp.array([[1.0, 3.5, 2.0, 1.4]]), None)
    assert [float(x) for x in kept[0]] == [-float("inf"), 3.5, 2.0, -float("inf")]
    assert "--filter would have no effect" in message


def refused(function) -> str:
    with pytest.raises(UserError) as error:
        function()
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG = """
import dataclasses, jax, jax.numpy as jnp, optax
from llm_jax import trees
from my_decay import Decay

class Rank(Decay):
    def bias(self, *args): return super().bias(*args)[0]
class Swapped(Decay):
    def bias(self, *args): return super().bias(*args).swapaxes(2, 3)
class Integers(Decay):
    def bias(self, *args): return super().bias(*args).astype(int)
class Raises(Decay):
    def bias(self, *args): raise KeyError("no such thing")
class Checked(Decay):
    def check(self): 1 / 0
class Rotated(Decay):
    def rotate(self, x, positions, length): return x[..., :1]
class Ends(Decay): bias = lambda self, *args: exit(3)
class Listed(Decay):
    def bias(self, *args): return [1]
@dataclasses.dataclass(frozen=True)
class Constructed(Decay):
    def __post_init__(self): raise ValueError("two\\nlines")
@trees.register
@dataclasses.dataclass(frozen=True)
class OneRow:
    margin: float = 1.0
    def __call__(self, logits, history): return logits[0]
def mean(logits, targets): return jnp.mean(logits)
def three(config): return 3
def fails(config): raise RuntimeError("no")
def complete(config): return optax.adam(config.lr)
def crashes(config): return optax.stateless(lambda updates, params: 1 / 0)
def flat(config): return optax.stateless(lambda updates, params: jax.tree.map(jnp.ravel, updates))
"""
CASES = {
    "my_decay.py:Decay(strenth=2)": "it has no option 'strenth'; its options are strength",
    "my_decay.py:Decay(2)": "expected options in parentheses as NAME=VALUE",
    "my_decay.py:Decay(strength=print())": "expected options in parentheses as NAME=VALUE",
    "my_decay.py:Missing": "my_decay.py defines no 'Missing'",
    "my_decay.py:Decay extra": "expected FILE:NAME or FILE:NAME(OPTION=VALUE, ...)",
    "my_decay.py:Decay(strength='x')": "option 'strength' is 'x'; expected float",
    "wrong:Rank": "bias returns float32 of shape (4, 3, 5); expected floats of shape (2, 4, 3, 5) = (batch, heads, ",
    "wrong:Swapped": "bias returns float32 of shape (2, 4, 5, 3); expected floats of shape (2, 4, 3, 5)",
    "wrong:Integers": "bias returns int32 of shape (2, 4, 3, 5); expected floats of shape",
    "wrong:Raises": "bias fails (KeyError: 'no such thing', wrong.py line",
    "wrong:Constructed": "it fails (ValueError: two lines, wrong.py line",
    "wrong:Checked": "it fails (ZeroDivisionError: division by zero, wrong.py line",
    "wrong:Rotated": "rotate returns float32 of shape (2, 3, 4, 1); expected floats of shape (2, 3, 4, 8) = (batch, ",
    "wrong:Ends": "bias fails (SystemExit: 3, wrong.py line",
    "ends:Decay": "ends fails (SystemExit: 3, ends.py line 1)",
    "wrong:Listed": "bias returns list; expected an array of shape (2, 4, 3, 5)",
    "syntax:Decay": "syntax fails (SyntaxError: invalid syntax (syntax.py, line 2))",
    "my_sign.py:sign": "expected a subclass of llm_jax.model.positions.Position",
    "numpy:pi": "'pi' is a float; expected a class or a function",
    "broken:Decay": "broken fails (ZeroDivisionError: division by zero, broken.py line 1)",
    "imports:Decay": "imports fails (ModuleNotFoundError: No module named 'no_such_module_anywhere', imports.py",
    "alib": "config key 'model.position.kind' is 'alib'; expected one of alibi",
}


@pytest.mark.parametrize("specification", CASES)
def test_refused(specification, directory, tiny, monkeypatch):
    (directory / "broken.py").write_text("1 / 0\n")
    (directory / "ends.py").write_text("raise SystemExit(3)\n")
    (directory / "syntax.py").write_text("\ndef f(:\n")
    (directory / "wrong.py").write_text(WRONG)
    (directory / "imports.py").write_text("import no_such_module_anywhere\n")
    config = configuration.replace(tiny, {"model.position.kind": specification}).model
    monkeypatch.syspath_prepend(directory)
    with contextlib.chdir(directory):
        assert CASES[specification] in refused(lambda: positions.make(config))


def test_other_tables(directory, monkeypatch, tiny):
    """Parts are also found on PYTHONPATH, and each kind of part is validated."""
    monkeypatch.syspath_prepend(directory)
    assert "expected a class with the members of Tokenizer; it lacks" in refused(
        lambda: tokenizers.get("my_decay:Decay")
    )
    folded = tokenizers.get("my_bytes:Folded(lower=False)")
    assert folded.kind.startswith("my_bytes:Folded(lower=False)#") and folded.train([], 0).encode("A") == [3 + 65]
    assert "it has no option 'upper'; its options are lower" in refused(
        lambda: tokenizers.get("my_bytes:Folded(upper=1)")
    )
    assert "expected a dataclass" in refused(DecodingOptions(filter=("my_sign:sign",)).sampler)
    (directory / "wrong.py").write_text(WRONG)
    filters = {
        "my_decay:Decay": "it is not a filter; expected a method __call__(self, logits, history) -> logits",
        "wrong:OneRow": "__call__ returns float32 of shape (7,); expected floats of shape (2, 7) = (batch, vocab_size)",
        "my_margin:Margin(margin='a')": "option 'margin' is 'a'; expected float",
    }
    for specification, message in filters.items():
        assert message in refused(DecodingOptions(filter=(specification,)).sampler)
    with_loss = configuration.replace(tiny, {"loss.kind": "wrong:mean"})
    message = "the loss returns float32 of shape (); expected floats of shape (2, 3) = (batch, tokens)"
    assert message in refused(lambda: losses_lib.check(with_loss))
    for name, message in {
        "three": "returns int; expected an optax transformation",
        "fails": "RuntimeError: no",
    }.items():
        assert message in refused(lambda name=name: optim._update_rule(f"wrong:{name}").make(tiny.optim))
    for name, message in {
        "complete": "the updates have the opposite sign of the gradients; leave out the learning rate and the sign",
        "crashes": "it fails (ZeroDivisionError: division by zero, wrong.py line",
        "flat": "the updates have other shapes than the gradients",
    }.items():
        config = dataclasses.replace(tiny.optim, kind=f"wrong:{name}", decay_rules=((".*", 1.0),))
        assert message in refused(lambda config=config: optim.make(config, 8, {"w": jnp.zeros((4, 3))}))
    assert (optim._update_rule("my_sign:sign").hidden, optim._update_rule("my_sign:sign").vectors) == (1, 0)


def test_loss_is_used(directory, monkeypatch, tiny):
    """The training loss is the formula of the example with its option, summed over the counted targets."""
    monkeypatch.setattr(losses_lib, "features", lambda model, params, batch: batch["x"])
    monkeypatch.setattr(losses_lib, "head", lambda model, params, x: x)
    logits, targets = jnp.log(jnp.array([[[0.5, 0.5], [0.2, 0.8]]])), jnp.array([[0, 1]])
    batch = {"x": logits, "inputs": targets, "targets": targets, "mask": jnp.array([[1, 0]])}
    with contextlib.chdir(directory):
        config = dataclasses.replace(tiny.loss, kind="my_focal.py:focal(gamma=3.0)")
        total, count = losses_lib.make(config, None, 0)(None, None, batch, None, None)
        smoothed = configuration.replace(tiny, {"loss.kind": config.kind, "loss.z_loss": 0.1})
        assert "loss.z_loss=0.1 has no effect" in refused(lambda: losses_lib.check(smoothed))
    assert float(total) == pytest.approx(0.5**3 * math.log(2)) and count == 1


def test_a_checkpoint_does_not_choose_code(directory, tmp_path, monkeypatch):
    """A checkpoint imports a file only if the user has named it with this content before, or sets LLM_JAX_ALLOW."""
    (directory / "own.py").write_text("import pathlib; pathlib.Path('ran').touch()\ndef own(): pass\n")
    sha256 = extensions._sha256((directory / "own.py").read_bytes())
    with contextlib.chdir(directory):
        for name in ("own.py", "own", "./own.py"):
            message = refused(lambda name=name: extensions.load("loss.kind", f"{name}:own#{sha256}"))
            assert "the checkpoint needs the code in" in message and not (directory / "ran").exists()
        assert "must record the hash" in refused(lambda: configuration.upgrade({"loss": {"kind": "own.py:own"}}))
        assert "must record the hash" in refused(
            lambda: configuration.upgrade({"model": {"position": {"kind": "own:own"}}})
        )
        monkeypatch.setenv("LLM_JAX_ALLOW", "own.py")
        assert extensions.load("loss.kind", f"own:own#{sha256}").target.__name__ == "own"
        monkeypatch.delenv("LLM_JAX_ALLOW")
        assert extensions.load("loss.kind", f"own:own#{sha256}").target.__name__ == "own"
        shutil.copytree(directory / ".", directory / "elsewhere", ignore=shutil.ignore_patterns("elsewhere"))
        assert "needs the code" in refused(lambda: extensions.load("loss.kind", f"elsewhere/own.py:own#{sha256}"))
        assert "needs the code" in refused(lambda: extensions.load("loss.kind", f"elsewhere.own:own#{sha256}"))


def test_notebook(monkeypatch):
    """A class that `__main__` defines is recorded with the hash of its own source."""
    import __main__

    monkeypatch.setattr(__main__, "Nope", NoPosition, raising=False)
    extension = extensions.load("model.position.kind", "__main__:Nope")
    monkeypatch.setattr(
        __main__, "Typed", type("Typed", (positions.Position,), {"__module__": "nowhere"}), raising=False
    )
    assert "the source of 'Typed' is not available" in refused(lambda: extensions.load("--filter", "__main__:Typed"))
    assert extension.target is NoPosition and re.fullmatch(r"__main__:Nope#[0-9a-f]{12}", extension.specification)


CELL = """
import dataclasses
from llm_jax.model.positions import Position

@dataclasses.dataclass(frozen=True)
class Own(Position):
    def declare(self):
        return {}

"""


def test_a_class_in_a_cell_of_a_notebook_is_recorded_with_its_own_lines(tiny, monkeypatch):
    """The kernel's `__main__` has no file; the sources of cells are in linecache, by the file name of their code."""
    notebook = types.ModuleType("__main__")

    def run(cell, name):
        linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
        exec(compile(cell, name, "exec"), vars(notebook))
        return extensions.load("model.position.kind", "__main__:Own").specification

    monkeypatch.setitem(sys.modules, "__main__", notebook)
    first = run(CELL, "<cell 1>")
    position = dataclasses.replace(tiny.model.position, kind="__main__:Own")
    model = Transformer(dataclasses.replace(tiny.model, position=position))
    weights = trees.flatten(checkpoints.abstract_params(model)).keys()
    assert run(CELL + "x = 1\n", "<cell 2>") == first  # what else is in the cell does not count
    assert run(CELL.replace("{}", "{'a': (1, 2)}"), "<cell 3>") != first
    assert (
        len(trees.flatten(checkpoints.abstract_params(model)).keys() - weights) == 1
    )  # of the class that is defined now
    assert run(CELL.replace("frozen=True", "frozen=True, eq=False"), "<cell 4>") != first


AXES_OF_SIZE_1 = """
import dataclasses
import jax.numpy as jnp
from llm_jax.model.positions import Position

@dataclasses.dataclass(frozen=True)
class Narrow(Position):
    full: bool = False

    def declare(self):
        return {"slope": (1,)}

    def declare_layer(self):
        return {"key": (1,)}

    def _size(self, bias, q_positions, k_positions):
        shape = (len(bias), self.config.num_heads, q_positions.shape[1], k_positions.shape[1])
        return jnp.broadcast_to(bias, shape) if self.full else bias

    def bias(self, q_positions, k_positions, table):
        distance = jnp.abs(q_positions[:, None, :, None] - k_positions[:, None, None, :])
        return self._size(table["slope"] * distance.astype(jnp.float32), q_positions, k_positions)

    def keys(self, q, q_positions, k_positions, table):
        bias = table["key"] * k_positions[:, None, None, :].astype(jnp.float32)
        return self._size(bias, q_positions, k_positions)
"""


def test_a_bias_may_have_axes_of_size_1(directory, tiny):
    """The loss, its gradients and the entropy of attention are those of the bias with all axes in full."""
    (directory / "narrow.py").write_text(AXES_OF_SIZE_1)
    tokens = jnp.arange(16).reshape(2, 8)

    def model(kind):
        position = dataclasses.replace(tiny.model.position, kind=kind)
        return Transformer(dataclasses.replace(tiny.model, num_layers=1, position=position))

    def gradients(model, params):
        def loss(params):
            logits, stats = model.apply({"params": params}, tokens, mutable=[ACTIVATION_STATS])
            return jnp.sum(jnp.sin(logits)), stats

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    with contextlib.chdir(directory):
        params = jax.jit(model("narrow.py:Narrow").init)(jax.random.key(0), tokens)["params"]
        narrow, full = (gradients(model(f"narrow.py:Narrow(full={full})"), params) for full in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), narrow, full)
    assert trees.flatten(narrow[0])["embed/position_slope"].item()


class NoPosition(positions.Position):
    """A scheme without positions."""
