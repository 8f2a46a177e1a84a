"""Names and values of other codebases, in flags, options and keyword arguments, are answered with those here."""

import copy
import importlib
import pathlib

import numpy as np
import pytest

import llm_jax
from llm_jax import __main__ as commands
from llm_jax import cli, tokenizers
from llm_jax.checkpoints import Loaded, generation_config
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions
from llm_jax.errors import UserError
from llm_jax.schema import option_names, value_names
from llm_jax.tokenizers.hub import HubTokenizer
from tests.tokenizers import forms

TRAIN, GENERATE = ("train", "--workdir=unused"), ("generate", "--checkpoint=nowhere", "--prompt=a")
CONVERT = ("convert", "--output=unused")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*GENERATE, "--min_new_tokens=3"), "there is no smallest length; --ignore_eos continues to --max_new_tokens"),
        ((*GENERATE, "--attn_implementation=sdpa"), "the attention kernel is chosen for the machine"),
        ((*GENERATE, "--revision=x"), "the main branch is taken"),
        ((*GENERATE, "--device=cuda"), "JAX_PLATFORMS=cpu, cuda or tpu chooses"),
        (
            (*GENERATE, "--batch_size=4"),
            "unknown flag --batch_size; all prompts are decoded in one batch; --prompt",
        ),
        ((*GENERATE, "--quant=nf4"), "unknown flag --quant; python -m llm_jax.quantize --scheme=nf4 writes a quantize"),
        ((*TRAIN, "--quant=nf4"), "unknown flag --quant; did you mean --config.quant.scheme?"),
        ((*TRAIN, "--batch_size=4"), "unknown flag --batch_size; did you mean --config.train.batch_size?"),
        ((*GENERATE, "--dtype=bf16"), "expected one of float32, bfloat16, float16; did you mean 'bfloat16'?"),
        ((*TRAIN, "--logging_steps=3"), "metrics.jsonl in the workdir has a line for every step"),
        ((*TRAIN, "--resume_from_checkpoint"), "the same command with the same --workdir resumes"),
        ((*TRAIN, "--config.train.packing=true"), "unknown config key 'train.packing'; documents and examples are al"),
        ((*TRAIN, "--load_in_4bit"), "did you mean --config.quant.scheme=nf4?"),
        ((*TRAIN, "--attn_implementation=sdpa"), "did you mean --config.model.attention_kernel?"),
        ((*TRAIN, "--max_length=8"), "train.seq_len is the number of tokens of a row"),
        ((*TRAIN, "--completion_only_loss=true"), "data.kind=instructions counts the answers"),
        ((*TRAIN, "--dataset_num_proc=2"), "did you mean --config.data.workers?"),
        ((*TRAIN, "--deepspeed=x.json"), "did you mean --config.mesh.fsdp?"),
        ((*TRAIN, "--optim=adamw_torch"), "did you mean --config.optim.kind?"),
        ((*TRAIN, "--config.optax_name=scale_by_adam"), "did you mean 'optim.kind'?"),
        ((*TRAIN, "--config.optim.kind=scale_by_adam"), "did you mean 'adamw'?"),
        ((*TRAIN, "--config.optax.b2=0.95"), "did you mean 'optim.beta2'?"),
        ((*TRAIN, "--config.schedule.decay_type=cosine"), "did you mean 'optim.schedule'?"),
        ((*TRAIN, "--config.optim.schedule=rsqrt"), "did you mean 'inverse_sqrt'?"),
        ((*TRAIN, "--config.grad_clip_norm=1"), "did you mean 'optim.clip_norm'?"),
        ((*TRAIN, "--config.lr_mults=x"), "did you mean 'optim.lr_rules'?"),
        ((*TRAIN, "--config.wd_mults=x"), "did you mean 'optim.decay_rules'?"),
        ((*TRAIN, "--config.model_init=x"), "did you mean 'init_from'?"),
        ((*TRAIN, "--config.ckpt_steps=10"), "did you mean 'checkpoint.every'?"),
        ((*TRAIN, "--config.keep_ckpt_steps=10"), "checkpoint.keep_last and checkpoint.keep_best decide what is kept"),
        ((*TRAIN, "--config.log_training_steps=10"), "metrics.jsonl in the workdir has a line for every step"),
        ((*TRAIN, "--config.evals.val.log_steps=10"), "eval.every is the interval of evaluations"),
        ((*TRAIN, "--config.evals=x"), "did you mean 'eval.tasks'?"),
        ((*TRAIN, "--config.sharding_strategy=x"), "did you mean 'mesh.rules'?"),
        ((*TRAIN, "--config.total_epochs=90"), "train.steps is the length of a run"),
        ((*TRAIN, "--config.input.batch_size=8"), "did you mean 'train.batch_size'?"),
        ((*TRAIN, "--config.input.shuffle_buffer_size=8"), "every epoch is a permutation of all rows"),
        ((*TRAIN, "--config.model_name=vit"), "--config=RECIPE and the options of model determine the model"),
        ((*TRAIN, "--config=tiny:runlocal"), "'tiny:runlocal': a recipe has no arguments after a colon; give --config"),
        ((*TRAIN, "--some_unknown_flag=1"), "python -m llm_jax.train --help lists the flags"),
        ((*TRAIN, "--config.train.warmup_ratio=0.1"), "optim.warmup_steps is the number of steps of the warmup"),
        ((*TRAIN, "--config.lora.bias=none"), "unknown config key 'lora.bias'; adapters train no biases"),
        ((*TRAIN, "--config.data.max_length=8"), "train.seq_len is the number of tokens of a row"),
        ((*TRAIN, "--config.lora.kind=dora"), "unknown config key 'lora.kind'; did you mean 'lora.variant'?"),
        ((*TRAIN, "--config.model.precision.compute=bf16"), "did you mean 'bfloat16'?"),
        ((*TRAIN, "--config.model.precision.params=fp16"), "did you mean 'float16'?"),
        ((*TRAIN, "--config.optim.kind=adamw_torch"), "did you mean 'adamw'?"),
        ((*TRAIN, "--config.optim.schedule=cosine_with_warmup"), "did you mean 'cosine'?"),
        ((*TRAIN, "--config.data.kind=chat"), "did you mean 'instructions'?"),
        ((*TRAIN, "--config.model.position.kind=sinusodial"), "did you mean 'sinusoidal'?"),
        (("train", "configs/tiny.py"), "error: --workdir is required; did you mean --config=configs/tiny.py?"),
        ((*TRAIN, "runs/x"), "unexpected argument 'runs/x'; options are written --name=value"),
        ((*CONVERT, "--to=hf", "--checkpoint=x"), "unknown flag --checkpoint; did you mean --input?"),
        ((*CONVERT, "--to=gguf", "--input=x", "--format=Q4_K_M"), "Q4_0 or Q4_1".replace(" or", ",")),
        ((*CONVERT, "--to=gguf", "--input=x", "--format=Q4_K_M"), "did you mean 'Q4_0'?"),
        (("generate", "--checkpoint=nowhere", "a text"), "--prompt is required; did you mean --prompt='a text'?"),
        (("generate", "runs/x", "a text"), "python -m llm_jax.generate --checkpoint=runs/x --prompt='a text'?"),
        (("generate", "--checkpoint=nowhere", "--prompt=a", "--top-p=2", "--no-stream"), "nowhere: no such directory"),
        (("generate", "--checkpoint=nowhere", "--prompt=a", "--top-q=2"), "unknown flag --top-q; did you mean --top_"),
        (("evaluate", "runs/x"), "error: --checkpoint is required; did you mean --checkpoint=runs/x?"),
        (("evaluate", "--checkpoint=~/x,y,"), "no such directory; did you mean --checkpoint=~/x --checkpoint=y?"),
        ((*TRAIN, "--n_layer=2", "--wandb_project=x"), "model.num_layers?; unknown flag --wandb_project; the environm"),
        ((*TRAIN, "--config.n_embd=2", "--config.qqqqqq=1"), "'model.width'?; unknown config key 'qqqqqq'; --help-con"),
        ((*TRAIN, "--num_samples=3"), "training prints one continuation for each of eval.prompts"),
        ((*TRAIN, "--config.init_from=resume"), "no such checkpoint; the same command with the same --workdir resumes"),
        ((*TRAIN, "--config.init_from=scratch"), "without init_from, the weights are random; leave it out"),
        ((*TRAIN, "--config.data.source=shakespeare_char"), "matches it as a glob; did you mean asset:shakespeare?"),
        ((*TRAIN, "--config.data.source=openwebtext"), "a data set of the Hugging Face hub is hf:openwebtext"),
        ((*TRAIN, "--config.data.source=https://x.y/z.txt"), "URLs are not supported, download the file first"),
        ((*TRAIN, "--config.data.source=asset:shakespear"), "did you mean 'shakespeare'?"),
        ((*TRAIN, "--config.tokenizer.kind=gpt2"), "did you mean 'byte_bpe'?"),
        (
            (*TRAIN, "--config.model.position.kind=my.py"),
            "position.kind=my.py: expected FILE:NAME, with the name of a ",
        ),
        (("show", "tokens", "--checkpoint=x", "--text=a"), "--checkpoint; did you mean --tokenizer=CHECKPOINT?"),
        ((*TRAIN, "--config.model.num_heads=2"), "does not divide model.num_heads=2; set model.num_kv_heads=2 (keys a"),
        ((*TRAIN, "--config.model.num_heads=6", "--config.model.width=96"), "set model.num_kv_heads=2, or another div"),
        ((*GENERATE, "--grammar=x.gbnf"), "constrained decoding is not supported; --filter adds a filter of your own"),
        ((*GENERATE, "--output_scores"), "did you mean --json?"),
        ((*GENERATE, "--num_assistant_tokens=3"), "did you mean --draft_tokens?"),
        ((*GENERATE, "--llm_int8_threshold=6"), "int8 schemes have no parts in other dtypes"),
        ((*TRAIN, "--config.rank_pattern=x"), "did you mean 'lora.ranks'?"),
        ((*TRAIN, "--config.local_rank=0"), "--coordinator_address connects several processes"),
        ((*TRAIN, "--config.rpo_alpha=1"), "loss.kind=dpo has the option loss.beta only"),
        ((*TRAIN, "--hub_model_id=x"), "nothing is uploaded"),
        ((*TRAIN, "--save_strategy=epoch"), "did you mean --config.checkpoint.every?"),
        ((*TRAIN, "--dataset_train_split=x"), "data.source=hf:NAME:SPLIT"),
        ((*TRAIN, "--config.output_dir=x"), "--workdir is the directory of a run"),
        ((*TRAIN, "--config.lora.variant=rslora"), "did you mean lora.variant=lora with lora.rank_stabilized=True?"),
        ((*TRAIN, "--config.lora.variant=qlora"), "did you mean lora.variant=lora with quant.scheme=nf4?"),
        ((*TRAIN, "--config.optim.kind=paged_adamw_8bit"), "did you mean 'adamw'?"),
        (("quantize", "--group_size=64"), "unknown flag --group_size; did you mean --scheme=int4:64?"),
        (("quantize", "--num_samples=64"), "unknown flag --num_samples; did you mean --sequences?"),
        (("quantize", "--outtype=q8_0"), "unknown flag --outtype; did you mean --scheme?"),
        ((*CONVERT, "--input=x", "--to=safetensors"), "expected one of hf, gguf, peft; did you mean 'hf'?"),
        (
            ("quantize", "--checkpoint=x", "--output=y", "--scheme=gptq"),
            "--scheme=gptq is a method; use --method=gptq with a scheme, e.g. --scheme=int4",
        ),
        ((*CONVERT, "--input=x"), "error: --to is required; expected one of hf, gguf, peft"),
        (("generate", "--out_dir=x", "--prompt=a"), "unknown flag --out_dir; did you mean --checkpoint?"),
    ],
)
def test_flags_options_and_values_of_other_codebases(flags, message, capsys):
    name, *arguments = flags
    assert cli.call(importlib.import_module(f"llm_jax.{name}").COMMAND, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_names_of_commands_elsewhere(monkeypatch, capsys):
    assert set(commands.OTHER_NAMES.values()) <= set(commands.COMMANDS) and not set(commands.OTHER_NAMES) & set(
        commands.COMMANDS
    )
    monkeypatch.setattr("sys.argv", ["llm-jax", "sample"])
    with pytest.raises(SystemExit):
        commands.main()
    assert capsys.readouterr().err == "error: unknown command 'sample'; did you mean generate?\n"


def test_every_subcommand_has_a_purpose(capsys):
    for name in ("launch", "show"):
        command = importlib.import_module(f"llm_jax.{name}").COMMAND
        assert cli.call(command, ["--help"]) == 0
        lines = capsys.readouterr().out.splitlines()[2:]
        assert len(lines) == len(command) and all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize("name", ["~/lr=1,2", "s3://bucket/lr=1,2"])
def test_a_checkpoint_may_have_a_comma_in_its_name(name, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lr=1,2").mkdir()
    assert cli.call(importlib.import_module("llm_jax.evaluate").COMMAND, [f"--checkpoint={name}"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_no_other_value_hides_one_of_the_same_name():
    for value, meant in value_names.OTHER_VALUES.items():
        assert value not in meant and value == value.lower()
        assert value_names.suggestion(value.upper(), meant[:1]) == f"; did you mean '{meant[0]}'?"
    assert value_names.suggestion("zzz", ["text", ""]) == ""


def test_a_beginning_of_a_single_value_suggests_it():
    values = ["smollm2-135m-instruct", "tweets", "tweaks"]
    assert value_names.suggestion("SmolLM2", values) == "; did you mean 'smollm2-135m-instruct'?"
    assert value_names.suggestion("NF4", ["nf4", "nf4_double"]) == "; did you mean 'nf4'?"
    assert value_names.suggestion("q4_o", ["Q4_0", "Q8_0"]) == "; did you mean 'Q4_0'?"
    assert value_names.suggestion("twe", values) == value_names.suggestion("", values) == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DecodingOptions(do_sample=True), r"DecodingOptions\(\) .* 'do_sample'; did you mean temperature=0 "),
        (lambda: DecodingOptions(num_beams=4), "'num_beams'; did you mean beams?"),
        (lambda: DecodingOptions(min_new_tokens=4), "'min_new_tokens'; there is no smallest length"),
        (lambda: llm_jax.load("x", torch_dtype="auto"), r"load\(\) has no argument 'torch_dtype'; did you mean dtype?"),
        (lambda: llm_jax.load("x", device_map="auto"), "'device_map'; the model is placed on the default device"),
        (lambda: llm_jax.load("x", load_in_4bit=True), "'load_in_4bit'; python -m llm_jax.quantize --scheme=nf4"),
        (lambda: llm_jax.load("x", zzz=1), "'zzz'; expected name, scan_layers, dtype, as_stored, base, activations"),
        (lambda: complete(None, None, None, [], None, stopping=1), r"complete\(\) has no argument 'stopping'"),
        (lambda: complete(None, None, None, [], top_k=1), r"did you mean options=DecodingOptions\(top_k=...\)\?"),
        (lambda: complete(None, None, None, [], num_beams=1), r"did you mean options=DecodingOptions\(beams=...\)\?"),
        (lambda: complete(None, None, None, [], do_sample=False), r"DecodingOptions\(temperature=0\)\?"),
        (lambda: llm_jax.load("x", revision="main"), "'revision'; the main branch is taken"),
        (lambda: llm_jax.load("x", attn_implementation="sdpa"), "the attention kernel is chosen for the machine"),
        (lambda: llm_jax.load(pretrained_model_name_or_path="x"), "did you mean name?"),
        (
            lambda: llm_jax.config("tiny", learning_rate=1),
            r'did you mean llm_jax.config\(RECIPE, {"optim.lr": ...}\)\?',
        ),
        (lambda: llm_jax.config("tiny", bf16=True), '{"model.precision.compute": "bfloat16"}'),
        (lambda: llm_jax.config("tiny", packing=True), "'packing'; documents and examples are always packed"),
        (lambda: llm_jax.train("tiny", output_dir="x"), "did you mean workdir?"),
        (lambda: llm_jax.train("tiny", "x", model_name_or_path="y"), '{"init_from": ...}'),
    ],
)
def test_keyword_arguments_of_other_libraries(call, message):
    with pytest.raises(UserError, match=message):
        call()
    assert DecodingOptions(top_k=3) == DecodingOptions(top_k=3) != DecodingOptions()


def test_a_single_value_of_an_option_of_several():
    single = DecodingOptions(stop="\n", eos=2, logit_bias={3: -5.0})
    assert single == DecodingOptions(stop=("\n",), eos=[2], logit_bias=((3, -5.0),))
    single.check(9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AutoModelForCausalLM", "here it is llm_jax.load$"),
        ("pipeline", r"here it is llm_jax.decoding.complete.complete\("),
        ("complete", "here it is llm_jax.decoding.complete.complete$"),
        ("BitsAndBytesConfig", "here it is the option quant.scheme"),
        ("zzz", "module 'llm_jax' has no attribute 'zzz'$"),
    ],
)
def test_attributes_of_other_libraries(name, message):
    with pytest.raises(AttributeError, match=message):
        getattr(llm_jax, name)


