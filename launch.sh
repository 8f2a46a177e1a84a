#!/usr/bin/env bash
# ./launch.sh [FLAGS]   set up .venv and train, evaluate and sample the default model (CPU, a few minutes);
#                       flags go to the trainer, e.g. --config.train.seed=1
# ./launch.sh test      set up .venv and run the tests
# ./launch.sh processes N [FLAGS]   the same training as N connected processes on this machine (CPU)
# ./launch.sh slurm|k8s|tpu [OPTIONS] -- COMMAND [FLAGS]   a command of llm_jax on a cluster (docs/how_to/launch.md)
# PYTHON=/path/python3  chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")"
unset PYTHONDONTWRITEBYTECODE # without bytecode each process would compile all that it imports, which takes seconds

usable() { # the version of an interpreter that starts, is 3.11 or newer and can make environments
  "$1" -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11); print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

setup() { # setup NAME REQUIREMENTS...: .venv with these installed, made anew when they change
  local stamp
  stamp=$(cat "$@" | cksum)
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c '' 2>/dev/null; then
    local python="" version=""
    for name in ${PYTHON:-python3.15 python3.14 python3.13 python3.12 python3.11 python3}; do
      if version=$(usable "$name"); then python=$name; break; fi
    done
    if [ -z "$python" ]; then
      echo "error: no usable Python 3.11 or newer (with venv) among ${PYTHON:-python3.15 ... python3.11 python3}; install one or set PYTHON" >&2
      exit 2
    fi
    echo "using $(command -v "$python") (Python $version)"
    rm -rf .venv
    "$python" -m venv .venv
  fi
  if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
    echo "installing $*"
    local files=()
    for file in "$@"; do files+=(-r "$file"); done
    # Most modules are never imported: Python compiles those that are at their first import.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "${files[@]}"
    # Scripts in any directory import the package, also in the one above a clone that is called llm_jax.
    pwd > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_jax_clone.pth"
    echo "$stamp" > .venv/installed
  fi
}

defaults() { # defaults WORKDIR FLAGS...: in flags, what the default run has and FLAGS do not set
  local given=" ${*:2} "
  flags=()
  [[ $given == *" --workdir"* ]] || flags+=("--workdir=$1")
  [[ $given == *" --config="* || $given == *" --config "* ]] && return
  flags+=(--config=configs/default.py)
  local key
  for key in model.scan_layers model.precision.compute; do # "auto": what trains fastest on this machine
    [[ $given == *" --config.$key"* ]] || flags+=("--config.$key=auto")
  done
}

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^# /s/^# //p}' launch.sh
    echo "The FLAGS: .venv/bin/python -m llm_jax.train --help"
    ;;
  "" | --*)
    [ -f .venv/tests ] && setup requirements.txt requirements-test.txt || setup requirements.txt
    defaults runs/default "$@"
    exec .venv/bin/python -m llm_jax.train "${flags[@]}" "$@"
    ;;
  processes)
    if ! [[ "${2:-}" =~ ^[1-9][0-9]*$ ]]; then
      echo "error: processes '${2:-}'; expected the number of processes, such as ./launch.sh processes 2" >&2
      exit 2
    fi
    count=$2
    shift 2
    [ -f .venv/tests ] && setup requirements.txt requirements-test.txt || setup requirements.txt
    defaults runs/processes "$@"
    exec .venv/bin/python -m llm_jax.parallel.launcher "$count" llm_jax.train "${flags[@]}" "$@"
    ;;
  slurm | k8s | tpu) # one of these, its options, -- and a command with its flags
    [ -f .venv/tests ] && setup requirements.txt requirements-test.txt || setup requirements.txt
    exec .venv/bin/python -m llm_jax.launch "$@"
    ;;
  test)
    shift
    setup requirements.txt requirements-test.txt
    touch .venv/tests
    exec .venv/bin/python -m pytest -q -m "not slow and not live" -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  *)
    echo "error: unknown job '$1'; expected nothing, test, processes, slurm, k8s, tpu, or --flags of the trainer" >&2
    exit 2
    ;;
esac
