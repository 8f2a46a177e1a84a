"""`open` for every form of checkpoint: class, config, tokenizer, parameters, errors; round trips of `save`."""

import dataclasses
import functools
import itertools
import json
import pathlib
import pickle
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library

import llm_jax
from llm_jax import checkpoints, configuration, lora, tokenizers, trees, weights
from llm_jax.checkpoints import manifest, opening, peft_config, peft_tensors
from llm_jax.checkpoints.checkpoint import on_default_device
from llm_jax.errors import UserError
from llm_jax.quant import post_training
from llm_jax.tokenizers.byte import ByteTokenizer
from tests.lora.cases import config as lora_config
from tests.lora.cases import made as make_adapters

FORMS = {
    "run": checkpoints.Run,
    "adapters": checkpoints.Adapters,
    "huggingface": checkpoints.HuggingFace,
    "gguf": checkpoints.Gguf,
    "peft": checkpoints.Peft,
}


@pytest.fixture(scope="module")
def audited():
    """`with audited as events` collects what is reported to the hook of Python, which cannot be removed."""
    audit = Audit()
    sys.addaudithook(audit.hook)
    return audit


class Audit:
    """Records what unpickles or starts a program."""

    EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")

    def __init__(self):
        self.events, self.on = [], False

    def hook(self, event, arguments):
        if self.on and event in self.EVENTS:
            self.events.append((event, arguments))

    def __enter__(self):
        self.events, self.on = [], True
        return self.events

    def __exit__(self, *error):
        self.on = False


@pytest.mark.parametrize("form", FORMS)
def test_loading_runs_no_code(paths, form, audited):
    with audited as events:
        llm_jax.load(paths[form])
    assert events == []
    with audited as events:
        pickle.loads(pickle.dumps(pathlib.PurePosixPath("a")))
    assert events[0][0] == "pickle.find_class"


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_each_form_offers_what_load_gives(paths, form):
    checkpoint = llm_jax.open(paths[form])
    assert type(checkpoint) is FORMS[form] and checkpoint.form == form
    loaded = llm_jax.load(paths[form])
    assert dataclasses.replace(checkpoint.config, scan_layers=False) == loaded.model.config
    assert tokenizers.digest(checkpoint.tokenizer) == tokenizers.digest(loaded.tokenizer)
    params = checkpoint.params(loaded.model.config, on_default_device)
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)
    assert checkpoint.family == "llama" and llm_jax.open(checkpoint.name).path == checkpoint.path
    assert (checkpoint.run_config is not None) == (form in ("run", "adapters"))
    assert (checkpoint.base is not None) == (form in ("adapters", "peft"))
    stacked = dataclasses.replace(loaded.model.config, scan_layers=True)
    again = checkpoint.params(stacked, on_default_device)
    assert "layers/0:2/0::1/mlp/up" in trees.flatten(again)
    assert trees.fingerprint(again) == trees.fingerprint(params)


@pytest.mark.parametrize("form", FORMS)
def test_identity_tells_a_checkpoint_from_a_changed_one(paths, form, tmp_path):
    before = llm_jax.open(paths[form])
    assert before.identity == llm_jax.open(paths[form]).identity
    copy = tmp_path / before.path.name
    (shutil.copytree if before.path.is_dir() else shutil.copy)(before.path, copy)
    if form in ("run", "adapters"):
        assert llm_jax.open(copy).identity == before.identity  # the hashes of the files, wherever they are
        (copy / "manifest.json").write_text(before.identity.replace("0", "1"))
    else:
        file = copy if copy.is_file() else copy / "config.json" if form == "huggingface" else copy / peft_config.CONFIG
        file.write_bytes(file.read_bytes() + b"\n")
    assert llm_jax.open(copy).identity != before.identity


@pytest.mark.parametrize("form", ["adapters", "peft"])
def test_adapters_are_separated_from_their_base_and_are_no_start_of_training(paths, form):
    base, (adapters,) = checkpoints.load_separately(paths[form])
    jax.tree.map(np.testing.assert_array_equal, base.params, llm_jax.load(paths["huggingface"]).params)
    attached = lora.attach(base.params, adapters)
    jax.tree.map(np.testing.assert_array_equal, attached, llm_jax.load(paths[form]).params)
    with pytest.raises(UserError, match="holds adapters; merge them first"):
        checkpoints.open_base(paths[form])


