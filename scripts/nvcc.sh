# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Sourced by the scripts that build kernels, from the repository's root, where .venv may be missing.

python() { if [[ -x .venv/bin/python ]]; then .venv/bin/python "$@"; else python3 "$@"; fi; }

# Sets and exports CUDACXX, the path of nvcc. Installs PyPI's wheels into .venv if there is none.
find_nvcc() {
  local look='from fastmqa_export.plugins import find_nvcc; print(find_nvcc())'
  if ! CUDACXX=$(PYTHONPATH=. python -c "$look" 2>/dev/null); then
    install_tools "cuda-toolkit[nvcc,cudart,cccl]"
    CUDACXX=$(PYTHONPATH=. python -c "$look")
  fi
  export CUDACXX
}

# Installs packages of constraints.txt into .venv.
install_tools() {
  if [[ ! -x .venv/bin/python ]]; then
    echo "there is no .venv to install $* into: make it with scripts/test.sh, or install them" >&2
    exit 3
  fi
  echo "installing $* into .venv" >&2
  .venv/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt "$@"
}
