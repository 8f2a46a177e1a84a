"""Trains a language model: `python -m llm_jax.train --config=configs/default.py --workdir=runs/x`.

Started again with the same command it goes on where it was, bit for bit.
"""

import dataclasses
import pathlib
import statistics
import time

from absl import flags

from llm_jax import cli
from llm_jax import config as config_lib
from llm_jax.errors import UserError

cli.define_config()
flags.DEFINE_string("workdir", None, "where the run is kept (config, metrics, checkpoints)", required=True)
flags.DEFINE_integer("devices", 0, "simulate this many CPU devices")
flags.DEFINE_boolean("dry_run", False, "print the parameters and their shardings, and stop")

# What may change when a run goes on: whole keys, and sections by their dot. Any other difference is another run.
_FREE = ("train.steps", "model.attention", "eval.", "checkpoint.", "mesh.", "data.cache_dir")


def main() -> None:
    cli.keep_memory()
    cli.use_devices(flags.FLAGS.devices)
    import jax
    import jax.numpy as jnp
    import optax

    from llm_jax import checkpoint, tokenizers, trees
    from llm_jax.data.corpus import Source
    from llm_jax.data.rows import Rows, Shuffled, batches
    from llm_jax.decoding import loop, samplers
    from llm_jax.model import product, transformer
    from llm_jax.model.stages import layout
    from llm_jax.parallel import mesh as mesh_lib
    from llm_jax.training import evaluation, losses, optim, report
    from llm_jax.training import step as step_lib

    config = cli.load_config()
    workdir = pathlib.Path(flags.FLAGS.workdir).expanduser()
    c = config.train
    began = time.perf_counter()

    # ---------------------------------------------------------------- where the run starts from
    # 1. the last checkpoint of the workdir; 2. the run named by init_from; 3. random weights.
    _refuse_another_run(workdir, config)
    resumed = checkpoint.find(workdir) if checkpoint.steps(workdir) else None
    origin = resumed or (checkpoint.find(config.init_from) if config.init_from else None)
    record = checkpoint.verify(origin) if origin else None
    start = record["step"] if resumed and record else 0
    if start > c.steps:
        raise UserError(f"{workdir} is at step {start}, past train.steps={c.steps}; raise it or give another --workdir")

    # ---------------------------------------------------------------- data
    source = Source(config.data)
    tokenizer = tokenizers.load(origin / "tokenizer") if origin else source.tokenizer(config.tokenizer)
    if tokenizer.kind != config.tokenizer.kind:
        raise UserError(
            f"{origin}: trained on '{tokenizer.kind}' tokens; config key 'tokenizer.kind' is '{config.tokenizer.kind}'"
        )
    if resumed and record and record["corpus"] != source.sha256:
        raise UserError(
            f"data.source={config.data.source}: its text has changed since {workdir} was started "
            f"(sha256 {record['corpus'][:12]}, now {source.sha256[:12]}); bring it back or give another --workdir"
        )
    corpus = source.corpus(tokenizer)
    train_rows, held_rows = Shuffled(Rows(corpus.train, c.seq_len), c.seed), Rows(corpus.validation, c.seq_len)
    print(
        f"{config.data.source}: {source.num_bytes:,} bytes (sha256 {corpus.sha256[:12]}), {len(corpus.train.tokens):,} "
        f"training tokens, {len(held_rows.split.tokens):,} held out; tokenizer {tokenizer.kind}, "
        f"{tokenizer.vocab_size} ids ({tokenizers.digest(tokenizer)[:12]})"
    )

    # ---------------------------------------------------------------- model, optimizer, shardings
    vocab = config.model.vocab_size or tokenizer.vocab_size
    if vocab < tokenizer.vocab_size:
        raise UserError(f"config key 'model.vocab_size' is {vocab}; the tokenizer has {tokenizer.vocab_size} ids")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab))
    mesh = mesh_lib.make(config.mesh)
    batch_sharding = mesh_lib.batch_sharding(mesh, c.batch_size)
    losses.check_chunk(c.loss_chunk, c.seq_len)
    step_lib.check_accumulation(c.batch_size, c.grad_accumulation, mesh.shape["data"] * mesh.shape["fsdp"])
    model = transformer.Transformer(config.model)
    transformer.check_length(config.model, c.seq_len)
    attention = product.describe(
        config.model, jax.default_backend(), c.batch_size // c.grad_accumulation, c.seq_len, dict(mesh.shape)
    )
    abstract = checkpoint.abstract_params(model)
    optimizer = optim.make(config.optim, c.steps, abstract)
    copies = mesh_lib.replicated(mesh)
    param_shardings = mesh_lib.shardings(abstract, config.mesh.rules, mesh)
    abstract_state = jax.eval_shape(lambda p: step_lib.init(optimizer, p), abstract)
    state_shardings = step_lib.State(
        copies,
        param_shardings,
        optax.tree.map_params(
            optimizer, lambda _, s: s, abstract_state.optimizer, param_shardings, transform_non_params=lambda _: copies
        ),
    )
    abstract_state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract_state, state_shardings
    )
    print(report.parameter_table(abstract_state.params))
    print(
        f"mesh {dict(mesh.shape)} of {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        f"attention {attention}, jax {jax.__version__}"
    )
    if flags.FLAGS.dry_run:
        return
    checkpoint.make_directory(workdir)

    # ---------------------------------------------------------------- state
    if resumed and record:
        params, optimizer_state = checkpoint.restore_state(
            resumed, record, abstract_state.params, abstract_state.optimizer
        )
        state = step_lib.State(jax.device_put(jnp.int32(start), copies), params, optimizer_state)
        print(f"going on from {origin}")
    elif origin and record:
        params = checkpoint.restore(
            origin, record, config.model, lambda tree: mesh_lib.shardings(tree, config.mesh.rules, mesh)
        )
        begin = jax.jit(
            lambda p: step_lib.init(optimizer, trees.restage(p, layout(config.model))), out_shardings=state_shardings
        )
        state = begin(params)
        print(f"weights from {origin}")
        for key, before in _differences(checkpoint.read_config(origin).model, config.model):
            print(f"note: {key} was {before} there")
    else:
        tokens = jnp.zeros((1, 1), jnp.int32)
        fresh = jax.jit(
            lambda key: step_lib.init(optimizer, model.init(key, tokens)["params"]), out_shardings=state_shardings
        )
        state = fresh(jax.random.key(c.seed))
    checkpoint.write_json(workdir / "config.json", config_lib.as_dict(config))

    # ---------------------------------------------------------------- compiled functions
    rate = optim.schedule(config.optim, c.steps)

    def loss(trained, frozen, batch, step, key):  # all parameters are trained, and nothing is drawn
        return losses.language_model(model, trained, batch, c.loss_chunk)

    train_step = jax.jit(
        mesh_lib.within(mesh, step_lib.make(loss, optimizer, rate, c.seed, c.grad_accumulation)),
        donate_argnums=0,
        in_shardings=(state_shardings, None, batch_sharding),
        out_shardings=(state_shardings, copies),
    )
    eval_loss = jax.jit(
        mesh_lib.within(mesh, lambda params, batch: losses.language_model(model, params, batch, c.loss_chunk)),
        in_shardings=(param_shardings, batch_sharding),
        out_shardings=copies,
    )
    decoder = model.clone(config=dataclasses.replace(config.model, scan_layers=False))
    unstack = jax.jit(trees.unstack, out_shardings=copies)

    def evaluate(limit: int) -> dict[str, float]:
        found = evaluation.evaluate(eval_loss, state.params, held_rows, c.batch_size, batch_sharding, limit)
        return {f"validation_{name}": value for name, value in found.items()}

    def sample(title: str) -> None:
        prompts = [tokenizers.prompt(tokenizer, text) for text in config.eval.prompts]
        made = loop.generate(
            decoder,
            unstack(state.params),
            prompts,
            samplers.make(0.8, top_p=0.95),
            max_new_tokens=config.eval.max_new_tokens,
            eos=tokenizer.eos,
            vocab_size=tokenizer.vocab_size,
        )
        for prompt, one in zip(prompts, made, strict=True):
            print(f"----- {title}\n{tokenizer.decode(prompt + one.ids)}")

    if config.eval.prompts and not start:
        sample("before training")

    # ---------------------------------------------------------------- the loop
    peak = report.matmul_peak(config.model.precision.compute)
    writer = checkpoint.Writer(workdir, config, tokenizer, corpus.sha256)
    progress = report.Progress(workdir, start, c.steps, transformer.flops_per_token(config.model, c.seq_len), peak)

    def due(every: int, done: int) -> bool:
        return done == c.steps or bool(every and done % every == 0)

    held: dict[str, float] = {}
    for index, batch in enumerate(batches(train_rows, start, c.steps, c.batch_size, batch_sharding), start):
        state, metrics = train_step(state, None, batch)
        done = index + 1
        progress.step(done, metrics)
        held = {}
        if due(config.eval.every, done):
            progress.collect()
            held = evaluate(0 if done == c.steps else config.eval.rows)
            progress.flush(**held)
            progress.write(
                f"step {done}: held-out loss {held['validation_loss']:.4f}, "
                f"{held['validation_bits_per_byte']:.3f} bits per byte"
            )
        if due(config.checkpoint.every, done):
            progress.flush()
            writer.save(done, state.params, state.optimizer, held.get("validation_loss"))
        if held:
            progress.pause()
    progress.close()
    writer.close()

    # ---------------------------------------------------------------- what came of it
    if config.eval.prompts:
        sample("after training")
    final = held or evaluate(0)
    packed = source.compressed_bits_per_byte()
    summary = {
        **final,
        "compressed_bits_per_byte": packed,
        "steps": c.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        "tokens_per_second": statistics.median(progress.rates) if progress.rates else None,
        "corpus": {"source": config.data.source, "sha256": corpus.sha256, "bytes": source.num_bytes},
        "seconds": time.perf_counter() - began,
        "jax": jax.__version__,
    }
    checkpoint.write_json(workdir / "summary.json", summary)
    others = ", ".join(f"{name} {value:.3f}" for name, value in packed.items())
    print(
        f"held-out: loss {final['validation_loss']:.4f}, perplexity {final['validation_perplexity']:.2f}, "
        f"{final['validation_bits_per_byte']:.3f} bits per byte ({others})\n"
        f"checkpoint: {workdir / 'checkpoints' / str(c.steps)}\n"
        f'next: python -m llm_jax.generate --checkpoint={workdir} --prompt="def "'
    )


