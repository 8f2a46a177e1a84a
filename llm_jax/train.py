"""Trains a language model: `python -m llm_jax.train --config=configs/default.py --workdir=runs/x`.

Started again with the same command it goes on where it was, bit for bit.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from llm_jax import cli
from llm_jax import config as config_lib
from llm_jax.errors import UserError

cli.define_config()
flags.DEFINE_string("workdir", None, "where the run is kept (config, metrics, checkpoints)", required=True)
flags.DEFINE_integer("devices", 0, "simulate this many CPU devices")
flags.DEFINE_boolean("dry_run", False, "print the parameters and their shardings, and stop")
flags.DEFINE_boolean(
    "profile", False, "trace steps 4 to 6 of this start into WORKDIR/profile, for TensorBoard or xprof"
)

# What may change when a run goes on: whole keys, and sections by their dot. Any other difference is another run.
_FREE = (
    *("eval.", "report.", "checkpoint.", "mesh."),
    *("train.steps", "train.on_bad_step", "train.spike_factor", "model.attention", "model.cache"),
    *("data.cache_dir", "data.workers"),
)


def main() -> None:
    cli.keep_memory()
    cli.use_devices(flags.FLAGS.devices)
    import jax
    import jax.numpy as jnp

    from llm_jax import checkpoint, pretrained, tokenizers, trees
    from llm_jax.data import rows
    from llm_jax.data.corpus import Source
    from llm_jax.decoding import loop
    from llm_jax.decoding.options import Options
    from llm_jax.model import product, transformer
    from llm_jax.model.stages import layout
    from llm_jax.parallel import mesh as mesh_lib
    from llm_jax.quant import qat
    from llm_jax.training import evaluation, losses, optim, report, sinks, watch
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

    if config.quant.scheme:
        raise UserError(f"config key 'quant.scheme' is '{config.quant.scheme}'; it is of the frozen base of adapters")

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
    train_rows = rows.training(config, corpus)
    held_rows, held_parts = rows.held_out(config.data, corpus, c.seq_len)
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
    losses.check(config)
    sinks.check(config.report.to)
    together = losses.rows_together(config.loss)
    step_lib.check_accumulation(c.batch_size, c.grad_accumulation, mesh.shape["data"] * mesh.shape["fsdp"], together)
    model = transformer.Transformer(config.model)
    transformer.check_length(config.model, c.seq_len)
    attention = product.describe(
        config.model, jax.default_backend(), c.batch_size // c.grad_accumulation, c.seq_len, dict(mesh.shape)
    )
    abstract = jax.eval_shape(lambda p: qat.prepare(p, config.quant), checkpoint.abstract_params(model))
    weights = watch.names(abstract)
    guard = watch.Watch(c, weights, workdir / "metrics.jsonl", start)
    optimizer = optim.make(config.optim, c.steps, abstract, transformer.width_ratio(config.model))
    copies = mesh_lib.replicated(mesh)
    param_shardings = mesh_lib.shardings(abstract, config.mesh.rules, mesh)

    def begun(params):
        return step_lib.init(optimizer, params, ema=bool(config.optim.ema_decay))

    abstract_state = jax.eval_shape(begun, abstract)
    state_shardings = step_lib.State(
        copies,
        param_shardings,
        optim.shardings(abstract_state.optimizer, abstract, param_shardings, copies),
        param_shardings if config.optim.ema_decay else None,
    )
    abstract_state = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract_state, state_shardings
    )
    # ---------------------------------------------------------------- the frozen model of the loss
    # A teacher, or for DPO the weights that the run started from.
    other, frozen, fingerprint = None, None, ""
    if name := config.loss.teacher or (config.init_from if config.loss.kind == "dpo" else ""):
        loaded = pretrained.load(name, scan_layers=config.model.scan_layers, dtype=config.model.precision.params)
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
    checkpoint.make_directory(workdir)
    lock = checkpoint.lock(workdir)

    # ---------------------------------------------------------------- state
    def restored(directory: pathlib.Path, record: Mapping[str, Any]) -> step_lib.State:
        a = abstract_state
        found = checkpoint.restore_state(directory, record, a.params, a.optimizer, a.ema)
        print(f"going on from {directory}")
        return step_lib.State(jax.device_put(jnp.int32(record["step"]), copies), *found)

    def first() -> step_lib.State:
        if origin and record and not resumed:
            params = checkpoint.restore(
                origin, record, config.model, lambda tree: mesh_lib.shardings(tree, config.mesh.rules, mesh)
            )
            begin = jax.jit(
                lambda p: begun(qat.prepare(trees.restage(p, layout(config.model)), config.quant)),
                out_shardings=state_shardings,
            )
            print(f"weights from {origin}")
            for key, before in _differences(checkpoint.read_config(origin).model, config.model):
                print(f"note: {key} was {before} there")
            return begin(params)
        tokens = jnp.zeros((1, 1), jnp.int32)
        fresh = jax.jit(
            lambda key: begun(qat.prepare(model.init(key, tokens)["params"], config.quant)),
            out_shardings=state_shardings,
        )
        return fresh(jax.random.key(c.seed))

    state = restored(resumed, record) if resumed and record else first()
    checkpoint.write_json(workdir / "config.json", config_lib.as_dict(config))

    # ---------------------------------------------------------------- compiled functions
    rate = optim.schedule(config.optim, c.steps)
    objective = losses.make(config.loss, model, c.loss_chunk, other)

    def loss(trained, frozen, batch, step, key):
        return objective(qat.delayed(trained, step, config.quant.qat.start_step), frozen, batch, step, key)

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
    eval_loss = jax.jit(
        mesh_lib.within(mesh, lambda params, batch: losses.language_model(model, params, batch, c.loss_chunk)),
        in_shardings=(param_shardings, batch_sharding),
        out_shardings=copies,
    )
    activation_norms = jax.jit(mesh_lib.within(mesh, report.activation_norms(model)))
    decoder = model.clone(config=dataclasses.replace(config.model, scan_layers=False))
    unstack = jax.jit(trees.unstack, out_shardings=copies)

    def evaluate(limit: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        for source_name, part in {"": held_rows, **held_parts}.items():
            found = evaluation.evaluate(eval_loss, state.model, part, c.batch_size, batch_sharding, limit)
            suffix = f"/{source_name}" if source_name else ""
            figures |= {f"validation_{name}{suffix}": value for name, value in found.items()}
        return figures

    def sample(title: str) -> str:
        prompts = [tokenizers.prompt(tokenizer, text) for text in config.eval.prompts]
        made = loop.generate(
            decoder,
            unstack(state.model),
            prompts,
            Options(temperature=0.8, top_p=0.95).sampler(),
            max_new_tokens=config.eval.max_new_tokens,
            eos=tokenizer.eos,
            vocab_size=tokenizer.vocab_size,
        )
        texts = [tokenizer.decode(prompt + one.ids) for prompt, one in zip(prompts, made, strict=True)]
        return "\n".join(f"----- {title}\n{text}" for text in texts)

    if config.eval.prompts and not start:
        print(sample("before training"))

    # ---------------------------------------------------------------- the loop
    peak = report.matmul_peak(config.model.precision.compute)
    opened = sinks.open_all(config.report.to, workdir, config_lib.flat(config), start)
    writer = checkpoint.Writer(workdir, config, tokenizer, corpus.sha256, fingerprint)
    flops = transformer.flops_per_token(config.model, c.seq_len)
    progress = report.Progress(workdir, start, c.steps, flops, peak, guard, weights, opened, config.report.norms_every)
    report.begin_attempt(workdir, start)
    rollbacks, tracer = watch.Rollbacks(), report.Tracer(workdir, start + 3 if flags.FLAGS.profile else None)
    periods = {
        "evaluate": config.eval.every,
        "sample": config.report.samples_every if config.eval.prompts else 0,
        "norms": config.report.norms_every,
        "save": config.checkpoint.every,
    }

    def ahead() -> Iterator[rows.Batch]:
        return rows.batches(train_rows, done + jumped, c.steps + jumped, c.batch_size, batch_sharding)

    def go_back(bad: watch.BadStep) -> tuple[step_lib.State, int]:
        """The state and step of the last checkpoint, or of the start."""
        writer.wait()
        kept = checkpoint.steps(workdir)
        if c.on_bad_step != "rollback":
            cure = "lower optim.lr, or set train.on_bad_step to skip or rollback"
            raise UserError(f"step {bad.step}: {bad.what}; {f'step {kept[-1]} is saved; ' if kept else ''}{cure}")
        to = kept[-1] if kept else 0
        rollbacks.count(to, bad)
        guard.rewind(to)
        progress.rewind(to)
        progress.write(f"step {bad.step}: {bad.what}; going back to step {to} and over the batches up to there")
        at = checkpoint.find(workdir) if kept else None
        return (restored(at, checkpoint.verify(at)) if at else first()), to

    held: dict[str, float] = {}
    done, jumped = start, record.get("jumped", 0) if resumed and record else 0
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
            except watch.BadStep as bad:
                (state, to), jumped = go_back(bad), jumped + bad.step
                done, jumped = to, jumped - to
                stream = ahead()
                continue
            if not due:
                continue
            norms = jax.device_get(activation_norms(state.params, batch)) if "norms" in due else {}
            if "evaluate" in due:
                held = evaluate(0 if done == c.steps else config.eval.rows)
                progress.write(
                    f"step {done}: held-out loss {held['validation_loss']:.4f}, "
                    f"{held['validation_bits_per_byte']:.3f} bits per byte"
                )
            progress.flush(norms, **held)
            if "sample" in due and done < c.steps:
                progress.text(done, "samples", sample(f"after {done} steps"))
            if "save" in due:
                writer.save(done, state.params, state.optimizer, held.get("validation_loss"), jumped, state.ema)
            progress.pause()
    tracer.close(state)
    writer.close()
    if config.eval.prompts and not stopping:
        progress.text(done, "samples", sample("after training"))
    progress.close()
    report.end_attempt(workdir)
    lock.close()
    if stopping and done < c.steps:
        cli.leave(stopping, f"saved at step {done} of {c.steps}; the same command goes on from there")

    # ---------------------------------------------------------------- what came of it
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
        "goodput": report.goodput(workdir),
        **report.peak_memory(),
        "jax": jax.__version__,
    }
    checkpoint.write_json(workdir / "summary.json", summary)
    others = ", ".join(f"{name} {value:.3f}" for name, value in packed.items())
    print(
        f"held-out: loss {final['validation_loss']:.4f}, perplexity {final['validation_perplexity']:.2f}, "
        f"{final['validation_bits_per_byte']:.3f} bits per byte{others and f' ({others})'}\n"
        + "".join(f"of {name}: {final[f'validation_bits_per_byte/{name}']:.3f}\n" for name in held_parts)
        + f"checkpoint: {workdir / 'checkpoints' / str(c.steps)}\n"
        f'next: python -m llm_jax.generate --checkpoint={workdir} --prompt="def "'
    )


def _differences(before: config_lib.ModelConfig, now: config_lib.ModelConfig) -> list[tuple[str, str]]:
    """What about a model has changed, beside how it is laid out: (key, what it was)."""
    free = ("model.scan_layers", "model.remat", "model.vocab_size", "model.attention", "model.cache")
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
