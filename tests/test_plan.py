"""Planning from the command line."""

from llm_jax.training import memory

FIGURES = memory.Memory(2**20, 2**20, 2**20, 2**20)

TINY = (
    "--config.model.vocab_size=64",
    "--config.model.width=64",
    "--config.model.mlp_dim=128",
    "--config.model.num_layers=2",
    "--config.train.seq_len=32",
    "--config.train.batch_size=4",
)


def test_the_configured_step_is_the_first_row_of_the_table(command):
    said = command("plan", "--memory", *TINY, "--config.lora.rank=4", "--config.lora.variant=fa").stdout.splitlines()
    rows = {(line[:12].strip(), line[12:20].strip()): line[20:] for line in said[2:]}
    assert len(rows) == 10 and next(iter(rows)) == ("as given", "none")
    assert rows["as given", "none"] == rows["fa", "none"] != rows["lora", "none"]


def test_without_memory_the_shapes_are_counted_and_nothing_is_compiled(command, monkeypatch):
    monkeypatch.setattr(memory, "of_variant", None)
    lines = command("plan", *TINY).stdout.splitlines()
    weights = 64 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64  # embeddings, layers, last norm
    assert lines[0] == f"{weights:,} parameters, {weights:,} trainable"
    flops = 6.0 * (2 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 64) + 12 * 2 * 64 * 32
    assert lines[1].startswith(f"{flops * 128:.3g} FLOPs per step of 4 x 32 = 128 tokens, ")
    mib = 4 * weights / 2**20
    assert lines[2].startswith(
        f"{4 * mib:,.1f} MiB on one device: weights {mib:,.1f}, optimizer {2 * mib:,.1f}, gradients "
    )
    adapters = command("plan", *TINY, "--config.lora.rank=4").stdout.splitlines()
    assert adapters[0].startswith(f"{weights:,} parameters, ") and adapters[2] != lines[2]


def test_an_invalid_configuration_is_rejected_before_the_table(command):
    done = command("plan", "--memory", *TINY, "--config.lora.rank=99", code=2)
    assert "lora.rank is 99" in done.stderr and not done.stdout


def test_a_run_without_a_flag_is_suggested_as_the_configuration(command, trained):
    error = command("plan", str(trained), code=2).stderr
    assert f"unexpected argument '{trained}'; did you mean --config={trained}?" in error


def test_the_default_vocabulary_is_that_of_the_tokenizer(command, monkeypatch):
    sizes = []
    monkeypatch.setattr(memory, "of_variant", lambda config, kind: sizes.append(config.model.vocab_size) or FIGURES)
    said = command("plan", "--memory", "--config.tokenizer.vocab_size=64", *TINY[1:]).stdout.splitlines()
    assert said[0].startswith("model.vocab_size=64: the vocabulary size in the tokenizer")
    explicit = command("plan", "--memory", *TINY).stdout.splitlines()
    assert said[1:] == explicit and set(sizes) == {64}
    assert command("plan", "--memory").stdout.startswith("model.vocab_size=")


def test_a_row_that_this_geometry_cannot_have_says_why(command, monkeypatch):
    compiled = memory.of_variant
    calls = []

    def figures(config, kind):
        calls.append(kind)
        return compiled(config, kind) if kind == "qlora" else FIGURES

    monkeypatch.setattr(memory, "of_variant", figures)
    said = command("plan", "--memory", *TINY, "--config.model.mlp_dim=144").stdout.splitlines()
    assert "the group 64 does not divide its 144 inputs" in said[-1] and len(said) == 2 + len(calls)
