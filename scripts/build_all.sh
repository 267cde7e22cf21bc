#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
set -euo pipefail

if [[ $# -gt 0 ]]; then
  cat <<'USAGE'
Usage: scripts/build_all.sh

Builds the CUDA kernels anew, for all GPUs that they are meant for, into build/plugins-all, and
writes registers, shared memory and occupancy of each to docs/kernels-resources.md. Takes minutes.
Fails if a kernel spills registers on any of them; the table is written all the same.
USAGE
  [[ $1 == -h || $1 == --help ]] && exit
  exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/nvcc.sh
find_nvcc
folder=build/plugins-all
rm -rf "$folder"
started=$SECONDS
code=0
# shellcheck disable=SC2046  # a word each
scripts/build_kernels.sh -o "$folder" $(python scripts/kernel_resources.py sms) || code=$?
built="$("$CUDACXX" --version | sed -n 's/.*release .*V/nvcc /p'),"
built+=" $((SECONDS - started)) s on $(nproc) cores"
python scripts/kernel_resources.py table "$folder" --built "$built" >"$folder/table.md"
mv "$folder/table.md" docs/kernels-resources.md
echo "wrote docs/kernels-resources.md"
exit "$code"