@pytest.mark.parametrize("form", ["adapters", "peft"])
def test_a_base_that_has_moved_with_its_adapters_is_found_or_given(paths, tmp_path, form, capsys):
    """Both are copied to another place, where the recorded path does not exist."""
    expected = llm_jax.load(paths[form]).params
    moved = tmp_path / "a" / form
    shutil.copytree(paths[form], moved)
    original = llm_jax.open(moved)
    recorded = moved / "adapter_config.json" if form == "peft" else original.path / "record.json"
    gone = "/content/drive/models/huggingface"
    if form == "peft":
        edit(recorded, base_model_name_or_path=gone)
    else:
        record = json.loads(recorded.read_text())
        edit(recorded, base=record["base"] | {"path": gone})
        manifest.write_manifest(original.path)
    with pytest.raises(UserError, match=f"{gone} does not exist, and .*; give its path with --base=PATH"):
        llm_jax.load(moved)
    jax.tree.map(np.testing.assert_array_equal, llm_jax.load(moved, base=paths["huggingface"]).params, expected)
    assert capsys.readouterr().err == ""
    shutil.copytree(paths["huggingface"], tmp_path / "huggingface")
    jax.tree.map(np.testing.assert_array_equal, llm_jax.load(moved).params, expected)
    assert f"note: {gone} does not exist; the base is {tmp_path / 'huggingface'}" in capsys.readouterr().err
    if form == "adapters":  # whatever is found must be the same base
        model, params, tokenizer = llm_jax.load(paths["huggingface"])
        shutil.rmtree(tmp_path / "huggingface")
        llm_jax.save(model, jax.tree.map(lambda w: w + 1, params), tokenizer, tmp_path / "huggingface")
        with pytest.raises(UserError, match="its adapters are for the base of sha256"):
            llm_jax.load(moved)


