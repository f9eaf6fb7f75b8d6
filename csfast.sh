#!/bin/sh
# From a fresh clone to a running csfast: makes .venv, installs this tree into it, runs one command.
#
#   ./csfast.sh demo [options]     the main job on the embedded model
#   ./csfast.sh test [options]     the tests; options go to pytest
#
# Installs again only if a source file changed since.
set -eu

say() { printf 'csfast.sh: %s\n' "$*" >&2; }
usage() { printf 'usage: ./csfast.sh demo|test [options]\n' >&2; }

case "${1-}" in
  demo | test) verb=$1; shift ;;
  -h | --help) usage; exit 0 ;;
  *) usage; exit 2 ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv=$root/.venv

# What decides whether the installed package is the one of this tree.
stamp() {
  printf '%s\n' "$root" "${CSFAST_CUDA-}" "${CSFAST_WERROR-}" "${CSFAST_BENCH-}"
  cd "$root"
  find pyproject.toml CMakeLists.txt constraints cpp cuda python -type f \
    ! -path '*/__pycache__/*' ! -name '*.so' -exec cksum {} + | LC_ALL=C sort -k 3
}

find_python() {
  for name in python3.11 python3 python3.12 python3.13 python3.14 python; do
    if "$name" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "$name"
      return
    fi
  done
}

has_torch() {
  "$1" -c 'import torch; raise SystemExit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 6])' \
    2>/dev/null
}

# Names what is missing and the one command that brings it, all on one line.
check_prerequisites() {
  missing='' packages=''
  if [ -z "$python" ]; then
    missing='Python 3.11 or newer, ' packages='python3 python3-venv python3-dev '
  else
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
      { missing="the venv module of $python, " packages='python3-venv '; }
    "$python" -c 'import os, sysconfig
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
      { missing="${missing}the headers of $python, " packages="${packages}python3-dev "; }
  fi
  compiler=
  for name in "${CXX-}" c++ g++ clang++; do
    [ -z "$name" ] || ! command -v "${name%% *}" >/dev/null 2>&1 || compiler=$name
  done
  [ -n "$compiler" ] || { missing="${missing}a C++20 compiler, " packages="${packages}g++ "; }
  [ -z "$missing" ] || {
    say "missing: ${missing%, }. On Debian or Ubuntu: apt-get install -y ${packages% }"
    exit 1
  }
}

install() {
  python=$venv/bin/python
  "$python" -c '' 2>/dev/null || python=$(find_python)
  check_prerequisites
  say "installing into .venv: this takes a few minutes the first time"
  if [ "$python" != "$venv/bin/python" ]; then
    rm -rf "$venv"
    if has_torch "$python"; then
      "$python" -m venv --system-site-packages "$venv"
    else
      "$python" -m venv "$venv"
    fi
  fi
  # A torch that is there stays; a machine with a GPU takes the default one; others the CPU build.
  if has_torch "$venv/bin/python" || nvidia-smi >/dev/null 2>&1; then
    set -- "${root}[test]"
  else
    set -- -c "$root/constraints/cpu.txt" "${root}[test]"
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || {
    say "the installation failed, see above"
    exit 1
  }
}

want=$(stamp | cksum)
if [ "$want" != "$(cat "$venv/csfast-stamp" 2>/dev/null)" ]; then
  (install)
  printf '%s\n' "$want" >"$venv/csfast-stamp"
fi

case $verb in
  demo) exec "$venv/bin/python" -m csfast demo "$@" ;;
  test)
    # Tensors of tests are small: threads that wait for each other cost more than they bring, much
    # more on a busy machine. Tests of several threads ask for them.
    # Two processes halve the wait; more of them load torch and models more often than they gain.
    cd "$root" && OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$venv/bin/python" -m pytest -n 2 "$@"
    ;;
esac
