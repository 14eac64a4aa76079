#!/usr/bin/env bash
# Makes or updates the virtual environment of the Makefile, which sets PYTHON, VENV and TORCH.
#
# torch, in this order:
#   - the one that PYTHON can import, if it is 2.11 or newer: it is used as it is, and never replaced;
#   - what TORCH says, in pip's words: TORCH='torch==2.11.0', TORCH='torch --index-url https://...', a wheel file;
#   - the release below. On a Linux machine without an NVIDIA GPU its CPU build (200 MB), if pip's own indexes or
#     PyTorch's can be reached for one, else the usual build, which brings several GB of CUDA libraries along.
set -euo pipefail
cd "$(dirname "$0")/.."

release=2.13.0
triton=3.7.1 # what that release is built with; a CPU build of torch doesn't name one
cpu_index=https://download.pytorch.org/whl/cpu

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
venv_python=$VENV/bin/python

say() { printf '==> %s\n' "$*"; }
install() { # without a terminal pip's progress is noise; errors are printed all the same
  local quiet=-qq
  if [ -t 1 ]; then quiet=; fi
  "$venv_python" -m pip install $quiet --no-compile "$@" # compiled below, on all cores
}
has_torch() {
  "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null
}
has_gpu() { nvidia-smi -L >/dev/null 2>&1; }
pip_finds_cpu_build() {
  "$venv_python" -m pip install -qq --dry-run --no-deps --report - "torch==$release" | grep '"version": ".*+cpu"' >/dev/null
}

make_venv() {
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python 3.11 or newer is needed, $PYTHON is not: PYTHON=python3.12, say, chooses one"
    return 1
  }
  if has_torch "$PYTHON"; then
    say "virtual environment in $VENV, around the torch that $PYTHON has"
    "$PYTHON" -m venv --system-site-packages "$VENV" || return
    # Where PYTHON is itself of a virtual environment, the new one sees the base interpreter's packages only.
    has_torch "$venv_python" || "$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
      >"$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer-torch.pth"
  else
    say "virtual environment in $VENV"
    "$PYTHON" -m venv "$VENV"
  fi
}

install_torch() {
  if [ -n "${TORCH:-}" ]; then
    say "installing $TORCH"
    # shellcheck disable=SC2086 # it may hold options
    install $TORCH
  elif has_gpu || [ "$(uname -s)" != Linux ]; then
    say "installing torch $release"
    install "torch==$release"
  else
    say "installing torch $release for the CPU"
    if pip_finds_cpu_build; then
      install "torch==$release"
    elif ! install --retries 1 --index-url "$cpu_index" "torch==$release"; then
      say "no CPU build can be reached: installing the one with CUDA, several GB (TORCH=... chooses another)"
      install "torch==$release"
    fi
  fi
}

if [ ! -x "$venv_python" ]; then
  make_venv || { rm -rf "$VENV"; exit 1; } # a half-made environment would be taken for a whole one
fi
# Before anything that depends on torch, because pip would choose the newest.
has_torch "$venv_python" || install_torch
if [ "$(uname -s)" = Linux ] && ! "$venv_python" -c 'import triton' 2>/dev/null; then
  say "installing triton $triton"
  install "triton==$triton"
fi
say "installing dsv4_fusion[test]"
install -e ".[test]"
# pip would compile on one core, and the hundreds of models of transformers too
"$venv_python" -m compileall -q -j 0 -x 'transformers/models/(?!auto/|deepseek_v4/)' \
  "$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >/dev/null || true # templates among them

"$venv_python" - <<'END'
from importlib.metadata import distributions

versions = {d.name: d.version for d in distributions()}
names = ("torch", "triton", "tilelang", "nvidia-cutlass-dsl", "transformers")
print("==> ready:", ", ".join(f"{name} {versions[name]}" for name in names if name in versions))
END