def test_bases_are_searched_for_beside_their_adapters(tmp_path, monkeypatch):
    for name in ("base", "models/base", "run/checkpoints/400", "out/adapter"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("base", "models/base", "out"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "out" / "tiny.gguf").touch()
    adapter = tmp_path / "out" / "adapter"
    for recorded, expected in {
        str(tmp_path / "base"): tmp_path / "base",
        "../../base": adapter / ".." / ".." / "base",  # relative to the adapters
        "/gone/base": tmp_path / "base",
        "/gone/models/base": tmp_path / "models" / "base",  # the longest end of the path
        "D:\\work\\models\\base": tmp_path / "models" / "base",
        "org/base": tmp_path / "base",
        "/gone/tiny.gguf": tmp_path / "out" / "tiny.gguf",
        "/gone/run/checkpoints/400": tmp_path / "run" / "checkpoints" / "400",
        "hf:org/base": "hf:org/base",
        "/gone/other": "",
        "/gone/400": "",
        "/gone/adapter": "",
    }.items():
        if recorded.endswith("400"):
            (tmp_path / "run" / "checkpoints" / "400" / "record.json").touch()
        assert opening.find_base(recorded, adapter) == str(expected), recorded
    monkeypatch.chdir(tmp_path)
    assert opening.find_base("base", adapter) == "base"


def test_adapters_name_what_is_missing(paths, tmp_path):
    copy = tmp_path / "several" / "first"
    shutil.copytree(paths["peft"], copy)
    with pytest.raises(UserError, match="several: holds adapters in subdirectories; give one of them: first"):
        llm_jax.open(tmp_path / "several")
    edit(copy / peft_config.CONFIG, base_model_name_or_path=None)
    with pytest.raises(UserError, match="has no base_model_name_or_path; give its path with --base=PATH"):
        llm_jax.load(copy)
    with pytest.raises(
        UserError, match="save: expected model, params, tokenizer and path, or the result of llm_jax.lo"
    ):
        llm_jax.save(*llm_jax.load(paths["run"])[:2], copy)
    edit(copy / peft_config.CONFIG, base_model_name_or_path="org/unknown")
    with pytest.raises(UserError, match="hf:org/unknown .*; give its path with --base=PATH"):
        llm_jax.load(copy)
    with pytest.raises(UserError, match="--base=x names the base of adapters; .* has no adapters"):
        llm_jax.load(paths["run"], base="x")


def test_the_tokenizer_beside_adapters_of_peft_counts(paths, vocabulary, tmp_path):
    base, adapters = tmp_path / "huggingface", tmp_path / "peft"
    shutil.copytree(paths["huggingface"], base)
    shutil.copytree(paths["peft"], adapters)
    edit(adapters / peft_config.CONFIG, base_model_name_or_path="../huggingface")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert tokenizers.digest(llm_jax.open(adapters).tokenizer) == tokenizers.digest(llm_jax.open(base).tokenizer)
    for name, content in vocabulary.files().items():
        (adapters / name).write_bytes(content)
    edit(adapters / "tokenizer_config.json", chat_template="other")
    tokenizer = llm_jax.open(adapters).tokenizer
    assert tokenizer.special["chat_template"] == "other" != vocabulary.special["chat_template"]
    assert {5, 6} <= {*tokenizers.eos_ids(tokenizer)}
    truncate(adapters / "tokenizer.json")
    with pytest.raises(UserError, match="peft: the tokenizer cannot be read"):
        llm_jax.load(adapters)
    words = library.Tokenizer(library.models.WordLevel({f"w{i}": i for i in range(999)}, "w0"))
    tokenizers.save(type(vocabulary)(words.to_str(), {}), adapters / "tokenizer")
    with pytest.raises(UserError, match="peft over .*huggingface: the tokenizer has 999 ids, the model only"):
        llm_jax.load(adapters)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


GARBAGE = [
    *((form, "empty", lambda p: [shutil.rmtree(p), p.mkdir()], "expected a run") for form in FORMS if form != "gguf"),
    ("gguf", "empty", lambda p: p.write_bytes(b""), "not a GGUF file"),
    ("run", "cut arrays", lambda p: truncate(largest(p)), "is damaged"),
    ("run", "cut config", lambda p: truncate(p / "config.json"), "damaged, not JSON"),
    ("run", "list as config", lambda p: edit(p / "config.json", model=[]), "config.json: "),
    ("run", "text as record", lambda p: (p / "record.json").write_text('"x"'), "'record.json' is damaged"),
    ("run", "list as manifest", lambda p: (p / "manifest.json").write_text("[]\n"), "'manifest.json' is damaged"),
    ("run", "no tokenizer", lambda p: shutil.rmtree(p / "tokenizer"), "no readable tokenizer"),
    ("adapters", "cut arrays", lambda p: truncate(largest(p)), "is damaged"),
    ("adapters", "number as rank", lambda p: edit(p / "config.json", lora=3), "config.json: "),
    ("adapters", "no base", lambda p: edit(p / "record.json", base=None), "is damaged"),
    ("huggingface", "cut tensors", lambda p: truncate(p / "model.safetensors"), "not a whole safetensors file"),
    ("huggingface", "cut config", lambda p: truncate(p / "config.json"), "config.json: cannot be read"),
    ("huggingface", "list as config", lambda p: (p / "config.json").write_text("[]"), "cannot be read .not an object"),
    ("huggingface", "text as width", lambda p: edit(p / "config.json", hidden_size="wide"), "'model.width' is 'wide'"),
    ("huggingface", "list as heads", lambda p: edit(p / "config.json", num_attention_heads=[]), "num_heads' is "),
    ("huggingface", "cut tokenizer", lambda p: truncate(p / "tokenizer.json"), "the tokenizer cannot be read"),
    ("gguf", "cut header", lambda p: p.write_bytes(p.read_bytes()[:500]), "goes past the end|cannot be in"),
    ("gguf", "cut tensors", lambda p: p.write_bytes(p.read_bytes()[:-900]), "goes past the end"),
    ("gguf", "text", lambda p: p.write_text("a model, honestly"), "not a GGUF file"),
    ("peft", "cut tensors", lambda p: truncate(p / peft_tensors.TENSORS), "not a whole safetensors file"),
    ("peft", "cut config", lambda p: truncate(p / peft_config.CONFIG), "damaged, not JSON"),
    ("peft", "list as config", lambda p: (p / peft_config.CONFIG).write_text("[]"), "expected 'LORA'"),
    ("peft", "number as base", lambda p: edit(p / peft_config.CONFIG, base_model_name_or_path=3), "name_or_path is 3"),
    (
        "peft",
        "text as rank",
        lambda p: edit(p / peft_config.CONFIG, r="many"),
        "r is 'many'; expected a positive number",
    ),
    ("peft", "list as pattern", lambda p: edit(p / peft_config.CONFIG, rank_pattern=[1]), "rank_pattern is"),
]


@pytest.mark.parametrize(("form", "damage", "message"), [(f, d, m) for f, _, d, m in GARBAGE], ids=[
    f"{form}-{name}" for form, name, _, _ in GARBAGE
])  # fmt: skip
def test_garbage_is_refused_in_one_line(paths, tmp_path, form, damage, message):
    original = llm_jax.open(paths[form]).path
    copy = tmp_path / original.name
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        llm_jax.load(copy)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@functools.partial(jax.jit, static_argnums=0)  # what is saved with and without a scan shares its programs
def logits(model, params, ids):
    return model.apply({"params": params}, ids)


def quantized(params):
    return post_training.quantize_params(params, post_training.rules("int4:16", "int8"), "here")


def mixed(params):
    """Layers of different kinds."""
    return post_training.quantize_params(params, post_training.rules("", "", ((r"layers/0/mlp/.*", "int8"),)), "here")


def adapted(params, tiny):
    return lora.attach(params, make_adapters(params, lora_config(tiny, rank=2)))


@pytest.mark.parametrize(
    ("kind", "scan_layers"),
    [*itertools.product(("dense", "bfloat16", "quantized", "adapted"), (False, True)), ("mixed", False)],
)
def test_what_is_saved_is_loaded(make, tiny, tmp_path, kind, scan_layers):
    model, params = make(scan_layers=scan_layers)
    change = {
        "dense": lambda p: p,
        "bfloat16": lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p),
        "quantized": quantized,
        "mixed": mixed,
        "adapted": lambda p: adapted(p, tiny),
    }[kind]
    params = change(params)
    llm_jax.save(model, params, ByteTokenizer(), tmp_path / "saved")
    loaded = llm_jax.load(tmp_path / "saved", scan_layers=scan_layers)
    assert loaded.model.config == model.config and loaded.tokenizer.kind == "byte"
    in_rows = weights.in_rows(loaded.params)
    assert trees.describe(in_rows) == trees.describe(params)
    jax.tree.map(np.testing.assert_array_equal, in_rows, params)
    other = llm_jax.load(tmp_path / "saved", scan_layers=not scan_layers)
    assert trees.fingerprint(weights.in_rows(other.params)) == trees.fingerprint(params)
    ids = jnp.ones((1, 5), int)
    assert other.model.config.scan_layers == (not scan_layers and kind != "mixed")
    both = [logits(one.model, one.params, ids) for one in (loaded, other)]
    np.testing.assert_allclose(*both, atol=2e-5 if kind != "bfloat16" else 0.1)
    assert configuration.load(tmp_path / "saved").model == model.config
    with pytest.raises(UserError, match="already exists; choose another path"):
        llm_jax.save(model, params, ByteTokenizer(), tmp_path / "saved")


