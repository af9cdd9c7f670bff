#!/usr/bin/env bash
# Set up PriorZero-ORZ and launch it. `./run_priorzero_orz.sh help` tells how.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: ./run_priorzero_orz.sh MODE [arguments]

  debug   a short run with small models, to see everything work
  train   a full run
  eval    evaluate the latest checkpoint of an experiment
  warmup  fine-tune an LLM to walkthroughs of games it will not be judged on: warmup --out FOLDER
  export  write the trained LLM of an experiment as a Hugging Face folder: export RUN OUT
  export-samples
          write what its LLM learns from as data of TRL or verl: export-samples RUN OUT --format trl|verl
  worker  join this machine to a Ray cluster for collector workers (docs/COLLECTORS.md): worker head on the
          first one, worker HEAD:6379 on the others
  test    the tests, on up to four cores (arguments go to pytest in place of that)
  check   report what this machine has: Python, torch, CUDA, vLLM, ORZ, games, models, memory, disk
  help    this text

One process per GPU trains a world model together under torchrun: docs/TORCHRUN.md has the command.

Every mode first makes .venv with Python 3.11 and installs the pinned packages, unless that is done already.
It runs in the project's folder: relative paths in arguments are read from there.

Environment:
  PRIORZERO_PYTHON       the Python 3.11 to make .venv with
  PRIORZERO_DEVICE       cpu or cuda: which packages to install (default: cuda where nvidia-smi answers)
  PRIORZERO_TORCH_INDEX  URL of an additional package index, for a CPU build of torch (see requirements/README.md)
  PRIORZERO_GAMES        folder with story files
TEXT
}

say() { printf '[priorzero] %s\n' "$*" >&2; }

die() {
    printf '[priorzero] error: %s\n' "$*" >&2
    exit 1
}

# Whether $1 is a Python 3.11 that can make a virtual environment with pip in it.
is_python_311() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1
}

# Print the command of a Python 3.11.
find_python() {
    local candidate
    if [[ -n ${PRIORZERO_PYTHON:-} ]]; then
        is_python_311 "$PRIORZERO_PYTHON" ||
            die "PRIORZERO_PYTHON=$PRIORZERO_PYTHON is not a Python 3.11 with its modules venv and ensurepip."
        printf '%s\n' "$PRIORZERO_PYTHON"
        return
    fi
    for candidate in python3.11 python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.11*/bin/python3.11; do
        if is_python_311 "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 found (looked for python3.11, python3, python and pyenv's versions).
  Why 3.11: LightZero, the base of the tree search, has compiled packages for no newer Python.
  Ways out:
    Debian, Ubuntu:  apt install python3.11 python3.11-venv
    pyenv:           pyenv install 3.11
    conda:           conda create -n py311 python=3.11
    uv:              uv python install 3.11
  Then start again; if it is still not found, name it: PRIORZERO_PYTHON=/path/to/python3.11 $0 ..."
}

# Print cpu or cuda.
find_device() {
    case ${PRIORZERO_DEVICE:-auto} in
        cpu | cuda) printf '%s\n' "$PRIORZERO_DEVICE" ;;
        auto) if nvidia-smi -L >/dev/null 2>&1; then printf 'cuda\n'; else printf 'cpu\n'; fi ;;
        *) die "PRIORZERO_DEVICE=$PRIORZERO_DEVICE is unknown; use cpu or cuda, or leave it unset." ;;
    esac
}

# Make .venv where it is missing. $1: device. The CPU and CUDA packages cannot share one (both bring a module vllm).
make_venv() {
    local device=$1 built_for=""
    [[ -f $venv/.priorzero-device ]] && built_for=$(<"$venv/.priorzero-device")
    if [[ -n $built_for && $built_for != "$device" ]]; then
        say ".venv holds the $built_for packages; making it anew for $device"
        base_python=$(find_python)
        "$base_python" -m venv --clear "$venv"
    elif [[ -e $venv ]]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then
            die "$venv has no working Python 3.11 in it. Remove that folder and start again."
        fi
    fi
    # An interrupted start may have left a .venv without pip: making it again completes it.
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base_python=$(find_python)
        say "making .venv with $("$base_python" --version 2>&1)"
        "$base_python" -m venv "$venv"
    fi
    printf '%s\n' "$device" >"$venv/.priorzero-device"
}

# Install the lock of device $1, unless the stamp says that it is installed already.
install_lock() {
    local device=$1 lock=requirements/$1.lock stamp=$venv/.priorzero-lock wanted
    local failed="the install of $lock failed; pip says above why. Starting again resumes it."
    local index=()
    [[ -f $lock ]] || die "$root/$lock is missing; the checkout is incomplete."
    [[ -n ${PRIORZERO_TORCH_INDEX:-} ]] && index=(--extra-index-url "$PRIORZERO_TORCH_INDEX")
    wanted="$device $(cksum <"$lock")"
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    # Without a stamp while it works: an interrupted install starts over.
    rm -f "$stamp"
    say "installing the packages of $lock (some minutes the first time)"
    "$python" -m pip install --quiet --no-deps ${index[@]+"${index[@]}"} -r "$lock" || die "$failed"
    # Nothing to do for a CPU build of torch; a CUDA build gets the libraries that the CPU lock does not name.
    "$python" -m pip install --quiet ${index[@]+"${index[@]}"} -c "$lock" -r <(grep '^torch==' "$lock") ||
        die "$failed"
    printf '%s\n' "$wanted" >"$stamp"
    say "packages installed"
}

mode=${1:-help}
(($# == 0)) || shift
case $mode in
    debug | train | eval | warmup | export | export-samples | worker | test | check) ;;
    help | -h | --help) usage && exit 0 ;;
    *) usage >&2 && die "mode '$mode' is unknown." ;;
esac

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd -- "$root"
venv=$root/.venv
python=$venv/bin/python
device=$(find_device)
make_venv "$device"
install_lock "$device"

# exec: signals reach Python, which finishes its step and saves.
case $mode in
    debug) DEBUG_MODE=True exec "$python" -m priorzero_orz_entry "$@" ;;
    train) exec "$python" -m priorzero_orz_entry "$@" ;;
    eval) exec "$python" -m priorzero_orz_entry --eval-only "$@" ;;
    warmup) exec "$python" -m priorzero.warmup "$@" ;;
    export) exec "$python" -m priorzero.export "$@" ;;
    export-samples) exec "$python" -m priorzero.export_samples "$@" ;;
    worker)
        ray=$venv/bin/ray
        [[ -x $ray ]] || die "Ray is not installed: .venv/bin/pip install --no-deps -r requirements/ray.lock"
        (($# > 0)) || die "worker needs a place: head, or HOST:PORT of the head."
        place=(--head)
        [[ $1 == head ]] || place=("--address=$1")
        # What Ray starts here finds the project, and the games of this machine.
        PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$ray" start "${place[@]}" --block "${@:2}"
        ;;
    test)
        # A worker per core, of which each has one thread: two files at a time on two cores.
        if (($# == 0)); then
            set -- -q -n logical --maxprocesses 4 --dist loadfile
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        fi
        exec "$python" -m pytest "$@"
        ;;
    check) exec "$python" -m priorzero.run.check "$@" ;;
esac
