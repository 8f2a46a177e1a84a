"""Trains a language model: `python -m llm_jax.train --config=configs/default.py --workdir=runs/x`.

Started again with the same command it goes on where it was, bit for bit.
"""

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from llm_jax import cli
from llm_jax import configuration as config_lib
from llm_jax.errors import UserError

cli.define_config()
flags.DEFINE_string("workdir", None, "where the run is kept (config, metrics, checkpoints)", required=True)
flags.DEFINE_integer("devices", 0, "simulate this many CPU devices")
flags.DEFINE_boolean("dry_run", False, "print the parameters and their shardings, and stop")
flags.DEFINE_boolean(
    "profile", False, "trace steps 4 to 6 of this start into WORKDIR/profile, for TensorBoard or xprof"
)
NEEDS: cli.Needs = ((("profile",), "--dry_run is given", lambda f: not f.dry_run),)


def main() -> None:
    cli.keep_memory()
    cli.use_devices(flags.FLAGS.devices)
    if flags.FLAGS.devices <= 1:
        cli.one_step_at_a_time()
    import jax
    import jax.numpy as jnp

    from llm_jax import checkpoints, files, tokenizers, trees
    from llm_jax.checkpoints import adapters, run, vocabulary
    from llm_jax.data import masking, rows
    from llm_jax.data.corpus import Source
    from llm_jax.decoding import loop
    from llm_jax.decoding.options import Options
    from llm_jax.evaluation import ask, builtin, classification, held_out, sentiment
    from llm_jax.model import attention_kernels, transformer
    from llm_jax.parallel import mesh as mesh_lib
    from llm_jax.training import bad_steps, losses, optim, report, resume, sinks, trainable
    from llm_jax.training import step as step_lib

    config = cli.load_config()
    workdir = pathlib.Path(flags.FLAGS.workdir).expanduser()
    resumed = checkpoints.find(workdir) if checkpoints.steps(workdir) else None
    given = None
    if config.tokenizer.path:
        kept = tokenizers.load(resumed / "tokenizer") if resumed else None
        given = vocabulary.named_tokenizer(config.tokenizer.path, kept)
        its = dataclasses.replace(config.tokenizer, kind=given.kind, vocab_size=given.vocab_size)
        config = dataclasses.replace(config, tokenizer=its)
    c = config.train
    began = time.perf_counter()

    # ---------------------------------------------------------------- where the run starts from
    # 1. the last checkpoint of the workdir; 2. the weights named by init_from; 3. random weights.
    # Adapters begin or go on in the same way, over the weights of init_from.
    kind = trainable.kind(config)
    resume.refuse_another(workdir, config)
    record = checkpoints.verify(resumed) if resumed else None
    named = bool(config.init_from) and (kind.adapts or not resumed)
    origin = checkpoints.open_base(config.init_from) if named else None
    start = record["step"] if record else 0
    if start > c.steps:
        raise UserError(f"{workdir} is at step {start}, past train.steps={c.steps}; raise it or give another --workdir")

    # ---------------------------------------------------------------- data
    asked = config.data.source.startswith(sentiment.PREFIX)
    source = sentiment.Source(config.data) if asked else Source(config.data)
    if resumed:
        tokenizer = tokenizers.load(resumed / "tokenizer")
    else:
        tokenizer = origin.tokenizer if origin else given or source.tokenizer(config.tokenizer)
    if given:
        vocabulary.check_tokenizer(config.tokenizer.path, given, tokenizer)
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
    test_rows: sentiment.Examples | None = None
    train_rows: rows.Shuffled | rows.Mixed
    held_rows: rows.AnyRows
    held_parts: dict[str, rows.AnyRows] = {}
    if isinstance(source, sentiment.Source):
        train, held_rows, test_rows = (source.rows(tokenizer, p, c.seq_len) for p in ("train", "validation", "test"))
        train_rows, num_tokens = rows.Shuffled(train, c.seed), len(train.split.tokens)
    else:
        corpus = source.corpus(tokenizer)
        train_rows, num_tokens = rows.training(config, corpus), len(corpus.train.tokens)
        held_rows, held_parts = rows.held_out(config.data, corpus, c.seq_len)
    print(
        f"{config.data.source}: {source.num_bytes:,} bytes (sha256 {source.sha256[:12]}), "
        f"{num_tokens:,} training tokens, {len(held_rows.split.tokens):,} held out; "
        f"tokenizer {tokenizer.kind}, {tokenizer.vocab_size} ids ({tokenizers.digest(tokenizer)[:12]})"
    )

    hide = masking.hider(config.loss, tokenizer)
    train_rows, held_rows = hide(train_rows, c.seed), hide(held_rows, 0)
    held_parts = {name: hide(part, 0) for name, part in held_parts.items()}

    # ---------------------------------------------------------------- model, optimizer, shardings
    ids = masking.vocab_size(config.loss, tokenizer)
    vocab = config.model.vocab_size or ids
    if vocab < ids:
        raise UserError(f"config key 'model.vocab_size' is {vocab}; the tokenizer has {ids} ids")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab))
    mesh = mesh_lib.make(config.mesh)
    batch_sharding = mesh_lib.batch_sharding(mesh, c.batch_size)
    losses.check(config)
    tasks = {pathlib.Path(name).stem: builtin.named(name) for name in config.eval.tasks}
    sinks.check(config.report.to)
    together = losses.rows_together(config.loss)
    step_lib.check_accumulation(c.batch_size, c.grad_accumulation, mesh.shape["data"] * mesh.shape["fsdp"], together)
    model = transformer.Transformer(config.model)
    transformer.check_length(config.model, c.seq_len)
    attention = attention_kernels.describe(
        config.model, jax.default_backend(), c.batch_size // c.grad_accumulation, c.seq_len, dict(mesh.shape)
    )
    abstract = checkpoints.abstract_params(model)
    copies = mesh_lib.replicated(mesh)
    param_shardings = mesh_lib.shardings(abstract, config.mesh.rules, mesh)
    abstract_trained, abstract_fixed = jax.eval_shape(kind.begin, abstract, jax.random.key(0))
    # Adapters are small: a copy on every device.
    trained_shardings = (
        jax.tree.map(lambda _: copies, abstract_trained)
        if kind.adapts
        else mesh_lib.shardings(abstract_trained, config.mesh.rules, mesh)
    )
    fixed_shardings = jax.tree.map(lambda _: copies, abstract_fixed)
    weights = bad_steps.names(abstract_trained)
    guard = bad_steps.Watch(c, weights, workdir / "metrics.jsonl", start)
    optimizer = optim.make(
        config.optim,
        c.steps,
        abstract if kind.adapts else abstract_trained,
        transformer.width_ratio(config.model),
        abstract_trained if kind.adapts else None,
        config.lora.b_lr_ratio,
    )

    def begun(params):
        return step_lib.init(optimizer, params, ema=bool(config.optim.ema_decay))

    abstract_state = jax.eval_shape(begun, abstract_trained)
    state_shardings = step_lib.State(
        copies,
        trained_shardings,
        optim.shardings(abstract_state.optimizer, abstract_trained, trained_shardings, copies),
        trained_shardings if config.optim.ema_decay else None,
    )
    abstract_state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract_state, state_shardings
    )
    # ---------------------------------------------------------------- the frozen model of the loss
    # A teacher, or for DPO the weights that the run started from.
    other, frozen, fingerprint = None, {}, ""
    if name := config.loss.teacher or (config.init_from if config.loss.kind == "dpo" else ""):
        loaded = checkpoints.load(name, scan_layers=config.model.scan_layers, dtype=config.model.precision.params)
        losses.check_other(name, loaded.model.config, config.model, tokenizers.digest(loaded.tokenizer), tokenizer)
        other = loaded.model if config.loss.teacher else model
        frozen = {"other": jax.device_put(loaded.params, mesh_lib.shardings(loaded.params, config.mesh.rules, mesh))}
        fingerprint = trees.fingerprint(loaded.params)
        transformer.check_length(other.config, c.seq_len)
        if resumed and record and record["other"] != fingerprint:
            raise UserError(f"{name}: its weights have changed since {workdir} was started; give another --workdir")
        del loaded

    # ---------------------------------------------------------------- what will be trained
    print(report.parameter_table(abstract_state.params))
    print(
        f"mesh {dict(mesh.shape)} of {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        f"attention {attention}, jax {jax.__version__}"
    )
    if flags.FLAGS.dry_run:
        return
    files.make_directory(workdir)
    mine = files.lock(workdir)

    # ---------------------------------------------------------------- state
    donated = () if kind.adapts else 0
    # The key is an argument, so that runs of other seeds compile nothing new.
    begin = functools.partial(
        jax.jit(kind.begin, out_shardings=(trained_shardings, fixed_shardings), donate_argnums=donated),
        key=jax.random.key(c.seed),
    )
    with_optimizer = jax.jit(begun, out_shardings=state_shardings, donate_argnums=0)
    fixed_too = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract_fixed, fixed_shardings
    )
    abstract_saved = kind.saved(abstract_state.params, {"fixed": fixed_too})

    def restored(directory: pathlib.Path, record: Mapping[str, Any]) -> tuple[step_lib.State, Any]:
        """The state of a checkpoint, and the parts of adapters that are not trained."""
        a = abstract_state
        saved, *rest = run.restore_state(directory, record, abstract_saved, a.optimizer, a.ema)
        params, fixed = kind.split(saved)
        print(f"going on from {directory}")
        return step_lib.State(jax.device_put(jnp.int32(record["step"]), copies), params, *rest), fixed

    def original() -> Any:
        """The weights of init_from, or random ones."""
        if origin:
            return origin.params(config.model, lambda tree: mesh_lib.shardings(tree, config.mesh.rules, mesh))
        tokens = jnp.zeros((1, 1), jnp.int32)
        return jax.jit(lambda key: model.init(key, tokens)["params"], out_shardings=param_shardings)(
            jax.random.key(c.seed)
        )

    def first() -> step_lib.State:
        return with_optimizer(begin(original())[0])

    base: Any = original() if kind.adapts or not resumed else None
    of_base: dict[str, str] | None = None
    if origin:
        print(f"weights from {origin.name}")
        for key, before in resume.differences(origin.config, config.model):
            print(f"note: {key} was {before} there")
    if kind.adapts and origin:
        of_base = {"path": origin.name, "sha256": trees.fingerprint(base)}
        if resumed and record:
            adapters.check_base(resumed, record, of_base["sha256"])
    if resumed and record:
        state, fixed = restored(resumed, record)
    else:
        params, fixed = begin(base)
        state = with_optimizer(params)
    if kind.adapts:
        seen = jax.eval_shape(kind.freeze, base, fixed)
        placed = {"base": mesh_lib.shardings(seen["base"], config.mesh.rules, mesh), "fixed": fixed_shardings}
        # A weight after the other, not in one function that would round them all at once.
        frozen = jax.device_put(kind.freeze(base, fixed), placed) | frozen
    del base
    cli.trim_memory()
    files.write_json(workdir / "config.json", config_lib.as_dict(config))

    # ---------------------------------------------------------------- compiled functions
    rate = optim.schedule(config.optim, c.steps)
    sparse = losses.is_sparse(config)
    loss_of = losses.make(config.loss, model, c.loss_chunk, other, sparse=sparse)

    def loss(trained, frozen, batch, step, key):
        return loss_of(kind.whole(trained, frozen, key, step), frozen, batch, step, key)

    train_step = jax.jit(
        mesh_lib.within(
            mesh,
            step_lib.make(
                loss,
                optimizer,
                rate,
                c.seed,
                c.grad_accumulation,
                skip_bad=c.on_bad_step == "skip",
                update_norms=config.report.norms_every > 0,
                ema_decay=config.optim.ema_decay,
                rows_together=together,
            ),
        ),
        donate_argnums=0,
        in_shardings=(state_shardings, None, batch_sharding, None),
        out_shardings=(state_shardings, copies),
    )
    held_loss = jax.jit(
        mesh_lib.within(mesh, lambda t, f, b: losses.language_model(model, kind.whole(t, f), b, c.loss_chunk, sparse)),
        in_shardings=(trained_shardings, None, batch_sharding),
        out_shardings=copies,
    )
    activation_norms = jax.jit(
        mesh_lib.within(mesh, lambda t, f, b: report.activation_norms(model)(kind.whole(t, f), b))
    )
    decoder = model.clone(config=dataclasses.replace(config.model, scan_layers=False))
    unstack = jax.jit(lambda t, f: trees.unstack(kind.whole(t, f)), out_shardings=copies)

    def evaluate(limit: int) -> dict[str, float]:
        one = lambda model_, batch: held_loss(model_, frozen, batch)  # noqa: E731
        figures: dict[str, float] = {}
        for source_name, part in {"": held_rows, **held_parts}.items():
            found = held_out.evaluate(one, state.model, part, c.batch_size, batch_sharding, limit)
            suffix = f"/{source_name}" if source_name else ""
            figures |= {f"validation_{name}{suffix}": value for name, value in found.items()}
        for name, task in tasks.items():
            which = range(min((limit and config.eval.task_examples) or len(task.examples), len(task.examples)))
            reader = (decoder, unstack(state.model, frozen), tokenizer)
            answers = list(ask.records(reader, task, ask.Manner(), which))
            figures[f"task_{name}"] = ask.summary(answers)["accuracy"]
        return figures

    def sample(title: str) -> str:
        prompts = [tokenizers.prompt(tokenizer, text) for text in config.eval.prompts]
        made = loop.generate(
            decoder,
            unstack(state.model, frozen),
            prompts,
            Options(temperature=0.8, top_p=0.95).sampler(),
            max_new_tokens=config.eval.max_new_tokens,
            eos=tokenizers.ends(tokenizer),
            vocab_size=tokenizer.vocab_size,
        )
        texts = [tokenizer.decode(prompt + one.ids) for prompt, one in zip(prompts, made, strict=True)]
        return "\n".join(f"----- {title}\n{text}" for text in texts)

    if config.eval.prompts and not start:
        print(sample("before training"))

    # ---------------------------------------------------------------- the loop
    peak = report.matmul_peak(config.model.precision.compute)
    opened = sinks.open_all(config.report.to, workdir, config_lib.flat(config), start)
    writer = checkpoints.Writer(workdir, config, tokenizer, source.sha256, fingerprint, of_base)
    flops = transformer.flops_per_token(config.model, c.seq_len)
    progress = report.Progress(workdir, start, c.steps, flops, peak, guard, weights, opened, config.report.norms_every)
    report.begin_attempt(workdir, start)
    rollbacks, tracer = bad_steps.Rollbacks(), report.Tracer(workdir, start + 3 if flags.FLAGS.profile else None)
    periods = {
        "evaluate": config.eval.every,
        "sample": config.report.samples_every if config.eval.prompts else 0,
        "norms": config.report.norms_every,
        "save": config.checkpoint.every,
    }

    def ahead() -> Iterator[rows.Batch]:
        return rows.batches(train_rows, done + skipped, c.steps + skipped, c.batch_size, batch_sharding)

    def go_back(bad: bad_steps.BadStep) -> tuple[step_lib.State, int]:
        """The state and step of the last checkpoint that every run has (not saved for a signal), or of the start."""
        writer.wait()
        kept = checkpoints.steps(workdir)
        if c.on_bad_step != "rollback":
            cure = "lower optim.lr, or set train.on_bad_step to skip or rollback"
            raise UserError(f"step {bad.step}: {bad.what}; {f'step {kept[-1]} is saved; ' if kept else ''}{cure}")
        to = ([s for s in kept if s % (config.checkpoint.every or 1) == 0] or kept or [0])[-1]
        rollbacks.count(to, bad)
        writer.discard(to)
        guard.rewind(to)
        progress.rewind(to)
        progress.write(f"step {bad.step}: {bad.what}; going back to step {to} and over the batches up to there")
        at = checkpoints.find(workdir) if to else None
        return (restored(at, checkpoints.verify(at))[0] if at else first()), to

    held: dict[str, float] = {}
    done, skipped = start, record["skipped_batches"] if resumed and record else 0
    stream, stopping = ahead(), 0
    with cli.signals_noted() as stopped:
        while done < c.steps and not stopping:
            tracer.at(done, state)
            batch = next(stream)
            state, metrics = train_step(state, frozen, batch, jnp.float32(guard.limit(done + 1)))
            done, stopping, held = done + 1, stopped(), {}
            due = {name for name, every in periods.items() if every and done % every == 0}
            due = {"save"} if stopping else due | {"evaluate", "save"} if done == c.steps else due
            try:
                progress.step(done, metrics)
                if due:
                    progress.collect()
            except bad_steps.BadStep as bad:
                (state, to), skipped = go_back(bad), skipped + bad.step
                done, skipped = to, skipped - to
                stream = ahead()
                continue
            if not due:
                continue
            norms = jax.device_get(activation_norms(state.params, frozen, batch)) if "norms" in due else {}
            if "evaluate" in due:
                held = evaluate(0 if done == c.steps else config.eval.rows)
                progress.write(
                    f"step {done}: held-out loss {held['validation_loss']:.4f}, "
                    f"{held['validation_bits_per_byte']:.3f} bits per byte"
                    + "".join(f", {name} {held[f'task_{name}']:.1%} right" for name in tasks)
                )
            progress.flush(norms, **held)
            if "sample" in due and done < c.steps:
                progress.text(done, "samples", sample(f"after {done} steps"))
            if "save" in due:
                saved = kind.saved(state.params, frozen)
                writer.save(done, saved, state.optimizer, held.get("validation_loss"), skipped, state.ema)
            progress.pause()
    tracer.close(state)
    writer.close()
    if config.eval.prompts and not stopping:
        progress.text(done, "samples", sample("after training"))
    progress.close()
    report.end_attempt(workdir)
    mine.close()
    if stopping and done < c.steps:
        cli.leave(stopping, f"saved at step {done} of {c.steps}; the same command goes on from there")

    # ---------------------------------------------------------------- what came of it
    final = held or evaluate(0)
    packed = source.compressed_bits_per_byte() if config.loss.masked == "none" else {}
    summary = {
        **final,
        "compressed_bits_per_byte": packed,
        "steps": c.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract_trained)),
        "tokens_per_second": statistics.median(progress.rates) if progress.rates else None,
        "corpus": {"source": config.data.source, "sha256": source.sha256, "bytes": source.num_bytes},
        "seconds": time.perf_counter() - began,
        "goodput": report.goodput(workdir),
        **report.peak_memory(),
        "jax": jax.__version__,
    }
    if test_rows:
        found = classification.accuracy(model, kind.whole(state.model, frozen), test_rows, c.batch_size, batch_sharding)
        summary |= {f"test_{name}": value for name, value in found.items()}
        print(f"test: {classification.say(found)}")
    files.write_json(workdir / "summary.json", summary)
    others = ", ".join(f"{name} {value:.3f}" for name, value in packed.items())
    print(
        f"held-out: loss {final['validation_loss']:.4f}, perplexity {final['validation_perplexity']:.2f}, "
        f"{final['validation_bits_per_byte']:.3f} bits per byte{others and f' ({others})'}\n"
        + "".join(f"of {name}: {final[f'validation_bits_per_byte/{name}']:.3f}\n" for name in held_parts)
        + f"checkpoint: {workdir / 'checkpoints' / str(c.steps)}\n"
        + (
            f'next: python -m llm_jax.generate --checkpoint={workdir} --prompt="def "'
            if config.model.causal
            else f"next: python -m llm_jax.evaluate --checkpoint={workdir} --data=FILE"
        )
    )


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on from the last checkpoint", NEEDS)