def test_parameters_of_another_model_are_not_saved(make, tmp_path):
    _, params = make(mlp_dim=80)
    other, _ = make()
    with pytest.raises(UserError, match="!layers/0/mlp/down is"):
        llm_jax.save(other, params, ByteTokenizer(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_older_records_name_the_skipped_batches_otherwise(paths, tmp_path):
    shutil.copytree(paths["run"], tmp_path / "run")
    directory = checkpoints.find(tmp_path / "run")
    record = json.loads((directory / "record.json").read_text())
    del record["skipped_batches"]
    from llm_jax.checkpoints.manifest import write_manifest

    (directory / "record.json").write_text(json.dumps(record | {"jumped": 7}))
    write_manifest(directory)
    assert checkpoints.verify(directory)["skipped_batches"] == 7


@pytest.mark.parametrize(("name", "hint"), [("gpt2", True), ("gpt2-org/gpt2", True), ("tests/gpt2", False)])
def test_a_name_that_may_be_of_the_hub_is_answered_with_its_form(name, hint):
    with pytest.raises(UserError, match=f"{name}: no such directory") as error:
        checkpoints.open(name)
    assert (f"a model of the Hugging Face hub is hf:{name}" in str(error.value)) == hint


def test_the_address_of_a_model_on_the_hub_suggests_its_name():
    with pytest.raises(UserError, match="a model of the Hugging Face hub is hf:org/name$"):
        llm_jax.open("https://huggingface.co/org/name/tree/main")
