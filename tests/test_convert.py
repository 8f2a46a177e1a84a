"""Converts a run to a Hugging Face directory and back."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import llm_jax
from llm_jax import convert, tokenizers
from llm_jax.checkpoints import huggingface
from llm_jax.errors import UserError
from llm_jax.tokenizers import export
from tests.checkpoints.gguf_cases import small
from tests.conftest import ROOT
from tests.tokenizers import forms


def test_a_run_becomes_a_hugging_face_directory_that_every_command_takes(trained, command, text_file, tmp_path):
    done = command("convert", f"--input={trained}", f"--output={tmp_path / 'hf'}", "--to=hf")
    assert "qwen3 (Qwen3ForCausalLM)" in done.stdout and "writing " in done.stdout
    assert {p.name for p in (tmp_path / "hf").glob("tokenizer*")} == {
        "tokenizer",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]
    before, after = llm_jax.load(trained), llm_jax.load(tmp_path / "hf")
    ids = jnp.asarray([before.tokenizer.encode("the model")])
    assert after.tokenizer.encode("the model") == ids[0].tolist()
    run = lambda loaded: jax.jit(loaded.model.apply)({"params": loaded.params}, ids)  # noqa: E731
    np.testing.assert_allclose(run(after), run(before), atol=1e-5)
    flags = (f"--checkpoint={tmp_path / 'hf'}", f"--data={text_file}", "--seq_len=32")
    cut, whole = command("evaluate", *flags), command("evaluate", *flags, "--whole_file")
    assert "bits per byte" in cut.stdout and "is split at line breaks into several documents; their first" in cut.stderr
    assert "bytes in 1 document," in whole.stdout and "note" not in whole.stderr
    (tmp_path / "short.txt").write_text("the model\n")
    short = command("evaluate", flags[0], f"--data={tmp_path / 'short.txt'}", "--seq_len=32")
    assert "10 bytes in 1 document," in short.stdout and "note" not in short.stderr
    (tmp_path / "hf" / "generation_config.json").write_text('{"do_sample": true, "top_k": 3, "max_length": 20}')
    greedy = command("generate", flags[0], "--prompt=the", "--max_new_tokens=4", "--temperature=0")
    assert greedy.stdout and "generation_config" not in greedy.stderr
    recommended = command("generate", flags[0], "--prompt=the", "--max_new_tokens=4", "--seed=3")
    assert recommended.stderr.startswith("note: using --top_k=3 from generation_config.json; any flag for sampling")
    assert (
        recommended.stdout
        == command("generate", flags[0], "--prompt=the", "--max_new_tokens=4", "--seed=3", "--top_k=3").stdout
    )
    command("convert", f"--input={tmp_path / 'hf'}", f"--output={tmp_path / 'again'}", "--to=hf")
    carried = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert carried == {"do_sample": True, "top_k": 3, "max_length": 20, **ends}


def test_what_cannot_be_converted_ends_in_one_line_and_writes_nothing(trained, command, tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("tokenizer.json cannot express this tokenizer")

    def said(*flags, **changes):
        given = {"input": trained, "output": tmp_path / "out", "to": "hf"} | changes
        done = command("convert", *(f"--{k}={v}" for k, v in given.items()), *flags, code=2)
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
        return done.stderr

    (tmp_path / "there").write_text("keep")
    assert "there already exists; choose another path" in said(output=tmp_path / "there")
    assert "no such directory" in said(input=tmp_path / "nothing")
    assert "none.gguf: no such file or directory (expected a GGUF file)" in said(input=tmp_path / "none.gguf")
    assert "there: not a GGUF file" in said(input=tmp_path / "there")
    assert "gpt2 cannot hold model." in said("--family=gpt2")
    monkeypatch.setattr(export, "transformers_files", refuse)
    assert "tokenizer.json cannot express" in said()
    monkeypatch.undo()
    assert "no vocabulary of tokenizer.kind=byte" in said(to="gguf")
    assert "--format=Q5_K; expected one of F32, F16" in said("--format=Q5_K", to="gguf")
    assert (tmp_path / "there").read_text() == "keep"


def test_all_ids_that_end_a_text_are_written(command, tmp_path):
    """By config.json, generation_config.json and the name of a token: transformers ends generation at each of them."""
    original = forms.form("bytelevel")
    files = original.files() | {"generation_config.json": json.dumps({"eos_token_id": [original.eos, 7]}).encode()}
    config, params = small("llama", original.vocab_size)
    huggingface.save(tmp_path / "in", "llama", config, params, files, {"eos_token_id": 9})
    command("convert", f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--to=hf")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [original.eos, 7, 9]
    assert tokenizers.eos_ids(llm_jax.open(tmp_path / "out").tokenizer) == [original.eos, 7, 9]


def test_copies_keep_the_recommended_sampling(command, tmp_path):
    """Quantized, then in a GGUF file, then as a Hugging Face directory. The tokenizer has fewer ids than the model."""
    original = forms.form("bytelevel")
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 400, "top_p": 0.9}
    files = original.files() | {"generation_config.json": json.dumps(sampling).encode()}
    config, params = small("llama", original.vocab_size + 150)
    huggingface.save(tmp_path / "in", "llama", config, params, files)
    run = tmp_path / "run"
    done = command("quantize", f"--checkpoint={tmp_path / 'in'}", f"--output={run}", "--scheme=int8")
    assert done.stdout.endswith(f"next: python -m llm_jax.evaluate --checkpoint={run} --data=FILE\n")
    refused = command("evaluate", f"--checkpoint={run}", code=2).stderr
    assert refused == f"error: {run} records no training data; set --data=FILE\n"
    assert llm_jax.open(run).run_config.train.seq_len == 512
    assert llm_jax.open(tmp_path / "run").generation_config == sampling
    done = command("generate", f"--checkpoint={tmp_path / 'run'}", "--prompt=the", "--max_new_tokens=1")
    note = f"--temperature=0.7 --top_k={original.vocab_size} --top_p=0.9 from generation_config.json; any flag"
    assert note in done.stderr
    command("convert", f"--input={tmp_path / 'run'}", f"--output={tmp_path / 'a.gguf'}", "--to=gguf")
    command("convert", f"--input={tmp_path / 'a.gguf'}", f"--output={tmp_path / 'hf'}", "--to=hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in sampling} == sampling
    command("quantize", f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'again'}", code=2)


INTERRUPTED = """
import os, signal, time
from llm_jax import cli

