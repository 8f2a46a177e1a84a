"""Commands with a number format of the user's own: the recipe of CONTRIBUTING.md as it stands there."""

import contextlib
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import configuration, trees, weights
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.weights import Encoded
from tests.test_extensions import COMMANDS, convert, losses
from tests.test_extensions import directory as directory
from tests.test_extensions import run as run

(QUANTIZATION,) = (words for words in COMMANDS if "llm_jax.quantize" in words)
TERNARY = [word for word in QUANTIZATION if not word.startswith(("--checkpoint", "--output"))]
SCHEME = TERNARY[-1].removeprefix("--scheme=")
EVALUATE = ["python", "-m", "llm_jax.evaluate", "--json"]


def test_number_format_is_checked_before_data_is_read(run, directory, trained):
    path = directory / "my_ternary.py"
    path.write_text(path.read_text().replace("return parts", "return parts.T @ parts"))
    train = ["python", "-m", "llm_jax.train", "--workdir=wrong", "--config.data.source=no-such-file"]
    message = run(train, f"--config.quant.qat.scheme={SCHEME}", code=2)
    assert f"scheme={SCHEME}: decode fails (AttributeError" in message
    adapters = [f"--config.init_from={trained}", "--config.lora.rank=2", "--config.model.qk_norm=True"]
    message = run(train, *adapters, f"--config.quant.scheme={SCHEME}", code=2)
    assert f"scheme={SCHEME}: decode fails (AttributeError" in message


@pytest.mark.slow
def test_number_format(run, directory, trained):
    """A run is quantized, evaluated and converted; a changed and a missing file are refused."""
    quantize = [*TERNARY, f"--checkpoint={trained}"]
    (directory / "my formats").mkdir()
    shutil.copy(directory / "my_ternary.py", directory / "my formats" / "more.py")
    rule = "--rule=layers/(0|1)/mlp/.*=my formats/more.py:Ternary(threshold=0.1)"
    table = run(quantize, rule, "--output=ternary")
    assert "my_ternary.py:Ternary(threshold=0.5)#" in table and "my formats/more.py:Ternary(threshold=0.1)#" in table
    assert json.loads(run(EVALUATE, "--checkpoint=ternary"))["bits_per_byte"] > 0
    assert "--method=gptq has no effect on --scheme=my_ternary" in run(quantize, "--method=gptq", "--output=x", code=2)
    run(convert("ternary"))
    with contextlib.chdir(directory):
        encoded, decoded = (trees.flatten(llm_jax.load(name).params) for name in ("ternary", "converted"))
    assert encoded.keys() == decoded.keys() and isinstance(encoded["layers/1/mlp/up"], Encoded)
    for path, weight in encoded.items():
        np.testing.assert_array_equal(weights.dense(weight), decoded[path])

    path = directory / "my_ternary.py"
    original = path.read_text()
    path.write_text(original.replace("> self", ">= self"))
    assert "my_ternary.py has changed since the checkpoint was written" in run(EVALUATE, "--checkpoint=ternary", code=2)
    path.unlink()
    message = run(EVALUATE, "--checkpoint=ternary", code=2)
    assert "no file or module 'my_ternary.py'; run in the directory of the file" in message and message.count("\n") == 1


@pytest.mark.slow
def test_number_format_in_training(run, directory, trained):
    """Weights train with the rounding of the format, and adapters over a base in it, with the option of the recipe."""
    train = ["python", "-m", "llm_jax.train"]
    qat = [*train, "--workdir=qat", f"--config.quant.qat.scheme={SCHEME}"]
    run(qat, "--config.train.steps=2")
    run(qat)
    assert len(losses(directory / "qat")) == 4
    assert configuration.load(directory / "qat").quant.qat.scheme.startswith(f"{SCHEME}#")
    run(TERNARY[:3], "--checkpoint=qat", "--output=trained-ternary")
    assert "bits_per_byte" in run(EVALUATE, "--checkpoint=trained-ternary")
    rules = f"--config.quant.rules=(('layers/.*/mlp/.*', '{SCHEME}'),)"
    adapters = [*train, f"--config.init_from={trained}", "--config.lora.rank=2", rules]
    adapters += ["--config.quant.scheme=int8", "--config.model.qk_norm=True", "--config.optim.lr=0.1"]
    run(adapters, "--workdir=uninterrupted")
    run(adapters, "--workdir=adapters", "--config.train.steps=2")
    run(adapters, "--workdir=adapters")
    assert losses(directory / "adapters") == losses(directory / "uninterrupted")
    (rule,) = configuration.load(directory / "adapters").quant.rules
    assert re.fullmatch(re.escape(SCHEME) + "#[0-9a-f]{12}", rule[1])
    assert "bits_per_byte" in run(EVALUATE, "--checkpoint=adapters")
    generate = ["python", "-m", "llm_jax.generate", "--checkpoint=adapters", "--prompt=the model", "--max_new_tokens=4"]
    with contextlib.chdir(directory):
        model, params, tokenizer = llm_jax.load("adapters")
        options = DecodingOptions(temperature=0, max_new_tokens=4)
        ((continued,),) = complete(model, params, tokenizer, ["the model"], options)
    weight = trees.flatten(params)["layers/0/mlp/up"]
    assert isinstance(weight.base, Encoded) and weight.base.scheme == rule[1] and jnp.any(weight.b != 0)
    assert json.loads(run(generate, "--temperature=0", "--json"))["text"] == continued.text
    path = directory / "my_ternary.py"
    path.write_text(path.read_text().replace("> self", ">= self"))
    for name in ("qat", "adapters"):
        message = run(EVALUATE, f"--checkpoint={name}", code=2)
        assert "my_ternary.py has changed since the checkpoint was written" in message and message.count("\n") == 1
