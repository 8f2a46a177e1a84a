"""A run of our own as a Hugging Face directory, and back."""

import jax
import jax.numpy as jnp
import numpy as np

import llm_jax


def test_a_run_becomes_a_hugging_face_directory_that_every_command_takes(trained, command, text_file, tmp_path):
    done = command("convert", f"--input={trained}", f"--output={tmp_path / 'hf'}", "--to=hf")
    assert "qwen3 (Qwen3ForCausalLM)" in done.stdout and "transformers reads no byte tokenizer" in done.stdout
    before, after = llm_jax.load(trained), llm_jax.load(tmp_path / "hf")
    ids = jnp.asarray([before.tokenizer.encode("the model")])
    assert after.tokenizer.encode("the model") == ids[0].tolist()
    run = lambda loaded: jax.jit(loaded.model.apply)({"params": loaded.params}, ids)  # noqa: E731
    np.testing.assert_allclose(run(after), run(before), atol=1e-5)
    flags = (f"--checkpoint={tmp_path / 'hf'}", f"--data={text_file}", "--seq_len=32")
    assert "bits per byte" in command("evaluate", *flags).stdout
    assert command("generate", flags[0], "--prompt=the", "--max_new_tokens=4", "--temperature=0").stdout


def test_what_cannot_be_converted_ends_in_one_line_and_writes_nothing(trained, command, tmp_path):
    def said(*flags, **changes):
        given = {"input": trained, "output": tmp_path / "out", "to": "hf"} | changes
        done = command("convert", *(f"--{k}={v}" for k, v in given.items()), *flags, code=2)
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
        return done.stderr

    (tmp_path / "there").write_text("keep")
    assert "there exists; give another" in said(output=tmp_path / "there")
    assert "no such directory" in said(input=tmp_path / "nothing")
    assert "there: not a GGUF file" in said(input=tmp_path / "there")
    assert "gpt2 cannot hold model." in said("--family=gpt2")
    assert "tokenizer.kind=hub" in said(to="gguf")
    assert "--format=Q5_K cannot be written" in said("--format=Q5_K", to="gguf")
    assert (tmp_path / "there").read_text() == "keep"
