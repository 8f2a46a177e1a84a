"""Quantizes a checkpoint: `python -m llm_jax.quantize --checkpoint=runs/x --output=runs/x-int4 --scheme=int4`.

Adapters are merged first: into dense weights, or into the codes of a quantized base; the command prints the rounding
error of the latter. After an interruption, the same command resumes with the next layer.
"""

import dataclasses
import pathlib
import shutil

from llm_jax import cli, extensions, runtime
from llm_jax.errors import UserError

FLAGS = cli.Flags()
FLAGS.define_checkpoint()
FLAGS.string("output", None, "run directory to write; must not exist", required=True)
FLAGS.string(
    "scheme",
    "",
    "number format, e.g. int8, w8a8, int4, nf4, int4:64 with a group size, or FILE:NAME; required unless the run was "
    "trained with quant.qat or over a quantized base",
)
_METHODS = ["absmax", "percentile", "mse", "smoothquant", "awq", "gptq"]
FLAGS.enum("method", "absmax", _METHODS, "quantization method")
FLAGS.string("head", "int8", "scheme of the embeddings and the output head; none leaves them unquantized")
FLAGS.multi_string(
    "rule", [], "REGEX=SCHEME (or none) for weights whose name matches, e.g. 'layers/0/mlp/.*=int8'; may be repeated"
)
FLAGS.string("fallback", "", "scheme for weights whose scheme this backend does not support; default: an error")
FLAGS.string("data", "", "calibration text, in the form of data.source; default: the training text of the run")
FLAGS.integer("sequences", 64, "number of calibration sequences")
FLAGS.integer("seq_len", 0, "tokens per calibration sequence; 0: train.seq_len of the run, or 512")
FLAGS.integer("batch_size", 8, "number of calibration sequences per batch")
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
        raise UserError(f"--output={output} already exists; choose another path, or remove it")
    if f.scheme in _METHODS:
        raise UserError(f"--scheme={f.scheme} is a method; use --method={f.scheme} with a scheme, e.g. --scheme=int4")
    if f.sequences < 1 or f.batch_size < 1 or f.seq_len < 0:
        values = f"--sequences={f.sequences} --batch_size={f.batch_size} --seq_len={f.seq_len}"
        raise UserError(f"{values}; expected positive numbers")

    # ---------------------------------------------------------------- the model, and the scheme of each weight
    checkpoint = checkpoints.open(f.checkpoint, f.base)
    model, params, tokenizer = checkpoint.load()
    quant.check_finite(params, f.checkpoint)
    if checkpoint.run_config is None:
        run_config, length = checkpoints.config_without_training(model.config, tokenizer), checkpoints.WINDOW
    else:
        run_config, length = checkpoint.run_config, checkpoint.run_config.train.seq_len
    length = f.seq_len or length
    before = weights.num_bytes(params)
    params, costs = lora.merge_attached(params)
    existing_scheme = "has adapters over a quantized base, which are merged into its codes" if costs else ""
    if quant.is_quantization_aware(params):
        existing_scheme = "was trained with quant.qat"
    if existing_scheme:
        if f.scheme:
            raise UserError(f"--scheme={f.scheme}: {f.checkpoint} {existing_scheme}; omit --scheme")
        planned = dict.fromkeys(trees.flatten(params), "")
    elif not f.scheme:
        raise UserError("--scheme is required; expected one of " + ", ".join(number_formats.WEIGHT_SCHEMES))
    else:
        if f.method != "absmax" and f.scheme != "none" and number_formats.scheme(f.scheme).custom:
            raise UserError(
                f"--method={f.method} has no effect on --scheme={f.scheme}, which encodes weights itself; omit it"
            )
        planned = quant.plan(params, quant.rules(_none(f.scheme), _none(f.head), _rules(f.rule)), "--scheme, --rule")
        planned = quant.replace_unsupported(params, planned, f.fallback)

    # ---------------------------------------------------------------- the calibration text
    rows: list[Row] = []
    text = ""
    if not existing_scheme and calibrate.needs_text(planned, f.method):
        if checkpoint.training_data is None and not f.data:
            raise UserError(
                f"--method={f.method} needs calibration text, and {f.checkpoint} records no training data; set "
                "--data=FILE"
            )
        transformer.check_length(model.config, length)
        rows, text = calibrate.calibration_rows(run_config, f.data, tokenizer, length, f.sequences)
        print(f"calibrating on {len(rows)} sequences of {length} tokens", flush=True)

    # ---------------------------------------------------------------- quantize layer by layer, and write the run
    partial = output.with_name(f".{output.name}.partial")
    _claim(partial, {**_request(f), "from": checkpoint.identity, "planned": planned, "text": text})
    if existing_scheme:
        params = quant.replace_fake_quant(params)
        lines = quant.summaries(params)
    else:
        options = calibrate.CalibrationOptions(f.method, f.act_order, f.batch_size)
        flat, params = trees.flatten(params), {}  # each weight is freed after it has been quantized
        params, lines = calibrate.quantize_layers(model, flat, planned, rows, options, partial)
    quant.check_finite(params, f"{f.checkpoint}, quantized: a scale exceeds the range of float16")
    saved = dataclasses.replace(run_config, model=dataclasses.replace(model.config, scan_layers=False))
    no_training = dataclasses.replace(saved.quant, scheme="", qat=dataclasses.replace(saved.quant.qat, scheme=""))
    saved = dataclasses.replace(saved, quant=no_training, lora=configuration.default("lora"))
    # A run that trained adapters does not inherit the sampling options of its base.
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
            f"relative error of the merged updates after rounding: mean {sum(costs.values()) / len(costs):.3f} over "
            f"{len(costs)} weights, maximum {costs[worst]:.3f} ({worst})"
        )
    data = "" if saved.data.source else " --data=FILE"
    print(f"wrote {output}; next: python -m llm_jax.evaluate --checkpoint={output}{data}")


def _none(name: str) -> str:
    return "" if name == "none" else name


def _rules(texts: list[str]) -> tuple[tuple[str, str], ...]:
    rules = []
    for rule in texts:
        parts = extensions.split_rule(rule)
        if parts is None:
            raise UserError(f"--rule={rule}; expected REGEX=SCHEME")
        rules.append((parts[0], _none(parts[1])))
    return tuple(rules)


def _request(f: cli.Flags) -> dict[str, object]:
    names = ("scheme", "method", "head", "rule", "fallback", "sequences", "seq_len", "batch_size", "act_order")
    return {name: f[name].value for name in names}


def _claim(partial: pathlib.Path, request: dict[str, object]) -> None:
    """Keeps the directory of an interrupted command with the same request, or creates an empty directory."""
    from llm_jax import files

    request_path = partial / "request.json"
    if request_path.exists() and files.read_json(request_path) == request:
        print(f"resuming from {partial}")
        shutil.rmtree(partial / "run", ignore_errors=True)
        return
    shutil.rmtree(partial, ignore_errors=True)
    files.make_directory(partial)
    files.write_json(request_path, request)


COMMAND = cli.Command(
    "quantize",
    main,
    FLAGS,
    needs=NEEDS,
    interrupt_message="interrupted; the same command resumes with the next layer",
    compiles=True,
    memory_hint="use a smaller --batch_size or a shorter --seq_len",
)

if __name__ == "__main__":
    cli.start(COMMAND)
