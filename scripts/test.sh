#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: scripts/test.sh [OPTION...]

Installs the package into .venv, then lints and type-checks it, builds the CUDA kernels and the
TensorRT plugin for two GPU generations (which needs no GPU) and tests all.
OPTIONs are pytest's, for example: scripts/test.sh -k imports
USAGE
  exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
ensure_venv
ensure_test_tools

# A process of pytest per core, and one thread in each: the tests' tensors are tiny.
processes=$(nproc)
export OMP_NUM_THREADS=1
# Tests never ask a network for a model, and fork after tokenizers may have started threads.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

check() {
  echo "== $*"
  .venv/bin/python -m "$@"
}
check ruff check .
check ruff format --check .
check mypy
echo "== clang-format"
find plugins tests -regex '.*\.\(h\|hpp\|cuh\|cpp\|cu\)' -print0 |
  xargs -0 .venv/bin/clang-format --dry-run -Werror
echo "== scripts/build_kernels.sh"
scripts/build_kernels.sh
check pytest -n "$processes" --dist loadfile "$@"
