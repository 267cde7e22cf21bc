#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs a compiler: `keep_log.sh nvcc … -o FILE …`. What it says goes to FILE.log, registers and spills
# of each kernel among it, where scripts/kernel_resources.py finds them; and to stderr if it fails.
set -uo pipefail

log=/dev/null
for ((i = 1; i < $#; i++)); do
  [[ ${!i} != -o ]] || { j=$((i + 1)) && log=${!j}.log; }
done
"$@" >"$log" 2>&1 || { code=$? && cat "$log" >&2 && exit "$code"; }
