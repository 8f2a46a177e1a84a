"""Quantizes a checkpoint: `python -m llm_jax.quantize --checkpoint=runs/x --output=runs/x-int4 --scheme=int4`.

Adapters are merged first: into dense weights, or into the codes of a quantized base, which loses a part of them that is
printed. If it is interrupted, the same command resumes with the next layer.
"""

import dataclasses
import pathlib
import shutil

from llm_jax import cli, runtime
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.define_checkpoint()
FLAGS.string("output", None, "run directory to write; must not exist", required=True)
FLAGS.string(
    "scheme",
    "",
    "number format, e.g. int8, w8a8, int4, nf4, or with a group size, int4:64; required unless the run "
    "was trained with "
    "quant.qat or over a quantized base",
)
FLAGS.enum(
    "method", "absmax", ["absmax", "percentile", "mse", "smoothquant", "awq", "gptq"], "how scales and codes are chosen"
)
FLAGS.string("head", "int8", "scheme of the embeddings and the output head; none leaves them unquantized")
FLAGS.multi_string(
    "rule", [], "REGEX=SCHEME (or none) for weights whose name matches, e.g. 'layers/0/mlp/.*=int8'; may be repeated"
)
FLAGS.string("fallback", "", "scheme for weights whose scheme this backend cannot run; default: an error")
FLAGS.string("data", "", "calibration text, as data.source takes it; default: the training text of the run")
FLAGS.integer("sequences", 64, "number of calibration sequences")
FLAGS.integer("seq_len", 0, "tokens per calibration sequence; default: train.seq_len of the run, or 512")
FLAGS.integer("batch_size", 8, "number of calibration sequences that are processed together")
FLAGS.boolean("act_order", True, "with --method=gptq: quantize the inputs with the largest activations first")

_CALIBRATED = ("smoothquant", "awq", "gptq")
NEEDS: cli.Needs = (
    (("method", "head", "rule", "fallback"), "--scheme is not given", lambda f: f.scheme),
    (("act_order",), "--method=gptq is not given", lambda f: f.method == "gptq"),
    (
        ("data", "sequences", "seq_len", "batch_size"),
        f"neither a static scheme nor --method={', '.join(_CALIBRATED)} is given",
        lambda f: f.method in _CALIBRATED or any("_static" in name for name in (f.scheme, f.fallback, *f.rule)),
    ),
)