def _differences(before: config_lib.ModelConfig, now: config_lib.ModelConfig) -> list[tuple[str, str]]:
    """What about a model has changed, beside how it is laid out: (key, what it was)."""
    free = ("model.scan_layers", "model.remat", "model.vocab_size", "model.attention")
    old, new = config_lib.flat(before, "model."), config_lib.flat(now, "model.")
    return [(key, repr(old[key])) for key in new if old[key] != new[key] and key not in free]


def _is_free(key: str) -> bool:
    return key in _FREE or f"{key.split('.')[0]}." in _FREE


def _refuse_another_run(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Raises UserError where the workdir holds a run of a configuration that differs in what matters."""
    from llm_jax import checkpoint

    if not (workdir / "config.json").exists():
        return
    before, now = (config_lib.flat(c) for c in (checkpoint.read_config(workdir), config))
    changed = [k for k in now if now[k] != before[k] and not _is_free(k)]
    if not now["model.vocab_size"]:  # 0 means the tokenizer's, which the file names
        changed = [k for k in changed if k != "model.vocab_size"]
    if changed:
        said = "; ".join(f"{k} was {before[k]!r}, now {now[k]!r}" for k in changed[:4])
        raise UserError(f"{workdir} holds another run ({said}); give another --workdir")


if __name__ == "__main__":
    cli.run(main)