@pytest.mark.parametrize(
    ("name", "cure"),
    [("eval", "not needed"), ("crop_block_size", "not needed"), ("to", "jax.device_put"), ("train", "not needed")],
)
def test_an_attribute_of_torch_modules_names_what_does_the_same(make, name, cure):
    with pytest.raises(AttributeError, match=f"Transformer has no attribute '{name}'; here it is {cure}"):
        getattr(make()[0], name)


def test_attributes_of_what_load_returns():
    loaded = Loaded(None, {}, HubTokenizer(forms.bytelevel_json(), {}))
    assert not hasattr(loaded, "zzz") and loaded._fields == ("model", "params", "tokenizer")
    with pytest.raises(AttributeError, match="no attribute 'save_pretrained'; here it is llm_jax.save"):
        loaded.save_pretrained("x")
    with pytest.raises(
        AttributeError, match="HubTokenizer has no attribute 'apply_chat_template'; here it is llm_jax."
    ):
        loaded.tokenizer.apply_chat_template([])
    with pytest.raises(TypeError, match=r"HubTokenizer is not callable; tokenizer.encode\(TEXT\) returns the ids"):
        loaded.tokenizer("a", return_tensors="np")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: t.encode("a", add_special_tokens=True),
            r"encode\(\) has no argument 'add_special_tokens'; encode adds",
        ),
        (lambda t: t.encode(["a", "b"]), "a text is a list; expected a str"),
        (
            lambda t: t.decode([1], skip_special_tokens=True),
            "'skip_special_tokens'; decode always omits special tokens",
        ),
        (lambda t: t.decode([[1, 2]]), "expected the ids of one text"),
        (lambda t: t.decode(np.ones((1, 2), np.int32)), "expected the ids of one text"),
        (lambda t: t.decode([-1]), "expected the ids of one text, a list of integers from 0"),
        (lambda t: llm_jax.apply_chat_template(t, [], tokenize=False), "'tokenize'; the result is a list of token ids"),
        (lambda t: llm_jax.apply_chat_template(t, "hello"), "messages: 'hello' is not a message; expected one convers"),
        (lambda t: llm_jax.apply_chat_template(t, [[{"role": "user"}]]), "is not a message; expected one conversation"),
        (lambda t: llm_jax.apply_chat_template(t, [{"from": "human", "value": "a"}]), "is not a message"),
    ],
)
def test_calls_of_tokenizers_of_transformers(call, message):
    with pytest.raises(UserError, match=message):
        call(HubTokenizer(forms.bytelevel_json(), {}))


