"""The distribution as a user installs it: what it carries, and that it works outside the repository."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

NOTEBOOK = """
import llm_jax
from llm_jax.decoding.complete import complete
from llm_jax.decoding.options import DecodingOptions

config = llm_jax.config("default", {
    "data.source": "words.txt", "tokenizer.kind": "byte", "train.steps": 3, "train.batch_size": 4, "train.seq_len": 32,
    "model.width": 32, "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 2, "model.mlp_dim": 48,
    "eval.rows": 4, "eval.prompts": (),
})
summary = llm_jax.train(config, "runs/notebook")
model, params, tokenizer = llm_jax.load("runs/notebook")
[[completion]] = complete(model, params, tokenizer, ["the "], DecodingOptions(max_new_tokens=4))
"""
CHECKS = """
import pathlib, sys
assert pathlib.Path(llm_jax.__file__).is_relative_to(sys.prefix), llm_jax.__file__
assert summary["steps"] == 3 and summary["validation_loss"] > 0, summary
assert 0 < len(completion.text) <= 4, completion  # a token is a byte
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = directory.glob("*.tar.gz")
    return path


def build_wheel(sdist, directory, **variables):
    """The wheel, built from the sdist as an index would offer it, and what the build prints."""
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    build = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(directory), str(sdist)]
    done = subprocess.run(
        build, cwd=directory, env=os.environ | variables, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    (path,) = directory.glob("*.whl")
    return path, done.stdout.decode()


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    return build_wheel(sdist, tmp_path_factory.mktemp("dist"))[0]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter in which the wheel is installed, beside the packages of this environment."""
    environment = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "zz_dependencies.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


def execute(program, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([*map(str, program)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_carries_the_recipes_and_the_marker_of_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {name.removeprefix("llm_jax/configs/") for name in names if name.startswith("llm_jax/configs/")} == recipes
    assert "llm_jax/py.typed" in names and "llm_jax/kernels/cpu/quantized_product.cc" in names
    assert {"llm_jax/py.typed", "llm_jax/research/page.css", "llm_jax/research/page.js"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"llm_jax"}


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler is installed")
def test_the_kernels_of_the_wheel_need_neither_a_compiler_nor_a_cache(wheel, python, tmp_path):
    assert wheel.name.endswith(f"-py3-none-{platform.system().lower()}_{platform.machine()}.whl")
    without = {"CXX": "no-compiler", "LLM_JAX_CACHE": str(tmp_path / "cache")}
    command = [python, "-m", "llm_jax.kernels", "--inputs=64", "--outputs=64"]
    lines = execute(command, tmp_path, **without).splitlines()
    (library,) = (line for line in lines if line.startswith("kernels "))
    assert "/llm_jax/kernels/prebuilt/kernels-" in library and "self-test passed" in lines
    assert not (tmp_path / "cache" / "kernels").exists()


@pytest.mark.parametrize("variable", [{"CXX": "no-compiler"}, {"LLM_JAX_KERNELS": "xla"}])
def test_a_wheel_without_kernels_is_for_any_platform_and_one_line_says_so(sdist, tmp_path, variable):
    path, printed = build_wheel(sdist, tmp_path, **variable)
    (line,) = (line.strip() for line in printed.splitlines() if "carries no compiled kernels" in line)
    reason = {"CXX": "no C++ compiler was found (no-compiler)", "LLM_JAX_KERNELS": "LLM_JAX_KERNELS=xla"}
    assert path.name.endswith("-py3-none-any.whl") and reason[next(iter(variable))] in line
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]


def test_recipes_are_read_from_any_directory(python, tmp_path):
    program = "import llm_jax; print(llm_jax.config('default').model.width)"
    width = execute([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"], tmp_path)
    assert execute([python, "-c", program], tmp_path) == width


def test_the_command_lists_the_commands(python, tmp_path):
    listing = execute([python.with_name("llm-jax"), "--help"], tmp_path)
    assert "train" in listing and "generate" in listing


def test_the_command_trains_a_recipe_outside_the_repository(python, tmp_path):
    flags = ("--config=default", "--workdir=runs/x", "--dry_run", "--config.data.cache_dir=cache")
    assert "layers/0:4" in execute([python.with_name("llm-jax"), "train", *flags], tmp_path)


def test_a_notebook_trains_and_generates(python, tmp_path, text_file):
    (tmp_path / "words.txt").write_bytes(text_file.read_bytes())
    execute([python, "-c", NOTEBOOK + CHECKS], tmp_path)


def test_a_script_above_a_clone_imports_the_package_and_not_the_folder(tmp_path):
    """The clone is a folder llm_jax with the package llm_jax in it; launch.sh adds the clone to the path of .venv."""
    (tmp_path / "llm_jax").symlink_to(ROOT)
    (tmp_path / "script.py").write_text(
        "import sys; sys.path.append(sys.argv[1])\nimport llm_jax; print(llm_jax.__file__)"
    )
    # -S: without the line that launch.sh added to this environment.
    imported = execute([sys.executable, "-S", "script.py", tmp_path / "llm_jax"], tmp_path)
    assert imported.strip() == str(tmp_path / "llm_jax" / "llm_jax" / "__init__.py")
