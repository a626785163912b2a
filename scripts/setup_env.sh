#!/bin/bash
# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

# Makes .venv, and leaves the caller in it. Sourced by the commands in this folder and by .ci/run; also runs alone.
# PYTHON names the interpreter to build from (default: python3), CXX the C++ compiler (default: g++).
# .venv/setup-stamp says what the environment was made from: without it the environment is half made and is made
# again; with another content it is brought up to date.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Where torch's CPU builds are, for machines whose own pip settings do not offer one.
TORCH_INDEX=https://download.pytorch.org/whl/cpu

die() {
    echo "set-up: $*" >&2
    exit 1
}

say() {
    echo "set-up: $*" >&2
}

pinned() { # NAME -> NAME==VERSION, from the constraints
    grep "^$1==" "$ROOT/scripts/constraints-cpu.txt"
}

logged() { # run a command, its output into the log
    echo "+ $*" >>"$ROOT/.venv.log"
    "$@" >>"$ROOT/.venv.log" 2>&1
}

step() { # WHAT COMMAND...: a logged command that must work
    say "$1"
    logged "${@:2}" || {
        tail -n 15 "$ROOT/.venv.log" | cut -c 1-300 | sed 's/^/    /' >&2
        die "failed while $1. The whole log: $ROOT/.venv.log"
    }
}

wanted_stamp() ( # in a subshell: the caller keeps its working directory
    echo "$ROOT"
    cd "$ROOT"
    sha256sum pyproject.toml scripts/constraints-cpu.txt scripts/setup_env.sh \
        torchtitan/experiments/rl/_import_hook/torchtitan_rl_unified.pth
)

is_current() {
    [[ -x $ROOT/.venv/bin/python && "$(cat "$ROOT/.venv/setup-stamp" 2>/dev/null)" == "$(wanted_stamp)" ]]
}

check_machine() { # what no package index can give
    local python="${PYTHON:-python3}" cxx="${CXX:-g++}" include
    command -v "$python" >/dev/null || die "there is no '$python': install Python 3.11, or name one with PYTHON=..."
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
        die "needs Python 3.11 or 3.12, but '$python' is $("$python" -V 2>&1): name another with PYTHON=..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "'$python' cannot make environments; on Debian and Ubuntu: apt-get install python3-venv"
    include="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
    echo '#include <Python.h>
          #include <omp.h>' | "$cxx" -fopenmp -x c++ -fsyntax-only -I "$include" - 2>/dev/null ||
        die "'$cxx' does not compile C++ against Python.h and omp.h, which kernels need at run time;" \
            "on Debian and Ubuntu: apt-get install g++ python3-dev (or name a compiler with CXX=...)"
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        die "vLLM needs libnuma.so.1; on Debian and Ubuntu: apt-get install libnuma1"
}

make_env() ( # in a subshell, whose end puts back what was there, if nothing stands in its place
    venv="$ROOT/.venv"
    old="$(head -n 1 "$venv/setup-stamp" 2>/dev/null || true)"
    if [[ $old && $old != "$ROOT" ]]; then # whole, and of another place
        rm -rf "$venv.old"
        mv "$venv" "$venv.old"
        trap '[[ -e $venv/setup-stamp ]] || { rm -rf "$venv"; mv "$venv.old" "$venv"; }' EXIT
    fi
    rm -f "$venv/setup-stamp"
    if [[ $old != "$ROOT" || ! -x $venv/bin/python ]]; then
        step "making $venv (once, a minute or two)" "${PYTHON:-python3}" -m venv --clear "$venv"
    fi
    pip=("$venv/bin/python" -m pip install --no-deps --no-compile --progress-bar off --disable-pip-version-check)
    uv=("$venv/bin/uv" pip install --python "$venv/bin/python" --no-deps)
    step "fetching uv" "${pip[@]}" "$(pinned uv)"
    say "fetching $(pinned torch)"
    logged "${pip[@]}" "$(pinned torch)" ||
        step "fetching torch from $TORCH_INDEX" "${pip[@]}" --index-url "$TORCH_INDEX" "$(pinned torch)"
    step "fetching the other packages" "${uv[@]}" -r "$ROOT/scripts/constraints-cpu.txt"
    step "installing this project" "${uv[@]}" --no-build-isolation --editable "$ROOT"
    wanted_stamp >"$venv/setup-stamp"
    rm -rf "$venv.old"
)

set_up() {
    is_current && return
    check_machine
    exec 9>>"$ROOT/.venv.log"
    flock -n 9 || {
        say "waiting for another set-up of $ROOT"
        flock 9
    }
    if ! is_current; then
        : >"$ROOT/.venv.log"
        make_env
        say "done in $SECONDS s"
    fi
    exec 9>&-
}

set_up
# Activation puts the environment's ninja on PATH, which torch needs to build C++ kernels.
source "$ROOT/.venv/bin/activate"
# A job starts several processes, and each would compile all that it imports: 28 s of processor time, not 11.
unset PYTHONDONTWRITEBYTECODE