@pytest.mark.parametrize(("kind", "size"), [("char", 40), ("byte", 0), ("word", 10)])
def test_calls_and_attributes_of_tokenizers(kind, size):
    tokenizer = tokenizers.get(kind).train(["the model reads the text " * 20], size)
    with pytest.raises(AttributeError, match="Tokenizer has no attribute 'stoi'; here it is tokenizer.encode"):
        _ = tokenizer.stoi
    with pytest.raises(TypeError, match=r"Tokenizer is not callable; tokenizer.encode\(TEXT\) returns the ids"):
        tokenizer("the")
    with pytest.raises(UserError, match="a text is a list; expected a str"):
        tokenizer.encode(["the", "model"])
    assert tokenizer.decode(copy.deepcopy(tokenizer).encode("the")) == "the"
    assert len(tokenizer) == tokenizer.vocab_size > 3


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ({}, {}),
        ({"bos_token_id": 1, "temperature": None, "top_p": 1.0, "top_k": 0, "do_sample": True}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 50, "epsilon_cutoff": 0.01}, {"top_k": 9, "epsilon": 0.01}),
        (
            {"do_sample": False, "temperature": 0.6, "top_k": 5, "repetition_penalty": 1.1},
            {"repetition_penalty": 1.1, "temperature": 0.0},
        ),
        ({"top_p": 2, "typical_p": 1.5, "epsilon_cutoff": 1, "eta_cutoff": -1, "no_repeat_ngram_size": -1}, {}),
        ({"top_p": 0.0, "min_p": 0.1}, {"min_p": 0.1, "top_k": 1}),
        ({"top_p": -0.5}, "--top_p=-0.5; expected a number in"),
        ({"top_k": -1, "top_p": 0.0}, "--top_k=-1; expected a number in"),
        ({"temperature": "hot"}, "the value of --temperature is 'hot'; expected a number"),
        ({"temperature": 10**400}, f"--temperature=1{36 * '0'}...; expected 0, or a magnitude"),
        ({"no_repeat_ngram_size": 10**400}, f"--no_repeat_ngram=1{36 * '0'}...; expected a number in"),
        ({"top_k": 1.5}, "the value of --top_k is 1.5; expected an integer"),
    ],
)
def test_sampling_options_of_generation_config(content, options):
    path = pathlib.Path("model/generation_config.json")
    if isinstance(options, str):
        with pytest.raises(UserError) as error:
            generation_config.sampling(content, 9, path)
        text = str(error.value)
        assert text.startswith(f"{path}: {options}") and "--temperature=1, which replaces" in text and "\n" not in text
    else:
        assert generation_config.sampling(content, 9, path) == options


def test_sampling_options_in_the_metadata_of_gguf_files():
    sampled = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    for content in ({}, sampled, {"do_sample": False, "repetition_penalty": 1.1}):
        metadata, lost = generation_config.to_gguf(content)
        assert generation_config.from_gguf(metadata) == content and not lost
    assert generation_config.to_gguf(sampled)[0]["general.sampling.penalty_last_n"] == -1
    wrong = {"top_k": 10**400, "top_p": 10**400, "min_p": "a", "typical_p": 0.5, "eos_token_id": 3}
    assert generation_config.to_gguf(wrong) == ({}, ["top_k", "top_p", "min_p", "typical_p"])


@pytest.mark.parametrize(
    ("key", "phrase"),
    {
        "data.formt": "did you mean 'data.format'?",
        "data.sorce": "did you mean 'data.source'?",
        "data.remat": "did you mean 'model.remat'?",  # the name of an option of another section
        "data.shape": "--help-config describes the options",
        "model.formatt": "did you mean 'data.format'?",
        "model.numheads": "did you mean 'model.num_heads'?",
        "modl.withd": "did you mean 'model.width'?",
    }.items(),
)
def test_suggestions_prefer_the_section(key, phrase):
    assert option_names.nearest(key) == phrase
