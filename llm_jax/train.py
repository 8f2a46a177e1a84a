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

    from llm_jax import checkpoint, lora, pretrained, tokenizers, trees
    from llm_jax.data.corpus import Source
    from llm_jax.data.rows import Finite, Rows, Shuffled, batches
    from llm_jax.decoding import loop, samplers
    from llm_jax.model import product, transformer
    from llm_jax.model.stages import layout
    from llm_jax.parallel import mesh as mesh_lib
    from llm_jax.prompting import sentiment
    from llm_jax.training import classify, evaluation, losses, optim, report
    from llm_jax.training import step as step_lib

    config = cli.load_config()
    workdir = pathlib.Path(flags.FLAGS.workdir).expanduser()
    c = config.train
    began = time.perf_counter()

    # ---------------------------------------------------------------- where the run starts from
    # 1. the last checkpoint of the workdir; 2. the weights named by init_from; 3. random weights.
    # Adapters (lora.rank) are restored or begun in the same way, always over the weights of init_from.
    adapting = config.lora.rank > 0
    if adapting and not config.init_from:
        raise UserError("lora.rank adapts pretrained weights; name them by init_from")
    _refuse_another_run(workdir, config)
    resumed = checkpoint.find(workdir) if checkpoint.steps(workdir) else None
    record = checkpoint.verify(resumed) if resumed else None
    origin = pretrained.locate(config.init_from) if config.init_from and (adapting or not resumed) else None
    foreign = origin is not None and pretrained.is_foreign(origin)
    given = pretrained.load(origin, dtype=config.model.precision.params) if origin and foreign else None
    said = config.init_from
    if origin and not foreign:
        origin = checkpoint.find(origin)
    if origin and not said.startswith(("asset:", "hf:")):
        said = str(origin.absolute())
    start = record["step"] if record else 0
    if start > c.steps:
        raise UserError(f"{workdir} is at step {start}, past train.steps={c.steps}; raise it or give another --workdir")

    # ---------------------------------------------------------------- data
    asked = config.data.source.startswith(sentiment.PREFIX)
    source = sentiment.Source(config.data) if asked else Source(config.data)
    if given and not resumed:
        tokenizer = given.tokenizer
    else:
        saved = resumed or origin
        tokenizer = tokenizers.load(saved / "tokenizer") if saved else source.tokenizer(config.tokenizer)
    if tokenizer.kind != config.tokenizer.kind:
        raise UserError(
            f"{resumed or config.init_from}: trained on '{tokenizer.kind}' tokens; config key 'tokenizer.kind' is "
            f"'{config.tokenizer.kind}'"
        )
    if record and record["corpus"] != source.sha256:
        raise UserError(
            f"data.source={config.data.source}: its text has changed since {workdir} was started "
            f"(sha256 {record['corpus'][:12]}, now {source.sha256[:12]}); bring it back or give another --workdir"
        )
    test_rows = source.rows(tokenizer, "test", c.seq_len) if isinstance(source, sentiment.Source) else None
    whole_rows: Finite
    held_rows: Finite
    if isinstance(source, sentiment.Source):
        whole_rows, held_rows = (source.rows(tokenizer, part, c.seq_len) for part in ("train", "validation"))
    else:
        corpus = source.corpus(tokenizer)
        whole_rows, held_rows = Rows(corpus.train, c.seq_len), Rows(corpus.validation, c.seq_len)
    train_rows = Shuffled(whole_rows, c.seed)
    print(
        f"{config.data.source}: {source.num_bytes:,} bytes (sha256 {source.sha256[:12]}), "
        f"{len(whole_rows.split.tokens):,} training tokens, {len(held_rows.split.tokens):,} held out; tokenizer "
        f"{tokenizer.kind}, "
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
    copies = mesh_lib.replicated(mesh)
    param_shardings = mesh_lib.shardings(abstract, config.mesh.rules, mesh)
    abstract_trained, trained_shardings, frozen_shardings, abstract_fixed = abstract, param_shardings, None, {}
    if adapting:

        def begin_adapters(base):
            return lora.split(lora.init(jax.random.key(c.seed), base, config.lora), config.lora.variant)

        abstract_trained, abstract_fixed = jax.eval_shape(begin_adapters, abstract)
        trained_shardings = jax.tree.map(lambda _: copies, abstract_trained)  # they are small
        frozen_shardings = {"base": param_shardings, "fixed": jax.tree.map(lambda _: copies, abstract_fixed)}
    optimizer = optim.make(
        config.optim, c.steps, abstract, abstract_trained if adapting else None, config.lora.b_lr_ratio
    )
    abstract_state = jax.eval_shape(lambda p: step_lib.init(optimizer, p), abstract_trained)
    state_shardings = step_lib.State(
        copies,
        trained_shardings,
        optax.tree.map_params(
            optimizer,
            lambda _, s: s,
            abstract_state.optimizer,
            trained_shardings,
            transform_non_params=lambda _: copies,
        ),
    )
    abstract_state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract_state, state_shardings
    )
    abstract_saved = abstract_state.params
    if adapting:
        fixed_too = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=copies), abstract_fixed)
        abstract_saved = lora.join(abstract_state.params, fixed_too)
    print(report.parameter_table(abstract_state.params))
    print(
        f"mesh {dict(mesh.shape)} of {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        f"attention {attention}, jax {jax.__version__}"
    )
    if flags.FLAGS.dry_run:
        return
    checkpoint.make_directory(workdir)

    # ---------------------------------------------------------------- state
    base, frozen, named = None, None, None
    if origin:
        if given:
            trees.check(trees.describe(given.params), trees.describe(jax.eval_shape(trees.unstack, abstract)), said)
            base = jax.device_put(trees.restage(given.params, layout(config.model)), param_shardings)
            before, given = given.model.config, None  # whose arrays would stay beside ours
        else:
            base = checkpoint.restore(
                origin,
                checkpoint.verify(origin),
                config.model,
                lambda tree: mesh_lib.shardings(tree, config.mesh.rules, mesh),
            )
            base = jax.jit(lambda p: trees.restage(p, layout(config.model)), out_shardings=param_shardings)(base)
            before = checkpoint.read_config(origin).model
        print(f"weights from {said}")
        for key, value in _differences(before, config.model):
            print(f"note: {key} was {value} there")
    if adapting and base is not None:
        named = {"path": said, "sha256": trees.fingerprint(base)}
        if resumed and record:
            checkpoint.check_base(resumed, record, named["sha256"])
    if resumed and record:
        saved, optimizer_state = checkpoint.restore_state(resumed, record, abstract_saved, abstract_state.optimizer)
        params, fixed = lora.split(saved, config.lora.variant) if adapting else (saved, {})
        state = step_lib.State(jax.device_put(jnp.int32(start), copies), params, optimizer_state)
        print(f"going on from {resumed}")
    else:
        tokens, fixed = jnp.zeros((1, 1), jnp.int32), {}
        if adapting:
            params, fixed = jax.jit(begin_adapters, out_shardings=copies)(base)
        elif origin:
            params = base
        else:
            fresh = jax.jit(lambda key: model.init(key, tokens)["params"], out_shardings=param_shardings)
            params = fresh(jax.random.key(c.seed))
        state = jax.jit(lambda p: step_lib.init(optimizer, p), out_shardings=state_shardings, donate_argnums=0)(params)
    if adapting:
        frozen = {"base": jax.jit(lora.rebase, donate_argnums=0)(base, fixed), "fixed": fixed}
    del base
    checkpoint.write_json(workdir / "config.json", config_lib.as_dict(config))

    # ---------------------------------------------------------------- compiled functions
    rate = optim.schedule(config.optim, c.steps)

    def whole(trained, frozen, **dropout):  # the parameters that the model sees
        return lora.with_base(frozen, trained, **dropout) if adapting else trained

    def loss(trained, frozen, batch, step, key):
        dropout = {"dropout": config.lora.dropout, "key": key} if config.lora.dropout else {}
        return losses.language_model(model, whole(trained, frozen, **dropout), batch, c.loss_chunk)

    train_step = jax.jit(
        mesh_lib.within(mesh, step_lib.make(loss, optimizer, rate, c.seed, c.grad_accumulation)),
        donate_argnums=0,
        in_shardings=(state_shardings, frozen_shardings, batch_sharding),
        out_shardings=(state_shardings, copies),
    )
    held_loss = jax.jit(
        mesh_lib.within(mesh, lambda t, f, batch: losses.language_model(model, whole(t, f), batch, c.loss_chunk)),
        in_shardings=(trained_shardings, frozen_shardings, batch_sharding),
        out_shardings=copies,
    )
    decoder = model.clone(config=dataclasses.replace(config.model, scan_layers=False))
    unstack = jax.jit(lambda trained, frozen: trees.unstack(whole(trained, frozen)), out_shardings=copies)

    def evaluate(limit: int) -> dict[str, float]:
        one = lambda trained, batch: held_loss(trained, frozen, batch)  # noqa: E731
        found = evaluation.evaluate(one, state.params, held_rows, c.batch_size, batch_sharding, limit)
        return {f"validation_{name}": value for name, value in found.items()}

    def sample(title: str) -> None:
        prompts = [tokenizers.prompt(tokenizer, text) for text in config.eval.prompts]
        made = loop.generate(
            decoder,
            unstack(state.params, frozen),
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
    writer = checkpoint.Writer(workdir, config, tokenizer, source.sha256, named)
    progress = report.Progress(workdir, start, c.steps, transformer.flops_per_token(config.model, c.seq_len), peak)

    def due(every: int, done: int) -> bool:
        return done == c.steps or bool(every and done % every == 0)

    held: dict[str, float] = {}
    for index, batch in enumerate(batches(train_rows, start, c.steps, c.batch_size, batch_sharding), start):
        state, metrics = train_step(state, frozen, batch)
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
            kept = lora.join(state.params, frozen["fixed"]) if frozen else state.params
            writer.save(done, kept, state.optimizer, held.get("validation_loss"))
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
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract_trained)),
        "tokens_per_second": statistics.median(progress.rates) if progress.rates else None,
        "corpus": {"source": config.data.source, "sha256": source.sha256, "bytes": source.num_bytes},
        "seconds": time.perf_counter() - began,
        "jax": jax.__version__,
    }
    if test_rows:
        found = classify.accuracy(model, whole(state.params, frozen), test_rows, c.batch_size, batch_sharding)
        summary |= {f"test_{name}": value for name, value in found.items()}
        print(f"test: {classify.say(found)}")
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