def _xla_gc_callback():
    os.kill(os.getpid(), signal.SIGINT)
    return time.monotonic()

def main():
    try:
        _xla_gc_callback()
    except KeyboardInterrupt:
        print("lost")  # as it is in the garbage collector
    time.sleep(60)

cli.run_script(main, "told")
"""


def test_an_interrupt_in_the_garbage_collectors_callback_is_not_lost():
    begin = time.monotonic()
    run = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(run, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ntold\n") and time.monotonic() - begin < 45


def test_an_interrupted_conversion_leaves_nothing(trained, tmp_path):
    given = [f"--input={trained}", f"--output={tmp_path / 'out' / 'hf'}", "--to=hf"]
    child = subprocess.Popen(
        [sys.executable, "-m", "llm_jax.convert", *given],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert "parameters" in child.stdout.readline()  # it has been read, and is about to be written
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    if child.returncode:  # else it was written before the signal came
        assert child.returncode == 130 and err.endswith("interrupted; --output is not written\n")
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    else:
        assert "wrote" in out


def test_the_note_on_adapters_names_no_format_of_peft_for_a_custom_base():
    own = convert._base_note("my_ternary.py:Ternary(threshold=0.5)#0123456789ab")
    assert "a base in my_ternary.py:Ternary(threshold=0.5);" in own and "#" not in own and "BitsAndBytes" not in own
    assert "a base in nf4;" in convert._base_note("nf4") and "BitsAndBytesConfig" in convert._base_note("nf4")