def main(f: cli.Flags) -> None:
    runtime.retain_freed_memory()
    from llm_jax import checkpoints, configuration, files, lora, trees, weights
    from llm_jax.data.rows import Row
    from llm_jax.kernels import number_formats
    from llm_jax.model import transformer
    from llm_jax.quant import calibrate
    from llm_jax.quant import post_training as quant

    output = files.local_path(f.output, "--output")
    if output.exists():
        raise UserError(f"--output={output} exists; give another, or remove it")
    if f.sequences < 1 or f.batch_size < 1 or f.seq_len < 0:
        said = f"--sequences={f.sequences} --batch_size={f.batch_size} --seq_len={f.seq_len}"
        raise UserError(f"{said}; expected positive numbers")

    # ---------------------------------------------------------------- the model, and what becomes of each weight
    checkpoint = checkpoints.open(f.checkpoint, f.base)
    model, params, tokenizer = checkpoint.load()
    quant.check_finite(params, f.checkpoint)
    if checkpoint.run_config is None:
        default = configuration.default()
        kind = dataclasses.replace(default.tokenizer, kind=tokenizer.kind)
        run_config, length = dataclasses.replace(default, model=model.config, tokenizer=kind), f.seq_len or 512
    else:
        run_config = checkpoint.run_config
        length = f.seq_len or run_config.train.seq_len
    before = weights.num_bytes(params)
    params, costs = lora.fold(params)
    made = "has adapters over a quantized base, which go into its own codes" if costs else ""
    if quant.is_quantization_aware(params):
        made = "was trained as integers already"
    if made:
        if f.scheme:
            raise UserError(f"--scheme={f.scheme}: {f.checkpoint} {made}; leave --scheme out")
        planned = dict.fromkeys(trees.flatten(params), "")
    elif not f.scheme:
        raise UserError("--scheme is needed; one of " + ", ".join(number_formats.FOR_WEIGHTS))
    else:
        planned = quant.plan(params, quant.rules(_none(f.scheme), _none(f.head), _rules(f.rule)), "--scheme, --rule")
        planned = quant.runnable(params, planned, f.fallback)

    # ---------------------------------------------------------------- the calibration text
    rows: list[Row] = []
    text = ""
    if not made and calibrate.needs_text(planned, f.method):
        if checkpoint.run_config is None and not f.data:
            raise UserError(f"--method={f.method} needs calibration text; {f.checkpoint} names none, give --data=FILE")
        transformer.check_length(model.config, length)
        rows, text = calibrate.text(run_config, f.data, tokenizer, length, f.sequences)
        print(f"calibrating on {len(rows)} sequences of {length} tokens", flush=True)

    # ---------------------------------------------------------------- layer by layer, and written
    partial = output.with_name(f".{output.name}.partial")
    _claim(partial, {**_request(f), "from": checkpoint.identity, "planned": planned, "text": text})
    if made:
        params = quant.finish(params)
        lines = quant.lines(params)
    else:
        options = calibrate.CalibrationOptions(f.method, f.act_order, f.batch_size)
        flat, params = trees.flatten(params), {}  # each weight goes when it has been quantized
        params, lines = calibrate.run(model, flat, planned, rows, options, partial)
    quant.check_finite(params, f"{f.checkpoint}, quantized: a float16 scale cannot hold it")
    saved = dataclasses.replace(run_config, model=dataclasses.replace(model.config, scan_layers=False))
    no_training = dataclasses.replace(saved.quant, scheme="", qat=dataclasses.replace(saved.quant.qat, scheme=""))
    saved = dataclasses.replace(saved, quant=no_training, lora=configuration.default("lora"))
    # Adapters of a run sample as every run of training, whatever their base recommends.
    generation = {} if checkpoint.form == "adapters" else checkpoint.generation_config
    checkpoints.write_run(partial / "run", saved, params, tokenizer, text, generation)
    files.rename(partial / "run", output, durable=True)
    shutil.rmtree(partial)
    print(quant.table(lines))
    after = weights.num_bytes(params)
    print(f"{before:,} bytes -> {after:,}: {before / after:.2f} times smaller")
    if costs:
        worst = max(costs, key=lambda path: costs[path])
        print(
            f"rounding the merged weights lost {sum(costs.values()) / len(costs):.3f} of what the adapters had added, "
            f"in the mean of {len(costs)} weights; at worst {costs[worst]:.3f} ({worst})"
        )
    print(f"wrote {output}; next: python -m llm_jax.evaluate --checkpoint={output}")


def _none(name: str) -> str:
    return "" if name == "none" else name


def _rules(said: list[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for rule in said:
        pattern, equals, scheme = rule.rpartition("=")
        if not equals or not pattern:
            raise UserError(f"--rule={rule}; expected REGEX=SCHEME")
        found.append((pattern, _none(scheme)))
    return tuple(found)


def _request(f: cli.Flags) -> dict[str, object]:
    names = ("scheme", "method", "head", "rule", "fallback", "sequences", "seq_len", "batch_size", "act_order")
    return {name: f[name].value for name in names}


def _claim(partial: pathlib.Path, request: dict[str, object]) -> None:
    """The directory of an unfinished command, if it is this very one; else made anew."""
    from llm_jax import files

    said = partial / "request.json"
    if said.exists() and files.read_json(said) == request:
        print(f"going on from {partial}")
        shutil.rmtree(partial / "run", ignore_errors=True)
        return
    shutil.rmtree(partial, ignore_errors=True)
    files.make_directory(partial)
    files.write_json(said, request)


COMMAND = cli.Command(
    "quantize",
    main,
    FLAGS,
    needs=NEEDS,
    interrupted="interrupted; the same command resumes with the next layer",
    compiles=True,
    memory_cure="give a smaller --batch_size or a shorter --seq_len",
)

if __name__ == "__main__":
    cli.start(COMMAND)
